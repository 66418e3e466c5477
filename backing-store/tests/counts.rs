//! What the epoch map costs, counted on a simulated disk: no clock has a part in it, so the bounds are exact and hold anywhere.
//!
//! `cargo test --release -p carrick-backing-store --test counts -- --nocapture` tells the figures.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

#[path = "faults/rig.rs"]
#[allow(dead_code, reason = "shared with the tests of faults")]
mod rig;

use std::collections::BTreeSet;
use std::time::Duration;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::DiskCounters;
use carrick_backing_store::epoch_map::{Geometry, OpenOptions};
use carrick_backing_store::{BlockIndex, ByteLength, Completion, Epoch, Operation, Outcome, ReplicaStore, Token, VolumeId};

use rig::{Picture, Rig, read, size, snapshot, volume, write};

const MIB: u64 = 256;
const TIB: u64 = 1 << 28;
const OVERCOMMIT: OpenOptions = OpenOptions { cache: ByteLength::new(64 << 20), overcommit: true };
const SMALL_CACHE: OpenOptions = OpenOptions { cache: ByteLength::new(8 << 20), overcommit: true };

/// What a store did, in blocks.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    all: u64,
    journal: u64,
    copied: u64,
    saved: u64,
    fresh: u64,
    pages: u64,
    syncs: u64,
    checkpoints: u64,
}

/// What it did since then; since the beginning if that is the default.
fn since(rig: &Rig, before: &Written) -> Written {
    let (disk, store) = (rig.disk.counters(), rig.store.counters());
    Written {
        all: disk.written_blocks - before.all,
        journal: store.journal_written - before.journal,
        copied: store.copied - before.copied,
        saved: store.coalesced - before.saved,
        fresh: store.data_written - before.fresh,
        pages: store.pages_written - before.pages,
        syncs: disk.syncs - before.syncs,
        checkpoints: store.checkpoints - before.checkpoints,
    }
}

fn written(rig: &Rig) -> Written {
    since(rig, &Written::default())
}

/// Writes single blocks with so many in flight, without a picture.
fn overwrite(rig: &mut Rig, id: VolumeId, depth: usize, blocks: impl Iterator<Item = u64>, mut each: impl FnMut(&mut Rig)) {
    let (mut done, mut in_flight): (Vec<Completion>, usize) = (Vec::new(), 0);
    let mut wait_until = |rig: &mut Rig, in_flight: &mut usize, most: usize| {
        while *in_flight > most {
            rig.store.reap(&mut done);
            *in_flight -= done.len();
            done.drain(..).for_each(|completion| assert!(completion.result.is_ok(), "{completion:?}"));
            each(rig);
        }
    };
    for block in blocks {
        rig.store.submit(id, Token(0), write(id, None, 1 + block, block, 1));
        in_flight += 1;
        wait_until(rig, &mut in_flight, depth - 1);
    }
    wait_until(rig, &mut in_flight, 0);
}

/// Makes a volume; it is not pictured.
fn create(rig: &mut Rig, id: VolumeId, blocks: u64) {
    rig.store.create(carrick_backing_store::ReplicaSpec { volume: id, size: size(blocks) }).unwrap();
}

fn fill(rig: &mut Rig, id: VolumeId, blocks: u64) {
    for first in (0..blocks).step_by(256) {
        rig.ask(id, write(id, None, 1 + first, first, 256.min(blocks - first))).unwrap();
    }
}

fn reopened(rig: Rig, options: &OpenOptions) -> Rig {
    let Rig { disk, store, .. } = rig;
    store.close().unwrap();
    Rig::open(disk, Picture::default(), options).unwrap()
}

#[test]
fn a_random_overwrite_costs_little_more_than_two_blocks() {
    let mut rig = Rig::new(512 * MIB, 1, &OVERCOMMIT);
    let blocks = 96 * MIB;
    create(&mut rig, volume(1), blocks);
    fill(&mut rig, volume(1), blocks);
    let mut rig = reopened(rig, &OVERCOMMIT);
    let (before, count, mut dice) = (written(&rig), 40_000, Dice::new(1));
    overwrite(&mut rig, volume(1), 32, (0..count).map(|_| dice.below(blocks)), |_| ());
    rig.settle();
    let cost = since(&rig, &before);
    let per = |what: u64| what as f64 / count as f64;
    println!(
        "blocks written per random overwrite at depth 32: {:.3} (journal {:.3}, copies {:.3}, pages {:.3}; {:.3} copies were saved); {cost:?}",
        per(cost.all),
        per(cost.journal),
        per(cost.copied),
        per(cost.pages),
        per(cost.saved)
    );
    assert!(per(cost.all + cost.saved) <= 2.3, "{cost:?}");
    // The last: where a running checkpoint needs what was there.
    assert_eq!(cost.copied + cost.saved + cost.fresh, count, "each overwrite is copied, or saved, or goes to a fresh place");
    assert!(cost.fresh * 50 < count, "{cost:?}");
}

