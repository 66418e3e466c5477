//! One run: operations on the subject and on the oracle, many in flight at once, and crashes. What to do next is in `steps`.

use std::collections::BTreeMap;

use carrick_backing_store::dice::Dice;
use carrick_backing_store::{
    OpenedReplica, Operation, Outcome, ReplicaSpec, ReplicaStore, SnapshotId, StoreError, Token, VolumeId, VolumeSize,
};

use super::content;
use super::expected::Expected;
use super::reference::{Reference, opened};
use super::subject::Subject;

const IN_FLIGHT_MAX: usize = 16;
/// More moments than anything takes that ever ends.
const PATIENCE: u32 = 1_000_000;
/// So much of what happened is told when a run fails.
const LINES_TOLD: usize = 40;

pub struct Plan {
    /// Which test it is for.
    pub test: &'static str,
    pub seed: u64,
    pub steps: u64,
    /// Size of the big volume, in blocks, which is touched in few places.
    pub big: u64,
}

struct Outstanding {
    volume: VolumeId,
    expected: Expected,
    text: String,
}

pub struct World<S: Subject> {
    pub plan: Plan,
    subject: S,
    store: Option<S::Store>,
    pub reference: Reference,
    pub dice: Dice,
    in_flight: BTreeMap<Token, Outstanding>,
    /// Counts operations, and names the writes among them and the snapshots.
    pub number: u64,
    step: u64,
    /// Which volume the steps are about for a while.
    pub at: u64,
    log: Log,
}

/// What happened; told when the run ends in a panic, or at once.
struct Log {
    lines: Vec<String>,
    replay: String,
    aloud: bool,
}

impl Log {
    fn push(&mut self, step: u64, text: &str) {
        if self.aloud {
            eprintln!("{step}: {text}");
        } else {
            self.lines.push(format!("{step}: {text}"));
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let first = self.lines.len().saturating_sub(LINES_TOLD);
            self.lines[first..].iter().for_each(|line| eprintln!("{line}"));
            eprintln!("replay: {}", self.replay);
        }
    }
}

/// How a store ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Close,
    Kill,
    PowerCut,
}

pub fn size(blocks: u64) -> VolumeSize {
    VolumeSize::new(blocks * 4096).unwrap()
}

/// A volume in a few letters.
fn name(volume: VolumeId) -> u8 {
    volume.to_bytes()[0]
}

/// Both must succeed, or fail for the same reason.
fn compare(what: &str, oracle: &Result<(), StoreError>, subject: &Result<(), StoreError>) {
    let same = match (oracle, subject) {
        (Ok(()), Ok(())) => true,
        (Err(oracle), Err(subject)) => std::mem::discriminant(oracle) == std::mem::discriminant(subject),
        _ => false,
    };
    assert!(same, "{what}: the answer is {subject:?}, expected was {oracle:?}");
}

/// Asks the subject one thing, while nothing else is in flight.
fn ask<S: Subject>(
    subject: &mut S,
    store: &mut S::Store,
    number: &mut u64,
    volume: VolumeId,
    operation: Operation,
) -> Result<Outcome, StoreError> {
    *number += 1;
    store.submit(volume, Token(*number), operation);
    let mut completions = Vec::new();
    for _ in 0..PATIENCE {
        subject.advance(store);
        store.reap(&mut completions);
        if let Some(completion) = completions.pop() {
            assert!(completions.is_empty() && completion.token == Token(*number), "a completion that nothing is in flight for");
            return completion.result;
        }
    }
    panic!("an operation never ends");
}

impl<S: Subject> World<S> {
    pub fn new(plan: Plan, mut subject: S, aloud: bool) -> Self {
        let store = Some(subject.open());
        let (dice, log) = (Dice::new(plan.seed), Log { lines: Vec::new(), replay: super::replay(&plan), aloud });
        Self { plan, subject, store, reference: Reference::new(), dice, in_flight: BTreeMap::new(), number: 0, step: 0, at: 0, log }
    }

    /// Runs it. Panics if the subject does anything that it must not.
    pub fn run(&mut self) {
        self.begin();
        while self.step < self.plan.steps {
            self.step += 1;
            self.random_step();
            while self.in_flight.len() > IN_FLIGHT_MAX {
                self.advance();
            }
            match self.dice.below(16) {
                0 => self.drain(),
                1..=4 => (0..self.dice.below(8)).for_each(|_| self.advance()),
                _ => {}
            }
        }
        self.audit();
        self.end(End::Close);
        self.empty();
    }

    fn say(&mut self, text: &str) {
        self.log.push(self.step, text);
    }

    fn store(&mut self) -> &mut S::Store {
        self.store.as_mut().unwrap()
    }

    // Operations.

    pub fn submit(&mut self, volume: VolumeId, operation: Operation) {
        self.number += 1;
        let token = Token(self.number);
        let text = format!("volume {}: {} ({})", name(volume), content::describe(&operation), token.0);
        self.say(&text);
        let expected = self.reference.submit(volume, token, operation.clone());
        self.in_flight.insert(token, Outstanding { volume, expected, text });
        self.store().submit(volume, token, operation);
    }

    /// Lets a little happen and looks at what came of it.
    fn advance(&mut self) {
        let mut store = self.store.take().unwrap();
        self.subject.advance(&mut store);
        let mut completions = Vec::new();
        store.reap(&mut completions);
        self.store = Some(store);
        for completion in completions {
            let token = completion.token;
            let Some(Outstanding { volume, expected, text }) = self.in_flight.remove(&token) else {
                panic!("a completion of {token:?}, which is not in flight");
            };
            assert_eq!(completion.volume, volume, "whose completion {token:?} is");
            if let Some(objection) = expected.objection(&completion) {
                panic!("{text}: {objection}");
            }
            self.say(&format!("({}) done", token.0));
            self.reference.acknowledged(volume, token, &expected, completion.result.as_ref().ok());
        }
    }

