//! The oracle itself: what a crash keeps and what it takes.

mod snapshots;

use super::*;
use crate::checksum::block_checksum;
use crate::store::{Content, LoggedExtents, Outcome, ReadData, ReplicaState, Synced};
use crate::units::{ByteOffset, Extent, Seq, Term, VolumeSize};

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
const BLOCKS: u64 = 16;

fn extent(first: u64, count: u64) -> Extent {
    Extent::new(ByteOffset::new(first * 4096), ByteLength::new(count * 4096)).unwrap()
}

fn store() -> MemoryStore {
    let mut store = MemoryStore::with_id(StoreId::from_bytes([1; 16]));
    store.create(ReplicaSpec { volume: VOLUME, size: VolumeSize::new(BLOCKS * 4096).unwrap() }).unwrap();
    store
}

fn write(seq: Option<u64>, first: u64, count: u64, fill: u8) -> Operation {
    let mut buffer = BufferPool::new(0).take(usize::try_from(count * 4096).unwrap());
    buffer.fill(fill);
    let checksums = (first..first + count).map(|block| block_checksum(VOLUME, BlockIndex::new(block), &[fill; 4096])).collect();
    Operation::Write { seq: seq.map(Seq::new), extent: extent(first, count), checksums, data: buffer.share() }
}

fn run(store: &mut MemoryStore, operation: Operation) -> Result<Outcome, StoreError> {
    store.submit(VOLUME, Token(1), operation);
    while store.complete_one(0) {}
    let mut completions = Vec::new();
    store.reap(&mut completions);
    assert_eq!(completions.len(), 1);
    completions.remove(0).result
}

/// The first byte of a block (all bytes are the same), 0 for a hole.
fn read(store: &mut MemoryStore, block: u64) -> u8 {
    match run(store, Operation::Read { extent: extent(block, 1), snapshot: None }).unwrap() {
        Outcome::Read(ReadData::Zeroes) => 0,
        Outcome::Read(ReadData::Blocks { data, .. }) => data[0],
        other => panic!("{other:?}"),
    }
}

