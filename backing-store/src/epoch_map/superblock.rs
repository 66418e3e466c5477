//! Where everything lies in a store, and the superblock that says so and names the last checkpoint.

use super::codec::{FormatError, Reader, Writer};
use super::journal::BatchNumber;
use crate::disk::DiskBlock;
use crate::units::{BLOCK_SIZE, StoreId};

/// The first bytes of a store.
pub const MAGIC: [u8; 8] = *b"CARRICK\x01";
/// The version of everything that this module and its neighbours write.
pub const FORMAT: u32 = 2;
/// Feature: states and epochs say what a copy into a replica may leave out.
pub const SYNCED_EPOCHS: u64 = 1;
/// Features without which a store can't be read.
pub const INCOMPATIBLE: u64 = SYNCED_EPOCHS;
/// Features without which a store can't be written, only read. None yet.
pub const READ_ONLY_COMPATIBLE: u64 = 0;

/// Where the two copies of the superblock are, and the end of their area: far apart for a disk, so that one bad spot doesn't
/// take both.
pub const COPIES: [DiskBlock; 2] = [DiskBlock::new(0), DiskBlock::new(128)];
const HEAD_BLOCKS: u64 = 256;

/// Smallest store: 4 MiB of journal, and something to put in. 8 MiB keep tests of full stores short; the tools ask for more.
pub const BLOCKS_MIN: u64 = (8 << 20) / BLOCK_SIZE as u64;
/// Largest store, in blocks: 4 PiB, so that a place fits into 40 bits.
pub const BLOCKS_LIMIT: u64 = 1 << 40;
const JOURNAL_MIN: u64 = (2 << 20) / BLOCK_SIZE as u64;
const JOURNAL_MAX: u64 = (256 << 20) / BLOCK_SIZE as u64;
const CATALOG_MIN: u64 = (256 << 10) / BLOCK_SIZE as u64;
const CATALOG_MAX: u64 = (4 << 20) / BLOCK_SIZE as u64;
/// Checkpoints and batches that a store can have had: thousands of years' worth.
const COUNT_MAX: u64 = 1 << 62;
/// Data begins at, and ends with, a whole one of these.
pub const CHUNK_BLOCKS: u64 = 256;

/// The areas of a store, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// All of it.
    pub blocks: u64,
    /// One copy of the catalog; there are two halves of two copies each.
    pub catalog_blocks: u64,
    /// The ring of the journal.
    pub journal_blocks: u64,
    /// Data and map pages.
    pub data_blocks: u64,
}

impl Geometry {
    /// The areas of a store of so many blocks. `None` if that is too few or too many.
    #[must_use]
    pub fn new(blocks: u64) -> Option<Self> {
        if !(BLOCKS_MIN..=BLOCKS_LIMIT).contains(&blocks) {
            return None;
        }
        let catalog_blocks = (blocks / 1024).clamp(CATALOG_MIN, CATALOG_MAX);
        let journal_blocks = (blocks / 64).clamp(JOURNAL_MIN, JOURNAL_MAX);
        let mut geometry = Self { blocks, catalog_blocks, journal_blocks, data_blocks: 0 };
        geometry.data_blocks = (blocks - geometry.data_start().get()) / CHUNK_BLOCKS * CHUNK_BLOCKS;
        Some(geometry)
    }

    /// Where a copy (0 or 1) of a half (0 or 1) of the catalog begins.
    #[must_use]
    pub const fn catalog_at(&self, half: u64, copy: u64) -> DiskBlock {
        DiskBlock::new(HEAD_BLOCKS + (copy * 2 + half) * self.catalog_blocks)
    }

    /// Where the journal begins.
    #[must_use]
    pub const fn journal_start(&self) -> DiskBlock {
        DiskBlock::new(HEAD_BLOCKS + 4 * self.catalog_blocks)
    }

    /// Where data begins.
    #[must_use]
    pub const fn data_start(&self) -> DiskBlock {
        DiskBlock::new((self.journal_start().get() + self.journal_blocks).next_multiple_of(CHUNK_BLOCKS))
    }

    /// Where data ends.
    #[must_use]
    pub const fn data_end(&self) -> DiskBlock {
        self.data_start().plus(self.data_blocks)
    }

    /// Whether a block of data or a page may lie there.
    #[must_use]
    pub const fn is_data(&self, place: DiskBlock) -> bool {
        self.data_start().get() <= place.get() && place.get() < self.data_end().get()
    }
}

/// Where in the journal reading begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalHead {
    /// The first batch that the checkpoint doesn't contain.
    pub batch: BatchNumber,
    /// Where in the ring it is, in blocks.
    pub offset: u64,
    /// The checksum of the batch before it.
    pub chain: u32,
}

/// What makes a store out of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Identity of the store.
    pub id: StoreId,
    /// Features that programs may ignore.
    pub compatible: u64,
    /// Features that programs must know to write.
    pub read_only_compatible: u64,
    /// Features that programs must know to read.
    pub incompatible: u64,
    /// Where everything lies.
    pub geometry: Geometry,
    /// Number of the checkpoint; the higher one of two superblocks counts.
    pub checkpoint: u64,
    /// Length of the catalog, in bytes. Its half is the checkpoint's lowest bit.
    pub catalog_length: u32,
    /// The catalog's checksum.
    pub catalog_checksum: u32,
    /// How often the store was opened for writing.
    pub incarnation: u32,
    /// Where the journal goes on from this checkpoint.
    pub journal: JournalHead,
}

