//! Who may have memory now (T3): first come, first served.

use std::collections::VecDeque;

/// Most bytes of data in service at once: 64 of the largest requests, far more than a network needs to be kept busy.
/// The kernel keeps the data of what waits, so that waiting costs no memory.
pub const DATA_BYTES_MAX: u32 = 64 << 20;

/// Requests that wait for memory, by tag.
#[derive(Debug)]
pub struct Budget {
    used: u32,
    waiting: VecDeque<(u16, u32)>,
}

impl Budget {
    /// For a queue of `depth` tags, each of which waits at most once.
    #[must_use]
    pub fn new(depth: u16) -> Self {
        Self { used: 0, waiting: VecDeque::with_capacity(depth.into()) }
    }

    /// Asks for `bytes` for a tag. If false, [`Budget::next`] names the tag later.
    #[must_use]
    pub fn take(&mut self, tag: u16, bytes: u32) -> bool {
        // Whoever needs nothing passes; all others queue, so that large requests don't starve.
        let fits = bytes == 0 || self.waiting.is_empty() && self.used + bytes <= DATA_BYTES_MAX;
        if fits {
            self.used += bytes;
        } else {
            self.waiting.push_back((tag, bytes));
        }
        fits
    }

    /// Gives back what a tag had.
    pub fn give_back(&mut self, bytes: u32) {
        self.used = self.used.saturating_sub(bytes);
    }

    /// A tag that waited and has its memory now.
    pub fn next(&mut self) -> Option<u16> {
        let (tag, bytes) = *self.waiting.front()?;
        if self.used + bytes > DATA_BYTES_MAX {
            return None;
        }
        self.waiting.pop_front();
        self.used += bytes;
        Some(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_given_in_order() {
        let mut budget = Budget::new(512);
        let mebibyte = 1 << 20;
        for tag in 0..64 {
            assert!(budget.take(tag, mebibyte));
        }
        assert!(!budget.take(64, mebibyte));
        assert!(!budget.take(65, 4096), "not before the large one that came first");
        assert!(budget.take(66, 0), "a flush needs nothing");
        assert_eq!(budget.next(), None);
        budget.give_back(4096);
        assert_eq!(budget.next(), None);
        budget.give_back(2 * mebibyte - 4096);
        assert_eq!(budget.next(), Some(64));
        assert_eq!(budget.next(), Some(65));
        assert_eq!(budget.next(), None);
        assert!(budget.take(67, mebibyte - 4096));
        assert!(!budget.take(68, 4096));
    }
}
