//! Whether flushes reach the disks under a path: the kernel counts those that it sends (`Documentation/block/stat.rst`).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use carrick_backing_store::{BLOCK_SIZE, BufferPool};

/// How often each way is tried: enough to tell them from what others do meanwhile, and over in a moment on the slowest disk.
const TIMES: u64 = 16;
/// Where the number of flushes is in a `stat` file.
const FLUSHES_FIELD: usize = 15;
/// Devices upon devices that are followed down.
const DEPTH_MAX: usize = 8;

/// The block devices under a path: those without others under them.
#[derive(Debug, Default)]
pub struct Disk {
    leaves: Vec<Leaf>,
}

#[derive(Debug)]
struct Leaf {
    name: String,
    folder: PathBuf,
    volatile: bool,
    fua: bool,
}

/// What was counted.
#[derive(Debug)]
pub struct Flushes {
    /// Calls of fdatasync after a write, and the flushes that the disks were sent meanwhile (by the one that got the fewest).
    pub syncs: u64,
    pub seen: u64,
    /// Writes with O_DSYNC, and the same.
    pub durable_writes: u64,
    pub seen_durable: u64,
    /// How long an fdatasync took on average, the write before it included.
    pub took: Duration,
}

impl Disk {
    /// Of a store: a folder, or a block device.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
        let mut disk = Self::default();
        // Major number 0: no device, such as memory.
        if rustix::fs::major(device) != 0 {
            let name = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
            disk.follow(&Path::new("/sys/dev/block").join(name).canonicalize()?, DEPTH_MAX)?;
        }
        Ok(disk)
    }

    /// Down to the devices that have none under them.
    fn follow(&mut self, folder: &Path, depth: usize) -> io::Result<()> {
        // A partition's flushes are counted by its disk.
        let folder = if folder.join("partition").exists() { folder.parent().unwrap_or(folder) } else { folder };
        let below: Vec<PathBuf> = match fs::read_dir(folder.join("slaves")) {
            Ok(entries) => entries.flatten().filter_map(|entry| entry.path().canonicalize().ok()).collect(),
            Err(_) => Vec::new(),
        };
        if !below.is_empty() && depth > 0 {
            return below.iter().try_for_each(|folder| self.follow(folder, depth - 1));
        }
        let read = |file: &str| fs::read_to_string(folder.join("queue").join(file)).unwrap_or_default();
        self.leaves.push(Leaf {
            name: folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            volatile: read("write_cache").trim() != "write through",
            fua: read("fua").trim() == "1",
            folder: folder.to_owned(),
        });
        Ok(())
    }

    /// Whether there is no device at all.
    pub fn is_memory(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Whether any has a cache that a loss of power empties.
    pub fn has_volatile_cache(&self) -> bool {
        self.leaves.iter().any(|leaf| leaf.volatile)
    }

    /// Whether all can be told to write past their caches.
    pub fn takes_fua(&self) -> bool {
        self.leaves.iter().all(|leaf| leaf.fua)
    }

    /// What they are called.
    pub fn names(&self) -> String {
        self.each().join(", ")
    }

    /// The same, one by one.
    pub fn each(&self) -> Vec<String> {
        self.leaves.iter().map(|leaf| leaf.name.clone()).collect()
    }

    /// Flushes so far of the device with a volatile cache that had the fewest since `before`.
    fn since(&self, before: &[u64]) -> io::Result<u64> {
        let now = self.counts()?;
        let counted = self.leaves.iter().zip(now.iter().zip(before)).filter(|(leaf, _)| leaf.volatile);
        Ok(counted.map(|(_, (now, before))| now.saturating_sub(*before)).min().unwrap_or(0))
    }

    fn counts(&self) -> io::Result<Vec<u64>> {
        let count = |leaf: &Leaf| {
            let text = fs::read_to_string(leaf.folder.join("stat"))?;
            let field = text.split_whitespace().nth(FLUSHES_FIELD).and_then(|field| field.parse().ok());
            field.ok_or_else(|| io::Error::other(format!("this kernel doesn't count the flushes of {}", leaf.name)))
        };
        self.leaves.iter().map(count).collect()
    }

    /// Sends flushes down the path that a store's take, and counts them at the other end. Of a block device nothing is written.
    pub fn measure(&self, path: &Path) -> io::Result<Flushes> {
        let mut flushes = Flushes { syncs: TIMES, seen: 0, durable_writes: 0, seen_durable: 0, took: Duration::ZERO };
        if self.is_memory() {
            return Ok(flushes);
        }
        let is_device = fs::metadata(path)?.file_type().is_block_device();
        let file = if is_device { File::open(path)? } else { unnamed(path, 0)? };
        let before = self.counts()?;
        let began = Instant::now();
        for round in 0..TIMES {
            if !is_device {
                file.write_all_at(&[u8::try_from(round).unwrap_or(1); BLOCK_SIZE as usize], 0)?;
            }
            file.sync_data()?;
        }
        flushes.took = began.elapsed() / u32::try_from(TIMES).unwrap_or(1);
        flushes.seen = self.since(&before)?;
        if !is_device {
            flushes.durable_writes = TIMES;
            flushes.seen_durable = self.durable_writes(path)?;
        }
        Ok(flushes)
    }

    /// Blocks written over and over, each to be on the disk when the call returns.
    fn durable_writes(&self, path: &Path) -> io::Result<u64> {
        let file = unnamed(path, libc::O_DIRECT | libc::O_DSYNC)?;
        let mut block = BufferPool::new(0).take(BLOCK_SIZE as usize);
        block.fill(1);
        file.write_all_at(&block, 0)?;
        file.sync_all()?;
        let before = self.counts()?;
        for _ in 0..TIMES {
            file.write_all_at(&block, 0)?;
        }
        self.since(&before)
    }

    /// One disk, for tests.
    #[cfg(test)]
    pub fn example(volatile: bool, fua: bool) -> Self {
        Self { leaves: vec![Leaf { name: "sda".into(), folder: "/nonexistent".into(), volatile, fua }] }
    }
}

