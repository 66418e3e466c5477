//! Structures that are wrong though their checksums are right, as a mistake in a program would leave them, and plain garbage.
//! Opening, checking, reading, and then changing such a store never panics, never hangs and never takes memory without bound.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::channel;
use std::sync::{Arc, Once};
use std::time::Duration;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::{DiskBlock, DiskImage, SimulatedDisk};
use carrick_backing_store::epoch_map::Geometry;
use carrick_backing_store::{BlockIndex, DIGEST_BLOCKS_MAX, Epoch, Operation, ReplicaSpec, ReplicaStore, Token};

use super::flips::{BLOCKS, options, store, structures};
use super::rig::{BLOCK, Map, Picture, Rig, checked, extent, size, snapshot, volume, write};

type Block = [u8; BLOCK];

/// A store, and where everything is in it.
struct Original {
    image: DiskImage,
    catalogs: Vec<DiskBlock>,
    leaves: Vec<DiskBlock>,
    inner: Vec<DiskBlock>,
    batches: Vec<DiskBlock>,
    directory: DiskBlock,
    bits: DiskBlock,
}

impl Original {
    fn new() -> Self {
        let (disk, picture) = store();
        let mut found = structures(&disk, &picture);
        let mut take = |kind| found.remove(kind).unwrap();
        let [one, other] = take("bits")[..] else { panic!("one page of bits, and one of the directory") };
        let points = |from: DiskBlock, to: DiskBlock| disk.content(from)[..5] == place_bytes(to);
        let (directory, bits) = if points(one, other) { (one, other) } else { (other, one) };
        assert!(points(directory, bits));
        let (catalogs, leaves, inner, batches) = (take("catalog"), take("leaf"), take("inner"), take("batch"));
        Self { image: disk.image(), catalogs, leaves, inner, batches, directory, bits }
    }
}

/// Changes a medium and seals it again.
struct Forger<'a> {
    disk: &'a SimulatedDisk,
    original: &'a Original,
}

fn number(block: &Block, at: usize) -> u32 {
    u32::from_le_bytes(block[at..at + 4].try_into().unwrap())
}

fn place_bytes(at: DiskBlock) -> [u8; 5] {
    at.get().to_le_bytes()[..5].try_into().unwrap()
}

/// The checksum of a structure that holds it itself.
fn own_checksum(bytes: &[u8], at: usize) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&bytes[..at]), &[0; 4]), &bytes[at + 4..])
}

impl Forger<'_> {
    fn content(&self, at: DiskBlock) -> Block {
        *self.disk.content(at)
    }

    fn superblock(&self, change: impl Fn(&mut Block)) {
        for copy in [0, 128] {
            let at = DiskBlock::new(copy);
            let mut block = self.content(at);
            change(&mut block);
            let checksum = crc32c::crc32c(&block[..BLOCK - 4]);
            block[BLOCK - 4..].copy_from_slice(&checksum.to_le_bytes());
            self.disk.overwrite(at, &block);
        }
    }

    fn catalog_length(&self) -> usize {
        number(&self.content(DiskBlock::new(0)), 96) as usize
    }

    /// A catalog of one block, and its new checksum in the superblock.
    fn catalog(&self, change: impl Fn(&mut Block)) {
        let length = self.catalog_length();
        let mut block = self.content(self.original.catalogs[0]);
        change(&mut block);
        let checksum = crc32c::crc32c(&block[..length.min(BLOCK)]);
        for at in &self.original.catalogs {
            self.disk.overwrite(*at, &block);
        }
        self.superblock(|block| block[100..104].copy_from_slice(&checksum.to_le_bytes()));
    }

    /// Changes a map page, and whatever points to it.
    fn page(&self, at: DiskBlock, change: impl Fn(&mut Block)) {
        let mut block = self.content(at);
        let before = number(&block, 40);
        change(&mut block);
        let after = own_checksum(&block, 40);
        block[40..44].copy_from_slice(&after.to_le_bytes());
        self.disk.overwrite(at, &block);
        self.pointers(at, 9, before, after);
    }

    /// Replaces the checksum that follows a place by so many bytes wherever that is pointed to.
    fn pointers(&self, at: DiskBlock, distance: usize, before: u32, after: u32) {
        let place = place_bytes(at);
        let find = |block: &Block| -> Vec<usize> {
            let is_here = |from: &usize| block[*from..from + 5] == place && number(block, from + distance) == before;
            (0..BLOCK - 13).filter(is_here).map(|from| from + distance).collect()
        };
        for inner in self.original.inner.iter().filter(|inner| **inner != at) {
            let found = find(&self.content(*inner));
            if !found.is_empty() {
                self.page(*inner, |block| found.iter().for_each(|from| block[*from..from + 4].copy_from_slice(&after.to_le_bytes())));
            }
        }
        let found = find(&self.content(self.original.catalogs[0]));
        if !found.is_empty() {
            self.catalog(|block| found.iter().for_each(|from| block[*from..from + 4].copy_from_slice(&after.to_le_bytes())));
        }
    }

    fn directory(&self, change: impl Fn(&mut Block)) {
        let at = self.original.directory;
        let checksum = |block: &Block| crc32c::crc32c_append(crc32c::crc32c(&(1_u64 << 63).to_le_bytes()), block);
        let mut block = self.content(at);
        let before = checksum(&block);
        change(&mut block);
        self.disk.overwrite(at, &block);
        self.pointers(at, 5, before, checksum(&block));
    }

    fn bits(&self, change: impl Fn(&mut Block)) {
        let at = self.original.bits;
        let mut block = self.content(at);
        change(&mut block);
        self.disk.overwrite(at, &block);
        let after = crc32c::crc32c_append(crc32c::crc32c(&0_u64.to_le_bytes()), &block);
        self.directory(|directory| directory[5..9].copy_from_slice(&after.to_le_bytes()));
    }

    /// Changes a batch's header, of one block, and the chain after it.
    fn batch(&self, index: usize, change: impl Fn(&mut Block)) {
        let mut chain = None;
        for (position, at) in self.original.batches.iter().enumerate().skip(index) {
            let mut block = self.content(*at);
            if position == index {
                change(&mut block);
            }
            if let Some(chain) = chain {
                let chain: u32 = chain;
                block[44..48].copy_from_slice(&chain.to_le_bytes());
            }
            let checksum = own_checksum(&block, 72);
            block[72..76].copy_from_slice(&checksum.to_le_bytes());
            self.disk.overwrite(*at, &block);
            chain = Some(checksum);
        }
    }
}

