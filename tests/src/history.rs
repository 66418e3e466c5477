//! A load that knows what every sector must hold: writes, zeroes, discards and reads of 512 bytes to 1 MiB, directly on a device,
//! each thread in a region of its own, so that every read has exactly one right answer.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, anyhow, ensure};
use carrick_backing_store::BufferPool;
use carrick_backing_store::dice::Dice;
use rustix::ioctl::{Opcode, Setter, ioctl};

/// The kernel's `BLKDISCARD` and `BLKZEROOUT` (include/uapi/linux/fs.h), which take {offset, length}.
const DISCARD: Opcode = 0x1277;
pub const ZERO_OUT: Opcode = 0x127f;
/// Longest request, in bytes.
const REQUEST_MAX: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// Threads under way.
pub struct History {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<anyhow::Result<u64>>>,
}

struct Worker {
    file: File,
    /// Where the region begins, in bytes.
    start: u64,
    /// Requests begin and end at multiples of this, in bytes.
    align: u64,
    /// Which request wrote each sector; 0 for zeros.
    stamps: Vec<u64>,
    dice: Dice,
}

impl History {
    /// Starts `threads` workers, each on the next `region` bytes from `start` on.
    pub fn start(device: &Path, start: u64, region: u64, threads: u64, align: u64, seed: u64) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let worker = |index: u64| {
            let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
            let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(device)?;
            let stamps = vec![0; usize::try_from(region / SECTOR)?];
            let mut worker = Worker { file, start: start + index * region, align, stamps, dice: Dice::new(seed + index) };
            let stop = Arc::clone(&stop);
            Ok(thread::spawn(move || worker.run(&stop)))
        };
        let workers = (0..threads).map(worker).collect::<anyhow::Result<_>>()?;
        Ok(Self { stop, workers })
    }

    /// Ends the load after a last look at every sector; how many requests there were.
    pub fn finish(mut self) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let ends = self.workers.drain(..).map(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?);
        ends.collect::<anyhow::Result<Vec<u64>>>().map(|counts| counts.iter().sum())
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Worker {
    fn run(&mut self, stop: &AtomicBool) -> anyhow::Result<u64> {
        let all = self.stamps.len() as u64 * SECTOR;
        // A device is as its last user left it: the first state is made.
        self.range(ZERO_OUT, 0, all)?;
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            count += 1;
            self.request(count).with_context(|| format!("request {count} in the region at {}", self.start))?;
        }
        for offset in (0..all).step_by(usize::try_from(REQUEST_MAX)?) {
            self.check(offset, REQUEST_MAX.min(all - offset)).context("after the last request")?;
        }
        Ok(count)
    }

    fn request(&mut self, stamp: u64) -> anyhow::Result<()> {
        let (offset, length) = self.pick();
        match self.dice.below(10) {
            0..=3 => self.check(offset, length),
            4 => {
                self.range(ZERO_OUT, offset, length)?;
                self.mark(offset, length, 0)
            }
            5 => {
                // Whole blocks, so that what is discarded reads as zeros for sure.
                let (first, end) = (offset.next_multiple_of(4096), (offset + length) / 4096 * 4096);
                if first < end {
                    self.range(DISCARD, first, end - first)?;
                    self.mark(first, end - first, 0)?;
                }
                Ok(())
            }
            6 if stamp.is_multiple_of(16) => self.file.sync_data().context("fsync"),
            _ => {
                let mut buffer = BufferPool::new(0).take(usize::try_from(length)?);
                for (sector, bytes) in (offset / SECTOR..).zip(buffer.chunks_exact_mut(512)) {
                    fill(bytes, stamp, self.start / SECTOR + sector);
                }
                self.file.write_all_at(&buffer, self.start + offset).with_context(|| format!("writing {offset}+{length}"))?;
                self.mark(offset, length, stamp)
            }
        }
    }

    /// Mostly small ranges, sometimes up to the longest.
    fn pick(&mut self) -> (u64, u64) {
        let units = self.stamps.len() as u64 * SECTOR / self.align;
        let longest = (REQUEST_MAX / self.align).min(units);
        let bound = 1 + self.dice.below(longest);
        let length = 1 + self.dice.below(bound);
        let first = self.dice.below(units - length + 1);
        (first * self.align, length * self.align)
    }

    fn mark(&mut self, offset: u64, length: u64, stamp: u64) -> anyhow::Result<()> {
        let sectors = usize::try_from(offset / SECTOR)?..usize::try_from((offset + length) / SECTOR)?;
        self.stamps[sectors].fill(stamp);
        Ok(())
    }

    fn check(&mut self, offset: u64, length: u64) -> anyhow::Result<()> {
        let mut buffer = BufferPool::new(0).take(usize::try_from(length)?);
        self.file.read_exact_at(&mut buffer, self.start + offset).with_context(|| format!("reading {offset}+{length}"))?;
        let mut wanted = [0; 512];
        for (sector, bytes) in (offset / SECTOR..).zip(buffer.chunks_exact(512)) {
            let stamp = self.stamps[usize::try_from(sector)?];
            fill(&mut wanted, stamp, self.start / SECTOR + sector);
            ensure!(*bytes == wanted, "sector {sector} should come from request {stamp}, holds {:02x?}…", &bytes[..16]);
        }
        Ok(())
    }

    fn range(&self, opcode: Opcode, offset: u64, length: u64) -> anyhow::Result<()> {
        change_range(&self.file, opcode, self.start + offset, length)
    }
}

/// Discards a range of a block device, or makes it zeros.
pub fn change_range(device: &File, opcode: Opcode, start: u64, length: u64) -> anyhow::Result<()> {
    let range = [start, length];
    // SAFETY: both commands read two 64-bit numbers from the pointer and nothing else.
    let done = unsafe {
        match opcode {
            DISCARD => ioctl(device, Setter::<DISCARD, [u64; 2]>::new(range)),
            _ => ioctl(device, Setter::<ZERO_OUT, [u64; 2]>::new(range)),
        }
    };
    done.with_context(|| format!("ioctl {opcode:#x} of {start}+{length}"))
}

/// A sector's content: whose it is and where it belongs, or zeros.
fn fill(bytes: &mut [u8], stamp: u64, sector: u64) {
    bytes.fill(0);
    if stamp != 0 {
        for pair in bytes.chunks_exact_mut(16) {
            pair[..8].copy_from_slice(&stamp.to_le_bytes());
            pair[8..].copy_from_slice(&sector.to_le_bytes());
        }
    }
}
