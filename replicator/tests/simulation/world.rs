//! A primary, three replicas, the network between them and a client, in virtual time: one thread, one seed.
//!
//! What is simulated: messages that take time and arrive in order per connection; connections that break, with what is on its
//! way lost or still delivered; replicas killed, stopped for a while, and restarted; the target killed, its last messages arriving
//! after its successor's first, its requests issued again in another order (as ublk does); loss of power of one machine or of all;
//! blocks that rot; syncs that fail. What is not: bytes (frames are passed whole), and more faults at once than the protocol
//! is meant to survive.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::{
    BlockIndex, BufferPool, ByteLength, ByteOffset, Extent, MemoryStore, Operation, Outcome, PowerLoss, ReadData, ReplicaSpec,
    ReplicaStore, StoreId, Term, Token, VolumeId, VolumeSize,
};
use carrick_replicator::control::MemberState;
use carrick_replicator::engine::{Action, Engine, EngineConfig, MemberIndex, ReadBytes, Request, RequestError, RequestTag, Response};
use carrick_replicator::replica::{ConnectionId, ReplicaService, ServiceAction};
use carrick_replicator::time::Monotonic;
use carrick_replicator::wire::Frame;

use crate::checker::{Checker, SECTOR, sector_bytes};

/// Microseconds of virtual time.
type Micros = u64;

const MILLISECOND: Micros = 1_000;
const SECOND: Micros = 1_000_000;
/// Small, so that requests collide: 48 blocks.
const BLOCKS: u64 = 48;
const DEPTH: usize = 8;
/// After all faults have ended, everything must be in sync and answered within this.
const HEAL_LIMIT: Micros = 60 * SECOND;

/// Rounds of engine, replicas and client at one moment: far above what a full queue causes.
const ROUNDS_MAX: u32 = 100_000;
/// Events of one run: far above what the longest needs.
const STEPS_MAX: u64 = 5_000_000;

/// What a run is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub replicas: usize,
    /// Requests to be completed before the faults end.
    pub requests: u64,
    /// Blocks rot, one at a time, instead of machines losing power: both together may leave no good copy.
    pub rot: bool,
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
    /// An operation in this replica's store completes.
    Complete(usize),
    StartReplica(usize),
    Resume(usize),
    StartTarget,
    Timer(u64),
    Fault,
}

struct Machine {
    store: MemoryStore,
    /// `None` while the process is dead.
    service: Option<ReplicaService>,
    /// Stopped by a signal: events wait here.
    stopped: Option<Vec<Event>>,
    connections: BTreeSet<ConnectionId>,
    /// Since its last damage, this one needs care: no second fault that the protocol can't survive.
    rotten: bool,
}

#[derive(Clone, Copy, Debug)]
struct Connection {
    replica: usize,
    /// When the last frame in each direction arrives, so that order is kept.
    to_replica: Micros,
    to_target: Micros,
    open_at_target: bool,
    /// Nothing sent to the replica arrives any more.
    cut: bool,
}

#[derive(Clone, Debug)]
struct Pending {
    request: Request,
    began: u64,
    stamp: u64,
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
    engine: Option<Engine>,
    incarnation: u64,
    /// The current connection to each member.
    links: Vec<Option<ConnectionId>>,
    timer: Option<Micros>,
    timer_number: u64,
    pending: BTreeMap<RequestTag, Pending>,
    next_tag: u64,
    completed: u64,
    checker: Checker,
    pool: BufferPool,
    faults: bool,
    steps: u64,
    pub log: VecDeque<String>,
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([7; 16])
}

fn size() -> VolumeSize {
    VolumeSize::new(BLOCKS * 4096).unwrap()
}

