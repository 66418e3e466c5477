//! Drives a [`ReplicaService`]: its listeners, its connections and its store, on one thread and one ring.
//!
//! Invariants:
//! * A peer that sends garbage, nothing, too much, or reads nothing, loses its own connection; nobody else notices.
//! * What one peer can make this process hold is bounded: frames are received only while the service may take them and less
//!   than [`OUTGOING_MAX`] waits to be sent; there are at most [`CONNECTIONS_MAX`] peers.
//! * No wake-up unless something completed: time limits are one-shot timers of the ring, running only while they matter.
//! * At the end every replica is synced after its last operation has completed.

use std::collections::HashMap;
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use carrick_backing_store::{
    BufferPool, ByteLength, Completion, Outcome, ReplicaSpec, ReplicaStore, Scrubbed, StoreError, StoreId, Term, Token, VolumeId,
};
use io_uring::opcode;
use io_uring::types::{Fd, Timespec};

use super::connection::{ConnectionKey, Connections, Event};
use super::control_socket::{Command, Reply};
use super::listeners::ReplicaListeners;
use super::mailbox::Mailbox;
use super::primary::{give_back_heap, ring_unavailable};
use super::reactor::{Completed, Reactor, Source};
use super::scrubber::Scrubber;
use super::socket;
use crate::control::{ReplicaAnswer, ReplicaRequest};
use crate::endpoint::Endpoint;
use crate::replica::{ConnectionId, ReplicaService, ServiceAction};
use crate::wire::{Body, ErrorBody, ErrorCode, Frame, Header, Kind};

/// Most peers at once. A primary has one connection per volume; a store with more volumes than this is not planned for.
const CONNECTIONS_MAX: usize = 64;
/// Most connections altogether: those of peers that were refused or are being finished count, too.
const SLOTS_MAX: usize = CONNECTIONS_MAX + 32;
/// Nothing is received from a peer while more than this waits to be sent to it, in bytes.
const OUTGOING_MAX: usize = 8 << 20;
/// Free buffer memory that is kept while there is load, in bytes.
const POOL_KEEP: usize = 32 << 20;
/// A new connection must say something sensible within this time.
static GREETING_LIMIT: Timespec = Timespec::new().sec(10);
/// A peer that has [`OUTGOING_MAX`] waiting and takes nothing for so long is cut off.
static STALL_LIMIT: Timespec = Timespec::new().sec(10);
/// So long no connection is accepted after the system had no descriptor or memory for one.
static ACCEPT_PAUSE: Timespec = Timespec::new().sec(1);
/// After so long without data moving, memory that only load needs is given back.
const IDLE: Duration = Duration::from_secs(2);
/// Repeated complaints are logged once in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// That a volume finds no room is logged once in this time.
const NO_SPACE_LOG_INTERVAL: Duration = Duration::from_secs(3600);
/// The token of the scrub's operations. The service counts its own up from 1.
const SCRUB: Token = Token(u64::MAX);

/// Tokens of [`Source::Mailbox`].
const MAILBOX: u64 = 0;
pub(super) const STORE: u64 = 1;
/// Tokens of [`Source::FrontEnd`]: a listener's index, or this plus its index for the pause of a listener.
pub(super) const PAUSE: u64 = 16;

