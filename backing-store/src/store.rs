//! [`ReplicaStore`]: the only face of a store. Operations are submitted and completed later, so that a store may use a
//! ring, threads or plain memory behind it.
//!
//! One store serves the replicas of many volumes; each volume has at most one replica in a store.

mod error;

use std::os::fd::BorrowedFd;

pub use error::StoreError;
use serde::{Deserialize, Serialize};

use crate::buffer::SharedBuffer;
use crate::checksum::{Checksums, Digest};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, Epoch, Extent, Seq, SnapshotId, StoreId, Term, VolumeId, VolumeSize};

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

/// What a replica surely has, by epoch: a copy into it may leave that out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Synced {
    /// The blocks that carry this epoch or an earlier one here are what they were for good at its end: every write of these
    /// epochs that counts is here, and nothing else of them.
    pub epoch: Epoch,
    /// The blocks below this one were copied since, by a copy that was not finished.
    pub copied: BlockIndex,
    /// What `epoch` is for the others, for the blocks below `copied`.
    pub copied_epoch: Epoch,
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
    /// What a copy into it may leave out.
    pub synced: Synced,
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
    /// What the next write carries.
    pub epoch: Epoch,
}

/// Ties a completion to its operation; the submitter chooses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// Work for a store. Extents are block-aligned and within the volume: the session checked them.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Puts blocks. With a sequence (a live write): the replica's position advances to it when it is done, and the extent is
    /// logged before the first byte changes. Without one (a copied block): the position stays.
    Write {
        /// Which write of the log term; `None` for a copied block.
        seq: Option<Seq>,
        /// Which blocks.
        extent: Extent,
        /// One per block; the caller has verified them against `data`.
        checksums: Checksums,
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
        /// Of which snapshot; `None` for the volume as it is now.
        snapshot: Option<SnapshotId>,
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
    /// Raises the volume's epoch, if it is below: later writes carry the new one. Durable when done.
    RaiseEpoch {
        /// To this.
        to: Epoch,
        /// Raises [`Synced::epoch`] with it, if that is below.
        synced: Epoch,
    },
    /// Keeps the volume as it is after all writes submitted before, under this identity, then raises the epoch. Durable when
    /// done. Making the newest snapshot again changes nothing and gives the same epoch; an older one can't be made again.
    Snapshot {
        /// Its identity.
        snapshot: SnapshotId,
    },
    /// Forgets a snapshot; its space comes back in the background. Durable when done. Deleting one that isn't there changes
    /// nothing.
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Makes the blocks what they are in the newest snapshot, and raises the epoch; the size stays, as do the position and the
    /// log. Durable when done.
    Revert {
        /// Which: the newest.
        snapshot: SnapshotId,
    },
    /// Makes the volume larger; the new part is a hole. Durable when done.
    Expand {
        /// The new size, not below the present one.
        size: VolumeSize,
    },
    /// Which blocks were last written in an epoch above `from`, in ascending order, as many as fit in one answer. Epochs before
    /// a revert may be forgotten: [`StoreError::EpochForgotten`].
    Changed {
        /// Exclusive bound; [`Epoch::NEVER`] gives everything that is not a hole.
        from: Epoch,
        /// In which snapshot; `None` for the volume as it is now.
        snapshot: Option<SnapshotId>,
        /// Blocks before this one are left out.
        start: BlockIndex,
    },
    /// What the blocks hold, in one number, from what the store remembers of them: nothing is read back.
    Digest {
        /// Which blocks: at most [`DIGEST_BLOCKS_MAX`].
        extent: Extent,
    },
    /// Reads back and verifies up to `blocks` blocks that are not holes, from `start` on, snapshots left out.
    Scrub {
        /// Where to begin.
        start: BlockIndex,
        /// How many blocks to read at most (1 to [`BLOCKS_MAX`]).
        blocks: u64,
    },
}

/// Most blocks of one digest (16 MiB): a millisecond's work, and 16 pages of the map.
pub const DIGEST_BLOCKS_MAX: u64 = 4096;

