//! Which blocks of the data area are in use.
//!
//! A block that is given up is *resting* until a checkpoint is on the disk that doesn't use it: then neither a replay of the
//! journal nor the older superblock can need it any more.
//!
//! Places are handed out so that a volume's neighbours lie side by side: next to what they follow, or at the same distance from
//! the start of an untouched chunk (1 MiB) as from the start of their leaf.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::codec::{FormatError, Reader, Writer};
use super::record::Run;
use super::superblock::{CHUNK_BLOCKS, Geometry};
use crate::disk::DiskBlock;
use crate::units::BLOCK_SIZE;

const BLOCK: usize = BLOCK_SIZE as usize;
/// Blocks in a group: what one page of bits covers (128 MiB).
pub(super) const GROUP_BLOCKS: u64 = BLOCK_SIZE as u64 * 8;
const WORDS: usize = BLOCK / 8;
/// Groups in one page of the directory. 9 bytes each.
pub(super) const DIRECTORY_FAN_OUT: usize = 448;
const CHUNKS_IN_GROUP: u64 = GROUP_BLOCKS / CHUNK_BLOCKS;
/// A write of so many blocks or more is worth a chunk of its own if it doesn't fit where its neighbours are.
const LARGE: u32 = 16;

type Words = [u64; WORDS];

/// Where a page of bits or of the directory is, and its checksum. `None` for the place: nothing is used in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitsPointer {
    /// Where.
    pub place: Option<DiskBlock>,
    /// CRC32C over its number and its bytes.
    pub checksum: u32,
}

#[derive(Debug)]
struct Group {
    /// `None`: all free, and no page on the disk is needed.
    used: Option<Arc<Words>>,
    resting: Option<Box<Words>>,
    resting_blocks: u32,
    /// Its page on the disk.
    pointer: BitsPointer,
    dirty: bool,
}

/// What a checkpoint writes of the allocator.
#[derive(Debug, Default)]
pub(super) struct FrozenBits {
    /// Group pages: number, place, bits.
    pub(super) groups: Vec<(u64, DiskBlock, Arc<Words>)>,
    /// Directory pages: number and place; their content is known when the groups are written.
    pub(super) directory: Vec<(usize, DiskBlock)>,
    /// A page that was replaced was not in use.
    pub(super) contradicted: bool,
}

#[derive(Debug)]
pub(super) struct Allocator {
    start: u64,
    blocks: u64,
    groups: Vec<Group>,
    directory: Vec<BitsPointer>,
    dirty_directory: BTreeSet<usize>,
    /// Per chunk: blocks neither used nor resting.
    free_in_chunk: Vec<u16>,
    /// Blocks neither used nor resting.
    free: u64,
    /// Given up before the running checkpoint's freeze (or any time, if none runs), and after it.
    resting: Vec<DiskBlock>,
    resting_later: Vec<DiskBlock>,
    /// Where the next untouched chunk is looked for.
    chunk_cursor: usize,
    /// No chunk was untouched when last looked for, and nothing has come back since.
    no_free_chunk: bool,
    /// Where the next page goes, if that is free.
    page_cursor: u64,
    /// Chunks at and after this one are not prepared on the disk.
    prepared_chunks: usize,
    freezing: bool,
    /// Blocks that hold pages of bits and of the directory.
    own: u64,
}

fn word_bit(index: u64) -> (usize, u64) {
    (usize::try_from(index % GROUP_BLOCKS / 64).unwrap_or(0), 1 << (index % 64))
}

impl Allocator {
    /// All free.
    pub(super) fn new(geometry: &Geometry) -> Self {
        let blocks = geometry.data_blocks;
        let groups = usize::try_from(blocks.div_ceil(GROUP_BLOCKS)).unwrap_or(0);
        let chunks = usize::try_from(blocks / CHUNK_BLOCKS).unwrap_or(0);
        let group = || Group { used: None, resting: None, resting_blocks: 0, pointer: BitsPointer::default(), dirty: false };
        Self {
            start: geometry.data_start().get(),
            blocks,
            groups: (0..groups).map(|_| group()).collect(),
            directory: vec![BitsPointer::default(); groups.div_ceil(DIRECTORY_FAN_OUT)],
            dirty_directory: BTreeSet::new(),
            free_in_chunk: vec![u16::try_from(CHUNK_BLOCKS).unwrap_or(u16::MAX); chunks],
            free: blocks,
            resting: Vec::new(),
            resting_later: Vec::new(),
            chunk_cursor: 0,
            no_free_chunk: false,
            page_cursor: 0,
            prepared_chunks: chunks,
            freezing: false,
            own: 0,
        }
    }

