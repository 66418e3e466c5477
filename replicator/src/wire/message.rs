//! The bodies of frames that carry a message: a CRC32C of the rest, then fixed little-endian fields.

use carrick_backing_store::{
    BLOCK_SIZE, BlockIndex, ByteLength, ByteOffset, CHANGED_MAX, Content, Epoch, Extent, LoggedExtents, Seq, StoreId, Synced, Term,
    VolumeSize,
};

use carrick_backing_store::units::VOLUME_SIZE_MAX;

use super::header::{Kind, read_u32, read_u64};
use super::{VERSION, WireError};

/// Features whose absence on one side makes a connection impossible. None yet.
pub const FEATURES_INCOMPATIBLE: u64 = 0;
/// Longest text of an error, in bytes.
pub const ERROR_TEXT_MAX: usize = 1024;
/// Most extents in a log answer: as many as a primary's backlog has writes.
pub const LOG_EXTENTS_MAX: usize = 32_768;

/// Body of Hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lowest version spoken.
    pub version_min: u8,
    /// Highest version spoken.
    pub version_max: u8,
    /// Features the other side must know, too.
    pub features_incompatible: u64,
    /// Features the other side may ignore.
    pub features_compatible: u64,
}

impl Hello {
    /// What this program says.
    pub const OURS: Self =
        Self { version_min: VERSION, version_max: VERSION, features_incompatible: FEATURES_INCOMPATIBLE, features_compatible: 0 };

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.version_min, self.version_max, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&self.features_incompatible.to_le_bytes());
        out.extend_from_slice(&self.features_compatible.to_le_bytes());
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        // Later versions may say more: what follows the known fields is ignored here, for ever.
        let fields = prefix(Kind::Hello, bytes, 24)?;
        Ok(Self {
            version_min: fields[0],
            version_max: fields[1],
            features_incompatible: read_u64(fields, 8),
            features_compatible: read_u64(fields, 16),
        })
    }
}

/// Body of HelloAnswer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelloAnswer {
    /// The version spoken from now on.
    pub version: u8,
    /// As in [`Hello`].
    pub features_incompatible: u64,
    /// As in [`Hello`].
    pub features_compatible: u64,
    /// Which store answers.
    pub store: StoreId,
}

impl HelloAnswer {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.version, 0, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&self.features_incompatible.to_le_bytes());
        out.extend_from_slice(&self.features_compatible.to_le_bytes());
        out.extend_from_slice(&self.store.to_bytes());
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let fields = prefix(Kind::HelloAnswer, bytes, 40)?;
        let mut store = [0; 16];
        store.copy_from_slice(&fields[24..40]);
        Ok(Self {
            version: fields[0],
            features_incompatible: read_u64(fields, 8),
            features_compatible: read_u64(fields, 16),
            store: StoreId::from_bytes(store),
        })
    }
}

/// Body of StatusAnswer and PromiseAnswer: how a replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusAnswer {
    /// The highest term promised.
    pub promised: Term,
    /// The term under which it was last reconciled.
    pub log_term: Term,
    /// The writes of the log term that it has received.
    pub position: Seq,
    /// Those on stable media.
    pub durable: Seq,
    /// The replica's size.
    pub size: VolumeSize,
    /// What the blocks are worth.
    pub content: Content,
    /// What its next write carries.
    pub epoch: Epoch,
    /// What a copy into it may leave out.
    pub synced: Synced,
}

/// Bytes of a status without and with what concerns epochs.
const STATUS_SHORT: usize = 48;
const STATUS: usize = 72;

