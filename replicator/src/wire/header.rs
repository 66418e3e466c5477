//! The fixed 64-byte header: layout, encoding, and the limits on what follows it.

use std::fmt;

use carrick_backing_store::{BLOCK_SIZE, ByteLength, ByteOffset, DIGEST_BLOCKS_MAX, Extent, Seq, Term, VolumeId};

use super::WireError;

/// The first four bytes of every frame: `CRKD`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"CRKD");
/// The version that this program speaks.
pub const VERSION: u8 = 1;
/// Bytes of a header.
pub const HEADER_LENGTH: usize = 64;
/// Most data in one frame, in bytes: a 1 MiB request that begins and ends inside blocks touches 257 of them.
pub const DATA_LENGTH_MAX: u32 = (1 << 20) + BLOCK_SIZE;
/// Longest range of a frame that carries no data, in bytes: 1 GiB keeps one frame's work for a store within milliseconds.
pub const RANGE_LENGTH_MAX: u32 = 1 << 30;
/// Longest range of one digest.
pub const DIGEST_LENGTH_MAX: u32 = 16 << 20;
/// Longest message body, in bytes, with its checksum: a log answer of 32,768 extents fits.
pub const MESSAGE_LENGTH_MAX: u32 = (512 << 10) + 64;

const _: () = assert!(DIGEST_LENGTH_MAX as u64 == DIGEST_BLOCKS_MAX * BLOCK_SIZE as u64, "what stores give");

/// Ties an answer to its request; the requester chooses it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Bits of a header that modify its kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u16);

impl Flags {
    /// None.
    pub const NONE: Self = Self(0);
    /// On a write: answer when it is on stable media.
    pub const FUA: Self = Self(1);
    /// On a read answer: every block is zeros, and no data follows.
    pub const ZEROES: Self = Self(1 << 1);
    /// On copy-begin: the content is worthless until the copy is complete.
    pub const REBUILD: Self = Self(1 << 2);
    const DEFINED: u16 = 0b111;

