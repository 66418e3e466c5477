//! What goes wrong, and how it is mended.

use carrick_backing_store::dice::Dice;
use carrick_backing_store::{BlockIndex, Epoch, PowerLoss, Term};
use carrick_replicator::engine::MemberIndex;
use carrick_replicator::replica::{ConnectionId, ReplicaService};

use super::planted::{Bug, Planted};
use super::{Event, MILLISECOND, Micros, Plan, SECOND, World};
use crate::machine_store::{BLOCKS, machine_store};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    KillReplica,
    StopReplica,
    BreakConnection,
    /// And another replica goes soon after, for long: what it lacks may be told by the one that has just come back.
    Relay,
    KillTarget,
    /// Another target takes over, while the old one lives.
    TakeOver,
    Part,
    /// All replicas but one are killed, while that one gets ever later.
    LastOne,
    /// The metadata store can't be reached for a while.
    LoseRecords,
    /// A replica that doesn't count is replaced by one that has nothing.
    Renew,
    /// The operator goes on with moving a replica to another store, or thinks better of it.
    Move,
    /// Of one machine.
    Power,
    PowerEverywhere,
    FailSync,
    Rot,
}

const ALWAYS: [FaultKind; 10] = [
    FaultKind::KillReplica,
    FaultKind::StopReplica,
    FaultKind::BreakConnection,
    FaultKind::Relay,
    FaultKind::KillTarget,
    FaultKind::TakeOver,
    FaultKind::Part,
    FaultKind::LastOne,
    FaultKind::LoseRecords,
    FaultKind::Renew,
];
const LOSSES: [FaultKind; 3] = [FaultKind::Power, FaultKind::PowerEverywhere, FaultKind::FailSync];

/// The kinds of faults in one run. Some are left out, since what one kind brings about another may mend at once.
pub(super) fn choose_faults(dice: &mut Dice, plan: &Plan) -> Vec<FaultKind> {
    if let Some(faults) = plan.bug.and_then(Bug::faults) {
        return faults.to_vec();
    }
    let rot = plan.rot;
    let losses: &[FaultKind] = if rot { &[FaultKind::Rot] } else { &LOSSES };
    let mut kinds: Vec<FaultKind> = ALWAYS.iter().chain(losses).copied().filter(|_| dice.coin()).collect();
    if rot && !kinds.contains(&FaultKind::Rot) || kinds.is_empty() {
        kinds.push(losses[0]);
    }
    kinds.extend(plan.moves.then_some(FaultKind::Move));
    kinds
}

/// Blocks that are tried until one is found that can rot: many are holes.
const ROT_TRIES: u32 = 8;

/// After so long without a request that was completed, there are no faults for a while.
const DROUGHT: Micros = 30 * SECOND;
const BREATHER: Micros = 10 * SECOND;

/// After a fault that takes from a replica what it has acknowledged, others wait until all are in sync again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calm {
    /// A sync will fail there, or on all machines: then power does, too.
    Failing { index: usize, everywhere: bool },
    /// It has lost something, and will be started anew.
    Restarting(usize),
    /// It is back.
    Settling,
    /// Power will fail everywhere.
    Doomed,
}

impl World {
    pub(super) fn start_replica(&mut self, index: usize) -> Result<(), String> {
        let machine = &mut self.machines[index];
        if machine.service.is_some() {
            return Ok(());
        }
        if self.faults && self.now < machine.away_until {
            let at = machine.away_until;
            self.schedule(at, Event::StartReplica(index));
            return Ok(());
        }
        let found = machine.store.open().map_err(|reason| format!("replica {index} can't start: {reason}"))?;
        if found.iter().any(|found| found.state.promised < machine.promised) {
            return Err(format!("replica {index} has forgotten its promise of term {}: {found:?}", machine.promised));
        }
        machine.opening += 1;
        machine.epoch = found.first().map_or(Epoch::NEVER, |found| found.epoch);
        machine.planted = Planted::at_start(&found);
        machine.service = Some(ReplicaService::new(machine.store.id(), found));
        if self.calm == Some(Calm::Restarting(index)) {
            self.calm = Some(Calm::Settling);
        }
        self.note(format!("replica {index} starts"));
        Ok(())
    }

