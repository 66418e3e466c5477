//! One replica of a [`super::MemoryStore`]: its blocks, what a loss of power could bring back, and its operations in flight.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;

use crate::buffer::{BufferPool, SharedBuffer};
use crate::checksum::{Checksum, block_checksum, zero_block_checksums};
use crate::store::{Content, LoggedExtents, OpenedReplica, Operation, Outcome, ReadData, ReplicaSpec, ReplicaState, StoreError, Token};
use crate::units::{BLOCK_SIZE, BlockIndex, Extent, Seq, Term, VolumeId};

use super::{Dice, PowerLoss};

#[derive(Clone, Debug)]
struct Block {
    checksum: Checksum,
    data: Arc<[u8]>,
}

#[derive(Debug)]
struct Pending {
    token: Token,
    operation: Operation,
}

/// Invariants: `durable <= position`; `unsynced` names every block that differs from stable media; `log` holds every logged
/// write above `log_floor`.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) spec: ReplicaSpec,
    state: ReplicaState,
    position: Seq,
    durable: Seq,
    /// A block that is not here is a hole.
    blocks: BTreeMap<u64, Block>,
    /// The values that a block had since the last sync but for its present one, the oldest (the one on stable media) first.
    unsynced: BTreeMap<u64, Vec<Option<Block>>>,
    log: BTreeMap<Seq, Extent>,
    /// Writes up to this are not in the log. `None` after a loss of power: what was logged is not known.
    log_floor: Option<Seq>,
    log_capacity: usize,
    pub(super) fail_sync: bool,
    pub(super) fail_write: bool,
    poisoned: bool,
    write_failed: bool,
    pending: VecDeque<Pending>,
}

fn refused(action: &'static str) -> StoreError {
    StoreError::Io { action, path: PathBuf::from("memory"), source: io::Error::other("made to fail by the test") }
}

impl Replica {
    pub(super) fn new(spec: ReplicaSpec, log_capacity: usize) -> Self {
        Self {
            spec,
            state: ReplicaState { promised: Term::ZERO, log_term: Term::ZERO, content: Content::Complete },
            position: Seq::ZERO,
            durable: Seq::ZERO,
            blocks: BTreeMap::new(),
            unsynced: BTreeMap::new(),
            log: BTreeMap::new(),
            log_floor: Some(Seq::ZERO),
            log_capacity,
            fail_sync: false,
            fail_write: false,
            poisoned: false,
            write_failed: false,
            pending: VecDeque::new(),
        }
    }

    pub(super) fn opened(&self) -> OpenedReplica {
        OpenedReplica { spec: self.spec, state: self.state, position: self.position, durable: self.durable }
    }

    pub(super) fn apply(&mut self, volume: VolumeId, operation: Operation, pool: &BufferPool) -> Result<Outcome, StoreError> {
        if self.poisoned {
            return Err(StoreError::Poisoned(volume));
        }
        if let Some(reason) = operation.misuse(self.spec.size) {
            return Err(StoreError::Misuse { volume, reason });
        }
        match operation {
            Operation::Write { seq, extent, .. } | Operation::WriteZeroes { seq, extent } => {
                self.begin_write(seq, extent)?;
                let blocks = if std::mem::take(&mut self.fail_write) {
                    self.write_failed = true;
                    extent.block_count() / 2
                } else {
                    extent.block_count()
                };
                for index in 0..blocks {
                    self.put(&operation, index);
                }
                if self.write_failed {
                    return Err(refused("write"));
                }
                self.position = seq.unwrap_or(self.position);
                Ok(Outcome::Written)
            }
            Operation::Read { extent, .. } => self.read(extent, pool).map(Outcome::Read),
            Operation::Sync => self.sync(self.position).map(|()| Outcome::Synced { durable: self.durable }),
            Operation::SetState { state, position } => {
                self.sync(position.unwrap_or(self.position))?;
                self.state = state;
                if let Some(position) = position {
                    self.position = position;
                    self.log.clear();
                    self.log_floor = Some(position);
                }
                Ok(Outcome::StateSet)
            }
            Operation::LoggedAfter { after } => Ok(Outcome::Logged(self.logged_after(after))),
            _ => Err(StoreError::Misuse { volume, reason: "the memory store can't do that yet" }),
        }
    }

