//! Copying blocks into a replica, from the chosen one before serving and from any in-sync one while serving.
//!
//! A chunk is read from the source under a shared range lock and sent to the destination before the lock is given up, so on the
//! destination's ordered connection it stands after every write that came before it, and before every later one: a copied block
//! never overwrites a newer write.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use carrick_backing_store::{ByteLength, ByteOffset, Content, Extent, Seq, Synced, VolumeSize};

use super::difference::{Difference, Side};
use super::member::{Member, Stage};
use super::range_lock::Access;
use super::requests::Owner;
use super::{Engine, MemberIndex, Outstanding};
use crate::time::Monotonic;
use crate::wire::{Body, Flags, Frame, Header, Kind};

/// Bytes of one chunk: one frame's worth, so that a hole costs one round trip per MiB.
const CHUNK: u64 = 1 << 20;
/// In the first moments nobody can tell how long a copy takes.
const TOO_EARLY: Duration = Duration::from_secs(1);
/// What changed is asked for while fewer ranges wait: a quarter of the longest answer.
const RANGES_AHEAD: usize = 512;

/// A copy under way into one member.
#[derive(Debug)]
pub(super) struct Copy {
    /// What is still to be started, as far as it is known, in order.
    ranges: VecDeque<Extent>,
    /// How the rest becomes known.
    difference: Option<Difference>,
    /// Chunks that wait for a lock, a read or the destination's answer.
    under_way: BTreeSet<ByteOffset>,
    /// Where the last range known ends.
    end: ByteOffset,
    total: u64,
    done: u64,
    /// What was done at the last mark.
    marked: u64,
    /// When it began, and how far it was then: an earlier one may have been interrupted.
    began: Option<(Monotonic, ByteLength)>,
    /// When something of it was done last.
    latest: Monotonic,
}

impl Copy {
    /// A copy of these ranges, which may overlap.
    pub(super) fn of(extents: impl IntoIterator<Item = Extent>) -> Self {
        let mut copy = Self {
            ranges: VecDeque::new(),
            difference: None,
            under_way: BTreeSet::new(),
            end: ByteOffset::ZERO,
            total: 0,
            done: 0,
            marked: 0,
            began: None,
            latest: Monotonic::default(),
        };
        copy.add(extents);
        copy.total = copy.ranges.iter().map(|extent| extent.length().get()).sum();
        copy
    }

    /// A copy of what a replica of a volume of this size lacks.
    pub(super) fn since(synced: Synced, size: VolumeSize) -> Self {
        Self { difference: Some(Difference::new(synced, size)), end: size.extent().end(), ..Self::of([]) }
    }

    /// Adds ranges behind those that are there.
    fn add(&mut self, extents: impl IntoIterator<Item = Extent>) {
        for extent in extents.into_iter().collect::<BTreeSet<_>>() {
            match self.ranges.back_mut() {
                Some(last) if extent.offset() <= last.end() => *last = span(last.offset(), last.end().max(extent.end())),
                _ => self.ranges.push_back(extent),
            }
        }
        self.end = self.end.max(self.ranges.back().map_or(ByteOffset::ZERO, |last| last.end()));
    }

    pub(super) fn is_finished(&self) -> bool {
        let is_known = self.difference.as_ref().is_none_or(|difference| difference.border() >= self.end);
        is_known && self.ranges.is_empty() && self.under_way.is_empty()
    }

    /// Everything before this was copied, if it is known where to copy at all.
    fn border(&self) -> ByteOffset {
        let known = self.difference.as_ref().map_or(self.end, Difference::border);
        let first = self.under_way.first().copied().into_iter().chain(self.ranges.front().map(|range| range.offset()));
        first.fold(known, ByteOffset::min)
    }

    /// How far it is, of how much. What a difference comes to is not known before its end; then it is the place in the volume.
    pub(super) fn progress(&self) -> (ByteLength, ByteLength) {
        match self.difference {
            Some(_) => (ByteLength::new(self.border().get()), ByteLength::new(self.end.get())),
            None => (ByteLength::new(self.done), ByteLength::new(self.total)),
        }
    }

