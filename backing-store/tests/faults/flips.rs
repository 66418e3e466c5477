//! Every kind of thing that a store keeps on its disk, with single bits flipped: what is read is right, or a typed error.
//!
//! By default a part of all flips is tried: every bit of the first bytes of each structure, and some bits of the others.
//! `CARRICK_FLIPS=1` tries one bit of every byte of every structure, and all bits of one structure of each kind.

use std::collections::{BTreeMap, BTreeSet};

use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::{DiskBlock, SimulatedDisk};
use carrick_backing_store::epoch_map::{EpochMap, Geometry, OpenOptions};
use carrick_backing_store::{ByteLength, Content, Operation, ReplicaState, ReplicaStore, Seq, StoreError, Synced, Term};

use super::rig::{BLOCK, Picture, Rig, checked, fill, path, snapshot, volume, write};

/// 8 MiB, the smallest store.
pub const BLOCKS: u64 = 2048;

pub fn options() -> OpenOptions {
    OpenOptions { cache: ByteLength::new(0), overcommit: true }
}

/// Volumes, snapshots, a clone, and a journal that is still to be replayed. Everything is flushed; of all but the last write the
/// disk says so, too.
pub fn store() -> (SimulatedDisk, Picture) {
    let mut rig = Rig::new(BLOCKS, 1, &options());
    let (a, b, c) = (volume(1), volume(2), volume(3));
    rig.create(a, 600).unwrap();
    rig.create(b, 40).unwrap();
    rig.write(a, 1, 0, 20).unwrap();
    rig.write(a, 2, 250, 20).unwrap();
    rig.write(b, 3, 0, 30).unwrap();
    rig.zero(b, 5, 3).unwrap();
    rig.snapshot(a, snapshot(1)).unwrap();
    rig.write(a, 4, 255, 3).unwrap();
    rig.write(a, 5, 550, 10).unwrap();
    rig.snapshot(a, snapshot(2)).unwrap();
    rig.clone_of(a, snapshot(1), c).unwrap();
    rig.write(c, 6, 10, 5).unwrap();
    rig.write(a, 7, 0, 2).unwrap();
    rig.settle();
    // Not through the rig, which writes without sequences.
    for (seq, (number, first, count)) in (1..).zip([(8, 0, 1), (9, 0, 8), (10, 12, 4), (11, 100, 16), (12, 30, 1)]) {
        let id = if first < 30 { b } else { a };
        let seq = if id == b { seq } else { seq - 3 };
        rig.ask(id, write(id, Some(seq), number, first, count)).unwrap();
        rig.picture.put(id, number, first, count);
        rig.flush(a).unwrap();
    }
    rig.zero(a, 251, 2).unwrap();
    rig.flush(a).unwrap();
    rig.snapshot(b, snapshot(3)).unwrap();
    let state = ReplicaState { promised: Term::new(9), log_term: Term::new(8), content: Content::Complete, synced: Synced::default() };
    rig.ask(a, Operation::SetState { state, position: None }).unwrap();
    rig.create(volume(4), 10).unwrap();
    rig.write(volume(4), 13, 0, 10).unwrap();
    rig.flush(a).unwrap();
    rig.write(c, 14, 10, 3).unwrap();
    rig.flush(c).unwrap();
    // This one ends the journal: that it is on stable media only the next would tell.
    rig.picture.put_perhaps(b, 12, 39, 1);
    rig.picture.put_perhaps(b, 0, 39, 1);
    rig.write(b, 15, 39, 1).unwrap();
    rig.flush(b).unwrap();
    let Rig { disk, picture, .. } = rig;
    disk.power_cut(1);
    (disk, picture)
}

