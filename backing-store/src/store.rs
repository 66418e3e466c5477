//! [`ReplicaStore`]: the only face of a store. Operations are submitted and completed later, so that a store may use a
//! ring, threads or plain memory behind it.
//!
//! One store serves the replicas of many volumes; each volume has at most one replica in a store.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::buffer::SharedBuffer;
use crate::checksum::Checksum;
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, Extent, Seq, StoreId, Term, VolumeId, VolumeSize};

/// What a replica is of, fixed at its creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaSpec {
    /// The volume.
    pub volume: VolumeId,
    /// Its size.
    pub size: VolumeSize,
}

/// What a replica's blocks are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// Exactly the writes of its log term up to its position, and at most the logged ones after it.
    Complete,
    /// It has the writes of its log term up to its position, but elsewhere blocks may hold either side of writes that were
    /// never acknowledged (the machine lost power, or a reconciliation was interrupted).
    Mixed,
    /// A copy is under way and unfinished: these blocks mean nothing yet, whatever the log term says.
    Rebuilding,
}

/// What a replica must never forget. Always written as a whole, durably, and atomically.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaState {
    /// The highest term promised: messages of lower ones change nothing (I4).
    pub promised: Term,
    /// The term under which the content was last reconciled or wholly copied.
    pub log_term: Term,
    /// What the blocks are worth.
    pub content: Content,
}

/// A replica as it was found when the store was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenedReplica {
    /// What it is of.
    pub spec: ReplicaSpec,
    /// What it must not forget. `content` is [`Content::Mixed`] after a loss of power.
    pub state: ReplicaState,
    /// The writes 1..=this of the log term have been received and are all there.
    pub position: Seq,
    /// The writes 1..=this are on stable media.
    pub durable: Seq,
}

/// Ties a completion to its operation; the submitter chooses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// Work for a store. Extents are block-aligned and within the volume: the session checked them.
#[derive(Debug)]
pub enum Operation {
    /// Puts blocks. With a sequence (a live write): the replica's position advances to it when it is done, and the extent is
    /// logged before the first byte changes. Without one (a copied block): the position stays.
    Write {
        /// Which write of the log term; `None` for a copied block.
        seq: Option<Seq>,
        /// Which blocks.
        extent: Extent,
        /// One per block; the caller has verified them against `data`.
        checksums: Vec<Checksum>,
        /// The blocks.
        data: SharedBuffer,
    },
    /// Makes blocks read as zeros, as a hole.
    WriteZeroes {
        /// As in `Write`.
        seq: Option<Seq>,
        /// Which blocks.
        extent: Extent,
    },
    /// Reads blocks and verifies their checksums.
    Read {
        /// Which blocks.
        extent: Extent,
    },
    /// Puts everything completed before on stable media.
    Sync,
    /// Replaces the durable state. With a position, it also sets the position and the durable position to it and forgets
    /// the log of extents. Everything completed before is on stable media first.
    SetState {
        /// The new state.
        state: ReplicaState,
        /// The new position, if that changes too.
        position: Option<Seq>,
    },
    /// The extents of the logged writes with a sequence above this one, those that may have been applied in part included.
    LoggedAfter {
        /// Exclusive bound.
        after: Seq,
    },
}

/// The blocks that a read found.
#[derive(Clone, Debug)]
pub enum ReadData {
    /// All are holes.
    Zeroes,
    /// The bytes and one checksum per block (holes among them have the checksum of a block of zeros).
    Blocks {
        /// One per block.
        checksums: Vec<Checksum>,
        /// The blocks.
        data: SharedBuffer,
    },
}

/// Which extents were written after some sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoggedExtents {
    /// All of them, in no particular order.
    All(Vec<Extent>),
    /// The log no longer reaches back so far.
    Forgotten,
}

/// How an operation ended.
#[derive(Debug)]
pub enum Outcome {
    /// `Write` or `WriteZeroes` is done: a kill of the process no longer undoes it.
    Written,
    /// `Read` found this.
    Read(ReadData),
    /// `Sync` is done: the writes of the log term up to this are on stable media.
    Synced {
        /// The durable position.
        durable: Seq,
    },
    /// `SetState` is done and durable.
    StateSet,
    /// `LoggedAfter` found these.
    Logged(LoggedExtents),
}

/// A finished operation.
#[derive(Debug)]
pub struct Completion {
    /// Whose.
    pub volume: VolumeId,
    /// Which.
    pub token: Token,
    /// How it ended.
    pub result: Result<Outcome, StoreError>,
}

