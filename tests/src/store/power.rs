//! Losses of power on a real kernel: everything that a store writes to its disk is logged, and the disk is made anew as it was at
//! each flush, and as it may have been a little later. There the store must be clean, and hold all that was flushed.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use carrick_backing_store::dice::Dice;
use carrick_backing_store::disk::{Access, StorePlace};
use carrick_backing_store::epoch_map::{EpochMap, OpenOptions};
use carrick_backing_store::{ByteLength, ByteOffset, Completion, Extent, Operation, Outcome, ReadData, ReplicaStore, Token};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::devices::Loop;
use super::log_writes::{Log, LogWrites};
use super::numbered::Numbered;
use super::program::{check, replica};
use crate::report::{Found, Plan};
use crate::site::{Site, path_text};

/// The smallest store: its journal, of 2 MiB, is round and checkpointed every few hundred requests.
const STORE: u64 = 64 << 20;
const LOG: u64 = 1200 << 20;
const VOLUME_BLOCKS: u64 = 3 << 10;
const WRITERS: u64 = 4;
/// What an idle store does, to the last, is done after this.
const SETTLED: Duration = Duration::from_secs(12);
/// Marks between which the volume was there.
const BEGIN: &str = "begin";
const END: &str = "end";
/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;

pub fn losses(plan: &Plan) -> Found {
    let folder = tempfile::Builder::new().prefix("carrick-power-").tempdir()?;
    let (log_path, points) = (folder.path().join("log"), if plan.quick { 25 } else { usize::MAX });
    let writers = record(folder.path(), &log_path, plan)?;
    let log = Log::read(&log_path)?;
    let mut replay = Replay { folder: folder.path(), log: &log, writers: &writers, dice: Dice::new(plan.seed), sums: Sums::default() };
    replay.run(points)?;
    let Sums { points, all, losses, batches, ahead } = replay.sums;
    ensure!(points >= 20, "only {points} flushes were seen");
    Ok(format!(
        "{} requests; {points} of {all} flush points replayed, {points} of them clean; so were {losses} states in which a part of what \
         came after was lost, {ahead} of which kept more than was flushed; up to {batches} batches in the journal",
        writers.iter().map(Numbered::len).sum::<usize>()
    ))
}

/// Writes to a volume with one replica, and logs what its store does.
fn record(folder: &Path, log: &Path, plan: &Plan) -> anyhow::Result<Vec<Numbered>> {
    let data = Loop::new(&folder.join("data"), STORE)?;
    let log = Loop::new(log, LOG)?;
    let device = LogWrites::new(data.path(), log.path(), STORE)?;
    replica(&["format", path_text(device.path())?])?;
    // Dropped first.
    let site = Site::start()?;
    site.carrick(&["store", "add", path_text(device.path())?])?;
    let size = (VOLUME_BLOCKS * 4096).to_string();
    site.carrick(&["volume", "create", "vm1", "--size", &size, "--replicas", "1"])?;
    let volume = site.attach("vm1", &[])?;
    device.mark(BEGIN)?;
    let region = VOLUME_BLOCKS / WRITERS;
    let mut writers: Vec<Numbered> =
        (0..WRITERS).map(|index| Numbered::new(&volume, index * region, region, plan.seed + index)).collect::<anyhow::Result<_>>()?;
    let requests = if plan.quick { 200 } else { 600 };
    for _ in 0..2 {
        work(&mut writers, requests, &device).with_context(|| site.log_tail())?;
        sleep(SETTLED);
    }
    device.mark(END)?;
    Ok(writers)
}

fn work(writers: &mut [Numbered], requests: usize, device: &LogWrites) -> anyhow::Result<()> {
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, writer) in writers.iter_mut().enumerate() {
            threads.push(scope.spawn(move || writer.work(requests, |done| device.mark(&format!("{index}:{done}")))));
        }
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a writer panicked"))?)
    })
}

/// What was tried.
#[derive(Default)]
struct Sums {
    /// Flush points at which the store was looked at, and all there were.
    points: usize,
    all: usize,
    /// States in which a part of what came after was lost, and those of them with more than what was flushed.
    losses: usize,
    ahead: usize,
    /// The longest journal.
    batches: u64,
}

/// Goes through the log.
struct Replay<'a> {
    folder: &'a Path,
    log: &'a Log,
    writers: &'a [Numbered],
    dice: Dice,
    sums: Sums,
}

