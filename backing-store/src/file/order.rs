//! Which reads and writes of one replica must wait for each other: those that overlap, in the order of submission.
//!
//! Writes are applied by one thread in order, so among themselves they need nothing. A read behind a write is parked until the
//! write has completed. A write behind a read makes the writer thread wait, which is rare: the target keeps requests that overlap
//! apart, so only copying meets live writes here.
//!
//! No deadlock: a read waits only for writes submitted before it, a write only for reads submitted before it, and the writer
//! completes what it has applied before it waits.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::units::Extent;

use super::replica::lock;
use super::worker::ReadJob;

/// Numbers operations of a store in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct OperationId(pub(super) u64);

#[derive(Debug, Default)]
struct Waiting {
    writes: VecDeque<(OperationId, Extent)>,
    reads: Vec<(OperationId, Extent)>,
    /// Reads, each with the last write that it waits for.
    parked: Vec<(OperationId, ReadJob)>,
}

#[derive(Debug, Default)]
pub(super) struct Order {
    waiting: Mutex<Waiting>,
    read_ended: Condvar,
}

impl Order {
    /// A write was submitted.
    pub(super) fn begin_write(&self, id: OperationId, extent: Extent) {
        lock(&self.waiting).writes.push_back((id, extent));
    }

    /// The last write submitted and not completed that touches these blocks.
    pub(super) fn write_before(&self, extent: Extent) -> Option<OperationId> {
        let waiting = lock(&self.waiting);
        waiting.writes.iter().rev().find(|(_, write)| write.overlaps(extent)).map(|(id, _)| *id)
    }

    /// A read was submitted that can't be answered at once. Gives the job back if it need not wait for a write.
    pub(super) fn begin_read(&self, job: ReadJob, after: Option<OperationId>) -> Option<ReadJob> {
        let mut waiting = lock(&self.waiting);
        waiting.reads.push((job.id, job.extent));
        // The write may have completed since the caller looked.
        let after = after.filter(|after| waiting.writes.iter().any(|(id, _)| id <= after));
        match after {
            None => Some(job),
            Some(after) => {
                waiting.parked.push((after, job));
                None
            }
        }
    }

    /// All writes up to this have completed, well or not. Returns the reads that waited for them.
    pub(super) fn end_writes(&self, last: OperationId) -> Vec<ReadJob> {
        let mut waiting = lock(&self.waiting);
        while waiting.writes.front().is_some_and(|(id, _)| *id <= last) {
            waiting.writes.pop_front();
        }
        waiting.parked.extract_if(.., |(after, _)| *after <= last).map(|(_, job)| job).collect()
    }

    /// A read has completed.
    pub(super) fn end_read(&self, id: OperationId) {
        lock(&self.waiting).reads.retain(|(read, _)| *read != id);
        self.read_ended.notify_all();
    }

    /// Whether a write must wait for a read.
    pub(super) fn must_wait(&self, id: OperationId, extent: Extent) -> bool {
        lock(&self.waiting).reads.iter().any(|(read, blocks)| *read < id && blocks.overlaps(extent))
    }

    /// Waits until a write need not wait any more.
    pub(super) fn wait_for_reads(&self, id: OperationId, extent: Extent) {
        let blocked = |waiting: &mut Waiting| waiting.reads.iter().any(|(read, blocks)| *read < id && blocks.overlaps(extent));
        drop(self.read_ended.wait_while(lock(&self.waiting), blocked).unwrap_or_else(PoisonError::into_inner));
    }
}
