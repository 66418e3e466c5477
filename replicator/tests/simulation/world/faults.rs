//! What goes wrong, and how it is mended.

use std::time::Duration;

use carrick_backing_store::{BlockIndex, ByteLength, PowerLoss};
use carrick_replicator::engine::{Engine, EngineConfig, RequestTag};
use carrick_replicator::replica::{ConnectionId, ReplicaService};

use super::client::Pending;
use super::{Event, MILLISECOND, SECOND, World};
use crate::machine_store::{BLOCKS, size, volume};

/// Blocks that are tried until one is found that can rot: many are holes.
const ROT_TRIES: u32 = 8;

/// After a fault that takes from a replica what it has acknowledged, others wait until all are in sync again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calm {
    /// A sync will fail there.
    Failing(usize),
    /// It has lost something, and will be started anew.
    Restarting(usize),
    /// It is back.
    Settling,
}

impl World {
    pub(super) fn start_replica(&mut self, index: usize) -> Result<(), String> {
        let machine = &mut self.machines[index];
        if machine.service.is_some() {
            return Ok(());
        }
        let found = machine.store.open().map_err(|reason| format!("replica {index} can't start: {reason}"))?;
        machine.opening += 1;
        machine.service = Some(ReplicaService::new(machine.store.id(), found));
        if self.calm == Some(Calm::Restarting(index)) {
            self.calm = Some(Calm::Settling);
        }
        self.note(format!("replica {index} starts"));
        Ok(())
    }

    pub(super) fn start_target(&mut self) {
        if self.engine.is_some() {
            return;
        }
        self.incarnation += 1;
        self.coverage.target_starts += 1;
        self.joined.fill(false);
        // Small, so that replicas fall behind, and lack only a part.
        let config = EngineConfig {
            backlog_bytes: 256 << 10,
            epoch_bytes: 1 << (12 + self.dice.below(8)),
            epoch_time: Duration::from_micros(1 + self.dice.skewed(2 * SECOND)),
            copy_rate: self.dice.coin().then_some(ByteLength::new(1 << 20)),
            ..EngineConfig::new(volume(), size(), self.machines.len(), self.dice.number())
        };
        let mut engine = Engine::new(config, self.pool.clone(), self.monotonic());
        // The kernel issues what was in flight again, in no particular order.
        let mut again: Vec<(RequestTag, Pending)> = self.pending.iter().map(|(tag, pending)| (*tag, pending.clone())).collect();
        while !again.is_empty() {
            let index = self.dice.index(again.len());
            let (tag, pending) = again.swap_remove(index);
            engine.submit(self.monotonic(), tag, pending.request);
        }
        self.engine = Some(engine);
        self.note(format!("target {} starts", self.incarnation));
    }

    pub(super) fn fault(&mut self) {
        if !self.faults {
            return;
        }
        let next = 5 * MILLISECOND + self.dice.skewed(3 * SECOND);
        self.schedule(self.now + next, Event::Fault);
        if self.calm.is_some() {
            return;
        }
        let index = self.dice.index(self.machines.len());
        match self.dice.below(14) {
            0..=2 => drop(self.kill_replica(index, PowerLoss::No)),
            3..=4 => self.stop_replica(index),
            5..=6 => {
                if let Some(connection) = self.links[index] {
                    self.note(format!("the connection to replica {index} breaks"));
                    self.break_at_replica(connection);
                    let delay = self.dice.skewed(2 * SECOND);
                    self.schedule(self.now + delay, Event::GoneAtTarget(connection));
                }
            }
            7..=8 => self.kill_target(),
            9 if !self.plan.rot => self.power_fails_everywhere(),
            10..=11 if !self.plan.rot && self.is_peaceful() => {
                self.kill_replica(index, PowerLoss::Yes);
                self.coverage.power_losses += 1;
                self.calm = Some(Calm::Restarting(index));
            }
            10..=13 if self.plan.rot && self.is_peaceful() => self.rot(index),
            12 if !self.plan.rot && self.is_peaceful() => {
                self.note(format!("the next sync of replica {index} will fail"));
                self.machines[index].store.fail_next_sync();
                self.calm = Some(Calm::Failing(index));
            }
            _ => {}
        }
    }

