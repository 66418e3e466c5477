//! Map pages as they are on the disk, kept in memory up to a budget.

use std::sync::Arc;

use super::numbers::NumberMap;
use super::page::Node;
use crate::disk::DiskBlock;

#[derive(Debug)]
struct Place {
    at: DiskBlock,
    node: Arc<Node>,
    /// Used since the hand last came by.
    used: bool,
}

/// A cache with the second-chance (clock) rule: a page that was used since the hand came by stays for another round.
#[derive(Debug)]
pub(super) struct PageCache {
    index: NumberMap<DiskBlock, usize>,
    places: Vec<Place>,
    hand: usize,
    memory: usize,
    budget: usize,
}

/// Fewest pages that fit whatever the budget: an operation touches at most a dozen, and must find the first when it has the last.
const PAGES_MIN: usize = 512;

impl PageCache {
    /// Keeps up to `budget` bytes, or [`PAGES_MIN`] pages if that is more.
    pub(super) fn new(budget: usize) -> Self {
        Self { index: NumberMap::default(), places: Vec::new(), hand: 0, memory: 0, budget }
    }

    pub(super) fn get(&mut self, at: DiskBlock) -> Option<Arc<Node>> {
        let place = self.places.get_mut(*self.index.get(&at)?)?;
        place.used = true;
        Some(Arc::clone(&place.node))
    }

    pub(super) fn insert(&mut self, at: DiskBlock, node: Arc<Node>) {
        self.remove(at);
        self.memory += node.memory();
        while self.memory > self.budget && self.places.len() >= PAGES_MIN {
            self.evict();
        }
        self.index.insert(at, self.places.len());
        self.places.push(Place { at, node, used: false });
    }

    /// The place got another content, or none.
    pub(super) fn remove(&mut self, at: DiskBlock) {
        if let Some(position) = self.index.get(&at).copied() {
            self.take(position);
        }
    }

    /// Bytes held.
    pub(super) const fn memory(&self) -> usize {
        self.memory
    }

    fn evict(&mut self) {
        loop {
            self.hand = if self.hand + 1 < self.places.len() { self.hand + 1 } else { 0 };
            match self.places.get_mut(self.hand) {
                Some(place) if place.used => place.used = false,
                Some(_) => return self.take(self.hand),
                None => return,
            }
        }
    }

    fn take(&mut self, position: usize) {
        let gone = self.places.swap_remove(position);
        self.memory -= gone.node.memory();
        self.index.remove(&gone.at);
        if let Some(moved) = self.places.get(position) {
            self.index.insert(moved.at, position);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::page::Child;
    use super::*;

    #[test]
    fn the_budget_holds_and_what_is_used_stays() {
        let page = Arc::new(Node::filled(0, &Child::Hole));
        let mut cache = PageCache::new(600 * page.memory());
        for at in 0..5000 {
            cache.insert(DiskBlock::new(at), Arc::clone(&page));
            assert!(cache.get(DiskBlock::new(0)).is_some(), "in use all the time");
        }
        assert!(cache.memory() <= 600 * page.memory());
        assert_eq!(cache.index.len(), cache.places.len());
        cache.remove(DiskBlock::new(0));
        assert!(cache.get(DiskBlock::new(0)).is_none());
    }
}
