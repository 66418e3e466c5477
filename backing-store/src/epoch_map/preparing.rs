//! Space of the disk below: asking for it before it is used, and giving it back.
//!
//! A store in a file that is left alone takes no more of its file system than it needs. Blocks are handed out only where the file
//! system has kept space for them, so no write of data can meet a full one: a hole that was punched is prepared again before it is
//! used. That is dear: punching waits for all that is under way in the file, and the first write to what was prepared changes the
//! file system's own maps. So what comes back is kept for the next writes, up to a limit, and given back when none come.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use super::{EpochMap, Purpose};
use crate::buffer::Buffer;
use crate::disk::{Disk, DiskBlock, DiskWork};
use crate::units::BLOCK_SIZE;

use super::superblock::CHUNK_BLOCKS;

/// Space is prepared when less than this is ready, and so much at once: 64 MiB.
const PREPARE: u64 = (64 << 20) / BLOCK_SIZE as u64;
/// Most free space that is kept while the store is busy, or a quarter of a small one, beside what is always prepared: twice what
/// large overwrites give up between two checkpoints, and then want again.
const KEEP_MAX: u64 = (16 << 30) / BLOCK_SIZE as u64;
/// What an idle store keeps: enough not to prepare more at once.
const KEEP_IDLE: u64 = 2 * PREPARE;
/// After the file system had no space, so long nothing is prepared.
const PREPARE_PAUSE: Duration = Duration::from_secs(1);

/// Free blocks side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FreeRun {
    at: DiskBlock,
    count: u64,
}

/// What is being prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preparing {
    /// The data area up to this block of it.
    Ahead(u64),
    /// A hole.
    Again(FreeRun),
}

#[derive(Debug, Default)]
pub(super) struct Below {
    preparing: bool,
    /// Blocks, in whole chunks, that could be prepared when last looked for.
    available: u64,
    /// Blocks that the disk is forgetting.
    discarding: u64,
    /// Free blocks that may be holes.
    holes: VecDeque<FreeRun>,
    in_holes: u64,
    /// Whether whole chunks were kept since space was last given back.
    keeps: bool,
    /// How many of them were tried since one had space.
    in_vain: usize,
    /// When the file system had no space for more.
    refused_at: Option<Duration>,
    /// That was logged.
    told: bool,
}

impl Below {
    pub(super) const fn is_preparing(&self) -> bool {
        self.preparing
    }

    /// Free blocks that the disk is forgetting.
    pub(super) const fn discarding(&self) -> u64 {
        self.discarding
    }

    /// Free blocks that may be holes.
    pub(super) const fn in_holes(&self) -> u64 {
        self.in_holes
    }

    /// Whether an idle store may have something to give back.
    pub(super) const fn keeps(&self) -> bool {
        self.keeps
    }

    fn add_hole(&mut self, run: FreeRun) {
        self.in_holes += run.count;
        self.holes.push_front(run);
    }

    /// There was no space for it, or for all of it. Whether it is worth trying the next.
    fn put_back(&mut self, run: FreeRun) -> bool {
        self.in_holes += run.count;
        let half = run.count / CHUNK_BLOCKS / 2 * CHUNK_BLOCKS;
        if half > 0 {
            self.holes.push_back(FreeRun { at: run.at, count: half });
            self.holes.push_back(FreeRun { at: run.at.plus(half), count: run.count - half });
        } else {
            self.holes.push_back(run);
            self.in_vain += 1;
        }
        self.in_vain < self.holes.len()
    }

    /// A hole, or so much of one.
    fn take_hole(&mut self, most: u64) -> Option<FreeRun> {
        let FreeRun { at, count } = self.holes.pop_front()?;
        let taken = count.min(most);
        if taken < count {
            self.holes.push_front(FreeRun { at: at.plus(taken), count: count - taken });
        }
        self.in_holes -= taken;
        Some(FreeRun { at, count: taken })
    }
}

impl<D: Disk> EpochMap<D> {
    /// Blocks that can be handed out as soon as they are prepared.
    pub(super) fn preparable(&self) -> u64 {
        let ahead = self.allocator.unprepared().min(self.below.available);
        // What may be a hole often is none, and then takes no space.
        if self.below.refused_at.is_none() { ahead + self.below.in_holes } else { 0 }
    }

    pub(super) fn advance_space(&mut self) {
        let scarce = self.allocator.ready() < PREPARE + self.reserve() && self.allocator.unprepared() + self.below.in_holes > 0;
        if self.poisoned.is_some() || self.below.preparing || !scarce || self.below.refused_at.is_some() {
            return;
        }
        let most = PREPARE.max(self.reserve()).next_multiple_of(CHUNK_BLOCKS);
        // Holes first: that keeps the file short.
        let (what, at, count) = if let Some(run) = self.below.take_hole(most) {
            (Preparing::Again(run), run.at, run.count)
        } else {
            self.look_below();
            let start = self.allocator.prepared();
            let count = most.min(self.below.available).min(self.allocator.unprepared());
            if count == 0 {
                return self.refuse_space(&io::ErrorKind::StorageFull.into());
            }
            (Preparing::Ahead(start + count), self.superblock.geometry.data_start().plus(start), count)
        };
        self.below.preparing = true;
        self.start(Purpose::Prepare(what), DiskWork::Prepare { at, count });
    }