const BLOCK: usize = BLOCK_SIZE as usize;

impl Superblock {
    /// One block.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut writer = Writer::default();
        writer.bytes(&MAGIC);
        writer.u32(FORMAT);
        writer.u32(0);
        writer.u64(self.compatible);
        writer.u64(self.read_only_compatible);
        writer.u64(self.incompatible);
        writer.bytes(&self.id.to_bytes());
        writer.u64(self.geometry.blocks);
        writer.u64(self.geometry.catalog_blocks);
        writer.u64(self.geometry.journal_blocks);
        writer.u64(self.geometry.data_blocks);
        writer.u64(self.checkpoint);
        writer.u32(self.catalog_length);
        writer.u32(self.catalog_checksum);
        writer.u32(self.incarnation);
        writer.u32(self.journal.chain);
        writer.u64(self.journal.batch.0);
        writer.u64(self.journal.offset);
        let mut block = [0; BLOCK];
        block[..writer.bytes.len()].copy_from_slice(&writer.bytes);
        let checksum = crc32c::crc32c(&block[..BLOCK - 4]);
        block[BLOCK - 4..].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    /// Reads one block. The format's version comes first, since a newer one may have its checksum elsewhere.
    ///
    /// # Errors
    /// [`SuperblockError`].
    pub fn decode(block: &[u8]) -> Result<Self, SuperblockError> {
        let mut reader = Reader::new(block, "superblock");
        if reader.bytes(8)? != MAGIC {
            return Err(FormatError::Magic.into());
        }
        let format = reader.u32()?;
        let checksum = block.get(BLOCK - 4..BLOCK).ok_or(FormatError::Truncated("superblock"))?;
        if crc32c::crc32c(&block[..BLOCK - 4]).to_le_bytes() != checksum {
            return Err(FormatError::Checksum.into());
        }
        if format != FORMAT {
            return Err(SuperblockError::Version(format));
        }
        reader.u32()?;
        let (compatible, read_only_compatible, incompatible) = (reader.u64()?, reader.u64()?, reader.u64()?);
        if incompatible & !INCOMPATIBLE != 0 {
            return Err(SuperblockError::Features(incompatible & !INCOMPATIBLE));
        }
        let id = StoreId::from_bytes(reader.array()?);
        let geometry =
            Geometry { blocks: reader.u64()?, catalog_blocks: reader.u64()?, journal_blocks: reader.u64()?, data_blocks: reader.u64()? };
        geometry.check()?;
        let checkpoint = reader.u64()?;
        if checkpoint > COUNT_MAX {
            return Err(FormatError::Field("checkpoint").into());
        }
        let (catalog_length, catalog_checksum, incarnation, chain) = (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
        if u64::from(catalog_length) > geometry.catalog_blocks * u64::from(BLOCK_SIZE) {
            return Err(FormatError::Field("catalog_length").into());
        }
        let journal = JournalHead { batch: BatchNumber(reader.u64()?), offset: reader.u64()?, chain };
        if incarnation >= u32::MAX - 1 || journal.batch.0 == 0 || journal.batch.0 > COUNT_MAX {
            return Err(FormatError::Field("incarnation or batch").into());
        }
        if journal.offset >= geometry.journal_blocks {
            return Err(FormatError::Field("journal_offset").into());
        }
        Ok(Self {
            id,
            compatible,
            read_only_compatible,
            incompatible,
            geometry,
            checkpoint,
            catalog_length,
            catalog_checksum,
            incarnation,
            journal,
        })
    }
}

impl Geometry {
    /// Whether such areas can be: a later version may choose other proportions, but they must fit.
    fn check(&self) -> Result<(), FormatError> {
        let sane = |blocks: u64, least: u64| (least..=BLOCKS_LIMIT).contains(&blocks);
        if !sane(self.blocks, BLOCKS_MIN) {
            return Err(FormatError::Field("blocks"));
        }
        if !sane(self.catalog_blocks, 1) || self.catalog_blocks > CATALOG_MAX {
            return Err(FormatError::Field("catalog_blocks"));
        }
        if !sane(self.journal_blocks, JOURNAL_MIN) || self.journal_blocks > JOURNAL_MAX {
            return Err(FormatError::Field("journal_blocks"));
        }
        let fits = self.data_blocks.is_multiple_of(CHUNK_BLOCKS) && sane(self.data_blocks, CHUNK_BLOCKS);
        if !fits || self.data_end().get() > self.blocks {
            return Err(FormatError::Field("data_blocks"));
        }
        Ok(())
    }
}

/// Why a block is no superblock that this program can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// It is none, or damaged.
    #[error(transparent)]
    Damaged(#[from] FormatError),
    /// Another version.
    #[error("its format is {0}")]
    Version(u32),
    /// Unknown features.
    #[error("it uses features {0:#x}")]
    Features(u64),
}
