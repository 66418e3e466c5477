//! Checking a store that nothing uses: reads everything, writes nothing.
//!
//! Every tree is walked: volumes, snapshots, clones, and what is being taken apart. What they need is compared with the bits: a
//! block that is needed and free would be written over, one that is in use and needed by nobody is lost space, and one that two
//! need was written over already.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::EpochMap;
use super::catalog::Owners;
use super::codec::FormatError;
use super::open::{OpenOptions, read_superblock_copy};
use super::page::{Body, Child, Entry, Node, Origin, PagePointer, blocks_under};
use super::record::Slot;
use super::superblock::COPIES;
use super::tree::{Missing, Tree};
use crate::checksum::block_checksum;
use crate::disk::{Disk, DiskBlock};
use crate::store::StoreError;
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, Epoch, VolumeId};

/// Faults that a report lists; the others are counted.
const FAULTS_MAX: usize = 1000;

/// How thoroughly.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// Reads all data, too, and verifies its checksums.
    pub data: bool,
}

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A copy of something that has another: the next checkpoint writes both.
    #[error("{what}, copy {copy}, is damaged: {reason}")]
    Copy {
        /// What.
        what: &'static str,
        /// 0 or 1.
        copy: u64,
        /// Why.
        reason: String,
    },
    /// A map page that can't be used. What is under it is not reached.
    #[error("volume {volume}: {reason}")]
    Page {
        /// Whose.
        volume: VolumeId,
        /// Which, and why.
        reason: String,
    },
    /// Data that is not what was written.
    #[error("volume {volume}, block {block} in place {place}: {reason}")]
    Block {
        /// Whose.
        volume: VolumeId,
        /// Which.
        block: BlockIndex,
        /// Where.
        place: DiskBlock,
        /// Why.
        reason: String,
    },
    /// A map points to where no data is.
    #[error("volume {volume}, block {block}: place {place} is outside the data area, or the block outside the volume")]
    Outside {
        /// Whose.
        volume: VolumeId,
        /// Which.
        block: BlockIndex,
        /// Where.
        place: DiskBlock,
    },
    /// What is needed could be written over.
    #[error("volume {volume} needs place {place}, which is free")]
    Free {
        /// Who.
        volume: VolumeId,
        /// Where.
        place: DiskBlock,
    },
    /// Two different blocks are in one place.
    #[error("volume {volume}, block {block}: place {place} belongs to another block, too")]
    CrossLink {
        /// Whose.
        volume: VolumeId,
        /// Which.
        block: BlockIndex,
        /// Where.
        place: DiskBlock,
    },
    /// Nobody needs what is in use.
    #[error("{count} blocks from place {place} on are in use, and nothing needs them")]
    Leak {
        /// Where.
        place: DiskBlock,
        /// How many.
        count: u64,
    },
    /// A count in the catalog is wrong.
    #[error("volume {volume}: {what} is recorded as {recorded}, and counted as {counted}")]
    Count {
        /// Whose.
        volume: VolumeId,
        /// What.
        what: &'static str,
        /// In the catalog and the journal.
        recorded: u64,
        /// In the map.
        counted: u64,
    },
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Volumes, those being deleted included.
    pub volumes: u64,
    /// Their snapshots.
    pub snapshots: u64,
    /// Map pages read.
    pub pages: u64,
    /// Blocks of data in use.
    pub blocks: u64,
    /// Of these, blocks whose checksum was verified.
    pub verified: u64,
    /// Batches of the journal that would be replayed.
    pub batches: u64,
    /// What is wrong, at most 1000 of it.
    pub faults: Vec<Fault>,
    /// How much more is wrong.
    pub more: u64,
}

impl CheckReport {
    fn note(&mut self, fault: Fault) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(fault);
        } else {
            self.more += 1;
        }
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }
}

