//! Drives an [`Engine`]: its connections, its clock and its front end, on one thread and one ring.
//!
//! Invariants:
//! * After every event the engine's actions are carried out before the next event reaches it, so that nothing comes from a
//!   connection that the engine has dropped.
//! * One submission per wake-up; no wake-up unless something completed or the engine's deadline has come.
//! * Nothing recurses: requests that responses bring about are collected and submitted in rounds.

use std::io;
use std::mem;
use std::time::{Duration, Instant};

use carrick_backing_store::{BufferPool, Term};

use super::connection::{ConnectionKey, Connections, Event};
use super::front_end::FrontEnd;
use super::reactor::{Completed, Reactor, Source};
use crate::endpoint::Endpoint;
use crate::engine::{Action, ConfigRecord, ConfigRequest, Engine, EngineConfig, MemberIndex, Request, RequestTag};
use crate::time::Monotonic;

/// Rounds of requests and responses before connections get their turn again: a front end whose requests are all answered at
/// once must not keep the replicas' answers waiting for ever.
const ROUNDS_MAX: usize = 64;
/// How long the connections may take to close at the end; what isn't closed by then is left to the kernel.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// After so long without a request, memory that only load needs is given back.
const IDLE: Duration = Duration::from_secs(2);

/// Why a primary ended, or never began.
#[derive(Debug, thiserror::Error)]
pub enum PrimaryError {
    /// Another primary has taken over: this process must end without completing any request.
    #[error("another primary takes over the volume; the latest term is {promised}")]
    Superseded {
        /// Its term, or the one before.
        promised: Term,
    },
    /// Data would cross the network unprotected.
    #[error("{0} is not on this host, and there is no TLS yet: data would cross the network in the clear; give --insecure to accept that")]
    Insecure(Endpoint),
    /// Not one endpoint per member.
    #[error("the volume has {members} replicas, but {endpoints} addresses are given")]
    Endpoints {
        /// Members.
        members: usize,
        /// Addresses.
        endpoints: usize,
    },
    /// No ring to be had.
    #[error("{}", ring_unavailable(.0))]
    Ring(#[source] io::Error),
    /// The ring or the front end failed.
    #[error("the primary's I/O failed: {0}")]
    Io(#[from] io::Error),
}

/// What to do about a ring that can't be made, in one sentence.
#[must_use]
pub fn ring_unavailable(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            format!(
                "io_uring is forbidden here ({error}): run `sysctl kernel.io_uring_disabled=0`, or allow it in the container's seccomp profile"
            )
        }
        Some(libc::ENOSYS) => format!("this kernel has no io_uring ({error}): use a kernel with CONFIG_IO_URING, 6.1 or newer"),
        Some(libc::EINVAL) => format!("this kernel's io_uring is too old ({error}): use Linux 6.1 or newer"),
        Some(libc::ENOMEM) => format!("no memory for an io_uring ({error}): raise `ulimit -l` or free memory"),
        _ => format!("can't make an io_uring: {error}"),
    }
}

struct Member {
    endpoint: Endpoint,
    connection: Option<ConnectionKey>,
}

/// Where the config's record is kept.
enum Records {
    /// Here, by a primary that no other can follow.
    Here(ConfigRecord),
    /// Elsewhere: the answer comes to [`Engine::on_config`] by way of the front end.
    Elsewhere(Box<dyn FnMut(ConfigRequest)>),
}

/// A volume's primary: engine, connections, ring.
pub struct Primary {
    started: Instant,
    engine: Engine,
    records: Records,
    members: Vec<Member>,
    connections: Connections,
    reactor: Reactor,
    pool: BufferPool,
    /// Requests that wait for the end of the current round.
    requests: Vec<(RequestTag, Request)>,
    /// Those of the current round: the two swap, so that neither is allocated anew.
    round: Vec<(RequestTag, Request)>,
    /// Whether data has moved since `busy_at` was set.
    busy: bool,
    /// When data moved last, until the memory it needed is given back.
    busy_at: Option<Monotonic>,
}