/// How full a store is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreUsage {
    /// What the file system underneath holds in all.
    pub capacity: ByteLength,
    /// What is still free for new replicas.
    pub free: ByteLength,
    /// What Carrick's replicas have reserved.
    pub reserved: ByteLength,
}

/// One disk's replicas.
///
/// All calls come from one thread (the store may use others inside). Calls but `create`, `delete` and the queries return
/// without waiting for the disk.
///
/// **Order:** operations of one volume that overlap take effect in the order of submission; a read sees every write submitted
/// before it. Writes with a sequence complete in sequence order. Other operations may complete in any order.
///
/// **After an error:** a failed `Write` leaves its extent undefined (old, new or a mixture, found by checksum) and the
/// position where it was; the session takes no more writes. After a failed `Sync` or `SetState` the replica refuses every
/// further operation with [`StoreError::Poisoned`] until the store is opened again: what reached the disk is unknown (I2).
pub trait ReplicaStore {
    /// Identity, fixed when the store was formatted.
    fn id(&self) -> StoreId;

    /// Makes an empty replica (all holes), durably. Making the same one again changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if there is one of another size; [`StoreError::NoSpace`]; I/O.
    fn create(&mut self, spec: ReplicaSpec) -> Result<(), StoreError>;

    /// Deletes a replica, durably. Deleting one that isn't there changes nothing.
    ///
    /// # Errors
    /// I/O.
    fn delete(&mut self, volume: VolumeId) -> Result<(), StoreError>;

    /// The replicas here, as they were found when the store was opened or created since.
    fn replicas(&self) -> Vec<OpenedReplica>;

    /// How full it is.
    ///
    /// # Errors
    /// I/O.
    fn usage(&self) -> Result<StoreUsage, StoreError>;

    /// Starts an operation. Its completion comes from [`ReplicaStore::reap`], always, and exactly once.
    fn submit(&mut self, volume: VolumeId, token: Token, operation: Operation);

    /// Moves finished operations to `completions` without waiting.
    fn reap(&mut self, completions: &mut Vec<Completion>);

    /// Becomes readable when [`ReplicaStore::reap`] has something to give. `None` if everything completes within `submit`.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// The most blocks of one [`Operation::Write`] or [`Operation::Read`]: what a [`crate::Buffer`] holds (2 MiB).
pub const BLOCKS_MAX: u64 = (2 << 20) / BLOCK_SIZE as u64;

/// A position above this was never reached by counting, and would overflow some day: it is a mistake or damage.
pub(crate) const SEQ_MAX: Seq = Seq::new(1 << 62);

impl Operation {
    /// Why a store must refuse this for a volume of `size`, if it must. The session has checked all this already; a store asks
    /// again because the answer to a mistake must never be a write beside the data.
    pub(crate) fn misuse(&self, size: VolumeSize) -> Option<&'static str> {
        let (extent, blocks_max) = match self {
            Self::Write { extent, .. } | Self::Read { extent } => (*extent, BLOCKS_MAX),
            Self::WriteZeroes { extent, .. } => (*extent, u64::MAX),
            Self::SetState { position: Some(position), .. } if *position > SEQ_MAX => return Some("a position is over 2^62"),
            Self::Sync | Self::SetState { .. } | Self::LoggedAfter { .. } => return None,
        };
        if !extent.is_block_aligned() {
            return Some("an extent is not whole blocks");
        }
        if !size.extent().contains(extent) {
            return Some("an extent reaches past the end of the volume");
        }
        if extent.block_count() > blocks_max {
            return Some("an extent is longer than 2 MiB");
        }
        if let Self::Write { checksums, data, .. } = self
            && (data.len() as u64 != extent.length().get() || checksums.len() as u64 != extent.block_count())
        {
            return Some("data, checksums and extent differ in length");
        }
        None
    }
}

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
    #[error("{path} is damaged: {reason}; delete this replica and let it be rebuilt from the others")]
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
    /// The caller broke the contract of [`ReplicaStore::submit`]; nothing was changed.
    #[error("an operation on volume {volume} was refused: {reason}")]
    Misuse {
        /// Whose.
        volume: VolumeId,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The file system can't do what the store needs.
    #[error("the file system of {path} can't {action}: put the store on ext4, XFS or tmpfs")]
    Unsupported {
        /// Where.
        path: PathBuf,
        /// What it can't.
        action: &'static str,
    },
}