    pub(super) fn fault(&mut self) {
        if !self.faults {
            return;
        }
        // Some kinds alone, one upon the other, would never let anything happen.
        if self.now > self.progress_at + DROUGHT {
            self.progress_at = self.now;
            return self.schedule(self.now + BREATHER, Event::Fault);
        }
        let longest = if self.plan.dense { SECOND } else { 3 * SECOND };
        let next = 5 * MILLISECOND + self.dice.skewed(longest);
        self.schedule(self.now + next, Event::Fault);
        // Others would mostly spoil what takes some seconds to come about.
        if self.calm.is_some() || self.is_one_late() {
            return;
        }
        let index = self.dice.index(self.machines.len());
        let kind = self.fault_kinds[self.dice.index(self.fault_kinds.len())];
        match kind {
            FaultKind::KillReplica => drop(self.kill_replica(index, PowerLoss::No)),
            FaultKind::StopReplica => {
                let time = self.dice.skewed(6 * SECOND);
                self.stop_replica(index, time);
            }
            FaultKind::BreakConnection => self.break_connection(index),
            FaultKind::Relay => {
                self.break_connection(index);
                let other = self.dice.index(self.machines.len());
                let begin = self.now + self.dice.below(3 * SECOND);
                let time = 2 * SECOND + self.dice.skewed(6 * SECOND);
                self.schedule(begin, Event::Stop(other, time));
            }
            // Mostly it gets somewhere before.
            FaultKind::KillTarget | FaultKind::TakeOver | FaultKind::Part | FaultKind::LastOne
                if !self.is_serving() && !self.dice.once_in(4) => {}
            FaultKind::KillTarget => self.kill_target(),
            FaultKind::TakeOver => self.take_over(),
            FaultKind::Part => self.part(index),
            FaultKind::LastOne => self.leave_one(index),
            // Else some runs would never get anywhere.
            FaultKind::LoseRecords if self.now < self.records_away + 3 * SECOND => {}
            FaultKind::LoseRecords => {
                self.records_away = self.now + self.dice.skewed(8 * SECOND);
                self.note("the metadata store can't be reached".to_owned());
            }
            FaultKind::Renew => self.renew(index),
            FaultKind::Move => self.go_on_moving(index),
            FaultKind::PowerEverywhere => self.power_fails_everywhere(),
            FaultKind::Power if self.is_peaceful(index) => {
                self.kill_replica(index, PowerLoss::Yes);
                self.coverage.power_losses += 1;
                self.calm = Some(Calm::Restarting(index));
            }
            FaultKind::FailSync if self.is_peaceful(index) => {
                let everywhere = self.fault_kinds.contains(&FaultKind::PowerEverywhere) && self.dice.coin();
                self.note(format!("the next sync of replica {index} will fail, and of all: {everywhere}"));
                let machines = self.machines.iter_mut().enumerate();
                machines.filter(|(other, _)| everywhere || *other == index).for_each(|(_, machine)| machine.store.fail_next_sync());
                self.calm = Some(Calm::Failing { index, everywhere });
            }
            FaultKind::Rot if self.is_peaceful(index) => self.rot(index),
            FaultKind::Power | FaultKind::FailSync | FaultKind::Rot => {}
        }
    }

    /// What is done with a replica that is lost for good: another takes its place, of which the next target learns.
    pub(super) fn renew(&mut self, index: usize) {
        if self.record.members.contains(MemberIndex(index)) {
            return;
        }
        self.note(format!("replica {index} is replaced by a new one"));
        self.coverage.renewed += 1;
        self.kill_replica(index, PowerLoss::No);
        let machine = &mut self.machines[index];
        self.coverage.add_store(machine.store.counts());
        machine.store = machine_store(self.plan.store, index, self.growth.size, self.dice.number(), false);
        (machine.promised, machine.rotten) = (Term::ZERO, false);
        machine.opening += 1;
        self.growth.renew(index);
        // Whoever still wants to take the old one in names a store that the volume no longer has.
        self.record.version = self.record.version.next();
        self.kill_target();
    }

    fn break_connection(&mut self, index: usize) {
        if let Some(connection) = self.link(index) {
            self.note(format!("the connection to replica {index} breaks"));
            self.break_at_replica(connection);
            let delay = self.dice.skewed(2 * SECOND);
            self.schedule(self.now + delay, Event::GoneAtTarget(connection));
        }
    }

