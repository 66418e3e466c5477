//! Checkpoints: the changed pages go to new places, a catalog names them, a superblock names the catalog; then the journal before
//! it is not needed any more.
//!
//! A checkpoint fixes its content in one step (the trees by holding their roots, the bits by sharing them) and is then written
//! beside everything else that goes on. Three syncs: one before the first superblock, for all it points to and for the journal's
//! batches before it; one between the superblocks, so that one of them is always whole; one before anything that only the older
//! checkpoint needed is used again.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::allocator::{BitsPointer, FrozenBits};
use super::catalog::{Catalog, Owners};
use super::journal::BatchNumber;
use super::page::{Body, Child, Node, Origin, PageIdentity, PagePointer, blocks_under};
use super::record::Slot;
use super::replica::Replica;
use super::superblock::{COPIES, JournalHead, Superblock};
use super::tree::Tree;
use super::{EpochMap, Purpose};
use crate::buffer::{Buffer, SharedBuffer};
use crate::disk::{Disk, DiskBlock, DiskWork};
use crate::store::StoreError;
use crate::units::{BLOCK_SIZE, Epoch};

/// Page writes at once.
const IN_FLIGHT_MAX: usize = 32;
/// Without work for so long, a store with changes makes a checkpoint, so that it starts quickly.
pub(super) const IDLE: Duration = Duration::from_secs(10);

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Pages are written.
    Pages,
    /// Everything that the superblock will stand for must be on stable media: waits for this sync.
    Settle,
    Catalog,
    FirstSync(u64),
    FirstSuperblock,
    SecondSync(u64),
    SecondSuperblock,
    LastSync(u64),
}

#[derive(Debug)]
pub(super) struct Checkpoint {
    stage: Stage,
    outstanding: usize,
    superblock: Superblock,
    /// Pages to write, children before parents.
    nodes: VecDeque<(Arc<Node>, PageIdentity, DiskBlock)>,
    /// Where pages in memory are going to be, or are.
    places: HashMap<*const Node, PagePointer>,
    /// Keeps the keys of `places` from being used again.
    held: Vec<Arc<Node>>,
    bits: FrozenBits,
    next_bits: usize,
    next_directory: usize,
    catalog: Catalog,
}

// SAFETY: the pointers in `places` are keys only; what they point to is held by `held`.
unsafe impl Send for Checkpoint {}

impl Checkpoint {
    /// Whether this page is one that it writes, or has written.
    pub(super) fn writes(&self, node: &Arc<Node>) -> bool {
        self.places.contains_key(&Arc::as_ptr(node))
    }

    /// The first batch that is not in it.
    pub(super) const fn until(&self) -> BatchNumber {
        self.superblock.journal.batch
    }
}

impl<D: Disk> EpochMap<D> {
    pub(super) fn advance_checkpoint(&mut self) {
        if self.poisoned.is_some() {
            return;
        }
        let pressed = self.journal.used() > self.journal.ring() / 2
            || self.dirty > self.space.dirty_max()
            || self.allocator.resting() > self.allocator.blocks() / 8;
        // After a crash the disk below may first have to be prepared again.
        let has_room = (self.dirty as u64) + 2 * self.allocator.pages() <= self.allocator.ready();
        if self.checkpoint.is_none() && (self.checkpoint_wanted || pressed) && has_room {
            self.checkpoint_wanted = false;
            self.begin_checkpoint();
        }
        while let Some(checkpoint) = &self.checkpoint {
            let before = checkpoint.stage;
            match before {
                Stage::Pages => self.write_pages(),
                Stage::Settle => self.settle(),
                Stage::Catalog if checkpoint.outstanding == 0 => self.sync_then(Stage::FirstSync),
                Stage::FirstSync(ticket) if self.journal.has_ended(ticket) => self.write_superblock(0, Stage::FirstSuperblock),
                Stage::FirstSuperblock if checkpoint.outstanding == 0 => self.sync_then(Stage::SecondSync),
                Stage::SecondSync(ticket) if self.journal.has_ended(ticket) => self.write_superblock(1, Stage::SecondSuperblock),
                Stage::SecondSuperblock if checkpoint.outstanding == 0 => self.sync_then(Stage::LastSync),
                Stage::LastSync(ticket) if self.journal.has_ended(ticket) => self.commit_checkpoint(),
                _ => return,
            }
            if self.checkpoint.as_ref().is_none_or(|checkpoint| checkpoint.stage == before) {
                return;
            }
        }
    }