    /// Checks that a write may come now, and logs it.
    fn begin_write(&mut self, seq: Option<Seq>, extent: Extent) -> Result<(), StoreError> {
        if self.write_failed {
            return Err(StoreError::Poisoned(self.spec.volume));
        }
        let Some(seq) = seq else { return Ok(()) };
        if seq != self.position.next() {
            return Err(StoreError::Misuse { volume: self.spec.volume, reason: "a write's sequence does not follow the position" });
        }
        self.log.insert(seq, extent);
        while self.log.len() > self.log_capacity {
            let forgotten = self.log.pop_first().map(|(seq, _)| seq);
            self.log_floor = self.log_floor.and(forgotten);
        }
        Ok(())
    }

    /// Puts the `index`-th block of a write.
    fn put(&mut self, operation: &Operation, index: u64) {
        let (extent, new) = match operation {
            Operation::Write { extent, checksums, data, .. } => {
                let size = BLOCK_SIZE as usize;
                let start = usize::try_from(index).unwrap_or(usize::MAX);
                let new = checksums
                    .get(start)
                    .zip(data.chunks_exact(size).nth(start))
                    .map(|(checksum, data)| Block { checksum: *checksum, data: data.into() });
                (extent, new)
            }
            Operation::WriteZeroes { extent, .. } => (extent, None),
            _ => return,
        };
        let block = extent.first_block().get() + index;
        let hole_before = !self.blocks.contains_key(&block);
        if hole_before && new.is_none() {
            return;
        }
        let old = match new {
            Some(new) => self.blocks.insert(block, new),
            None => self.blocks.remove(&block),
        };
        self.unsynced.entry(block).or_default().push(old);
    }

    fn read(&self, extent: Extent, pool: &BufferPool) -> Result<ReadData, StoreError> {
        let volume = self.spec.volume;
        let first = extent.first_block().get();
        let range = first..first + extent.block_count();
        if self.blocks.range(range.clone()).next().is_none() {
            return Ok(ReadData::Zeroes);
        }
        let mut buffer = pool.take(usize::try_from(extent.length().get()).unwrap_or(0));
        let mut checksums: Vec<Checksum> = zero_block_checksums(volume, BlockIndex::new(first), extent.block_count()).collect();
        let places = range.zip(buffer.chunks_exact_mut(BLOCK_SIZE as usize).zip(&mut checksums));
        for (index, (place, checksum)) in places {
            let Some(block) = self.blocks.get(&index) else {
                place.fill(0);
                continue;
            };
            let (index, expected) = (BlockIndex::new(index), block.checksum);
            let got = block_checksum(volume, index, &block.data);
            if got != expected {
                return Err(StoreError::Corrupt { volume, block: index, expected, got });
            }
            place.copy_from_slice(&block.data);
            *checksum = expected;
        }
        let data: SharedBuffer = buffer.share();
        Ok(ReadData::Blocks { checksums, data })
    }

    fn sync(&mut self, durable: Seq) -> Result<(), StoreError> {
        if std::mem::take(&mut self.fail_sync) {
            self.poisoned = true;
            return Err(refused("sync"));
        }
        self.unsynced.clear();
        self.durable = durable;
        Ok(())
    }

    fn logged_after(&self, after: Seq) -> LoggedExtents {
        if self.log_floor.is_none_or(|floor| after < floor) {
            return LoggedExtents::Forgotten;
        }
        let extents = self.log.range((Bound::Excluded(after), Bound::Unbounded)).map(|(_, extent)| *extent);
        LoggedExtents::All(extents.filter(|extent| !extent.is_empty()).collect())
    }

    pub(super) fn corrupt(&mut self, block: BlockIndex) -> bool {
        let Some(block) = self.blocks.get_mut(&block.get()) else { return false };
        let mut data = block.data.to_vec();
        if let Some(byte) = data.first_mut() {
            *byte ^= 1;
        }
        block.data = data.into();
        true
    }

    // Operations in flight.

    pub(super) fn queue(&mut self, token: Token, operation: Operation) {
        self.pending.push_back(Pending { token, operation });
    }

