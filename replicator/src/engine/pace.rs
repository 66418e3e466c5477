//! How fast copies may go: under a cap that the operator set, and a step back while the volume's own requests wait for the same disks.

use carrick_backing_store::ByteLength;

use super::{Engine, MemberIndex};
use crate::time::Monotonic;

/// Chunks under way per copy: enough to hide a round trip.
const CHUNKS_MAX: usize = 2;
/// While requests are under way: the disks' time goes to them.
const CHUNKS_BESIDE_REQUESTS: usize = 1;
/// Lowest cap, in bytes a second: a chunk takes a second then, far below what keeps a connection alive.
pub const COPY_RATE_MIN: ByteLength = ByteLength::new(1 << 20);
/// What is saved up while nothing is copied, in parts of a second's worth.
const SAVED: u64 = 10;

/// A token bucket that may be overdrawn by one chunk.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Option<ByteLength>,
    /// Bytes that may be copied now, if above zero.
    balance: i64,
    at: Monotonic,
}

impl Pace {
    pub(super) fn new(rate: Option<ByteLength>, now: Monotonic) -> Self {
        Self { rate: rate.map(|rate| rate.max(COPY_RATE_MIN)), balance: 0, at: now }
    }

    /// Whether a chunk may begin now.
    fn may_begin(&mut self, now: Monotonic) -> bool {
        let Some(rate) = self.rate else {
            self.balance = 0;
            return true;
        };
        let earned = u128::from(rate.get()) * now.since(self.at).as_micros() / 1_000_000;
        if earned > 0 {
            self.at = now;
            let most = i64::try_from(rate.get() / SAVED).unwrap_or(i64::MAX);
            self.balance = self.balance.saturating_add(i64::try_from(earned).unwrap_or(i64::MAX)).min(most);
        }
        self.balance >= 0
    }

    fn spend(&mut self, bytes: ByteLength) {
        if self.rate.is_some() {
            self.balance = self.balance.saturating_sub(i64::try_from(bytes.get()).unwrap_or(i64::MAX));
        }
    }

    /// When a chunk may begin, if one has to wait.
    fn next(&self) -> Option<Monotonic> {
        if self.balance >= 0 {
            return None;
        }
        let Some(rate) = self.rate else { return Some(self.at) };
        let micros = u128::from(self.balance.unsigned_abs()) * 1_000_000 / u128::from(rate.get()) + 1;
        Some(self.at + std::time::Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX)))
    }
}

impl Engine {
    /// Changes how many bytes are copied in a second at most (not below [`COPY_RATE_MIN`]); `None`: as many as go. Look at
    /// [`Engine::deadline`] afterwards.
    pub fn set_copy_rate(&mut self, rate: Option<ByteLength>) {
        self.pace.rate = rate.map(|rate| rate.max(COPY_RATE_MIN));
    }

    /// How many chunks may be under way in one copy. None before the next moment in [`Engine::copy_deadline`].
    pub(super) fn chunks_max(&mut self, now: Monotonic) -> usize {
        // Before serving, everybody waits for the copies.
        if !self.is_serving() {
            return CHUNKS_MAX;
        }
        match self.pace.may_begin(now) {
            true if self.requests.is_empty() => CHUNKS_MAX,
            true => CHUNKS_BESIDE_REQUESTS,
            false => 0,
        }
    }

    pub(super) fn spend_on_copy(&mut self, bytes: ByteLength) {
        if self.is_serving() {
            self.pace.spend(bytes);
        }
    }

    /// When copies that wait for their turn may go on.
    pub(super) fn copy_deadline(&self) -> Option<Monotonic> {
        self.pace.next().filter(|_| self.members.iter().any(|member| member.takes_writes() && member.copy.is_some()))
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
    fn in_the_long_run_the_rate_is_kept() {
        let begin = Monotonic::default();
        let rate = ByteLength::new(10 << 20);
        let mut pace = Pace::new(Some(rate), begin);
        let (mut now, mut bytes) = (begin, 0);
        while now.since(begin) < Duration::from_secs(60) {
            while pace.may_begin(now) {
                pace.spend(ByteLength::new(1 << 20));
                bytes += 1 << 20;
            }
            now = pace.next().unwrap();
        }
        assert!((590 << 20..=602 << 20).contains(&bytes), "{bytes} bytes in a minute");
    }

    #[test]
    fn little_is_saved_up_and_without_a_cap_nothing_waits() {
        let begin = Monotonic::default();
        let mut pace = Pace::new(Some(ByteLength::new(100 << 20)), begin);
        let later = begin + Duration::from_secs(3600);
        let mut chunks = 0;
        while pace.may_begin(later) {
            pace.spend(ByteLength::new(1 << 20));
            chunks += 1;
        }
        assert_eq!(chunks, 11, "a tenth of a second's worth, and one more");
        pace.rate = None;
        assert!(pace.next().is_some_and(|next| next <= later), "who waits for the cap goes on when it is lifted");
        assert!(pace.may_begin(later) && pace.next().is_none());
        let mut free = Pace::new(None, begin);
        free.spend(ByteLength::new(1 << 40));
        assert!(free.may_begin(begin) && free.next().is_none());
    }
}
