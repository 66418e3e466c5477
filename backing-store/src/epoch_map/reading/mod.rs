//! Reads, listings of what changed, digests, and scrubbing.

mod blocks;
mod digest;
mod listing;
mod scrub;

use std::io;
use std::ops::Range;

use super::catalog::ReplicaRecord;
use super::numbers::NumberMap;
use super::page::Entry;
use super::record::Slot;
use super::replica::Reader;
use super::tree::Tree;
use super::{EpochMap, OpId};
use crate::buffer::Buffer;
use crate::disk::{Disk, DiskBlock};
use crate::store::{ChangedExtent, Outcome, StoreError, Token};
use crate::units::{BlockIndex, Epoch, Extent, SnapshotId, VolumeId};

/// Names a read while it is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ReadKey(pub(super) OpId);

#[derive(Debug, Default)]
pub(super) struct Reading {
    under_way: NumberMap<ReadKey, ReadOperation>,
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
    /// What is being read: parts end in any order.
    parts: Vec<Part>,
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
    Digest {
        extent: Extent,
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

    pub(super) fn begin_digest(&mut self, slot: Slot, token: Token, extent: Extent) {
        self.begin(slot, token, Kind::Digest { extent });
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
            // These read only the map. The volume's may change meanwhile; a snapshot's must not go away.
            Kind::Digest { extent } => (*extent, None),
            Kind::Changed { snapshot, .. } => (size.extent(), snapshot.map(Some)),
            Kind::Scrub { .. } => (size.extent(), None),
        };
        let parked = replica.hides(op, extent);
        if parked {
            replica.parked.push(key);
        }
        replica.readers.extend(reader.map(|snapshot| Reader { op, extent, snapshot }));
        self.reading.under_way.insert(key, ReadOperation { slot, volume, token, kind, parts: Vec::new(), parked });
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
                    Kind::Read { extent, .. } | Kind::Digest { extent } => *extent,
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
            Some(Kind::Digest { .. }) => self.digest(key),
            Some(Kind::Scrub { .. }) => self.choose(key),
            _ => {}
        }
    }

    fn end_read(&mut self, key: ReadKey, result: Result<Outcome, StoreError>) {
        let Some(read) = self.reading.under_way.remove(&key) else { return };
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
}

/// The tree that is read: the volume's or a snapshot's, and how many blocks are under it.
fn tree_of(record: &ReplicaRecord, snapshot: Option<SnapshotId>) -> Result<(&Tree, u64), StoreError> {
    let Some(id) = snapshot else { return Ok((&record.tree, record.size.blocks())) };
    let unknown = StoreError::UnknownSnapshot { volume: record.volume, snapshot: id };
    record.snapshot(id).map(|found| (&found.tree, found.size.blocks())).ok_or(unknown)
}
