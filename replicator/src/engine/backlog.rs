//! The writes that some replica may still need: kept from the moment they get their sequence until every replica that is to
//! have them has received them.

use std::collections::VecDeque;

use carrick_backing_store::{Checksums, Extent, Seq, SharedBuffer, Term, VolumeId};

use super::requests::JobId;
use crate::time::Monotonic;
use crate::wire::{Flags, Frame, Header, Kind};

/// Most writes in the backlog: replicas log so many extents and more, so that one that stops can be reconciled by them.
pub(super) const BACKLOG_WRITES_MAX: usize = 16_384;

/// What a write does.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Data { checksums: Checksums, data: SharedBuffer },
    Zeroes,
    Discard,
}

/// A write with a sequence.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) seq: Seq,
    pub(super) extent: Extent,
    pub(super) change: Change,
    pub(super) fua: bool,
    pub(super) job: JobId,
    pub(super) since: Monotonic,
}

impl Entry {
    fn bytes(&self) -> u64 {
        if let Change::Data { data, .. } = &self.change { data.len() as u64 } else { 0 }
    }

    /// The frame that carries it.
    pub(super) fn frame(&self, volume: VolumeId, term: Term) -> Frame {
        let kind = match self.change {
            Change::Data { .. } => Kind::Write,
            Change::Zeroes => Kind::WriteZeroes,
            Change::Discard => Kind::Discard,
        };
        let flags = if self.fua { Flags::FUA } else { Flags::NONE };
        let header = Header { flags, sequence: self.seq, ..Header::new(kind, volume, term) };
        match &self.change {
            Change::Data { checksums, data } => Frame::data(header, self.extent, checksums.clone(), data.clone()),
            Change::Zeroes | Change::Discard => Frame::range(header, self.extent),
        }
    }
}

/// A queue of writes without gaps.
#[derive(Debug)]
pub(super) struct Backlog {
    entries: VecDeque<Entry>,
    /// Sequence of the write before the first entry.
    before: Seq,
    bytes: u64,
}

impl Backlog {
    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new(), before: Seq::ZERO, bytes: 0 }
    }

    /// The last sequence given out.
    pub(super) fn last(&self) -> Seq {
        Seq::new(self.before.get() + self.entries.len() as u64)
    }

    /// The sequence before the oldest write kept: a replica that has it can be brought up from here.
    pub(super) fn before(&self) -> Seq {
        self.before
    }

    pub(super) fn push(&mut self, entry: Entry) {
        assert_eq!(entry.seq, self.last().next(), "sequences have no gaps");
        self.bytes += entry.bytes();
        self.entries.push_back(entry);
    }

    pub(super) fn get(&self, seq: Seq) -> Option<&Entry> {
        let index = seq.get().checked_sub(self.before.get() + 1)?;
        self.entries.get(usize::try_from(index).ok()?)
    }

    /// The writes after `seq`, oldest first.
    pub(super) fn after(&self, seq: Seq) -> impl Iterator<Item = &Entry> {
        let skip = usize::try_from(seq.get().saturating_sub(self.before.get())).unwrap_or(usize::MAX);
        self.entries.iter().skip(skip)
    }

    /// Forgets the writes up to `seq`.
    pub(super) fn trim(&mut self, seq: Seq) {
        while self.before < seq
            && let Some(entry) = self.entries.pop_front()
        {
            self.bytes -= entry.bytes();
            self.before = entry.seq;
        }
    }

    pub(super) fn is_over(&self, bytes_max: u64) -> bool {
        self.bytes > bytes_max || self.entries.len() > BACKLOG_WRITES_MAX
    }
}
