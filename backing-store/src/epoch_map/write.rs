//! Applying changes: which blocks are overwritten through the journal, which go to fresh places, and what becomes of the old ones.

use std::ops::Range;

use super::page::Entry;
use super::record::{Record, Run, Slot};
use super::replica::{Change, ChangeKind};
use super::space::{Floor, Shortage};
use super::tree::Missing;
use super::{EpochMap, OpId, Purpose, Waiter};
use crate::buffer::SharedBuffer;
use crate::checksum::{Checksum, Checksums};
use crate::disk::{Disk, DiskBlock, DiskWork};
use crate::store::{Outcome, StoreError, Token};
use crate::units::{BLOCK_SIZE, BlockIndex, Epoch, Extent, Seq, VolumeSize};

/// Writes of up to so many blocks (32 KiB) are overwritten in place, through the journal, so that volumes stay laid out as they
/// are. Larger ones go to fresh places: that is one write instead of two, and long enough to be read back at speed.
pub(super) const IN_PLACE_MAX: u64 = 8;

/// What a change does with the first of the queue.
pub(super) enum Verdict {
    /// It was applied, or refused: the next may come.
    Next,
    /// It waits for pages that are being read, or for readers before it, and is looked at again when these are done.
    Wait,
    /// It waits for space, for a checkpoint or for copies.
    Stall,
}

/// Neighbours that are treated alike.
struct Stretch {
    blocks: Range<u64>,
    in_place: bool,
}

pub(super) fn block_range(extent: Extent) -> Range<u64> {
    let first = extent.first_block().get();
    first..first + extent.block_count()
}

impl Change {
    /// The size that the volume has after it, if it changes that.
    pub(super) fn new_size(&self) -> Option<VolumeSize> {
        if let ChangeKind::Expand { size } = self.kind { Some(size) } else { None }
    }
}

impl<D: Disk> EpochMap<D> {
    pub(super) fn advance_replica(&mut self, slot: Slot) {
        while self.poisoned.is_none() {
            match self.apply_first(slot) {
                Verdict::Next => self.unpark(slot),
                Verdict::Wait => return,
                Verdict::Stall => {
                    if let Some(replica) = self.replicas.get_mut(&slot) {
                        replica.stalled = true;
                    }
                    return;
                }
            }
        }
    }

    fn apply_first(&mut self, slot: Slot) -> Verdict {
        let Some(replica) = self.replicas.get(&slot) else { return Verdict::Wait };
        let Some(change) = replica.queue.front() else { return Verdict::Wait };
        if replica.is_read(change) {
            return Verdict::Wait;
        }
        if !self.journal.has_room() || self.dirty > self.space.dirty_limit() || self.dead.len() >= self.limits.dead {
            // Trees that are taken apart need no checkpoint.
            self.checkpoint_wanted |= self.dead.len() < self.limits.dead;
            return Verdict::Stall;
        }
        self.retry_preparing();
        if let Err(shortage) = self.may_change() {
            if shortage == Shortage::Passing {
                self.checkpoint_wanted |= self.allocator.resting() > 0;
                return Verdict::Stall;
            }
            let error = self.no_space(1);
            self.refuse_first(slot, error);
            return Verdict::Next;
        }
        let Some(change) = self.replicas.get(&slot).and_then(|replica| replica.queue.front()) else { return Verdict::Wait };
        match &change.kind {
            ChangeKind::Write { seq, extent, .. } if !extent.is_empty() => {
                let (seq, extent) = (*seq, *extent);
                self.apply_write(slot, seq, extent)
            }
            // A write of nothing has a sequence, too.
            ChangeKind::Write { seq, extent, .. } | ChangeKind::Zeroes { seq, extent } => {
                let (seq, extent) = (*seq, *extent);
                self.apply_zeroes(slot, seq, extent)
            }
            _ => self.apply_control(slot),
        }
    }

    /// Why a write may not come now.
    fn refusal(&self, slot: Slot, seq: Option<Seq>) -> Option<StoreError> {
        let replica = self.replicas.get(&slot)?;
        let volume = replica.record.volume;
        let reason = "a write's sequence does not follow the position";
        seq.filter(|seq| *seq != replica.record.position.next()).map(|_| StoreError::Misuse { volume, reason })
    }

