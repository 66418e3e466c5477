//! What is known of a volume's blocks, as runs of blocks that share a value: a terabyte of zeros is one entry.

use std::collections::BTreeMap;
use std::ops::Range;

/// Blocks without a value are in no run. Invariant: runs are not empty and do not overlap.
#[derive(Clone, Debug)]
pub(super) struct Runs<T> {
    /// By the first block: the block after the last, and the value.
    runs: BTreeMap<u64, (u64, T)>,
}

impl<T> Default for Runs<T> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<T: Clone> Runs<T> {
    /// All runs, in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Range<u64>, &T)> {
        self.over(0..u64::MAX)
    }

    /// The parts of runs within `range`, in ascending order.
    pub(super) fn over(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, &T)> {
        let first = self.runs.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let Range { start: from, end: to } = range;
        let clipped = self.runs.range(first..to.max(first)).map(move |(start, (end, value))| (from.max(*start)..to.min(*end), value));
        clipped.filter(|(part, _)| !part.is_empty())
    }

    /// `range` in parts that have one value each, or none.
    pub(super) fn pieces(&self, range: Range<u64>) -> Vec<(Range<u64>, Option<T>)> {
        let mut pieces = Vec::new();
        let mut done = range.start;
        for (part, value) in self.over(range.clone()) {
            if done < part.start {
                pieces.push((done..part.start, None));
            }
            done = part.end;
            pieces.push((part, Some(value.clone())));
        }
        if done < range.end {
            pieces.push((done..range.end, None));
        }
        pieces
    }

    /// Gives the blocks of `range` a value, or takes it away.
    pub(super) fn set(&mut self, range: Range<u64>, value: Option<T>) {
        if range.is_empty() {
            return;
        }
        self.cut(range.start);
        self.cut(range.end);
        while let Some(start) = self.runs.range(range.clone()).next().map(|(start, _)| *start) {
            self.runs.remove(&start);
        }
        if let Some(value) = value {
            self.runs.insert(range.start, (range.end, value));
        }
    }

    /// Makes `block` the first of a run if it is inside one.
    fn cut(&mut self, block: u64) {
        let Some((_, (end, value))) = self.runs.range_mut(..block).next_back() else { return };
        if *end > block {
            let rest = (std::mem::replace(end, block), value.clone());
            self.runs.insert(block, rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_where_values_begin_and_end() {
        let mut runs = Runs::default();
        runs.set(0..1 << 40, Some('a'));
        runs.set(10..20, Some('b'));
        runs.set(15..17, None);
        runs.set(30..30, Some('c'));
        let all: Vec<_> = runs.iter().map(|(range, value)| (range, *value)).collect();
        assert_eq!(all, [(0..10, 'a'), (10..15, 'b'), (17..20, 'b'), (20..1 << 40, 'a')]);
        assert_eq!(runs.pieces(14..18), [(14..15, Some('b')), (15..17, None), (17..18, Some('b'))]);
        assert_eq!(runs.pieces(16..16), []);
        assert_eq!(runs.over(16..17).count(), 0);
        runs.set(0..1 << 40, None);
        assert_eq!(runs.pieces(5..7), [(5..7, None)]);
    }
}