/// Changes some numbers somewhere before `end`, to others of the kind that mistakes make.
fn mutation(dice: &mut Dice, start: usize, end: usize) -> impl Fn(&mut Block) + use<> {
    let changes: Vec<(usize, usize, u64)> = (0..1 + dice.below(3))
        .map(|_| {
            let at = start + dice.index(end - start);
            let length = [1, 1, 2, 4, 5, 8][dice.index(6)];
            let value = match dice.below(6) {
                0 => 0,
                1 => u64::MAX,
                2 => 1 << dice.below(64),
                3 => dice.below(256),
                4 => dice.below(BLOCKS * 2),
                _ => dice.number(),
            };
            (at, length, value)
        })
        .collect();
    move |block: &mut Block| {
        for (at, length, value) in &changes {
            let length = (*length).min(end - at);
            block[*at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
        }
    }
}

fn forge(forger: &Forger<'_>, dice: &mut Dice) {
    let leaves = &forger.original.leaves;
    let mut pick = |places: &[DiskBlock]| dice.index(places.len());
    let (leaf, inner, batch) = (pick(leaves), pick(&forger.original.inner), pick(&forger.original.batches));
    match dice.below(7) {
        // Not the magic number: without it there is nothing to decode.
        0 => forger.superblock(mutation(dice, 8, 136)),
        1 => forger.catalog(mutation(dice, 0, forger.catalog_length())),
        2 => forger.page(leaves[leaf], mutation(dice, 32, 64 + 40 * 14)),
        3 => forger.page(forger.original.inner[inner], mutation(dice, 32, 64 + 13 * 4)),
        4 => {
            let block = forger.content(forger.original.batches[batch]);
            let end = 80 + number(&block, 68) as usize;
            forger.batch(batch, mutation(dice, 6, end.clamp(81, BLOCK)));
        }
        5 => forger.bits(mutation(dice, 0, 128)),
        _ => forger.directory(mutation(dice, 0, 18)),
    }
}

// Using what is wrong.

fn reap(store: &mut Map, disk: &SimulatedDisk, rounds: u32) -> usize {
    let mut ended = Vec::new();
    for _ in 0..rounds {
        store.reap(&mut ended);
        disk.advance(Duration::from_millis(400));
    }
    ended.len()
}

/// Everything that changes nothing. Gives the store if it could be opened.
fn look(disk: &SimulatedDisk) -> Option<Map> {
    let _ = checked(disk);
    let mut store = Rig::open(disk.clone(), Picture::default(), &options()).ok()?.store;
    let _ = store.usage();
    let mut submitted = 0;
    for opened in store.replicas() {
        let id = opened.spec.volume;
        let snapshots = store.snapshots(id).unwrap();
        for kept in std::iter::once(None).chain(snapshots.iter().map(|kept| Some(kept.id))) {
            let blocks = opened.spec.size.blocks().min(1024);
            for first in (0..blocks).step_by(64) {
                let extent = extent(first, 64.min(blocks - first));
                store.submit(id, Token(1), Operation::Read { extent, snapshot: kept });
                submitted += 1;
            }
            store.submit(id, Token(2), Operation::Changed { from: Epoch::NEVER, snapshot: kept, start: BlockIndex::new(0) });
            submitted += 1;
        }
        store.submit(id, Token(3), Operation::Scrub { start: BlockIndex::new(0), blocks: 512 });
        store.submit(id, Token(4), Operation::Digest { extent: extent(0, opened.spec.size.blocks().min(DIGEST_BLOCKS_MAX)) });
        submitted += 2;
    }
    let ended = reap(&mut store, disk, 20);
    assert_eq!(ended, submitted, "not every read has ended");
    Some(store)
}

fn change(mut store: Map, disk: &SimulatedDisk, dice: &mut Dice) {
    let mut submitted = 0;
    let mut submit = |store: &mut Map, id, token, operation| {
        store.submit(id, Token(token), operation);
        submitted += 1;
    };
    for opened in store.replicas() {
        let (id, blocks) = (opened.spec.volume, opened.spec.size.blocks().min(1024));
        for step in 0..8 {
            let count = (1 + dice.below(16)).min(blocks);
            let first = dice.below(blocks - count + 1);
            submit(&mut store, id, 4, write(id, None, 1 + step, first, count));
        }
        submit(&mut store, id, 5, Operation::WriteZeroes { seq: None, extent: extent(0, blocks.min(300)) });
        submit(&mut store, id, 6, Operation::Snapshot { snapshot: snapshot(99) });
        submit(&mut store, id, 4, write(id, None, 9, 0, 1));
        submit(&mut store, id, 7, Operation::Sync);
        for kept in store.snapshots(id).unwrap() {
            submit(&mut store, id, 8, Operation::DeleteSnapshot { snapshot: kept.id });
        }
        submit(&mut store, id, 8, Operation::Revert { snapshot: snapshot(99) });
    }
    assert_eq!(reap(&mut store, disk, 100), submitted, "not every operation has ended");
    let _ = store.create(ReplicaSpec { volume: volume(77), size: size(100) });
    for opened in store.replicas() {
        let _ = store.delete(opened.spec.volume);
    }
    reap(&mut store, disk, 100);
    let _ = store.close();
    let _ = checked(disk);
}

// Running it.

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

static HOOK: Once = Once::new();

/// Panics of threads that ask for it are remembered, not printed.
fn collect_panics() {
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                return before(info);
            }
            let place = info.location().map_or(String::new(), ToString::to_string);
            let text = info.payload().downcast_ref::<String>().cloned();
            let text = text.or_else(|| info.payload().downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
            // Where, and what: but not with which numbers.
            let text: String = text.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).collect();
            LAST.set(format!("{place}: {text}"));
        }));
    });
}

