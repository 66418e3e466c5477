//! A store's process: killed again and again, and left alone.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use carrick_backing_store::dice::Dice;
use rustix::process::Signal;

use super::devices::Loop;
use super::program::{check, replica};
use crate::disk::Disk;
use crate::first_volume::chaos::{traffic, verifying_load};
use crate::first_volume::idle::wakeups_of;
use crate::report::{Found, Plan};
use crate::site::{Site, path_text, signal};

const STORE: u64 = 256 << 20;
/// How long nothing may happen, and how soon that must be: the first scrub begins a minute after the start.
const QUIET: Duration = Duration::from_secs(5);
const QUIET_WITHIN: Duration = Duration::from_secs(40);
/// A ring that has ever synced keeps a worker thread, which looks every 5 s whether it may end (`WORKER_IDLE_TIMEOUT` in the kernel's
/// io_uring/io-wq.c) and, as the last of its kind, stays. There may be one each for files and devices.
const WORKER_WAKEUPS_MAX: u64 = 2;

/// With one replica: no other could make good what this one loses.
pub fn kills(plan: &Plan) -> Found {
    let mut site = Site::with_stores(1)?;
    site.carrick(&["volume", "create", "vm1", "--size", "64M", "--replicas", "1"])?;
    let device = site.attach("vm1", &[])?;
    let stop = site.path("stop-fio");
    let mut fio = verifying_load(&device, ("4096", "1M"), plan.seed, &stop)?;
    let mut dice = Dice::new(plan.seed);
    let wanted = if plan.quick { 10 } else { 40 };
    let mut killed = 0;
    while killed < wanted && fio.is_running()? {
        sleep(Duration::from_millis(100 + dice.below(1400)));
        if let Some(pid) = site.pids("replica")?.first() {
            signal(*pid, Signal::KILL)?;
            killed += 1;
        }
    }
    fs::write(&stop, "")?;
    let said = fio.finish().with_context(|| site.log_tail())?;
    ensure!(killed == wanted, "fio ended after {killed} kills of {wanted}");
    site.detach("vm1")?;
    // The last process gets no chance to tidy up.
    let last = site.pids("replica")?.first().copied().context("no replica at the end")?;
    site.kill_daemon()?;
    signal(last, Signal::KILL)?;
    let report = check(&site.path("store0"))?;
    Ok(format!("{killed} kills under fio verify, {}; check --data: 0 faults, {} blocks verified", traffic(&said), report["verified"]))
}

pub fn idle(_: &Plan) -> Found {
    let folder = tempfile::Builder::new().prefix("carrick-idle-").tempdir()?;
    let disk = Loop::new(&folder.path().join("disk"), STORE)?;
    replica(&["format", path_text(disk.path())?])?;
    // Dropped first.
    let mut site = Site::start()?;
    site.carrick(&["store", "add", path_text(disk.path())?])?;
    site.carrick(&["volume", "create", "vm1", "--size", "32M", "--replicas", "1"])?;
    let device = site.attach("vm1", &[])?;
    for round in 1..4 {
        Disk::open(&device)?.write_blocks(0, 2048, round)?;
    }
    site.detach("vm1")?;
    let pid = site.pids("replica")?.first().copied().context("no replica")?;
    // Nobody asks it how it is.
    site.kill_daemon()?;
    let begin = Instant::now();
    loop {
        let settled = begin.elapsed();
        let before = (wakeups_of(pid, |name| !is_worker(name))?, wakeups_of(pid, is_worker)?, disk.requests()?);
        sleep(QUIET);
        let own = wakeups_of(pid, |name| !is_worker(name))? - before.0;
        // A worker that ended takes its count along.
        let workers = wakeups_of(pid, is_worker)?.saturating_sub(before.1);
        let requests = disk.requests()? - before.2;
        if own == 0 && workers <= WORKER_WAKEUPS_MAX && requests == 0 {
            return Ok(format!(
                "0 wakeups, {workers} of the kernel's workers (bound {WORKER_WAKEUPS_MAX}) and 0 requests to the disk in 5 s, {:.0} s after the load",
                settled.as_secs_f32()
            ));
        }
        ensure!(
            begin.elapsed() < QUIET_WITHIN,
            "long after the load, in 5 s: {own} wakeups of its own threads, {workers} of the kernel's io_uring workers, {requests} requests to the disk"
        );
    }
}

/// Whether a thread of this name is one that the kernel keeps for io_uring.
fn is_worker(name: &str) -> bool {
    name.starts_with("iou-")
}
