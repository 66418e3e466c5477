//! Framed connections on the ring: TCP or Unix stream sockets, many frames per system call.
//!
//! Invariants:
//! * **Memory:** what the kernel may read or write belongs to a slot of [`Connections`] and stays there, at one place, until
//!   the completion of that operation has come, even if the connection was closed long before.
//! * **Identity:** a [`ConnectionKey`] is never used twice. It is in the token of every operation, so that a late completion
//!   of an old connection is never taken for one of its successor in the slot.
//! * **Order:** per connection there is at most one receive and one send in flight.
//! * After [`Event::Ended`], or after the owner closed it, a connection yields no event and no frame.
//!
//! It knows no meaning of frames, and no clock: the one timer per connection is the ring's.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};

use carrick_backing_store::BufferPool;
use io_uring::types::{Fd, Timespec};
use io_uring::{opcode, squeue};
use rustix::net::{Shutdown, SocketAddrAny};

use super::reactor::{Completed, Reactor, Source};
use super::receive::Inbox;
use super::send::Outbox;
use super::socket;
use crate::endpoint::Endpoint;
use crate::wire::{Frame, WireError};

/// For so long a connection that is being finished waits for its peer to read what was sent and to close.
static LINGER: Timespec = Timespec::new().sec(2);

/// Names a connection for as long as the process runs: the slot in the lower bits, a serial number above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionKey(u64);

impl ConnectionKey {
    const SLOT_BITS: u32 = 12;
    /// Most slots.
    const SLOTS_MAX: usize = 1 << Self::SLOT_BITS;
    /// A trillion connections: one per millisecond for 34 years.
    const SERIAL_BITS: u32 = 40;

    const fn new(slot: usize, serial: u64) -> Self {
        Self(serial << Self::SLOT_BITS | slot as u64)
    }

    const fn slot(self) -> usize {
        (self.0 & (Self::SLOTS_MAX as u64 - 1)) as usize
    }

    /// As a number, for who numbers connections.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// From [`ConnectionKey::get`].
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
}

/// What an operation of a connection is: the upper 4 bits of the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Connect,
    Receive,
    Send,
    Timer,
    Cancel,
}

impl Step {
    const SHIFT: u32 = ConnectionKey::SLOT_BITS + ConnectionKey::SERIAL_BITS;

    const fn token(self, key: ConnectionKey) -> u64 {
        (self as u64) << Self::SHIFT | key.0
    }

    const fn of(token: u64) -> Option<(Self, ConnectionKey)> {
        let step = match token >> Self::SHIFT {
            0 => Self::Connect,
            1 => Self::Receive,
            2 => Self::Send,
            3 => Self::Timer,
            4 => Self::Cancel,
            _ => return None,
        };
        Some((step, ConnectionKey(token & ((1 << Self::SHIFT) - 1))))
    }
}

const _: () = assert!(Step::SHIFT + 4 <= 56, "a token has 56 bits");

