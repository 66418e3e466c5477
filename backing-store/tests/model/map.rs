//! The epoch map on a simulated disk that completes what it likes, loses what was not synced, and tears what it was writing.

use std::path::Path;
use std::time::Duration;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::SimulatedDisk;
use carrick_backing_store::epoch_map::{CheckOptions, EpochMap, FormatOptions, OpenOptions, check, dump, format};
use carrick_backing_store::{ByteLength, ReplicaStore, StoreId};

use super::subject::Subject;

/// 48 MiB: small enough that places are used again and again.
const BLOCKS: u64 = 12_288;

pub struct Map {
    dice: Dice,
    disk: SimulatedDisk,
    formatted: bool,
}

impl Map {
    pub fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x6d61_7000);
        let disk = SimulatedDisk::new(BLOCKS, dice.number());
        disk.set_discards(dice.once_in(2));
        Self { dice, disk, formatted: false }
    }
}

impl Subject for Map {
    type Store = EpochMap<SimulatedDisk>;

    const POWER_CUTS: bool = true;

    fn open(&mut self) -> Self::Store {
        let path = Path::new("simulated");
        self.disk.set_manual_completion(false);
        if !std::mem::replace(&mut self.formatted, true) {
            let mut disk = self.disk.reopen();
            format(&mut disk, path, &FormatOptions { id: Some(StoreId::from_bytes([1; 16])) }).unwrap();
        }
        let report = check(self.disk.reopen(), path, &CheckOptions { data: true }).unwrap();
        if !report.is_clean() {
            dump(self.disk.reopen(), path, &mut std::io::stdout()).unwrap();
            panic!("{report:?}");
        }
        self.disk.set_manual_completion(true);
        // No cache to speak of: pages are read again and again.
        EpochMap::open(self.disk.reopen(), path, &OpenOptions { cache: ByteLength::new(0), overcommit: true }).unwrap()
    }

    fn advance(&mut self, _store: &mut Self::Store) {
        match self.dice.below(8) {
            0 => self.disk.complete_some(),
            1 => self.disk.advance(Duration::from_millis(self.dice.below(3000))),
            _ => drop(self.disk.complete_one()),
        }
    }

    fn settle(&mut self, store: &mut Self::Store) {
        for _ in 0..1000 {
            self.disk.complete_all();
            store.reap(&mut Vec::new());
            self.disk.advance(Duration::from_secs(1));
        }
        assert_eq!(self.disk.alarm(), None, "a store without work sleeps");
    }

    fn close(&mut self, store: Self::Store) {
        store.close().unwrap();
    }

    fn kill(&mut self, store: Self::Store, seed: u64) {
        self.disk.kill(seed);
        drop(store);
    }

    fn power_cut(&mut self, store: Self::Store, seed: u64) {
        self.disk.power_cut(seed);
        drop(store);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let counters = self.disk.counters();
            assert_eq!((counters.overlaps, counters.misuses), (0, 0), "{counters:?}");
        }
    }
}