    pub fn drain(&mut self) {
        let mut patience = PATIENCE;
        while !self.in_flight.is_empty() {
            self.advance();
            patience -= 1;
            assert!(patience > 0, "operations never end: {:?}", self.in_flight.values().map(|one| &one.text).collect::<Vec<_>>());
        }
    }

    // Calls that wait. What is in flight beside them counts for what was there when it was submitted.

    pub fn create(&mut self, spec: ReplicaSpec) {
        self.say(&format!("create {} of {} blocks", name(spec.volume), spec.size.blocks()));
        self.drain();
        let (oracle, subject) = (self.reference.create(spec), self.store().create(spec));
        compare("create", &oracle, &subject);
    }

    /// `blocks` gives the clone's size from the snapshot's.
    pub fn clone_snapshot(&mut self, origin: VolumeId, snapshot: SnapshotId, target: VolumeId, blocks: impl FnOnce(u64) -> u64) {
        self.drain();
        let snapshots = self.reference.live.snapshots(origin).unwrap();
        let blocks = blocks(snapshots.iter().find(|info| info.id == snapshot).map_or(16, |info| info.size.blocks()));
        self.say(&format!("clone {} of {snapshot} of {}, {blocks} blocks", name(target), name(origin)));
        let spec = ReplicaSpec { volume: target, size: size(blocks) };
        for _ in 0..=self.dice.below(2) {
            let oracle = self.reference.clone_snapshot(origin, snapshot, spec);
            compare("clone_snapshot", &oracle, &self.store().clone_snapshot(origin, snapshot, spec));
        }
    }

    pub fn delete(&mut self, volume: VolumeId) {
        self.say(&format!("delete {}", name(volume)));
        // Only its own operations may be in flight: another's DeleteSnapshot may wait for this.
        while self.in_flight.values().any(|outstanding| outstanding.volume != volume) {
            self.advance();
        }
        if self.dice.once_in(2) {
            self.drain();
        }
        let (oracle, subject) = (self.reference.delete(volume), self.store().delete(volume));
        compare("delete", &oracle, &subject);
        if oracle.is_ok() {
            for outstanding in self.in_flight.values_mut().filter(|outstanding| outstanding.volume == volume) {
                outstanding.expected = Expected::Anything;
            }
        }
    }

    // Checks.

    /// Compares which replicas there are; gives what the subject says of them.
    fn replicas(&mut self) -> Vec<OpenedReplica> {
        let mut found = self.store().replicas();
        found.sort_by_key(|opened| opened.spec.volume);
        let names = |list: &[OpenedReplica]| list.iter().map(|opened| opened.spec.volume).collect::<Vec<_>>();
        assert_eq!(names(&found), names(&self.reference.live.replicas()), "the replicas");
        found
    }

    /// Compares everything that can be seen.
    pub fn audit(&mut self) {
        self.drain();
        self.say("audit");
        for found in self.replicas() {
            let volume = found.spec.volume;
            assert_eq!(Some(found.spec), opened(&self.reference.live, volume).map(|opened| opened.spec), "a replica's size");
            let snapshots = self.store().snapshots(volume).unwrap();
            let (subject, store, number) = (&mut self.subject, self.store.as_mut().unwrap(), &mut self.number);
            let mut ask = |operation| ask(subject, store, number, volume, operation);
            let difference = self.reference.difference(volume, snapshots, &mut ask);
            assert_eq!(difference, None, "volume {}", name(volume));
        }
        let usage = self.store().usage().unwrap();
        let parts = [usage.free, usage.used, usage.snapshots, usage.reclaimable, usage.metadata, usage.bad];
        assert_eq!(parts.iter().map(|part| part.get()).sum::<u64>(), usage.capacity.get(), "{usage:?}");
    }

    /// Ends the store, opens it again, and finds out what is left.
    pub fn end(&mut self, end: End) {
        if end == End::Close {
            self.drain();
        }
        let seed = self.dice.number();
        self.say(&format!("{end:?} with {} in flight", self.in_flight.len()));
        let store = self.store.take().unwrap();
        match end {
            End::Close => self.subject.close(store),
            End::Kill => self.subject.kill(store, seed),
            End::PowerCut => self.subject.power_cut(store, seed),
        }
        self.in_flight.clear();
        self.store = Some(self.subject.open());
        if end == End::Close {
            self.reference.closed();
        }
        for found in self.replicas() {
            let volume = found.spec.volume;
            let snapshots = self.store().snapshots(volume).unwrap();
            let (subject, store, number) = (&mut self.subject, self.store.as_mut().unwrap(), &mut self.number);
            let mut ask = |operation| ask(subject, store, number, volume, operation);
            match self.reference.resolve((found, snapshots), &mut ask, end == End::PowerCut) {
                Ok(summary) => self.say(&format!("volume {}: {summary}", name(volume))),
                Err(reason) => panic!("after a {end:?}, volume {}: {reason}", name(volume)),
            }
        }
        self.reference.resume();
    }

    /// Deletes everything; then nothing may be left.
    fn empty(&mut self) {
        while !self.reference.live.replicas().is_empty() {
            for opened in self.reference.live.replicas() {
                self.delete(opened.spec.volume);
            }
        }
        let mut store = self.store.take().unwrap();
        self.subject.settle(&mut store);
        let usage = store.usage().unwrap();
        self.store = Some(store);
        assert_eq!([usage.used, usage.snapshots, usage.reclaimable].map(|part| part.get()), [0; 3], "left of nothing: {usage:?}");
    }
}
