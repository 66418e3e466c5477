//! One io_uring per data-path thread: everything the thread waits for completes here.

use std::io;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, squeue};

/// Submission entries: all of a target's 512 fetches fit into one `io_uring_enter`, as recovery needs.
const SUBMISSIONS: u32 = 1024;
/// Completion entries: four per submission, since a wake may find many.
const COMPLETIONS: u32 = 4096;

/// Which part of a thread an entry belongs to: the upper 8 bits of its user data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Source {
    /// Replica or primary connections.
    Connection = 1,
    /// The front end: ublk, a bench, an acceptor.
    FrontEnd = 2,
    /// The thread's own mailbox.
    Mailbox = 3,
}

/// What an entry came to.
#[derive(Clone, Copy, Debug)]
pub struct Completed {
    /// Whose it was, `None` for a value no [`Source`] made.
    pub source: Option<Source>,
    /// The lower 56 bits of the user data, as the source gave them.
    pub token: u64,
    /// The result: bytes, or a negative errno.
    pub result: i32,
    /// Whether a multishot entry will complete again.
    pub more: bool,
}

impl Source {
    const TOKEN_BITS: u32 = 56;

    /// The user data of this source's entry `token` (below 2^56).
    #[must_use]
    pub const fn user_data(self, token: u64) -> u64 {
        (self as u64) << Self::TOKEN_BITS | (token & ((1 << Self::TOKEN_BITS) - 1))
    }

    const fn of(user_data: u64) -> Option<Self> {
        match user_data >> Self::TOKEN_BITS {
            1 => Some(Self::Connection),
            2 => Some(Self::FrontEnd),
            3 => Some(Self::Mailbox),
            _ => None,
        }
    }
}

/// A ring for one thread: made on that thread, used only there.
pub struct Reactor {
    ring: IoUring,
}

impl Reactor {
    /// Makes the ring.
    ///
    /// # Errors
    /// What `io_uring_setup` says: `EPERM` if `kernel.io_uring_disabled` forbids it, `ENOSYS` if the kernel has none.
    pub fn new() -> io::Result<Self> {
        let ring =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_cqsize(COMPLETIONS).setup_clamp().build(SUBMISSIONS)?;
        Ok(Self { ring })
    }

    /// Queues an entry; it is submitted with the next [`Reactor::wait`], or now if the queue is full.
    ///
    /// # Safety
    /// What the entry points to must stay valid until its completion has come.
    ///
    /// # Errors
    /// What `io_uring_enter` says.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: passed on to the caller.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }

    /// Submits what is queued and waits until something completes or `timeout` has passed (`None`: for ever), then moves
    /// everything completed to `completed`. A signal or a timeout is no error: nothing may have completed.
    ///
    /// # Errors
    /// What `io_uring_enter` says.
    pub fn wait(&mut self, timeout: Option<Duration>, completed: &mut Vec<Completed>) -> io::Result<()> {
        let waited = match timeout {
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
            None => self.ring.submit_and_wait(1),
        };
        match waited {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(error) => return Err(error),
        }
        completed.extend(self.ring.completion().map(|entry| Completed {
            source: Source::of(entry.user_data()),
            token: entry.user_data() & ((1 << Source::TOKEN_BITS) - 1),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
        }));
        Ok(())
    }

    /// Submits what is queued without waiting.
    ///
    /// # Errors
    /// What `io_uring_enter` says.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.submit().map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use io_uring::opcode;

    use super::*;

    #[test]
    fn entries_come_back_to_their_source() {
        let mut reactor = Reactor::new().unwrap();
        let entry = opcode::Nop::new().build().user_data(Source::Mailbox.user_data(77));
        // SAFETY: a no-op points to nothing.
        unsafe { reactor.push(&entry) }.unwrap();
        let mut completed = Vec::new();
        reactor.wait(Some(Duration::from_secs(5)), &mut completed).unwrap();
        assert_eq!((completed[0].source, completed[0].token, completed[0].result), (Some(Source::Mailbox), 77, 0));
        completed.clear();
        reactor.wait(Some(Duration::from_millis(1)), &mut completed).unwrap();
        assert!(completed.is_empty(), "a timeout is no error");
    }
}
