//! Replicas that are lost for good: others take their place, again and again.

use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::resync::COPY_LIMIT;
use crate::disk::Disk;
use crate::history::History;
use crate::replicas::{identical, replicas_of};
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, signal, wait_for};

const VOLUME: &str = "vm1";
/// One more than the volume has replicas, so that one is spare.
const STORES: usize = 4;
const LAPS: u64 = 50;
const LAPS_QUICK: u64 = 4;
/// The volume's beginning is divided into so many parts; each lap overwrites the next. The rest changes all the time.
const PARTS: u64 = 8;
const PART_BLOCKS: u64 = 256;
const CHANGING: u64 = 16 << 20;
/// The longest that a write may stand still in a lap: a lost replica is missed after 1.5 s, and the target that learns of the new one
/// is started again.
const STALL_MAX: Duration = Duration::from_secs(5);

/// Loses a replica, and waits until another one, elsewhere, has taken its place, and the first is deleted.
fn lap(site: &Site, disk: &Disk, number: u64, by_hand: bool) -> anyhow::Result<Duration> {
    let before = replicas_of(site, VOLUME)?;
    let lost = &before[usize::try_from(number)? % before.len()];
    let (store, path) =
        (lost["store"].as_str().context("no store")?.to_owned(), lost["store_path"].as_str().context("no path")?.to_owned());
    let pid = site.pid_of(&store)?;
    signal(pid, Signal::STOP)?;
    let value = u8::try_from(1 + number % 250)?;
    let longest = disk.write_blocks(number % PARTS * PART_BLOCKS, PART_BLOCKS, value)?;
    let of = |replicas: &[Value]| replicas.iter().find(|replica| replica["store"] == store.as_str()).cloned();
    wait_for("the lost replica to count no longer", SOON, || {
        Ok(of(&replicas_of(site, VOLUME)?).is_none_or(|replica| replica["counts"] == false).then_some(()))
    })?;
    if by_hand {
        site.carrick(&["volume", "replace", VOLUME, &path])?;
    }
    wait_for("another replica to take its place", COPY_LIMIT, || {
        let now = replicas_of(site, VOLUME)?;
        let is_well = |replica: &Value| replica["counts"] == true && replica["state"] == "in-sync";
        Ok((of(&now).is_none() && now.len() == before.len() && now.iter().all(is_well)).then_some(()))
    })?;
    signal(pid, Signal::CONT)?;
    site.wait_left(VOLUME)?;
    Ok(longest)
}

/// Reads what each part has held since its last lap.
fn check(disk: &Disk, laps: u64) -> anyhow::Result<()> {
    for number in laps.saturating_sub(PARTS)..laps {
        disk.check_blocks(number % PARTS * PART_BLOCKS, PART_BLOCKS, u8::try_from(1 + number % 250)?)?;
    }
    Ok(())
}

pub fn again_and_again(plan: &Plan) -> Found {
    let laps = if plan.quick { LAPS_QUICK } else { LAPS };
    let mut site = Site::with_stores(STORES)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "64M"])?;
    let device = site.attach(VOLUME, &[])?;
    let disk = Disk::open(&device)?;
    let history = History::start(&device, PARTS * PART_BLOCKS * 4096, CHANGING, 1, 512, 7)?;
    let mut longest = Duration::ZERO;
    for number in 0..laps {
        if number == laps / 2 {
            // The second half without an operator.
            site.kill_daemon()?;
            site.start_daemon_with(&["--replace-after", "1"])?;
        }
        let stall = lap(&site, &disk, number, number < laps / 2).with_context(|| format!("lap {number}\n{}", site.log_tail()))?;
        longest = longest.max(stall);
        check(&disk, number + 1)?;
    }
    let requests = history.finish()?;
    drop(disk);
    site.detach(VOLUME)?;
    let bytes = identical(&site, VOLUME)?;
    ensure!(longest <= STALL_MAX, "a write took {longest:?} while a replica was lost");
    Ok(format!(
        "{laps} replicas replaced, half of them by carrickd itself, beside {requests} requests that were checked; the slowest write took {} \
         ms of {}; {bytes} bytes the same on all",
        longest.as_millis(),
        STALL_MAX.as_millis()
    ))
}
