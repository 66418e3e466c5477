//! Replicas that hold something else, with checksums that are right: what a bug, or somebody's hand, would leave.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use carrick_backing_store::dice::Dice;
use serde_json::Value;

use crate::fio::Fio;
use crate::history::History;
use crate::replicas::{identical, tamper};
use crate::report::{Found, Plan};
use crate::site::{Site, wait_for};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// What is tampered with; the rest of the volume is written to meanwhile.
const QUIET: u64 = 128 * MIB;
const BUSY: u64 = 64 * MIB;
/// Threads of the load on the rest, and how fine it writes.
const THREADS: u64 = 2;
/// A comparison of so much, even beside a load. Of 200 blocks in 128 MiB, each differs in a MiB of its own nearly, and each such MiB is taken
/// apart: 5,000 questions one after the other, 10 ms and an answer under load apart.
const VERIFY_MAX: Duration = Duration::from_secs(300);

pub fn differences(plan: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", "vm1", "--size", &(QUIET + BUSY).to_string(), "--replicas", "3"])?;
    site.refused(&["volume", "verify", "vm1"], 5, "VOLUME_NOT_ATTACHED")?;
    let device = site.attach("vm1", &[])?;
    Fio::start(&device, &["--rw=write", "--bs=1M", "--size=64M", "--buffer_pattern=0xca55e77e"])?.finish()?;
    ensure!(found(&site.carrick(&["volume", "verify", "vm1", "--wait"])?)? == (0, 0), "equal replicas differ");
    site.detach("vm1")?;
    let (count, mut dice) = (if plan.quick { 20 } else { 200 }, Dice::new(plan.seed));
    let mut blocks: Vec<u64> = (0..count).map(|_| dice.below(QUIET / BLOCK)).collect();
    blocks.sort_unstable();
    blocks.dedup();
    tamper(&site, "vm1", 1, &blocks)?;
    site.attach("vm1", &[])?;
    let load = History::start(&device, QUIET, BUSY / THREADS, THREADS, 512, plan.seed)?;
    site.carrick(&["volume", "verify", "vm1"])?;
    let begin = Instant::now();
    let done = || {
        let shown = site.carrick(&["volume", "show", "vm1"])?;
        Ok((shown["attachment"]["verification"]["running"] == false).then_some(shown))
    };
    let shown = wait_for("the replicas to be compared", VERIFY_MAX, done).with_context(|| site.log_tail())?;
    let took = begin.elapsed();
    let requests = load.finish().with_context(|| site.log_tail())?;
    let (repaired, unsettled) = found(&shown)?;
    ensure!((repaired, unsettled) == (blocks.len() as u64, 0), "{} blocks were changed in one replica: {shown}", blocks.len());
    ensure!(found(&site.carrick(&["volume", "verify", "vm1", "--wait"])?)? == (0, 0), "repaired replicas differ");
    site.detach("vm1")?;
    let bytes = identical(&site, "vm1")?;
    let told = of_two(&site)?;
    Ok(format!(
        "{repaired} blocks changed in one of three, found and repaired in {:.0} s beside {requests} requests that were checked; {bytes} bytes \
         the same on all; {told}",
        took.as_secs_f32(),
    ))
}

/// Of two, nobody can tell who is right: that is said, until the block is written again.
fn of_two(site: &Site) -> anyhow::Result<String> {
    site.carrick(&["volume", "create", "vm2", "--size", "64M", "--replicas", "2"])?;
    tamper(site, "vm2", 0, &[5])?;
    let device = site.attach("vm2", &[])?;
    let message = site.refused(&["volume", "verify", "vm2", "--wait"], 1, "REPLICAS_DIFFER")?;
    let status = site.carrick(&["status"])?;
    let problems = status["problems"].to_string();
    ensure!(problems.contains("differ in 1 blocks"), "carrick status says nothing of replicas that differ: {problems}");
    Fio::start(&device, &["--rw=write", "--bs=4k", "--size=64k"])?.finish()?;
    ensure!(found(&site.carrick(&["volume", "verify", "vm2", "--wait"])?)? == (0, 0), "replicas differ in what was written to both");
    site.detach("vm2")?;
    Ok(format!("of two: \"{message}\""))
}

/// Blocks that were repaired, and that nobody can settle.
fn found(volume: &Value) -> anyhow::Result<(u64, u64)> {
    let verification = &volume["attachment"]["verification"];
    let number = |name: &str| verification[name].as_u64().with_context(|| format!("no {name} in {verification}"));
    ensure!(verification["running"] == false && number("skipped_bytes")? == 0, "not all is compared: {verification}");
    Ok((number("repaired_blocks")?, number("unsettled_blocks")?))
}
