//! A load generator: the front end of `carrick bench`, and of tests that check what they read.
//!
//! It is deterministic by its seed, but for the order in which requests end. Verification knows the content of a unit (one
//! request's worth of bytes) from the seed, the unit's number and how often it was written, so that it needs four bytes per
//! unit and no copy of the data. While it verifies, no unit is in two requests at once.

use std::io;
use std::time::{Duration, Instant};

use carrick_backing_store::{BufferPool, ByteLength, ByteOffset, Extent, SharedBuffer, Term};
use io_uring::opcode;
use io_uring::types::Timespec;
use serde::{Deserialize, Serialize};

use super::front_end::FrontEnd;
use super::histogram::{Histogram, LatencySummary};
use super::reactor::{Completed, Reactor, Source};
use crate::engine::{Engine, ReadBytes, Request, RequestError, RequestTag, Response};

/// Largest request, in bytes: the engine's limit.
const UNIT_MAX: u64 = 1 << 20;
/// Most requests at once.
const DEPTH_MAX: usize = 4096;

/// Tokens of [`Source::FrontEnd`].
const BEGIN: u64 = 0;
const TIME_IS_UP: u64 = 1;

/// What a unit's version means that is not a count.
const UNKNOWN: u32 = u32::MAX;

/// In which order units are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoadPattern {
    /// Any unit, each as likely as the others.
    Random,
    /// One after the other, and again from the start.
    Sequential,
}

/// When it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoadLimit {
    /// After so many requests.
    Requests(u64),
    /// After so much time; requests in flight then are still waited for.
    Time(Duration),
}

/// What is checked of the bytes that reads give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verification {
    /// Nothing.
    Off,
    /// Units that this load has written must read as written.
    OwnWrites,
    /// And all others as zeros: the volume is new.
    FromZeroes,
}

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadSpec {
    /// The part of the volume that is used.
    pub region: Extent,
    /// Bytes per request: a multiple of 512 up to 1 MiB.
    pub unit: ByteLength,
    /// Requests at once.
    pub depth: usize,
    /// How many of 100 requests are writes.
    pub write_percent: u8,
    /// In which order.
    pub pattern: LoadPattern,
    /// Until when.
    pub limit: LoadLimit,
    /// What is checked.
    pub verify: Verification,
    /// Where all that is random comes from.
    pub seed: u64,
}

/// A load that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadSpecError {
    /// Of the request size.
    #[error("a request of {0} bytes: give a multiple of 512 from 512 to {UNIT_MAX}")]
    Unit(ByteLength),
    /// Of the depth.
    #[error("depth {0}: give 1 to {DEPTH_MAX}")]
    Depth(usize),
    /// Of the mixture.
    #[error("{0} % writes: give 0 to 100")]
    WritePercent(u8),
    /// Of the region.
    #[error("the region {region} has room for {units} requests of this size, {needed} are needed")]
    Region {
        /// The region.
        region: Extent,
        /// How many fit.
        units: u64,
        /// How many must.
        needed: u64,
    },
}

/// What came of one kind of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OperationReport {
    /// How many ended well.
    pub count: u64,
    /// Per second.
    pub iops: f64,
    /// Of data, per second.
    pub mib_per_second: f64,
    /// How long they took.
    pub latency: LatencySummary,
}

/// What came of a load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// From the first request to the last response.
    pub seconds: f64,
    /// Reads.
    pub reads: OperationReport,
    /// Writes.
    pub writes: OperationReport,
    /// Requests that ended badly.
    pub errors: u64,
    /// Reads that gave other bytes than they had to.
    pub mismatches: u64,
    /// The first of the errors and mismatches, in words.
    pub first_failure: Option<String>,
}

/// One request's place.
#[derive(Clone, Copy, Debug)]
struct Slot {
    unit: u64,
    is_write: bool,
    started: Instant,
}

/// The front end.
#[derive(Debug)]
pub struct Load {
    spec: LoadSpec,
    pool: BufferPool,
    random: XorShift,
    units: u64,
    next_unit: u64,
    /// By tag.
    slots: Vec<Slot>,
    free: Vec<usize>,
    issued: u64,
    may_issue: bool,
    serving: bool,
    /// How often each unit was written; empty without verification.
    versions: Vec<u32>,
    in_flight: Vec<bool>,
    /// What is written when nobody checks.
    filler: SharedBuffer,
    reads: Histogram,
    writes: Histogram,
    errors: u64,
    mismatches: u64,
    first_failure: Option<String>,
    began: Option<Instant>,
    ended: Option<Instant>,
    /// The ring reads it when the timer is submitted.
    time: Box<Timespec>,
}

