//! Requests: split where a range begins or ends inside a block, locked, merged, given a sequence, and completed.
//!
//! A request is one job or more; each job covers whole blocks and holds their range lock from its start to its end.

use carrick_backing_store::{
    BLOCK_SIZE, BlockIndex, ByteLength, ByteOffset, Checksums, Extent, Seq, SharedBuffer, VolumeId, block_checksum,
};

use smallvec::{SmallVec, smallvec};

use super::backlog::{Change, Entry};
use super::range_lock::Access;
use super::{Action, Engine, MemberIndex, Outstanding, ReadBytes, Request, RequestError, RequestTag, Response};
use crate::time::Monotonic;
use crate::wire::{Body, DATA_LENGTH_MAX, Frame, Kind, RANGE_LENGTH_MAX};

/// Ranges of requests begin and end at multiples of this.
const SECTOR: u64 = 512;

/// A job's place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct JobId(pub(super) usize);

/// Who holds a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Job(JobId),
    Copy(MemberIndex, ByteOffset),
    Verification,
}

#[derive(Clone, Debug)]
enum Work {
    Read,
    Write { data: SharedBuffer, fua: bool },
    Zeroes { fua: bool },
    Discard,
}

#[derive(Debug)]
pub(super) struct Job {
    request: usize,
    /// The bytes asked for.
    extent: Extent,
    /// The blocks they touch: what is locked.
    blocks: Extent,
    work: Work,
    /// For a write that begins or ends inside a block: the old blocks to be read first, last first.
    edges: Vec<Extent>,
    /// The write's blocks, as far as they are put together.
    merged: Option<carrick_backing_store::Buffer>,
    /// Members (a bit each) whose copy of the blocks now being read is damaged.
    pub(super) damaged: u8,
}

/// A request with jobs under way.
#[derive(Debug)]
pub(super) struct Ongoing {
    tag: RequestTag,
    jobs: usize,
    result: Result<Response, RequestError>,
}

/// What a write still waits for after a majority has received it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Waiter {
    Flush(RequestTag),
    Write(JobId),
}

/// A table whose places are used again.
#[derive(Debug)]
pub(super) struct Table<T> {
    slots: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Table<T> {
    pub(super) fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }

    fn insert(&mut self, value: T) -> usize {
        if let Some(index) = self.free.pop() {
            self.slots[index] = Some(value);
            return index;
        }
        self.slots.push(Some(value));
        self.slots.len() - 1
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.len() == self.free.len()
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.slots.get_mut(index)?.as_mut()
    }

    fn remove(&mut self, index: usize) -> Option<T> {
        let value = self.slots.get_mut(index)?.take();
        if value.is_some() {
            self.free.push(index);
        }
        value
    }
}

impl Engine {
    /// Takes a request. It ends with one [`Action::Complete`]; before [`Action::Serve`], requests just wait.
    pub fn submit(&mut self, now: Monotonic, tag: RequestTag, request: Request) {
        if self.aborted {
            self.actions.push_back(Action::Complete(tag, Err(RequestError::Aborted)));
        } else if !self.is_serving() {
            self.queued.push_back((tag, request));
        } else {
            self.start_request(now, tag, request);
        }
    }

    pub(super) fn start_queued(&mut self, now: Monotonic) {
        while let Some((tag, request)) = self.queued.pop_front() {
            self.start_request(now, tag, request);
        }
    }

    fn start_request(&mut self, now: Monotonic, tag: RequestTag, request: Request) {
        let extent = match &request {
            Request::Flush => return self.start_flush(now, tag),
            Request::Read { extent }
            | Request::Write { extent, .. }
            | Request::WriteZeroes { extent, .. }
            | Request::Discard { extent } => *extent,
        };
        if !self.is_in_range(&request, extent) {
            self.actions.push_back(Action::Complete(tag, Err(RequestError::Range)));
            return;
        }
        let parts = split(request, &self.zeroes);
        if parts.is_empty() {
            self.actions.push_back(Action::Complete(tag, Ok(Response::Done)));
            return;
        }
        let ongoing = self.requests.insert(Ongoing { tag, jobs: parts.len(), result: Ok(Response::Done) });
        for (extent, work) in parts {
            // Within the volume, which ends at a block's end.
            let Some(blocks) = extent.block_aligned() else { continue };
            let access = if matches!(work, Work::Read) { Access::Shared } else { Access::Exclusive };
            let job = Job { request: ongoing, extent, blocks, work, edges: Vec::new(), merged: None, damaged: 0 };
            let id = JobId(self.jobs.insert(job));
            if self.locks.acquire(Owner::Job(id), blocks, access) {
                self.start_job(now, id);
            }
        }
    }

