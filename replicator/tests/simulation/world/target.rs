//! Targets: the one that the client uses; `old` has the one that it no longer uses.

use std::collections::BTreeMap;
use std::time::Duration;

use carrick_backing_store::{ByteLength, Epoch};
use carrick_replicator::engine::{Action, Engine, EngineConfig, MemberIndex, Predecessor, RequestTag};
use carrick_replicator::replica::ConnectionId;
use carrick_replicator::time::Monotonic;
use carrick_replicator::wire::{Flags, Frame, Kind};

use super::client::Pending;
use super::faults::FaultKind;
use super::network::Connection;
use super::old::Asked;
use super::planted::Bug;
use super::{Event, MILLISECOND, Micros, SECOND, World};
use crate::machine_store::volume;

/// Counts targets. Each has one of its own.
pub(super) type Incarnation = u64;

pub(super) struct Target {
    pub(super) incarnation: Incarnation,
    pub(super) engine: Engine,
    /// The current connection to each member.
    pub(super) links: Vec<Option<ConnectionId>>,
    /// The highest that it has told anybody to raise to.
    pub(super) epoch: Epoch,
    /// When it is next told that time has passed.
    pub(super) timer: Option<(Micros, u64)>,
    /// Stopped by a signal: events wait until then.
    pub(super) stopped_until: Micros,
    /// What those who still use it when it has been left ask of it.
    pub(super) asked: BTreeMap<RequestTag, Asked>,
}

impl World {
    /// The target of this incarnation, if it still lives.
    pub(super) fn target_of(&mut self, incarnation: Incarnation) -> Option<&mut Target> {
        [&mut self.target, &mut self.old].into_iter().flatten().find(|target| target.incarnation == incarnation)
    }

    pub(super) fn is_current(&self, incarnation: Incarnation) -> bool {
        self.target.as_ref().is_some_and(|target| target.incarnation == incarnation)
    }

    pub(super) fn engine(&self) -> Option<&Engine> {
        self.target.as_ref().map(|target| &target.engine)
    }

    /// The current target's connection to a replica.
    pub(super) fn link(&self, index: usize) -> Option<ConnectionId> {
        self.target.as_ref()?.links[index]
    }

    pub(super) fn start_target(&mut self) {
        if self.target.is_some() {
            return;
        }
        self.incarnation += 1;
        self.coverage.target_starts += 1;
        self.joined.fill(false);
        // Small, so that replicas fall behind, and lack only a part.
        let config = EngineConfig {
            backlog_bytes: if self.fault_kinds.contains(&FaultKind::LastOne) { 64 << 20 } else { 256 << 10 },
            epoch_bytes: 1 << (12 + self.dice.skewed(8)),
            epoch_time: Duration::from_micros(1 + self.dice.skewed(2 * SECOND)),
            changes_config: true,
            retiring: self.retiring,
            attachment: self.record.attachment,
            predecessor: if self.old.is_some() && !self.has(Bug::ForgetPredecessor) { Predecessor::MayServe } else { Predecessor::Ended },
            copy_rate: self.dice.coin().then_some(ByteLength::new(1 << 20)),
            ..EngineConfig::new(volume(), self.growth.size, self.machines.len(), self.dice.number())
        };
        let mut engine = Engine::new(config, self.pool.clone(), self.monotonic());
        // The kernel issues what was in flight again, in no particular order.
        let mut again: Vec<(RequestTag, Pending)> = self.pending.iter().map(|(tag, pending)| (*tag, pending.clone())).collect();
        while !again.is_empty() {
            let index = self.dice.index(again.len());
            let (tag, pending) = again.swap_remove(index);
            engine.submit(self.monotonic(), tag, pending.request);
        }
        let links = vec![None; self.machines.len()];
        self.target = Some(Target {
            incarnation: self.incarnation,
            engine,
            links,
            epoch: Epoch::NEVER,
            timer: None,
            stopped_until: 0,
            asked: BTreeMap::new(),
        });
        self.note(format!("target {} starts", self.incarnation));
    }

    pub(super) fn kill_target(&mut self) {
        let Some(target) = self.target.take() else { return };
        self.note("the target is killed".to_owned());
        self.bury(target);
        let back = self.now + 1 + self.dice.skewed(SECOND);
        self.schedule(back, Event::StartTarget);
    }

    pub(super) fn bury(&mut self, target: Target) {
        self.coverage.add_engine(&target.engine);
        target.links.into_iter().flatten().for_each(|link| self.break_at_replica(link));
    }

    pub(super) fn on_timer(&mut self, incarnation: Incarnation, number: u64) {
        let now = self.monotonic();
        if let Some(target) = self.target_of(incarnation)
            && target.timer.is_some_and(|(_, armed)| armed == number)
        {
            target.timer = None;
            target.engine.on_timer(now);
        }
    }

