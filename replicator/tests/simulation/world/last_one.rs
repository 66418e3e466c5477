//! The hardest that can happen to a config: one replica lags while all others go. Once the record says that the one alone counts,
//! what it has is all there is; and just then it goes, too.

use super::faults::FaultKind;
use super::{Event, MILLISECOND, Micros, SECOND, World};

/// A replica that takes ever longer, until it is asked for all there is.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastOne {
    pub(super) replica: usize,
    laggard: Laggard,
    since: Micros,
    until: Micros,
    /// What is asked of the metadata store takes long, too.
    slow_records: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Laggard {
    /// The target's frames reach it late.
    Link,
    /// Its disk takes long. It answers pings all the same.
    Disk,
}

/// The longest that anything takes: short of what makes a replica too slow.
const SLOWEST: Micros = 1_900 * MILLISECOND;
/// After so long it is as slow as that: not at once, or it would be missed.
const SLOWS_DOWN: Micros = 2 * SLOWEST;
/// About when replicas that have gone no longer count.
const MISSED: Micros = 1_500 * MILLISECOND;

impl World {
    /// One replica lags further and further behind; then the others go.
    pub(super) fn leave_one(&mut self, index: usize) {
        self.note(format!("replica {index} gets later and later"));
        let begin = self.now + SLOWS_DOWN + self.dice.below(SECOND);
        let laggard = if self.dice.coin() { Laggard::Link } else { Laggard::Disk };
        let until = begin + MISSED + self.dice.skewed(8 * SECOND);
        self.last_one = Some(LastOne { replica: index, laggard, since: self.now, until, slow_records: self.dice.coin() });
        // Some come back at the very moment when they are left out.
        let returns = self.dice.coin();
        for other in (0..self.machines.len()).filter(|other| *other != index) {
            let at = begin + self.dice.skewed(200 * MILLISECOND);
            self.schedule(at, Event::Kill(other));
            let absence = if returns { MISSED + self.dice.below(SECOND) } else { SECOND + self.dice.below(5 * SECOND) };
            self.machines[other].away_until = at + absence;
        }
        if self.dice.coin() {
            let end = begin + MISSED + self.dice.skewed(2 * SECOND);
            self.schedule(end, Event::EndTarget(self.incarnation));
        }
    }

    /// Whether this is under way.
    pub(super) fn is_one_late(&self) -> bool {
        self.faults && self.last_one.is_some_and(|one| self.now < one.until)
    }

    /// Nothing that begins from now on is late.
    pub(super) fn hurry(&mut self) {
        let now = self.now;
        self.last_one.iter_mut().for_each(|one| one.until = one.until.min(now));
    }

    /// Whether none was late of late: what one owes since then may still be too much.
    pub(super) fn is_punctual(&self) -> bool {
        self.last_one.is_none_or(|one| self.now > one.until + 2 * SLOWEST)
    }

    /// The record says that one alone counts.
    pub(super) fn on_only_one(&mut self) {
        let Some(one) = self.last_one.filter(|_| self.is_one_late() && self.calm.is_none()) else { return };
        let end = self.now + self.dice.skewed(50 * MILLISECOND);
        self.schedule(end, Event::EndTarget(self.incarnation));
        // Else the target's machine may lose power, and all others with it.
        if !self.fault_kinds.contains(&FaultKind::PowerEverywhere) || self.dice.coin() {
            self.schedule(end, Event::Kill(one.replica));
        }
    }

    /// How much longer than usual a frame is on its way to this replica.
    pub(super) fn link_delay(&self, replica: usize) -> Micros {
        self.lateness(replica, Laggard::Link)
    }

    /// How much longer than usual this replica's disk takes for something.
    pub(super) fn disk_delay(&self, replica: usize) -> Micros {
        self.lateness(replica, Laggard::Disk)
    }

    fn lateness(&self, replica: usize, laggard: Laggard) -> Micros {
        let is_it = |one: &LastOne| self.is_one_late() && one.replica == replica && one.laggard == laggard;
        self.last_one.filter(is_it).map_or(0, |one| ((self.now - one.since) / 2).min(SLOWEST))
    }

    /// How long the metadata store may take for something.
    pub(super) fn longest_ask(&mut self) -> Micros {
        let is_slow = self.is_one_late() && self.last_one.is_some_and(|one| one.slow_records);
        match self.faults {
            true if is_slow => 2 * SECOND,
            true if self.dice.once_in(8) => 4 * SECOND,
            _ => 20 * MILLISECOND,
        }
    }
}
