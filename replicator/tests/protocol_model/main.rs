//! An explicit-state model of the replication protocol: metadata record, promises, choice, reconciling, writes, config changes.
//! It is a model beside the code, not the code itself: whoever changes the protocol changes both.
//!
//! * `cargo test --release -p carrick-replicator --test protocol_model` searches all states of small bounds, takes random walks
//!   through larger ones, and shows for each shortcut that it would be found. It takes about a minute and 0.6 GB.
//! * `CARRICK_MODEL_SECONDS=3600` makes the walks longer; `CARRICK_MODEL_FIRST=N` begins with walk N, to see one again.
//! * `-- --ignored` searches three primaries with a write each and no config changes (1 GB).
//! * A violation is told with a shortest way to it, step by step (that of a walk is as long as the walk was).
//!
//! Covered: primaries that stop for good at any step; messages and compare-and-swaps that arrive late, or never, those of dead
//! primaries too; recovery without the metadata store; volumes that begin with one, two or three members; changes to any members
//! (some dropped, some added, both) with one in common, by prepare, compare-and-swap and commit, or given up halfway; a copy
//! that ends before the term is adopted. In each state, whoever might start next must find all that users have seen.
//!
//! Death of a primary is no step of its own: a dead primary is one that takes no further steps, while what it sent may still
//! arrive. Writes go to one sector, and users see a content when a primary serves it, or acknowledges more.
//!
//! Not covered: the read lease, which needs time (what a superseded primary still shows is only required to have been true once);
//! losses of power and flushes; damaged disks; wrap of sequences; copies by epoch, which the simulation covers.
//!
//! States that differ only in the names of replicas count once. States are remembered by 64-bit fingerprints, so a search may
//! miss one with a chance of about 10⁻⁵.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

mod check;
mod rules;
mod search;
mod state;

use std::time::{Duration, Instant};

use check::Violation;
use rules::{Bounds, Kind, Shortcut};

/// How long random walks are taken unless told otherwise.
const SECONDS_DEFAULT: u64 = 10;
/// Volumes that begin with three, two or one member.
const FIRST: &[u8] = &[0b111, 0b011, 0b001];
/// What is searched to the end.
const SMALL: Bounds = Bounds { primaries: 2, writes: 1, changes: 1, first: FIRST, by_record: false, shortcut: None };
/// The same, as the code does it so far.
const CODE: Bounds = Bounds { by_record: true, ..SMALL };
/// What random walks go through.
const LARGE: Bounds = Bounds { primaries: 3, writes: 2, changes: 2, first: FIRST, by_record: false, shortcut: None };

/// Each shortcut, and what a shortest way through it ends in.
const SHORTCUTS: &[(Shortcut, Violation)] = &[
    (Shortcut::CommitUnprepared, Violation::LostWrite),
    (Shortcut::RecoverByMajority, Violation::LostWrite),
    (Shortcut::IgnorePrepared, Violation::LostWrite),
    (Shortcut::ComparePositions, Violation::LostWrite),
    (Shortcut::AcknowledgeOnOne, Violation::LostWrite),
    (Shortcut::AcceptLowerTerm, Violation::LostWrite),
    (Shortcut::ServeEarly, Violation::ChangedBack),
    (Shortcut::AddLagging, Violation::LostWrite),
    (Shortcut::AcknowledgeWhileChanging, Violation::LostWrite),
    (Shortcut::DiscardWhileCopied, Violation::LostWrite),
    (Shortcut::ChooseAgain, Violation::ChangedBack),
];

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// Searches to the end, and expects no violation. Returns how often each kind of step was taken.
fn search(bounds: Bounds) -> [usize; Kind::COUNT] {
    let begin = Instant::now();
    let searched = bounds.search();
    if let Some((violation, trace)) = searched.violation {
        panic!("{violation:?}, after\n{trace}");
    }
    println!("{} states, {} steps deep, {:.1} s", searched.states, searched.depth, begin.elapsed().as_secs_f64());
    searched.taken
}

#[test]
fn two_primaries_a_write_and_a_change_each_violate_nothing() {
    let taken = search(SMALL);
    let never: Vec<usize> = (0..Kind::COUNT).filter(|kind| taken[*kind] == 0).collect();
    assert_eq!(never, [Kind::Learn.index()], "a kind of step was never taken: {taken:?}");
}

#[test]
fn what_the_code_does_violates_nothing() {
    search(CODE);
    search(Bounds { changes: 2, ..CODE });
    for shortcut in [Shortcut::AcknowledgeWhileChanging, Shortcut::AddLagging, Shortcut::AcknowledgeOnOne] {
        let searched = Bounds { shortcut: Some(shortcut), ..CODE }.search();
        let (violation, trace) = searched.violation.unwrap_or_else(|| panic!("{shortcut:?} violates nothing"));
        assert_eq!(violation, Violation::LostWrite, "{shortcut:?} ends otherwise:\n{trace}");
    }
}

#[test]
#[ignore = "takes one and a half minutes, and 1 GB"]
fn three_primaries_and_a_write_each_violate_nothing() {
    search(Bounds { primaries: 3, changes: 0, ..SMALL });
}

#[test]
fn random_walks_of_three_primaries_violate_nothing() {
    let limit = Duration::from_secs(variable("CARRICK_MODEL_SECONDS").unwrap_or(SECONDS_DEFAULT));
    let first = variable("CARRICK_MODEL_FIRST").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        u64::try_from(now.as_micros()).unwrap()
    });
    let begin = Instant::now();
    let (mut walks, mut steps) = (0, 0);
    while walks == 0 || begin.elapsed() < limit {
        let (length, violation) = LARGE.walk(first + walks);
        if let Some((violation, trace)) = violation {
            panic!("walk {}: {violation:?}, after\n{trace}", first + walks);
        }
        (walks, steps) = (walks + 1, steps + length);
    }
    println!("{walks} walks from {first} on, {steps} steps");
}

#[test]
fn every_shortcut_is_found() {
    for (shortcut, expected) in SHORTCUTS {
        let begin = Instant::now();
        let searched = Bounds { shortcut: Some(*shortcut), ..SMALL }.search();
        let (violation, trace) = searched.violation.unwrap_or_else(|| panic!("{shortcut:?} violates nothing"));
        assert_eq!(violation, *expected, "{shortcut:?} ends otherwise:\n{trace}");
        let seconds = begin.elapsed().as_secs_f64();
        println!("{shortcut:?}: {violation:?} after {} steps, {} states, {seconds:.1} s\n{trace}", searched.depth, searched.states);
    }
}

/// Else walks that find nothing would say nothing.
#[test]
fn random_walks_find_every_shortcut() {
    for (shortcut, _) in SHORTCUTS {
        let bounds = Bounds { shortcut: Some(*shortcut), ..LARGE };
        let found = (0..100_000).find(|walk| bounds.walk(*walk).1.is_some());
        println!("{shortcut:?}: in walk {}", found.unwrap_or_else(|| panic!("no walk finds what {shortcut:?} violates")));
    }
}