/// A run of blocks that were written, or made zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedExtent {
    /// Which blocks.
    pub extent: Extent,
    /// Whether they are zeros (a tombstone) rather than data.
    pub zeroes: bool,
}

/// One answer's worth of what changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedExtents {
    /// In ascending order, neighbours of a kind joined; at most [`CHANGED_MAX`].
    pub extents: Vec<ChangedExtent>,
    /// Where to go on; `None` at the end.
    pub next: Option<BlockIndex>,
}

/// Most extents of one [`ChangedExtents`]: 24 KiB on the wire at 12 bytes each.
pub const CHANGED_MAX: usize = 2048;

/// What a scrub found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scrubbed {
    /// How many blocks were read and are right.
    pub verified: u64,
    /// Those that can't be read or fail their checksum.
    pub bad: Vec<BlockIndex>,
    /// Where to go on; `None` at the end of the volume.
    pub next: Option<BlockIndex>,
}

/// A snapshot of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its identity.
    pub id: SnapshotId,
    /// The epoch that it ended: blocks of this and earlier ones are in it.
    pub epoch: Epoch,
    /// The volume's size at that point.
    pub size: VolumeSize,
}

/// The blocks that a read found.
#[derive(Clone, Debug)]
pub enum ReadData {
    /// All are holes.
    Zeroes,
    /// The bytes and one checksum per block (holes among them have the checksum of a block of zeros).
    Blocks {
        /// One per block.
        checksums: Checksums,
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
    /// `RaiseEpoch`, `Snapshot` or `Revert` is done and durable: later writes carry this epoch.
    Epoch(Epoch),
    /// `DeleteSnapshot` or `Expand` is done and durable.
    Done,
    /// `Changed` found these.
    Changed(ChangedExtents),
    /// `Digest` gave this.
    Digest(Digest),
    /// `Scrub` found this.
    Scrubbed(Scrubbed),
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

/// How full a store is, in bytes. Of a whole store, `capacity` is the sum of all others but `reserved`, which says how much of
/// `free` is promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreUsage {
    /// What the store can hold in all.
    pub capacity: ByteLength,
    /// What is not in use now.
    pub free: ByteLength,
    /// The part of `free` that is promised: to volumes, up to their sizes, and to the store's own work.
    pub reserved: ByteLength,
    /// What volumes hold as they are now.
    pub used: ByteLength,
    /// What only snapshots hold.
    pub snapshots: ByteLength,
    /// What was given up and comes back by itself, in the background.
    pub reclaimable: ByteLength,
    /// What the store itself takes: superblocks, journal, maps.
    pub metadata: ByteLength,
    /// Blocks that are never used again, since they could not be read or written.
    pub bad: ByteLength,
}

impl StoreUsage {
    /// What new volumes can have.
    #[must_use]
    pub const fn available(&self) -> ByteLength {
        ByteLength::new(self.free.get().saturating_sub(self.reserved.get()))
    }
}

/// One disk's replicas.
///
/// All calls come from one thread (the store may use others inside). Calls but `create`, `delete` and the queries return
/// without waiting for the disk.
///
/// **Order:** operations of one volume that overlap take effect in the order of submission; a read sees every write submitted
/// before it, and a `Digest` is a read. `Changed` and `Scrub` are reads of the whole volume; what looks at a snapshot overlaps no write. `SetState` and
/// `LoggedAfter` overlap every write and each other. What changes epochs, snapshots or the size (`RaiseEpoch`, `Snapshot`,
/// `DeleteSnapshot`, `Revert`, `Expand`) overlaps everything but `Sync`. Writes with a sequence complete in sequence order. Other
/// operations may complete in any order.
///
/// **After an error:** a failed `Write` leaves its extent undefined (old, new or a mixture, found by checksum) and the
/// position where it was; the session takes no more writes. One that found [`StoreError::NoSpace`] has changed nothing, and can be
/// submitted again. After a failed `Sync` or `SetState` the replica refuses every
/// further operation with [`StoreError::Poisoned`] until the store is opened again: what reached the disk is unknown (I2).
pub trait ReplicaStore {
    /// Identity, fixed when the store was formatted.
    fn id(&self) -> StoreId;