    // Queries.

    /// Blocks that come back with the next checkpoints.
    pub(super) fn resting(&self) -> u64 {
        (self.resting.len() + self.resting_later.len()) as u64
    }

    /// Blocks in use.
    pub(super) fn used(&self) -> u64 {
        self.blocks - self.free - self.resting()
    }

    /// Blocks that hold the allocator's own pages.
    pub(super) const fn own(&self) -> u64 {
        self.own
    }

    /// Most pages that a checkpoint may have to write for the allocator itself.
    pub(super) fn pages(&self) -> u64 {
        (self.groups.len() + self.directory.len()) as u64
    }

    pub(super) fn is_used(&self, place: DiskBlock) -> bool {
        let index = place.get() - self.start;
        let (word, bit) = word_bit(index);
        self.group(index).used.as_ref().is_some_and(|words| words[word] & bit != 0)
    }

    fn group(&self, index: u64) -> &Group {
        &self.groups[usize::try_from(index / GROUP_BLOCKS).unwrap_or(usize::MAX)]
    }

    fn is_free(&self, index: u64) -> bool {
        let (word, bit) = word_bit(index);
        let group = self.group(index);
        group.used.as_ref().is_none_or(|words| words[word] & bit == 0) && group.resting.as_ref().is_none_or(|words| words[word] & bit == 0)
    }

    fn chunk(index: u64) -> usize {
        usize::try_from(index / CHUNK_BLOCKS).unwrap_or(usize::MAX)
    }

    // Preparing.

    /// From here on the disk is not prepared.
    pub(super) fn set_prepared(&mut self, blocks: u64) {
        self.prepared_chunks = Self::chunk(blocks).min(self.free_in_chunk.len());
        self.no_free_chunk = false;
    }

    /// Blocks from the start of the data area that are prepared.
    pub(super) const fn prepared(&self) -> u64 {
        self.prepared_chunks as u64 * CHUNK_BLOCKS
    }

    /// Blocks of the whole data area.
    pub(super) const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Free blocks that are not prepared: none of them was ever used.
    pub(super) fn unprepared(&self) -> u64 {
        self.blocks - self.prepared()
    }

    /// Blocks that can be handed out now.
    pub(super) fn ready(&self) -> u64 {
        self.free - self.unprepared()
    }

    // Changes.

    fn mark(&mut self, index: u64, used: bool) {
        let (word, bit) = word_bit(index);
        let number = usize::try_from(index / GROUP_BLOCKS).unwrap_or(usize::MAX);
        let group = &mut self.groups[number];
        let words = Arc::make_mut(group.used.get_or_insert_with(|| Arc::new([0; WORDS])));
        assert_eq!(words[word] & bit != 0, !used, "block {index} of the data area is taken once and given up once");
        words[word] ^= bit;
        group.dirty = true;
        self.dirty_directory.insert(number / DIRECTORY_FAN_OUT);
    }

    fn take(&mut self, index: u64) {
        assert!(self.is_free(index), "block {index} of the data area is handed out while it is free");
        self.mark(index, true);
        self.free -= 1;
        self.free_in_chunk[Self::chunk(index)] -= 1;
    }

    /// A replayed record says that this block is in use.
    ///
    /// # Errors
    /// If it can't be: the journal and the map disagree.
    pub(super) fn take_at(&mut self, place: DiskBlock) -> Result<(), FormatError> {
        let index = place.get().checked_sub(self.start).filter(|index| *index < self.blocks).ok_or(FormatError::Field("place"))?;
        if !self.is_free(index) {
            return Err(FormatError::Field("place"));
        }
        self.prepared_chunks = self.prepared_chunks.max(Self::chunk(index) + 1);
        self.take(index);
        Ok(())
    }

    /// Nothing needs this block any more. Whether it was in use, as it must have been.
    #[must_use]
    pub(super) fn give_up(&mut self, place: DiskBlock) -> bool {
        let index = place.get().wrapping_sub(self.start);
        if index >= self.blocks || !self.is_used(place) {
            return false;
        }
        self.mark(index, false);
        let (word, bit) = word_bit(index);
        let number = usize::try_from(index / GROUP_BLOCKS).unwrap_or(usize::MAX);
        let group = &mut self.groups[number];
        group.resting.get_or_insert_with(|| Box::new([0; WORDS]))[word] |= bit;
        group.resting_blocks += 1;
        if self.freezing { &mut self.resting_later } else { &mut self.resting }.push(place);
        true
    }