/// How many seeds, and from which on, unless the environment says otherwise.
fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let first = number("CARRICK_GARBAGE_FIRST").unwrap_or(0);
    first..first + number("CARRICK_GARBAGE_SEEDS").unwrap_or(default)
}

/// How to see a failure again.
const REPLAY: &str = "replay one with CARRICK_GARBAGE_FIRST=SEED CARRICK_GARBAGE_SEEDS=1 and the name of the test";

/// Runs a case for each seed, in threads of their own, so that one that hangs is found, too.
fn run(seeds: std::ops::Range<u64>, case: fn(u64, &Original)) {
    collect_panics();
    let original = Arc::new(Original::new());
    let workers = 2;
    let (done, results) = channel();
    for worker in 0..workers {
        let (done, seeds, original) = (done.clone(), seeds.clone(), Arc::clone(&original));
        std::thread::spawn(move || {
            QUIET.set(true);
            for seed in seeds.skip(worker).step_by(workers) {
                let result = catch_unwind(AssertUnwindSafe(|| case(seed, &original)));
                let failure = result.is_err().then(|| LAST.take());
                done.send((seed, failure)).unwrap();
            }
        });
    }
    let mut left: BTreeSet<u64> = seeds.collect();
    let mut failures: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    while !left.is_empty() {
        let Ok((seed, failure)) = results.recv_timeout(Duration::from_secs(30)) else {
            panic!("one of these seeds hangs: {:?}; {REPLAY}; so far: {failures:#?}", left.iter().take(2).collect::<Vec<_>>());
        };
        left.remove(&seed);
        if let Some(failure) = failure {
            failures.entry(failure).or_default().push(seed);
        }
    }
    failures.values_mut().for_each(|seeds| seeds.truncate(5));
    assert!(failures.is_empty(), "{} kinds of panics, and seeds; {REPLAY}: {failures:#?}", failures.len());
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    let kilobytes: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kilobytes < 1 << 20, "memory: {peak}");
}

