//! The quantities that cross module borders, each a type of its own so that they can't be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The unit of checksums, of data on the wire and of allocation in a store, in bytes.
pub const BLOCK_SIZE: u32 = 4096;

/// Largest volume: 4 PiB. Far above one store's disk, far below where byte arithmetic could overflow.
pub const VOLUME_SIZE_MAX: u64 = 4 << 50;

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Nothing yet, or the beginning.
            pub const ZERO: Self = Self(0);

            /// Wraps a raw number.
            #[must_use]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

quantity! {
    /// Number of a write within a term. The first write of a term is 1; 0 means "none".
    Seq
}
quantity! {
    /// Index of a 4 KiB block in a volume.
    BlockIndex
}
quantity! {
    /// Distance from the start of a volume, in bytes.
    ByteOffset
}
quantity! {
    /// A number of bytes.
    ByteLength
}

impl Epoch {
    /// What a new replica's first writes carry. 0 is the epoch of blocks that were never written.
    pub const FIRST: Self = Self(1);
    /// Never written.
    pub const NEVER: Self = Self(0);

    /// Wraps a raw number.
    #[must_use]
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The raw number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The one that follows. `None` when the counter is used up (after 2^32 snapshots and losses of replicas).
    #[must_use]
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(next) => Some(Self(next)),
            None => None,
        }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Seq {
    /// The sequence that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl BlockIndex {
    /// Where the block begins.
    #[must_use]
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0 * BLOCK_SIZE as u64)
    }
}

impl ByteOffset {
    /// The block that holds this byte.
    #[must_use]
    pub const fn block(self) -> BlockIndex {
        BlockIndex(self.0 / BLOCK_SIZE as u64)
    }
}

/// A store's birth counter per volume: every block remembers the epoch of its last write. Raised at snapshots and when a replica
/// is lost, so that "what changed since then" is a walk over what is younger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(u32);

/// A primary's fencing number: a counter in the upper 32 bits and a nonce, random per attempt, in the lower 32, compared in
/// that order, so that two attempts never share a term. 0 means "none yet".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(u64);

impl Term {
    /// No term: what a new replica has promised.
    pub const ZERO: Self = Self(0);

    /// Wraps the wire's form.
    #[must_use]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The wire's form.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// A term above this one. `None` when the counter is used up (after 2^32 attachments).
    #[must_use]
    pub fn successor(self, nonce: u32) -> Option<Self> {
        let counter = (self.0 >> 32).checked_add(1).filter(|counter| u32::try_from(*counter).is_ok())?;
        Some(Self(counter << 32 | u64::from(nonce)))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:08x}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new random identity.
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// From the 16 bytes of the wire or of a file.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }

            /// The 16 bytes of the wire or of a file.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.into_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

identity! {
    /// Identity of a volume, for ever.
    VolumeId
}
identity! {
    /// Identity of a snapshot of a volume, the same on all its replicas.
    SnapshotId
}
identity! {
    /// Identity of a store: one disk's replica storage.
    StoreId
}

/// A range of bytes in a volume. Its end never overflows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    offset: ByteOffset,
    length: ByteLength,
}

impl Extent {
    /// The range, or `None` if its end would overflow.
    #[must_use]
    pub const fn new(offset: ByteOffset, length: ByteLength) -> Option<Self> {
        if offset.0.checked_add(length.0).is_none() {
            return None;
        }
        Some(Self { offset, length })
    }

    /// The first byte.
    #[must_use]
    pub const fn offset(self) -> ByteOffset {
        self.offset
    }

    /// How many bytes.
    #[must_use]
    pub const fn length(self) -> ByteLength {
        self.length
    }

    /// The byte after the last.
    #[must_use]
    pub const fn end(self) -> ByteOffset {
        ByteOffset(self.offset.0 + self.length.0)
    }

