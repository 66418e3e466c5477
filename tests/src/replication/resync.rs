//! Replicas that were away, and what it takes to bring them back.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;

use crate::fio::Fio;
use crate::replicas::identical;
use crate::report::{Found, Plan};
use crate::site::{Site, signal, wait_for};

const VOLUME: &str = "vm1";
const MIB: u64 = 1 << 20;
/// A store's journal, maps and reserves, and what overwrites need before the old blocks are free again.
const STORE_EXTRA_MIB: u64 = 768;
/// Within this the replicas of a volume at rest know that they have everything: two raises of the epoch, a second each.
const SETTLED: Duration = Duration::from_secs(4);
/// A replica that is away for longer is left behind.
const AWAY: Duration = Duration::from_secs(10);
/// How long a whole copy may take on a slow machine.
pub const COPY_LIMIT: Duration = Duration::from_secs(300);

/// A volume on three replicas, written to the end.
struct Filled {
    site: Site,
    device: PathBuf,
    mib: u64,
}

impl Filled {
    fn new(plan: &Plan) -> anyhow::Result<Self> {
        let mib = if plan.quick { 256 } else { 1024 };
        let site = Site::with_sized_stores(3, &format!("{}M", mib + STORE_EXTRA_MIB))?;
        site.carrick(&["volume", "create", VOLUME, "--size", &format!("{mib}M")])?;
        let device = site.attach(VOLUME, &[])?;
        let filled = Self { site, device, mib };
        filled.write(&["--rw=write", "--bs=1M", "--iodepth=4"])?;
        sleep(SETTLED);
        Ok(filled)
    }

    fn write(&self, load: &[&str]) -> anyhow::Result<()> {
        let fio = Fio::start(&self.device, &[load, &["--size=100%", "--randrepeat=0"]].concat())?;
        fio.finish().map(drop).with_context(|| self.site.log_tail())
    }

    fn replica(&self) -> anyhow::Result<i32> {
        self.site.pids("replica")?.first().copied().context("no replica")
    }

    /// Bytes sent to replicas that lacked them.
    fn copied(&self) -> anyhow::Result<u64> {
        let shown = self.site.carrick(&["volume", "show", VOLUME])?;
        shown["attachment"]["copied_bytes"].as_u64().context("an attachment that doesn't say what it copied")
    }

    fn wait_in_sync(&self) -> anyhow::Result<()> {
        self.site.wait_in_sync(VOLUME, COPY_LIMIT).with_context(|| self.site.log_tail())
    }

    fn wait_behind(&self) -> anyhow::Result<()> {
        wait_for("the replica to be missed", COPY_LIMIT, || {
            let shown = self.site.carrick(&["volume", "show", VOLUME])?;
            Ok((shown["replicas"][0]["state"] != "in-sync").then_some(()))
        })
    }

    /// Waits until the first replica is being copied, but is not done.
    fn wait_copying(&self) -> anyhow::Result<u64> {
        wait_for("a copy to be under way", COPY_LIMIT, || {
            let shown = self.site.carrick(&["volume", "show", VOLUME])?;
            let replica = &shown["replicas"][0];
            ensure!(replica["state"] != "in-sync", "the copy was over before it could be interrupted");
            Ok(replica["copied_bytes"].as_u64().filter(|copied| *copied > self.mib * MIB / 10))
        })
    }

    /// Detaches, and compares the replicas.
    fn end(self) -> anyhow::Result<u64> {
        self.site.detach(VOLUME)?;
        identical(&self.site, VOLUME)
    }
}

