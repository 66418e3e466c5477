//! Format version 1 of a store's files, as bytes: what `docs/store-format.md` says, and nothing else. No I/O here.
//!
//! Every `decode` takes foreign bytes of any length and never panics. All numbers are little-endian. The magic, the version, the
//! feature words and the place of the checksum are where they are in every later version too, so that an old program can refuse a
//! new store by name.

use crate::checksum::Checksum;
use crate::store::{Content, ReplicaState, SEQ_MAX, StoreError};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, ByteOffset, Extent, Seq, StoreId, Term, VolumeId, VolumeSize};
use std::path::Path;

/// The format that this program writes, and the newest that it reads.
pub const VERSION: u32 = 1;
/// Size of the superblock, the header and a state slot.
pub const PAGE: usize = 4096;
/// Size of a record of the log, and of one copy of the applied record.
pub const RECORD: usize = 32;
/// Size of an entry of the checksum table.
pub const ENTRY: usize = 8;
/// Records in a new replica's log: what the replicator flushes in the background (every second) stays far below it.
pub const LOG_RECORDS: u64 = 65_536;
/// Where a new replica's data area may begin: fresh large pages and RAID stripes are not straddled.
pub const DATA_ALIGNMENT: u64 = 1 << 20;

const SUPERBLOCK_MAGIC: [u8; 8] = *b"CRKSTORE";
const HEADER_MAGIC: [u8; 8] = *b"CRKREPL1";
const SLOT_MAGIC: [u8; 8] = *b"CRKSTATE";
const CHECKSUM_AT: usize = PAGE - 4;
const PAGE_BYTES: u64 = PAGE as u64;
const RECORD_BYTES: u64 = RECORD as u64;
const ENTRY_BYTES: u64 = ENTRY as u64;
/// 48 bits: more blocks than the largest volume has.
const U48_MAX: u64 = (1 << 48) - 1;
/// No byte of it is zero, so that no single damaged byte (nor three) turns a written block into a hole.
const WRITTEN: u32 = 0x4e54_5257;
const FLAG_CLEAN: u8 = 1;
const FLAG_LOG_LOST: u8 = 2;
const FLAG_SUSPECT: u32 = 1;

const _: () = assert!(crate::units::VOLUME_SIZE_MAX / BLOCK_SIZE as u64 <= U48_MAX);

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Too few of them.
    #[error("{got} bytes are there, {needed} are needed")]
    Short {
        /// How many it takes.
        needed: usize,
        /// How many there are.
        got: usize,
    },
    /// Something else altogether.
    #[error("the magic number is missing")]
    Magic,
    /// They changed since they were written.
    #[error("checksum {stored:#010x} is stored, {computed:#010x} was computed")]
    Checksum {
        /// What the bytes say.
        stored: Checksum,
        /// What they give.
        computed: Checksum,
    },
    /// Written by a newer program.
    #[error("format {0}, this program knows up to {VERSION}")]
    Version(u32),
    /// Uses features of a newer program.
    #[error("unknown features {0:#018x}")]
    Features(u64),
    /// A field has a value that it can't have.
    #[error("{0}")]
    Field(&'static str),
}

impl FormatError {
    pub(super) fn at(self, path: &Path) -> StoreError {
        let path = path.to_path_buf();
        match self {
            Self::Version(found) => StoreError::UnknownFormat { path, found, known: VERSION },
            Self::Features(features) => StoreError::UnknownFeatures { path, features },
            other => StoreError::Damaged { path, reason: other.to_string() },
        }
    }
}

type Page = [u8; PAGE];

fn page(bytes: &[u8]) -> Result<&Page, FormatError> {
    bytes.first_chunk().ok_or(FormatError::Short { needed: PAGE, got: bytes.len() })
}

fn record(bytes: &[u8]) -> Result<&[u8; RECORD], FormatError> {
    bytes.first_chunk().ok_or(FormatError::Short { needed: RECORD, got: bytes.len() })
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

fn array<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&from[at..at + N]);
    bytes
}

fn u64_at(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(from, at))
}