impl Load {
    /// Checks and prepares a load. Data comes from `pool`.
    ///
    /// # Errors
    /// [`LoadSpecError`] names the field.
    pub fn new(spec: LoadSpec, pool: BufferPool) -> Result<Self, LoadSpecError> {
        let unit = spec.unit.get();
        if unit == 0 || !unit.is_multiple_of(512) || unit > UNIT_MAX {
            return Err(LoadSpecError::Unit(spec.unit));
        }
        if spec.depth == 0 || spec.depth > DEPTH_MAX {
            return Err(LoadSpecError::Depth(spec.depth));
        }
        if spec.write_percent > 100 {
            return Err(LoadSpecError::WritePercent(spec.write_percent));
        }
        let verifies = spec.verify != Verification::Off;
        let units = spec.region.length().get() / unit;
        // With as many units as requests, one that isn't in flight is always to be found.
        let needed = if verifies { spec.depth as u64 } else { 1 };
        if units < needed {
            return Err(LoadSpecError::Region { region: spec.region, units, needed });
        }
        let mut random = XorShift::new(spec.seed);
        let mut filler = pool.take(usize::try_from(unit).unwrap_or(0));
        filler.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
        let checked = if verifies { usize::try_from(units).unwrap_or(usize::MAX) } else { 0 };
        let mut load = Self {
            spec,
            pool,
            random,
            units,
            next_unit: 0,
            slots: Vec::new(),
            free: Vec::new(),
            issued: 0,
            may_issue: true,
            serving: false,
            versions: vec![0; checked],
            in_flight: vec![false; checked],
            filler: filler.share(),
            reads: Histogram::default(),
            writes: Histogram::default(),
            errors: 0,
            mismatches: 0,
            first_failure: None,
            began: None,
            ended: None,
            time: Box::new(Timespec::new()),
        };
        load.restart(spec);
        Ok(load)
    }

    /// Another load that remembers what this one has written, to read it again: region, unit and verification stay.
    #[must_use]
    pub fn again(mut self, spec: LoadSpec) -> Self {
        self.restart(LoadSpec { region: self.spec.region, unit: self.spec.unit, verify: self.spec.verify, ..spec });
        self
    }

    fn restart(&mut self, spec: LoadSpec) {
        self.spec = spec;
        let depth = spec.depth.clamp(1, DEPTH_MAX);
        self.slots = vec![Slot { unit: 0, is_write: false, started: Instant::now() }; depth];
        self.free = (0..depth).collect();
        (self.issued, self.next_unit, self.may_issue, self.serving) = (0, 0, true, false);
        (self.reads, self.writes) = (Histogram::default(), Histogram::default());
        (self.errors, self.mismatches, self.first_failure) = (0, 0, None);
        (self.began, self.ended) = (None, None);
    }

    /// What came of it.
    #[must_use]
    pub fn report(&self) -> LoadReport {
        let seconds = match (self.began, self.ended) {
            (Some(began), Some(ended)) => ended.duration_since(began).as_secs_f64(),
            _ => 0.0,
        };
        let of = |histogram: &Histogram| {
            let count = histogram.total();
            // Counts stay far below 2^53, where a float is still exact.
            let iops = if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
            let mib_per_second = iops * self.spec.unit.get() as f64 / f64::from(1 << 20);
            OperationReport { count, iops, mib_per_second, latency: histogram.summary() }
        };
        LoadReport {
            seconds,
            reads: of(&self.reads),
            writes: of(&self.writes),
            errors: self.errors,
            mismatches: self.mismatches,
            first_failure: self.first_failure.clone(),
        }
    }

    fn fill(&mut self, requests: &mut Vec<(RequestTag, Request)>) {
        while self.may_issue && !self.is_used_up() {
            let Some(index) = self.free.pop() else { return };
            let unit = self.choose();
            let is_write = self.random.below(100) < u64::from(self.spec.write_percent);
            let request = self.request(unit, is_write);
            let started = Instant::now();
            self.began.get_or_insert(started);
            self.slots[index] = Slot { unit, is_write, started };
            self.issued += 1;
            requests.push((RequestTag(index as u64), request));
        }
    }

    fn is_used_up(&self) -> bool {
        matches!(self.spec.limit, LoadLimit::Requests(requests) if self.issued >= requests)
    }

    fn choose(&mut self) -> u64 {
        let mut unit = match self.spec.pattern {
            LoadPattern::Random => self.random.below(self.units),
            LoadPattern::Sequential => self.next_unit,
        };
        while self.in_flight.get(index(unit)).is_some_and(|in_flight| *in_flight) {
            unit = (unit + 1) % self.units;
        }
        self.next_unit = (unit + 1) % self.units;
        unit
    }

