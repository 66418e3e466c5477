//! Volumes that grow while they are used.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::disk::Disk;
use crate::first_volume::chaos::{COPY_LIMIT, verifying_load};
use crate::mount::Mount;
use crate::replicas::identical_at_last;
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, path_text, run, signal, wait_for};

const VOLUME: &str = "vm1";
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Bound of the promise: from a kill to the end of the operation.
const DONE_MAX: Duration = Duration::from_secs(10);
const CLIENTS: u64 = 20;
const REQUESTS: u64 = 5;

/// A volume of so many MiB on three stores, attached.
struct Grown {
    site: Site,
    device: PathBuf,
    /// Whether this kernel lets a device grow while it is used.
    online: bool,
}

impl Grown {
    fn new(mib: u64, options: &[&str]) -> anyhow::Result<Self> {
        let site = Site::with_stores(3)?;
        site.carrick(&["volume", "create", VOLUME, "--size", &format!("{mib}M")])?;
        let device = site.attach(VOLUME, options)?;
        let answer = site.carrick(&["volume", "expand", VOLUME, &format!("{}M", mib + 1), "--dry-run"])?;
        let online = answer["device"] == "online";
        ensure!(online || answer["device"] == "next-attachment", "{answer}");
        Ok(Self { site, device, online })
    }

    fn expand(&self, mib: u64) -> anyhow::Result<()> {
        self.site.carrick(&["volume", "expand", VOLUME, &format!("{mib}M"), "--wait"]).map(drop)
    }

    fn shown(&self) -> anyhow::Result<Value> {
        self.site.carrick(&["volume", "show", VOLUME])
    }

    /// The size that everybody says: the record, and, where that can be, the device.
    fn is_large(&self, mib: u64) -> anyhow::Result<bool> {
        let shown = self.shown()?;
        let device = !self.online || size_of(&self.device)? == mib * MIB && shown["attachment"]["device_size_bytes"] == mib * MIB;
        Ok(shown["size_bytes"] == mib * MIB && device)
    }

    /// Where the kernel can't change a device, it has the new size from now on.
    fn attach_again(&mut self, options: &[&str]) -> anyhow::Result<()> {
        self.site.detach(VOLUME)?;
        self.device = self.site.attach(VOLUME, options)?;
        Ok(())
    }

    fn operations(&self) -> anyhow::Result<Vec<Value>> {
        let mut operations = self.site.carrick(&["operation", "list"])?.as_array().cloned().context("no list of operations")?;
        operations.retain(|operation| operation["kind"] == "expand");
        Ok(operations)
    }

    /// Ends with all replicas the same.
    fn finish(self) -> anyhow::Result<u64> {
        identical_at_last(&self.site, VOLUME)
    }

    fn how(&self) -> &'static str {
        if path_text(&self.device).is_ok_and(|path| path.starts_with("/dev/dm-")) {
            "the mapped device follows at once"
        } else if self.online {
            "the device follows at once"
        } else {
            "this kernel's device follows at the next attachment"
        }
    }
}

/// What the kernel says of a block device, in bytes.
fn size_of(device: &Path) -> anyhow::Result<u64> {
    let name = device.file_name().context("a device without name")?;
    let sectors: u64 = fs::read_to_string(Path::new("/sys/block").join(name).join("size"))?.trim().parse()?;
    Ok(sectors * 512)
}