    fn is_in_range(&self, request: &Request, extent: Extent) -> bool {
        let limit = match request {
            Request::Read { .. } | Request::Write { .. } => u64::from(DATA_LENGTH_MAX - BLOCK_SIZE),
            _ => u64::from(RANGE_LENGTH_MAX),
        };
        let sectors = extent.offset().get().is_multiple_of(SECTOR) && extent.length().get().is_multiple_of(SECTOR);
        let fits = match request {
            Request::Write { data, .. } => data.len() as u64 == extent.length().get(),
            _ => true,
        };
        sectors && fits && !extent.is_empty() && extent.length().get() <= limit && self.config.size.extent().contains(extent)
    }

    /// Gives up a range, and starts whoever waited for it.
    pub(super) fn unlock(&mut self, now: Monotonic, owner: Owner) {
        let mut granted = Vec::new();
        self.locks.release(owner, &mut granted);
        for owner in granted {
            match owner {
                Owner::Job(id) => self.start_job(now, id),
                Owner::Copy(member, offset) => self.on_chunk_granted(now, member, offset),
                Owner::Verification => self.ask_digests(now),
            }
        }
    }

    /// The job holds its range.
    fn start_job(&mut self, now: Monotonic, id: JobId) {
        let Some(job) = self.jobs.get_mut(id.0) else { return };
        match job.work.clone() {
            Work::Read => self.read(now, id),
            Work::Zeroes { fua } => self.write(now, id, Change::Zeroes, fua),
            Work::Discard => self.write(now, id, Change::Discard, false),
            Work::Write { data, fua } if job.extent == job.blocks => {
                let change = data_change(self.config.volume, job.blocks, data);
                self.write(now, id, change, fua);
            }
            Work::Write { .. } => {
                job.edges = edges(job.extent, job.blocks);
                let length = usize::try_from(job.blocks.length().get()).unwrap_or(usize::MAX);
                job.merged = Some(self.pool.take(length));
                self.read(now, id);
            }
        }
    }

    /// Asks a replica for the blocks that the job needs next.
    pub(super) fn read(&mut self, now: Monotonic, id: JobId) {
        let Some(job) = self.jobs.get_mut(id.0) else { return };
        let (extent, damaged) = (job.edges.last().copied().unwrap_or(job.blocks), job.damaged);
        if let Some(member) = self.best_reader(damaged) {
            let header = self.header(Kind::Read);
            self.renew_lease(now);
            let request = self.request(now, member, Frame::range(header, extent), Outstanding::Read { job: id, asked: now });
            self.note_read_asked(now, request);
        } else if self.member_indices().all(|index| !self.members[index.0].in_sync || damaged & 1 << index.0 != 0) {
            self.finish_job(now, id, Err(RequestError::Damaged));
        } else {
            // In-sync replicas are away: the timer and every return try again.
            self.stalled_reads.push(id);
        }
    }

    /// Reads that found nobody to ask, or no lease, try again.
    pub(super) fn retry_reads(&mut self, now: Monotonic) {
        self.release_reads(now);
        for id in std::mem::take(&mut self.stalled_reads) {
            self.read(now, id);
        }
    }

