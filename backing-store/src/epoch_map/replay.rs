//! Replaying the journal when a store is opened.
//!
//! First its chain is followed to where it ends, and through which batch everything was on stable media is learnt. Of batches
//! after that one the data outside the journal is verified, and the first without it ends the journal: it was never acknowledged
//! as durable, nor was what came after. Then everything before that end is applied.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use super::EpochMap;
use super::catalog::Owners;
use super::codec::FormatError;
use super::commit::Journal;
use super::journal::{Batch, BatchNumber, decode_header, header_length, header_max, payload_max};
use super::open::decode_page;
use super::record::{Record, Run, Slot};
use super::superblock::JournalHead;
use super::tree::{Missing, Tree};
use crate::buffer::{Buffer, SharedBuffer};
use crate::checksum::{Checksum, block_checksum};
use crate::disk::{Disk, DiskBlock, DiskWork};
use crate::store::{BLOCKS_MAX, ReplicaSpec, StoreError};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, Extent, Seq, VolumeId};

const BLOCK: usize = BLOCK_SIZE as usize;

/// Blocks of the journal read at once: thousands of small reads, one after the other, are what a start would take its time for.
const READ_AHEAD: usize = 64;
/// Levels of the highest tree.
const LEVELS_MAX: usize = 5;

/// How a journal was found.
struct Found {
    /// Where it ends: what comes next is written here.
    end: JournalHead,
    /// Through which batch everything was on stable media.
    synced: BatchNumber,
    /// Through which batch overwrites were copied, as the last batch before the end says: a later one may say so of overwrites
    /// that were never copied since it gave up their blocks.
    copied: BatchNumber,
    /// In which opening of the store its last batch was written.
    incarnation: u32,
    /// The batches of which the disk doesn't say that they were on stable media: where each is, and what was copied before it.
    unsaid: VecDeque<(JournalHead, BatchNumber)>,
    /// Batches whose payload is not what their records say.
    hollow: Vec<BatchNumber>,
    /// Whose replicas the records speak of.
    volumes: HashMap<Slot, VolumeId>,
}

/// Batches that were replayed though the disk doesn't say that they were on stable media.
pub(super) struct Unsaid {
    batches: Vec<JournalHead>,
    volumes: HashMap<Slot, VolumeId>,
}

impl<D: Disk> EpochMap<D> {
    /// Reads the journal and applies it. Gives the batches in it of which the disk doesn't say that they were on stable media.
    pub(super) fn replay(&mut self) -> Result<Unsaid, StoreError> {
        let mut found = self.find_end()?;
        self.cut(&mut found)?;
        let ring = self.superblock.geometry.journal_blocks;
        let mut at = self.superblock.journal;
        let mut used = 0;
        while at.batch < found.end.batch {
            let Some((batch, next)) = self.read_batch(&at)? else { return Err(self.damaged("the journal changed while it was read")) };
            let payload = if batch.head.number > found.copied { self.read_payload(&batch)? } else { Vec::new() };
            let mut payload = payload.into_iter();
            self.prefetch(&batch.records);
            for record in &batch.records {
                self.apply_record(record, batch.head.number, &mut payload)?;
            }
            used += (next.offset + ring - at.offset) % ring;
            at = next;
        }
        self.ahead = None;
        self.journal = Journal::new(ring, at, used, found.synced);
        let mut unsaid = found.unsaid;
        unsaid.retain(|(head, _)| head.batch < found.end.batch);
        Ok(Unsaid { batches: unsaid.into_iter().map(|(head, _)| head).collect(), volumes: found.volumes })
    }

    /// Writes what a replay relied on to where it is, once more. Reading it back doesn't show that it is on stable media: after a
    /// sync has failed, a disk may have it in a cache that the next sync says nothing about.
    pub(super) fn write_again(&mut self, unsaid: &Unsaid) -> Result<(), StoreError> {
        for at in &unsaid.batches {
            let Some((batch, _)) = self.read_batch(at)? else { return Err(self.damaged("the journal changed while it was read")) };
            let start = self.superblock.geometry.journal_start().plus(batch.head.offset);
            let whole = self.read_journal(start, batch.head.header_blocks + batch.head.payload_blocks)?;
            self.write_back(start, whole)?;
            for record in &batch.records {
                let Record::Write { slot, block, runs, checksums, .. } = record else { continue };
                let Some(volume) = unsaid.volumes.get(slot) else { continue };
                let absent = self.absent_blocks(*volume, *block, runs, checksums)?;
                let places = runs.iter().flat_map(|run| (0..u64::from(run.count)).map(|step| run.place.plus(step)));
                for (block, place) in (block.get()..).map(BlockIndex::new).zip(places) {
                    // One that an overwrite replaces gets that one's data.
                    if !absent.contains(&block) {
                        let data = self.direct().read(place, 1).map_err(|source| self.io_error("read", source))?;
                        self.write_back(place, data)?;
                    }
                }
            }
        }
        self.ahead = None;
        Ok(())
    }

