//! The pages of a volume's map, in memory and on the disk.
//!
//! A leaf maps 256 blocks (1 MiB) of a volume, an inner page 256 pages of the level below. Pages are never changed on the disk:
//! a changed one gets a new place at the next checkpoint. Whoever points to a page names its checksum, so a page that was not
//! written, or is an older one, is found as surely as a flipped bit.

use std::sync::Arc;

use super::codec::{FormatError, Reader, Writer};
use super::superblock::Geometry;
use crate::checksum::Checksum;
use crate::disk::DiskBlock;
use crate::units::{BLOCK_SIZE, Epoch, VolumeId};

/// Children of an inner page, entries of a leaf.
pub(super) const FAN_OUT: usize = 256;
const BLOCK: usize = BLOCK_SIZE as usize;
const LEAF_MAGIC: [u8; 4] = *b"CLEF";
const INNER_MAGIC: [u8; 4] = *b"CINN";
const HEADER: usize = 64;
const CHECKSUM_AT: usize = 40;

/// Blocks of a volume under a page of this level; leaves have level 0.
pub(super) const fn blocks_under(level: u8) -> u64 {
    1 << (FAN_OUT.trailing_zeros() * (level as u32 + 1))
}

/// Level of the root of a volume of so many blocks.
pub(super) const fn root_level(blocks: u64) -> u8 {
    let mut level = 0;
    while blocks_under(level) < blocks {
        level += 1;
    }
    level
}

/// Where a page is, and which it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagePointer {
    /// Where.
    pub place: DiskBlock,
    /// CRC32C over the page.
    pub checksum: Checksum,
    /// The youngest epoch under it.
    pub epoch: Epoch,
}

/// One block of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Where its data is; block 0 of the disk, which holds no data, says: nowhere.
    pub place: DiskBlock,
    /// When it was last written. [`Epoch::NEVER`] for a hole; a later one without a place is a zero.
    pub epoch: Epoch,
    /// Of its data.
    pub checksum: Checksum,
}

impl Entry {
    /// Whether it has data.
    pub(super) const fn is_mapped(&self) -> bool {
        self.place.get() != 0
    }
}

/// What a page, or a volume, has at one place.
#[derive(Clone, Debug, Default)]
pub(super) enum Child {
    /// Nothing was ever written here.
    #[default]
    Hole,
    /// All of it became zeros in this epoch.
    Zeroes(Epoch),
    /// A page on the disk.
    Disk(PagePointer),
    /// A page that was changed since the last checkpoint.
    Memory(Arc<Node>),
}

impl Child {
    /// Whether it is where pages are.
    ///
    /// # Errors
    /// [`FormatError`] if not.
    pub(super) const fn check(&self, geometry: &Geometry) -> Result<(), FormatError> {
        match self {
            Self::Disk(pointer) if !geometry.is_data(pointer.place) => Err(FormatError::Field("child.place")),
            _ => Ok(()),
        }
    }

    /// The youngest epoch in it.
    pub(super) fn epoch(&self) -> Epoch {
        match self {
            Self::Hole => Epoch::NEVER,
            Self::Zeroes(epoch) => *epoch,
            Self::Disk(pointer) => pointer.epoch,
            Self::Memory(node) => node.epoch,
        }
    }
}

/// Which page on the disk a changed page will replace.
#[derive(Clone, Debug, Default)]
pub(super) enum Origin {
    /// None: it is new.
    #[default]
    New,
    /// This one.
    Page(PagePointer),
    /// The one that this node, which a snapshot or a running checkpoint keeps, becomes.
    Node(Arc<Node>),
}

#[derive(Clone, Debug)]
pub(super) enum Body {
    Leaf(Box<[Entry; FAN_OUT]>),
    Inner(Box<[Child; FAN_OUT]>),
}

/// A page in memory. In the cache, as it is on the disk; in a [`Child::Memory`], changed.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) epoch: Epoch,
    pub(super) body: Body,
}

/// Which page of whose map it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageIdentity {
    /// The volume that wrote it (a clone reads its origin's pages).
    pub volume: VolumeId,
    /// 0 for leaves.
    pub level: u8,
    /// Which of its level.
    pub index: u64,
}

impl Node {
    /// A page that says what `child` says, which is no page.
    pub(super) fn filled(level: u8, child: &Child) -> Self {
        let epoch = child.epoch();
        let body = if level == 0 {
            Body::Leaf(Box::new([Entry { epoch, ..Entry::default() }; FAN_OUT]))
        } else if epoch == Epoch::NEVER {
            Body::Inner(Box::new([const { Child::Hole }; FAN_OUT]))
        } else {
            Body::Inner(Box::new(std::array::from_fn(|_| Child::Zeroes(epoch))))
        };
        Self { origin: Origin::New, epoch, body }
    }

    /// Roughly what it takes in memory, in bytes.
    pub(super) const fn memory(&self) -> usize {
        match self.body {
            Body::Leaf(_) => FAN_OUT * size_of::<Entry>() + 96,
            Body::Inner(_) => FAN_OUT * size_of::<Child>() + 96,
        }
    }

