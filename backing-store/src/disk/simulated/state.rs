//! The state behind a simulated disk's handles: what is in flight, what is to fail, and how work ends.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::mem;
use std::ops::Range;
use std::time::Duration;

use rustix::io::Errno;

use crate::buffer::{Buffer, SharedBuffer};
use crate::dice::Dice;
use crate::units::BLOCK_SIZE;

use super::super::{DiskDone, DiskRequest, DiskWork, IoId};
use super::medium::{Medium, WHOLE, block_of, overlay};
use super::{BLOCK, DiskCounters};

#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) id: IoId,
    pub(super) work: DiskWork,
    /// For a sync: which writes it covers.
    pub(super) mark: u64,
}

/// Blocks whose I/O fails, and how often yet (`None`: for ever).
#[derive(Clone, Debug)]
pub(super) struct BadRange {
    pub(super) blocks: Range<u64>,
    pub(super) left: Option<u32>,
}

/// Faults that wait for something to happen to.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    pub(super) bad_reads: Vec<BadRange>,
    pub(super) bad_writes: Vec<BadRange>,
    pub(super) sync: bool,
    pub(super) prepare: bool,
    pub(super) misdirect: Option<u64>,
    pub(super) lose: bool,
    pub(super) short: bool,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) blocks: u64,
    pub(super) medium: Medium,
    pub(super) dice: Dice,
    pub(super) manual: bool,
    pub(super) discards: bool,
    /// Bytes that the file system below could still give; `None`: all are there.
    pub(super) room: Option<u64>,
    /// The blocks that have room, if that is counted.
    pub(super) allocated: BTreeSet<u64>,
    pub(super) in_flight: VecDeque<InFlight>,
    pub(super) ended: Vec<DiskDone>,
    pub(super) faults: Faults,
    pub(super) counters: DiskCounters,
    pub(super) clock: Duration,
    pub(super) opened_at: Duration,
    pub(super) alarm: Option<Duration>,
    /// Which opening is alive.
    pub(super) generation: u64,
    /// How many submissions are left until the disk stops.
    pub(super) submits_left: Option<u64>,
    pub(super) stopped: bool,
}

fn broken() -> io::Error {
    Errno::IO.into()
}

fn full() -> io::Error {
    Errno::NOSPC.into()
}

/// A piece of a write that was cut short by something: which sectors of each of its blocks were written.
fn torn(count: usize, dice: &mut Dice) -> Vec<u8> {
    let fate = dice.below(4);
    (0..count)
        .map(|_| match fate {
            0 => 0,
            1 => WHOLE,
            2 if dice.coin() => WHOLE,
            2 => 0,
            _ => dice.number().to_le_bytes()[0],
        })
        .collect()
}

fn blocks_of(pieces: &[SharedBuffer]) -> impl Iterator<Item = &[u8]> {
    pieces.iter().flat_map(|piece| piece.chunks_exact(BLOCK))
}

fn shuffle<T>(things: &mut [T], dice: &mut Dice) {
    for index in (1..things.len()).rev() {
        things.swap(index, dice.index(index + 1));
    }
}

