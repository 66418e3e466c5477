//! Connections: frames take time and arrive in order; each end learns of a break in its own time.

use carrick_replicator::engine::MemberIndex;
use carrick_replicator::replica::ConnectionId;
use carrick_replicator::wire::Frame;

use super::{Event, MILLISECOND, Micros, SECOND, World};

#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    pub(super) replica: usize,
    /// When the last frame in each direction arrives, so that order is kept.
    pub(super) to_replica: Micros,
    pub(super) to_target: Micros,
    pub(super) open_at_target: bool,
    /// Nothing sent to the replica arrives any more.
    pub(super) cut: bool,
}

impl World {
    /// Which member the connection belongs to, if it is the current target's current one.
    pub(super) fn member_of(&self, connection: ConnectionId) -> Option<MemberIndex> {
        let index = self.links.iter().position(|link| *link == Some(connection))?;
        self.connections[&connection].open_at_target.then_some(MemberIndex(index))
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
        if self.links[state.replica] == Some(connection) {
            let member = MemberIndex(state.replica);
            if alive {
                self.connections.get_mut(&connection).unwrap().open_at_target = true;
                if let Some(engine) = &mut self.engine {
                    engine.on_connected(now, member);
                }
            } else {
                self.links[state.replica] = None;
                if let Some(engine) = &mut self.engine {
                    engine.on_disconnected(now, member, "connection refused".to_owned());
                }
            }
        }
    }

    pub(super) fn gone_at_target(&mut self, connection: ConnectionId) {
        let Some(index) = self.links.iter().position(|link| *link == Some(connection)) else { return };
        self.links[index] = None;
        let now = self.monotonic();
        if let Some(engine) = &mut self.engine {
            engine.on_disconnected(now, MemberIndex(index), "connection lost".to_owned());
        }
    }

    pub(super) fn send(&mut self, connection: ConnectionId, frame: Frame, to_replica: bool) {
        let delay = 10 + self.dice.skewed(2 * MILLISECOND);
        let Some(replica) = self.connections.get(&connection).filter(|state| !(to_replica && state.cut)).map(|state| state.replica) else {
            return;
        };
        let delay = delay + if to_replica { self.link_delay(replica) } else { 0 };
        let state = self.connections.get_mut(&connection).unwrap();
        let last = if to_replica { &mut state.to_replica } else { &mut state.to_target };
        let at = (self.now + delay).max(*last + 1);
        *last = at;
        let frame = Box::new(frame);
        self.schedule(at, if to_replica { Event::ToReplica(connection, frame) } else { Event::ToTarget(connection, frame) });
    }

    /// The replica learns of a broken connection some time after the last frame on its way, or frames are lost with it.
    pub(super) fn break_at_replica(&mut self, connection: ConnectionId) {
        let Some(state) = self.connections.get(&connection).copied() else { return };
        if self.dice.once_in(2) {
            self.events.retain(|_, event| !matches!(event, Event::ToReplica(other, _) if *other == connection));
            self.connections.entry(connection).and_modify(|state| state.cut = true);
        }
        let delay = self.dice.skewed(SECOND);
        self.schedule(state.to_replica.max(self.now) + 1 + delay, Event::GoneAtReplica(connection));
    }
}