    /// Writes it as a page into `place`, which is one block, and says its checksum. `pointer` gives the places of children in
    /// memory.
    pub(super) fn encode(&self, identity: PageIdentity, place: &mut [u8], mut pointer: impl FnMut(&Arc<Self>) -> PagePointer) -> Checksum {
        let mut writer = Writer { bytes: Vec::with_capacity(BLOCK) };
        writer.bytes(if identity.level == 0 { &LEAF_MAGIC } else { &INNER_MAGIC });
        writer.u8(identity.level);
        writer.bytes(&[0; 3]);
        writer.bytes(&identity.volume.to_bytes());
        writer.u64(identity.index);
        writer.u32(self.epoch.get());
        writer.bytes(&[0; HEADER - 36]);
        match &self.body {
            Body::Leaf(entries) => {
                for entry in entries.iter() {
                    writer.u40(entry.place.get());
                    writer.u8(0);
                    writer.u32(entry.epoch.get());
                    writer.u32(entry.checksum);
                }
            }
            Body::Inner(children) => {
                for child in children.iter() {
                    write_child(&mut writer, child, &mut pointer);
                }
            }
        }
        place[..writer.bytes.len()].copy_from_slice(&writer.bytes);
        place[writer.bytes.len()..].fill(0);
        let checksum = crc32c::crc32c(place);
        place[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        checksum
    }

    /// Reads a page, which must be the one that `pointer` names.
    ///
    /// # Errors
    /// [`FormatError`].
    pub(super) fn decode(page: &[u8], pointer: &PagePointer, identity: PageIdentity, geometry: &Geometry) -> Result<Self, FormatError> {
        if page_checksum(page)? != pointer.checksum {
            return Err(FormatError::Checksum);
        }
        let mut reader = Reader::new(page, "page");
        let magic: [u8; 4] = reader.array()?;
        if magic != if identity.level == 0 { LEAF_MAGIC } else { INNER_MAGIC } {
            return Err(FormatError::Magic);
        }
        let level = reader.u8()?;
        reader.bytes(3)?;
        let found = PageIdentity { level, volume: VolumeId::from_bytes(reader.array()?), index: reader.u64()? };
        if found != identity {
            return Err(FormatError::Misplaced);
        }
        let epoch = Epoch::new(reader.u32()?);
        if epoch != pointer.epoch {
            return Err(FormatError::Field("epoch"));
        }
        reader.bytes(HEADER - 36)?;
        let body = if level == 0 {
            let mut entries = Box::new([Entry::default(); FAN_OUT]);
            for entry in entries.iter_mut() {
                let place = DiskBlock::new(reader.u40()?);
                reader.u8()?;
                *entry = Entry { place, epoch: Epoch::new(reader.u32()?), checksum: reader.u32()? };
                if entry.is_mapped() && !geometry.is_data(place) {
                    return Err(FormatError::Field("entry.place"));
                }
                if entry.epoch > epoch || entry.is_mapped() && entry.epoch == Epoch::NEVER {
                    return Err(FormatError::Field("entry.epoch"));
                }
            }
            Body::Leaf(entries)
        } else {
            let mut children = Box::new([const { Child::Hole }; FAN_OUT]);
            for child in children.iter_mut() {
                *child = read_child(&mut reader)?;
                child.check(geometry)?;
                if child.epoch() > epoch {
                    return Err(FormatError::Field("child.epoch"));
                }
            }
            Body::Inner(children)
        };
        Ok(Self { origin: Origin::New, epoch, body })
    }
}

/// The checksum that a page says it has, if that is right.
pub(super) fn page_checksum(page: &[u8]) -> Result<Checksum, FormatError> {
    if page.len() != BLOCK {
        return Err(FormatError::Truncated("page"));
    }
    let stored = Reader::new(&page[CHECKSUM_AT..], "page").u32()?;
    let computed = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&page[..CHECKSUM_AT]), &[0; 4]), &page[CHECKSUM_AT + 4..]);
    if computed == stored { Ok(stored) } else { Err(FormatError::Checksum) }
}

/// 13 bytes: place, epoch, checksum. Without a place: a hole, or zeros of that epoch.
pub(super) fn write_child(writer: &mut Writer, child: &Child, pointer: &mut impl FnMut(&Arc<Node>) -> PagePointer) {
    let pointer = match child {
        Child::Hole => PagePointer { place: DiskBlock::new(0), checksum: 0, epoch: Epoch::NEVER },
        Child::Zeroes(epoch) => PagePointer { place: DiskBlock::new(0), checksum: 0, epoch: *epoch },
        Child::Disk(pointer) => *pointer,
        Child::Memory(node) => pointer(node),
    };
    writer.u40(pointer.place.get());
    writer.u32(pointer.epoch.get());
    writer.u32(pointer.checksum);
}

pub(super) fn read_child(reader: &mut Reader<'_>) -> Result<Child, FormatError> {
    let (place, epoch, checksum) = (DiskBlock::new(reader.u40()?), Epoch::new(reader.u32()?), reader.u32()?);
    match (place.get(), epoch) {
        (0, Epoch::NEVER) => Ok(Child::Hole),
        (0, epoch) => Ok(Child::Zeroes(epoch)),
        (_, Epoch::NEVER) => Err(FormatError::Field("child.epoch")),
        _ => Ok(Child::Disk(PagePointer { place, checksum, epoch })),
    }
}
