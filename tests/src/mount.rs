//! A mounted file system, unmounted when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::site::{path_text, run};

/// See the module.
pub struct Mount(PathBuf);

impl Mount {
    pub fn new(device: &Path, folder: PathBuf) -> anyhow::Result<Self> {
        Self::with(&[], device, folder)
    }

    /// The same, with options of mount(8).
    pub fn with(options: &[&str], device: &Path, folder: PathBuf) -> anyhow::Result<Self> {
        run("mount", &[options, &[path_text(device)?, path_text(&folder)?]].concat())?;
        Ok(Self(folder))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
