//! What `carrick doctor` finds on a machine that is as it should be, and on one that isn't.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::mount::Mount;
use crate::report::{Found, Plan};
use crate::site::{Site, path_text, run};

/// Room for the smallest store.
const DISK_BYTES: u64 = 160 << 20;

/// A file system on a disk of its own, mounted.
fn disk(site: &Site, name: &str, options: &str) -> anyhow::Result<(Mount, PathBuf)> {
    let image = site.path(&format!("{name}.image"));
    File::create(&image)?.set_len(DISK_BYTES)?;
    run("mkfs.ext4", &["-q", path_text(&image)?])?;
    let folder = site.path(name);
    fs::create_dir_all(&folder)?;
    Ok((Mount::with(&["-o", options], &image, folder.clone())?, folder))
}

fn check<'a>(checks: &'a Value, name: &str) -> anyhow::Result<&'a Value> {
    let found = checks.as_array().into_iter().flatten().find(|check| check["name"].as_str().is_some_and(|text| text.starts_with(name)));
    found.with_context(|| format!("no check {name} in {checks}"))
}

pub fn machine(_: &Plan) -> Found {
    let site = Site::start()?;
    let (good, folder) = disk(&site, "good", "loop")?;
    site.carrick(&["store", "add", path_text(&folder)?, "--size", "64M"])?;
    let checks = site.carrick(&["doctor"])?;
    for name in ["io_uring", "carrickd", "room in", "flushes to"] {
        ensure!(check(&checks, name)?["verdict"] == "pass", "{checks}");
    }
    let flushes = check(&checks, "flushes to")?["found"].as_str().unwrap_or_default().to_owned();
    ensure!(flushes.contains("fdatasyncs sent") || flushes.contains("no volatile cache"), "{flushes}");
    let ublk = check(&checks, "ublk")?["verdict"].to_string();
    // A file system that is told not to send them.
    let (bad, folder) = disk(&site, "bad", "loop,nobarrier")?;
    site.carrick(&["store", "add", path_text(&folder)?, "--size", "64M"])?;
    let message = site.refused(&["doctor"], 8, "UNSUPPORTED")?;
    ensure!(message.starts_with("1 of "), "{message}");
    for store in ["good", "bad"] {
        site.carrick(&["store", "remove", path_text(&site.path(store))?])?;
    }
    drop((good, bad));
    Ok(format!("ublk {ublk}; {flushes}; on a file system mounted with nobarrier: {message}"))
}
