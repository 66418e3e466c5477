//! A store that was made by an older program must open for ever. Each folder beside this file has one in `store`, with a journal that
//! was never replayed, and in `content.txt` what is in it. They never change.
//!
//! When the format does, `cargo test --release -p carrick-backing-store --test format generate -- --ignored` makes the store of a
//! new [`TODAY`].

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

#[path = "../faults/rig.rs"]
#[allow(dead_code, reason = "shared with the tests of faults")]
mod rig;

use std::fmt::Write;
use std::path::PathBuf;

use carrick_backing_store::disk::{DiskBlock, SimulatedDisk};
use carrick_backing_store::epoch_map::OpenOptions;
use carrick_backing_store::{
    BlockIndex, Content, Epoch, Extent, LoggedExtents, Operation, Outcome, ReadData, ReplicaState, ReplicaStore, Seq, SnapshotId,
    StoreError, Synced, Term, VolumeId,
};

use rig::{BLOCK, Picture, Rig, checked, extent, fill, size, snapshot, volume, write};

/// 8 MiB, the smallest store.
const BLOCKS: u64 = 2048;

fn options() -> OpenOptions {
    OpenOptions { overcommit: true, ..OpenOptions::default() }
}

/// What this program writes.
const TODAY: &str = "v2-synced";

fn file(version: &str, name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "format", version, name].iter().collect()
}

// The file: each block that is not all zeros, as its number (8 bytes) and its bytes; those as runs: a count (2 bytes, little-endian,
// with the highest bit for a repeated byte) and the bytes, or the byte.

const REPEATED: u16 = 1 << 15;
const WORTH_IT: usize = 6;

fn pack(disk: &SimulatedDisk) -> Vec<u8> {
    let mut packed = Vec::new();
    for at in 0..BLOCKS {
        let block = disk.content(DiskBlock::new(at));
        if *block == [0; BLOCK] {
            continue;
        }
        packed.extend(at.to_le_bytes());
        let mut literal: Vec<u8> = Vec::new();
        let flush = |literal: &mut Vec<u8>, packed: &mut Vec<u8>| {
            if !literal.is_empty() {
                packed.extend(u16::try_from(literal.len()).unwrap().to_le_bytes());
                packed.append(literal);
            }
        };
        for run in block.chunk_by(|a, b| a == b) {
            if run.len() < WORTH_IT {
                literal.extend(run);
            } else {
                flush(&mut literal, &mut packed);
                packed.extend((REPEATED | u16::try_from(run.len()).unwrap()).to_le_bytes());
                packed.push(run[0]);
            }
        }
        flush(&mut literal, &mut packed);
    }
    packed
}

fn unpack(mut packed: &[u8]) -> SimulatedDisk {
    let disk = SimulatedDisk::new(BLOCKS, 0);
    disk.set_garbage_when_unwritten(false);
    let mut take = |count: usize| {
        let (taken, rest) = packed.split_at_checked(count)?;
        packed = rest;
        Some(taken)
    };
    while let Some(at) = take(8) {
        let mut block = Vec::new();
        while block.len() < BLOCK {
            let count = u16::from_le_bytes(take(2).unwrap().try_into().unwrap());
            let length = usize::from(count & !REPEATED);
            if count & REPEATED == 0 {
                block.extend(take(length).unwrap());
            } else {
                block.resize(block.len() + length, take(1).unwrap()[0]);
            }
        }
        disk.overwrite(DiskBlock::new(u64::from_le_bytes(at.try_into().unwrap())), &block);
    }
    disk
}

