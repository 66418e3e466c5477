//! [`SimulatedDisk`]: a disk in memory that loses, tears and corrupts what a real one may, on demand or by seed.
//!
//! It is deterministic: the same seed and calls give the same bytes. It knows no clock but the one that the test moves.

mod medium;
mod state;

use std::cell::{RefCell, RefMut};
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Duration;

use crate::dice::Dice;
use crate::units::BLOCK_SIZE;

use super::{Disk, DiskBlock, DiskDone, DiskRequest, DiskWork};
use medium::{Bytes, Medium};
use state::{BadRange, Faults, InFlight, State};

const BLOCK: usize = BLOCK_SIZE as usize;

/// What a [`SimulatedDisk`] has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounters {
    /// Reads completed.
    pub reads: u64,
    /// Blocks that they were of.
    pub read_blocks: u64,
    /// Writes completed.
    pub writes: u64,
    /// Blocks that they were of.
    pub written_blocks: u64,
    /// Syncs completed.
    pub syncs: u64,
    /// Discards completed.
    pub discards: u64,
    /// Blocks that they were of.
    pub discarded_blocks: u64,
    /// Prepares completed.
    pub prepares: u64,
    /// Blocks that they were of.
    pub prepared_blocks: u64,
    /// Work of any kind that ended with an error.
    pub failed: u64,
    /// Requests submitted beside one in flight that they overlap, unless both were reads. Their result is anything.
    pub overlaps: u64,
    /// Requests refused because no disk could do them.
    pub misuses: u64,
}

/// A disk in memory. A handle is a [`Disk`] for a store, and its clones are the remote control for the test.
///
/// * By default work completes, in the order of submission, at the next `reap`. After
///   [`SimulatedDisk::set_manual_completion`] the test says what completes when, or `wait` completes something at random.
/// * [`SimulatedDisk::power_cut`] and [`SimulatedDisk::kill`] end an opening: the handles that were open do nothing any more
///   (`wait` fails), but still control the disk. [`SimulatedDisk::reopen`] gives one that is alive.
#[derive(Clone, Debug)]
pub struct SimulatedDisk {
    state: Rc<RefCell<State>>,
    generation: u64,
}

/// What a disk holds, without what is in flight and whatever else is about it: unlike a disk it can go to other threads.
#[derive(Clone, Debug)]
pub struct DiskImage {
    blocks: u64,
    medium: Medium,
    dice: Dice,
}

impl DiskImage {
    /// The same content for disks that will have another fate.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { dice: Dice::new(seed), ..self }
    }
}

impl SimulatedDisk {
    /// An empty disk of so many blocks, opened for the first time.
    #[must_use]
    pub fn new(blocks: u64, seed: u64) -> Self {
        Self::of(&DiskImage { blocks, medium: Medium::new(seed), dice: Dice::new(seed) })
    }

    /// What it holds.
    #[must_use]
    pub fn image(&self) -> DiskImage {
        let state = self.state();
        DiskImage { blocks: state.blocks, medium: state.medium.clone(), dice: state.dice }
    }

    /// A disk that holds this, opened for the first time.
    #[must_use]
    pub fn of(image: &DiskImage) -> Self {
        let state = State {
            blocks: image.blocks,
            medium: image.medium.clone(),
            dice: image.dice,
            manual: false,
            discards: false,
            room: None,
            allocated: BTreeSet::new(),
            in_flight: VecDeque::new(),
            ended: Vec::new(),
            faults: Faults::default(),
            counters: DiskCounters::default(),
            clock: Duration::ZERO,
            opened_at: Duration::ZERO,
            alarm: None,
            generation: 0,
            submits_left: None,
            stopped: false,
        };
        Self { state: Rc::new(RefCell::new(state)), generation: 0 }
    }

    fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// The state, if this handle's opening lives and the disk has not stopped.
    fn live(&self) -> Option<RefMut<'_, State>> {
        let state = self.state();
        (state.generation == self.generation && !state.stopped).then_some(state)
    }

    /// Whether work waits for [`SimulatedDisk::complete_some`] and its like, or for `wait`, instead of the next `reap`.
    pub fn set_manual_completion(&self, manual: bool) {
        self.state().manual = manual;
    }

    /// Whether the disk wants discards (at first: no).
    pub fn set_discards(&self, wanted: bool) {
        self.state().discards = wanted;
    }

    /// Whether blocks that were never written hold garbage (as at first) or zeros.
    pub fn set_garbage_when_unwritten(&self, garbage: bool) {
        self.state().medium.garbage_when_unwritten = garbage;
    }

    /// Makes the disk a sparse file on a file system with so many bytes free: blocks take room when they are prepared or first
    /// written, and fail with `ENOSPC` when there is none. Before the first use: what was written before is not counted.
    pub fn set_room(&self, bytes: Option<u64>) {
        self.state().room = bytes;
    }

    /// How much work is in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.state().in_flight.len()
    }

    /// Completes everything in flight, in the order of submission.
    pub fn complete_all(&self) {
        self.state().complete_all();
    }

    /// Completes one thing in flight, at random. `false` if there is none.
    pub fn complete_one(&self) -> bool {
        let mut state = self.state();
        let any = !state.in_flight.is_empty() && !state.stopped;
        state.complete_any();
        any
    }

    /// Completes some of what is in flight, possibly nothing, possibly all, in random order.
    pub fn complete_some(&self) {
        let mut state = self.state();
        let count = state.in_flight.len();
        for _ in 0..state.dice.index(count + 1) {
            state.complete_any();
        }
    }

    /// Lets the disk take so many more submissions; the next one after that, and everything else, is ignored, as if the process
    /// had died there. [`SimulatedDisk::kill`] or [`SimulatedDisk::power_cut`] must follow.
    pub fn stop_after(&self, submissions: u64) {
        self.state().submits_left = Some(submissions);
    }

    /// Whether the disk has stopped, after [`SimulatedDisk::stop_after`].
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.state().stopped
    }

    /// Ends the machine. Work in flight may have reached the disk in part, sector by sector; each sector that was not synced
    /// becomes any of its values since the last sync, the old one included.
    pub fn power_cut(&self, seed: u64) {
        self.state().crash(&mut Dice::new(seed), true);
    }

    /// Ends the process. Completed writes stay; those in flight happened wholly, not at all, or in part, sector by sector. What
    /// is not synced can still be lost to a later [`SimulatedDisk::power_cut`].
    pub fn kill(&self, seed: u64) {
        self.state().crash(&mut Dice::new(seed), false);
    }

    /// Opens the disk again: the handle that it returns is alive, all others are dead. If the last opening has not crashed,
    /// what is in flight completes first.
    #[must_use]
    pub fn reopen(&self) -> Self {
        let mut state = self.state();
        state.stopped = false;
        state.complete_all();
        state.end_opening();
        state.opened_at = state.clock;
        Self { state: Rc::clone(&self.state), generation: state.generation }
    }

    /// Another disk with the same content, sync state, faults and work in flight (but for reads), and no opening alive: to try
    /// what different crashes at this point leave, while this one goes on.
    #[must_use]
    pub fn fork(&self) -> Self {
        let state = self.state();
        let copy = |flight: &InFlight| {
            let work = match &flight.work {
                DiskWork::Read { .. } => return None,
                DiskWork::Write { at, pieces } => DiskWork::Write { at: *at, pieces: pieces.clone() },
                DiskWork::Sync => DiskWork::Sync,
                DiskWork::Discard { at, count } => DiskWork::Discard { at: *at, count: *count },
                DiskWork::Prepare { at, count } => DiskWork::Prepare { at: *at, count: *count },
            };
            Some(InFlight { id: flight.id, work, mark: flight.mark })
        };
        let forked = State {
            medium: state.medium.clone(),
            allocated: state.allocated.clone(),
            in_flight: state.in_flight.iter().filter_map(copy).collect(),
            ended: Vec::new(),
            faults: state.faults.clone(),
            alarm: None,
            generation: state.generation + 1,
            submits_left: None,
            stopped: false,
            ..*state
        };
        Self { state: Rc::new(RefCell::new(forked)), generation: state.generation }
    }

    /// Reads that touch these blocks fail with `EIO`, so many times or (`None`) for ever.
    pub fn fail_read(&self, blocks: Range<DiskBlock>, times: Option<u32>) {
        let blocks = blocks.start.get()..blocks.end.get();
        self.state().faults.bad_reads.push(BadRange { blocks, left: times });
    }

    /// Writes that touch these blocks fail with `EIO`, so many times or (`None`) for ever, and may have happened in part.
    pub fn fail_write(&self, blocks: Range<DiskBlock>, times: Option<u32>) {
        let blocks = blocks.start.get()..blocks.end.get();
        self.state().faults.bad_writes.push(BadRange { blocks, left: times });
    }

    /// The next sync to complete fails with `EIO`. What it covered stays at the mercy of the next loss of power, whatever is
    /// synced later.
    pub fn fail_next_sync(&self) {
        self.state().faults.sync = true;
    }

    /// The next prepare to complete fails with `ENOSPC`.
    pub fn fail_next_prepare(&self) {
        self.state().faults.prepare = true;
    }

    /// The next write to complete goes elsewhere, and says that all is well.
    pub fn misdirect_next_write(&self, to: DiskBlock) {
        self.state().faults.misdirect = Some(to.get());
    }

    /// The next write to complete says that all is well, and never happens.
    pub fn lose_next_write(&self) {
        self.state().faults.lose = true;
    }

    /// The next write to complete stops somewhere, and fails.
    pub fn short_next_write(&self) {
        self.state().faults.short = true;
    }

    /// Takes back all faults that have not struck yet. Damaged blocks stay damaged.
    pub fn heal(&self) {
        self.state().faults = Faults::default();
    }

    /// Flips a bit of a block (0 is the lowest of the first byte), for good.
    pub fn flip_bit(&self, block: DiskBlock, bit: usize) {
        self.state().medium.damage(block.get(), |bytes| bytes[bit / 8 % BLOCK] ^= 1 << (bit % 8));
    }

    /// Puts other bytes in a block, for good; those beyond a block's length are ignored.
    pub fn overwrite(&self, block: DiskBlock, new: &[u8]) {
        self.state().medium.damage(block.get(), |bytes| bytes.iter_mut().zip(new).for_each(|(byte, new)| *byte = *new));
    }

    /// Puts a block back to what was stable before the sync that changed it last. `false` if none has, or it was put back
    /// already.
    pub fn stale(&self, block: DiskBlock) -> bool {
        self.state().medium.revert(block.get())
    }

    /// What a block holds now.
    #[must_use]
    pub fn content(&self, block: DiskBlock) -> Box<[u8; BLOCK]> {
        Box::new(Bytes::clone(&self.state().medium.content(block.get())))
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> DiskCounters {
        self.state().counters
    }

    /// Moves the clock.
    pub fn advance(&self, by: Duration) {
        self.state().clock += by;
    }

    /// When the alarm goes off, as of `now` of the live handle. A `reap` at or after that time takes it off.
    #[must_use]
    pub fn alarm(&self) -> Option<Duration> {
        self.state().alarm
    }
}

