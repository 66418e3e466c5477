//! [`EpochMap`]: the store of replicas. See `docs/store-format.md` for what lies on the disk, and why it survives.
//!
//! In short: a copy-on-write radix tree per volume maps each 4 KiB block to its place, checksum and epoch. Changes are
//! remembered in one journal for all volumes of the store. Small overwrites go into the journal with their data and are copied
//! to their places later; everything else goes to fresh places, with data and record written in parallel. A checkpoint writes
//! the changed pages to new places and names them in a superblock; after a crash the journal is replayed from there.
//!
//! Everything here is a state machine over a [`Disk`]: operations and ended I/O come in, I/O and completions go out.
//!
//! Invariants:
//! * Batches of the journal count in order. A write is acknowledged when its batch, every earlier one, and all data that they
//!   speak of have been written. So what a crash leaves is a prefix of what was submitted, over all volumes.
//! * A place is overwritten only by a copy of what the journal has on stable media, and only if no snapshot needs it.
//! * A place that was given up is used again only after a checkpoint without it is on stable media.
//! * After a failed sync, or a failed write of journal, page or superblock, nothing is written any more.

mod allocator;
mod background;
mod cache;
mod catalog;
mod check;
mod checkpoint;
mod codec;
mod commit;
mod control;
mod copying;
mod dirty_log;
mod dump;
mod idle;
mod journal;
mod numbers;
mod open;
mod operations;
mod page;
mod preparing;
mod reading;
mod record;
mod replay;
mod replica;
mod space;
mod superblock;
mod tree;
mod write;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::buffer::{Buffer, BufferPool, SharedBuffer};
use crate::disk::{Disk, DiskBlock, DiskDone, DiskRequest, DiskWork, IoId};
use crate::store::{Completion, OpenedReplica, Operation, Outcome, ReplicaSpec, ReplicaStore, SnapshotInfo, StoreError, StoreUsage, Token};
use crate::units::{BLOCK_SIZE, SnapshotId, StoreId, VolumeId};

use allocator::Allocator;
use background::Background;
use cache::PageCache;
use catalog::DeadTree;
use checkpoint::Checkpoint;
use commit::Journal;
use copying::Copying;
use journal::BatchNumber;
use numbers::{NumberMap, NumberSet};
use preparing::{Below, FreeRun, Preparing};
use reading::{ReadKey, Reading};
use record::Slot;
use replica::Replica;
use space::Space;
use superblock::Superblock;
use tree::Missing;

pub use check::{CheckOptions, CheckReport, Fault, check};
pub use dump::dump;
pub use open::{Contents, FormatOptions, OpenOptions, format, look};
pub use superblock::Geometry;
pub(crate) use superblock::MAGIC;

/// Free buffer memory that is kept while there is load, in bytes.
const POOL_KEEP: usize = 16 << 20;

/// Why an I/O was started.
#[derive(Debug)]
enum Purpose {
    /// A map page.
    Page(Missing, catalog::Owners),
    /// Data for a read.
    Data(ReadKey, DiskBlock),
    /// The data of a write to fresh places.
    Fresh(BatchNumber, Slot, OpId),
    /// A batch of the journal.
    Batch(BatchNumber),
    /// Copies of overwrites to their places.
    Copy(Vec<(DiskBlock, BatchNumber)>),
    /// Everything so far on stable media.
    Sync,
    /// A part of the running checkpoint.
    Checkpoint,
    /// Space below.
    Prepare(Preparing),
    /// These blocks can be handed out when the disk has forgotten them.
    Discard(FreeRun),
}

/// Who waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiter {
    /// The first change in a replica's queue.
    Replica(Slot),
    Read(ReadKey),
    Background,
}

/// Number of an operation, in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct OpId(u64);

