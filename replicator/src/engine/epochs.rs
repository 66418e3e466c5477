//! The volume's epochs: what lets a replica that returns be brought up to date by a copy of little more than what it missed.
//!
//! Every block remembers the epoch of its last write. The primary raises the epoch in the stream of writes, at the same place for all
//! replicas. When a majority has that durably, whatever was written in the epochs before is for good: no later primary can choose a
//! content without it. The primary tells so to each replica that has all of it; the replica remembers it as *synced*.
//!
//! Invariants:
//! * A replica never gives a block an earlier epoch than the one it was written in, whether it is in sync or being copied to; a later one
//!   does no harm.
//! * So two replicas agree wherever both carry epochs up to what one of them knows as synced, if the other is in sync: a copy may leave
//!   these blocks out, and nothing else.

use carrick_backing_store::{ByteOffset, Epoch, Seq};

use super::{Engine, MemberIndex, Outstanding};
use crate::time::Monotonic;
use crate::wire::{Body, Frame, Header, Kind};

#[derive(Debug, Default)]
pub(super) struct Epochs {
    /// What writes carry now.
    pub(super) current: Epoch,
    /// What was written in epochs up to this is for good.
    pub(super) stable: Epoch,
    /// Bytes written and copied in the present epoch.
    written: u64,
    /// When the epoch is raised, or the replicas are told what is stable.
    due: Option<Monotonic>,
}

impl Engine {
    /// Before serving: an epoch that nobody has used.
    pub(super) fn choose_epoch(&mut self) {
        let highest = self.members.iter().filter_map(|member| member.promised()).map(|status| status.epoch).max().unwrap_or_default();
        self.epochs.current = self.epochs.current.max(highest.next().unwrap_or(highest));
    }

    /// Something was written, or copied.
    pub(super) fn note_written(&mut self, now: Monotonic, bytes: u64) {
        if !self.is_serving() {
            return;
        }
        self.epochs.written = self.epochs.written.saturating_add(bytes);
        self.epochs.due.get_or_insert(now + self.config.epoch_time);
        if self.epochs.written >= self.config.epoch_bytes {
            self.raise_epoch(now);
        }
    }

    /// A member has joined, or more is stable.
    pub(super) fn tell_synced_soon(&mut self, now: Monotonic) {
        self.epochs.due.get_or_insert(now + self.config.epoch_time);
    }

    /// When [`Engine::advance_epochs`] wants to be called.
    pub(super) fn epoch_deadline(&self) -> Option<Monotonic> {
        self.epochs.due.filter(|_| self.is_serving())
    }

    /// Time has passed.
    pub(super) fn advance_epochs(&mut self, now: Monotonic) {
        if !self.is_serving() || self.epochs.due.is_none_or(|due| now < due) {
            return;
        }
        if self.epochs.written > 0 {
            return self.raise_epoch(now);
        }
        self.epochs.due = None;
        for index in self.writers() {
            if self.members[index.0].synced_told < self.synced_of(index) {
                self.tell_epoch(now, index, true);
            }
        }
    }

    pub(super) fn raise_epoch(&mut self, now: Monotonic) {
        let Some(next) = self.epochs.current.next() else { return };
        self.epochs.current = next;
        self.epochs.written = 0;
        // If nothing follows, what is stable then is told.
        self.epochs.due = Some(now + self.config.epoch_time);
        for index in self.writers() {
            self.tell_epoch(now, index, true);
        }
    }

    /// Raises a member's epoch to the present one. `counts`: it has, or gets before its answer counts, all that was written before.
    pub(super) fn tell_epoch(&mut self, now: Monotonic, index: MemberIndex, counts: bool) {
        let (epoch, synced) = (self.epochs.current, self.synced_of(index));
        self.members[index.0].synced_told = synced;
        let (offset, sequence) = (ByteOffset::new(u64::from(epoch.get())), Seq::new(u64::from(synced.get())));
        let header = Header { offset, sequence, ..self.header(Kind::RaiseEpoch) };
        let epoch = if counts { epoch } else { Epoch::NEVER };
        self.members[index.0].epoch_told = self.members[index.0].epoch_told.max(epoch);
        self.request(now, index, Frame::new(header, Body::Empty), Outstanding::Epoch(epoch));
    }

    /// What a member may remember as synced.
    fn synced_of(&self, index: MemberIndex) -> Epoch {
        self.epochs.stable.min(before(self.members[index.0].epoch))
    }

    /// A member has raised its epoch, durably.
    pub(super) fn on_epoch_raised(&mut self, now: Monotonic, index: MemberIndex, epoch: Epoch) {
        let member = &mut self.members[index.0];
        member.epoch = member.epoch.max(epoch);
        let stable = before(self.on_majority(|member| member.epoch));
        if self.is_serving() && stable > self.epochs.stable {
            self.epochs.stable = stable;
            self.tell_synced_soon(now);
        }
        self.start_rebuilds(now);
        if self.configs.is_waiting {
            self.propose_change(now);
        }
    }
}

/// The epoch before this one.
pub(super) fn before(epoch: Epoch) -> Epoch {
    Epoch::new(epoch.get().saturating_sub(1))
}