impl StatusAnswer {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.promised.get().to_le_bytes());
        out.extend_from_slice(&self.log_term.get().to_le_bytes());
        out.extend_from_slice(&self.position.get().to_le_bytes());
        out.extend_from_slice(&self.durable.get().to_le_bytes());
        out.extend_from_slice(&self.size.bytes().get().to_le_bytes());
        let content = match self.content {
            Content::Complete => 0,
            Content::Mixed => 1,
            Content::Rebuilding => 2,
        };
        out.extend_from_slice(&[content, 0, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&self.epoch.get().to_le_bytes());
        out.extend_from_slice(&self.synced.epoch.get().to_le_bytes());
        out.extend_from_slice(&self.synced.copied.get().to_le_bytes());
        out.extend_from_slice(&self.synced.copied_epoch.get().to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }

    pub(super) fn decode(kind: Kind, bytes: &[u8]) -> Result<Self, WireError> {
        let fields = prefix(kind, bytes, STATUS_SHORT)?;
        let epoch_at = |at: usize| if bytes.len() < STATUS { Epoch::NEVER } else { Epoch::new(read_u32(bytes, at)) };
        let copied = if bytes.len() < STATUS { 0 } else { read_u64(bytes, 56) };
        if copied > VOLUME_SIZE_MAX / u64::from(BLOCK_SIZE) {
            return Err(WireError::Field { kind, field: "copied" });
        }
        Ok(Self {
            promised: Term::new(read_u64(fields, 0)),
            log_term: Term::new(read_u64(fields, 8)),
            position: Seq::new(read_u64(fields, 16)),
            durable: Seq::new(read_u64(fields, 24)),
            size: VolumeSize::new(read_u64(fields, 32)).map_err(|_| WireError::Field { kind, field: "size" })?,
            content: match fields[40] {
                0 => Content::Complete,
                1 => Content::Mixed,
                2 => Content::Rebuilding,
                _ => return Err(WireError::Field { kind, field: "content" }),
            },
            epoch: epoch_at(48),
            synced: Synced { epoch: epoch_at(52), copied: BlockIndex::new(copied), copied_epoch: epoch_at(64) },
        })
    }
}

/// Body of LogAnswer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogAnswer {
    /// The extents, or that they are no longer known.
    pub extents: LoggedExtents,
}

impl LogAnswer {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let (known, extents) = match &self.extents {
            LoggedExtents::All(extents) if extents.len() <= LOG_EXTENTS_MAX => (1, extents.as_slice()),
            // Too many to tell are as good as unknown: the primary copies everything.
            LoggedExtents::All(_) | LoggedExtents::Forgotten => (0, &[][..]),
        };
        out.extend_from_slice(&[known, 0, 0, 0, 0, 0, 0, 0]);
        for extent in extents {
            out.extend_from_slice(&extent.offset().get().to_le_bytes());
            out.extend_from_slice(&extent.length().get().to_le_bytes());
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        const KIND: Kind = Kind::LogAnswer;
        let known = prefix(KIND, bytes, 8)?[0];
        let rest = &bytes[8..];
        if known == 0 {
            return Ok(Self { extents: LoggedExtents::Forgotten });
        }
        if known != 1 {
            return Err(WireError::Field { kind: KIND, field: "known" });
        }
        Ok(Self { extents: LoggedExtents::All(extents(KIND, rest, LOG_EXTENTS_MAX)?) })
    }
}

/// Body of ChangedAnswer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedAnswer {
    /// In ascending order, not overlapping; at most [`CHANGED_MAX`].
    pub extents: Vec<Extent>,
    /// Where to go on; `None` at the end of the volume.
    pub next: Option<ByteOffset>,
}

impl ChangedAnswer {
    /// Stands for no next one: no volume is so large.
    const END: u64 = u64::MAX;

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.next.map_or(Self::END, ByteOffset::get).to_le_bytes());
        for extent in &self.extents {
            out.extend_from_slice(&extent.offset().get().to_le_bytes());
            out.extend_from_slice(&extent.length().get().to_le_bytes());
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        const KIND: Kind = Kind::ChangedAnswer;
        let next = read_u64(prefix(KIND, bytes, 8)?, 0);
        let extents = extents(KIND, &bytes[8..], CHANGED_MAX)?;
        let ascending = extents.windows(2).all(|pair| pair[0].end() <= pair[1].offset());
        // An answer that doesn't get on would be asked for again for ever.
        let gets_on = extents.last().is_none_or(|last| last.end().get() <= next);
        if !ascending || !gets_on {
            return Err(WireError::Field { kind: KIND, field: "extents" });
        }
        Ok(Self { extents, next: (next != Self::END).then_some(ByteOffset::new(next)) })
    }
}

