//! Reading blocks: where they are, reading them, verifying them.

use std::io;

use super::{Kind, Part, ReadKey, ReadOperation, Work, tree_of};
use crate::buffer::Buffer;
use crate::checksum::{Checksums, block_checksum, zero_block_checksums};
use crate::disk::{Disk, DiskBlock, DiskWork};
use crate::epoch_map::page::Entry;
use crate::epoch_map::write::block_range;
use crate::epoch_map::{EpochMap, Purpose, Waiter};
use crate::store::{Outcome, ReadData, StoreError};
use crate::units::{BLOCK_SIZE, BlockIndex};

impl<D: Disk> EpochMap<D> {
    /// Finds where a read's blocks are, and starts reading them.
    pub(super) fn locate(&mut self, key: ReadKey) {
        let Some((slot, extent, snapshot)) = self.reading.under_way.get(&key).and_then(|read| match &read.kind {
            Kind::Read { extent, snapshot, .. } => Some((read.slot, *extent, *snapshot)),
            _ => None,
        }) else {
            return;
        };
        let Some(record) = self.replicas.get(&slot).map(|replica| &replica.record) else { return };
        let (tree, size) = match tree_of(record, snapshot) {
            Ok(found) => found,
            Err(error) => return self.end_read(key, Err(error)),
        };
        let blocks = block_range(extent);
        if blocks.end > size {
            let reason = "an extent reaches past the end of the snapshot";
            let error = StoreError::Misuse { volume: record.volume, reason };
            return self.end_read(key, Err(error));
        }
        let entries = match tree.entries(&mut self.cache, &blocks) {
            Ok(entries) => entries,
            Err(missing) => {
                let owners = record.owners();
                return missing.iter().for_each(|missing| self.load(*missing, &owners, Waiter::Read(key)));
            }
        };
        if entries.iter().all(|entry| !entry.is_mapped()) {
            return self.end_read(key, Ok(Outcome::Read(ReadData::Zeroes)));
        }
        let buffer = self.pool.take(entries.len() * BLOCK_SIZE as usize);
        self.read_blocks(key, blocks.start, entries, buffer);
    }

    fn read_blocks(&mut self, key: ReadKey, first: u64, entries: Vec<Entry>, mut buffer: Buffer) {
        let mut parts: Vec<Part> = Vec::new();
        for (position, entry) in entries.iter().enumerate() {
            let block = first + position as u64;
            let place = &mut buffer[position * BLOCK_SIZE as usize..][..BLOCK_SIZE as usize];
            if !entry.is_mapped() {
                place.fill(0);
            } else if let Some(data) = self.copying.get(entry.place) {
                place.copy_from_slice(data);
            } else {
                match parts.last_mut() {
                    Some(last) if last.blocks.end == block && last.place.plus(block - last.blocks.start) == entry.place => {
                        last.blocks.end = block + 1
                    }
                    _ => parts.push(Part { blocks: block..block + 1, place: entry.place }),
                }
            }
        }
        let whole = parts.len() == 1 && parts[0].blocks.end - parts[0].blocks.start == entries.len() as u64;
        let mut work = Work { entries, buffer, outstanding: parts.len(), failed: None };
        let started: Vec<(DiskBlock, Buffer)> = if whole {
            // Straight into the answer.
            let empty = self.pool.take(0);
            vec![(parts[0].place, std::mem::replace(&mut work.buffer, empty))]
        } else {
            let length = |part: &Part| usize::try_from(part.blocks.end - part.blocks.start).unwrap_or(0) * BLOCK_SIZE as usize;
            parts.iter().map(|part| (part.place, self.pool.take(length(part)))).collect()
        };
        if let Some(ReadOperation { kind: Kind::Read { work: place, .. }, .. }) = self.reading.under_way.get_mut(&key) {
            *place = Some(work);
        }
        if started.is_empty() {
            return self.finish_read(key);
        }
        if let Some(read) = self.reading.under_way.get_mut(&key) {
            read.parts = parts;
        }
        for (at, buffer) in started {
            self.counters.data_read += (buffer.len() / BLOCK_SIZE as usize) as u64;
            self.start(Purpose::Data(key, at), DiskWork::Read { at, buffer });
        }
    }

