//! Operations as they come in: what is refused at once, what queues as a change, what is a read; and making and deleting replicas.

use super::catalog::{LINEAGE_MAX, ReplicaRecord, SLOT_MAX};
use super::dirty_log::DirtyLog;
use super::page::root_level;
use super::record::{Record, Slot};
use super::replica::{Change, ChangeKind, Replica};
use super::tree::Tree;
use super::{EpochMap, OpId};
use crate::disk::Disk;
use crate::store::{Content, Operation, ReplicaSpec, ReplicaState, StoreError, Synced, Token};
use crate::units::{Epoch, Seq, SnapshotId, Term, VolumeId};

impl<D: Disk> EpochMap<D> {
    pub(super) fn next_op(&mut self) -> OpId {
        self.next_op += 1;
        OpId(self.next_op)
    }

    pub(super) fn accept(&mut self, volume: VolumeId, token: Token, operation: Operation) {
        self.active_at = self.disk.now();
        let Some(slot) = self.slot(volume) else { return self.complete(volume, token, Err(StoreError::UnknownVolume(volume))) };
        let Some(replica) = self.replicas.get(&slot) else { return };
        if self.poisoned.is_some() {
            return self.complete(volume, token, Err(StoreError::Poisoned(volume)));
        }
        // The size may be about to grow. A snapshot's is looked at when the changes before the read have been applied.
        let size = replica.queue.iter().rev().find_map(Change::new_size).unwrap_or(replica.record.size);
        if let Some(reason) = operation.misuse(size) {
            return self.complete(volume, token, Err(StoreError::Misuse { volume, reason }));
        }
        let kind = match operation {
            Operation::Sync => return self.flush(slot, volume, token),
            Operation::Read { extent, snapshot } => return self.begin_read(slot, token, extent, snapshot),
            Operation::Changed { from, snapshot, start } => return self.begin_listing(slot, token, from, snapshot, start),
            Operation::Digest { extent } => return self.begin_digest(slot, token, extent),
            Operation::Scrub { start, blocks } => return self.begin_scrub(slot, token, start, blocks),
            Operation::Write { seq, extent, checksums, data } => ChangeKind::Write { seq, extent, checksums, data },
            Operation::WriteZeroes { seq, extent } => ChangeKind::Zeroes { seq, extent },
            Operation::SetState { state, position } => ChangeKind::State { state, position },
            Operation::LoggedAfter { after } => ChangeKind::Logged { after },
            Operation::RaiseEpoch { to, synced } => ChangeKind::RaiseEpoch { to, synced },
            Operation::Snapshot { snapshot } => ChangeKind::Snapshot { snapshot },
            Operation::DeleteSnapshot { snapshot } => ChangeKind::DeleteSnapshot { snapshot },
            Operation::Revert { snapshot } => ChangeKind::Revert { snapshot },
            Operation::Expand { size } => ChangeKind::Expand { size },
        };
        let op = self.next_op();
        if let Some(replica) = self.replicas.get_mut(&slot) {
            replica.queue.push_back(Change { op, token, kind });
            self.ready.push_back(slot);
        }
    }

    /// The first change of a replica can't be applied.
    pub(super) fn fail_first(&mut self, slot: Slot, error: &str) {
        let failed = std::io::Error::other(error.to_owned());
        let error = self.io_error("read a map page of", failed);
        self.refuse_first(slot, error);
    }

    /// Ends the first change of a replica without having changed anything.
    pub(super) fn refuse_first(&mut self, slot: Slot, error: StoreError) {
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        let volume = replica.record.volume;
        if let Some(change) = replica.queue.pop_front() {
            self.complete(volume, change.token, Err(error));
            self.unpark(slot);
            self.ready.push_back(slot);
        }
    }

    /// Ends everything that is under way: nothing is written any more.
    pub(super) fn fail_everything(&mut self) {
        self.fail_waiting();
        let mut failed = Vec::new();
        for replica in self.replicas.values_mut() {
            let volume = replica.record.volume;
            failed.extend(replica.queue.drain(..).map(|change| (volume, change.token)));
            replica.unreadable.clear();
        }
        for (volume, token) in failed {
            self.complete(volume, token, Err(StoreError::Poisoned(volume)));
        }
        self.fail_reads();
    }

    pub(super) fn create_replica(&mut self, spec: ReplicaSpec, origin: Option<(VolumeId, SnapshotId)>) -> Result<(), StoreError> {
        let (volume, wanted) = (spec.volume, spec.size.bytes());
        if let Some(replica) = self.slot(volume).and_then(|slot| self.replicas.get(&slot)) {
            let found = replica.record.size.bytes();
            let of = |(origin, id): (VolumeId, SnapshotId)| self.slot(origin).map(|slot| (slot, id));
            let same = found == wanted && (origin.is_none() || replica.record.origin == origin.and_then(of));
            return if same { Ok(()) } else { Err(StoreError::Conflict { volume, found, wanted }) };
        }
        let origin = origin.map(|(origin, id)| self.find_snapshot(origin, id)).transpose()?;
        if let Some((slot, id)) = origin
            && let Some(snapshot) = self.replicas.get(&slot).and_then(|replica| replica.record.snapshot(id))
            && snapshot.size > spec.size
        {
            return Err(StoreError::Misuse { volume, reason: "a clone is smaller than its snapshot" });
        }
        if self.next_slot >= SLOT_MAX {
            return Err(self.limit("replicas that were ever made", SLOT_MAX as usize));
        }
        if self.replicas.len() >= self.limits.replicas {
            return Err(self.limit("replicas", self.limits.replicas));
        }
        let generations = origin.and_then(|(slot, _)| self.replicas.get(&slot)).map_or(0, |from| from.record.lineage.len());
        if generations >= LINEAGE_MAX {
            return Err(self.limit("generations of clones", LINEAGE_MAX));
        }
        if let Some(reason) = &self.poisoned {
            return Err(self.io_error("write", std::io::Error::other(reason.clone())));
        }
        self.check_room(spec.size)?;
        self.wait_for(|store| store.journal.has_room())?;
        let slot = Slot(self.next_slot);
        let batch = self.record(&[Record::Create { slot, volume, size: spec.size, origin }], Vec::new());
        self.apply_create(slot, spec, origin);
        self.journal.want_sync();
        self.wait_for(|store| store.journal.done >= batch)?;
        let ticket = self.journal.want_sync();
        self.wait_for(|store| store.journal.has_ended(ticket))
    }

