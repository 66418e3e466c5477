//! Whom to read from: the replica that will answer first, as far as one can tell.

use std::collections::VecDeque;
use std::time::Duration;

use super::member::Member;
use super::{Engine, MemberIndex, Outstanding};
use crate::time::Monotonic;
use crate::wire::RequestId;

/// Answer times below this count as equal: then reads go round, and every disk gets its share.
const QUICK: Duration = Duration::from_micros(200);
/// One read in so many goes to whoever has least to do, quick or not, to learn whether a slow one has become quick. Few enough not to
/// show in the slowest hundredth of all reads; and a prime, so that whose turn it is then isn't always the same member's.
const PROBE_EVERY: u64 = 257;
/// How much of the smoothed answer time the last one makes: a share of one in so many.
const SMOOTHING: u32 = 8;

/// A read that isn't answered for so long is asked of another member, if one has much less to do. Disks that work are quicker even
/// under load; and a guest hardly notices.
const HEDGE_DELAY: Duration = Duration::from_millis(250);

#[derive(Debug, Default)]
pub(super) struct Readers {
    /// Reads that were given to somebody.
    chosen: u64,
    next: usize,
    /// When each read was asked for, oldest first. Those that were answered since are skipped.
    fresh: VecDeque<(Monotonic, RequestId)>,
    /// The same of those that took longer than [`HEDGE_DELAY`] while nobody had less to do: when that was seen.
    late: VecDeque<(Monotonic, RequestId)>,
    /// Reads that were asked of another member since the first was slow.
    hedged: u64,
    /// The member that a read is being taken away from.
    slow: Option<MemberIndex>,
}

impl Readers {
    fn due(queue: &mut VecDeque<(Monotonic, RequestId)>, now: Monotonic, after: Duration) -> Option<RequestId> {
        queue.pop_front_if(|(at, _)| now >= *at + after).map(|(_, request)| request)
    }
}

/// The smoothed time, after another answer took so long.
fn smoothed(before: Duration, last: Duration) -> Duration {
    if before.is_zero() { last } else { (before * (SMOOTHING - 1) + last) / SMOOTHING }
}

impl Engine {
    /// A read was asked for.
    pub(super) fn note_read_asked(&mut self, now: Monotonic, request: RequestId) {
        self.readers.fresh.push_back((now, request));
    }

    /// Forgets when the oldest reads were asked for that nobody owes any more.
    pub(super) fn trim_read_times(&mut self) {
        for queue in [&mut self.readers.fresh, &mut self.readers.late] {
            while queue.pop_front_if(|(_, request)| !self.outstanding.contains_key(request)).is_some() {}
        }
    }

    /// When [`Engine::expire_reads`] wants to be called.
    pub(super) fn read_deadline(&self) -> Option<Monotonic> {
        let fresh = self.readers.fresh.front().map(|(at, _)| *at + HEDGE_DELAY);
        let late = self.readers.late.front().map(|(at, _)| *at + self.config.replica_timeout);
        fresh.into_iter().chain(late).min()
    }

    /// Reads that a replica holds back although it lives (its disk hangs) are asked of another.
    pub(super) fn expire_reads(&mut self, now: Monotonic) {
        while let Some(request) = Readers::due(&mut self.readers.fresh, now, HEDGE_DELAY) {
            // If all have as much to do, asking twice would only give them more.
            self.expire_read(now, request, HEDGE_DELAY, |reads, others| others * 2 <= reads);
        }
        while let Some(request) = Readers::due(&mut self.readers.late, now, self.config.replica_timeout) {
            self.expire_read(now, request, self.config.replica_timeout, |_, _| true);
        }
    }

    /// A read has waited for so long: another joined member is asked if `is_better` is true of the reads that this one owes and that
    /// the other does. Else it waits on.
    fn expire_read(&mut self, now: Monotonic, request: RequestId, waited: Duration, is_better: impl Fn(usize, usize) -> bool) {
        let Some((member, Outstanding::Read { job, asked })) = self.outstanding.get(&request).copied() else { return };
        self.note_read_time(now, member, asked);
        let reads = self.members[member.0].reads;
        if !self.joined_besides(member).any(|other| is_better(reads, other.reads)) {
            return self.readers.late.push_back((now, request));
        }
        // It still owes the answer, which keeps further reads away from it.
        self.outstanding.insert(request, (member, Outstanding::Abandoned));
        self.members[member.0].last_error = Some(format!("a read waited for {} ms", waited.as_millis()));
        self.readers.hedged += 1;
        self.readers.slow = Some(member);
        self.read(now, job);
        self.readers.slow = None;
    }

    /// The joined members but this one.
    pub(super) fn joined_besides(&self, index: MemberIndex) -> impl Iterator<Item = &Member> {
        let others = self.members.iter().enumerate().filter(move |(other, _)| *other != index.0);
        others.map(|(_, member)| member).filter(|member| member.is_joined())
    }

    /// How many reads were asked of another replica since the first didn't answer in time.
    #[must_use]
    pub fn hedged(&self) -> u64 {
        self.readers.hedged
    }

    /// The member to read from: joined, not excluded (a bit each), and the first to answer by what it has to do and how long it took
    /// lately.
    pub(super) fn best_reader(&mut self, excluded: u8) -> Option<MemberIndex> {
        let all = self.members.len();
        let start = self.readers.next;
        self.readers.next = (start + 1) % all;
        self.readers.chosen += 1;
        let probes = self.readers.chosen.is_multiple_of(PROBE_EVERY);
        let wait = |index: &MemberIndex| {
            let member = &self.members[index.0];
            let load = 1 + member.reads as u64 + member.sent.get().saturating_sub(member.received.get());
            let time = if probes { QUICK } else { member.read_time.max(QUICK) };
            (self.readers.slow == Some(*index), u128::from(load) * time.as_nanos())
        };
        (0..all)
            .map(|step| MemberIndex((start + step) % all))
            .filter(|index| excluded & 1 << index.0 == 0 && self.members[index.0].is_joined())
            .min_by_key(wait)
    }

    /// A member has answered a read.
    pub(super) fn note_read_time(&mut self, now: Monotonic, index: MemberIndex, asked: Monotonic) {
        let member = &mut self.members[index.0];
        member.read_time = smoothed(member.read_time, now.since(asked));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::MEMBERS_MAX;
    use super::*;

    #[test]
    fn answer_times_follow_what_is_measured() {
        let (slow, quick) = (Duration::from_millis(200), Duration::from_micros(100));
        assert_eq!(smoothed(Duration::ZERO, slow), slow, "the first counts whole");
        let after = |count: u32| (0..count).fold(slow, |time, _| smoothed(time, quick));
        assert!(after(8) > slow / 4, "a single quick answer says little");
        assert!(after(60) < QUICK, "many say it all");
    }

    #[test]
    fn every_member_has_its_turn_to_be_probed() {
        for members in 1..=MEMBERS_MAX as u64 {
            // Both go on by one with each read.
            let turns: BTreeSet<u64> = (1..=members).map(|probe| (probe * PROBE_EVERY - 1) % members).collect();
            assert_eq!(turns.len() as u64, members);
        }
    }
}
