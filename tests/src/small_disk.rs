//! A small file system in memory.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::site::{path_text, run};

/// A mounted one, unmounted when dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of this size, such as 96m, on a folder.
    pub fn mount(path: &Path, size: &str) -> anyhow::Result<Self> {
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "small", path_text(path)?])?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
