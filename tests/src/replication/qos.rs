//! Limits of a volume's requests, measured on its device.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;

use crate::fio::Fio;
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, signal, wait_for};

const LIMITED: &str = "vm1";
const FREE: &str = "vm2";
const MIB: f64 = 1_048_576.0;
/// Of what is small and random: fio without an end of its own; it is ended with its owner.
const SMALL: &[&str] = &["--rw=randrw", "--bs=4k", "--time_based", "--runtime=600", "--randrepeat=0"];
const LARGE: &[&str] = &["--rw=write", "--bs=1M", "--iodepth=32", "--time_based", "--runtime=600"];
/// Until a load goes evenly, and what the device did before it is over.
const WARM_UP: Duration = Duration::from_secs(1);
/// A limit is kept to within a tenth.
const WITHIN: f64 = 0.1;
/// What a volume without a limit keeps of its rate beside one with a low limit and many requests that wait for it.
const NEIGHBOUR: f64 = 0.75;
const ROUNDS: u32 = 4;

/// Two written volumes on the same three stores.
struct Pair {
    site: Site,
    limited: PathBuf,
    free: PathBuf,
    measured: Duration,
}

impl Pair {
    fn new(plan: &Plan) -> anyhow::Result<Self> {
        let site = Site::with_sized_stores(3, "1G")?;
        let attach = |volume: &str| -> anyhow::Result<PathBuf> {
            site.carrick(&["volume", "create", volume, "--size", "96M"])?;
            let device = site.attach(volume, &[])?;
            Fio::start(&device, &["--rw=write", "--bs=1M", "--iodepth=4", "--size=100%"])?.finish()?;
            Ok(device)
        };
        let (limited, free) = (attach(LIMITED)?, attach(FREE)?);
        Ok(Self { site, limited, free, measured: Duration::from_secs(if plan.quick { 4 } else { 12 }) })
    }

    fn set(&self, settings: &[&str]) -> anyhow::Result<()> {
        self.site.carrick(&[&["volume", "set", LIMITED], settings].concat()).map(drop)
    }

    fn small(&self, device: &Path, depth: u32) -> anyhow::Result<Fio> {
        Fio::start(device, &[SMALL, &[&format!("--iodepth={depth}")]].concat())
    }

    /// What the device does from now on, in requests and bytes a second.
    fn rates(&self, device: &Path) -> anyhow::Result<(f64, f64)> {
        let idle = Done::of(device)?.requests;
        wait_for("a load to begin", SOON, || Ok((Done::of(device)?.requests > idle).then_some(())))?;
        sleep(WARM_UP);
        let (before, begin) = (Done::of(device)?, Instant::now());
        sleep(self.measured);
        let (after, seconds) = (Done::of(device)?, begin.elapsed().as_secs_f64());
        Ok(((after.requests - before.requests) as f64 / seconds, (after.sectors - before.sectors) as f64 * 512.0 / seconds))
    }

    /// Requests a second of a load of its own.
    fn alone(&self, device: &Path, depth: u32) -> anyhow::Result<f64> {
        let load = self.small(device, depth)?;
        let (rate, _) = self.rates(device)?;
        drop(load);
        Ok(rate)
    }

    /// What `volume show` says of the limited volume's attachment.
    fn attachment(&self, field: &str) -> anyhow::Result<u64> {
        let shown = self.site.carrick(&["volume", "show", LIMITED])?;
        shown["attachment"][field].as_u64().with_context(|| format!("an attachment without {field}: {shown}"))
    }
}

/// What a block device has done, by the kernel's count.
struct Done {
    requests: u64,
    sectors: u64,
}

impl Done {
    fn of(device: &Path) -> anyhow::Result<Self> {
        let name = device.file_name().context("a device without name")?;
        let text = fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
        let fields: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [reads, _, read, _, writes, _, written, ..] = fields[..] else { anyhow::bail!("{text:?} is no stat") };
        Ok(Self { requests: reads + writes, sectors: read + written })
    }
}

fn check(what: &str, measured: f64, limit: f64) -> anyhow::Result<()> {
    ensure!((measured / limit - 1.0).abs() <= WITHIN, "{what}: {measured:.1} measured, the limit is {limit}");
    Ok(())
}

