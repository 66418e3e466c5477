//! A primary, its replicas, the network between them and a client, in virtual time: one thread, one seed.
//!
//! What is simulated: messages that take time and arrive in order per connection; connections that break, with what is on its
//! way lost or still delivered; replicas killed, stopped for a while, and restarted; the target killed, its last messages arriving
//! after its successor's first, its requests issued again in another order (as ublk does); a target that has been left, and lives on
//! beside its successor; loss of power of one machine or of all; blocks that rot; syncs that fail. What is not: bytes (frames are
//! passed whole), and more faults at once than the protocol is meant to survive.

mod alone;
mod client;
mod epochs;
mod faults;
mod growth;
mod last_one;
mod moves;
mod network;
mod old;
mod planted;
mod records;
mod target;
mod verify;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::{BufferPool, Epoch, PowerLoss, Seq, Term};
use carrick_replicator::control::MemberState;
use carrick_replicator::engine::{ConfigRecord, ConfigRequest, Engine, MemberSet, RequestTag};
use carrick_replicator::replica::{ConnectionId, ReplicaService, ServiceAction};
use carrick_replicator::time::Monotonic;
use carrick_replicator::wire::Frame;

use crate::checker::{Checker, SECTOR};
use crate::coverage::Coverage;
use crate::machine_store::{BLOCKS, MachineStore, StoreKind, machine_store, read_all, volume_of};
use client::Pending;
use faults::{Calm, FaultKind, choose_faults};
use growth::Growth;
use last_one::LastOne;
use network::Connection;
use old::Apart;
pub use planted::Bug;
use planted::Planted;
use target::{Incarnation, Target};

/// Microseconds of virtual time.
pub type Micros = u64;

const MILLISECOND: Micros = 1_000;
const SECOND: Micros = 1_000_000;
/// From when a store's alarm rings to when its process looks.
const ALARM_LATENCY: Micros = 50;
/// Within this there are enough requests, those in a calm counted.
const LONG: Micros = 1_000 * SECOND;
/// After all faults have ended, everything must be in sync and answered within this.
const HEAL_LIMIT: Micros = 60 * SECOND;
/// Then nothing happens for so long, and nothing may go wrong.
const REST: Micros = 15 * SECOND;

/// Rounds of engine, replicas and client at one moment: far above what a full queue causes.
const ROUNDS_MAX: u32 = 100_000;
/// Events of one run: far above what the longest needs.
const STEPS_MAX: u64 = 5_000_000;

/// Blocks of a volume that is to grow.
const GROWS_FROM: u64 = 16;

/// What a run is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub replicas: usize,
    /// Requests to be completed before the faults end.
    pub requests: u64,
    /// Blocks rot, one at a time, instead of machines losing power: both together may leave no good copy.
    pub rot: bool,
    /// Faults come one upon the other.
    pub dense: bool,
    /// The client rests now and then: else all is over before anything slow can happen.
    pub pauses: bool,
    pub store: StoreKind,
    /// The volume begins small.
    pub grows: bool,
    /// Replicas are moved to other stores.
    pub moves: bool,
    /// Planted, to be found.
    pub bug: Option<Bug>,
    /// What happened longest ago is forgotten beyond so many lines.
    pub log_lines: usize,
}

#[derive(Debug)]
enum Event {
    /// A frame arrives at the replica's end of a connection.
    ToReplica(ConnectionId, Box<Frame>),
    /// A frame arrives at the target's end.
    ToTarget(ConnectionId, Box<Frame>),
    /// The connection opens at both ends.
    Open(ConnectionId),
    /// The end of the replica learns that the connection is gone.
    GoneAtReplica(ConnectionId),
    GoneAtTarget(ConnectionId),
    /// Something that is under way in this replica's store completes, if it is still this opening of the store.
    Complete(usize, u64),
    /// This replica's store wants to be looked at.
    Alarm(usize),
    StartReplica(usize),
    /// A replica whose store takes nothing any more is ended, to be started anew.
    Replace(usize),
    Stop(usize, Micros),
    Kill(usize),
    Resume(usize),
    /// Everywhere.
    LosePower,
    StartTarget,
    /// Something that this target asked reaches the metadata store; its answer reaches the target.
    ConfigAsked(Incarnation, ConfigRequest),
    ConfigAnswered(Incarnation, Result<ConfigRecord, String>),
    /// The target ends, if it is still this one.
    EndTarget(Incarnation),
    Timer(Incarnation, u64),
    /// Somebody reads from a target that was left.
    AskOld(Incarnation),
    Fault,
    /// The operator goes on making the volume larger.
    Grow,
    /// The client has rested.
    Rested,
}

