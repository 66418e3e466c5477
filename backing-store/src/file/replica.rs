//! One replica in service: its file, its position and its durable state.
//!
//! Locks: `slot` before `progress` before `known`. `slot` is held over a sync and the slot that follows from it, so that of two syncs at the same
//! time none can take the other's error for its own success, and slots have one writer.
//!
//! Invariants: what `progress` says has been written to the file before anybody is told; the first failed sync or slot write sets
//! `poisoned`, the first failed write `write_failed`, and neither is ever taken back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::buffer::BufferPool;
use crate::store::{LoggedExtents, OpenedReplica, Operation, ReadData, ReplicaSpec, ReplicaState, StoreError};
use crate::units::{Extent, Seq, VolumeId};

use super::disk::Folder;
use super::format::{Applied, BootId, StateSlot};
use super::order::Order;
use super::recovery::{self, Recovered};
use super::replica_file::{Patience, Payload, ReplicaFile};

/// A mutex is only poisoned by a panic, which ends the process.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    adoption: u64,
    base: Seq,
    log_lost: bool,
    position: Seq,
    last_logged: Seq,
}

/// A `Write` or `WriteZeroes`, taken apart.
#[derive(Debug)]
pub(super) struct BlockWrite<'a> {
    pub(super) seq: Option<Seq>,
    pub(super) extent: Extent,
    pub(super) payload: Payload<'a>,
}

