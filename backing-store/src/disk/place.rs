//! [`StorePlace`]: where a store lies: the file `blocks` in a folder, or a block device. It makes them, locks them, and refuses
//! what might be somebody's data. What is in the blocks it doesn't know, but for the first bytes of a store.
//!
//! A folder's store is made as `blocks.new`, and gets its name from [`StorePlace::publish`] when its superblock is durable. So a
//! crash leaves a folder that is no store yet and can be formatted again.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, statvfs};
use rustix::io::Errno;

use crate::buffer::BufferPool;
use crate::epoch_map::MAGIC;
use crate::store::StoreError;
use crate::units::{BLOCK_SIZE, ByteLength};

use super::ring::RingDisk;
use super::{Disk, DiskBlock, DiskDone, DiskRequest, DiskWork, IoId};

/// Smallest store, in bytes: with less, the store's own structures take most of it.
pub const STORE_MIN: ByteLength = ByteLength::new(64 << 20);

/// The file that is the store.
const BLOCKS: &str = "blocks";
/// Its name until it is one.
const BLOCKS_UNFINISHED: &str = "blocks.new";
/// What a store of the format before this one has in its folder.
const OLD_SUPERBLOCK: &str = "carrick-store";
/// Sizes are multiples of this, and so much of a device must be empty. In bytes.
const UNIT: u64 = 1 << 20;
/// How many writes of [`UNIT`] are under way while a store is written over with zeros: enough to keep a disk busy.
const PREWRITES: u64 = 8;

/// How to make a store.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlaceOptions {
    /// How large it becomes, rounded down to whole MiB; at least [`STORE_MIN`]. `None`: as large as the file system or the
    /// device.
    pub size: Option<ByteLength>,
    /// Whether all of it is written over with zeros at once: then no space can be wanting later, and no first write is slow.
    pub prewrite: bool,
    /// Whether a device that isn't empty is taken all the same. Its first MiB is cleared.
    pub force: bool,
}

/// What a store is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading and writing, by nobody else.
    Exclusive,
    /// For looking at, also while it is served. Every write fails.
    ReadOnly,
}

/// Where a store lies, or will.
#[derive(Clone, Debug)]
pub struct StorePlace {
    path: PathBuf,
}

enum Kind {
    Missing,
    Folder,
    Device,
}

