//! Changes that are not of data: states, epochs, snapshots, reverts, sizes.

use super::EpochMap;
use super::catalog::{DeadTree, Snapshot};
use super::page::{Child, root_level};
use super::record::{Record, Slot};
use super::replica::{Change, ChangeKind};
use super::tree::Tree;
use super::write::Verdict;
use crate::disk::Disk;
use crate::store::{Outcome, ReplicaState, StoreError};
use crate::units::{BLOCK_SIZE, Epoch, Seq, SnapshotId, VolumeSize};

impl<D: Disk> EpochMap<D> {
    /// Everything but writes.
    pub(super) fn apply_control(&mut self, slot: Slot) -> Verdict {
        if !self.is_ready_for_control(slot) {
            return Verdict::Stall;
        }
        if let Some(error) = self.control_refusal(slot) {
            self.refuse_first(slot, error);
            return Verdict::Next;
        }
        let Some(replica) = self.replicas.get_mut(&slot) else { return Verdict::Wait };
        let Some(Change { token, kind, .. }) = replica.queue.pop_front() else { return Verdict::Wait };
        let record = &replica.record;
        let (epoch, volume) = (record.epoch, record.volume);
        let kept = |snapshot| record.snapshot(snapshot).map(|kept| kept.epoch);
        let (entry, outcome, position) = match kind {
            ChangeKind::State { state, position } => (Record::State { slot, state, position }, Outcome::StateSet, position),
            ChangeKind::Logged { after } => {
                let found = record.log.after(after, record.size);
                // What it tells is true once the writes before are; nothing is recorded.
                let batch = self.journal.newest();
                if batch <= self.journal.done {
                    self.complete(volume, token, Ok(Outcome::Logged(found)));
                } else {
                    self.end_with(batch, slot, token, Outcome::Logged(found), None);
                }
                return Verdict::Next;
            }
            ChangeKind::RaiseEpoch { to, synced } => {
                let (epoch, synced) = (epoch.max(to), record.state.synced.epoch.max(synced));
                (Record::RaiseEpoch { slot, epoch, synced: Some(synced) }, Outcome::Epoch(epoch), None)
            }
            ChangeKind::Snapshot { snapshot } => {
                if let Some(ended) = kept(snapshot) {
                    // It may have been made a moment ago.
                    let outcome = Outcome::Epoch(ended.next().unwrap_or(ended));
                    self.end_durably(self.journal.newest(), slot, token, outcome, None);
                    return Verdict::Next;
                }
                (Record::Snapshot { slot, snapshot, epoch }, Outcome::Epoch(epoch.next().unwrap_or(epoch)), None)
            }
            ChangeKind::DeleteSnapshot { snapshot } => {
                if kept(snapshot).is_none() {
                    self.end_durably(self.journal.newest(), slot, token, Outcome::Done, None);
                    return Verdict::Next;
                }
                (Record::DeleteSnapshot { slot, snapshot }, Outcome::Done, None)
            }
            ChangeKind::Revert { snapshot } => {
                let epoch = epoch.next().unwrap_or(epoch);
                (Record::Revert { slot, snapshot, epoch }, Outcome::Epoch(epoch), None)
            }
            ChangeKind::Expand { size } => (Record::Expand { slot, size }, Outcome::Done, None),
            ChangeKind::Write { .. } | ChangeKind::Zeroes { .. } => return Verdict::Next,
        };
        let batch = self.record(std::slice::from_ref(&entry), Vec::new());
        self.apply_control_record(&entry);
        self.end_durably(batch, slot, token, outcome, position);
        Verdict::Next
    }

    /// Whether the first change can be applied, or must wait for a checkpoint.
    fn is_ready_for_control(&mut self, slot: Slot) -> bool {
        let Some(replica) = self.replicas.get(&slot) else { return false };
        let Some(ChangeKind::Revert { snapshot }) = replica.queue.front().map(|change| &change.kind) else { return true };
        let Some(since) = replica.record.snapshot(*snapshot).map(|snapshot| snapshot.epoch) else { return true };
        let in_memory = |tree: &Tree| matches!(tree.root, Child::Memory(_));
        let later = replica.record.snapshots.iter().filter(|snapshot| snapshot.epoch >= since);
        let wanted = later.map(|snapshot| &snapshot.tree).chain([&replica.record.tree]).any(in_memory);
        self.checkpoint_wanted |= wanted;
        !wanted
    }

