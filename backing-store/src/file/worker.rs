//! The threads of a file store: one applies writes and states in order, one syncs, two read what is not in memory. All sleep when
//! there is nothing to do.
//!
//! The submitting thread only ever queues, or reads what the page cache has. Queues are as long as the submitter makes them: the
//! session bounds what it has in flight, and `submit` asserts a generous limit.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};

use crate::buffer::BufferPool;
use crate::store::{Completion, Operation, Outcome, ReadData, StoreError, Token};
use crate::units::{Extent, VolumeId};

use super::NO_SNAPSHOTS;
use super::order::OperationId;
use super::replica::{BlockWrite, Replica, lock};
use super::replica_file::Patience;

/// Writes that share one log write, one applied record and one hand-over: enough to spread the cost of these, few enough that the
/// first does not wait long for the last.
const RUN_MAX: usize = 32;
/// Free buffer memory kept between reads.
const POOL_KEEP: usize = 16 << 20;
/// Enough to keep a disk busy with cold reads beside what the page cache answers.
const READERS: usize = 2;

#[derive(Debug)]
struct Items<T> {
    list: VecDeque<T>,
    closed: bool,
}

/// A queue that its readers sleep on.
#[derive(Debug)]
struct Queue<T> {
    items: Mutex<Items<T>>,
    changed: Condvar,
}

impl<T> Queue<T> {
    fn new() -> Self {
        Self { items: Mutex::new(Items { list: VecDeque::new(), closed: false }), changed: Condvar::new() }
    }

    fn push(&self, item: T) {
        lock(&self.items).list.push_back(item);
        self.changed.notify_one();
    }

    /// No more items will come; those that are there are still given out, unless `drop_rest`.
    fn close(&self, drop_rest: bool) {
        let mut items = lock(&self.items);
        items.closed = true;
        if drop_rest {
            items.list.clear();
        }
        drop(items);
        self.changed.notify_all();
    }

    fn wait(&self) -> std::sync::MutexGuard<'_, Items<T>> {
        let empty = |items: &mut Items<T>| items.list.is_empty() && !items.closed;
        self.changed.wait_while(lock(&self.items), empty).unwrap_or_else(PoisonError::into_inner)
    }

    /// The oldest item. `None` when the queue is closed and empty.
    fn pop(&self) -> Option<T> {
        self.wait().list.pop_front()
    }

    /// All items. Empty when the queue is closed and empty.
    fn take_all(&self) -> VecDeque<T> {
        std::mem::take(&mut self.wait().list)
    }
}

/// Work for the writer thread: any operation but `Read` and `Sync`.
#[derive(Debug)]
pub(super) struct WriteJob {
    pub(super) id: OperationId,
    pub(super) replica: Arc<Replica>,
    pub(super) token: Token,
    pub(super) operation: Operation,
}

#[derive(Debug)]
pub(super) struct SyncJob {
    pub(super) replica: Arc<Replica>,
    pub(super) token: Token,
}

#[derive(Debug)]
pub(super) struct ReadJob {
    pub(super) id: OperationId,
    pub(super) replica: Arc<Replica>,
    pub(super) token: Token,
    pub(super) extent: Extent,
}

#[derive(Debug, Default)]
struct Finished {
    list: Vec<Completion>,
    /// The event is set. Changed together with it, under the lock.
    signalled: bool,
}

#[derive(Debug)]
struct Completions {
    finished: Mutex<Finished>,
    event: OwnedFd,
}

impl Completions {
    fn push(&self, completions: impl IntoIterator<Item = Completion>) {
        let mut finished = lock(&self.finished);
        finished.list.extend(completions);
        if !finished.signalled && !finished.list.is_empty() {
            finished.signalled = true;
            // Can't fail: the counter is 0 or 1, and the descriptor is ours.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }

    fn reap(&self, completions: &mut Vec<Completion>) {
        let mut finished = lock(&self.finished);
        if finished.signalled {
            finished.signalled = false;
            let _ = rustix::io::read(&self.event, &mut [0_u8; 8]);
        }
        completions.append(&mut finished.list);
    }
}

/// What the threads and the store share.
#[derive(Debug)]
struct Shared {
    writes: Queue<WriteJob>,
    syncs: Queue<SyncJob>,
    reads: Queue<ReadJob>,
    completions: Completions,
    pool: BufferPool,
}

/// The running threads of a store.
#[derive(Debug)]
pub(super) struct Workers {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    others: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn start() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            writes: Queue::new(),
            syncs: Queue::new(),
            reads: Queue::new(),
            completions: Completions { finished: Mutex::default(), event },
            pool: BufferPool::new(POOL_KEEP),
        });
        let mut workers = Self { shared, writer: None, others: Vec::new() };
        workers.writer = Some(workers.spawn("store-write", write_loop)?);
        for _ in 0..READERS {
            let reader = workers.spawn("store-read", read_loop)?;
            workers.others.push(reader);
        }
        let syncer = workers.spawn("store-sync", sync_loop)?;
        workers.others.push(syncer);
        Ok(workers)
    }

    fn spawn(&self, name: &str, body: fn(&Shared)) -> io::Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        thread::Builder::new().name(name.to_owned()).spawn(move || body(&shared))
    }

    pub(super) fn write(&self, job: WriteJob) {
        if let Some(write) = BlockWrite::of(&job.operation) {
            job.replica.order.begin_write(job.id, write.extent);
        }
        self.shared.writes.push(job);
    }

    pub(super) fn sync(&self, job: SyncJob) {
        self.shared.syncs.push(job);
    }

    /// Reads at once if it can be done without waiting.
    pub(super) fn read(&self, job: ReadJob) {
        let after = job.replica.order.write_before(job.extent);
        if after.is_none()
            && let Some(result) = job.replica.read(job.extent, &self.shared.pool, Patience::Cached).transpose()
        {
            self.complete(job.replica.spec().volume, job.token, result.map(Outcome::Read));
            return;
        }
        let replica = Arc::clone(&job.replica);
        if let Some(job) = replica.order.begin_read(job, after) {
            self.shared.reads.push(job);
        }
    }

    pub(super) fn complete(&self, volume: VolumeId, token: Token, result: Result<Outcome, StoreError>) {
        self.shared.completions.push([Completion { volume, token, result }]);
    }

    pub(super) fn reap(&self, completions: &mut Vec<Completion>) {
        self.shared.completions.reap(completions);
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.completions.event.as_fd()
    }

    /// Ends the threads, after what is queued or (`drop_rest`) before it.
    pub(super) fn stop(&mut self, drop_rest: bool) {
        // The writer first: it may wait for readers, and hands them the reads that waited for writes.
        self.shared.writes.close(drop_rest);
        let ended = |thread: JoinHandle<()>| drop(thread.join());
        self.writer.take().map(ended);
        self.shared.reads.close(drop_rest);
        self.shared.syncs.close(drop_rest);
        self.others.drain(..).for_each(ended);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop(false);
    }
}