impl StorePlace {
    /// The place with this path: of a folder or a block device.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> StoreError + use<'_> {
        move |source| StoreError::Io { action, path: self.path.clone(), source }
    }

    fn not_a_store(&self, reason: &str) -> StoreError {
        StoreError::NotAStore { path: self.path.clone(), reason: reason.to_owned() }
    }

    fn occupied(&self, reason: impl Into<String>) -> StoreError {
        StoreError::Occupied { path: self.path.clone(), reason: reason.into() }
    }

    fn kind(&self) -> Result<Kind, StoreError> {
        match fs::metadata(&self.path) {
            Ok(found) if found.is_dir() && self.path.join(OLD_SUPERBLOCK).exists() => Err(StoreError::OldFormat(self.path.clone())),
            Ok(found) if found.is_dir() => Ok(Kind::Folder),
            Ok(found) if found.file_type().is_block_device() => Ok(Kind::Device),
            Ok(_) => Err(self.not_a_store("it is neither a folder nor a block device")),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(Kind::Missing),
            Err(source) => Err(self.failed("look at")(source)),
        }
    }

    /// Makes the disk of a new store, and locks it. It holds zeros or, on a device, what was there. In a folder (made if it is
    /// missing) it is not a store before [`StorePlace::publish`].
    ///
    /// # Errors
    /// [`StoreError::Occupied`] or [`StoreError::OldFormat`] if there is something already; [`StoreError::StoreSize`];
    /// [`StoreError::NoSpace`] if all of it is to be written and there isn't enough; [`StoreError::InUse`],
    /// [`StoreError::DeviceInUse`]; I/O.
    pub fn create(&self, options: &PlaceOptions) -> Result<RingDisk, StoreError> {
        let kind = self.kind()?;
        if let Some(size) = options.size {
            self.check_size(size)?;
        }
        let mut disk = match kind {
            Kind::Missing | Kind::Folder => self.create_file(options)?,
            Kind::Device => self.create_on_device(options)?,
        };
        if options.prewrite {
            prewrite(&mut disk).map_err(self.failed("write zeros to"))?;
        }
        Ok(disk)
    }

    /// Makes a folder's new disk a store, durably, once its superblock is. Nothing is to be done for a device.
    ///
    /// # Errors
    /// I/O.
    pub fn publish(&self) -> Result<(), StoreError> {
        if matches!(self.kind()?, Kind::Device) {
            return Ok(());
        }
        let unfinished = self.path.join(BLOCKS_UNFINISHED);
        // Its length is as important as its content, and no disk work syncs that for certain.
        File::open(&unfinished).and_then(|file| file.sync_all()).map_err(self.failed("sync the new store in"))?;
        fs::rename(unfinished, self.path.join(BLOCKS)).map_err(self.failed("name the new store in"))?;
        let folder = self.path.canonicalize().map_err(self.failed("find"))?;
        for folder in [Some(folder.as_path()), folder.parent()].into_iter().flatten() {
            let sync = || File::open(folder)?.sync_all();
            sync().map_err(|source| StoreError::Io { action: "sync", path: folder.to_path_buf(), source })?;
        }
        Ok(())
    }

    /// Opens the disk of a store. Whether it is one, its first block tells.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] if it can't be one; [`StoreError::OldFormat`]; [`StoreError::InUse`], [`StoreError::DeviceInUse`]; I/O.
    pub fn open(&self, access: Access) -> Result<RingDisk, StoreError> {
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::Exclusive);
        let disk = match self.kind()? {
            Kind::Missing => return Err(self.not_a_store("there is no such folder or device; format it first")),
            Kind::Device => self.open_device(&mut options, access)?,
            Kind::Folder => {
                let file = match open_direct(&mut options, &self.path.join(BLOCKS), 0) {
                    Err(source) if source.kind() == io::ErrorKind::NotFound => return Err(self.not_a_store(self.what_instead())),
                    opened => opened.map_err(self.failed("open the file blocks in"))?,
                };
                if !file.metadata().map_err(self.failed("look at"))?.is_file() {
                    return Err(self.not_a_store("blocks is not a file"));
                }
                if access == Access::Exclusive {
                    self.lock(&file)?;
                }
                self.disk(file)?
            }
        };
        if disk.blocks() == 0 {
            return Err(self.not_a_store("it is empty; format it first"));
        }
        Ok(disk)
    }

    /// Why there is no store in the folder.
    fn what_instead(&self) -> &'static str {
        if self.path.join(BLOCKS_UNFINISHED).exists() {
            "its formatting was interrupted; format it again"
        } else {
            "there is no file blocks in it; format it first"
        }
    }

    fn disk(&self, file: File) -> Result<RingDisk, StoreError> {
        RingDisk::new(file).map_err(self.failed("set up io_uring for"))
    }

    fn lock(&self, file: &File) -> Result<(), StoreError> {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(StoreError::InUse(self.path.clone())),
            Err(errno) => Err(self.failed("lock")(errno.into())),
        }
    }

    fn check_size(&self, given: ByteLength) -> Result<(), StoreError> {
        if given < STORE_MIN { Err(self.bad_size(given, format!("the smallest store is of {STORE_MIN} bytes"))) } else { Ok(()) }
    }

    fn bad_size(&self, given: ByteLength, reason: String) -> StoreError {
        StoreError::StoreSize { path: self.path.clone(), given, reason }
    }

    fn create_file(&self, options: &PlaceOptions) -> Result<RingDisk, StoreError> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path).map_err(self.failed("make"))?;
        self.check_free()?;
        let found = statvfs(&self.path).map_err(|errno| self.failed("measure")(errno.into()))?;
        let size = options.size.unwrap_or(ByteLength::new(found.f_blocks.saturating_mul(found.f_frsize)));
        self.check_size(size)?;
        let length = size.get() / UNIT * UNIT;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        if options.prewrite && free < length {
            let (needed, free) = (ByteLength::new(length), ByteLength::new(free));
            return Err(StoreError::NoSpace { path: self.path.clone(), needed, free });
        }
        let path = self.path.join(BLOCKS_UNFINISHED);
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = open_direct(&mut how, &path, 0).map_err(self.failed("make a file in"))?;
        self.lock(&file)?;
        // Whoever had the lock may have published this very file before we got it.
        let same = |named: fs::Metadata, ours: fs::Metadata| (named.dev(), named.ino()) == (ours.dev(), ours.ino());
        let is_ours = fs::metadata(&path).and_then(|named| Ok(same(named, file.metadata()?)));
        if !is_ours.map_err(self.failed("look at the new store in"))? {
            return Err(StoreError::InUse(self.path.clone()));
        }
        match file.set_len(0).and_then(|()| file.set_len(length)) {
            Err(source) if source.raw_os_error() == Some(libc::EFBIG) => {
                return Err(self.bad_size(size, "a file can't be so long in this file system; give a smaller size".to_owned()));
            }
            result => result.map_err(self.failed("size the new store in"))?,
        }
        self.disk(file)
    }

    /// Refuses a folder with anything in it.
    fn check_free(&self) -> Result<(), StoreError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(self.failed("list"))? {
            names.push(entry.map_err(self.failed("list"))?.file_name());
        }
        if names.iter().any(|name| name == BLOCKS) {
            return Err(self.occupied("it is a Carrick store already, and formatting would lose it"));
        }
        // A fresh file system, and what an interrupted format leaves.
        match names.iter().find(|name| *name != "lost+found" && *name != BLOCKS_UNFINISHED) {
            Some(name) => Err(self.occupied(format!("{} is in it; give an empty folder", name.to_string_lossy()))),
            None => Ok(()),
        }
    }

    fn open_device(&self, options: &mut OpenOptions, access: Access) -> Result<RingDisk, StoreError> {
        // Of a device, the exclusive opening is what keeps others off: mounts as well as our own kind.
        let flags = if access == Access::Exclusive { libc::O_EXCL } else { 0 };
        let file = match open_direct(options, &self.path, flags) {
            Err(source) if source.raw_os_error() == Some(libc::EBUSY) => return Err(StoreError::DeviceInUse(self.path.clone())),
            opened => opened.map_err(self.failed("open"))?,
        };
        if access == Access::Exclusive {
            // The lock asks udev not to probe it. It may be doing so right now, with a lock of its own, and that is no harm.
            let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
        }
        self.disk(file)
    }

    fn create_on_device(&self, options: &PlaceOptions) -> Result<RingDisk, StoreError> {
        let mut disk = self.open_device(OpenOptions::new().read(true).write(true), Access::Exclusive)?;
        let found = ByteLength::new(disk.blocks() * u64::from(BLOCK_SIZE));
        let size = options.size.unwrap_or(found);
        self.check_size(size)?;
        if size > found {
            return Err(self.bad_size(size, format!("the device has {found} bytes")));
        }
        if !options.force {
            self.check_empty(&mut disk)?;
        } else if !options.prewrite {
            write_zeros(&mut disk, 1).map_err(self.failed("clear the beginning of"))?;
        }
        disk.limit(size.get() / UNIT * (UNIT / u64::from(BLOCK_SIZE)));
        Ok(disk)
    }

    /// Refuses a device with anything at its beginning: a wrong name must not cost a file system.
    fn check_empty(&self, disk: &mut RingDisk) -> Result<(), StoreError> {
        let buffer = BufferPool::new(0).take(UNIT as usize);
        disk.submit(DiskRequest { id: IoId(0), work: DiskWork::Read { at: DiskBlock::new(0), buffer } });
        let begin = finish_one(disk).map_err(self.failed("read"))?.result.map_err(self.failed("read"))?;
        match begin {
            Some(begin) if begin.starts_with(&MAGIC) => Err(self.occupied("it is a Carrick store already, and formatting would lose it")),
            Some(begin) if begin.iter().any(|byte| *byte != 0) => {
                Err(self.occupied("its first MiB is not empty: if nobody needs what is on it, use carrick-replica format --force"))
            }
            _ => Ok(()),
        }
    }
}

