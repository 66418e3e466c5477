//! Stores without space: full ones, and ones whose file system is full.

use std::time::Duration;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::SimulatedDisk;
use carrick_backing_store::epoch_map::{Geometry, OpenOptions};
use carrick_backing_store::{ByteLength, Epoch, Operation, ReplicaStore, StoreError, StoreUsage, VolumeId};

use super::rig::{BLOCK, Picture, Rig, make, snapshot, volume};

const MIB: u64 = 256;
const FIRM: OpenOptions = OpenOptions { cache: ByteLength::new(0), overcommit: false };
const OVERCOMMIT: OpenOptions = OpenOptions { cache: ByteLength::new(0), overcommit: true };

fn is_full(result: Result<(), StoreError>) -> bool {
    match result {
        Ok(()) => false,
        Err(StoreError::NoSpace { .. }) => true,
        Err(error) => panic!("{error}"),
    }
}

fn usage(rig: &Rig) -> StoreUsage {
    let usage = rig.store.usage().unwrap();
    let parts = [usage.free, usage.used, usage.snapshots, usage.reclaimable, usage.metadata, usage.bad];
    assert_eq!(parts.iter().map(|part| part.get()).sum::<u64>(), usage.capacity.get(), "{usage:?}");
    usage
}

/// All but where the boundary between free blocks and the store's own pages is.
fn held(usage: &StoreUsage) -> [u64; 4] {
    [usage.used, usage.snapshots, usage.reclaimable, usage.bad].map(ByteLength::get)
}

/// Snapshots and overwrites until a write finds no space. Gives the snapshots.
fn fill_with_snapshots(rig: &mut Rig, id: VolumeId, blocks: u64, dice: &mut Dice) -> Vec<u8> {
    let mut made = Vec::new();
    for number in 1..=250 {
        if let Err(error) = rig.snapshot(id, snapshot(number)) {
            assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
            return made;
        }
        made.push(number);
        for _ in 0..12 {
            let count = 1 + dice.below(64);
            let first = dice.below(blocks - count);
            if is_full(rig.write(id, dice.number() | 1, first, count)) {
                return made;
            }
        }
    }
    panic!("the store is never full");
}

/// What must go on in a full store, for the volume that filled it and for others.
fn goes_on(rig: &mut Rig, id: VolumeId, other: VolumeId, what: &str) {
    let ok = |result: Result<(), StoreError>, name: &str| {
        if let Err(error) = result {
            panic!("{what}: {name}: {error}");
        }
    };
    ok(rig.flush(id), "flush");
    ok(rig.ask(id, Operation::RaiseEpoch { to: Epoch::new(1000), synced: Epoch::NEVER }).map(drop), "raising the epoch");
    ok(rig.zero(id, 10, 30), "zeros");
    ok(rig.zero(other, 100, 40), "zeros of another volume");
    ok(rig.snapshot(other, snapshot(251)), "a snapshot of another volume");
    ok(rig.delete_snapshot(other, snapshot(251)), "deleting a snapshot of another volume");
    rig.settle();
    // Whatever has space can be overwritten where it is.
    for step in 0..30 {
        ok(rig.write(other, 4000 + step, step * 3, 8), "overwriting another volume");
    }
    rig.verify();
    ok(rig.flush(other), "flush of another volume");
}