pub fn in_a_row(_: &Plan) -> Found {
    let mut grown = Grown::new(16, &[])?;
    let disk = Disk::open(&grown.device)?;
    disk.write_blocks(0, 64, 1)?;
    let mut longest = Duration::ZERO;
    for round in 0..=10 {
        let mib = 32 + 8 * round;
        let begin = Instant::now();
        grown.expand(mib)?;
        longest = longest.max(begin.elapsed());
        ensure!(grown.is_large(mib)?, "after an expansion to {mib} MiB: {}", grown.shown()?);
        if grown.online {
            disk.write_blocks(mib * MIB / BLOCK - 16, 16, 2)?;
        }
    }
    drop(disk);
    let how = grown.how();
    grown.attach_again(&[])?;
    let disk = Disk::open(&grown.device)?;
    ensure!(size_of(&grown.device)? == 112 * MIB, "attached again with {} bytes", size_of(&grown.device)?);
    disk.check_blocks(0, 64, 1)?;
    disk.write_blocks(112 * MIB / BLOCK - 16, 16, 3)?;
    disk.check_blocks(112 * MIB / BLOCK - 16, 16, 3)?;
    drop(disk);
    let bytes = grown.finish()?;
    Ok(format!("11 expansions, the slowest took {} ms; {how}; {bytes} bytes the same on all replicas", longest.as_millis()))
}

/// The size in MiB of a client's request.
fn asked_for(client: u64, request: u64) -> u64 {
    20 + (client * 37 + request * 53) % 90
}

pub fn at_once(_: &Plan) -> Found {
    let grown = Grown::new(16, &[])?;
    let begin = Instant::now();
    let refused: Vec<anyhow::Result<u64>> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let grown = &grown;
                scope.spawn(move || {
                    let mut refused = 0;
                    for request in 0..REQUESTS {
                        let mib = asked_for(client, request);
                        match grown.site.try_carrick(&["volume", "expand", VOLUME, &format!("{mib}M"), "--wait"])? {
                            Ok(_) => {}
                            Err(refusal) => {
                                ensure!(refusal.reason == "VOLUME_LARGER", "{refusal:?}");
                                refused += 1;
                            }
                        }
                    }
                    Ok(refused)
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked")))).collect()
    });
    let refused: u64 = refused.into_iter().sum::<anyhow::Result<u64>>()?;
    let largest = (0..CLIENTS).flat_map(|client| (0..REQUESTS).map(move |request| asked_for(client, request))).max();
    let largest = largest.context("no request")?;
    let operations = grown.operations()?;
    let stuck = operations.iter().filter(|operation| operation["state"] != "succeeded").count();
    ensure!(stuck == 0, "{stuck} operations have not succeeded: {operations:?}");
    ensure!(grown.is_large(largest)?, "the largest was {largest} MiB: {}", grown.shown()?);
    let (took, how) = (begin.elapsed(), grown.how());
    grown.finish()?;
    Ok(format!(
        "{} requests of {CLIENTS} clients in {:.1} s: {} operations, all done, {refused} refused because the volume was larger already; \
         {largest} MiB in the end; {how}",
        CLIENTS * REQUESTS,
        took.as_secs_f64(),
        operations.len()
    ))
}

pub fn under_load(plan: &Plan) -> Found {
    let grown = Grown::new(64, &[])?;
    let stop = grown.site.path("stop-fio");
    let mut fio = verifying_load(&grown.device, ("512", "1M"), plan.seed, &stop)?;
    for round in 1..=5 {
        thread::sleep(Duration::from_secs(1));
        grown.expand(64 + 8 * round)?;
        ensure!(fio.is_running()?, "fio ended in round {round}");
    }
    ensure!(grown.is_large(104)?, "{}", grown.shown()?);
    fs::write(&stop, "")?;
    fio.finish().with_context(|| grown.site.log_tail())?;
    if grown.online {
        let disk = Disk::open(&grown.device)?;
        disk.write_blocks(103 * MIB / BLOCK, 256, 7)?;
        disk.check_blocks(103 * MIB / BLOCK, 256, 7)?;
    }
    let how = grown.how();
    let bytes = grown.finish()?;
    Ok(format!("5 expansions under fio verify, no error; {how}; {bytes} bytes the same on all replicas"))
}

pub fn file_system(_: &Plan) -> Found {
    file_system_on(&["--host"])
}