    pub(super) fn arm_timers(&mut self) {
        let now = self.now;
        let mut due = Vec::new();
        for target in [&mut self.target, &mut self.old].into_iter().flatten() {
            let Some(deadline) = target.engine.deadline() else { continue };
            let at = u64::try_from(deadline.since(Monotonic::default()).as_nanos().div_ceil(1_000)).unwrap().max(now);
            if target.timer.is_none_or(|(timer, _)| at < timer || timer < now) {
                self.timer_number += 1;
                target.timer = Some((at, self.timer_number));
                due.push((at, Event::Timer(target.incarnation, self.timer_number)));
            }
        }
        due.into_iter().for_each(|(at, event)| self.schedule(at, event));
    }

    /// Carries out what the targets want. `true` if they wanted something.
    pub(super) fn pump_targets(&mut self) -> Result<bool, String> {
        let mut busy = false;
        while let Some(action) = self.target.as_mut().and_then(|target| target.engine.next_action()) {
            busy = true;
            self.on_action(self.incarnation, action)?;
        }
        while let Some(old) = &mut self.old
            && let Some(action) = old.engine.next_action()
        {
            busy = true;
            let incarnation = old.incarnation;
            self.on_action(incarnation, action)?;
        }
        self.check_verification()?;
        Ok(busy)
    }

    fn on_action(&mut self, incarnation: Incarnation, action: Action) -> Result<(), String> {
        match action {
            Action::Connect(member) => self.connect(incarnation, member),
            Action::Send(member, frame) => {
                let link = self.target_of(incarnation).and_then(|target| target.links[member.0]);
                let connection = link.ok_or_else(|| format!("a frame for {member:?}, which has no connection"))?;
                if self.is_current(incarnation) {
                    self.count_frame(member, &frame);
                }
                self.note_epoch(incarnation, &frame);
                self.send(connection, frame, true);
            }
            Action::Disconnect(member) => {
                self.dropped += 1;
                let Some(target) = self.target_of(incarnation) else { return Ok(()) };
                let link = target.links[member.0].take();
                let reason = target.engine.members()[member.0].last_error.clone();
                self.note(format!("target {incarnation} drops {member:?}: {reason:?}"));
                if let Some(connection) = link {
                    self.break_at_replica(connection);
                }
            }
            Action::Config(request) => self.ask_config(incarnation, request),
            Action::Complete(tag, result) if self.is_current(incarnation) => self.on_complete(tag, result)?,
            Action::Complete(tag, result) => self.on_old_complete(tag, result)?,
            Action::Serve(term) => {
                self.coverage.elections += 1;
                self.note(format!("target {incarnation} serves under {term}"));
                if self.dice.coin()
                    && let Some(target) = self.target_of(incarnation)
                {
                    target.engine.verify();
                }
            }
            Action::Grown(size) => self.note(format!("target {incarnation} reaches up to block {}", size.blocks())),
            Action::Superseded { promised } if self.is_current(incarnation) => {
                // A dead predecessor's attempt reached some replica with a higher term: the target ends, and is started again.
                self.note(format!("superseded by {promised}"));
                self.kill_target();
            }
            Action::Superseded { promised } => {
                self.note(format!("target {incarnation} has found out about {promised}"));
                self.kill_old();
            }
        }
        Ok(())
    }

    fn connect(&mut self, incarnation: Incarnation, member: MemberIndex) {
        self.next_connection += 1;
        let connection = ConnectionId(self.next_connection);
        let state =
            Connection { incarnation, replica: member.0, to_replica: 0, to_target: 0, open_at_target: false, cut: false, mute: false };
        self.connections.insert(connection, state);
        if let Some(target) = self.target_of(incarnation) {
            target.links[member.0] = Some(connection);
        }
        let delay = 50 + self.dice.skewed(MILLISECOND);
        let at = (self.now + delay).max(self.reachable_from(incarnation, member));
        self.schedule(at, Event::Open(connection));
    }

    /// What the target tells a member shows what becomes of it.
    fn count_frame(&mut self, member: MemberIndex, frame: &Frame) {
        let serving = self.is_serving();
        let (begun, joined) = (&mut self.copy_begun[member.0], &mut self.joined[member.0]);
        match frame.header.kind {
            Kind::CopyBegin => {
                *begun = true;
                if serving && frame.header.flags.contains(Flags::REBUILD) {
                    self.coverage.left_behind += u64::from(std::mem::take(joined));
                }
            }
            // The replica that is copied to is asked, too.
            Kind::Changed if std::mem::take(begun) => {
                let is_difference = frame.header.sequence.get() > 0;
                *(if is_difference { &mut self.coverage.differences } else { &mut self.coverage.whole }) += 1;
            }
            _ => {}
        }
    }

    /// A frame reaches a target's end of a connection.
    pub(super) fn on_frame_at_target(&mut self, connection: ConnectionId, frame: Frame) {
        let now = self.monotonic();
        let Some((incarnation, member)) = self.end_of(connection) else { return };
        if self.is_current(incarnation) {
            self.joined[member.0] |= frame.header.kind == Kind::AdoptAnswer;
        }
        if let Some(target) = self.target_of(incarnation) {
            target.engine.on_frame(now, member, frame);
        }
    }
}