fn full_store(overcommit: bool, seed: u64) {
    let what = format!("overcommit {overcommit}, seed {seed}");
    println!("{what}");
    let options = if overcommit { OVERCOMMIT } else { FIRM };
    let mut dice = Dice::new(seed);
    let store = 20 * MIB + dice.below(20) * MIB;
    let mut rig = Rig::new(store, seed, &options);
    rig.disk.set_discards(seed.is_multiple_of(2));
    let (id, other) = (volume(1), volume(2));
    let blocks = 2 * MIB;
    for id in [id, other] {
        rig.create(id, blocks).unwrap();
        for first in (0..blocks).step_by(64) {
            rig.write(id, 1 + first, first, 64).unwrap();
        }
    }
    rig.settle();
    // The last group and directory pages come with the first checkpoint; from here on it is all the same.
    let before = usage(&rig);
    for round in 0..3 {
        let what = format!("{what}, round {round}");
        let snapshots = fill_with_snapshots(&mut rig, id, blocks, &mut dice);
        assert!(snapshots.len() > 1, "{what}: {snapshots:?}");
        goes_on(&mut rig, id, other, &what);
        if dice.below(2) == 0 {
            let power = (dice.below(2) == 0).then_some(seed);
            rig.flush(id).unwrap();
            rig = rig.reopen(power, &options);
            rig.verify();
            goes_on(&mut rig, id, other, &what);
        }
        let mut left = snapshots;
        while !left.is_empty() {
            let gone = left.remove(dice.index(left.len()));
            rig.delete_snapshot(id, snapshot(gone)).unwrap_or_else(|error| panic!("{what}: deleting a snapshot: {error}"));
        }
        // As it was.
        for id in [id, other] {
            for first in (0..blocks).step_by(64) {
                rig.write(id, 1 + first, first, 64).unwrap_or_else(|error| panic!("{what}: space does not come back: {error}"));
            }
        }
        rig.settle();
        assert_eq!(usage(&rig), before, "{what}: after everything was deleted");
        rig.verify();
    }
    rig = rig.reopen(None, &options);
    assert_eq!(usage(&rig), before, "{what}: after it was opened again");
    for id in [id, other] {
        rig.delete(id).unwrap();
    }
    rig.settle();
    assert_eq!(held(&usage(&rig)), [0; 4], "{what}");
    rig.store.close().unwrap();
}

#[test]
fn a_full_store_goes_on_and_its_space_comes_back() {
    (0..4).for_each(|seed| full_store(false, seed));
}

#[test]
fn an_overcommitted_store_that_is_full_goes_on_and_its_space_comes_back() {
    (0..4).for_each(|seed| full_store(true, seed));
}

/// Volumes deleted while the store is full, snapshots and all.
#[test]
fn a_full_store_can_delete_its_volumes() {
    for seed in 0..8 {
        let overcommit = seed % 2 == 0;
        let what = format!("seed {seed}");
        let options = if overcommit { OVERCOMMIT } else { FIRM };
        let mut dice = Dice::new(seed);
        let mut rig = Rig::new(24 * MIB, seed, &options);
        rig.create(volume(9), 64).unwrap();
        rig.write(volume(9), 3, 0, 64).unwrap();
        rig.settle();
        for round in 0..3 {
            let before = usage(&rig);
            let blocks = 3 * MIB;
            rig.create(volume(1), blocks).unwrap();
            let snapshots = fill_with_snapshots(&mut rig, volume(1), blocks, &mut dice);
            rig.clone_of(volume(1), snapshot(snapshots[0]), volume(2)).map_or_else(
                |error| assert!(matches!(error, StoreError::NoSpace { .. }) && !overcommit, "{what}: {error}"),
                |()| rig.delete(volume(2)).unwrap(),
            );
            rig.delete(volume(1)).unwrap_or_else(|error| panic!("{what}, round {round}: {error}"));
            rig.settle();
            assert_eq!(held(&usage(&rig)), held(&before), "{what}, round {round}");
            rig.verify();
        }
        rig = rig.reopen(Some(seed), &options);
        rig.verify();
    }
}

/// Two water marks: what is promised to others, and the reserve that only the store's own work may use.
#[test]
fn promises_and_the_reserve_hold() {
    let mut rig = Rig::new(32 * MIB, 1, &FIRM);
    let free = usage(&rig).available().get() / BLOCK as u64;
    let size = free / 3;
    rig.create(volume(1), size).unwrap();
    rig.create(volume(2), size).unwrap();
    // More than there is can't be promised.
    let error = rig.create(volume(3), free / 2).unwrap_err();
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    let error = rig.ask(volume(1), Operation::Expand { size: super::rig::size(size + free / 2) }).unwrap_err();
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    // The first takes what it can by snapshots.
    let mut dice = Dice::new(7);
    for first in (0..size - 64).step_by(64) {
        rig.write(volume(1), 1, first, 64).unwrap();
    }
    fill_with_snapshots(&mut rig, volume(1), size, &mut dice);
    let reserved = usage(&rig).reserved.get() / BLOCK as u64;
    assert!(reserved >= size, "the second's promise is kept: {reserved} of {size}");
    // The second has all that it was promised, and stays at it.
    for first in (0..size).step_by(64) {
        let count = 64.min(size - first);
        rig.write(volume(2), 2, first, count).unwrap_or_else(|error| panic!("block {first}: {error}"));
    }
    for first in (0..size).step_by(64) {
        let count = 8.min(size - first);
        rig.write(volume(2), 3, first, count).unwrap_or_else(|error| panic!("overwriting block {first}: {error}"));
    }
    rig.verify();
    // The reserve is left.
    assert!(usage(&rig).free.get() > 0);
    goes_on(&mut rig, volume(1), volume(2), "after both");
    let mut rig = rig.reopen(Some(3), &FIRM);
    rig.verify();
    goes_on(&mut rig, volume(1), volume(2), "after a power cut");
}

