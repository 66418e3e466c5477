//! Carrick's backing stores: where a replica keeps its blocks, and what it must never forget.
//!
//! This crate knows blocks and disks. It knows no network, no ublk and no clock. Its only face to the replicator is
//! [`ReplicaStore`].

pub mod buffer;
pub mod checksum;
pub mod dice;
pub mod disk;
pub mod epoch_map;
pub mod memory;
pub mod size;
pub mod store;
pub mod units;

pub use buffer::{Buffer, BufferPool, SharedBuffer};
pub use checksum::{Checksum, Checksums, Digest, block_checksum, zero_block_checksums};
pub use memory::{MemoryStore, PowerLoss};
pub use store::{
    BLOCKS_MAX, CHANGED_MAX, ChangedExtent, ChangedExtents, Completion, Content, DIGEST_BLOCKS_MAX, LoggedExtents, OpenedReplica,
    Operation, Outcome, ReadData, ReplicaSpec, ReplicaState, ReplicaStore, Scrubbed, SnapshotInfo, StoreError, StoreUsage, Synced, Token,
};
pub use units::{BLOCK_SIZE, BlockIndex, ByteLength, ByteOffset, Epoch, Extent, Seq, SnapshotId, StoreId, Term, VolumeId, VolumeSize};
