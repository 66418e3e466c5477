//! Disks that fail one replica, while the volume is under load.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use carrick_backing_store::dice::Dice;
use rustix::process::Signal;

use super::flakey::Flakey;
use super::nodes::{Nodes, STORE_BYTES, VOLUME_SIZE};
use super::partition::{COPY_LIMIT, Loaded, STALL_MAX};
use crate::fio::Fio;
use crate::report::{Found, Plan};
use crate::site::{SOON, signal, wait_for};
use crate::small_disk::SmallDisk;
use crate::store::devices::Loop;
use crate::store::program::check;

/// A file system somewhat larger than a store.
const SMALL: &str = "640m";
/// A volume that needs more than what a store has taken from its file system before anything is written.
const LARGER: &str = "192M";
/// A replica that finds no room is left behind within this.
const MISSED_MAX: Duration = Duration::from_secs(30);

pub fn power_cuts(plan: &Plan) -> Found {
    let folder = tempfile::Builder::new().prefix("carrick-flakey-").tempdir()?;
    let data = Loop::new(&folder.path().join("disk"), STORE_BYTES)?;
    let disk = Flakey::new(data.path(), STORE_BYTES)?;
    // Dropped first.
    let mut loaded = Loaded::on(plan, Nodes::with_first_store(Some(disk.path()), VOLUME_SIZE)?)?;
    let mut dice = Dice::new(plan.seed);
    let cuts = if plan.quick { 2 } else { 5 };
    let mut dropped = 0;
    loaded.probe.longest();
    for _ in 0..cuts {
        sleep(Duration::from_millis(500 + dice.below(1500)));
        let time = Duration::from_millis(100 + dice.below(1900));
        dropped += power_cut(&mut loaded.nodes, &disk, time)?;
        loaded.nodes.wait_in_sync(COPY_LIMIT)?;
    }
    loaded.wait_round()?;
    let (longest, copied) = (loaded.probe.longest(), loaded.nodes.counted("copied_bytes")?);
    ensure!(longest <= STALL_MAX, "a request took {longest:?}");
    ensure!(dropped > 0 && copied > 0, "{dropped} writes were dropped, {copied} bytes were copied: nothing was lost");
    let (said, nodes) = loaded.compare()?;
    nodes.site.carrick(&["shutdown"])?;
    let report = check(disk.path())?;
    Ok(format!(
        "{cuts} cuts, {dropped} writes to the disk dropped: longest request {} ms of {}, {} MiB copied; {said}, check --data: 0 faults, {} blocks verified",
        longest.as_millis(),
        STALL_MAX.as_millis(),
        copied >> 20,
        report["verified"]
    ))
}

/// Loses what the replica on node 0 writes for a while, and then its process. A new one finds the disk as it was before. How many
/// writes that were.
fn power_cut(nodes: &mut Nodes, disk: &Flakey, time: Duration) -> anyhow::Result<u64> {
    let pid = nodes.replica_pid(0)?;
    let before = disk.writes()?;
    disk.drop_writes()?;
    sleep(time);
    // Nobody starts a new process on a disk that still drops writes.
    nodes.site.kill_daemon()?;
    signal(pid, Signal::KILL)?;
    wait_for("the killed replica to be gone", SOON, || Ok((!is_alive(pid)).then_some(())))?;
    let dropped = disk.writes()? - before;
    disk.restore()?;
    nodes.site.start_daemon()?;
    Ok(dropped)
}

/// Whether a process is there, and not just its exit code.
fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

pub fn full(plan: &Plan) -> Found {
    let folder = tempfile::Builder::new().prefix("carrick-full-").tempdir()?;
    let _small = SmallDisk::mount(folder.path(), SMALL)?;
    let store = folder.path().join("store");
    // Dropped first.
    let nodes = Nodes::with_first_store(Some(&store), LARGER)?;
    let other = folder.path().join("other");
    fill(&other)?;
    let mut fio = Fio::start(&nodes.device, &["--rw=write", "--bs=256k", "--iodepth=8", "--size=160M", "--verify=crc32c"])?;
    let missed = nodes.wait_missed(0, MISSED_MAX);
    let running = fio.is_running()?;
    fio.finish().context("writing with a full disk under one replica").with_context(|| nodes.site.log_tail())?;
    let missed = missed.with_context(|| format!("fio was {}", if running { "running" } else { "done" }))?;
    let problem = nodes.replica(0)?["last_error"].clone();
    let loaded = Loaded::on(plan, nodes)?;
    loaded.probe.longest();
    sleep(Duration::from_secs(if plan.quick { 3 } else { 10 }));
    loaded.wait_round()?;
    let longest = loaded.probe.longest();
    ensure!(longest <= STALL_MAX, "a request took {longest:?}");
    let state = loaded.nodes.replica(0)?["state"].clone();
    ensure!(state != "in-sync", "the replica without room is {state}");
    fs::remove_file(&other)?;
    let in_sync = loaded.nodes.wait_in_sync(COPY_LIMIT)?;
    let (said, _nodes) = loaded.compare()?;
    Ok(format!(
        "missed after {:.1} s ({problem}); longest request {} ms of {}; with room again in sync after {:.1} s; {said}",
        missed.as_secs_f32(),
        longest.as_millis(),
        STALL_MAX.as_millis(),
        in_sync.as_secs_f32()
    ))
}

/// Takes all the room there is.
fn fill(path: &Path) -> anyhow::Result<()> {
    let filled = File::create(path).and_then(|mut file| io::copy(&mut io::repeat(1), &mut file));
    ensure!(filled.is_err_and(|error| error.kind() == io::ErrorKind::StorageFull), "the small disk never got full");
    Ok(())
}