/// The worst for a map: every overwrite changes another page.
#[test]
fn a_random_overwrite_of_a_huge_sparse_volume_costs_a_page_more() {
    let mut rig = Rig::new(1024 * MIB, 1, &OVERCOMMIT);
    let leaves = 12_000;
    let at = |leaf: u64| leaf * (TIB / leaves) + leaf % 200;
    create(&mut rig, volume(1), TIB);
    overwrite(&mut rig, volume(1), 64, (0..leaves).map(at), |_| ());
    let mut rig = reopened(rig, &OVERCOMMIT);
    let (before, count, mut dice) = (written(&rig), 30_000, Dice::new(1));
    overwrite(&mut rig, volume(1), 32, (0..count).map(|_| at(dice.below(leaves))), |_| ());
    rig.settle();
    let cost = since(&rig, &before);
    let per = |what: u64| what as f64 / count as f64;
    println!("blocks written per overwrite of one block per leaf: {:.3} (pages {:.3}); {cost:?}", per(cost.all), per(cost.pages));
    assert!(per(cost.all + cost.saved) <= 4.5, "{cost:?}");
}

/// Idleness makes the copies go out at once; work after it must find them lazy again.
#[test]
fn overwrites_after_idleness_save_copies_and_syncs_again() {
    let mut rig = Rig::new(512 * MIB, 1, &OVERCOMMIT);
    create(&mut rig, volume(1), 4 * MIB);
    fill(&mut rig, volume(1), 4 * MIB);
    overwrite(&mut rig, volume(1), 1, 0..10, |_| ());
    rig.settle();
    let (before, mut dice) = (written(&rig), Dice::new(1));
    overwrite(&mut rig, volume(1), 1, (0..400).map(|_| dice.below(8)), |_| ());
    let cost = since(&rig, &before);
    println!("400 overwrites of 8 blocks after idleness: {cost:?}");
    assert!(cost.saved >= 300 && cost.syncs <= 10, "{cost:?}");
}

#[test]
fn a_read_with_a_warm_map_is_one_read_of_the_disk() {
    let mut rig = Rig::new(256 * MIB, 1, &OVERCOMMIT);
    let blocks = 64 * MIB;
    create(&mut rig, volume(1), blocks);
    fill(&mut rig, volume(1), blocks);
    let mut rig = reopened(rig, &OVERCOMMIT);
    let mut dice = Dice::new(1);
    let mut reads = |rig: &mut Rig, count: u64| {
        let before = rig.disk.counters();
        for _ in 0..count {
            rig.ask(volume(1), read(dice.below(blocks), 1)).unwrap();
        }
        let DiskCounters { reads, read_blocks, .. } = rig.disk.counters();
        (reads - before.reads, read_blocks - before.read_blocks)
    };
    println!("1000 random reads with a cold map: {:?} (reads, blocks)", reads(&mut rig, 1000));
    (0..blocks).step_by(256).for_each(|first| drop(rig.ask(volume(1), read(first, 1)).unwrap()));
    let warm = reads(&mut rig, 1000);
    println!("1000 random reads with a warm map: {warm:?} (reads, blocks)");
    assert_eq!(warm, (1000, 1000));
}

#[test]
fn flushes_of_many_volumes_share_syncs() {
    for (depth, most) in [(8, 300), (1, 1100)] {
        let mut rig = Rig::new(64 * MIB, 1, &OVERCOMMIT);
        for number in 1..=depth {
            create(&mut rig, volume(number), 4 * MIB);
            fill(&mut rig, volume(number), 4 * MIB);
        }
        let mut rig = reopened(rig, &OVERCOMMIT);
        rig.disk.set_manual_completion(true);
        let mut dice = Dice::new(1);
        let mut next = |rig: &mut Rig, id: VolumeId, token: u64| {
            let operation = if token == 0 { write(id, None, 5, dice.below(4 * MIB), 1) } else { Operation::Sync };
            rig.store.submit(id, Token(token), operation);
        };
        (1..=depth).for_each(|number| next(&mut rig, volume(number), 0));
        let (before, mut flushes, mut done) = (rig.disk.counters().syncs, 0, Vec::new());
        while flushes < 1000 {
            rig.disk.complete_one();
            rig.store.reap(&mut done);
            for completion in done.drain(..) {
                completion.result.unwrap();
                flushes += completion.token.0;
                next(&mut rig, completion.volume, 1 - completion.token.0);
            }
        }
        let syncs = rig.disk.counters().syncs - before;
        println!("1000 flushes of {depth} volumes: {syncs} syncs");
        assert!(syncs <= most, "{syncs} syncs");
        assert_eq!(rig.disk.counters().overlaps, 0);
    }
}

