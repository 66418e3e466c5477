//! A node whose machine loses its power and is booted again. Each half runs on a machine of its own, one after the other
//! (`tests/acceptance`); what they share is a disk.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::disk::Disk;
use crate::first_volume::chaos::COPY_LIMIT;
use crate::mount::Mount;
use crate::replicas::identical;
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, path_text, run, wait_for};
use crate::store::devices::Loop;

/// The file that is the disk.
const DISK: &str = "CARRICK_BOOT_DISK";
const DISK_BYTES: u64 = 2 << 30;
/// Attached when the power goes, with how.
const ATTACHED: [(&str, &[&str]); 3] = [("vm1", &[]), ("vm2", &["--map", "always"]), ("vm3", &["--host"])];
const DETACHED: &str = "vm4";
const BLOCKS: u64 = 512;
/// Bound: from the start of carrickd to the last device that answers.
const BACK_MAX: Duration = Duration::from_secs(30);

/// What is on the disk, which is mounted.
struct Kept {
    // In this order: the node ends before its disk goes.
    site: Site,
    _mount: Mount,
    _disk: Loop,
}

fn disk_file() -> anyhow::Result<PathBuf> {
    let guest = env::var("CARRICK_GUEST").unwrap_or_default();
    ensure!(guest != "host", "this machine isn't cut off for a test: give --kernel uml or qemu-6.12");
    Ok(env::var_os(DISK).with_context(|| format!("{DISK} is not set: run tests/acceptance control"))?.into())
}

/// Starts the node of the disk, or makes one.
fn start(disk: Loop) -> anyhow::Result<Kept> {
    let folder = PathBuf::from("/tmp/carrick-boot");
    fs::create_dir_all(&folder)?;
    let mount = Mount::new(disk.path(), folder.clone())?;
    // As /run, which a boot empties.
    let site = folder.join("site");
    let _ = fs::remove_dir_all(site.join("run"));
    Ok(Kept { site: Site::kept_in(site)?, _mount: mount, _disk: disk })
}

pub fn before(_: &Plan) -> Found {
    let disk = Loop::new(&disk_file()?, DISK_BYTES)?;
    run("mkfs.ext4", &["-q", path_text(disk.path())?])?;
    let kept = start(disk)?;
    let site = &kept.site;
    site.add_stores(3, "400M")?;
    for (value, (name, options)) in (1..).zip(ATTACHED.iter().chain([&(DETACHED, &[] as &[&str])])) {
        site.carrick(&["volume", "create", name, "--size", "16M"])?;
        let disk = Disk::open(&site.attach(name, options)?)?;
        disk.write_blocks(0, BLOCKS, value)?;
        disk.flush()?;
    }
    site.detach(DETACHED)?;
    // Nothing is taken down: the machine goes as it is.
    std::mem::forget(kept);
    Ok(format!("{} volumes attached, {BLOCKS} blocks written to each and flushed; the machine is cut off", ATTACHED.len()))
}

pub fn after(_: &Plan) -> Found {
    let disk = Loop::over(&disk_file()?)?;
    let begin = Instant::now();
    let kept = start(disk)?;
    let site = &kept.site;
    for (value, (name, _)) in (1..).zip(ATTACHED) {
        let device = wait_for("the device to be back", SOON, || {
            let shown = site.carrick(&["volume", "show", name])?;
            let attachment = &shown["attachment"];
            let serves = attachment["state"] == "attached" && attachment["phase"] == "serving";
            Ok(attachment["device"].as_str().filter(|_| serves).map(PathBuf::from))
        })?;
        Disk::open(&device)?.check_blocks(0, BLOCKS, value)?;
    }
    let back = begin.elapsed();
    ensure!(site.carrick(&["volume", "show", DETACHED])?["attachment"].is_null(), "what was detached is attached after the boot");
    let mut bytes = 0;
    for (name, _) in ATTACHED {
        site.wait_in_sync(name, COPY_LIMIT)?;
        site.detach(name)?;
        bytes += identical(site, name)?;
    }
    ensure!(back <= BACK_MAX, "the last device answered {back:?} after the start");
    Ok(format!(
        "all {} devices were back and right {:.1} s after the start of carrickd (bound {}), and not the one that was detached; {bytes} bytes the \
         same on all replicas",
        ATTACHED.len(),
        back.as_secs_f64(),
        BACK_MAX.as_secs()
    ))
}
