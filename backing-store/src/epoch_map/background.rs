//! Taking apart what nothing needs any more: deleted snapshots and replicas, and parts of maps that became zeros.
//!
//! One walk does it all. It goes over a tree in ascending order, a leaf at a time, and gives up what is younger than what the
//! older snapshot has (`floor`) and is not in the tree that follows (`next`). Two trees share everything under a page that both
//! point to, so most of them is never read. How far the walk has come is part of what a checkpoint says; after a crash it goes on
//! from there, and the blocks given up since are in use again, since the bits are as old.
//!
//! There are no dead lists: what they would say is in the difference of two trees, which can't disagree with itself.

use std::sync::Arc;

use super::cache::PageCache;
use super::catalog::{DeadTree, Owners, Snapshot};
use super::page::{Body, Child, Node, Origin, PagePointer, blocks_under};
use super::record::Slot;
use super::space::decrease;
use super::tree::{Missing, Tree};
use super::{EpochMap, Waiter};
use crate::disk::{Disk, DiskBlock};
use crate::units::Epoch;

/// Leaves taken apart in one round, so that a walk never holds up what comes in.
const LEAVES_PER_ROUND: u32 = 16;

#[derive(Debug, Default)]
pub(super) struct Background {
    /// There may be something to do.
    awake: bool,
    /// A page is being read.
    waiting: bool,
    /// A page can't be read: what is under it is not given up.
    stuck: bool,
    /// It waits for a checkpoint.
    blocked: bool,
    /// Pages that left the volume's tree while a checkpoint or a snapshot held them, and what is needed of them.
    left: Vec<(Arc<Node>, Epoch)>,
}

impl Background {
    pub(super) const fn wake(&mut self) {
        self.awake = true;
        self.blocked = false;
    }

    pub(super) const fn is_busy(&self) -> bool {
        self.awake && !self.stuck
    }

    pub(super) fn leave(&mut self, node: Arc<Node>, needed: Epoch) {
        self.left.push((node, needed));
    }

    pub(super) fn take_left(&mut self) -> Vec<(Arc<Node>, Epoch)> {
        std::mem::take(&mut self.left)
    }
}

/// What a walk takes apart.
#[derive(Clone, Debug)]
enum Job {
    /// The first of the dead trees.
    Dead,
    /// The first snapshot on its way out of this replica.
    Snapshot(Slot, usize),
    /// A replica of which only the volume as it is now is left.
    Replica(Slot),
}

/// Why a walk stops in the middle.
enum Pause {
    /// Enough for this round.
    Enough,
    Missing(Missing),
}

struct Walk<'a, D: Disk> {
    store: &'a mut EpochMap<D>,
    slot: Slot,
    floor: Epoch,
    floor_before: Epoch,
    split: u64,
    foreign: Epoch,
    counts_as_live: bool,
    next: u64,
    leaves: u32,
}

impl<D: Disk> EpochMap<D> {
    pub(super) fn advance_background(&mut self) {
        let background = &self.background;
        if !background.awake || background.waiting || background.stuck || background.blocked || self.poisoned.is_some() {
            return;
        }
        match self.next_job() {
            Some(job) => self.work(&job),
            None => {
                self.background.awake = false;
                self.unstall();
            }
        }
    }

    pub(super) fn resume_background(&mut self, failure: Option<&str>) {
        self.background.waiting = false;
        if let Some(error) = failure {
            self.background.stuck = true;
            tracing::error!(store = %self.superblock.id, error, "space can't be taken back: a map page is damaged; replace this store's replicas");
        }
    }

    /// Whether it goes on without being told.
    pub(super) const fn is_working(&self) -> bool {
        self.background.awake && !self.background.waiting && !self.background.stuck && !self.background.blocked
    }

    fn next_job(&self) -> Option<Job> {
        if !self.dead.is_empty() {
            return Some(Job::Dead);
        }
        let find = |from: u64| {
            self.replicas.iter().find_map(|(slot, replica)| {
                let leaves = |snapshot: &Snapshot| snapshot.deleted_before.is_some_and(|before| before >= from);
                replica.record.snapshots.iter().position(leaves).map(|number| Job::Snapshot(*slot, number))
            })
        };
        // One that is partly taken apart can't be compared with any more, so it is finished first.
        find(1)
            .or_else(|| find(0))
            .or_else(|| self.replicas.iter().find(|(_, replica)| replica.record.deleting).map(|(slot, _)| Job::Replica(*slot)))
    }

