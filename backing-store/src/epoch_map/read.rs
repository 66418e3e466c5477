//! Reads, listings of what changed, and scrubbing.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use super::catalog::Owners;
use super::page::{Body, Entry};
use super::record::Slot;
use super::replica::Reader;
use super::tree::{Piece, Tree};
use super::write::block_range;
use super::{EpochMap, OpId, Purpose, Waiter};
use crate::buffer::Buffer;
use crate::checksum::{Checksum, block_checksum, zero_block_checksums};
use crate::disk::{Disk, DiskBlock, DiskWork};
use crate::store::{CHANGED_MAX, ChangedExtent, ChangedExtents, Outcome, ReadData, Scrubbed, StoreError, Token};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, Epoch, Extent, SnapshotId, VolumeId};

/// Names a read while it is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ReadKey(pub(super) OpId);

#[derive(Debug, Default)]
pub(super) struct Reading {
    under_way: HashMap<ReadKey, ReadOperation>,
    /// Which part of a read an I/O is: reads of one operation end in any order.
    parts: HashMap<ReadKey, Vec<Part>>,
}

/// Blocks of a read that lie side by side on the disk.
#[derive(Clone, Debug)]
struct Part {
    blocks: Range<u64>,
    place: DiskBlock,
}

#[derive(Debug)]
struct ReadOperation {
    slot: Slot,
    volume: VolumeId,
    token: Token,
    kind: Kind,
    /// It waits for changes before it.
    parked: bool,
}

#[derive(Debug)]
enum Kind {
    Read {
        extent: Extent,
        snapshot: Option<SnapshotId>,
        work: Option<Work>,
    },
    Changed {
        from: Epoch,
        snapshot: Option<SnapshotId>,
        next: u64,
        found: Vec<ChangedExtent>,
    },
    Scrub {
        /// Blocks still to be read.
        left: u64,
        next: u64,
        chosen: Vec<(u64, Entry)>,
        end: Option<u64>,
        verified: u64,
        bad: Vec<BlockIndex>,
        outstanding: usize,
    },
}

/// A read whose places are known.
#[derive(Debug)]
struct Work {
    entries: Vec<Entry>,
    /// The answer, being filled.
    buffer: Buffer,
    outstanding: usize,
    failed: Option<StoreError>,
}

impl<D: Disk> EpochMap<D> {
    pub(super) fn begin_read(&mut self, slot: Slot, token: Token, extent: Extent, snapshot: Option<SnapshotId>) {
        self.begin(slot, token, Kind::Read { extent, snapshot, work: None });
    }

    pub(super) fn begin_listing(&mut self, slot: Slot, token: Token, from: Epoch, snapshot: Option<SnapshotId>, start: BlockIndex) {
        self.begin(slot, token, Kind::Changed { from, snapshot, next: start.get(), found: Vec::new() });
    }

    pub(super) fn begin_scrub(&mut self, slot: Slot, token: Token, start: BlockIndex, blocks: u64) {
        let kind =
            Kind::Scrub { left: blocks, next: start.get(), chosen: Vec::new(), end: None, verified: 0, bad: Vec::new(), outstanding: 0 };
        self.begin(slot, token, kind);
    }

    fn begin(&mut self, slot: Slot, token: Token, kind: Kind) {
        let op = self.next_op();
        let key = ReadKey(op);
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        let (volume, size) = (replica.record.volume, replica.record.size);
        let (extent, reader) = match &kind {
            Kind::Read { extent, snapshot, .. } => (*extent, Some(*snapshot)),
            // It reads only the map. The volume's may change meanwhile; a snapshot's must not go away.
            Kind::Changed { snapshot, .. } => (size.extent(), snapshot.map(Some)),
            Kind::Scrub { .. } => (size.extent(), None),
        };
        let parked = replica.hides(op, extent);
        if parked {
            replica.parked.push(key);
        }
        replica.readers.extend(reader.map(|snapshot| Reader { op, extent, snapshot }));
        self.reading.under_way.insert(key, ReadOperation { slot, volume, token, kind, parked });
        if !parked {
            self.advance_read(key);
        }
    }

    /// Something that reads waited for has happened.
    pub(super) fn unpark(&mut self, slot: Slot) {
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        if replica.parked.is_empty() {
            return;
        }
        let size = replica.record.size;
        let mut parked = std::mem::take(&mut replica.parked);
        let under_way = &self.reading.under_way;
        let ready: Vec<ReadKey> = parked
            .extract_if(.., |key| {
                let extent = under_way.get(key).map_or(size.extent(), |read| match &read.kind {
                    Kind::Read { extent, .. } => *extent,
                    _ => size.extent(),
                });
                !replica.hides(key.0, extent)
            })
            .collect();
        replica.parked = parked;
        for key in ready {
            if let Some(read) = self.reading.under_way.get_mut(&key) {
                read.parked = false;
            }
            self.advance_read(key);
        }
    }

    pub(super) fn resume_read(&mut self, key: ReadKey, failure: Option<&str>) {
        match failure {
            None => self.advance_read(key),
            Some(error) => {
                let error = self.io_error("read a map page of", io::Error::other(error.to_owned()));
                self.end_read(key, Err(error));
            }
        }
    }

