//! The store code that production runs, on a disk that completes what it likes, loses what was not synced, and tears what it was
//! writing. Every crash ends in a real opening, with its replay.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::{Disk, DiskBlock, DiskImage, SimulatedDisk};
use carrick_backing_store::epoch_map::{CheckOptions, EpochMap, FormatOptions, Geometry, OpenOptions, check, format};
use carrick_backing_store::{
    BLOCK_SIZE, BlockIndex, ByteLength, Completion, Extent, OpenedReplica, Operation, Outcome, PowerLoss, ReplicaStore, StoreError,
    StoreId, Token, VolumeSize,
};

use super::{MachineStore, OURS, StoreCounts, our_answer, spec, volume};
use crate::checker::{SECTOR, sector_bytes};
use crate::world::Micros;

/// The smallest store: 8 MiB.
const STORE_BLOCKS: u64 = 2048;
/// No cache to speak of: pages are read again and again.
const OPTIONS: OpenOptions = OpenOptions { cache: ByteLength::new(0), overcommit: true };
/// Rounds after which an operation is said never to end.
const PATIENCE: u32 = 10_000;

fn path() -> &'static Path {
    Path::new("simulated")
}

fn open(disk: SimulatedDisk) -> Result<EpochMap<SimulatedDisk>, String> {
    EpochMap::open(disk, path(), &OPTIONS).map_err(|error| format!("the store can't be opened: {error}"))
}

/// The disk of a new store with an empty replica. Made once: a seventh of all time went there when every run made its own.
fn new_store(id: StoreId, size: VolumeSize) -> DiskImage {
    type Made = HashMap<(StoreId, VolumeSize), DiskImage>;
    static MADE: LazyLock<Mutex<Made>> = LazyLock::new(Mutex::default);
    let make = || {
        let disk = SimulatedDisk::new(STORE_BLOCKS, 0);
        format(&mut disk.reopen(), path(), &FormatOptions { id: Some(id) }).unwrap();
        let mut store = open(disk.reopen()).unwrap();
        store.create(spec(size)).unwrap();
        store.close().unwrap();
        disk.image()
    };
    MADE.lock().unwrap().entry((id, size)).or_insert_with(make).clone()
}

pub struct MapMachine {
    id: StoreId,
    disk: SimulatedDisk,
    /// `None` while the process is dead.
    store: Option<EpochMap<SimulatedDisk>>,
    dice: Dice,
    now: Micros,
    opened_at: Micros,
    /// Something was submitted or has completed since the store was last asked.
    is_due: bool,
    is_rotten: bool,
    /// What ended it last.
    crash: Option<PowerLoss>,
    /// How much disk work the last opening took.
    opening: u64,
    /// Checkpoints of the openings before this one.
    checkpoints: u64,
    counts: StoreCounts,
}

impl MapMachine {
    pub fn new(id: StoreId, size: VolumeSize, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let disk = SimulatedDisk::of(&new_store(id, size).with_seed(dice.number()));
        disk.set_discards(dice.once_in(2));
        disk.set_manual_completion(true);
        Self {
            id,
            disk,
            store: None,
            dice,
            now: 0,
            opened_at: 0,
            is_due: false,
            is_rotten: false,
            crash: None,
            opening: 0,
            checkpoints: 0,
            counts: StoreCounts::default(),
        }
    }

    fn work_done(&self) -> u64 {
        let counters = self.disk.counters();
        counters.reads + counters.writes + counters.syncs
    }

    /// An opening that ends in the middle. It has told nobody anything, so it may end in the way the one before did.
    fn open_in_vain(&mut self, power_loss: PowerLoss) {
        let handle = self.disk.reopen();
        // It reads a lot before it writes a little.
        let from_the_end = self.dice.below(12);
        let limit = if self.dice.coin() { self.opening.saturating_sub(from_the_end) } else { self.dice.below(self.opening.max(1)) };
        self.disk.stop_after(limit);
        drop(open(handle));
        let seed = self.dice.number();
        self.end(power_loss, seed);
        self.counts.interrupted += 1;
    }

    fn end(&self, power_loss: PowerLoss, seed: u64) {
        match power_loss {
            PowerLoss::No => self.disk.kill(seed),
            PowerLoss::Yes => self.disk.power_cut(seed),
        }
    }

    fn check(&mut self) -> Result<(), String> {
        self.disk.set_manual_completion(false);
        let report = check(self.disk.reopen(), path(), &CheckOptions { data: true });
        self.disk.set_manual_completion(true);
        self.counts.checked += 1;
        let report = report.map_err(|error| format!("the store can't be checked: {error}"))?;
        if report.is_clean() { Ok(()) } else { Err(format!("the store is damaged: {report:?}")) }
    }

    /// The places that hold a value of this block, whether it is the present one or not.
    fn places_of(&self, block: BlockIndex) -> Vec<DiskBlock> {
        let sector = block.get() * u64::from(BLOCK_SIZE) / SECTOR;
        let geometry = Geometry::new(STORE_BLOCKS).unwrap();
        let is_value = |place: &DiskBlock| {
            let bytes = self.disk.content(*place);
            let (words, _) = bytes.as_chunks::<8>();
            bytes[..sector_bytes(0, 0).len()] == sector_bytes(u64::from_le_bytes(words[0]), sector)
        };
        (geometry.data_start().get()..geometry.data_end().get()).map(DiskBlock::new).filter(is_value).collect()
    }