    fn work(&mut self, job: &Job) {
        match job {
            Job::Dead => self.work_on_dead(),
            Job::Snapshot(slot, number) => self.work_on_snapshot(*slot, *number),
            Job::Replica(slot) => self.work_on_replica(*slot),
        }
    }

    fn work_on_dead(&mut self) {
        let Some(dead) = self.dead.first().cloned() else { return };
        let DeadTree { root, level, base, next, floor, floor_before, split, slot, counts_as_live, done_before } = dead;
        // A replica's record stays until all its trees are taken apart.
        let Some(owners) = self.replicas.get(&slot).map(|replica| replica.record.owners()) else { return };
        let tree = Tree { root: Child::Disk(root), level };
        let other = match beside(&next, &tree, &mut self.cache) {
            Ok(other) => other,
            Err(missing) => return self.pause(Pause::Missing(missing), &owners),
        };
        let mut walk =
            Walk { store: self, slot, floor, floor_before, split, foreign: owners.floor(), counts_as_live, next: done_before, leaves: 0 };
        let ended = walk.over(&tree.root, &other, level, base);
        let next = walk.next;
        match ended {
            Ok(()) => drop(self.dead.remove(0)),
            Err(pause) => {
                if let Some(dead) = self.dead.first_mut() {
                    dead.done_before = next;
                }
                self.pause(pause, &owners);
            }
        }
    }

    fn work_on_snapshot(&mut self, slot: Slot, number: usize) {
        let Some(record) = self.replicas.get(&slot).map(|replica| &replica.record) else { return };
        let owners = record.owners();
        let Some(snapshot) = record.snapshots.get(number) else { return };
        if matches!(snapshot.tree.root, Child::Memory(_)) {
            return self.block();
        }
        let tree = snapshot.tree.clone();
        let next = record.snapshots.get(number + 1).map_or(&record.tree, |next| &next.tree);
        let next = beside(next, &tree, &mut self.cache);
        let floor = record.floor_of(number, u64::MAX);
        let start = snapshot.deleted_before.unwrap_or(0);
        let mut walk = Walk {
            store: self,
            slot,
            floor,
            floor_before: floor,
            split: 0,
            foreign: owners.floor(),
            counts_as_live: false,
            next: start,
            leaves: 0,
        };
        let ended = match next {
            Ok(next) => walk.over(&tree.root, &next, tree.level, 0),
            Err(missing) => Err(Pause::Missing(missing)),
        };
        let reached = walk.next;
        drop(tree);
        if let Some(replica) = self.replicas.get_mut(&slot) {
            if ended.is_ok() {
                let removed = replica.record.snapshots.remove(number);
                replica.note_removed(removed.epoch);
            } else if let Some(snapshot) = replica.record.snapshots.get_mut(number) {
                snapshot.deleted_before = Some(reached);
            }
        }
        if let Err(pause) = ended {
            self.pause(pause, &owners);
        }
    }

    fn work_on_replica(&mut self, slot: Slot) {
        let Some(replica) = self.replicas.get_mut(&slot) else { return };
        let (root, level) = (replica.record.tree.root.clone(), replica.record.tree.level);
        match root {
            Child::Memory(_) => self.block(),
            Child::Disk(root) => {
                replica.record.tree = Tree::new(level);
                let dead = self.dead_tree(slot, root, level, 0, true);
                self.dead.push(dead);
            }
            // Its tree is taken apart.
            Child::Hole | Child::Zeroes(_) => drop(self.replicas.remove(&slot)),
        }
    }

    /// Nothing can be done before a checkpoint has put the pages on the disk.
    fn block(&mut self) {
        self.background.blocked = true;
        self.checkpoint_wanted = true;
    }

    fn pause(&mut self, pause: Pause, owners: &Owners) {
        if let Pause::Missing(missing) = pause {
            self.background.waiting = true;
            self.load(missing, owners, Waiter::Background);
        }
    }
}

