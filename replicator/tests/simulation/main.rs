//! The seeded simulation: engine, replica sessions and their stores in virtual time, with crashes, lost connections and losses of
//! power, checked against the history of every sector. The stores of some seeds are the real ones, on a simulated disk; those of the
//! others are in memory.
//!
//! * `cargo test --release -p carrick-replicator --test simulation` runs new seeds for a fixed time, and all seeds that once failed.
//!   At its end it tells what happened in them.
//!   Bugs that are planted on purpose must be found, each within some runs.
//! * `CARRICK_SIM_SECONDS=3600` makes it a soak; `CARRICK_SIM_SEEDS=N` makes it N schedules, however long they take; `tests/soak` does
//!   this on all processors. `CARRICK_SIM_SEED=N` replays one run, and tells all that happened in it, whether it
//!   fails or not. `CARRICK_SIM_STORE=memory` or `map` gives all replicas this kind of store.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

mod checker;
mod coverage;
mod machine_store;
mod world;

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use carrick_backing_store::dice::Dice;

use coverage::Coverage;
use machine_store::StoreKind;
use world::{Bug, Plan, World};

/// How long new seeds are tried unless told otherwise.
const SECONDS_DEFAULT: u64 = 20;
/// A soak tells how far it is after so many runs: that is each few minutes.
const RUNS_BETWEEN_NEWS: u64 = 10_000;
/// Lines that are told of a run that failed among many.
const LOG_LINES: usize = 400;
/// In so many runs everything should have happened.
const RUNS_THAT_COVER: u64 = 2000;
/// In so many runs each planted bug is found.
const RUNS_THAT_FIND: u64 = 1000;
/// Seeds that found something once.
const FAILED_ONCE: &[u64] = &[
    // A replica whose copy began slowly wrote what came after with an epoch that was past.
    1795286463009157,
    1795286363009232,
    // A copy replaced a replica that was behind while what was flushed to it was on no other majority's media.
    20261122000005006,
    // Power failed while a store was opened, and again while it was opened after that.
    20261122100010288,
];
/// And since replicas are moved, which the earlier ones didn't do.
const FAILED_ONCE_MOVING: &[u64] = &[
    // What was to go had gone, and the test waited for it to be in sync again.
    1795344419468386,
    // One that had been late no longer counted when the other one lost what it had, and that was all there was.
    1795346324333086,
    // The disk of one failed when the other one, which had the same, was about to go.
    1795360907003806,
    // A disk that took nearly two seconds for everything owed something yet when the faults ended.
    1795387532047103,
    // Nothing but disks that fail, one after the other, and requests between them only.
    1795389003010374,
    // A connection was broken, and only its replica knew when the rest began.
    1795391347013203,
];

fn plan(seed: u64, log_lines: usize) -> Plan {
    let replicas = [3, 3, 3, 1, 2, 5][usize::try_from(seed % 6).unwrap()];
    let store = match std::env::var("CARRICK_SIM_STORE").as_deref() {
        Ok("memory") => StoreKind::Memory,
        Ok("map") => StoreKind::Map,
        Ok(other) => panic!("CARRICK_SIM_STORE is memory or map, not {other:?}"),
        // What else the seed decides says nothing of this.
        Err(_) if Dice::new(seed ^ 0x7374_6f72).once_in(3) => StoreKind::Map,
        Err(_) => StoreKind::Memory,
    };
    let rot = replicas >= 3 && seed.is_multiple_of(5);
    let grows = Dice::new(seed ^ 0x6772_6f77).once_in(3);
    let moves = Dice::new(seed ^ 0x6d6f_7665).once_in(3);
    Plan {
        seed,
        replicas,
        requests: 200 + seed % 300,
        rot,
        grows,
        moves,
        dense: seed % 7 < 3,
        pauses: seed % 4 < 3,
        store,
        bug: None,
        log_lines,
    }
}

/// Tells something, whether the test fails or not.
fn tell(line: &str) {
    // Not eprintln!, whose output is kept back.
    let mut out = std::io::stderr().lock();
    writeln!(out, "{line}").unwrap();
}