struct Machine {
    store: Box<dyn MachineStore>,
    /// Counts how often the store was opened.
    opening: u64,
    /// Completions that are scheduled for this opening.
    completions_due: usize,
    /// When its store is next looked at for its alarm.
    alarm: Option<Micros>,
    /// Operations in the store.
    operations: usize,
    /// `None` while the process is dead.
    service: Option<ReplicaService>,
    /// Nobody starts it before.
    away_until: Micros,
    /// Stopped by a signal: events wait here.
    stopped: Option<Vec<Event>>,
    connections: BTreeSet<ConnectionId>,
    /// Since its last damage, this one needs care: no second fault that the protocol can't survive.
    rotten: bool,
    /// The highest term that it has ever told anybody to have promised.
    promised: Term,
    /// What its next write carries.
    epoch: Epoch,
    planted: Planted,
}

pub struct World {
    dice: Dice,
    plan: Plan,
    now: Micros,
    events: BTreeMap<(Micros, u64), Event>,
    event_number: u64,
    machines: Vec<Machine>,
    connections: BTreeMap<ConnectionId, Connection>,
    next_connection: u64,
    /// The client's.
    target: Option<Target>,
    /// One that the client has left.
    old: Option<Target>,
    apart: Option<Apart>,
    /// The latest one's.
    incarnation: Incarnation,
    /// What the metadata store has, and until when it can't be reached.
    record: ConfigRecord,
    records_away: Micros,
    growth: Growth,
    /// Which replica is to be moved away: targets that start are told.
    retiring: MemberSet,
    last_one: Option<LastOne>,
    timer_number: u64,
    pending: BTreeMap<RequestTag, Pending>,
    next_tag: u64,
    completed: u64,
    /// The same, with those in a calm.
    answered: u64,
    /// When a request was completed last.
    progress_at: Micros,
    /// Until when the client asks for nothing new.
    pause_until: Micros,
    checker: Checker,
    pool: BufferPool,
    faults: bool,
    fault_kinds: Vec<FaultKind>,
    calm: Option<Calm>,
    steps: u64,
    /// Per member: joined under this target, and its machine kept its power since.
    joined: Vec<bool>,
    /// Per member: a copy into it has begun, and nothing is known of its extent.
    copy_begun: Vec<bool>,
    coverage: Coverage,
    /// In which epoch a term's writes were sent first.
    written_in: BTreeMap<(Term, Seq), Epoch>,
    /// Connections that engines gave up.
    dropped: u64,
    /// One replica holds something else, on purpose.
    is_made_different: bool,
    pub log: VecDeque<String>,
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let blocks = if plan.grows { GROWS_FROM } else { BLOCKS };
        let machines = (0..plan.replicas).map(|index| {
            let short_log = plan.seed.is_multiple_of(3) && !plan.rot;
            Machine {
                store: machine_store(plan.store, index, volume_of(blocks), plan.seed, short_log),
                opening: 0,
                completions_due: 0,
                alarm: None,
                operations: 0,
                service: None,
                away_until: 0,
                stopped: None,
                connections: BTreeSet::new(),
                rotten: false,
                promised: Term::ZERO,
                epoch: Epoch::NEVER,
                planted: Planted::default(),
            }
        });
        let mut world = Self {
            dice: Dice::new(plan.seed),
            now: 0,
            events: BTreeMap::new(),
            event_number: 0,
            machines: machines.collect(),
            connections: BTreeMap::new(),
            next_connection: 0,
            target: None,
            old: None,
            apart: None,
            incarnation: 0,
            record: ConfigRecord::first(plan.replicas),
            records_away: 0,
            growth: Growth::new(blocks, plan.replicas),
            retiring: MemberSet::NONE,
            last_one: None,
            timer_number: 0,
            pending: BTreeMap::new(),
            next_tag: 0,
            completed: 0,
            answered: 0,
            progress_at: 0,
            pause_until: 0,
            checker: Checker::default(),
            pool: BufferPool::new(1 << 20),
            faults: true,
            fault_kinds: choose_faults(&mut Dice::new(plan.seed ^ 0x6661_756c), &plan),
            calm: None,
            steps: 0,
            joined: vec![false; plan.replicas],
            copy_begun: vec![false; plan.replicas],
            coverage: Coverage::default(),
            written_in: BTreeMap::new(),
            dropped: 0,
            is_made_different: false,
            log: VecDeque::new(),
            plan,
        };
        for index in 0..plan.replicas {
            world.schedule(0, Event::StartReplica(index));
        }
        world.schedule(0, Event::StartTarget);
        world.schedule(20 * MILLISECOND, Event::Fault);
        if plan.grows {
            world.schedule_growth();
        }
        world
    }

    /// Runs to the end, or to the first violation.
    pub fn run(&mut self) -> Result<(), String> {
        let result = self.run_faults().and_then(|()| self.heal());
        result.map_err(|reason| format!("at {} µs: {reason}", self.now))
    }

    fn run_faults(&mut self) -> Result<(), String> {
        while self.completed < self.plan.requests && self.now <= LONG || self.calm.is_some() {
            self.step()?;
            // With one calm upon the other there are few requests besides.
            if self.now > LONG && self.answered < self.plan.requests || self.now > LONG + HEAL_LIMIT {
                let (answered, calm, now) = (self.answered, self.calm, self.now / SECOND);
                return Err(format!("only {answered} requests in {now} s, or {calm:?} without an end: {}", self.describe()));
            }
        }
        Ok(())
    }

    /// Ends all faults, and expects everything to come back to order: every request answered, every replica in sync and
    /// holding the same bytes, and those the ones that were written.
    fn heal(&mut self) -> Result<(), String> {
        self.faults = false;
        self.hurry();
        self.records_away = 0;
        self.note("faults end".to_owned());
        for index in 0..self.machines.len() {
            self.schedule(self.now, Event::Resume(index));
        }
        self.finish_move()?;
        let limit = self.now + HEAL_LIMIT;
        while !(self.pending.is_empty() && self.all_in_sync() && self.old.is_none() && self.has_grown() && self.is_past()) {
            self.step()?;
            if self.now > limit {
                return Err(format!("not in order {} s after the faults ended: {}", HEAL_LIMIT / SECOND, self.describe()));
            }
        }
        self.rest()?;
        self.verify()?;
        self.compare()?;
        self.machines
            .iter_mut()
            .enumerate()
            .try_for_each(|(index, machine)| machine.store.finish().map_err(|reason| format!("replica {index} at its end: {reason}")))
    }

    /// Whether nothing is under way that a fault has begun: nobody late, and no connection broken that one end knows nothing of.
    fn is_past(&self) -> bool {
        let breaks = |event: &Event| matches!(event, Event::GoneAtReplica(_) | Event::GoneAtTarget(_));
        self.is_punctual() && !self.events.values().any(breaks)
    }

    /// Without requests and faults no connection is given up.
    fn rest(&mut self) -> Result<(), String> {
        let (until, dropped) = (self.now + REST, self.dropped);
        while self.now < until || !self.all_in_sync() {
            self.step()?;
            if self.dropped > dropped {
                return Err(format!("a connection was given up though nothing happened: {}", self.describe()));
            }
        }
        Ok(())
    }

    /// What happened.
    pub fn coverage(&self) -> Coverage {
        let mut coverage = self.coverage;
        coverage.runs = 1;
        for target in [&self.target, &self.old].into_iter().flatten() {
            coverage.add_engine(&target.engine);
        }
        self.machines.iter().for_each(|machine| coverage.add_store(machine.store.counts()));
        coverage
    }

    fn describe(&self) -> String {
        let members = self.engine().map(|engine| (engine.waiting_for(), engine.members()));
        let reports: Vec<_> = self.machines.iter().map(|machine| machine.service.as_ref().map(ReplicaService::report)).collect();
        format!("{} requests pending, engine {members:?}, replicas {reports:?}", self.pending.len())
    }

    fn is_serving(&self) -> bool {
        self.engine().is_some_and(Engine::is_serving)
    }

    /// Every replica is in sync, and has all that was ever sent to it.
    fn all_in_sync(&self) -> bool {
        let arriving = || self.events.values().any(|event| matches!(event, Event::ToReplica(..)));
        self.machines.iter().all(|machine| machine.operations == 0) && self.all_joined() && self.all_count() && !arriving()
    }

    /// Every replica is in sync, and hears the target.
    fn all_joined(&self) -> bool {
        let connected = |(machine, index): (&Machine, usize)| {
            self.link(index)
                .is_some_and(|link| machine.service.is_some() && machine.connections.contains(&link) && !self.connections[&link].cut)
        };
        self.machines.iter().zip(0..).all(connected)
            && self
                .engine()
                .is_some_and(|engine| engine.is_serving() && engine.members().iter().all(|member| member.state == MemberState::InSync))
    }

    /// Reads all replicas' stores directly.
    fn compare(&mut self) -> Result<(), String> {
        let began = self.checker.tick();
        let mut first: Option<Vec<u8>> = None;
        for index in 0..self.machines.len() {
            let bytes = match read_all(&mut *self.machines[index].store) {
                // A block that rotted and that nobody has read since: nothing scrubs yet.
                Err(_) if self.machines[index].rotten => continue,
                read => read?,
            };
            match &first {
                None => first = Some(bytes),
                Some(first) if *first == bytes => {}
                Some(first) => {
                    let at = first.iter().zip(&bytes).position(|(left, right)| left != right).unwrap_or(0);
                    return Err(format!("replicas 0 and {index} differ in sector {}", at as u64 / SECTOR));
                }
            }
        }
        self.checker.read_ends(began, 0, &first.unwrap_or_default())
    }

    fn note(&mut self, text: String) {
        if self.log.len() >= self.plan.log_lines {
            self.log.pop_front();
        }
        self.log.push_back(format!("{:>9} {text}", self.now));
    }

    fn schedule(&mut self, at: Micros, event: Event) {
        self.event_number += 1;
        self.events.insert((at, self.event_number), event);
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::new(Duration::from_micros(self.now))
    }

    fn step(&mut self) -> Result<(), String> {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return Err(format!("no end after {STEPS_MAX} events: {}", self.describe()));
        }
        let Some(((at, _), event)) = self.events.pop_first() else { return Err("nothing will ever happen again".to_owned()) };
        self.now = self.now.max(at);
        for machine in &mut self.machines {
            machine.store.set_time(self.now);
        }
        self.handle(event)?;
        self.pump()?;
        self.advance_calm();
        self.arm_timers();
        (0..self.machines.len()).for_each(|index| self.arm_store(index));
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<(), String> {
        let Some(event) = self.unless_target_stopped(event) else { return Ok(()) };
        match event {
            Event::ToReplica(connection, _) | Event::GoneAtReplica(connection) if self.is_stopped(connection) => {
                self.hold(connection, event)
            }
            Event::ToReplica(connection, frame) => {
                if let Some(machine) = self.machine_of(connection)
                    && machine.connections.contains(&connection)
                    && let Some(service) = &mut machine.service
                {
                    service.on_frame(connection, *frame);
                }
            }
            Event::GoneAtReplica(connection) => {
                if let Some(machine) = self.machine_of(connection)
                    && machine.connections.remove(&connection)
                    && let Some(service) = &mut machine.service
                {
                    service.on_disconnected(connection);
                }
            }
            Event::ToTarget(connection, frame) => self.on_frame_at_target(connection, *frame),
            Event::GoneAtTarget(connection) => self.gone_at_target(connection),
            Event::Open(connection) => self.open(connection),
            Event::Complete(index, opening) => {
                // A disk goes on while the process is stopped.
                let machine = &mut self.machines[index];
                if machine.opening == opening {
                    machine.completions_due -= 1;
                    machine.store.complete_one(&mut self.dice);
                }
            }
            Event::Alarm(index) => self.machines[index].alarm = None,
            Event::StartReplica(index) => self.start_replica(index)?,
            Event::Replace(index) => drop(self.kill_replica(index, PowerLoss::No)),
            Event::Stop(index, time) if self.faults && self.calm.is_none() => self.stop_replica(index, time),
            Event::Stop(..) => {}
            Event::Kill(index) if self.faults && self.calm.is_none() => drop(self.kill_replica(index, PowerLoss::No)),
            Event::Kill(_) => {}
            Event::Resume(index) => {
                let held = self.machines[index].stopped.take().unwrap_or_default();
                for event in held {
                    self.schedule(self.now, event);
                }
            }
            Event::LosePower => self.power_fails_everywhere(),
            Event::EndTarget(incarnation) if self.faults && self.is_current(incarnation) => self.end_part(),
            Event::EndTarget(_) => {}
            Event::StartTarget => self.start_target(),
            Event::Timer(incarnation, number) => self.on_timer(incarnation, number),
            Event::AskOld(incarnation) => self.ask_old(incarnation),
            Event::Fault => self.fault(),
            Event::Grow => self.grow(),
            // It looks in a moment, as after every event.
            Event::Rested => {}
            Event::ConfigAsked(asker, request) => self.on_config_asked(asker, request),
            Event::ConfigAnswered(asker, answer) => {
                if let Some(target) = self.target_of(asker) {
                    target.engine.on_config(answer);
                }
            }
        }
        Ok(())
    }

    fn machine_of(&mut self, connection: ConnectionId) -> Option<&mut Machine> {
        let replica = self.connections.get(&connection)?.replica;
        self.machines.get_mut(replica)
    }

    /// Carries out what the engine and the replicas want until they want nothing.
    fn pump(&mut self) -> Result<(), String> {
        for _ in 0..ROUNDS_MAX {
            let mut busy = false;
            busy |= self.pump_targets()?;
            for index in 0..self.machines.len() {
                busy |= self.pump_replica(index)?;
            }
            busy |= self.offer_requests();
            if !busy {
                return Ok(());
            }
        }
        Err(format!("no rest after {ROUNDS_MAX} rounds at one moment: {}", self.describe()))
    }

    fn pump_replica(&mut self, index: usize) -> Result<bool, String> {
        let machine = &mut self.machines[index];
        if machine.service.is_none() || machine.stopped.is_some() {
            return Ok(false);
        }
        let mut completions = Vec::new();
        machine.store.reap(&mut completions);
        machine.operations -= completions.len();
        self.plant_in_completions(index, &mut completions);
        let Some(service) = &mut self.machines[index].service else { return Ok(false) };
        for completion in completions {
            service.on_completion(completion);
        }
        let mut actions = Vec::new();
        while let Some(action) = service.next_action() {
            actions.push(action);
        }
        let busy = !actions.is_empty();
        for action in actions {
            match action {
                ServiceAction::Send(connection, frame) => self.send(connection, frame, false),
                ServiceAction::Close(connection) => {
                    self.machines[index].connections.remove(&connection);
                    let at = self.connections.get(&connection).map_or(self.now, |state| state.to_target.max(self.now) + 1);
                    if !self.connections.get(&connection).is_some_and(|state| state.mute) {
                        self.schedule(at, Event::GoneAtTarget(connection));
                    }
                    if let Some(service) = &mut self.machines[index].service {
                        service.on_disconnected(connection);
                    }
                }
                ServiceAction::Expanded(blocks, result) => self.on_expanded(index, blocks, result),
                ServiceAction::Store(_, token, operation) => {
                    self.machines[index].operations += 1;
                    self.check_epoch(index, &operation)?;
                    self.submit_planted(index, token, operation);
                }
            }
        }
        Ok(busy)
    }

    /// What happens in a store happens some time after it could.
    fn arm_store(&mut self, index: usize) {
        let machine = &self.machines[index];
        if machine.service.is_none() {
            return;
        }
        let (ready, opening) = (machine.store.ready(), machine.opening);
        while self.machines[index].completions_due < ready {
            self.machines[index].completions_due += 1;
            let delay = self.dice.skewed(3 * MILLISECOND) + self.disk_delay(index);
            self.schedule(self.now + delay, Event::Complete(index, opening));
        }
        let machine = &mut self.machines[index];
        let Some(alarm) = machine.store.alarm().filter(|_| machine.stopped.is_none()) else { return };
        let at = alarm.max(self.now) + ALARM_LATENCY;
        if machine.alarm.is_none_or(|armed| at < armed) {
            machine.alarm = Some(at);
            self.schedule(at, Event::Alarm(index));
        }
    }

    /// The highest term that was promised, to see that runs get somewhere.
    pub fn term(&self) -> Option<Term> {
        self.engine().and_then(Engine::term)
    }
}
