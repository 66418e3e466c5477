//! [`MemoryStore`]: a store without a disk. It is the oracle that the other stores are compared with, and the disk of the
//! simulation.
//!
//! It is deterministic: the same calls (and seeds) give the same results. It knows no clock, no thread and no file. A crash is a
//! call, after which the object is what a reopened store would be.
//!
//! * By default every operation takes effect and completes within `submit`.
//! * With [`MemoryStore::with_manual_completion`] operations queue up and take effect, whole, when the simulation says so, in any
//!   order that the contract of [`ReplicaStore`] allows. A crash then meets operations in flight.

mod order;
mod replica;
mod runs;
mod snapshots;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::buffer::BufferPool;
use crate::dice::Dice;
use crate::store::{Completion, OpenedReplica, Operation, ReplicaSpec, ReplicaStore, SnapshotInfo, StoreError, StoreUsage, Token};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, SnapshotId, StoreId, VolumeId};

use replica::{Replica, Value};
use runs::Runs;

/// How many extents a replica's log remembers unless told otherwise: as many as an `EpochMap`'s.
const LOG_CAPACITY: usize = 65_536;
/// Room unless told otherwise.
const CAPACITY: ByteLength = ByteLength::new(1 << 50);
/// Free buffer memory that is kept between reads.
const POOL_KEEP: usize = 4 << 20;

/// What a [`MemoryStore::crash`] takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerLoss {
    /// Nothing that was completed: the process was killed, the machine lives.
    No,
    /// What was not on stable media: of each block written since the last sync, any of the values since then may be what is
    /// found, and the position falls back to the durable one.
    Yes,
}

/// A store in memory. See the module's text.
#[derive(Debug)]
pub struct MemoryStore {
    id: StoreId,
    capacity: ByteLength,
    log_capacity: usize,
    manual: bool,
    replicas: BTreeMap<VolumeId, Replica>,
    finished: Vec<Completion>,
    pool: BufferPool,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store with a random identity, in which every operation completes within `submit`.
    #[must_use]
    pub fn new() -> Self {
        Self::with_id(StoreId::random())
    }

    /// The same with a given identity, for runs that must replay.
    #[must_use]
    pub fn with_id(id: StoreId) -> Self {
        Self {
            id,
            capacity: CAPACITY,
            log_capacity: LOG_CAPACITY,
            manual: false,
            replicas: BTreeMap::new(),
            finished: Vec::new(),
            pool: BufferPool::new(POOL_KEEP),
        }
    }

