//! What a checkpoint says of all replicas, snapshots and unfinished work: one blob, written twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::allocator::{BitsPointer, read_pointer, write_pointer};
use super::codec::{FormatError, Reader, Writer, count};
use super::dirty_log::DirtyLog;
use super::page::{Child, Node, PagePointer, read_child, root_level, write_child};
use super::record::{Slot, read_size, read_state, write_state};
use super::superblock::Geometry;
use super::tree::Tree;
use crate::disk::DiskBlock;
use crate::store::ReplicaState;
use crate::units::{BLOCK_SIZE, Epoch, Seq, SnapshotId, VolumeId, VolumeSize};

/// How much a catalog may say, so that it fits into its area whatever happens. A quarter of the area each is for replicas and
/// snapshots (at most 540 and 58 bytes), a half for trees that are taken apart (56 bytes); what is left is for the logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) replicas: usize,
    pub(super) snapshots: usize,
    /// Above this no more are added; one operation adds at most 2040.
    pub(super) dead: usize,
    pub(super) bad: usize,
    pub(super) bytes: usize,
}

impl Limits {
    pub(super) fn new(geometry: &Geometry) -> Self {
        let bytes = usize::try_from(geometry.catalog_blocks).unwrap_or(0) * BLOCK_SIZE as usize;
        Self { replicas: bytes / 2048, snapshots: bytes / 512, dead: bytes / 1024, bad: bytes / 256, bytes }
    }
}

/// Replicas that a store can have had.
pub(super) const SLOT_MAX: u32 = u32::MAX - 1;
/// Most generations of clones: each costs 20 bytes in every younger one.
pub(super) const LINEAGE_MAX: usize = 16;

/// The highest root of any volume.
const LEVEL_MAX: u8 = root_level(1 << 40);

/// A snapshot of a replica.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) id: SnapshotId,
    /// The epoch that it ended.
    pub(super) epoch: Epoch,
    pub(super) size: VolumeSize,
    pub(super) tree: Tree,
    /// Blocks of its own replica that the volume held when it was made.
    pub(super) live: u64,
    /// It is being given up, and is no longer needed for blocks before this one.
    pub(super) deleted_before: Option<u64>,
}

/// What must be known of a replica besides what its map says.
#[derive(Clone, Debug)]
pub(super) struct ReplicaRecord {
    pub(super) slot: Slot,
    pub(super) volume: VolumeId,
    pub(super) size: VolumeSize,
    pub(super) state: ReplicaState,
    pub(super) position: Seq,
    pub(super) epoch: Epoch,
    pub(super) tree: Tree,
    /// Oldest first.
    pub(super) snapshots: Vec<Snapshot>,
    /// Blocks that it and its snapshots hold, those of its origin left out.
    pub(super) allocated: u64,
    /// Of these, what the volume holds as it is now.
    pub(super) live: u64,
    /// For a clone: whose blocks are of epochs up to which, ascending. The last is its origin.
    pub(super) lineage: Arc<[(Epoch, VolumeId)]>,
    /// The snapshot that it is a clone of.
    pub(super) origin: Option<(Slot, SnapshotId)>,
    /// The reverts, oldest first.
    pub(super) reverts: Vec<Reverted>,
    /// It is given up, and its space is coming back.
    pub(super) deleting: bool,
    pub(super) log: DirtyLog,
}

/// Blocks went back to what they were at the end of epoch `to`, and the epoch was raised to `raised`. They don't show it, so changes
/// since an epoch between the two can't be told from epochs alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reverted {
    pub(super) to: Epoch,
    /// Of several that are remembered as one, the first.
    pub(super) first_raised: Epoch,
    pub(super) raised: Epoch,
}

/// Reverts that are remembered one by one; the older ones as one.
const REVERTS_MAX: usize = 8;

impl ReplicaRecord {
    pub(super) fn note_revert(&mut self, to: Epoch, raised: Epoch) {
        self.reverts.push(Reverted { to, first_raised: raised, raised });
        if self.reverts.len() > REVERTS_MAX {
            let oldest = self.reverts.remove(0);
            if let Some(next) = self.reverts.first_mut() {
                next.to = next.to.min(oldest.to);
                next.first_raised = oldest.first_raised;
            }
        }
    }

    /// Why changes up to `end` since `from` can't be told: what they can be told since.
    pub(super) fn forgotten(&self, from: Epoch, end: Epoch) -> Option<Epoch> {
        let found = self.reverts.iter().find(|revert| revert.first_raised <= end && revert.to < from && from < revert.raised);
        found.map(|revert| revert.to)
    }
}

