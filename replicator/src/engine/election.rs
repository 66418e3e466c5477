//! Becoming primary: promises of a majority, the choice of the content that counts, and a majority brought to exactly it.
//!
//! Invariants:
//! * Nothing is served before a majority has promised the term durably (I4) and adopted the same content durably (I5).
//! * The chosen content is that of the highest (log term, position) among a promising majority: it has every acknowledged write.
//! * No replica adopts the term before every participant has the chosen content, so a crash in between leaves the choice open.

use std::time::Duration;

use carrick_backing_store::{Content, LoggedExtents, Seq, Term};

use super::config::MemberSet;
use super::copy::Copy;
use super::member::Stage;
use super::{Action, Engine, MemberIndex, Outstanding, Phase};
use crate::time::Monotonic;
use crate::wire::{Body, Frame, Header, Kind, StatusAnswer};

/// How long a majority waits for the other members, so as not to leave them behind for nothing. A local replica answers within
/// a millisecond; half a second also catches one that is just being restarted.
const GATHER_WAIT: Duration = Duration::from_millis(500);

impl Engine {
    /// A member's status is known, or a promise was given, or time has passed: goes on if enough members are ready.
    pub(super) fn advance_election(&mut self, now: Monotonic) {
        match self.phase {
            Phase::Electing { .. } => self.choose_term(now),
            Phase::Gathering { .. } => self.choose_content(now),
            Phase::Comparing => self.plan_copies(now),
            Phase::Reconciling => self.serve_when_adopted(now),
            Phase::Taking | Phase::Serving | Phase::Superseded => {}
        }
    }

    /// When the wait for the other members ends, if a majority waits for them.
    pub(super) fn gather_deadline(&self) -> Option<Monotonic> {
        match self.phase {
            // With a note, only another member's answer can help.
            Phase::Electing { majority_at } | Phase::Gathering { majority_at } if self.note.is_none() => {
                majority_at.map(|at| at + GATHER_WAIT)
            }
            _ => None,
        }
    }

    /// Whether these are enough to go on now, of those that count, and remembers since when a majority is.
    fn is_gathered(&mut self, now: Monotonic, ready: MemberSet) -> bool {
        let voters = self.voters();
        let (majority, all) = (voters.majority(), voters.count());
        let ready = ready.iter().filter(|index| voters.contains(*index)).count();
        let (Phase::Electing { majority_at } | Phase::Gathering { majority_at }) = &mut self.phase else { return false };
        if ready < majority || all == 0 {
            *majority_at = None;
            return false;
        }
        let since = *majority_at.get_or_insert(now);
        ready == all || now >= since + GATHER_WAIT
    }

    fn choose_term(&mut self, now: Monotonic) {
        let known = self.member_indices().filter_map(|index| match &self.members[index.0].stage {
            Stage::Known(status) => Some((index, status.promised)),
            _ => None,
        });
        let known: Vec<(MemberIndex, Term)> = known.collect();
        if !self.is_gathered(now, known.iter().map(|(index, _)| *index).collect()) {
            return;
        }
        let highest = known.iter().map(|(_, promised)| *promised).max().unwrap_or(Term::ZERO);
        if !self.take_record(highest) {
            self.note = Some(format!("the volume's terms are used up ({highest} is promised)"));
        }
    }

    /// The record has this term: no earlier primary can change the config any more.
    pub(super) fn on_term_taken(&mut self, now: Monotonic) {
        self.term = self.configs.record().map(|record| record.term);
        self.phase = Phase::Gathering { majority_at: None };
        for index in self.member_indices() {
            if matches!(self.members[index.0].stage, Stage::Known(_) | Stage::Idle) {
                self.ask_promise(now, index);
            }
        }
    }

    pub(super) fn ask_promise(&mut self, now: Monotonic, index: MemberIndex) {
        self.members[index.0].stage = Stage::Promising;
        let promise = Frame::new(self.header(Kind::Promise), Body::Empty);
        self.request(now, index, promise, Outstanding::Control);
    }