/// The part of `next` that lies over the same blocks as `tree`, which may have fewer levels.
fn beside(next: &Tree, tree: &Tree, cache: &mut PageCache) -> Result<Child, Missing> {
    let (mut child, mut level) = (next.root.clone(), next.level);
    while level > tree.level {
        let node = match &child {
            Child::Memory(node) => Arc::clone(node),
            Child::Disk(pointer) => cache.get(pointer.place).ok_or(Missing { pointer: *pointer, level, index: 0 })?,
            Child::Hole | Child::Zeroes(_) => break,
        };
        let Body::Inner(children) = &node.body else { break };
        (child, level) = (children[0].clone(), level - 1);
    }
    Ok(child)
}

impl<D: Disk> Walk<'_, D> {
    /// What is needed of the block, or of the page whose last block is at `index`.
    const fn needed(&self, index: u64) -> Epoch {
        if index < self.split { self.floor_before } else { self.floor }
    }

    fn page(&mut self, pointer: &PagePointer, level: u8, base: u64) -> Result<Arc<Node>, Pause> {
        let found = self.store.cache.get(pointer.place);
        found.ok_or_else(|| Pause::Missing(Missing { pointer: *pointer, level, index: base / blocks_under(level) }))
    }

    /// Takes apart what is under `child` and not under `other`, from `self.next` on.
    fn over(&mut self, child: &Child, other: &Child, level: u8, base: u64) -> Result<(), Pause> {
        let end = base + blocks_under(level);
        if end <= self.next {
            return Ok(());
        }
        let last = end - 1;
        let least = if self.counts_as_live { self.foreign } else { self.floor.min(self.floor_before) };
        let pointer = match child {
            Child::Disk(pointer) if pointer.epoch > least && !is_same_page(pointer.place, other) => *pointer,
            _ => {
                self.next = end;
                return Ok(());
            }
        };
        if level == 0 {
            if self.leaves == LEAVES_PER_ROUND {
                return Err(Pause::Enough);
            }
            self.leaves += 1;
        }
        let node = self.page(&pointer, level, base)?;
        let beside = match other {
            Child::Disk(other) => Some(self.page(other, level, base)?),
            Child::Memory(node) => Some(Arc::clone(node)),
            Child::Hole | Child::Zeroes(_) => None,
        };
        match &node.body {
            Body::Leaf(entries) => {
                for (position, (index, entry)) in (base..).zip(entries.iter()).enumerate() {
                    let beside = match beside.as_ref().map(|node| &node.body) {
                        Some(Body::Leaf(others)) => others[position].place,
                        _ => DiskBlock::new(0),
                    };
                    if entry.is_mapped() && entry.place != beside {
                        self.block(index, entry.epoch, entry.place);
                    }
                }
                self.next = end;
            }
            Body::Inner(children) => {
                let each = blocks_under(level - 1);
                for (position, (number, child)) in (0..).zip(children.iter()).enumerate() {
                    let beside = match beside.as_ref().map(|node| &node.body) {
                        Some(Body::Inner(others)) => &others[position],
                        _ => &Child::Hole,
                    };
                    self.over(child, beside, level - 1, base + number * each)?;
                }
            }
        }
        // A page that the next tree has changed in memory is given up when that is written, but for one that is being written: when
        // that was decided, this tree still needed what it replaces.
        let written = |node: &Arc<Node>| self.store.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.writes(node));
        let replaces = |node: &Arc<Node>| matches!(&node.origin, Origin::Page(from) if from.place == pointer.place) && !written(node);
        if pointer.epoch > self.needed(last) && !matches!(other, Child::Memory(node) if replaces(node)) {
            self.store.give_up_page(&pointer);
        }
        Ok(())
    }

    fn block(&mut self, index: u64, epoch: Epoch, place: DiskBlock) {
        if self.counts_as_live
            && epoch > self.foreign
            && let Some(replica) = self.store.replicas.get_mut(&self.slot)
        {
            self.store.contradicted |= !decrease(&mut replica.record.live);
            // Those made since then have counted it, too.
            let since = replica.record.snapshots.iter_mut().rev().take_while(|snapshot| snapshot.epoch > self.floor);
            since.for_each(|snapshot| self.store.contradicted |= !decrease(&mut snapshot.live));
        }
        if epoch > self.needed(index) {
            self.store.give_up_block(self.slot, place);
        }
    }
}

fn is_same_page(place: DiskBlock, other: &Child) -> bool {
    matches!(other, Child::Disk(pointer) if pointer.place == place)
}