    /// A replica gave the blocks.
    pub(super) fn on_read(&mut self, now: Monotonic, id: JobId, frame: Frame) {
        let Some(job) = self.jobs.get_mut(id.0) else { return };
        let Some(found) = frame.header.extent() else { return };
        if job.damaged != 0 {
            let damaged = std::mem::take(&mut job.damaged);
            self.repair(now, damaged, &frame);
        }
        let Some(job) = self.jobs.get_mut(id.0) else { return };
        let Some(merged) = &mut job.merged else {
            let bytes = match frame.body {
                Body::Data { data, .. } => ReadBytes::Bytes(data.slice(within(job.blocks, job.extent))),
                _ => ReadBytes::Zeroes,
            };
            return self.answer_read(now, id, bytes);
        };
        let old = &mut merged[within(job.blocks, found)];
        match frame.body {
            Body::Data { data, .. } => old.copy_from_slice(&data),
            _ => old.fill(0),
        }
        job.edges.pop();
        if job.edges.is_empty() { self.write_merged(now, id) } else { self.read(now, id) }
    }

    /// The old blocks are there: puts the new bytes over them.
    fn write_merged(&mut self, now: Monotonic, id: JobId) {
        let Some(job) = self.jobs.get_mut(id.0) else { return };
        let (Work::Write { data, fua }, Some(mut merged)) = (job.work.clone(), job.merged.take()) else { return };
        merged[within(job.blocks, job.extent)].copy_from_slice(&data);
        let change = data_change(self.config.volume, job.blocks, merged.share());
        self.write(now, id, change, fua);
    }

    /// Writes good blocks over damaged ones. The job's lock keeps newer writes behind it.
    fn repair(&mut self, now: Monotonic, damaged: u8, frame: &Frame) {
        let Some(extent) = frame.header.extent() else { return };
        for index in self.member_indices().filter(|index| damaged & 1 << index.0 != 0) {
            if !self.members[index.0].is_joined() {
                continue;
            }
            self.repaired += 1;
            let copied = self.copy_frame(extent, frame.body.clone());
            self.request(now, index, copied, Outstanding::Repair);
        }
    }

    /// Gives the write its sequence and sends it to everyone who takes writes.
    fn write(&mut self, now: Monotonic, id: JobId, change: Change, fua: bool) {
        let Some(job) = self.jobs.get_mut(id.0) else { return };
        let Some(term) = self.term else { return };
        let seq = self.backlog.last().next();
        let entry = Entry { seq, extent: job.blocks, change, fua, job: id, since: now };
        for index in self.writers() {
            self.send_write(now, index, entry.frame(self.config.volume, term), fua);
        }
        let bytes = entry.extent.length().get();
        self.backlog.push(entry);
        self.bound_backlog(now);
        self.note_written(now, bytes);
    }

    /// Sends a member every write that it lacks.
    pub(super) fn send_backlog(&mut self, now: Monotonic, index: MemberIndex) {
        let Some(term) = self.term else { return };
        let frames: Vec<(Frame, bool)> =
            self.backlog.after(self.members[index.0].sent).map(|entry| (entry.frame(self.config.volume, term), entry.fua)).collect();
        for (frame, fua) in frames {
            self.send_write(now, index, frame, fua);
        }
        // What a flush on the connection before covered must be asked for again.
        if !self.waiters.is_empty() {
            self.send_flush(now, index);
        }
    }

    fn send_write(&mut self, now: Monotonic, index: MemberIndex, frame: Frame, fua: bool) {
        let member = &mut self.members[index.0];
        if !member.owes() {
            member.quiet_since = now;
        }
        member.sent = frame.header.sequence;
        if fua {
            member.flush_sent = member.sent;
        }
        self.actions.push_back(Action::Send(index, frame));
    }

    fn start_flush(&mut self, now: Monotonic, tag: RequestTag) {
        let target = self.acknowledged;
        if self.durable_on_majority() >= target {
            self.note_flushed(target);
            self.actions.push_back(Action::Complete(tag, Ok(Response::Done)));
            return;
        }
        self.wait_durable(now, target, Waiter::Flush(tag));
    }

    /// Completes the waiter when a majority has `target` on stable media, and asks those for it who were not asked yet.
    fn wait_durable(&mut self, now: Monotonic, target: Seq, waiter: Waiter) {
        self.waiters.push((target, waiter));
        for index in self.writers() {
            if self.members[index.0].flush_sent < target {
                self.send_flush(now, index);
            }
        }
    }

