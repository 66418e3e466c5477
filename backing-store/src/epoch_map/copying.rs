//! Overwrites that are in the journal with their data, and are copied to their places when that is on stable media.
//!
//! Until then their data is in memory, where reads find it. A place's data is copied from its newest overwrite; ones before
//! that are saved, unless a running checkpoint needs them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;

use super::journal::BatchNumber;
use super::numbers::NumberMap;
use super::{EpochMap, Purpose};
use crate::buffer::{Buffer, SharedBuffer};
use crate::disk::{Disk, DiskBlock, DiskWork};

/// Copying begins when more blocks than that wait (4 MiB), unless something asks for it before: waiting saves copies of what is
/// overwritten again.
const LEFT_WAITING: usize = 1024;
/// For each so many more, one more I/O is under way. So copying settles at the rate of overwrites, beside them: a disk that gets
/// hundreds of copies at once lets the journal wait for all of them.
const WAITING_PER_COPY: usize = 64;
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

/// Copies of neighbours: one I/O.
#[derive(Debug)]
struct Run {
    at: DiskBlock,
    blocks: Vec<(DiskBlock, BatchNumber)>,
    pieces: Vec<SharedBuffer>,
}

#[derive(Debug, Default)]
pub(super) struct Copying {
    blocks: NumberMap<DiskBlock, Pending>,
    queue: BTreeSet<(BatchNumber, DiskBlock)>,
    /// How many copies of each batch are not yet on stable media.
    owed: BTreeMap<BatchNumber, usize>,
    /// Copies that have ended and are not yet on stable media.
    copied: Vec<BatchNumber>,
    /// What is copied next, and how many blocks that is.
    runs: VecDeque<Run>,
    in_runs: usize,
    in_flight: usize,
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

    /// How many I/Os may be under way.
    fn in_flight_max(&self, urgent: bool) -> usize {
        let waiting = self.queue.len() + self.in_runs;
        if urgent { IN_FLIGHT_MAX } else { (waiting.saturating_sub(LEFT_WAITING) / WAITING_PER_COPY).min(IN_FLIGHT_MAX) }
    }

    /// The next copies. Their data is on stable media in the journal.
    fn take_run(&mut self, synced: BatchNumber) -> Option<Run> {
        if self.runs.is_empty() {
            self.sort_due(synced);
        }
        let run = self.runs.pop_front()?;
        self.in_runs -= run.blocks.len();
        Some(run)
    }

    /// Makes runs of the oldest blocks, by place.
    fn sort_due(&mut self, synced: BatchNumber) {
        let blocks = &self.blocks;
        let due = self.queue.iter().take_while(|(batch, _)| *batch <= synced);
        let due = due.filter(|(_, place)| blocks.get(place).is_some_and(|pending| !pending.copying)).take(SORTED);
        let mut due: Vec<_> = due.map(|(batch, place)| (*place, *batch)).collect();
        due.sort_unstable();
        for (place, batch) in due {
            self.queue.remove(&(batch, place));
            let Some(pending) = self.blocks.get_mut(&place) else { continue };
            pending.copying = true;
            self.in_runs += 1;
            let data = pending.data.clone();
            match self.runs.back_mut().filter(|run| run.blocks.len() < RUN_MAX && run.at.plus(run.blocks.len() as u64) == place) {
                Some(run) => {
                    run.blocks.push((place, batch));
                    run.pieces.push(data);
                }
                None => self.runs.push_back(Run { at: place, blocks: vec![(place, batch)], pieces: vec![data] }),
            }
        }
    }
}

impl<D: Disk> EpochMap<D> {
    pub(super) fn advance_copying(&mut self) {
        if self.poisoned.is_some() {
            return;
        }
        if self.copying.queue.is_empty() && self.copying.runs.is_empty() {
            self.copying.eager = false;
        }
        let urgent = self.copying.eager || self.checkpoint.as_ref().is_some_and(|checkpoint| self.copying.has_before(checkpoint.until()));
        let most = self.copying.in_flight_max(urgent);
        if most > 0 && self.copying.queue.first().is_some_and(|(batch, _)| *batch > self.journal.synced) && !self.copying.has_copied() {
            self.journal.want_sync();
        }
        while self.copying.in_flight < most
            && let Some(Run { at, blocks, pieces }) = self.copying.take_run(self.journal.synced)
        {
            self.counters.copied += blocks.len() as u64;
            self.copying.in_flight += 1;
            self.start(Purpose::Copy(blocks), DiskWork::Write { at, pieces });
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