/// Checks a store that nobody else has open.
///
/// # Errors
/// As [`EpochMap::open`]: a store that can't be opened can't be walked.
pub fn check<D: Disk>(disk: D, path: &Path, options: &CheckOptions) -> Result<CheckReport, StoreError> {
    let open = OpenOptions { cache: ByteLength::new(64 << 20), overcommit: true };
    let (mut store, _) = EpochMap::read_all(disk, path, &open)?;
    let mut report = CheckReport { batches: store.journal.head().batch.0 - store.superblock.journal.batch.0, ..CheckReport::default() };
    store.check_copies(&mut report)?;
    let blocks = usize::try_from(store.superblock.geometry.data_blocks).unwrap_or(usize::MAX);
    let mut walk = Walk { store: &mut store, report, seen: vec![0; blocks], pages: HashSet::new(), options: *options };
    walk.all();
    Ok(walk.report)
}

impl<D: Disk> EpochMap<D> {
    /// The copies that opening didn't need.
    fn check_copies(&mut self, report: &mut CheckReport) -> Result<(), StoreError> {
        // A crash may tear one superblock; what matters is that the other is whole, as opening has found.
        let torn = COPIES.iter().filter(|copy| read_superblock_copy(&mut self.direct(), **copy).is_err()).count();
        if torn > 0 {
            tracing::info!(path = %self.path.display(), "one superblock is not whole: the store was opened when a crash came, or it is damaged");
        }
        let superblock = self.superblock;
        for copy in 0..2 {
            let at = superblock.geometry.catalog_at(superblock.checkpoint & 1, copy);
            let bytes = super::open::read_catalog_copy(&mut self.direct(), at, superblock.catalog_length as usize);
            let reason = match bytes {
                Ok(bytes) if crc32c::crc32c(&bytes) == superblock.catalog_checksum => continue,
                Ok(_) => FormatError::Checksum.to_string(),
                Err(error) => error.to_string(),
            };
            report.note(Fault::Copy { what: "the catalog", copy, reason });
        }
        Ok(())
    }
}

/// What of a tree is walked, and whose it is.
struct Scope {
    owners: Owners,
    /// Blocks of the volume or snapshot.
    size: u64,
    /// Blocks before this are done with.
    from: u64,
    /// What is not younger than this belongs to others, who are walked, too.
    above: Epoch,
    /// Pages that were walked for another tree are left out.
    once: bool,
    /// Blocks of its own volume that were found.
    own: u64,
}

struct Walk<'a, D: Disk> {
    store: &'a mut EpochMap<D>,
    report: CheckReport,
    /// Per block of the data area: 0 if nobody needs it, or a digest of who does.
    seen: Vec<u8>,
    /// Map pages that were walked with all that is under them.
    pages: HashSet<DiskBlock>,
    options: CheckOptions,
}

