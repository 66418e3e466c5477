//! Overwrites that are in the journal with their data, and are copied to their places when that is on stable media.
//!
//! Until then their data is in memory, where reads find it. A place's data is copied from its newest overwrite; ones before
//! that are saved, unless a running checkpoint needs them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::journal::BatchNumber;
use super::numbers::NumberMap;
use super::{EpochMap, Purpose};
use crate::buffer::{Buffer, SharedBuffer};
use crate::disk::{Disk, DiskBlock, DiskWork};

/// Copying begins when so many blocks wait (8 MiB), unless something asks for it before, and goes on to half as many: waiting
/// saves copies of what is overwritten again.
const BEGIN: usize = 2048;
const END: usize = 1024;
/// Changes wait when so many blocks wait to be copied (32 MiB of memory).
const BLOCKS_MAX: usize = 8192;
/// I/Os at once, and blocks of one.
const IN_FLIGHT_MAX: usize = 32;
const RUN_MAX: usize = 64;
/// Blocks that are sorted together, so that neighbours go in one I/O.
const SORTED: usize = 512;

#[derive(Debug)]
struct Pending {
    data: SharedBuffer,
    batch: BatchNumber,
    copying: bool,
    /// Nothing points to the place any more; it stays until the copy under way has ended.
    cancelled: bool,
}

#[derive(Debug, Default)]
pub(super) struct Copying {
    blocks: NumberMap<DiskBlock, Pending>,
    queue: BTreeSet<(BatchNumber, DiskBlock)>,
    /// How many copies of each batch are not yet on stable media.
    owed: BTreeMap<BatchNumber, usize>,
    /// Copies that have ended and are not yet on stable media.
    copied: Vec<BatchNumber>,
    in_flight: usize,
    running: bool,
    /// Everything is to be copied now.
    pub(super) eager: bool,
}

impl Copying {
    /// The data that a place will have.
    pub(super) fn get(&self, place: DiskBlock) -> Option<&SharedBuffer> {
        self.blocks.get(&place).map(|pending| &pending.data)
    }

    /// Whether the copy to this place must not be saved.
    pub(super) fn is_needed_before(&self, place: DiskBlock, batch: BatchNumber) -> bool {
        self.blocks.get(&place).is_some_and(|pending| pending.batch < batch)
    }

    /// Whether anything of before `batch` is to be copied or being copied.
    pub(super) fn has_before(&self, batch: BatchNumber) -> bool {
        self.owed.first_key_value().is_some_and(|(first, _)| *first < batch)
    }

    pub(super) fn is_full(&self) -> bool {
        self.blocks.len() >= BLOCKS_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }

    /// Adds an overwrite. Whether it saved the copy of one before.
    pub(super) fn insert(&mut self, place: DiskBlock, data: SharedBuffer, batch: BatchNumber) -> bool {
        let before = self.blocks.get(&place).map(|pending| (pending.batch, pending.copying));
        let saved = before.is_some_and(|(batch, _)| self.queue.remove(&(batch, place)));
        if let Some((before, _)) = before.filter(|_| saved) {
            self.settle(before);
        }
        let copying = before.is_some_and(|(_, copying)| copying);
        self.blocks.insert(place, Pending { data, batch, copying, cancelled: false });
        self.queue.insert((batch, place));
        *self.owed.entry(batch).or_default() += 1;
        saved
    }

    /// Nothing points to this place any more.
    pub(super) fn cancel(&mut self, place: DiskBlock) {
        let Some(pending) = self.blocks.get_mut(&place) else { return };
        let (batch, copying) = (pending.batch, pending.copying);
        pending.cancelled = true;
        if self.queue.remove(&(batch, place)) {
            self.settle(batch);
        }
        if !copying {
            self.blocks.remove(&place);
        }
    }

    fn settle(&mut self, batch: BatchNumber) {
        if let Some(owed) = self.owed.get_mut(&batch) {
            *owed -= 1;
            if *owed == 0 {
                self.owed.remove(&batch);
            }
        }
    }

    /// The overwrites of all batches up to this one have been copied, on stable media.
    pub(super) fn copied_through(&self, next: BatchNumber) -> BatchNumber {
        self.owed.first_key_value().map_or(next, |(first, _)| *first).previous()
    }

    /// What a sync that begins now makes stable.
    pub(super) fn take_copied(&mut self) -> Vec<BatchNumber> {
        std::mem::take(&mut self.copied)
    }

    pub(super) fn has_copied(&self) -> bool {
        !self.copied.is_empty()
    }

    /// It has.
    pub(super) fn release(&mut self, copied: &[BatchNumber]) {
        copied.iter().for_each(|batch| self.settle(*batch));
    }

    /// The next blocks to copy, by place.
    fn take_due(&mut self, synced: BatchNumber) -> Vec<(DiskBlock, BatchNumber, SharedBuffer)> {
        let blocks = &self.blocks;
        let due = self.queue.iter().take_while(|(batch, _)| *batch <= synced);
        let due = due.filter(|(_, place)| blocks.get(place).is_some_and(|pending| !pending.copying)).take(SORTED);
        let mut due: Vec<_> = due.map(|(batch, place)| (*place, *batch)).collect();
        due.sort_unstable();
        let mut taken = Vec::with_capacity(due.len());
        for (place, batch) in due {
            self.queue.remove(&(batch, place));
            if let Some(pending) = self.blocks.get_mut(&place) {
                pending.copying = true;
                taken.push((place, batch, pending.data.clone()));
            }
        }
        taken
    }
}

impl<D: Disk> EpochMap<D> {
    pub(super) fn advance_copying(&mut self) {
        if self.poisoned.is_some() {
            return;
        }
        let waiting = self.copying.queue.len();
        if waiting == 0 {
            self.copying.eager = false;
        }
        let urgent = self.copying.eager || self.checkpoint.as_ref().is_some_and(|checkpoint| self.copying.has_before(checkpoint.until()));
        self.copying.running = urgent || waiting > if self.copying.running { END } else { BEGIN };
        if !self.copying.running {
            return;
        }
        if self.copying.queue.first().is_some_and(|(batch, _)| *batch > self.journal.synced) && !self.copying.has_copied() {
            self.journal.want_sync();
        }
        while self.copying.in_flight < IN_FLIGHT_MAX {
            let due = self.copying.take_due(self.journal.synced);
            if due.is_empty() {
                break;
            }
            let mut due = due.into_iter().peekable();
            while let Some((at, batch, data)) = due.next() {
                let (mut blocks, mut pieces) = (vec![(at, batch)], vec![data]);
                while let Some((place, batch, data)) =
                    due.next_if(|(place, ..)| *place == at.plus(blocks.len() as u64) && blocks.len() < RUN_MAX)
                {
                    blocks.push((place, batch));
                    pieces.push(data);
                }
                self.counters.copied += blocks.len() as u64;
                self.copying.in_flight += 1;
                self.start(Purpose::Copy(blocks), DiskWork::Write { at, pieces });
            }
        }
    }

    pub(super) fn on_copied(&mut self, blocks: &[(DiskBlock, BatchNumber)], result: io::Result<Option<Buffer>>) {
        self.copying.in_flight -= 1;
        if let Err(error) = result {
            return self.poison("a write of data failed", &error);
        }
        for (place, batch) in blocks {
            self.copying.copied.push(*batch);
            if let Some(pending) = self.copying.blocks.get_mut(place) {
                pending.copying = false;
                if pending.batch == *batch || pending.cancelled {
                    self.copying.blocks.remove(place);
                }
            }
        }
        self.unstall();
    }
}
