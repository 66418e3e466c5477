//! A store's folder: making it, locking it, and its superblock.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use uuid::Uuid;

use crate::store::StoreError;
use crate::units::StoreId;

use super::disk::sync_folder;
use super::format::{BootId, FormatError, PAGE, Superblock};
use super::replica_file::io_error;

/// The file with the superblock, which is also what is locked.
const SUPERBLOCK: &str = "carrick-store";
/// Its name until it is complete.
const SUPERBLOCK_UNFINISHED: &str = "carrick-store.new";
/// The folder of the replicas' files.
pub(super) const REPLICAS: &str = "replicas";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The boot that this is.
pub(super) fn boot_id() -> Result<BootId, StoreError> {
    let path = Path::new(BOOT_ID);
    let text = fs::read_to_string(path).map_err(|source| io_error("read", path, source))?;
    let id = Uuid::parse_str(text.trim()).map_err(|error| io_error("understand", path, io::Error::other(error)))?;
    Ok(BootId(id.into_bytes()))
}

/// Makes an empty store. The superblock gets its name last, so that a crash leaves a folder that is no store yet and can be
/// formatted again.
pub(super) fn format(path: &Path) -> Result<StoreId, StoreError> {
    let failed = |action| move |source| io_error(action, path, source);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make"))?;
    check_empty(path)?;
    let replicas = path.join(REPLICAS);
    match fs::DirBuilder::new().mode(0o700).create(&replicas) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => return Err(io_error("make", &replicas, source)),
        _ => {}
    }
    let superblock = Superblock { id: StoreId::random() };
    let unfinished = path.join(SUPERBLOCK_UNFINISHED);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.write_all(&[superblock.encode(), superblock.encode()].concat())?;
        file.sync_all()
    };
    write().map_err(|source| io_error("write", &unfinished, source))?;
    sync_folder(&replicas).map_err(|source| io_error("sync", &replicas, source))?;
    fs::rename(&unfinished, path.join(SUPERBLOCK)).map_err(failed("rename a file in"))?;
    sync_folder(path).map_err(failed("sync"))?;
    if let Some(parent) = path.canonicalize().map_err(failed("find"))?.parent() {
        sync_folder(parent).map_err(|source| io_error("sync", parent, source))?;
    }
    Ok(superblock.id)
}

fn check_empty(path: &Path) -> Result<(), StoreError> {
    let not_a_store = |reason: String| StoreError::NotAStore { path: path.to_path_buf(), reason };
    let failed = |source| io_error("list", path, source);
    for entry in fs::read_dir(path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        match name.to_str() {
            // A fresh file system, and what an interrupted `format` leaves.
            Some("lost+found" | SUPERBLOCK_UNFINISHED) => {}
            Some(REPLICAS) if fs::read_dir(path.join(REPLICAS)).map_err(failed)?.next().is_none() => {}
            Some(SUPERBLOCK) => return Err(not_a_store("it is one already, and formatting would lose it".to_owned())),
            _ => return Err(not_a_store(format!("{} is in it; give an empty folder", name.to_string_lossy()))),
        }
    }
    Ok(())
}

/// Takes the store for this process, for as long as the file is open, and reads who it is.
pub(super) fn lock(path: &Path) -> Result<(File, Superblock), StoreError> {
    let place = path.join(SUPERBLOCK);
    let not_a_store = |reason: String| StoreError::NotAStore { path: path.to_path_buf(), reason };
    let mut file = match OpenOptions::new().read(true).write(true).open(&place) {
        Ok(file) => file,
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            return Err(not_a_store(format!("there is no file {SUPERBLOCK} in it; format it first")));
        }
        Err(source) => return Err(io_error("open", &place, source)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(StoreError::InUse(path.to_path_buf())),
        Err(errno) => return Err(io_error("lock", &place, errno.into())),
    }
    let mut bytes = Vec::new();
    Read::by_ref(&mut file).take(2 * PAGE as u64).read_to_end(&mut bytes).map_err(|source| io_error("read", &place, source))?;
    let copy = bytes.get(PAGE..).unwrap_or_default();
    match Superblock::decode(&bytes).or_else(|first| Superblock::decode(copy).map_err(|_| first)) {
        Ok(superblock) => Ok((file, superblock)),
        Err(FormatError::Magic | FormatError::Short { .. }) => Err(not_a_store(format!("{SUPERBLOCK} is something else"))),
        Err(error) => Err(error.at(&place)),
    }
}