impl<'a> BlockWrite<'a> {
    /// `None` for other operations.
    pub(super) fn of(operation: &'a Operation) -> Option<Self> {
        match operation {
            Operation::Write { seq, extent, checksums, data } => {
                Some(Self { seq: *seq, extent: *extent, payload: Payload::Blocks { checksums, data } })
            }
            Operation::WriteZeroes { seq, extent } => Some(Self { seq: *seq, extent: *extent, payload: Payload::Zeroes }),
            _ => None,
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Replica {
    file: ReplicaFile,
    pub(super) order: Order,
    slot: Mutex<StateSlot>,
    progress: Mutex<Progress>,
    /// What was last completed, for those who must not wait for the device as the holders of the other locks do.
    known: Mutex<OpenedReplica>,
    poisoned: AtomicBool,
    write_failed: AtomicBool,
}

impl Replica {
    pub(super) fn new(file: ReplicaFile, recovered: &Recovered) -> Self {
        let Recovered { slot, position, last_logged } = *recovered;
        let progress = Progress { adoption: slot.adoption, base: slot.base, log_lost: slot.log_lost, position, last_logged };
        let known = OpenedReplica { spec: file.spec(), state: slot.state, position, durable: slot.durable };
        Self {
            file,
            order: Order::default(),
            slot: Mutex::new(slot),
            progress: Mutex::new(progress),
            known: Mutex::new(known),
            poisoned: AtomicBool::new(false),
            write_failed: AtomicBool::new(false),
        }
    }

    pub(super) fn open(folder: &dyn Folder, name: &str, volume: VolumeId, boot: BootId) -> Result<Self, StoreError> {
        let file = ReplicaFile::open(folder, name, volume)?;
        let recovered = recovery::recover(&file, boot)?;
        Ok(Self::new(file, &recovered))
    }

    pub(super) fn spec(&self) -> ReplicaSpec {
        self.file.spec()
    }

    pub(super) fn reserved(&self) -> u64 {
        self.file.layout().file_length().get()
    }

    pub(super) fn opened(&self) -> OpenedReplica {
        *lock(&self.known)
    }

    /// How many writes may be logged before the applied record follows them: half of the log, so that a restart finds all.
    pub(super) fn run_max(&self) -> usize {
        usize::try_from(self.file.layout().log_records() / 2).unwrap_or(usize::MAX).max(1)
    }

    fn poisoned_error(&self) -> StoreError {
        StoreError::Poisoned(self.spec().volume)
    }

    /// Refuses everything after a failed sync.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        if self.poisoned.load(Ordering::Acquire) { Err(self.poisoned_error()) } else { Ok(()) }
    }

    /// Latches a failure of stable media, and tells the next process that this page cache is not to be believed.
    fn poison(&self, error: StoreError) -> StoreError {
        self.poisoned.store(true, Ordering::Release);
        tracing::error!(volume = %self.spec().volume, %error, "stable media failed; the replica takes no more work");
        let progress = lock(&self.progress);
        // Without a sync, because there is nothing left to trust; should it fail as well, this was all that could be done.
        drop(self.write_applied(&progress));
        error
    }

    fn write_applied(&self, progress: &Progress) -> Result<(), StoreError> {
        let suspect = self.poisoned.load(Ordering::Acquire);
        self.file.write_applied(Applied { adoption: progress.adoption, position: progress.position, suspect })
    }

    // The writer thread's part.

    /// Applies writes in order, and returns as many results.
    pub(super) fn write(&self, writes: &[BlockWrite<'_>]) -> Vec<Result<(), StoreError>> {
        if self.check().is_err() || self.write_failed.load(Ordering::Acquire) {
            return writes.iter().map(|_| Err(self.poisoned_error())).collect();
        }
        // Only this thread moves the position, so it stays what it is here.
        let Progress { adoption, position: start, .. } = *lock(&self.progress);
        let mut position = start;
        let mut logged = Vec::with_capacity(writes.len());
        let mut results: Vec<Result<(), StoreError>> = Vec::with_capacity(writes.len());
        for write in writes {
            let follows = write.seq.is_none_or(|seq| seq == position.next());
            results.push(if follows { Ok(()) } else { Err(self.gap()) });
            if let Some(seq) = write.seq.filter(|_| follows) {
                position = seq;
                logged.push(write.extent);
            }
        }
        if let Err(error) = self.log(adoption, start, &logged) {
            return self.fail_rest(results, 0, error);
        }
        let mut applied = start;
        for (index, write) in writes.iter().enumerate() {
            if results[index].is_err() {
                continue;
            }
            if let Err(error) = self.file.put(write.extent, &write.payload, write.seq.is_some()) {
                // What came before it did happen.
                return match self.advance(start, applied) {
                    Ok(()) => self.fail_rest(results, index, error),
                    Err(_) => self.fail_rest(results, 0, error),
                };
            }
            applied = write.seq.unwrap_or(applied);
        }
        match self.advance(start, applied) {
            Ok(()) => results,
            Err(error) => self.fail_rest(results, 0, error),
        }
    }

    fn gap(&self) -> StoreError {
        StoreError::Misuse { volume: self.spec().volume, reason: "a write's sequence does not follow the position" }
    }

    fn log(&self, adoption: u64, start: Seq, extents: &[Extent]) -> Result<(), StoreError> {
        if extents.is_empty() {
            return Ok(());
        }
        let mut progress = lock(&self.progress);
        // Counted even if it fails: some of the records may be there.
        progress.last_logged = progress.last_logged.max(Seq::new(start.get() + extents.len() as u64));
        drop(progress);
        self.file.log(adoption, start.next(), extents)
    }

    fn advance(&self, from: Seq, to: Seq) -> Result<(), StoreError> {
        if from == to {
            return Ok(());
        }
        let mut progress = lock(&self.progress);
        self.write_applied(&Progress { position: to, ..*progress })?;
        progress.position = to;
        lock(&self.known).position = to;
        Ok(())
    }

    /// The write at `index` failed and those after it were not tried.
    fn fail_rest(&self, mut results: Vec<Result<(), StoreError>>, index: usize, error: StoreError) -> Vec<Result<(), StoreError>> {
        self.write_failed.store(true, Ordering::Release);
        tracing::error!(volume = %self.spec().volume, %error, "a write failed; the replica takes no more writes");
        let mut error = Some(error);
        for result in results.iter_mut().skip(index).filter(|result| result.is_ok()) {
            *result = Err(error.take().unwrap_or_else(|| self.poisoned_error()));
        }
        results
    }

    /// Puts everything on stable media, then the new state.
    pub(super) fn set_state(&self, state: ReplicaState, position: Option<Seq>) -> Result<(), StoreError> {
        let mut slot = lock(&self.slot);
        self.check()?;
        self.file.sync().map_err(|error| self.poison(error))?;
        let mut progress = *lock(&self.progress);
        if let Some(position) = position {
            let adoption = progress.adoption + 1;
            progress = Progress { adoption, base: position, log_lost: false, position, last_logged: position };
        }
        let next = StateSlot {
            state,
            durable: progress.position,
            adoption: progress.adoption,
            base: progress.base,
            log_lost: progress.log_lost,
            ..*slot
        };
        // Twice, so that damage to one slot later can't bring an older promise back.
        self.put_slot(&mut slot, next)?;
        self.put_slot(&mut slot, next)?;
        *lock(&self.progress) = progress;
        *lock(&self.known) = OpenedReplica { spec: self.spec(), state, position: progress.position, durable: progress.position };
        Ok(())
    }

    fn put_slot(&self, slot: &mut StateSlot, next: StateSlot) -> Result<(), StoreError> {
        let next = StateSlot { generation: slot.generation + 1, ..next };
        self.file.write_slot(&next).map_err(|error| self.poison(error))?;
        *slot = next;
        Ok(())
    }

    /// What was logged after a write.
    pub(super) fn logged_after(&self, after: Seq) -> Result<LoggedExtents, StoreError> {
        self.check()?;
        let Progress { adoption, base, log_lost, last_logged, .. } = *lock(&self.progress);
        let reach = last_logged.get().saturating_sub(self.file.layout().log_records());
        if log_lost || after < base || after.get() < reach {
            return Ok(LoggedExtents::Forgotten);
        }
        let mut extents = Vec::new();
        let mut seq = after;
        while seq < last_logged {
            for found in self.file.logged(adoption, seq.next(), last_logged)? {
                seq = seq.next();
                match found {
                    Some(extent) if extent.is_empty() => {}
                    Some(extent) => extents.push(extent),
                    None => {
                        tracing::warn!(volume = %self.spec().volume, %seq, "the log misses a record");
                        return Ok(LoggedExtents::Forgotten);
                    }
                }
            }
        }
        Ok(LoggedExtents::All(extents))
    }

    // The other threads' parts.

    /// Puts everything completed before on stable media, and returns the durable position.
    pub(super) fn sync(&self) -> Result<Seq, StoreError> {
        let mut slot = lock(&self.slot);
        self.check()?;
        let position = lock(&self.progress).position;
        self.file.sync().map_err(|error| self.poison(error))?;
        // The writer may have gone on, but it can't have set the position: that takes the lock held here.
        if position > slot.durable {
            let next = StateSlot { durable: position, ..*slot };
            self.put_slot(&mut slot, next)?;
            lock(&self.known).durable = position;
        }
        Ok(slot.durable)
    }

    /// Reads and verifies. `None` if that would take patience.
    pub(super) fn read(&self, extent: Extent, pool: &BufferPool, patience: Patience) -> Result<Option<ReadData>, StoreError> {
        self.check()?;
        self.file.read_blocks(extent, pool, patience)
    }

    /// Leaves the file so that the next start has nothing to look for. Nothing else may run any more.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        self.check()?;
        if self.write_failed.load(Ordering::Acquire) {
            // Blocks are in doubt: let the next start settle them.
            return Err(self.poisoned_error());
        }
        self.sync()?;
        let mut slot = lock(&self.slot);
        let next = StateSlot { clean: true, ..*slot };
        self.put_slot(&mut slot, next)
    }
}
