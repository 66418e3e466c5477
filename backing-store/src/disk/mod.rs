//! What the epoch map stands on: an array of 4 KiB blocks that can be read, written and synced, and that may lose, tear or
//! corrupt what was not synced.
//!
//! * [`RingDisk`]: a file or a block device, through io_uring, past the page cache.
//! * [`SimulatedDisk`]: in memory, with every fault a disk has.

mod place;
mod ring;
mod simulated;
mod slots;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::buffer::{Buffer, SharedBuffer};
use crate::units::BLOCK_SIZE;

pub use place::{Access, PlaceOptions, STORE_MIN, StorePlace};
pub use ring::RingDisk;
pub use simulated::{DiskCounters, DiskImage, SimulatedDisk};

/// Index of a 4 KiB block of a store's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskBlock(u64);

impl DiskBlock {
    /// Wraps a raw number.
    #[must_use]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The block `count` further on.
    #[must_use]
    pub const fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl fmt::Display for DiskBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Ties the end of an I/O to its beginning; never reused within an opened store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoId(pub u64);

/// One piece of work for a disk.
#[derive(Debug)]
pub enum DiskWork {
    /// Fills the buffer, whose length is whole blocks, from here on.
    Read {
        /// The first block.
        at: DiskBlock,
        /// Where to.
        buffer: Buffer,
    },
    /// Writes the pieces, each of whole blocks, one behind the other.
    Write {
        /// The first block.
        at: DiskBlock,
        /// What.
        pieces: Vec<SharedBuffer>,
    },
    /// Puts every write that has completed before on stable media.
    Sync,
    /// Tells the disk that these blocks are not needed; reading them gives anything until they are written.
    Discard {
        /// The first block.
        at: DiskBlock,
        /// How many.
        count: u64,
    },
    /// Makes sure that writing these blocks, which never were, will not fail for want of space below. Their content is
    /// undefined afterwards.
    Prepare {
        /// The first block.
        at: DiskBlock,
        /// How many.
        count: u64,
    },
}

impl DiskWork {
    /// Where it begins and of how many bytes it is; a sync is of none.
    pub(crate) fn span(&self) -> (DiskBlock, u64) {
        const BLOCK: u64 = BLOCK_SIZE as u64;
        match self {
            Self::Read { at, buffer } => (*at, buffer.len() as u64),
            Self::Write { at, pieces } => (*at, pieces.iter().map(|piece| piece.len() as u64).sum()),
            Self::Sync => (DiskBlock::default(), 0),
            Self::Discard { at, count } | Self::Prepare { at, count } => (*at, count.saturating_mul(BLOCK)),
        }
    }

    /// Why a disk of `blocks` blocks must refuse it, if it must.
    pub(crate) fn misuse(&self, blocks: u64) -> Option<&'static str> {
        const BLOCK: usize = BLOCK_SIZE as usize;
        let odd = |bytes: &[u8]| bytes.is_empty() || !bytes.len().is_multiple_of(BLOCK) || !bytes.as_ptr().addr().is_multiple_of(BLOCK);
        let is_odd = match self {
            Self::Read { buffer, .. } => odd(buffer),
            Self::Write { pieces, .. } => pieces.is_empty() || pieces.iter().any(|piece| odd(piece)),
            Self::Sync => return None,
            Self::Discard { count, .. } | Self::Prepare { count, .. } => *count == 0,
        };
        if is_odd {
            return Some("disk work is not of whole blocks that lie at a multiple of 4096 in memory");
        }
        let (at, length) = self.span();
        let end = at.get().checked_add(length / u64::from(BLOCK_SIZE));
        (end.is_none_or(|end| end > blocks)).then_some("disk work reaches past the end of the disk")
    }
}

/// Work with its name.
#[derive(Debug)]
pub struct DiskRequest {
    /// Its name.
    pub id: IoId,
    /// What to do.
    pub work: DiskWork,
}

/// How work ended.
#[derive(Debug)]
pub struct DiskDone {
    /// Its name.
    pub id: IoId,
    /// For a read the filled buffer, else `None`. A short read or write is an error.
    pub result: io::Result<Option<Buffer>>,
}

/// An array of blocks. All calls come from one thread.
///
/// Work completes in any order; a read or write beside another that overlaps it and has not completed gives anything. A
/// completed write is seen by every later read, and survives the death of the process, but only a [`DiskWork::Sync`] submitted
/// after it completed makes it survive a loss of power. Blocks may be torn at 512 bytes by a loss of power or a kill.
pub trait Disk {
    /// How many blocks there are.
    fn blocks(&self) -> u64;

    /// Bytes that the file system underneath could still give to [`DiskWork::Prepare`]. `None` if all space is there already.
    ///
    /// # Errors
    /// What the system says.
    fn preparable(&self) -> io::Result<Option<u64>>;

    /// Whether [`DiskWork::Discard`] is of use.
    fn wants_discards(&self) -> bool;

    /// Starts work. Its end comes from [`Disk::reap`], always, and exactly once.
    fn submit(&mut self, request: DiskRequest);

    /// Hands everything submitted to the system, without waiting. [`Disk::reap`] does so, too.
    fn push(&mut self) {}

    /// Hands everything submitted to the system, and moves what has ended to `done`, without waiting. It may leave some for the
    /// next time; then [`Disk::wake_fd`] stays readable.
    fn reap(&mut self, done: &mut Vec<DiskDone>);

    /// Waits until something has ended that was not reaped. Returns at once if nothing is under way.
    ///
    /// # Errors
    /// What the system says.
    fn wait(&mut self) -> io::Result<()>;

    /// Time since the disk was opened, never going back.
    fn now(&self) -> Duration;

    /// Makes [`Disk::wake_fd`] readable at this time (as of [`Disk::now`]) if it isn't before; a later call replaces the
    /// earlier. `None`: not at all.
    fn set_alarm(&mut self, at: Option<Duration>);

    /// Becomes readable when something has ended or the alarm has gone off. `None` if work completes otherwise (in a
    /// simulation).
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;
}