impl Primary {
    /// A primary of a volume whose replicas are at these addresses, in the order of the config. Plain TCP to other hosts is
    /// refused unless `insecure` is set. Make it on the thread that will run it.
    ///
    /// # Errors
    /// [`PrimaryError`] says what is wrong.
    pub fn new(config: EngineConfig, endpoints: Vec<Endpoint>, pool: BufferPool, insecure: bool) -> Result<Self, PrimaryError> {
        if endpoints.len() != config.members {
            return Err(PrimaryError::Endpoints { members: config.members, endpoints: endpoints.len() });
        }
        if let Some(remote) = endpoints.iter().find(|endpoint| !insecure && !endpoint.is_local()) {
            return Err(PrimaryError::Insecure(remote.clone()));
        }
        let reactor = Reactor::new().map_err(PrimaryError::Ring)?;
        Ok(Self {
            started: Instant::now(),
            records: Records::Here(ConfigRecord::first(config.members)),
            engine: Engine::new(config, pool.clone(), Monotonic::default()),
            members: endpoints.into_iter().map(|endpoint| Member { endpoint, connection: None }).collect(),
            connections: Connections::new(pool.clone()),
            reactor,
            pool,
            requests: Vec::new(),
            round: Vec::new(),
            busy: false,
            busy_at: None,
        })
    }

    /// Asks a metadata store which replicas count, instead of keeping that in memory. `ask` must not wait; the front end is told the
    /// answer, and passes it to [`Engine::on_config`].
    #[must_use]
    pub fn with_records(mut self, ask: impl FnMut(ConfigRequest) + 'static) -> Self {
        self.records = Records::Elsewhere(Box::new(ask));
        self
    }

    /// The ring, for entries that the front end needs before it runs.
    pub fn reactor(&mut self) -> &mut Reactor {
        &mut self.reactor
    }

    /// The engine, to be asked how it stands.
    #[must_use]
    pub const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Runs until the front end is finished.
    ///
    /// # Errors
    /// [`PrimaryError::Superseded`], or I/O.
    pub fn run(&mut self, front: &mut impl FrontEnd) -> Result<(), PrimaryError> {
        let ended = self.serve(front);
        let closed = self.close();
        ended.and(closed.map_err(PrimaryError::from))
    }

    fn serve(&mut self, front: &mut impl FrontEnd) -> Result<(), PrimaryError> {
        let mut completed = Vec::new();
        front.on_start(&mut self.reactor)?;
        loop {
            let quiet = self.settle(front)?;
            self.connections.flush(&mut self.reactor)?;
            if front.is_finished() {
                return Ok(());
            }
            let timeout = if quiet { self.timeout(front.due()) } else { Some(Duration::ZERO) };
            self.reactor.wait(timeout, &mut completed)?;
            self.on_time(front)?;
            for completed in completed.drain(..) {
                self.on_completed(front, completed)?;
            }
        }
    }

    fn now(&self) -> Monotonic {
        Monotonic::new(self.started.elapsed())
    }

    /// How long nothing is due, here or in the front end.
    fn timeout(&mut self, front: Option<Instant>) -> Option<Duration> {
        let now = self.now();
        if mem::take(&mut self.busy) {
            self.busy_at = Some(now);
        }
        let idle = self.busy_at.map(|at| at + IDLE);
        let front = front.map(|due| Monotonic::new(due.saturating_duration_since(self.started)));
        [self.engine.deadline(), idle, front].into_iter().flatten().min().map(|due| due.since(now))
    }

    fn on_time(&mut self, front: &mut impl FrontEnd) -> Result<(), PrimaryError> {
        let now = self.now();
        if self.engine.deadline().is_some_and(|due| due <= now) {
            self.engine.on_timer(now);
            self.act(front)?;
        }
        if front.due().is_some_and(|due| due <= Instant::now()) {
            front.on_due(&mut self.reactor, &mut self.requests)?;
        }
        if !self.busy && self.busy_at.is_some_and(|at| at + IDLE <= now) {
            self.busy_at = None;
            self.connections.shrink(&mut self.reactor)?;
            self.pool.trim();
            give_back_heap();
        }
        Ok(())
    }

    fn on_completed(&mut self, front: &mut impl FrontEnd, completed: Completed) -> Result<(), PrimaryError> {
        match completed.source {
            Some(Source::Connection) => {
                if let Some((key, event)) = self.connections.on_completed(&mut self.reactor, &completed)? {
                    self.on_connection(front, key, event)?;
                }
            }
            Some(Source::FrontEnd | Source::Mailbox) => {
                front.on_completed(&mut self.reactor, &mut self.engine, completed, &mut self.requests)?;
                self.act(front)?;
            }
            None => tracing::error!(token = completed.token, "a completion that nobody asked for"),
        }
        Ok(())
    }

    fn on_connection(&mut self, front: &mut impl FrontEnd, key: ConnectionKey, event: Event) -> Result<(), PrimaryError> {
        let Some(index) = self.members.iter().position(|member| member.connection == Some(key)) else { return Ok(()) };
        let member = MemberIndex(index);
        match event {
            Event::Connected => {
                self.connections.receive(&mut self.reactor, key)?;
                self.engine.on_connected(self.now(), member);
                self.act(front)?;
            }
            Event::Received => self.on_received(front, key, member)?,
            Event::Sent | Event::TimerExpired => {}
            Event::Ended(reason) => self.on_disconnected(front, member, reason.to_string())?,
        }
        Ok(())
    }