/// A store with something of everything, as a kill leaves it.
fn build() -> SimulatedDisk {
    let disk = SimulatedDisk::new(BLOCKS, 0);
    disk.set_garbage_when_unwritten(false);
    rig::make(&disk);
    let mut rig = Rig::open(disk, Picture::default(), &options()).unwrap();
    let [a, b, c, d] = [1, 2, 3, 4].map(volume);
    let state = |promised, content| {
        let synced = Synced { epoch: Epoch::new(3), copied: BlockIndex::new(300), copied_epoch: Epoch::new(4) };
        ReplicaState { promised: Term::new(promised), log_term: Term::new(promised - 1), content, synced }
    };
    rig.create(a, 600).unwrap();
    rig.create(b, 40).unwrap();
    rig.create(c, 300_000).unwrap();
    rig.create(d, 20).unwrap();
    rig.ask(a, Operation::SetState { state: state(7, Content::Mixed), position: Some(Seq::new(100)) }).unwrap();
    let mut seq = 100;
    let mut logged = |rig: &mut Rig, number, first, count| {
        seq += 1;
        rig.ask(a, write(a, Some(seq), number, first, count)).unwrap();
    };
    logged(&mut rig, 1, 0, 20);
    logged(&mut rig, 2, 250, 20);
    rig.write(b, 3, 0, 30).unwrap();
    rig.write(c, 4, 70_000, 2).unwrap();
    rig.write(c, 4, 299_999, 1).unwrap();
    rig.write(d, 5, 0, 20).unwrap();
    rig.snapshot(a, snapshot(1)).unwrap();
    logged(&mut rig, 6, 255, 3);
    rig.snapshot(a, snapshot(2)).unwrap();
    rig.snapshot(b, snapshot(3)).unwrap();
    rig.write(b, 7, 10, 5).unwrap();
    rig.clone_of(a, snapshot(1), volume(5)).unwrap();
    rig.write(volume(5), 8, 19, 2).unwrap();
    rig.zero(c, 65_536, 65_536).unwrap();
    rig.settle();
    // From here on all is in the journal; one record of each kind at least.
    rig.ask(b, Operation::Revert { snapshot: snapshot(3) }).unwrap();
    logged(&mut rig, 9, 0, 1);
    logged(&mut rig, 10, 256, 8);
    logged(&mut rig, 11, 500, 30);
    rig.zero(a, 5, 3).unwrap();
    rig.ask(a, Operation::SetState { state: state(9, Content::Complete), position: None }).unwrap();
    rig.ask(c, Operation::SetState { state: state(4, Content::Rebuilding), position: Some(Seq::new(77)) }).unwrap();
    rig.ask(c, Operation::Expand { size: size(400_000) }).unwrap();
    rig.ask(c, write(c, None, 12, 399_990, 10)).unwrap();
    rig.ask(c, Operation::RaiseEpoch { to: Epoch::new(2), synced: Epoch::FIRST }).unwrap();
    rig.write(c, 13, 299_999, 1).unwrap();
    rig.snapshot(b, snapshot(4)).unwrap();
    rig.write(b, 14, 0, 12).unwrap();
    rig.delete_snapshot(a, snapshot(2)).unwrap();
    rig.delete(d).unwrap();
    rig.create(volume(6), 10).unwrap();
    rig.clone_of(b, snapshot(4), volume(7)).unwrap();
    rig.write(volume(7), 15, 39, 1).unwrap();
    rig.flush(a).unwrap();
    // Without this nothing says that the last is on stable media.
    rig.write(b, 16, 20, 1).unwrap();
    rig.flush(b).unwrap();
    rig.disk.kill(0);
    rig.disk
}

// What is in it.

fn blocks_of(rig: &mut Rig, id: VolumeId, kept: Option<SnapshotId>, blocks: u64) -> Vec<(u64, u64, u64)> {
    let mut runs: Vec<(u64, u64, u64)> = Vec::new();
    let mut expected = [0; BLOCK];
    for first in (0..blocks).step_by(512) {
        let count = 512.min(blocks - first);
        let answer = rig.ask(id, Operation::Read { extent: extent(first, count), snapshot: kept }).unwrap();
        let Outcome::Read(ReadData::Blocks { data, .. }) = answer else { continue };
        for (block, bytes) in (first..).zip(data.chunks_exact(BLOCK)) {
            let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            fill(number, block, &mut expected);
            assert!(bytes == expected, "block {block} of {id} is not what write {number} wrote");
            match runs.last_mut() {
                Some((last, from, length)) if *last == number && *from + *length == block => *length += 1,
                _ if number > 0 => runs.push((number, block, 1)),
                _ => {}
            }
        }
    }
    runs
}

fn range(extent: Extent) -> String {
    format!("{}+{}", extent.first_block(), extent.block_count())
}

fn changed(rig: &mut Rig, id: VolumeId, kept: Option<SnapshotId>, from: u32) -> String {
    let operation = Operation::Changed { from: Epoch::new(from), snapshot: kept, start: BlockIndex::new(0) };
    match rig.ask(id, operation) {
        Ok(Outcome::Changed(found)) => {
            assert_eq!(found.next, None);
            found.extents.iter().fold(String::new(), |text, found| text + " " + if found.zeroes { "0:" } else { "" } + &range(found.extent))
        }
        Err(StoreError::EpochForgotten { oldest, .. }) => format!(" forgotten, from {} on", oldest.get()),
        other => panic!("{other:?}"),
    }
}

