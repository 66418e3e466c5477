//! What a replica's file means after whatever ended the last process.
//!
//! | Found | What ended it | Position | In doubt |
//! |---|---|---|---|
//! | clean flag | a close | the durable one | nothing |
//! | this boot's id, a believable applied record | a kill: the page cache lived on | the applied one | the logged writes after it |
//! | anything else | a loss of power | the durable one | every block |
//!
//! A block in doubt whose bytes and entry disagree holds one side of a write that nobody was told about (or parts of both, as on
//! any disk), so its bytes are believed and summed afresh.

use crate::checksum::block_checksum;
use crate::store::{Content, StoreError};
use crate::units::{BLOCK_SIZE, BlockIndex, Extent, Seq};

use super::format::{Applied, BootId, Entry, PAGE, StateSlot};
use super::replica_file::ReplicaFile;

const BLOCK: usize = BLOCK_SIZE as usize;
/// Blocks looked at in one step: a page of the table and 2 MiB of data.
const STEP: u64 = (PAGE / super::format::ENTRY) as u64;

/// A replica's file, ready to be served.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) slot: StateSlot,
    pub(super) position: Seq,
    /// The highest write in the log, applied or not.
    pub(super) last_logged: Seq,
}

/// Puts a file in order after the end of the last process, whatever it was, and records the boot under which it is open now,
/// durably. Interrupted at any point it does the same again next time: the slots are written last.
pub(super) fn recover(file: &ReplicaFile, boot: BootId) -> Result<Recovered, StoreError> {
    let slot = file.read_slot()?;
    let killed_at = file.read_applied()?.and_then(|applied| position_after_kill(&slot, applied, boot));
    let (mut slot, position, last_logged) = match killed_at {
        _ if slot.clean => (slot, slot.durable, last_logged(file, &slot, slot.durable)?),
        Some(position) => {
            let last_logged = last_logged(file, &slot, position)?;
            settle_logged(file, &slot, position, last_logged)?;
            (slot, position, last_logged)
        }
        None => (lose_power(file, &slot)?, slot.durable, slot.durable),
    };
    slot.clean = false;
    slot.boot = boot;
    if let Err(error) = take_over(file, &mut slot) {
        // The page cache may have lost what an earlier write put there: the next start must not trust it. This mark needs no sync,
        // because it matters only while the page cache lives.
        drop(file.write_applied(Applied { adoption: slot.adoption, position, suspect: true }));
        return Err(error);
    }
    file.write_applied(Applied { adoption: slot.adoption, position, suspect: false })?;
    Ok(Recovered { slot, position, last_logged })
}

fn take_over(file: &ReplicaFile, slot: &mut StateSlot) -> Result<(), StoreError> {
    // The slot that was found may be in the page cache only, if a kill met its writer before the device had it. It must be on
    // stable media before the other one is overwritten: else a loss of power now could leave neither.
    file.sync()?;
    // Both slots, so that damage to one of them can neither bring the clean flag back nor a promise down.
    for _ in 0..2 {
        slot.generation += 1;
        file.write_slot(slot)?;
    }
    Ok(())
}

/// The position after a kill. `None` if it was no mere kill.
fn position_after_kill(slot: &StateSlot, applied: Applied, boot: BootId) -> Option<Seq> {
    if slot.boot != boot || applied.suspect || applied.adoption > slot.adoption {
        return None;
    }
    // Killed between setting a position and the first write after it: the record is still of the old log.
    let position = if applied.adoption == slot.adoption { applied.position } else { slot.base };
    (position >= slot.durable).then_some(position)
}

fn last_logged(file: &ReplicaFile, slot: &StateSlot, position: Seq) -> Result<Seq, StoreError> {
    let mut last = position;
    while last.get() - position.get() < file.layout().log_records() {
        match file.logged(slot.adoption, last.next(), last.next())?.as_slice() {
            [Some(_)] => last = last.next(),
            _ => break,
        }
    }
    Ok(last)
}

fn settle_logged(file: &ReplicaFile, slot: &StateSlot, position: Seq, last_logged: Seq) -> Result<(), StoreError> {
    let mut resummed = 0;
    let mut seq = position;
    while seq < last_logged {
        for extent in file.logged(slot.adoption, seq.next(), last_logged)? {
            seq = seq.next();
            resummed += extent.map_or(Ok(0), |extent| settle(file, extent))?;
        }
    }
    if seq > position {
        let (first, last) = (position.next().get(), seq.get());
        tracing::info!(volume = %file.spec().volume, first, last, resummed, "writes were in flight when the last process ended");
    }
    Ok(())
}

/// After a loss of power. Any block may be in doubt, so all are looked at: the limit of this format.
fn lose_power(file: &ReplicaFile, slot: &StateSlot) -> Result<StateSlot, StoreError> {
    let volume = file.spec().volume;
    tracing::warn!(%volume, durable = slot.durable.get(), "power was lost; all blocks are being checked");
    let resummed = settle(file, file.spec().size.extent())?;
    tracing::warn!(%volume, resummed, "blocks that were being written when power was lost have been summed afresh");
    let mut lost = StateSlot { adoption: slot.adoption + 1, base: slot.durable, log_lost: true, ..*slot };
    if lost.state.content == Content::Complete {
        lost.state.content = Content::Mixed;
    }
    Ok(lost)
}

/// Makes entries agree with bytes, and returns how many did not.
fn settle(file: &ReplicaFile, extent: Extent) -> Result<u64, StoreError> {
    let (mut first, end) = (extent.first_block().get(), extent.first_block().get() + extent.block_count());
    let mut data = vec![0; usize::try_from((end - first).min(STEP)).unwrap_or(0) * BLOCK];
    let mut resummed = 0;
    while first < end {
        let count = (end - first).min(STEP);
        resummed += settle_step(file, BlockIndex::new(first), count, &mut data)?;
        first += count;
    }
    Ok(resummed)
}

fn settle_step(file: &ReplicaFile, first: BlockIndex, count: u64, data: &mut [u8]) -> Result<u64, StoreError> {
    let mut entries = file.read_entries(first, usize::try_from(count).unwrap_or(0))?;
    let runs: Vec<_> = entries.runs().collect();
    let mut resummed = 0;
    for (hole, start, length) in runs {
        let place = BlockIndex::new(first.get() + start as u64);
        let end = place.get() + length as u64;
        if hole && file.next_data(place)?.is_none_or(|data| data.get() >= end) {
            continue;
        }
        let bytes = &mut data[..length * BLOCK];
        file.read_raw(place, bytes)?;
        for (index, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
            let index = start + index;
            let block = BlockIndex::new(first.get() + index as u64);
            let sum = block_checksum(file.spec().volume, block, bytes);
            let right = match entries.get(index) {
                Entry::Hole => bytes.iter().all(|byte| *byte == 0),
                Entry::Written(stored) => stored == sum,
                // An entry lies within one sector, so no interrupted write makes it neither old nor new: this is damage, and is
                // to be found by whoever reads the block.
                Entry::Damaged(_) => true,
            };
            if !right {
                entries.set(index, Entry::Written(sum));
                resummed += 1;
            }
        }
    }
    if resummed > 0 {
        file.write_entries(first, &entries)?;
    }
    Ok(resummed)
}
