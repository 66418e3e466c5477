//! A look at how a device does: a few blocks at a time are written and read back, one request after the other, and the longest is
//! remembered.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{anyhow, ensure};

use crate::disk::Disk;

/// Blocks in a round.
const BLOCKS: u64 = 4;

/// A thread that looks on and on.
pub struct Probe {
    seen: Arc<Seen>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    rounds: AtomicU64,
    longest_us: AtomicU64,
}

impl Probe {
    /// Begins on a few blocks from `first` on, which nobody else may use.
    pub fn start(device: &Path, first: u64) -> anyhow::Result<Self> {
        let (disk, seen) = (Disk::open(device)?, Arc::new(Seen::default()));
        let shared = Arc::clone(&seen);
        let thread = thread::spawn(move || {
            let mut value = 0_u8;
            while !shared.stop.load(Ordering::Relaxed) {
                value = value.wrapping_add(1);
                let longest = disk.write_blocks(first, BLOCKS, value)?.max(disk.check_blocks(first, BLOCKS, value)?);
                shared.longest_us.fetch_max(u64::try_from(longest.as_micros())?, Ordering::Relaxed);
                shared.rounds.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Ok(Self { seen, thread: Some(thread) })
    }

    /// How many rounds were done. An error has ended it for good.
    pub fn rounds(&self) -> anyhow::Result<u64> {
        let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        ensure!(!ended, "a request of the probe failed");
        Ok(self.seen.rounds.load(Ordering::Relaxed))
    }

    /// The longest request since this was asked before.
    pub fn longest(&self) -> Duration {
        Duration::from_micros(self.seen.longest_us.swap(0, Ordering::Relaxed))
    }

    /// Ends it; every request must have been answered rightly.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.seen.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("the probe panicked"))?
    }
}

impl Drop for Probe {
    /// Doesn't wait: the device may never answer.
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
    }
}
