//! Epochs, snapshots, clones, reverts, and what they cost.

use super::*;
use crate::store::{CHANGED_MAX, ChangedExtent, ChangedExtents, Scrubbed, SnapshotInfo};
use crate::units::Epoch;

const CLONE: VolumeId = VolumeId::from_bytes([8; 16]);
const OTHER: VolumeId = VolumeId::from_bytes([9; 16]);

fn id(name: u8) -> SnapshotId {
    SnapshotId::from_bytes([name; 16])
}

fn spec(volume: VolumeId, blocks: u64) -> ReplicaSpec {
    ReplicaSpec { volume, size: VolumeSize::new(blocks * 4096).unwrap() }
}

fn zeroes(first: u64, count: u64) -> Operation {
    Operation::WriteZeroes { seq: None, extent: extent(first, count) }
}

fn epoch(store: &mut MemoryStore, operation: Operation) -> u32 {
    match run(store, operation).unwrap() {
        Outcome::Epoch(epoch) => epoch.get(),
        other => panic!("{other:?}"),
    }
}

fn raise(to: u32) -> Operation {
    Operation::RaiseEpoch { to: Epoch::new(to), synced: Epoch::NEVER }
}

fn snapshot(store: &mut MemoryStore, name: u8) -> u32 {
    epoch(store, Operation::Snapshot { snapshot: id(name) })
}

fn revert(store: &mut MemoryStore, name: u8) -> u32 {
    epoch(store, Operation::Revert { snapshot: id(name) })
}

fn delete(store: &mut MemoryStore, name: u8) -> Result<Outcome, StoreError> {
    run(store, Operation::DeleteSnapshot { snapshot: id(name) })
}

fn run_on(store: &mut MemoryStore, volume: VolumeId, operation: Operation) -> Result<Outcome, StoreError> {
    store.submit(volume, Token(1), operation);
    let mut completions = Vec::new();
    store.reap(&mut completions);
    completions.remove(0).result
}

/// The first bytes of blocks.
fn read_of(store: &mut MemoryStore, volume: VolumeId, snapshot: Option<u8>, first: u64, count: u64) -> Vec<u8> {
    match run_on(store, volume, Operation::Read { extent: extent(first, count), snapshot: snapshot.map(id) }).unwrap() {
        Outcome::Read(ReadData::Zeroes) => vec![0; usize::try_from(count).unwrap()],
        Outcome::Read(ReadData::Blocks { data, checksums }) => {
            for ((block, data), checksum) in (first..).zip(data.chunks(4096)).zip(checksums) {
                assert_eq!(block_checksum(volume, BlockIndex::new(block), data), checksum);
            }
            data.iter().step_by(4096).copied().collect()
        }
        other => panic!("{other:?}"),
    }
}

fn changed_on(
    store: &mut MemoryStore,
    volume: VolumeId,
    from: u32,
    snapshot: Option<u8>,
    start: u64,
) -> Result<ChangedExtents, StoreError> {
    let operation = Operation::Changed { from: Epoch::new(from), snapshot: snapshot.map(id), start: BlockIndex::new(start) };
    run_on(store, volume, operation).map(|outcome| match outcome {
        Outcome::Changed(changed) => changed,
        other => panic!("{other:?}"),
    })
}

/// First block, count, whether zeros.
fn changed(store: &mut MemoryStore, from: u32, snapshot: Option<u8>) -> Vec<(u64, u64, bool)> {
    let found = changed_on(store, VOLUME, from, snapshot, 0).unwrap();
    assert_eq!(found.next, None);
    let numbers = |ChangedExtent { extent, zeroes }: ChangedExtent| (extent.first_block().get(), extent.block_count(), zeroes);
    found.extents.into_iter().map(numbers).collect()
}

