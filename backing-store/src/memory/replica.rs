//! One replica of a [`super::MemoryStore`]: its blocks, what a loss of power could bring back, and its operations in flight.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::{Bound, Range};
use std::path::PathBuf;
use std::sync::Arc;

use crate::buffer::{BufferPool, SharedBuffer};
use crate::checksum::{Checksum, Checksums, Digest, block_checksum, zero_block_checksums};
use crate::store::{
    Content, LoggedExtents, OpenedReplica, Operation, Outcome, ReadData, ReplicaSpec, ReplicaState, StoreError, Synced, Token,
};
use crate::units::{BLOCK_SIZE, BlockIndex, Epoch, Extent, Seq, SnapshotId, Term, VolumeId};

use super::order::must_follow;
use super::runs::Runs;
use super::snapshots::Snapshot;
use super::{Dice, PowerLoss};

#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) checksum: Checksum,
    pub(super) data: Arc<[u8]>,
}

/// What was last written to a block.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) epoch: Epoch,
    /// `None` for zeros.
    pub(super) block: Option<Block>,
}

/// Zeros in part are decided in so many parts at most.
const ZEROES_PARTS: u64 = 512;

#[derive(Clone, Debug)]
struct Pending {
    token: Token,
    operation: Operation,
}

/// Invariants: `durable <= position`; `unsynced` names every block that differs from stable media; `log` holds every logged
/// write above `log_floor`; a run of data is one block.
#[derive(Clone, Debug)]
pub(super) struct Replica {
    pub(super) spec: ReplicaSpec,
    pub(super) state: ReplicaState,
    pub(super) position: Seq,
    durable: Seq,
    /// What writes carry now.
    pub(super) epoch: Epoch,
    /// A block that is not here is a hole.
    pub(super) blocks: Runs<Value>,
    /// The values that a block had since the last sync but for its present one, the oldest (the one on stable media) first.
    unsynced: Runs<Vec<Option<Value>>>,
    /// Oldest first.
    pub(super) snapshots: Vec<Snapshot>,
    /// The reverts: the epoch of the snapshot, and what the epoch was raised to. Blocks do not show what went back with them, so
    /// nobody can tell what changed since an epoch between the two.
    pub(super) reverts: Vec<(Epoch, Epoch)>,
    /// What it is a clone of.
    pub(super) origin: Option<(VolumeId, SnapshotId)>,
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
            state: ReplicaState { promised: Term::ZERO, log_term: Term::ZERO, content: Content::Complete, synced: Synced::default() },
            position: Seq::ZERO,
            durable: Seq::ZERO,
            epoch: Epoch::FIRST,
            blocks: Runs::default(),
            unsynced: Runs::default(),
            snapshots: Vec::new(),
            reverts: Vec::new(),
            origin: None,
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
        OpenedReplica { spec: self.spec, state: self.state, position: self.position, durable: self.durable, epoch: self.epoch }
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
                self.put(&operation, 0..blocks);
                if self.write_failed {
                    return Err(refused("write"));
                }
                self.position = seq.unwrap_or(self.position);
                Ok(Outcome::Written)
            }
            Operation::Read { extent, snapshot } => self.read(extent, snapshot, pool).map(Outcome::Read),
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
            Operation::RaiseEpoch { to, synced } => self.raise_epoch(to, synced).map(Outcome::Epoch),
            Operation::Snapshot { snapshot } => self.make_snapshot(snapshot).map(Outcome::Epoch),
            Operation::DeleteSnapshot { snapshot } => self.delete_snapshot(snapshot).map(|()| Outcome::Done),
            Operation::Revert { snapshot } => self.revert(snapshot).map(Outcome::Epoch),
            Operation::Expand { size } => self.expand(size).map(|()| Outcome::Done),
            Operation::Changed { from, snapshot, start } => self.changed(from, snapshot, start).map(Outcome::Changed),
            Operation::Digest { extent } => Ok(Outcome::Digest(self.digest(extent))),
            Operation::Scrub { start, blocks } => Ok(Outcome::Scrubbed(self.scrub(start, blocks))),
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

    /// Puts these blocks of a write, counted from its first.
    fn put(&mut self, operation: &Operation, indices: Range<u64>) {
        match operation {
            Operation::Write { extent, checksums, data, .. } => {
                let first = extent.first_block().get();
                let blocks = (0..).zip(checksums.iter().zip(data.chunks_exact(BLOCK_SIZE as usize)));
                for (index, (checksum, data)) in blocks.filter(|(index, _)| indices.contains(index)) {
                    let block = Block { checksum: *checksum, data: data.into() };
                    self.put_run(first + index..first + index + 1, Some(block));
                }
            }
            Operation::WriteZeroes { extent, .. } => {
                let first = extent.first_block().get();
                self.put_run(first + indices.start..first + indices.end, None);
            }
            _ => {}
        }
    }

    fn put_run(&mut self, run: Range<u64>, block: Option<Block>) {
        for (piece, old) in self.blocks.pieces(run.clone()) {
            for (part, values) in self.unsynced.pieces(piece) {
                let mut values = values.unwrap_or_default();
                values.push(old.clone());
                self.unsynced.set(part, Some(values));
            }
        }
        self.blocks.set(run, Some(Value { epoch: self.epoch, block }));
    }

    fn read(&self, extent: Extent, snapshot: Option<SnapshotId>, pool: &BufferPool) -> Result<ReadData, StoreError> {
        let volume = self.spec.volume;
        let (blocks, size) = self.view(snapshot)?;
        if !size.extent().contains(extent) {
            return Err(StoreError::Misuse { volume, reason: "an extent reaches past the end of the snapshot" });
        }
        let first = extent.first_block().get();
        let data = blocks.over(first..first + extent.block_count()).filter_map(|(run, value)| Some((run.start, value.block.as_ref()?)));
        let mut data = data.peekable();
        if data.peek().is_none() {
            return Ok(ReadData::Zeroes);
        }
        let mut buffer = pool.take(usize::try_from(extent.length().get()).unwrap_or(0));
        buffer.fill(0);
        let mut checksums: Checksums = zero_block_checksums(volume, BlockIndex::new(first), extent.block_count()).collect();
        let mut places = (first..).zip(buffer.chunks_exact_mut(BLOCK_SIZE as usize).zip(&mut checksums));
        for (index, block) in data {
            let expected = block.checksum;
            let got = block_checksum(volume, BlockIndex::new(index), &block.data);
            if got != expected {
                return Err(StoreError::Corrupt { volume, block: BlockIndex::new(index), expected, got });
            }
            if let Some((_, (place, checksum))) = places.find(|(place, _)| *place == index) {
                place.copy_from_slice(&block.data);
                *checksum = expected;
            }
        }
        let data: SharedBuffer = buffer.share();
        Ok(ReadData::Blocks { checksums, data })
    }

    fn digest(&self, extent: Extent) -> Digest {
        let first = extent.first_block().get();
        let mut digest = Digest::default();
        for (run, value) in self.blocks.over(first..first + extent.block_count()) {
            if let Some(block) = &value.block {
                run.for_each(|index| digest.add(self.spec.volume, BlockIndex::new(index), block.checksum));
            }
        }
        digest
    }

    pub(super) fn sync(&mut self, durable: Seq) -> Result<(), StoreError> {
        if std::mem::take(&mut self.fail_sync) {
            self.poisoned = true;
            return Err(refused("sync"));
        }
        self.unsynced = Runs::default();
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
        let run = block.get()..block.get() + 1;
        let Some((Some(found), epoch)) = self.blocks.over(run.clone()).next().map(|(_, value)| (value.block.clone(), value.epoch)) else {
            return false;
        };
        let mut data = found.data.to_vec();
        if let Some(byte) = data.first_mut() {
            *byte ^= 1;
        }
        self.blocks.set(run, Some(Value { epoch, block: Some(Block { data: data.into(), ..found }) }));
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
        let whole = dice.index(self.pending.len() + 1);
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
        let count = extent.block_count();
        let part = if matches!(operation, Operation::WriteZeroes { .. }) { count.div_ceil(ZEROES_PARTS).max(1) } else { 1 };
        let mut first = 0;
        while first < count {
            let last = (first + part).min(count);
            if dice.coin() {
                self.put(operation, first..last);
            }
            first = last;
        }
    }

    fn lose_power(&mut self, dice: &mut Dice) {
        if self.unsynced.iter().next().is_none() && self.position == self.durable && !self.poisoned {
            return;
        }
        for (run, values) in std::mem::take(&mut self.unsynced).iter() {
            if let Some(value) = values.get(dice.index(values.len() + 1)) {
                self.blocks.set(run, value.clone());
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