/// A tree that nothing points to any more, which is being taken apart.
#[derive(Clone, Debug)]
pub(super) struct DeadTree {
    pub(super) root: PagePointer,
    pub(super) level: u8,
    pub(super) base: u64,
    /// The one that came after it, and is taken apart after it: what that has, too, is left to it.
    pub(super) next: Tree,
    /// What is not younger than this stays, since a snapshot has it.
    pub(super) floor: Epoch,
    /// Blocks before `split` have this floor instead: the snapshot was on its way out, and done so far.
    pub(super) floor_before: Epoch,
    pub(super) split: u64,
    /// Whose it was.
    pub(super) slot: Slot,
    /// Its blocks count as held by the volume until they are found.
    pub(super) counts_as_live: bool,
    /// Blocks before this one are done.
    pub(super) done_before: u64,
}

/// Whose pages and blocks are of which epochs: the ancestors' up to theirs, the volume's own above.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owners {
    pub(super) volume: VolumeId,
    pub(super) lineage: Arc<[(Epoch, VolumeId)]>,
}

impl Owners {
    /// Who wrote what is of this epoch.
    pub(super) fn of(&self, epoch: Epoch) -> VolumeId {
        self.lineage.iter().find(|(last, _)| epoch <= *last).map_or(self.volume, |(_, volume)| *volume)
    }

    /// What is not younger than this belongs to an ancestor.
    pub(super) fn floor(&self) -> Epoch {
        self.lineage.last().map_or(Epoch::NEVER, |(epoch, _)| *epoch)
    }
}

impl ReplicaRecord {
    pub(super) fn owners(&self) -> Owners {
        Owners { volume: self.volume, lineage: Arc::clone(&self.lineage) }
    }

    /// What is not younger than this belongs to an ancestor.
    pub(super) fn lineage_floor(&self) -> Epoch {
        self.lineage.last().map_or(Epoch::NEVER, |(epoch, _)| *epoch)
    }

    /// What a snapshot or an ancestor needs of the blocks at `index`: everything that is not younger than this.
    pub(super) fn floor_at(&self, index: u64) -> Epoch {
        self.floor_of(self.snapshots.len(), index)
    }

    /// The same for the tree of a snapshot, of which `older` are older.
    pub(super) fn floor_of(&self, older: usize, index: u64) -> Epoch {
        let needed = |snapshot: &&Snapshot| snapshot.deleted_before.is_none_or(|before| before <= index);
        self.snapshots.iter().take(older).rev().find(needed).map_or(self.lineage_floor(), |snapshot| snapshot.epoch)
    }

    /// All of it but the exact extents of its log, which no checkpoint keeps.
    pub(super) fn frozen(&self) -> Self {
        Self {
            tree: self.tree.clone(),
            snapshots: self.snapshots.clone(),
            lineage: Arc::clone(&self.lineage),
            reverts: self.reverts.clone(),
            log: self.log.without_extents(),
            ..*self
        }
    }

    pub(super) fn snapshot(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.id == id && snapshot.deleted_before.is_none())
    }
}

/// Everything in it.
#[derive(Clone, Debug)]
pub(super) struct Catalog {
    pub(super) next_slot: u32,
    /// How many blocks of the data area are prepared.
    pub(super) prepared: u64,
    pub(super) replicas: BTreeMap<Slot, ReplicaRecord>,
    pub(super) dead: Vec<DeadTree>,
    pub(super) bad: BTreeSet<DiskBlock>,
    pub(super) directory: Vec<BitsPointer>,
}

fn length(writer: &mut Writer, length: usize) {
    writer.u32(u32::try_from(length).unwrap_or(u32::MAX));
}

fn write_lineage(writer: &mut Writer, lineage: &[(Epoch, VolumeId)]) {
    length(writer, lineage.len());
    for (epoch, volume) in lineage {
        writer.u32(epoch.get());
        writer.bytes(&volume.to_bytes());
    }
}

fn read_lineage(reader: &mut Reader<'_>) -> Result<Vec<(Epoch, VolumeId)>, FormatError> {
    let length = reader.u32()?;
    (0..count(reader, length, 20)?).map(|_| Ok((Epoch::new(reader.u32()?), VolumeId::from_bytes(reader.array()?)))).collect()
}

