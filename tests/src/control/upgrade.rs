//! A node whose programs are replaced by newer ones while its volumes are used.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use crate::disk::Disk;
use crate::fio::Fio;
use crate::first_volume::chaos::verifying_load;
use crate::replicas::identical_at_last;
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, programs, wait_for};

/// Names, with how they are made and attached.
const VOLUMES: [(&str, &[&str], &[&str]); 3] =
    [("vm1", &["--replicas", "3"], &[]), ("vm2", &["--replicas", "1"], &[]), ("vm3", &["--replicas", "3"], &["--map", "always"])];
/// Behind what fio works on.
const WATCHED_BLOCK: u64 = (80 << 20) / 4096;

pub fn upgrade(plan: &Plan) -> Found {
    let folder = tempfile::Builder::new().prefix("carrick-programs-").tempdir()?;
    install(folder.path())?;
    let mut site = Site::start_with(folder.path().to_owned())?;
    site.add_stores(3, "512M")?;
    let mut devices = Vec::new();
    for (name, creation, attachment) in VOLUMES {
        site.carrick(&[&["volume", "create", name, "--size", "96M"], creation].concat())?;
        devices.push(site.attach(name, attachment)?);
    }
    // Each takes its file away when it has seen it.
    let stops: Vec<PathBuf> = VOLUMES.iter().map(|(name, ..)| site.path(&format!("stop-{name}"))).collect();
    let loads = devices.iter().zip(&stops).map(|(device, stop)| verifying_load(device, ("4k", "64k"), plan.seed, stop));
    let mut loads: Vec<Fio> = loads.collect::<anyhow::Result<_>>()?;
    let before = site.processes()?;
    let ended = AtomicBool::new(false);
    let rounds = if plan.quick { 1 } else { 4 };
    let (took, longest) = thread::scope(|scope| -> anyhow::Result<(Duration, Vec<Duration>)> {
        let watchers: Vec<_> = devices.iter().map(|device| scope.spawn(|| watch(device, &ended))).collect();
        let upgraded = upgrades(&mut site, folder.path(), rounds);
        ended.store(true, Ordering::Relaxed);
        let joined = watchers.into_iter().map(|watcher| watcher.join().map_err(|_| anyhow!("a watcher panicked"))?);
        let longest = joined.collect::<anyhow::Result<Vec<Duration>>>()?;
        Ok((upgraded?, longest))
    })
    .with_context(|| site.log_tail())?;
    for fio in &mut loads {
        ensure!(fio.is_running()?, "fio ended: {}", site.log_tail());
    }
    let after = site.processes()?;
    let kept = after.iter().filter(|new| before.iter().any(|old| old.pid == new.pid)).count();
    ensure!(after.len() == before.len() && kept == 0, "{before:?} became {after:?}");
    for (fio, stop) in loads.into_iter().zip(&stops) {
        fs::write(stop, "")?;
        fio.finish().with_context(|| site.log_tail())?;
    }
    let mut bytes = 0;
    for (name, _, _) in VOLUMES {
        bytes += identical_at_last(&site, name)?;
    }
    let longest: Vec<String> =
        VOLUMES.iter().zip(longest).map(|((name, ..), longest)| format!("{} ms on {name}", longest.as_millis())).collect();
    Ok(format!(
        "{} processes replaced {} times, one time with carrickd killed in the middle; {} s for the slowest; no error in fio; the slowest \
         request took {} (one replica: vm2, mapped: vm3); {bytes} bytes the same on all replicas",
        before.len(),
        rounds + 1,
        took.as_secs_f64().ceil(),
        longest.join(", ")
    ))
}

/// Puts new files in the place of the programs, as a package does.
fn install(folder: &Path) -> anyhow::Result<()> {
    for name in ["carrick-replica", "carrick-target"] {
        let new = folder.join("new");
        fs::copy(programs()?.join(name), &new)?;
        fs::rename(new, folder.join(name))?;
    }
    Ok(())
}

/// Upgrades so often, and once more with carrickd killed in the middle. How long the slowest took.
fn upgrades(site: &mut Site, folder: &Path, rounds: u32) -> anyhow::Result<Duration> {
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds {
        thread::sleep(Duration::from_secs(1));
        install(folder)?;
        let begin = Instant::now();
        site.carrick(&["node", "upgrade", "--wait"])?;
        slowest = slowest.max(begin.elapsed());
    }
    install(folder)?;
    let processes = site.processes()?.len();
    site.carrick(&["node", "upgrade"])?;
    let left = |site: &Site| -> anyhow::Result<Option<u64>> { Ok(site.carrick(&["status"])?["upgrade"]["left"].as_u64()) };
    wait_for("half of it to be done", SOON, || Ok(left(site)?.is_none_or(|left| left <= processes as u64 / 2).then_some(())))?;
    site.kill_daemon()?;
    thread::sleep(Duration::from_millis(500));
    site.start_daemon()?;
    wait_for("the next carrickd to finish it", SOON, || Ok(left(site)?.is_none().then_some(())))?;
    Ok(slowest)
}

/// Writes a block again and again until the end; the longest time that one took.
fn watch(device: &Path, ended: &AtomicBool) -> anyhow::Result<Duration> {
    let disk = Disk::open(device)?;
    let (mut longest, mut value) = (Duration::ZERO, 0_u8);
    while !ended.load(Ordering::Relaxed) {
        value = value.wrapping_add(1);
        longest = longest.max(disk.write_blocks(WATCHED_BLOCK, 1, value)?).max(disk.check_blocks(WATCHED_BLOCK, 1, value)?);
    }
    Ok(longest)
}