/// The replicas of one disk.
pub struct EpochMap<D: Disk> {
    disk: D,
    path: PathBuf,
    pool: BufferPool,
    superblock: Superblock,
    replicas: BTreeMap<Slot, Replica>,
    by_volume: HashMap<VolumeId, Slot>,
    next_slot: u32,
    next_op: u64,
    next_io: u64,
    in_flight: NumberMap<IoId, Purpose>,
    cache: PageCache,
    waiters: NumberMap<DiskBlock, Vec<Waiter>>,
    allocator: Allocator,
    space: Space,
    below: Below,
    journal: Journal,
    copying: Copying,
    reading: Reading,
    checkpoint: Option<Checkpoint>,
    checkpoint_wanted: bool,
    background: Background,
    dead: Vec<DeadTree>,
    bad: BTreeSet<DiskBlock>,
    limits: catalog::Limits,
    /// Blocks that could not be read: when they are given up they are not used again.
    suspect: NumberSet<DiskBlock>,
    /// A stretch of the journal that a replay has read.
    ahead: Option<(DiskBlock, SharedBuffer)>,
    /// Pages changed since the last checkpoint's freeze.
    dirty: usize,
    /// Replicas whose queues may go on.
    ready: VecDeque<Slot>,
    completions: Vec<Completion>,
    /// What is in memory was found to contradict itself.
    contradicted: bool,
    /// Why nothing is written any more.
    poisoned: Option<String>,
    /// When something was last submitted.
    active_at: Duration,
    /// When the next step of idleness is due.
    idle_at: Duration,
    counters: Counters,
}

/// What the store did, for those who count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Flushes asked for.
    pub flushes: u64,
    /// Syncs of the disk.
    pub syncs: u64,
    /// Map pages read.
    pub pages_read: u64,
    /// Map, bit and catalog pages written.
    pub pages_written: u64,
    /// Data blocks read.
    pub data_read: u64,
    /// Data blocks written to fresh places.
    pub data_written: u64,
    /// Journal blocks written.
    pub journal_written: u64,
    /// Blocks copied from the journal to their places.
    pub copied: u64,
    /// Blocks whose copy was saved since they were overwritten again.
    pub coalesced: u64,
    /// Checkpoints.
    pub checkpoints: u64,
}

impl<D: Disk> EpochMap<D> {
    /// What it did since it was opened.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes of map pages in the cache, and pages changed since the last checkpoint.
    #[must_use]
    pub const fn memory(&self) -> (usize, usize) {
        (self.cache.memory(), self.dirty)
    }

    /// Why nothing is written any more, if so.
    #[must_use]
    pub fn poisoned(&self) -> Option<&str> {
        self.poisoned.as_deref()
    }

    fn start(&mut self, purpose: Purpose, work: DiskWork) {
        self.next_io += 1;
        let id = IoId(self.next_io);
        self.in_flight.insert(id, purpose);
        self.disk.submit(DiskRequest { id, work });
    }

    /// Stops writing, for good.
    fn poison(&mut self, what: &'static str, error: &io::Error) {
        if self.poisoned.is_none() {
            let reason = format!("{what}: {error}");
            tracing::error!(store = %self.superblock.id, path = %self.path.display(), reason, "the store stops writing; restart carrick-replica to look at it afresh");
            self.poisoned = Some(reason);
        }
        self.fail_everything();
    }

    /// A store whose map, bits and counts say different things is not written any more: it would get worse.
    fn stop_if_contradicted(&mut self) {
        if self.contradicted && self.poisoned.is_none() {
            self.poison("the map contradicts the catalog", &io::ErrorKind::InvalidData.into());
        }
    }

    /// Takes what has ended, and moves on. Whether anything had.
    fn pump(&mut self) -> bool {
        let mut done = Vec::new();
        self.disk.reap(&mut done);
        let any = !done.is_empty();
        done.into_iter().for_each(|done| self.on_done(done));
        self.advance();
        self.disk.push();
        any
    }

    /// One round over everything that may have become possible.
    fn advance(&mut self) {
        self.on_time();
        loop {
            while let Some(slot) = self.ready.pop_front() {
                self.advance_replica(slot);
            }
            self.advance_background();
            self.stop_if_contradicted();
            self.advance_journal();
            self.advance_copying();
            self.advance_checkpoint();
            self.advance_space();
            if self.ready.is_empty() {
                break;
            }
        }
    }

    fn on_done(&mut self, DiskDone { id, result }: DiskDone) {
        let Some(purpose) = self.in_flight.remove(&id) else { return };
        match purpose {
            Purpose::Page(missing, owners) => self.on_page(missing, &owners, result),
            Purpose::Data(key, at) => self.on_data(key, at, result),
            Purpose::Fresh(batch, slot, op) => self.on_fresh(batch, slot, op, result),
            Purpose::Batch(batch) => self.on_batch(batch, result),
            Purpose::Copy(blocks) => self.on_copied(&blocks, result),
            Purpose::Sync => self.on_synced(result),
            Purpose::Checkpoint => self.on_checkpoint_io(result),
            Purpose::Prepare(what) => self.on_prepared(what, result),
            Purpose::Discard(run) => self.on_discarded(run),
        }
    }