    pub(super) fn on_prepared(&mut self, what: Preparing, result: io::Result<Option<Buffer>>) {
        self.below.preparing = false;
        match (result, what) {
            (Ok(_), Preparing::Ahead(end)) => self.allocator.set_prepared(end.max(self.allocator.prepared())),
            (Ok(_), Preparing::Again(run)) => self.wake(run),
            (Err(error), Preparing::Again(run)) => {
                if !self.below.put_back(run) {
                    self.refuse_space(&error);
                }
                return self.unstall();
            }
            (Err(error), Preparing::Ahead(_)) => {
                self.refuse_space(&error);
                return self.unstall();
            }
        }
        self.below.told = false;
        self.below.in_vain = 0;
        self.look_below();
        self.unstall();
    }

    pub(super) fn look_below(&mut self) {
        let below = self.disk.preparable().ok().flatten().map_or(u64::MAX, |bytes| bytes / u64::from(BLOCK_SIZE));
        self.below.available = below / CHUNK_BLOCKS * CHUNK_BLOCKS;
    }

    fn refuse_space(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.below.told, true) {
            tracing::warn!(store = %self.superblock.id, %error, "no space below for more of the store");
        }
        self.below.refused_at = Some(self.disk.now());
    }

    /// The file system may have space again.
    pub(super) fn retry_preparing(&mut self) {
        let now = self.disk.now();
        if self.below.refused_at.is_some_and(|at| now.saturating_sub(at) >= PREPARE_PAUSE) {
            self.below.refused_at = None;
            self.below.in_vain = 0;
            self.look_below();
        }
    }

    /// After a start nobody knows where holes are, but that they are whole chunks.
    pub(super) fn suspect_holes(&mut self) {
        if !self.is_thin() {
            return;
        }
        for (at, count) in self.allocator.hold_free_chunks(u64::MAX) {
            self.below.add_hole(FreeRun { at, count });
        }
    }

    /// Nothing has come in for long: the file system gets back what was kept.
    pub(super) fn give_back(&mut self) {
        self.below.keeps = false;
        let excess = self.allocator.ready().saturating_sub(KEEP_IDLE + self.reserve());
        for (at, count) in self.allocator.hold_free_chunks(excess) {
            self.discard(FreeRun { at, count });
        }
    }

    fn is_thin(&self) -> bool {
        self.disk.preparable().is_ok_and(|below| below.is_some())
    }

    /// These blocks are not needed by any checkpoint any more.
    pub(super) fn reuse(&mut self, mut blocks: Vec<DiskBlock>) {
        if !self.disk.wants_discards() {
            return blocks.into_iter().for_each(|block| self.allocator.wake(block));
        }
        let limit = KEEP_MAX.min(self.allocator.blocks() / 4) + PREPARE + self.reserve();
        let is_thin = self.is_thin();
        blocks.sort_unstable();
        for blocks in blocks.chunk_by(|a, b| a.plus(1) == *b) {
            let Some(first) = blocks.first().copied() else { continue };
            // Whole chunks: less is not worth telling the disk, and a start must find what may be a hole.
            let end = first.get() + blocks.len() as u64;
            let (from, to) = (first.get().next_multiple_of(CHUNK_BLOCKS), end / CHUNK_BLOCKS * CHUNK_BLOCKS);
            if from >= to {
                self.wake(FreeRun { at: first, count: end - first.get() });
                continue;
            }
            let run = FreeRun { at: DiskBlock::new(from), count: to - from };
            self.wake(FreeRun { at: first, count: from - first.get() });
            self.wake(FreeRun { at: DiskBlock::new(to), count: end - to });
            // A device is told only what is too much: nobody waits for its space.
            if self.allocator.ready() + run.count <= limit {
                self.below.keeps = is_thin;
                self.wake(run);
            } else {
                self.discard(run);
            }
        }
    }

    fn discard(&mut self, run: FreeRun) {
        self.below.discarding += run.count;
        self.start(Purpose::Discard(run), DiskWork::Discard { at: run.at, count: run.count });
    }

    pub(super) fn on_discarded(&mut self, run: FreeRun) {
        self.below.discarding -= run.count;
        if self.is_thin() {
            self.below.add_hole(run);
        } else {
            self.wake(run);
        }
        self.unstall();
    }

    fn wake(&mut self, run: FreeRun) {
        (0..run.count).for_each(|step| self.allocator.wake(run.at.plus(step)));
    }
}
