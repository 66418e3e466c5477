//! Processes that this one starts, and waiting for them.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// First pause between two looks, doubled up to [`POLL_MAX`].
const POLL_MIN: Duration = Duration::from_millis(1);
/// Longest pause between two looks.
const POLL_MAX: Duration = Duration::from_millis(50);

/// This program, also if another version has been put in its place by now.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";
/// The exit code of a tied process whose program isn't there, as shells have it.
pub(crate) const NO_PROGRAM: u8 = 127;

/// A program that the kernel kills when this process ends: what it would still do is not for the next target to meet. Only for the main
/// thread, since the kernel takes the end of the thread that started it for that of the process.
///
/// By way of this program ([`tie`]): to set that up between fork and exec takes a whole fork, which copies the page tables of a process that
/// serves requests, and from which a target on user-mode Linux never came back.
pub(crate) fn tied(program: &str) -> Command {
    let mut command = Command::new(OWN_PROGRAM);
    command.arg("tied").arg(std::process::id().to_string()).arg(program);
    command
}

/// Becomes the program that is to end with its parent. Gives its exit code if that can't be.
#[must_use]
pub fn tie(parent: u32, program: &[OsString]) -> u8 {
    let tied = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    // It may have ended before that.
    let lives = rustix::process::getppid().is_some_and(|there| u32::try_from(there.as_raw_nonzero().get()) == Ok(parent));
    let [name, arguments @ ..] = program else { return NO_PROGRAM };
    if tied.is_err() || !lives {
        return 1;
    }
    let error = Command::new(name).args(arguments).exec();
    eprintln!("{}: {error}", name.display());
    NO_PROGRAM
}

/// `None` if it hasn't ended in time.
///
/// # Errors
/// The kernel's.
pub fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let (begun, mut pause) = (Instant::now(), POLL_MIN);
    loop {
        let ended = child.try_wait()?;
        if ended.is_some() || begun.elapsed() > limit {
            return Ok(ended);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(POLL_MAX);
    }
}