    /// Up to `count` blocks side by side, at `wanted` or as near as is sensible. `None` if nothing is ready.
    pub(super) fn run(&mut self, wanted: Option<DiskBlock>, offset: u64, count: u32) -> Option<Run> {
        if self.ready() == 0 {
            return None;
        }
        let wanted = wanted.and_then(|place| place.get().checked_sub(self.start)).filter(|index| *index < self.prepared());
        let from = wanted
            .filter(|index| self.is_free(*index))
            .or_else(|| self.untouched_chunk(wanted.is_none() || count >= LARGE).map(|chunk| chunk + offset % CHUNK_BLOCKS))
            .or_else(|| self.next_free())?;
        let mut length = 0;
        while length < count && from + u64::from(length) < self.prepared() && self.is_free(from + u64::from(length)) {
            self.take(from + u64::from(length));
            length += 1;
        }
        Some(Run { place: DiskBlock::new(self.start + from), count: length })
    }

    /// A block for a page.
    pub(super) fn page(&mut self) -> Option<DiskBlock> {
        if self.page_cursor >= self.prepared() || !self.is_free(self.page_cursor) {
            let ahead = (self.page_cursor + 1..(self.page_cursor / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS)
                .find(|index| *index < self.prepared() && self.is_free(*index));
            self.page_cursor = ahead.or_else(|| self.untouched_chunk(true)).or_else(|| self.next_free())?;
        }
        self.take(self.page_cursor);
        Some(DiskBlock::new(self.start + self.page_cursor))
    }

    /// The first block of a chunk of which nothing is in use.
    fn untouched_chunk(&mut self, wanted: bool) -> Option<u64> {
        if !wanted || self.no_free_chunk {
            return None;
        }
        let whole = u16::try_from(CHUNK_BLOCKS).unwrap_or(u16::MAX);
        let found = self.search_chunk(|free| free == whole);
        self.no_free_chunk = found.is_none();
        found.map(|chunk| chunk as u64 * CHUNK_BLOCKS)
    }

    fn search_chunk(&mut self, suits: impl Fn(u16) -> bool) -> Option<usize> {
        let chunks = &self.free_in_chunk[..self.prepared_chunks];
        let ahead = chunks.iter().skip(self.chunk_cursor).position(|free| suits(*free)).map(|position| position + self.chunk_cursor);
        let found = ahead.or_else(|| chunks.iter().take(self.chunk_cursor).position(|free| suits(*free)))?;
        self.chunk_cursor = found;
        Some(found)
    }

    fn next_free(&mut self) -> Option<u64> {
        let chunk = self.search_chunk(|free| free > 0)? as u64;
        (chunk * CHUNK_BLOCKS..(chunk + 1) * CHUNK_BLOCKS).find(|index| self.is_free(*index))
    }

    // Checkpoints.

    /// Fixes what the running checkpoint writes. Places for the changed pages are taken, those of the pages that they replace are
    /// given up. `None` if there is no room, which the reserve rules out.
    pub(super) fn freeze(&mut self) -> Option<FrozenBits> {
        let mut groups: Vec<(u64, DiskBlock)> = Vec::new();
        let mut directory = Vec::new();
        let mut contradicted = false;
        // Taking places for pages changes more pages, of which each is taken once.
        let mut done = BTreeSet::new();
        loop {
            let more: Vec<usize> = (0..self.groups.len()).filter(|number| self.groups[*number].dirty && !done.contains(number)).collect();
            let directory_done: BTreeSet<usize> = directory.iter().map(|(number, _)| *number).collect();
            let more_directory: Vec<usize> = self.dirty_directory.difference(&directory_done).copied().collect();
            if more.is_empty() && more_directory.is_empty() {
                break;
            }
            for number in more {
                done.insert(number);
                match self.groups[number].pointer.place.take() {
                    Some(old) => contradicted |= !self.give_up(old),
                    None => self.own += 1,
                }
                groups.push((number as u64, self.page()?));
            }
            for number in more_directory {
                match self.directory[number].place.take() {
                    Some(old) => contradicted |= !self.give_up(old),
                    None => self.own += 1,
                }
                directory.push((number, self.page()?));
            }
        }
        let mut frozen = FrozenBits { groups: Vec::with_capacity(groups.len()), directory, contradicted };
        for (number, place) in groups {
            let group = &mut self.groups[usize::try_from(number).unwrap_or(usize::MAX)];
            group.dirty = false;
            let bits = Arc::clone(group.used.get_or_insert_with(|| Arc::new([0; WORDS])));
            frozen.groups.push((number, place, bits));
        }
        self.dirty_directory.clear();
        self.freezing = true;
        Some(frozen)
    }

    /// A group's page as bytes; its pointer is remembered for its page of the directory.
    pub(super) fn encode_group(&mut self, number: u64, place: DiskBlock, bits: &Words, page: &mut [u8]) {
        for (bytes, word) in page.chunks_exact_mut(8).zip(bits) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let checksum = bits_checksum(number, page);
        self.groups[usize::try_from(number).unwrap_or(usize::MAX)].pointer = BitsPointer { place: Some(place), checksum };
    }

    /// A page of the directory as bytes, when all its groups' pages are encoded.
    pub(super) fn encode_directory(&mut self, number: usize, place: DiskBlock, page: &mut [u8]) {
        let mut writer = Writer::default();
        for group in self.groups.iter().skip(number * DIRECTORY_FAN_OUT).take(DIRECTORY_FAN_OUT) {
            write_pointer(&mut writer, &group.pointer);
        }
        page[..writer.bytes.len()].copy_from_slice(&writer.bytes);
        page[writer.bytes.len()..].fill(0);
        self.directory[number] = BitsPointer { place: Some(place), checksum: bits_checksum(directory_number(number), page) };
    }

    /// Where the directory is.
    pub(super) fn directory(&self) -> &[BitsPointer] {
        &self.directory
    }

    /// The checkpoint is on the disk: what rested through it is free. Gives the blocks that came back.
    pub(super) fn thaw(&mut self) -> Vec<DiskBlock> {
        let free = std::mem::replace(&mut self.resting, std::mem::take(&mut self.resting_later));
        self.freezing = false;
        free
    }

    /// A block that rested can be handed out.
    pub(super) fn wake(&mut self, place: DiskBlock) {
        let index = place.get() - self.start;
        let (word, bit) = word_bit(index);
        let number = usize::try_from(index / GROUP_BLOCKS).unwrap_or(usize::MAX);
        let group = &mut self.groups[number];
        if let Some(words) = &mut group.resting {
            words[word] &= !bit;
            group.resting_blocks -= 1;
            if group.resting_blocks == 0 {
                group.resting = None;
            }
        }
        self.free += 1;
        self.free_in_chunk[Self::chunk(index)] += 1;
        self.no_free_chunk = false;
    }

    /// Keeps chunks of which nothing is in use, the last first, from being handed out before they are woken: at most so many blocks.
    /// Gives where they are.
    pub(super) fn hold_free_chunks(&mut self, most: u64) -> Vec<(DiskBlock, u64)> {
        let whole = u16::try_from(CHUNK_BLOCKS).unwrap_or(u16::MAX);
        let mut runs: Vec<(DiskBlock, u64)> = Vec::new();
        let mut left = most / CHUNK_BLOCKS;
        for chunk in (0..self.prepared_chunks).rev() {
            if left == 0 {
                break;
            }
            if self.free_in_chunk[chunk] != whole {
                continue;
            }
            left -= 1;
            self.hold_chunk(chunk);
            let at = DiskBlock::new(self.start + chunk as u64 * CHUNK_BLOCKS);
            match runs.last_mut().filter(|(first, _)| at.plus(CHUNK_BLOCKS) == *first) {
                Some((first, count)) => (*first, *count) = (at, *count + CHUNK_BLOCKS),
                None => runs.push((at, CHUNK_BLOCKS)),
            }
        }
        runs
    }

    fn hold_chunk(&mut self, chunk: usize) {
        let (word, _) = word_bit(chunk as u64 * CHUNK_BLOCKS);
        let group = &mut self.groups[chunk / usize::try_from(CHUNKS_IN_GROUP).unwrap_or(usize::MAX)];
        let words = group.resting.get_or_insert_with(|| Box::new([0; WORDS]));
        words[word..][..usize::try_from(CHUNK_BLOCKS / 64).unwrap_or(0)].fill(u64::MAX);
        group.resting_blocks += u32::try_from(CHUNK_BLOCKS).unwrap_or(0);
        self.free -= CHUNK_BLOCKS;
        self.free_in_chunk[chunk] = 0;
    }

    // Opening.

    /// Sets the directory as the catalog tells.
    pub(super) fn set_directory(&mut self, directory: &[BitsPointer]) -> Result<(), FormatError> {
        if directory.len() != self.directory.len() {
            return Err(FormatError::Field("directory"));
        }
        if directory.iter().any(|pointer| !self.holds(pointer)) {
            return Err(FormatError::Field("directory.place"));
        }
        self.directory.copy_from_slice(directory);
        self.own += directory.iter().filter(|pointer| pointer.place.is_some()).count() as u64;
        Ok(())
    }

    fn holds(&self, pointer: &BitsPointer) -> bool {
        pointer.place.is_none_or(|place| (self.start..self.start + self.blocks).contains(&place.get()))
    }

    /// Takes over a page of the directory. Gives the groups that have pages.
    pub(super) fn decode_directory(&mut self, number: usize, page: &[u8]) -> Result<Vec<(u64, DiskBlock)>, FormatError> {
        if bits_checksum(directory_number(number), page) != self.directory[number].checksum {
            return Err(FormatError::Checksum);
        }
        let places = self.start..self.start + self.blocks;
        let mut reader = Reader::new(page, "directory");
        let mut with_pages = Vec::new();
        let first = number * DIRECTORY_FAN_OUT;
        for (group_number, group) in (first as u64..).zip(self.groups.iter_mut().skip(first).take(DIRECTORY_FAN_OUT)) {
            let pointer = read_pointer(&mut reader)?;
            if pointer.place.is_some_and(|place| !places.contains(&place.get())) {
                return Err(FormatError::Field("directory.place"));
            }
            group.pointer = pointer;
            with_pages.extend(group.pointer.place.map(|place| (group_number, place)));
        }
        Ok(with_pages)
    }

    /// Takes over a group's page.
    pub(super) fn decode_group(&mut self, number: u64, page: &[u8]) -> Result<(), FormatError> {
        let position = usize::try_from(number).unwrap_or(usize::MAX);
        if bits_checksum(number, page) != self.groups[position].pointer.checksum {
            return Err(FormatError::Checksum);
        }
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(page.chunks_exact(8)) {
            *word = Reader::new(bytes, "bits").u64()?;
        }
        let last = (self.blocks - number * GROUP_BLOCKS).min(GROUP_BLOCKS);
        for chunk in 0..CHUNKS_IN_GROUP.min(last / CHUNK_BLOCKS) {
            let per_chunk = usize::try_from(CHUNK_BLOCKS / 64).unwrap_or(0);
            let words = &words[usize::try_from(chunk).unwrap_or(0) * per_chunk..][..per_chunk];
            let used: u32 = words.iter().map(|word| word.count_ones()).sum();
            let place = &mut self.free_in_chunk[usize::try_from(number * CHUNKS_IN_GROUP + chunk).unwrap_or(usize::MAX)];
            *place -= u16::try_from(used).unwrap_or(0);
            self.free -= u64::from(used);
        }
        self.groups[position].used = Some(Arc::new(words));
        self.own += 1;
        Ok(())
    }

    /// Whether nothing is in use where the disk is not prepared.
    pub(super) fn is_prepared(&self) -> bool {
        let whole = u16::try_from(CHUNK_BLOCKS).unwrap_or(u16::MAX);
        self.free_in_chunk.iter().skip(self.prepared_chunks).all(|free| *free == whole)
    }

    /// The places of the allocator's own pages.
    pub(super) fn own_pages(&self) -> impl Iterator<Item = DiskBlock> {
        self.groups.iter().filter_map(|group| group.pointer.place).chain(self.directory.iter().filter_map(|pointer| pointer.place))
    }
}

/// Directory pages are numbered apart from groups, so that one is never taken for the other.
const fn directory_number(number: usize) -> u64 {
    1 << 63 | number as u64
}

fn bits_checksum(number: u64, page: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), page)
}

pub(super) fn write_pointer(writer: &mut Writer, pointer: &BitsPointer) {
    writer.u40(pointer.place.map_or(0, DiskBlock::get));
    writer.u32(pointer.checksum);
}

pub(super) fn read_pointer(reader: &mut Reader<'_>) -> Result<BitsPointer, FormatError> {
    let (place, checksum) = (reader.u40()?, reader.u32()?);
    Ok(BitsPointer { place: (place != 0).then(|| DiskBlock::new(place)), checksum })
}
