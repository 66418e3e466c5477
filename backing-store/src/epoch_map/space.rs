//! Who may have how much: promises, the reserve, accounting, giving blocks up.
//!
//! * A volume is promised its size. What it doesn't hold of that can't be taken by anybody else.
//! * Snapshots hold more than that: their volume's writes take what is neither used nor promised, and get
//!   [`StoreError::NoSpace`] when that is gone, while other volumes go on.
//! * A reserve is left for map pages, so that checkpoints, deletions and discards work on a full store.

use super::EpochMap;
use super::catalog::{DeadTree, ReplicaRecord};
use super::page::{Entry, PagePointer};
use super::record::Slot;
use super::tree::{Displaced, Tree};
use super::write::IN_PLACE_MAX;
use crate::disk::{Disk, DiskBlock};
use crate::store::{BLOCKS_MAX, StoreError, StoreUsage};
use crate::units::{BLOCK_SIZE, ByteLength, Epoch, VolumeSize};

/// Map pages that may change before a checkpoint begins, or a 256th of a small store. With those that change while it is being
/// written, and both in memory, that is 64 MiB.
const DIRTY_MAX: u64 = 6144;
const DIRTY_MIN: u64 = 64;
/// Room for overwrites on their way: 32 MiB, less on a small store, but where it is not tiny two of the largest writes.
const TRANSIT_MAX: u64 = 8192;
const TRANSIT_MIN: u64 = 2 * BLOCKS_MAX;
/// Most pages that one operation changes: the leaves and inner pages over both ends of what it touches.
const PAGES_PER_OPERATION: usize = 16;
/// One block in so many is the map's, if all are mapped: a leaf for 256 blocks, and inner pages.
const BLOCKS_PER_PAGE: u64 = 250;

#[derive(Debug)]
pub(super) struct Space {
    /// Nothing is promised: who comes first takes it.
    overcommit: bool,
    /// Blocks promised to volumes and not yet theirs.
    promised: u64,
    /// Blocks of pages: map, bits, directory.
    pub(super) pages: u64,
    dirty_max: u64,
    /// Blocks for overwrites that go to fresh places: those that they replace come back with a checkpoint only.
    transit: u64,
}

/// Why there is no room for something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shortage {
    /// Space is coming back: it waits.
    Passing,
    /// Not before somebody deletes something.
    Lasting,
}

/// What giving something up depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Floor {
    pub(super) needed: Epoch,
    /// What is not younger than this is an ancestor's, and was never counted.
    pub(super) foreign: Epoch,
}

impl ReplicaRecord {
    /// Blocks that it may still take whatever others do.
    pub(super) fn promise(&self) -> u64 {
        if self.deleting { 0 } else { self.size.blocks().saturating_sub(self.allocated) }
    }
}

impl Space {
    pub(super) fn new(data_blocks: u64, overcommit: bool) -> Self {
        let dirty_max = (data_blocks / 256).clamp(DIRTY_MIN, DIRTY_MAX);
        let transit = (data_blocks / 256).max((data_blocks / 8).min(TRANSIT_MIN)).min(TRANSIT_MAX);
        Self { overcommit, promised: 0, pages: 0, dirty_max, transit }
    }

    /// A replica's promise was `before` and is now what its record says.
    pub(super) fn promise(&mut self, before: Option<u64>, record: Option<&ReplicaRecord>) {
        if !self.overcommit {
            self.promised = self.promised - before.unwrap_or(0) + record.map_or(0, ReplicaRecord::promise);
        }
    }

    /// Pages that may have changed before changes wait for a checkpoint.
    pub(super) const fn dirty_limit(&self) -> usize {
        (self.dirty_max + self.dirty_max / 4) as usize
    }

    /// Pages that may change before a checkpoint begins.
    pub(super) const fn dirty_max(&self) -> usize {
        self.dirty_max as usize
    }
}

/// Takes one away. Whether there was one: if not, the map says something else than the catalog.
pub(super) const fn decrease(count: &mut u64) -> bool {
    let found = *count > 0;
    *count = count.saturating_sub(1);
    found
}

impl<D: Disk> EpochMap<D> {
    /// Blocks that only pages may take.
    pub(super) fn reserve(&self) -> u64 {
        3 * self.space.dirty_max + 2 * self.allocator.pages()
    }

