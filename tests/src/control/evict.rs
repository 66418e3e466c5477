//! Stores that are emptied while the volumes with replicas there are used.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::first_volume::chaos::{COPY_LIMIT, verifying_load};
use crate::first_volume::idle::ublk_devices;
use crate::replicas::{identical, identical_at_last, replicas_of};
use crate::report::{Found, Plan};
use crate::site::{Site, signal, wait_for};

const VOLUME: &str = "vm1";
const STORES: usize = 4;
/// Copying takes some seconds at this rate, so that there is a middle.
const RATE: &str = "rebuild-rate=16M";
/// From a kill to an empty store: the copy from its beginning, and pauses of what was started anew.
const DONE_MAX: Duration = Duration::from_secs(30);

/// Who is killed while a store is emptied.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Nobody,
    /// By its own hand, when this step is done and not yet written down.
    Daemon(&'static str),
    /// In the middle of the copy.
    Target,
    /// The one that is copied to.
    NewReplica,
    /// The one that is to go.
    OldReplica,
}

fn store_of(replica: &Value) -> anyhow::Result<String> {
    Ok(replica["store"].as_str().context("no store")?.to_owned())
}

/// Waits until the store is empty; fails if fewer than three replicas ever count unless somebody was killed.
fn wait_empty(site: &Site, store: &str, always_three: bool) -> anyhow::Result<()> {
    wait_for("the store to be empty", DONE_MAX, || {
        let counting = replicas_of(site, VOLUME)?.iter().filter(|replica| replica["counts"] == true).count();
        ensure!(!always_three || counting >= 3, "only {counting} replicas count in the middle of a move");
        let found = site.carrick(&["store", "show", store])?;
        let is_empty = |name: &str| found[name].as_array().is_some_and(Vec::is_empty);
        Ok((is_empty("volumes") && is_empty("leaving_volumes")).then_some(()))
    })
}

/// Empties the store of the volume's first replica; how long that took since the kill, if there was one.
fn empty(site: &mut Site, victim: Victim) -> anyhow::Result<Duration> {
    let old = store_of(&replicas_of(site, VOLUME)?[0])?;
    let evict = ["store", "evict", old.as_str()];
    let mut begin = Instant::now();
    match victim {
        Victim::Nobody => drop(site.carrick(&evict)?),
        Victim::Daemon(step) => {
            site.kill_daemon()?;
            site.start_daemon_with(&["--crash-at", step])?;
            // It may die before it has answered.
            let _ = site.try_carrick(&evict)?;
            site.wait_daemon_dead()?;
            begin = Instant::now();
            site.start_daemon()?;
        }
        Victim::Target | Victim::NewReplica | Victim::OldReplica => {
            site.carrick(&evict)?;
            let new = wait_for("the copy", DONE_MAX, || {
                let copying = |replica: &&Value| replica["state"] == "copying";
                replicas_of(site, VOLUME)?.iter().find(copying).map(store_of).transpose()
            })?;
            let pid = match victim {
                Victim::Target => *site.pids("target")?.first().context("no target")?,
                Victim::NewReplica => site.pid_of(&new)?,
                _ => site.pid_of(&old)?,
            };
            signal(pid, Signal::KILL)?;
            begin = Instant::now();
        }
    }
    wait_empty(site, &old, matches!(victim, Victim::Nobody))?;
    let took = begin.elapsed();
    let left = replicas_of(site, VOLUME)?;
    ensure!(left.len() == 3 && left.iter().all(|replica| replica["store"] != old.as_str()), "{left:?}");
    // The next one needs it.
    site.carrick(&["store", "enable", &old])?;
    Ok(took)
}

pub fn emptied(plan: &Plan) -> Found {
    let mut site = Site::with_stores(STORES)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "64M"])?;
    site.carrick(&["volume", "set", VOLUME, RATE])?;
    let device = site.attach(VOLUME, &[])?;
    let stop = site.path("stop-fio");
    let mut fio = verifying_load(&device, ("512", "1M"), plan.seed, &stop)?;
    // So that there is something to be copied.
    thread::sleep(Duration::from_secs(2));
    let victims = [Victim::Nobody, Victim::Daemon("make"), Victim::Daemon("drop"), Victim::Target, Victim::NewReplica, Victim::OldReplica];
    let mut longest = Duration::ZERO;
    for victim in victims {
        longest = longest.max(empty(&mut site, victim).with_context(|| format!("{victim:?}\n{}", site.log_tail()))?);
        ensure!(fio.is_running()?, "fio ended: {victim:?}");
        site.wait_in_sync(VOLUME, COPY_LIMIT)?;
    }
    fs::write(&stop, "")?;
    fio.finish().with_context(|| site.log_tail())?;
    identical_at_last(&site, VOLUME)?;
    // Detached, its replicas move all the same.
    let mut longest_unused = Duration::ZERO;
    for victim in [Victim::Nobody, Victim::Target] {
        longest_unused =
            longest_unused.max(empty(&mut site, victim).with_context(|| format!("detached, {victim:?}\n{}", site.log_tail()))?);
    }
    let emptied = store_of(&replicas_of(&site, VOLUME)?[0])?;
    site.carrick(&["store", "evict", &emptied, "--wait"])?;
    site.carrick(&["store", "remove", &emptied])?;
    wait_for("its last target to end", DONE_MAX, || Ok(site.pids("target")?.is_empty().then_some(())))?;
    ensure!(ublk_devices()? == 0, "a device was made for a volume that nobody uses");
    let bytes = identical(&site, VOLUME)?;
    Ok(format!(
        "6 times, with 2 deaths of carrickd, 1 of the target, 1 of the replica that is copied to and 1 of that which goes: empty after {:.1} s \
         at most (bound {}), 3 replicas counted throughout where nobody was killed; no error in fio; then 3 times detached, without a device: \
         {:.1} s at most; {bytes} bytes the same on all replicas",
        longest.as_secs_f64(),
        DONE_MAX.as_secs(),
        longest_unused.as_secs_f64()
    ))
}
