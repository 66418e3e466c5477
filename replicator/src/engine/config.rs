//! The config: which of the volume's replicas count, and the one record that decides it.
//!
//! The record is kept outside, by a metadata store that changes it by compare-and-swap only. A primary-to-be writes its term into
//! it, after which no earlier primary can change the config; whoever attaches the volume anew writes its attachment's number, after
//! which no target of an earlier attachment can become primary; a primary leaves out of it who is lost or too slow, and takes in who
//! is back. A single member is a majority of itself, so a volume goes on with one replica, once the record says so.
//!
//! Invariants, each checked by the simulation:
//! * Every member of the next config has all that was acknowledged and, on stable media, all that was flushed and what counts as
//!   stable, before the record is asked to change.
//! * Until it is known whether the record has changed, whatever a majority is needed for needs one of both configs.
//! * A proposal is never given up for another: a message on its way may still make it true.

use std::time::Duration;

use carrick_backing_store::{Seq, Term};
use serde::{Deserialize, Serialize};

use super::epochs::before;
use super::member::{Member, Stage};
use super::{Action, Engine, MEMBERS_MAX, MemberIndex, Phase};
use crate::time::Monotonic;

/// After the metadata store could not be reached, it is asked again after so long.
const RETRY: Duration = Duration::from_secs(1);

/// Some of a volume's replicas: a bit each, by [`MemberIndex`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MemberSet(u8);

impl MemberSet {
    /// None of them.
    pub const NONE: Self = Self(0);

    /// The first `count` replicas, at most [`MEMBERS_MAX`].
    #[must_use]
    pub fn first(count: usize) -> Self {
        (0..count.min(MEMBERS_MAX)).map(MemberIndex).collect()
    }

    /// Whether this replica is one of them.
    #[must_use]
    pub const fn contains(self, index: MemberIndex) -> bool {
        self.0 >> index.0 & 1 == 1
    }

    /// How many there are.
    #[must_use]
    pub const fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = MemberIndex> {
        (0..MEMBERS_MAX).map(MemberIndex).filter(move |index| self.contains(*index))
    }

    /// How many are a majority.
    #[must_use]
    pub const fn majority(self) -> usize {
        self.count() / 2 + 1
    }
}

impl FromIterator<MemberIndex> for MemberSet {
    fn from_iter<T: IntoIterator<Item = MemberIndex>>(indices: T) -> Self {
        Self(indices.into_iter().fold(0, |set, index| set | 1 << index.0))
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $(#[$first_doc:meta])* $first:ident = $number:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            $(#[$first_doc])*
            pub const $first: Self = Self($number);

            /// From a number.
            #[must_use]
            pub const fn new(number: u64) -> Self {
                Self(number)
            }

            /// As a number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The one after.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }
    };
}

counter! {
    /// Number of a config: each change of the record makes the next.
    ConfigVersion,
    /// The config that a volume is made with.
    FIRST = 1
}
counter! {
    /// Number of an attachment of a volume: each one is told the next. A target that was started again has the number it had.
    Attachment,
    /// The volume was never attached.
    NONE = 0
}

/// What the metadata store keeps of a volume's config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigRecord {
    /// Grows with each change.
    pub version: ConfigVersion,
    /// Whose word counts. Never empty.
    pub members: MemberSet,
    /// The term of the primary that wrote it.
    pub term: Term,
    /// Who may be primary: targets of earlier attachments end.
    pub attachment: Attachment,
}

impl ConfigRecord {
    /// Of a new volume: all its replicas count.
    #[must_use]
    pub fn first(members: usize) -> Self {
        Self { version: ConfigVersion::FIRST, members: MemberSet::first(members), term: Term::ZERO, attachment: Attachment::NONE }
    }
}

/// What the metadata store is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigRequest {
    /// What does the record say?
    Read,
    /// Let it say this, if its version is the one before; what does it say then?
    Swap(ConfigRecord),
}