impl Replay<'_> {
    /// Looks at so many flush points, chosen at random, or at all.
    fn run(&mut self, points: usize) -> anyhow::Result<()> {
        let log = self.log;
        let place =
            |word: &str| (0..log.len()).find(|index| log.mark(*index) == Some(word)).with_context(|| format!("{word} is not in the log"));
        let (begin, end) = (place(BEGIN)?, place(END)?);
        let mut left = (begin..end).filter(|index| log.is_flush(*index)).count();
        self.sums.all = left;
        let store = self.folder.join("replayed");
        let disk = self.new_disk(&store)?;
        // What each writer knows to be flushed.
        let mut flushed = vec![0; self.writers.len()];
        for index in 0..end {
            log.apply(index, &disk)?;
            if let Some((writer, done)) = log.mark(index).and_then(|word| word.split_once(':')) {
                flushed[writer.parse::<usize>()?] = done.parse()?;
            }
            if index < begin || !log.is_flush(index) {
                continue;
            }
            let wanted = points.saturating_sub(self.sums.points);
            if self.dice.below(left as u64) < wanted as u64 {
                self.look(&store, index, &flushed).with_context(|| format!("after entry {index} of {end} in the log"))?;
            }
            left -= 1;
        }
        Ok(())
    }

    /// An empty disk in a folder, as a store has it.
    fn new_disk(&self, store: &Path) -> anyhow::Result<File> {
        fs::create_dir_all(store)?;
        let disk = File::options().read(true).write(true).create(true).truncate(true).open(store.join("blocks"))?;
        disk.set_len(STORE)?;
        Ok(disk)
    }

    /// The store as it is at a flush, and with some of what was written before the next one.
    fn look(&mut self, store: &Path, index: usize, flushed: &[usize]) -> anyhow::Result<()> {
        let copy = self.folder.join("copy");
        fs::create_dir_all(&copy)?;
        let take = || fs::copy(store.join("blocks"), copy.join("blocks"));
        take()?;
        self.survives(&copy, flushed).context("with what was flushed")?;
        self.sums.points += 1;
        take()?;
        let disk = File::options().write(true).open(copy.join("blocks"))?;
        for later in (index + 1..self.log.len()).take_while(|later| !self.log.is_flush(*later)) {
            if self.dice.below(2) == 0 {
                self.log.apply(later, &disk)?;
            }
        }
        let ahead = self.survives(&copy, flushed).context("with a part of what was not flushed")?;
        self.sums.losses += 1;
        self.sums.ahead += usize::from(ahead);
        Ok(())
    }

    /// Checks a store, opens it, and compares its volume; whether there is more than what was flushed.
    fn survives(&mut self, store: &Path, flushed: &[usize]) -> anyhow::Result<bool> {
        let report = check(store)?;
        self.sums.batches = self.sums.batches.max(report["batches"].as_u64().unwrap_or_default());
        let content = read_volume(store)?;
        let mut ahead = false;
        for (writer, at_least) in self.writers.iter().zip(flushed) {
            ahead |= writer.find(&content, *at_least)? > *at_least;
        }
        Ok(ahead)
    }
}

/// Opens a store as its process does, and reads its only volume.
fn read_volume(place: &Path) -> anyhow::Result<Vec<u8>> {
    let disk = StorePlace::new(place).open(Access::Exclusive)?;
    let mut store = EpochMap::open(disk, place, &OpenOptions::default())?;
    let spec = store.replicas().first().context("no replica")?.spec;
    let (size, mut content) = (spec.size.bytes().get(), Vec::new());
    for offset in (0..size).step_by(usize::try_from(CHUNK)?) {
        let length = CHUNK.min(size - offset);
        let extent = Extent::new(ByteOffset::new(offset), ByteLength::new(length)).context("an extent")?;
        store.submit(spec.volume, Token(0), Operation::Read { extent, snapshot: None });
        match ended(&mut store)?.result? {
            Outcome::Read(ReadData::Blocks { data, .. }) => content.extend_from_slice(&data),
            Outcome::Read(ReadData::Zeroes) => content.resize(content.len() + usize::try_from(length)?, 0),
            other => bail!("a read was answered with {other:?}"),
        }
    }
    store.close()?;
    Ok(content)
}

/// Waits for the only operation under way.
fn ended(store: &mut impl ReplicaStore) -> anyhow::Result<Completion> {
    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
    let mut completions = Vec::new();
    loop {
        store.reap(&mut completions);
        if let Some(completion) = completions.pop() {
            return Ok(completion);
        }
        let wake = store.wake_fd().context("nothing to wait for")?;
        ensure!(poll(&mut [PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN)], Some(&limit))? == 1, "a read doesn't end");
    }
}