/// Larger overwrites go to fresh places; but what they replace comes back, so they need no more space than was promised.
#[test]
fn large_overwrites_go_on_beside_a_volume_whose_snapshots_took_all() {
    let mut rig = Rig::new(24 * MIB, 1, &FIRM);
    for id in [volume(1), volume(2)] {
        rig.create(id, 2 * MIB).unwrap();
        for first in (0..2 * MIB).step_by(64) {
            rig.write(id, 1, first, 64).unwrap();
        }
    }
    rig.settle();
    fill_with_snapshots(&mut rig, volume(1), 2 * MIB, &mut Dice::new(1));
    for round in 2..10 {
        for first in (0..2 * MIB).step_by(64) {
            rig.write(volume(2), round, first, 64).unwrap_or_else(|error| panic!("round {round}, block {first}: {error}"));
        }
    }
    rig.verify();
}

/// A promised volume can be overwritten for ever, with large writes, too, which need fresh places for a moment.
#[test]
fn a_volume_without_snapshots_is_overwritten_for_ever() {
    for overcommit in [false, true] {
        let mut rig = Rig::new(16 * MIB, 1, if overcommit { &OVERCOMMIT } else { &FIRM });
        let size = usage(&rig).available().get() / BLOCK as u64 * 250 / 252;
        rig.create(volume(1), size).unwrap();
        for round in 1..20 {
            for first in (0..size).step_by(256) {
                let count = 256.min(size - first);
                rig.write(volume(1), round, first, count).unwrap_or_else(|error| panic!("round {round}, block {first}: {error}"));
            }
        }
        rig.verify();
    }
}

// The file system below.

/// A sparse store with so many blocks of room for data.
fn thin(blocks: u64, room: u64, seed: u64, discards: bool) -> SimulatedDisk {
    let disk = SimulatedDisk::new(blocks, seed);
    let head = Geometry::new(blocks).unwrap().data_start().get();
    disk.set_room(Some((head + room) * BLOCK as u64));
    disk.set_discards(discards);
    make(&disk);
    disk
}

fn fill_below(rig: &mut Rig, id: VolumeId, from: u64, to: u64) -> u64 {
    let mut first = from;
    while first < to {
        if is_full(rig.write(id, 1 + first, first, 64)) {
            return first;
        }
        first += 64;
    }
    panic!("the file system is never full");
}

#[test]
fn a_full_file_system_stops_new_blocks_only_until_it_has_space_again() {
    full_file_system(false);
}

#[test]
fn what_was_given_back_to_a_full_file_system_is_asked_for_again() {
    full_file_system(true);
}

fn full_file_system(discards: bool) {
    for seed in 0..4 {
        let what = format!("seed {seed}");
        // A store of 400 MiB; the file system has only 100 MiB for it: the second piece that is prepared does not fit.
        let disk = thin(400 * MIB, 100 * MIB, seed, discards);
        let mut rig = Rig::open(disk, Picture::default(), &OVERCOMMIT).unwrap();
        let (id, other, third) = (volume(1), volume(2), volume(3));
        for (id, blocks) in [(id, 300 * MIB), (other, 4 * MIB), (third, 4 * MIB)] {
            rig.create(id, blocks).unwrap();
            for first in (0..512).step_by(64) {
                rig.write(id, 1 + first, first, 64).unwrap();
            }
        }
        rig.snapshot(third, snapshot(1)).unwrap();
        let reached = fill_below(&mut rig, id, 512, 300 * MIB);
        rig.flush(id).unwrap();
        assert!(reached > 30 * MIB, "{what}: {reached}");
        let all_goes_on = |rig: &mut Rig, what: &str| {
            goes_on(rig, id, other, what);
            for step in 0..50 {
                rig.write(id, 10_000 + step, 64 + step * 8, 8).unwrap_or_else(|error| panic!("{what}: overwriting: {error}"));
            }
            rig.verify();
        };
        all_goes_on(&mut rig, &what);
        rig.settle();
        if seed % 2 == 1 {
            rig = rig.reopen(Some(seed), &OVERCOMMIT);
            all_goes_on(&mut rig, &format!("{what}, opened again"));
        }
        rig.delete_snapshot(third, snapshot(1)).unwrap();
        rig.delete(third).unwrap();
        rig.settle();
        // Somebody makes space.
        let room = |rig: &Rig| rig.store.usage().unwrap().free.get() / BLOCK as u64;
        let before = room(&rig);
        rig.disk.set_room(Some(80 * MIB * BLOCK as u64));
        rig.disk.advance(Duration::from_secs(2));
        assert!(room(&rig) > before, "{what}");
        let more = fill_below(&mut rig, id, reached, 300 * MIB);
        rig.flush(id).unwrap();
        assert!(more >= reached + 50 * MIB, "{what}: {more} after {reached}");
        rig.verify();
        let mut rig = rig.reopen(Some(seed), &OVERCOMMIT);
        rig.verify();
    }
}