/// What is in a block that matters.
pub fn structures(disk: &SimulatedDisk, picture: &Picture) -> BTreeMap<&'static str, Vec<DiskBlock>> {
    let geometry = Geometry::new(BLOCKS).unwrap();
    let mut found: BTreeMap<&'static str, Vec<DiskBlock>> = BTreeMap::new();
    let content = |at: u64| disk.content(DiskBlock::new(at));
    found.insert("superblock", vec![DiskBlock::new(0), DiskBlock::new(128)]);
    let number = |at: u64| u64::from_le_bytes(content(at)[88..96].try_into().unwrap());
    let half = number(0).max(number(128)) & 1;
    found.insert("catalog", (0..2).map(|copy| geometry.catalog_at(half, copy)).collect());
    let head = u64::from_le_bytes(content(0)[120..128].try_into().unwrap());
    let journal = geometry.journal_start().get();
    for offset in head..geometry.journal_blocks {
        let kind = if content(journal + offset)[..4] == *b"CJNL" { "batch" } else { "payload" };
        found.entry(kind).or_default().push(DiskBlock::new(journal + offset));
        // The journal ends with three blocks without anything.
        if (offset..offset + 3).all(|offset| *content(journal + offset) == [0; BLOCK]) {
            break;
        }
    }
    let numbers: BTreeSet<(u64, u64)> =
        picture.images.values().flat_map(|numbers| (0..).zip(numbers).map(|(block, number)| (*number, block))).collect();
    let mut bytes = [0; BLOCK];
    for at in geometry.data_start().get()..geometry.data_end().get() {
        let block = content(at);
        let kind = match &block[..4] {
            b"CLEF" => "leaf",
            b"CINN" => "inner",
            _ => {
                let number = u64::from_le_bytes(block[..8].try_into().unwrap());
                let index = u64::from_le_bytes(block[8..16].try_into().unwrap());
                let is_data = numbers.contains(&(number, index)) && {
                    fill(number, index, &mut bytes);
                    *block == bytes
                };
                // Pages of bits and of the directory have no magic number, and what was never written is garbage.
                if is_data { "data" } else { "bits" }
            }
        };
        found.entry(kind).or_default().push(DiskBlock::new(at));
    }
    // Of blocks without a magic number only those count that opening reads.
    let bits = found.remove("bits").unwrap_or_default();
    let is_read = |at: &DiskBlock| {
        let fork = disk.fork();
        fork.fail_read(*at..at.plus(1), None);
        matches!(EpochMap::open(fork.reopen(), path(), &options()), Err(StoreError::Damaged { reason, .. }) if reason.starts_with("a page of"))
    };
    found.insert("bits", bits.into_iter().filter(is_read).collect());
    found
}

/// What came of some flips.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcomes {
    pub refused: u64,
    pub partly: u64,
    pub whole: u64,
}

/// Opens a store and reads everything. Wrong bytes are a panic.
pub fn look(disk: &SimulatedDisk, picture: &Picture, outcomes: &mut Outcomes) {
    let mut rig = match Rig::open(disk.clone(), picture.clone(), &options()) {
        Ok(rig) => rig,
        Err(StoreError::Damaged { .. }) => return outcomes.refused += 1,
        Err(error) => panic!("opening says: {error}"),
    };
    for (id, _) in picture.images.keys() {
        let opened = rig.store.replicas().iter().any(|opened| opened.spec.volume == *id);
        assert!(opened, "volume {id} is not there, and nobody said why");
    }
    let a = rig.store.replicas().into_iter().find(|opened| opened.spec.volume == volume(1)).unwrap();
    assert_eq!((a.position, a.state.promised), (Seq::new(2), Term::new(9)), "what volume 1 must never forget");
    let failed = rig.read_all(64);
    for (image, first, error) in &failed {
        let typed = matches!(error, StoreError::Corrupt { .. } | StoreError::Io { action: "read a map page of", .. });
        assert!(typed, "{image:?} at {first}: {error}");
    }
    *(if failed.is_empty() { &mut outcomes.whole } else { &mut outcomes.partly }) += 1;
}

fn try_flip(disk: &SimulatedDisk, picture: &Picture, at: DiskBlock, bit: usize, outcomes: &mut Outcomes) {
    let fork = disk.fork();
    fork.flip_bit(at, bit);
    if bit.is_multiple_of(64)
        && let Err(error) = checked(&fork)
    {
        assert!(matches!(error, StoreError::Damaged { .. }), "checking says: {error}");
    }
    look(&fork, picture, outcomes);
}

