//! `carrick-replica`, run by hand.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use carrick_replicator::control::{ReplicaAnswer, ReplicaRequest, RunDirectory, call};
use rustix::process::Signal;
use serde_json::Value;

use crate::site::{SOON, path_text, programs, run, signal};

/// Runs a command of the program; what it prints.
pub fn replica(arguments: &[&str]) -> anyhow::Result<String> {
    run(path_text(&programs()?.join("carrick-replica"))?, arguments)
}

/// Checks a store with all its data, which must be clean; what the check says.
pub fn check(store: &Path) -> anyhow::Result<Value> {
    let output = Command::new(programs()?.join("carrick-replica")).args(["check", "--data", "--json"]).arg(store).output()?;
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "check of {}: {} {said} {complained}", store.display(), output.status);
    let report: Value = serde_json::from_str(&said)?;
    ensure!(report["clean"] == true, "check of {}: {report}", store.display());
    Ok(report)
}

/// A store being served. Killed when dropped.
pub struct Served {
    child: Child,
}

impl Served {
    /// Serves a store, and waits until its control socket answers; how long that took.
    pub fn start(store: &Path, run_dir: &Path) -> anyhow::Result<(Self, Duration)> {
        let shown: Value = serde_json::from_str(&replica(&["show", path_text(store)?])?)?;
        let id = shown["store"].as_str().context("a store without id")?.parse()?;
        let socket = RunDirectory::new(run_dir).replica_control(id);
        fs::create_dir_all(run_dir)?;
        let begin = Instant::now();
        let child = Command::new(programs()?.join("carrick-replica"))
            .args(["serve", path_text(store)?, "--run-dir", path_text(run_dir)?])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting carrick-replica")?;
        let mut served = Self { child };
        while !answers(&socket) {
            if let Some(status) = served.child.try_wait()? {
                bail!("carrick-replica ended with {status} instead of serving {}", store.display());
            }
            ensure!(begin.elapsed() < SOON, "carrick-replica doesn't answer");
            sleep(Duration::from_millis(2));
        }
        Ok((served, begin.elapsed()))
    }

    /// Ends it in order.
    pub fn end(mut self) -> anyhow::Result<()> {
        signal(i32::try_from(self.child.id())?, Signal::TERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "carrick-replica ended with {status}");
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answers(socket: &Path) -> bool {
    matches!(call(socket, &ReplicaRequest::Status, SOON), Ok(ReplicaAnswer::Status(_)))
}