    pub(super) fn pending_tokens(&self) -> impl Iterator<Item = Token> {
        self.pending.iter().map(|pending| pending.token)
    }

    pub(super) fn pending_token(&self, index: usize) -> Token {
        self.pending.get(index).map_or(Token(0), |pending| pending.token)
    }

    /// The operations in flight that wait for no earlier one.
    pub(super) fn ready(&self) -> impl Iterator<Item = usize> {
        let waits = |(index, later): &(usize, &Pending)| {
            self.pending.iter().take(*index).any(|earlier| must_follow(&earlier.operation, &later.operation))
        };
        self.pending.iter().enumerate().filter(move |candidate| !waits(candidate)).map(|(index, _)| index)
    }

    pub(super) fn finish(&mut self, index: usize, volume: VolumeId, pool: &BufferPool) -> Option<crate::store::Completion> {
        let Pending { token, operation } = self.pending.remove(index)?;
        let result = self.apply(volume, operation, pool);
        Some(crate::store::Completion { volume, token, result })
    }

    // Crashes.

    pub(super) fn crash(&mut self, volume: VolumeId, power_loss: PowerLoss, dice: &mut Dice, pool: &BufferPool) {
        let whole = dice.below(self.pending.len() + 1);
        for Pending { operation, .. } in self.pending.drain(..whole).collect::<Vec<_>>() {
            // Its answer reached nobody.
            drop(self.apply(volume, operation, pool));
        }
        if let Some(Pending { operation, .. }) = self.pending.pop_front() {
            self.apply_in_part(&operation, dice);
        }
        self.pending.clear();
        if power_loss == PowerLoss::Yes || self.poisoned {
            self.lose_power(dice);
        }
        (self.poisoned, self.write_failed, self.fail_sync, self.fail_write) = (false, false, false, false);
    }

    fn apply_in_part(&mut self, operation: &Operation, dice: &mut Dice) {
        let (Operation::Write { seq, extent, .. } | Operation::WriteZeroes { seq, extent }) = operation else { return };
        if self.poisoned || operation.misuse(self.spec.size).is_some() || self.begin_write(*seq, *extent).is_err() {
            return;
        }
        for index in 0..extent.block_count() {
            if dice.below(2) == 1 {
                self.put(operation, index);
            }
        }
    }

    fn lose_power(&mut self, dice: &mut Dice) {
        if self.unsynced.is_empty() && self.position == self.durable && !self.poisoned {
            return;
        }
        for (block, mut values) in std::mem::take(&mut self.unsynced) {
            let found = dice.below(values.len() + 1);
            if found < values.len() {
                match values.swap_remove(found) {
                    Some(value) => self.blocks.insert(block, value),
                    None => self.blocks.remove(&block),
                };
            }
        }
        self.position = self.durable;
        if self.state.content == Content::Complete {
            self.state.content = Content::Mixed;
        }
        self.log.clear();
        self.log_floor = None;
    }
}

/// Whether `later` must take effect after `earlier`, by the contract of [`crate::ReplicaStore`].
fn must_follow(earlier: &Operation, later: &Operation) -> bool {
    use Operation::{LoggedAfter, Read, SetState, Sync, Write, WriteZeroes};
    match (earlier, later) {
        (
            Write { seq: a, extent: x, .. } | WriteZeroes { seq: a, extent: x },
            Write { seq: b, extent: y, .. } | WriteZeroes { seq: b, extent: y },
        ) => (a.is_some() && b.is_some()) || x.overlaps(*y),
        (Write { extent: x, .. } | WriteZeroes { extent: x, .. }, Read { extent: y, .. })
        | (Read { extent: x, .. }, Write { extent: y, .. } | WriteZeroes { extent: y, .. }) => x.overlaps(*y),
        (Read { .. } | Sync, _) | (_, Read { .. } | Sync) => false,
        // The log, the position and the state are one thing: what changes or reads them goes in order.
        (Write { .. } | WriteZeroes { .. } | SetState { .. } | LoggedAfter { .. }, SetState { .. } | LoggedAfter { .. })
        | (SetState { .. } | LoggedAfter { .. }, Write { .. } | WriteZeroes { .. }) => true,
        _ => false,
    }
}
