//! One replica's file: where each thing is read and written, and in which order. It keeps nothing in memory but the header, and
//! takes no locks: its callers see to it that one thread writes the log, the applied record and any one block at a time.
//!
//! Order within a live write (each a plain write to the page cache, so that a kill leaves a prefix of them):
//! 1. the log record: from here on a restart knows that these blocks are in doubt;
//! 2. the bytes; 3. the table entries; 4. (once per batch) the applied record.
//!
//! A block's bytes are zeros whenever its entry says "hole" and no write is in flight: else a loss of power that takes a later
//! write's bytes but not its entry would bring back what was there before the hole. So making a hole really erases.

use std::io;
use std::path::{Path, PathBuf};

use crate::buffer::BufferPool;
use crate::checksum::{Checksum, block_checksum, zero_block_checksums};
use crate::store::{BLOCKS_MAX, Content, ReadData, ReplicaSpec, ReplicaState, StoreError};
use crate::units::{BLOCK_SIZE, BlockIndex, Extent, Seq, Term, VolumeId};

use super::disk::{Disk, Folder};
use super::format::{Applied, BootId, ENTRY, Entry, Header, Layout, LogRecord, PAGE, RECORD, StateSlot};

const BLOCK: usize = BLOCK_SIZE as usize;
/// Entries that are read or written at a time: a page of the table.
const ENTRIES_MAX: usize = PAGE / ENTRY;
/// Below this many blocks, zeros are written; from it on the file system is told, at the price of changing its extents.
const ERASE_BY_CALL: usize = 64;

const _: () = assert!(BLOCKS_MAX as usize == ENTRIES_MAX);

static ZEROS: [u8; ERASE_BY_CALL * BLOCK] = [0; ERASE_BY_CALL * BLOCK];

/// A page of table entries and how much of it is in use.
#[derive(Debug)]
pub(super) struct Entries {
    bytes: [u8; PAGE],
    count: usize,
}

impl Entries {
    pub(super) fn new(count: usize) -> Self {
        Self { bytes: [0; PAGE], count: count.min(ENTRIES_MAX) }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.count * ENTRY]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.count * ENTRY]
    }

    pub(super) fn get(&self, index: usize) -> Entry {
        let bytes = self.bytes().as_chunks().0.get(index).copied().unwrap_or_default();
        Entry::decode(bytes)
    }

    pub(super) fn set(&mut self, index: usize, entry: Entry) {
        if let Some(bytes) = self.bytes_mut().as_chunks_mut().0.get_mut(index) {
            *bytes = entry.encode();
        }
    }

    fn all_holes(&self) -> bool {
        self.bytes().iter().all(|byte| *byte == 0)
    }

    /// The runs of holes and of anything else: whether it is of holes, its first index, its length.
    pub(super) fn runs(&self) -> impl Iterator<Item = (bool, usize, usize)> {
        let is_hole = |bytes: &[u8; ENTRY]| *bytes == [0; ENTRY];
        let mut first = 0;
        self.bytes().as_chunks().0.chunk_by(move |a, b| is_hole(a) == is_hole(b)).map(move |run| {
            let start = first;
            first += run.len();
            (run.first().is_some_and(is_hole), start, run.len())
        })
    }
}

/// Whether a read may wait for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// Only what is in memory already.
    Cached,
    /// As long as it takes.
    Waits,
}

/// What a write puts into its extent.
#[derive(Debug)]
pub(super) enum Payload<'a> {
    Blocks { checksums: &'a [Checksum], data: &'a [u8] },
    Zeroes,
}

#[derive(Debug)]
pub(super) struct ReplicaFile {
    disk: Box<dyn Disk>,
    header: Header,
    path: PathBuf,
}

/// What `Io` errors are made of.
pub(super) fn io_error(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { action, path: path.to_path_buf(), source }
}

fn index(count: u64) -> usize {
    // Only for counts within one page of entries or one buffer; a larger one can't be in memory, and fails the slice it is for.
    usize::try_from(count).unwrap_or(usize::MAX)
}

