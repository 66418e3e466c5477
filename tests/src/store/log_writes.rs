//! dm-log-writes: a device that remembers every write to it and what was flushed when, and a replayer that makes what a loss of
//! power would have left. The format of the log is in the kernel's Documentation/admin-guide/device-mapper/log-writes.rst: a
//! superblock, then entries, each a sector with its data behind it. Writes are in the log only from the flush on that made them
//! durable, so everything before a flush is what the disk promised to keep.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use crate::site::{path_text, run};

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// Bytes moved at a time.
const CHUNK: u64 = 1 << 20;
/// What discarded blocks hold afterwards: nobody may rely on zeros.
const DISCARDED: u8 = 0xa5;
const NAME: &str = "carrick-log-writes";

/// The device, removed when dropped.
pub struct LogWrites {
    path: PathBuf,
}

impl LogWrites {
    /// A device that passes everything on to `data`, of so many bytes, and logs it on `log`.
    pub fn new(data: &Path, log: &Path, bytes: u64) -> anyhow::Result<Self> {
        let table = format!("0 {} log-writes {} {}", bytes / 512, path_text(data)?, path_text(log)?);
        run("dmsetup", &["create", NAME, "--table", &table])?;
        let mut device = Self { path: PathBuf::new() };
        // The kernel's own name: /dev/mapper is udev's work, and there may be none.
        let node = run("dmsetup", &["info", "--columns", "--noheadings", "-o", "blkdevname", NAME])?;
        device.path = Path::new("/dev").join(node.trim());
        Ok(device)
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Remembers a word in the log, after everything that was flushed so far.
    pub fn mark(&self, word: &str) -> anyhow::Result<()> {
        run("dmsetup", &["message", NAME, "0", "mark", word]).map(|_| ())
    }
}

impl Drop for LogWrites {
    fn drop(&mut self) {
        // It may be held open for a moment by a process that was killed.
        let _ = run("dmsetup", &["remove", "--retry", NAME]);
    }
}

/// What was logged.
pub struct Log {
    file: File,
    entries: Vec<Entry>,
}

/// One of it: a write, a discard, a flush or a mark. In bytes.
struct Entry {
    start: u64,
    length: u64,
    flags: u64,
    data_at: u64,
    mark: String,
}

impl Log {
    /// Reads a log that is complete: the device is gone.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path)?;
        let head = words(&file, 0)?;
        ensure!(head[0] == MAGIC && head[1] == VERSION, "{} has no log of writes", path.display());
        let (count, sector) = (head[2], head[3] & 0xffff_ffff);
        let mut entries = Vec::new();
        let mut at = sector;
        for _ in 0..count {
            let [start, length, flags, mark_length] = words(&file, at)?;
            let mut mark = vec![0; if flags & MARK == 0 { 0 } else { usize::try_from(mark_length)? }];
            file.read_exact_at(&mut mark, at + 32)?;
            let entry = Entry {
                start: start * sector,
                length: length * sector,
                flags,
                data_at: at + sector,
                mark: String::from_utf8_lossy(&mark).trim_end_matches('\0').to_owned(),
            };
            at = entry.data_at + if flags & DISCARD == 0 { entry.length } else { 0 };
            entries.push(entry);
        }
        Ok(Self { file, entries })
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether what is before this entry, and itself, is durable when it has been done.
    pub fn is_flush(&self, index: usize) -> bool {
        self.entries[index].flags & (FLUSH | FUA) != 0
    }

    /// The word, if the entry is a mark.
    pub fn mark(&self, index: usize) -> Option<&str> {
        let entry = &self.entries[index];
        (entry.flags & MARK != 0).then_some(entry.mark.as_str())
    }

    /// Does to a disk what this entry did.
    pub fn apply(&self, index: usize, disk: &File) -> anyhow::Result<()> {
        let Entry { start, length, flags, data_at, .. } = self.entries[index];
        let mut bytes = vec![DISCARDED; usize::try_from(length.min(CHUNK))?];
        for offset in (0..length).step_by(usize::try_from(CHUNK)?) {
            let part = &mut bytes[..usize::try_from(CHUNK.min(length - offset))?];
            if flags & DISCARD == 0 {
                self.file.read_exact_at(part, data_at + offset)?;
            }
            disk.write_all_at(part, start + offset).with_context(|| format!("replaying entry {index}"))?;
        }
        Ok(())
    }
}

/// The four numbers with which superblock and entries begin.
fn words(file: &File, at: u64) -> anyhow::Result<[u64; 4]> {
    let mut bytes = [0; 32];
    file.read_exact_at(&mut bytes, at).with_context(|| format!("the log ends before {at}"))?;
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    }
    Ok(words)
}