    fn sync_then(&mut self, stage: impl Fn(u64) -> Stage) {
        let ticket = self.journal.want_sync();
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.stage = stage(ticket);
        }
        // The journal comes before checkpoints in a round.
        self.advance_journal();
    }

    /// Fixes what the checkpoint will say.
    fn begin_checkpoint(&mut self) {
        self.seal();
        let head: JournalHead = self.journal.head();
        let mut nodes = Vec::new();
        let mut held = HashMap::new();
        for replica in self.replicas.values() {
            let record = &replica.record;
            let owners = record.owners();
            // Older ones first: a page that several share replaces what the oldest doesn't need.
            for (number, snapshot) in record.snapshots.iter().enumerate() {
                collect(&snapshot.tree, &owners, record.slot, number, &mut nodes, &mut held);
            }
            collect(&record.tree, &owners, record.slot, record.snapshots.len(), &mut nodes, &mut held);
        }
        let mut queue = VecDeque::with_capacity(nodes.len());
        let mut places = HashMap::with_capacity(nodes.len());
        for Collected { node, identity, slot, snapshots } in nodes {
            if let Origin::Page(replaced) = &node.origin {
                let last = (identity.index + 1) * blocks_under(identity.level) - 1;
                let floor = self.replicas.get(&slot).map_or(Epoch::NEVER, |replica| replica.record.floor_of(snapshots, last));
                if replaced.epoch > floor {
                    self.give_up_page(replaced);
                }
            }
            let place = self.allocator.page();
            assert!(place.is_some(), "the reserve has room for all changed pages");
            let Some(place) = place else { return };
            self.space.pages += 1;
            places.insert(Arc::as_ptr(&node), PagePointer { place, checksum: 0, epoch: node.epoch });
            queue.push_back((node, identity, place));
        }
        self.stop_if_contradicted();
        let bits = self.allocator.freeze();
        assert!(bits.is_some(), "the reserve has room for all changed bits");
        self.contradicted |= bits.as_ref().is_some_and(|bits| bits.contradicted);
        let mut catalog = Catalog {
            next_slot: self.next_slot,
            prepared: self.allocator.prepared(),
            replicas: self.replicas.iter().map(|(slot, replica)| (*slot, replica.record.frozen())).collect(),
            dead: self.dead.clone(),
            bad: self.bad.clone(),
            directory: vec![BitsPointer::default(); self.allocator.directory().len()],
        };
        catalog.shorten_logs(self.limits.bytes);
        self.dirty = 0;
        self.replicas.values_mut().for_each(Replica::freeze);
        self.checkpoint = Some(Checkpoint {
            stage: Stage::Pages,
            outstanding: 0,
            superblock: Superblock { checkpoint: self.superblock.checkpoint + 1, journal: head, ..self.superblock },
            nodes: queue,
            places,
            held: held.into_values().collect(),
            bits: bits.unwrap_or_default(),
            next_bits: 0,
            next_directory: 0,
            catalog,
        });
    }

    fn write_pages(&mut self) {
        loop {
            let Some(checkpoint) = &mut self.checkpoint else { return };
            if checkpoint.outstanding >= IN_FLIGHT_MAX {
                return;
            }
            let mut page = self.pool.take(BLOCK_SIZE as usize);
            let place = if let Some((node, identity, place)) = checkpoint.nodes.pop_front() {
                let places = &mut checkpoint.places;
                let checksum = node.encode(identity, &mut page, |child| pointer_of(places, child));
                if let Some(pointer) = places.get_mut(&Arc::as_ptr(&node)) {
                    pointer.checksum = checksum;
                }
                let clean = clean(&node, places);
                self.cache.insert(place, clean);
                place
            } else if let Some((number, place, bits)) = checkpoint.bits.groups.get(checkpoint.next_bits) {
                checkpoint.next_bits += 1;
                self.allocator.encode_group(*number, *place, bits, &mut page);
                *place
            } else if let Some((number, place)) = checkpoint.bits.directory.get(checkpoint.next_directory) {
                checkpoint.next_directory += 1;
                self.allocator.encode_directory(*number, *place, &mut page);
                *place
            } else {
                checkpoint.stage = Stage::Settle;
                return;
            };
            self.write_checkpoint(place, page.share());
        }
    }

    fn write_checkpoint(&mut self, at: DiskBlock, piece: SharedBuffer) {
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.outstanding += 1;
        }
        self.counters.pages_written += (piece.len() / BLOCK_SIZE as usize) as u64;
        self.start(Purpose::Checkpoint, DiskWork::Write { at, pieces: vec![piece] });
    }

    pub(super) fn on_checkpoint_io(&mut self, result: io::Result<Option<Buffer>>) {
        if let Err(error) = result {
            return self.poison("a write of a checkpoint failed", &error);
        }
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.outstanding -= 1;
        }
    }

    /// Waits until all batches before the checkpoint are done and their overwrites copied, then writes the catalog.
    fn settle(&mut self) {
        let Some(checkpoint) = &self.checkpoint else { return };
        let until = checkpoint.until();
        if checkpoint.outstanding > 0 || self.journal.done < until.previous() {
            return;
        }
        if self.copying.has_before(until) {
            // Copies need the journal on stable media first, and count as done when they are there, too.
            if self.journal.synced < until.previous() || self.copying.has_copied() {
                self.journal.want_sync();
                self.advance_journal();
            }
            return;
        }
        self.write_catalog();
    }

    fn write_catalog(&mut self) {
        let directory = self.allocator.directory().to_vec();
        let Some(checkpoint) = &mut self.checkpoint else { return };
        checkpoint.catalog.directory = directory;
        let places = &checkpoint.places;
        let bytes = checkpoint.catalog.encode(|node| pointer_of(places, node));
        let geometry = self.superblock.geometry;
        let blocks = bytes.len().div_ceil(BLOCK_SIZE as usize);
        assert!(blocks as u64 <= geometry.catalog_blocks, "limits keep the catalog within its area: {blocks} blocks");
        checkpoint.superblock.catalog_length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        checkpoint.superblock.catalog_checksum = crc32c::crc32c(&bytes);
        checkpoint.stage = Stage::Catalog;
        let half = checkpoint.superblock.checkpoint & 1;
        for copy in 0..2 {
            let mut at = geometry.catalog_at(half, copy);
            for part in bytes.chunks(1 << 20) {
                let mut page = self.pool.take(part.len().next_multiple_of(BLOCK_SIZE as usize));
                page[..part.len()].copy_from_slice(part);
                page[part.len()..].fill(0);
                let blocks = (page.len() / BLOCK_SIZE as usize) as u64;
                self.write_checkpoint(at, page.share());
                at = at.plus(blocks);
            }
        }
    }

    fn write_superblock(&mut self, copy: usize, stage: Stage) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        checkpoint.stage = stage;
        let mut page = self.pool.take(BLOCK_SIZE as usize);
        page.copy_from_slice(&checkpoint.superblock.encode());
        self.write_checkpoint(COPIES[copy], page.share());
    }

    fn commit_checkpoint(&mut self) {
        let Some(checkpoint) = self.checkpoint.take() else { return };
        let Checkpoint { superblock, places, held, catalog, .. } = checkpoint;
        // Its references to pages would make those look shared.
        drop(catalog);
        self.journal.release(&superblock.journal);
        self.superblock = superblock;
        self.counters.checkpoints += 1;
        let blocks = self.allocator.thaw();
        self.reuse(blocks);
        let mut merge = Merge { places: &places, rebuilt: HashMap::new() };
        for replica in self.replicas.values_mut() {
            replica.record.snapshots.iter_mut().for_each(|snapshot| merge.child(&mut snapshot.tree.root));
            merge.child(&mut replica.record.tree.root);
            replica.thaw();
        }
        drop(merge);
        for (node, floor) in self.background.take_left() {
            // One that this checkpoint didn't write was made after the freeze, and is a snapshot's.
            if let Some(pointer) = places.get(&Arc::as_ptr(&node)).filter(|pointer| pointer.epoch > floor) {
                self.give_up_page(pointer);
            }
        }
        drop(held);
        self.background.wake();
        self.unstall();
    }

    /// Makes a checkpoint of everything and waits for it.
    pub(super) fn checkpoint_now(&mut self) -> Result<(), StoreError> {
        self.wait_for(|store| store.checkpoint.is_none())?;
        self.checkpoint_wanted = true;
        let before = self.counters.checkpoints;
        self.wait_for(|store| store.counters.checkpoints > before)
    }
}