/// Runs one seed; on a violation, tells how to see it again.
fn run(plan: Plan, always_tells: bool) -> Coverage {
    let mut world = World::new(plan);
    let result = world.run();
    if always_tells || result.is_err() {
        tell(&format!("{plan:?}"));
        world.log.iter().for_each(|line| tell(line));
        tell(&world.coverage().to_string());
    }
    let seed = plan.seed;
    if let Err(reason) = result {
        let store = std::env::var("CARRICK_SIM_STORE").map(|kind| format!("CARRICK_SIM_STORE={kind} ")).unwrap_or_default();
        let again = format!("CARRICK_SIM_SEED={seed} {store}cargo test --release -p carrick-replicator --test simulation");
        panic!("seed {seed}: {reason}\nreplay: {again}");
    }
    assert!(world.term().is_some(), "seed {seed}: nobody ever became primary");
    world.coverage()
}

/// Whether a run with this bug comes to the wrong end.
fn is_found(plan: Plan) -> bool {
    let outcome = std::panic::catch_unwind(|| World::new(plan).run());
    // An assertion that doesn't hold ends the process, which is as good.
    !matches!(outcome, Ok(Ok(())))
}

#[test]
fn planted_bugs_are_found() {
    let first = variable("CARRICK_SIM_FIRST").unwrap_or(1);
    let mut missed = Vec::new();
    for bug in Bug::ALL {
        let begin = Instant::now();
        let found = (first..first + RUNS_THAT_FIND)
            .find(|seed| is_found(Plan { bug: Some(bug), rot: false, moves: false, ..plan(*seed, LOG_LINES) }));
        let seconds = begin.elapsed().as_secs_f64();
        match found {
            Some(seed) => tell(&format!("{bug:?} was found in run {} (seed {seed}), after {seconds:.1} s", seed - first + 1)),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not found in {RUNS_THAT_FIND} runs from seed {first} on: {missed:?}");
}

#[test]
fn a_lone_replica_that_lost_what_it_had_acknowledged_stops_the_volume_until_somebody_says_so() {
    for store in [StoreKind::Memory, StoreKind::Map] {
        let mut world = World::new(Plan { replicas: 1, store, rot: false, grows: false, moves: false, ..plan(3, LOG_LINES) });
        let told = world.lose_what_one_alone_had().unwrap();
        assert!(told.contains("has come back without what was acknowledged last"), "{told}");
        assert!(told.contains("detached by force and attached again"), "{told}");
    }
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

#[test]
fn seeds_that_failed_once_stay_fixed() {
    // They are older than what has a seed of its own.
    FAILED_ONCE.iter().for_each(|seed| _ = run(Plan { moves: false, ..plan(*seed, LOG_LINES) }, false));
    FAILED_ONCE_MOVING.iter().for_each(|seed| _ = run(plan(*seed, LOG_LINES), false));
}

#[test]
fn random_schedules_lose_nothing() {
    if let Some(seed) = variable("CARRICK_SIM_SEED") {
        run(plan(seed, usize::MAX), true);
        return;
    }
    let seconds = variable("CARRICK_SIM_SECONDS").unwrap_or(SECONDS_DEFAULT);
    let (seeds, limit) = match variable("CARRICK_SIM_SEEDS") {
        Some(seeds) => (seeds, Duration::MAX),
        None => (u64::MAX, Duration::from_secs(seconds)),
    };
    let first = variable("CARRICK_SIM_FIRST").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        u64::try_from(now.as_micros()).unwrap()
    });
    let begin = Instant::now();
    let mut seen: BTreeMap<StoreKind, (Coverage, Duration)> = BTreeMap::new();
    for seed in first..first.saturating_add(seeds) {
        if begin.elapsed() >= limit {
            break;
        }
        let plan = plan(seed, LOG_LINES);
        let began = Instant::now();
        let coverage = run(plan, false);
        let (total, time) = seen.entry(plan.store).or_default();
        total.add(&coverage);
        *time += began.elapsed();
        let runs = seed - first + 1;
        if runs.is_multiple_of(RUNS_BETWEEN_NEWS) {
            tell(&format!("{runs} schedules from seed {first} on, nothing wrong, {:.0} minutes", begin.elapsed().as_secs_f64() / 60.0));
        }
    }
    let mut all = Coverage::default();
    tell(&format!("schedules from seed {first} on:"));
    for (kind, (coverage, time)) in seen {
        tell(&format!("{kind:?} stores, {:.0} runs a minute: {coverage}", coverage.runs as f64 * 60.0 / time.as_secs_f64()));
        all.add(&coverage);
    }
    assert!(all.runs > 0);
    let never = if all.runs < RUNS_THAT_COVER { Vec::new() } else { all.never_happened() };
    assert!(never.is_empty(), "in {} runs there were no {}", all.runs, never.join(", no "));
}