/// What happened to a connection.
#[derive(Debug)]
pub enum Event {
    /// It is open: frames may be sent, and [`Connections::receive`] called.
    Connected,
    /// Bytes came: take frames until there is none, then call [`Connections::receive`] again.
    Received,
    /// Bytes were sent: less is queued.
    Sent,
    /// The timer ran out.
    TimerExpired,
    /// It could not be opened, or is gone.
    Ended(EndReason),
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum EndReason {
    /// It never opened.
    #[error("can't connect: {0}")]
    Connect(io::Error),
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed it before a frame was complete.
    #[error("the peer closed the connection in the middle of a frame")]
    ClosedAmidFrame,
    /// The system says.
    #[error("the connection broke: {0}")]
    Broken(io::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Open,
    /// Over for the owner; what is queued is still being sent, then the peer is given time to read it.
    Finishing,
    /// Over; the memory waits for the completions of what is in flight.
    Closing,
}

struct Connection {
    key: ConnectionKey,
    phase: Phase,
    socket: OwnedFd,
    inbox: Inbox,
    outbox: Outbox,
    /// The address while connecting.
    address: Option<Box<SocketAddrAny>>,
    connecting: bool,
    receiving: bool,
    sending: bool,
    /// Whether it is in the list of those with something to send.
    listed: bool,
    /// The running timer.
    timer: Option<u64>,
    /// Why nothing can be sent any more; what the peer sent before is still received.
    send_error: Option<io::Error>,
}

impl Connection {
    const fn is_in_flight(&self) -> bool {
        self.connecting || self.receiving || self.sending
    }
}

/// All connections of one thread.
pub struct Connections {
    pool: BufferPool,
    /// Boxed, since the kernel holds pointers into them while the vector grows.
    slots: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    next_serial: u64,
    /// Those that may have something to send.
    to_send: Vec<ConnectionKey>,
}

impl Connections {
    /// None yet. Data of received frames comes from `pool`.
    #[must_use]
    pub fn new(pool: BufferPool) -> Self {
        Self { pool, slots: Vec::new(), free: Vec::new(), next_serial: 0, to_send: Vec::new() }
    }

    /// Takes over a connected socket. Call [`Connections::receive`] to begin.
    ///
    /// # Errors
    /// When there are thousands already.
    pub fn adopt(&mut self, socket: OwnedFd) -> io::Result<ConnectionKey> {
        self.insert(socket, Phase::Open)
    }

    /// Begins to connect. It ends with [`Event::Connected`] or [`Event::Ended`].
    ///
    /// # Errors
    /// When not even an attempt can be made.
    pub fn connect(&mut self, reactor: &mut Reactor, endpoint: &Endpoint) -> io::Result<ConnectionKey> {
        let (socket, address) = socket::for_connecting(endpoint)?;
        let key = self.insert(socket, Phase::Connecting)?;
        if let Some(connection) = self.get_mut(key) {
            let address = connection.address.insert(Box::new(address));
            let entry = opcode::Connect::new(Fd(connection.socket.as_raw_fd()), address.as_ptr().cast(), address.addr_len());
            connection.connecting = true;
            push(reactor, entry.build(), Step::Connect.token(key))?;
        }
        Ok(key)
    }

    fn insert(&mut self, socket: OwnedFd, phase: Phase) -> io::Result<ConnectionKey> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < ConnectionKey::SLOTS_MAX => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return Err(io::Error::other("too many connections are being closed")),
        };
        let key = ConnectionKey::new(slot, self.serial());
        self.slots[slot] = Some(Box::new(Connection {
            key,
            phase,
            socket,
            inbox: Inbox::new(self.pool.clone()),
            outbox: Outbox::new(),
            address: None,
            connecting: false,
            receiving: false,
            sending: false,
            listed: false,
            timer: None,
            send_error: None,
        }));
        Ok(key)
    }

    fn serial(&mut self) -> u64 {
        self.next_serial += 1;
        assert!(self.next_serial < 1 << ConnectionKey::SERIAL_BITS, "serial numbers are used up");
        self.next_serial
    }

    fn get(&self, key: ConnectionKey) -> Option<&Connection> {
        self.slots.get(key.slot())?.as_deref().filter(|connection| connection.key == key)
    }

    fn get_mut(&mut self, key: ConnectionKey) -> Option<&mut Connection> {
        self.slots.get_mut(key.slot())?.as_deref_mut().filter(|connection| connection.key == key)
    }

    fn open(&mut self, key: ConnectionKey) -> Option<&mut Connection> {
        self.get_mut(key).filter(|connection| connection.phase == Phase::Open)
    }

    /// The next frame that came on it.
    ///
    /// # Errors
    /// What came is no frame. Nothing more will come; say so to the peer and finish.
    pub fn next_frame(&mut self, key: ConnectionKey) -> Result<Option<Frame>, WireError> {
        self.open(key).map_or(Ok(None), |connection| connection.inbox.next_frame())
    }

    /// Lets the connection receive, until the next [`Event::Received`]. Call it when [`Connections::next_frame`] has no more.
    ///
    /// # Errors
    /// The ring's.
    pub fn receive(&mut self, reactor: &mut Reactor, key: ConnectionKey) -> io::Result<()> {
        match self.get_mut(key) {
            Some(connection) if connection.phase == Phase::Open && !connection.receiving => arm_receive(reactor, connection),
            _ => Ok(()),
        }
    }

