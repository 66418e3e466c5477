//! Machines that can't: each gets one sentence.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

use super::Plan;
use crate::report::Found;
use crate::site::{Site, programs};

const DEVICE: &str = "/dev/ublk-control";
const HIDDEN: &str = "/dev/ublk-control.hidden";
const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";

pub fn refusals(_: &Plan) -> Found {
    let site = Site::with_stores(1)?;
    site.carrick(&["volume", "create", "vm1", "--size", "64M", "--replicas", "1"])?;
    let without_ublk = {
        let _hidden = Hidden::new()?;
        one_sentence(&site.refused(&["attach", "vm1"], 8, "UNSUPPORTED")?, &["ublk", "modprobe"])?
    };
    let without_ring = if Path::new(SYSCTL).exists() {
        let _disabled = Disabled::new()?;
        one_sentence(&site.refused(&["attach", "vm1"], 8, "UNSUPPORTED")?, &["io_uring"])?
    } else {
        "this kernel has no io_uring_disabled".to_owned()
    };
    // The refused attachments left nothing: it works now.
    site.attach("vm1", &[])?;
    site.carrick(&["detach", "vm1"])?;
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(programs()?.join("carrickd"))
        .arg("--run-dir")
        .arg(site.path("other-run"))
        .arg("--state-dir")
        .arg(site.path("other-state"))
        .output()
        .context("starting carrickd as nobody")?;
    ensure!(!output.status.success(), "carrickd runs as nobody");
    let not_root = one_sentence(String::from_utf8_lossy(&output.stderr).trim(), &["root"])?;
    Ok(format!("{without_ublk:?}; {without_ring:?}; {not_root:?}"))
}

fn one_sentence(said: &str, words: &[&str]) -> anyhow::Result<String> {
    ensure!(!said.is_empty() && !said.contains('\n'), "not one sentence: {said:?}");
    for word in words {
        ensure!(said.contains(word), "{said:?} doesn't say {word:?}");
    }
    Ok(said.to_owned())
}

/// The control device under another name.
struct Hidden;

impl Hidden {
    fn new() -> anyhow::Result<Self> {
        fs::rename(DEVICE, HIDDEN).context("hiding the control device")?;
        Ok(Self)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = fs::rename(HIDDEN, DEVICE);
    }
}

/// io_uring forbidden to everybody.
struct Disabled {
    before: String,
}

impl Disabled {
    fn new() -> anyhow::Result<Self> {
        let before = fs::read_to_string(SYSCTL)?;
        fs::write(SYSCTL, "2")?;
        Ok(Self { before })
    }
}

impl Drop for Disabled {
    fn drop(&mut self) {
        let _ = fs::write(SYSCTL, &self.before);
    }
}