    fn write_back(&mut self, at: DiskBlock, data: Buffer) -> Result<(), StoreError> {
        let written = self.direct().one(DiskWork::Write { at, pieces: vec![data.share()] });
        written.map(drop).map_err(|source| self.io_error("write", source))
    }

    /// Follows the chain to its end.
    fn find_end(&mut self) -> Result<Found, StoreError> {
        let mut at = self.superblock.journal;
        let before = at.batch.previous();
        let volumes = self.replicas.iter().map(|(slot, replica)| (*slot, replica.record.volume)).collect();
        let mut found =
            Found { end: at, synced: before, copied: before, incarnation: 0, unsaid: VecDeque::new(), hollow: Vec::new(), volumes };
        while let Some((batch, next)) = self.read_batch(&at)? {
            if batch.head.incarnation < found.incarnation {
                break;
            }
            for record in &batch.records {
                if let Record::Create { slot, volume, .. } = record {
                    found.volumes.insert(*slot, *volume);
                }
            }
            if !self.has_payload(&batch, &found.volumes)? {
                found.hollow.push(at.batch);
            }
            found.incarnation = batch.head.incarnation;
            found.synced = found.synced.max(batch.head.synced);
            found.unsaid.push_back((at, found.copied));
            while found.unsaid.pop_front_if(|(head, _)| head.batch <= found.synced).is_some() {}
            found.copied = found.copied.max(batch.head.copied);
            at = next;
        }
        found.end = at;
        self.check_torn(&found)?;
        Ok(found)
    }

    /// The batch that continues the chain at `at`, if there is one, and where the one after it is.
    pub(super) fn read_batch(&mut self, at: &JournalHead) -> Result<Option<(Batch, JournalHead)>, StoreError> {
        let ring = self.superblock.geometry.journal_blocks;
        let places: &[u64] = if at.offset == 0 { &[0] } else { &[at.offset, 0] };
        for offset in places {
            let Some(batch) = self.read_header(*offset)? else { continue };
            let head = &batch.head;
            let fits = head.offset == *offset && offset + head.blocks() <= ring;
            if fits && head.store == self.superblock.id && head.number == at.batch && head.chain == at.chain {
                let offset = (offset + head.blocks()) % ring;
                let next = JournalHead { batch: at.batch.next(), offset, chain: batch.checksum };
                return Ok(Some((batch, next)));
            }
        }
        Ok(None)
    }

    fn read_header(&mut self, offset: u64) -> Result<Option<Batch>, StoreError> {
        let geometry = self.superblock.geometry;
        let at = geometry.journal_start().plus(offset);
        let first = self.read_ahead(at, 1)?;
        let Ok(blocks) = header_length(&first) else { return Ok(None) };
        if offset + blocks as u64 > geometry.journal_blocks {
            return Ok(None);
        }
        let header = if blocks == 1 { first } else { self.read_ahead(at, blocks)? };
        Ok(decode_header(&header).ok())
    }

    fn read_journal(&mut self, at: DiskBlock, blocks: usize) -> Result<Buffer, StoreError> {
        let read = self.direct().read(at, blocks);
        read.map_err(|source| self.io_error("read the journal of", source))
    }

    /// The same from what was read last, or with what follows. Not to be kept: a slice of it holds all of it.
    fn read_ahead(&mut self, at: DiskBlock, blocks: usize) -> Result<SharedBuffer, StoreError> {
        let geometry = self.superblock.geometry;
        let end = geometry.journal_start().plus(geometry.journal_blocks);
        let left = usize::try_from(end.get().saturating_sub(at.get())).unwrap_or(usize::MAX);
        let wanted = blocks * BLOCK;
        let is_within = |(start, ahead): &(DiskBlock, SharedBuffer)| {
            let from = usize::try_from(at.get().checked_sub(start.get())?).ok()?.checked_mul(BLOCK)?;
            (from.checked_add(wanted)? <= ahead.len()).then(|| ahead.slice(from..from + wanted))
        };
        if let Some(found) = self.ahead.as_ref().and_then(is_within) {
            return Ok(found);
        }
        // One bad block in what follows must not be taken for a bad block here.
        // Of a small ring not a large part.
        let ahead = READ_AHEAD.min(usize::try_from(geometry.journal_blocks / 32).unwrap_or(READ_AHEAD));
        match self.direct().read(at, ahead.max(blocks).min(left.max(blocks))) {
            Ok(read) => {
                let read = read.share();
                let found = read.slice(0..wanted);
                self.ahead = Some((at, read));
                Ok(found)
            }
            Err(_) => self.read_journal(at, blocks).map(Buffer::share),
        }
    }

