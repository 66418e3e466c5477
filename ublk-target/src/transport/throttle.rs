//! Who may go on now under the volume's limits: first come, first served.
//!
//! Sans-I/O: time is passed in. Rules:
//! * Without limits nobody waits, and nothing is counted.
//! * A flush never waits and is no request here: what it waits for is done already, and the volume's user waits for it alone.
//! * A discard or zeroes are one request without bytes.
//! * Reads and writes stand in one line. Whoever is first goes as soon as neither limit is overdrawn, however large it is; those
//!   behind it wait for what it took too much.
//! * While somebody waits nothing is lost: who is called late goes as of the time when it was his turn.

use std::collections::VecDeque;
use std::time::Duration;

use carrick_replicator::bucket::TokenBucket;
use carrick_replicator::limits::{Delays, Limits, Requests};
use carrick_replicator::time::Monotonic;

use super::descriptor::{Asked, Operation};

#[derive(Clone, Copy, Debug)]
struct Held {
    tag: u16,
    bytes: u32,
    since: Monotonic,
}

/// The limits of one volume, and the requests that wait for them, by tag.
#[derive(Debug)]
pub struct Throttle {
    is_on: bool,
    requests: TokenBucket,
    bytes: TokenBucket,
    waiting: VecDeque<Held>,
    delayed: u64,
    delay: Duration,
}

impl Default for Throttle {
    /// Without limits.
    fn default() -> Self {
        // Without them time doesn't matter.
        let unlimited = || TokenBucket::new(None, 0, Monotonic::default());
        Self { is_on: false, requests: unlimited(), bytes: unlimited(), waiting: VecDeque::new(), delayed: 0, delay: Duration::ZERO }
    }
}