/// Extents of whole blocks, 16 bytes each.
fn extents(kind: Kind, bytes: &[u8], most: usize) -> Result<Vec<Extent>, WireError> {
    let invalid = WireError::Field { kind, field: "extents" };
    if !bytes.len().is_multiple_of(16) || bytes.len() / 16 > most {
        return Err(invalid);
    }
    let extents = bytes.chunks_exact(16).map(|entry| {
        Extent::new(ByteOffset::new(read_u64(entry, 0)), ByteLength::new(read_u64(entry, 8)))
            .filter(|extent| extent.is_block_aligned() && !extent.is_empty())
            .ok_or(invalid)
    });
    extents.collect()
}

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// Why a request was refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum ErrorCode {
            $($(#[$doc])* $name = $value,)*
        }

        impl ErrorCode {
            /// Every code, for tests over all of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            const fn from_wire(value: u16) -> Option<Self> {
                match value {
                    $($value => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

error_codes! {
    /// No version in common.
    UnsupportedVersion = 1,
    /// An incompatible feature that this side doesn't know; the text names it.
    UnsupportedFeature = 2,
    /// The bytes were no frame; the text says which field.
    BadFrame = 3,
    /// No replica of this volume here.
    UnknownVolume = 4,
    /// A higher term is promised; the header's term says which.
    StaleTerm = 5,
    /// Not the next sequence, or not for the state the replica is in; the header's sequence is its position.
    OutOfOrder = 6,
    /// Outside the volume.
    OutOfRange = 7,
    /// No room on the disk.
    NoSpace = 8,
    /// A block fails its checksum: it must come from another replica.
    Corrupt = 9,
    /// The disk failed.
    Io = 10,
    /// A write to stable media failed earlier: this replica serves nothing more until it was looked at afresh.
    Poisoned = 11,
    /// Too many connections or requests at once.
    Busy = 12,
    /// What changed since that epoch is no longer known: compare everything.
    EpochForgotten = 13,
}

/// Body of Error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct ErrorBody {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub text: String,
}

impl ErrorBody {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.code as u16).to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        let mut end = self.text.len().min(ERROR_TEXT_MAX);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        out.extend_from_slice(&self.text.as_bytes()[..end]);
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        const KIND: Kind = Kind::Error;
        let fields = prefix(KIND, bytes, 8)?;
        let code =
            ErrorCode::from_wire(u16::from_le_bytes([fields[0], fields[1]])).ok_or(WireError::Field { kind: KIND, field: "code" })?;
        let text = &bytes[8..];
        if text.len() > ERROR_TEXT_MAX {
            return Err(WireError::Field { kind: KIND, field: "text" });
        }
        let text = std::str::from_utf8(text).map_err(|_| WireError::Field { kind: KIND, field: "text" })?;
        Ok(Self { code, text: text.to_owned() })
    }
}

/// The fields of known length at the front.
fn prefix(kind: Kind, bytes: &[u8], length: usize) -> Result<&[u8], WireError> {
    bytes.get(..length).ok_or(WireError::TooShort {
        kind,
        // The header's length counts the checksum, which is no longer in `bytes`.
        got: u32::try_from(bytes.len() + 4).unwrap_or(u32::MAX),
        least: u32::try_from(length + 4).unwrap_or(u32::MAX),
    })
}

/// Splits a body into its checked content.
pub(super) fn checked(kind: Kind, body: &[u8]) -> Result<&[u8], WireError> {
    if body.len() < 4 {
        return Err(WireError::TooShort { kind, got: u32::try_from(body.len()).unwrap_or(u32::MAX), least: 4 });
    }
    let (expected, got) = (read_u32(body, 0), crc32c::crc32c(&body[4..]));
    if expected == got { Ok(&body[4..]) } else { Err(WireError::BodyChecksum { kind, expected, got }) }
}