    fn payload_at(&self, batch: &Batch) -> DiskBlock {
        self.superblock.geometry.journal_start().plus(batch.head.offset + batch.head.header_blocks as u64)
    }

    /// Whether a batch's payload is what its records say.
    fn has_payload(&mut self, batch: &Batch, volumes: &HashMap<Slot, VolumeId>) -> Result<bool, StoreError> {
        if batch.head.payload_blocks == 0 {
            return Ok(true);
        }
        let Ok(payload) = self.read_ahead(self.payload_at(batch), batch.head.payload_blocks) else { return Ok(false) };
        let mut blocks = payload.chunks_exact(BLOCK);
        for record in &batch.records {
            let Record::Overwrite { slot, block, checksums, .. } = record else { continue };
            let Some(volume) = volumes.get(slot) else { return Ok(false) };
            let whole = (block.get()..).zip(checksums).all(|(index, checksum)| {
                blocks.next().is_some_and(|data| block_checksum(*volume, BlockIndex::new(index), data) == *checksum)
            });
            if !whole {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_payload(&mut self, batch: &Batch) -> Result<Vec<SharedBuffer>, StoreError> {
        if batch.head.payload_blocks == 0 {
            return Ok(Vec::new());
        }
        let ahead = self.read_ahead(self.payload_at(batch), batch.head.payload_blocks)?;
        let mut payload = self.pool.take(ahead.len());
        payload.copy_from_slice(&ahead);
        let payload = payload.share();
        Ok((0..batch.head.payload_blocks).map(|index| payload.slice(index * BLOCK..(index + 1) * BLOCK)).collect())
    }

    /// The journal ends at `found`: by a crash, or because something in its middle is damaged? A later batch that was written when
    /// this one was on stable media tells.
    fn check_torn(&mut self, found: &Found) -> Result<(), StoreError> {
        let ring = self.superblock.geometry.journal_blocks;
        let reach = (2 * (header_max(ring) + payload_max(ring))) as u64;
        // It is behind the end, or at the ring's beginning. Each place is looked at once.
        let behind = (0..reach).map(|step| (found.end.offset + step) % ring);
        let is_behind = |offset: &u64| (offset + ring - found.end.offset) % ring < reach;
        let beginning = (0..reach).filter(|offset| !is_behind(offset));
        for offset in behind.chain(beginning) {
            let Some(batch) = self.read_header(offset)? else { continue };
            let head = &batch.head;
            let is_later = head.store == self.superblock.id && head.offset == offset && head.incarnation >= found.incarnation;
            if is_later && head.number > found.end.batch && head.synced >= found.end.batch {
                return Err(self.not_whole(found.end.batch));
            }
        }
        Ok(())
    }

    fn not_whole(&self, batch: BatchNumber) -> StoreError {
        self.damaged(format_args!("batch {} of the journal, which was on stable media, is not whole", batch.0))
    }

    /// Moves the end before the first batch whose data, in the journal or outside, is not there and needed.
    ///
    /// A block that an overwrite in a later batch replaces needn't be there if that batch is before the end, too: it may have been
    /// copied over the block, or have been at it when the crash came.
    fn cut(&mut self, found: &mut Found) -> Result<(), StoreError> {
        let mut absent: HashMap<(Slot, BlockIndex), BatchNumber> = HashMap::new();
        let mut replaced: Vec<(BatchNumber, BatchNumber)> = Vec::new();
        for (at, _) in &found.unsaid {
            let Some((batch, _)) = self.read_batch(at)? else { return Err(self.damaged("the journal changed while it was read")) };
            let number = batch.head.number;
            for record in &batch.records {
                match record {
                    Record::Write { slot, block, runs, checksums, .. } => {
                        let Some(volume) = found.volumes.get(slot) else { return Err(self.damaged(FormatError::Field("record.slot"))) };
                        for block in self.absent_blocks(*volume, *block, runs, checksums)? {
                            absent.entry((*slot, block)).or_insert(number);
                        }
                    }
                    Record::Overwrite { slot, block, checksums, .. } => {
                        let blocks = (block.get()..).map(BlockIndex::new).take(checksums.len());
                        replaced.extend(blocks.filter_map(|block| Some((absent.remove(&(*slot, block))?, number))));
                    }
                    _ => {}
                }
            }
        }
        let first_absent = absent.into_values().min();
        let mut end = first_absent.unwrap_or(found.end.batch);
        loop {
            if let Some((at, copied)) = found.unsaid.iter().find(|(at, _)| at.batch == end) {
                (found.end, found.copied) = (*at, *copied);
            }
            let replaced = replaced.iter().find(|(first, by)| *first < end && end <= *by).map(|(first, _)| *first);
            // What was copied is not needed in the journal any more.
            let hollow = found.hollow.iter().find(|batch| **batch > found.copied && **batch < end).copied();
            let Some(earlier) = replaced.into_iter().chain(hollow).min() else { return Ok(()) };
            if earlier <= found.synced {
                return Err(self.not_whole(earlier));
            }
            end = earlier;
        }
    }

    /// Which blocks of a write to fresh places are not there.
    fn absent_blocks(
        &mut self,
        volume: VolumeId,
        block: BlockIndex,
        runs: &[Run],
        checksums: &[Checksum],
    ) -> Result<Vec<BlockIndex>, StoreError> {
        let geometry = self.superblock.geometry;
        let mut expected = (block.get()..).map(BlockIndex::new).zip(checksums);
        let mut absent = Vec::new();
        for run in runs {
            let count = u64::from(run.count);
            let inside = geometry.is_data(run.place) && run.place.get() + count <= geometry.data_end().get();
            if !inside || count == 0 || count > BLOCKS_MAX {
                return Err(self.damaged(FormatError::Field("run")));
            }
            // What can't be read was not written.
            let data = self.direct().read(run.place, run.count as usize).ok();
            let mut blocks = data.iter().flat_map(|data| data.chunks_exact(BLOCK));
            for (index, checksum) in expected.by_ref().take(run.count as usize) {
                if blocks.next().is_none_or(|data| block_checksum(volume, index, data) != *checksum) {
                    absent.push(index);
                }
            }
        }
        Ok(absent)
    }

    // Applying.

    fn apply_record(
        &mut self,
        record: &Record,
        batch: BatchNumber,
        payload: &mut impl Iterator<Item = SharedBuffer>,
    ) -> Result<(), StoreError> {
        let slot = record.slot();
        if let Record::Create { volume, size, origin, .. } = record {
            self.apply_create(slot, ReplicaSpec { volume: *volume, size: *size }, *origin);
            return Ok(());
        }
        if !self.replicas.contains_key(&slot) {
            return Err(self.damaged(FormatError::Field("record.slot")));
        }
        match record {
            Record::Write { seq, block, runs, checksums, .. } => {
                let blocks = self.reach(slot, *block, checksums.len() as u64, false)?;
                let places: Vec<DiskBlock> =
                    runs.iter().flat_map(|run| (0..u64::from(run.count)).map(|step| run.place.plus(step))).collect();
                for place in &places {
                    self.allocator.take_at(*place).map_err(|error| self.damaged(error))?;
                }
                if let Some(replica) = self.replicas.get_mut(&slot) {
                    let before = replica.record.promise();
                    replica.record.allocated += places.len() as u64;
                    self.space.promise(Some(before), Some(&replica.record));
                }
                self.map(slot, blocks.start, &places, checksums);
                self.note_write(slot, *seq, &blocks);
            }
            Record::Overwrite { seq, block, checksums, .. } => {
                let blocks = self.reach(slot, *block, checksums.len() as u64, false)?;
                let entries = self.entries(slot, &blocks);
                if entries.iter().any(|entry| !entry.is_mapped()) {
                    return Err(self.damaged(FormatError::Field("record.block")));
                }
                let places: Vec<DiskBlock> = entries.iter().map(|entry| entry.place).collect();
                for place in &places {
                    let Some(data) = payload.next() else { continue };
                    self.copying.insert(*place, data, batch);
                }
                self.map(slot, blocks.start, &places, checksums);
                self.note_write(slot, *seq, &blocks);
            }
            Record::Zeroes { seq, block, count, .. } => {
                let blocks = self.reach(slot, *block, *count, true)?;
                self.zero(slot, &blocks);
                self.note_write(slot, *seq, &blocks);
            }
            Record::Delete { .. } => self.apply_delete(slot),
            _ => self.apply_control_record(record),
        }
        Ok(())
    }

    /// Checks that a replica has these blocks, and reads the pages over them.
    fn reach(&mut self, slot: Slot, block: BlockIndex, count: u64, whole: bool) -> Result<Range<u64>, StoreError> {
        let blocks = block.get()..block.get().saturating_add(count);
        let found = self.replicas.get(&slot).filter(|replica| blocks.end <= replica.record.size.blocks());
        let Some((owners, tree)) = found.map(|replica| (replica.record.owners(), replica.record.tree.clone())) else {
            return Err(self.damaged(FormatError::Field("record.block")));
        };
        self.load_pages(&tree, &owners, &blocks, whole)?;
        Ok(blocks)
    }

    /// Reads the pages of a tree over `blocks`, as [`Tree::missing`] tells.
    pub(super) fn load_pages(&mut self, tree: &Tree, owners: &Owners, blocks: &Range<u64>, whole: bool) -> Result<(), StoreError> {
        loop {
            let mut missing = Vec::new();
            if !blocks.is_empty() {
                tree.missing(&mut self.cache, blocks, whole, &mut missing);
            }
            if missing.is_empty() {
                return Ok(());
            }
            for missing in missing {
                self.load_page(&missing, owners)?;
            }
        }
    }

    /// Reads the pages that these records will need, many at once. What can't be read now is found out when it is needed.
    fn prefetch(&mut self, records: &[Record]) {
        // One level of all trees at a time, and no deeper than any tree is.
        for _ in 0..LEVELS_MAX {
            let mut wanted: HashMap<DiskBlock, (Missing, Slot)> = HashMap::new();
            for record in records {
                let (block, count) = match record {
                    Record::Write { block, checksums, .. } | Record::Overwrite { block, checksums, .. } => {
                        (block.get(), checksums.len() as u64)
                    }
                    Record::Zeroes { block, count, .. } => (block.get(), *count),
                    _ => continue,
                };
                let Some(replica) = self.replicas.get(&record.slot()) else { continue };
                let blocks = block..block.saturating_add(count).min(replica.record.size.blocks());
                let mut missing = Vec::new();
                if !blocks.is_empty() {
                    let whole = matches!(record, Record::Zeroes { .. });
                    replica.record.tree.missing(&mut self.cache, &blocks, whole, &mut missing);
                }
                wanted.extend(missing.into_iter().map(|missing| (missing.pointer.place, (missing, record.slot()))));
            }
            if wanted.is_empty() {
                return;
            }
            let wanted: Vec<(DiskBlock, (Missing, Slot))> = wanted.into_iter().collect();
            let places: Vec<DiskBlock> = wanted.iter().map(|(place, _)| *place).collect();
            self.counters.pages_read += places.len() as u64;
            let pages = self.direct().read_pages(&places);
            for ((place, (missing, slot)), page) in wanted.into_iter().zip(pages) {
                let Some(owners) = self.replicas.get(&slot).map(|replica| replica.record.owners()) else { continue };
                let Ok(node) = decode_page(&missing, &owners, &self.superblock.geometry, page.map(Some)) else { return };
                self.cache.insert(place, node);
            }
        }
    }

    pub(super) fn load_page(&mut self, missing: &Missing, owners: &Owners) -> Result<(), StoreError> {
        self.counters.pages_read += 1;
        let page = self.direct().read(missing.pointer.place, 1).map(Some);
        let node = decode_page(missing, owners, &self.superblock.geometry, page).map_err(|error| self.damaged(error))?;
        self.cache.insert(missing.pointer.place, node);
        Ok(())
    }

    fn note_write(&mut self, slot: Slot, seq: Seq, blocks: &Range<u64>) {
        if seq == Seq::ZERO {
            return;
        }
        let length = ByteLength::new((blocks.end - blocks.start) * u64::from(BLOCK_SIZE));
        if let Some(replica) = self.replicas.get_mut(&slot) {
            replica.record.position = seq;
            if let Some(extent) = Extent::new(BlockIndex::new(blocks.start).offset(), length) {
                replica.record.log.insert(seq, extent);
            }
        }
    }
}
