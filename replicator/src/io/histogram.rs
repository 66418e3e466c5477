//! Latencies in a table of fixed size: 64 steps per power of two, so a reading is at most 1.6 % off.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Steps per power of two, as a power of two.
const STEP_BITS: u32 = 6;
const STEPS: usize = 1 << STEP_BITS;
/// Everything from 2^40 ns (18 minutes) on counts as that.
const NANOS_BITS: u32 = 40;
const BUCKETS: usize = (NANOS_BITS - STEP_BITS + 1) as usize * STEPS;

/// How often each latency occurred.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    max: Duration,
}

/// What people ask of a histogram, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Half took no longer.
    pub p50_us: f64,
    /// 99 % took no longer.
    pub p99_us: f64,
    /// 99.9 % took no longer.
    pub p99_9_us: f64,
    /// None took longer.
    pub max_us: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into_boxed_slice(), total: 0, max: Duration::ZERO }
    }
}

impl Histogram {
    /// One more.
    pub fn record(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).min((1 << NANOS_BITS) - 1);
        self.counts[bucket(nanos)] += 1;
        self.total += 1;
        self.max = self.max.max(latency);
    }

    /// How many.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// A latency that this share of all (in thousandths) did not exceed.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> Duration {
        let rank = (self.total * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(upper(index)).min(self.max);
            }
        }
        self.max
    }

    /// The usual numbers.
    #[must_use]
    pub fn summary(&self) -> LatencySummary {
        let micros = |latency: Duration| latency.as_secs_f64() * 1e6;
        LatencySummary {
            p50_us: micros(self.quantile(500)),
            p99_us: micros(self.quantile(990)),
            p99_9_us: micros(self.quantile(999)),
            max_us: micros(self.max),
        }
    }
}

/// Below 64 ns every value has its bucket; above, the 7 highest bits decide.
const fn bucket(nanos: u64) -> usize {
    let shift = (u64::BITS - nanos.leading_zeros()).saturating_sub(STEP_BITS + 1);
    shift as usize * STEPS + (nanos >> shift) as usize
}

/// The largest value of a bucket.
const fn upper(index: usize) -> u64 {
    if index < 2 * STEPS {
        return index as u64;
    }
    let shift = index / STEPS - 1;
    (((index - shift * STEPS + 1) as u64) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_every_value_in_order_and_closely() {
        let mut last = 0;
        for nanos in (0..5000).chain((13..40).flat_map(|bits| [(1_u64 << bits) - 1, 1 << bits, (1 << bits) + 1])) {
            let index = bucket(nanos);
            assert!(index < BUCKETS && index >= last, "{nanos}");
            last = index;
            let upper = upper(index);
            assert!(upper >= nanos && upper - nanos <= nanos / 64, "{nanos} is in a bucket up to {upper}");
        }
        assert_eq!(bucket((1 << NANOS_BITS) - 1), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_those_of_the_values() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(500), Duration::ZERO);
        (1..=1000).for_each(|micros| histogram.record(Duration::from_micros(micros)));
        let summary = histogram.summary();
        for (got, wanted) in [(summary.p50_us, 500.0), (summary.p99_us, 990.0), (summary.p99_9_us, 999.0), (summary.max_us, 1000.0)] {
            assert!((got - wanted).abs() <= wanted / 50.0, "{got} for {wanted}");
        }
    }
}
