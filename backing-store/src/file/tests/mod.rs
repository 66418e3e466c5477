//! Tests of the file store. `nasty` is a folder in memory that forgets, tears and fails like a disk; the other modules are named
//! after what they show.

mod bytes;
mod crashes;
mod damage;
mod nasty;
mod oracle;
mod service;

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::buffer::BufferPool;
use crate::checksum::block_checksum;
use crate::store::{Content, LoggedExtents, Outcome, ReadData, ReplicaState};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteOffset, Extent, Seq, Term, VolumeSize};

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
const BOOT: BootId = BootId([1; 16]);
const OTHER_BOOT: BootId = BootId([2; 16]);
const BLOCK: usize = BLOCK_SIZE as usize;

fn options(boot: BootId) -> Options {
    Options { boot, log_records: 64, data_alignment: 4096 }
}

fn spec(blocks: u64) -> ReplicaSpec {
    ReplicaSpec { volume: VOLUME, size: VolumeSize::new(blocks * 4096).unwrap() }
}

fn extent(first: u64, count: u64) -> Extent {
    Extent::new(ByteOffset::new(first * 4096), ByteLength::new(count * 4096)).unwrap()
}

/// A block that no other (block, fill) shares a sector with.
fn pattern(block: u64, fill: u8) -> Vec<u8> {
    let sector = |sector: u8| {
        let mut bytes = [fill; 512];
        bytes[0] = sector;
        bytes[1..9].copy_from_slice(&block.to_le_bytes());
        bytes
    };
    (0..8).flat_map(sector).collect()
}

fn write(seq: Option<u64>, first: u64, count: u64, fill: u8) -> Operation {
    let mut buffer = BufferPool::new(0).take(usize::try_from(count).unwrap() * BLOCK);
    let mut checksums = Vec::new();
    for (block, place) in (first..).zip(buffer.chunks_exact_mut(BLOCK)) {
        place.copy_from_slice(&pattern(block, fill));
        checksums.push(block_checksum(VOLUME, BlockIndex::new(block), place));
    }
    Operation::Write { seq: seq.map(Seq::new), extent: extent(first, count), checksums, data: buffer.share() }
}

fn zeroes(seq: Option<u64>, first: u64, count: u64) -> Operation {
    Operation::WriteZeroes { seq: seq.map(Seq::new), extent: extent(first, count) }
}

fn set_state(promised: u64, content: Content, position: Option<u64>) -> Operation {
    let state = ReplicaState { promised: Term::new(promised), log_term: Term::new(promised), content };
    Operation::SetState { state, position: position.map(Seq::new) }
}

/// Waits, with a limit, until so many operations have completed.
fn wait(store: &mut dyn ReplicaStore, count: usize) -> BTreeMap<Token, Result<Outcome, StoreError>> {
    let mut done = BTreeMap::new();
    while done.len() < count {
        if let Some(fd) = store.wake_fd() {
            let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
            let ready = poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)], Some(&limit)).unwrap();
            assert_eq!(ready, 1, "{} of {count} operations have completed", done.len());
        }
        let mut completions = Vec::new();
        store.reap(&mut completions);
        for completion in completions {
            assert!(done.insert(completion.token, completion.result).is_none(), "completed twice");
        }
    }
    done
}

fn run(store: &mut dyn ReplicaStore, operation: Operation) -> Result<Outcome, StoreError> {
    store.submit(VOLUME, Token(1 << 60), operation);
    wait(store, 1).remove(&Token(1 << 60)).unwrap()
}

/// The bytes of blocks, with holes as zeros; checks that the checksums given with them are right.
fn read(store: &mut dyn ReplicaStore, first: u64, count: u64) -> Result<Vec<u8>, StoreError> {
    match run(store, Operation::Read { extent: extent(first, count), snapshot: None })? {
        Outcome::Read(ReadData::Zeroes) => Ok(vec![0; usize::try_from(count).unwrap() * BLOCK]),
        Outcome::Read(ReadData::Blocks { checksums, data }) => {
            assert_eq!(checksums.len() as u64, count);
            for ((block, bytes), checksum) in (first..).zip(data.chunks_exact(BLOCK)).zip(checksums) {
                assert_eq!(block_checksum(VOLUME, BlockIndex::new(block), bytes), checksum);
            }
            Ok(data.to_vec())
        }
        other => panic!("{other:?}"),
    }
}

fn logged(store: &mut dyn ReplicaStore, after: u64) -> LoggedExtents {
    match run(store, Operation::LoggedAfter { after: Seq::new(after) }) {
        Ok(Outcome::Logged(LoggedExtents::All(mut extents))) => {
            extents.sort();
            LoggedExtents::All(extents)
        }
        Ok(Outcome::Logged(extents)) => extents,
        other => panic!("{other:?}"),
    }
}