    fn last_checkpoints(&self) -> u64 {
        self.store.as_ref().map_or(0, |store| store.counters().checkpoints)
    }
}

/// What a process that is started on this disk finds, and how it reads a block.
fn after_a_kill(disk: &SimulatedDisk, block: BlockIndex) -> Result<(Vec<OpenedReplica>, Result<(), StoreError>), String> {
    disk.heal();
    disk.complete_all();
    disk.kill(0);
    disk.set_manual_completion(false);
    let mut store = open(disk.reopen())?;
    let found = store.replicas();
    let extent = Extent::new(block.offset(), ByteLength::new(u64::from(BLOCK_SIZE))).ok_or("a block beyond all volumes")?;
    store.submit(volume(), OURS, Operation::Read { extent, snapshot: None });
    let mut completions = Vec::new();
    for _ in 0..PATIENCE {
        store.reap(&mut completions);
        if let Some(completion) = completions.pop() {
            return Ok((found, completion.result.map(drop)));
        }
    }
    Err("a read never ends".to_owned())
}

impl MachineStore for MapMachine {
    fn id(&self) -> StoreId {
        self.id
    }

    fn open(&mut self) -> Result<Vec<OpenedReplica>, String> {
        if let Some(power_loss) = self.crash {
            self.counts.reopened += 1;
            while self.dice.once_in(4) {
                self.open_in_vain(power_loss);
            }
            if !self.is_rotten && self.dice.once_in(4) {
                self.check()?;
            }
        }
        let before = self.work_done();
        let store = open(self.disk.reopen())?;
        self.opening = self.work_done() - before;
        (self.crash, self.opened_at, self.is_due) = (None, self.now, true);
        let found = store.replicas();
        self.store = Some(store);
        Ok(found)
    }

    fn set_time(&mut self, now: Micros) {
        self.disk.advance(Duration::from_micros(now - self.now));
        self.now = now;
    }

    fn alarm(&self) -> Option<Micros> {
        let alarm = self.disk.alarm()?;
        Some(self.opened_at + u64::try_from(alarm.as_nanos().div_ceil(1_000)).unwrap())
    }

    fn submit(&mut self, token: Token, operation: Operation) {
        self.is_due = true;
        self.store.as_mut().expect("the process lives").submit(volume(), token, operation);
    }

    fn ready(&self) -> usize {
        self.disk.in_flight()
    }

    fn complete_one(&mut self, _dice: &mut Dice) {
        self.is_due |= self.disk.complete_one();
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let rings = self.disk.alarm().is_some_and(|at| at <= self.disk.now());
        let Some(store) = self.store.as_mut().filter(|_| self.is_due || rings) else { return };
        self.is_due = false;
        // It leaves some for the next time when it has something to tell.
        loop {
            let before = completions.len();
            store.reap(completions);
            if completions.len() == before {
                return;
            }
        }
    }

    fn crash(&mut self, power_loss: PowerLoss, seed: u64) {
        self.checkpoints += self.last_checkpoints();
        self.disk.heal();
        self.end(power_loss, seed);
        self.store = None;
        // Once the power is lost, what is there is on stable media.
        if self.crash != Some(PowerLoss::Yes) {
            self.crash = Some(power_loss);
        }
        self.is_due = false;
    }

    fn fail_next_sync(&mut self) {
        self.disk.fail_next_sync();
    }

    fn is_poisoned(&self) -> bool {
        self.store.as_ref().is_some_and(|store| store.poisoned().is_some())
    }

    /// What the journal doesn't yet call stable is verified by a replay, which ends at a batch whose data is damaged: that is as if
    /// power had been lost, and no mere damage.
    fn rot(&mut self, block: BlockIndex) -> bool {
        let places = self.places_of(block);
        let damage = |disk: &SimulatedDisk| places.iter().for_each(|place| disk.flip_bit(*place, 77));
        let damaged = self.disk.fork();
        damage(&damaged);
        let (Ok((whole, Ok(()))), Ok((found, Err(StoreError::Corrupt { .. })))) =
            (after_a_kill(&self.disk.fork(), block), after_a_kill(&damaged, block))
        else {
            return false;
        };
        if found != whole {
            return false;
        }
        damage(&self.disk);
        self.is_rotten = true;
        true
    }

    fn do_now(&mut self, operation: Operation) -> Result<Outcome, String> {
        self.submit(OURS, operation);
        let mut completions = Vec::new();
        for _ in 0..PATIENCE {
            self.disk.complete_some();
            self.is_due = true;
            self.reap(&mut completions);
            if !completions.is_empty() {
                break;
            }
        }
        our_answer(completions)
    }

    fn finish(&mut self) -> Result<(), String> {
        self.checkpoints += self.last_checkpoints();
        if let Some(store) = self.store.take() {
            store.close().map_err(|error| format!("the store can't be closed: {error}"))?;
        }
        if !self.is_rotten {
            self.check()?;
        }
        let counters = self.disk.counters();
        let is_right = counters.overlaps == 0 && counters.misuses == 0;
        if is_right { Ok(()) } else { Err(format!("the store misuses its disk: {counters:?}")) }
    }

    fn counts(&self) -> StoreCounts {
        StoreCounts { checkpoints: self.checkpoints + self.last_checkpoints(), ..self.counts }
    }
}