fn flag(reader: &mut Reader<'_>, name: &'static str) -> Result<bool, FormatError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(FormatError::Field(name)),
    }
}

impl Catalog {
    /// As bytes. `pointer` gives the places of pages in memory.
    pub(super) fn encode(&self, mut pointer: impl FnMut(&Arc<Node>) -> PagePointer) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.u32(self.next_slot);
        writer.u64(self.prepared);
        length(&mut writer, self.replicas.len());
        for replica in self.replicas.values() {
            replica.encode(&mut writer, &mut pointer);
        }
        length(&mut writer, self.dead.len());
        for dead in &self.dead {
            write_child(&mut writer, &Child::Disk(dead.root), &mut pointer);
            writer.u8(dead.level);
            writer.u40(dead.base);
            write_child(&mut writer, &dead.next.root, &mut pointer);
            writer.u8(dead.next.level);
            writer.u32(dead.floor.get());
            writer.u32(dead.floor_before.get());
            writer.u40(dead.split);
            writer.u32(dead.slot.0);
            writer.u8(u8::from(dead.counts_as_live));
            writer.u40(dead.done_before);
        }
        length(&mut writer, self.bad.len());
        for bad in &self.bad {
            writer.u40(bad.get());
        }
        length(&mut writer, self.directory.len());
        for pointer in &self.directory {
            write_pointer(&mut writer, pointer);
        }
        writer.bytes
    }

    /// Drops the oldest of the logs until it fits into so many bytes.
    pub(super) fn shorten_logs(&mut self, bytes: usize) {
        let nowhere = PagePointer { place: DiskBlock::new(0), checksum: 0, epoch: Epoch::NEVER };
        let mut most = super::dirty_log::REGIONS_MAX;
        while most > 0 && self.encode(|_| nowhere).len() > bytes {
            most /= 2;
            self.replicas.values_mut().for_each(|replica| replica.log.keep_newest(most));
        }
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FormatError`].
    pub(super) fn decode(bytes: &[u8], geometry: &Geometry) -> Result<Self, FormatError> {
        let catalog = Self::read(bytes)?;
        catalog.check(geometry)?;
        Ok(catalog)
    }

    /// Whether it can be true of such a store.
    fn check(&self, geometry: &Geometry) -> Result<(), FormatError> {
        let Self { next_slot, prepared, replicas, dead, bad, .. } = self;
        let all = geometry.data_blocks;
        if replicas.keys().any(|slot| slot.0 >= *next_slot) || *next_slot > SLOT_MAX {
            return Err(FormatError::Field("next_slot"));
        }
        if *prepared > all {
            return Err(FormatError::Field("prepared"));
        }
        for replica in replicas.values() {
            replica.tree.root.check(geometry)?;
            replica.snapshots.iter().try_for_each(|snapshot| snapshot.tree.root.check(geometry))?;
            let most = replica.snapshots.iter().map(|snapshot| snapshot.live).chain([replica.live, replica.allocated]).max();
            if most.is_some_and(|most| most > all) {
                return Err(FormatError::Field("replica.blocks"));
            }
        }
        for dead in dead {
            Child::Disk(dead.root).check(geometry)?;
            dead.next.root.check(geometry)?;
            if !replicas.contains_key(&dead.slot) {
                return Err(FormatError::Field("dead.slot"));
            }
        }
        if bad.iter().any(|place| !geometry.is_data(*place)) {
            return Err(FormatError::Field("bad"));
        }
        Ok(())
    }

    fn read(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes, "catalog");
        let (next_slot, prepared) = (reader.u32()?, reader.u64()?);
        let mut replicas = BTreeMap::new();
        let replica_count = reader.u32()?;
        for _ in 0..count(&reader, replica_count, 64)? {
            let replica = ReplicaRecord::decode(&mut reader)?;
            replicas.insert(replica.slot, replica);
        }
        let mut dead = Vec::new();
        let dead_count = reader.u32()?;
        for _ in 0..count(&reader, dead_count, 56)? {
            let Child::Disk(root) = read_child(&mut reader)? else { return Err(FormatError::Field("dead.root")) };
            let (level, base) = (reader.u8()?, reader.u40()?);
            let next = Tree { root: read_child(&mut reader)?, level: reader.u8()? };
            if level > LEVEL_MAX || next.level > LEVEL_MAX {
                return Err(FormatError::Field("dead.level"));
            }
            let (floor, floor_before) = (Epoch::new(reader.u32()?), Epoch::new(reader.u32()?));
            let (split, slot) = (reader.u40()?, Slot(reader.u32()?));
            let (counts_as_live, done_before) = (flag(&mut reader, "dead.counts_as_live")?, reader.u40()?);
            dead.push(DeadTree { root, level, base, next, floor, floor_before, split, slot, counts_as_live, done_before });
        }
        let bad_count = reader.u32()?;
        let bad = (0..count(&reader, bad_count, 5)?).map(|_| reader.u40().map(DiskBlock::new)).collect::<Result<_, _>>()?;
        let directory_count = reader.u32()?;
        let directory = (0..count(&reader, directory_count, 9)?).map(|_| read_pointer(&mut reader)).collect::<Result<_, _>>()?;
        if !reader.is_empty() {
            return Err(FormatError::Field("length"));
        }
        Ok(Self { next_slot, prepared, replicas, dead, bad, directory })
    }
}

impl ReplicaRecord {
    fn encode(&self, writer: &mut Writer, pointer: &mut impl FnMut(&Arc<Node>) -> PagePointer) {
        writer.u32(self.slot.0);
        writer.bytes(&self.volume.to_bytes());
        writer.u64(self.size.bytes().get());
        write_state(writer, &self.state);
        writer.u64(self.position.get());
        writer.u32(self.epoch.get());
        write_child(writer, &self.tree.root, pointer);
        writer.u64(self.allocated);
        writer.u64(self.live);
        write_lineage(writer, &self.lineage);
        writer.u8(u8::from(self.origin.is_some()));
        if let Some((slot, snapshot)) = self.origin {
            writer.u32(slot.0);
            writer.bytes(&snapshot.to_bytes());
        }
        length(writer, self.reverts.len());
        for revert in &self.reverts {
            writer.u32(revert.to.get());
            writer.u32(revert.first_raised.get());
            writer.u32(revert.raised.get());
        }
        writer.u8(u8::from(self.deleting));
        length(writer, self.snapshots.len());
        for snapshot in &self.snapshots {
            writer.bytes(&snapshot.id.to_bytes());
            writer.u32(snapshot.epoch.get());
            writer.u64(snapshot.size.bytes().get());
            write_child(writer, &snapshot.tree.root, pointer);
            writer.u64(snapshot.live);
            writer.u8(u8::from(snapshot.deleted_before.is_some()));
            writer.u64(snapshot.deleted_before.unwrap_or(0));
        }
        self.log.encode(writer);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let slot = Slot(reader.u32()?);
        let (volume, size) = (VolumeId::from_bytes(reader.array()?), read_size(reader)?);
        let (state, position) = (read_state(reader)?, Seq::new(reader.u64()?));
        let epoch = Epoch::new(reader.u32()?);
        let tree = Tree { root: read_child(reader)?, level: root_level(size.blocks()) };
        let (allocated, live) = (reader.u64()?, reader.u64()?);
        let lineage = read_lineage(reader)?.into();
        let origin = flag(reader, "replica.origin")?
            .then(|| Ok::<_, FormatError>((Slot(reader.u32()?), SnapshotId::from_bytes(reader.array()?))))
            .transpose()?;
        let mut reverts = Vec::new();
        let revert_count = reader.u32()?;
        for _ in 0..count(reader, revert_count, 12)? {
            let (to, first_raised) = (Epoch::new(reader.u32()?), Epoch::new(reader.u32()?));
            reverts.push(Reverted { to, first_raised, raised: Epoch::new(reader.u32()?) });
        }
        let deleting = flag(reader, "replica.deleting")?;
        let mut snapshots = Vec::new();
        let snapshot_count = reader.u32()?;
        for _ in 0..count(reader, snapshot_count, 50)? {
            let (id, epoch) = (SnapshotId::from_bytes(reader.array()?), Epoch::new(reader.u32()?));
            let size = read_size(reader)?;
            let tree = Tree { root: read_child(reader)?, level: root_level(size.blocks()) };
            let live = reader.u64()?;
            let deleted = flag(reader, "snapshot.deleted")?;
            let before = reader.u64()?;
            snapshots.push(Snapshot { id, epoch, size, tree, live, deleted_before: deleted.then_some(before) });
        }
        let log = DirtyLog::decode(reader)?;
        Ok(Self { slot, volume, size, state, position, epoch, tree, snapshots, allocated, live, lineage, origin, reverts, deleting, log })
    }
}