    /// Reads what is missing of these pages. Whether all are there.
    fn has_pages(&mut self, slot: Slot, blocks: &Range<u64>, whole: bool) -> bool {
        let Some(replica) = self.replicas.get(&slot) else { return false };
        let mut missing: Vec<Missing> = Vec::new();
        replica.record.tree.missing(&mut self.cache, blocks, whole, &mut missing);
        if missing.is_empty() {
            return true;
        }
        let owners = replica.record.owners();
        missing.iter().for_each(|missing| self.load(*missing, &owners, Waiter::Replica(slot)));
        false
    }

    /// The entries of blocks whose pages are there.
    pub(super) fn entries(&mut self, slot: Slot, blocks: &Range<u64>) -> Vec<Entry> {
        let found = self.replicas.get(&slot).and_then(|replica| replica.record.tree.entries(&mut self.cache, blocks).ok());
        found.unwrap_or_default()
    }

    fn apply_write(&mut self, slot: Slot, seq: Option<Seq>, extent: Extent) -> Verdict {
        if let Some(error) = self.refusal(slot, seq) {
            self.refuse_first(slot, error);
            return Verdict::Next;
        }
        let blocks = block_range(extent);
        if !self.has_pages(slot, &blocks, false) {
            return Verdict::Wait;
        }
        let old = self.entries(slot, &blocks);
        let stretches = self.stretches(slot, &blocks, &old);
        let fresh: u64 =
            stretches.iter().filter(|stretch| !stretch.in_place).map(|stretch| stretch.blocks.end - stretch.blocks.start).sum();
        if fresh > 0
            && let Err(shortage) = self.may_take(slot, fresh, self.returning(slot, &stretches, &blocks, &old))
        {
            if shortage == Shortage::Passing {
                self.checkpoint_wanted |= self.allocator.resting() > 0;
                return Verdict::Stall;
            }
            let error = self.no_space(fresh);
            self.refuse_first(slot, error);
            return Verdict::Next;
        }
        if self.copying.is_full() {
            self.copying.eager = true;
            return Verdict::Stall;
        }
        let Some(replica) = self.replicas.get_mut(&slot) else { return Verdict::Wait };
        let Some(Change { op, token, kind: ChangeKind::Write { checksums, data, .. } }) = replica.queue.pop_front() else {
            return Verdict::Wait;
        };
        self.write(slot, (op, token), seq, extent, &stretches, &old, &checksums, &data);
        Verdict::Next
    }

    /// Which blocks of a write are overwritten where they are.
    fn stretches(&self, slot: Slot, blocks: &Range<u64>, old: &[Entry]) -> Vec<Stretch> {
        let Some(replica) = self.replicas.get(&slot) else { return Vec::new() };
        let until = self.checkpoint.as_ref().map(|checkpoint| checkpoint.until());
        let small = blocks.end - blocks.start <= IN_PLACE_MAX;
        let floor = replica.in_place_floor();
        let in_place = |entry: &Entry| {
            small
                && entry.is_mapped()
                && entry.epoch > floor
                && !self.suspect.contains(&entry.place)
                // What a checkpoint needs there must be copied first.
                && until.is_none_or(|until| !self.copying.is_needed_before(entry.place, until))
        };
        let mut stretches: Vec<Stretch> = Vec::new();
        for (index, entry) in blocks.clone().zip(old) {
            let in_place = in_place(entry);
            match stretches.last_mut() {
                Some(last) if last.in_place == in_place => last.blocks.end = index + 1,
                _ => stretches.push(Stretch { blocks: index..index + 1, in_place }),
            }
        }
        stretches
    }

    /// How many blocks a write gives up.
    fn returning(&self, slot: Slot, stretches: &[Stretch], blocks: &Range<u64>, old: &[Entry]) -> u64 {
        let Some(replica) = self.replicas.get(&slot) else { return 0 };
        let redirected = |index: u64| stretches.iter().any(|stretch| !stretch.in_place && stretch.blocks.contains(&index));
        let given_up =
            |(index, entry): &(u64, &Entry)| entry.is_mapped() && redirected(*index) && entry.epoch > replica.record.floor_at(*index);
        blocks.clone().zip(old).filter(given_up).count() as u64
    }

