//! Damaged data and damaged map pages: a typed error for what is damaged, and nothing else suffers.

use std::collections::BTreeSet;

use carrick_backing_store::disk::DiskBlock;
use carrick_backing_store::epoch_map::{Fault, Geometry, OpenOptions};
use carrick_backing_store::{BlockIndex, ByteLength, Epoch, Operation, Outcome, ReplicaStore, SnapshotId, StoreError, VolumeId};

use super::rig::{BLOCK, Rig, checked, disk_blocks, read, snapshot, volume, write};

/// 48 MiB.
const BLOCKS: u64 = 12_288;
const V: VolumeId = VolumeId::from_bytes([1; 16]);
const OTHER: VolumeId = VolumeId::from_bytes([2; 16]);
/// Blocks of each volume: a root and four leaves.
const SIZE: u64 = 1024;

fn options() -> OpenOptions {
    OpenOptions { cache: ByteLength::new(0), overcommit: false }
}

fn data() -> std::ops::Range<u64> {
    let geometry = Geometry::new(BLOCKS).unwrap();
    geometry.data_start().get()..geometry.data_end().get()
}

/// Two volumes whose every block was written twice, the second time in place, all of it settled.
fn prepared(seed: u64) -> Rig {
    let mut rig = Rig::new(BLOCKS, seed, &options());
    for (id, number) in [(V, 10_000), (OTHER, 20_000)] {
        rig.create(id, SIZE).unwrap();
        for first in (0..SIZE).step_by(64) {
            rig.write(id, 5000 + number + first, first, 64).unwrap();
        }
        rig.flush(id).unwrap();
        for first in (0..SIZE).step_by(8) {
            rig.write(id, number + first, first, 8).unwrap();
        }
        rig.flush(id).unwrap();
    }
    rig.settle();
    rig.verify();
    rig
}

