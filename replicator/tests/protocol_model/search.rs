//! Searches: breadth first through all states, and random walks.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::hash::{BuildHasherDefault, Hasher};

use super::check::Violation;
use super::rules::{Bounds, Kind, Step, names};
use super::state::{ALL, Config, Log, PRIMARIES, Packed, State, fingerprint};

/// Fingerprints are hashes already.
#[derive(Default)]
pub struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unimplemented!("only fingerprints are hashed")
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// What a search through all states found.
pub struct Searched {
    pub states: usize,
    /// Steps from the first state to the farthest.
    pub depth: usize,
    /// How often each kind of step led to a new state.
    pub taken: [usize; Kind::COUNT],
    /// The first violation, and a shortest way to it.
    pub violation: Option<(Violation, String)>,
}

/// From each state's fingerprint to the one it was first reached from; initial states point at themselves.
type Origins = HashMap<u64, u64, BuildHasherDefault<AsIs>>;

impl Bounds {
    fn initial(&self) -> impl Iterator<Item = State> {
        self.first.iter().map(|members| State::new(*members))
    }

    /// Visits every state, nearest first, until one violates anything.
    pub fn search(&self) -> Searched {
        let mut origins = Origins::default();
        let mut level: Vec<Packed> = self.initial().map(|state| state.canonical()).collect();
        origins.extend(level.iter().map(|packed| (fingerprint(packed), fingerprint(packed))));
        let (mut next_level, mut successors, mut depth) = (Vec::new(), Vec::new(), 0);
        let mut taken = [0; Kind::COUNT];
        while !level.is_empty() {
            for packed in &level {
                self.successors(&State::unpack(packed), &mut successors);
                for (step, next) in &successors {
                    let next_packed = next.canonical();
                    let found = fingerprint(&next_packed);
                    let std::collections::hash_map::Entry::Vacant(vacant) = origins.entry(found) else { continue };
                    vacant.insert(fingerprint(packed));
                    taken[step.kind.index()] += 1;
                    if let Some(violation) = self.violation(next) {
                        let trace = self.trace(&origins, found);
                        return Searched { states: origins.len(), depth: depth + 1, taken, violation: Some((violation, trace)) };
                    }
                    next_level.push(next_packed);
                }
            }
            std::mem::swap(&mut level, &mut next_level);
            next_level.clear();
            depth += usize::from(!level.is_empty());
        }
        Searched { states: origins.len(), depth, taken, violation: None }
    }

    /// Tells how a state was reached, by going there again without renaming replicas.
    fn trace(&self, origins: &Origins, last: u64) -> String {
        let mut way = vec![last];
        while origins[&way[way.len() - 1]] != way[way.len() - 1] {
            way.push(origins[&way[way.len() - 1]]);
        }
        let is_at = |state: &State, place: u64| fingerprint(&state.canonical()) == place;
        let mut state = self.initial().find(|state| is_at(state, way[way.len() - 1])).unwrap();
        let mut told = format!("begin: {}\n", told_state(&state).join(", "));
        let mut successors = Vec::new();
        for place in way.iter().rev().skip(1) {
            self.successors(&state, &mut successors);
            let (step, next) = successors.iter().find(|(_, next)| is_at(next, *place)).unwrap();
            tell(&mut told, *step, &state, next);
            state = *next;
        }
        self.tell_choices(&mut told, &state);
        told
    }

    /// Takes random steps from one of the first states until none is left or something is violated. How likely each kind of step of
    /// each primary is differs from walk to walk, so that some walks go far under one primary and others change often.
    pub fn walk(&self, seed: u64) -> (usize, Option<(Violation, String)>) {
        let mut random = Random(seed);
        let weights: [[u64; Kind::COUNT]; PRIMARIES] = std::array::from_fn(|_| std::array::from_fn(|_| 1 << (2 * random.below(5))));
        let mut state = State::new(self.first[random.below(self.first.len() as u64) as usize]);
        let mut way: Vec<(Step, State)> = Vec::new();
        let first = state;
        let mut successors = Vec::new();
        loop {
            self.successors(&state, &mut successors);
            let weight = |step: &Step| weights[step.primary][step.kind.index()];
            let total: u64 = successors.iter().map(|(step, _)| weight(step)).sum();
            if total == 0 {
                return (way.len(), None);
            }
            let mut drawn = random.below(total);
            let taken = successors.iter().find(|(step, _)| {
                let found = drawn < weight(step);
                drawn = drawn.wrapping_sub(weight(step));
                found
            });
            let (step, next) = *taken.unwrap();
            way.push((step, next));
            state = next;
            if let Some(violation) = self.violation(&state) {
                let mut told = format!("begin: {}\n", told_state(&first).join(", "));
                let befores = [first].into_iter().chain(way.iter().map(|(_, state)| *state));
                befores.zip(&way).for_each(|(before, (step, after))| tell(&mut told, *step, &before, after));
                self.tell_choices(&mut told, &state);
                return (way.len(), Some((violation, told)));
            }
        }
    }

    /// Writes down which contents a primary may choose that starts now.
    fn tell_choices(&self, told: &mut String, state: &State) {
        let mut tell = |source: &str, choices: &mut dyn Iterator<Item = (Config, usize)>| {
            let mut choices: Vec<String> = choices.map(|(config, chosen)| format!("r{chosen} in config {}", told_config(config))).collect();
            choices.dedup();
            let choices = if choices.is_empty() { "nothing".to_owned() } else { choices.join(", ") };
            writeln!(told, "a primary that starts now {source} the store may choose: {choices}").unwrap();
        };
        tell("with", &mut self.choices_by_record(state, state.record, ALL).map(|chosen| (state.record, chosen)));
        tell("without", &mut self.choices_by_replicas(state, ALL));
    }
}

/// Writes down a step, and what it changed.
fn tell(told: &mut String, step: Step, before: &State, after: &State) {
    let changed = told_state(before).into_iter().zip(told_state(after)).filter(|(before, after)| before != after);
    let changed: Vec<String> = changed.map(|(_, after)| after).collect();
    writeln!(told, "{step}{}{}", if changed.is_empty() { "" } else { ": now " }, changed.join(", ")).unwrap();
}

fn told_log(log: Log) -> String {
    let writes: Vec<String> = log.writes().map(|(term, sequence)| format!("w{term}.{sequence}")).collect();
    format!("[{}]", writes.join(" "))
}

fn told_config(config: Config) -> String {
    if config == Config::NONE { "none".to_owned() } else { format!("{}{}", config.version, names(config.members)) }
}

/// The parts of a state that are not a primary's.
fn told_state(state: &State) -> Vec<String> {
    let record = format!("record {} by {}", told_config(state.record), state.record_term);
    let seen = format!("users saw {}", told_log(state.seen));
    let replicas = state.replicas.iter().enumerate().map(|(index, replica)| {
        let (log, config, prepared) = (told_log(replica.log), told_config(replica.config), told_config(replica.prepared));
        let discarded = if replica.discarded { " (discarded)" } else { "" };
        let held = format!("r{index} holds {log}{discarded} at {}.{}", replica.log_term, replica.position);
        format!("{held} promised {} config {config} prepared {prepared}", replica.promised)
    });
    [record, seen].into_iter().chain(replicas).collect()
}

/// Splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % limit
    }
}
