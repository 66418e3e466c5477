//! Loop devices.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::site::{path_text, run};

/// A block device that is a sparse file, taken away when dropped.
pub struct Loop(PathBuf);

impl Loop {
    /// Makes the file, of so many bytes, and the device.
    pub fn new(file: &Path, bytes: u64) -> anyhow::Result<Self> {
        File::create(file)?.set_len(bytes)?;
        Self::over(file)
    }

    /// A device that is this file.
    pub fn over(file: &Path) -> anyhow::Result<Self> {
        let device = run("losetup", &["--find", "--show", path_text(file)?])?;
        Ok(Self(PathBuf::from(device.trim())))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// How many reads, writes, discards and flushes it has had.
    pub fn requests(&self) -> anyhow::Result<u64> {
        let name = self.0.file_name().context("a device without name")?;
        let text = fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
        // Documentation/block/stat.rst: what was completed is in the fields 1, 5, 12 and 16.
        Ok([0, 4, 11, 15].iter().filter_map(|field| text.split_whitespace().nth(*field)?.parse::<u64>().ok()).sum())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Ok(path) = path_text(&self.0) {
            let _ = run("losetup", &["--detach", path]);
        }
    }
}