fn scrub(rig: &mut Rig, id: VolumeId) -> BTreeSet<u64> {
    let (mut start, mut bad) = (BlockIndex::new(0), BTreeSet::new());
    loop {
        match rig.ask(id, Operation::Scrub { start, blocks: 300 }).unwrap() {
            Outcome::Scrubbed(found) => {
                bad.extend(found.bad.iter().map(|block| block.get()));
                match found.next {
                    Some(next) => start = next,
                    None => return bad,
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Reads block by block, and in pieces: exactly these must fail, and say so. Scrubbing finds the same.
fn only_these_are_bad(rig: &mut Rig, id: VolumeId, expected: &BTreeSet<u64>, what: &str) {
    let mut found = BTreeSet::new();
    for piece in [1, 64] {
        for ((image, snapshot), first, error) in rig.read_all(piece) {
            assert_eq!((image, snapshot), (id, None), "{what}: {error}");
            let StoreError::Corrupt { volume, block, .. } = error else { panic!("{what}: {error}") };
            assert!(volume == id && (first..first + piece).contains(&block.get()), "{what}: {error} for {first}+{piece}");
            found.extend((piece == 1).then_some(block.get()));
        }
    }
    assert_eq!(&found, expected, "{what}: what can't be read");
    assert_eq!(&scrub(rig, id), expected, "{what}: what a scrub finds");
    assert_eq!(scrub(rig, OTHER), BTreeSet::new(), "{what}: what a scrub finds of the other volume");
}

fn bad_blocks(rig: &Rig) -> u64 {
    rig.store.usage().unwrap().bad.get() / BLOCK as u64
}

/// Writes the bad blocks anew: then all is well, and their places are never used again.
fn heal(rig: &mut Rig, bad: &BTreeSet<u64>, places: &[u64], what: &str) {
    for block in bad {
        rig.write(V, 77_777, *block, 1).unwrap();
    }
    rig.flush(V).unwrap();
    only_these_are_bad(rig, V, &BTreeSet::new(), what);
    rig.settle();
    assert_eq!(bad_blocks(rig), places.len() as u64, "{what}: the places that are remembered");
    for block in bad {
        let place = rig.place_of(77_777, *block, data());
        assert!(!places.contains(&place), "{what}: block {block} is at place {place} again");
    }
}

#[test]
fn damaged_data_is_never_taken_for_right_and_a_write_heals_it() {
    damaged_data_is_found(&["flip", "error once", "stale", "zeroed", "misplaced"]);
}

#[test]
fn unreadable_data_is_found_and_a_write_heals_it() {
    damaged_data_is_found(&["error"]);
}

fn damaged_data_is_found(ways: &[&str]) {
    for (seed, what) in (0..).zip(ways.iter().copied()) {
        let mut rig = prepared(seed);
        let blocks = [3, 64 + 9, 255, 256, 700, 1023];
        let places: Vec<u64> = blocks.iter().map(|block| rig.place_of(10_000 + block / 8 * 8, *block, data())).collect();
        for (position, at) in places.iter().enumerate() {
            let block = DiskBlock::new(*at);
            match what {
                "flip" => rig.disk.flip_bit(block, 4567 * position % (BLOCK * 8)),
                "error" => rig.disk.fail_read(disk_blocks(*at, 1), None),
                // Each is read four times below.
                "error once" => rig.disk.fail_read(disk_blocks(*at, 1), Some(1)),
                "stale" => assert!(rig.disk.stale(block)),
                "zeroed" => rig.disk.overwrite(block, &[0; BLOCK]),
                _ => {
                    let other = rig.disk.content(DiskBlock::new(at + 1));
                    rig.disk.overwrite(block, &other[..]);
                }
            }
        }
        let bad: BTreeSet<u64> = blocks.into();
        if what == "error once" {
            assert_eq!(rig.read_all(1).len(), 6, "{what}");
            only_these_are_bad(&mut rig, V, &BTreeSet::new(), what);
        } else {
            only_these_are_bad(&mut rig, V, &bad, what);
            let report = checked(&rig.disk).unwrap();
            let faults: BTreeSet<u64> = report.faults.iter().map(fault_block).collect();
            assert!(faults == bad, "{what}: a check finds {} bad blocks: {:?}", faults.len(), report.faults.first());
            rig = Rig::open(rig.disk.clone(), rig.picture.clone(), &options()).unwrap();
            only_these_are_bad(&mut rig, V, &bad, what);
        }
        heal(&mut rig, &bad, &places, what);
        let mut rig = rig.reopen(None, &options());
        assert_eq!(bad_blocks(&rig), 6, "{what}: remembered over a restart");
        // And not given to others.
        for round in 0..4 {
            for first in (0..SIZE).step_by(32) {
                rig.write(V, 200_000 + round * SIZE + first, first, 32).unwrap();
            }
            rig.settle();
        }
        rig.verify();
        let mut expected = vec![0; BLOCK];
        for (id, _) in rig.picture.images.keys() {
            for block in 0..SIZE {
                super::rig::fill(rig.picture.images[&(*id, None)][usize::try_from(block).unwrap()], block, &mut expected);
                assert!(places.iter().all(|at| rig.disk.content(DiskBlock::new(*at))[..] != expected[..]), "{what}");
            }
        }
    }
}

fn fault_block(fault: &Fault) -> u64 {
    if let Fault::Block { block, .. } = fault { block.get() } else { panic!("{fault:?}") }
}

#[test]
fn an_unreadable_block_condemns_no_others() {
    let mut rig = prepared(1);
    let place = rig.place_of(10_000 + 8, 12, data());
    rig.disk.fail_read(disk_blocks(place, 1), None);
    let Err(StoreError::Corrupt { block, .. }) = rig.ask(V, read(0, 64)) else { panic!("a block of it can't be read") };
    assert_eq!(block.get(), 12, "which block is bad");
    assert_eq!(scrub(&mut rig, V), [12].into());
    rig.write(V, 5000, 0, 64).unwrap();
    rig.settle();
    rig.verify();
    assert_eq!(bad_blocks(&rig), 1, "blocks that are never used again");
}

#[test]
fn writes_that_never_came_or_came_elsewhere_are_found() {
    for (seed, fresh, elsewhere) in [(1, false, false), (2, false, true), (3, true, false), (4, true, true)] {
        let what = format!("fresh {fresh}, elsewhere {elsewhere}");
        let mut rig = prepared(seed).reopen(None, &options());
        let victim = rig.place_of(10_000 + 800, 801, data());
        let (first, count) = (400, if fresh { 16 } else { 4 });
        let before = rig.place_of(10_000 + 400, 400, data());
        let strike = |rig: &Rig| if elsewhere { rig.disk.misdirect_next_write(DiskBlock::new(victim)) } else { rig.disk.lose_next_write() };
        if fresh {
            strike(&rig);
            rig.write(V, 3, first, count).unwrap();
        } else {
            rig.write(V, 3, first, count).unwrap();
            rig.flush(V).unwrap();
            // What comes next is the copy.
            strike(&rig);
        }
        rig.settle();
        let copied = *rig.disk.content(DiskBlock::new(before));
        assert!(fresh || copied[..8] == (10_000_u64 + 400).to_le_bytes(), "{what}: the copy never came");
        let mut bad: BTreeSet<u64> = (first..first + count).collect();
        if elsewhere {
            bad.extend((801..801 + count).filter(|block| *block < SIZE));
        }
        only_these_are_bad(&mut rig, V, &bad, &what);
        for block in &bad {
            rig.write(V, 9, *block, 1).unwrap();
        }
        only_these_are_bad(&mut rig, V, &BTreeSet::new(), &what);
        rig.flush(V).unwrap();
        let mut rig = rig.reopen(Some(seed), &options());
        rig.verify();
    }
}

#[test]
fn a_damaged_block_of_a_snapshot_is_remembered_when_the_snapshot_goes() {
    let mut rig = prepared(5);
    let kept: SnapshotId = snapshot(1);
    rig.snapshot(V, kept).unwrap();
    let place = rig.place_of(10_000 + 96, 100, data());
    rig.disk.flip_bit(DiskBlock::new(place), 12_345);
    let mut failed: Vec<_> = rig.read_all(1).into_iter().map(|((id, snapshot), block, _)| (id, snapshot, block)).collect();
    failed.sort_unstable();
    assert_eq!(failed, [(V, None, 100), (V, Some(kept), 100)]);
    rig.write(V, 4, 100, 1).unwrap();
    assert_eq!(rig.read_all(1).len(), 1, "the volume is healed, the snapshot is not");
    rig.delete_snapshot(V, kept).unwrap();
    rig.settle();
    assert_eq!(bad_blocks(&rig), 1);
    rig.verify();
    rig.reopen(Some(1), &options()).verify();
}

// Map pages.

/// Where there is, or was, a page of this volume's map.
fn pages(rig: &Rig, magic: [u8; 4], id: VolumeId, index: u64) -> Vec<DiskBlock> {
    let is_one = |at: &DiskBlock| {
        let page = rig.disk.content(*at);
        page[..4] == magic && page[8..24] == id.to_bytes() && page[24..32] == index.to_le_bytes()
    };
    data().map(DiskBlock::new).filter(is_one).collect()
}

fn is_page_error(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { action: "read a map page of", .. })
}

#[test]
fn under_a_damaged_map_page_there_are_errors_and_beside_it_everything_goes_on() {
    for (seed, how) in (0..).zip(["flip", "error", "zeroed"]) {
        for (magic, index, under) in [(*b"CLEF", 2, 512..768), (*b"CINN", 0, 0..1024)] {
            let what = format!("{how}, page {index}, {under:?}");
            let mut rig = prepared(seed);
            let found = pages(&rig, magic, V, index);
            assert!(!found.is_empty());
            for page in found {
                match how {
                    "flip" => rig.disk.flip_bit(page, 100 * 8),
                    "error" => rig.disk.fail_read(disk_blocks(page.get(), 1), None),
                    _ => rig.disk.overwrite(page, &[0; BLOCK]),
                }
            }
            // What `prepared` had in the cache is gone.
            rig = Rig::open(rig.disk.clone(), rig.picture.clone(), &options()).unwrap();
            let failed: BTreeSet<(VolumeId, u64)> = rig
                .read_all(64)
                .into_iter()
                .map(|((id, _), first, error)| {
                    assert!(is_page_error(&error), "{what}: {error}");
                    (id, first)
                })
                .collect();
            assert_eq!(failed, under.clone().step_by(64).map(|first| (V, first)).collect(), "{what}");
            for operation in [
                write(V, None, 5, under.start + 3, 1),
                write(V, None, 5, under.start, 100),
                Operation::WriteZeroes { seq: None, extent: super::rig::extent(under.start + 1, 4) },
                Operation::Scrub { start: BlockIndex::new(under.start), blocks: 10 },
                Operation::Changed { from: Epoch::NEVER, snapshot: None, start: BlockIndex::new(0) },
            ] {
                let error = rig.ask(V, operation.clone()).unwrap_err();
                assert!(is_page_error(&error), "{what}: {operation:?}: {error}");
            }
            if under.start > 0 {
                rig.write(V, 6, 10, 3).unwrap();
                rig.zero(V, 20, 100).unwrap();
            }
            rig.write(OTHER, 6, 10, 300).unwrap();
            rig.snapshot(OTHER, snapshot(1)).unwrap();
            rig.write(OTHER, 7, 12, 2).unwrap();
            rig.flush(OTHER).unwrap();
            rig.settle();
            // Taking the volume apart comes to the page, stays there, and does no harm.
            rig.delete(V).unwrap();
            for round in 0..5 {
                rig.write(OTHER, 8 + round, 100 * round, 50).unwrap();
            }
            settle_for_a_while(&mut rig);
            rig.verify();
            let report = checked(&rig.disk).unwrap();
            assert!(report.faults.iter().any(|fault| matches!(fault, Fault::Page { .. })), "{what}: {report:?}");
            rig = Rig::open(rig.disk.clone(), rig.picture.clone(), &options()).unwrap();
            rig.verify();
            rig.create(V, 64).unwrap();
            rig.write(V, 50, 0, 64).unwrap();
            rig.delete_snapshot(OTHER, snapshot(1)).unwrap();
            settle_for_a_while(&mut rig);
            rig.verify();
            assert!(rig.store.poisoned().is_none(), "{what}");
            rig.store.close().unwrap();
        }
    }
}

fn settle_for_a_while(rig: &mut Rig) {
    for _ in 0..40 {
        rig.store.reap(&mut Vec::new());
        rig.disk.advance(std::time::Duration::from_secs(1));
    }
    assert!(rig.disk.alarm().is_none(), "a store that can't go on sleeps");
}

#[test]
fn a_whole_part_that_becomes_zeros_needs_no_damaged_page() {
    let mut rig = prepared(9);
    for page in pages(&rig, *b"CLEF", V, 2) {
        rig.disk.flip_bit(page, 9);
    }
    rig = Rig::open(rig.disk.clone(), rig.picture.clone(), &options()).unwrap();
    rig.zero(V, 512, 256).unwrap();
    settle_for_a_while(&mut rig);
    rig.write(V, 3, 600, 4).unwrap();
    rig.flush(V).unwrap();
    rig.verify();
    let mut rig = Rig::open(rig.disk.clone(), rig.picture.clone(), &options()).unwrap();
    rig.verify();
}

#[test]
fn a_page_that_could_not_be_read_once_is_read_again() {
    let mut rig = prepared(10);
    rig = Rig::open(rig.disk.clone(), rig.picture.clone(), &options()).unwrap();
    for page in pages(&rig, *b"CLEF", V, 1) {
        rig.disk.fail_read(disk_blocks(page.get(), 1), Some(1));
    }
    let error = rig.ask(V, read(300, 4)).unwrap_err();
    assert!(is_page_error(&error), "{error}");
    rig.disk.heal();
    rig.verify();
    rig.write(volume(1), 3, 300, 4).unwrap();
    rig.verify();
}
