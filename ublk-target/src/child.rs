//! Waiting for a process that this one has started.

use std::io;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// First pause between two looks, doubled up to [`POLL_MAX`].
const POLL_MIN: Duration = Duration::from_millis(1);
/// Longest pause between two looks.
const POLL_MAX: Duration = Duration::from_millis(50);

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