/// A file without a name in this folder: nothing is left of it, whatever happens.
fn unnamed(folder: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE | flags).mode(0o600).open(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_under_devices_are_found_and_their_flushes_counted() {
        let root = tempfile::tempdir().unwrap();
        let device = |name: &str, cache: &str, flushes: u64| {
            let folder = root.path().join(name);
            fs::create_dir_all(folder.join("queue")).unwrap();
            fs::create_dir_all(folder.join("slaves")).unwrap();
            fs::write(folder.join("queue/write_cache"), cache).unwrap();
            fs::write(folder.join("queue/fua"), "1\n").unwrap();
            fs::write(folder.join("stat"), format!("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 {flushes} 17\n")).unwrap();
            folder
        };
        let (top, first, second) =
            (device("dm-0", "write back", 0), device("sda", "write back\n", 100), device("sdb", "write through\n", 7));
        let partition = first.join("sda1");
        fs::create_dir_all(&partition).unwrap();
        fs::write(partition.join("partition"), "1").unwrap();
        std::os::unix::fs::symlink(&partition, top.join("slaves/sda1")).unwrap();
        std::os::unix::fs::symlink(&second, top.join("slaves/sdb")).unwrap();
        let mut disk = Disk::default();
        disk.follow(&top, DEPTH_MAX).unwrap();
        let mut names: Vec<_> = disk.leaves.iter().map(|leaf| leaf.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!((names, disk.has_volatile_cache(), disk.takes_fua()), (vec!["sda", "sdb"], true, true));
        let before = disk.counts().unwrap();
        fs::write(first.join("stat"), "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 116 17\n").unwrap();
        assert_eq!(disk.since(&before).unwrap(), 16, "of the one that needs them");
        fs::write(first.join("stat"), "1 2 3\n").unwrap();
        assert!(disk.counts().unwrap_err().to_string().contains("sda"));
    }
}
