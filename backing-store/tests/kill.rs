//! Goal: a real `kill -9` takes back no acknowledged write. Method: this program starts itself as a child that writes without end
//! and tells each acknowledgement through a pipe; it is killed after a while, and the store is compared with what was told: every
//! block must be what the writes up to the position that is found make it, no later and no earlier one, and a check with all data
//! must find nothing. Then the next child goes on where this one was stopped.

#![expect(clippy::unwrap_used, reason = "helpers of a test, which the lint does not know as such")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use carrick_backing_store::disk::{Access, PlaceOptions, RingDisk, StorePlace};
use carrick_backing_store::epoch_map::{self, CheckOptions, EpochMap, FormatOptions, OpenOptions};
use carrick_backing_store::{
    BlockIndex, BufferPool, ByteLength, ByteOffset, Checksums, Completion, Content, Extent, LoggedExtents, Operation, Outcome, ReadData,
    ReplicaSpec, ReplicaStore, Seq, StoreError, Token, VolumeId, VolumeSize, block_checksum,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const FOLDER: &str = "CARRICK_KILL_TEST_STORE";
const VOLUME: VolumeId = VolumeId::from_bytes([3; 16]);
const BLOCKS: u64 = 256;
const DEPTH: u64 = 16;
/// Every so many writes one is of a MiB, which goes to fresh places instead of into the journal.
const LARGE_EVERY: u64 = 50;
const STORE: ByteLength = ByteLength::new(64 << 20);

type Store = EpochMap<RingDisk>;

/// Which blocks a write touches: a function of its sequence, so that parent and children agree.
fn blocks_of(seq: u64) -> (u64, u64) {
    if seq.is_multiple_of(LARGE_EVERY) {
        return (0, BLOCKS);
    }
    let mixed = seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    (mixed % BLOCKS, (1 + mixed / BLOCKS % 8).min(BLOCKS - mixed % BLOCKS))
}

fn extent(first: u64, count: u64) -> Extent {
    Extent::new(ByteOffset::new(first * 4096), ByteLength::new(count * 4096)).unwrap()
}

fn content(block: u64, seq: u64) -> Vec<u8> {
    [block.to_le_bytes(), seq.to_le_bytes()].concat().repeat(256)
}

fn write(seq: u64) -> Operation {
    let (first, count) = blocks_of(seq);
    let extent = extent(first, count);
    if seq.is_multiple_of(7) {
        return Operation::WriteZeroes { seq: Some(Seq::new(seq)), extent };
    }
    let mut buffer = BufferPool::new(0).take(usize::try_from(count * 4096).unwrap());
    let mut checksums = Checksums::new();
    for (block, place) in (first..).zip(buffer.chunks_exact_mut(4096)) {
        place.copy_from_slice(&content(block, seq));
        checksums.push(block_checksum(VOLUME, BlockIndex::new(block), place));
    }
    Operation::Write { seq: Some(Seq::new(seq)), extent, checksums, data: buffer.share() }
}

/// Opens the disk, as soon as the ring of a killed predecessor has let go of it: that takes until its last I/O has ended.
fn disk(path: &Path) -> RingDisk {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match StorePlace::new(path).open(Access::Exclusive) {
            Err(StoreError::InUse(_)) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            opened => return opened.unwrap(),
        }
    }
}

fn open(path: &Path) -> Store {
    EpochMap::open(disk(path), path, &OpenOptions::default()).unwrap()
}

fn reap(store: &mut Store) -> Vec<Completion> {
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    let mut completions = Vec::new();
    loop {
        store.reap(&mut completions);
        if !completions.is_empty() {
            return completions;
        }
        let fd = store.wake_fd().unwrap();
        assert_eq!(poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)], Some(&limit)).unwrap(), 1);
    }
}

fn run(store: &mut Store, operation: Operation) -> Outcome {
    store.submit(VOLUME, Token(0), operation);
    loop {
        if let Some(completion) = reap(store).pop() {
            return completion.result.unwrap();
        }
    }
}

