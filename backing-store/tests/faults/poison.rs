//! A write or a sync that fails ends all writing, at once and visibly; what was flushed before is there afterwards.

use std::time::Duration;

use carrick_backing_store::disk::{DiskCounters, SimulatedDisk};
use carrick_backing_store::epoch_map::{Geometry, OpenOptions};
use carrick_backing_store::{
    BlockIndex, Content, Epoch, Operation, ReplicaSpec, ReplicaState, ReplicaStore, Seq, StoreError, Synced, Term, Token, VolumeId,
};

use super::rig::{Answer, Rig, disk_blocks, extent, read, size, snapshot, volume, write};

/// 48 MiB.
const BLOCKS: u64 = 12_288;
const BOTH: [u8; 2] = [1, 2];

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strike {
    Journal,
    Data,
    Copy,
    Page,
    Catalog,
    Superblock(u64),
    FlushedSync,
    SilentSync,
    CheckpointSync,
    Short,
}

const STRIKES: [Strike; 11] = [
    Strike::Journal,
    Strike::Data,
    Strike::Copy,
    Strike::Page,
    Strike::Catalog,
    Strike::Superblock(0),
    Strike::Superblock(128),
    Strike::FlushedSync,
    Strike::SilentSync,
    Strike::CheckpointSync,
    Strike::Short,
];

impl Strike {
    /// What the store says then.
    fn reasons(self) -> &'static [&'static str] {
        match self {
            Self::Journal => &["a write to the journal failed"],
            Self::Data | Self::Copy => &["a write of data failed"],
            Self::Short => &["a write to the journal failed", "a write of data failed"],
            Self::Page | Self::Catalog | Self::Superblock(_) => &["a write of a checkpoint failed"],
            Self::FlushedSync | Self::SilentSync | Self::CheckpointSync => &["a sync failed"],
        }
    }
}

fn options() -> OpenOptions {
    OpenOptions::default()
}

/// Two volumes with flushed content, a snapshot and a clone, overwrites pending.
fn prepared(seed: u64) -> Rig {
    let mut rig = Rig::new(BLOCKS, seed, &options());
    for number in BOTH {
        rig.create(volume(number), 1024).unwrap();
        rig.write(volume(number), 1, 0, 300).unwrap();
    }
    rig.snapshot(volume(1), snapshot(1)).unwrap();
    rig.clone_of(volume(1), snapshot(1), volume(3)).unwrap();
    rig.settle();
    for step in 0..40 {
        rig.write(volume(1 + u8::try_from(step % 3).unwrap()), 2 + step, step * 7, 1 + step % 12).unwrap();
    }
    rig.flush(volume(1)).unwrap();
    rig
}

fn is_typed(answer: &Answer) -> bool {
    matches!(answer, Err(StoreError::Poisoned(_) | StoreError::Io { .. }))
}

/// What a disk was told to change.
fn changes(disk: &SimulatedDisk) -> DiskCounters {
    DiskCounters { reads: 0, read_blocks: 0, ..disk.counters() }
}

/// Changes that are in flight when the fault strikes.
fn burst(rig: &mut Rig) -> Vec<(Token, Operation)> {
    let mut burst = Vec::new();
    for (step, number) in (0..).zip([1, 2, 3, 1, 2]) {
        let (id, first) = (volume(number), 100 * step);
        rig.picture.put_perhaps(id, 900 + step, first, 1);
        rig.picture.put_perhaps(id, 950 + step, 10 + first, 20);
        rig.picture.put_perhaps(id, 0, 40 + first, 5);
        let zeroes = Operation::WriteZeroes { seq: None, extent: extent(40 + first, 5) };
        for operation in [write(id, None, 900 + step, first, 1), write(id, None, 950 + step, 10 + first, 20), zeroes, read(0, 64)] {
            burst.push((rig.submit(id, operation.clone()), operation));
        }
    }
    for operation in [Operation::Sync, raise_epoch(), write(volume(2), None, 999, 1000, 3), read(0, 64), Operation::Sync] {
        burst.push((rig.submit(volume(2), operation.clone()), operation));
    }
    rig.picture.put_perhaps(volume(2), 999, 1000, 3);
    burst
}