    /// Queues a frame; [`Connections::flush`] sends it.
    pub fn send(&mut self, key: ConnectionKey, frame: Frame) {
        let Some(connection) = self.open(key) else { return };
        if connection.send_error.is_some() {
            return;
        }
        connection.outbox.push(frame);
        if !mem::replace(&mut connection.listed, true) {
            self.to_send.push(key);
        }
    }

    /// Bytes queued and not yet taken by the kernel.
    #[must_use]
    pub fn queued_bytes(&self, key: ConnectionKey) -> usize {
        self.get(key).map_or(0, |connection| connection.outbox.bytes())
    }

    /// Starts sending whatever is queued anywhere.
    ///
    /// # Errors
    /// The ring's.
    pub fn flush(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        while let Some(key) = self.to_send.pop() {
            let Some(connection) = self.get_mut(key) else { continue };
            connection.listed = false;
            if connection.sending || !matches!(connection.phase, Phase::Open | Phase::Finishing) {
                continue;
            }
            if let Some(message) = connection.outbox.message() {
                // Without WAITALL the kernel would stop, and wake this thread, whenever the socket's buffer is full.
                let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
                let entry = opcode::SendMsg::new(Fd(connection.socket.as_raw_fd()), message).flags(flags.cast_unsigned());
                connection.sending = true;
                push(reactor, entry.build(), Step::Send.token(key))?;
            } else if connection.phase == Phase::Finishing {
                // A failure means that the peer is gone, which the receive in flight reports.
                let _ = rustix::net::shutdown(&connection.socket, Shutdown::Write);
            }
        }
        Ok(())
    }

    /// Starts the connection's timer, instead of a running one.
    ///
    /// # Errors
    /// The ring's.
    pub fn set_timer(&mut self, reactor: &mut Reactor, key: ConnectionKey, after: &'static Timespec) -> io::Result<()> {
        self.clear_timer(reactor, key)?;
        let serial = self.serial();
        let Some(connection) = self.get_mut(key) else { return Ok(()) };
        connection.timer = Some(serial);
        // A timer has a serial number of its own, so that one that was replaced in its last moment isn't taken for the new one.
        push(reactor, opcode::Timeout::new(after).build(), Step::Timer.token(ConnectionKey::new(key.slot(), serial)))
    }

    /// Stops the connection's timer.
    ///
    /// # Errors
    /// The ring's.
    pub fn clear_timer(&mut self, reactor: &mut Reactor, key: ConnectionKey) -> io::Result<()> {
        let Some(serial) = self.get_mut(key).and_then(|connection| connection.timer.take()) else { return Ok(()) };
        let timer = Source::Connection.user_data(Step::Timer.token(ConnectionKey::new(key.slot(), serial)));
        push(reactor, opcode::TimeoutRemove::new(timer).build(), Step::Cancel.token(key))
    }

    /// Ends the connection now, with all that is queued.
    ///
    /// # Errors
    /// The ring's.
    pub fn close(&mut self, reactor: &mut Reactor, key: ConnectionKey) -> io::Result<()> {
        self.clear_timer(reactor, key)?;
        let Some(connection) = self.get_mut(key) else { return Ok(()) };
        if connection.phase != Phase::Closing {
            connection.phase = Phase::Closing;
            let _ = rustix::net::shutdown(&connection.socket, Shutdown::Both);
            // The shutdown ends receives and sends; an attempt to connect needs the cancellation.
            let flights = [(connection.connecting, Step::Connect), (connection.receiving, Step::Receive), (connection.sending, Step::Send)];
            for (_, step) in flights.into_iter().filter(|(in_flight, _)| *in_flight) {
                let cancel = opcode::AsyncCancel::new(Source::Connection.user_data(step.token(key)));
                push(reactor, cancel.build(), Step::Cancel.token(key))?;
            }
        }
        self.release(key);
        Ok(())
    }