impl<D: Disk> Walk<'_, D> {
    fn all(&mut self) {
        let slots: Vec<Slot> = self.store.replicas.keys().copied().collect();
        for slot in &slots {
            self.replica(*slot);
        }
        for dead in self.store.dead.clone() {
            let Some((owners, size)) = self.store.replicas.get(&dead.slot).map(|replica| (replica.record.owners(), u64::MAX)) else {
                continue;
            };
            let above = dead.floor.min(dead.floor_before);
            let mut scope = Scope { owners, size, from: dead.done_before, above, once: true, own: 0 };
            let tree = Tree { root: Child::Disk(dead.root), level: dead.level };
            let floor = |index: u64| if index < dead.split { dead.floor_before } else { dead.floor };
            self.tree(&tree.root, tree.level, dead.base, &mut scope, &floor);
        }
        self.bits();
        self.counts(&slots);
    }

    fn replica(&mut self, slot: Slot) {
        let Some(record) = self.store.replicas.get(&slot).map(|replica| replica.record.frozen()) else { return };
        self.report.volumes += 1;
        let owners = record.owners();
        // The origin of a clone that is given up may be gone already.
        let above = if record.deleting { owners.floor() } else { Epoch::NEVER };
        let floor = |_: u64| above;
        // Not once: all its blocks are counted.
        let mut scope = Scope { owners: owners.clone(), size: record.size.blocks(), from: 0, above, once: false, own: 0 };
        self.tree(&record.tree.root, record.tree.level, 0, &mut scope, &floor);
        let dead = self.store.dead.iter().any(|dead| dead.slot == slot && dead.counts_as_live);
        if !dead && scope.own != record.live {
            self.count(&owners, "blocks of the volume", record.live, scope.own);
        }
        for snapshot in &record.snapshots {
            self.report.snapshots += 1;
            let from = snapshot.deleted_before.unwrap_or(0);
            let size = snapshot.size.blocks();
            let mut scope = Scope { owners: owners.clone(), size, from, above, once: true, own: 0 };
            self.tree(&snapshot.tree.root, snapshot.tree.level, 0, &mut scope, &floor);
        }
    }

    fn count(&mut self, owners: &Owners, what: &'static str, recorded: u64, counted: u64) {
        self.report.note(Fault::Count { volume: owners.volume, what, recorded, counted });
    }

    /// Walks what is under `child`, from `scope.from` on. `floor` says what of a block belongs to others.
    fn tree(&mut self, child: &Child, level: u8, base: u64, scope: &mut Scope, floor: &impl Fn(u64) -> Epoch) {
        let end = base.saturating_add(blocks_under(level));
        if end <= scope.from || child.epoch() <= scope.above {
            return;
        }
        let node = match child {
            Child::Hole | Child::Zeroes(_) => return,
            Child::Memory(node) => Arc::clone(node),
            Child::Disk(pointer) => {
                self.needs_page(pointer, scope);
                // One of which only a part is walked is walked again for others.
                let whole = scope.from <= base;
                if whole && !self.pages.insert(pointer.place) && scope.once {
                    return;
                }
                match self.page(pointer, level, base, &scope.owners) {
                    Some(node) => node,
                    None => return,
                }
            }
        };
        // It is in use until the next checkpoint.
        if let Origin::Page(replaced) = &node.origin {
            self.needs_page(replaced, scope);
        }
        match &node.body {
            Body::Leaf(entries) => self.leaf(base, &entries[..], scope, floor),
            Body::Inner(children) => {
                for (number, child) in (0..).zip(children.iter()) {
                    self.tree(child, level - 1, base + number * blocks_under(level - 1), scope, floor);
                }
            }
        }
    }

    fn page(&mut self, pointer: &PagePointer, level: u8, base: u64, owners: &Owners) -> Option<Arc<Node>> {
        if let Some(node) = self.store.cache.get(pointer.place) {
            return Some(node);
        }
        self.report.pages += 1;
        let missing = Missing { pointer: *pointer, level, index: base / blocks_under(level) };
        match self.store.load_page(&missing, owners) {
            Ok(()) => self.store.cache.get(pointer.place),
            Err(error) => {
                self.report.note(Fault::Page { volume: owners.volume, reason: error.to_string() });
                None
            }
        }
    }

    /// Marks a map page as needed.
    fn needs_page(&mut self, pointer: &PagePointer, scope: &Scope) {
        self.needs(pointer.place, 1, scope, BlockIndex::new(0));
    }

    fn leaf(&mut self, base: u64, entries: &[Entry], scope: &mut Scope, floor: &impl Fn(u64) -> Epoch) {
        let owned = |index: u64, entry: &Entry| entry.is_mapped() && index >= scope.from && entry.epoch > floor(index);
        let needed: Vec<(u64, Entry)> = (base..).zip(entries.iter().copied()).filter(|(index, entry)| owned(*index, entry)).collect();
        for (index, entry) in &needed {
            let owner = scope.owners.of(entry.epoch);
            scope.own += u64::from(owner == scope.owners.volume);
            let block = BlockIndex::new(*index);
            if *index >= scope.size {
                self.report.note(Fault::Outside { volume: scope.owners.volume, block, place: entry.place });
            }
            // Never 0, nor 1, which is for pages.
            let mut digest = crc32c::crc32c(&owner.to_bytes());
            digest = crc32c::crc32c_append(digest, &index.to_le_bytes());
            digest = crc32c::crc32c_append(digest, &entry.epoch.get().to_le_bytes());
            digest = crc32c::crc32c_append(digest, &entry.checksum.to_le_bytes());
            self.needs(entry.place, u8::try_from(2 + digest % 254).unwrap_or(2), scope, block);
        }
        if self.options.data {
            self.verify(&needed, scope);
        }
    }

    /// Marks a block of the data area as needed.
    fn needs(&mut self, place: DiskBlock, digest: u8, scope: &Scope, block: BlockIndex) {
        let volume = scope.owners.volume;
        let geometry = &self.store.superblock.geometry;
        let index = place.get().checked_sub(geometry.data_start().get()).and_then(|index| usize::try_from(index).ok());
        let Some(seen) = index.and_then(|index| self.seen.get_mut(index)) else {
            return self.report.note(Fault::Outside { volume, block, place });
        };
        let before = std::mem::replace(seen, digest);
        if before != 0 && before != digest {
            self.report.note(Fault::CrossLink { volume, block, place });
        }
        if before == 0 {
            self.report.blocks += u64::from(digest != 1);
            if !self.store.allocator.is_used(place) {
                self.report.note(Fault::Free { volume, place });
            }
        }
    }

    /// Reads blocks and compares their checksums; those side by side at once.
    fn verify(&mut self, blocks: &[(u64, Entry)], scope: &Scope) {
        let follows = |a: &(u64, Entry), b: &(u64, Entry)| a.1.place.plus(1) == b.1.place;
        for run in blocks.chunk_by(follows) {
            let Some((_, first)) = run.first() else { continue };
            let read = self.store.direct().read(first.place, run.len());
            if read.is_err() && run.len() > 1 {
                run.iter().for_each(|block| self.verify(std::slice::from_ref(block), scope));
                continue;
            }
            for (position, (index, entry)) in run.iter().enumerate() {
                let pending = self.store.copying.get(entry.place).cloned();
                let start = position * BLOCK_SIZE as usize;
                let data = match (&pending, &read) {
                    // Not where it belongs yet: it is in the journal.
                    (Some(data), _) => Ok(&data[..]),
                    (None, Ok(data)) => Ok(&data[start..start + BLOCK_SIZE as usize]),
                    (None, Err(error)) => Err(error.to_string()),
                };
                let (block, owner) = (BlockIndex::new(*index), scope.owners.of(entry.epoch));
                let reason = match data.map(|data| block_checksum(owner, block, data)) {
                    Ok(got) if got == entry.checksum => {
                        self.report.verified += 1;
                        continue;
                    }
                    Ok(got) => format!("its checksum is {got:#010x}, not {:#010x}", entry.checksum),
                    Err(reason) => reason,
                };
                self.report.note(Fault::Block { volume: scope.owners.volume, block, place: entry.place, reason });
            }
        }
    }

    /// Compares the bits with what is needed.
    fn bits(&mut self) {
        let own: HashSet<DiskBlock> = self.store.allocator.own_pages().collect();
        let start = self.store.superblock.geometry.data_start();
        let mut leak: Option<(DiskBlock, u64)> = None;
        for (index, seen) in (0..).zip(&self.seen) {
            let place = start.plus(index);
            let lost = *seen == 0 && self.store.allocator.is_used(place) && !own.contains(&place) && !self.store.bad.contains(&place);
            match &mut leak {
                Some((_, count)) if lost => *count += 1,
                None if lost => leak = Some((place, 1)),
                _ => {
                    if let Some((place, count)) = leak.take() {
                        self.report.note(Fault::Leak { place, count });
                    }
                }
            }
        }
        if let Some((place, count)) = leak {
            self.report.note(Fault::Leak { place, count });
        }
    }

    fn counts(&mut self, slots: &[Slot]) {
        let recorded: u64 = slots.iter().filter_map(|slot| self.store.replicas.get(slot)).map(|replica| replica.record.allocated).sum();
        if recorded != self.report.blocks
            && let Some(owners) = slots.first().and_then(|slot| self.store.replicas.get(slot)).map(|replica| replica.record.owners())
        {
            self.count(&owners, "blocks of this and all other volumes", recorded, self.report.blocks);
        }
    }
}