    /// Whether a machine may lose what it has acknowledged: the others have it, and the target, which knows what counts, won't go.
    fn is_peaceful(&self) -> bool {
        let others = |connection: &ConnectionId| !self.links.contains(&Some(*connection));
        let is_trouble = |event: &Event| match event {
            // An earlier target may yet take over some replica.
            Event::ToReplica(connection, _) | Event::Open(connection) => others(connection),
            Event::GoneAtReplica(connection) | Event::GoneAtTarget(connection) => !others(connection),
            _ => false,
        };
        // Of two, the one that is left is no majority, and gives nothing to copy.
        self.machines.len() > 2
            && self.all_joined()
            && self.machines.iter().all(|machine| machine.stopped.is_none())
            && !self.events.values().any(is_trouble)
    }

    /// The client asks for nothing new until all replicas are in sync again.
    pub(super) fn is_settling(&self) -> bool {
        self.calm == Some(Calm::Settling)
    }

    pub(super) fn advance_calm(&mut self) {
        match self.calm {
            Some(Calm::Failing(index)) if self.machines[index].store.is_poisoned() => {
                self.note(format!("a sync of replica {index} has failed"));
                self.coverage.failed_syncs += 1;
                self.joined[index] = false;
                self.calm = Some(Calm::Restarting(index));
                let delay = self.dice.skewed(3 * SECOND);
                self.schedule(self.now + delay, Event::Replace(index));
            }
            Some(Calm::Settling) if self.all_in_sync() => self.calm = None,
            _ => {}
        }
    }

    fn stop_replica(&mut self, index: usize) {
        if self.machines[index].stopped.is_none() && self.machines[index].service.is_some() {
            self.note(format!("replica {index} is stopped"));
            self.machines[index].stopped = Some(Vec::new());
            let resume = self.now + self.dice.skewed(6 * SECOND);
            self.schedule(resume, Event::Resume(index));
        }
    }

    /// `false` if it was dead already.
    pub(super) fn kill_replica(&mut self, index: usize, power: PowerLoss) -> bool {
        if self.machines[index].service.take().is_none() {
            return false;
        }
        self.note(format!("replica {index} is killed, power lost: {power:?}"));
        let machine = &mut self.machines[index];
        machine.stopped = None;
        (machine.completions_due, machine.alarm, machine.operations) = (0, None, 0);
        // What was to complete no longer does.
        machine.opening += 1;
        self.joined[index] &= power == PowerLoss::No;
        let seed = self.dice.number();
        machine.store.crash(power, seed);
        let broken = std::mem::take(&mut machine.connections);
        for connection in broken {
            let delay = self.dice.skewed(100 * MILLISECOND);
            self.schedule(self.now + delay, Event::GoneAtTarget(connection));
        }
        let back = self.now + 1 + self.dice.skewed(5 * SECOND);
        self.schedule(back, Event::StartReplica(index));
        true
    }

    pub(super) fn kill_target(&mut self) {
        let Some(engine) = self.engine.take() else { return };
        self.coverage.add_engine(&engine);
        self.note("the target is killed".to_owned());
        for link in std::mem::take(&mut self.links).into_iter().flatten() {
            self.break_at_replica(link);
        }
        self.links = vec![None; self.machines.len()];
        let back = self.now + 1 + self.dice.skewed(SECOND);
        self.schedule(back, Event::StartTarget);
    }

    fn power_fails_everywhere(&mut self) {
        self.note("power fails everywhere".to_owned());
        self.kill_target();
        self.coverage.power_losses_everywhere += 1;
        for index in 0..self.machines.len() {
            if !self.kill_replica(index, PowerLoss::Yes) {
                // It was dead already, and loses what was not on stable media all the same.
                let seed = self.dice.number();
                self.machines[index].store.crash(PowerLoss::Yes, seed);
            }
        }
        self.checker.power_fails();
        self.pending.clear();
    }

    /// Damages a block on one replica, once, if no other has a damaged one.
    fn rot(&mut self, index: usize) {
        if self.machines.iter().any(|machine| machine.rotten) {
            return;
        }
        for _ in 0..ROT_TRIES {
            let block = BlockIndex::new(self.dice.below(BLOCKS));
            if self.machines[index].store.rot(block) {
                self.machines[index].rotten = true;
                self.coverage.rotten += 1;
                return self.note(format!("block {block} rots on replica {index}"));
            }
        }
    }
}
