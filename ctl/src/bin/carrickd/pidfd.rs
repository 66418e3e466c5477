//! A process that can't be mistaken for another one that got its number later.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was not this carrickd's child: only its parent is told.
    Unknown,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with exit code {code}"),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Self::Unknown => f.write_str("ended"),
        }
    }
}

/// See the module.
pub struct PidFd {
    pid: u32,
    fd: AsyncFd<OwnedFd>,
}

impl PidFd {
    /// Of a process that can't have ended unnoticed: an unreaped child, or one that the caller proves alive afterwards.
    ///
    /// # Errors
    /// No such process.
    pub fn open(pid: u32) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        let fd = rustix::process::pidfd_open(raw, PidfdFlags::empty())?;
        // SAFETY: the descriptor is owned, so it stays open, and always means the same, until the AsyncFd is dropped with it.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self { pid, fd })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end. The kernel tells: nothing is polled.
    pub async fn ended(&self) {
        // An error would mean that the runtime is going away.
        let _ = self.fd.readable().await;
    }

    /// After its end: how, and the zombie is gone.
    pub fn reap(&self) -> Ending {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.fd.get_ref().as_fd()), options) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ending::Code(code),
                (None, Some(signal)) => Ending::Signal(signal),
                (None, None) => Ending::Unknown,
            },
            Ok(None) | Err(_) => Ending::Unknown,
        }
    }

    /// SIGKILL. Harmless if it has ended.
    pub fn kill(&self) {
        if let Err(error) = rustix::process::pidfd_send_signal(self.fd.get_ref(), Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::warn!(pid = self.pid, %error, "can't kill a process");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[tokio::test]
    #[expect(clippy::zombie_processes, reason = "reaping is what is tested")]
    async fn the_end_of_a_child_is_told_and_reaped() {
        let child = Command::new("sh").args(["-c", "exit 7"]).stdin(Stdio::null()).spawn().unwrap();
        let process = PidFd::open(child.id()).unwrap();
        process.ended().await;
        assert_eq!(process.reap(), Ending::Code(7));
        assert_eq!(process.reap(), Ending::Unknown, "reaped already");
        process.kill();

        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = PidFd::open(child.id()).unwrap();
        process.kill();
        process.ended().await;
        assert_eq!(process.reap(), Ending::Signal(9));
    }

    #[test]
    fn nonsense_is_no_process() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        assert!(PidFd::open(0).is_err());
        assert!(PidFd::open(u32::MAX).is_err());
    }
}
