//! A block device read and written without the page cache, a block at a time, with the longest time that one took.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

const BLOCK: usize = 4096;

/// An open device.
pub struct Disk {
    file: File,
}

/// One aligned block, as direct I/O wants it.
struct Block(*mut u8);

impl Block {
    const LAYOUT: Layout = match Layout::from_size_align(BLOCK, BLOCK) {
        Ok(layout) => layout,
        Err(_) => panic!("a block's layout"),
    };

    fn filled(value: u8) -> Self {
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(Self::LAYOUT) };
        if start.is_null() {
            handle_alloc_error(Self::LAYOUT);
        }
        let mut block = Self(start);
        block.bytes().fill(value);
        block
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `LAYOUT` many initialised bytes that only this block refers to.
        unsafe { std::slice::from_raw_parts_mut(self.0, BLOCK) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.0, Self::LAYOUT) }
    }
}

impl Disk {
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
        let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(path);
        Ok(Self { file: file.with_context(|| format!("opening {}", path.display()))? })
    }

    /// Fills blocks with a byte that depends on `value` and the block.
    pub fn write_blocks(&self, first: u64, count: u64, value: u8) -> anyhow::Result<Duration> {
        let mut longest = Duration::ZERO;
        for index in first..first + count {
            let mut block = Block::filled(byte(index, value));
            let begin = Instant::now();
            self.file.write_all_at(block.bytes(), index * BLOCK as u64).with_context(|| format!("writing block {index}"))?;
            longest = longest.max(begin.elapsed());
        }
        Ok(longest)
    }

    /// Brings what was written to stable media.
    pub fn flush(&self) -> anyhow::Result<()> {
        Ok(self.file.sync_all()?)
    }

    /// Reads one.
    pub fn read_block(&self, index: u64) -> std::io::Result<Vec<u8>> {
        let mut block = Block::filled(0);
        self.file.read_exact_at(block.bytes(), index * BLOCK as u64)?;
        Ok(block.bytes().to_vec())
    }

    /// Reads them back.
    pub fn check_blocks(&self, first: u64, count: u64, value: u8) -> anyhow::Result<Duration> {
        let mut longest = Duration::ZERO;
        for index in first..first + count {
            let mut block = Block::filled(0);
            let begin = Instant::now();
            self.file.read_exact_at(block.bytes(), index * BLOCK as u64).with_context(|| format!("reading block {index}"))?;
            longest = longest.max(begin.elapsed());
            let wanted = byte(index, value);
            ensure!(block.bytes().iter().all(|found| *found == wanted), "block {index} holds {:#x}, not {wanted:#x}", block.bytes()[0]);
        }
        Ok(longest)
    }
}

/// Never zero, so that a hole is told from data.
fn byte(index: u64, value: u8) -> u8 {
    u8::try_from(index % 251).unwrap_or(0).wrapping_add(value) | 1
}
