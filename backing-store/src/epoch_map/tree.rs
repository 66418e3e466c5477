//! A volume's map: a radix tree of pages, changed by copying the path to what changes.
//!
//! A page in memory that somebody else holds, too (a snapshot, a checkpoint that is being written), is copied before it is
//! changed; so holding the root's `Arc` freezes the whole tree.

use std::ops::Range;
use std::sync::Arc;

use super::cache::PageCache;
use super::page::{Body, Child, Entry, FAN_OUT, Node, Origin, PagePointer, blocks_under};
use crate::units::Epoch;

/// A page that must be read before an operation can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) pointer: PagePointer,
    pub(super) level: u8,
    pub(super) index: u64,
}

/// What a change pushed out of a tree. Whether it is free then is decided by who else needs it.
#[derive(Debug)]
pub(super) enum Displaced {
    /// One block of data, which was at this index of the volume.
    Block(u64, Entry),
    /// Everything under a page, the page included, from this index on.
    Tree(PagePointer, u8, u64),
    /// A page alone, and the last index under it.
    Page(PagePointer, u64),
    /// The page that this node will become, if it is written, and the last index under it.
    Node(Arc<Node>, u64),
}

/// One stretch of a map.
#[derive(Debug)]
pub(super) enum Piece {
    /// A leaf and the first block under it.
    Leaf(Arc<Node>, u64),
    /// These blocks all became zeros.
    Zeroes(Range<u64>),
    /// This must be read first.
    Missing(Missing),
    /// There is nothing more.
    End,
}

#[derive(Clone, Debug)]
pub(super) struct Tree {
    pub(super) root: Child,
    pub(super) level: u8,
}

impl Tree {
    pub(super) const fn new(level: u8) -> Self {
        Self { root: Child::Hole, level }
    }

    /// Makes room for so many blocks, in the present epoch.
    pub(super) fn grow(&mut self, level: u8, epoch: Epoch, dirty: &mut usize) {
        while self.level < level {
            self.level += 1;
            if matches!(self.root, Child::Hole) {
                continue;
            }
            let mut children = Box::new([const { Child::Hole }; FAN_OUT]);
            children[0] = std::mem::take(&mut self.root);
            *dirty += 1;
            // The present epoch, though nothing under it is so young: the page itself is in no snapshot.
            self.root = Child::Memory(Arc::new(Node { origin: Origin::New, epoch, body: Body::Inner(children) }));
        }
    }

    /// The pages that must be read before the leaves over `range` can be reached. With `whole`, those of which all blocks are
    /// in the range are left out.
    pub(super) fn missing(&self, cache: &mut PageCache, range: &Range<u64>, whole: bool, found: &mut Vec<Missing>) {
        missing_under(&self.root, self.level, 0, cache, range, whole, found);
    }

    /// The entries of `range`, or the pages that must be read before they are known.
    pub(super) fn entries(&self, cache: &mut PageCache, range: &Range<u64>) -> Result<Vec<Entry>, Vec<Missing>> {
        let mut found = vec![Entry::default(); usize::try_from(range.end - range.start).unwrap_or(0)];
        let mut missing = Vec::new();
        if !range.is_empty() {
            entries_under(&self.root, self.level, 0, cache, range, &mut found, &mut missing);
        }
        if missing.is_empty() { Ok(found) } else { Err(missing) }
    }

    /// The next stretch at or after `position` that has anything younger than `above`.
    pub(super) fn next_piece(&self, cache: &mut PageCache, position: u64, above: Epoch) -> Piece {
        piece_under(&self.root, self.level, 0, cache, position, above).unwrap_or(Piece::End)
    }

    /// Lets `change` look at, and change, each entry of `range`, all of whose pages are there.
    pub(super) fn change(
        &mut self,
        cache: &mut PageCache,
        range: &Range<u64>,
        epoch: Epoch,
        dirty: &mut usize,
        change: &mut impl FnMut(u64, &mut Entry),
    ) {
        change_under(&mut self.root, self.level, 0, cache, range, epoch, dirty, change);
    }

    /// Makes `range` zeros. The pages over its edges are there.
    pub(super) fn zero(
        &mut self,
        cache: &mut PageCache,
        range: &Range<u64>,
        epoch: Epoch,
        dirty: &mut usize,
        displaced: &mut impl FnMut(Displaced),
    ) {
        zero_under(&mut self.root, self.level, 0, cache, range, epoch, dirty, displaced);
    }
}

