//! How fast copies may go: under a cap that the operator set, and a step back while the volume's own requests wait for the same disks.

use carrick_backing_store::ByteLength;

use super::{Engine, MemberIndex};
use crate::bucket::TokenBucket;
use crate::time::Monotonic;

/// Chunks under way per copy: enough to hide a round trip.
const CHUNKS_MAX: usize = 2;
/// While requests are under way: the disks' time goes to them.
const CHUNKS_BESIDE_REQUESTS: usize = 1;
/// Lowest cap, in bytes a second: a chunk takes a second then, far below what keeps a connection alive.
pub const COPY_RATE_MIN: ByteLength = ByteLength::new(1 << 20);
/// What is saved up while nothing is copied, in parts of a second's worth.
const SAVED: u64 = 10;

/// Copies' own bucket: it may be overdrawn by one chunk.
#[derive(Debug)]
pub(super) struct Pace(TokenBucket);

impl Pace {
    pub(super) fn new(rate: Option<ByteLength>, now: Monotonic) -> Self {
        let (rate, saved) = rate_and_saved(rate);
        Self(TokenBucket::new(rate, saved, now))
    }

    fn set(&mut self, rate: Option<ByteLength>) {
        let (rate, saved) = rate_and_saved(rate);
        self.0.set(rate, saved);
    }
}

/// Bytes a second, and how many are saved up at most.
fn rate_and_saved(rate: Option<ByteLength>) -> (Option<u64>, u64) {
    let rate = rate.map(|rate| rate.max(COPY_RATE_MIN).get());
    (rate, rate.unwrap_or_default() / SAVED)
}

impl Engine {
    /// Changes how many bytes are copied in a second at most (not below [`COPY_RATE_MIN`]); `None`: as many as go. Look at
    /// [`Engine::deadline`] afterwards.
    pub fn set_copy_rate(&mut self, rate: Option<ByteLength>) {
        self.pace.set(rate);
    }

    /// How many chunks may be under way in one copy. None before the next moment in [`Engine::copy_deadline`].
    pub(super) fn chunks_max(&mut self, now: Monotonic) -> usize {
        // Before serving, everybody waits for the copies.
        if !self.is_serving() {
            return CHUNKS_MAX;
        }
        match self.pace.0.may_take(now) {
            true if self.requests.is_empty() => CHUNKS_MAX,
            true => CHUNKS_BESIDE_REQUESTS,
            false => 0,
        }
    }

    pub(super) fn spend_on_copy(&mut self, bytes: ByteLength) {
        if self.is_serving() {
            self.pace.0.take(bytes.get());
        }
    }

    /// When copies that wait for their turn may go on.
    pub(super) fn copy_deadline(&self) -> Option<Monotonic> {
        self.pace.0.next().filter(|_| self.members.iter().any(|member| member.takes_writes() && member.copy.is_some()))
    }

    /// Starts what may begin now in all copies.
    pub(super) fn advance_copies(&mut self, now: Monotonic) {
        for index in self.member_indices().collect::<Vec<MemberIndex>>() {
            if self.members[index.0].takes_writes() && self.members[index.0].copy.is_some() {
                self.advance_copy(now, index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn little_is_saved_up_and_without_a_cap_nothing_waits() {
        let begin = Monotonic::default();
        let mut pace = Pace::new(Some(ByteLength::new(100 << 20)), begin);
        let later = begin + Duration::from_secs(3600);
        let mut chunks = 0;
        while pace.0.may_take(later) {
            pace.0.take(1 << 20);
            chunks += 1;
        }
        assert_eq!(chunks, 11, "a tenth of a second's worth, and one more");
        pace.set(None);
        assert!(pace.0.next().is_some_and(|next| next <= later), "who waits for the cap goes on when it is lifted");
        assert!(pace.0.may_take(later) && pace.0.next().is_none());
    }

    #[test]
    fn a_cap_below_the_least_is_the_least() {
        let begin = Monotonic::default();
        let mut pace = Pace::new(Some(ByteLength::new(1)), begin);
        assert!(pace.0.may_take(begin));
        pace.0.take(1 << 20);
        assert_eq!(pace.0.next(), Some(begin + Duration::from_secs(1)));
    }
}
