//! Writes that carry their number: one request at a time in a region of its own, so that after a loss of power the region must
//! hold exactly what the first so many of them made.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use carrick_backing_store::BufferPool;
use carrick_backing_store::dice::Dice;

use crate::history::{ZERO_OUT, change_range};

const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = 4096;
/// Flushes come after so many requests on average.
const FLUSH_EVERY: u64 = 8;

/// One request: these blocks of the region become its number, or zeros.
#[derive(Clone, Copy)]
struct Change {
    first: u64,
    count: u64,
    zeros: bool,
}

/// Who writes, and what was written.
pub struct Numbered {
    file: File,
    /// First block of the region.
    start: u64,
    blocks: u64,
    done: Vec<Change>,
    dice: Dice,
}

impl Numbered {
    /// Of a region that holds zeros.
    pub fn new(device: &Path, start: u64, blocks: u64, seed: u64) -> anyhow::Result<Self> {
        let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
        let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(device)?;
        Ok(Self { file, start, blocks, done: Vec::new(), dice: Dice::new(seed) })
    }

    /// Makes requests, and flushes; `flushed` is told how many were made before each flush that succeeded.
    pub fn work(&mut self, requests: usize, flushed: impl Fn(usize) -> anyhow::Result<()>) -> anyhow::Result<()> {
        for _ in 0..requests {
            self.request().with_context(|| format!("request {} in the region at block {}", self.done.len(), self.start))?;
            if self.dice.below(FLUSH_EVERY) == 0 {
                self.file.sync_data().context("a flush")?;
                flushed(self.done.len())?;
            }
        }
        Ok(())
    }

    /// Mostly small writes, which the store takes through its journal, but all other kinds, too.
    fn request(&mut self) -> anyhow::Result<()> {
        let (most, zeros) = match self.dice.below(20) {
            0..=13 => (1, false),
            14..=16 => (8, false),
            17..=18 => (64, false),
            _ => (32, true),
        };
        let count = 1 + self.dice.below(most);
        let first = self.dice.below(self.blocks - count + 1);
        self.done.push(Change { first, count, zeros });
        let at = (self.start + first) * BLOCK;
        if zeros {
            return change_range(&self.file, ZERO_OUT, at, count * BLOCK);
        }
        let number = self.done.len() as u64;
        let mut buffer = BufferPool::new(0).take(usize::try_from(count * BLOCK)?);
        for (block, bytes) in (self.start + first..).zip(buffer.chunks_exact_mut(BLOCK_BYTES)) {
            fill(bytes, block, number);
        }
        Ok(self.file.write_all_at(&buffer, at)?)
    }

    /// How many requests there were.
    pub const fn len(&self) -> usize {
        self.done.len()
    }

    /// Finds after which request the volume's content is that of the region; at least so many must be in it.
    pub fn find(&self, volume: &[u8], at_least: usize) -> anyhow::Result<usize> {
        let region = volume.chunks_exact(BLOCK_BYTES).skip(usize::try_from(self.start)?).take(usize::try_from(self.blocks)?);
        let found: Vec<u64> = (self.start..).zip(region).map(|(block, bytes)| number(bytes, block)).collect::<anyhow::Result<_>>()?;
        let mut wanted = vec![0; found.len()];
        let mut different = found.iter().filter(|number| **number != 0).count();
        for done in 0..=self.done.len() {
            if done > 0 {
                let Change { first, count, zeros } = self.done[done - 1];
                for index in usize::try_from(first)?..usize::try_from(first + count)? {
                    let number = if zeros { 0 } else { done as u64 };
                    different -= usize::from(wanted[index] != found[index]);
                    wanted[index] = number;
                    different += usize::from(number != found[index]);
                }
            }
            if different == 0 && done >= at_least {
                return Ok(done);
            }
        }
        let newest = found.iter().max().copied().unwrap_or_default();
        bail!("the region at block {} is as after none of the requests from {at_least} on; its newest is {newest}", self.start)
    }
}

fn fill(bytes: &mut [u8], block: u64, number: u64) {
    for pair in bytes.chunks_exact_mut(16) {
        pair[..8].copy_from_slice(&block.to_le_bytes());
        pair[8..].copy_from_slice(&number.to_le_bytes());
    }
}

/// Which request wrote the block; 0 for zeros.
fn number(bytes: &[u8], block: u64) -> anyhow::Result<u64> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[8..16]);
    let number = u64::from_le_bytes(number);
    let mut wanted = [0; BLOCK_BYTES];
    fill(&mut wanted, block, number);
    ensure!(bytes == wanted, "block {block} was never written like this: {:02x?}…", &bytes[..16]);
    Ok(number)
}
