//! fio, as a child that is ended with its owner.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};

/// A running fio.
pub struct Fio(Option<Child>);

impl Fio {
    /// Starts it on a device with these options besides direct, asynchronous I/O.
    pub fn start(device: &Path, options: &[&str]) -> anyhow::Result<Self> {
        let child = Command::new("fio")
            // Threads, not processes: all end with the one that is known here.
            .args(["--name=load", "--thread", "--ioengine=libaio", "--direct=1", "--group_reporting", "--verify_state_save=0"])
            .arg(format!("--filename={}", device.display()))
            .args(options)
            // Where it may leave its files.
            .current_dir(std::env::temp_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting fio")?;
        Ok(Self(Some(child)))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(match &mut self.0 {
            Some(child) => child.try_wait()?.is_none(),
            None => false,
        })
    }

    /// Waits for its end, which must be a good one; what it printed.
    pub fn finish(mut self) -> anyhow::Result<String> {
        let child = self.0.take().context("fio is gone")?;
        let output = child.wait_with_output()?;
        let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let good = output.status.success() && said.contains("err= 0") && !complained.contains("verify:");
        ensure!(good, "fio ended with {}: {complained}\n{said}", output.status);
        Ok(said.into_owned())
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
