//! A load that knows what every sector must hold: writes, zeroes, discards and reads of 512 bytes to 1 MiB, directly on a device,
//! each thread in a region of its own, so that every read has exactly one right answer.

use std::collections::BTreeMap;
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
    region: Region,
}

/// A part of a device, and what it must hold.
pub struct Region {
    /// Where it begins, in bytes.
    start: u64,
    /// Requests begin and end at multiples of this, in bytes.
    align: u64,
    /// Which request wrote each sector; 0 for zeros.
    stamps: Vec<u64>,
    /// What a sector may hold instead, because a request that would have changed it failed.
    maybe: BTreeMap<usize, Vec<u64>>,
    /// Requests so far.
    count: u64,
    dice: Dice,
}

impl History {
    /// Starts `threads` workers, each on the next `region` bytes from `start` on.
    pub fn start(device: &Path, start: u64, region: u64, threads: u64, align: u64, seed: u64) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let worker = |index: u64| {
            let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
            let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(device)?;
            let region = Region::new(start + index * region, region, align, seed + index)?;
            let mut worker = Worker { file, region };
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
        let Self { file, region } = self;
        // A device is as its last user left it: the first state is made.
        change_range(file, ZERO_OUT, region.start, region.length())?;
        while !stop.load(Ordering::Relaxed) {
            region.request(file)?;
        }
        region.check_all(file).context("after the last request")?;
        Ok(region.count)
    }
}

impl Region {
    /// One that holds zeros.
    pub fn new(start: u64, length: u64, align: u64, seed: u64) -> anyhow::Result<Self> {
        let stamps = vec![0; usize::try_from(length / SECTOR)?];
        Ok(Self { start, align, stamps, maybe: BTreeMap::new(), count: 0, dice: Dice::new(seed) })
    }

    /// In bytes.
    pub fn length(&self) -> u64 {
        self.stamps.len() as u64 * SECTOR
    }

    /// Makes it larger: what is new holds zeros.
    pub fn grow(&mut self, length: u64) -> anyhow::Result<()> {
        let sectors = usize::try_from(length / SECTOR)?;
        self.stamps.resize(sectors.max(self.stamps.len()), 0);
        Ok(())
    }

    /// Reads everything, and compares it.
    pub fn check_all(&mut self, file: &File) -> anyhow::Result<()> {
        let all = self.length();
        for offset in (0..all).step_by(usize::try_from(REQUEST_MAX)?) {
            self.check(file, offset, REQUEST_MAX.min(all - offset))?;
        }
        Ok(())
    }

    /// Makes the next request of chance. If it fails, the sectors that it would have changed may be as they were, or as it wanted them.
    pub fn request(&mut self, file: &File) -> anyhow::Result<()> {
        self.count += 1;
        self.try_request(file, self.count).with_context(|| format!("request {} in the region at {}", self.count, self.start))
    }

    fn try_request(&mut self, file: &File, stamp: u64) -> anyhow::Result<()> {
        let (offset, length) = self.pick();
        match self.dice.below(10) {
            0..=3 => self.check(file, offset, length),
            4 => {
                let done = change_range(file, ZERO_OUT, self.start + offset, length);
                self.mark(offset, length, 0, done)
            }
            5 => {
                // Whole blocks, so that what is discarded reads as zeros for sure.
                let (first, end) = (offset.next_multiple_of(4096), (offset + length) / 4096 * 4096);
                if first >= end {
                    return Ok(());
                }
                let done = change_range(file, DISCARD, self.start + first, end - first);
                self.mark(first, end - first, 0, done)
            }
            6 if stamp.is_multiple_of(16) => file.sync_data().context("fsync"),
            _ => {
                let mut buffer = BufferPool::new(0).take(usize::try_from(length)?);
                for (sector, bytes) in (offset / SECTOR..).zip(buffer.chunks_exact_mut(512)) {
                    fill(bytes, stamp, self.start / SECTOR + sector);
                }
                let done = file.write_all_at(&buffer, self.start + offset).with_context(|| format!("writing {offset}+{length}"));
                self.mark(offset, length, stamp, done)
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

    /// Remembers what came of a request.
    fn mark(&mut self, offset: u64, length: u64, stamp: u64, done: anyhow::Result<()>) -> anyhow::Result<()> {
        let sectors = usize::try_from(offset / SECTOR)?..usize::try_from((offset + length) / SECTOR)?;
        if done.is_ok() {
            self.stamps[sectors.clone()].fill(stamp);
            self.maybe.retain(|sector, _| !sectors.contains(sector));
        } else {
            sectors.for_each(|sector| self.maybe.entry(sector).or_default().push(stamp));
        }
        done
    }

    fn check(&mut self, file: &File, offset: u64, length: u64) -> anyhow::Result<()> {
        let mut buffer = BufferPool::new(0).take(usize::try_from(length)?);
        file.read_exact_at(&mut buffer, self.start + offset).with_context(|| format!("reading {offset}+{length}"))?;
        let mut wanted = [0; 512];
        for (sector, bytes) in (offset / SECTOR..).zip(buffer.chunks_exact(512)) {
            let index = usize::try_from(sector)?;
            let mut is = |stamp: u64| {
                fill(&mut wanted, stamp, self.start / SECTOR + sector);
                *bytes == wanted
            };
            // Once one of the possible contents was read, no other is possible.
            let others = self.maybe.remove(&index).unwrap_or_default();
            let stamp = others.iter().copied().find(|stamp| is(*stamp)).unwrap_or(self.stamps[index]);
            ensure!(is(stamp), "sector {sector} should come from request {stamp} (or {others:?}), holds {:02x?}…", &bytes[..16]);
            self.stamps[index] = stamp;
        }
        Ok(())
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