/// What the file system has left is used to its end: not only pieces of 64 MiB.
#[test]
fn the_last_of_the_file_systems_space_is_used() {
    let disk = thin(400 * MIB, 30 * MIB, 1, false);
    let mut rig = Rig::open(disk, Picture::default(), &OVERCOMMIT).unwrap();
    rig.create(volume(1), 300 * MIB).unwrap();
    let free = usage(&rig).free.get() / BLOCK as u64;
    assert!(free >= 29 * MIB, "what it says is free: {free}");
    let reached = fill_below(&mut rig, volume(1), 0, 300 * MIB);
    assert!(reached > 20 * MIB, "it says that {free} blocks are free, and takes {reached}");
}

/// Right after the crash of a store whose file system is full, it can still delete.
#[test]
fn a_crash_on_a_full_file_system_takes_no_space_away() {
    for seed in 0..6 {
        let what = format!("seed {seed}");
        let disk = thin(400 * MIB, 140 * MIB, seed, false);
        let mut rig = Rig::open(disk, Picture::default(), &OVERCOMMIT).unwrap();
        let mut dice = Dice::new(seed);
        rig.create(volume(1), 300 * MIB).unwrap();
        rig.create(volume(2), 2 * MIB).unwrap();
        rig.write(volume(2), 9, 0, 100).unwrap();
        rig.snapshot(volume(1), snapshot(1)).unwrap();
        let reached = fill_below(&mut rig, volume(1), 0, 300 * MIB);
        for step in 0..dice.below(100) {
            rig.write(volume(1), 700 + step, dice.below(reached - 8), 1 + step % 8).unwrap();
        }
        rig.flush(volume(1)).unwrap();
        rig = rig.reopen((seed % 3 > 0).then_some(seed), &OVERCOMMIT);
        let goes = |result: Result<(), StoreError>, name: &str| result.unwrap_or_else(|error| panic!("{what}: {name}: {error}"));
        goes(rig.write(volume(1), 5, 100, 8), "overwriting");
        goes(rig.zero(volume(1), 0, 64), "zeros");
        goes(rig.delete_snapshot(volume(1), snapshot(1)), "deleting a snapshot");
        goes(rig.delete(volume(2)), "deleting a volume");
        rig.verify();
        goes(rig.delete(volume(1)), "deleting the volume");
        rig.settle();
        goes(rig.create(volume(3), 100 * MIB), "creating");
        for first in (0..30 * MIB).step_by(64) {
            goes(rig.write(volume(3), 5, first, 64), "writing");
        }
        rig.verify();
    }
}

/// A prepare that fails for a moment only delays.
#[test]
fn a_prepare_that_fails_once_is_tried_again() {
    let disk = thin(400 * MIB, 300 * MIB, 1, false);
    disk.fail_next_prepare();
    let mut rig = Rig::open(disk, Picture::default(), &OVERCOMMIT).unwrap();
    let result = rig.create(volume(1), 100 * MIB);
    assert!(result.is_ok() || is_full(result));
    rig.create(volume(1), 100 * MIB).unwrap();
    let _ = is_full(rig.write(volume(1), 1, 0, 64));
    rig.disk.advance(Duration::from_secs(2));
    rig.write(volume(1), 1, 0, 64).unwrap();
    rig.flush(volume(1)).unwrap();
    rig.verify();
    assert_eq!(rig.disk.counters().failed, 1, "the prepare that failed");
}