impl ConfigRequest {
    /// What a metadata store does with it.
    pub fn apply(self, record: &mut ConfigRecord) -> ConfigRecord {
        match self {
            Self::Swap(next) if record.version.next() == next.version => *record = next,
            Self::Swap(_) | Self::Read => {}
        }
        *record
    }
}

#[derive(Debug, Default)]
pub(super) struct Configs {
    /// As it was when last heard of.
    record: Option<ConfigRecord>,
    /// What it was asked to become.
    proposed: Option<ConfigRecord>,
    /// It was asked, and has not answered.
    is_asked: bool,
    /// It has answered since a change is wanted: it can be reached.
    is_fresh: bool,
    /// An answer that has come and was not looked at.
    answer: Option<Result<ConfigRecord, String>>,
    /// Why the store was not reached, and when it is asked again.
    unreachable: Option<(String, Monotonic)>,
    /// A change waits for members to be ready for it.
    pub(super) is_waiting: bool,
    /// When it was last looked at who is lost.
    looked_at: Monotonic,
}

impl Configs {
    pub(super) fn record(&self) -> Option<ConfigRecord> {
        self.record
    }

    /// The config that is known, and the one that may be true already.
    fn sets(&self) -> [Option<MemberSet>; 2] {
        [self.record.map(|record| record.members), self.proposed.map(|record| record.members)]
    }
}

impl Engine {
    /// The metadata store has answered: what the record says now, or why it could not be asked. To be followed by
    /// [`Engine::on_timer`], as [`Engine::deadline`] tells.
    pub fn on_config(&mut self, answer: Result<ConfigRecord, String>) {
        self.configs.answer = Some(answer);
    }

    /// Which replicas count, if the record is known.
    #[must_use]
    pub fn counting(&self) -> Option<MemberSet> {
        self.configs.record.map(|record| record.members)
    }

    /// Whether a change of the config is under way.
    #[must_use]
    pub fn is_changing_config(&self) -> bool {
        self.configs.proposed.is_some()
    }

    /// Whose word counts.
    pub(super) fn voters(&self) -> MemberSet {
        self.counting().unwrap_or_default()
    }

    /// Whether those members that `has` is true of are a majority, whichever config is true.
    pub(super) fn is_majority(&self, has: impl Fn(MemberIndex, &Member) -> bool) -> bool {
        let sets = self.configs.sets();
        let is_majority_of = |set: &MemberSet| set.iter().filter(|index| has(*index, &self.members[index.0])).count() >= set.majority();
        sets[0].is_some() && sets.iter().flatten().all(is_majority_of)
    }

    /// The highest position that a majority has, whichever config is true.
    pub(super) fn on_majority<T: Copy + Default + Ord>(&self, position: impl Fn(&Member) -> T) -> T {
        let of_set = |set: MemberSet| {
            let mut positions = [T::default(); MEMBERS_MAX];
            let mut count = 0;
            for index in set.iter().filter(|index| self.members[index.0].in_sync) {
                positions[count] = position(&self.members[index.0]);
                count += 1;
            }
            positions[..count].sort_unstable_by(|left, right| right.cmp(left));
            positions[..count].get(set.majority() - 1).copied().unwrap_or_default()
        };
        self.configs.sets().into_iter().flatten().map(of_set).min().unwrap_or_default()
    }

    pub(super) fn ask_config(&mut self, request: ConfigRequest) {
        self.configs.is_asked = true;
        self.actions.push_back(Action::Config(request));
    }

    /// When the config wants [`Engine::on_timer`] to be called: there is an answer, it is time to ask again, or someone may be lost.
    pub(super) fn config_deadline(&self) -> Option<Monotonic> {
        if self.configs.answer.is_some() {
            return Some(Monotonic::default());
        }
        if let Some((_, retry_at)) = &self.configs.unreachable {
            return Some(*retry_at);
        }
        if !self.config.changes_config || !self.is_serving() || self.configs.proposed.is_some() || self.voters().count() < 2 {
            return None;
        }
        let missed = self.voters().iter().flat_map(|index| self.missed_at(index)).flatten();
        missed.filter(|at| *at > self.configs.looked_at).min()
    }