    /// Whether no byte is in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.length.0 == 0
    }

    /// Whether a byte is in both.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset.0 < other.end().0 && other.offset.0 < self.end().0
    }

    /// Whether every byte of `other` is in this range.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.offset.0 <= other.offset.0 && other.end().0 <= self.end().0
    }

    /// Whether it begins and ends at block borders.
    #[must_use]
    pub const fn is_block_aligned(self) -> bool {
        self.offset.0.is_multiple_of(BLOCK_SIZE as u64) && self.length.0.is_multiple_of(BLOCK_SIZE as u64)
    }

    /// The smallest block-aligned range around it. `None` if that would overflow.
    #[must_use]
    pub const fn block_aligned(self) -> Option<Self> {
        let start = self.offset.0 / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
        match self.end().0.checked_next_multiple_of(BLOCK_SIZE as u64) {
            Some(end) => Some(Self { offset: ByteOffset(start), length: ByteLength(end - start) }),
            None => None,
        }
    }

    /// The first block it touches.
    #[must_use]
    pub const fn first_block(self) -> BlockIndex {
        self.offset.block()
    }

    /// How many blocks it touches.
    #[must_use]
    pub const fn block_count(self) -> u64 {
        if self.length.0 == 0 {
            return 0;
        }
        (self.end().0 - 1) / BLOCK_SIZE as u64 - self.offset.0 / BLOCK_SIZE as u64 + 1
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.length)
    }
}

/// Size of a volume: a positive multiple of 4 KiB up to 4 PiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VolumeSize(u64);

/// Why a number of bytes can't be a volume's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeSizeError {
    /// A volume of nothing.
    #[error("size is 0: give at least {BLOCK_SIZE} bytes")]
    Zero,
    /// Not whole blocks.
    #[error("size {0} is not a multiple of {BLOCK_SIZE} bytes")]
    Unaligned(u64),
    /// Above [`VOLUME_SIZE_MAX`].
    #[error("size {0} is over the limit of {VOLUME_SIZE_MAX} bytes (4 PiB)")]
    TooLarge(u64),
}

impl VolumeSize {
    /// Checks a number of bytes.
    ///
    /// # Errors
    /// [`VolumeSizeError`] says which rule it breaks.
    pub const fn new(bytes: u64) -> Result<Self, VolumeSizeError> {
        if bytes == 0 {
            Err(VolumeSizeError::Zero)
        } else if !bytes.is_multiple_of(BLOCK_SIZE as u64) {
            Err(VolumeSizeError::Unaligned(bytes))
        } else if bytes > VOLUME_SIZE_MAX {
            Err(VolumeSizeError::TooLarge(bytes))
        } else {
            Ok(Self(bytes))
        }
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> ByteLength {
        ByteLength(self.0)
    }

    /// In 4 KiB blocks.
    #[must_use]
    pub const fn blocks(self) -> u64 {
        self.0 / BLOCK_SIZE as u64
    }

    /// The whole volume as a range.
    #[must_use]
    pub const fn extent(self) -> Extent {
        Extent { offset: ByteOffset::ZERO, length: ByteLength(self.0) }
    }
}

impl TryFrom<u64> for VolumeSize {
    type Error = VolumeSizeError;

    fn try_from(bytes: u64) -> Result<Self, Self::Error> {
        Self::new(bytes)
    }
}

impl From<VolumeSize> for u64 {
    fn from(size: VolumeSize) -> Self {
        size.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent::new(ByteOffset(offset), ByteLength(length)).unwrap()
    }

    #[test]
    fn a_successor_is_above_whatever_the_nonce() {
        let term = Term::ZERO.successor(u32::MAX).unwrap();
        assert!(term > Term::ZERO);
        assert!(term.successor(0).unwrap() > term);
        assert_eq!(Term::new(u64::MAX).successor(0), None);
        assert_eq!(term.to_string(), "1.ffffffff");
    }

    #[test]
    fn extents_align_outwards_and_never_overflow() {
        assert_eq!(extent(512, 4096).block_aligned().unwrap(), extent(0, 8192));
        assert_eq!(extent(512, 4096).block_count(), 2);
        assert_eq!(extent(4096, 0).block_count(), 0);
        assert!(Extent::new(ByteOffset(u64::MAX), ByteLength(1)).is_none());
        assert!(extent(u64::MAX - 1, 1).block_aligned().is_none());
    }

    #[test]
    fn neighbours_do_not_overlap() {
        assert!(!extent(0, 4096).overlaps(extent(4096, 4096)));
        assert!(extent(0, 4097).overlaps(extent(4096, 4096)));
        assert!(!extent(0, 0).overlaps(extent(0, 4096)));
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(VolumeSize::new(0), Err(VolumeSizeError::Zero));
        assert_eq!(VolumeSize::new(4097), Err(VolumeSizeError::Unaligned(4097)));
        assert_eq!(VolumeSize::new(VOLUME_SIZE_MAX + 4096), Err(VolumeSizeError::TooLarge(VOLUME_SIZE_MAX + 4096)));
        assert_eq!(VolumeSize::new(VOLUME_SIZE_MAX).unwrap().blocks(), 1 << 40);
    }
}