    /// Reads a page that somebody waits for, unless it is being read already.
    fn load(&mut self, missing: Missing, owners: &catalog::Owners, waiter: Waiter) {
        let waiters = self.waiters.entry(missing.pointer.place).or_default();
        let is_first = waiters.is_empty();
        if !waiters.contains(&waiter) {
            waiters.push(waiter);
        }
        if is_first {
            self.counters.pages_read += 1;
            let buffer = self.pool.take(BLOCK_SIZE as usize);
            self.start(Purpose::Page(missing, owners.clone()), DiskWork::Read { at: missing.pointer.place, buffer });
        }
    }

    fn on_page(&mut self, missing: Missing, owners: &catalog::Owners, result: io::Result<Option<Buffer>>) {
        let place = missing.pointer.place;
        let failure = match open::decode_page(&missing, owners, &self.superblock.geometry, result) {
            Ok(node) => {
                self.cache.insert(place, node);
                None
            }
            Err(error) => Some(error),
        };
        for waiter in self.waiters.remove(&place).unwrap_or_default() {
            match (waiter, &failure) {
                (Waiter::Replica(slot), None) => self.ready.push_back(slot),
                (Waiter::Replica(slot), Some(error)) => self.fail_first(slot, error),
                (Waiter::Read(key), failure) => self.resume_read(key, failure.as_deref()),
                (Waiter::Background, failure) => self.resume_background(failure.as_deref()),
            }
        }
    }

    fn complete(&mut self, volume: VolumeId, token: Token, result: Result<Outcome, StoreError>) {
        self.completions.push(Completion { volume, token, result });
    }

    fn slot(&self, volume: VolumeId) -> Option<Slot> {
        self.by_volume.get(&volume).copied()
    }

    /// Carries out one control operation to its end.
    fn wait_for(&mut self, done: impl Fn(&Self) -> bool) -> Result<(), StoreError> {
        loop {
            self.advance();
            while self.pump() {}
            if done(self) {
                return Ok(());
            }
            if let Some(reason) = &self.poisoned {
                return Err(self.io_error("write", io::Error::other(reason.clone())));
            }
            self.disk.wait().map_err(|source| self.io_error("wait for", source))?;
        }
    }

    fn io_error(&self, action: &'static str, source: io::Error) -> StoreError {
        StoreError::Io { action, path: self.path.clone(), source }
    }
}

impl<D: Disk> ReplicaStore for EpochMap<D> {
    fn id(&self) -> StoreId {
        self.superblock.id
    }

    fn create(&mut self, spec: ReplicaSpec) -> Result<(), StoreError> {
        self.create_replica(spec, None)
    }

    fn clone_snapshot(&mut self, origin: VolumeId, snapshot: SnapshotId, spec: ReplicaSpec) -> Result<(), StoreError> {
        self.create_replica(spec, Some((origin, snapshot)))
    }

    fn delete(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        self.delete_replica(volume)
    }

    fn replicas(&self) -> Vec<OpenedReplica> {
        let mut replicas: Vec<_> = self.by_volume.values().filter_map(|slot| self.replicas.get(slot)).map(Replica::opened).collect();
        replicas.sort_unstable_by_key(|opened| opened.spec.volume);
        replicas
    }

    fn snapshots(&self, volume: VolumeId) -> Result<Vec<SnapshotInfo>, StoreError> {
        let replica = self.slot(volume).and_then(|slot| self.replicas.get(&slot)).ok_or(StoreError::UnknownVolume(volume))?;
        Ok(replica.snapshots())
    }

    fn usage(&self) -> Result<StoreUsage, StoreError> {
        self.measure()
    }

    fn submit(&mut self, volume: VolumeId, token: Token, operation: Operation) {
        self.accept(volume, token, operation);
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        self.advance();
        // What is there is told at once, so that the disk and the caller work side by side.
        while self.completions.is_empty() && self.pump() {}
        self.disk.push();
        let alarm = self.next_time();
        self.disk.set_alarm(alarm);
        completions.append(&mut self.completions);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.disk.wake_fd()
    }

    fn poisoned(&self) -> Option<&str> {
        self.poisoned.as_deref()
    }
}
