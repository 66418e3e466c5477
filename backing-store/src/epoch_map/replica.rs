//! One replica in memory: its record, and the operations on it that wait or are under way.

use std::collections::VecDeque;

use super::OpId;
use super::catalog::ReplicaRecord;
use super::reading::ReadKey;
use crate::buffer::SharedBuffer;
use crate::checksum::Checksums;
use crate::store::{OpenedReplica, ReplicaSpec, ReplicaState, SnapshotInfo, Token};
use crate::units::{Epoch, Extent, Seq, SnapshotId, VolumeSize};

/// A change that was submitted and not yet applied. Changes of a replica are applied in order.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) op: OpId,
    pub(super) token: Token,
    pub(super) kind: ChangeKind,
}

#[derive(Debug)]
pub(super) enum ChangeKind {
    Write { seq: Option<Seq>, extent: Extent, checksums: Checksums, data: SharedBuffer },
    Zeroes { seq: Option<Seq>, extent: Extent },
    State { state: ReplicaState, position: Option<Seq> },
    Logged { after: Seq },
    RaiseEpoch { to: Epoch, synced: Epoch },
    Snapshot { snapshot: SnapshotId },
    DeleteSnapshot { snapshot: SnapshotId },
    Revert { snapshot: SnapshotId },
    Expand { size: VolumeSize },
}

impl Change {
    /// Whether it takes away what this read, which came before, is at.
    fn disturbs(&self, read: &Reader, size: VolumeSize) -> bool {
        match &self.kind {
            ChangeKind::DeleteSnapshot { snapshot } => read.snapshot == Some(*snapshot),
            _ => read.snapshot.is_none() && self.extent(size).is_some_and(|blocks| blocks.overlaps(read.extent)),
        }
    }

    /// Which blocks it may change.
    pub(super) fn extent(&self, size: VolumeSize) -> Option<Extent> {
        match &self.kind {
            ChangeKind::Write { extent, .. } | ChangeKind::Zeroes { extent, .. } => Some(*extent),
            ChangeKind::Revert { .. } => Some(size.extent()),
            _ => None,
        }
    }
}

/// A read that has not ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    pub(super) op: OpId,
    pub(super) extent: Extent,
    /// What it reads, if not the volume.
    pub(super) snapshot: Option<SnapshotId>,
}

/// Invariants: `acknowledged <= record.position`; `durable <= acknowledged`.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) record: ReplicaRecord,
    /// The writes up to this have completed.
    pub(super) acknowledged: Seq,
    /// The writes up to this are on stable media.
    pub(super) durable: Seq,
    pub(super) queue: VecDeque<Change>,
    /// Applied writes whose data is not yet where the map says.
    pub(super) unreadable: Vec<(OpId, Extent)>,
    /// Reads that have not ended, those that wait included.
    pub(super) readers: Vec<Reader>,
    /// Reads that wait for changes before them.
    pub(super) parked: Vec<ReadKey>,
    /// The newest snapshots that were taken apart, and still are in the last checkpoint: since the last freeze, and before it.
    removed: Epoch,
    removed_before: Epoch,
    /// Its first change waits for a checkpoint or for space.
    pub(super) stalled: bool,
}

impl Replica {
    pub(super) fn new(record: ReplicaRecord) -> Self {
        let position = record.position;
        Self {
            record,
            acknowledged: position,
            durable: position,
            queue: VecDeque::new(),
            unreadable: Vec::new(),
            readers: Vec::new(),
            parked: Vec::new(),
            removed: Epoch::NEVER,
            removed_before: Epoch::NEVER,
            stalled: false,
        }
    }

    /// A snapshot was taken apart.
    pub(super) fn note_removed(&mut self, epoch: Epoch) {
        self.removed = self.removed.max(epoch);
    }

    /// A checkpoint's content is fixed; it has been committed.
    pub(super) fn freeze(&mut self) {
        self.removed_before = self.removed_before.max(std::mem::replace(&mut self.removed, Epoch::NEVER));
    }

    pub(super) fn thaw(&mut self) {
        self.removed_before = Epoch::NEVER;
    }

    /// What is not younger than this is not overwritten where it is: a snapshot or an ancestor has it. So has a snapshot that is on
    /// its way out, however far that has come: after a crash it is taken apart again from where the checkpoint says, and must
    /// not find what became the volume's alone, and may have been given up by it.
    pub(super) fn in_place_floor(&self) -> Epoch {
        let newest = self.record.snapshots.last().map_or(Epoch::NEVER, |snapshot| snapshot.epoch);
        newest.max(self.removed).max(self.removed_before).max(self.record.lineage_floor())
    }

    pub(super) fn opened(&self) -> OpenedReplica {
        OpenedReplica {
            spec: ReplicaSpec { volume: self.record.volume, size: self.record.size },
            state: self.record.state,
            position: self.acknowledged,
            durable: self.durable,
            epoch: self.record.epoch,
        }
    }

    pub(super) fn snapshots(&self) -> Vec<SnapshotInfo> {
        let kept = self.record.snapshots.iter().filter(|snapshot| snapshot.deleted_before.is_none());
        kept.map(|snapshot| SnapshotInfo { id: snapshot.id, epoch: snapshot.epoch, size: snapshot.size }).collect()
    }

    /// Whether a change before `op` is in the way of reading `extent`.
    pub(super) fn hides(&self, op: OpId, extent: Extent) -> bool {
        let size = self.record.size;
        self.unreadable.iter().any(|(write, blocks)| *write < op && blocks.overlaps(extent))
            || self.queue.iter().take_while(|change| change.op < op).any(|change| {
                // A snapshot or a size that is about to change is waited for whatever the blocks.
                change.extent(size).is_none_or(|blocks| blocks.overlaps(extent))
            })
    }

    /// Whether a read before this change is still at what it takes away.
    pub(super) fn is_read(&self, change: &Change) -> bool {
        self.readers.iter().any(|read| read.op < change.op && change.disturbs(read, self.record.size))
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.unreadable.is_empty() && self.readers.is_empty()
    }
}
