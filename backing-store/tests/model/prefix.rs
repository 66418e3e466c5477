//! A store as the model wants it, to test the model with: made of two oracles, of which one is what a loss of power leaves. It can
//! be told to do wrong.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::BorrowedFd;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::{
    Completion, MemoryStore, OpenedReplica, Operation, ReplicaSpec, ReplicaStore, SnapshotId, SnapshotInfo, StoreError, StoreId,
    StoreUsage, Token, VolumeId,
};

use super::subject::Subject;

/// What a store may do wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Nothing.
    None,
    /// A sync keeps nothing.
    Sync,
    /// A loss of power takes an operation out of the middle.
    Gap,
    /// A loss of power takes the last block of a write.
    Torn,
    /// A kill takes what was acknowledged last.
    Kill,
    /// A loss of power takes the last write before a snapshot out of it.
    Snapshot,
    /// A new epoch is forgotten.
    Epoch,
}

pub struct Prefix {
    dice: Dice,
    lie: Lie,
    closed: Option<PrefixStore>,
}

pub struct PrefixStore {
    now: MemoryStore,
    stable: MemoryStore,
    /// What `stable` lacks.
    since: BTreeMap<VolumeId, Vec<Operation>>,
    due: VecDeque<Completion>,
    handed_out: Vec<Completion>,
    lie: Lie,
}

impl Prefix {
    pub fn new(seed: u64, lie: Lie) -> Self {
        let now = MemoryStore::with_id(StoreId::from_bytes([2; 16]));
        let (stable, since) = (now.fork(), BTreeMap::new());
        let store = PrefixStore { now, stable, since, due: VecDeque::new(), handed_out: Vec::new(), lie };
        Self { dice: Dice::new(seed), lie, closed: Some(store) }
    }

    fn end(&mut self, mut store: PrefixStore) {
        store.due.clear();
        store.handed_out.clear();
        self.closed = Some(store);
    }
}

fn apply(store: &mut MemoryStore, volume: VolumeId, operation: Operation) -> Completion {
    store.submit(volume, Token(0), operation);
    let mut completions = Vec::new();
    store.reap(&mut completions);
    completions.remove(0)
}

impl PrefixStore {
    fn settle(&mut self, volume: VolumeId) {
        for operation in self.since.remove(&volume).unwrap_or_default() {
            apply(&mut self.stable, volume, operation);
        }
    }
}

impl Subject for Prefix {
    type Store = PrefixStore;

    const POWER_CUTS: bool = true;

    fn open(&mut self) -> PrefixStore {
        self.closed.take().unwrap()
    }

    fn advance(&mut self, store: &mut PrefixStore) {
        if !store.due.is_empty() {
            // In any order, but those of a volume among themselves: sequences complete in order.
            let place = self.dice.index(store.due.len());
            let volume = store.due[place].volume;
            let first = store.due.iter().position(|completion| completion.volume == volume).unwrap();
            store.handed_out.extend(store.due.remove(first));
        }
    }

    fn settle(&mut self, _store: &mut PrefixStore) {}

    fn close(&mut self, mut store: PrefixStore) {
        for opened in store.now.replicas() {
            apply(&mut store.now, opened.spec.volume, Operation::Sync);
            store.settle(opened.spec.volume);
            apply(&mut store.stable, opened.spec.volume, Operation::Sync);
        }
        self.end(store);
    }

    fn kill(&mut self, mut store: PrefixStore, _seed: u64) {
        if self.lie == Lie::Kill {
            let mut now = store.stable.fork();
            for (volume, operations) in &mut store.since {
                operations.pop();
                operations.iter().for_each(|operation| drop(apply(&mut now, *volume, operation.clone())));
            }
            store.now = now;
        }
        self.end(store);
    }

    fn power_cut(&mut self, mut store: PrefixStore, seed: u64) {
        let mut dice = Dice::new(seed);
        for (volume, mut operations) in std::mem::take(&mut store.since) {
            operations.truncate(dice.index(operations.len() + 1));
            if self.lie == Lie::Gap && operations.len() > 1 {
                operations.remove(operations.len() / 2);
            }
            let last = operations.pop();
            for operation in operations {
                apply(&mut store.stable, volume, operation);
            }
            match last {
                Some(Operation::Write { seq, extent, checksums, data }) if self.lie == Lie::Torn && checksums.len() > 1 => {
                    let blocks = extent.block_count() - 1;
                    let extent = super::picture::extent(extent.first_block().get(), blocks);
                    let data = data.slice(0..data.len() - 4096);
                    let checksums = checksums[..checksums.len() - 1].into();
                    apply(&mut store.stable, volume, Operation::Write { seq, extent, checksums, data });
                }
                Some(operation) => drop(apply(&mut store.stable, volume, operation)),
                None => {}
            }
        }
        for opened in store.stable.replicas() {
            apply(&mut store.stable, opened.spec.volume, Operation::Sync);
        }
        store.now = store.stable.fork();
        self.end(store);
    }
}

impl ReplicaStore for PrefixStore {
    fn id(&self) -> StoreId {
        self.now.id()
    }

    fn create(&mut self, spec: ReplicaSpec) -> Result<(), StoreError> {
        self.stable.create(spec)?;
        self.now.create(spec)
    }

    fn clone_snapshot(&mut self, origin: VolumeId, snapshot: SnapshotId, spec: ReplicaSpec) -> Result<(), StoreError> {
        self.now.clone_snapshot(origin, snapshot, spec)?;
        self.stable.clone_snapshot(origin, snapshot, spec)
    }

    fn delete(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        self.now.delete(volume)?;
        self.since.remove(&volume);
        self.stable.delete(volume)
    }

    fn replicas(&self) -> Vec<OpenedReplica> {
        self.now.replicas()
    }

    fn snapshots(&self, volume: VolumeId) -> Result<Vec<SnapshotInfo>, StoreError> {
        self.now.snapshots(volume)
    }

    fn usage(&self) -> Result<StoreUsage, StoreError> {
        self.now.usage()
    }

    fn submit(&mut self, volume: VolumeId, token: Token, operation: Operation) {
        use Operation::{Changed, LoggedAfter, RaiseEpoch, Read, Scrub, Snapshot, Sync, Write, WriteZeroes};
        let forgotten = match operation {
            Sync => self.lie == Lie::Sync,
            RaiseEpoch { .. } => self.lie == Lie::Epoch,
            _ => matches!(operation, Read { .. } | Changed { .. } | Scrub { .. } | LoggedAfter { .. } | Write { .. } | WriteZeroes { .. }),
        };
        let since = self.since.entry(volume).or_default();
        if !matches!(operation, Read { .. } | Changed { .. } | Scrub { .. } | LoggedAfter { .. } | Sync) {
            since.push(operation.clone());
        }
        let count = since.len();
        if self.lie == Lie::Snapshot && matches!(operation, Snapshot { .. }) && count > 1 {
            since.swap(count - 1, count - 2);
        }
        let completion = apply(&mut self.now, volume, operation);
        self.due.push_back(Completion { token, ..completion });
        if !forgotten {
            self.settle(volume);
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.handed_out);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
