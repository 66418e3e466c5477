//! The range lock: requests that overlap one in flight wait for it, in the order of their arrival, so that every replica
//! applies overlapping writes in the same order, and a read never sees a write that a crash could still take back.
//!
//! A linear scan: at most a queue's depth of ranges is held or waits, and one comparison is a few instructions.

use std::collections::VecDeque;

use carrick_backing_store::Extent;

/// Who may be inside a range at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Reads and copies: others of their kind.
    Shared,
    /// Writes: nobody.
    Exclusive,
}

#[derive(Clone, Copy, Debug)]
struct Range<O> {
    owner: O,
    extent: Extent,
    access: Access,
}

impl<O> Range<O> {
    fn conflicts(&self, extent: Extent, access: Access) -> bool {
        (self.access == Access::Exclusive || access == Access::Exclusive) && self.extent.overlaps(extent)
    }
}

/// Ranges of one volume, held by owners of type `O`.
#[derive(Debug)]
pub(super) struct RangeLock<O> {
    held: Vec<Range<O>>,
    waiting: VecDeque<Range<O>>,
}

impl<O: Copy + PartialEq> RangeLock<O> {
    pub(super) fn new() -> Self {
        Self { held: Vec::new(), waiting: VecDeque::new() }
    }

    /// Takes the range if nothing held or waiting conflicts; else the owner waits, and comes out of [`RangeLock::release`].
    pub(super) fn acquire(&mut self, owner: O, extent: Extent, access: Access) -> bool {
        let free = !self.held.iter().chain(&self.waiting).any(|range| range.conflicts(extent, access));
        let range = Range { owner, extent, access };
        if free {
            self.held.push(range);
        } else {
            self.waiting.push_back(range);
        }
        free
    }

    /// Gives up what the owner holds or waits for, and moves those who may go on now to `granted`.
    pub(super) fn release(&mut self, owner: O, granted: &mut Vec<O>) {
        self.held.retain(|range| range.owner != owner);
        self.waiting.retain(|range| range.owner != owner);
        let mut index = 0;
        while index < self.waiting.len() {
            let range = self.waiting[index];
            let earlier = self.waiting.iter().take(index);
            if self.held.iter().chain(earlier).any(|other| other.conflicts(range.extent, range.access)) {
                index += 1;
            } else {
                self.waiting.remove(index);
                self.held.push(range);
                granted.push(range.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::{ByteLength, ByteOffset};

    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent::new(ByteOffset::new(offset), ByteLength::new(length)).unwrap()
    }

    #[test]
    fn overlapping_writes_go_one_by_one_in_order() {
        let mut lock = RangeLock::new();
        assert!(lock.acquire(1, extent(0, 8192), Access::Exclusive));
        assert!(!lock.acquire(2, extent(4096, 8192), Access::Exclusive));
        assert!(!lock.acquire(3, extent(8192, 4096), Access::Shared), "behind 2, which waits");
        assert!(lock.acquire(4, extent(16384, 4096), Access::Exclusive));
        let mut granted = Vec::new();
        lock.release(1, &mut granted);
        assert_eq!(granted, [2]);
        granted.clear();
        lock.release(2, &mut granted);
        assert_eq!(granted, [3]);
    }

    #[test]
    fn reads_share_and_a_write_does_not_starve() {
        let mut lock = RangeLock::new();
        assert!(lock.acquire(1, extent(0, 4096), Access::Shared));
        assert!(lock.acquire(2, extent(0, 4096), Access::Shared));
        assert!(!lock.acquire(3, extent(0, 4096), Access::Exclusive));
        assert!(!lock.acquire(4, extent(0, 4096), Access::Shared), "not past the write that waits");
        let mut granted = Vec::new();
        lock.release(1, &mut granted);
        assert!(granted.is_empty());
        lock.release(3, &mut granted);
        assert_eq!(granted, [4], "a write that gives up lets the read behind it go");
    }
}
