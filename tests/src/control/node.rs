//! A node with many volumes, and one whose processes all die at once.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;

use crate::disk::Disk;
use crate::first_volume::chaos::{COPY_LIMIT, verifying_load};
use crate::replicas::identical_at_last;
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, signal, wait_for};

const VOLUMES: usize = 50;
/// Bounds of the promise.
const ATTACHED_MAX: Duration = Duration::from_secs(60);
const ADOPTED_MAX: Duration = Duration::from_secs(5);
/// A request that takes longer was noticed by somebody.
const STALL_MAX: Duration = Duration::from_secs(1);

pub fn fifty_volumes(_: &Plan) -> Found {
    let mut site = Site::with_sized_stores(3, "1G")?;
    let begin = Instant::now();
    let mut devices: Vec<PathBuf> = Vec::new();
    for number in 0..VOLUMES {
        let name = format!("vm{number}");
        site.carrick(&["volume", "create", &name, "--size", "4M"])?;
        devices.push(site.attach(&name, &[])?);
    }
    let attached = begin.elapsed();
    let before = site.pids("target")?;
    ensure!(before.len() == VOLUMES, "{} targets run", before.len());
    let disks: Vec<Disk> = devices.iter().map(|device| Disk::open(device)).collect::<anyhow::Result<_>>()?;
    let (adopted, longest) = thread::scope(|scope| -> anyhow::Result<(Duration, Duration)> {
        let disks = &disks;
        let io = scope.spawn(move || -> anyhow::Result<Duration> {
            let (begin, mut longest, mut round) = (Instant::now(), Duration::ZERO, 0_u8);
            while begin.elapsed() < Duration::from_secs(8) {
                round = round.wrapping_add(1);
                for disk in disks {
                    longest = longest.max(disk.write_blocks(0, 2, round)?).max(disk.check_blocks(0, 2, round)?);
                }
            }
            Ok(longest)
        });
        thread::sleep(Duration::from_secs(1));
        site.kill_daemon()?;
        thread::sleep(Duration::from_secs(1));
        let begin = Instant::now();
        site.start_daemon()?;
        wait_for("all processes to be adopted", SOON, || {
            let status = site.carrick(&["status"])?;
            let processes = status["processes"].as_array().context("no processes")?;
            let running = processes.iter().filter(|process| process["state"] == "running").count();
            Ok((running == VOLUMES + 3).then_some(()))
        })?;
        let adopted = begin.elapsed();
        Ok((adopted, io.join().map_err(|_| anyhow::anyhow!("the I/O panicked"))??))
    })?;
    ensure!(site.pids("target")? == before, "targets were started anew");
    drop(disks);
    let found = format!(
        "{VOLUMES} created and attached in {:.1} s (bound {}); adopted {} ms after the next start (bound {}); the slowest request took {} ms",
        attached.as_secs_f64(),
        ATTACHED_MAX.as_secs(),
        adopted.as_millis(),
        ADOPTED_MAX.as_millis(),
        longest.as_millis()
    );
    ensure!(attached <= ATTACHED_MAX && adopted <= ADOPTED_MAX && longest <= STALL_MAX, "{found}");
    Ok(found)
}

pub fn all_killed(plan: &Plan) -> Found {
    const VOLUME: &str = "vm1";
    let mut site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "96M"])?;
    let device = site.attach(VOLUME, &[])?;
    let stop = site.path("stop-fio");
    let mut fio = verifying_load(&device, ("512", "1M"), plan.seed, &stop)?;
    let rounds = if plan.quick { 2 } else { 5 };
    let mut longest = Duration::ZERO;
    for _ in 0..rounds {
        thread::sleep(Duration::from_secs(2));
        let pids = [site.pids("replica")?, site.pids("target")?].concat();
        site.kill_daemon()?;
        pids.iter().try_for_each(|pid| signal(*pid, Signal::KILL))?;
        let begin = Instant::now();
        site.start_daemon()?;
        site.wait_in_sync(VOLUME, COPY_LIMIT)?;
        longest = longest.max(begin.elapsed());
        ensure!(fio.is_running()?, "fio ended: {}", site.log_tail());
    }
    fs::write(&stop, "")?;
    fio.finish().with_context(|| site.log_tail())?;
    let bytes = identical_at_last(&site, VOLUME)?;
    Ok(format!(
        "{rounds} times all processes at once; all in sync again {:.1} s after the start at most; no error in fio, {bytes} bytes the same on \
         all replicas",
        longest.as_secs_f64()
    ))
}