/// Which bits of a structure are tried.
fn bits(is_first: bool, all: bool, dice: &mut Dice) -> Vec<usize> {
    let mut one_in = |step: usize| -> Vec<usize> { (0..BLOCK).step_by(step).map(|byte| byte * 8 + dice.index(8 * step)).collect() };
    match (all, is_first) {
        (true, true) => (0..BLOCK * 8).collect(),
        (true, false) => one_in(1),
        (false, _) => {
            let mut bits = one_in(128);
            bits.extend((0..if is_first { 96 * 8 } else { 0 }).step_by(3));
            bits
        }
    }
}

#[test]
fn a_flipped_bit_is_repaired_or_told() {
    let all = std::env::var("CARRICK_FLIPS").is_ok();
    let (disk, picture) = store();
    let mut rig = Rig::open(disk.fork(), picture.clone(), &options()).unwrap();
    rig.verify();
    let structures = structures(&disk, &picture);
    let kinds: Vec<(&str, usize)> = structures.iter().map(|(kind, places)| (*kind, places.len())).collect();
    println!("{kinds:?}");
    for kind in ["superblock", "catalog", "bits", "leaf", "inner", "batch", "payload", "data"] {
        assert!(structures.get(kind).is_some_and(|places| !places.is_empty()), "no {kind} was found");
    }
    let mut dice = Dice::new(2);
    let mut work = Vec::new();
    for (kind, places) in &structures {
        for (number, at) in places.iter().enumerate() {
            if *kind != "data" {
                work.extend(bits(number == 0, all, &mut dice).into_iter().map(|bit| (*kind, *at, bit)));
            } else if number % 4 == 0 {
                work.push((*kind, *at, dice.index(BLOCK * 8)));
            }
        }
    }
    let workers = 2;
    let parts: Vec<BTreeMap<&str, Outcomes>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers)
            .map(|worker| {
                let (image, picture, work) = (disk.image(), picture.clone(), &work);
                scope.spawn(move || {
                    let disk = SimulatedDisk::of(&image);
                    let mut outcomes: BTreeMap<&str, Outcomes> = BTreeMap::new();
                    for (kind, at, bit) in work.iter().skip(worker).step_by(workers) {
                        let attempt = || try_flip(&disk, &picture, *at, *bit, outcomes.entry(kind).or_default());
                        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt));
                        assert!(result.is_ok(), "bit {bit} of block {at}, which is a {kind}, was flipped");
                    }
                    outcomes
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    for kind in structures.keys() {
        let sum = |part: fn(&Outcomes) -> u64| parts.iter().filter_map(|outcomes| outcomes.get(kind)).map(part).sum::<u64>();
        let (refused, partly, whole) = (sum(|o| o.refused), sum(|o| o.partly), sum(|o| o.whole));
        println!("{kind}: refused {refused}, partly readable {partly}, whole {whole}");
        let is_told = match *kind {
            // There are two.
            "superblock" | "catalog" => refused == 0 && partly == 0,
            // What is free can't be known without it.
            "bits" => partly == 0 && whole == 0,
            "leaf" | "inner" => whole == 0,
            "data" => refused == 0 && whole == 0,
            // The end of the journal may be one that a crash left: then it was never acknowledged, or is in place, too.
            _ => partly == 0 && refused > whole / 2,
        };
        assert!(is_told, "a flipped bit in a {kind} went unnoticed, or cost too much");
    }
}

/// One copy of two may be lost altogether.
#[test]
fn one_copy_of_superblock_and_catalog_is_enough() {
    let (disk, picture) = store();
    let structures = structures(&disk, &picture);
    for kind in ["superblock", "catalog"] {
        for place in structures[kind].iter().copied() {
            for how in ["zeros", "error"] {
                let fork = disk.fork();
                match how {
                    "zeros" => fork.overwrite(place, &[0; BLOCK]),
                    _ => fork.fail_read(place..place.plus(1), None),
                }
                let mut outcomes = Outcomes::default();
                look(&fork, &picture, &mut outcomes);
                assert_eq!(outcomes.whole, 1, "{kind} at {place}, {how}: {outcomes:?}");
                // The next checkpoint writes both.
                let mut rig = Rig::open(fork, picture.clone(), &options()).unwrap();
                rig.write(volume(1), 50, 0, 1).unwrap();
                rig.settle();
                rig.disk.heal();
                rig.store.close().unwrap();
                assert!(checked(&rig.disk).unwrap().is_clean(), "{kind} at {place}, {how}");
            }
        }
    }
}