pub fn mapped(plan: &Plan) -> Found {
    let file_system = file_system_on(&["--host", "--map", "always"])?;
    Ok(format!("{file_system}; {}", killed_on(&["--map", "always"], plan)?))
}

fn file_system_on(options: &[&str]) -> Found {
    let mut grown = Grown::new(64, options)?;
    run("mkfs.ext4", &["-q", path_text(&grown.device)?])?;
    let folder = grown.site.path("mounted");
    fs::create_dir_all(&folder)?;
    let mut mounted = Mount::new(&grown.device, folder.clone())?;
    fs::write(folder.join("before"), vec![7; 20 << 20])?;
    grown.expand(128)?;
    if !grown.online {
        drop(mounted);
        grown.attach_again(options)?;
        mounted = Mount::new(&grown.device, folder.clone())?;
    }
    run("resize2fs", &[path_text(&grown.device)?])?;
    // More than the file system had room for.
    fs::write(folder.join("after"), vec![9; 70 << 20])?;
    run("sync", &["-f", path_text(&folder)?])?;
    drop(mounted);
    run("e2fsck", &["-fn", path_text(&grown.device)?])?;
    let mounted = Mount::new(&grown.device, folder.clone())?;
    for (name, value, bytes) in [("before", 7, 20 << 20), ("after", 9, 70 << 20)] {
        let found = fs::read(folder.join(name))?;
        ensure!(found.len() == bytes && found.iter().all(|byte| *byte == value), "the file {name} is not what was written");
    }
    drop(mounted);
    let how = grown.how();
    grown.finish()?;
    Ok(format!("64 to 128 MiB; {how}; 90 MiB in it are right, e2fsck clean"))
}

