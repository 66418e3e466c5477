//! The epochs and snapshots of a replica.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::checksum::block_checksum;
use crate::store::{BLOCKS_MAX, CHANGED_MAX, ChangedExtent, ChangedExtents, ReplicaSpec, Scrubbed, SnapshotInfo, StoreError};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, Epoch, Extent, SnapshotId, VolumeId, VolumeSize};

use super::replica::{Replica, Value};
use super::runs::Runs;

#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) info: SnapshotInfo,
    pub(super) blocks: Runs<Value>,
    /// The volumes that began as it, and exist.
    pub(super) clones: BTreeSet<VolumeId>,
}

impl Replica {
    fn snapshot(&self, id: SnapshotId) -> Result<&Snapshot, StoreError> {
        let unknown = StoreError::UnknownSnapshot { volume: self.spec.volume, snapshot: id };
        self.snapshots.iter().find(|snapshot| snapshot.info.id == id).ok_or(unknown)
    }

    fn misuse(&self, reason: &'static str) -> StoreError {
        StoreError::Misuse { volume: self.spec.volume, reason }
    }

    /// The blocks, and how many there may be, of a snapshot or of the volume as it is.
    pub(super) fn view(&self, snapshot: Option<SnapshotId>) -> Result<(&Runs<Value>, VolumeSize), StoreError> {
        let Some(id) = snapshot else { return Ok((&self.blocks, self.spec.size)) };
        self.snapshot(id).map(|snapshot| (&snapshot.blocks, snapshot.info.size))
    }

    fn next_epoch(&self) -> Result<Epoch, StoreError> {
        self.epoch.next().ok_or(StoreError::Limit { path: PathBuf::from("memory"), what: "epochs", limit: u32::MAX.into() })
    }

    pub(super) fn raise_epoch(&mut self, to: Epoch, synced: Epoch) -> Result<Epoch, StoreError> {
        self.sync(self.position)?;
        self.epoch = self.epoch.max(to);
        self.state.synced.epoch = self.state.synced.epoch.max(synced);
        Ok(self.epoch)
    }

    pub(super) fn make_snapshot(&mut self, id: SnapshotId) -> Result<Epoch, StoreError> {
        if let Some(newest) = self.snapshots.last().filter(|newest| newest.info.id == id) {
            return Ok(newest.info.epoch.next().unwrap_or(self.epoch));
        }
        if self.snapshot(id).is_ok() {
            return Err(self.misuse("a snapshot that is not the newest can't be made again"));
        }
        let info = SnapshotInfo { id, epoch: self.epoch, size: self.spec.size };
        let raised = self.raise_epoch(self.next_epoch()?, Epoch::NEVER)?;
        self.snapshots.push(Snapshot { info, blocks: self.blocks.clone(), clones: BTreeSet::new() });
        Ok(raised)
    }

    pub(super) fn delete_snapshot(&mut self, id: SnapshotId) -> Result<(), StoreError> {
        let Ok(snapshot) = self.snapshot(id) else { return Ok(()) };
        self.check_unused(snapshot)?;
        self.sync(self.position)?;
        self.snapshots.retain(|snapshot| snapshot.info.id != id);
        Ok(())
    }

    fn check_unused(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        let Some(clone) = snapshot.clones.first() else { return Ok(()) };
        Err(StoreError::SnapshotInUse {
            volume: self.spec.volume,
            snapshot: snapshot.info.id,
            by: format!("volume {clone}"),
            advice: "delete that volume first, which is a clone of it",
        })
    }

    /// Whether the replica may go: no clone depends on it.
    pub(super) fn check_deletable(&self) -> Result<(), StoreError> {
        self.snapshots.iter().try_for_each(|snapshot| self.check_unused(snapshot))
    }

    /// The size stays: whoever uses the volume has been told it.
    pub(super) fn revert(&mut self, id: SnapshotId) -> Result<Epoch, StoreError> {
        let snapshot = self.snapshot(id)?;
        if self.snapshots.last().is_none_or(|newest| newest.info.id != id) {
            return Err(self.misuse("only the newest snapshot can be reverted to: delete the younger ones first"));
        }
        let (since, blocks) = (snapshot.info.epoch, snapshot.blocks.clone());
        let raised = self.raise_epoch(self.next_epoch()?, Epoch::NEVER)?;
        self.reverts.push((since, raised));
        self.blocks = blocks;
        Ok(raised)
    }

