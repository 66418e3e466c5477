//! Comparing replicas: whether all that are in sync hold the same, found by digests of ranges and of ever smaller parts of those that
//! differ. No data is shipped but that of blocks to be repaired.
//!
//! A range is compared under its shared lock. So nothing changes it meanwhile, and all that was ever written to it went to each member
//! before the question, on the same ordered connection: whoever answers something else holds something else, though its checksums
//! are right. What most hold is taken for right and written over the rest. Where there is no majority nobody can tell: it is counted.

use std::time::Duration;

use carrick_backing_store::{BLOCK_SIZE, ByteLength, ByteOffset, DIGEST_BLOCKS_MAX, Digest, Extent};

use super::copy::span;
use super::range_lock::Access;
use super::requests::Owner;
use super::{Engine, MemberIndex, Outstanding};
use crate::control::VerificationReport;
use crate::time::Monotonic;
use crate::wire::{Frame, Kind};

/// Bytes compared at once: what a digest may be of.
const RANGE: u64 = DIGEST_BLOCKS_MAX * BLOCK_SIZE as u64;
/// In so many parts a range that differs is compared again: from 16 MiB to a block in three steps.
const PARTS: u64 = 16;
/// Between two comparisons: writes that wait for a range go first. 1.6 GiB a second are compared at most.
const PAUSE: Duration = Duration::from_millis(10);
/// So many blocks are told by their places.
const PLACES_MAX: usize = 16;

/// The range that is being compared, and what those that were asked have answered.
#[derive(Debug)]
struct Round {
    extent: Extent,
    digests: Vec<(MemberIndex, Option<Digest>)>,
}

#[derive(Debug, Default)]
pub(super) struct Verification {
    /// The next comparison may begin then; `None`: none is to.
    due: Option<Monotonic>,
    /// Everything before is compared, but for `parts` and the present round.
    next: ByteOffset,
    /// Of ranges that differ, the next last.
    parts: Vec<Extent>,
    round: Option<Round>,
    report: Option<VerificationReport>,
}

impl Verification {
    fn take_range(&mut self, end: ByteOffset) -> Option<Extent> {
        if let Some(part) = self.parts.pop() {
            return Some(part);
        }
        let range = span(self.next, end.min(ByteOffset::new(self.next.get() + RANGE)));
        self.next = range.end();
        Some(range).filter(|range| !range.is_empty())
    }
}

/// The parts of a range of more than one block, last first.
fn parts(extent: Extent) -> impl Iterator<Item = Extent> {
    let length = (extent.block_count().div_ceil(PARTS) * u64::from(BLOCK_SIZE)).max(u64::from(BLOCK_SIZE));
    let start = extent.offset().get();
    let starts = (0..PARTS).rev().map(move |part| ByteOffset::new(start + part * length)).filter(move |from| *from < extent.end());
    starts.map(move |from| span(from, extent.end().min(ByteOffset::new(from.get() + length))))
}

/// What more than half of them answered.
fn majority(digests: &[(MemberIndex, Option<Digest>)]) -> Option<Digest> {
    let count = |wanted: Option<Digest>| digests.iter().filter(|(_, digest)| *digest == wanted).count();
    digests.iter().find(|(_, digest)| count(*digest) * 2 > digests.len()).and_then(|(_, digest)| *digest)
}

impl Engine {
    /// Compares all replicas in sync, once, from the beginning; one that is under way goes on. Look at [`Engine::deadline`]
    /// afterwards.
    pub fn verify(&mut self) {
        if self.verification.report.as_ref().is_none_or(|report| !report.running) {
            let total = self.config.size.bytes();
            let report = VerificationReport { running: true, total, ..VerificationReport::default() };
            self.verification = Verification { due: Some(Monotonic::default()), report: Some(report), ..Verification::default() };
        }
    }

    /// What the latest comparison came to so far, if there was one.
    #[must_use]
    pub fn verification(&self) -> Option<&VerificationReport> {
        self.verification.report.as_ref()
    }

    /// When [`Engine::advance_verification`] wants to be called.
    pub(super) fn verification_deadline(&self) -> Option<Monotonic> {
        self.verification.due.filter(|_| self.is_comparable())
    }

    /// Whether there are two to compare.
    fn is_comparable(&self) -> bool {
        self.is_serving() && self.members.iter().filter(|member| member.is_joined()).count() > 1
    }

    /// Begins the next comparison, if it is time.
    pub(super) fn advance_verification(&mut self, now: Monotonic) {
        if !self.is_comparable() || self.verification.due.is_none_or(|due| now < due) {
            return;
        }
        self.verification.due = None;
        let Some(extent) = self.verification.take_range(self.config.size.extent().end()) else {
            return self.note_verified(|report| report.running = false);
        };
        let at = self.verification.next;
        self.note_verified(|report| report.compared = ByteLength::new(at.get()));
        self.verification.round = Some(Round { extent, digests: Vec::new() });
        if self.locks.acquire(Owner::Verification, extent, Access::Shared) {
            self.ask_digests(now);
        }
    }

    fn note_verified(&mut self, note: impl FnOnce(&mut VerificationReport)) {
        if let Some(report) = &mut self.verification.report {
            note(report);
        }
    }