    fn request(&mut self, unit: u64, is_write: bool) -> Request {
        let length = self.spec.unit;
        let offset = ByteOffset::new(self.spec.region.offset().get() + unit * length.get());
        // Within the region, whose end was checked.
        let extent = Extent::new(offset, length).unwrap_or(self.spec.region);
        if let Some(in_flight) = self.in_flight.get_mut(index(unit)) {
            *in_flight = true;
        }
        if !is_write {
            return Request::Read { extent };
        }
        let data = match self.versions.get_mut(index(unit)) {
            None => self.filler.clone(),
            Some(version) => {
                *version = if *version >= UNKNOWN - 1 { 1 } else { *version + 1 };
                let mut buffer = self.pool.take(index(length.get()));
                content(self.spec.seed, unit, *version, &mut buffer);
                buffer.share()
            }
        };
        Request::Write { extent, data, fua: false }
    }

    fn end(&mut self, slot: Slot, result: Result<Response, RequestError>) {
        let now = Instant::now();
        self.ended = Some(now);
        let unit = index(slot.unit);
        if let Some(in_flight) = self.in_flight.get_mut(unit) {
            *in_flight = false;
        }
        match result {
            Ok(response) => {
                let histogram = if slot.is_write { &mut self.writes } else { &mut self.reads };
                histogram.record(now.duration_since(slot.started));
                if let Response::Read(bytes) = &response {
                    self.check(slot.unit, bytes);
                }
            }
            Err(error) => {
                self.errors += 1;
                if slot.is_write
                    && let Some(version) = self.versions.get_mut(unit)
                {
                    *version = UNKNOWN;
                }
                self.first_failure.get_or_insert_with(|| format!("unit {unit}: {error}"));
            }
        }
    }

    fn check(&mut self, unit: u64, bytes: &ReadBytes) {
        let Some(version) = self.versions.get(index(unit)).copied() else { return };
        let is_right = match (version, bytes) {
            (_, ReadBytes::Bytes(bytes)) if bytes.len() as u64 != self.spec.unit.get() => false,
            (UNKNOWN, _) => true,
            (0, _) if self.spec.verify == Verification::OwnWrites => true,
            (0, ReadBytes::Zeroes) => true,
            (0, ReadBytes::Bytes(bytes)) => bytes.iter().all(|byte| *byte == 0),
            (_, ReadBytes::Zeroes) => false,
            (version, ReadBytes::Bytes(bytes)) => is_content(self.spec.seed, unit, version, bytes),
        };
        if !is_right {
            self.mismatches += 1;
            let found = match bytes {
                ReadBytes::Zeroes => "zeros".to_owned(),
                ReadBytes::Bytes(bytes) => format!("{:02x?}…", &bytes[..bytes.len().min(24)]),
            };
            self.first_failure.get_or_insert_with(|| format!("unit {unit} of version {version} reads as {found}"));
        }
    }
}

impl FrontEnd for Load {
    fn on_serve(&mut self, reactor: &mut Reactor, _term: Term) -> io::Result<()> {
        self.serving = true;
        let begin = opcode::Nop::new().build().user_data(Source::FrontEnd.user_data(BEGIN));
        // SAFETY: a no-op points to nothing.
        unsafe { reactor.push(&begin) }?;
        if let LoadLimit::Time(time) = self.spec.limit {
            *self.time = Timespec::from(time);
            let timer = opcode::Timeout::new(&raw const *self.time).build().user_data(Source::FrontEnd.user_data(TIME_IS_UP));
            // SAFETY: the kernel reads the boxed time when the entry is submitted, which the primary does before it waits, and
            // it borrows this front end all the while.
            unsafe { reactor.push(&timer) }?;
        }
        Ok(())
    }

    fn on_completed(
        &mut self,
        _reactor: &mut Reactor,
        _engine: &mut Engine,
        completed: Completed,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        match completed.token {
            TIME_IS_UP => self.may_issue = false,
            _ => self.fill(requests),
        }
        Ok(())
    }

