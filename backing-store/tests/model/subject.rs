//! What is tested: a store, and the ways in which it can end.

use carrick_backing_store::dice::Dice;
use carrick_backing_store::{MemoryStore, Operation, PowerLoss, ReplicaStore, StoreId, Token};

/// A store under test, with whatever lies below it. Everything in it depends on nothing but the seed that it was made with.
pub trait Subject {
    /// The store.
    type Store: ReplicaStore;

    /// What it promises for a loss of power. With `true`: that each volume is then as after some first part of its operations, in
    /// the order of submission, with everything in it that was on stable media. With `false` power is never cut.
    const POWER_CUTS: bool;

    /// Opens the store; the first time an empty one.
    fn open(&mut self) -> Self::Store;

    /// Lets a little happen, so that completions come if any are due. Called again and again while operations are in flight.
    fn advance(&mut self, store: &mut Self::Store);

    /// Lets everything happen that goes on in the background, such as taking apart what was deleted.
    fn settle(&mut self, store: &mut Self::Store);

    /// Ends it in good order; nothing is in flight.
    fn close(&mut self, store: Self::Store);

    /// Ends the process, whatever is in flight.
    fn kill(&mut self, store: Self::Store, seed: u64);

    /// Ends the machine, whatever is in flight.
    fn power_cut(&mut self, store: Self::Store, seed: u64);
}

/// The oracle as its own subject: its operations complete in any order that the contract allows.
pub struct Memory {
    dice: Dice,
    closed: Option<MemoryStore>,
}

impl Memory {
    pub fn new(seed: u64) -> Self {
        let store = MemoryStore::with_id(StoreId::from_bytes([1; 16])).with_manual_completion();
        Self { dice: Dice::new(seed), closed: Some(store) }
    }
}

impl Subject for Memory {
    type Store = MemoryStore;

    const POWER_CUTS: bool = false;

    fn open(&mut self) -> MemoryStore {
        self.closed.take().unwrap()
    }

    fn advance(&mut self, store: &mut MemoryStore) {
        let ready = store.ready().len();
        if ready > 0 {
            store.complete_one(self.dice.index(ready));
        }
    }

    fn settle(&mut self, _store: &mut MemoryStore) {}

    fn close(&mut self, mut store: MemoryStore) {
        for opened in store.replicas() {
            store.submit(opened.spec.volume, Token(0), Operation::Sync);
        }
        store.complete_all();
        store.reap(&mut Vec::new());
        self.closed = Some(store);
    }

    fn kill(&mut self, mut store: MemoryStore, seed: u64) {
        store.crash(PowerLoss::No, seed);
        self.closed = Some(store);
    }

    fn power_cut(&mut self, _store: MemoryStore, _seed: u64) {
        unreachable!("it keeps any of the blocks that were not synced, not a first part");
    }
}