    /// Time has passed, or an answer has come.
    pub(super) fn advance_config(&mut self, now: Monotonic) {
        match self.configs.answer.take() {
            Some(Ok(record)) => {
                self.configs.is_asked = false;
                self.on_record(now, record);
            }
            Some(Err(reason)) => {
                self.configs.is_asked = false;
                self.configs.unreachable = Some((reason, now + RETRY));
            }
            None => {}
        }
        if self.configs.unreachable.as_ref().is_some_and(|(_, at)| *at <= now) {
            self.configs.unreachable = None;
            self.ask_config(self.configs.proposed.map_or(ConfigRequest::Read, ConfigRequest::Swap));
        }
        self.propose_change(now);
    }

    fn on_record(&mut self, now: Monotonic, record: ConfigRecord) {
        match self.configs.proposed {
            // Terms alone don't tell: this target could choose a higher one, and carry out what was asked of it long ago.
            _ if record.attachment > self.config.attachment => self.supersede(record.term),
            Some(proposed) if proposed == record => {
                self.configs.proposed = None;
                let earlier = self.configs.record.replace(record);
                self.on_committed(now, earlier.map(|earlier| earlier.members).unwrap_or_default());
            }
            // It was not reached when it was asked.
            Some(proposed) if self.configs.record == Some(record) => self.ask_config(ConfigRequest::Swap(proposed)),
            Some(_) if self.is_serving() => self.supersede(record.term),
            // Another attempt was quicker.
            Some(_) => {
                self.configs.proposed = None;
                self.configs.record = Some(record);
                self.phase = Phase::Electing { majority_at: None };
                for index in self.member_indices() {
                    if matches!(self.members[index.0].stage, Stage::Idle) {
                        self.inquire(now, index);
                    }
                }
                self.advance_election(now);
            }
            None if self.is_serving() && self.configs.record != Some(record) => self.supersede(record.term),
            None => {
                self.configs.is_fresh = true;
                self.configs.record = Some(record);
                self.advance_election(now);
            }
        }
    }

    /// Writes this term into the record. `false` if there is none left.
    pub(super) fn take_record(&mut self, highest: Term) -> bool {
        let Some(record) = self.configs.record else { return true };
        let nonce = self.random();
        let Some(term) = highest.max(record.term).successor(nonce) else { return false };
        let attachment = self.config.attachment;
        let next = ConfigRecord { version: record.version.next(), term, attachment, ..record };
        self.term = None;
        self.phase = Phase::Taking;
        self.propose(next);
        true
    }

    fn propose(&mut self, next: ConfigRecord) {
        self.configs.is_fresh = false;
        self.configs.proposed = Some(next);
        self.ask_config(ConfigRequest::Swap(next));
    }

    fn on_committed(&mut self, now: Monotonic, earlier: MemberSet) {
        if matches!(self.phase, Phase::Taking) {
            return self.on_term_taken(now);
        }
        let voters = self.voters();
        for index in earlier.iter().filter(|index| !voters.contains(*index)) {
            if self.members[index.0].in_sync {
                let why = if self.is_retiring(index) { "it is to go" } else { "it was lost or too slow" };
                self.leave_behind(now, index, &format!("{why}, and no longer counts"));
            }
        }
        self.advance_acknowledged(now);
        self.start_rebuilds(now);
        self.retry_reads(now);
    }