/// The children of an inner page over `range`: position among the children, first block.
fn children_over(level: u8, base: u64, range: &Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
    let each = blocks_under(level - 1);
    // A power of two: a division would be the dearest step of a lookup.
    let shift = each.trailing_zeros();
    let first = range.start.saturating_sub(base) >> shift;
    let last = (range.end.min(base + blocks_under(level)) - 1).saturating_sub(base) >> shift;
    (first..=last).map(move |index| (usize::try_from(index).unwrap_or(0), base + index * each))
}

fn covers(range: &Range<u64>, level: u8, base: u64) -> bool {
    range.start <= base && base + blocks_under(level) <= range.end
}

fn missing_under(child: &Child, level: u8, base: u64, cache: &mut PageCache, range: &Range<u64>, whole: bool, found: &mut Vec<Missing>) {
    if whole && covers(range, level, base) {
        return;
    }
    let held;
    let node = match child {
        Child::Hole | Child::Zeroes(_) => return,
        Child::Memory(node) => node,
        Child::Disk(pointer) => match cache.get(pointer.place) {
            None => return found.push(Missing { pointer: *pointer, level, index: base / blocks_under(level) }),
            Some(node) => {
                held = node;
                &held
            }
        },
    };
    if let Body::Inner(children) = &node.body {
        for (position, base) in children_over(level, base, range) {
            missing_under(&children[position], level - 1, base, cache, range, whole, found);
        }
    }
}

fn entries_under(
    child: &Child,
    level: u8,
    base: u64,
    cache: &mut PageCache,
    range: &Range<u64>,
    found: &mut [Entry],
    missing: &mut Vec<Missing>,
) {
    let (start, end) = (range.start.max(base), range.end.min(base + blocks_under(level)));
    let at = |block: u64, from: u64| usize::try_from(block - from).unwrap_or(usize::MAX);
    let held;
    let node = match child {
        Child::Hole => return,
        Child::Zeroes(epoch) => {
            return found[at(start, range.start)..at(end, range.start)].fill(Entry { epoch: *epoch, ..Entry::default() });
        }
        Child::Memory(node) => node,
        Child::Disk(pointer) => match cache.get(pointer.place) {
            None => return missing.push(Missing { pointer: *pointer, level, index: base / blocks_under(level) }),
            Some(node) => {
                held = node;
                &held
            }
        },
    };
    match &node.body {
        Body::Leaf(entries) => {
            found[at(start, range.start)..at(end, range.start)].copy_from_slice(&entries[at(start, base)..at(end, base)]);
        }
        Body::Inner(children) => {
            for (position, base) in children_over(level, base, range) {
                entries_under(&children[position], level - 1, base, cache, range, found, missing);
            }
        }
    }
}

fn piece_under(child: &Child, level: u8, base: u64, cache: &mut PageCache, position: u64, above: Epoch) -> Option<Piece> {
    let end = base + blocks_under(level);
    if child.epoch() <= above || end <= position {
        return None;
    }
    let held;
    let node = match child {
        Child::Hole => return None,
        Child::Zeroes(_) => return Some(Piece::Zeroes(position.max(base)..end)),
        Child::Memory(node) => node,
        Child::Disk(pointer) => match cache.get(pointer.place) {
            None => return Some(Piece::Missing(Missing { pointer: *pointer, level, index: base / blocks_under(level) })),
            Some(node) => {
                held = node;
                &held
            }
        },
    };
    match &node.body {
        Body::Leaf(_) => Some(Piece::Leaf(Arc::clone(node), base)),
        Body::Inner(children) => children_over(level, base, &(position..end))
            .find_map(|(position_of, base)| piece_under(&children[position_of], level - 1, base, cache, position, above)),
    }
}