pub fn limits(plan: &Plan) -> Found {
    let pair = Pair::new(plan)?;
    let device = &pair.limited;
    pair.set(&["iops=500"])?;
    let load = pair.small(device, 32)?;
    let (first, _) = pair.rates(device)?;
    check("iops=500", first, 500.0)?;
    let flush = flush(device)?;
    pair.set(&["iops=1000"])?;
    let (second, _) = pair.rates(device)?;
    check("iops=1000, while fio ran", second, 1000.0)?;
    // Nothing is changed by what is refused.
    pair.site.refused(&["volume", "set", LIMITED, "bandwidth=1G", "iops=1"], 2, "INVALID_FIELD")?;
    let killed = killed_while_waiting(&pair)?;
    let (delayed, micros) = (pair.attachment("delayed_requests")?, pair.attachment("delayed_micros")?);
    drop(load);
    pair.set(&["iops=none", "bandwidth=10M"])?;
    let load = Fio::start(device, LARGE)?;
    let (_, third) = pair.rates(device)?;
    check("bandwidth=10M", third / MIB, 10.0)?;
    pair.set(&["bandwidth=none"])?;
    let (_, fourth) = pair.rates(device)?;
    ensure!(fourth > 3.0 * third, "{:.1} MiB/s without a limit, {:.1} with one of 10", fourth / MIB, third / MIB);
    drop(load);
    let ended = detached_by_force(&pair)?;
    Ok(format!(
        "iops=500: {first:.0}, a flush beside it {flush:.0} ms; changed to 1000 while fio ran: {second:.0}, with its target killed: \
         {killed:.0}; {delayed} requests waited, {:.1} ms on average; bandwidth=10M: {:.2} MiB/s, lifted: {:.0} MiB/s; detached by \
         force in {ended:.0} ms with requests waiting",
        micros as f64 / 1000.0 / delayed.max(1) as f64,
        third / MIB,
        fourth / MIB,
    ))
}

/// How long a flush takes beside requests that wait, in milliseconds.
fn flush(device: &Path) -> anyhow::Result<f64> {
    let file = File::options().write(true).open(device)?;
    let begin = Instant::now();
    file.sync_all()?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// The target ends with requests waiting, and the next one serves them, under the same limits; their rate.
fn killed_while_waiting(pair: &Pair) -> anyhow::Result<f64> {
    wait_for("requests to wait", SOON, || Ok((pair.attachment("requests_delayed_now")? > 0).then_some(())))?;
    let shown = pair.site.carrick(&["volume", "show", LIMITED])?;
    let processes = pair.site.processes()?;
    let target = processes.iter().find(|process| shown["id"] == process.subject.as_str()).context("no target")?;
    signal(target.pid, Signal::KILL)?;
    wait_for("the next target", SOON, || Ok((pair.attachment("delayed_requests")? > 0).then_some(())))?;
    let (rate, _) = pair.rates(&pair.limited)?;
    check("iops=1000, after a kill", rate, 1000.0)?;
    Ok(rate)
}

/// How long it takes to take the device away while the lowest limit holds a load up, in milliseconds.
fn detached_by_force(pair: &Pair) -> anyhow::Result<f64> {
    pair.set(&["iops=10"])?;
    let load = pair.small(&pair.limited, 64)?;
    wait_for("requests to wait", SOON, || Ok((pair.attachment("requests_delayed_now")? > 32).then_some(())))?;
    let begin = Instant::now();
    pair.site.carrick(&["detach", LIMITED, "--force"])?;
    let millis = begin.elapsed().as_secs_f64() * 1e3;
    drop(load);
    Ok(millis)
}

/// What the volume without a limit does, in requests a second, one figure a situation; each is a sum over all rounds.
#[derive(Default)]
struct Neighbours {
    alone: f64,
    beside_limited: f64,
    beside_unlimited: f64,
    single: f64,
    single_beside_unlimited: f64,
    single_beside_large: f64,
    unlimited: f64,
}

impl Neighbours {
    fn round(&mut self, pair: &Pair) -> anyhow::Result<()> {
        self.alone += pair.alone(&pair.free, 8)?;
        self.single += pair.alone(&pair.free, 1)?;
        pair.set(&["iops=100"])?;
        let load = pair.small(&pair.limited, 128)?;
        let (held, _) = pair.rates(&pair.limited)?;
        check("iops=100, at depth 128", held, 100.0)?;
        self.beside_limited += pair.alone(&pair.free, 8)?;
        pair.set(&["iops=none"])?;
        self.beside_unlimited += pair.alone(&pair.free, 8)?;
        self.single_beside_unlimited += pair.alone(&pair.free, 1)?;
        self.unlimited += pair.rates(&pair.limited)?.0;
        drop(load);
        let load = Fio::start(&pair.limited, LARGE)?;
        self.single_beside_large += pair.alone(&pair.free, 1)?;
        drop(load);
        Ok(())
    }
}

pub fn neighbours(plan: &Plan) -> Found {
    let mut pair = Pair::new(plan)?;
    // The machine may have other things to do, now more, now less: many short looks in turn.
    pair.measured /= ROUNDS;
    let mut sums = Neighbours::default();
    for _ in 0..ROUNDS {
        sums.round(&pair)?;
    }
    let each = |sum: f64| sum / f64::from(ROUNDS);
    let ratio = sums.beside_limited / sums.alone;
    let found = format!(
        "{:.0} requests a second at depth 8, {:.0} beside 128 that wait for iops=100: ratio {ratio:.2} (bound {NEIGHBOUR}), {:.0} beside \
         the same without limit; at depth 1: {:.0}, {:.0} beside {:.0} at depth 128, {:.0} beside writes of 1 MiB at depth 32",
        each(sums.alone),
        each(sums.beside_limited),
        each(sums.beside_unlimited),
        each(sums.single),
        each(sums.single_beside_unlimited),
        each(sums.unlimited),
        each(sums.single_beside_large),
    );
    ensure!(ratio >= NEIGHBOUR, "{found}");
    Ok(found)
}