fn sectors(extent: Extent) -> std::ops::Range<u64> {
    extent.offset().get() / SECTOR..extent.end().get() / SECTOR
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let machines = (0..plan.replicas).map(|index| {
            let mut store = MemoryStore::with_id(StoreId::from_bytes([u8::try_from(index).unwrap(); 16])).with_manual_completion();
            if plan.seed.is_multiple_of(3) && !plan.rot {
                store = store.with_log_capacity(16);
            }
            store.create(ReplicaSpec { volume: volume(), size: size() }).unwrap();
            Machine { store, service: None, stopped: None, connections: BTreeSet::new(), rotten: false }
        });
        let mut world = Self {
            dice: Dice::new(plan.seed),
            now: 0,
            events: BTreeMap::new(),
            event_number: 0,
            machines: machines.collect(),
            connections: BTreeMap::new(),
            next_connection: 0,
            engine: None,
            incarnation: 0,
            links: vec![None; plan.replicas],
            timer: None,
            timer_number: 0,
            pending: BTreeMap::new(),
            next_tag: 0,
            completed: 0,
            checker: Checker::default(),
            pool: BufferPool::new(1 << 20),
            faults: true,
            steps: 0,
            log: VecDeque::new(),
            plan,
        };
        for index in 0..plan.replicas {
            world.schedule(0, Event::StartReplica(index));
        }
        world.schedule(0, Event::StartTarget);
        world.schedule(20 * MILLISECOND, Event::Fault);
        world
    }

    /// Runs to the end, or to the first violation.
    pub fn run(&mut self) -> Result<(), String> {
        let result = self.run_faults().and_then(|()| self.heal());
        result.map_err(|reason| format!("at {} µs: {reason}", self.now))
    }

    fn run_faults(&mut self) -> Result<(), String> {
        while self.completed < self.plan.requests {
            self.step()?;
            if self.now > 1_000 * SECOND {
                return Err(format!("only {} requests in 1,000 s: {}", self.completed, self.describe()));
            }
        }
        Ok(())
    }

    /// Ends all faults, and expects everything to come back to order: every request answered, every replica in sync and
    /// holding the same bytes, and those the ones that were written.
    fn heal(&mut self) -> Result<(), String> {
        self.faults = false;
        self.note("faults end".to_owned());
        for index in 0..self.machines.len() {
            self.schedule(self.now, Event::Resume(index));
        }
        let limit = self.now + HEAL_LIMIT;
        while !(self.pending.is_empty() && self.all_in_sync()) {
            self.step()?;
            if self.now > limit {
                return Err(format!("not in order {} s after the faults ended: {}", HEAL_LIMIT / SECOND, self.describe()));
            }
        }
        self.compare()
    }

    fn describe(&self) -> String {
        let members = self.engine.as_ref().map(|engine| (engine.waiting_for(), engine.members()));
        let reports: Vec<_> = self.machines.iter().map(|machine| machine.service.as_ref().map(ReplicaService::report)).collect();
        format!("{} requests pending, engine {members:?}, replicas {reports:?}", self.pending.len())
    }

    fn all_in_sync(&self) -> bool {
        let connected = |(machine, link): (&Machine, &Option<ConnectionId>)| {
            link.is_some_and(|link| machine.connections.contains(&link) && !self.connections[&link].cut)
        };
        let quiet = self.machines.iter().all(|machine| machine.store.ready().is_empty() && machine.service.is_some());
        let arriving = self.events.values().any(|event| matches!(event, Event::ToReplica(..)));
        let quiet = quiet && !arriving && self.machines.iter().zip(&self.links).all(connected);
        let engine = self.engine.as_ref();
        quiet
            && engine.is_some_and(|engine| engine.is_serving() && engine.members().iter().all(|member| member.state == MemberState::InSync))
    }

    /// Reads all replicas' stores directly.
    fn compare(&mut self) -> Result<(), String> {
        let began = self.checker.tick();
        let mut first: Option<Vec<u8>> = None;
        for index in 0..self.machines.len() {
            let bytes = match self.read_store(index) {
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

    fn read_store(&mut self, index: usize) -> Result<Vec<u8>, String> {
        let store = &mut self.machines[index].store;
        store.submit(volume(), Token(u64::MAX), Operation::Read { extent: size().extent(), snapshot: None });
        store.complete_all();
        let mut completions = Vec::new();
        store.reap(&mut completions);
        let completion = completions.into_iter().find(|completion| completion.token == Token(u64::MAX)).ok_or("no answer")?;
        match completion.result.map_err(|error| error.to_string())? {
            Outcome::Read(ReadData::Zeroes) => Ok(vec![0; usize::try_from(size().bytes().get()).unwrap()]),
            Outcome::Read(ReadData::Blocks { data, .. }) => Ok(data.to_vec()),
            other => Err(format!("{other:?}")),
        }
    }

    fn note(&mut self, text: String) {
        if self.log.len() == 400 {
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
        self.handle(event);
        self.pump()?;
        self.arm_timer();
        Ok(())
    }

    fn handle(&mut self, event: Event) {
        let now = self.monotonic();
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
            Event::ToTarget(connection, frame) => {
                if let Some(member) = self.member_of(connection)
                    && let Some(engine) = &mut self.engine
                {
                    engine.on_frame(now, member, *frame);
                }
            }
            Event::GoneAtTarget(connection) => self.gone_at_target(connection),
            Event::Open(connection) => self.open(connection),
            Event::Complete(replica) => {
                let machine = &mut self.machines[replica];
                if machine.stopped.is_some() {
                    return self.machines[replica].stopped.as_mut().unwrap().push(Event::Complete(replica));
                }
                let ready = machine.store.ready().len();
                if ready > 0 {
                    let index = self.dice.index(ready);
                    machine.store.complete_one(index);
                }
            }
            Event::StartReplica(index) => self.start_replica(index),
            Event::Resume(index) => {
                let held = self.machines[index].stopped.take().unwrap_or_default();
                for event in held {
                    self.schedule(self.now, event);
                }
            }
            Event::StartTarget => self.start_target(),
            Event::Timer(number) => {
                if number == self.timer_number {
                    self.timer = None;
                    if let Some(engine) = &mut self.engine {
                        engine.on_timer(now);
                    }
                }
            }
            Event::Fault => self.fault(),
        }
    }

    fn machine_of(&mut self, connection: ConnectionId) -> Option<&mut Machine> {
        let replica = self.connections.get(&connection)?.replica;
        self.machines.get_mut(replica)
    }

    /// Which member the connection belongs to, if it is the current target's current one.
    fn member_of(&self, connection: ConnectionId) -> Option<MemberIndex> {
        let index = self.links.iter().position(|link| *link == Some(connection))?;
        self.connections[&connection].open_at_target.then_some(MemberIndex(index))
    }

    fn is_stopped(&self, connection: ConnectionId) -> bool {
        self.connections.get(&connection).is_some_and(|connection| self.machines[connection.replica].stopped.is_some())
    }

    fn hold(&mut self, connection: ConnectionId, event: Event) {
        if let Some(held) = self.machine_of(connection).and_then(|machine| machine.stopped.as_mut()) {
            held.push(event);
        }
    }

    fn open(&mut self, connection: ConnectionId) {
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

    fn gone_at_target(&mut self, connection: ConnectionId) {
        let Some(index) = self.links.iter().position(|link| *link == Some(connection)) else { return };
        self.links[index] = None;
        let now = self.monotonic();
        if let Some(engine) = &mut self.engine {
            engine.on_disconnected(now, MemberIndex(index), "connection lost".to_owned());
        }
    }

    /// Carries out what the engine and the replicas want until they want nothing.
    fn pump(&mut self) -> Result<(), String> {
        for _ in 0..ROUNDS_MAX {
            let mut busy = false;
            while let Some(action) = self.engine.as_mut().and_then(Engine::next_action) {
                busy = true;
                self.on_action(action)?;
            }
            for index in 0..self.machines.len() {
                busy |= self.pump_replica(index);
            }
            busy |= self.offer_requests();
            if !busy {
                return Ok(());
            }
        }
        Err(format!("no rest after {ROUNDS_MAX} rounds at one moment: {}", self.describe()))
    }

    fn pump_replica(&mut self, index: usize) -> bool {
        let machine = &mut self.machines[index];
        let Some(service) = machine.service.as_mut().filter(|_| machine.stopped.is_none()) else { return false };
        let mut completions = Vec::new();
        machine.store.reap(&mut completions);
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
                    self.schedule(at, Event::GoneAtTarget(connection));
                    if let Some(service) = &mut self.machines[index].service {
                        service.on_disconnected(connection);
                    }
                }
                ServiceAction::Store(volume, token, operation) => {
                    self.machines[index].store.submit(volume, token, operation);
                    let delay = self.dice.skewed(3 * MILLISECOND);
                    self.schedule(self.now + delay, Event::Complete(index));
                }
            }
        }
        busy
    }

    fn send(&mut self, connection: ConnectionId, frame: Frame, to_replica: bool) {
        let delay = 10 + self.dice.skewed(2 * MILLISECOND);
        let now = self.now;
        let Some(state) = self.connections.get_mut(&connection).filter(|state| !(to_replica && state.cut)) else { return };
        let last = if to_replica { &mut state.to_replica } else { &mut state.to_target };
        let at = (now + delay).max(*last + 1);
        *last = at;
        let frame = Box::new(frame);
        self.schedule(at, if to_replica { Event::ToReplica(connection, frame) } else { Event::ToTarget(connection, frame) });
    }

    fn on_action(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Connect(member) => {
                self.next_connection += 1;
                let connection = ConnectionId(self.next_connection);
                let state = Connection { replica: member.0, to_replica: 0, to_target: 0, open_at_target: false, cut: false };
                self.connections.insert(connection, state);
                self.links[member.0] = Some(connection);
                let delay = 50 + self.dice.skewed(MILLISECOND);
                self.schedule(self.now + delay, Event::Open(connection));
            }
            Action::Send(member, frame) => {
                let connection = self.links[member.0].ok_or_else(|| format!("a frame for {member:?}, which has no connection"))?;
                self.send(connection, frame, true);
            }
            Action::Disconnect(member) => {
                self.note(format!("engine drops {member:?}: {:?}", self.engine.as_ref().unwrap().members()[member.0].last_error));
                if let Some(connection) = self.links[member.0].take() {
                    self.break_at_replica(connection);
                }
            }
            Action::Complete(tag, result) => self.on_complete(tag, result)?,
            Action::Serve(term) => self.note(format!("serving under {term}")),
            Action::Superseded { promised } => {
                // A dead predecessor's attempt reached some replica with a higher term: the target ends, and is started again.
                self.note(format!("superseded by {promised}"));
                self.kill_target();
            }
        }
        Ok(())
    }

    /// The replica learns of a broken connection some time after the last frame on its way, or frames are lost with it.
    fn break_at_replica(&mut self, connection: ConnectionId) {
        let Some(state) = self.connections.get(&connection).copied() else { return };
        if self.dice.once_in(2) {
            self.events.retain(|_, event| !matches!(event, Event::ToReplica(other, _) if *other == connection));
            self.connections.entry(connection).and_modify(|state| state.cut = true);
        }
        let delay = self.dice.skewed(SECOND);
        self.schedule(state.to_replica.max(self.now) + 1 + delay, Event::GoneAtReplica(connection));
    }

    fn on_complete(&mut self, tag: RequestTag, result: Result<Response, RequestError>) -> Result<(), String> {
        let pending = self.pending.remove(&tag).ok_or_else(|| format!("{tag:?} was completed twice"))?;
        self.completed += 1;
        let response = result.map_err(|error| format!("{:?} failed: {error}", pending.request))?;
        match (pending.request, response) {
            (Request::Read { extent }, Response::Read(found)) => {
                let length = usize::try_from(extent.length().get()).unwrap();
                let bytes = match found {
                    ReadBytes::Zeroes => vec![0; length],
                    ReadBytes::Bytes(bytes) => bytes.to_vec(),
                };
                assert_eq!(bytes.len(), length);
                self.checker.read_ends(pending.began, extent.offset().get() / SECTOR, &bytes)?;
            }
            (Request::Write { extent, fua, .. } | Request::WriteZeroes { extent, fua }, Response::Done) => {
                self.checker.write_ends(pending.stamp, fua, sectors(extent));
            }
            (Request::Discard { extent }, Response::Done) => self.checker.write_ends(pending.stamp, false, discarded(extent)),
            (Request::Flush, Response::Done) => self.checker.flush_ends(pending.began),
            (request, response) => return Err(format!("{request:?} was answered with {response:?}")),
        }
        Ok(())
    }

    /// The client keeps a few requests in flight.
    fn offer_requests(&mut self) -> bool {
        let serving = self.engine.as_ref().is_some_and(Engine::is_serving);
        let mut offered = false;
        while serving && self.faults && self.pending.len() < DEPTH {
            self.next_tag += 1;
            let tag = RequestTag(self.next_tag);
            let pending = self.random_request(self.next_tag);
            let request = pending.request.clone();
            self.pending.insert(tag, pending);
            let now = self.monotonic();
            if let Some(engine) = &mut self.engine {
                engine.submit(now, tag, request);
            }
            offered = true;
        }
        offered
    }

    fn random_request(&mut self, stamp: u64) -> Pending {
        let all = BLOCKS * 8;
        let first = self.dice.below(all);
        let mut count = 1 + self.dice.skewed(40).min(all - first - 1);
        let mut first = first;
        if !self.dice.once_in(3) {
            first = first / 8 * 8;
            count = count.next_multiple_of(8).min(all - first);
        }
        let extent = Extent::new(ByteOffset::new(first * SECTOR), ByteLength::new(count * SECTOR)).unwrap();
        let fua = self.dice.once_in(8);
        let request = match self.dice.below(16) {
            0..=4 => Request::Read { extent },
            5 => Request::Flush,
            6 => Request::Discard { extent },
            7 => Request::WriteZeroes { extent, fua },
            _ => {
                let mut data = self.pool.take(usize::try_from(extent.length().get()).unwrap());
                for (sector, bytes) in sectors(extent).zip(data.chunks_exact_mut(SECTOR as usize)) {
                    bytes.copy_from_slice(&sector_bytes(stamp, sector));
                }
                Request::Write { extent, data: data.share(), fua }
            }
        };
        match &request {
            Request::Write { .. } => self.checker.write_begins(stamp, false, sectors(extent)),
            Request::WriteZeroes { .. } => self.checker.write_begins(stamp, true, sectors(extent)),
            Request::Discard { .. } => self.checker.write_begins(stamp, true, discarded(extent)),
            Request::Read { .. } | Request::Flush => {}
        }
        Pending { request, began: self.checker.tick(), stamp }
    }

    fn arm_timer(&mut self) {
        let Some(deadline) = self.engine.as_ref().and_then(Engine::deadline) else { return };
        let at = u64::try_from(deadline.since(Monotonic::default()).as_nanos().div_ceil(1_000)).unwrap().max(self.now);
        if self.timer.is_none_or(|timer| at < timer || timer < self.now) {
            self.timer_number += 1;
            self.timer = Some(at);
            self.schedule(at, Event::Timer(self.timer_number));
        }
    }

    fn start_replica(&mut self, index: usize) {
        let machine = &mut self.machines[index];
        if machine.service.is_none() {
            machine.service = Some(ReplicaService::new(machine.store.id(), machine.store.replicas()));
            self.note(format!("replica {index} starts"));
        }
    }

    fn start_target(&mut self) {
        if self.engine.is_some() {
            return;
        }
        self.incarnation += 1;
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

    fn fault(&mut self) {
        if !self.faults {
            return;
        }
        let next = 5 * MILLISECOND + self.dice.skewed(3 * SECOND);
        self.schedule(self.now + next, Event::Fault);
        let index = self.dice.index(self.machines.len());
        match self.dice.below(12) {
            0..=2 => self.kill_replica(index, PowerLoss::No),
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
            // Only while the others are in sync: more is beyond what a majority can survive without its primary's help.
            10 if !self.plan.rot && self.all_in_sync() && self.machines.len() > 1 => self.kill_replica(index, PowerLoss::Yes),
            11 if self.plan.rot && self.all_in_sync() => self.rot(index),
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

    fn kill_replica(&mut self, index: usize, power: PowerLoss) {
        if self.machines[index].service.take().is_none() {
            return;
        }
        self.note(format!("replica {index} is killed, power lost: {power:?}"));
        let machine = &mut self.machines[index];
        machine.stopped = None;
        let seed = self.dice.number();
        machine.store.crash(power, seed);
        let broken = std::mem::take(&mut machine.connections);
        for connection in broken {
            let delay = self.dice.skewed(100 * MILLISECOND);
            self.schedule(self.now + delay, Event::GoneAtTarget(connection));
        }
        let back = self.now + 1 + self.dice.skewed(5 * SECOND);
        self.schedule(back, Event::StartReplica(index));
    }

    fn kill_target(&mut self) {
        if self.engine.take().is_none() {
            return;
        }
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
        for index in 0..self.machines.len() {
            self.kill_replica(index, PowerLoss::Yes);
            // Those that were dead already lose what was not on stable media all the same.
            let seed = self.dice.number();
            self.machines[index].store.crash(PowerLoss::Yes, seed);
        }
        self.checker.power_fails();
        self.pending.clear();
    }

    /// Damages a block on one replica, once, if no other has a damaged one.
    fn rot(&mut self, index: usize) {
        if self.machines.iter().any(|machine| machine.rotten) {
            return;
        }
        let block = BlockIndex::new(self.dice.below(BLOCKS));
        if self.machines[index].store.corrupt_block(volume(), block) {
            self.machines[index].rotten = true;
            self.note(format!("block {block} rots on replica {index}"));
        }
    }

    /// The highest term that was promised, to see that runs get somewhere.
    pub fn term(&self) -> Option<Term> {
        self.engine.as_ref().and_then(Engine::term)
    }
}

/// The sectors of whole blocks: what a discard zeroes.
fn discarded(extent: Extent) -> std::ops::Range<u64> {
    let first = extent.offset().get().next_multiple_of(4096) / SECTOR;
    let end = extent.end().get() / 4096 * 4096 / SECTOR;
    first..end.max(first)
}
