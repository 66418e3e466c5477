//! A token bucket: so much a second, and what was saved up at once. It counts units of one kind, such as bytes or requests, and may be
//! overdrawn by whatever is taken last: something larger than all that can be saved up passes, and what comes after waits longer.

use std::time::Duration;

use crate::time::Monotonic;

/// The balance is kept in billionths of a unit, so that a rate a second times nanoseconds is exact: many small steps lose nothing.
const SCALE: i128 = 1_000_000_000;

/// Sans-I/O: time is passed in.
#[derive(Debug)]
pub struct TokenBucket {
    /// Units earned in a second; `None`: nothing ever waits.
    rate: Option<u64>,
    /// Most units saved up.
    burst: u64,
    /// What may be taken now, if it is not below zero.
    balance: i128,
    /// Earned for until then.
    at: Monotonic,
}

impl TokenBucket {
    /// `rate` units a second (`None`: no limit), of which `burst` are saved up at most. Nothing is, so far.
    #[must_use]
    pub const fn new(rate: Option<u64>, burst: u64, now: Monotonic) -> Self {
        Self { rate, burst, balance: 0, at: now }
    }

    /// Changes both. What was earned since the last look is counted by the new rate, unless [`TokenBucket::may_take`] is asked
    /// before. A debt stays, and is paid at the new rate.
    pub fn set(&mut self, rate: Option<u64>, burst: u64) {
        self.rate = rate.map(|rate| rate.max(1));
        self.burst = burst;
        self.balance = self.balance.min(i128::from(burst).saturating_mul(SCALE));
    }

    /// Whether something may be taken now, however much.
    pub fn may_take(&mut self, now: Monotonic) -> bool {
        match self.rate {
            None => self.balance = 0,
            Some(rate) => {
                let nanos = i128::try_from(now.since(self.at).as_nanos()).unwrap_or(i128::MAX);
                let most = i128::from(self.burst).saturating_mul(SCALE);
                self.balance = self.balance.saturating_add(i128::from(rate).saturating_mul(nanos)).min(most);
            }
        }
        self.at = self.at.max(now);
        self.balance >= 0
    }

    /// Takes so many units.
    pub fn take(&mut self, units: u64) {
        if self.rate.is_some() {
            self.balance = self.balance.saturating_sub(i128::from(units).saturating_mul(SCALE));
        }
    }

    /// When something may be taken again; `None`: it may be at once.
    #[must_use]
    pub fn next(&self) -> Option<Monotonic> {
        if self.balance >= 0 {
            return None;
        }
        // Whoever waited for a rate that is lifted goes on.
        let Some(rate) = self.rate else { return Some(self.at) };
        let nanos = self.balance.unsigned_abs().div_ceil(u128::from(rate));
        Some(self.at + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes `units` at a time as soon as it may, for so long; how often it did.
    fn drain(bucket: &mut TokenBucket, begin: Monotonic, time: Duration, units: u64) -> u64 {
        let (mut now, mut count) = (begin, 0);
        while now.since(begin) < time {
            while bucket.may_take(now) {
                bucket.take(units);
                count += 1;
            }
            now = bucket.next().unwrap();
        }
        count
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn the_rate_is_exact_also_where_a_unit_takes_no_whole_number_of_nanoseconds() {
        for rate in [1, 3, 7, 500, 999, 20_011] {
            let begin = Monotonic::new(Duration::from_nanos(12_345));
            assert_eq!(drain(&mut TokenBucket::new(Some(rate), 1, begin), begin, MINUTE, 1), 60 * rate, "{rate} a second");
        }
        let begin = Monotonic::default();
        assert_eq!(drain(&mut TokenBucket::new(Some(10 << 20), 1, begin), begin, MINUTE, 1 << 20), 600, "of a MiB each");
    }

    #[test]
    fn looking_often_earns_nothing_and_loses_nothing() {
        let begin = Monotonic::default();
        let mut bucket = TokenBucket::new(Some(500), 500, begin);
        let mut taken = 0;
        for step in 0..100_000_u64 {
            // 10 s in steps of 100 µs, each far below what one unit takes.
            if bucket.may_take(begin + Duration::from_micros(100 * step)) {
                bucket.take(1);
                taken += 1;
            }
        }
        assert_eq!(taken, 5000);
    }

    #[test]
    fn what_is_saved_up_is_bounded_and_comes_on_top_of_the_rate() {
        let begin = Monotonic::default();
        let mut bucket = TokenBucket::new(Some(100), 30, begin);
        let later = begin + Duration::from_secs(3600);
        assert_eq!(drain(&mut bucket, later, Duration::from_secs(1), 1), 130);
        let huge = Monotonic::new(Duration::from_secs(u64::MAX / 2));
        let mut fastest = TokenBucket::new(Some(u64::MAX), u64::MAX, begin);
        assert!(fastest.may_take(huge), "no overflow");
        fastest.take(u64::MAX);
        assert!(fastest.may_take(huge));
    }

    #[test]
    fn what_is_larger_than_the_burst_passes_and_is_paid_for_afterwards() {
        let begin = Monotonic::default();
        let mut bucket = TokenBucket::new(Some(1000), 10, begin);
        assert!(bucket.may_take(begin));
        bucket.take(5000);
        assert!(!bucket.may_take(begin + Duration::from_millis(4999)));
        assert_eq!(bucket.next(), Some(begin + Duration::from_secs(5)));
        assert!(bucket.may_take(begin + Duration::from_secs(5)));
    }

    #[test]
    fn a_debt_is_paid_at_the_new_rate_and_forgotten_without_one() {
        let begin = Monotonic::default();
        let mut bucket = TokenBucket::new(Some(10), 0, begin);
        assert!(bucket.may_take(begin));
        bucket.take(100);
        bucket.set(Some(1000), 0);
        assert_eq!(bucket.next(), Some(begin + Duration::from_millis(100)));
        bucket.set(None, 0);
        assert_eq!(bucket.next(), Some(begin));
        assert!(bucket.may_take(begin) && bucket.next().is_none());
        bucket.take(u64::MAX);
        assert!(bucket.may_take(begin), "without a rate nothing is counted");
    }

    #[test]
    fn a_lower_burst_takes_away_what_was_saved_up_above_it() {
        let begin = Monotonic::default();
        let later = begin + Duration::from_secs(100);
        let mut bucket = TokenBucket::new(Some(10), 500, begin);
        assert!(bucket.may_take(later));
        bucket.set(Some(10), 5);
        assert_eq!(drain(&mut bucket, later, Duration::from_secs(1), 1), 15);
    }
}