    /// Blocks that come back without anybody giving up more.
    fn coming(&self) -> u64 {
        self.allocator.resting() + self.below.discarding() + self.preparable()
    }

    /// Whether a replica's write may take so many fresh blocks, which give back `returning` others.
    pub(super) fn may_take(&self, slot: Slot, fresh: u64, returning: u64) -> Result<(), Shortage> {
        let ready = self.allocator.ready().saturating_sub(self.reserve());
        let later = (self.allocator.ready() + self.coming()).saturating_sub(self.reserve());
        let own = self.replicas.get(&slot).filter(|_| !self.space.overcommit);
        let promise = own.map_or(0, |replica| replica.record.promise());
        // What is promised to others, and what overwrites need on their way, is not for growth beyond the promise.
        let beyond = fresh.saturating_sub(returning).saturating_sub(promise);
        // Two water marks: small writes find room for longer than large ones.
        let transit = if fresh <= IN_PLACE_MAX { self.space.transit / 2 } else { self.space.transit };
        let is_kept = beyond == 0 || self.space.promised + beyond + transit <= later;
        if is_kept && fresh <= ready {
            return Ok(());
        }
        // After a running checkpoint, some of it may not need fresh blocks any more.
        let passes = is_kept && fresh <= later || self.background.is_busy() || self.below.is_preparing() || self.checkpoint.is_some();
        Err(if passes { Shortage::Passing } else { Shortage::Lasting })
    }

    /// Whether a checkpoint finds places for all changed pages if one more operation changes some.
    pub(super) fn may_change(&self) -> Result<(), Shortage> {
        let pages = (self.dirty + PAGES_PER_OPERATION) as u64 + 2 * self.allocator.pages();
        if pages <= self.allocator.ready() {
            return Ok(());
        }
        let passes = self.coming() > 0 || self.below.is_preparing() || self.checkpoint.is_some();
        Err(if passes { Shortage::Passing } else { Shortage::Lasting })
    }

    pub(super) fn no_space(&self, blocks: u64) -> StoreError {
        let kept = self.reserve() + self.space.promised + self.space.transit;
        let free = self.allocator.ready().saturating_sub(kept);
        let bytes = |blocks: u64| ByteLength::new(blocks * u64::from(BLOCK_SIZE));
        StoreError::NoSpace { path: self.path.clone(), needed: bytes(blocks), free: bytes(free) }
    }

    /// Whether a new replica of this size finds room.
    pub(super) fn check_room(&self, size: VolumeSize) -> Result<(), StoreError> {
        if self.space.overcommit {
            return Ok(());
        }
        let needed = size.blocks() + size.blocks() / BLOCKS_PER_PAGE;
        let usage = self.measure()?;
        let free = usage.available();
        if needed.saturating_mul(u64::from(BLOCK_SIZE)) > free.get() {
            return Err(StoreError::NoSpace { path: self.path.clone(), needed: size.bytes(), free });
        }
        Ok(())
    }

    pub(super) fn measure(&self) -> Result<StoreUsage, StoreError> {
        let bytes = |blocks: u64| ByteLength::new(blocks * u64::from(BLOCK_SIZE));
        let geometry = &self.superblock.geometry;
        let (mut live, mut allocated, mut leaving) = (0, 0, 0);
        for replica in self.replicas.values() {
            let record = &replica.record;
            if record.deleting {
                leaving += record.allocated;
            } else {
                live += record.live;
                allocated += record.allocated;
            }
        }
        let below = self.disk.preparable().map_err(|source| self.io_error("measure", source))?;
        let below = below.map_or(u64::MAX, |bytes| bytes / u64::from(BLOCK_SIZE));
        let free = self.allocator.ready() + (self.allocator.unprepared() + self.below.in_holes()).min(below);
        let bad = self.bad.len() as u64;
        let fixed = geometry.blocks - geometry.data_blocks;
        let pages = self.space.pages + self.allocator.own();
        let reclaimable = self.allocator.resting() + self.below.discarding() + leaving;
        let snapshots = allocated.saturating_sub(live);
        let reserved = (self.space.promised + self.space.promised / BLOCKS_PER_PAGE + self.space.transit + self.reserve()).min(free);
        Ok(StoreUsage {
            capacity: bytes(fixed + free + live + snapshots + reclaimable + pages + bad),
            free: bytes(free),
            reserved: bytes(reserved),
            used: bytes(live),
            snapshots: bytes(snapshots),
            reclaimable: bytes(reclaimable),
            metadata: bytes(fixed + pages),
            bad: bytes(bad),
        })
    }

