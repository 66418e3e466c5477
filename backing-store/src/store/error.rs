//! What can go wrong in a store.

use std::io;
use std::path::PathBuf;

use crate::checksum::Checksum;
use crate::units::{BlockIndex, ByteLength, Epoch, SnapshotId, VolumeId};

/// What can go wrong in a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The system refused.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A block is not what was written.
    #[error("block {block} of volume {volume} fails its checksum: stored {expected:#010x}, computed {got:#010x}")]
    Corrupt {
        /// Whose.
        volume: VolumeId,
        /// Which.
        block: BlockIndex,
        /// What the store remembers.
        expected: Checksum,
        /// What the bytes give.
        got: Checksum,
    },
    /// No room.
    #[error("no room in store {path}: {needed} bytes are needed, {free} are free; delete a volume or add a store")]
    NoSpace {
        /// The store.
        path: PathBuf,
        /// How many bytes are needed.
        needed: ByteLength,
        /// How many there are.
        free: ByteLength,
    },
    /// A replica of this volume is here, and differs.
    #[error("a replica of volume {volume} with {found} bytes is already in this store, {wanted} were asked for")]
    Conflict {
        /// Whose.
        volume: VolumeId,
        /// Its size.
        found: ByteLength,
        /// The size asked for.
        wanted: ByteLength,
    },
    /// No such replica.
    #[error("no replica of volume {0} in this store")]
    UnknownVolume(VolumeId),
    /// No such snapshot.
    #[error("volume {volume} has no snapshot {snapshot} in this store")]
    UnknownSnapshot {
        /// Whose.
        volume: VolumeId,
        /// Which.
        snapshot: SnapshotId,
    },
    /// Something depends on a snapshot.
    #[error("snapshot {snapshot} of volume {volume} is in use by {by}: {advice}")]
    SnapshotInUse {
        /// Whose.
        volume: VolumeId,
        /// Which.
        snapshot: SnapshotId,
        /// Who uses it.
        by: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// A volume was reverted, so that its epochs don't tell what changed since one before that.
    #[error(
        "what changed in volume {volume} since epoch {from} is not known, since the volume was reverted; epochs from {oldest} on \
         tell: compare everything"
    )]
    EpochForgotten {
        /// Whose.
        volume: VolumeId,
        /// The epoch asked for.
        from: Epoch,
        /// The first one after it that can be asked for.
        oldest: Epoch,
    },
    /// A fixed bound of the store is reached.
    #[error("store {path} already has {limit} {what}, which is its limit")]
    Limit {
        /// Where.
        path: PathBuf,
        /// Of what.
        what: &'static str,
        /// How many.
        limit: u64,
    },
    /// An earlier sync failed.
    #[error("a write to stable media failed earlier on this replica of volume {0}; restart carrick-replica to look at it afresh")]
    Poisoned(VolumeId),
    /// The folder holds something else.
    #[error("{path} is not a Carrick store: {reason}")]
    NotAStore {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process has it.
    #[error("store {0} is in use by another carrick-replica process")]
    InUse(PathBuf),
    /// Somebody has the whole device.
    #[error("device {0} is in use: it is mounted, a part of another device, or served by another carrick-replica process")]
    DeviceInUse(PathBuf),
    /// A store can't be made where something else is.
    #[error("no store can be made in {path}: {reason}")]
    Occupied {
        /// Where.
        path: PathBuf,
        /// What is there, and what to do about it.
        reason: String,
    },
    /// A store can't be of this size.
    #[error("no store of {given} bytes can be made in {path}: {reason}")]
    StoreSize {
        /// Where.
        path: PathBuf,
        /// The size that was given, or found.
        given: ByteLength,
        /// What is wrong with it.
        reason: String,
    },
    /// Written by a newer version.
    #[error("{path} has format {found}, this program knows up to {known}: upgrade carrick-replica")]
    UnknownFormat {
        /// Where.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// A structure of the store fails its own checksum.
    #[error("{path} is damaged: {reason}; nothing in it is served. Let its replicas be rebuilt from the others, in another store")]
    Damaged {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Written by a newer version that uses something this one must not ignore.
    #[error("{path} uses format features {features:#018x} that this program does not know: upgrade carrick-replica")]
    UnknownFeatures {
        /// Where.
        path: PathBuf,
        /// The unknown bits.
        features: u64,
    },
    /// The caller broke the contract of [`ReplicaStore::submit`](crate::ReplicaStore::submit); nothing was changed.
    #[error("an operation on volume {volume} was refused: {reason}")]
    Misuse {
        /// Whose.
        volume: VolumeId,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Of the format before the first one that this program knows.
    #[error(
        "the store in {0} was made by an earlier Carrick, whose format is no longer read: format a new store elsewhere, and let the \
         replicas be rebuilt on it"
    )]
    OldFormat(PathBuf),
}
