//! Power that fails again while a store is being opened after a power failure.

use std::collections::BTreeMap;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::{DiskBlock, SimulatedDisk};
use carrick_backing_store::epoch_map::OpenOptions;

use super::rig::{Map, Picture, Rig, path, volume};

const OPTIONS: OpenOptions = OpenOptions { cache: carrick_backing_store::ByteLength::new(0), overcommit: true };
const BLOCKS: u64 = 2048;
/// Where the superblocks are.
const COPIES: [u64; 2] = [0, 128];

/// Opens it, and loses power after so many pieces of work.
fn open_in_vain(disk: &SimulatedDisk, work: u64, seed: u64) {
    let handle = disk.reopen();
    disk.stop_after(work);
    drop(Map::open(handle, path(), &OPTIONS));
    disk.power_cut(seed);
}

#[test]
fn power_failures_in_openings_one_after_the_other_lose_nothing() {
    let id = volume(1);
    for seed in 0..2 {
        let mut rig = Rig::new(BLOCKS, seed, &OPTIONS);
        rig.create(id, 64).unwrap();
        for number in 1..=16 {
            rig.write(id, number, (number * 7) % 60, 4).unwrap();
        }
        rig.flush(id).unwrap();
        let Rig { disk, store, picture, .. } = rig;
        disk.power_cut(seed);
        drop(store);
        let submitted = |disk: &SimulatedDisk| {
            let counters = disk.counters();
            counters.reads + counters.writes + counters.syncs
        };
        let whole = {
            let disk = disk.fork();
            let before = submitted(&disk);
            drop(Map::open(disk.reopen(), path(), &OPTIONS).unwrap());
            submitted(&disk) - before
        };
        // It reads a lot before it writes a little.
        let last = whole.saturating_sub(6)..=whole;
        let copies = |disk: &SimulatedDisk| COPIES.map(|at| disk.content(DiskBlock::new(at)));
        let mut dice = Dice::new(seed);
        let mut outcomes = BTreeMap::new();
        for first in last.clone().flat_map(|first| std::iter::repeat_n(first, 16)) {
            let cut = disk.fork();
            open_in_vain(&cut, first, dice.number());
            let [left, right] = copies(&cut);
            if left == right {
                continue;
            }
            for second in last.clone().flat_map(|second| std::iter::repeat_n(second, 16)) {
                let disk = cut.fork();
                open_in_vain(&disk, second, dice.number());
                match Rig::open(disk, Picture { images: picture.images.clone(), ..Picture::default() }, &OPTIONS) {
                    Ok(mut rig) => rig.verify(),
                    Err(error) => *outcomes.entry(error.to_string()).or_insert(0) += 1,
                }
            }
        }
        assert!(outcomes.is_empty(), "seed {seed}: {outcomes:?}");
    }
}