    /// A member has promised: once a majority has, asks those that may hold the chosen content what they wrote last.
    fn choose_content(&mut self, now: Monotonic) {
        let ready = self.member_indices().filter(|index| self.members[index.0].promised().is_some());
        if !self.is_gathered(now, ready.collect()) {
            return;
        }
        let candidates = self.voters().iter().filter_map(|index| {
            let status = self.members[index.0].promised()?;
            (status.content != Content::Rebuilding).then_some((index, *status))
        });
        // The highest log term, then the highest position. Of equals one without damage, a complete one, the first.
        let rank = |(index, status): &(MemberIndex, StatusAnswer)| {
            (status.log_term, status.position, !self.members[index.0].damaged, status.content == Content::Complete)
        };
        let chosen = candidates.reduce(|best, next| if rank(&next) > rank(&best) { next } else { best });
        let Some((chosen, best)) = chosen else {
            self.note = Some("no replica that answers holds a complete copy; the others must come back".to_owned());
            return;
        };
        self.note = None;
        self.begin_successor_wait(now);
        self.chosen = Some(chosen);
        self.choose_epoch();
        self.phase = Phase::Comparing;
        let siblings: Vec<(MemberIndex, StatusAnswer)> = self
            .voters()
            .iter()
            .filter_map(|index| Some((index, *self.members[index.0].promised()?)))
            .filter(|(_, status)| status.log_term == best.log_term && status.content != Content::Rebuilding)
            .collect();
        let lowest = siblings.iter().map(|(_, status)| status.position).min().unwrap_or(best.position);
        for (index, status) in siblings {
            let after = if index == chosen { lowest } else { status.position };
            let logged = (status.content == Content::Mixed).then_some(LoggedExtents::Forgotten);
            if logged.is_none() {
                let header = Header { sequence: after, ..self.header(Kind::Log) };
                self.request(now, index, Frame::new(header, Body::Empty), Outstanding::Control);
            }
            self.members[index.0].stage = Stage::Comparing { status, logged };
        }
        self.plan_copies(now);
    }

    /// All logs are there: decides what is copied where, and begins.
    fn plan_copies(&mut self, now: Monotonic) {
        let waiting = self.members.iter().any(|member| matches!(member.stage, Stage::Comparing { logged: None, .. }));
        let Some(chosen) = self.chosen.filter(|_| !waiting) else { return };
        let Stage::Comparing { logged: Some(chosen_log), .. } = &self.members[chosen.0].stage else { return };
        let chosen_log = chosen_log.clone();
        // Members that differ from the chosen one in known extents only are quick to bring along.
        let mut plans: Vec<(MemberIndex, Option<Copy>)> = Vec::new();
        for index in self.member_indices().filter(|index| *index != chosen) {
            if let Stage::Comparing { logged: Some(LoggedExtents::All(own)), .. } = &self.members[index.0].stage
                && let LoggedExtents::All(others) = &chosen_log
            {
                let copy = Copy::of(own.iter().chain(others).copied());
                plans.push((index, (!copy.is_finished()).then_some(copy)));
            }
        }
        let voters = self.voters();
        if plans.len() + 1 < voters.majority() {
            // They are no majority: what the others lack is copied to them before anything is served.
            for index in voters.iter().filter(|index| *index != chosen) {
                let status = match &self.members[index.0].stage {
                    Stage::Comparing { .. } if plans.iter().any(|(planned, _)| *planned == index) => continue,
                    Stage::Comparing { status, .. } | Stage::Promised(status) => status,
                    _ => continue,
                };
                plans.push((index, Some(Copy::since(status.synced, self.config.size))));
            }
        }
        self.phase = Phase::Reconciling;
        self.members[chosen.0].stage = Stage::Reconciled;
        self.tell_epoch(now, chosen, true);
        for (index, copy) in plans {
            self.begin_reconciling(now, index, copy);
        }
        // The rest waits until the volume is served.
        for member in &mut self.members {
            if let Stage::Comparing { status, .. } = member.stage {
                member.stage = Stage::Promised(status);
            }
        }
        self.adopt_when_reconciled(now);
    }