/// The blocks that work is about.
fn range_of(work: &DiskWork) -> Range<u64> {
    let (at, length) = work.span();
    at.get()..at.get() + length / u64::from(BLOCK_SIZE)
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Whether a fault hits this range; one that is not for ever is used up by it.
fn hits(bad: &mut Vec<BadRange>, range: &Range<u64>) -> bool {
    let Some(index) = bad.iter().position(|bad| overlap(&bad.blocks, range)) else { return false };
    if let Some(left) = &mut bad[index].left {
        *left = left.saturating_sub(1);
        if *left == 0 {
            bad.remove(index);
        }
    }
    true
}

impl State {
    pub(super) fn submit(&mut self, request: DiskRequest) {
        match &mut self.submits_left {
            Some(0) => self.stopped = true,
            Some(left) => *left -= 1,
            None => {}
        }
        if self.stopped {
            return;
        }
        let DiskRequest { id, work } = request;
        if let Some(reason) = work.misuse(self.blocks) {
            self.counters.misuses += 1;
            self.ended.push(DiskDone { id, result: Err(io::Error::new(io::ErrorKind::InvalidInput, reason)) });
            return;
        }
        let range = range_of(&work);
        let clashes = |other: &InFlight| {
            let both_read = matches!(work, DiskWork::Read { .. }) && matches!(other.work, DiskWork::Read { .. });
            !both_read && overlap(&range, &range_of(&other.work))
        };
        if self.in_flight.iter().any(clashes) {
            self.counters.overlaps += 1;
        }
        let mark = self.medium.completed();
        self.in_flight.push_back(InFlight { id, work, mark });
    }

    pub(super) fn complete(&mut self, index: usize) {
        if self.stopped {
            return;
        }
        if let Some(InFlight { id, work, mark }) = self.in_flight.remove(index) {
            let result = self.perform(work, mark);
            self.counters.failed += u64::from(result.is_err());
            self.ended.push(DiskDone { id, result });
        }
    }

    pub(super) fn complete_all(&mut self) {
        while !self.stopped && !self.in_flight.is_empty() {
            self.complete(0);
        }
    }

    pub(super) fn complete_any(&mut self) {
        let index = self.dice.index(self.in_flight.len());
        self.complete(index);
    }

    fn perform(&mut self, work: DiskWork, mark: u64) -> io::Result<Option<Buffer>> {
        let range = range_of(&work);
        let count = range.end - range.start;
        match work {
            DiskWork::Read { buffer, .. } => {
                self.counters.reads += 1;
                self.counters.read_blocks += count;
                return self.read(range, buffer).map(Some);
            }
            DiskWork::Write { pieces, .. } => {
                self.counters.writes += 1;
                self.counters.written_blocks += count;
                self.write(range, &pieces)?;
            }
            DiskWork::Sync => {
                self.counters.syncs += 1;
                let succeeds = !mem::take(&mut self.faults.sync);
                self.medium.sync(mark, succeeds);
                if !succeeds {
                    return Err(broken());
                }
            }
            DiskWork::Discard { .. } => {
                self.counters.discards += 1;
                self.counters.discarded_blocks += count;
                range.for_each(|block| self.discard(block));
            }
            DiskWork::Prepare { .. } => {
                self.counters.prepares += 1;
                self.counters.prepared_blocks += count;
                if mem::take(&mut self.faults.prepare) || !self.allocate(range.clone()) {
                    return Err(full());
                }
                range.for_each(|block| self.medium.discard(block, &mut self.dice));
            }
        }
        Ok(None)
    }

    fn read(&mut self, range: Range<u64>, mut buffer: Buffer) -> io::Result<Buffer> {
        if hits(&mut self.faults.bad_reads, &range) {
            return Err(broken());
        }
        let meets = |other: &&InFlight| matches!(other.work, DiskWork::Write { .. }) && overlap(&range, &range_of(&other.work));
        let beside: Vec<&InFlight> = self.in_flight.iter().filter(meets).collect();
        let mut out = buffer.as_chunks_mut::<BLOCK>().0.iter_mut();
        self.medium.read(range, &mut self.dice, |block, bytes, dice| {
            let Some(out) = out.next() else { return };
            *out = *bytes;
            // A write in flight may be there already, in part.
            for other in &beside {
                let there = range_of(&other.work);
                if let DiskWork::Write { pieces, .. } = &other.work
                    && there.contains(&block)
                    && let Some(new) = usize::try_from(block - there.start).ok().and_then(|index| blocks_of(pieces).nth(index))
                {
                    overlay(out, &block_of(new), dice.number().to_le_bytes()[0]);
                }
            }
        });
        Ok(buffer)
    }

    fn write(&mut self, mut range: Range<u64>, pieces: &[SharedBuffer]) -> io::Result<()> {
        if !self.allocate(range.clone()) {
            return Err(full());
        }
        let count = blocks_of(pieces).count();
        let mut sectors = vec![WHOLE; count];
        let mut result = Ok(());
        if hits(&mut self.faults.bad_writes, &range) {
            sectors = torn(count, &mut self.dice);
            result = Err(broken());
        } else if mem::take(&mut self.faults.short) {
            let whole = self.dice.index(count);
            sectors.iter_mut().skip(whole).for_each(|set| *set = 0);
            sectors[whole] = (1 << self.dice.below(8)) - 1;
            result = Err(io::ErrorKind::WriteZero.into());
        } else if mem::take(&mut self.faults.lose) {
            return Ok(());
        } else if let Some(to) = self.faults.misdirect.take() {
            range = to..self.blocks.min(to + count as u64);
        }
        for ((block, bytes), set) in range.zip(blocks_of(pieces)).zip(sectors) {
            self.medium.write(block, &block_of(bytes), set);
        }
        result
    }

    fn discard(&mut self, block: u64) {
        self.medium.discard(block, &mut self.dice);
        if self.allocated.remove(&block)
            && let Some(room) = &mut self.room
        {
            *room += u64::from(BLOCK_SIZE);
        }
    }

    /// Takes room for those blocks that have none. `false`, and nothing is taken, if there isn't enough.
    fn allocate(&mut self, range: Range<u64>) -> bool {
        let Some(room) = &mut self.room else { return true };
        let there = self.allocated.range(range.clone()).count() as u64;
        let needed = (range.end - range.start - there) * u64::from(BLOCK_SIZE);
        let Some(left) = room.checked_sub(needed) else { return false };
        *room = left;
        self.allocated.extend(range);
        true
    }

    /// Ends the opening. What was in flight may have happened, wholly or in part.
    pub(super) fn crash(&mut self, dice: &mut Dice, power_is_lost: bool) {
        let mut in_flight: Vec<InFlight> = self.in_flight.drain(..).collect();
        shuffle(&mut in_flight, dice);
        for InFlight { work, .. } in in_flight {
            let range = range_of(&work);
            match work {
                DiskWork::Write { pieces, .. } => {
                    if self.allocate(range.clone()) {
                        let sectors = torn(blocks_of(&pieces).count(), dice);
                        for ((block, bytes), set) in range.zip(blocks_of(&pieces)).zip(sectors) {
                            self.medium.write(block, &block_of(bytes), set);
                        }
                    }
                }
                DiskWork::Discard { .. } => range.filter(|_| dice.coin()).for_each(|block| self.discard(block)),
                DiskWork::Prepare { .. } | DiskWork::Read { .. } | DiskWork::Sync => {}
            }
        }
        if power_is_lost {
            self.medium.lose_power(dice);
        }
        self.end_opening();
    }

    pub(super) fn end_opening(&mut self) {
        self.ended.clear();
        self.in_flight.clear();
        self.alarm = None;
        self.submits_left = None;
        self.stopped = false;
        self.generation += 1;
    }
}