    /// The range is locked.
    pub(super) fn ask_digests(&mut self, now: Monotonic) {
        let joined = |index: &MemberIndex| self.members[index.0].is_joined();
        let asked: Vec<MemberIndex> = self.member_indices().filter(joined).collect();
        let Some(round) = &mut self.verification.round else { return };
        round.digests = asked.iter().map(|index| (*index, None)).collect();
        let extent = round.extent;
        for index in asked {
            let header = self.header(Kind::Digest);
            self.request(now, index, Frame::range(header, extent), Outstanding::Digest);
        }
        self.settle_round(now);
    }

    /// A member has told its digest, or can't read its map: then the others are compared.
    pub(super) fn on_digest(&mut self, now: Monotonic, index: MemberIndex, digest: Option<Digest>) {
        let Some(round) = &mut self.verification.round else { return };
        match digest {
            Some(_) => round.digests.iter_mut().filter(|(member, _)| *member == index).for_each(|(_, place)| *place = digest),
            None => round.digests.retain(|(member, _)| *member != index),
        }
        self.settle_round(now);
    }

    /// Once all have answered: equal, or a reason to look closer.
    fn settle_round(&mut self, now: Monotonic) {
        let Some(round) = self.verification.round.take_if(|round| round.digests.iter().all(|(_, digest)| digest.is_some())) else {
            return;
        };
        let differ = round.digests.iter().any(|(_, digest)| *digest != round.digests[0].1);
        if round.digests.len() < 2 {
            // Of the others, the maps can't be read.
            self.note_verified(|report| report.skipped = ByteLength::new(report.skipped.get() + round.extent.length().get()));
        } else if differ && round.extent.block_count() > 1 {
            self.verification.parts.extend(parts(round.extent));
        } else if differ {
            return self.settle_block(now, round);
        }
        self.end_round(now);
    }

    /// One block differs: what most hold is read, to be written over the rest.
    fn settle_block(&mut self, now: Monotonic, round: Round) {
        let extent = round.extent;
        let Some(right) = majority(&round.digests) else { return self.give_up_block(now, extent) };
        let from = round.digests.iter().find(|(index, digest)| *digest == Some(right) && self.members[index.0].is_joined());
        let from = from.map(|(index, _)| *index);
        self.verification.round = Some(round);
        let Some(from) = from else { return self.retry_round(now) };
        tracing::error!(volume = %self.config.volume, block = %extent.first_block(), "replicas differ; what most hold is taken for right");
        let header = self.header(Kind::Read);
        self.request(now, from, Frame::range(header, extent), Outstanding::DigestRead);
    }

    fn give_up_block(&mut self, now: Monotonic, extent: Extent) {
        let block = extent.first_block();
        tracing::error!(volume = %self.config.volume, %block, "replicas differ, and nobody can tell which is right");
        self.note_verified(|report| {
            report.unsettled += 1;
            if report.places.len() < PLACES_MAX {
                report.places.push(block);
            }
        });
        self.end_round(now);
    }

    /// What most hold is here, or can't be read.
    pub(super) fn on_digest_read(&mut self, now: Monotonic, frame: Option<Frame>) {
        let Some(round) = self.verification.round.take() else { return };
        let Some(frame) = frame else { return self.give_up_block(now, round.extent) };
        let right = majority(&round.digests);
        for (index, _) in round.digests.iter().filter(|(_, digest)| *digest != right) {
            if !self.members[index.0].is_joined() {
                continue;
            }
            let copied = self.copy_frame(round.extent, frame.body.clone());
            self.request(now, *index, copied, Outstanding::Repair);
        }
        self.note_verified(|report| report.repaired += 1);
        self.end_round(now);
    }

    /// Somebody who was asked is gone: the range is compared anew.
    pub(super) fn retry_round(&mut self, now: Monotonic) {
        let Some(round) = self.verification.round.take() else { return };
        for (_, outstanding) in self.outstanding.values_mut() {
            match outstanding {
                Outstanding::Digest => *outstanding = Outstanding::Ignored,
                Outstanding::DigestRead => *outstanding = Outstanding::Abandoned,
                _ => {}
            }
        }
        self.verification.parts.push(round.extent);
        self.end_round(now);
    }

    fn end_round(&mut self, now: Monotonic) {
        self.verification.due = Some(now + PAUSE);
        self.unlock(now, Owner::Verification);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(first: u64, count: u64) -> Extent {
        span(ByteOffset::new(first * 4096), ByteOffset::new((first + count) * 4096))
    }

    #[test]
    fn a_range_is_taken_apart_without_gaps_down_to_blocks() {
        for count in [2, 3, 15, 16, 17, 100, 256, 4095, 4096] {
            let mut found: Vec<Extent> = parts(extent(7, count)).collect();
            found.reverse();
            assert!(found.iter().all(|part| part.block_count() < count), "{count}");
            assert_eq!((found[0].offset(), found.last().unwrap().end()), (extent(7, count).offset(), extent(7, count).end()), "{count}");
            assert!(found.windows(2).all(|pair| pair[0].end() == pair[1].offset()), "{count}");
        }
    }

    #[test]
    fn more_than_half_must_agree() {
        let of = |digests: &[u64]| {
            majority(
                &digests.iter().enumerate().map(|(index, digest)| (MemberIndex(index), Some(Digest::new(*digest)))).collect::<Vec<_>>(),
            )
        };
        assert_eq!(of(&[1, 2, 1]), Some(Digest::new(1)));
        assert_eq!(of(&[1, 2]), None);
        assert_eq!(of(&[1, 2, 3]), None);
        assert_eq!(of(&[1, 1, 2, 2]), None);
        assert_eq!(of(&[3, 1, 3, 2, 3]), Some(Digest::new(3)));
    }
}