/// A changed page, and what decides about the page that it replaces.
struct Collected {
    node: Arc<Node>,
    identity: PageIdentity,
    slot: Slot,
    /// How many snapshots are older.
    snapshots: usize,
}

/// Finds the pages in memory, children before parents, each once.
fn collect(
    tree: &Tree,
    owners: &Owners,
    slot: Slot,
    snapshots: usize,
    nodes: &mut Vec<Collected>,
    held: &mut HashMap<*const Node, Arc<Node>>,
) {
    fn under(
        child: &Child,
        level: u8,
        index: u64,
        found: &mut impl FnMut(&Arc<Node>, u8, u64) -> bool,
        after: &mut impl FnMut(&Arc<Node>, u8, u64),
    ) {
        let Child::Memory(node) = child else { return };
        if !found(node, level, index) {
            return;
        }
        if let Body::Inner(children) = &node.body {
            for (number, child) in (0..).zip(children.iter()) {
                under(child, level - 1, index * children.len() as u64 + number, found, after);
            }
        }
        after(node, level, index);
    }
    let mut new = |node: &Arc<Node>, _: u8, _: u64| held.insert(Arc::as_ptr(node), Arc::clone(node)).is_none();
    let mut after = |node: &Arc<Node>, level: u8, index: u64| {
        let identity = PageIdentity { volume: owners.of(node.epoch), level, index };
        nodes.push(Collected { node: Arc::clone(node), identity, slot, snapshots });
    };
    under(&tree.root, tree.level, 0, &mut new, &mut after);
}