    /// What the member has keeps its rank until it adopts the term: if the chosen one is lost now, it may be the best there is.
    fn begin_reconciling(&mut self, now: Monotonic, index: MemberIndex, copy: Option<Copy>) {
        // No copied block may carry an earlier epoch than the original.
        self.tell_epoch(now, index, true);
        let Some(copy) = copy else {
            self.members[index.0].stage = Stage::Reconciled;
            return;
        };
        let member = &mut self.members[index.0];
        member.stage = Stage::Reconciling { begun: false };
        member.copy = Some(copy);
        let header = Header { sequence: Seq::ZERO, ..self.header(Kind::CopyBegin) };
        self.request(now, index, Frame::new(header, Body::Empty), Outstanding::Control);
    }

    /// Tells all participants to adopt the term once each has the chosen content.
    pub(super) fn adopt_when_reconciled(&mut self, now: Monotonic) {
        if !matches!(self.phase, Phase::Reconciling) || self.members.iter().any(|member| matches!(member.stage, Stage::Reconciling { .. }))
        {
            return;
        }
        self.adopting = true;
        for index in self.member_indices() {
            if matches!(self.members[index.0].stage, Stage::Reconciled) {
                let member = &mut self.members[index.0];
                member.stage = Stage::Adopting;
                (member.received, member.durable, member.sent, member.flush_sent) = (Seq::ZERO, Seq::ZERO, Seq::ZERO, Seq::ZERO);
                let header = Header { sequence: Seq::ZERO, ..self.header(Kind::Adopt) };
                self.request(now, index, Frame::new(header, Body::Empty), Outstanding::Control);
            }
        }
    }

    /// Whether all participants have adopted the term, and are a majority.
    pub(super) fn is_adopted(&self) -> bool {
        !self.members.iter().any(|member| matches!(member.stage, Stage::Adopting)) && self.is_majority(|_, member| member.is_joined())
    }

    /// A participant has adopted the term, or time has passed: serves once all have, and nobody else does.
    pub(super) fn serve_when_adopted(&mut self, now: Monotonic) {
        let (Phase::Reconciling, Some(term)) = (&self.phase, self.term) else { return };
        if !self.is_adopted() || self.may_predecessor_read(now) {
            return;
        }
        self.phase = Phase::Serving;
        self.adopting = false;
        self.chosen = None;
        self.actions.push_back(Action::Serve(term));
        self.start_rebuilds(now);
        self.start_queued(now);
        self.propose_change(now);
    }

    /// A participant was lost before serving: what the others hold is asked for anew. Under the same term only if nobody can have
    /// adopted it: one that did and comes back would pass for equal to others that then adopt another content.
    pub(super) fn restart_gathering(&mut self, now: Monotonic) {
        let renew = std::mem::take(&mut self.adopting);
        let given_up = self.term.unwrap_or(Term::ZERO);
        if !renew {
            self.phase = Phase::Gathering { majority_at: None };
        } else if !self.take_record(given_up) {
            // Nothing can be chosen any more: its supervisor starts it again, and the next attempt says so.
            return self.supersede(given_up);
        }
        self.chosen = None;
        self.stalled_chunks.clear();
        self.stalled_copies.clear();
        for index in self.member_indices() {
            self.drop_chunks(now, index);
            let member = &mut self.members[index.0];
            member.in_sync = false;
            member.left_at = None;
            member.copy = None;
            member.forget_epochs();
            if matches!(
                member.stage,
                Stage::Promised(_)
                    | Stage::Comparing { .. }
                    | Stage::Reconciling { .. }
                    | Stage::Reconciled
                    | Stage::Adopting
                    | Stage::Joined
            ) || renew && matches!(self.members[index.0].stage, Stage::Promising)
            {
                self.forget_outstanding(index);
                if renew {
                    self.members[index.0].stage = Stage::Idle;
                } else {
                    self.ask_promise(now, index);
                }
            }
        }
    }
}
