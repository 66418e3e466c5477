//! How long a store needs to start when its process was killed at the worst moment.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::Signal;

use super::program::{Served, check, replica};
use crate::fio::Fio;
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, path_text, signal};

/// With the largest journal there is.
const STORE: &str = "16G";
const JOURNAL_BLOCKS: u64 = 65_536;
const VOLUME_MIB: u64 = 256;
/// Bound of the promise.
const START_MAX: Duration = Duration::from_secs(2);
/// A checkpoint begins when half of the journal is used, so it can't be much fuller than that. How many blocks a write takes
/// differs a little from run to run.
const FULL: f64 = 0.47;
/// This is full enough.
const FULL_MIN: f64 = 0.4;
/// What an idle store does, to the last, is done after this.
const SETTLED: Duration = Duration::from_secs(12);

/// A killed store: what is in its journal, and how long it needed to start.
struct Start {
    blocks: u64,
    batches: u64,
    time: Duration,
}

pub fn full_journal(plan: &Plan) -> Found {
    let mut site = Site::start()?;
    let store = site.path("store0");
    replica(&["format", path_text(&store)?, "--size", STORE])?;
    site.carrick(&["store", "add", path_text(&store)?])?;
    site.carrick(&["volume", "create", "vm1", "--size", &format!("{VOLUME_MIB}M"), "--replicas", "1"])?;
    let device = site.attach("vm1", &[])?;
    Fio::start(&device, &["--rw=write", "--bs=1M", "--iodepth=8"])?.finish()?;
    let mut starts: Vec<Start> = Vec::new();
    // How many overwrites fill the journal, the first one finds out.
    let mut writes = 20_000.0;
    for round in 0..if plan.quick { 2 } else { 4 } {
        sleep(SETTLED);
        let seed = format!("--randseed={}", plan.seed + round);
        let count = format!("--number_ios={writes:.0}");
        let load = ["--rw=randwrite", "--bs=4k", "--iodepth=32", &seed, &count];
        let start = one_life(&mut site, &store, &device, &load).with_context(|| site.log_tail())?;
        // Fewer blocks than writes: there was a checkpoint in between.
        let was_too_many = (start.blocks as f64) < writes;
        writes *= if was_too_many { 0.9 } else { FULL * JOURNAL_BLOCKS as f64 / start.blocks as f64 };
        starts.push(start);
        site.start_daemon()?;
        site.wait_in_sync("vm1", SOON)?;
    }
    let longest = starts.iter().max_by_key(|start| start.time).context("no start")?;
    let fullest = starts.iter().max_by_key(|start| start.blocks).context("no start")?;
    let all: Vec<_> = starts.iter().map(|start| (start.time.as_millis(), start.blocks)).collect();
    let is_full = fullest.blocks as f64 >= FULL_MIN * JOURNAL_BLOCKS as f64;
    ensure!(is_full, "the journal was never full; starts took (ms, blocks in the journal): {all:?}");
    ensure!(longest.time <= START_MAX, "starts took (ms, blocks in the journal): {all:?}");
    Ok(format!(
        "{} starts; longest {} ms of 2000; fullest journal {} of {JOURNAL_BLOCKS} blocks in {} batches, {} ms",
        starts.len(),
        longest.time.as_millis(),
        fullest.blocks,
        fullest.batches,
        fullest.time.as_millis()
    ))
}

/// Loads the store, kills its process, and starts it by hand.
fn one_life(site: &mut Site, store: &Path, device: &Path, load: &[&str]) -> anyhow::Result<Start> {
    let pid = site.pids("replica")?.first().copied().context("no replica")?;
    Fio::start(device, load)?.finish()?;
    // Nobody starts it again but us.
    site.kill_daemon()?;
    signal(pid, Signal::KILL)?;
    let batches = check(store)?["batches"].as_u64().context("no batches")?;
    let blocks = journal_blocks(&replica(&["dump", path_text(store)?])?)?;
    // Apart from the target, which is not to disturb it.
    let (served, time) = Served::start(store, &site.path("run-alone"))?;
    served.end()?;
    Ok(Start { blocks, batches, time })
}

/// Sums up what `carrick-replica dump` says of the batches in the journal: "batch 7 at 12: ..., 1+32 blocks".
fn journal_blocks(dump: &str) -> anyhow::Result<u64> {
    let mut sum = 0;
    for line in dump.lines().filter(|line| line.starts_with("batch ")) {
        let blocks = line.rsplit_once(", ").and_then(|(_, blocks)| blocks.strip_suffix(" blocks"));
        for part in blocks.with_context(|| format!("the dump says {line:?}"))?.split('+') {
            sum += part.parse::<u64>()?;
        }
    }
    Ok(sum)
}