/// Why a replica process can't serve, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An address can't be listened on.
    #[error("can't listen on {endpoint}: {source}")]
    Listen {
        /// Where.
        endpoint: Endpoint,
        /// Why not.
        source: io::Error,
    },
    /// Data would cross the network unprotected.
    #[error(
        "{0} can be reached from other hosts, and there is no TLS yet: data would cross the network in the clear; give --insecure to accept that"
    )]
    Insecure(SocketAddr),
    /// No ring to be had.
    #[error("{}", ring_unavailable(.0))]
    Ring(#[source] io::Error),
    /// The ring failed.
    #[error("the ring failed: {0}")]
    Io(#[from] io::Error),
    /// Not everything is on stable media.
    #[error("volume {volume} could not be put on stable media at the end: {source}")]
    Sync {
        /// Whose replica.
        volume: VolumeId,
        /// Why not.
        source: StoreError,
    },
}

/// What the driver knows of a peer.
#[derive(Debug, Default)]
pub(super) struct Peer {
    /// It has sent a frame.
    greeted: bool,
    /// Nothing is received from it now.
    paused: bool,
    /// Because it doesn't read, with the timer running.
    stalled: bool,
    /// It has read something since the timer started.
    reads: bool,
}

/// One store's replicas, served.
pub struct Server<S: ReplicaStore> {
    pub(super) store: S,
    pub(super) store_id: StoreId,
    pub(super) service: ReplicaService,
    pub(super) listeners: ReplicaListeners,
    pub(super) path: PathBuf,
    /// Replicas that go as soon as the store has finished with them.
    pub(super) deleting: Vec<(VolumeId, Reply<ReplicaAnswer>)>,
    /// Replicas that are being made larger, by a number of each request.
    pub(super) expanding: Vec<(u64, ReplicaSpec, Reply<ReplicaAnswer>)>,
    /// The last of these numbers.
    pub(super) expansions: u64,
    /// Replicas that the store failed to delete.
    pub(super) half_deleted: Vec<VolumeId>,
    mailbox: Mailbox<Command<ReplicaRequest, ReplicaAnswer>>,
    pub(super) reactor: Reactor,
    pub(super) connections: Connections,
    pool: BufferPool,
    pub(super) peers: HashMap<ConnectionKey, Peer>,
    /// How many peers are paused.
    paused: usize,
    /// Operations submitted to the store and not completed.
    pub(super) in_store: usize,
    completions: Vec<Completion>,
    /// The store's descriptor became readable since the last reap, or it was changed without being reaped.
    pub(super) store_woke: bool,
    pub(super) scrubber: Scrubber,
    /// Data has moved since `busy_at` was set.
    busy: bool,
    busy_at: Option<Instant>,
    refusal_logged: Option<Instant>,
    failure_logged: Option<Instant>,
    no_space_logged: HashMap<VolumeId, Instant>,
    garbage_logged: Option<Instant>,
    cut_off_logged: Option<Instant>,
    /// Who asked for the end.
    stopping: Option<Vec<Reply<ReplicaAnswer>>>,
}

impl<S: ReplicaStore> Server<S> {
    /// Serves `store`, which is at `path`, and scrubs it at this rate, in bytes per second (zero: not at all). Make it on the
    /// thread that will run it.
    ///
    /// # Errors
    /// [`ServerError::Ring`].
    pub fn new(
        store: S,
        path: PathBuf,
        listeners: ReplicaListeners,
        mailbox: Mailbox<Command<ReplicaRequest, ReplicaAnswer>>,
        scrub_rate: ByteLength,
    ) -> Result<Self, ServerError> {
        let reactor = Reactor::new().map_err(ServerError::Ring)?;
        let pool = BufferPool::new(POOL_KEEP);
        let store_id = store.id();
        let service = ReplicaService::new(store_id, store.replicas());
        Ok(Self {
            store,
            store_id,
            service,
            listeners,
            path,
            deleting: Vec::new(),
            expanding: Vec::new(),
            expansions: 0,
            half_deleted: Vec::new(),
            mailbox,
            reactor,
            connections: Connections::new(pool.clone()),
            pool,
            peers: HashMap::new(),
            paused: 0,
            in_store: 0,
            completions: Vec::new(),
            // It may have work of its own to go on with.
            store_woke: true,
            scrubber: Scrubber::new(scrub_rate, Instant::now()),
            busy: false,
            busy_at: None,
            refusal_logged: None,
            failure_logged: None,
            no_space_logged: HashMap::new(),
            garbage_logged: None,
            cut_off_logged: None,
            stopping: None,
        })
    }

    /// Serves until somebody asks for the end, then puts everything on stable media. Gives the store back, and who waits for
    /// the news that it is closed.
    ///
    /// # Errors
    /// [`ServerError::Io`], [`ServerError::Sync`].
    pub fn run(mut self) -> Result<(S, Vec<Reply<ReplicaAnswer>>), ServerError> {
        self.mailbox.arm(&mut self.reactor, MAILBOX)?;
        self.arm_store()?;
        for index in 0..self.listeners.count() {
            self.arm_accept(index)?;
        }
        let mut completed = Vec::new();
        while self.stopping.is_none() {
            self.settle()?;
            self.connections.flush(&mut self.reactor)?;
            let timeout = self.timeout();
            self.reactor.wait(timeout, &mut completed)?;
            self.rest()?;
            for completed in completed.drain(..) {
                self.on_completed(completed)?;
            }
        }
        self.stop(&mut completed)?;
        Ok((self.store, self.stopping.unwrap_or_default()))
    }

    fn timeout(&mut self) -> Option<Duration> {
        let now = Instant::now();
        if mem::take(&mut self.busy) {
            self.busy_at = Some(now);
        }
        let rest = self.busy_at.map(|at| at + IDLE);
        let first = [rest, self.scrubber.due()].into_iter().flatten().min();
        first.map(|at| at.saturating_duration_since(now))
    }

    /// Gives memory back once when load has ended.
    fn rest(&mut self) -> io::Result<()> {
        if self.busy_at.is_some_and(|at| at.elapsed() >= IDLE) {
            self.busy_at = None;
            self.connections.shrink(&mut self.reactor)?;
            self.pool.trim();
            give_back_heap();
        }
        Ok(())
    }

    fn on_completed(&mut self, completed: Completed) -> io::Result<()> {
        match (completed.source, completed.token) {
            (Some(Source::Connection), _) => {
                if let Some((key, event)) = self.connections.on_completed(&mut self.reactor, &completed)? {
                    self.on_connection(key, event)?;
                }
            }
            (Some(Source::Mailbox), MAILBOX) => {
                let commands: Vec<_> = self.mailbox.take().collect();
                self.mailbox.arm(&mut self.reactor, MAILBOX)?;
                commands.into_iter().for_each(|command| self.on_command(command));
            }
            (Some(Source::Mailbox), STORE) => {
                // Reaped first, or the poll would find it readable still.
                self.store_woke = true;
                self.reap();
                self.arm_store()?;
            }
            (Some(Source::FrontEnd), token @ PAUSE..) => self.arm_accept(usize::try_from(token - PAUSE).unwrap_or(0))?,
            (Some(Source::FrontEnd), token) => self.on_accept(usize::try_from(token).unwrap_or(0), &completed)?,
            (source, token) => tracing::error!(?source, token, "a completion that nobody asked for"),
        }
        Ok(())
    }

    fn on_command(&mut self, command: Command<ReplicaRequest, ReplicaAnswer>) {
        if let ReplicaRequest::Shutdown = command.request {
            self.stopping.get_or_insert_default().push(command.reply);
        } else {
            self.on_control(command);
        }
    }

    pub(super) fn arm_store(&mut self) -> io::Result<()> {
        let Some(fd) = self.store.wake_fd() else { return Ok(()) };
        // Once and re-armed: an edge that is missed can't be missed for ever.
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), u32::from(libc::POLLIN.cast_unsigned()));
        // SAFETY: a poll points to no memory, and holds the file by itself.
        unsafe { self.reactor.push(&entry.build().user_data(Source::Mailbox.user_data(STORE))) }
    }

    fn arm_accept(&mut self, index: usize) -> io::Result<()> {
        let Some(listener) = self.listeners.get(index) else { return Ok(()) };
        let entry = opcode::AcceptMulti::new(Fd(listener.as_raw_fd())).flags(libc::SOCK_CLOEXEC);
        // SAFETY: an accept without addresses points to no memory.
        unsafe { self.reactor.push(&entry.build().user_data(Source::FrontEnd.user_data(index as u64))) }
    }

    fn on_accept(&mut self, index: usize, completed: &Completed) -> io::Result<()> {
        if completed.result >= 0 {
            // SAFETY: the kernel has just made this descriptor for us.
            let accepted = unsafe { OwnedFd::from_raw_fd(completed.result) };
            self.welcome(index, accepted)?;
        } else if matches!(-completed.result, libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) {
            let error = io::Error::from_raw_os_error(-completed.result);
            tracing::warn!(store = %self.store_id, %error, "can't accept a connection; trying again in a second");
            let entry = opcode::Timeout::new(&raw const ACCEPT_PAUSE);
            let token = Source::FrontEnd.user_data(PAUSE + index as u64);
            // SAFETY: the time is static.
            return unsafe { self.reactor.push(&entry.build().user_data(token)) };
        }
        if completed.more { Ok(()) } else { self.arm_accept(index) }
    }

    fn welcome(&mut self, index: usize, socket: OwnedFd) -> io::Result<()> {
        let is_tcp = index > 0;
        if self.connections.in_use() >= SLOTS_MAX || is_tcp && socket::tune(&socket).is_err() {
            return Ok(());
        }
        let key = self.connections.adopt(socket)?;
        if self.peers.len() >= CONNECTIONS_MAX {
            if may_log(&mut self.refusal_logged) {
                tracing::warn!(store = %self.store_id, limit = CONNECTIONS_MAX, "too many connections: a new one was refused");
            }
            let text = format!("this replica process has {CONNECTIONS_MAX} connections, which is its limit");
            let header = Header::new(Kind::Error, VolumeId::from_bytes([0; 16]), Term::ZERO);
            self.connections.send(key, Frame::new(header, Body::Error(ErrorBody { code: ErrorCode::Busy, text })));
            return self.connections.finish(&mut self.reactor, key);
        }
        self.peers.insert(key, Peer::default());
        self.connections.set_timer(&mut self.reactor, key, &GREETING_LIMIT)?;
        self.connections.receive(&mut self.reactor, key)?;
        tracing::debug!(store = %self.store_id, connection = key.get(), "connected");
        self.service.on_connected(ConnectionId(key.get()));
        Ok(())
    }

    fn on_connection(&mut self, key: ConnectionKey, event: Event) -> io::Result<()> {
        let Some(peer) = self.peers.get_mut(&key) else { return Ok(()) };
        match event {
            Event::Received => return self.deliver(key),
            // Paused peers are looked at again when everything has settled.
            Event::Sent => peer.reads = true,
            Event::Connected => {}
            Event::TimerExpired if !peer.greeted => return self.cut_off(key, "it said nothing"),
            Event::TimerExpired => return self.on_stalled(key),
            Event::Ended(reason) => {
                tracing::debug!(store = %self.store_id, connection = key.get(), %reason, "disconnected");
                self.forget(key);
            }
        }
        Ok(())
    }

    /// The time for reading something has run out.
    fn on_stalled(&mut self, key: ConnectionKey) -> io::Result<()> {
        let has_much_to_read = self.connections.queued_bytes(key) > OUTGOING_MAX;
        let Some(peer) = self.peers.get_mut(&key) else { return Ok(()) };
        if !has_much_to_read {
            // It has read; what it is paused for now is the store.
            peer.stalled = false;
        } else if mem::take(&mut peer.reads) {
            self.connections.set_timer(&mut self.reactor, key, &STALL_LIMIT)?;
        } else {
            self.cut_off(key, "it doesn't read")?;
        }
        Ok(())
    }

    fn cut_off(&mut self, key: ConnectionKey, reason: &str) -> io::Result<()> {
        if may_log(&mut self.cut_off_logged) {
            tracing::warn!(store = %self.store_id, connection = key.get(), reason, "connection closed");
        }
        self.connections.close(&mut self.reactor, key)?;
        self.forget(key);
        Ok(())
    }

    /// The connection is gone: tells the service.
    pub(super) fn forget(&mut self, key: ConnectionKey) {
        self.drop_peer(key);
        self.service.on_disconnected(ConnectionId(key.get()));
    }

    fn drop_peer(&mut self, key: ConnectionKey) {
        if self.peers.remove(&key).is_some_and(|peer| peer.paused) {
            self.paused -= 1;
        }
    }

    fn may_receive(&self, key: ConnectionKey) -> bool {
        self.connections.queued_bytes(key) <= OUTGOING_MAX && self.service.may_receive(ConnectionId(key.get()))
    }

    /// Hands the service what has come from a peer, as long as it may take more, and receives again. What the service wants
    /// done waits for the end of the batch, so that many frames are acknowledged with one.
    fn deliver(&mut self, key: ConnectionKey) -> io::Result<()> {
        while self.peers.contains_key(&key) {
            if !self.may_receive(key) {
                return self.pause(key);
            }
            match self.connections.next_frame(key) {
                Ok(Some(frame)) => {
                    if self.peers.get_mut(&key).is_some_and(|peer| !mem::replace(&mut peer.greeted, true)) {
                        self.connections.clear_timer(&mut self.reactor, key)?;
                    }
                    self.busy |= frame.payload().is_some();
                    self.service.on_frame(ConnectionId(key.get()), frame);
                }
                Ok(None) => return self.connections.receive(&mut self.reactor, key),
                Err(error) => {
                    if may_log(&mut self.garbage_logged) {
                        tracing::warn!(store = %self.store_id, connection = key.get(), %error, "not a frame");
                    }
                    self.service.on_wire_error(ConnectionId(key.get()), error);
                    self.act()?;
                    self.drop_peer(key);
                    return self.connections.finish(&mut self.reactor, key);
                }
            }
        }
        Ok(())
    }

    fn pause(&mut self, key: ConnectionKey) -> io::Result<()> {
        let reads_too_little = self.connections.queued_bytes(key) > OUTGOING_MAX;
        let Some(peer) = self.peers.get_mut(&key) else { return Ok(()) };
        if !mem::replace(&mut peer.paused, true) {
            self.paused += 1;
        }
        if reads_too_little && !mem::replace(&mut peer.stalled, true) {
            peer.reads = false;
            self.connections.set_timer(&mut self.reactor, key, &STALL_LIMIT)?;
        }
        Ok(())
    }

    /// Receives again from paused peers that may go on.
    fn resume(&mut self) -> io::Result<()> {
        if self.paused == 0 {
            return Ok(());
        }
        let keys: Vec<_> = self.peers.iter().filter(|(_, peer)| peer.paused).map(|(key, _)| *key).collect();
        for key in keys {
            if !self.may_receive(key) {
                self.pause(key)?;
                continue;
            }
            let Some(peer) = self.peers.get_mut(&key) else { continue };
            peer.paused = false;
            self.paused -= 1;
            if mem::take(&mut peer.stalled) {
                self.connections.clear_timer(&mut self.reactor, key)?;
            }
            self.deliver(key)?;
        }
        Ok(())
    }

    /// Carries everything on until nothing moves: what peers sent is bounded by what was received, so this ends.
    fn settle(&mut self) -> io::Result<()> {
        self.scrub();
        loop {
            self.finish_deletions();
            self.resume()?;
            self.act()?;
            if !self.reap() {
                return Ok(());
            }
        }
    }

    /// Carries out what the service wants.
    pub(super) fn act(&mut self) -> io::Result<()> {
        while let Some(action) = self.service.next_action() {
            match action {
                ServiceAction::Send(ConnectionId(id), frame) => {
                    self.busy |= frame.payload().is_some();
                    log_promise(self.store_id, &frame);
                    self.connections.send(ConnectionKey::from_raw(id), frame);
                }
                ServiceAction::Close(ConnectionId(id)) => {
                    let key = ConnectionKey::from_raw(id);
                    self.connections.finish(&mut self.reactor, key)?;
                    self.forget(key);
                }
                ServiceAction::Store(volume, token, operation) => {
                    self.in_store += 1;
                    self.store.submit(volume, token, operation);
                }
                ServiceAction::Expanded(number, result) => self.on_expanded(number, result),
            }
        }
        Ok(())
    }

    /// Tells the service what the store has finished. Whether there was anything.
    pub(super) fn reap(&mut self) -> bool {
        if self.in_store == 0 && !self.store_woke {
            return false;
        }
        self.store_woke = false;
        let mut completions = mem::take(&mut self.completions);
        self.store.reap(&mut completions);
        let any = !completions.is_empty();
        for completion in completions.drain(..) {
            self.in_store -= 1;
            if completion.token == SCRUB {
                self.on_scrubbed(completion);
                continue;
            }
            self.log_failure(&completion);
            self.service.on_completion(completion);
        }
        self.completions = completions;
        any
    }

    fn log_failure(&mut self, completion: &Completion) {
        let (store, volume) = (self.store_id, completion.volume);
        match &completion.result {
            Ok(_) => {}
            // The primary tries again and again: once an hour tells as much.
            Err(error @ StoreError::NoSpace { .. }) => {
                let logged = self.no_space_logged.get(&volume);
                if logged.is_none_or(|at| at.elapsed() >= NO_SPACE_LOG_INTERVAL) {
                    self.no_space_logged.insert(volume, Instant::now());
                    tracing::error!(%store, %volume, %error, "a write finds no room; it is tried again");
                }
            }
            Err(error) if may_log(&mut self.failure_logged) => tracing::error!(%store, %volume, %error, "the store failed an operation"),
            Err(_) => {}
        }
    }

    /// Reads the next piece of the scrub, if it is time.
    fn scrub(&mut self) {
        let store = &self.store;
        let volumes = || store.replicas().iter().map(|replica| replica.spec.volume).collect();
        if let Some((volume, operation)) = self.scrubber.next(Instant::now(), self.in_store > 0, volumes) {
            self.in_store += 1;
            self.store.submit(volume, SCRUB, operation);
        }
    }

    fn on_scrubbed(&mut self, completion: Completion) {
        let (store, volume) = (self.store_id, completion.volume);
        let result = completion.result.map(|outcome| match outcome {
            Outcome::Scrubbed(scrubbed) => scrubbed,
            _ => Scrubbed { verified: 0, bad: Vec::new(), next: None },
        });
        if let Err(error) = &result
            && !matches!(error, StoreError::UnknownVolume(_))
        {
            tracing::error!(%store, %volume, %error, "the scrub can't read a volume");
        }
        for block in self.scrubber.on_read(Instant::now(), &result) {
            tracing::error!(%store, %volume, %block, "the scrub found a damaged block; it is replaced when it is read");
        }
    }
}

/// A promise is rare, and what people look for after a takeover.
fn log_promise(store: StoreId, frame: &Frame) {
    if frame.header.kind == Kind::PromiseAnswer {
        tracing::info!(%store, volume = %frame.header.volume, term = %frame.header.term, "promised");
    }
}

/// Whether a complaint may be logged again.
fn may_log(last: &mut Option<Instant>) -> bool {
    let may = last.is_none_or(|at| at.elapsed() >= LOG_INTERVAL);
    if may {
        *last = Some(Instant::now());
    }
    may
}
