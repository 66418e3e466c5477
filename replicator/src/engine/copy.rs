//! Copying blocks into a replica, from the chosen one before serving and from any in-sync one while serving.
//!
//! A chunk is read from the source under a shared range lock and sent to the destination before the lock is given up, so on the
//! destination's ordered connection it stands after every write that came before it, and before every later one: a copied block
//! never overwrites a newer write.

use std::collections::BTreeSet;

use carrick_backing_store::{ByteLength, ByteOffset, Content, Extent, Seq};

use super::member::{Member, Stage};
use super::range_lock::Access;
use super::requests::Owner;
use super::{Engine, MemberIndex, Outstanding};
use crate::time::Monotonic;
use crate::wire::{Body, Flags, Frame, Header, Kind};

/// Bytes of one chunk: one frame's worth, so that a hole costs one round trip per MiB.
const CHUNK: u64 = 1 << 20;
/// Chunks under way per copy: enough to hide a round trip, few enough to leave room for foreground I/O.
const CHUNKS_IN_FLIGHT: usize = 2;

/// A copy under way into one member.
#[derive(Debug)]
pub(super) struct Copy {
    /// What is still to be started, last first.
    ranges: Vec<Extent>,
    /// Chunks that wait for a lock, a read or the destination's answer.
    under_way: usize,
    total: u64,
    done: u64,
}

impl Copy {
    /// A copy of these ranges, which may overlap.
    pub(super) fn new(extents: impl IntoIterator<Item = Extent>) -> Self {
        let mut ranges: Vec<Extent> = Vec::new();
        for extent in extents.into_iter().collect::<BTreeSet<_>>() {
            match ranges.last_mut() {
                Some(last) if extent.offset() <= last.end() => {
                    let end = last.end().max(extent.end());
                    *last = span(last.offset(), end);
                }
                _ => ranges.push(extent),
            }
        }
        ranges.reverse();
        let total = ranges.iter().map(|extent| extent.length().get()).sum();
        Self { ranges, under_way: 0, total, done: 0 }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.ranges.is_empty() && self.under_way == 0
    }

    pub(super) fn progress(&self) -> (ByteLength, ByteLength) {
        (ByteLength::new(self.done), ByteLength::new(self.total))
    }

    fn next_chunk(&mut self) -> Option<Extent> {
        if self.under_way >= CHUNKS_IN_FLIGHT {
            return None;
        }
        let range = self.ranges.pop()?;
        let border = ByteOffset::new(range.offset().get() + CHUNK).min(range.end());
        if border < range.end() {
            self.ranges.push(span(border, range.end()));
        }
        self.under_way += 1;
        Some(span(range.offset(), border))
    }
}

/// From `start` up to `end`, which is not before it.
fn span(start: ByteOffset, end: ByteOffset) -> Extent {
    let length = ByteLength::new(end.get().saturating_sub(start.get()));
    match Extent::new(start, length) {
        Some(extent) => extent,
        None => unreachable!("{start}..{end} ends where an extent ended"),
    }
}

impl Engine {
    /// Starts the next chunks of a copy, or ends it.
    pub(super) fn advance_copy(&mut self, now: Monotonic, destination: MemberIndex) {
        while let Some(chunk) = self.members[destination.0].copy.as_mut().and_then(Copy::next_chunk) {
            let owner = Owner::Copy(destination, chunk.offset());
            self.chunks.insert((destination, chunk.offset()), chunk);
            if self.locks.acquire(owner, chunk, Access::Shared) {
                self.read_chunk(now, destination, chunk);
            }
        }
        if self.members[destination.0].copy.as_ref().is_some_and(Copy::is_finished) {
            self.finish_copy(now, destination);
        }
    }

    /// The lock of a chunk was granted.
    pub(super) fn on_chunk_granted(&mut self, now: Monotonic, destination: MemberIndex, offset: ByteOffset) {
        if let Some(chunk) = self.chunks.get(&(destination, offset)).copied() {
            self.read_chunk(now, destination, chunk);
        }
    }

    fn read_chunk(&mut self, now: Monotonic, destination: MemberIndex, chunk: Extent) {
        self.read_chunk_from(now, destination, chunk, 0);
    }

    /// Asks a source other than those in `tried` (a bit per member) for the chunk; without one, the chunk waits for the timer.
    fn read_chunk_from(&mut self, now: Monotonic, destination: MemberIndex, chunk: Extent, tried: u8) {
        let source = match self.chosen {
            Some(chosen) if !self.is_serving() => Some(chosen).filter(|chosen| tried & 1 << chosen.0 == 0),
            _ => self.best_reader(tried | 1 << destination.0),
        };
        let Some(source) = source else {
            self.stalled_chunks.push((destination, chunk));
            return;
        };
        let header = self.header(Kind::Read);
        self.request(now, source, Frame::range(header, chunk), Outstanding::CopyRead { destination, chunk, tried });
    }

    /// Tries again what found no source. Called by the timer and when a member joins.
    pub(super) fn retry_stalled_chunks(&mut self, now: Monotonic) {
        for (destination, chunk) in std::mem::take(&mut self.stalled_chunks) {
            if self.chunks.contains_key(&(destination, chunk.offset())) {
                self.read_chunk(now, destination, chunk);
            }
        }
    }

