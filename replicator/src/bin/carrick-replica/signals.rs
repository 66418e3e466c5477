//! SIGTERM and SIGINT as messages: blocked everywhere, taken by one thread, so that no code ever runs in a signal handler.

use std::io;
use std::mem::MaybeUninit;
use std::thread;

use carrick_replicator::control::{ReplicaAnswer, ReplicaRequest};
use carrick_replicator::io::{Command, Reply, Sender};

/// The thread only waits.
const STACK: usize = 64 << 10;

/// The signals that end the process, blocked.
pub(crate) struct EndSignals(libc::sigset_t);

impl EndSignals {
    /// Blocks them in this thread and in all that it starts.
    pub(crate) fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: `sigemptyset` initialises the set, the others get a valid one.
        let (set, error) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            let set = set.assume_init();
            (set, libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))
        };
        if error == 0 { Ok(Self(set)) } else { Err(io::Error::from_raw_os_error(error)) }
    }

    /// From now on the first of them asks the server to end; later ones change nothing, since it is ending.
    pub(crate) fn forward(self, commands: Sender<Command<ReplicaRequest, ReplicaAnswer>>) -> io::Result<()> {
        let wait = move || {
            let mut signal = 0;
            // SAFETY: both point to valid values of this thread.
            while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
            tracing::info!(signal, "asked to end by a signal");
            let (reply, _nobody_waits) = Reply::new();
            commands.send(Command { request: ReplicaRequest::Shutdown, reply });
        };
        thread::Builder::new().name("signals".into()).stack_size(STACK).spawn(wait).map(drop)
    }
}