#[test]
fn blocks_remember_the_epoch_of_their_last_write() {
    let mut store = store();
    assert_eq!(changed(&mut store, 0, None), []);
    run(&mut store, write(None, 2, 3, 5)).unwrap();
    run(&mut store, zeroes(4, 3)).unwrap();
    assert_eq!(epoch(&mut store, raise(2)), 2);
    run(&mut store, write(None, 3, 1, 6)).unwrap();
    run(&mut store, write(None, 9, 1, 6)).unwrap();
    assert_eq!(changed(&mut store, 0, None), [(2, 2, false), (4, 3, true), (9, 1, false)]);
    assert_eq!(changed(&mut store, 1, None), [(3, 1, false), (9, 1, false)]);
    assert_eq!(changed(&mut store, 2, None), []);
    let from_five = changed_on(&mut store, VOLUME, 0, None, 5).unwrap();
    assert_eq!(from_five.extents[0], ChangedExtent { extent: extent(5, 2), zeroes: true });
}

#[test]
fn zeros_of_any_length_are_tombstones_even_over_holes() {
    let mut store = store();
    run(&mut store, Operation::Expand { size: VolumeSize::new(1 << 50).unwrap() }).unwrap();
    run(&mut store, write(None, 7, 1, 5)).unwrap();
    run(&mut store, zeroes(0, 1 << 38)).unwrap();
    run(&mut store, write(None, 9, 1, 5)).unwrap();
    assert_eq!(changed(&mut store, 0, None), [(0, 9, true), (9, 1, false), (10, (1 << 38) - 10, true)]);
    assert_eq!(read_of(&mut store, VOLUME, None, 8, 3), [0, 5, 0]);
}

#[test]
fn a_snapshot_stays_what_it_was_and_raises_the_epoch() {
    let mut store = store();
    run(&mut store, write(Some(1), 0, 2, 5)).unwrap();
    assert_eq!(snapshot(&mut store, 1), 2);
    run(&mut store, write(Some(2), 1, 2, 6)).unwrap();
    assert_eq!(read_of(&mut store, VOLUME, Some(1), 0, 3), [5, 5, 0]);
    assert_eq!(read_of(&mut store, VOLUME, None, 0, 3), [5, 6, 6]);
    assert_eq!(changed(&mut store, 0, Some(1)), [(0, 2, false)]);
    assert_eq!(changed(&mut store, 1, None), [(1, 2, false)]);
    let size = spec(VOLUME, BLOCKS).size;
    assert_eq!(store.snapshots(VOLUME).unwrap(), [SnapshotInfo { id: id(1), epoch: Epoch::FIRST, size }]);
    assert!(matches!(store.snapshots(OTHER), Err(StoreError::UnknownVolume(_))));
    for seed in 0..16 {
        store.crash(PowerLoss::Yes, seed);
        assert_eq!(read_of(&mut store, VOLUME, Some(1), 0, 3), [5, 5, 0]);
    }
    assert_eq!(store.replicas()[0].position, Seq::new(1), "what came before the snapshot is durable, what came after is not");
}

