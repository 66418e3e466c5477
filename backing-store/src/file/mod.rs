//! [`FileStore`]: replicas in preallocated files of a file system, one file per replica. The format is described byte by byte, with
//! the argument why each crash is survived, in `docs/store-format.md`.
//!
//! | Module | What it is |
//! |---|---|
//! | [`mod@format`] | the bytes; no I/O |
//! | `disk` | the system calls, behind traits |
//! | `replica_file` | where and in which order one file is read and written |
//! | `recovery` | what a file means after a crash |
//! | `replica` | one replica in service: position, durable state, poison |
//! | `order` | reads and writes that must wait for each other |
//! | `worker` | the threads |
//! | `setup` | making, locking and reading the superblock of a store |

mod disk;
pub mod format;
mod order;
mod recovery;
mod replica;
mod replica_file;
mod setup;
mod worker;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::store::{Completion, OpenedReplica, Operation, ReplicaSpec, ReplicaStore, SnapshotInfo, StoreError, StoreUsage, Token};
use crate::units::{ByteLength, SnapshotId, StoreId, VolumeId};

use disk::{Folder, SystemFolder};
use format::{BootId, Header, Layout};
use order::OperationId;
use replica::Replica;
use replica_file::{ReplicaFile, io_error};
use worker::{ReadJob, SyncJob, Workers, WriteJob};

/// The most operations between `submit` and `reap`. The session keeps far below it; more is a leak.
const MAX_QUEUED: usize = 65_536;
/// What this store is not made for.
const NO_SNAPSHOTS: &str = "keep epochs and snapshots in files";
/// The end of the name of a file that is being made. One that is found at a start was never finished.
const UNFINISHED: &str = ".new";

/// How new replicas are laid out, and which boot this is.
#[derive(Clone, Copy, Debug)]
struct Options {
    boot: BootId,
    log_records: u64,
    data_alignment: u64,
}

/// A file that is here but can't be served.
#[derive(Debug)]
struct Unusable {
    reserved: u64,
    error: StoreError,
}

/// A store in a folder. See the module's text.
///
/// Dropping it ends it like [`FileStore::close`], but for the answer.
#[derive(Debug)]
pub struct FileStore {
    id: StoreId,
    path: PathBuf,
    folder: Box<dyn Folder>,
    options: Options,
    replicas: BTreeMap<VolumeId, Arc<Replica>>,
    unusable: BTreeMap<VolumeId, Unusable>,
    workers: Workers,
    last_id: u64,
    in_flight: usize,
    closed: bool,
    /// Keeps other processes out as long as it is open.
    _lock: Option<File>,
}

impl FileStore {
    /// Makes an empty store in a folder that is empty or not there (`lost+found` may be in it). Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] if something else is there; I/O.
    pub fn format(path: impl AsRef<Path>) -> Result<StoreId, StoreError> {
        setup::format(path.as_ref())
    }