    #[expect(clippy::too_many_arguments, reason = "all that a write is")]
    fn write(
        &mut self,
        slot: Slot,
        (op, token): (OpId, Token),
        seq: Option<Seq>,
        extent: Extent,
        stretches: &[Stretch],
        old: &[Entry],
        checksums: &[Checksum],
        data: &SharedBuffer,
    ) {
        let first = extent.first_block().get();
        let place_in = |block: u64| usize::try_from(block - first).unwrap_or(0);
        let mut records = Vec::with_capacity(stretches.len());
        let mut payload = Vec::new();
        let mut new_places = Vec::with_capacity(old.len());
        let mut runs_of_data: Vec<(Run, u64)> = Vec::new();
        for stretch in stretches {
            let range = place_in(stretch.blocks.start)..place_in(stretch.blocks.end);
            let block = BlockIndex::new(stretch.blocks.start);
            let (seq, checksums) = (seq.unwrap_or(Seq::ZERO), Checksums::from(&checksums[range.clone()]));
            if stretch.in_place {
                payload.push(data.slice(range.start * BLOCK_SIZE as usize..range.end * BLOCK_SIZE as usize));
                new_places.extend(old[range].iter().map(|entry| entry.place));
                records.push(Record::Overwrite { slot, seq, block, checksums });
            } else {
                let runs = self.allocate(slot, &stretch.blocks, &old[range]);
                let mut at = stretch.blocks.start;
                for run in &runs {
                    runs_of_data.push((*run, at));
                    new_places.extend((0..u64::from(run.count)).map(|step| run.place.plus(step)));
                    at += u64::from(run.count);
                }
                records.push(Record::Write { slot, seq, block, runs, checksums });
            }
        }
        let batch = self.record(&records, payload);
        for (run, at) in runs_of_data {
            let start = place_in(at) * BLOCK_SIZE as usize;
            let piece = data.slice(start..start + run.count as usize * BLOCK_SIZE as usize);
            if let Some(replica) = self.replicas.get_mut(&slot) {
                replica.unreadable.push((op, extent));
            }
            self.counters.data_written += u64::from(run.count);
            self.hold(batch);
            self.start(Purpose::Fresh(batch, slot, op), DiskWork::Write { at: run.place, pieces: vec![piece] });
        }
        for stretch in stretches.iter().filter(|stretch| stretch.in_place) {
            for block in stretch.blocks.clone() {
                let (position, start) = (place_in(block), place_in(block) * BLOCK_SIZE as usize);
                let piece = data.slice(start..start + BLOCK_SIZE as usize);
                if self.copying.insert(new_places[position], piece, batch) {
                    self.counters.coalesced += 1;
                }
            }
        }
        self.map(slot, first, &new_places, checksums);
        if let (Some(seq), Some(replica)) = (seq, self.replicas.get_mut(&slot)) {
            replica.record.position = seq;
            replica.record.log.insert(seq, extent);
        }
        self.end_with(batch, slot, token, Outcome::Written, seq);
    }

    /// Places for these blocks: what was there and around them says where.
    fn allocate(&mut self, slot: Slot, blocks: &Range<u64>, old: &[Entry]) -> Vec<Run> {
        let mut wanted = self.neighbour(slot, blocks.start, old);
        let mut runs: Vec<Run> = Vec::new();
        let mut next = blocks.start;
        while next < blocks.end {
            let count = u32::try_from(blocks.end - next).unwrap_or(u32::MAX);
            let run = self.allocator.run(wanted, next, count);
            assert!(run.is_some(), "room was there a moment ago");
            let Some(run) = run else { return runs };
            next += u64::from(run.count);
            wanted = Some(run.place.plus(u64::from(run.count)));
            match runs.last_mut().filter(|last| last.place.plus(u64::from(last.count)) == run.place) {
                Some(last) => last.count += run.count,
                None => runs.push(run),
            }
        }
        if let Some(replica) = self.replicas.get_mut(&slot) {
            let before = replica.record.promise();
            replica.record.allocated += blocks.end - blocks.start;
            self.space.promise(Some(before), Some(&replica.record));
        }
        runs
    }