#[test]
fn making_the_newest_snapshot_again_changes_nothing_and_an_older_one_is_a_mistake() {
    let mut store = store();
    assert_eq!(snapshot(&mut store, 1), 2);
    run(&mut store, write(None, 0, 1, 5)).unwrap();
    assert_eq!(epoch(&mut store, raise(3)), 3);
    assert_eq!(snapshot(&mut store, 1), 2);
    assert_eq!(read_of(&mut store, VOLUME, Some(1), 0, 1), [0]);
    assert_eq!(snapshot(&mut store, 2), 4);
    assert!(matches!(run(&mut store, Operation::Snapshot { snapshot: id(1) }), Err(StoreError::Misuse { .. })));
    assert_eq!(store.snapshots(VOLUME).unwrap().iter().map(|info| info.epoch.get()).collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn a_snapshot_ends_where_it_ended() {
    let mut store = store();
    snapshot(&mut store, 1);
    assert!(matches!(run(&mut store, Operation::Expand { size: spec(VOLUME, 8).size }), Err(StoreError::Misuse { .. })));
    assert!(matches!(run(&mut store, Operation::Expand { size: spec(VOLUME, 32).size }), Ok(Outcome::Done)));
    assert_eq!(store.replicas()[0].spec, spec(VOLUME, 32));
    assert_eq!(read_of(&mut store, VOLUME, None, 16, 16), [0; 16]);
    let past = Operation::Read { extent: extent(15, 2), snapshot: Some(id(1)) };
    assert!(matches!(run(&mut store, past), Err(StoreError::Misuse { .. })));
    let unknown = Operation::Read { extent: extent(0, 1), snapshot: Some(id(2)) };
    assert!(matches!(run(&mut store, unknown), Err(StoreError::UnknownSnapshot { .. })));
    assert!(matches!(changed_on(&mut store, VOLUME, 0, Some(2), 0), Err(StoreError::UnknownSnapshot { .. })));
    run(&mut store, write(None, 20, 1, 5)).unwrap();
    assert_eq!(revert(&mut store, 1), 3);
    assert_eq!(store.replicas()[0].spec, spec(VOLUME, 32), "a revert leaves the size");
    assert_eq!(read_of(&mut store, VOLUME, None, 20, 1), [0]);
}

#[test]
fn a_revert_goes_to_the_newest_snapshot_only() {
    let mut store = store();
    run(&mut store, write(None, 0, 1, 5)).unwrap();
    snapshot(&mut store, 1);
    run(&mut store, write(None, 0, 2, 6)).unwrap();
    snapshot(&mut store, 2);
    run(&mut store, write(None, 0, 3, 7)).unwrap();
    assert!(matches!(run(&mut store, Operation::Revert { snapshot: id(1) }), Err(StoreError::Misuse { .. })));
    assert!(matches!(run(&mut store, Operation::Revert { snapshot: id(3) }), Err(StoreError::UnknownSnapshot { .. })));
    assert_eq!(revert(&mut store, 2), 4);
    assert_eq!(read_of(&mut store, VOLUME, None, 0, 3), [6, 6, 0]);
    delete(&mut store, 2).unwrap();
    delete(&mut store, 2).unwrap();
    assert_eq!(revert(&mut store, 1), 5);
    assert_eq!(read_of(&mut store, VOLUME, None, 0, 3), [5, 0, 0]);
    run(&mut store, write(None, 1, 1, 8)).unwrap();
    assert_eq!(changed(&mut store, 1, None), [(1, 1, false)]);
}

#[test]
fn what_a_revert_took_back_is_forgotten_and_said_to_be() {
    let mut store = store();
    snapshot(&mut store, 1);
    epoch(&mut store, raise(3));
    run(&mut store, write(None, 0, 1, 5)).unwrap();
    assert_eq!(epoch(&mut store, raise(4)), 4);
    assert_eq!(revert(&mut store, 1), 5);
    assert_eq!(snapshot(&mut store, 2), 6);
    assert_eq!(revert(&mut store, 2), 7);
    let oldest = |store: &mut MemoryStore, from, snapshot| match changed_on(store, VOLUME, from, snapshot, 0) {
        Ok(_) => None,
        Err(StoreError::EpochForgotten { oldest, .. }) => Some(oldest.get()),
        Err(other) => panic!("{other:?}"),
    };
    let live: Vec<_> = (0..9).map(|from| oldest(&mut store, from, None)).collect();
    assert_eq!(live, [None, None, Some(5), Some(5), Some(5), None, Some(7), None, None]);
    assert!((0..9).all(|from| oldest(&mut store, from, Some(1)).is_none()), "the first was there before");
    assert_eq!((0..9).filter(|from| oldest(&mut store, *from, Some(2)).is_some()).collect::<Vec<_>>(), [2, 3, 4]);
}

#[test]
fn a_clone_begins_as_the_snapshot_and_keeps_it_there() {
    let mut store = store();
    run(&mut store, write(None, 0, 2, 5)).unwrap();
    run(&mut store, zeroes(4, 1)).unwrap();
    epoch(&mut store, raise(2));
    snapshot(&mut store, 1);
    run(&mut store, write(None, 0, 1, 6)).unwrap();
    assert!(matches!(store.clone_snapshot(OTHER, id(1), spec(CLONE, BLOCKS)), Err(StoreError::UnknownVolume(_))));
    assert!(matches!(store.clone_snapshot(VOLUME, id(2), spec(CLONE, BLOCKS)), Err(StoreError::UnknownSnapshot { .. })));
    assert!(matches!(store.clone_snapshot(VOLUME, id(1), spec(CLONE, BLOCKS - 1)), Err(StoreError::Misuse { .. })));
    for _ in 0..2 {
        store.clone_snapshot(VOLUME, id(1), spec(CLONE, 32)).unwrap();
    }
    assert!(matches!(store.clone_snapshot(VOLUME, id(1), spec(CLONE, 31)), Err(StoreError::Conflict { .. })));
    assert!(matches!(store.clone_snapshot(VOLUME, id(1), spec(VOLUME, BLOCKS)), Err(StoreError::Conflict { .. })));
    assert_eq!(read_of(&mut store, CLONE, None, 0, 20), [&[5, 5][..], &[0; 18]].concat());
    let blank = store.replicas()[1];
    assert_eq!((blank.position, blank.state.content), (Seq::ZERO, Content::Complete));
    assert_eq!(changed_on(&mut store, CLONE, 1, None, 0).unwrap().extents, []);
    assert_eq!(changed_on(&mut store, CLONE, 0, None, 0).unwrap().extents.len(), 2);
    assert!(matches!(run_on(&mut store, CLONE, raise(4)), Ok(Outcome::Epoch(epoch)) if epoch == Epoch::new(4)));
    assert!(matches!(delete(&mut store, 1), Err(StoreError::SnapshotInUse { .. })));
    assert!(matches!(store.delete(VOLUME), Err(StoreError::SnapshotInUse { .. })));
    store.delete(CLONE).unwrap();
    delete(&mut store, 1).unwrap();
    store.delete(VOLUME).unwrap();
}

#[test]
fn a_clone_of_a_corrupt_block_has_it_corrupt() {
    let mut store = store();
    run(&mut store, write(None, 0, 1, 5)).unwrap();
    store.corrupt_block(VOLUME, BlockIndex::new(0));
    snapshot(&mut store, 1);
    store.clone_snapshot(VOLUME, id(1), spec(CLONE, BLOCKS)).unwrap();
    let found = run_on(&mut store, CLONE, Operation::Read { extent: extent(0, 1), snapshot: None });
    assert!(matches!(found, Err(StoreError::Corrupt { volume, .. }) if volume == CLONE));
}

#[test]
fn a_long_answer_goes_on_where_it_stopped() {
    let mut store = store();
    run(&mut store, Operation::Expand { size: spec(VOLUME, 1 << 20).size }).unwrap();
    let runs = CHANGED_MAX as u64 + 2;
    (0..runs).for_each(|index| drop(run(&mut store, zeroes(index * 2, 1)).unwrap()));
    let first = changed_on(&mut store, VOLUME, 0, None, 0).unwrap();
    assert_eq!((first.extents.len(), first.next), (CHANGED_MAX, Some(BlockIndex::new(2 * CHANGED_MAX as u64))));
    let rest = changed_on(&mut store, VOLUME, 0, None, first.next.unwrap().get()).unwrap();
    assert_eq!((rest.extents.len(), rest.next), (2, None));
    assert_eq!(changed_on(&mut store, VOLUME, 0, None, u64::MAX).unwrap().extents, []);
}

#[test]
fn a_scrub_reads_data_only_and_names_what_is_bad() {
    let mut store = store();
    run(&mut store, write(None, 2, 4, 5)).unwrap();
    run(&mut store, zeroes(3, 1)).unwrap();
    store.corrupt_block(VOLUME, BlockIndex::new(4));
    let mut scrub = |start, blocks| match run(&mut store, Operation::Scrub { start: BlockIndex::new(start), blocks }) {
        Ok(Outcome::Scrubbed(scrubbed)) => scrubbed,
        other => panic!("{other:?}"),
    };
    let bad = vec![BlockIndex::new(4)];
    assert_eq!(scrub(0, 2), Scrubbed { verified: 1, bad: bad.clone(), next: Some(BlockIndex::new(5)) });
    assert_eq!(scrub(5, 2), Scrubbed { verified: 1, bad: Vec::new(), next: None });
    assert_eq!(scrub(0, 512), Scrubbed { verified: 2, bad, next: None });
    for blocks in [0, 513] {
        assert!(matches!(run(&mut store, Operation::Scrub { start: BlockIndex::new(0), blocks }), Err(StoreError::Misuse { .. })));
    }
}

#[test]
fn usage_counts_shared_blocks_once_and_promises_the_rest() {
    let mut store = store();
    store.set_capacity(ByteLength::new(64 * 4096));
    let blocks = |store: &MemoryStore| {
        let usage = store.usage().unwrap();
        let parts = [usage.used, usage.snapshots, usage.free, usage.reserved].map(|part| part.get() / 4096);
        assert_eq!(parts[..3].iter().sum::<u64>(), 64);
        parts
    };
    assert_eq!(blocks(&store), [0, 0, 64, 16]);
    run(&mut store, write(None, 0, 4, 5)).unwrap();
    run(&mut store, zeroes(3, 2)).unwrap();
    assert_eq!(blocks(&store), [3, 0, 61, 13]);
    snapshot(&mut store, 1);
    run(&mut store, write(None, 0, 1, 6)).unwrap();
    assert_eq!(blocks(&store), [3, 1, 60, 13]);
    store.clone_snapshot(VOLUME, id(1), spec(CLONE, BLOCKS)).unwrap();
    assert_eq!(blocks(&store), [4, 0, 60, 26]);
    assert!(matches!(store.create(spec(OTHER, 35)), Err(StoreError::NoSpace { .. })));
    assert!(matches!(run(&mut store, Operation::Expand { size: spec(VOLUME, 51).size }), Err(StoreError::NoSpace { .. })));
    run(&mut store, Operation::Expand { size: spec(VOLUME, 50).size }).unwrap();
    assert_eq!(store.usage().unwrap().available(), ByteLength::ZERO);
}

#[test]
fn control_operations_put_on_stable_media_what_came_before() {
    let operations: [fn() -> Operation; 5] = [
        || raise(9),
        || Operation::Snapshot { snapshot: id(2) },
        || Operation::DeleteSnapshot { snapshot: id(1) },
        || Operation::Revert { snapshot: id(1) },
        || Operation::Expand { size: spec(VOLUME, 17).size },
    ];
    for operation in operations {
        let mut store = store();
        snapshot(&mut store, 1);
        run(&mut store, write(Some(1), 0, 1, 5)).unwrap();
        run(&mut store, operation()).unwrap();
        let (before, snapshots) = (store.replicas(), store.snapshots(VOLUME).unwrap());
        assert_eq!((before[0].durable, before[0].position), (Seq::new(1), Seq::new(1)));
        store.crash(PowerLoss::Yes, 1);
        assert_eq!((store.replicas(), store.snapshots(VOLUME).unwrap()), (before, snapshots));
        store.fail_next_sync(VOLUME);
        assert!(matches!(run(&mut store, raise(9)), Err(StoreError::Io { .. })));
        assert!(matches!(run(&mut store, raise(9)), Err(StoreError::Poisoned(_))));
    }
}

#[test]
fn control_operations_keep_their_place_among_reads_and_writes() {
    let mut store = store().with_manual_completion();
    let operations = [
        write(None, 0, 1, 5),
        Operation::Snapshot { snapshot: id(1) },
        write(None, 1, 1, 6),
        Operation::Read { extent: extent(1, 1), snapshot: None },
        Operation::Read { extent: extent(1, 1), snapshot: Some(id(1)) },
        Operation::Changed { from: Epoch::NEVER, snapshot: None, start: BlockIndex::new(0) },
        Operation::Revert { snapshot: id(1) },
        Operation::Sync,
        Operation::Scrub { start: BlockIndex::new(0), blocks: 1 },
        write(None, 2, 1, 7),
    ];
    for (token, operation) in (1..).zip(operations) {
        store.submit(VOLUME, Token(token), operation);
    }
    let mut steps = Vec::new();
    loop {
        let ready: Vec<u64> = store.ready().iter().map(|(_, token)| token.0).collect();
        if ready.is_empty() {
            break;
        }
        steps.push(ready);
        store.complete_one(0);
    }
    assert_eq!(
        steps,
        [vec![1, 8], vec![2, 8], vec![3, 5, 8], vec![4, 5, 6, 8], vec![5, 6, 8], vec![6, 8], vec![7, 8], vec![8, 9], vec![9], vec![10]]
    );
}