    fn note_time(&mut self, now: Monotonic) {
        self.began.get_or_insert((now, self.progress().0));
        self.latest = now;
    }

    /// How long it takes from its latest step on, if it goes on as it went so far.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let ((began, from), (at, total)) = (self.began?, self.progress());
        let took = self.latest.since(began);
        let did = at.get().checked_sub(from.get()).filter(|did| *did > 0 && took >= TOO_EARLY)?;
        let left = took.as_micros() * u128::from(total.get().saturating_sub(at.get())) / u128::from(did);
        u64::try_from(left).ok().map(Duration::from_micros)
    }

    fn next_chunk(&mut self, under_way_max: usize) -> Option<Extent> {
        if self.under_way.len() >= under_way_max {
            return None;
        }
        let range = self.ranges.pop_front()?;
        let border = ByteOffset::new(range.offset().get() + CHUNK).min(range.end());
        if border < range.end() {
            self.ranges.push_front(span(border, range.end()));
        }
        self.under_way.insert(range.offset());
        Some(span(range.offset(), border))
    }

    /// Whom to ask what changed, if it is time: some ranges ahead, so that asking costs no time.
    fn question(&mut self, side: Side) -> Option<(carrick_backing_store::Epoch, ByteOffset)> {
        let few = self.ranges.len() < RANGES_AHEAD;
        self.difference.as_mut().filter(|_| few)?.question(side)
    }

    /// Copies all that is left, whether it differs or not.
    fn take_whole(&mut self) {
        if let Some(difference) = self.difference.take() {
            self.add([span(difference.border(), self.end)].into_iter().filter(|rest| !rest.is_empty()));
            self.total = self.done + self.ranges.iter().map(|range| range.length().get()).sum::<u64>();
        }
    }

    /// How far it came, if so much was copied since that was last remembered.
    fn take_mark(&mut self, bytes: u64) -> Option<ByteOffset> {
        let border = self.border();
        let is_worth_it = self.done >= self.marked + bytes && border >= self.difference.as_ref()?.copied_before();
        is_worth_it.then(|| self.marked = self.done).map(|()| border)
    }
}

/// From `start` up to `end`, which is not before it.
pub(super) fn span(start: ByteOffset, end: ByteOffset) -> Extent {
    let length = ByteLength::new(end.get().saturating_sub(start.get()));
    match Extent::new(start, length) {
        Some(extent) => extent,
        None => unreachable!("{start}..{end} ends where an extent ended"),
    }
}