/// The page at `child` as one that may be changed.
///
/// # Panics
/// If the page is on the disk and not in the cache: the caller makes sure that it is, and to go on would lose its content.
fn node_mut<'a>(child: &'a mut Child, level: u8, cache: &mut PageCache, epoch: Epoch, dirty: &mut usize) -> &'a mut Node {
    let fresh = match child {
        // No weak references are ever made, so one strong one is the only one.
        Child::Memory(node) if Arc::strong_count(node) == 1 => None,
        Child::Memory(node) => Some(Node { origin: Origin::Node(Arc::clone(node)), epoch: node.epoch, body: node.body.clone() }),
        Child::Disk(pointer) => {
            let cached = cache.get(pointer.place);
            assert!(cached.is_some(), "the page at {} is read before it is changed", pointer.place);
            cached.map(|node| Node { origin: Origin::Page(*pointer), epoch: node.epoch, body: node.body.clone() })
        }
        Child::Hole | Child::Zeroes(_) => Some(Node::filled(level, child)),
    };
    if let Some(fresh) = fresh {
        *dirty += 1;
        *child = Child::Memory(Arc::new(fresh));
    }
    match child {
        Child::Memory(node) => {
            // Alone by now, so nothing is copied.
            let node = Arc::make_mut(node);
            node.epoch = epoch.max(node.epoch);
            node
        }
        _ => unreachable!("made a page in memory just now"),
    }
}

#[expect(clippy::too_many_arguments, reason = "a recursion's state")]
fn change_under(
    child: &mut Child,
    level: u8,
    base: u64,
    cache: &mut PageCache,
    range: &Range<u64>,
    epoch: Epoch,
    dirty: &mut usize,
    change: &mut impl FnMut(u64, &mut Entry),
) {
    match &mut node_mut(child, level, cache, epoch, dirty).body {
        Body::Leaf(entries) => {
            for (block, entry) in (base..).zip(entries.iter_mut()).filter(|(block, _)| range.contains(block)) {
                change(block, entry);
            }
        }
        Body::Inner(children) => {
            for (position, base) in children_over(level, base, range) {
                change_under(&mut children[position], level - 1, base, cache, range, epoch, dirty, change);
            }
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "a recursion's state")]
fn zero_under(
    child: &mut Child,
    level: u8,
    base: u64,
    cache: &mut PageCache,
    range: &Range<u64>,
    epoch: Epoch,
    dirty: &mut usize,
    displaced: &mut impl FnMut(Displaced),
) {
    if covers(range, level, base) {
        return displace(std::mem::replace(child, Child::Zeroes(epoch)), level, base, displaced);
    }
    match &mut node_mut(child, level, cache, epoch, dirty).body {
        Body::Leaf(entries) => {
            for (block, entry) in (base..).zip(entries.iter_mut()).filter(|(block, _)| range.contains(block)) {
                let old = std::mem::replace(entry, Entry { epoch, ..Entry::default() });
                if old.is_mapped() {
                    displaced(Displaced::Block(block, old));
                }
            }
        }
        Body::Inner(children) => {
            for (position, base) in children_over(level, base, range) {
                zero_under(&mut children[position], level - 1, base, cache, range, epoch, dirty, displaced);
            }
        }
    }
}

/// Everything under `child` leaves the tree.
fn displace(child: Child, level: u8, base: u64, displaced: &mut impl FnMut(Displaced)) {
    let mut node = match child {
        Child::Hole | Child::Zeroes(_) => return,
        Child::Disk(pointer) => return displaced(Displaced::Tree(pointer, level, base)),
        Child::Memory(node) => node,
    };
    let last = base + blocks_under(level) - 1;
    let body = if let Some(alone) = Arc::get_mut(&mut node) {
        match std::mem::take(&mut alone.origin) {
            Origin::New => {}
            Origin::Page(pointer) => displaced(Displaced::Page(pointer, last)),
            Origin::Node(node) => displaced(Displaced::Node(node, last)),
        }
        // Taken, not cloned, so that it shows which children are held by somebody else.
        std::mem::replace(&mut alone.body, Body::Inner(Box::new([const { Child::Hole }; FAN_OUT])))
    } else {
        // Somebody else holds it with everything under it, and will write it.
        displaced(Displaced::Node(Arc::clone(&node), last));
        node.body.clone()
    };
    match body {
        Body::Leaf(entries) => {
            for (block, entry) in (base..).zip(entries.iter()).filter(|(_, entry)| entry.is_mapped()) {
                displaced(Displaced::Block(block, *entry));
            }
        }
        Body::Inner(children) => {
            for (index, child) in (0..).zip(*children) {
                displace(child, level - 1, base + index * blocks_under(level - 1), displaced);
            }
        }
    }
}
