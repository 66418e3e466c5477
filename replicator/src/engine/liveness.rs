//! Who is alive, who is too slow, and when to look again.

use std::time::Duration;

use super::member::{Member, Stage};
use super::{Engine, MemberIndex, Outstanding};
use crate::time::Monotonic;
use crate::wire::{Body, Frame, Kind};

/// A joined member that owes nothing is asked for a sign of life this often: five seconds keep an idle target under one wakeup a
/// second with three replicas, and find a dead connection before the next write has to.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Members due within this time are asked together, so that one wakeup serves all.
const KEEP_ALIVE_SLACK: Duration = Duration::from_secs(1);
/// A write that a member has not received for this long makes it behind, whatever else it answers (I7).
const LAG_MAX: Duration = Duration::from_secs(2);
/// How often reads and chunks that found no source are tried, besides at every return of a member.
const STALL_RETRY: Duration = Duration::from_millis(250);

impl Engine {
    /// Time has passed: call it when [`Engine::deadline`] is reached (earlier calls do no harm).
    pub fn on_timer(&mut self, now: Monotonic) {
        for index in self.member_indices() {
            self.check_member(now, index);
        }
        self.expire_reads(now);
        self.leave_laggards_behind(now);
        self.advance_config(now);
        self.advance_election(now);
        self.start_rebuilds(now);
        self.advance_epochs(now);
        self.advance_copies(now);
        self.advance_verification(now);
        self.advance_growth(now);
        if self.stall_deadline.is_some_and(|deadline| deadline <= now) {
            self.stall_deadline = None;
            self.retry_reads(now);
            self.retry_stalled_chunks(now);
        }
        self.arm_stall_retry(now);
    }

    /// When [`Engine::on_timer`] wants to be called. `None`: nothing to wait for.
    #[must_use]
    pub fn deadline(&self) -> Option<Monotonic> {
        if matches!(self.phase, super::Phase::Superseded) {
            return None;
        }
        let members = self.member_indices().flat_map(|index| {
            let member = &self.members[index.0];
            let timeout = self.config.replica_timeout;
            let own = match member.stage {
                Stage::Down { retry_at } => Some(retry_at),
                _ if member.owes() && member.may_be_pinged() => Some(member.quiet_since + self.ping_after()),
                _ if member.owes() => Some(member.quiet_since + timeout),
                Stage::Joined => Some(member.quiet_since + KEEP_ALIVE),
                _ => None,
            };
            let missed = self.missed_at(index).map(|at| at.filter(|_| self.may_leave_behind(index)));
            [own, missed[0], missed[1]]
        });
        members
            .flatten()
            .chain(self.read_deadline())
            .chain(self.lease_deadline())
            .chain(self.gather_deadline())
            .chain(self.config_deadline())
            .chain(self.stall_deadline)
            .chain(self.epoch_deadline())
            .chain(self.copy_deadline())
            .chain(self.verification_deadline())
            .chain(self.growth_deadline())
            .min()
    }

    /// After this long without a sign of life a member that owes something is asked for one, so that a slow disk is told
    /// from a dead process.
    fn ping_after(&self) -> Duration {
        self.config.replica_timeout / 3
    }

    pub(super) fn arm_stall_retry(&mut self, now: Monotonic) {
        let waiting = !self.stalled_reads.is_empty() || self.lease.has_waiting();
        let stalled = waiting || !(self.stalled_chunks.is_empty() && self.stalled_copies.is_empty());
        if self.stall_deadline.is_none() && stalled {
            self.stall_deadline = Some(now + STALL_RETRY);
        }
    }

    fn check_member(&mut self, now: Monotonic, index: MemberIndex) {
        let member = &self.members[index.0];
        let quiet = now.since(member.quiet_since);
        match member.stage {
            Stage::Down { retry_at } if retry_at <= now => self.connect(now, index),
            Stage::Down { .. } => {}
            _ if member.owes() && quiet >= self.config.replica_timeout => {
                let reason = format!("it answered nothing for {} ms", quiet.as_millis());
                self.drop_member(now, index, reason, false);
            }
            _ if !member.may_be_pinged() => {}
            _ if member.owes() && quiet >= self.ping_after() => self.ping(now, index),
            Stage::Joined if !member.owes() && quiet + KEEP_ALIVE_SLACK >= KEEP_ALIVE => self.ping(now, index),
            _ => {}
        }
    }

    pub(super) fn ping(&mut self, now: Monotonic, index: MemberIndex) {
        let quiet_since = self.members[index.0].quiet_since;
        let owed = self.members[index.0].owes();
        let ping = Frame::new(self.header(Kind::Ping), Body::Empty);
        self.request(now, index, ping, Outstanding::Ping { asked: now });
        let member = &mut self.members[index.0];
        member.pinged = true;
        if owed {
            member.quiet_since = quiet_since;
        }
    }

    /// From when on a member in sync is away for too long, and from when on it is too slow (I7).
    pub(super) fn missed_at(&self, index: MemberIndex) -> [Option<Monotonic>; 2] {
        let member = &self.members[index.0];
        if !member.in_sync {
            return [None, None];
        }
        // The oldest write that it lacks.
        let lacks = self.backlog.get(member.received.next()).map(|entry| entry.since);
        [member.left_at.map(|at| at + self.config.replica_timeout), lacks.map(|since| since + LAG_MAX)]
    }

    /// Whether a majority without this member has all that was acknowledged.
    pub(super) fn is_held_without(&self, index: MemberIndex) -> bool {
        let holds = |member: &Member| member.in_sync && member.received >= self.acknowledged;
        self.is_majority(|other, member| other != index && holds(member))
    }

    fn may_leave_behind(&self, index: MemberIndex) -> bool {
        self.members[index.0].in_sync && self.is_held_without(index)
    }

    /// Takes members out of the count that were away or slow for too long (I7). They will be copied.
    fn leave_laggards_behind(&mut self, now: Monotonic) {
        for index in self.member_indices() {
            let [away, lagging] = self.missed_at(index).map(|at| at.is_some_and(|at| now >= at));
            if (away || lagging) && self.may_leave_behind(index) {
                self.leave_behind(now, index, if away { "it was away too long" } else { "it was too slow" });
            }
        }
    }

    /// Keeps the backlog within its bound at the cost of the slowest, as long as a majority stays.
    pub(super) fn bound_backlog(&mut self, now: Monotonic) {
        while self.backlog.is_over(self.config.backlog_bytes) {
            let slowest = self
                .member_indices()
                .filter(|index| {
                    let member = &self.members[index.0];
                    member.needs_backlog() && (!member.in_sync || self.may_leave_behind(*index))
                })
                .min_by_key(|index| self.members[index.0].received);
            let Some(slowest) = slowest.filter(|index| self.members[index.0].received < self.acknowledged) else { return };
            self.leave_behind(now, slowest, "it fell too far behind");
        }
    }

    pub(super) fn leave_behind(&mut self, now: Monotonic, index: MemberIndex, reason: &str) {
        self.members[index.0].in_sync = false;
        self.members[index.0].left_at = None;
        if !self.members[index.0].is_down() {
            self.drop_member(now, index, reason.to_owned(), false);
        }
        self.trim_backlog();
    }
}