/// Opens a file past the page cache, if its file system can.
pub(super) fn open_direct(options: &mut OpenOptions, path: &Path, flags: i32) -> io::Result<File> {
    match options.custom_flags(flags | libc::O_DIRECT).open(path) {
        Err(source) if source.raw_os_error() == Some(libc::EINVAL) => options.custom_flags(flags).open(path),
        opened => opened,
    }
}

/// Waits for the end of something that was submitted.
fn finish_one(disk: &mut RingDisk) -> io::Result<DiskDone> {
    let mut done = Vec::with_capacity(1);
    loop {
        disk.wait()?;
        disk.reap(&mut done);
        if let Some(done) = done.pop() {
            return Ok(done);
        }
    }
}

/// Writes zeros over all of a disk.
fn prewrite(disk: &mut RingDisk) -> io::Result<()> {
    let units = disk.blocks() * u64::from(BLOCK_SIZE) / UNIT;
    write_zeros(disk, units)
}

/// Writes zeros over the first so many units of a disk, durably.
fn write_zeros(disk: &mut RingDisk, units: u64) -> io::Result<()> {
    let mut buffer = BufferPool::new(0).take(UNIT as usize);
    buffer.fill(0);
    let zeros = buffer.share();
    let mut done = Vec::new();
    let (mut begun, mut ended) = (0, 0);
    while ended < units {
        while begun < units && begun - ended < PREWRITES {
            let at = DiskBlock::new(begun * (UNIT / u64::from(BLOCK_SIZE)));
            disk.submit(DiskRequest { id: IoId(begun), work: DiskWork::Write { at, pieces: vec![zeros.clone()] } });
            begun += 1;
        }
        disk.wait()?;
        disk.reap(&mut done);
        for done in done.drain(..) {
            done.result?;
            ended += 1;
        }
    }
    disk.submit(DiskRequest { id: IoId(begun), work: DiskWork::Sync });
    finish_one(disk)?.result.map(|_| ())
}

#[cfg(test)]
mod tests;