    fn control_refusal(&self, slot: Slot) -> Option<StoreError> {
        let record = &self.replicas.get(&slot)?.record;
        let volume = record.volume;
        let misuse = |reason| Some(StoreError::Misuse { volume, reason });
        let last_epoch = record.epoch.next().is_none();
        let newest = record.snapshots.iter().rev().find(|snapshot| snapshot.deleted_before.is_none()).map(|snapshot| snapshot.id);
        match &self.replicas.get(&slot)?.queue.front()?.kind {
            ChangeKind::Snapshot { snapshot } => {
                let there = record.snapshot(*snapshot).is_some();
                if there && newest != Some(*snapshot) {
                    return misuse("a snapshot with this identity is there already, and is not the newest");
                }
                if there {
                    return None;
                }
                if last_epoch {
                    return misuse("the epochs are used up");
                }
                let count: usize = self.replicas.values().map(|replica| replica.record.snapshots.len()).sum();
                (count >= self.limits.snapshots).then(|| self.limit("snapshots", self.limits.snapshots))
            }
            ChangeKind::DeleteSnapshot { snapshot } => self.clone_in_the_way(slot, Some(*snapshot)),
            ChangeKind::Revert { snapshot } => match record.snapshot(*snapshot) {
                None => Some(StoreError::UnknownSnapshot { volume, snapshot: *snapshot }),
                Some(_) if newest != Some(*snapshot) => misuse("only the newest snapshot can be reverted to: delete those after it first"),
                Some(_) if last_epoch => misuse("the epochs are used up"),
                Some(_) => None,
            },
            ChangeKind::Expand { size } => {
                let more = size.blocks().saturating_sub(record.size.blocks());
                VolumeSize::new(more * u64::from(BLOCK_SIZE)).ok().and_then(|more| self.check_room(more).err())
            }
            _ => None,
        }
    }

    /// Applies a record of a control operation, now or at a replay.
    pub(super) fn apply_control_record(&mut self, entry: &Record) {
        match entry {
            Record::State { slot, state, position } => self.set_state(*slot, *state, *position),
            Record::RaiseEpoch { slot, epoch, synced } => {
                if let Some(replica) = self.replicas.get_mut(slot) {
                    replica.record.epoch = *epoch;
                    replica.record.state.synced.epoch = synced.unwrap_or(replica.record.state.synced.epoch);
                }
            }
            Record::Snapshot { slot, snapshot, epoch } => self.keep_snapshot(*slot, *snapshot, *epoch),
            Record::DeleteSnapshot { slot, snapshot } => {
                if let Some(replica) = self.replicas.get_mut(slot) {
                    let kept = |found: &&mut Snapshot| found.id == *snapshot && found.deleted_before.is_none();
                    if let Some(found) = replica.record.snapshots.iter_mut().find(kept) {
                        found.deleted_before = Some(0);
                    }
                    self.background.wake();
                }
            }
            Record::Revert { slot, snapshot, epoch } => self.revert(*slot, *snapshot, *epoch),
            Record::Expand { slot, size } => {
                if let Some(replica) = self.replicas.get_mut(slot) {
                    let record = &mut replica.record;
                    let before = record.promise();
                    record.size = *size;
                    record.tree.grow(root_level(size.blocks()), record.epoch, &mut self.dirty);
                    self.space.promise(Some(before), Some(&replica.record));
                }
            }
            Record::Write { .. } | Record::Overwrite { .. } | Record::Zeroes { .. } | Record::Create { .. } | Record::Delete { .. } => {}
        }
    }

    fn set_state(&mut self, slot: Slot, state: ReplicaState, position: Option<Seq>) {
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        replica.record.state = state;
        if let Some(position) = position {
            replica.record.position = position;
            replica.record.log.restart(position);
        }
    }

    fn keep_snapshot(&mut self, slot: Slot, id: SnapshotId, epoch: Epoch) {
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        let record = &mut replica.record;
        let (size, tree, live) = (record.size, record.tree.clone(), record.live);
        record.snapshots.push(Snapshot { id, epoch, size, tree, live, deleted_before: None });
        record.epoch = epoch.next().unwrap_or(epoch);
    }

    fn revert(&mut self, slot: Slot, id: SnapshotId, epoch: Epoch) {
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        let record = &mut replica.record;
        let Some(snapshot) = record.snapshot(id) else { return };
        let (mut tree, live, since) = (snapshot.tree.clone(), snapshot.live, snapshot.epoch);
        // The volume may have grown since; it stays as large.
        tree.grow(record.tree.level, epoch, &mut self.dirty);
        let mut next = std::mem::replace(&mut record.tree, tree);
        record.live = live;
        record.epoch = epoch;
        record.note_revert(since, epoch);
        // What left the volume after the snapshot is not in the count that came back.
        let later = self.dead.iter_mut().filter(|dead| dead.slot == slot && dead.floor >= since);
        later.for_each(|dead| dead.counts_as_live = false);
        // All that is younger than the snapshot goes: the volume as it was, and snapshots that were on their way out. They are a
        // branch of their own now: what comes after the snapshot is the volume, which has all that it has.
        let first = record.snapshots.partition_point(|snapshot| snapshot.epoch <= since);
        let branch: Vec<Snapshot> = record.snapshots.drain(first..).collect();
        let mut dead = Vec::new();
        let mut give_up = |tree: Tree, next: Tree, done_before: u64| {
            let Child::Disk(root) = tree.root else { return };
            let (level, base, floor, counts_as_live) = (tree.level, 0, since, false);
            dead.push(DeadTree { root, level, base, next, floor, floor_before: floor, split: 0, slot, counts_as_live, done_before });
        };
        give_up(next.clone(), Tree::new(next.level), 0);
        for snapshot in branch.into_iter().rev() {
            give_up(snapshot.tree.clone(), std::mem::replace(&mut next, snapshot.tree), snapshot.deleted_before.unwrap_or(0));
        }
        self.dead.extend(dead.into_iter().rev());
        self.background.wake();
    }
}