    pub(in crate::epoch_map) fn on_data(&mut self, key: ReadKey, at: DiskBlock, result: io::Result<Option<Buffer>>) {
        let Some(read) = self.reading.under_way.get_mut(&key) else { return };
        let Some(part) = read.parts.iter().find(|part| part.place == at).cloned() else { return };
        if result.is_err() && part.blocks.end - part.blocks.start > 1 {
            return self.read_one_by_one(key, &part);
        }
        match &mut read.kind {
            Kind::Read { extent, work: Some(work), .. } => {
                work.outstanding -= 1;
                let first = extent.first_block().get();
                match result {
                    Ok(Some(buffer)) if work.buffer.is_empty() => work.buffer = buffer,
                    Ok(Some(buffer)) => {
                        let start = usize::try_from(part.blocks.start - first).unwrap_or(0) * BLOCK_SIZE as usize;
                        work.buffer[start..start + buffer.len()].copy_from_slice(&buffer);
                    }
                    failed => {
                        let source = failed.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                        if self.suspect.insert(part.place) {
                            let (store, volume) = (self.superblock.id, read.volume);
                            tracing::warn!(%store, %volume, block = part.blocks.start, %source, "a block can't be read");
                        }
                        // For whoever asks, a block that can't be read and one that is wrong are the same: others have it.
                        let block = BlockIndex::new(part.blocks.start);
                        work.failed = Some(StoreError::Corrupt { volume: read.volume, block, expected: 0, got: 0 });
                    }
                }
                if work.outstanding == 0 {
                    self.finish_read(key);
                }
            }
            Kind::Scrub { .. } => self.on_scrubbed(key, &part, result),
            _ => {}
        }
    }

    /// Blocks can't be read together: finds out which of them it is.
    fn read_one_by_one(&mut self, key: ReadKey, part: &Part) {
        let blocks = part.blocks.clone();
        let single = |block: u64| Part { blocks: block..block + 1, place: part.place.plus(block - blocks.start) };
        let parts: Vec<Part> = blocks.clone().map(single).collect();
        let Some(read) = self.reading.under_way.get_mut(&key) else { return };
        match &mut read.kind {
            Kind::Read { work: Some(work), .. } => {
                work.outstanding += parts.len() - 1;
                if work.buffer.is_empty() {
                    work.buffer = self.pool.take(work.entries.len() * BLOCK_SIZE as usize);
                }
            }
            Kind::Scrub { outstanding, .. } => *outstanding += parts.len() - 1,
            _ => return,
        }
        read.parts.retain(|other| other.place != part.place);
        read.parts.extend_from_slice(&parts);
        for part in parts {
            let buffer = self.pool.take(BLOCK_SIZE as usize);
            self.start(Purpose::Data(key, part.place), DiskWork::Read { at: part.place, buffer });
        }
    }

    /// Everything is there: verifies it.
    fn finish_read(&mut self, key: ReadKey) {
        let Some(ReadOperation { slot, kind: Kind::Read { extent, work, .. }, .. }) = self.reading.under_way.get_mut(&key) else { return };
        let (slot, first) = (*slot, extent.first_block().get());
        let Some(Work { entries, buffer, failed, .. }) = work.take() else { return };
        let Some(owners) = self.replicas.get(&slot).map(|replica| replica.record.owners()) else { return };
        if let Some(error) = failed {
            return self.end_read(key, Err(error));
        }
        let volume = owners.volume;
        let mut checksums = Checksums::with_capacity(entries.len());
        for ((position, entry), data) in entries.iter().enumerate().zip(buffer.chunks_exact(BLOCK_SIZE as usize)) {
            let block = BlockIndex::new(first + position as u64);
            if !entry.is_mapped() {
                checksums.extend(zero_block_checksums(volume, block, 1));
                continue;
            }
            let owner = owners.of(entry.epoch);
            let got = block_checksum(owner, block, data);
            if got != entry.checksum {
                self.suspect.insert(entry.place);
                return self.end_read(key, Err(StoreError::Corrupt { volume, block, expected: entry.checksum, got }));
            }
            checksums.push(if owner == volume { got } else { block_checksum(volume, block, data) });
        }
        self.end_read(key, Ok(Outcome::Read(ReadData::Blocks { checksums, data: buffer.share() })));
    }
}