    /// Where the first of these blocks would lie beside its neighbours in the volume.
    fn neighbour(&mut self, slot: Slot, block: u64, old: &[Entry]) -> Option<DiskBlock> {
        // A redirected write: anywhere but where the old blocks are; beside what precedes them is not free either.
        if old.first().is_some_and(Entry::is_mapped) {
            return None;
        }
        let leaf = block / 256 * 256;
        let before = self.entries(slot, &(leaf.max(block.saturating_sub(1))..block));
        if let Some(entry) = before.last().filter(|entry| entry.is_mapped()) {
            return Some(entry.place.plus(1));
        }
        let around = self.entries(slot, &(leaf..(leaf + 256)));
        let at = |index: usize| leaf + index as u64;
        let (index, entry) =
            around.iter().enumerate().filter(|(_, entry)| entry.is_mapped()).min_by_key(|(index, _)| at(*index).abs_diff(block))?;
        (entry.place.get() + block).checked_sub(at(index)).map(DiskBlock::new)
    }

    /// Points the map to new places, in the present epoch, and gives up what only it needed.
    pub(super) fn map(&mut self, slot: Slot, first: u64, places: &[DiskBlock], checksums: &[Checksum]) {
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        let record = &mut replica.record;
        let (epoch, foreign) = (record.epoch, record.lineage_floor());
        let range = first..first + places.len() as u64;
        let mut left: Vec<(u64, Entry)> = Vec::new();
        let mut kept = 0;
        let mut change = |index: u64, entry: &mut Entry| {
            let position = usize::try_from(index - first).unwrap_or(usize::MAX);
            let new = Entry { place: places[position], epoch, checksum: checksums[position] };
            let old = std::mem::replace(entry, new);
            if old.place == new.place {
                kept += 1;
            } else if old.is_mapped() {
                left.push((index, old));
            }
        };
        record.tree.change(&mut self.cache, &range, epoch, &mut self.dirty, &mut change);
        record.live += places.len() as u64 - kept;
        for (index, entry) in left {
            let needed = self.replicas.get(&slot).map_or(Epoch::NEVER, |replica| replica.record.floor_at(index));
            self.displace_block(slot, entry, Floor { needed, foreign });
        }
    }

    fn apply_zeroes(&mut self, slot: Slot, seq: Option<Seq>, extent: Extent) -> Verdict {
        if let Some(error) = self.refusal(slot, seq) {
            self.refuse_first(slot, error);
            return Verdict::Next;
        }
        let blocks = block_range(extent);
        if !blocks.is_empty() && !self.has_pages(slot, &blocks, true) {
            return Verdict::Wait;
        }
        let Some(change) = self.replicas.get_mut(&slot).and_then(|replica| replica.queue.pop_front()) else { return Verdict::Wait };
        let (block, count) = (BlockIndex::new(blocks.start), extent.block_count());
        let batch = self.record(&[Record::Zeroes { slot, seq: seq.unwrap_or(Seq::ZERO), block, count }], Vec::new());
        self.zero(slot, &blocks);
        if let (Some(seq), Some(replica)) = (seq, self.replicas.get_mut(&slot)) {
            replica.record.position = seq;
            replica.record.log.insert(seq, extent);
        }
        self.end_with(batch, slot, change.token, Outcome::Written, seq);
        Verdict::Next
    }

    /// Makes blocks zeros in the map, in the present epoch.
    pub(super) fn zero(&mut self, slot: Slot, blocks: &Range<u64>) {
        let Some(replica) = self.replicas.get_mut(&slot).filter(|_| !blocks.is_empty()) else { return };
        let record = &mut replica.record;
        let mut left = Vec::new();
        record.tree.zero(&mut self.cache, blocks, record.epoch, &mut self.dirty, &mut |displaced| left.push(displaced));
        left.into_iter().for_each(|displaced| self.displace(slot, displaced));
    }
}