    fn on_received(&mut self, front: &mut impl FrontEnd, key: ConnectionKey, member: MemberIndex) -> Result<(), PrimaryError> {
        let now = self.now();
        loop {
            // Gives nothing once the engine has dropped the connection.
            match self.connections.next_frame(key) {
                Ok(Some(frame)) => {
                    self.engine.on_frame(now, member, frame);
                    self.act(front)?;
                }
                Ok(None) => return Ok(self.connections.receive(&mut self.reactor, key)?),
                Err(error) => {
                    self.connections.close(&mut self.reactor, key)?;
                    return self.on_disconnected(front, member, error.to_string());
                }
            }
        }
    }

    fn on_disconnected(&mut self, front: &mut impl FrontEnd, member: MemberIndex, reason: String) -> Result<(), PrimaryError> {
        self.members[member.0].connection = None;
        self.engine.on_disconnected(self.now(), member, reason);
        self.act(front)
    }

    /// Carries out everything the engine wants, and submits the requests that this brings, until nothing is left. False if
    /// it was stopped before that, for others to get their turn.
    fn settle(&mut self, front: &mut impl FrontEnd) -> Result<bool, PrimaryError> {
        for _ in 0..ROUNDS_MAX {
            self.act(front)?;
            if self.requests.is_empty() {
                return Ok(true);
            }
            let now = self.now();
            self.busy = true;
            let mut round = mem::take(&mut self.round);
            mem::swap(&mut round, &mut self.requests);
            for (tag, request) in round.drain(..) {
                self.engine.submit(now, tag, request);
                self.act(front)?;
            }
            self.round = round;
        }
        Ok(false)
    }

    fn act(&mut self, front: &mut impl FrontEnd) -> Result<(), PrimaryError> {
        while let Some(action) = self.engine.next_action() {
            match action {
                Action::Connect(member) => self.connect(member),
                Action::Send(member, frame) => {
                    self.busy |= frame.payload().is_some();
                    if let Some(key) = self.members[member.0].connection {
                        self.connections.send(key, frame);
                    }
                }
                Action::Disconnect(member) => {
                    if let Some(key) = self.members[member.0].connection.take() {
                        self.connections.close(&mut self.reactor, key)?;
                    }
                }
                Action::Config(request) => match &mut self.records {
                    Records::Here(record) => self.engine.on_config(Ok(request.apply(record))),
                    Records::Elsewhere(ask) => ask(request),
                },
                Action::Complete(tag, result) => front.on_response(&mut self.reactor, tag, result, &mut self.requests)?,
                Action::Serve(term) => front.on_serve(&mut self.reactor, term)?,
                Action::Grown(size) => front.on_grown(size),
                Action::Superseded { promised } => return Err(PrimaryError::Superseded { promised }),
            }
        }
        Ok(())
    }

    fn connect(&mut self, member: MemberIndex) {
        let state = &mut self.members[member.0];
        debug_assert!(state.connection.is_none(), "a member has one connection");
        match self.connections.connect(&mut self.reactor, &state.endpoint) {
            Ok(key) => state.connection = Some(key),
            // The engine tries again by its own clock, so this can't become a loop.
            Err(error) => self.engine.on_disconnected(self.now(), member, format!("can't connect: {error}")),
        }
    }

    /// Closes the connections and waits, not for long, until the kernel has let go of their memory.
    fn close(&mut self) -> io::Result<()> {
        self.connections.close_all(&mut self.reactor)?;
        let until = Instant::now() + CLOSE_LIMIT;
        let mut completed = Vec::new();
        while self.connections.in_use() > 0 && Instant::now() < until {
            self.reactor.wait(Some(until.saturating_duration_since(Instant::now())), &mut completed)?;
            for completed in completed.drain(..).filter(|completed| completed.source == Some(Source::Connection)) {
                self.connections.on_completed(&mut self.reactor, &completed)?;
            }
        }
        Ok(())
    }
}

/// Gives freed heap memory back to the system.
pub(super) fn give_back_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only returns free pages.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_that_cannot_be_made_is_explained_with_what_to_do() {
        let text = |code| PrimaryError::Ring(io::Error::from_raw_os_error(code)).to_string();
        assert!(text(libc::EPERM).contains("sysctl kernel.io_uring_disabled=0"));
        assert!(text(libc::ENOSYS).contains("CONFIG_IO_URING"));
        assert!(text(libc::EINVAL).contains("6.1"));
    }
}
