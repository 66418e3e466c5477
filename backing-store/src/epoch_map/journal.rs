//! The journal: a ring of batches, each some header blocks full of records and then the data of overwrites.
//!
//! A batch counts if its header's checksum is right, it continues the chain of the one before it, and its payload has the
//! checksums that its records name. Reading stops at the first that doesn't count. Whether that is where a crash ended writing
//! or damage inside the journal, later batches tell: each says through which batch everything was on stable media when it was
//! written.

use super::codec::{FormatError, Reader, Writer};
use super::record::Record;
use crate::units::{BLOCK_SIZE, StoreId};

/// Number of a batch since the store was made. The first is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchNumber(pub u64);

impl BatchNumber {
    /// The one that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The one before.
    #[must_use]
    pub const fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

const BLOCK: usize = BLOCK_SIZE as usize;
const MAGIC: [u8; 4] = *b"CJNL";
const VERSION: u16 = 1;
const FIXED: usize = 80;
const CHECKSUM_AT: usize = 72;
/// Most header blocks of a batch: 64 KiB of records. The largest single operation's take 6 KiB.
const HEADER_BLOCKS_MAX: usize = 16;
/// Most payload blocks of a batch: 1 MiB, one I/O.
const PAYLOAD_BLOCKS_MAX: usize = 256;

/// Most header blocks of a batch in a ring of so many blocks: small rings hold several.
pub(super) fn header_max(ring: u64) -> usize {
    HEADER_BLOCKS_MAX.min(usize::try_from(ring / 64).unwrap_or(HEADER_BLOCKS_MAX))
}

/// Most payload blocks of a batch in a ring of so many blocks.
pub(super) fn payload_max(ring: u64) -> usize {
    PAYLOAD_BLOCKS_MAX.min(usize::try_from(ring / 16).unwrap_or(PAYLOAD_BLOCKS_MAX))
}

/// Room for records in so many header blocks.
pub(super) const fn body_room(header_blocks: usize) -> usize {
    header_blocks * BLOCK - FIXED
}

/// The fixed part of a batch's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHead {
    /// Whose journal.
    pub store: StoreId,
    /// Which batch.
    pub number: BatchNumber,
    /// In which opening of the store it was written.
    pub incarnation: u32,
    /// Checksum of the batch before.
    pub chain: u32,
    /// Everything up to this batch, data outside the journal included, was on stable media when this one was written.
    pub synced: BatchNumber,
    /// The overwrites up to this batch have been copied to their places, on stable media.
    pub copied: BatchNumber,
    /// Where in the ring it is, in blocks.
    pub offset: u64,
    /// How many header blocks.
    pub header_blocks: usize,
    /// How many payload blocks.
    pub payload_blocks: usize,
}

impl BatchHead {
    /// Blocks in all.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        (self.header_blocks + self.payload_blocks) as u64
    }
}

/// A batch's header, decoded; its payload is not yet checked.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The fixed part.
    pub head: BatchHead,
    /// The changes, in order.
    pub records: Vec<Record>,
    /// Its own checksum, which the next one names.
    pub checksum: u32,
}

/// How many header blocks a batch with a body of so many bytes takes.
pub(super) const fn header_blocks(body: usize) -> usize {
    (FIXED + body).div_ceil(BLOCK)
}

/// Writes the header into `place`, which has `head.header_blocks` blocks. Returns its checksum.
pub(super) fn encode_header(head: &BatchHead, records: u32, body: &[u8], place: &mut [u8]) -> u32 {
    let mut writer = Writer { bytes: Vec::with_capacity(FIXED) };
    writer.bytes(&MAGIC);
    writer.u16(VERSION);
    writer.u16(u16::try_from(head.header_blocks).unwrap_or(u16::MAX));
    writer.u32(u32::try_from(head.payload_blocks).unwrap_or(u32::MAX));
    writer.u32(records);
    writer.bytes(&head.store.to_bytes());
    writer.u64(head.number.0);
    writer.u32(head.incarnation);
    writer.u32(head.chain);
    writer.u64(head.synced.0);
    writer.u64(head.copied.0);
    writer.u32(u32::try_from(head.offset).unwrap_or(u32::MAX));
    writer.u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
    writer.u32(0);
    writer.u32(0);
    let end = FIXED + body.len();
    place[..FIXED].copy_from_slice(&writer.bytes);
    place[FIXED..end].copy_from_slice(body);
    place[end..].fill(0);
    let checksum = crc32c::crc32c(place);
    place[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
    checksum
}

/// How many header blocks a batch says it has, from its first block: what must be read before it can be decoded.
///
/// # Errors
/// [`FormatError`] if that is no batch's first block.
pub fn header_length(first: &[u8]) -> Result<usize, FormatError> {
    let mut reader = Reader::new(first, "batch");
    if reader.array()? != MAGIC {
        return Err(FormatError::Magic);
    }
    if reader.u16()? != VERSION {
        return Err(FormatError::Field("version"));
    }
    let blocks = usize::from(reader.u16()?);
    if blocks == 0 || blocks > HEADER_BLOCKS_MAX {
        return Err(FormatError::Field("header_blocks"));
    }
    Ok(blocks)
}

/// Decodes a whole header.
///
/// # Errors
/// [`FormatError`].
pub fn decode_header(header: &[u8]) -> Result<Batch, FormatError> {
    let header_blocks = header_length(header)?;
    if header.len() != header_blocks * BLOCK {
        return Err(FormatError::Truncated("batch"));
    }
    let mut reader = Reader::new(&header[8..], "batch");
    let payload_blocks = reader.u32()? as usize;
    if payload_blocks > PAYLOAD_BLOCKS_MAX {
        return Err(FormatError::Field("payload_blocks"));
    }
    let records = reader.u32()?;
    let store = StoreId::from_bytes(reader.array()?);
    let number = BatchNumber(reader.u64()?);
    let (incarnation, chain) = (reader.u32()?, reader.u32()?);
    let (synced, copied) = (BatchNumber(reader.u64()?), BatchNumber(reader.u64()?));
    let offset = u64::from(reader.u32()?);
    let body_length = reader.u32()? as usize;
    let checksum = reader.u32()?;
    reader.u32()?;
    let zeroed = [0; 4];
    let computed =
        crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&header[..CHECKSUM_AT]), &zeroed), &header[CHECKSUM_AT + 4..]);
    if computed != checksum {
        return Err(FormatError::Checksum);
    }
    let mut body = Reader::new(reader.bytes(body_length)?, "batch");
    let mut decoded = Vec::new();
    for _ in 0..records {
        decoded.push(Record::decode(&mut body)?);
    }
    if !body.is_empty() || decoded.iter().map(Record::payload_blocks).sum::<usize>() != payload_blocks {
        return Err(FormatError::Field("records"));
    }
    let head = BatchHead { store, number, incarnation, chain, synced, copied, offset, header_blocks, payload_blocks };
    Ok(Batch { head, records: decoded, checksum })
}