    // Giving up.

    /// A block left the tree of the volume as it is now.
    pub(super) fn displace_block(&mut self, slot: Slot, entry: Entry, floor: Floor) {
        if let Some(replica) = self.replicas.get_mut(&slot)
            && entry.epoch > floor.foreign
        {
            self.contradicted |= !decrease(&mut replica.record.live);
        }
        if entry.epoch > floor.needed {
            self.give_up_block(slot, entry.place);
        }
    }

    /// Nothing needs this block of data any more.
    pub(super) fn give_up_block(&mut self, slot: Slot, place: DiskBlock) {
        if let Some(replica) = self.replicas.get_mut(&slot) {
            let before = replica.record.promise();
            self.contradicted |= !decrease(&mut replica.record.allocated);
            self.space.promise(Some(before), Some(&replica.record));
        }
        let until = self.checkpoint.as_ref().map(|checkpoint| checkpoint.until());
        if until.is_none_or(|until| !self.copying.is_needed_before(place, until)) {
            self.copying.cancel(place);
        }
        if self.suspect.remove(&place) && self.bad.len() < self.limits.bad {
            self.bad.insert(place);
        } else {
            self.contradicted |= !self.allocator.give_up(place);
        }
    }

    /// Nothing needs this page any more.
    pub(super) fn give_up_page(&mut self, pointer: &PagePointer) {
        self.cache.remove(pointer.place);
        self.contradicted |= !decrease(&mut self.space.pages) | !self.allocator.give_up(pointer.place);
    }

    /// What leaves the tree of the volume as it is now by a change to zeros.
    pub(super) fn displace(&mut self, slot: Slot, displaced: Displaced) {
        let Some(replica) = self.replicas.get(&slot) else { return };
        let record = &replica.record;
        let foreign = record.lineage_floor();
        match displaced {
            Displaced::Block(index, entry) => {
                let needed = record.floor_at(index);
                self.displace_block(slot, entry, Floor { needed, foreign });
            }
            Displaced::Page(pointer, last) => {
                if pointer.epoch > record.floor_at(last) {
                    self.give_up_page(&pointer);
                }
            }
            Displaced::Node(node, last) => {
                let needed = record.floor_at(last);
                self.background.leave(node, needed);
            }
            Displaced::Tree(root, level, base) => {
                let dead = self.dead_tree(slot, root, level, base, true);
                self.dead.push(dead);
                self.background.wake();
            }
        }
    }

    pub(super) fn dead_tree(&self, slot: Slot, root: PagePointer, level: u8, base: u64, counts_as_live: bool) -> DeadTree {
        let snapshots = self.replicas.get(&slot).map_or(&[][..], |replica| &replica.record.snapshots);
        let foreign = self.replicas.get(&slot).map_or(Epoch::NEVER, |replica| replica.record.lineage_floor());
        // At most one snapshot is partly taken apart: the oldest of those on their way out.
        let split = snapshots.iter().filter_map(|snapshot| snapshot.deleted_before).max().unwrap_or(0);
        let newest = |gone_below: u64| {
            let needed = snapshots.iter().rev().find(|snapshot| snapshot.deleted_before.is_none_or(|before| before <= gone_below));
            needed.map_or(foreign, |snapshot| snapshot.epoch)
        };
        let (floor, floor_before) = (newest(u64::MAX), newest(0));
        DeadTree { root, level, base, next: Tree::new(level), floor, floor_before, split, slot, counts_as_live, done_before: base }
    }

    /// What waited for space, a checkpoint or copies looks again.
    pub(super) fn unstall(&mut self) {
        for (slot, replica) in &mut self.replicas {
            if std::mem::take(&mut replica.stalled) {
                self.ready.push_back(*slot);
            }
        }
    }

    /// Counts what the catalog and a replay have left.
    pub(super) fn count_space(&mut self) {
        self.look_below();
        let promised = self.replicas.values().map(|replica| replica.record.promise()).sum();
        self.space.promised = if self.space.overcommit { 0 } else { promised };
        let data: u64 = self.replicas.values().map(|replica| replica.record.allocated).sum();
        self.space.pages = self.allocator.used().saturating_sub(data + self.allocator.own() + self.bad.len() as u64);
    }
}
