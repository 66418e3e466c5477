//! dm-flakey: a disk that can be told to drop all writes, and to say that they were done.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::site::{path_text, run};

const NAME: &str = "carrick-flakey";

/// The device, removed when dropped.
pub struct Flakey {
    path: PathBuf,
    /// Its size and the device below, as in a table.
    sectors: u64,
    data: String,
}

impl Flakey {
    /// A device that passes everything on to `data`, of so many bytes.
    pub fn new(data: &Path, bytes: u64) -> anyhow::Result<Self> {
        let mut device = Self { path: PathBuf::new(), sectors: bytes / 512, data: path_text(data)?.to_owned() };
        run("dmsetup", &["create", NAME, "--table", &device.good()])?;
        // The kernel's own name: /dev/mapper is udev's work, and there may be none.
        let node = run("dmsetup", &["info", "--columns", "--noheadings", "-o", "blkdevname", NAME])?;
        device.path = Path::new("/dev").join(node.trim());
        Ok(device)
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many writes it has taken, dropped ones among them.
    pub fn writes(&self) -> anyhow::Result<u64> {
        let name = self.path.file_name().context("a device without name")?;
        let text = fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
        // Documentation/block/stat.rst: the fifth number.
        Ok(text.split_whitespace().nth(4).context("no fifth number")?.parse()?)
    }

    /// From now on no write reaches the disk.
    pub fn drop_writes(&self) -> anyhow::Result<()> {
        // Never up, always down.
        self.replace(&format!("0 {} flakey {} 0 0 3600 1 drop_writes", self.sectors, self.data))
    }

    /// From now on the disk is a good one; nobody remembers what was dropped.
    pub fn restore(&self) -> anyhow::Result<()> {
        self.replace(&self.good())?;
        run("blockdev", &["--flushbufs", path_text(&self.path)?]).map(drop)
    }

    fn good(&self) -> String {
        format!("0 {} linear {} 0", self.sectors, self.data)
    }

    fn replace(&self, table: &str) -> anyhow::Result<()> {
        run("dmsetup", &["load", NAME, "--table", table])?;
        run("dmsetup", &["suspend", "--nolockfs", NAME])?;
        run("dmsetup", &["resume", NAME]).map(drop)
    }
}

impl Drop for Flakey {
    fn drop(&mut self) {
        // A suspended one would keep whoever has it open from ending. It may be held open for a moment by a process that was killed.
        let _ = run("dmsetup", &["resume", NAME]);
        let _ = run("dmsetup", &["remove", "--retry", NAME]);
    }
}