    fn advance_read(&mut self, key: ReadKey) {
        match self.reading.under_way.get(&key).map(|read| &read.kind) {
            Some(Kind::Read { work: None, .. }) => self.locate(key),
            Some(Kind::Changed { .. }) => self.list(key),
            Some(Kind::Scrub { .. }) => self.choose(key),
            _ => {}
        }
    }

    fn end_read(&mut self, key: ReadKey, result: Result<Outcome, StoreError>) {
        let Some(read) = self.reading.under_way.remove(&key) else { return };
        self.reading.parts.remove(&key);
        if let Some(replica) = self.replicas.get_mut(&read.slot) {
            replica.readers.retain(|read| read.op != key.0);
            if !replica.queue.is_empty() {
                self.ready.push_back(read.slot);
            }
        }
        self.complete(read.volume, read.token, result);
    }

    pub(super) fn fail_reads(&mut self) {
        let mut keys: Vec<ReadKey> = self.reading.under_way.keys().copied().collect();
        keys.sort_unstable();
        for key in keys {
            let volume = self.reading.under_way.get(&key).map(|read| read.volume);
            if let Some(volume) = volume {
                self.end_read(key, Err(StoreError::Poisoned(volume)));
            }
        }
        self.replicas.values_mut().for_each(|replica| replica.parked.clear());
    }

    /// The tree that is read: the volume's or a snapshot's, and whose blocks are in it.
    fn tree_of(&self, slot: Slot, snapshot: Option<SnapshotId>) -> Result<(Tree, Owners, u64), StoreError> {
        let Some(record) = self.replicas.get(&slot).map(|replica| &replica.record) else {
            return Err(StoreError::UnknownVolume(VolumeId::from_bytes([0; 16])));
        };
        let (tree, size) = match snapshot {
            None => (&record.tree, record.size),
            Some(id) => {
                let unknown = StoreError::UnknownSnapshot { volume: record.volume, snapshot: id };
                record.snapshot(id).map(|found| (&found.tree, found.size)).ok_or(unknown)?
            }
        };
        Ok((tree.clone(), record.owners(), size.blocks()))
    }

    // Reading.

    /// Finds where a read's blocks are, and starts reading them.
    fn locate(&mut self, key: ReadKey) {
        let Some((slot, extent, snapshot)) = self.reading.under_way.get(&key).and_then(|read| match &read.kind {
            Kind::Read { extent, snapshot, .. } => Some((read.slot, *extent, *snapshot)),
            _ => None,
        }) else {
            return;
        };
        let (tree, owners, size) = match self.tree_of(slot, snapshot) {
            Ok(found) => found,
            Err(error) => return self.end_read(key, Err(error)),
        };
        let blocks = block_range(extent);
        if blocks.end > size {
            let reason = "an extent reaches past the end of the snapshot";
            return self.end_read(key, Err(StoreError::Misuse { volume: owners.volume, reason }));
        }
        let mut missing = Vec::new();
        if !blocks.is_empty() {
            tree.missing(&mut self.cache, &blocks, false, &mut missing);
        }
        if !missing.is_empty() {
            drop(tree);
            return missing.iter().for_each(|missing| self.load(*missing, &owners, Waiter::Read(key)));
        }
        let entries = entries_of(&tree, &mut self.cache, &blocks);
        drop(tree);
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
        self.reading.parts.insert(key, parts);
        for (at, buffer) in started {
            self.counters.data_read += (buffer.len() / BLOCK_SIZE as usize) as u64;
            self.start(Purpose::Data(key, at), DiskWork::Read { at, buffer });
        }
    }