    /// Ends the connection for its owner; what is queued is still sent, and read by the peer if it does so soon. Closing at
    /// once could make the peer's kernel throw away what the peer has not read yet.
    ///
    /// # Errors
    /// The ring's.
    pub fn finish(&mut self, reactor: &mut Reactor, key: ConnectionKey) -> io::Result<()> {
        let Some(connection) = self.get_mut(key) else { return Ok(()) };
        match connection.phase {
            Phase::Finishing | Phase::Closing => return Ok(()),
            Phase::Open if connection.send_error.is_none() => {}
            Phase::Open | Phase::Connecting => return self.close(reactor, key),
        }
        connection.phase = Phase::Finishing;
        if !connection.receiving {
            connection.inbox.discard();
            arm_receive(reactor, connection)?;
        }
        if !mem::replace(&mut connection.listed, true) {
            self.to_send.push(key);
        }
        self.set_timer(reactor, key, &LINGER)
    }

    /// Frees the slot if it is closing and nothing is in flight any more.
    fn release(&mut self, key: ConnectionKey) {
        if self.get(key).is_some_and(|connection| connection.phase == Phase::Closing && !connection.is_in_flight()) {
            self.slots[key.slot()] = None;
            self.free.push(key.slot());
        }
    }

    /// Connections that were not closed by their owner.
    #[must_use]
    pub fn is_open(&self, key: ConnectionKey) -> bool {
        self.get(key).is_some_and(|connection| matches!(connection.phase, Phase::Open | Phase::Connecting))
    }

    /// All slots in use, also those of connections that are over and wait for completions.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Closes everything.
    ///
    /// # Errors
    /// The ring's.
    pub fn close_all(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        let keys: Vec<_> = self.slots.iter().flatten().map(|connection| connection.key).collect();
        keys.into_iter().try_for_each(|key| self.close(reactor, key))
    }

    /// Gives memory back that quiet connections don't need: for a thread that has become idle.
    ///
    /// # Errors
    /// The ring's.
    pub fn shrink(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        for connection in self.slots.iter_mut().flatten() {
            if !connection.sending {
                connection.outbox.shrink();
            }
            if connection.phase == Phase::Open && connection.inbox.is_large() {
                if connection.receiving {
                    // Its completion brings a smaller buffer.
                    let cancel = opcode::AsyncCancel::new(Source::Connection.user_data(Step::Receive.token(connection.key)));
                    push(reactor, cancel.build(), Step::Cancel.token(connection.key))?;
                } else {
                    connection.inbox.shrink();
                }
            }
        }
        Ok(())
    }

    /// A completion of [`Source::Connection`]. Says what it means for the owner, if anything.
    ///
    /// # Errors
    /// The ring's.
    pub fn on_completed(&mut self, reactor: &mut Reactor, completed: &Completed) -> io::Result<Option<(ConnectionKey, Event)>> {
        let Some((step, named)) = Step::of(completed.token) else { return Ok(None) };
        if step == Step::Timer {
            return self.on_timer(reactor, named);
        }
        let Some(connection) = self.get_mut(named) else { return Ok(None) };
        let event = match step {
            Step::Connect => on_connect(connection, completed.result),
            Step::Receive => on_receive(reactor, connection, completed.result)?,
            Step::Send => on_send(connection, completed.result),
            Step::Timer | Step::Cancel => return Ok(None),
        };
        if step == Step::Send && matches!(connection.phase, Phase::Open | Phase::Finishing) && !mem::replace(&mut connection.listed, true) {
            self.to_send.push(named);
        }
        match event {
            Some(event @ Event::Ended(_)) => {
                let was_owned = self.is_open(named);
                self.close(reactor, named)?;
                Ok(was_owned.then_some((named, event)))
            }
            event => {
                self.release(named);
                Ok(event.map(|event| (named, event)))
            }
        }
    }