fn logged(store: &mut MemoryStore, after: u64) -> LoggedExtents {
    match run(store, Operation::LoggedAfter { after: Seq::new(after) }).unwrap() {
        Outcome::Logged(extents) => extents,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_written_is_read_and_holes_are_zeros() {
    let mut store = store();
    run(&mut store, write(Some(1), 2, 2, 5)).unwrap();
    run(&mut store, Operation::WriteZeroes { seq: Some(Seq::new(2)), extent: extent(3, 4) }).unwrap();
    assert_eq!([1, 2, 3].map(|block| read(&mut store, block)), [0, 5, 0]);
    assert_eq!(store.replicas()[0].position, Seq::new(2));
    assert_eq!(logged(&mut store, 1), LoggedExtents::All(vec![extent(3, 4)]));
}

#[test]
fn a_gap_in_the_sequence_is_refused_and_changes_nothing() {
    let mut store = store();
    assert!(matches!(run(&mut store, write(Some(2), 0, 1, 5)), Err(StoreError::Misuse { .. })));
    assert!(matches!(run(&mut store, write(None, 15, 2, 5)), Err(StoreError::Misuse { .. })));
    assert_eq!(read(&mut store, 0), 0);
    assert_eq!(logged(&mut store, 0), LoggedExtents::All(vec![]));
}

#[test]
fn a_kill_keeps_all_that_was_completed() {
    let mut store = store();
    run(&mut store, write(Some(1), 0, 4, 5)).unwrap();
    store.crash(PowerLoss::No, 1);
    let opened = store.replicas()[0];
    assert_eq!((opened.position, opened.durable, opened.state.content), (Seq::new(1), Seq::ZERO, Content::Complete));
    assert_eq!(read(&mut store, 3), 5);
    assert_eq!(logged(&mut store, 0), LoggedExtents::All(vec![extent(0, 4)]));
}

#[test]
fn a_loss_of_power_keeps_what_was_synced_and_either_side_of_the_rest() {
    let mut seen = [false; 3];
    for seed in 0..64 {
        let mut store = store();
        run(&mut store, write(Some(1), 0, 4, 5)).unwrap();
        assert!(matches!(run(&mut store, Operation::Sync).unwrap(), Outcome::Synced { durable } if durable == Seq::new(1)));
        run(&mut store, write(Some(2), 0, 1, 6)).unwrap();
        run(&mut store, write(Some(3), 0, 1, 7)).unwrap();
        store.crash(PowerLoss::Yes, seed);
        let opened = store.replicas()[0];
        assert_eq!((opened.position, opened.durable, opened.state.content), (Seq::new(1), Seq::new(1), Content::Mixed));
        assert_eq!(read(&mut store, 1), 5);
        seen[usize::from(read(&mut store, 0) - 5)] = true;
        assert_eq!(logged(&mut store, 1), LoggedExtents::Forgotten);
    }
    assert_eq!(seen, [true; 3]);
}

#[test]
fn a_state_survives_a_loss_of_power_and_an_idle_replica_stays_complete() {
    let mut store = store();
    run(&mut store, write(Some(1), 0, 1, 5)).unwrap();
    let state = ReplicaState { promised: Term::new(9), log_term: Term::new(8), content: Content::Complete, synced: Synced::default() };
    run(&mut store, Operation::SetState { state, position: Some(Seq::new(40)) }).unwrap();
    store.crash(PowerLoss::Yes, 3);
    let opened = store.replicas()[0];
    assert_eq!((opened.state, opened.position, opened.durable), (state, Seq::new(40), Seq::new(40)));
    assert_eq!(read(&mut store, 0), 5);
    assert_eq!(logged(&mut store, 39), LoggedExtents::Forgotten);
    assert_eq!(logged(&mut store, 40), LoggedExtents::All(vec![]));
}

#[test]
fn a_write_in_flight_at_a_crash_may_be_there_in_part_and_is_logged() {
    let (mut whole, mut part, mut none) = (0, 0, 0);
    for seed in 0..200 {
        let mut store = store().with_manual_completion();
        store.submit(VOLUME, Token(1), write(Some(1), 0, 4, 5));
        store.crash(PowerLoss::No, seed);
        let new = (0..4).filter(|block| read(&mut store, *block) == 5).count();
        if store.replicas()[0].position == Seq::new(1) {
            assert_eq!(new, 4);
            whole += 1;
        } else {
            *if new == 0 { &mut none } else { &mut part } += 1;
        }
        assert_eq!(logged(&mut store, 0), LoggedExtents::All(vec![extent(0, 4)]), "applied or not, it was in flight");
    }
    assert!(whole > 20 && part > 20 && none > 0, "{whole} {part} {none}");
}

#[test]
fn manual_completion_allows_exactly_the_orders_of_the_contract() {
    let mut store = store().with_manual_completion();
    store.submit(VOLUME, Token(1), write(Some(1), 0, 1, 5));
    store.submit(VOLUME, Token(2), write(Some(2), 4, 1, 5));
    store.submit(VOLUME, Token(3), Operation::Read { extent: extent(0, 1), snapshot: None });
    store.submit(VOLUME, Token(4), Operation::Read { extent: extent(8, 1), snapshot: None });
    store.submit(VOLUME, Token(5), Operation::Sync);
    store.submit(VOLUME, Token(6), write(None, 8, 1, 5));
    store.submit(VOLUME, Token(7), Operation::LoggedAfter { after: Seq::ZERO });
    assert_eq!(store.ready(), [1, 4, 5].map(|token| (VOLUME, Token(token))));
    assert!(store.complete_one(1));
    assert_eq!(store.ready(), [1, 5, 6].map(|token| (VOLUME, Token(token))));
    assert!(store.complete_one(0));
    assert_eq!(store.ready(), [2, 3, 5, 6].map(|token| (VOLUME, Token(token))));
    assert!(!store.complete_one(4));
    store.complete_all();
    let mut completions = Vec::new();
    store.reap(&mut completions);
    assert_eq!(completions.len(), 7);
}

#[test]
fn a_failed_sync_poisons_until_the_store_is_opened_again() {
    let mut store = store();
    run(&mut store, write(Some(1), 0, 1, 5)).unwrap();
    store.fail_next_sync(VOLUME);
    assert!(matches!(run(&mut store, Operation::Sync), Err(StoreError::Io { .. })));
    assert!(matches!(run(&mut store, Operation::Read { extent: extent(0, 1), snapshot: None }), Err(StoreError::Poisoned(_))));
    store.crash(PowerLoss::No, 1);
    assert_eq!((store.replicas()[0].position, store.replicas()[0].state.content), (Seq::ZERO, Content::Mixed));
    assert!(matches!(run(&mut store, Operation::Sync), Ok(Outcome::Synced { .. })));
}

#[test]
fn a_failed_write_stops_the_position_and_later_writes() {
    let mut store = store();
    store.fail_next_write(VOLUME);
    assert!(matches!(run(&mut store, write(Some(1), 0, 2, 5)), Err(StoreError::Io { .. })));
    assert!(matches!(run(&mut store, write(Some(1), 0, 2, 5)), Err(StoreError::Poisoned(_))));
    assert_eq!(store.replicas()[0].position, Seq::ZERO);
    assert_eq!(logged(&mut store, 0), LoggedExtents::All(vec![extent(0, 2)]));
}

#[test]
fn corruption_is_found_and_a_full_store_refuses() {
    let mut store = store();
    run(&mut store, write(None, 3, 1, 5)).unwrap();
    assert!(store.corrupt_block(VOLUME, BlockIndex::new(3)) && !store.corrupt_block(VOLUME, BlockIndex::new(4)));
    let found = run(&mut store, Operation::Read { extent: extent(2, 3), snapshot: None });
    assert!(matches!(found, Err(StoreError::Corrupt { block, .. }) if block == BlockIndex::new(3)));
    store.set_capacity(ByteLength::new(BLOCKS * 4096 + 4096));
    let size = |blocks: u64| VolumeSize::new(blocks * 4096).unwrap();
    let other = ReplicaSpec { volume: VolumeId::from_bytes([8; 16]), size: size(2) };
    assert!(matches!(store.create(other), Err(StoreError::NoSpace { .. })));
    assert!(matches!(store.create(ReplicaSpec { volume: VOLUME, size: size(1) }), Err(StoreError::Conflict { .. })));
    store.delete(VOLUME).unwrap();
    store.create(other).unwrap();
}

#[test]
fn a_short_log_forgets() {
    let mut store = MemoryStore::new().with_log_capacity(2);
    store.create(ReplicaSpec { volume: VOLUME, size: VolumeSize::new(BLOCKS * 4096).unwrap() }).unwrap();
    for seq in 1..=3 {
        run(&mut store, write(Some(seq), seq, 1, 5)).unwrap();
    }
    assert_eq!(logged(&mut store, 0), LoggedExtents::Forgotten);
    assert_eq!(logged(&mut store, 1), LoggedExtents::All(vec![extent(2, 1), extent(3, 1)]));
}