impl ReplicaFile {
    /// Writes a new replica's structures into a fresh file of zeros, durably.
    pub(super) fn create(disk: Box<dyn Disk>, path: PathBuf, header: Header, boot: BootId) -> Result<(Self, StateSlot), StoreError> {
        let file = Self { disk, header, path };
        let state = ReplicaState { promised: Term::ZERO, log_term: Term::ZERO, content: Content::Complete };
        let first =
            StateSlot { generation: 1, state, durable: Seq::ZERO, adoption: 1, base: Seq::ZERO, clean: false, log_lost: false, boot };
        let second = StateSlot { generation: 2, ..first };
        file.write("write the header of", &header.encode(), 0)?;
        for slot in [first, second] {
            file.write("write the state of", &slot.encode(header.volume), slot_place(slot.generation))?;
        }
        file.write_applied(Applied { adoption: 1, position: Seq::ZERO, suspect: false })?;
        file.sync()?;
        Ok((file, second))
    }

    /// Takes a file whose header is right and whose name agrees with it.
    pub(super) fn open(folder: &dyn Folder, name: &str, volume: VolumeId) -> Result<Self, StoreError> {
        let path = folder.path().join(name);
        let disk = folder.open(name).map_err(|source| io_error("open", &path, source))?;
        let length = disk.length().map_err(|source| io_error("ask the length of", &path, source))?;
        let mut bytes = [0; PAGE];
        read_full(&*disk, &mut bytes, 0).map_err(|source| io_error("read the header of", &path, source))?;
        let header = Header::decode(&bytes).map_err(|error| error.at(&path))?;
        if header.volume != volume {
            return Err(StoreError::Damaged { path, reason: format!("it is a replica of volume {}", header.volume) });
        }
        if length < header.layout.file_length().get() {
            let reason = format!("{length} bytes are there, {} are needed", header.layout.file_length());
            return Err(StoreError::Damaged { path, reason });
        }
        Ok(Self { disk, header, path })
    }

    pub(super) fn spec(&self) -> ReplicaSpec {
        ReplicaSpec { volume: self.header.volume, size: self.header.size }
    }

    pub(super) fn layout(&self) -> Layout {
        self.header.layout
    }

    fn volume(&self) -> VolumeId {
        self.header.volume
    }

    fn read(&self, action: &'static str, buffer: &mut [u8], at: u64) -> Result<(), StoreError> {
        read_full(&*self.disk, buffer, at).map_err(|source| io_error(action, &self.path, source))
    }

    /// Fills a buffer; `false` if that would take patience.
    fn fill(&self, buffer: &mut [u8], at: u64, patience: Patience) -> Result<bool, StoreError> {
        match patience {
            Patience::Waits => self.read("read", buffer, at).map(|()| true),
            // An error is found again, and reported, by the read that waits.
            Patience::Cached => Ok(self.disk.read_cached(buffer, at).is_ok_and(|got| got == buffer.len())),
        }
    }

    fn write(&self, action: &'static str, bytes: &[u8], at: u64) -> Result<(), StoreError> {
        let mut done = 0;
        while done < bytes.len() {
            match self.disk.write_at(&bytes[done..], at + done as u64) {
                Ok(0) => return Err(io_error(action, &self.path, io::ErrorKind::WriteZero.into())),
                Ok(count) => done += count,
                Err(source) => return Err(io_error(action, &self.path, source)),
            }
        }
        Ok(())
    }