pub fn overwritten_while_away(plan: &Plan) -> Found {
    let filled = Filled::new(plan)?;
    let part = filled.mib / 10;
    let before = filled.copied()?;
    let away = filled.replica()?;
    signal(away, Signal::STOP)?;
    filled.write(&["--rw=randwrite", "--bs=64k", "--iodepth=8", &format!("--io_size={part}M")])?;
    // What it misses while it is away for a moment, it gets without a copy.
    sleep(AWAY);
    filled.wait_behind()?;
    signal(away, Signal::CONT)?;
    let begin = Instant::now();
    filled.wait_in_sync()?;
    let (seconds, copied) = (begin.elapsed().as_secs_f32(), filled.copied()? - before);
    let (mib, bound) = (filled.mib, part * MIB * 11 / 10);
    ensure!(copied > 0, "nothing was copied: the replica was never behind");
    ensure!(copied <= bound, "{copied} bytes were copied, the bound is {bound}");
    let bytes = filled.end()?;
    Ok(format!(
        "{part} of {mib} MiB overwritten, {:.1} MiB copied (bound {:.1}) in {seconds:.1} s; {bytes} bytes the same on all replicas",
        copied as f64 / MIB as f64,
        bound as f64 / MIB as f64
    ))
}

pub fn nothing_written_while_away(plan: &Plan) -> Found {
    let filled = Filled::new(plan)?;
    let before = filled.copied()?;
    let away = filled.replica()?;
    signal(away, Signal::STOP)?;
    sleep(AWAY);
    filled.wait_behind()?;
    signal(away, Signal::CONT)?;
    let begin = Instant::now();
    filled.wait_in_sync()?;
    let (seconds, copied) = (begin.elapsed().as_secs_f32(), filled.copied()? - before);
    ensure!(copied == 0, "{copied} bytes were copied");
    let bytes = filled.end()?;
    Ok(format!("0 bytes copied, in sync after {seconds:.1} s; {bytes} bytes the same on all replicas"))
}

pub fn capped(plan: &Plan) -> Found {
    let filled = Filled::new(plan)?;
    let mut rates = Vec::new();
    for setting in ["rebuild-rate=20M", "rebuild-rate=none"] {
        filled.site.carrick(&["volume", "set", VOLUME, setting])?;
        let away = filled.replica()?;
        signal(away, Signal::STOP)?;
        filled.write(&["--rw=write", "--bs=1M", "--iodepth=4"])?;
        filled.wait_behind()?;
        signal(away, Signal::CONT)?;
        filled.wait_copying()?;
        let (before, begin) = (filled.copied()?, Instant::now());
        filled.wait_in_sync()?;
        rates.push((filled.copied()? - before) as f64 / MIB as f64 / begin.elapsed().as_secs_f64());
    }
    let [slow, fast] = rates[..] else { anyhow::bail!("{} rates", rates.len()) };
    // What was saved up before, and a chunk over.
    ensure!(slow <= 20.0 * 1.2, "{slow:.1} MiB/s with a cap of 20");
    ensure!(fast > slow, "{fast:.1} MiB/s without a cap, {slow:.1} with one");
    let bytes = filled.end()?;
    Ok(format!("{slow:.1} MiB/s (bound 24) with the cap, {fast:.1} without; {bytes} bytes the same on all replicas"))
}

pub fn interrupted_twice(plan: &Plan) -> Found {
    let filled = Filled::new(plan)?;
    let away = filled.replica()?;
    signal(away, Signal::STOP)?;
    filled.write(&["--rw=write", "--bs=1M", "--iodepth=4"])?;
    filled.wait_behind()?;
    signal(away, Signal::CONT)?;
    let first = filled.wait_copying()?;
    signal(filled.replica()?, Signal::KILL)?;
    let second = filled.wait_copying()?;
    signal(filled.site.pids("target")?.first().copied().context("no target")?, Signal::KILL)?;
    filled.wait_in_sync()?;
    let last = filled.copied()?;
    let mib = |bytes: u64| bytes / MIB;
    let (first, second, last, all) = (mib(first), mib(second), mib(last), filled.mib);
    let bytes = filled.end()?;
    Ok(format!(
        "the replica killed at {first} of {all} MiB, the target at {second}; {last} MiB copied after that; {bytes} bytes the same on all replicas"
    ))
}