    fn on_timer(&mut self, reactor: &mut Reactor, named: ConnectionKey) -> io::Result<Option<(ConnectionKey, Event)>> {
        let Some(connection) = self.slots.get_mut(named.slot()).and_then(Option::as_deref_mut) else { return Ok(None) };
        if connection.timer.is_none_or(|serial| ConnectionKey::new(named.slot(), serial) != named) {
            return Ok(None);
        }
        connection.timer = None;
        let key = connection.key;
        if connection.phase == Phase::Finishing {
            self.close(reactor, key)?;
            return Ok(None);
        }
        Ok(Some((key, Event::TimerExpired)))
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        for connection in mem::take(&mut self.slots).into_iter().flatten() {
            if connection.is_in_flight() {
                let _ = rustix::net::shutdown(&connection.socket, Shutdown::Both);
                // The kernel may still use this memory, and nobody is left to learn when it no longer does.
                mem::forget(connection);
            }
        }
    }
}

fn arm_receive(reactor: &mut Reactor, connection: &mut Connection) -> io::Result<()> {
    let space = connection.inbox.space();
    let length = u32::try_from(space.length).unwrap_or(u32::MAX);
    let flags = if space.whole { libc::MSG_WAITALL } else { 0 };
    let entry = opcode::Recv::new(Fd(connection.socket.as_raw_fd()), space.start, length).flags(flags);
    connection.receiving = true;
    push(reactor, entry.build(), Step::Receive.token(connection.key))
}

fn on_connect(connection: &mut Connection, result: i32) -> Option<Event> {
    connection.connecting = false;
    connection.address = None;
    if connection.phase != Phase::Connecting {
        return None;
    }
    if result < 0 {
        return Some(Event::Ended(EndReason::Connect(io::Error::from_raw_os_error(-result))));
    }
    connection.phase = Phase::Open;
    Some(Event::Connected)
}

fn on_receive(reactor: &mut Reactor, connection: &mut Connection, result: i32) -> io::Result<Option<Event>> {
    connection.receiving = false;
    if connection.phase == Phase::Closing {
        return Ok(None);
    }
    Ok(match usize::try_from(result) {
        Ok(0) if connection.send_error.is_some() => connection.send_error.take().map(|error| Event::Ended(EndReason::Broken(error))),
        Ok(0) if connection.inbox.is_amid_frame() => Some(Event::Ended(EndReason::ClosedAmidFrame)),
        Ok(0) => Some(Event::Ended(EndReason::Closed)),
        Ok(_) if connection.phase == Phase::Finishing => {
            connection.inbox.discard();
            arm_receive(reactor, connection)?;
            None
        }
        Ok(bytes) => {
            connection.inbox.received(bytes);
            Some(Event::Received)
        }
        // Cancelled by `shrink`, or nothing happened at all.
        Err(_) if matches!(-result, libc::ECANCELED | libc::EINTR | libc::EAGAIN) => {
            connection.inbox.shrink();
            arm_receive(reactor, connection)?;
            None
        }
        Err(_) => Some(Event::Ended(EndReason::Broken(io::Error::from_raw_os_error(-result)))),
    })
}

fn on_send(connection: &mut Connection, result: i32) -> Option<Event> {
    connection.sending = false;
    match usize::try_from(result) {
        Ok(bytes) => {
            connection.outbox.advance(bytes);
            (connection.phase == Phase::Open).then_some(Event::Sent)
        }
        Err(_) if connection.phase == Phase::Closing => None,
        Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => None,
        Err(_) => {
            // What the peer said before it closed (why it refused, most of all) may still be unread: the end comes from the
            // receive, after it.
            connection.send_error = Some(io::Error::from_raw_os_error(-result));
            connection.outbox.clear();
            let _ = rustix::net::shutdown(&connection.socket, Shutdown::Both);
            (connection.phase == Phase::Open).then_some(Event::Sent)
        }
    }
}

fn push(reactor: &mut Reactor, entry: squeue::Entry, token: u64) -> io::Result<()> {
    let entry = entry.user_data(Source::Connection.user_data(token));
    // SAFETY: sockets, buffers, messages and addresses belong to a boxed `Connection` that is dropped, or lets go of them,
    // only when nothing is in flight; `Drop for Connections` leaks those that are. Timespecs are static.
    unsafe { reactor.push(&entry) }
}

#[cfg(test)]
mod tests;