    /// Whether all bits of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    const fn from_bits(bits: u16) -> Result<Self, WireError> {
        if bits & !Self::DEFINED != 0 { Err(WireError::Flags(bits & !Self::DEFINED)) } else { Ok(Self(bits)) }
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// What a frame is. Answers have the highest bit set.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind {
            $($(#[$doc])* $name = $value,)*
        }

        impl Kind {
            /// Every kind, for tests over all of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            const fn from_wire(value: u8) -> Option<Self> {
                match value {
                    $($value => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// First frame of a connection: versions and features.
    Hello = 0x01,
    /// How does this volume's replica stand?
    Status = 0x02,
    /// Promise this term, durably, and bind the volume to this connection.
    Promise = 0x03,
    /// A live write, in sequence.
    Write = 0x04,
    /// Live zeros, in sequence.
    WriteZeroes = 0x05,
    /// A live discard, in sequence. Discarded blocks read as zeros.
    Discard = 0x06,
    /// Put everything received before on stable media.
    Flush = 0x07,
    /// Give these blocks.
    Read = 0x08,
    /// A copy into this replica begins.
    CopyBegin = 0x09,
    /// Copied blocks, out of sequence.
    CopyWrite = 0x0a,
    /// Copied holes, out of sequence.
    CopyZeroes = 0x0b,
    /// The content is now that of this term at this sequence: remember it durably.
    Adopt = 0x0c,
    /// Which extents were written after this sequence?
    Log = 0x0d,
    /// Are you there?
    Ping = 0x0e,
    /// What is written from now on carries the epoch `offset`, and what was written in epochs up to `sequence` is for good.
    RaiseEpoch = 0x10,
    /// Which blocks from `offset` on were written in epochs above `sequence`?
    Changed = 0x14,
    /// The copy has reached `offset`: what lies before is what it was for good at the end of epoch `sequence`, or younger.
    CopyMark = 0x16,
    /// What do these blocks hold, in one number?
    Digest = 0x18,
    /// To Hello.
    HelloAnswer = 0x81,
    /// To Status.
    StatusAnswer = 0x82,
    /// To Promise: as StatusAnswer, with the promise made.
    PromiseAnswer = 0x83,
    /// To Write, WriteZeroes, Discard and Flush, cumulative: all up to `sequence` is received, all up to `offset` (the same
    /// unit) is on stable media.
    Ack = 0x84,
    /// To Read.
    ReadAnswer = 0x88,
    /// To CopyBegin.
    CopyBeginAnswer = 0x89,
    /// To CopyWrite and CopyZeroes.
    CopyAnswer = 0x8a,
    /// To Adopt.
    AdoptAnswer = 0x8c,
    /// To Log.
    LogAnswer = 0x8d,
    /// To Ping, with the positions of Ack.
    Pong = 0x8e,
    /// To RaiseEpoch: durable. `offset` is the epoch that the next write carries.
    RaiseEpochAnswer = 0x90,
    /// To Changed.
    ChangedAnswer = 0x94,
    /// To CopyMark: durable.
    CopyMarkAnswer = 0x96,
    /// To Digest: `sequence` is the digest.
    DigestAnswer = 0x98,
    /// Instead of any answer: a code and a text.
    Error = 0xff,
}

/// What follows a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyShape {
    /// Nothing; `length` is 0.
    Nothing,
    /// Nothing; `offset` and `length` are a range of blocks.
    Range,
    /// `length` bytes: a CRC32C, then the message.
    Message,
    /// A CRC32C per block, then the `length` bytes of the blocks from `offset` on.
    Data,
}

impl Kind {
    pub(super) const fn shape(self, flags: Flags) -> BodyShape {
        match self {
            Self::Hello
            | Self::HelloAnswer
            | Self::StatusAnswer
            | Self::PromiseAnswer
            | Self::LogAnswer
            | Self::ChangedAnswer
            | Self::Error => BodyShape::Message,
            Self::Write | Self::CopyWrite => BodyShape::Data,
            Self::ReadAnswer if !flags.contains(Flags::ZEROES) => BodyShape::Data,
            Self::WriteZeroes | Self::Discard | Self::Read | Self::CopyZeroes | Self::ReadAnswer | Self::Digest | Self::DigestAnswer => {
                BodyShape::Range
            }
            Self::Status
            | Self::Promise
            | Self::Flush
            | Self::CopyBegin
            | Self::Adopt
            | Self::Log
            | Self::Ping
            | Self::Ack
            | Self::CopyBeginAnswer
            | Self::CopyAnswer
            | Self::AdoptAnswer
            | Self::Pong
            | Self::RaiseEpoch
            | Self::RaiseEpochAnswer
            | Self::Changed
            | Self::CopyMark
            | Self::CopyMarkAnswer => BodyShape::Nothing,
        }
    }
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Bits that modify the kind.
    pub flags: Flags,
    /// Which volume.
    pub volume: VolumeId,
    /// The primary's term; in an Error with code stale-term, the term that is promised.
    pub term: Term,
    /// A sequence; what it means depends on the kind.
    pub sequence: Seq,
    /// A byte offset; in Ack and Pong the durable position.
    pub offset: ByteOffset,
    /// Length of the range, the data or the message, in bytes.
    pub length: u32,
    /// Ties an answer to its request.
    pub request: RequestId,
}

impl Header {
    /// A header of this kind for this volume and term, all else zero.
    #[must_use]
    pub const fn new(kind: Kind, volume: VolumeId, term: Term) -> Self {
        Self { kind, flags: Flags::NONE, volume, term, sequence: Seq::ZERO, offset: ByteOffset::ZERO, length: 0, request: RequestId(0) }
    }

    /// The range of `offset` and `length`. Decoding has checked that it doesn't overflow.
    #[must_use]
    pub fn extent(&self) -> Option<Extent> {
        Extent::new(self.offset, ByteLength::new(u64::from(self.length)))
    }

    /// Bytes that follow the header. Known to be within the limits after [`Header::decode`].
    #[must_use]
    pub const fn body_length(&self) -> usize {
        match self.kind.shape(self.flags) {
            BodyShape::Nothing | BodyShape::Range => 0,
            BodyShape::Message => self.length as usize,
            BodyShape::Data => self.length as usize / BLOCK_SIZE as usize * size_of::<u32>() + self.length as usize,
        }
    }

    /// The 64 bytes of the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = VERSION;
        bytes[5] = self.kind as u8;
        bytes[6..8].copy_from_slice(&self.flags.bits().to_le_bytes());
        bytes[8..24].copy_from_slice(&self.volume.to_bytes());
        bytes[24..32].copy_from_slice(&self.term.get().to_le_bytes());
        bytes[32..40].copy_from_slice(&self.sequence.get().to_le_bytes());
        bytes[40..48].copy_from_slice(&self.offset.get().to_le_bytes());
        bytes[48..52].copy_from_slice(&self.length.to_le_bytes());
        bytes[52..60].copy_from_slice(&self.request.0.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the 64 bytes of the wire and checks every field, so that the body's length can be trusted.
    ///
    /// # Errors
    /// [`WireError`] names the field.
    pub fn decode(bytes: &[u8; HEADER_LENGTH]) -> Result<Self, WireError> {
        let magic = read_u32(bytes, 0);
        if magic != MAGIC {
            return Err(WireError::Magic(magic));
        }
        let (expected, got) = (read_u32(bytes, 60), crc32c::crc32c(&bytes[..60]));
        if expected != got {
            return Err(WireError::HeaderChecksum { expected, got });
        }
        if bytes[4] != VERSION {
            return Err(WireError::Version(bytes[4]));
        }
        let kind = Kind::from_wire(bytes[5]).ok_or(WireError::Kind(bytes[5]))?;
        let flags = Flags::from_bits(u16::from_le_bytes([bytes[6], bytes[7]]))?;
        let mut volume = [0; 16];
        volume.copy_from_slice(&bytes[8..24]);
        let header = Self {
            kind,
            flags,
            volume: VolumeId::from_bytes(volume),
            term: Term::new(read_u64(bytes, 24)),
            sequence: Seq::new(read_u64(bytes, 32)),
            offset: ByteOffset::new(read_u64(bytes, 40)),
            length: read_u32(bytes, 48),
            request: RequestId(read_u64(bytes, 52)),
        };
        header.check_length()?;
        Ok(header)
    }

    fn check_length(&self) -> Result<(), WireError> {
        let (kind, got) = (self.kind, self.length);
        let (least, limit) = match kind.shape(self.flags) {
            BodyShape::Nothing => (0, 0),
            BodyShape::Range if kind == Kind::ReadAnswer || kind == Kind::Read => (BLOCK_SIZE, DATA_LENGTH_MAX),
            BodyShape::Range if kind == Kind::Digest || kind == Kind::DigestAnswer => (BLOCK_SIZE, DIGEST_LENGTH_MAX),
            BodyShape::Range => (BLOCK_SIZE, RANGE_LENGTH_MAX),
            BodyShape::Message => (4, MESSAGE_LENGTH_MAX),
            BodyShape::Data => (BLOCK_SIZE, DATA_LENGTH_MAX),
        };
        if got > limit {
            return Err(WireError::TooLong { kind, got, limit });
        }
        if got < least {
            return Err(WireError::TooShort { kind, got, least });
        }
        if matches!(kind.shape(self.flags), BodyShape::Range | BodyShape::Data) && !self.extent().is_some_and(Extent::is_block_aligned) {
            return Err(WireError::Range { offset: self.offset.get(), length: got });
        }
        Ok(())
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} term {} sequence {} range {}+{}", self.kind, self.term, self.sequence, self.offset, self.length)
    }
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

pub(super) fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}