    /// Opens a store, brings its replicas in order and starts its threads. After a loss of power this reads every block of
    /// every replica.
    ///
    /// A replica that can't be opened does not keep the others from being served: see [`FileStore::unusable`].
    ///
    /// # Errors
    /// [`StoreError::InUse`] if it is open already; [`StoreError::NotAStore`], [`StoreError::UnknownFormat`],
    /// [`StoreError::UnknownFeatures`], [`StoreError::Damaged`]; I/O.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let options = Options { boot: setup::boot_id()?, log_records: format::LOG_RECORDS, data_alignment: format::DATA_ALIGNMENT };
        Self::open_with(path.as_ref(), options)
    }

    fn open_with(path: &Path, options: Options) -> Result<Self, StoreError> {
        let (lock, superblock) = setup::lock(path)?;
        let folder = SystemFolder::new(path.join(setup::REPLICAS));
        Self::open_folder(path, Box::new(folder), superblock.id, options, Some(lock))
    }

    fn open_folder(path: &Path, folder: Box<dyn Folder>, id: StoreId, options: Options, lock: Option<File>) -> Result<Self, StoreError> {
        let workers = Workers::start().map_err(|source| io_error("start the threads of", path, source))?;
        let mut store = Self {
            id,
            path: path.to_path_buf(),
            folder,
            options,
            replicas: BTreeMap::new(),
            unusable: BTreeMap::new(),
            workers,
            last_id: 0,
            in_flight: 0,
            closed: false,
            _lock: lock,
        };
        store.open_replicas()?;
        Ok(store)
    }

    fn open_replicas(&mut self) -> Result<(), StoreError> {
        let names = self.folder.names().map_err(|source| io_error("list", self.folder.path(), source))?;
        for name in names {
            if name.ends_with(UNFINISHED) {
                self.folder.remove(&name).map_err(|source| io_error("remove", &self.folder.path().join(&name), source))?;
                continue;
            }
            let Some(volume) = name.parse().ok().filter(|volume: &VolumeId| volume.to_string() == name) else {
                tracing::warn!(name, "a file in the replicas' folder is no replica");
                continue;
            };
            match Replica::open(&*self.folder, &name, volume, self.options.boot) {
                Ok(replica) => {
                    self.replicas.insert(volume, Arc::new(replica));
                }
                Err(error) => {
                    tracing::error!(%volume, %error, "a replica can't be opened; the others are served");
                    let reserved = self.folder.open(&name).and_then(|disk| disk.length()).unwrap_or(0);
                    self.unusable.insert(volume, Unusable { reserved, error });
                }
            }
        }
        Ok(())
    }

    /// The replicas that are here but can't be served, and why. They can be deleted.
    pub fn unusable(&self) -> impl Iterator<Item = (VolumeId, &StoreError)> {
        self.unusable.iter().map(|(volume, unusable)| (*volume, &unusable.error))
    }

    /// Finishes what is queued, puts everything on stable media and notes that nothing is in doubt. Completions that were not
    /// reaped are lost.
    ///
    /// # Errors
    /// The first failure. The replicas that it did not concern are closed nevertheless.
    pub fn close(mut self) -> Result<(), StoreError> {
        self.close_all()
    }

    fn close_all(&mut self) -> Result<(), StoreError> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        self.workers.stop(false);
        self.replicas.values().map(|replica| replica.close()).fold(Ok(()), Result::and)
    }

    /// Ends the store as a kill would: what is queued is dropped, and nothing is put in order.
    #[cfg(test)]
    fn abandon(mut self) {
        self.closed = true;
        self.workers.stop(true);
    }

    fn make_replica(&self, spec: ReplicaSpec, header: Header) -> Result<Replica, StoreError> {
        let name = spec.volume.to_string();
        let unfinished = format!("{name}{UNFINISHED}");
        let path = self.folder.path().join(&name);
        let made = self.folder.create(&unfinished, header.layout.file_length().get());
        let disk = made.map_err(|source| self.creation_error(source, header.layout.file_length()))?;
        let (file, slot) = ReplicaFile::create(disk, path.clone(), header, self.options.boot)?;
        self.folder.rename(&unfinished, &name).map_err(|source| io_error("rename", &path, source))?;
        self.folder.sync().map_err(|source| io_error("sync", self.folder.path(), source))?;
        let recovered = recovery::Recovered { slot, position: slot.base, last_logged: slot.base };
        Ok(Replica::new(file, &recovered))
    }

    fn creation_error(&self, source: io::Error, needed: ByteLength) -> StoreError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge | io::ErrorKind::QuotaExceeded => {
                let free = self.folder.space().map_or(ByteLength::ZERO, |space| ByteLength::new(space.free));
                StoreError::NoSpace { path: self.path.clone(), needed, free }
            }
            io::ErrorKind::Unsupported => {
                StoreError::Unsupported { path: self.path.clone(), action: "reserve the space of a file (fallocate)" }
            }
            _ => io_error("make a replica in", self.folder.path(), source),
        }
    }

    /// Removes a file that was never finished.
    fn remove_unfinished(&self, volume: VolumeId) {
        match self.folder.remove(&format!("{volume}{UNFINISHED}")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%volume, %error, "an unfinished replica file is left until the next start");
            }
            _ => {}
        }
    }
}

/// An error again, for a caller that asks again.
fn again(error: &StoreError, path: PathBuf) -> StoreError {
    match error {
        StoreError::UnknownFormat { path, found, known } => StoreError::UnknownFormat { path: path.clone(), found: *found, known: *known },
        StoreError::UnknownFeatures { path, features } => StoreError::UnknownFeatures { path: path.clone(), features: *features },
        StoreError::Io { action, path, source } => {
            let source = source.raw_os_error().map_or_else(|| source.kind().into(), io::Error::from_raw_os_error);
            StoreError::Io { action, path: path.clone(), source }
        }
        StoreError::Damaged { path, reason } => StoreError::Damaged { path: path.clone(), reason: reason.clone() },
        other => StoreError::Damaged { path, reason: other.to_string() },
    }
}

impl ReplicaStore for FileStore {
    fn id(&self) -> StoreId {
        self.id
    }

