//! The background scrub of a store: which piece of it is to be read next, and when. No I/O, and no clock.
//!
//! It goes through all volumes, in the order of their ids, a small piece at a time, rests, and begins anew. What it finds is told;
//! a damaged block is replaced when somebody reads it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use carrick_backing_store::{BLOCK_SIZE, BlockIndex, ByteLength, Operation, Scrubbed, StoreError, VolumeId};

use crate::control::{DamagedReplica, ScrubReport};

/// Blocks read at once: 256 KiB, for which nobody waits long.
const PIECE: u64 = 64;
/// So long after the start the first pass begins: a node that comes up has better things to do.
const FIRST_AFTER: Duration = Duration::from_secs(60);
/// So long after a pass the next one begins. Blocks rot in months, and an idle store shall be idle.
const PASS_PAUSE: Duration = Duration::from_secs(24 * 3600);
/// While others use the store, a piece that is due is put off by this much.
const YIELD: Duration = Duration::from_millis(50);
/// But not more often than this: under endless load there is one piece in about a second.
const YIELDS_MAX: u32 = 20;
/// Damaged blocks that are logged in one pass; the others are only counted.
const LOGGED_MAX: u32 = 100;

/// What is read now, or next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// What comes after this volume; `None`: the first one.
    After(Option<VolumeId>),
    /// A volume, from a block on.
    In(VolumeId, BlockIndex),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Scrubber {
    /// In bytes per second; zero: off.
    rate: ByteLength,
    due: Option<Instant>,
    place: Place,
    /// A piece is being read, of this volume.
    reading: Option<VolumeId>,
    yielded: u32,
    passes: u64,
    verified: ByteLength,
    /// Damaged blocks that this pass and the one before it found.
    found: BTreeMap<VolumeId, u64>,
    found_before: BTreeMap<VolumeId, u64>,
    logged: u32,
}

impl Scrubber {
    /// Reads at most so many bytes per second; none at all if that is zero.
    pub(super) fn new(rate: ByteLength, now: Instant) -> Self {
        Self {
            rate,
            due: (rate > ByteLength::ZERO).then(|| now + FIRST_AFTER),
            place: Place::After(None),
            reading: None,
            yielded: 0,
            passes: 0,
            verified: ByteLength::ZERO,
            found: BTreeMap::new(),
            found_before: BTreeMap::new(),
            logged: 0,
        }
    }

    /// When it wants to be asked for the next piece.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The volume of which a piece is being read.
    pub(super) const fn reading(&self) -> Option<VolumeId> {
        self.reading
    }

    /// The next piece, if it is time. `busy` says whether others wait for the store; `volumes` are those that are there.
    pub(super) fn next(&mut self, now: Instant, busy: bool, volumes: impl Fn() -> Vec<VolumeId>) -> Option<(VolumeId, Operation)> {
        if self.due.is_none_or(|due| due > now) {
            return None;
        }
        if busy && self.yielded < YIELDS_MAX {
            self.yielded += 1;
            self.due = Some(now + YIELD);
            return None;
        }
        self.yielded = 0;
        let (volume, start) = match self.place {
            Place::In(volume, start) => (volume, start),
            Place::After(last) => match volumes().into_iter().filter(|volume| Some(*volume) > last).min() {
                Some(volume) => (volume, BlockIndex::new(0)),
                None => {
                    self.end_pass(now);
                    return None;
                }
            },
        };
        self.place = Place::In(volume, start);
        self.reading = Some(volume);
        self.due = None;
        Some((volume, Operation::Scrub { start, blocks: PIECE }))
    }

    /// A piece has been read, or could not be. Gives the damaged blocks that are to be logged.
    pub(super) fn on_read(&mut self, now: Instant, result: &Result<Scrubbed, StoreError>) -> Vec<BlockIndex> {
        let Some(volume) = self.reading.take() else { return Vec::new() };
        let (read, next, bad) = match result {
            Ok(scrubbed) => (scrubbed.verified + scrubbed.bad.len() as u64, scrubbed.next, &scrubbed.bad[..]),
            // Until the store is opened again.
            Err(StoreError::Poisoned(_)) => return Vec::new(),
            // It was deleted, or its map can't be read, which whoever uses it is told.
            Err(_) => (0, None, &[][..]),
        };
        let bytes = |blocks: u64| blocks * u64::from(BLOCK_SIZE);
        self.verified = ByteLength::new(self.verified.get() + bytes(read - bad.len() as u64));
        self.place = next.map_or(Place::After(Some(volume)), |next| Place::In(volume, next));
        // Holes cost something, too.
        self.due = Some(now + Duration::from_secs_f64(bytes(read.max(1)) as f64 / self.rate.get() as f64));
        if bad.is_empty() {
            return Vec::new();
        }
        *self.found.entry(volume).or_default() += bad.len() as u64;
        let room = LOGGED_MAX.saturating_sub(self.logged);
        self.logged = self.logged.saturating_add(u32::try_from(bad.len()).unwrap_or(u32::MAX));
        bad.iter().copied().take(room as usize).collect()
    }

    fn end_pass(&mut self, now: Instant) {
        self.passes += 1;
        self.place = Place::After(None);
        self.found_before = std::mem::take(&mut self.found);
        self.logged = 0;
        self.due = Some(now + PASS_PAUSE);
    }