    pub(super) fn send_flush(&mut self, now: Monotonic, index: MemberIndex) {
        let flush = Frame::new(self.header(Kind::Flush), Body::Empty);
        let member = &mut self.members[index.0];
        if !member.owes() {
            member.quiet_since = now;
        }
        member.flush_sent = member.sent;
        self.actions.push_back(Action::Send(index, flush));
    }

    /// A member's positions have moved: completes what a majority has now.
    pub(super) fn advance_acknowledged(&mut self, now: Monotonic) {
        let received = self.on_majority(|member| member.received);
        while self.acknowledged < received {
            self.acknowledged = self.acknowledged.next();
            let Some(entry) = self.backlog.get(self.acknowledged) else {
                unreachable!("write {} is in the backlog until it is acknowledged", self.acknowledged)
            };
            let (job, fua) = (entry.job, entry.fua);
            if fua {
                self.wait_durable(now, self.acknowledged, Waiter::Write(job));
            } else {
                self.finish_job(now, job, Ok(Response::Done));
            }
        }
        let durable = self.durable_on_majority();
        let mut index = 0;
        while index < self.waiters.len() {
            if self.waiters[index].0 > durable {
                index += 1;
                continue;
            }
            self.note_flushed(self.waiters[index].0);
            match self.waiters.remove(index).1 {
                Waiter::Flush(tag) => self.actions.push_back(Action::Complete(tag, Ok(Response::Done))),
                Waiter::Write(job) => self.finish_job(now, job, Ok(Response::Done)),
            }
        }
        self.trim_backlog();
        if self.configs.is_waiting {
            self.propose_change(now);
        }
    }

    fn durable_on_majority(&self) -> Seq {
        self.on_majority(|member| member.durable)
    }

    pub(super) fn finish_job(&mut self, now: Monotonic, id: JobId, result: Result<Response, RequestError>) {
        let Some(job) = self.jobs.remove(id.0) else { return };
        if let Some(ongoing) = self.requests.get_mut(job.request) {
            ongoing.jobs -= 1;
            match result {
                Ok(Response::Done) => {}
                result if ongoing.result.is_ok() => ongoing.result = result,
                _ => {}
            }
            if ongoing.jobs == 0
                && let Some(ongoing) = self.requests.remove(job.request)
            {
                self.actions.push_back(Action::Complete(ongoing.tag, ongoing.result));
            }
        }
        self.unlock(now, Owner::Job(id));
    }

    /// Ends every request with [`RequestError::Aborted`], those to come included. The writes among them may or may not happen.
    pub fn abort(&mut self) {
        self.aborted = true;
        let flushes = self.waiters.extract_if(.., |(_, waiter)| matches!(waiter, Waiter::Flush(_)));
        let flushes: Vec<RequestTag> =
            flushes.filter_map(|(_, waiter)| if let Waiter::Flush(tag) = waiter { Some(tag) } else { None }).collect();
        let queued = self.queued.drain(..).map(|(tag, _)| tag);
        let ongoing = self.requests.slots.iter_mut().filter_map(|slot| slot.take()).map(|ongoing| ongoing.tag);
        let tags: Vec<RequestTag> = flushes.into_iter().chain(queued).chain(ongoing).collect();
        self.actions.extend(tags.into_iter().map(|tag| Action::Complete(tag, Err(RequestError::Aborted))));
    }
}