    /// Makes an empty replica (all holes), durably. Making the same one again changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if there is one of another size; [`StoreError::NoSpace`]; I/O.
    fn create(&mut self, spec: ReplicaSpec) -> Result<(), StoreError>;

    /// Makes a replica whose content is that of a snapshot of another volume in this store, durably; nothing is copied. Blocks keep
    /// their epochs; the clone's own first writes carry the one after the snapshot's. The snapshot can't be deleted while the
    /// clone exists. Making the same one again changes nothing.
    ///
    /// # Errors
    /// [`StoreError::UnknownVolume`], [`StoreError::UnknownSnapshot`], [`StoreError::Conflict`]; [`StoreError::Misuse`] if the
    /// size is below the snapshot's; [`StoreError::NoSpace`]; I/O.
    fn clone_snapshot(&mut self, origin: VolumeId, snapshot: SnapshotId, spec: ReplicaSpec) -> Result<(), StoreError>;

    /// Deletes a replica with its snapshots, durably; the space comes back in the background. Deleting one that isn't there
    /// changes nothing.
    ///
    /// # Errors
    /// [`StoreError::SnapshotInUse`] if a clone of one of its snapshots exists; I/O.
    fn delete(&mut self, volume: VolumeId) -> Result<(), StoreError>;

    /// The replicas here, as they were found when the store was opened or created since.
    fn replicas(&self) -> Vec<OpenedReplica>;

    /// A replica's snapshots, oldest first.
    ///
    /// # Errors
    /// [`StoreError::UnknownVolume`].
    fn snapshots(&self, volume: VolumeId) -> Result<Vec<SnapshotInfo>, StoreError>;

    /// How full it is.
    ///
    /// # Errors
    /// I/O.
    fn usage(&self) -> Result<StoreUsage, StoreError>;

    /// Starts an operation. Its completion comes from [`ReplicaStore::reap`], always, and exactly once.
    fn submit(&mut self, volume: VolumeId, token: Token, operation: Operation);

    /// Moves finished operations to `completions` without waiting.
    fn reap(&mut self, completions: &mut Vec<Completion>);

    /// Becomes readable when [`ReplicaStore::reap`] has something to give, or to do. `None` if everything completes within
    /// `submit`.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Why the whole store takes no more operations until it is opened again, if so.
    fn poisoned(&self) -> Option<&str> {
        None
    }
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
            Self::Write { extent, .. } | Self::Read { extent, .. } => (*extent, BLOCKS_MAX),
            Self::WriteZeroes { extent, .. } => (*extent, u64::MAX),
            Self::Digest { extent } => (*extent, DIGEST_BLOCKS_MAX),
            Self::SetState { position: Some(position), .. } if *position > SEQ_MAX => return Some("a position is over 2^62"),
            Self::Scrub { blocks, .. } if *blocks == 0 || *blocks > BLOCKS_MAX => return Some("a scrub is of 1 to 512 blocks"),
            Self::Expand { size: new } if *new < size => return Some("a volume can't shrink"),
            Self::Sync
            | Self::SetState { .. }
            | Self::LoggedAfter { .. }
            | Self::RaiseEpoch { .. }
            | Self::Snapshot { .. }
            | Self::DeleteSnapshot { .. }
            | Self::Revert { .. }
            | Self::Expand { .. }
            | Self::Changed { .. }
            | Self::Scrub { .. } => return None,
        };
        if !extent.is_block_aligned() {
            return Some("an extent is not whole blocks");
        }
        if !size.extent().contains(extent) {
            return Some("an extent reaches past the end of the volume");
        }
        if extent.block_count() > blocks_max {
            return Some("an extent is longer than 2 MiB, or one of a digest than 16 MiB");
        }
        if let Self::Write { checksums, data, .. } = self
            && (data.len() as u64 != extent.length().get() || checksums.len() as u64 != extent.block_count())
        {
            return Some("data, checksums and extent differ in length");
        }
        None
    }
}