    /// Another store that is what this one is now, operations in flight included, completions that were not reaped left out.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self { replicas: self.replicas.clone(), finished: Vec::new(), pool: BufferPool::new(POOL_KEEP), ..*self }
    }

    /// Lets operations wait until [`MemoryStore::complete_one`] or [`MemoryStore::complete_next`] is called.
    #[must_use]
    pub fn with_manual_completion(mut self) -> Self {
        self.manual = true;
        self
    }

    /// Shortens the log of extents, so that [`crate::LoggedExtents::Forgotten`] comes early. It holds at least one.
    #[must_use]
    pub fn with_log_capacity(mut self, extents: usize) -> Self {
        self.log_capacity = extents.max(1);
        self
    }

    /// Sets how many bytes of volumes fit in.
    pub fn set_capacity(&mut self, capacity: ByteLength) {
        self.capacity = capacity;
    }

    /// The next `Sync` or `SetState` of this volume fails and poisons the replica.
    pub fn fail_next_sync(&mut self, volume: VolumeId) {
        if let Some(replica) = self.replicas.get_mut(&volume) {
            replica.fail_sync = true;
        }
    }

    /// The next `Write` or `WriteZeroes` of this volume fails, half done.
    pub fn fail_next_write(&mut self, volume: VolumeId) {
        if let Some(replica) = self.replicas.get_mut(&volume) {
            replica.fail_write = true;
        }
    }

    /// Flips a bit in a block, so that reading it finds [`StoreError::Corrupt`]. `false` if it is a hole, which has no bits.
    pub fn corrupt_block(&mut self, volume: VolumeId, block: BlockIndex) -> bool {
        self.replicas.get_mut(&volume).is_some_and(|replica| replica.corrupt(block))
    }

    /// The operations in flight that may complete now, in an order that is the same in every run.
    #[must_use]
    pub fn ready(&self) -> Vec<(VolumeId, Token)> {
        self.replicas.iter().flat_map(|(volume, replica)| replica.ready().map(|index| (*volume, replica.pending_token(index)))).collect()
    }

    /// Completes the `index`-th operation of [`MemoryStore::ready`]. `false` if there is none.
    pub fn complete_one(&mut self, index: usize) -> bool {
        let mut left = index;
        for (volume, replica) in &mut self.replicas {
            let ready: Vec<usize> = replica.ready().collect();
            let Some(place) = ready.get(left) else {
                left -= ready.len();
                continue;
            };
            self.finished.extend(replica.finish(*place, *volume, &self.pool));
            return true;
        }
        false
    }

    /// Completes a volume's oldest operation in flight. `false` if there is none.
    pub fn complete_next(&mut self, volume: VolumeId) -> bool {
        let Some(replica) = self.replicas.get_mut(&volume) else { return false };
        let completion = replica.finish(0, volume, &self.pool);
        let done = completion.is_some();
        self.finished.extend(completion);
        done
    }

    /// Completes all operations in flight, in the order of submission per volume.
    pub fn complete_all(&mut self) {
        let volumes: Vec<VolumeId> = self.replicas.keys().copied().collect();
        for volume in volumes {
            while self.complete_next(volume) {}
        }
    }

    /// Ends the process (or the machine) and opens the store again. Completions that were not reaped are gone. Of the operations
    /// in flight some may have taken effect, in order; the next write of a volume perhaps in part, block by block, its extent
    /// logged; `seed` decides. A replica whose sync had failed comes back as after a loss of power in any case.
    pub fn crash(&mut self, power_loss: PowerLoss, seed: u64) {
        let mut dice = Dice::new(seed);
        self.finished.clear();
        for (volume, replica) in &mut self.replicas {
            replica.crash(*volume, power_loss, &mut dice, &self.pool);
        }
    }

    /// The clones of a snapshot.
    fn clones_of(&mut self, origin: VolumeId, snapshot: SnapshotId) -> Option<&mut BTreeSet<VolumeId>> {
        let snapshots = &mut self.replicas.get_mut(&origin)?.snapshots;
        snapshots.iter_mut().find(|known| known.info.id == snapshot).map(|snapshot| &mut snapshot.clones)
    }

    /// How many bytes of data there are, each block counted once whoever shares it: in volumes as they are now, and in snapshots
    /// only.
    fn held(&self) -> (u64, u64) {
        let distinct = |blocks: BTreeSet<usize>| blocks.len() as u64 * u64::from(BLOCK_SIZE);
        let places = |blocks: &Runs<Value>| -> Vec<usize> {
            blocks.iter().filter_map(|(_, value)| value.block.as_ref()).map(|block| Arc::as_ptr(&block.data).addr()).collect()
        };
        let live: BTreeSet<usize> = self.replicas.values().flat_map(|replica| places(&replica.blocks)).collect();
        let snapshots = self.replicas.values().flat_map(|replica| &replica.snapshots);
        let kept = snapshots.flat_map(|snapshot| places(&snapshot.blocks)).filter(|place| !live.contains(place)).collect();
        (distinct(live), distinct(kept))
    }

    /// What volumes may still come to hold, in bytes.
    fn reserved(&self) -> u64 {
        let missing = |replica: &Replica| {
            let data = replica.blocks.iter().filter(|(_, value)| value.block.is_some()).count() as u64;
            replica.spec.size.bytes().get() - data * u64::from(BLOCK_SIZE)
        };
        self.replicas.values().map(missing).sum()
    }

    fn free(&self) -> u64 {
        let (used, snapshots) = self.held();
        self.capacity.get().saturating_sub(used + snapshots)
    }

    /// Whether so much more may be promised.
    fn check_room(&self, needed: u64) -> Result<(), StoreError> {
        let free = self.free().saturating_sub(self.reserved());
        if needed <= free {
            return Ok(());
        }
        Err(StoreError::NoSpace { path: PathBuf::from("memory"), needed: ByteLength::new(needed), free: ByteLength::new(free) })
    }

    /// Room is promised when an operation is submitted, not when it takes effect: a replica doesn't know of the others.
    fn check_growth(&self, volume: VolumeId, operation: &Operation) -> Result<(), StoreError> {
        let (Some(replica), Operation::Expand { size }) = (self.replicas.get(&volume), operation) else { return Ok(()) };
        self.check_room(size.bytes().get().saturating_sub(replica.spec.size.bytes().get()))
    }
}