fn u32_at(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(from, at))
}

fn put_u48(to: &mut [u8], at: usize, value: u64) {
    put(to, at, &value.to_le_bytes()[..6]);
}

fn u48_at(from: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..6].copy_from_slice(&from[at..at + 6]);
    u64::from_le_bytes(bytes)
}

fn seal(mut page: Page) -> Page {
    let sum = crc32c::crc32c(&page[..CHECKSUM_AT]);
    put(&mut page, CHECKSUM_AT, &sum.to_le_bytes());
    page
}

fn check_sealed(page: &Page, magic: [u8; 8]) -> Result<(), FormatError> {
    if array(page, 0) != magic {
        return Err(FormatError::Magic);
    }
    let (stored, computed) = (u32_at(page, CHECKSUM_AT), crc32c::crc32c(&page[..CHECKSUM_AT]));
    if stored != computed {
        return Err(FormatError::Checksum { stored, computed });
    }
    Ok(())
}

/// The version and the feature words, of which version 1 has none. A store is always opened for writing, so an unknown
/// feature that only readers may ignore is refused as well.
fn check_version(page: &Page) -> Result<(), FormatError> {
    let version = u32_at(page, 8);
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    match u64_at(page, 24) | u64_at(page, 32) {
        0 => Ok(()),
        unknown => Err(FormatError::Features(unknown)),
    }
}

/// CRC32C of a record, bound to the volume so that a record of another replica is never believed.
fn record_sum(volume: VolumeId, bytes: &[u8]) -> Checksum {
    crc32c::crc32c_append(crc32c::crc32c(&volume.to_bytes()), bytes)
}

/// The first page of `carrick-store`; the second is a copy of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Who the store is.
    pub id: StoreId,
}