#[test]
fn a_snapshot_writes_two_blocks_at_most_whatever_the_size() {
    for blocks in [1, 100, 4 * MIB, 64 * MIB] {
        let mut rig = Rig::new(256 * MIB, 1, &OVERCOMMIT);
        create(&mut rig, volume(1), blocks);
        fill(&mut rig, volume(1), blocks);
        rig.settle();
        for (number, settled) in [(1, true), (2, false), (3, true)] {
            let mut dice = Dice::new(number);
            overwrite(&mut rig, volume(1), 32, (0..500).map(|_| dice.below(blocks)), |_| ());
            if settled {
                rig.settle();
            } else {
                rig.ask(volume(1), Operation::Sync).unwrap();
            }
            let before = rig.disk.counters();
            let answer = rig.ask(volume(1), Operation::Snapshot { snapshot: snapshot(u8::try_from(number).unwrap()) });
            assert!(matches!(answer, Ok(Outcome::Epoch(_))), "{answer:?}");
            let now = rig.disk.counters();
            let cost = (now.written_blocks - before.written_blocks, now.syncs - before.syncs, now.reads - before.reads);
            println!("a snapshot of {blocks} blocks: {cost:?} (blocks written, syncs, reads), settled before: {settled}");
            assert!(cost.0 <= 2 && cost.1 <= 2 && cost.2 == 0, "{cost:?}");
        }
    }
}

#[test]
fn what_changed_in_a_huge_volume_is_found_in_few_pages() {
    let mut rig = Rig::new(1024 * MIB, 1, &OVERCOMMIT);
    let mut dice = Dice::new(1);
    create(&mut rig, volume(1), TIB);
    let mut filled: Vec<u64> = (0..6000).map(|_| dice.below(TIB)).collect();
    filled.sort_unstable();
    overwrite(&mut rig, volume(1), 64, filled.into_iter(), |_| ());
    let Ok(Outcome::Epoch(epoch)) = rig.ask(volume(1), Operation::RaiseEpoch { to: Epoch::new(2), synced: Epoch::NEVER }) else {
        panic!("the epoch")
    };
    let changed: BTreeSet<u64> = (0..100).map(|_| dice.below(TIB)).collect();
    overwrite(&mut rig, volume(1), 32, changed.iter().copied(), |_| ());
    let mut rig = reopened(rig, &OVERCOMMIT);
    let from = Epoch::new(epoch.get() - 1);
    let before = (rig.store.counters().pages_read, rig.disk.counters().reads);
    let answer = rig.ask(volume(1), Operation::Changed { from, snapshot: None, start: BlockIndex::new(0) });
    let Ok(Outcome::Changed(found)) = answer else { panic!("{answer:?}") };
    let blocks: BTreeSet<u64> = found.extents.iter().map(|found| found.extent.first_block().get()).collect();
    assert_eq!((blocks, found.next), (changed, None));
    let cost = (rig.store.counters().pages_read - before.0, rig.disk.counters().reads - before.1);
    println!("100 changed blocks of 1 TiB, with a cold cache: {} pages read, {} reads", cost.0, cost.1);
    assert!(cost.0 <= 1000 && cost.1 == cost.0, "{cost:?}");
}

/// Stops a busy store at many moments, and counts what opening it takes.
#[test]
fn opening_a_store_with_a_full_journal_is_bounded() {
    let store = 512 * MIB;
    let ring = Geometry::new(store).unwrap().journal_blocks;
    let mut rig = Rig::new(store, 1, &OVERCOMMIT);
    let blocks = 16 * MIB;
    create(&mut rig, volume(1), blocks);
    fill(&mut rig, volume(1), blocks);
    let mut rig = reopened(rig, &OVERCOMMIT);
    rig.disk.set_manual_completion(true);
    let (mut dice, mut most, mut round) = (Dice::new(1), DiskCounters::default(), 0);
    overwrite(&mut rig, volume(1), 32, (0..10_000).map(|_| dice.below(blocks)), |rig| {
        rig.disk.complete_some();
        round += 1;
        if round % 64 != 0 {
            return;
        }
        let fork = rig.disk.fork();
        fork.kill(round);
        fork.set_manual_completion(false);
        let before = fork.counters();
        let opened = Rig::open(fork.clone(), Picture::default(), &OVERCOMMIT).unwrap();
        let now = fork.counters();
        let most_of = |most: &mut u64, count: fn(&DiskCounters) -> u64| *most = (*most).max(count(&now) - count(&before));
        most_of(&mut most.reads, |counters| counters.reads);
        most_of(&mut most.read_blocks, |counters| counters.read_blocks);
        most_of(&mut most.writes, |counters| counters.writes);
        most_of(&mut most.written_blocks, |counters| counters.written_blocks);
        most_of(&mut most.syncs, |counters| counters.syncs);
        drop(opened);
    });
    println!("opening with a full journal of {ring} blocks: at most {most:?}");
    assert!(most.read_blocks > ring / 2, "the journal never was full: {most:?}");
    // The journal twice in stretches that overlap by up to a batch, what looks for a torn end, and the pages of the map, in few reads.
    // What was not known to be on stable media is written anew.
    assert!(most.read_blocks <= 4 * ring + 1500 && most.reads <= ring / 8, "{most:?}");
    assert!(most.written_blocks <= ring && most.syncs <= 3, "{most:?}");
}