    /// For a while the target's writes reach one replica only, then the target dies, and that replica is not heard of: it holds
    /// what a successor never learns of.
    fn part(&mut self, index: usize) {
        let lost: Vec<ConnectionId> =
            (0..self.machines.len()).filter(|other| *other != index).filter_map(|other| self.link(other)).collect();
        lost.into_iter().for_each(|connection| self.cut(connection));
        self.note(format!("only replica {index} hears the target"));
        let end = self.now + self.dice.skewed(5 * SECOND);
        let time = SECOND + self.dice.skewed(6 * SECOND);
        self.schedule(end, Event::EndTarget(self.incarnation));
        self.schedule(end + 10 * MILLISECOND, Event::Stop(index, time));
    }

    /// What is in flight when a target dies is asked for again, and written over. It isn't if the client's machine goes, too.
    pub(super) fn end_part(&mut self) {
        if self.fault_kinds.contains(&FaultKind::PowerEverywhere) && self.dice.coin() {
            self.power_fails_everywhere();
        } else {
            self.kill_target();
        }
    }

    /// Whether this machine may lose what it has acknowledged: the others have it, and the target, which knows what counts, won't go.
    fn is_peaceful(&self, index: usize) -> bool {
        let others = |connection: &ConnectionId| !self.is_current(self.connections[connection].incarnation);
        let is_trouble = |event: &Event| match event {
            Event::EndTarget(_) | Event::Stop(..) | Event::Kill(_) => true,
            // An earlier target may yet take over some replica.
            Event::ToReplica(connection, _) | Event::Open(connection) => others(connection),
            Event::GoneAtReplica(connection) | Event::GoneAtTarget(connection) => !others(connection),
            _ => false,
        };
        // Of one, nobody else has it, nor if all others are about to go.
        let is_left = |other: usize| other != index && !self.retiring.contains(MemberIndex(other));
        (0..self.machines.len()).any(is_left)
            && self.old.is_none()
            && self.all_joined()
            && self.all_count()
            && self.is_punctual()
            && self.machines.iter().all(|machine| machine.stopped.is_none())
            && !self.events.values().any(is_trouble)
    }

    /// The client asks for nothing new until all replicas are in sync again.
    pub(super) fn is_settling(&self) -> bool {
        self.calm == Some(Calm::Settling)
    }

    pub(super) fn advance_calm(&mut self) {
        match self.calm {
            Some(Calm::Failing { everywhere: true, .. }) if self.machines.iter().any(|machine| machine.store.is_poisoned()) => {
                self.note("syncs fail everywhere".to_owned());
                self.calm = Some(Calm::Doomed);
                // Whatever was said to be flushed must be there all the same.
                let at = self.now + self.dice.skewed(500 * MILLISECOND);
                self.schedule(at, Event::LosePower);
            }
            Some(Calm::Failing { index, everywhere: false }) if self.machines[index].store.is_poisoned() => {
                self.note(format!("a sync of replica {index} has failed"));
                self.coverage.failed_syncs += 1;
                self.joined[index] = false;
                self.calm = Some(Calm::Restarting(index));
                let delay = self.dice.skewed(3 * SECOND);
                self.schedule(self.now + delay, Event::Replace(index));
            }
            // Nobody takes it in again, nor asks it to sync anything.
            Some(Calm::Failing { index, everywhere: false }) if self.gone() == Some(index) => {
                self.calm = Some(Calm::Settling);
                self.replace_gone(index);
            }
            Some(Calm::Settling) if let Some(gone) = self.gone() => self.replace_gone(gone),
            Some(Calm::Settling) if self.all_in_sync() => self.calm = None,
            _ => {}
        }
    }

    pub(super) fn stop_replica(&mut self, index: usize, time: Micros) {
        if self.machines[index].stopped.is_none() && self.machines[index].service.is_some() {
            self.note(format!("replica {index} is stopped"));
            self.machines[index].stopped = Some(Vec::new());
            self.schedule(self.now + time, Event::Resume(index));
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

    pub(super) fn power_fails_everywhere(&mut self) {
        self.calm = None;
        self.note("power fails everywhere".to_owned());
        self.kill_target();
        self.kill_old();
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
