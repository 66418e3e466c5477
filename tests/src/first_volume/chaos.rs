//! Killing and stopping processes under load.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use carrick_backing_store::dice::Dice;
use rustix::process::Signal;

use super::Plan;
use crate::disk::Disk;
use crate::fio::Fio;
use crate::history::History;
use crate::mount::Mount;
use crate::replicas::{identical, identical_at_last};
use crate::report::Found;
use crate::site::{Site, path_text, run, signal};

const VOLUME: &str = "vm1";
/// Bound of the promise.
const STALL_MAX: Duration = Duration::from_secs(3);
/// How long a whole copy of the small volume may take on a slow machine.
pub const COPY_LIMIT: Duration = Duration::from_secs(180);

pub fn sectors_512(plan: &Plan) -> Found {
    chaos(plan, "512")
}

pub fn sectors_4096(plan: &Plan) -> Found {
    chaos(plan, "4096")
}

fn chaos(plan: &Plan, sector: &str) -> Found {
    let mut site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "96M", "--block-size", sector])?;
    let device = site.attach(VOLUME, &[])?;
    let kills = if plan.quick { 6 } else { 20 };
    let mut dice = Dice::new(plan.seed);
    // fio can't verify trims; the rest of the volume takes them, with every sector known.
    let history = History::start(&device, 64 << 20, 4 << 20, 8, sector.parse()?, plan.seed)?;
    let stop = site.path("stop-fio");
    let mut fio = verifying_load(&device, (sector, "1M"), plan.seed, &stop)?;
    let killed = kill_at_random(&mut site, &mut fio, &mut dice, kills).with_context(|| site.log_tail())?;
    // fio ends at its next look at the trigger file, after the verification of what is in its backlog.
    fs::write(&stop, "")?;
    let said = fio.finish().with_context(|| site.log_tail())?;
    let requests = history.finish().with_context(|| site.log_tail())?;
    site.wait_in_sync(VOLUME, COPY_LIMIT)?;
    verified_pass(&device, sector)?;
    let bytes = identical_at_last(&site, VOLUME)?;
    Ok(format!(
        "{killed}; fio {}, {requests} writes, reads, zeroes and trims beside it; {bytes} bytes the same on all three replicas",
        traffic(&said)
    ))
}

/// Requests of all sizes between two on the first 64 MiB of a device, everything read back and compared; ends soon after the file
/// `stop` is there.
pub fn verifying_load(device: &Path, (least, most): (&str, &str), seed: u64, stop: &Path) -> anyhow::Result<Fio> {
    let (range, align) = (format!("--bsrange={least}-{most}"), format!("--blockalign={least}"));
    let (seed, trigger) = (format!("--randseed={seed}"), format!("--trigger-file={}", path_text(stop)?));
    let options = [
        "--rw=randrw",
        "--rwmixread=30",
        &range,
        &align,
        "--iodepth=32",
        "--size=64M",
        "--loops=1000",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_backlog=256",
        "--serialize_overlap=1",
        "--fsync=64",
        &seed,
        &trigger,
    ];
    Fio::start(device, &options)
}

/// One whole pass of writing and reading back, without faults: what the faults left behind must not disturb it.
fn verified_pass(device: &Path, sector: &str) -> anyhow::Result<()> {
    let range = format!("--bsrange={sector}-1M");
    let fio = Fio::start(device, &["--rw=randwrite", &range, "--iodepth=32", "--size=96M", "--verify=crc32c", "--verify_fatal=1"])?;
    fio.finish().context("the pass after the faults").map(|_| ())
}

/// What fio moved, from its summary.
pub fn traffic(said: &str) -> String {
    let part = |name: &str| {
        let line = said.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default();
        line.split_once('(')
            .and_then(|(_, rest)| rest.rsplit_once('('))
            .map_or(String::new(), |(_, moved)| format!("{name} {}", moved.split(')').next().unwrap_or_default()))
    };
    [part("read:"), part("write:")].join(", ")
}