// The writer.

fn write_loop(shared: &Shared) {
    loop {
        let mut jobs = Vec::from(shared.writes.take_all());
        if jobs.is_empty() {
            return;
        }
        // One replica after the other, each in its order: neighbours can then share a run. (The sort is stable.)
        jobs.sort_by_key(|job| Arc::as_ptr(&job.replica).addr());
        let mut left = jobs.as_slice();
        while let Some(first) = left.first() {
            let run = run_length(first, left);
            let (now, later) = left.split_at(run.max(1));
            if run == 0 {
                let result = other(first);
                shared.completions.push([Completion { volume: first.replica.spec().volume, token: first.token, result }]);
            } else {
                write_run(shared, &first.replica, now);
            }
            left = later;
        }
    }
}

/// How many of these jobs, from the first on, are writes of one replica that can be applied together. 0 if the first is none.
fn run_length(first: &WriteJob, jobs: &[WriteJob]) -> usize {
    let max = first.replica.run_max().min(RUN_MAX);
    let fits = |(index, job): &(usize, &WriteJob)| {
        let Some(write) = BlockWrite::of(&job.operation) else { return false };
        if !Arc::ptr_eq(&job.replica, &first.replica) {
            return false;
        }
        if *index == 0 {
            // Nothing is applied yet that a parked read could be waiting for.
            job.replica.order.wait_for_reads(job.id, write.extent);
            return true;
        }
        !job.replica.order.must_wait(job.id, write.extent)
    };
    jobs.iter().take(max).enumerate().take_while(fits).count()
}

fn write_run(shared: &Shared, replica: &Replica, jobs: &[WriteJob]) {
    let volume = replica.spec().volume;
    let writes: Vec<BlockWrite<'_>> = jobs.iter().filter_map(|job| BlockWrite::of(&job.operation)).collect();
    let results = replica.write(&writes);
    if let Some(last) = jobs.last() {
        for read in replica.order.end_writes(last.id) {
            shared.reads.push(read);
        }
    }
    let completions = jobs.iter().zip(results);
    shared.completions.push(completions.map(|(job, result)| Completion {
        volume,
        token: job.token,
        result: result.map(|()| Outcome::Written),
    }));
}

fn other(job: &WriteJob) -> Result<Outcome, StoreError> {
    match &job.operation {
        Operation::SetState { state, position } => job.replica.set_state(*state, *position).map(|()| Outcome::StateSet),
        Operation::LoggedAfter { after } => job.replica.logged_after(*after).map(Outcome::Logged),
        Operation::Write { .. } | Operation::WriteZeroes { .. } | Operation::Read { .. } | Operation::Sync => {
            Err(StoreError::Misuse { volume: job.replica.spec().volume, reason: "it is not for the writer thread" })
        }
        _ => Err(StoreError::Unsupported { path: job.replica.spec().volume.to_string().into(), action: NO_SNAPSHOTS }),
    }
}

// The others.

fn sync_loop(shared: &Shared) {
    loop {
        let mut jobs = Vec::from(shared.syncs.take_all());
        if jobs.is_empty() {
            return;
        }
        jobs.sort_by_key(|job| Arc::as_ptr(&job.replica).addr());
        for same in jobs.chunk_by(|a, b| Arc::ptr_eq(&a.replica, &b.replica)) {
            let Some(first) = same.first() else { continue };
            let volume = first.replica.spec().volume;
            let mut result = Some(first.replica.sync());
            shared.completions.push(same.iter().map(|job| {
                let result = match &result {
                    Some(Ok(durable)) => Ok(Outcome::Synced { durable: *durable }),
                    // The first learns the cause.
                    _ => Err(result.take().and_then(Result::err).unwrap_or(StoreError::Poisoned(volume))),
                };
                Completion { volume, token: job.token, result }
            }));
        }
    }
}

fn read_loop(shared: &Shared) {
    while let Some(job) = shared.reads.pop() {
        let found = job.replica.read(job.extent, &shared.pool, Patience::Waits);
        let result = found.map(|data| Outcome::Read(data.unwrap_or(ReadData::Zeroes)));
        job.replica.order.end_read(job.id);
        shared.completions.push([Completion { volume: job.replica.spec().volume, token: job.token, result }]);
    }
}
