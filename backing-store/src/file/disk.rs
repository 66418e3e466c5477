//! The only place of the file store that touches the system. A [`Disk`] is one replica's file, a [`Folder`] holds them. Tests put
//! an unreliable implementation in their place.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, fdatasync, seek, statvfs};
use rustix::io::{Errno, ReadWriteFlags, pread, preadv2, pwrite, pwritev2};

/// One file. All calls may come from several threads at once. Reads and writes may be short, as the system's are.
pub(super) trait Disk: Debug + Send + Sync {
    /// Reads, and waits for the device if it must.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;
    /// Reads what is in memory already, else fails with `WouldBlock` or `Unsupported` at once.
    fn read_cached(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;
    /// Writes to the page cache: a kill of the process no longer undoes it, a loss of power may.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize>;
    /// Writes these bytes to stable media. Says nothing about others.
    fn write_durably(&self, bytes: &[u8], at: u64) -> io::Result<usize>;
    /// Puts everything written before on stable media. After a failure nothing is known about what was written since the last
    /// success, and calling it again would lie.
    fn sync(&self) -> io::Result<()>;
    /// Makes a range read as zeros and keeps its space. `Unsupported` if the file system can't.
    fn zero(&self, at: u64, length: u64) -> io::Result<()>;
    /// The first place at or after `at` that may hold anything but zeros.
    fn next_data(&self, at: u64) -> io::Result<Option<u64>>;
    /// How long the file is.
    fn length(&self) -> io::Result<u64>;
}

/// Room of a file system, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    pub(super) capacity: u64,
    pub(super) free: u64,
}

/// The folder of the replicas. Names are plain file names.
pub(super) trait Folder: Debug + Send + Sync {
    /// Opens a file.
    fn open(&self, name: &str) -> io::Result<Box<dyn Disk>>;
    /// Makes a new file of zeros with all its space reserved. `Unsupported` if the file system can't reserve.
    fn create(&self, name: &str, length: u64) -> io::Result<Box<dyn Disk>>;
    /// Gives a file another name, over any that has it. Durable after the next `sync`.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file. Durable after the next `sync`.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// The names of all files.
    fn names(&self) -> io::Result<Vec<String>>;
    /// Puts names on stable media.
    fn sync(&self) -> io::Result<()>;
    /// How much room there is.
    fn space(&self) -> io::Result<Space>;
    /// Where it is, for messages.
    fn path(&self) -> &Path;
}

#[derive(Debug)]
struct SystemDisk(File);

/// Longest single write, in bytes. The page cache makes folios as long as the write that fills them, and ext4 walks all blocks of
/// a folio for each later write into it, however small (`ext4_block_write_begin`, Linux 6.16 and newer): after writes of 1 MiB,
/// two thirds of the time of 4 KiB writes went there.
const WRITE_MAX: usize = 16 << 10;

fn retried<T>(mut call: impl FnMut() -> Result<T, Errno>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP) => return Err(io::ErrorKind::Unsupported.into()),
            other => return Ok(other?),
        }
    }
}

impl Disk for SystemDisk {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        retried(|| pread(&self.0, &mut *buffer, at))
    }

    fn read_cached(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        retried(|| preadv2(&self.0, &mut [IoSliceMut::new(buffer)], at, ReadWriteFlags::NOWAIT))
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(WRITE_MAX)];
        retried(|| pwrite(&self.0, part, at))
    }

    fn write_durably(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        retried(|| pwritev2(&self.0, &[IoSlice::new(bytes)], at, ReadWriteFlags::DSYNC))
    }

    fn sync(&self) -> io::Result<()> {
        // Not repeated when interrupted, unlike the others: a sync that did not succeed has failed.
        Ok(fdatasync(&self.0)?)
    }

    fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        retried(|| fallocate(&self.0, FallocateFlags::ZERO_RANGE, at, length))
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        match seek(&self.0, SeekFrom::Data(at)) {
            Ok(place) => Ok(Some(place)),
            Err(Errno::NXIO) => Ok(None),
            Err(Errno::INVAL) => Ok(Some(at)),
            Err(errno) => Err(errno.into()),
        }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

/// A folder of a real file system.
#[derive(Debug)]
pub(super) struct SystemFolder {
    path: PathBuf,
}

impl SystemFolder {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }
}

/// No reading ahead: it would fill the page cache with long folios, too (see [`WRITE_MAX`]). Whoever reads in sequence through a
/// volume reads ahead there.
fn expect_random(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, Advice::Random)?)
}

/// Puts the names in a folder on stable media.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The room of the file system at `path`.
pub(super) fn space_at(path: &Path) -> io::Result<Space> {
    let found = statvfs(path)?;
    Ok(Space { capacity: found.f_blocks.saturating_mul(found.f_frsize), free: found.f_bavail.saturating_mul(found.f_frsize) })
}

impl Folder for SystemFolder {
    fn open(&self, name: &str) -> io::Result<Box<dyn Disk>> {
        let file = OpenOptions::new().read(true).write(true).open(self.path.join(name))?;
        expect_random(&file)?;
        Ok(Box::new(SystemDisk(file)))
    }

    fn create(&self, name: &str, length: u64) -> io::Result<Box<dyn Disk>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(self.path.join(name))?;
        expect_random(&file)?;
        retried(|| fallocate(&file, FallocateFlags::empty(), 0, length))?;
        Ok(Box::new(SystemDisk(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn sync(&self) -> io::Result<()> {
        sync_folder(&self.path)
    }

    fn space(&self) -> io::Result<Space> {
        space_at(&self.path)
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