fn pointer_of(places: &HashMap<*const Node, PagePointer>, node: &Arc<Node>) -> PagePointer {
    let pointer = places.get(&Arc::as_ptr(node));
    assert!(pointer.is_some(), "every changed page under a changed page is written with it");
    pointer.copied().unwrap_or(PagePointer { place: DiskBlock::new(0), checksum: 0, epoch: Epoch::NEVER })
}

/// The page as it is on the disk.
fn clean(node: &Arc<Node>, places: &HashMap<*const Node, PagePointer>) -> Arc<Node> {
    let body = match &node.body {
        Body::Leaf(_) => node.body.clone(),
        Body::Inner(children) => Body::Inner(Box::new(std::array::from_fn(|number| match &children[number] {
            Child::Memory(child) => Child::Disk(pointer_of(places, child)),
            child => child.clone(),
        }))),
    };
    Arc::new(Node { origin: Origin::New, epoch: node.epoch, body })
}

/// After a checkpoint: what it has written is on the disk now, and what was changed since replaces that.
struct Merge<'a> {
    places: &'a HashMap<*const Node, PagePointer>,
    /// Pages that several trees share, once merged. The key's node is held by the value.
    rebuilt: HashMap<*const Node, (Arc<Node>, Arc<Node>)>,
}

impl Merge<'_> {
    fn child(&mut self, child: &mut Child) {
        let Child::Memory(node) = child else { return };
        if let Some(pointer) = self.places.get(&Arc::as_ptr(node)) {
            *child = Child::Disk(*pointer);
            return;
        }
        if let Some((_, rebuilt)) = self.rebuilt.get(&Arc::as_ptr(node)) {
            *node = Arc::clone(rebuilt);
            return;
        }
        if let Some(alone) = Arc::get_mut(node) {
            self.node(alone);
            return;
        }
        let mut copy = Node::clone(node);
        self.node(&mut copy);
        let copy = Arc::new(copy);
        self.rebuilt.insert(Arc::as_ptr(node), (Arc::clone(node), Arc::clone(&copy)));
        *node = copy;
    }

    fn node(&mut self, node: &mut Node) {
        if let Origin::Node(from) = &node.origin {
            if let Some(pointer) = self.places.get(&Arc::as_ptr(from)) {
                node.origin = Origin::Page(*pointer);
            } else if let Some((_, rebuilt)) = self.rebuilt.get(&Arc::as_ptr(from)) {
                node.origin = Origin::Node(Arc::clone(rebuilt));
            }
        }
        if let Body::Inner(children) = &mut node.body {
            children.iter_mut().for_each(|child| self.child(child));
        }
    }
}