impl Throttle {
    /// Whether there are limits: if not, [`Throttle::take`] need not be asked.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.is_on
    }

    /// From now on these limits, for a queue of `depth` tags. Ask [`Throttle::next`] until `None` afterwards: requests that wait
    /// may have their turn.
    pub fn set(&mut self, now: Monotonic, limits: &Limits, depth: u16) {
        // By the old ones, up to now.
        self.requests.may_take(now);
        self.bytes.may_take(now);
        self.requests.set(limits.iops.map(Requests::get), limits.requests_at_once().get());
        self.bytes.set(limits.bandwidth.map(|bytes| bytes.get()), limits.bytes_at_once().get());
        self.is_on = !limits.are_none();
        if self.is_on {
            self.waiting.reserve_exact(usize::from(depth) - self.waiting.len().min(depth.into()));
        }
    }

    /// Asks whether a request may go on. If false, [`Throttle::next`] names its tag later.
    #[must_use]
    pub fn take(&mut self, now: Monotonic, tag: u16, asked: Asked) -> bool {
        if asked.operation == Operation::Flush {
            return true;
        }
        let bytes = asked.data_bytes();
        let may_go = self.waiting.is_empty() && self.may_take(now);
        if may_go {
            self.spend(bytes);
        } else {
            self.waiting.push_back(Held { tag, bytes, since: now });
        }
        may_go
    }

    /// A tag that waited and may go on now.
    pub fn next(&mut self, now: Monotonic) -> Option<u16> {
        let due = self.due().filter(|due| *due <= now)?;
        let held = self.waiting.pop_front()?;
        self.may_take(due);
        self.spend(held.bytes);
        self.delayed += 1;
        self.delay += now.since(held.since);
        Some(held.tag)
    }

    /// When [`Throttle::next`] has something; `None` while nobody waits.
    #[must_use]
    pub fn due(&self) -> Option<Monotonic> {
        let first = self.waiting.front()?;
        [self.requests.next(), self.bytes.next()].into_iter().flatten().chain([first.since]).max()
    }

    /// Whether somebody waits.
    #[must_use]
    pub fn holds_any(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// What the limits have done so far.
    #[must_use]
    pub fn delays(&self) -> Delays {
        Delays {
            requests: self.delayed,
            micros: u64::try_from(self.delay.as_micros()).unwrap_or(u64::MAX),
            waiting: u32::try_from(self.waiting.len()).unwrap_or(u32::MAX),
        }
    }

    fn may_take(&mut self, now: Monotonic) -> bool {
        // Both, so that both earn.
        let (requests, bytes) = (self.requests.may_take(now), self.bytes.may_take(now));
        requests && bytes
    }

    fn spend(&mut self, bytes: u32) {
        self.requests.take(1);
        self.bytes.take(bytes.into());
    }
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::{ByteLength, ByteOffset, Extent};

    use super::*;

    const START: Monotonic = Monotonic::new(Duration::ZERO);
    const KIB4: u64 = 4 << 10;
    const MIB: u64 = 1 << 20;
    const READ: Operation = Operation::Read;
    const WRITE: Operation = Operation::Write { fua: false };

    fn asked(operation: Operation, bytes: u64) -> Asked {
        Asked { operation, extent: Extent::new(ByteOffset::ZERO, ByteLength::new(bytes)).unwrap() }
    }

    fn iops(iops: u64, burst: u64) -> Limits {
        Limits { iops: Some(Requests::new(iops)), iops_burst: Some(Requests::new(burst)), ..Limits::default() }
    }

    fn bandwidth(rate: u64, burst: u64) -> Limits {
        let (rate, burst) = (Some(ByteLength::new(rate)), Some(ByteLength::new(burst)));
        Limits { bandwidth: rate, bandwidth_burst: burst, ..Limits::default() }
    }

    fn both(iops: Limits, bandwidth: Limits) -> Limits {
        Limits { iops: iops.iops, iops_burst: iops.iops_burst, ..bandwidth }
    }

    fn at(millis: u64) -> Monotonic {
        Monotonic::new(Duration::from_millis(millis))
    }

    /// A queue that is always full of one kind of request, each answered at once.
    struct Load {
        throttle: Throttle,
        depth: u16,
        kind: fn(u16) -> Asked,
        /// How late the clock's calls are.
        late: Duration,
    }

    impl Load {
        fn new(limits: Limits, kind: fn(u16) -> Asked) -> Self {
            let mut throttle = Throttle::default();
            throttle.set(START, &limits, 8);
            Self { throttle, depth: 8, kind, late: Duration::ZERO }
        }

        fn begin(&mut self, now: Monotonic) -> Vec<u16> {
            let depth = self.depth;
            (0..depth).flat_map(|tag| self.ask(now, tag)).collect()
        }

        /// A tag asks until it has to wait; how often it went on. Bounded, for times when nothing is limited.
        fn ask(&mut self, now: Monotonic, tag: u16) -> Vec<u16> {
            let mut passed = Vec::new();
            while passed.len() < 100_000 && self.throttle.take(now, tag, (self.kind)(tag)) {
                passed.push(tag);
            }
            passed
        }

        /// Goes on to `end`; the tags that went on, in order.
        fn run(&mut self, end: Monotonic) -> Vec<u16> {
            let mut passed = Vec::new();
            while let Some(due) = self.throttle.due().filter(|due| *due < end) {
                let now = due + self.late;
                while let Some(tag) = self.throttle.next(now) {
                    passed.push(tag);
                    passed.extend(self.ask(now, tag));
                }
            }
            passed
        }
    }

    fn small_read(_: u16) -> Asked {
        asked(READ, KIB4)
    }

    fn large_write(_: u16) -> Asked {
        asked(WRITE, MIB)
    }

    #[test]
    fn without_limits_nobody_waits_and_nothing_is_to_be_done() {
        let mut throttle = Throttle::default();
        assert!(!throttle.is_on());
        for tag in 0..512 {
            assert!(throttle.take(START, tag, large_write(tag)));
        }
        assert_eq!((throttle.due(), throttle.next(at(1)), throttle.delays()), (None, None, Delays::default()));
    }

    #[test]
    fn over_any_time_exactly_the_rate_goes_on() {
        let mut load = Load::new(iops(500, 1), small_read);
        let begun = load.begin(START).len();
        assert_eq!(begun + load.run(at(10_000)).len(), 5000);
        let mut load = Load::new(bandwidth(10 * MIB, 1), large_write);
        let begun = load.begin(START).len();
        assert_eq!(begun + load.run(at(60_000)).len(), 600);
        // The lower of both counts: 4 KiB each, 256 a MiB.
        let mut load = Load::new(both(iops(500, 1), bandwidth(MIB, 1)), small_read);
        let begun = load.begin(START).len();
        assert_eq!(begun + load.run(at(10_000)).len(), 2560);
        let mut load = Load::new(both(iops(100, 1), bandwidth(MIB, 1)), small_read);
        let begun = load.begin(START).len();
        assert_eq!(begun + load.run(at(10_000)).len(), 1000);
    }

    #[test]
    fn a_clock_that_calls_late_costs_nothing_of_the_rate() {
        let mut load = Load::new(iops(1000, 1), small_read);
        load.late = Duration::from_micros(1700);
        let begun = load.begin(START).len();
        let passed = begun + load.run(at(10_000)).len();
        assert!((9_998..=10_002).contains(&passed), "{passed} in 10 s");
    }

    #[test]
    fn after_a_pause_the_burst_comes_on_top_and_no_more() {
        let mut load = Load::new(iops(100, 30), small_read);
        let begun = load.begin(at(3_600_000)).len();
        assert_eq!(begun, 31, "the burst, and one that overdraws it");
        assert_eq!(begun + load.run(at(3_610_000)).len(), 30 + 1000);
        // Nothing was saved up under load.
        assert_eq!(load.run(at(3_620_000)).len(), 1000);
    }

    #[test]
    fn a_request_larger_than_the_burst_passes_and_the_next_pays() {
        let mut throttle = Throttle::default();
        throttle.set(START, &bandwidth(MIB, 4096), 8);
        assert!(throttle.take(at(0), 1, asked(WRITE, MIB)));
        assert!(!throttle.take(at(0), 2, asked(READ, 512)));
        assert_eq!(throttle.due(), Some(at(1000)));
        assert_eq!(throttle.next(at(999)), None);
        assert_eq!(throttle.next(at(1000)), Some(2));
        assert_eq!(throttle.due(), None, "no timer when nobody waits");
    }

    #[test]
    fn reads_and_writes_stand_in_one_line_and_flushes_in_none() {
        let mut load = Load::new(iops(100, 1), |tag| asked(if tag % 2 == 0 { READ } else { WRITE }, if tag % 2 == 0 { KIB4 } else { MIB }));
        load.begin(START);
        let order: Vec<u16> = load.run(at(800));
        let round = [0, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(order.len(), 79);
        assert!(order.chunks(8).all(|chunk| *chunk == round[..chunk.len()]), "{order:?}");
        for _ in 0..1000 {
            assert!(load.throttle.take(at(800), 9, asked(Operation::Flush, 0)), "before those that wait");
        }
        assert_eq!(load.run(at(1800)).len(), 100, "and costs them nothing");
    }

    #[test]
    fn discards_and_zeroes_are_requests_without_bytes() {
        for operation in [Operation::Discard, Operation::WriteZeroes { fua: true }] {
            let mut throttle = Throttle::default();
            throttle.set(START, &both(iops(10, 1), bandwidth(MIB, 1)), 8);
            assert!(throttle.take(at(0), 0, asked(operation, 1 << 30)));
            assert!(!throttle.take(at(0), 1, asked(operation, 1 << 30)));
            assert_eq!(throttle.due(), Some(at(100)), "of 10 a second");
        }
    }

    #[test]
    fn limits_change_at_once_for_those_who_wait() {
        let mut load = Load::new(iops(500, 1), small_read);
        let begun = load.begin(START).len();
        assert_eq!(begun + load.run(at(2000)).len(), 1000);
        load.throttle.set(at(2000), &iops(1000, 1), 8);
        assert_eq!(load.run(at(4000)).len(), 2000);
        // A debt of a second is paid in 10 ms at the hundredfold rate.
        let mut throttle = Throttle::default();
        throttle.set(START, &bandwidth(MIB, 1), 8);
        assert!(throttle.take(at(0), 0, asked(WRITE, MIB)));
        assert!(!throttle.take(at(0), 1, asked(WRITE, MIB)));
        throttle.set(at(0), &bandwidth(100 * MIB, 1), 8);
        assert_eq!(throttle.due(), Some(at(10)));
    }

    #[test]
    fn when_limits_are_lifted_everybody_goes_at_once_in_order() {
        let mut throttle = Throttle::default();
        throttle.set(START, &both(iops(10, 1), bandwidth(MIB, 1)), 512);
        for tag in 0..512 {
            assert_eq!(throttle.take(at(0), tag, asked(WRITE, MIB)), tag == 0);
        }
        assert_eq!(throttle.delays().waiting, 511);
        throttle.set(at(500), &Limits::default(), 512);
        let all: Vec<u16> = std::iter::from_fn(|| throttle.next(at(500))).collect();
        assert_eq!(all, (1..512).collect::<Vec<_>>());
        assert!(!throttle.is_on() && !throttle.holds_any());
        assert_eq!(throttle.delays(), Delays { requests: 511, micros: 511 * 500_000, waiting: 0 });
        // What comes back later begins with nothing saved up.
        throttle.set(at(900_000), &iops(10, 100), 512);
        assert!(throttle.take(at(900_000), 0, asked(READ, 512)));
        assert!(!throttle.take(at(900_000), 1, asked(READ, 512)));
    }

    #[test]
    fn one_limit_lifted_leaves_the_other() {
        let mut throttle = Throttle::default();
        throttle.set(START, &both(iops(10, 1), bandwidth(MIB, 1)), 8);
        assert!(throttle.take(at(0), 0, asked(WRITE, MIB)));
        assert!(!throttle.take(at(0), 1, asked(WRITE, MIB)));
        throttle.set(at(0), &iops(10, 1), 8);
        assert_eq!(throttle.due(), Some(at(100)));
    }

    #[test]
    fn waiting_allocates_nothing_once_limits_are_set() {
        let mut throttle = Throttle::default();
        throttle.set(START, &iops(10, 1), 512);
        let capacity = throttle.waiting.capacity();
        for round in 0..100_u64 {
            for tag in 0..512 {
                let _ = throttle.take(at(round * 60_000), tag, small_read(tag));
            }
            while throttle.next(at((round + 1) * 60_000 - 1)).is_some() {}
        }
        assert_eq!(throttle.waiting.capacity(), capacity);
    }
}