/// Who is killed while an expansion is under way.
#[derive(Clone, Copy, Debug)]
enum Victim {
    /// By its own hand, when this step is done and not yet written down.
    Daemon(&'static str),
    Target,
    Replica(usize),
}

pub fn killed(plan: &Plan) -> Found {
    killed_on(&[], plan)
}

fn killed_on(options: &[&str], plan: &Plan) -> Found {
    let mut grown = Grown::new(64, options)?;
    let stop = grown.site.path("stop-fio");
    let mut fio = verifying_load(&grown.device, ("512", "1M"), plan.seed, &stop)?;
    let victims = [
        Victim::Daemon("replicas"),
        Victim::Daemon("record"),
        Victim::Daemon("device"),
        Victim::Target,
        Victim::Replica(0),
        Victim::Replica(1),
        Victim::Replica(2),
    ];
    let mut longest = (Duration::ZERO, Victim::Target);
    for (victim, mib) in victims.into_iter().zip((68..).step_by(4)) {
        let took = expand_and_kill(&mut grown, victim, mib).with_context(|| format!("{victim:?}"))?;
        longest = if took > longest.0 { (took, victim) } else { longest };
        ensure!(fio.is_running()?, "fio ended: {victim:?}");
        grown.site.wait_in_sync(VOLUME, COPY_LIMIT)?;
    }
    fs::write(&stop, "")?;
    fio.finish().with_context(|| grown.site.log_tail())?;
    let how = grown.how();
    let bytes = grown.finish()?;
    let (longest, last) = longest;
    ensure!(longest <= DONE_MAX, "an expansion was done after {longest:?}: {last:?}; {how}");
    Ok(format!(
        "3 deaths of carrickd, 1 of the target, 3 of replicas, each in an expansion: done after {} ms at most ({last:?}; bound {}); {how}; no error \
         in fio, {bytes} bytes the same on all replicas",
        longest.as_millis(),
        DONE_MAX.as_millis()
    ))
}

/// How long after the kill the volume had its new size.
fn expand_and_kill(grown: &mut Grown, victim: Victim, mib: u64) -> anyhow::Result<Duration> {
    let size = format!("{mib}M");
    let request = ["volume", "expand", VOLUME, &size];
    let begin = match victim {
        Victim::Daemon(step) => {
            grown.site.kill_daemon()?;
            grown.site.start_daemon_with(&["--crash-at", step])?;
            grown.site.wait_in_sync(VOLUME, COPY_LIMIT)?;
            // It may die before it has answered.
            let _ = grown.site.try_carrick(&request)?;
            grown.site.wait_daemon_dead()?;
            let begin = Instant::now();
            grown.site.start_daemon()?;
            begin
        }
        Victim::Target | Victim::Replica(_) => {
            let pids = grown.site.pids(if matches!(victim, Victim::Target) { "target" } else { "replica" })?;
            let index = if let Victim::Replica(index) = victim { index } else { 0 };
            let pid = *pids.get(index).context("nobody to kill")?;
            let killer = thread::spawn(move || signal(pid, Signal::KILL));
            let begin = Instant::now();
            let _ = grown.site.try_carrick(&request)?;
            killer.join().map_err(|_| anyhow::anyhow!("the killer panicked"))??;
            begin
        }
    };
    // A request that came while too few answered was refused, and changed nothing: then it is made again, as an operator would.
    wait_for("the expansion to be done", SOON, || {
        if grown.is_large(mib)? && grown.operations()?.iter().all(|operation| operation["state"] != "running") {
            return Ok(Some(()));
        }
        let is_running = grown.operations()?.iter().any(|operation| operation["state"] == "running");
        if !is_running {
            let _ = grown.site.try_carrick(&request)?;
        }
        Ok(None)
    })?;
    Ok(begin.elapsed())
}

pub fn replica_away(_: &Plan) -> Found {
    let grown = Grown::new(32, &[])?;
    let disk = Disk::open(&grown.device)?;
    disk.write_blocks(0, 256, 1)?;
    let away = *grown.site.pids("replica")?.first().context("no replica")?;
    signal(away, Signal::STOP)?;
    let begin = Instant::now();
    let answer = grown.site.carrick(&["volume", "expand", VOLUME, "64M", "--wait"])?;
    let took = begin.elapsed();
    ensure!(answer["away_stores"].as_array().is_some_and(|stores| stores.len() == 1), "{answer}");
    ensure!(grown.is_large(64)?, "{}", grown.shown()?);
    let first = if grown.online { 64 * MIB / BLOCK - 256 } else { 256 };
    disk.write_blocks(first, 256, 2)?;
    signal(away, Signal::CONT)?;
    let begin = Instant::now();
    grown.site.wait_in_sync(VOLUME, COPY_LIMIT)?;
    let back = begin.elapsed();
    disk.check_blocks(first, 256, 2)?;
    drop(disk);
    let how = grown.how();
    let bytes = grown.finish()?;
    Ok(format!(
        "grew in {:.1} s with one of three replicas away; {how}; that one was in sync again {:.1} s after it was back, {bytes} bytes the same",
        took.as_secs_f64(),
        back.as_secs_f64()
    ))
}

pub fn no_room(_: &Plan) -> Found {
    let grown = Grown::new(32, &[])?;
    let disk = Disk::open(&grown.device)?;
    grown.site.carrick(&["volume", "create", "other", "--size", "300M", "--replicas", "1"])?;
    let message = grown.site.refused(&["volume", "expand", VOLUME, "400M"], 6, "NO_SPACE")?;
    ensure!(grown.is_large(32)? && grown.operations()?.is_empty(), "{}", grown.shown()?);
    disk.write_blocks(0, 256, 1)?;
    disk.check_blocks(0, 256, 1)?;
    grown.site.carrick(&["volume", "delete", "other"])?;
    wait_for("the room to be there", SOON, || {
        Ok(grown.site.try_carrick(&["volume", "expand", VOLUME, "400M", "--wait"])?.ok().map(|_| ()))
    })?;
    ensure!(grown.is_large(400)?, "{}", grown.shown()?);
    drop(disk);
    grown.finish()?;
    Ok(format!("refused ({message}), used on, and done when there was room"))
}