/// Not a test of its own: what the child does.
#[test]
fn child() {
    let Ok(path) = std::env::var(FOLDER) else { return };
    let mut store = open(Path::new(&path));
    let mut acknowledged = store.replicas()[0].position.get();
    let mut submitted = acknowledged;
    let mut told = std::io::stdout();
    loop {
        while submitted < acknowledged + DEPTH {
            submitted += 1;
            store.submit(VOLUME, Token(submitted), write(submitted));
            if submitted.is_multiple_of(100) {
                store.submit(VOLUME, Token(0), Operation::Sync);
            }
        }
        for Completion { token, result, .. } in reap(&mut store) {
            match result.unwrap() {
                Outcome::Written => acknowledged = token.0,
                Outcome::Synced { durable } => told.write_all(format!("durable {durable}.\n").as_bytes()).unwrap(),
                other => panic!("{other:?}"),
            }
        }
        told.write_all(format!("acknowledged {acknowledged}.\n").as_bytes()).unwrap();
    }
}

/// Lets a child write for a while and kills it; gives the last write and the last durable position that it told of.
fn one_life(path: &Path, time: Duration) -> (u64, u64) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture", "--test-threads=1"])
        .env(FOLDER, path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut acknowledged, mut durable) = (0, 0);
    let (mut end, mut killed) = (None, false);
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
        // The harness prints words of its own before the first of them, and a kill may cut the last one short.
        let number = |word| line.split_once(word).and_then(|(_, number)| number.strip_suffix('.')).and_then(|number| number.parse().ok());
        acknowledged = number("acknowledged ").unwrap_or(acknowledged);
        durable = number("durable ").unwrap_or(durable);
        if acknowledged > 0 && !killed && Instant::now() >= *end.get_or_insert_with(|| Instant::now() + time) {
            child.kill().unwrap();
            killed = true;
        }
    }
    child.wait().unwrap();
    assert!(killed, "the child ended by itself");
    (acknowledged, durable)
}

fn verify(path: &Path, acknowledged: u64, durable: u64) -> u64 {
    let report = epoch_map::check(disk(path), path, &CheckOptions { data: true }).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let mut store = open(path);
    let opened = store.replicas()[0];
    let position = opened.position.get();
    assert!((acknowledged..=acknowledged + 2 * DEPTH).contains(&position), "position {position}, acknowledged {acknowledged}");
    assert!(opened.durable.get() >= durable);
    assert_eq!(opened.state.content, Content::Complete);
    let mut last = BTreeMap::new();
    for seq in 1..=position {
        let (first, count) = blocks_of(seq);
        last.extend((first..first + count).map(|block| (block, seq)));
    }
    let logged = run(&mut store, Operation::LoggedAfter { after: opened.position });
    let nothing = matches!(&logged, Outcome::Logged(LoggedExtents::All(extents)) if extents.is_empty());
    assert!(nothing, "after its position nothing was written: {logged:?}");
    for block in 0..BLOCKS {
        let data = match run(&mut store, Operation::Read { extent: extent(block, 1), snapshot: None }) {
            Outcome::Read(ReadData::Zeroes) => vec![0; 4096],
            Outcome::Read(ReadData::Blocks { data, .. }) => data.to_vec(),
            other => panic!("{other:?}"),
        };
        let value = |seq: u64| if seq.is_multiple_of(7) { vec![0; 4096] } else { content(block, seq) };
        let seq = last.get(&block).copied().unwrap_or(0);
        assert!(data == value(seq), "block {block} is not what write {seq} made it; the position is {position}");
    }
    position
}

#[test]
fn a_killed_process_takes_no_acknowledged_write_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let place = StorePlace::new(&path);
    let mut made = place.create(&PlaceOptions { size: Some(STORE), ..PlaceOptions::default() }).unwrap();
    epoch_map::format(&mut made, &path, &FormatOptions::default()).unwrap();
    place.publish().unwrap();
    drop(made);
    let mut store = open(&path);
    store.create(ReplicaSpec { volume: VOLUME, size: VolumeSize::new(BLOCKS * 4096).unwrap() }).unwrap();
    store.close().unwrap();
    let mut position = 0;
    for life in 0..8_u64 {
        // From the first instants of a start to well into the writing.
        let (acknowledged, durable) = one_life(&path, Duration::from_micros(life * life * 4321));
        assert!(acknowledged >= position);
        position = verify(&path, acknowledged, durable);
        assert!(position >= acknowledged);
    }
    assert!(position > 100, "only {position} writes were tried");
}
