//! The data protocol between a primary and a replica, byte by byte as `docs/protocol.md` tells it.
//!
//! Nothing here does I/O. Foreign bytes are checked before anything is allocated for them: first the 64-byte header, then the
//! length of what follows it against a limit by kind, then the body.

mod frame;
mod header;
mod message;

pub use frame::{Body, Frame};
pub use header::{DATA_LENGTH_MAX, Flags, HEADER_LENGTH, Header, Kind, MAGIC, MESSAGE_LENGTH_MAX, RANGE_LENGTH_MAX, RequestId, VERSION};
pub use message::{
    ChangedAnswer, ERROR_TEXT_MAX, ErrorBody, ErrorCode, FEATURES_INCOMPATIBLE, Hello, HelloAnswer, LOG_EXTENTS_MAX, LogAnswer,
    StatusAnswer,
};

use carrick_backing_store::{BlockIndex, VolumeId};

/// Why bytes from a peer are not a frame of this protocol. The connection they came on is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not our protocol at all.
    #[error("header.magic is {0:#010x}, not Carrick's: this is no Carrick peer")]
    Magic(u32),
    /// The header was damaged on its way.
    #[error("header.crc is {expected:#010x}, its bytes give {got:#010x}: the frame was damaged on its way")]
    HeaderChecksum {
        /// What the header says.
        expected: u32,
        /// What its bytes give.
        got: u32,
    },
    /// A version this program doesn't speak.
    #[error("header.version is {0}, this program speaks {VERSION}: upgrade the older side")]
    Version(u8),
    /// No such kind in this version.
    #[error("header.kind is {0:#04x}: no such kind in version {VERSION}")]
    Kind(u8),
    /// A flag that this version doesn't define.
    #[error("header.flags has undefined bits {0:#06x}")]
    Flags(u16),
    /// Longer than its kind may be.
    #[error("header.length is {got}, a frame of kind {kind:?} has at most {limit}")]
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// Its length.
        got: u32,
        /// The limit.
        limit: u32,
    },
    /// Shorter than its kind must be.
    #[error("header.length is {got}, a frame of kind {kind:?} has at least {least}")]
    TooShort {
        /// The frame's kind.
        kind: Kind,
        /// Its length.
        got: u32,
        /// The least.
        least: u32,
    },
    /// Not whole blocks, or beyond any volume.
    #[error("header.offset {offset} and header.length {length} are not a range of whole blocks")]
    Range {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        length: u32,
    },
    /// A block's bytes don't fit its checksum.
    #[error("block {block} of volume {volume} was damaged on its way: checksum {expected:#010x}, computed {got:#010x}")]
    BlockChecksum {
        /// Whose.
        volume: VolumeId,
        /// Which.
        block: BlockIndex,
        /// What the frame says.
        expected: u32,
        /// What the bytes give.
        got: u32,
    },
    /// A message body's bytes don't fit its checksum.
    #[error("the body of a {kind:?} frame was damaged on its way: checksum {expected:#010x}, computed {got:#010x}")]
    BodyChecksum {
        /// The frame's kind.
        kind: Kind,
        /// What the frame says.
        expected: u32,
        /// What the bytes give.
        got: u32,
    },
    /// A field of a message has a value it can't have.
    #[error("field {field} of a {kind:?} frame is invalid")]
    Field {
        /// The frame's kind.
        kind: Kind,
        /// The field.
        field: &'static str,
    },
}
