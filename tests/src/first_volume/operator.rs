//! What an operator does and gets wrong.

use std::fs;
use std::process::Command;

use anyhow::{Context, ensure};

use super::Plan;
use crate::disk::Disk;
use crate::fio::Fio;
use crate::report::Found;
use crate::site::{SOON, Site, path_text, programs};
use crate::small_disk::SmallDisk;

/// Creating, listing and refusing.
pub fn create(_: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    let first = site.carrick(&["volume", "create", "vm1", "--size", "64M"])?;
    let again = site.carrick(&["volume", "create", "vm1", "--size", "64MiB"])?;
    ensure!(first["id"].is_string() && first["id"] == again["id"], "created twice: {first} and {again}");
    let mut refused = 0;
    for (arguments, code, reason, word) in [
        (&["volume", "create", "vm1", "--size", "128M"][..], 4, "VOLUME_EXISTS", "size"),
        (&["volume", "create", "vm1", "--size", "64M", "--block-size", "4096"], 4, "VOLUME_EXISTS", "block"),
        (&["volume", "create", "vm2", "--size", "0"], 2, "INVALID_FIELD", "size"),
        (&["volume", "create", "vm2", "--size", "5000"], 2, "INVALID_FIELD", "4096"),
        (&["volume", "create", "vm2", "--size", "8192T"], 2, "INVALID_FIELD", "limit"),
        (&["volume", "create", "vm2", "--size", "64M", "--block-size", "1024"], 2, "INVALID_FIELD", "block"),
        (&["volume", "create", "no/slash", "--size", "64M"], 2, "INVALID_FIELD", "name"),
        (&["volume", "create", "vm2", "--size", "64M", "--replicas", "5"], 5, "TOO_FEW_STORES", "5"),
        (&["volume", "show", "nobody"], 3, "VOLUME_NOT_FOUND", "nobody"),
        (&["volume", "delete", "nobody"], 3, "VOLUME_NOT_FOUND", "nobody"),
        (&["attach", "nobody"], 3, "VOLUME_NOT_FOUND", "nobody"),
        (&["detach", "nobody"], 3, "VOLUME_NOT_FOUND", "nobody"),
    ] {
        let said = site.refused(arguments, code, reason)?;
        ensure!(said.to_lowercase().contains(word), "{arguments:?} says {said:?}, without {word:?}");
        refused += 1;
    }
    let list = site.carrick(&["volume", "list"])?;
    ensure!(list.to_string().matches("\"name\"").count() == 1, "the refused requests left something: {list}");
    Ok(format!("idempotent; {refused} wrong requests refused with their reason"))
}

/// Folders that are no stores, stores in use, disks that are full.
pub fn stores(_: &Plan) -> Found {
    let site = Site::with_stores(1)?;
    let foreign = site.path("foreign");
    fs::create_dir_all(&foreign)?;
    fs::write(foreign.join("letter.txt"), "dear disk")?;
    let said_foreign = site.refused(&["store", "add", path_text(&foreign)?], 5, "STORE_UNUSABLE")?;
    ensure!(fs::read_dir(&foreign)?.count() == 1 && foreign.join("letter.txt").exists(), "the foreign folder was changed");
    let own = site.path("store0");
    let output = Command::new(programs()?.join("carrick-replica"))
        .args(["serve", path_text(&own)?, "--run-dir", path_text(&site.path("second"))?])
        .output()
        .context("starting a second carrick-replica")?;
    let said_in_use = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(!output.status.success() && said_in_use.contains("in use"), "a second carrick-replica said {said_in_use:?}");

    // A disk of 96 MiB takes a volume of 64 MiB, then is full for a second one. The store's space is taken at once.
    let small = site.path("small");
    fs::create_dir_all(&small)?;
    let _disk = SmallDisk::mount(&small, "96m")?;
    let format = ["format", path_text(&small)?, "--size", "88M", "--prewrite"];
    let formatted = Command::new(programs()?.join("carrick-replica")).args(format).output().context("formatting a store")?;
    ensure!(formatted.status.success(), "carrick-replica {format:?}: {formatted:?}");
    site.carrick(&["store", "add", path_text(&small)?])?;
    let small_id = site.store_at(path_text(&small)?)?;
    site.carrick(&["volume", "create", "fits", "--size", "64M", "--replicas", "1", "--store", &small_id])?;
    let said_full = site.refused(&["volume", "create", "big", "--size", "64M", "--replicas", "1", "--store", &small_id], 6, "NO_SPACE")?;
    let device = site.attach("fits", &[])?;
    // Somebody else fills the disk: what was promised to the volume is still there.
    let filled = fs::File::create(small.join("other")).and_then(|mut file| std::io::copy(&mut std::io::repeat(1), &mut file));
    ensure!(filled.is_err(), "the small disk never got full");
    let fio = Fio::start(&device, &["--rw=randwrite", "--bs=64k", "--iodepth=8", "--size=64M", "--verify=crc32c", "--verify_fatal=1"])?;
    fio.finish().context("writing to a volume on a disk that others filled")?;
    site.carrick(&["detach", "fits"])?;
    site.carrick(&["shutdown"])?;
    Ok(format!(
        "not ours: {said_foreign:?}; in use: {said_in_use:?}; full: {said_full:?}; a volume on a disk that others filled still takes every write"
    ))
}

/// Detaching and deleting what is in use.
pub fn detach(_: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", "vm1", "--size", "64M"])?;
    let device = site.attach("vm1", &[])?;
    let same = site.attach("vm1", &[])?;
    ensure!(device == same, "attached twice: {device:?}, {same:?}");
    let disk = Disk::open(&device)?;
    disk.write_blocks(0, 256, 7)?;

    let mut fio =
        Fio::start(&device, &["--rw=randwrite", "--bs=16k", "--iodepth=32", "--offset=32M", "--size=32M", "--time_based", "--runtime=60"])?;
    let said_busy = site.refused(&["detach", "vm1"], 5, "DEVICE_BUSY")?;
    let said_attached = site.refused(&["volume", "delete", "vm1"], 5, "VOLUME_ATTACHED")?;
    ensure!(fio.is_running()?, "the refused detach ended the load");
    site.carrick(&["detach", "vm1", "--force"])?;
    drop(fio);
    drop(disk);
    ensure!(!device.exists() || !crate::site::is_block_device(&device), "{device:?} is still there");

    let device = site.attach("vm1", &[])?;
    Disk::open(&device)?.check_blocks(0, 256, 7).context("what was acknowledged before the forced detach")?;
    site.carrick(&["detach", "vm1"])?;
    site.carrick(&["detach", "vm1"])?;
    site.carrick(&["volume", "delete", "vm1"])?;
    crate::site::wait_for("the volume to be gone", SOON, || Ok((site.try_carrick(&["volume", "show", "vm1"])?.is_err()).then_some(())))?;
    Ok(format!("in use: {said_busy:?}; attached: {said_attached:?}; forced, then attached again: all there"))
}