    pub(super) fn on_data(&mut self, key: ReadKey, at: DiskBlock, result: io::Result<Option<Buffer>>) {
        let Some(read) = self.reading.under_way.get_mut(&key) else { return };
        let part = self.reading.parts.get(&key).and_then(|parts| parts.iter().find(|part| part.place == at)).cloned();
        let Some(part) = part else { return };
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
                        tracing::warn!(store = %self.superblock.id, volume = %read.volume, block = part.blocks.start, %source, "blocks can't be read");
                        self.suspect.extend((0..part.blocks.end - part.blocks.start).map(|step| part.place.plus(step)));
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
        let mut checksums: Vec<Checksum> = Vec::with_capacity(entries.len());
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

    // Listing what changed.

    fn list(&mut self, key: ReadKey) {
        let Some(read) = self.reading.under_way.get_mut(&key) else { return };
        let Kind::Changed { from, snapshot, next, found } = &mut read.kind else { return };
        let (slot, from, snapshot, mut next, mut found) = (read.slot, *from, *snapshot, *next, std::mem::take(found));
        let (tree, owners, size) = match self.tree_of(slot, snapshot) {
            Ok(found) => found,
            Err(error) => return self.end_read(key, Err(error)),
        };
        let forgotten = self.replicas.get(&slot).and_then(|replica| {
            let end = snapshot.map_or(Some(replica.record.epoch), |id| Some(replica.record.snapshot(id)?.epoch))?;
            replica.record.forgotten(from, end)
        });
        if let Some(oldest) = forgotten {
            return self.end_read(key, Err(StoreError::EpochForgotten { volume: owners.volume, from, oldest }));
        }
        loop {
            match tree.next_piece(&mut self.cache, next, from) {
                Piece::Missing(missing) => {
                    if let Some(ReadOperation { kind: Kind::Changed { next: place, found: list, .. }, .. }) =
                        self.reading.under_way.get_mut(&key)
                    {
                        (*place, *list) = (next, found);
                    }
                    drop(tree);
                    return self.load(missing, &owners, Waiter::Read(key));
                }
                Piece::End => break,
                Piece::Zeroes(range, _) => {
                    if !list_run(&mut found, next.max(range.start)..range.end.min(size), true) {
                        next = next.max(range.start);
                        return self.end_listing(key, found, Some(next));
                    }
                    next = range.end;
                }
                Piece::Leaf(node, base) => {
                    let Body::Leaf(entries) = &node.body else { return };
                    for (block, entry) in (base..).zip(entries.iter()).filter(|(block, entry)| *block >= next && entry.epoch > from) {
                        if !list_run(&mut found, block..(block + 1).min(size), !entry.is_mapped()) {
                            return self.end_listing(key, found, Some(block));
                        }
                    }
                    next = base + entries.len() as u64;
                }
            }
            if next >= size {
                break;
            }
        }
        self.end_listing(key, found, None);
    }

    fn end_listing(&mut self, key: ReadKey, extents: Vec<ChangedExtent>, next: Option<u64>) {
        self.end_read(key, Ok(Outcome::Changed(ChangedExtents { extents, next: next.map(BlockIndex::new) })));
    }

    // Scrubbing.

    /// Chooses the blocks to read.
    fn choose(&mut self, key: ReadKey) {
        let Some(read) = self.reading.under_way.get_mut(&key) else { return };
        let Kind::Scrub { left, next, chosen, verified, .. } = &mut read.kind else { return };
        let (slot, mut left, mut next, mut chosen, mut verified) = (read.slot, *left, *next, std::mem::take(chosen), *verified);
        let Ok((tree, owners, _)) = self.tree_of(slot, None) else { return };
        let end = loop {
            if left == 0 {
                break Some(next);
            }
            match tree.next_piece(&mut self.cache, next, Epoch::NEVER) {
                Piece::End => break None,
                Piece::Zeroes(range, _) => next = range.end,
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
        self.reading.parts.insert(key, parts.clone());
        for part in parts {
            let length = usize::try_from(part.blocks.end - part.blocks.start).unwrap_or(0) * BLOCK_SIZE as usize;
            let buffer = self.pool.take(length);
            self.counters.data_read += part.blocks.end - part.blocks.start;
            self.start(Purpose::Data(key, part.place), DiskWork::Read { at: part.place, buffer });
        }
    }

    fn on_scrubbed(&mut self, key: ReadKey, part: &Part, result: io::Result<Option<Buffer>>) {
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

/// Adds blocks to a listing. Whether there was room.
fn list_run(found: &mut Vec<ChangedExtent>, blocks: Range<u64>, zeroes: bool) -> bool {
    if blocks.is_empty() {
        return true;
    }
    let (start, length) = (BlockIndex::new(blocks.start).offset(), (blocks.end - blocks.start) * u64::from(BLOCK_SIZE));
    if let Some(last) = found.last_mut()
        && last.zeroes == zeroes
        && last.extent.end() == start
        && let Some(longer) = Extent::new(last.extent.offset(), ByteLength::new(last.extent.length().get() + length))
    {
        last.extent = longer;
        return true;
    }
    if found.len() == CHANGED_MAX {
        return false;
    }
    found.extend(Extent::new(start, ByteLength::new(length)).map(|extent| ChangedExtent { extent, zeroes }));
    true
}

/// The entries of blocks whose pages are there.
pub(super) fn entries_of(tree: &Tree, cache: &mut super::cache::PageCache, blocks: &Range<u64>) -> Vec<Entry> {
    let mut entries = vec![Entry::default(); usize::try_from(blocks.end - blocks.start).unwrap_or(0)];
    let mut next = blocks.start;
    while next < blocks.end {
        let place = |block: u64| usize::try_from(block - blocks.start).unwrap_or(0);
        next = match tree.next_piece(cache, next, Epoch::NEVER) {
            Piece::Leaf(node, base) => {
                if let Body::Leaf(leaf) = &node.body {
                    for (block, entry) in (base..).zip(leaf.iter()).filter(|(block, _)| blocks.contains(block)) {
                        entries[place(block)] = *entry;
                    }
                }
                base + 256
            }
            Piece::Zeroes(range, epoch) => {
                for block in range.start.max(next)..range.end.min(blocks.end) {
                    entries[place(block)] = Entry { epoch, ..Entry::default() };
                }
                range.end
            }
            // Beyond these blocks: those here are all there.
            Piece::Missing(_) | Piece::End => blocks.end,
        };
    }
    entries
}