#[test]
fn memory_does_not_grow_with_what_is_mapped() {
    let mut rig = Rig::new(4096 * MIB, 1, &SMALL_CACHE);
    rig.disk.set_garbage_when_unwritten(false);
    let leaves = 30_000_u64;
    create(&mut rig, volume(1), TIB);
    // A page in memory: 256 entries of 24 bytes, and its head.
    const PAGE: usize = 256 * 24 + 96;
    let (mut cached, mut changed) = (0, 0);
    overwrite(&mut rig, volume(1), 64, (0..leaves).map(|leaf| leaf * (TIB / leaves)), |rig| {
        let (cache, dirty) = rig.store.memory();
        (cached, changed) = (cached.max(cache), changed.max(dirty));
    });
    rig.settle();
    let (cache, dirty) = rig.store.memory();
    assert_eq!(dirty, 0);
    println!(
        "one block in each of {leaves} leaves over 1 TiB, with a cache of 8 MiB: at most {} MiB cached, {changed} changed pages ({} MiB)",
        cached >> 20,
        (changed * PAGE) >> 20
    );
    assert!(cache <= 8 << 20, "{cache}");
    assert!(cached + changed * PAGE <= (8 << 20) + (64 << 20), "{cached} and {changed} pages");
}

/// Punching holes and preparing them again would hold up whatever else goes on in the file.
#[test]
fn large_overwrites_take_the_space_that_the_last_ones_gave_up() {
    let mut rig = Rig::new(512 * MIB, 1, &OVERCOMMIT);
    rig.disk.set_room(Some(500 * MIB * 4096));
    rig.disk.set_discards(true);
    let (id, blocks) = (volume(1), 96 * MIB);
    create(&mut rig, id, blocks);
    let rounds = |rig: &mut Rig, count: u64| (0..count).for_each(|_| fill(rig, id, blocks));
    rounds(&mut rig, 4);
    let (before, checkpoints) = (rig.disk.counters(), written(&rig).checkpoints);
    rounds(&mut rig, 20);
    let busy = rig.disk.counters();
    let (discards, prepares) = (busy.discards - before.discards, busy.prepares - before.prepares);
    let checkpoints = written(&rig).checkpoints - checkpoints;
    println!("1,920 MiB overwritten: {checkpoints} checkpoints, {discards} discards, {prepares} prepared");
    assert!(checkpoints >= 10, "space came back again and again: {checkpoints}");
    assert!(discards <= 2 && prepares <= 2, "{discards} discards, {prepares} prepared");
    // A busy store keeps that; an idle one gives it back, and then sleeps.
    let free = |rig: &Rig| rig.store.usage().unwrap().free.get() / 4096;
    let before = free(&rig);
    rig.settle();
    let idle = rig.disk.counters();
    let taken = idle.prepared_blocks - idle.discarded_blocks;
    assert!(idle.discarded_blocks > busy.discarded_blocks, "{idle:?}");
    assert!(taken <= blocks + 160 * MIB, "{} MiB taken from the file system for {} MiB", taken / MIB, blocks / MIB);
    assert!(free(&rig) >= before, "it is still free");
    rounds(&mut rig, 1);
    rig.settle();
}

/// Nothing is written by a store that is only read, but what idleness owed.
#[test]
fn a_settled_store_does_nothing() {
    let mut rig = Rig::new(64 * MIB, 1, &OVERCOMMIT);
    create(&mut rig, volume(1), 4 * MIB);
    fill(&mut rig, volume(1), 4 * MIB);
    rig.settle();
    let before = rig.disk.counters();
    for first in (0..4 * MIB).step_by(64) {
        rig.ask(volume(1), read(first, 64)).unwrap();
        rig.ask(volume(1), read(first, 1)).unwrap();
        rig.disk.advance(Duration::from_secs(1));
    }
    rig.settle();
    let now = rig.disk.counters();
    assert_eq!((now.writes, now.syncs, now.discards, now.prepares), (before.writes, before.syncs, before.discards, before.prepares));
    assert_eq!(now.read_blocks - before.read_blocks, 4 * MIB + 16);
}