impl Superblock {
    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        put(&mut page, 0, &SUPERBLOCK_MAGIC);
        put(&mut page, 8, &VERSION.to_le_bytes());
        put(&mut page, 40, &self.id.to_bytes());
        seal(page)
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FormatError`] says what is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let page = page(bytes)?;
        check_sealed(page, SUPERBLOCK_MAGIC)?;
        check_version(page)?;
        Ok(Self { id: StoreId::from_bytes(array(page, 40)) })
    }
}

/// Where a replica file's parts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    log_records: u64,
    table_at: u64,
    data_at: u64,
    file_length: u64,
}

impl Layout {
    /// Where the two state slots are.
    pub const SLOTS_AT: [u64; 2] = [PAGE_BYTES, 2 * PAGE_BYTES];
    /// Where the applied record's two copies are.
    pub const APPLIED_AT: u64 = 3 * PAGE_BYTES;
    /// Where the log begins.
    pub const LOG_AT: u64 = 4 * PAGE_BYTES;

    /// The parts of a replica of `size`, with a log of `log_records` and its data at a multiple of `data_alignment`.
    ///
    /// # Errors
    /// [`FormatError::Field`] if the log is empty or a number overflows.
    pub fn new(size: VolumeSize, log_records: u64, data_alignment: u64) -> Result<Self, FormatError> {
        let parts = || {
            let log_length = log_records.checked_mul(RECORD_BYTES)?.checked_next_multiple_of(PAGE_BYTES)?;
            let table_at = Self::LOG_AT.checked_add(log_length)?;
            let table_length = size.blocks().checked_mul(ENTRY_BYTES)?.checked_next_multiple_of(PAGE_BYTES)?;
            let data_at = table_at.checked_add(table_length)?.checked_next_multiple_of(data_alignment)?;
            let file_length = data_at.checked_add(size.bytes().get())?;
            i64::try_from(file_length).ok()?;
            Some(Self { log_records, table_at, data_at, file_length })
        };
        if log_records == 0 {
            return Err(FormatError::Field("the log has no records"));
        }
        parts().ok_or(FormatError::Field("an offset overflows"))
    }

    /// How many records the log holds.
    #[must_use]
    pub const fn log_records(self) -> u64 {
        self.log_records
    }

    /// How long the file is.
    #[must_use]
    pub const fn file_length(self) -> ByteLength {
        ByteLength::new(self.file_length)
    }

    /// The place of the record of this write.
    #[must_use]
    pub const fn log_record(self, seq: Seq) -> u64 {
        Self::LOG_AT + seq.get() % self.log_records * RECORD_BYTES
    }

    /// The place of a block's entry. The block must be within the volume.
    #[must_use]
    pub const fn entry(self, block: BlockIndex) -> u64 {
        self.table_at + block.get() * ENTRY_BYTES
    }

    /// The place of a block's bytes. The block must be within the volume.
    #[must_use]
    pub const fn block(self, block: BlockIndex) -> u64 {
        self.data_at + block.get() * BLOCK_SIZE as u64
    }

    /// The block whose bytes are at `place`, a place within the data area.
    #[must_use]
    pub const fn block_at(self, place: u64) -> BlockIndex {
        BlockIndex::new(place.saturating_sub(self.data_at) / BLOCK_SIZE as u64)
    }
}

/// The first page of a replica file, written once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose replica it is.
    pub volume: VolumeId,
    /// How large the volume is.
    pub size: VolumeSize,
    /// Where everything is.
    pub layout: Layout,
}

impl Header {
    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        put(&mut page, 0, &HEADER_MAGIC);
        put(&mut page, 8, &VERSION.to_le_bytes());
        put(&mut page, 12, &BLOCK_SIZE.to_le_bytes());
        put(&mut page, 40, &self.volume.to_bytes());
        put(&mut page, 56, &self.size.bytes().get().to_le_bytes());
        put(&mut page, 64, &self.layout.log_records.to_le_bytes());
        put(&mut page, 72, &self.layout.table_at.to_le_bytes());
        put(&mut page, 80, &self.layout.data_at.to_le_bytes());
        put(&mut page, 88, &self.layout.file_length.to_le_bytes());
        seal(page)
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FormatError`] says what is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let page = page(bytes)?;
        check_sealed(page, HEADER_MAGIC)?;
        check_version(page)?;
        if u32_at(page, 12) != BLOCK_SIZE {
            return Err(FormatError::Field("the block size is not 4096"));
        }
        let size = VolumeSize::new(u64_at(page, 56)).map_err(|_| FormatError::Field("the volume's size is not a possible one"))?;
        let (log_records, data_at) = (u64_at(page, 64), u64_at(page, 80));
        // The table follows the log; the data may leave a gap after the table, for alignment.
        let mut layout = Layout::new(size, log_records, PAGE_BYTES)?;
        if u64_at(page, 72) != layout.table_at || data_at < layout.data_at || !data_at.is_multiple_of(PAGE_BYTES) {
            return Err(FormatError::Field("the parts of the file overlap"));
        }
        layout.data_at = data_at;
        layout.file_length = u64_at(page, 88);
        if data_at.checked_add(size.bytes().get()) != Some(layout.file_length) || i64::try_from(layout.file_length).is_err() {
            return Err(FormatError::Field("the length of the file does not fit its parts"));
        }
        Ok(Self { volume: VolumeId::from_bytes(array(page, 40)), size, layout })
    }
}

/// Which boot of which machine: `/proc/sys/kernel/random/boot_id`. Equal means that the page cache has survived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

/// A state slot. The valid one with the higher generation counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSlot {
    /// Grows by one with each slot written.
    pub generation: u64,
    /// What a replica must never forget.
    pub state: ReplicaState,
    /// The writes up to this were on stable media when the slot was written.
    pub durable: Seq,
    /// How often the position has been set. It names the log: records of another adoption are void.
    pub adoption: u64,
    /// What the position was set to then.
    pub base: Seq,
    /// Everything is on stable media, the position is `durable`, and nothing was written after this slot.
    pub clean: bool,
    /// The log misses writes: the machine lost power since the position was set.
    pub log_lost: bool,
    /// The boot under which the store was opened last.
    pub boot: BootId,
}

