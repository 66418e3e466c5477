//! The read lease: what a replica gives is an answer only while nobody else can have become primary.
//!
//! A member that answers a read or a ping had promised no later term when that was sent. As long as a majority has confirmed so
//! within [`READ_LEASE`], by this process's own clock, no successor serves: it waits for [`SUCCESSOR_WAIT`] after the promises of a
//! majority, unless the one before has ended (C. Gray, D. Cheriton: Leases, SOSP 1989). A read that is there without a lease waits
//! for one. Writes need none: a majority receives them.

use std::time::Duration;

use super::requests::JobId;
use super::{Engine, MemberIndex, Phase, Predecessor, ReadBytes, Response};
use crate::time::Monotonic;

/// For how long a confirmation counts, from when it was asked for. What a successor of a lost target waits for, so not much longer than
/// it takes to find that one lost; long enough for reads to confirm it by the way, and for a slow replica to answer twice.
pub(super) const READ_LEASE: Duration = Duration::from_secs(2);
/// How long a successor waits: the lease, and a tenth for clocks that differ.
pub(super) const SUCCESSOR_WAIT: Duration = Duration::from_millis(2200);
/// After so much of a lease, a read asks for the next.
const RENEW_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Lease {
    /// Reads that are there, and wait for a lease.
    waiting: Vec<(JobId, ReadBytes)>,
    /// From when on no predecessor answers reads, once that is known.
    serve_at: Option<Monotonic>,
}

impl Lease {
    pub(super) const fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

impl Engine {
    /// Whether a majority has confirmed the term within this time.
    fn is_confirmed(&self, now: Monotonic, within: Duration) -> bool {
        self.is_majority(|_, member| member.confirmed.is_some_and(|at| now < at + within))
    }

    /// A replica gave what a request reads.
    pub(super) fn answer_read(&mut self, now: Monotonic, job: JobId, bytes: ReadBytes) {
        if self.is_confirmed(now, READ_LEASE) {
            return self.finish_job(now, job, Ok(Response::Read(bytes)));
        }
        self.lease.waiting.push((job, bytes));
        self.renew_lease(now);
    }

    /// Asks members for a confirmation unless a majority has given one lately.
    pub(super) fn renew_lease(&mut self, now: Monotonic) {
        if self.is_confirmed(now, RENEW_AFTER) {
            return;
        }
        for index in self.member_indices() {
            let member = &self.members[index.0];
            if member.may_be_pinged() && member.confirmed.is_none_or(|at| now >= at + RENEW_AFTER) {
                self.ping(now, index);
            }
        }
    }

    /// A member has answered what it was asked at this time, and so had promised no later term then.
    pub(super) fn on_confirmed(&mut self, now: Monotonic, index: MemberIndex, asked: Monotonic) {
        let member = &mut self.members[index.0];
        member.confirmed = member.confirmed.max(Some(asked));
        self.release_reads(now);
    }

    /// Answers the reads that wait, if there is a lease now: a confirmation has come, or who is a majority has changed.
    pub(super) fn release_reads(&mut self, now: Monotonic) {
        if !self.lease.has_waiting() {
            return;
        }
        if !self.is_confirmed(now, READ_LEASE) {
            return self.renew_lease(now);
        }
        for (job, bytes) in std::mem::take(&mut self.lease.waiting) {
            self.finish_job(now, job, Ok(Response::Read(bytes)));
        }
    }

    /// A majority has promised the term: whoever was primary before gets no further lease.
    pub(super) fn begin_successor_wait(&mut self, now: Monotonic) {
        if self.config.predecessor == Predecessor::MayServe {
            self.lease.serve_at.get_or_insert(now + SUCCESSOR_WAIT);
        }
    }

    /// Whether a predecessor may still answer reads.
    pub(super) fn may_predecessor_read(&self, now: Monotonic) -> bool {
        self.lease.serve_at.is_some_and(|at| now < at)
    }

    /// When no predecessor answers reads any more, if only that is waited for.
    pub(super) fn lease_deadline(&self) -> Option<Monotonic> {
        self.lease.serve_at.filter(|_| matches!(self.phase, Phase::Reconciling) && self.is_adopted())
    }
}
