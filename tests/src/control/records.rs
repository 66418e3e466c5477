//! The disk of carrickd's own records.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, ensure};
use rustix::process::Signal;

use crate::first_volume::chaos::{COPY_LIMIT, verifying_load};
use crate::replicas::identical;
use crate::report::{Found, Plan};
use crate::site::{SOON, Site, signal, wait_for};
use crate::small_disk::SmallDisk;

const VOLUME: &str = "vm1";
const REASON: &str = "METADATA_UNREACHABLE";
/// A file of records has some room inside, so a few changes go well on a full disk.
const CHANGES_MAX: u64 = 500;

pub fn full(plan: &Plan) -> Found {
    let mut site = Site::start()?;
    site.kill_daemon()?;
    let state = site.path("state");
    let small = SmallDisk::mount(&state, "8m")?;
    site.start_daemon()?;
    site.add_stores(3, "200M")?;
    site.carrick(&["volume", "create", VOLUME, "--size", "16M"])?;
    let device = site.attach(VOLUME, &[])?;
    let stop = site.path("stop-fio");
    let mut fio = verifying_load(&device, ("512", "64k"), plan.seed, &stop)?;

    let filler = state.join("filler");
    fill(&filler)?;
    let mut changes = 0;
    let message = loop {
        let rate = format!("rebuild-rate={}M", 10 + changes);
        match site.try_carrick(&["volume", "set", VOLUME, &rate])? {
            Ok(_) => changes += 1,
            Err(refusal) => {
                ensure!(refusal.reason == REASON && refusal.code == 7, "{refusal:?}");
                break refusal.message;
            }
        }
        ensure!(changes < CHANGES_MAX, "{changes} changes on a full disk");
    };
    ensure!(finds(&site)?, "explain doesn't name the cause: {}", site.carrick(&["explain", VOLUME])?);
    site.refused(&["volume", "expand", VOLUME, "24M"], 7, REASON)?;
    // A majority goes on without a record of the loss.
    signal(*site.pids("replica")?.first().context("no replica")?, Signal::KILL)?;
    ensure!(fio.is_running()?, "fio ended while the disk of the records was full");

    fs::remove_file(&filler)?;
    site.carrick(&["volume", "expand", VOLUME, "24M", "--wait"])?;
    wait_for("explain to find the records well", SOON, || Ok((!finds(&site)?).then_some(())))?;
    site.wait_in_sync(VOLUME, COPY_LIMIT)?;
    fs::write(&stop, "")?;
    fio.finish().with_context(|| site.log_tail())?;
    site.detach(VOLUME)?;
    let bytes = identical(&site, VOLUME)?;
    drop(site);
    drop(small);
    Ok(format!(
        "after {changes} changes: {message}; explain says {REASON}, I/O went on, also without a replica; the next change with room was made; \
         {bytes} bytes the same"
    ))
}

fn fill(path: &Path) -> anyhow::Result<()> {
    let mut file = File::create(path)?;
    while file.write(&[0; 4096]).is_ok() {}
    Ok(())
}

fn finds(site: &Site) -> anyhow::Result<bool> {
    let explained = site.carrick(&["explain", VOLUME])?;
    let findings = explained["findings"].as_array().context("no findings")?;
    Ok(findings.iter().any(|finding| finding["reason"] == REASON))
}