    fn on_response(
        &mut self,
        _reactor: &mut Reactor,
        tag: RequestTag,
        result: Result<Response, RequestError>,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        let place = index(tag.0);
        if let Some(slot) = self.slots.get(place).copied() {
            self.end(slot, result);
            self.free.push(place);
            self.fill(requests);
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.serving && self.free.len() == self.slots.len() && (!self.may_issue || self.is_used_up())
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// The words of a unit's content, eight bytes each.
fn words(seed: u64, unit: u64, version: u32) -> impl Iterator<Item = u64> {
    let mut random = XorShift::new(seed ^ unit.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(version) << 40);
    [unit, u64::from(version)].into_iter().chain(std::iter::from_fn(move || Some(random.next())))
}

fn content(seed: u64, unit: u64, version: u32, buffer: &mut [u8]) {
    for (place, word) in buffer.chunks_exact_mut(8).zip(words(seed, unit, version)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}

fn is_content(seed: u64, unit: u64, version: u32, bytes: &[u8]) -> bool {
    bytes.chunks_exact(8).zip(words(seed, unit, version)).all(|(found, word)| *found == word.to_le_bytes())
}

/// Marsaglia's xorshift64*: a few instructions, and the same on every machine.
#[derive(Clone, Copy, Debug)]
struct XorShift(u64);

impl XorShift {
    const fn new(seed: u64) -> Self {
        // The state must not be zero.
        Self(seed ^ 0x2545_f491_4f6c_dd1d | 1)
    }

    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `bound`, which is far below 2^64, so that no value is noticeably more likely.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> LoadSpec {
        LoadSpec {
            region: Extent::new(ByteOffset::new(8192), ByteLength::new(64 * 4096)).unwrap(),
            unit: ByteLength::new(4096),
            depth: 16,
            write_percent: 50,
            pattern: LoadPattern::Random,
            limit: LoadLimit::Requests(1000),
            verify: Verification::FromZeroes,
            seed: 7,
        }
    }

    fn read(load: &mut Load, unit: u64, bytes: &[u8]) -> u64 {
        let mut buffer = load.pool.take(bytes.len());
        buffer.copy_from_slice(bytes);
        load.check(unit, &ReadBytes::Bytes(buffer.share()));
        std::mem::take(&mut load.mismatches)
    }

    #[test]
    fn wrong_bytes_are_noticed_whatever_they_are() {
        let mut load = Load::new(spec(), BufferPool::new(0)).unwrap();
        assert_eq!(read(&mut load, 3, &[0; 4096]), 0, "never written");
        let mut bytes = vec![0; 4096];
        bytes[4095] = 1;
        assert_eq!(read(&mut load, 3, &bytes), 1);

        load.versions[3] = 2;
        content(7, 3, 2, &mut bytes);
        assert_eq!(read(&mut load, 3, &bytes), 0);
        bytes[4000] ^= 1;
        assert_eq!(read(&mut load, 3, &bytes), 1, "a flipped bit");
        content(7, 3, 1, &mut bytes);
        assert_eq!(read(&mut load, 3, &bytes), 1, "the write before");
        content(7, 4, 2, &mut bytes);
        assert_eq!(read(&mut load, 3, &bytes), 1, "another unit's write");
        load.check(3, &ReadBytes::Zeroes);
        assert_eq!(load.mismatches, 1);
        assert!(load.report().first_failure.unwrap().contains("unit 3 of version 0"), "the first is told");
        content(7, 3, 2, &mut bytes);
        load.mismatches = 0;
        assert_eq!(read(&mut load, 3, &bytes[..2048]), 1, "too few bytes");
    }

    #[test]
    fn requests_stay_in_the_region_and_never_meet_while_it_verifies() {
        let mut load = Load::new(spec(), BufferPool::new(0)).unwrap();
        let mut requests = Vec::new();
        load.fill(&mut requests);
        assert_eq!(requests.len(), 16);
        let extents: Vec<_> = requests
            .iter()
            .map(|(_, request)| match request {
                Request::Read { extent } | Request::Write { extent, .. } => *extent,
                other => panic!("{other:?}"),
            })
            .collect();
        for (index, extent) in extents.iter().enumerate() {
            assert!(load.spec.region.contains(*extent));
            assert!(extents[..index].iter().all(|other| !other.overlaps(*extent)));
        }
    }

    #[test]
    fn loads_that_cannot_be_are_refused() {
        let refused = |spec| Load::new(spec, BufferPool::new(0)).err();
        assert!(matches!(refused(LoadSpec { unit: ByteLength::new(100), ..spec() }), Some(LoadSpecError::Unit(_))));
        assert!(matches!(refused(LoadSpec { depth: 0, ..spec() }), Some(LoadSpecError::Depth(0))));
        assert!(matches!(refused(LoadSpec { write_percent: 101, ..spec() }), Some(LoadSpecError::WritePercent(101))));
        assert!(matches!(refused(LoadSpec { depth: 65, ..spec() }), Some(LoadSpecError::Region { units: 64, needed: 65, .. })));
        assert!(refused(LoadSpec { depth: 65, verify: Verification::Off, ..spec() }).is_none());
    }
}