    fn create(&mut self, spec: ReplicaSpec) -> Result<(), StoreError> {
        let (volume, wanted) = (spec.volume, spec.size.bytes());
        if let Some(replica) = self.replicas.get(&volume) {
            let found = replica.spec().size.bytes();
            return if found == wanted { Ok(()) } else { Err(StoreError::Conflict { volume, found, wanted }) };
        }
        if let Some(unusable) = self.unusable.get(&volume) {
            return Err(again(&unusable.error, self.folder.path().join(volume.to_string())));
        }
        let layout = Layout::new(spec.size, self.options.log_records, self.options.data_alignment)
            .map_err(|_| StoreError::Misuse { volume, reason: "a file of this size is not possible" })?;
        let space = self.folder.space().map_err(|source| io_error("ask the free space of", &self.path, source))?;
        let needed = layout.file_length();
        if needed.get() > space.free {
            return Err(StoreError::NoSpace { path: self.path.clone(), needed, free: ByteLength::new(space.free) });
        }
        self.remove_unfinished(volume);
        match self.make_replica(spec, Header { volume, size: spec.size, layout }) {
            Ok(replica) => {
                self.replicas.insert(volume, Arc::new(replica));
                Ok(())
            }
            Err(error) => {
                self.remove_unfinished(volume);
                Err(error)
            }
        }
    }

    fn clone_snapshot(&mut self, _origin: VolumeId, _snapshot: SnapshotId, _spec: ReplicaSpec) -> Result<(), StoreError> {
        Err(StoreError::Unsupported { path: self.path.clone(), action: NO_SNAPSHOTS })
    }

    fn delete(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        let name = volume.to_string();
        match self.folder.remove(&name) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &self.folder.path().join(name), source));
            }
            _ => {}
        }
        // Operations in flight hold the file and end on it, though it has no name any more.
        self.replicas.remove(&volume);
        self.unusable.remove(&volume);
        self.folder.sync().map_err(|source| io_error("sync", self.folder.path(), source))
    }

    fn replicas(&self) -> Vec<OpenedReplica> {
        self.replicas.values().map(|replica| replica.opened()).collect()
    }

    fn snapshots(&self, volume: VolumeId) -> Result<Vec<SnapshotInfo>, StoreError> {
        self.replicas.get(&volume).map(|_| Vec::new()).ok_or(StoreError::UnknownVolume(volume))
    }

    fn usage(&self) -> Result<StoreUsage, StoreError> {
        let space = self.folder.space().map_err(|source| io_error("ask the free space of", &self.path, source))?;
        let served = self.replicas.values().map(|replica| replica.reserved());
        let used = served.chain(self.unusable.values().map(|unusable| unusable.reserved)).sum();
        // The files have all their space from the beginning, so that nothing of what is free is promised.
        Ok(StoreUsage {
            capacity: ByteLength::new(space.capacity),
            free: ByteLength::new(space.free),
            used: ByteLength::new(used),
            ..StoreUsage::default()
        })
    }

    fn submit(&mut self, volume: VolumeId, token: Token, operation: Operation) {
        self.in_flight += 1;
        assert!(self.in_flight <= MAX_QUEUED, "over {MAX_QUEUED} operations in flight in a store: their completions are not reaped");
        self.last_id += 1;
        let id = OperationId(self.last_id);
        let Some(replica) = self.replicas.get(&volume).map(Arc::clone) else {
            let error = match self.unusable.get(&volume) {
                Some(unusable) => again(&unusable.error, self.folder.path().join(volume.to_string())),
                None => StoreError::UnknownVolume(volume),
            };
            return self.workers.complete(volume, token, Err(error));
        };
        if let Some(reason) = operation.misuse(replica.spec().size) {
            return self.workers.complete(volume, token, Err(StoreError::Misuse { volume, reason }));
        }
        match operation {
            Operation::Read { snapshot: Some(snapshot), .. } => {
                self.workers.complete(volume, token, Err(StoreError::UnknownSnapshot { volume, snapshot }));
            }
            Operation::Read { extent, snapshot: None } => self.workers.read(ReadJob { id, replica, token, extent }),
            Operation::Sync => self.workers.sync(SyncJob { replica, token }),
            operation => self.workers.write(WriteJob { id, replica, token, operation }),
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let before = completions.len();
        self.workers.reap(completions);
        self.in_flight -= completions.len() - before;
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.workers.wake_fd())
    }
}

impl Drop for FileStore {
    fn drop(&mut self) {
        if let Err(error) = self.close_all() {
            tracing::error!(path = %self.path.display(), %error, "the store could not be closed cleanly");
        }
    }
}
