//! Scrubbing: reading what nobody asked for, to find what is damaged while others have it.

use std::io;

use super::{Kind, Part, ReadKey, ReadOperation};
use crate::buffer::Buffer;
use crate::checksum::block_checksum;
use crate::disk::{Disk, DiskWork};
use crate::epoch_map::page::{Body, Entry};
use crate::epoch_map::record::Slot;
use crate::epoch_map::replica::Reader;
use crate::epoch_map::tree::Piece;
use crate::epoch_map::{EpochMap, Purpose, Waiter};
use crate::store::{Outcome, Scrubbed};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, Epoch, Extent};

impl<D: Disk> EpochMap<D> {
    /// Chooses the blocks to read.
    pub(super) fn choose(&mut self, key: ReadKey) {
        let Some(read) = self.reading.under_way.get_mut(&key) else { return };
        let Kind::Scrub { left, next, chosen, verified, .. } = &mut read.kind else { return };
        let (slot, mut left, mut next, mut chosen, mut verified) = (read.slot, *left, *next, std::mem::take(chosen), *verified);
        let Some(record) = self.replicas.get(&slot).map(|replica| &replica.record) else { return };
        let (tree, owners) = (record.tree.clone(), record.owners());
        let end = loop {
            if left == 0 {
                break Some(next);
            }
            match tree.next_piece(&mut self.cache, next, Epoch::NEVER) {
                Piece::End => break None,
                Piece::Zeroes(range) => next = range.end,
                Piece::Missing(missing) => {
                    if let Some(ReadOperation { kind: Kind::Scrub { left: a, next: b, chosen: c, verified: d, .. }, .. }) =
                        self.reading.under_way.get_mut(&key)
                    {
                        (*a, *b, *c, *d) = (left, next, chosen, verified);
                    }
                    drop(tree);
                    return self.load(missing, &owners, Waiter::Read(key));
                }
                Piece::Leaf(node, base) => {
                    let Body::Leaf(entries) = &node.body else { return };
                    let start = next;
                    for (block, entry) in (base..).zip(entries.iter()).filter(|(block, _)| *block >= start) {
                        if left == 0 {
                            break;
                        }
                        next = block + 1;
                        if entry.is_mapped() {
                            left -= 1;
                            // One that waits to be copied is in memory, as it was verified when it came.
                            match self.copying.get(entry.place) {
                                Some(_) => verified += 1,
                                None => chosen.push((block, *entry)),
                            }
                        }
                    }
                }
            }
        };
        drop(tree);
        if let Some(ReadOperation { kind: Kind::Scrub { verified: place, .. }, .. }) = self.reading.under_way.get_mut(&key) {
            *place = verified;
        }
        self.scrub_blocks(key, slot, chosen, end);
    }

    fn scrub_blocks(&mut self, key: ReadKey, slot: Slot, chosen: Vec<(u64, Entry)>, end: Option<u64>) {
        let (first, last) = (chosen.first().map(|(block, _)| *block), chosen.last().map(|(block, _)| *block));
        let extent = first.zip(last).and_then(|(first, last)| {
            Extent::new(BlockIndex::new(first).offset(), ByteLength::new((last + 1 - first) * u64::from(BLOCK_SIZE)))
        });
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        if extent.is_some_and(|extent| replica.hides(key.0, extent) || replica.unreadable.iter().any(|(_, blocks)| blocks.overlaps(extent)))
        {
            // Being written right now: again from the start, when that is done.
            if let Some(read) = self.reading.under_way.get_mut(&key)
                && let Kind::Scrub { left, next, chosen: place, .. } = &mut read.kind
            {
                (*left, *next, *place) = (chosen.len() as u64, first.unwrap_or(0), Vec::new());
                read.parked = true;
                replica.parked.push(key);
            }
            return;
        }
        if let Some(extent) = extent {
            replica.readers.push(Reader { op: key.0, extent, snapshot: None });
        }
        let mut parts: Vec<Part> = Vec::new();
        for (block, entry) in &chosen {
            match parts.last_mut() {
                Some(last) if last.blocks.end == *block && last.place.plus(block - last.blocks.start) == entry.place => {
                    last.blocks.end = block + 1
                }
                _ => parts.push(Part { blocks: *block..block + 1, place: entry.place }),
            }
        }
        if let Some(ReadOperation { kind: Kind::Scrub { chosen: place, end: end_place, outstanding, .. }, .. }) =
            self.reading.under_way.get_mut(&key)
        {
            (*place, *end_place, *outstanding) = (chosen, end, parts.len());
        }
        if parts.is_empty() {
            return self.finish_scrub(key);
        }
        if let Some(read) = self.reading.under_way.get_mut(&key) {
            read.parts.clone_from(&parts);
        }
        for part in parts {
            let length = usize::try_from(part.blocks.end - part.blocks.start).unwrap_or(0) * BLOCK_SIZE as usize;
            let buffer = self.pool.take(length);
            self.counters.data_read += part.blocks.end - part.blocks.start;
            self.start(Purpose::Data(key, part.place), DiskWork::Read { at: part.place, buffer });
        }
    }

    pub(super) fn on_scrubbed(&mut self, key: ReadKey, part: &Part, result: io::Result<Option<Buffer>>) {
        let Some(read) = self.reading.under_way.get_mut(&key) else { return };
        let Some(owners) = self.replicas.get(&read.slot).map(|replica| replica.record.owners()) else { return };
        let Kind::Scrub { chosen, verified, bad, outstanding, .. } = &mut read.kind else { return };
        *outstanding -= 1;
        let buffer = result.ok().flatten();
        for (position, block) in part.blocks.clone().enumerate() {
            let entry = chosen.iter().find(|(chosen, _)| *chosen == block).map(|(_, entry)| *entry);
            let data = buffer.as_ref().and_then(|buffer| buffer.chunks_exact(BLOCK_SIZE as usize).nth(position));
            let index = BlockIndex::new(block);
            match entry.zip(data) {
                Some((entry, data)) if block_checksum(owners.of(entry.epoch), index, data) == entry.checksum => *verified += 1,
                _ => {
                    bad.push(index);
                    self.suspect.extend(entry.map(|entry| entry.place));
                }
            }
        }
        if *outstanding == 0 {
            self.finish_scrub(key);
        }
    }

    fn finish_scrub(&mut self, key: ReadKey) {
        let Some(ReadOperation { kind: Kind::Scrub { verified, bad, end, .. }, .. }) = self.reading.under_way.get_mut(&key) else { return };
        let (verified, mut bad, next) = (*verified, std::mem::take(bad), end.map(BlockIndex::new));
        bad.sort_unstable();
        self.end_read(key, Ok(Outcome::Scrubbed(Scrubbed { verified, bad, next })));
    }
}
