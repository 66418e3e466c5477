//! Connections: frames take time and arrive in order; each end learns of a break in its own time.

use carrick_replicator::engine::MemberIndex;
use carrick_replicator::replica::ConnectionId;
use carrick_replicator::wire::{Frame, Kind};

use super::target::Incarnation;
use super::{Event, MILLISECOND, Micros, SECOND, World};

#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    /// Whose target's it is.
    pub(super) incarnation: Incarnation,
    pub(super) replica: usize,
    /// When the last frame in each direction arrives, so that order is kept.
    pub(super) to_replica: Micros,
    pub(super) to_target: Micros,
    pub(super) open_at_target: bool,
    /// Nothing sent to the replica arrives any more.
    pub(super) cut: bool,
    /// Nothing sent to the target arrives any more.
    pub(super) mute: bool,
}

impl World {
    /// Which target's end of the connection it is, and which member's it is there, if that is the current one.
    pub(super) fn end_of(&mut self, connection: ConnectionId) -> Option<(Incarnation, MemberIndex)> {
        let state = self.connections.get(&connection).copied().filter(|state| state.open_at_target)?;
        let target = self.target_of(state.incarnation)?;
        (target.links[state.replica] == Some(connection)).then_some((state.incarnation, MemberIndex(state.replica)))
    }

    /// Gives an event back, unless it is for a target that is stopped: then it waits.
    pub(super) fn unless_target_stopped(&mut self, event: Event) -> Option<Event> {
        let incarnation = match &event {
            Event::ToTarget(connection, _) | Event::GoneAtTarget(connection) => self.connections.get(connection)?.incarnation,
            Event::Timer(incarnation, _) | Event::ConfigAnswered(incarnation, _) | Event::AskOld(incarnation) => *incarnation,
            _ => return Some(event),
        };
        let now = self.now;
        let Some(until) = self.target_of(incarnation).map(|target| target.stopped_until).filter(|until| *until > now) else {
            return Some(event);
        };
        self.schedule(until, event);
        None
    }

    pub(super) fn is_stopped(&self, connection: ConnectionId) -> bool {
        self.connections.get(&connection).is_some_and(|connection| self.machines[connection.replica].stopped.is_some())
    }

    pub(super) fn hold(&mut self, connection: ConnectionId, event: Event) {
        if let Some(held) = self.machine_of(connection).and_then(|machine| machine.stopped.as_mut()) {
            held.push(event);
        }
    }

    pub(super) fn open(&mut self, connection: ConnectionId) {
        let Some(state) = self.connections.get(&connection).copied() else { return };
        let now = self.monotonic();
        let machine = &mut self.machines[state.replica];
        let alive = machine.service.is_some();
        if let Some(service) = machine.service.as_mut() {
            machine.connections.insert(connection);
            service.on_connected(connection);
        }
        if alive {
            self.connections.get_mut(&connection).unwrap().open_at_target = true;
        }
        let Some(target) = self.target_of(state.incarnation).filter(|target| target.links[state.replica] == Some(connection)) else {
            return;
        };
        let member = MemberIndex(state.replica);
        if alive {
            target.engine.on_connected(now, member);
        } else {
            target.links[state.replica] = None;
            target.engine.on_disconnected(now, member, "connection refused".to_owned());
        }
    }

    pub(super) fn gone_at_target(&mut self, connection: ConnectionId) {
        let now = self.monotonic();
        let Some(state) = self.connections.get(&connection).copied() else { return };
        let Some(target) = self.target_of(state.incarnation).filter(|target| target.links[state.replica] == Some(connection)) else {
            return;
        };
        target.links[state.replica] = None;
        target.engine.on_disconnected(now, MemberIndex(state.replica), "connection lost".to_owned());
    }

    pub(super) fn send(&mut self, connection: ConnectionId, frame: Frame, to_replica: bool) {
        let delay = 10 + self.dice.skewed(2 * MILLISECOND);
        let arrives = |state: &&Connection| !(if to_replica { state.cut } else { state.mute });
        let Some(replica) = self.connections.get(&connection).filter(arrives).map(|state| state.replica) else { return };
        let delay = delay + if to_replica { self.link_delay(replica) } else { 0 };
        if frame.header.kind == Kind::PromiseAnswer {
            let promised = &mut self.machines[replica].promised;
            *promised = frame.header.term.max(*promised);
        }
        let state = self.connections.get_mut(&connection).unwrap();
        let last = if to_replica { &mut state.to_replica } else { &mut state.to_target };
        let at = (self.now + delay).max(*last + 1);
        *last = at;
        let frame = Box::new(self.plant_in_frame(connection, frame, to_replica));
        self.schedule(at, if to_replica { Event::ToReplica(connection, frame) } else { Event::ToTarget(connection, frame) });
    }

    /// Nothing sent to the replica arrives any more, nor what is on its way.
    pub(super) fn cut(&mut self, connection: ConnectionId) {
        self.events.retain(|_, event| !matches!(event, Event::ToReplica(other, _) if *other == connection));
        self.connections.entry(connection).and_modify(|state| state.cut = true);
    }

    /// The same of what is sent to the target, which hears of no end either.
    pub(super) fn mute(&mut self, connection: ConnectionId) {
        let arrives = |event: &Event| matches!(event, Event::ToTarget(other, _) | Event::GoneAtTarget(other) if *other == connection);
        self.events.retain(|_, event| !arrives(event));
        self.connections.entry(connection).and_modify(|state| state.mute = true);
    }

    /// The replica learns of a broken connection some time after the last frame on its way, or frames are lost with it.
    pub(super) fn break_at_replica(&mut self, connection: ConnectionId) {
        let Some(state) = self.connections.get(&connection).copied() else { return };
        if self.dice.once_in(2) {
            self.cut(connection);
        }
        let delay = self.dice.skewed(SECOND);
        self.schedule(state.to_replica.max(self.now) + 1 + delay, Event::GoneAtReplica(connection));
    }
}