impl ReplicaStore for MemoryStore {
    fn id(&self) -> StoreId {
        self.id
    }

    fn create(&mut self, spec: ReplicaSpec) -> Result<(), StoreError> {
        let wanted = spec.size.bytes();
        if let Some(there) = self.replicas.get(&spec.volume) {
            let found = there.spec.size.bytes();
            return if found == wanted { Ok(()) } else { Err(StoreError::Conflict { volume: spec.volume, found, wanted }) };
        }
        self.check_room(wanted.get())?;
        self.replicas.insert(spec.volume, Replica::new(spec, self.log_capacity));
        Ok(())
    }

    fn clone_snapshot(&mut self, origin: VolumeId, snapshot: SnapshotId, spec: ReplicaSpec) -> Result<(), StoreError> {
        if let Some(there) = self.replicas.get(&spec.volume) {
            if there.origin == Some((origin, snapshot)) && there.spec == spec {
                return Ok(());
            }
            return Err(StoreError::Conflict { volume: spec.volume, found: there.spec.size.bytes(), wanted: spec.size.bytes() });
        }
        let parent = self.replicas.get(&origin).ok_or(StoreError::UnknownVolume(origin))?;
        let clone = parent.cloned(snapshot, spec, self.log_capacity)?;
        // What came with it takes no room, but it may overwrite all of it.
        let data = clone.blocks.iter().filter(|(_, value)| value.block.is_some()).count() as u64;
        self.check_room(spec.size.bytes().get() - data * u64::from(BLOCK_SIZE))?;
        self.replicas.insert(spec.volume, clone);
        self.clones_of(origin, snapshot).map(|clones| clones.insert(spec.volume));
        Ok(())
    }

    fn delete(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        self.replicas.get(&volume).map_or(Ok(()), Replica::check_deletable)?;
        if let Some(replica) = self.replicas.remove(&volume) {
            if let Some((origin, snapshot)) = replica.origin {
                self.clones_of(origin, snapshot).map(|clones| clones.remove(&volume));
            }
            let unknown = |token| Completion { volume, token, result: Err(StoreError::UnknownVolume(volume)) };
            self.finished.extend(replica.pending_tokens().map(unknown));
        }
        Ok(())
    }

    fn replicas(&self) -> Vec<OpenedReplica> {
        self.replicas.values().map(Replica::opened).collect()
    }

    fn snapshots(&self, volume: VolumeId) -> Result<Vec<SnapshotInfo>, StoreError> {
        let replica = self.replicas.get(&volume).ok_or(StoreError::UnknownVolume(volume))?;
        Ok(replica.snapshots.iter().map(|snapshot| snapshot.info).collect())
    }

    fn usage(&self) -> Result<StoreUsage, StoreError> {
        let (used, snapshots) = self.held();
        Ok(StoreUsage {
            capacity: self.capacity,
            free: ByteLength::new(self.free()),
            reserved: ByteLength::new(self.reserved()),
            used: ByteLength::new(used),
            snapshots: ByteLength::new(snapshots),
            ..StoreUsage::default()
        })
    }

    fn submit(&mut self, volume: VolumeId, token: Token, operation: Operation) {
        if let Err(error) = self.check_growth(volume, &operation) {
            return self.finished.push(Completion { volume, token, result: Err(error) });
        }
        match self.replicas.get_mut(&volume) {
            None => self.finished.push(Completion { volume, token, result: Err(StoreError::UnknownVolume(volume)) }),
            Some(replica) if self.manual => replica.queue(token, operation),
            Some(replica) => {
                let result = replica.apply(volume, operation, &self.pool);
                self.finished.push(Completion { volume, token, result });
            }
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.finished);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests;
