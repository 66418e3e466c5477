//! Volumes that lose replicas one after the other, and what they remember of it.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::resync::COPY_LIMIT;
use crate::disk::Disk;
use crate::fio::Fio;
use crate::replicas::identical;
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, signal, wait_for};

const VOLUME: &str = "vm1";
const BLOCKS: u64 = 2048;
/// The longest that I/O may stand still when a replica is lost that a majority needs: it is missed after 1.5 s, of which 1.5 s more
/// may pass before it is given up, and the record is changed.
const STALL_MAX: Duration = Duration::from_secs(4);
/// How long a volume is watched that must not become active.
const WATCHED: Duration = Duration::from_secs(8);

fn show(site: &Site) -> anyhow::Result<Value> {
    site.carrick(&["volume", "show", VOLUME])
}

/// Waits until exactly these replicas count, and are in sync.
fn wait_counting(site: &Site, counting: &[bool]) -> anyhow::Result<()> {
    wait_for(&format!("replicas {counting:?} to count"), COPY_LIMIT, || {
        let shown = show(site)?;
        let replicas = shown["replicas"].as_array().context("no replicas")?;
        let is_so = |(replica, counts): (&Value, &bool)| replica["counts"] == *counts && (!counts || replica["state"] == "in-sync");
        Ok((replicas.len() == counting.len() && replicas.iter().zip(counting).all(is_so)).then_some(()))
    })
    .with_context(|| site.log_tail())
}

pub fn down_to_one(_: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "64M"])?;
    let device = site.attach(VOLUME, &[])?;
    let disk = Disk::open(&device)?;
    disk.write_blocks(0, BLOCKS, 1)?;
    wait_counting(&site, &[true; 3])?;
    let replicas = site.pids("replica")?;
    let mut longest = Duration::ZERO;
    let mut counting = [true; 3];
    for (round, index) in [(2, 0), (3, 1)] {
        signal(replicas[index], Signal::STOP)?;
        counting[index] = false;
        longest = longest.max(disk.write_blocks(0, BLOCKS, round)?);
        wait_counting(&site, &counting)?;
    }
    disk.check_blocks(0, BLOCKS, 3)?;
    let said = show(&site)?["replicas"][0]["state"].to_string();
    for index in [0, 1] {
        signal(replicas[index], Signal::CONT)?;
    }
    wait_counting(&site, &[true; 3])?;
    disk.check_blocks(0, BLOCKS, 3)?;
    drop(disk);
    site.detach(VOLUME)?;
    let bytes = identical(&site, VOLUME)?;
    ensure!(longest <= STALL_MAX, "a write took {longest:?} when a replica was lost");
    Ok(format!(
        "two of three lost one after the other ({said}): the slowest write took {} ms of {}; both came back, {bytes} bytes the same",
        longest.as_millis(),
        STALL_MAX.as_millis()
    ))
}

pub fn never_split(_: &Plan) -> Found {
    let site = Site::with_stores(2)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "64M", "--replicas", "2"])?;
    let device = site.attach(VOLUME, &[])?;
    let disk = Disk::open(&device)?;
    disk.write_blocks(0, BLOCKS, 1)?;
    wait_counting(&site, &[true; 2])?;
    let [first, second] = site.pids("replica")?[..] else { anyhow::bail!("not two replicas") };
    signal(first, Signal::STOP)?;
    disk.write_blocks(0, BLOCKS, 2)?;
    wait_counting(&site, &[false, true])?;
    // Now the one that has it goes, and the one that lacks it comes back; a new target knows only what is written down.
    signal(second, Signal::STOP)?;
    signal(first, Signal::CONT)?;
    signal(site.pids("target")?.first().copied().context("no target")?, Signal::KILL)?;
    let store = show(&site)?["replicas"][1]["store"].as_str().context("a replica without store")?.to_owned();
    let mut said = String::new();
    let begin = Instant::now();
    while begin.elapsed() < WATCHED {
        let shown = show(&site)?;
        let attachment = &shown["attachment"];
        let is_active = attachment["phase"] == "serving" && attachment["waiting_for"].is_null();
        ensure!(!is_active, "the volume became active without the replica that has what was written last: {shown}");
        said = attachment["waiting_for"].as_str().unwrap_or(&said).to_owned();
        sleep(Duration::from_millis(200));
    }
    ensure!(said.contains(&store), "it says {said:?}, which doesn't name the store {store} that has the data");
    signal(second, Signal::CONT)?;
    wait_for("the volume to be active", SOON, || Ok((show(&site)?["attachment"]["phase"] == "serving").then_some(())))?;
    disk.check_blocks(0, BLOCKS, 2)?;
    wait_counting(&site, &[true; 2])?;
    drop(disk);
    site.detach(VOLUME)?;
    let bytes = identical(&site, VOLUME)?;
    Ok(format!("active only with the one that has it; before that: {said:?}; then {bytes} bytes the same on both"))
}

