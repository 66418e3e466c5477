//! What Carrick costs when nothing happens, and what it leaves behind.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::Plan;
use crate::disk::Disk;
use crate::report::Found;
use crate::site::{Site, path_text};

/// How long wakeups are counted.
const SECONDS: u64 = 20;
/// Bounds of the promise.
const WAKEUPS_A_SECOND_MAX: f64 = 2.0;
const RESIDENT_MAX_KIB: u64 = 24 << 10;

pub fn idle(_: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", "vm1", "--size", "64M"])?;
    let device = site.attach("vm1", &[])?;
    let disk = Disk::open(&device)?;
    disk.write_blocks(0, 2048, 3)?;
    disk.check_blocks(0, 2048, 3)?;
    drop(disk);
    // What the load left to do (write-back, trimming of buffers) is over after this.
    sleep(Duration::from_secs(7));
    let processes = site.processes()?;
    ensure!(processes.len() == 4, "3 replicas and a target, not {processes:?}");
    let before: BTreeMap<i32, BTreeMap<String, u64>> =
        processes.iter().map(|process| Ok((process.pid, wakeups_by_thread(process.pid)?))).collect::<anyhow::Result<_>>()?;
    sleep(Duration::from_secs(SECONDS));
    let mut found = Vec::new();
    for process in &processes {
        let mut threads = wakeups_by_thread(process.pid)?;
        for (thread, wakeups) in &before[&process.pid] {
            *threads.entry(thread.clone()).or_insert(*wakeups) -= wakeups;
        }
        let rate = threads.values().sum::<u64>() as f64 / SECONDS as f64;
        let resident = resident_kib(process.pid)?;
        ensure!(rate <= WAKEUPS_A_SECOND_MAX, "the {} woke {rate:.1} times a second, in {SECONDS} s: {threads:?}", process.kind);
        if process.kind == "target" {
            ensure!(resident <= RESIDENT_MAX_KIB, "the target holds {resident} KiB");
        }
        found.push(format!("{} {rate:.2}/s {:.1} MiB", process.kind, resident as f64 / 1024.0));
    }
    Ok(found.join(", "))
}

/// Voluntary context switches of the threads whose name is wanted: each is a wakeup.
pub fn wakeups_of(pid: i32, wanted: impl Fn(&str) -> bool) -> anyhow::Result<u64> {
    Ok(wakeups_by_thread(pid)?.iter().filter(|(name, _)| wanted(name)).map(|(_, wakeups)| wakeups).sum())
}

/// The same by thread: its name and id.
fn wakeups_by_thread(pid: i32) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?;
        let name = fs::read_to_string(thread.path().join("comm"))?;
        let status = fs::read_to_string(thread.path().join("status"))?;
        let wakeups = field(&status, "voluntary_ctxt_switches:")?;
        found.insert(format!("{} {}", name.trim_end(), thread.file_name().display()), wakeups);
    }
    Ok(found)
}

/// Resident memory, counted page by page: the sums in `status` lag behind on machines with several processors.
fn resident_kib(pid: i32) -> anyhow::Result<u64> {
    field(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?, "Rss:")
}

fn field(text: &str, name: &str) -> anyhow::Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(line.split_whitespace().next().context("no number")?.parse()?)
}

pub fn clean(_: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    let before = ublk_devices()?;
    site.carrick(&["volume", "create", "vm1", "--size", "64M"])?;
    let device = site.attach("vm1", &[])?;
    let pids: Vec<i32> = site.processes()?.into_iter().map(|process| process.pid).collect();
    Disk::open(&device)?.write_blocks(0, 16, 5)?;
    site.carrick(&["detach", "vm1"])?;
    site.carrick(&["shutdown"])?;
    let run = site.path("run");
    let left: Vec<String> = files_below(&run)?;
    ensure!(left.is_empty(), "left in the run directory: {left:?}");
    let alive: Vec<&i32> = pids.iter().filter(|pid| process_is_carrick(**pid)).collect();
    ensure!(alive.is_empty(), "still running: {alive:?}");
    ensure!(ublk_devices()? == before, "a ublk device is left");
    ensure!(!crate::site::is_block_device(&device), "{} is left", path_text(&device)?);
    Ok(format!("{} processes, 1 device, all sockets and files are gone", pids.len()))
}

fn process_is_carrick(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("carrick"))
}

/// The ublk devices of this machine.
pub fn ublk_devices() -> anyhow::Result<usize> {
    Ok(fs::read_dir("/sys/class/ublk-char").map_or(0, Iterator::count))
}

fn files_below(folder: &std::path::Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else { return Ok(found) };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files_below(&entry.path())?);
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    Ok(found)
}