impl Engine {
    /// Starts the next chunks of a copy, or ends it.
    pub(super) fn advance_copy(&mut self, now: Monotonic, destination: MemberIndex) {
        if let Some(copy) = &mut self.members[destination.0].copy {
            copy.note_time(now);
        }
        self.ask_changed(now, destination, Side::Destination);
        self.ask_changed(now, destination, Side::Source);
        while let most = self.chunks_max(now)
            && let Some(chunk) = self.members[destination.0].copy.as_mut().and_then(|copy| copy.next_chunk(most))
        {
            self.spend_on_copy(chunk.length());
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

    /// Asks a side of a copy what changed, if it is time.
    fn ask_changed(&mut self, now: Monotonic, destination: MemberIndex, side: Side) {
        let Some((epoch, start)) = self.members[destination.0].copy.as_mut().and_then(|copy| copy.question(side)) else { return };
        let member = match side {
            Side::Destination => Some(destination),
            Side::Source if self.is_serving() => self.best_reader(1 << destination.0),
            // If it was lost, everything begins anew in a moment.
            Side::Source => self.chosen.filter(|chosen| !self.members[chosen.0].is_down()),
        };
        let Some(member) = member else {
            self.withdraw_question(destination, side);
            self.stalled_copies.push(destination);
            return;
        };
        let header = Header { sequence: Seq::new(u64::from(epoch.get())), offset: start, ..self.header(Kind::Changed) };
        self.request(now, member, Frame::new(header, Body::Empty), Outstanding::Changed { destination, side });
    }

    fn withdraw_question(&mut self, destination: MemberIndex, side: Side) {
        if let Some(difference) = self.members[destination.0].copy.as_mut().and_then(|copy| copy.difference.as_mut()) {
            difference.withdraw(side);
        }
    }

    /// A side has told what changed.
    pub(super) fn on_changed(&mut self, now: Monotonic, from: MemberIndex, destination: MemberIndex, side: Side, frame: Frame) {
        let Body::Changed(answer) = frame.body else { return };
        let Some(copy) = &mut self.members[destination.0].copy else { return };
        // It may have been asked by a copy that has ended, or is no longer needed.
        let Some(difference) = &mut copy.difference else { return };
        let Some(known) = difference.answer(side, answer.extents, answer.next) else {
            return self.drop_member(now, from, "it tells of changes where that makes no sense".to_owned(), true);
        };
        copy.add(known);
        self.advance_copy(now, destination);
    }

    /// Whoever was asked is gone.
    pub(super) fn on_changed_unanswered(&mut self, now: Monotonic, destination: MemberIndex, side: Side) {
        self.withdraw_question(destination, side);
        self.advance_copy(now, destination);
    }

    /// What changed can't be told: all is copied.
    pub(super) fn copy_whole(&mut self, now: Monotonic, destination: MemberIndex) {
        if let Some(copy) = &mut self.members[destination.0].copy {
            copy.take_whole();
            self.advance_copy(now, destination);
        }
    }

    /// Tries again what found no source. Called by the timer and when a member joins.
    pub(super) fn retry_stalled_chunks(&mut self, now: Monotonic) {
        for destination in std::mem::take(&mut self.stalled_copies) {
            self.advance_copy(now, destination);
        }
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
        if let Some(data) = frame.payload() {
            self.copied = ByteLength::new(self.copied.get() + data.len() as u64);
        }
        let copied = self.copy_frame(chunk, frame.body);
        self.request(now, destination, copied, Outstanding::CopyWrite { destination, chunk });
        self.end_chunk(now, destination, chunk.offset());
    }

    /// The frame that puts what a read gave into another member.
    pub(super) fn copy_frame(&self, extent: Extent, read: Body) -> Frame {
        match read {
            Body::Data { checksums, data } => Frame::data(self.header(Kind::CopyWrite), extent, checksums, data),
            _ => Frame::range(self.header(Kind::CopyZeroes), extent),
        }
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
        let Some(copy) = &mut self.members[destination.0].copy else { return };
        copy.under_way.remove(&chunk.offset());
        copy.done += chunk.length().get();
        let mark = copy.take_mark(self.config.epoch_bytes);
        self.note_written(now, chunk.length().get());
        if let Some(border) = mark.filter(|_| self.is_serving()) {
            self.mark_copy(now, destination, border);
        }
        self.advance_copy(now, destination);
    }

    fn end_chunk(&mut self, now: Monotonic, destination: MemberIndex, offset: ByteOffset) {
        self.chunks.remove(&(destination, offset));
        self.unlock(now, Owner::Copy(destination, offset));
    }

    /// The destination is gone: its chunks give up their locks, and what was asked for its copy is of no use to the next one, which
    /// begins with other writes.
    pub(super) fn drop_chunks(&mut self, now: Monotonic, destination: MemberIndex) {
        for (_, outstanding) in self.outstanding.values_mut() {
            match outstanding {
                Outstanding::CopyRead { destination: to, .. } if *to == destination => *outstanding = Outstanding::Abandoned,
                Outstanding::Changed { destination: to, .. } if *to == destination => *outstanding = Outstanding::Ignored,
                _ => {}
            }
        }
        let offsets: Vec<ByteOffset> = self.chunks.keys().filter(|(member, _)| *member == destination).map(|(_, offset)| *offset).collect();
        for offset in offsets {
            self.end_chunk(now, destination, offset);
        }
    }

    /// Lets the destination remember how far its copy came.
    fn mark_copy(&mut self, now: Monotonic, destination: MemberIndex, border: ByteOffset) {
        let sequence = Seq::new(u64::from(self.epochs.stable.get()));
        let header = Header { sequence, offset: border, ..self.header(Kind::CopyMark) };
        self.request(now, destination, Frame::new(header, Body::Empty), Outstanding::Ignored);
    }

    fn finish_copy(&mut self, now: Monotonic, destination: MemberIndex) {
        self.members[destination.0].copy = None;
        if self.is_serving() {
            self.mark_copy(now, destination, self.config.size.extent().end());
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
    /// And what was flushed, or told to be for good, doesn't stand on it: others may have received that, and lose it with their power.
    pub(super) fn may_destroy(&self, index: MemberIndex) -> bool {
        let Some(status) = self.members[index.0].promised() else { return false };
        let here = Some(status.log_term) == self.term && status.content != Content::Rebuilding;
        if here && !self.is_majority(|other, member| other != index && member.in_sync && self.is_durable(member)) {
            return false;
        }
        if self.is_held_without(index) {
            return true;
        }
        let lacks = !here || status.position < self.acknowledged;
        let holds = |member: &Member| member.is_joined() && member.received >= self.acknowledged;
        let copying = |member: &Member| member.takes_writes() && !member.is_joined() || matches!(member.stage, Stage::CopyBeginning);
        lacks && self.members.iter().any(holds) && !self.members.iter().any(copying)
    }

    /// Starts to copy the whole volume into members that are behind, where that risks nothing, and makes it so where it does.
    pub(super) fn start_rebuilds(&mut self, now: Monotonic) {
        if !self.is_serving() {
            return;
        }
        for index in self.member_indices() {
            let is_behind = !self.members[index.0].in_sync && self.members[index.0].promised().is_some();
            let is_gone = self.is_retiring(index) && !self.voters().contains(index);
            // What it has is all there is, for somebody who gives the others up, as long as there is nobody to copy from.
            if !is_behind || is_gone || self.joined_besides(index).next().is_none() {
                continue;
            }
            if !self.may_destroy(index) {
                self.make_durable(now, self.voters());
            } else {
                let base = self.backlog.last();
                let size = self.config.size;
                let member = &mut self.members[index.0];
                member.copy = member.promised().map(|status| Copy::since(status.synced, size));
                member.stage = Stage::CopyBeginning;
                (member.received, member.durable, member.sent, member.flush_sent) = (base, Seq::ZERO, base, Seq::ZERO);
                // No copied block may carry an earlier epoch than the original.
                self.tell_epoch(now, index, true);
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
    fn the_time_left_follows_what_was_done_so_far() {
        let begin = Monotonic::default();
        let mut copy = Copy::of([extent(0, 100 * CHUNK)]);
        copy.done = 20 * CHUNK;
        copy.note_time(begin);
        assert_eq!(copy.time_left(), None, "an earlier copy's work says nothing");
        copy.done = 30 * CHUNK;
        copy.note_time(begin + Duration::from_millis(500));
        assert_eq!(copy.time_left(), None, "too early to tell");
        copy.done = 40 * CHUNK;
        copy.note_time(begin + Duration::from_secs(2));
        assert_eq!(copy.time_left(), Some(Duration::from_secs(6)), "20 chunks took 2 s, 60 are left");
        copy.done = 100 * CHUNK;
        copy.note_time(begin + Duration::from_secs(8));
        assert_eq!(copy.time_left(), Some(Duration::ZERO));
    }

    #[test]
    fn overlapping_ranges_are_copied_once_in_chunks() {
        let mut copy = Copy::of([extent(8 << 20, 4096), extent(0, CHUNK), extent(4096, CHUNK)]);
        assert_eq!(copy.progress().1.get(), CHUNK + 4096 + 4096);
        assert_eq!(copy.next_chunk(2), Some(extent(0, CHUNK)));
        assert_eq!(copy.next_chunk(2), Some(extent(CHUNK, 4096)));
        assert_eq!(copy.next_chunk(2), None, "two are under way");
        copy.under_way.clear();
        assert_eq!(copy.next_chunk(2), Some(extent(8 << 20, 4096)));
        assert!(!copy.is_finished());
        copy.under_way.clear();
        assert!(copy.is_finished());
    }
}