/// What a request does to which bytes. Ranges that begin or end inside a block are split, so that each part is either whole
/// blocks or to be merged.
fn split(request: Request, zeroes: &SharedBuffer) -> SmallVec<[(Extent, Work); 3]> {
    match request {
        Request::Read { extent } => smallvec![(extent, Work::Read)],
        Request::Write { extent, data, fua } => smallvec![(extent, Work::Write { data, fua })],
        Request::Discard { extent } => whole_blocks(extent).map(|whole| (whole, Work::Discard)).into_iter().collect(),
        Request::WriteZeroes { extent, fua } => {
            let zero = |extent: Extent| {
                let length = usize::try_from(extent.length().get()).unwrap_or(0);
                (extent, Work::Write { data: zeroes.slice(0..length), fua })
            };
            let Some(whole) = whole_blocks(extent) else {
                // Within one block, or at the border of two: less than two blocks of zeros.
                return smallvec![zero(extent)];
            };
            let head = between(extent.offset(), whole.offset());
            let tail = between(whole.end(), extent.end());
            head.map(zero).into_iter().chain([(whole, Work::Zeroes { fua })]).chain(tail.map(zero)).collect()
        }
        Request::Flush => SmallVec::new(),
    }
}

/// The blocks that lie wholly within.
fn whole_blocks(extent: Extent) -> Option<Extent> {
    let block = u64::from(BLOCK_SIZE);
    let start = extent.offset().get().next_multiple_of(block);
    let end = extent.end().get() / block * block;
    between(ByteOffset::new(start), ByteOffset::new(end))
}

fn between(start: ByteOffset, end: ByteOffset) -> Option<Extent> {
    let length = end.get().checked_sub(start.get()).filter(|length| *length > 0)?;
    Extent::new(start, ByteLength::new(length))
}

/// The blocks of which only a part is overwritten, last first.
fn edges(extent: Extent, blocks: Extent) -> Vec<Extent> {
    let block = |index: BlockIndex| Extent::new(index.offset(), ByteLength::new(u64::from(BLOCK_SIZE)));
    let head = (extent.offset() != blocks.offset()).then(|| block(blocks.first_block())).flatten();
    let last = BlockIndex::new(blocks.first_block().get() + blocks.block_count() - 1);
    let tail = (extent.end() != blocks.end()).then(|| block(last)).flatten();
    tail.into_iter().chain(head.filter(|head| Some(*head) != tail)).collect()
}

/// Where `inner` lies within `outer`.
fn within(outer: Extent, inner: Extent) -> std::ops::Range<usize> {
    let start = usize::try_from(inner.offset().get() - outer.offset().get()).unwrap_or(usize::MAX);
    start..start + usize::try_from(inner.length().get()).unwrap_or(usize::MAX)
}

fn data_change(volume: VolumeId, blocks: Extent, data: SharedBuffer) -> Change {
    let first = blocks.first_block().get();
    let checksums: Checksums = data
        .chunks_exact(BLOCK_SIZE as usize)
        .zip(first..)
        .map(|(block, index)| block_checksum(volume, BlockIndex::new(index), block))
        .collect();
    Change::Data { checksums, data }
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::BufferPool;

    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent::new(ByteOffset::new(offset), ByteLength::new(length)).unwrap()
    }

    fn split_zeroes(offset: u64, length: u64) -> Vec<Extent> {
        let zeroes = BufferPool::new(0).take(8192).share();
        split(Request::WriteZeroes { extent: extent(offset, length), fua: false }, &zeroes).into_iter().map(|(extent, _)| extent).collect()
    }

    #[test]
    fn zeroes_are_split_at_block_borders() {
        assert_eq!(split_zeroes(0, 4096), [extent(0, 4096)]);
        assert_eq!(split_zeroes(512, 512), [extent(512, 512)]);
        assert_eq!(split_zeroes(3584, 1024), [extent(3584, 1024)], "parts of two blocks, none whole");
        assert_eq!(split_zeroes(3584, 9216), [extent(3584, 512), extent(4096, 8192), extent(12288, 512)]);
    }

    #[test]
    fn edges_are_read_once_each() {
        let of = |offset, length| {
            let part = extent(offset, length);
            edges(part, part.block_aligned().unwrap())
        };
        assert_eq!(of(512, 512), [extent(0, 4096)]);
        assert_eq!(of(512, 4096), [extent(4096, 4096), extent(0, 4096)]);
        assert_eq!(of(0, 4608), [extent(4096, 4096)]);
        assert_eq!(of(512, 8192 - 512), [extent(0, 4096)]);
    }
}