pub fn salvage(_: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "64M", "--replicas", "2"])?;
    let device = site.attach(VOLUME, &[])?;
    let disk = Disk::open(&device)?;
    disk.write_blocks(0, BLOCKS, 1)?;
    wait_counting(&site, &[true; 2])?;
    let replicas = show(&site)?["replicas"].clone();
    let store = |index: usize| replicas[index]["store"].as_str().context("a replica without store");
    let pids = [site.pid_of(store(0)?)?, site.pid_of(store(1)?)?];
    // The first falls behind; then the second, which has everything, is lost for good.
    signal(pids[0], Signal::STOP)?;
    disk.write_blocks(0, BLOCKS / 2, 2)?;
    wait_counting(&site, &[false, true])?;
    signal(pids[1], Signal::STOP)?;
    let salvage = ["volume", "salvage", VOLUME, "--from", store(0)?];
    site.refused(&salvage, 2, "INVALID_FIELD")?;
    let salvage = [&salvage[..], &["--give-up-the-rest"]].concat();
    site.refused(&salvage, 1, "REPLICA_FAILED")?;
    signal(pids[0], Signal::CONT)?;
    let said = wait_for("the salvage", SOON, || Ok(site.try_carrick(&salvage)?.ok()))?["salvages"][0].to_string();
    wait_for("the volume to be active", SOON, || Ok((show(&site)?["attachment"]["phase"] == "serving").then_some(())))?;
    // What the first has: a prefix of what was written, which it was told last.
    disk.check_blocks(BLOCKS / 2, BLOCKS / 2, 1)?;
    disk.write_blocks(0, BLOCKS, 3)?;
    // The one that was given up comes back with something else, and is not asked.
    signal(pids[1], Signal::CONT)?;
    site.wait_left(VOLUME)?;
    site.carrick(&["volume", "add-replica", VOLUME, "--with", store(1)?])?;
    wait_counting(&site, &[true; 2])?;
    disk.check_blocks(0, BLOCKS, 3)?;
    drop(disk);
    site.detach(VOLUME)?;
    let bytes = identical(&site, VOLUME)?;
    Ok(format!(
        "refused until said twice; then active with what the stale one has, and written down: {said}; {bytes} bytes the same on both"
    ))
}

pub fn daemon_away(_: &Plan) -> Found {
    let mut site = Site::with_stores(2)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "64M", "--replicas", "2"])?;
    let device = site.attach(VOLUME, &[])?;
    let replica = site.pids("replica")?.first().copied().context("no replica")?;
    wait_counting(&site, &[true; 2])?;
    site.kill_daemon()?;
    signal(replica, Signal::STOP)?;
    let mut fio = Fio::start(&device, &["--rw=write", "--bs=64k", "--iodepth=4", "--size=16M"])?;
    // Whether the loss may count is not for the target to say.
    sleep(WATCHED);
    ensure!(fio.is_running()?, "writes to one of two replicas were completed though nobody could write down that the other is lost");
    let begin = Instant::now();
    site.start_daemon()?;
    fio.finish()?;
    let waited = begin.elapsed();
    wait_counting(&site, &[false, true])?;
    signal(replica, Signal::CONT)?;
    wait_counting(&site, &[true; 2])?;
    site.detach(VOLUME)?;
    let bytes = identical(&site, VOLUME)?;
    Ok(format!(
        "writes waited for {} s without an error, and were done {} ms after carrickd was started; then {bytes} bytes the same on both",
        WATCHED.as_secs(),
        waited.as_millis()
    ))
}