impl StateSlot {
    /// As bytes.
    #[must_use]
    pub fn encode(&self, volume: VolumeId) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        put(&mut page, 0, &SLOT_MAGIC);
        put(&mut page, 8, &volume.to_bytes());
        put(&mut page, 24, &self.generation.to_le_bytes());
        put(&mut page, 32, &self.state.promised.get().to_le_bytes());
        put(&mut page, 40, &self.state.log_term.get().to_le_bytes());
        put(&mut page, 48, &self.durable.get().to_le_bytes());
        put(&mut page, 56, &self.adoption.to_le_bytes());
        put(&mut page, 64, &self.base.get().to_le_bytes());
        page[72] = match self.state.content {
            Content::Complete => 0,
            Content::Mixed => 1,
            Content::Rebuilding => 2,
        };
        page[73] = if self.clean { FLAG_CLEAN } else { 0 } | if self.log_lost { FLAG_LOG_LOST } else { 0 };
        put(&mut page, 80, &self.boot.0);
        seal(page)
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FormatError`] says what is wrong with them.
    pub fn decode(bytes: &[u8], volume: VolumeId) -> Result<Self, FormatError> {
        let page = page(bytes)?;
        check_sealed(page, SLOT_MAGIC)?;
        if VolumeId::from_bytes(array(page, 8)) != volume {
            return Err(FormatError::Field("a state slot is another volume's"));
        }
        let content = match page[72] {
            0 => Content::Complete,
            1 => Content::Mixed,
            2 => Content::Rebuilding,
            _ => return Err(FormatError::Field("a state slot has an unknown content")),
        };
        let flags = page[73];
        if flags & !(FLAG_CLEAN | FLAG_LOG_LOST) != 0 {
            return Err(FormatError::Field("a state slot has unknown flags"));
        }
        let slot = Self {
            generation: u64_at(page, 24),
            state: ReplicaState { promised: Term::new(u64_at(page, 32)), log_term: Term::new(u64_at(page, 40)), content },
            durable: Seq::new(u64_at(page, 48)),
            adoption: u64_at(page, 56),
            base: Seq::new(u64_at(page, 64)),
            clean: flags & FLAG_CLEAN != 0,
            log_lost: flags & FLAG_LOG_LOST != 0,
            boot: BootId(array(page, 80)),
        };
        if slot.durable < slot.base || slot.durable > SEQ_MAX {
            return Err(FormatError::Field("a state slot's durable position is not a possible one"));
        }
        Ok(slot)
    }
}

/// How far writes have been applied: what a kill of the process leaves behind. Means nothing after a loss of power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// To which log it belongs.
    pub adoption: u64,
    /// The writes up to this are wholly there.
    pub position: Seq,
    /// A sync failed: the page cache may no longer be what was written, so trust only what was durable before.
    pub suspect: bool,
}

impl Applied {
    /// Both copies, as bytes.
    #[must_use]
    pub fn encode(&self, volume: VolumeId) -> [u8; 2 * RECORD] {
        let mut copies = [0; 2 * RECORD];
        let (first, second) = copies.split_at_mut(RECORD);
        put(first, 0, &self.position.get().to_le_bytes());
        put(first, 8, &self.adoption.to_le_bytes());
        put(first, 16, &if self.suspect { FLAG_SUSPECT } else { 0 }.to_le_bytes());
        let sum = record_sum(volume, &first[..RECORD - 4]);
        put(first, RECORD - 4, &sum.to_le_bytes());
        second.copy_from_slice(first);
        copies
    }

    /// From the bytes of one copy.
    ///
    /// # Errors
    /// [`FormatError`] says what is wrong with them.
    pub fn decode(bytes: &[u8], volume: VolumeId) -> Result<Self, FormatError> {
        let bytes = record(bytes)?;
        check_record(bytes, volume)?;
        let flags = u32_at(bytes, 16);
        if flags & !FLAG_SUSPECT != 0 {
            return Err(FormatError::Field("an applied record has unknown flags"));
        }
        if u64_at(bytes, 0) > SEQ_MAX.get() {
            return Err(FormatError::Field("an applied record's position is not a possible one"));
        }
        Ok(Self { position: Seq::new(u64_at(bytes, 0)), adoption: u64_at(bytes, 8), suspect: flags != 0 })
    }

    /// From the bytes of both copies: the first is written before the second, so the higher valid one counts.
    ///
    /// # Errors
    /// The second copy's error, if neither is valid.
    pub fn decode_copies(bytes: &[u8], volume: VolumeId) -> Result<Self, FormatError> {
        let first = Self::decode(bytes, volume);
        let second = Self::decode(bytes.get(RECORD..).unwrap_or_default(), volume);
        match (first, second) {
            (Ok(first), Ok(second)) => {
                let newer = if (second.adoption, second.position) > (first.adoption, first.position) { second } else { first };
                Ok(Self { suspect: first.suspect || second.suspect, ..newer })
            }
            (Ok(only), Err(_)) | (Err(_), Ok(only)) => Ok(only),
            (Err(_), Err(error)) => Err(error),
        }
    }
}

fn check_record(bytes: &[u8; RECORD], volume: VolumeId) -> Result<(), FormatError> {
    let (stored, computed) = (u32_at(bytes, RECORD - 4), record_sum(volume, &bytes[..RECORD - 4]));
    if stored != computed {
        return Err(FormatError::Checksum { stored, computed });
    }
    Ok(())
}

/// A record of the log: which blocks a write touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// Which write.
    pub seq: Seq,
    /// Of which adoption of a position.
    pub adoption: u64,
    /// Which blocks.
    pub extent: Extent,
}

impl LogRecord {
    /// As bytes. The extent is within a volume, so its numbers fit into 48 bits.
    #[must_use]
    pub fn encode(&self, volume: VolumeId) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        put(&mut bytes, 0, &self.seq.get().to_le_bytes());
        put(&mut bytes, 8, &self.adoption.to_le_bytes());
        put_u48(&mut bytes, 16, self.extent.first_block().get());
        put_u48(&mut bytes, 22, self.extent.block_count());
        let sum = record_sum(volume, &bytes[..RECORD - 4]);
        put(&mut bytes, RECORD - 4, &sum.to_le_bytes());
        bytes
    }

    /// From bytes. The caller checks that the extent is within its volume.
    ///
    /// # Errors
    /// [`FormatError`] says what is wrong with them.
    pub fn decode(bytes: &[u8], volume: VolumeId) -> Result<Self, FormatError> {
        let bytes = record(bytes)?;
        check_record(bytes, volume)?;
        let bytes_of = |blocks: u64| blocks * u64::from(BLOCK_SIZE);
        let (first, count) = (bytes_of(u48_at(bytes, 16)), bytes_of(u48_at(bytes, 22)));
        let extent = Extent::new(ByteOffset::new(first), ByteLength::new(count)).ok_or(FormatError::Field("an extent overflows"))?;
        Ok(Self { seq: Seq::new(u64_at(bytes, 0)), adoption: u64_at(bytes, 8), extent })
    }
}

/// An entry of the checksum table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The block reads as zeros, and its bytes in the data area are zeros too (or will be, once the write in flight is done).
    Hole,
    /// The block was written, and this is its checksum.
    Written(Checksum),
    /// Neither: the entry itself is damaged. It holds what stands in the place of a checksum.
    Damaged(Checksum),
}

impl Entry {
    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; ENTRY] {
        let (sum, mark) = match self {
            Self::Hole => (0, 0),
            Self::Written(sum) => (sum, WRITTEN),
            Self::Damaged(sum) => (sum, !WRITTEN),
        };
        let mut bytes = [0; ENTRY];
        put(&mut bytes, 0, &sum.to_le_bytes());
        put(&mut bytes, 4, &mark.to_le_bytes());
        bytes
    }

    /// From bytes.
    #[must_use]
    pub fn decode(bytes: [u8; ENTRY]) -> Self {
        match (u32_at(&bytes, 0), u32_at(&bytes, 4)) {
            (0, 0) => Self::Hole,
            (sum, WRITTEN) => Self::Written(sum),
            (sum, _) => Self::Damaged(sum),
        }
    }
}