    /// Puts everything written before on stable media.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.disk.sync().map_err(|source| io_error("sync", &self.path, source))
    }

    // State slots and the applied record.

    /// The valid slot with the highest generation.
    pub(super) fn read_slot(&self) -> Result<StateSlot, StoreError> {
        let mut newest: Option<StateSlot> = None;
        let mut reason = String::new();
        for place in Layout::SLOTS_AT {
            let mut bytes = [0; PAGE];
            self.read("read the state of", &mut bytes, place)?;
            match StateSlot::decode(&bytes, self.volume()) {
                Ok(slot) if newest.is_none_or(|newest| newest.generation < slot.generation) => newest = Some(slot),
                Ok(_) => {}
                Err(error) => reason = format!("no state slot is valid: {error}"),
            }
        }
        newest.ok_or_else(|| StoreError::Damaged { path: self.path.clone(), reason })
    }

    /// Writes a slot over the older one, durably. It says nothing about other bytes: those were synced before.
    pub(super) fn write_slot(&self, slot: &StateSlot) -> Result<(), StoreError> {
        let (bytes, place) = (slot.encode(self.volume()), slot_place(slot.generation));
        match self.disk.write_durably(&bytes, place) {
            Ok(PAGE) => Ok(()),
            Ok(_) => Err(io_error("write the state of", &self.path, io::ErrorKind::WriteZero.into())),
            Err(source) => Err(io_error("write the state of", &self.path, source)),
        }
    }

    /// The applied record, if a copy of it is valid.
    pub(super) fn read_applied(&self) -> Result<Option<Applied>, StoreError> {
        let mut bytes = [0; 2 * RECORD];
        self.read("read the position of", &mut bytes, Layout::APPLIED_AT)?;
        Ok(Applied::decode_copies(&bytes, self.volume()).ok())
    }

    pub(super) fn write_applied(&self, applied: Applied) -> Result<(), StoreError> {
        self.write("write the position of", &applied.encode(self.volume()), Layout::APPLIED_AT)
    }

    // The log.

    /// Logs writes with consecutive sequences, the first of them `first`.
    pub(super) fn log(&self, adoption: u64, first: Seq, extents: &[Extent]) -> Result<(), StoreError> {
        let mut bytes = Vec::with_capacity(extents.len() * RECORD);
        let mut start = first;
        let mut seq = first;
        for extent in extents {
            bytes.extend(LogRecord { seq, adoption, extent: *extent }.encode(self.volume()));
            seq = seq.next();
            if seq.get().is_multiple_of(self.layout().log_records()) {
                self.write("log a write in", &bytes, self.layout().log_record(start))?;
                bytes.clear();
                start = seq;
            }
        }
        if bytes.is_empty() { Ok(()) } else { self.write("log a write in", &bytes, self.layout().log_record(start)) }
    }

    /// The extents logged for the writes from `first` on, `None` where a record is not there or not whole. At least one, at most up
    /// to `last`: the caller asks again for the rest.
    pub(super) fn logged(&self, adoption: u64, first: Seq, last: Seq) -> Result<Vec<Option<Extent>>, StoreError> {
        let records = self.layout().log_records();
        let to_the_border = records - first.get() % records;
        let count = (last.get().saturating_sub(first.get()) + 1).min(to_the_border).min((PAGE / RECORD) as u64);
        let mut bytes = vec![0; index(count) * RECORD];
        self.read("read the log of", &mut bytes, self.layout().log_record(first))?;
        let whole = self.header.size.extent();
        let extent = |(seq, bytes): (u64, &[u8])| {
            let record = LogRecord::decode(bytes, self.volume()).ok()?;
            (record.seq.get() == seq && record.adoption == adoption && whole.contains(record.extent)).then_some(record.extent)
        };
        Ok((first.get()..).zip(bytes.chunks_exact(RECORD)).map(extent).collect())
    }

    // Blocks.

    pub(super) fn read_entries(&self, first: BlockIndex, count: usize) -> Result<Entries, StoreError> {
        let mut entries = Entries::new(count);
        self.read("read the checksums of", entries.bytes_mut(), self.layout().entry(first))?;
        Ok(entries)
    }

    pub(super) fn write_entries(&self, first: BlockIndex, entries: &Entries) -> Result<(), StoreError> {
        self.write("write the checksums of", entries.bytes(), self.layout().entry(first))
    }

    /// Reads the bytes of blocks as they are, unverified.
    pub(super) fn read_raw(&self, first: BlockIndex, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.read("read", buffer, self.layout().block(first))
    }

    /// The first block from `first` on whose bytes may not be zeros.
    pub(super) fn next_data(&self, first: BlockIndex) -> Result<Option<BlockIndex>, StoreError> {
        let place = self.layout().block(first);
        let found = self.disk.next_data(place).map_err(|source| io_error("look for data in", &self.path, source))?;
        Ok(found.map(|found| self.layout().block_at(found.max(place))))
    }

    /// Reads and verifies up to [`BLOCKS_MAX`] blocks. `None` if that would take patience.
    pub(super) fn read_blocks(&self, extent: Extent, pool: &BufferPool, patience: Patience) -> Result<Option<ReadData>, StoreError> {
        let first = extent.first_block();
        let mut entries = Entries::new(index(extent.block_count()));
        if !self.fill(entries.bytes_mut(), self.layout().entry(first), patience)? {
            return Ok(None);
        }
        if entries.all_holes() {
            return Ok(Some(ReadData::Zeroes));
        }
        let mut buffer = pool.take(entries.count * BLOCK);
        for (hole, start, count) in entries.runs() {
            let bytes = &mut buffer[start * BLOCK..(start + count) * BLOCK];
            let place = self.layout().block(BlockIndex::new(first.get() + start as u64));
            if hole {
                bytes.fill(0);
            } else if !self.fill(bytes, place, patience)? {
                return Ok(None);
            }
        }
        let checksums = self.verify(first, &entries, &buffer)?;
        Ok(Some(ReadData::Blocks { checksums, data: buffer.share() }))
    }

    /// The checksums of blocks that all agree with their entries.
    fn verify(&self, first: BlockIndex, entries: &Entries, data: &[u8]) -> Result<Vec<Checksum>, StoreError> {
        let volume = self.volume();
        let blocks = (first.get()..).map(BlockIndex::new).zip(data.chunks_exact(BLOCK)).enumerate();
        blocks
            .map(|(index, (block, bytes))| match entries.get(index) {
                Entry::Hole => Ok(zero_block_checksums(volume, block, 1).next().unwrap_or_default()),
                Entry::Written(expected) => match block_checksum(volume, block, bytes) {
                    got if got == expected => Ok(got),
                    got => Err(StoreError::Corrupt { volume, block, expected, got }),
                },
                // The bytes may be right, but nothing vouches for them.
                Entry::Damaged(expected) => Err(StoreError::Corrupt { volume, block, expected, got: block_checksum(volume, block, bytes) }),
            })
            .collect()
    }

    /// Puts blocks or a hole. `logged` says whether the log names these blocks, should the process be killed in the middle.
    pub(super) fn put(&self, extent: Extent, payload: &Payload<'_>, logged: bool) -> Result<(), StoreError> {
        match payload {
            Payload::Zeroes => self.erase(extent),
            Payload::Blocks { checksums, data } => {
                let place = self.layout().block(extent.first_block());
                if logged {
                    self.write("write", data, place)?;
                    self.put_checksums(extent, checksums)
                } else {
                    // Nobody will look for leftovers of this one after a kill. Entries first: a kill then leaves blocks that fail
                    // their checksum, never bytes under a hole.
                    self.put_checksums(extent, checksums)?;
                    self.write("write", data, place)
                }
            }
        }
    }

    fn put_checksums(&self, extent: Extent, checksums: &[Checksum]) -> Result<(), StoreError> {
        let mut first = extent.first_block().get();
        for part in checksums.chunks(ENTRIES_MAX) {
            let mut entries = Entries::new(part.len());
            for (index, checksum) in part.iter().enumerate() {
                entries.set(index, Entry::Written(*checksum));
            }
            self.write_entries(BlockIndex::new(first), &entries)?;
            first += part.len() as u64;
        }
        Ok(())
    }

    /// Makes holes: first the bytes, then the entries. Where there are holes already nothing is written.
    fn erase(&self, extent: Extent) -> Result<(), StoreError> {
        let (mut first, end) = (extent.first_block().get(), extent.first_block().get() + extent.block_count());
        while first < end {
            let count = index(end - first).min(ENTRIES_MAX);
            let block = BlockIndex::new(first);
            let entries = self.read_entries(block, count)?;
            if !entries.all_holes() {
                for (_, start, count) in entries.runs().filter(|(hole, ..)| !hole) {
                    self.erase_bytes(BlockIndex::new(first + start as u64), count)?;
                }
                self.write_entries(block, &Entries::new(count))?;
            }
            first += count as u64;
        }
        Ok(())
    }

    fn erase_bytes(&self, first: BlockIndex, count: usize) -> Result<(), StoreError> {
        let (place, length) = (self.layout().block(first), (count * BLOCK) as u64);
        if count >= ERASE_BY_CALL {
            match self.disk.zero(place, length) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                Err(source) => return Err(io_error("erase", &self.path, source)),
            }
        }
        for start in (0..count).step_by(ERASE_BY_CALL) {
            let part = (count - start).min(ERASE_BY_CALL) * BLOCK;
            self.write("erase", &ZEROS[..part], place + (start * BLOCK) as u64)?;
        }
        Ok(())
    }
}

fn slot_place(generation: u64) -> u64 {
    Layout::SLOTS_AT[usize::from(generation % 2 == 1)]
}

fn read_full(disk: &dyn Disk, buffer: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match disk.read_at(&mut buffer[done..], at + done as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(())
}