/// All that can be seen of a store, in words.
fn describe(rig: &mut Rig) -> String {
    let mut text = format!("store {}\n", rig.store.id());
    for opened in rig.store.replicas() {
        let id = opened.spec.volume;
        let (size, state) = (opened.spec.size.blocks(), opened.state);
        let (promised, log_term) = (state.promised.get(), state.log_term.get());
        let (position, durable) = (opened.position, opened.durable);
        writeln!(text, "\nvolume {id}: {size} blocks, promised {promised}, log term {log_term}, {:?}", state.content).unwrap();
        writeln!(text, "  position {position}, durable {durable}").unwrap();
        if let Synced { epoch, copied, copied_epoch } = state.synced
            && state.synced != Synced::default()
        {
            writeln!(text, "  epoch {}, synced {epoch}, {copied} blocks of {copied_epoch}", opened.epoch).unwrap();
        }
        for after in [0, 99, 100, 101, 105, 106] {
            let logged = match rig.ask(id, Operation::LoggedAfter { after: Seq::new(after) }) {
                Ok(Outcome::Logged(LoggedExtents::Forgotten)) => " forgotten".to_owned(),
                Ok(Outcome::Logged(LoggedExtents::All(extents))) => extents.iter().map(|extent| format!(" {}", range(*extent))).collect(),
                other => panic!("{other:?}"),
            };
            writeln!(text, "  logged after {after}:{logged}").unwrap();
        }
        let kept = rig.store.snapshots(id).unwrap();
        let images = kept.iter().map(|kept| (Some(kept.id), kept.size.blocks(), kept.epoch.get()));
        for (kept, size, epoch) in images.chain([(None, size, u32::MAX)]) {
            let name = kept.map_or("as it is now".to_owned(), |kept| format!("snapshot {kept}, epoch {epoch}, {size} blocks"));
            writeln!(text, "  {name}").unwrap();
            for (number, first, count) in blocks_of(rig, id, kept, size) {
                writeln!(text, "    {first}+{count}: write {number}").unwrap();
            }
            for from in 0..6 {
                writeln!(text, "    changed since {from}:{}", changed(rig, id, kept, from)).unwrap();
            }
        }
    }
    text
}

#[test]
fn a_store_of_format_2_opens_for_ever() {
    opens("v2");
}

#[test]
fn a_store_that_says_what_is_synced_opens_for_ever() {
    opens("v2-synced");
}

fn opens(version: &str) {
    let packed = std::fs::read(file(version, "store")).unwrap();
    let disk = unpack(&packed);
    assert_eq!(pack(&disk), packed);
    let report = checked(&disk).unwrap();
    assert!(report.is_clean() && report.batches > 10, "{report:?}");
    let expected = std::fs::read_to_string(file(version, "content.txt")).unwrap();
    let mut rig = Rig::open(disk.clone(), Picture::default(), &options()).unwrap();
    let found = describe(&mut rig);
    assert!(found == expected, "found:\n{found}\nexpected:\n{expected}");
    // And goes on.
    rig.settle();
    assert_eq!(describe(&mut rig), expected);
    let Rig { store, .. } = rig;
    store.close().unwrap();
    let mut rig = Rig::open(disk, Picture::default(), &options()).unwrap();
    // The log knows only regions after a checkpoint.
    let without_log = |text: &str| text.lines().filter(|line| !line.contains("logged")).collect::<Vec<_>>().join("\n");
    assert_eq!(without_log(&describe(&mut rig)), without_log(&expected));
    for number in [7, 6, 5, 3, 2, 1] {
        rig.ask(volume(number), write(volume(number), None, 99, 3, 4)).unwrap();
        rig.store.delete(volume(number)).unwrap();
    }
    rig.settle();
    let usage = rig.store.usage().unwrap();
    assert_eq!([usage.used, usage.snapshots, usage.reclaimable].map(|part| part.get()), [0; 3], "{usage:?}");
}

#[test]
#[ignore = "writes the fixture anew"]
fn generate() {
    let disk = build();
    let packed = pack(&disk);
    assert!(packed.len() < 200 << 10, "{} bytes", packed.len());
    std::fs::create_dir(file(TODAY, "")).unwrap();
    std::fs::write(file(TODAY, "store"), &packed).unwrap();
    let mut rig = Rig::open(disk, Picture::default(), &options()).unwrap();
    std::fs::write(file(TODAY, "content.txt"), describe(&mut rig)).unwrap();
    println!("{} bytes", packed.len());
}

/// Today's program makes the same store as it always did: a change of what it writes is seen here first.
#[test]
fn todays_store_has_the_same_content() {
    let mut rig = Rig::open(build(), Picture::default(), &options()).unwrap();
    assert_eq!(describe(&mut rig), std::fs::read_to_string(file(TODAY, "content.txt")).unwrap());
}