    /// The source answered.
    pub(super) fn on_copy_read(&mut self, now: Monotonic, destination: MemberIndex, chunk: Extent, frame: Frame) {
        // The copy may have ended with its destination's connection, and the chunk with it.
        if !self.chunks.contains_key(&(destination, chunk.offset())) {
            return;
        }
        let copied = match frame.body {
            Body::Data { checksums, data } => Frame::data(self.header(Kind::CopyWrite), chunk, checksums, data),
            _ => Frame::range(self.header(Kind::CopyZeroes), chunk),
        };
        self.request(now, destination, copied, Outstanding::CopyWrite { destination, chunk });
        self.end_chunk(now, destination, chunk.offset());
    }

    /// The source could not give the chunk.
    pub(super) fn on_copy_read_failed(&mut self, now: Monotonic, source: MemberIndex, destination: MemberIndex, chunk: Extent, tried: u8) {
        if self.chunks.contains_key(&(destination, chunk.offset())) {
            self.members[source.0].damaged |= !self.is_serving();
            self.read_chunk_from(now, destination, chunk, tried | 1 << source.0);
        }
    }

    /// The destination has the chunk.
    pub(super) fn on_copy_written(&mut self, now: Monotonic, destination: MemberIndex, chunk: Extent) {
        if let Some(copy) = &mut self.members[destination.0].copy {
            copy.under_way -= 1;
            copy.done += chunk.length().get();
            self.advance_copy(now, destination);
        }
    }

    fn end_chunk(&mut self, now: Monotonic, destination: MemberIndex, offset: ByteOffset) {
        self.chunks.remove(&(destination, offset));
        self.unlock(now, Owner::Copy(destination, offset));
    }

    /// The destination is gone: its chunks give up their locks.
    pub(super) fn drop_chunks(&mut self, now: Monotonic, destination: MemberIndex) {
        let offsets: Vec<ByteOffset> = self.chunks.keys().filter(|(member, _)| *member == destination).map(|(_, offset)| *offset).collect();
        for offset in offsets {
            self.end_chunk(now, destination, offset);
        }
    }

    fn finish_copy(&mut self, now: Monotonic, destination: MemberIndex) {
        self.members[destination.0].copy = None;
        if self.is_serving() {
            self.members[destination.0].stage = Stage::CopyAdopting;
            let adopt = Frame::new(self.header(Kind::Adopt), Body::Empty);
            self.request(now, destination, adopt, Outstanding::Control);
        } else {
            self.members[destination.0].stage = Stage::Reconciled;
            self.adopt_when_reconciled(now);
        }
    }

    /// Whether this member's old content may give way to a copy: a majority without it has all that was acknowledged; or a
    /// joined member has, this one has not, and no other member is being copied, so that what is left of others' content stays.
    pub(super) fn may_destroy(&self, index: MemberIndex) -> bool {
        let Some(status) = self.members[index.0].promised() else { return false };
        if self.holders_of_acknowledged(index) >= self.majority() {
            return true;
        }
        let here = Some(status.log_term) == self.term && status.content != Content::Rebuilding;
        let lacks = !here || status.position < self.acknowledged;
        let holds = |member: &Member| member.is_joined() && member.received >= self.acknowledged;
        let copying = |member: &Member| member.takes_writes() && !member.is_joined() || matches!(member.stage, Stage::CopyBeginning);
        lacks && self.members.iter().any(holds) && !self.members.iter().any(copying)
    }

    /// Starts to copy the whole volume into members that are behind, where that risks nothing.
    pub(super) fn start_rebuilds(&mut self, now: Monotonic) {
        if !self.is_serving() {
            return;
        }
        for index in self.member_indices() {
            if !self.members[index.0].in_sync && self.may_destroy(index) {
                let base = self.backlog.last();
                let member = &mut self.members[index.0];
                member.stage = Stage::CopyBeginning;
                (member.received, member.durable, member.sent, member.flush_sent) = (base, Seq::ZERO, base, Seq::ZERO);
                let header = Header { flags: Flags::REBUILD, sequence: base, ..self.header(Kind::CopyBegin) };
                self.request(now, index, Frame::new(header, Body::Empty), Outstanding::Control);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent::new(ByteOffset::new(offset), ByteLength::new(length)).unwrap()
    }

    #[test]
    fn overlapping_ranges_are_copied_once_in_chunks() {
        let mut copy = Copy::new([extent(8 << 20, 4096), extent(0, CHUNK), extent(4096, CHUNK)]);
        assert_eq!(copy.progress().1.get(), CHUNK + 4096 + 4096);
        assert_eq!(copy.next_chunk(), Some(extent(0, CHUNK)));
        assert_eq!(copy.next_chunk(), Some(extent(CHUNK, 4096)));
        assert_eq!(copy.next_chunk(), None, "two are under way");
        copy.under_way -= 2;
        assert_eq!(copy.next_chunk(), Some(extent(8 << 20, 4096)));
        assert!(!copy.is_finished());
        copy.under_way -= 1;
        assert!(copy.is_finished());
    }
}