    pub(super) fn limit(&self, what: &'static str, limit: usize) -> StoreError {
        StoreError::Limit { path: self.path.clone(), what, limit: limit as u64 }
    }

    fn find_snapshot(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<(Slot, SnapshotId), StoreError> {
        let slot = self.slot(volume).ok_or(StoreError::UnknownVolume(volume))?;
        let found = self.replicas.get(&slot).and_then(|replica| replica.record.snapshot(snapshot));
        found.map(|found| (slot, found.id)).ok_or(StoreError::UnknownSnapshot { volume, snapshot })
    }

    /// Makes a replica, now or at a replay.
    pub(super) fn apply_create(&mut self, slot: Slot, spec: ReplicaSpec, origin: Option<(Slot, SnapshotId)>) {
        let level = root_level(spec.size.blocks());
        let mut record = ReplicaRecord {
            slot,
            volume: spec.volume,
            size: spec.size,
            state: ReplicaState { promised: Term::ZERO, log_term: Term::ZERO, content: Content::Complete, synced: Synced::default() },
            position: Seq::ZERO,
            epoch: Epoch::FIRST,
            tree: Tree::new(level),
            snapshots: Vec::new(),
            allocated: 0,
            live: 0,
            lineage: [].into(),
            origin,
            reverts: Vec::new(),
            deleting: false,
            log: DirtyLog::default(),
        };
        if let Some((origin, id)) = origin
            && let Some(from) = self.replicas.get(&origin)
            && let Some(snapshot) = from.record.snapshot(id)
        {
            record.reverts = from.record.reverts.iter().copied().filter(|revert| revert.first_raised <= snapshot.epoch).collect();
            record.lineage = from.record.lineage.iter().copied().chain([(snapshot.epoch, from.record.volume)]).collect();
            record.epoch = snapshot.epoch.next().unwrap_or(snapshot.epoch);
            record.tree = snapshot.tree.clone();
            record.tree.grow(level, record.epoch, &mut self.dirty);
        }
        self.next_slot = self.next_slot.max(slot.0 + 1);
        self.by_volume.insert(spec.volume, slot);
        self.replicas.insert(slot, Replica::new(record));
        self.space.promise(None, self.replicas.get(&slot).map(|replica| &replica.record));
    }

    /// Why this snapshot, or any of a replica's, can't go: a clone. One that is being given up is not at its origin's blocks.
    pub(super) fn clone_in_the_way(&self, slot: Slot, wanted: Option<SnapshotId>) -> Option<StoreError> {
        let volume = self.replicas.get(&slot)?.record.volume;
        self.replicas.values().filter(|replica| !replica.record.deleting).find_map(|clone| {
            let (_, snapshot) = clone.record.origin.filter(|(origin, id)| *origin == slot && wanted.is_none_or(|wanted| wanted == *id))?;
            let by = format!("the clone {}", clone.record.volume);
            Some(StoreError::SnapshotInUse { volume, snapshot, by, advice: "delete the clone first" })
        })
    }

    pub(super) fn delete_replica(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        let Some(slot) = self.slot(volume) else { return Ok(()) };
        if let Some(error) = self.clone_in_the_way(slot, None) {
            return Err(error);
        }
        if let Some(reason) = &self.poisoned {
            return Err(self.io_error("write", std::io::Error::other(reason.clone())));
        }
        // Nobody may be at its blocks when they are given up.
        self.wait_for(|store| store.replicas.get(&slot).is_none_or(Replica::is_idle) && store.journal.has_room())?;
        let batch = self.record(&[Record::Delete { slot }], Vec::new());
        self.apply_delete(slot);
        self.wait_for(|store| store.journal.done >= batch)?;
        let ticket = self.journal.want_sync();
        self.wait_for(|store| store.journal.has_ended(ticket))
    }

    /// Gives a replica up, now or at a replay. Its space comes back in the background.
    pub(super) fn apply_delete(&mut self, slot: Slot) {
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        let before = replica.record.promise();
        replica.record.deleting = true;
        for snapshot in &mut replica.record.snapshots {
            snapshot.deleted_before.get_or_insert(0);
        }
        self.by_volume.remove(&replica.record.volume);
        self.space.promise(Some(before), Some(&replica.record));
        self.background.wake();
    }
}