/// Lets the fault strike, and gives the answers of what was in flight.
fn strike(rig: &mut Rig, strike: Strike) -> Vec<(Answer, Operation)> {
    let geometry = Geometry::new(BLOCKS).unwrap();
    let disk = rig.disk.clone();
    let data = disk_blocks(geometry.data_start().get(), geometry.data_blocks);
    let catalog = geometry.catalog_at(0, 0)..geometry.journal_start();
    let journal = geometry.journal_start()..geometry.data_start();
    match strike {
        Strike::Journal => disk.fail_write(journal, Some(1)),
        Strike::Short => disk.short_next_write(),
        Strike::Data => disk.fail_write(data.clone(), Some(1)),
        Strike::FlushedSync => disk.fail_next_sync(),
        _ => {}
    }
    if matches!(strike, Strike::Journal | Strike::Short | Strike::Data | Strike::FlushedSync) {
        let burst = burst(rig);
        return burst.into_iter().map(|(token, operation)| (rig.answer(token), operation)).collect();
    }
    // The others strike a store that is left alone.
    if strike == Strike::SilentSync {
        rig.picture.put_perhaps(volume(1), 800, 9, 1);
        let token = rig.submit(volume(1), write(volume(1), None, 800, 9, 1));
        rig.answer(token).unwrap();
        disk.fail_next_sync();
    }
    if strike == Strike::Copy {
        disk.fail_write(data.clone(), Some(1));
    }
    let mut armed = false;
    for _ in 0..300 {
        rig.store.reap(&mut Vec::new());
        if rig.store.poisoned().is_some() {
            return Vec::new();
        }
        // After nine seconds of idleness everything is copied, and the checkpoint is near.
        if !armed && rig.disk.alarm().is_some() && rig.store.counters().copied > 0 && rig.store.memory().1 > 0 {
            match strike {
                Strike::Page if is_copied(rig) => disk.fail_write(data.clone(), Some(1)),
                Strike::Catalog => disk.fail_write(catalog.clone(), Some(1)),
                Strike::Superblock(at) => disk.fail_write(disk_blocks(at, 1), Some(1)),
                Strike::CheckpointSync if is_copied(rig) => disk.fail_next_sync(),
                _ => {}
            }
            armed = !matches!(strike, Strike::Page | Strike::CheckpointSync) || is_copied(rig);
        }
        disk.advance(Duration::from_millis(500));
    }
    panic!("{strike:?} never strikes");
}

/// Whether only the checkpoint is still to be made.
fn is_copied(rig: &Rig) -> bool {
    rig.disk.alarm().is_some() && rig.disk.in_flight() == 0 && carrick_backing_store::disk::Disk::now(&rig.disk) > Duration::from_secs(9)
}

fn everything(id: VolumeId) -> Vec<Operation> {
    let state = ReplicaState { promised: Term::new(5), log_term: Term::new(5), content: Content::Complete, synced: Synced::default() };
    vec![
        write(id, None, 700, 0, 1),
        write(id, None, 700, 0, 64),
        write(id, Some(1), 700, 0, 1),
        Operation::WriteZeroes { seq: None, extent: extent(0, 512) },
        Operation::Sync,
        Operation::SetState { state, position: Some(Seq::new(7)) },
        raise_epoch(),
        Operation::Snapshot { snapshot: snapshot(9) },
        Operation::DeleteSnapshot { snapshot: snapshot(1) },
        Operation::Revert { snapshot: snapshot(1) },
        Operation::Expand { size: size(2048) },
    ]
}