impl Disk for SimulatedDisk {
    fn blocks(&self) -> u64 {
        self.state().blocks
    }

    fn preparable(&self) -> io::Result<Option<u64>> {
        Ok(self.state().room)
    }

    fn wants_discards(&self) -> bool {
        self.state().discards
    }

    fn submit(&mut self, request: DiskRequest) {
        if let Some(mut state) = self.live() {
            state.submit(request);
        }
    }

    fn reap(&mut self, done: &mut Vec<DiskDone>) {
        if let Some(mut state) = self.live() {
            let now = state.clock.saturating_sub(state.opened_at);
            state.alarm = state.alarm.filter(|at| *at > now);
            if !state.manual {
                state.complete_all();
            }
            done.append(&mut state.ended);
        }
    }

    /// # Errors
    /// `BrokenPipe` when this handle is dead or the disk has stopped: nothing will ever end.
    fn wait(&mut self) -> io::Result<()> {
        let Some(mut state) = self.live() else { return Err(io::ErrorKind::BrokenPipe.into()) };
        if state.ended.is_empty() && !state.in_flight.is_empty() {
            if !state.manual || state.dice.below(4) == 0 {
                state.complete_all();
            } else {
                state.complete_any();
            }
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        let state = self.state();
        state.clock.saturating_sub(state.opened_at)
    }

    fn set_alarm(&mut self, at: Option<Duration>) {
        if let Some(mut state) = self.live() {
            state.alarm = at;
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests;