fn forged(seed: u64, original: &Original) -> (SimulatedDisk, Dice) {
    let disk = SimulatedDisk::of(&original.image);
    let mut dice = Dice::new(seed);
    forge(&Forger { disk: &disk, original }, &mut dice);
    (disk, dice)
}

#[test]
fn a_store_with_wrong_structures_can_be_looked_at() {
    run(seeds(4000), |seed, original| {
        look(&forged(seed, original).0);
    });
}

#[test]
fn a_store_with_wrong_structures_can_be_changed() {
    run(seeds(3000), |seed, original| {
        let (disk, mut dice) = forged(seed, original);
        if let Some(store) = look(&disk) {
            change(store, &disk, &mut dice);
        }
    });
}

/// What is forged is sealed: unchanged, it is the same store.
#[test]
fn the_forger_forges() {
    let original = Original::new();
    let disk = SimulatedDisk::of(&original.image);
    let forger = Forger { disk: &disk, original: &original };
    let same = |_: &mut Block| {};
    forger.superblock(same);
    forger.catalog(same);
    original.leaves.iter().chain(&original.inner).for_each(|at| forger.page(*at, same));
    (0..original.batches.len()).for_each(|batch| forger.batch(batch, same));
    forger.bits(same);
    assert!(checked(&disk).unwrap().is_clean());
    // A changed seal is carried on to where it is known from.
    let unused = |block: &mut Block| block[50] ^= 1;
    original.leaves.iter().chain(&original.inner).for_each(|at| forger.page(*at, unused));
    (0..original.batches.len()).for_each(|batch| forger.batch(batch, |block| block[76] ^= 1));
    forger.superblock(|block| block[12] ^= 1);
    let report = checked(&disk).unwrap();
    assert!(report.is_clean() && report.batches > 5, "{report:?}");
}

/// A place that is no place for data is found out when its page is read, not when it is written to.
#[test]
fn a_place_outside_the_data_area_is_never_written_to() {
    let original = Original::new();
    let geometry = Geometry::new(BLOCKS).unwrap();
    for target in [0, 1, 128, 300, geometry.journal_start().get() + 400, BLOCKS - 1, BLOCKS, 1 << 39] {
        for position in [0, 5] {
            let disk = SimulatedDisk::of(&original.image);
            let forger = Forger { disk: &disk, original: &original };
            // Every leaf of volume 2, of which nothing is shared.
            for at in original.leaves.iter().filter(|at| disk.content(**at)[8..24] == volume(2).to_bytes()) {
                forger.page(*at, |block| block[64 + position * 14..][..5].copy_from_slice(&place_bytes(DiskBlock::new(target))));
            }
            let before: Vec<_> = (0..geometry.journal_start().get()).map(|at| disk.content(DiskBlock::new(at))).collect();
            let Ok(mut rig) = Rig::open(disk.clone(), Picture::default(), &options()) else { continue };
            let _ = rig.ask(volume(2), write(volume(2), None, 3, position as u64, 1));
            let _ = rig.ask(volume(2), Operation::Sync);
            reap(&mut rig.store, &disk, 15);
            // Before any checkpoint: only the superblocks' incarnation has changed.
            for (at, before) in (0..).zip(before).filter(|(at, _)| at % 128 != 0) {
                assert!(disk.content(DiskBlock::new(at)) == before, "block {at} was written to, for place {target}");
            }
            for copy in [0, 128] {
                assert_eq!(disk.content(DiskBlock::new(copy))[..8], *b"CARRICK\x01", "superblock {copy} for place {target}");
            }
            let counters = disk.counters();
            assert_eq!(counters.misuses, 0, "place {target} is past the end of the disk");
        }
    }
}

/// Blocks of nonsense anywhere.
#[test]
fn garbage_is_refused_or_reported() {
    run(seeds(500), |seed, original| {
        let disk = SimulatedDisk::of(&original.image);
        let mut dice = Dice::new(seed);
        for _ in 0..1 + dice.below(4) {
            let bound = if dice.below(2) == 0 { BLOCKS } else { 1500 };
            let at = dice.below(bound);
            let mut block =
                SimulatedDisk::of(&original.image).content(DiskBlock::new(if dice.below(2) == 0 { at } else { dice.below(BLOCKS) }));
            if dice.below(2) == 0 {
                let from = dice.index(BLOCK);
                block[from..].iter_mut().for_each(|byte| *byte = u8::try_from(dice.below(256)).unwrap());
            }
            disk.overwrite(DiskBlock::new(at), &block[..]);
        }
        if let Some(store) = look(&disk) {
            change(store, &disk, &mut dice);
        }
    });
}