/// A poisoned store refuses every change and writes nothing, and answers what it can.
fn stays_poisoned(rig: &mut Rig, strike: Strike, what: &str) {
    let reason = rig.store.poisoned().unwrap_or_else(|| panic!("{what}: the store does not say that it is poisoned")).to_owned();
    assert!(strike.reasons().iter().any(|expected| reason.starts_with(expected)), "{what}: {reason}");
    rig.disk.complete_all();
    rig.store.reap(&mut Vec::new());
    let before = changes(&rig.disk);
    for number in [1, 2, 3] {
        for operation in everything(volume(number)) {
            let answer = rig.ask(volume(number), operation.clone());
            assert!(is_typed(&answer), "{what}: {operation:?} on a poisoned store: {answer:?}");
        }
        let scrub = Operation::Scrub { start: BlockIndex::new(0), blocks: 512 };
        let changed = Operation::Changed { from: Epoch::NEVER, snapshot: None, start: BlockIndex::new(0) };
        for operation in [scrub, changed, Operation::LoggedAfter { after: Seq::ZERO }] {
            let answer = rig.ask(volume(number), operation.clone());
            assert!(answer.is_ok() || is_typed(&answer), "{what}: {operation:?}: {answer:?}");
        }
    }
    for (image, _, error) in rig.read_all(512) {
        assert!(matches!(error, StoreError::Poisoned(_) | StoreError::Io { .. }), "{what}: reading {image:?}: {error}");
    }
    let spec = ReplicaSpec { volume: volume(8), size: size(1024) };
    assert!(is_typed(&rig.store.create(spec).map(|()| unreachable!())), "{what}: create");
    assert!(is_typed(&rig.store.clone_snapshot(volume(1), snapshot(1), spec).map(|()| unreachable!())), "{what}: clone");
    assert!(is_typed(&rig.store.delete(volume(2)).map(|()| unreachable!())), "{what}: delete");
    assert_eq!(rig.store.replicas().len(), 3, "{what}");
    assert_eq!(rig.store.snapshots(volume(1)).unwrap().len(), 1, "{what}");
    rig.store.usage().unwrap();
    for _ in 0..60 {
        rig.disk.advance(Duration::from_secs(1));
        rig.store.reap(&mut Vec::new());
    }
    assert_eq!(rig.disk.alarm(), None, "{what}: it sleeps");
    assert_eq!(changes(&rig.disk), before, "{what}: nothing is ever written again");
}

fn raise_epoch() -> Operation {
    Operation::RaiseEpoch { to: Epoch::new(1000), synced: Epoch::FIRST }
}

#[test]
fn a_failed_write_or_sync_ends_all_writing_and_loses_nothing_that_was_flushed() {
    for what in STRIKES {
        for seed in 0..6 {
            let name = format!("{what:?}, seed {seed}");
            println!("{name}");
            let mut rig = prepared(seed);
            let answers = strike(&mut rig, what);
            for (answer, operation) in &answers {
                assert!(answer.is_ok() || is_typed(answer), "{name}: {operation:?}: {answer:?}");
            }
            let refused = answers.iter().filter(|(answer, _)| answer.is_err()).count();
            assert!(answers.is_empty() || refused > 0, "{name}: nothing in flight was refused");
            stays_poisoned(&mut rig, what, &name);
            let mut rig = rig.reopen((seed > 0).then_some(seed), &options());
            rig.verify();
            // It is as good as new.
            rig.picture.perhaps.clear();
            rig.create(volume(7), 64).unwrap();
            rig.write(volume(7), 600, 0, 64).unwrap();
            rig.flush(volume(7)).unwrap();
            rig.picture.images.retain(|(id, _), _| *id == volume(7));
            let mut rig = rig.reopen((seed > 0).then_some(seed), &options());
            rig.verify();
        }
    }
}

/// After a failed sync nobody knows what of it is on stable media. A store that was opened again on what could still be read must not
/// build on it: here the power goes later, after a flush that succeeded.
#[test]
fn what_a_failed_sync_left_in_doubt_is_made_good_by_opening_the_store_again() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut rig = prepared(seed);
        let answers = strike(&mut rig, Strike::FlushedSync);
        assert!(answers.iter().any(|(answer, _)| answer.is_err()));
        let mut rig = rig.reopen(None, &options());
        rig.verify();
        rig.write(volume(1), 500, 60, 2).unwrap();
        rig.write(volume(1), 501, 600, 20).unwrap();
        rig.picture.perhaps.retain(|(id, block), _| *id != volume(1) || !(60..62).contains(block) && !(600..620).contains(block));
        rig.flush(volume(1)).unwrap();
        let mut rig = rig.reopen(Some(seed), &options());
        rig.verify();
    }
}
