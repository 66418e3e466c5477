//! Whom to read from: the replica that will answer first, as far as one can tell.

use std::time::Duration;

use super::{Engine, MemberIndex};
use crate::time::Monotonic;

/// Answer times below this count as equal: then reads go round, and every disk gets its share.
const QUICK: Duration = Duration::from_micros(200);
/// One read in so many goes to whoever has least to do, quick or not, to learn whether a slow one has become quick. Few enough not to
/// show in the slowest hundredth of all reads.
const PROBE_EVERY: u64 = 256;
/// How much of the smoothed answer time the last one makes: a share of one in so many.
const SMOOTHING: u32 = 8;

#[derive(Debug, Default)]
pub(super) struct Readers {
    /// Reads that were given to somebody.
    chosen: u64,
    next: usize,
}

/// The smoothed time, after another answer took so long.
fn smoothed(before: Duration, last: Duration) -> Duration {
    if before.is_zero() { last } else { (before * (SMOOTHING - 1) + last) / SMOOTHING }
}

impl Engine {
    /// The member to read from: joined, not excluded (a bit each), and the first to answer by what it has to do and how long it took
    /// lately. None while no majority is joined: another primary may have taken over then.
    pub(super) fn best_reader(&mut self, excluded: u8) -> Option<MemberIndex> {
        if !self.is_majority(|_, member| member.is_joined()) {
            return None;
        }
        let all = self.members.len();
        let start = self.readers.next;
        self.readers.next = (start + 1) % all;
        self.readers.chosen += 1;
        let probes = self.readers.chosen.is_multiple_of(PROBE_EVERY);
        let wait = |index: &MemberIndex| {
            let member = &self.members[index.0];
            let load = 1 + member.reads as u64 + member.sent.get().saturating_sub(member.received.get());
            let time = if probes { QUICK } else { member.read_time.max(QUICK) };
            (self.slow_reader == Some(*index), u128::from(load) * time.as_nanos())
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
    use super::*;

    #[test]
    fn answer_times_follow_what_is_measured() {
        let (slow, quick) = (Duration::from_millis(200), Duration::from_micros(100));
        assert_eq!(smoothed(Duration::ZERO, slow), slow, "the first counts whole");
        let after = |count: u32| (0..count).fold(slow, |time, _| smoothed(time, quick));
        assert!(after(8) > slow / 4, "a single quick answer says little");
        assert!(after(60) < QUICK, "many say it all");
    }
}