    /// Asks for the next config, if this one should change and everyone in the next is ready.
    pub(super) fn propose_change(&mut self, now: Monotonic) {
        self.configs.looked_at = now;
        let (Phase::Serving, None, Some(record), Some(term)) = (&self.phase, self.configs.proposed, self.configs.record, self.term) else {
            return;
        };
        if !self.config.changes_config {
            return;
        }
        let goes = |index: &MemberIndex| self.is_lost(now, *index) || self.may_go(now, record.members, *index);
        let kept: MemberSet = record.members.iter().filter(|index| !goes(index)).collect();
        let back = |index: &MemberIndex| !record.members.contains(*index) && self.members[index.0].is_joined() && !self.is_retiring(*index);
        let joined: MemberSet = self.member_indices().filter(back).collect();
        if kept.is_empty() || kept == record.members && joined.is_empty() {
            (self.configs.is_waiting, self.configs.is_fresh) = (false, false);
            return;
        }
        let ready = |index: &MemberIndex| self.is_ready(&self.members[index.0]);
        let members: MemberSet = kept.iter().chain(joined.iter().filter(ready)).collect();
        if members == record.members || !kept.iter().all(|index| ready(&index)) {
            return self.wait_for_readiness(now, kept.iter().chain(joined.iter()).collect());
        }
        if !self.configs.is_fresh {
            // A proposal that may or may not be true binds both configs' majorities. So it isn't made to a store out of reach.
            if !self.configs.is_asked && self.configs.unreachable.is_none() {
                self.ask_config(ConfigRequest::Read);
            }
            return;
        }
        self.configs.is_waiting = false;
        self.propose(ConfigRecord { version: record.version.next(), members, term, ..record });
    }

    /// Whether it is to stop counting, whatever it has.
    pub(super) fn is_retiring(&self, index: MemberIndex) -> bool {
        self.config.retiring.contains(index)
    }

    /// Whether one that is to stop counting can: all others count, so none is lost by it.
    fn may_go(&self, now: Monotonic, members: MemberSet, index: MemberIndex) -> bool {
        let mut others = self.member_indices().filter(|other| !self.is_retiring(*other)).peekable();
        self.is_retiring(index) && others.peek().is_some() && others.all(|other| members.contains(other) && !self.is_lost(now, other))
    }

    /// Whether it should no longer be waited for.
    fn is_lost(&self, now: Monotonic, index: MemberIndex) -> bool {
        !self.members[index.0].in_sync || self.missed_at(index).into_iter().flatten().any(|at| now >= at)
    }

    /// Whether it may be in the next config: it has everything that must not be lost.
    fn is_ready(&self, member: &Member) -> bool {
        member.is_joined() && member.received >= self.acknowledged && self.is_durable(member)
    }

    /// Whether it has, on stable media, what was flushed and what counts as stable.
    pub(super) fn is_durable(&self, member: &Member) -> bool {
        member.durable >= self.flushed && before(member.epoch) >= self.epochs.stable
    }

    /// Asks those who are to be in the next config for what they lack.
    fn wait_for_readiness(&mut self, now: Monotonic, members: MemberSet) {
        self.configs.is_waiting = true;
        self.make_durable(now, members);
    }

    /// Has those of them that are joined put on stable media what they lack there.
    pub(super) fn make_durable(&mut self, now: Monotonic, members: MemberSet) {
        let mut needs_epoch = false;
        for index in members.iter() {
            let member = &self.members[index.0];
            if !member.is_joined() {
                continue;
            }
            // Not if its answer is on the way.
            needs_epoch |= before(member.epoch.max(member.epoch_told)) < self.epochs.stable;
            if member.durable < self.flushed && member.flush_sent < self.flushed {
                self.send_flush(now, index);
            }
        }
        if needs_epoch {
            self.raise_epoch(now);
        }
    }

    /// Why the config can't be read or changed, in words, if that holds something up.
    pub(super) fn config_trouble(&self) -> Option<String> {
        let (reason, _) = self.configs.unreachable.as_ref()?;
        Some(format!("the metadata store can't be reached: {reason}"))
    }

    /// Flushed up to here, for good.
    pub(super) fn note_flushed(&mut self, sequence: Seq) {
        self.flushed = self.flushed.max(sequence);
    }
}
