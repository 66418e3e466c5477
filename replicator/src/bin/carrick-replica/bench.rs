//! How fast a store is, without network and device around it. `tests/bench store` runs these loads and fio's beside each other.

use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::{Access, RingDisk, StorePlace};
use carrick_backing_store::epoch_map::{EpochMap, OpenOptions};
use carrick_backing_store::{
    BLOCK_SIZE, BlockIndex, BufferPool, ByteLength, Checksums, Completion, Extent, Operation, Outcome, ReplicaSpec, ReplicaStore, Seq,
    SharedBuffer, SnapshotId, Token, VolumeId, VolumeSize, block_checksum,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::BenchArguments;

/// The volume that the loads work on. Its identity is fixed, so that a load finds what an earlier one has written.
const VOLUME: VolumeId = VolumeId::from_bytes(*b"carrick-bench-01");
/// Small operations in flight, as with fio's `iodepth=32`.
const DEPTH: usize = 32;
/// Large operations in flight, each of 1 MiB.
const DEPTH_LARGE: usize = 8;
const LARGE: u64 = (1 << 20) / BLOCK_SIZE as u64;
/// A flush after so many random writes.
const FLUSH_EACH: u64 = 32;
/// Blocks written before each snapshot.
const BETWEEN_SNAPSHOTS: u64 = 64;
/// Writes made ahead by the thread that computes their checksums: that is a target's work, not a store's.
const AHEAD: usize = 128;
/// Of the places and the data, so that each run is the same.
const SEED: u64 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Load {
    /// Makes the volume, and writes all of it, 1 MiB at a time.
    Fill,
    /// 4 KiB at random, 32 at once.
    RandomRead,
    /// 4 KiB at random, 32 at once, with a flush after each 32.
    RandomWrite,
    /// 1 MiB after the other, 8 at once.
    Read,
    /// 1 MiB after the other over what is there, 8 at once.
    Write,
    /// Makes snapshots, with 64 random writes before each.
    Snapshots,
    /// Deletes the volume.
    Remove,
}

/// A write with everything that a store must be given: its data is that of [`noise`] from this block of it on.
type Write = (Extent, Checksums, u64);

struct Bench {
    store: EpochMap<RingDisk>,
    blocks: u64,
    seq: Seq,
    token: u64,
    in_flight: usize,
    noise: SharedBuffer,
    done: Vec<Completion>,
}

pub fn bench(arguments: &BenchArguments) -> anyhow::Result<()> {
    let mut bench = Bench::open(&arguments.store, arguments)?;
    let limit = Duration::from_secs(arguments.seconds);
    let blocks = bench.blocks;
    let begin = Instant::now();
    let operations = match arguments.load {
        Load::Fill => bench.fill()?,
        Load::RandomRead => {
            let mut dice = Dice::new(SEED);
            bench.run(limit, DEPTH, |bench| bench.read(dice.below(blocks), 1))?
        }
        Load::Read => {
            let mut starts = (0..blocks / LARGE).map(|number| number * LARGE).cycle();
            bench.run(limit, DEPTH_LARGE, |bench| bench.read(starts.next().unwrap_or(0), LARGE))?
        }
        Load::RandomWrite => {
            let writes = random_writes(blocks);
            bench.run(limit, DEPTH, |bench| bench.write_and_flush(writes.recv()?))?
        }
        Load::Write => {
            let writes = writes((0..blocks / LARGE).map(|number| (number * LARGE, LARGE)).cycle());
            bench.run(limit, DEPTH_LARGE, |bench| bench.write(writes.recv()?))?
        }
        Load::Snapshots => bench.make_snapshots(arguments.snapshots)?,
        Load::Remove => bench.store.delete(VOLUME).map(|()| 1)?,
    };
    let seconds = begin.elapsed().as_secs_f64();
    let counters = bench.store.counters();
    bench.store.close()?;
    let load = clap::ValueEnum::to_possible_value(&arguments.load);
    super::print_json(&serde_json::json!({
        "load": load.map(|load| load.get_name().to_owned()),
        "operations": operations,
        "seconds": seconds,
        "per_second": operations as f64 / seconds,
        "syncs": counters.syncs,
        "journal_blocks": counters.journal_written,
        "copied_blocks": counters.copied,
        "page_blocks": counters.pages_written,
        "data_blocks": counters.data_written,
        "pages_read": counters.pages_read,
        "data_read": counters.data_read,
    }))
}

impl Bench {
    fn open(path: &Path, arguments: &BenchArguments) -> anyhow::Result<Self> {
        let mut store = EpochMap::open(StorePlace::new(path).open(Access::Exclusive)?, path, &OpenOptions::default())?;
        if arguments.load == Load::Fill {
            store.create(ReplicaSpec { volume: VOLUME, size: VolumeSize::new(arguments.size.get())? })?;
        }
        let found = store.replicas().into_iter().find(|found| found.spec.volume == VOLUME);
        let found = found.context("there is no bench volume in this store; run the load fill first")?;
        Ok(Self { store, blocks: found.spec.size.blocks(), seq: found.position, token: 0, in_flight: 0, noise: noise(), done: Vec::new() })
    }

    fn submit(&mut self, operation: Operation) {
        self.token += 1;
        self.in_flight += 1;
        self.store.submit(VOLUME, Token(self.token), operation);
    }

    fn read(&mut self, first: u64, count: u64) -> anyhow::Result<()> {
        self.submit(Operation::Read { extent: extent(first, count)?, snapshot: None });
        Ok(())
    }

    fn write(&mut self, (extent, checksums, place): Write) -> anyhow::Result<()> {
        self.seq = self.seq.next();
        let data = self.noise.slice(part(place, extent.block_count()));
        self.submit(Operation::Write { seq: Some(self.seq), extent, checksums, data });
        Ok(())
    }

    fn write_and_flush(&mut self, write: Write) -> anyhow::Result<()> {
        self.write(write)?;
        if self.seq.get().is_multiple_of(FLUSH_EACH) {
            self.submit(Operation::Sync);
        }
        Ok(())
    }

    /// Keeps `depth` operations in flight for so long. How many ended.
    fn run(&mut self, limit: Duration, depth: usize, mut one: impl FnMut(&mut Self) -> anyhow::Result<()>) -> anyhow::Result<u64> {
        let begin = Instant::now();
        let mut ended = 0;
        while begin.elapsed() < limit {
            while self.in_flight < depth {
                one(self)?;
            }
            ended += self.wait()?;
        }
        Ok(ended + self.drain()?)
    }

    /// Waits until something has ended. How many operations did, flushes left out.
    fn wait(&mut self) -> anyhow::Result<u64> {
        self.store.reap(&mut self.done);
        while self.done.is_empty() {
            if let Some(wake) = self.store.wake_fd() {
                let second = Timespec { tv_sec: 1, tv_nsec: 0 };
                poll(&mut [PollFd::from_borrowed_fd(wake, PollFlags::IN)], Some(&second)).context("can't wait for the store")?;
            }
            self.store.reap(&mut self.done);
        }
        let mut ended = 0;
        for completion in self.done.drain(..) {
            self.in_flight -= 1;
            ended += u64::from(!matches!(completion.result?, Outcome::Synced { .. }));
        }
        Ok(ended)
    }

    fn drain(&mut self) -> anyhow::Result<u64> {
        let mut ended = 0;
        while self.in_flight > 0 {
            ended += self.wait()?;
        }
        Ok(ended)
    }

    fn fill(&mut self) -> anyhow::Result<u64> {
        let blocks = self.blocks;
        let mut ended = 0;
        let starts = (0..blocks.div_ceil(LARGE)).map(|number| number * LARGE);
        for write in writes(starts.map(move |first| (first, LARGE.min(blocks - first)))) {
            while self.in_flight >= DEPTH_LARGE {
                ended += self.wait()?;
            }
            self.write(write)?;
        }
        self.submit(Operation::Sync);
        Ok(ended + self.drain()?)
    }

    fn make_snapshots(&mut self, count: u16) -> anyhow::Result<u64> {
        let writes = random_writes(self.blocks);
        for number in 0..count {
            for _ in 0..BETWEEN_SNAPSHOTS {
                while self.in_flight >= DEPTH {
                    self.wait()?;
                }
                self.write(writes.recv()?)?;
            }
            let mut id = *b"bench-snapshot..";
            id[14..].copy_from_slice(&number.to_be_bytes());
            self.submit(Operation::Snapshot { snapshot: SnapshotId::from_bytes(id) });
        }
        self.drain()?;
        Ok(u64::from(count))
    }
}

fn random_writes(blocks: u64) -> Receiver<Write> {
    let mut dice = Dice::new(SEED);
    writes(std::iter::repeat_with(move || (dice.below(blocks), 1)))
}

/// Makes writes of (first block, count) on a thread of its own, until nobody takes them.
fn writes(places: impl Iterator<Item = (u64, u64)> + Send + 'static) -> Receiver<Write> {
    let (sender, receiver) = sync_channel(AHEAD);
    std::thread::spawn(move || {
        let noise = noise();
        for (number, (first, count)) in (0..LARGE).cycle().zip(places) {
            // Different data each time, without the time to make it.
            let checksums = (first..).zip(noise[part(number, count)].chunks_exact(BLOCK_SIZE as usize));
            let checksums = checksums.map(|(index, data)| block_checksum(VOLUME, BlockIndex::new(index), data)).collect();
            let Ok(extent) = extent(first, count) else { return };
            if sender.send((extent, checksums, number)).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Where so many blocks of the noise are.
fn part(first: u64, count: u64) -> std::ops::Range<usize> {
    let block = |number: u64| usize::try_from(number * u64::from(BLOCK_SIZE)).unwrap_or(0);
    block(first)..block(first + count)
}

/// 2 MiB that nothing compresses.
fn noise() -> SharedBuffer {
    let mut noise = BufferPool::new(0).take(2 << 20);
    let mut dice = Dice::new(SEED);
    noise.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&dice.number().to_le_bytes()));
    noise.share()
}

fn extent(first: u64, count: u64) -> anyhow::Result<Extent> {
    Extent::new(BlockIndex::new(first).offset(), ByteLength::new(count * u64::from(BLOCK_SIZE))).context("an extent beyond all volumes")
}
