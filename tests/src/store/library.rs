//! What the library's own tests find out on a simulated disk, with their figures. They are built on the host
//! (`tests/acceptance`), and run there, too: user-mode Linux needs minutes for what a test does with much memory.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail, ensure};

use crate::report::{Found, Plan};

/// Where cargo runs the tests of this package.
const PACKAGE: &str = "backing-store";
/// How many processes share the seeds.
const PROCESSES: u64 = 2;

/// A figure that a test prints: the first number after `before`, in each line that begins with `line`. The largest counts.
struct Figure {
    test: &'static str,
    line: &'static str,
    before: &'static str,
    most: f64,
}

impl Figure {
    /// Runs the test, and compares.
    fn find(&self) -> Found {
        let said = finish(start("counts", &[self.test, "--exact", "--nocapture"], &[])?)?;
        let number = |line: &str| {
            let rest = line.strip_prefix(self.line)?.split_once(self.before)?.1;
            let end = rest.find(|digit: char| !digit.is_ascii_digit() && digit != '.').unwrap_or(rest.len());
            rest[..end].parse::<f64>().ok()
        };
        let found = said.lines().filter_map(number).reduce(f64::max).with_context(|| format!("{} doesn't say it: {said}", self.test))?;
        ensure!(found <= self.most, "{found}, at most {} are allowed", self.most);
        Ok(format!("{found} of {}", self.most))
    }
}

pub fn overwrite(_: &Plan) -> Found {
    let (test, line) = ("a_random_overwrite_costs_little_more_than_two_blocks", "blocks written per random overwrite at depth 32");
    Figure { test, line, before: ": ", most: 2.3 }.find()
}

pub fn read(_: &Plan) -> Found {
    let (test, line) = ("a_read_with_a_warm_map_is_one_read_of_the_disk", "1000 random reads with a warm map");
    Figure { test, line, before: ": (", most: 1000.0 }.find()
}

pub fn flush(_: &Plan) -> Found {
    let (test, line) = ("flushes_of_many_volumes_share_syncs", "1000 flushes of 8 volumes");
    Figure { test, line, before: ": ", most: 300.0 }.find()
}

pub fn snapshot(_: &Plan) -> Found {
    let (test, line) = ("a_snapshot_writes_two_blocks_at_most_whatever_the_size", "a snapshot of ");
    Figure { test, line, before: " blocks: (", most: 2.0 }.find()
}

pub fn difference(_: &Plan) -> Found {
    let (test, line) = ("what_changed_in_a_huge_volume_is_found_in_few_pages", "100 changed blocks of 1 TiB");
    Figure { test, line, before: "cache: ", most: 1000.0 }.find()
}

pub fn memory(_: &Plan) -> Found {
    let (test, line) = ("memory_does_not_grow_with_what_is_mapped", "one block in each of 30000 leaves over 1 TiB");
    let cached = Figure { test, line, before: "at most ", most: 8.0 }.find()?;
    let changed = Figure { test, line, before: "changed pages (", most: 64.0 }.find()?;
    Ok(format!("{cached} MiB cached, {changed} MiB changed"))
}

pub fn crashes(plan: &Plan) -> Found {
    let seeds: u64 = if plan.quick { 200 } else { 10_000 };
    let run = |process: u64| {
        let (count, first) = ((seeds / PROCESSES).to_string(), (plan.seed * 1_000_000 + process * seeds).to_string());
        let test = ["the_epoch_map_agrees_with_the_oracle", "--exact", "--nocapture"];
        start("model", &test, &[("CARRICK_MODEL_SEEDS", &count), ("CARRICK_MODEL_FIRST", &first)])
    };
    let runs: Vec<Running> = (0..PROCESSES).map(run).collect::<anyhow::Result<_>>()?;
    let mut done = 0;
    for run in runs {
        let said = finish(run)?;
        let words = said.lines().find_map(|line| line.strip_prefix("the_epoch_map_agrees_with_the_oracle: "));
        let count: u64 = words.and_then(|words| words.split_once(' ')?.0.parse().ok()).context("the model test says no count")?;
        done += count;
    }
    ensure!(done >= seeds, "only {done} seeds of {seeds} were run");
    Ok(format!("{done} seeds of kills and losses of power, 0 failures"))
}

pub fn flips(_: &Plan) -> Found {
    let said = finish(start("faults", &["flips::", "--nocapture"], &[])?)?;
    let (mut flips, mut kinds) = (0, 0);
    for line in said.lines().filter(|line| line.contains(": refused ")) {
        // "leaf: refused 1, partly readable 2, whole 3"
        flips += line.split([' ', ',']).filter_map(|word| word.parse::<u64>().ok()).sum::<u64>();
        kinds += 1;
    }
    ensure!(flips > 0, "no flip was counted: {said}");
    Ok(format!("{flips} flips in {kinds} kinds of structures, each repaired or told"))
}

pub fn forged(_: &Plan) -> Found {
    let found = passed("faults", "garbage::")?;
    Ok(format!("{found}, no panic, no wrong data, no write outside"))
}

pub fn damage(_: &Plan) -> Found {
    Ok(format!("{}; {}", passed("faults", "damage::")?, passed("faults", "poison::")?))
}

/// There are no commands for snapshots yet, so no volume of a real node can fill its store with them.
pub fn full(_: &Plan) -> Found {
    Ok(format!("{} of the library; snapshots have no commands yet", passed("faults", "space::")?))
}

pub fn format(_: &Plan) -> Found {
    passed("format", "")
}

/// Runs the tests whose name contains a word; says how many passed.
fn passed(program: &str, word: &str) -> Found {
    let said = finish(start(program, if word.is_empty() { &[] } else { std::slice::from_ref(&word) }, &[])?)?;
    let words = said.lines().find_map(|line| line.strip_prefix("test result: ok. ")).context("the tests say no result")?;
    let count: u64 = words.split_once(' ').and_then(|(count, _)| count.parse().ok()).context("the tests say no count")?;
    ensure!(count > 0, "no test has {word} in its name");
    Ok(format!("{count} tests passed"))
}

/// A test program under way, killed when dropped.
struct Running(Option<Child>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<Running> {
    let variable = format!("CARRICK_TEST_{}", name.to_uppercase());
    let program = std::env::var_os(&variable).map(PathBuf::from);
    let child = Command::new(program.with_context(|| format!("{variable} names no program: start this by tests/acceptance"))?)
        .args(arguments)
        .envs(variables.iter().copied())
        .current_dir(PACKAGE)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting the test {name}"))?;
    Ok(Running(Some(child)))
}

/// Waits for the end, which must be a good one; what it printed.
fn finish(mut running: Running) -> anyhow::Result<String> {
    let output = running.0.take().context("the test is gone")?.wait_with_output()?;
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{}: {said}\n{complained}", output.status);
    }
    Ok(said.into_owned())
}