fn kill_at_random(site: &mut Site, fio: &mut Fio, dice: &mut Dice, kills: usize) -> anyhow::Result<String> {
    let (mut replicas, mut targets, mut daemons) = (0, 0, 0);
    for _ in 0..kills {
        sleep(Duration::from_millis(200 + dice.below(2300)));
        if !fio.is_running()? {
            // Its own words say most.
            break;
        }
        match dice.below(5) {
            0..=2 => {
                let pids = site.pids("replica")?;
                if let Some(pid) = pids.get(dice.index(pids.len())) {
                    signal(*pid, Signal::KILL)?;
                    replicas += 1;
                }
            }
            3 => {
                if let Some(pid) = site.pids("target")?.first() {
                    signal(*pid, Signal::KILL)?;
                    targets += 1;
                }
            }
            _ => {
                site.kill_daemon()?;
                daemons += 1;
                sleep(Duration::from_millis(dice.below(500)));
                site.start_daemon()?;
            }
        }
    }
    Ok(format!("{replicas} kills of replicas, {targets} of the target, {daemons} of carrickd"))
}

pub fn stopped_replica(_: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "96M"])?;
    let device = site.attach(VOLUME, &[])?;
    let disk = Disk::open(&device)?;
    disk.write_blocks(0, 64, 1)?;
    let load = ["--rw=randrw", "--bs=4k", "--iodepth=16", "--offset=16M", "--size=64M", "--time_based", "--runtime=600"];
    let mut fio = Fio::start(&device, &load)?;
    let stopped = site.pids("replica")?.first().copied().context("no replica")?;
    sleep(Duration::from_secs(1));
    signal(stopped, Signal::STOP)?;
    let mut longest = Duration::ZERO;
    let begin = Instant::now();
    let mut round = 0_u8;
    while begin.elapsed() < Duration::from_secs(6) {
        round = round.wrapping_add(1);
        longest = longest.max(disk.write_blocks(0, 64, round)?);
        longest = longest.max(disk.check_blocks(0, 64, round)?);
    }
    let running = fio.is_running()?;
    signal(stopped, Signal::CONT)?;
    site.wait_in_sync(VOLUME, COPY_LIMIT)?;
    drop(fio);
    drop(disk);
    ensure!(running, "the load ended while the replica was stopped");
    ensure!(longest <= STALL_MAX, "a request took {longest:?}");
    site.detach(VOLUME)?;
    let bytes = identical(&site, VOLUME)?;
    Ok(format!("longest request {} ms of 3000; caught up, {bytes} bytes the same on all replicas", longest.as_millis()))
}

pub fn file_system(_: &Plan) -> Found {
    let mut site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", VOLUME, "--size", "96M"])?;
    let device = site.attach(VOLUME, &["--host"])?;
    run("mkfs.ext4", &["-q", path_text(&device)?])?;
    let folder = site.path("mounted");
    fs::create_dir_all(&folder)?;
    let mounted = Mount::new(&device, folder.clone())?;
    let source = PathBuf::from("/usr/share/doc/util-linux");
    ensure!(source.is_dir(), "{} is not there to be copied", source.display());
    let mut copies = Vec::new();
    for round in 0..6 {
        let copy = folder.join(format!("copy{round}"));
        run("cp", &["-r", path_text(&source)?, path_text(&copy)?])?;
        match round {
            1 => signal(*site.pids("replica")?.first().context("no replica")?, Signal::KILL)?,
            2 | 4 => signal(*site.pids("target")?.first().context("no target")?, Signal::KILL)?,
            3 => {
                site.kill_daemon()?;
                site.start_daemon()?;
            }
            _ => {}
        }
        copies.push(copy);
    }
    run("sync", &["-f", path_text(&folder)?])?;
    drop(mounted);
    run("e2fsck", &["-fn", path_text(&device)?])?;
    let mounted = Mount::new(&device, folder)?;
    for copy in &copies {
        run("diff", &["-r", path_text(&source)?, path_text(copy)?])?;
    }
    drop(mounted);
    site.detach(VOLUME)?;
    Ok(format!("{} copies of a tree are the same after 1 kill of a replica, 2 of the target and 1 of carrickd; e2fsck clean", copies.len()))
}
