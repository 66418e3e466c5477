//! Loop devices.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::site::{path_text, run};

/// A block device that is a sparse file, taken away when dropped.
pub struct Loop(PathBuf);

impl Loop {
    /// Makes the file, of so many bytes, and the device.
    pub fn new(file: &Path, bytes: u64) -> anyhow::Result<Self> {
        File::create(file)?.set_len(bytes)?;
        let device = run("losetup", &["--find", "--show", path_text(file)?])?;
        Ok(Self(PathBuf::from(device.trim())))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Ok(path) = path_text(&self.0) {
            let _ = run("losetup", &["--detach", path]);
        }
    }
}
