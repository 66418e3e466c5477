//! What a replica lacks: the blocks that it, or one in sync with all that counts, has written since what it knows as synced. Both are
//! asked for a stretch of the volume at a time, so that the difference of any two replicas takes little memory.

use std::collections::VecDeque;

use carrick_backing_store::{ByteOffset, Epoch, Extent, Synced, VolumeSize};

use super::copy::span;

/// Which of the two is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The replica that is brought up to date.
    Destination,
    /// One in sync.
    Source,
}

/// What one side has told.
#[derive(Debug, Default)]
struct Listing {
    extents: VecDeque<Extent>,
    /// It has told everything up to here.
    known_to: ByteOffset,
    /// Where the question under way begins.
    asked: Option<ByteOffset>,
}

#[derive(Debug)]
pub(super) struct Difference {
    synced: Synced,
    end: ByteOffset,
    destination: Listing,
    source: Listing,
    /// Both are known, and what they differ in was handed out, up to here.
    border: ByteOffset,
}

impl Difference {
    pub(super) fn new(synced: Synced, size: VolumeSize) -> Self {
        let end = size.extent().end();
        Self { synced, end, destination: Listing::default(), source: Listing::default(), border: ByteOffset::ZERO }
    }

    pub(super) fn border(&self) -> ByteOffset {
        self.border
    }

    /// Up to here an earlier copy came, which this one must not fall behind.
    pub(super) fn copied_before(&self) -> ByteOffset {
        self.synced.copied.offset().min(self.end)
    }

    fn listing(&mut self, side: Side) -> &mut Listing {
        match side {
            Side::Destination => &mut self.destination,
            Side::Source => &mut self.source,
        }
    }

    /// What to ask a side next, if it isn't asked already: since which epoch, from where on.
    pub(super) fn question(&mut self, side: Side) -> Option<(Epoch, ByteOffset)> {
        let (border, copied, end) = (self.border, self.copied_before(), self.end);
        let listing = self.listing(side);
        // No further ahead than the other side: that bounds what is remembered.
        if listing.asked.is_some() || listing.known_to >= end || listing.known_to > border {
            return None;
        }
        let start = listing.known_to;
        listing.asked = Some(start);
        Some((if start < copied { self.synced.copied_epoch } else { self.synced.epoch }, start))
    }

    /// The question to a side will not be answered.
    pub(super) fn withdraw(&mut self, side: Side) {
        self.listing(side).asked = None;
    }

    /// A side has answered: what lacks now is known up to the border. `None` if the answer makes no sense.
    pub(super) fn answer(&mut self, side: Side, extents: Vec<Extent>, next: Option<ByteOffset>) -> Option<Vec<Extent>> {
        let (copied, end) = (self.copied_before(), self.end);
        let listing = self.listing(side);
        let start = listing.asked.take()?;
        // Beyond what was copied before, another epoch counts.
        let limit = if start < copied { copied } else { end };
        let known_to = next.unwrap_or(limit).min(limit);
        if known_to <= start || extents.first().is_some_and(|first| first.offset() < start) {
            return None;
        }
        listing.known_to = known_to;
        let within = extents.into_iter().filter(|extent| extent.offset() < known_to);
        listing.extents.extend(within.map(|extent| span(extent.offset(), extent.end().min(known_to))));
        Some(self.take_known())
    }

    /// What both sides have told of, in order, joined.
    fn take_known(&mut self) -> Vec<Extent> {
        self.border = self.destination.known_to.min(self.source.known_to);
        let mut known: Vec<Extent> = Vec::new();
        for listing in [&mut self.destination, &mut self.source] {
            while let Some(first) = listing.extents.pop_front_if(|first| first.offset() < self.border) {
                if first.end() > self.border {
                    listing.extents.push_front(span(self.border, first.end()));
                }
                known.push(span(first.offset(), first.end().min(self.border)));
            }
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::{BlockIndex, ByteLength};

    use super::*;

    const BLOCK: u64 = 4096;

    fn extent(first: u64, count: u64) -> Extent {
        Extent::new(ByteOffset::new(first * BLOCK), ByteLength::new(count * BLOCK)).unwrap()
    }

    fn at(block: u64) -> ByteOffset {
        ByteOffset::new(block * BLOCK)
    }

    fn difference(synced: Synced) -> Difference {
        Difference::new(synced, VolumeSize::new(100 * BLOCK).unwrap())
    }

    #[test]
    fn both_sides_count_as_far_as_both_are_known() {
        let mut it = difference(Synced { epoch: Epoch::new(5), ..Synced::default() });
        assert_eq!(it.question(Side::Source), Some((Epoch::new(5), at(0))));
        assert_eq!(it.question(Side::Source), None, "it is asked already");
        assert_eq!(it.answer(Side::Source, vec![extent(1, 2), extent(8, 10)], Some(at(50))), Some(vec![]));
        assert_eq!(it.question(Side::Source), None, "the other side is behind");
        assert_eq!(it.question(Side::Destination), Some((Epoch::new(5), at(0))));
        assert_eq!(it.answer(Side::Destination, vec![extent(2, 1)], Some(at(10))), Some(vec![extent(2, 1), extent(1, 2), extent(8, 2)]));
        assert_eq!(it.border(), at(10));
        assert_eq!(it.question(Side::Destination), Some((Epoch::new(5), at(10))));
        assert_eq!(it.answer(Side::Destination, vec![], None), Some(vec![extent(10, 8)]));
        assert_eq!(it.question(Side::Destination), None, "all is known");
        assert_eq!(it.question(Side::Source), Some((Epoch::new(5), at(50))));
        it.withdraw(Side::Source);
        assert_eq!(it.question(Side::Source), Some((Epoch::new(5), at(50))));
        assert_eq!(it.answer(Side::Source, vec![extent(99, 1)], None), Some(vec![extent(99, 1)]));
        assert_eq!(it.border(), at(100));
    }

    #[test]
    fn what_was_copied_before_is_asked_for_since_then() {
        let mut it = difference(Synced { epoch: Epoch::new(2), copied: BlockIndex::new(30), copied_epoch: Epoch::new(7) });
        for side in [Side::Source, Side::Destination] {
            assert_eq!(it.question(side), Some((Epoch::new(7), at(0))));
            it.answer(side, vec![extent(25, 10)], None).unwrap();
        }
        assert_eq!(it.border(), at(30), "not beyond the earlier copy");
        assert_eq!(it.question(Side::Source), Some((Epoch::new(2), at(30))));
    }

    #[test]
    fn answers_that_do_not_get_on_are_refused() {
        for (extents, next) in [(vec![], Some(at(0))), (vec![extent(1, 1)], Some(at(0)))] {
            let mut it = difference(Synced::default());
            it.question(Side::Source);
            assert_eq!(it.answer(Side::Source, extents, next), None);
        }
        assert_eq!(difference(Synced::default()).answer(Side::Source, vec![], None), None, "nothing was asked");
    }
}