    pub(super) fn expand(&mut self, size: VolumeSize) -> Result<(), StoreError> {
        if size != self.spec.size {
            self.sync(self.position)?;
            self.spec.size = size;
        }
        Ok(())
    }

    pub(super) fn changed(&self, from: Epoch, snapshot: Option<SnapshotId>, start: BlockIndex) -> Result<ChangedExtents, StoreError> {
        let (blocks, _) = self.view(snapshot)?;
        let end = snapshot.map_or(Ok(self.epoch), |id| self.snapshot(id).map(|snapshot| snapshot.info.epoch))?;
        // A snapshot knows nothing of the reverts after it.
        let lost = |asked: Epoch| self.reverts.iter().find(|(since, raised)| *raised <= end && *since < asked && asked < *raised);
        let mut oldest = from;
        while let Some((_, raised)) = lost(oldest) {
            oldest = *raised;
        }
        if oldest != from {
            return Err(StoreError::EpochForgotten { volume: self.spec.volume, from, oldest });
        }
        let mut found: Vec<(u64, u64, bool)> = Vec::new();
        for (run, value) in blocks.over(start.get()..u64::MAX).filter(|(_, value)| value.epoch > from) {
            let zeroes = value.block.is_none();
            if let Some((_, end, _)) = found.last_mut().filter(|(_, end, kind)| *end == run.start && *kind == zeroes) {
                *end = run.end;
            } else if found.len() < CHANGED_MAX {
                found.push((run.start, run.end, zeroes));
            } else {
                return Ok(ChangedExtents { extents: extents(&found), next: Some(BlockIndex::new(run.start)) });
            }
        }
        Ok(ChangedExtents { extents: extents(&found), next: None })
    }

    pub(super) fn scrub(&self, start: BlockIndex, blocks: u64) -> Scrubbed {
        let volume = self.spec.volume;
        let mut scrubbed = Scrubbed { verified: 0, bad: Vec::new(), next: None };
        let data = self.blocks.over(start.get()..u64::MAX).filter_map(|(run, value)| value.block.as_ref().map(|block| (run.start, block)));
        for (left, (index, block)) in (0..=blocks.min(BLOCKS_MAX)).rev().zip(data) {
            let index = BlockIndex::new(index);
            if left == 0 {
                scrubbed.next = Some(index);
            } else if block_checksum(volume, index, &block.data) == block.checksum {
                scrubbed.verified += 1;
            } else {
                scrubbed.bad.push(index);
            }
        }
        scrubbed
    }

    /// A replica that begins as a snapshot of this one.
    pub(super) fn cloned(&self, id: SnapshotId, spec: ReplicaSpec, log_capacity: usize) -> Result<Self, StoreError> {
        let snapshot = self.snapshot(id)?;
        if spec.size < snapshot.info.size {
            return Err(StoreError::Misuse { volume: spec.volume, reason: "a clone can't be smaller than its snapshot" });
        }
        let mut clone = Self::new(spec, log_capacity);
        clone.origin = Some((self.spec.volume, id));
        // Its own writes are told from those that came with it.
        clone.epoch = snapshot.info.epoch.next().unwrap_or(snapshot.info.epoch);
        clone.reverts = self.reverts.iter().copied().filter(|(_, raised)| *raised <= snapshot.info.epoch).collect();
        for (run, value) in snapshot.blocks.iter() {
            let mut value = value.clone();
            if let Some(block) = &mut value.block {
                // A checksum names the volume. A block that was wrong stays wrong.
                let sum = |volume| block_checksum(volume, BlockIndex::new(run.start), &block.data);
                block.checksum ^= sum(spec.volume) ^ sum(self.spec.volume);
            }
            clone.blocks.set(run, Some(value));
        }
        Ok(clone)
    }
}

fn extents(found: &[(u64, u64, bool)]) -> Vec<ChangedExtent> {
    let extent = |(start, end, zeroes): &(u64, u64, bool)| {
        let length = ByteLength::new((end - start) * u64::from(BLOCK_SIZE));
        Extent::new(BlockIndex::new(*start).offset(), length).map(|extent| ChangedExtent { extent, zeroes: *zeroes })
    };
    found.iter().filter_map(extent).collect()
}
