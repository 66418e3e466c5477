//! The model test of stores: random operations on a store and on the oracle ([`carrick_backing_store::MemoryStore`]), every answer
//! compared, with kills and losses of power in between, after which the store has to be as after a first part of what was asked.
//!
//! * `cargo test --release -p carrick-backing-store --test model` runs new seeds for a fixed time, and all seeds that once failed.
//! * `CARRICK_MODEL_SECONDS=3600` makes it a soak, `CARRICK_MODEL_SEEDS=1000` runs so many. `CARRICK_MODEL_FIRST=N` says where to
//!   begin. `CARRICK_MODEL_SEED=N` replays one run, and tells what happens in it.
//!
//! A store is plugged in by a [`subject::Subject`] and a test that calls [`soak`].

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

mod content;
mod expected;
mod map;
mod picture;
mod prefix;
mod reference;
mod steps;
mod subject;
mod world;

use std::time::{Duration, Instant};

use map::Map;
use prefix::{Lie, Prefix};
use subject::{Memory, Subject};
use world::{Plan, World};

/// How long new seeds are tried unless told otherwise.
const SECONDS_DEFAULT: u64 = 10;
/// Seeds that found something once.
const FAILED_ONCE: &[u64] = &[35, 89, 96, 97, 172, 186, 1710, 2010, 3252, 5047, 1001058, 1795293709902229];

fn plan(test: &'static str, seed: u64) -> Plan {
    Plan { test, seed, steps: 100 + seed % 300, big: 1 << 28 }
}

/// How to see a run again.
fn replay(plan: &Plan) -> String {
    let Plan { test, seed, .. } = plan;
    format!("CARRICK_MODEL_SEED={seed} cargo test --release -p carrick-backing-store --test model {test} -- --nocapture")
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// Runs seeds on a subject, as the environment says. `test` is the name of the test that calls it.
fn soak<S: Subject>(test: &'static str, subject: impl Fn(u64) -> S) {
    if let Some(seed) = variable("CARRICK_MODEL_SEED") {
        return World::new(plan(test, seed), subject(seed), true).run();
    }
    let run = |seed| World::new(plan(test, seed), subject(seed), false).run();
    FAILED_ONCE.iter().for_each(|seed| run(*seed));
    let first = variable("CARRICK_MODEL_FIRST").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        u64::try_from(now.as_micros()).unwrap()
    });
    let limit = Duration::from_secs(variable("CARRICK_MODEL_SECONDS").unwrap_or(SECONDS_DEFAULT));
    let seeds = variable("CARRICK_MODEL_SEEDS");
    let begin = Instant::now();
    let mut runs = 0;
    while seeds.map_or_else(|| begin.elapsed() < limit, |seeds| runs < seeds) {
        run(first + runs);
        runs += 1;
    }
    println!("{test}: {runs} runs from seed {first} on, {:.0} a minute", runs as f64 * 60.0 / begin.elapsed().as_secs_f64());
    assert!(runs > 0);
}

#[test]
fn the_epoch_map_agrees_with_the_oracle() {
    soak("the_epoch_map_agrees_with_the_oracle", Map::new);
}

#[test]
fn the_oracle_agrees_with_itself() {
    soak("the_oracle_agrees_with_itself", Memory::new);
}

#[test]
fn a_store_that_keeps_a_prefix_passes() {
    soak("a_store_that_keeps_a_prefix_passes", |seed| Prefix::new(seed, Lie::None));
}

#[test]
fn a_store_that_does_wrong_is_found_out() {
    for lie in [Lie::Sync, Lie::Gap, Lie::Torn, Lie::Kill, Lie::Snapshot, Lie::Epoch] {
        let passes = |seed| {
            let run = || World::new(plan("a_store_that_does_wrong_is_found_out", seed), Prefix::new(seed, lie), false).run();
            std::panic::catch_unwind(run).is_ok()
        };
        assert!(!(1..40).all(passes), "{lie:?} is not found in 40 runs");
    }
}