    /// What it found so far.
    pub(super) fn report(&self) -> ScrubReport {
        let mut damaged = self.found_before.clone();
        for (volume, blocks) in &self.found {
            let most = damaged.entry(*volume).or_default();
            *most = (*most).max(*blocks);
        }
        let damaged = damaged.into_iter().map(|(volume, blocks)| DamagedReplica { volume, blocks }).collect();
        ScrubReport { rate: self.rate, passes: self.passes, verified: self.verified, damaged }
    }

    /// A volume is gone.
    pub(super) fn forget(&mut self, volume: VolumeId) {
        self.found.remove(&volume);
        self.found_before.remove(&volume);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: VolumeId = VolumeId::from_bytes([1; 16]);
    const B: VolumeId = VolumeId::from_bytes([2; 16]);
    const MIB: u64 = 1 << 20;

    fn scrubbed(verified: u64, bad: &[u64], next: Option<u64>) -> Result<Scrubbed, StoreError> {
        Ok(Scrubbed { verified, bad: bad.iter().copied().map(BlockIndex::new).collect(), next: next.map(BlockIndex::new) })
    }

    fn start_of(piece: Option<(VolumeId, Operation)>) -> Option<(VolumeId, u64)> {
        piece.map(|(volume, operation)| match operation {
            Operation::Scrub { start, blocks: PIECE } => (volume, start.get()),
            other => panic!("{other:?}"),
        })
    }

    /// A scrub at 1 MiB/s whose first pass is due, and the time.
    fn begun() -> (Scrubber, Instant) {
        let now = Instant::now();
        (Scrubber::new(ByteLength::new(MIB), now), now + FIRST_AFTER)
    }

    #[test]
    fn all_volumes_are_read_at_the_rate_and_then_it_rests() {
        let (mut scrubber, mut now) = begun();
        let volumes = || vec![B, A];
        assert_eq!(start_of(scrubber.next(now - Duration::from_millis(1), false, volumes)), None, "not before it is due");
        let mut seen = Vec::new();
        for answer in [scrubbed(64, &[], Some(70)), scrubbed(32, &[], None), scrubbed(0, &[], None)] {
            seen.extend(start_of(scrubber.next(now, false, volumes)));
            assert_eq!(scrubber.due(), None, "one piece at a time");
            assert!(scrubber.on_read(now, &answer).is_empty());
            now = scrubber.due().unwrap();
        }
        assert_eq!(seen, [(A, 0), (A, 70), (B, 0)]);
        let took = now.duration_since(begun().1);
        assert!(took >= Duration::from_millis(375), "64 + 32 blocks are 384 KiB: {took:?}");
        assert_eq!(start_of(scrubber.next(now, false, volumes)), None);
        assert_eq!(scrubber.due(), Some(now + PASS_PAUSE));
        let report = scrubber.report();
        assert_eq!((report.passes, report.verified.get()), (1, 96 * 4096));
        assert_eq!(start_of(scrubber.next(now + PASS_PAUSE, false, volumes)), Some((A, 0)));
    }

    #[test]
    fn it_yields_to_others_but_not_for_ever() {
        let (mut scrubber, mut now) = begun();
        let mut put_off = 0;
        while scrubber.next(now, true, || vec![A]).is_none() {
            put_off += 1;
            now = scrubber.due().unwrap();
        }
        assert_eq!(put_off, YIELDS_MAX);
        assert_eq!(scrubber.reading(), Some(A));
    }

    #[test]
    fn damage_is_counted_logged_up_to_a_bound_and_forgotten_when_a_whole_pass_is_clean() {
        let (mut scrubber, mut now) = begun();
        let bad: Vec<u64> = (0..60).collect();
        for logged in [60, 40, 0] {
            scrubber.next(now, false, || vec![A]).unwrap();
            assert_eq!(scrubber.on_read(now, &scrubbed(4, &bad, Some(64))).len(), logged);
            now = scrubber.due().unwrap();
        }
        let damaged = |scrubber: &Scrubber| scrubber.report().damaged.iter().map(|of| (of.volume, of.blocks)).collect::<Vec<_>>();
        assert_eq!(damaged(&scrubber), [(A, 180)]);
        // What the last whole pass found counts until the next one has ended.
        for counted in [&[(A, 180)][..], &[]] {
            assert_eq!(damaged(&scrubber), [(A, 180)]);
            scrubber.next(now, false, || vec![A]).unwrap();
            scrubber.on_read(now, &scrubbed(64, &[], None));
            assert!(scrubber.next(scrubber.due().unwrap(), false, || vec![A]).is_none());
            assert_eq!(damaged(&scrubber), counted);
            now = scrubber.due().unwrap();
        }
    }

    #[test]
    fn deleted_volumes_are_passed_over_and_a_poisoned_store_is_left_alone() {
        let (mut scrubber, now) = begun();
        scrubber.next(now, false, || vec![A, B]).unwrap();
        scrubber.on_read(now, &scrubbed(1, &[7], Some(8)));
        scrubber.forget(A);
        assert!(scrubber.report().damaged.is_empty());
        let now = scrubber.due().unwrap();
        assert_eq!(start_of(scrubber.next(now, false, || vec![B])), Some((A, 8)));
        scrubber.on_read(now, &Err(StoreError::UnknownVolume(A)));
        let now = scrubber.due().unwrap();
        assert_eq!(start_of(scrubber.next(now, false, || vec![B])), Some((B, 0)));
        scrubber.on_read(now, &Err(StoreError::Poisoned(B)));
        assert_eq!(scrubber.due(), None);
    }

    #[test]
    fn a_rate_of_zero_turns_it_off() {
        assert_eq!(Scrubber::new(ByteLength::ZERO, Instant::now()).due(), None);
    }
}
