//! A machine's store, as the world sees it: the real one on a simulated disk, or the one in memory.

mod map;

use std::cell::Cell;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::{
    BlockIndex, Completion, MemoryStore, OpenedReplica, Operation, Outcome, PowerLoss, ReadData, ReplicaSpec, ReplicaStore, StoreError,
    StoreId, Token, VolumeId, VolumeSize,
};

use crate::world::Micros;

pub use map::MapMachine;

/// How large the volume is in the end. Small, so that requests collide.
pub const BLOCKS: u64 = 48;
/// No service gives this to an operation.
const OURS: Token = Token(u64::MAX);

pub fn volume() -> VolumeId {
    VolumeId::from_bytes([7; 16])
}

pub fn volume_of(blocks: u64) -> VolumeSize {
    VolumeSize::new(blocks * 4096).unwrap()
}

fn spec(size: VolumeSize) -> ReplicaSpec {
    ReplicaSpec { volume: volume(), size }
}

/// Which store a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoreKind {
    Memory,
    Map,
}

/// What happened in stores so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreCounts {
    /// Stores opened after their process or machine ended.
    pub reopened: u64,
    /// Openings that were killed before they ended.
    pub interrupted: u64,
    /// Whole stores checked, data included.
    pub checked: u64,
    /// Checkpoints.
    pub checkpoints: u64,
}

/// One machine's disk, and its store while the process lives.
pub trait MachineStore {
    fn id(&self) -> StoreId;

    /// The process starts: what it finds.
    fn open(&mut self) -> Result<Vec<OpenedReplica>, String>;

    /// The clock that the store's timers follow.
    fn set_time(&mut self, now: Micros);

    /// When the store wants to be looked at, whatever else happens.
    fn alarm(&self) -> Option<Micros>;

    fn submit(&mut self, token: Token, operation: Operation);

    /// How much may complete now.
    fn ready(&self) -> usize;

    /// Completes something that is ready, if anything is.
    fn complete_one(&mut self, dice: &mut Dice);

    /// What has ended. Does nothing if nothing has happened since the last time.
    fn reap(&mut self, completions: &mut Vec<Completion>);

    /// Ends the process, or the machine, which may be dead already.
    fn crash(&mut self, power_loss: PowerLoss, seed: u64);

    /// The next sync fails; all that it covered may be lost.
    fn fail_next_sync(&mut self);

    /// Whether a sync is known to have failed since the store was opened.
    fn is_poisoned(&self) -> bool;

    /// Damages a block that the store would find good after any crash. `false` if this one isn't there, or not settled.
    fn rot(&mut self, block: BlockIndex) -> bool;

    /// Does this, past the service. Nothing else may be under way.
    fn do_now(&mut self, operation: Operation) -> Result<Outcome, String>;

    /// The run is over: a last look at what is there.
    fn finish(&mut self) -> Result<(), String>;

    fn counts(&self) -> StoreCounts;
}

pub fn machine_store(kind: StoreKind, index: usize, size: VolumeSize, seed: u64, short_log: bool) -> Box<dyn MachineStore> {
    let id = StoreId::from_bytes([u8::try_from(index).unwrap(); 16]);
    match kind {
        StoreKind::Memory => Box::new(MemoryMachine::new(id, size, short_log)),
        StoreKind::Map => Box::new(MapMachine::new(id, size, Dice::new(seed ^ 0x6d61_7000 ^ (index as u64) << 40).number())),
    }
}

/// All bytes of the volume.
pub fn read_all(store: &mut dyn MachineStore) -> Result<Vec<u8>, String> {
    match store.do_now(Operation::Read { extent: volume_of(BLOCKS).extent(), snapshot: None })? {
        Outcome::Read(ReadData::Zeroes) => Ok(vec![0; usize::try_from(BLOCKS * 4096).unwrap()]),
        Outcome::Read(ReadData::Blocks { data, .. }) => Ok(data.to_vec()),
        other => Err(format!("{other:?}")),
    }
}

/// The answer to what was asked with [`OURS`].
fn our_answer(completions: Vec<Completion>) -> Result<Outcome, String> {
    let completion = completions.into_iter().find(|completion| completion.token == OURS).ok_or("no answer")?;
    completion.result.map_err(|error| error.to_string())
}

/// The store in memory: operations take effect whole, and a crash is a call.
struct MemoryMachine {
    store: MemoryStore,
    /// How many operations may complete, while that is known: it is asked for after every event.
    ready: Cell<Option<usize>>,
    is_poisoned: bool,
    opened: u64,
}

impl MemoryMachine {
    fn new(id: StoreId, size: VolumeSize, short_log: bool) -> Self {
        let mut store = MemoryStore::with_id(id).with_manual_completion();
        if short_log {
            store = store.with_log_capacity(16);
        }
        store.create(spec(size)).unwrap();
        Self { store, ready: Cell::new(None), is_poisoned: false, opened: 0 }
    }
}

impl MachineStore for MemoryMachine {
    fn id(&self) -> StoreId {
        self.store.id()
    }

    fn open(&mut self) -> Result<Vec<OpenedReplica>, String> {
        self.opened += 1;
        Ok(self.store.replicas())
    }

    fn set_time(&mut self, _now: Micros) {}

    fn alarm(&self) -> Option<Micros> {
        None
    }

    fn submit(&mut self, token: Token, operation: Operation) {
        self.ready.set(None);
        self.store.submit(volume(), token, operation);
    }

    fn ready(&self) -> usize {
        let ready = self.ready.get().unwrap_or_else(|| self.store.ready().len());
        self.ready.set(Some(ready));
        ready
    }

    fn complete_one(&mut self, dice: &mut Dice) {
        let index = dice.index(self.ready());
        self.ready.set(None);
        self.store.complete_one(index);
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let before = completions.len();
        self.store.reap(completions);
        // Only a sync is ever made to fail here, and damage poisons nothing.
        let failed = |completion: &Completion| matches!(completion.result, Err(StoreError::Io { .. } | StoreError::Poisoned(_)));
        self.is_poisoned |= completions[before..].iter().any(failed);
    }

    fn crash(&mut self, power_loss: PowerLoss, seed: u64) {
        self.ready.set(None);
        self.store.crash(power_loss, seed);
        self.is_poisoned = false;
    }

    fn fail_next_sync(&mut self) {
        self.store.fail_next_sync(volume());
    }

    fn is_poisoned(&self) -> bool {
        self.is_poisoned
    }

    fn rot(&mut self, block: BlockIndex) -> bool {
        self.store.corrupt_block(volume(), block)
    }

    fn do_now(&mut self, operation: Operation) -> Result<Outcome, String> {
        self.submit(OURS, operation);
        self.store.complete_all();
        self.ready.set(None);
        let mut completions = Vec::new();
        self.store.reap(&mut completions);
        our_answer(completions)
    }

    fn finish(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn counts(&self) -> StoreCounts {
        StoreCounts { reopened: self.opened.saturating_sub(1), ..StoreCounts::default() }
    }
}
