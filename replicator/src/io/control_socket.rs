//! Serves a control socket with plain threads: it asks the data thread through a mailbox and waits for the answer, so that no
//! JSON is ever parsed where the I/O runs.

use std::io::{self, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::mailbox::Sender;
use crate::control::{ControlError, ControlErrorCode, read_line, write_line};

/// Most connections at once: `carrickd` needs one, a person another.
const CONNECTIONS_MAX: usize = 16;
/// A connection that asks nothing for so long is closed, so that forgotten ones can't lock others out.
const IDLE: Duration = Duration::from_secs(60);
/// An answer that nobody reads for so long isn't waited for.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// A request of 1 MiB is parsed into the heap; the stack needs little.
const STACK: usize = 256 << 10;

/// A control request on its way to the data thread.
#[derive(Debug)]
pub struct Command<Q, A> {
    /// What is asked.
    pub request: Q,
    /// Where the answer goes. Dropping it answers that the process is ending.
    pub reply: Reply<A>,
}

/// The way back of one answer.
#[derive(Debug)]
pub struct Reply<A>(mpsc::SyncSender<A>);

impl<A> Reply<A> {
    /// A way back for a request that comes from nobody in particular: its answer may be read at the other end.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<A>) {
        let (sender, receiver) = mpsc::sync_channel(1);
        (Self(sender), receiver)
    }

    /// Answers.
    pub fn send(self, answer: A) {
        // Nobody waits any more: the asker is gone.
        let _ = self.0.try_send(answer);
    }
}

/// Counts connections; the end of the process waits until answers are written.
#[derive(Debug, Default)]
struct Activity {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    connections: usize,
    requests: usize,
}

impl Activity {
    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn enter(&self) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let room = counts.connections < CONNECTIONS_MAX;
        counts.connections += usize::from(room);
        room
    }
}

/// A control socket being served.
#[derive(Debug)]
pub struct ControlSocket {
    activity: Arc<Activity>,
}

impl ControlSocket {
    /// Serves a listening Unix socket on a thread of its own, until the process ends. `refuse` turns an error into an answer.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn serve<Q, A>(listener: OwnedFd, commands: Sender<Command<Q, A>>, refuse: fn(ControlError) -> A) -> io::Result<Self>
    where
        Q: DeserializeOwned + Send + 'static,
        A: Serialize + Send + 'static,
    {
        let activity = Arc::new(Activity::default());
        let listener = UnixListener::from(listener);
        let shared = Arc::clone(&activity);
        thread::Builder::new().name("control".into()).stack_size(STACK).spawn(move || accept(&listener, &commands, refuse, &shared))?;
        Ok(Self { activity })
    }

    /// Waits until all answers are written, at most `limit`. Call it when the data thread has ended.
    pub fn drain(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut counts = self.activity.counts.lock().unwrap_or_else(PoisonError::into_inner);
        while counts.requests > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            counts = self.activity.changed.wait_timeout(counts, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn accept<Q, A>(listener: &UnixListener, commands: &Sender<Command<Q, A>>, refuse: fn(ControlError) -> A, activity: &Arc<Activity>)
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    loop {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors or memory: it will pass, and must not spin.
                tracing::warn!(%error, "can't accept a control connection");
                thread::sleep(Duration::from_secs(1));
                continue;
            }
        };
        if stream.set_read_timeout(Some(IDLE)).and_then(|()| stream.set_write_timeout(Some(SEND_TIMEOUT))).is_err() {
            continue;
        }
        if !activity.enter() {
            let message = format!("{CONNECTIONS_MAX} control connections are open: close one");
            let _ = write_line(&mut stream, &refuse(ControlError { code: ControlErrorCode::Busy, message }));
            continue;
        }
        let (commands, shared) = (commands.clone(), Arc::clone(activity));
        let spawned = thread::Builder::new().name("control-peer".into()).stack_size(STACK).spawn(move || {
            if let Err(error) = converse(stream, &commands, refuse, &shared) {
                tracing::debug!(%error, "control connection ended");
            }
            shared.change(|counts| counts.connections -= 1);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "can't start a thread for a control connection");
            activity.change(|counts| counts.connections -= 1);
        }
    }
}

fn converse<Q, A>(
    stream: UnixStream,
    commands: &Sender<Command<Q, A>>,
    refuse: fn(ControlError) -> A,
    activity: &Activity,
) -> io::Result<()>
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let request = match read_line(&mut reader) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                // Where the next request would begin is unknown after a line that was cut off.
                return write_line(&mut writer, &refuse(ControlError { code: ControlErrorCode::Invalid, message: error.to_string() }));
            }
            Err(error) => return Err(error),
        };
        activity.change(|counts| counts.requests += 1);
        let written = ask(commands, request, refuse, &mut writer);
        activity.change(|counts| counts.requests -= 1);
        written?;
    }
}

fn ask<Q, A: Serialize>(
    commands: &Sender<Command<Q, A>>,
    request: Q,
    refuse: fn(ControlError) -> A,
    writer: &mut UnixStream,
) -> io::Result<()> {
    let (reply, answer) = Reply::new();
    let answer = match commands.send(Command { request, reply }).then(|| answer.recv()) {
        Some(Ok(answer)) => answer,
        // The data thread is gone, or dropped the request on its way out.
        _ => refuse(ControlError { code: ControlErrorCode::Failed, message: "the process is ending".into() }),
    };
    write_line(writer, &answer)
}
