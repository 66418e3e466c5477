//! Group commit: records gather in a batch while earlier batches are being written; acknowledgements follow the batches, flushes
//! share syncs.

use std::collections::VecDeque;
use std::io;

use super::codec::Writer;
use super::journal::{BatchHead, BatchNumber, body_room, encode_header, header_blocks, header_max, payload_max};
use super::record::{Record, Slot};
use super::superblock::JournalHead;
use super::{EpochMap, OpId, Purpose};
use crate::buffer::{Buffer, SharedBuffer};
use crate::disk::{Disk, DiskWork};
use crate::store::{Outcome, StoreError, Token};
use crate::units::{BLOCK_SIZE, Seq, VolumeId};

/// Batches being written at once: one more than needed to keep the disk busy; more would be smaller ones.
const WRITING_MAX: usize = 2;

/// Records that are not yet written.
#[derive(Debug, Default)]
struct Building {
    body: Writer,
    records: u32,
    payload: Vec<SharedBuffer>,
    payload_blocks: usize,
}

/// A batch that has not been written with everything it speaks of.
#[derive(Debug)]
struct Flying {
    number: BatchNumber,
    outstanding: usize,
    sealed: bool,
}

/// An operation that ends when its batch is done.
#[derive(Debug)]
struct Waiting {
    batch: BatchNumber,
    slot: Slot,
    volume: VolumeId,
    /// What is told then; nothing if that waits for a sync.
    answer: Option<(Token, Outcome)>,
    /// The position that is reached then.
    position: Option<Seq>,
}

#[derive(Debug)]
struct Flush {
    target: BatchNumber,
    slot: Slot,
    volume: VolumeId,
    token: Token,
}

#[derive(Debug)]
struct Syncing {
    covers: BatchNumber,
    positions: Vec<(Slot, Seq)>,
    copied: Vec<BatchNumber>,
}

#[derive(Debug)]
pub(super) struct Journal {
    /// The batch being built.
    pub(super) next: BatchNumber,
    /// Where it goes, unless it doesn't fit before the ring's end.
    offset: u64,
    chain: u32,
    ring: u64,
    used: u64,
    building: Building,
    flying: VecDeque<Flying>,
    writing: usize,
    /// All batches up to this one are written with everything they speak of.
    pub(super) done: BatchNumber,
    /// And on stable media.
    pub(super) synced: BatchNumber,
    /// What the last batch written said was synced.
    said: BatchNumber,
    /// The last batch with records.
    last: BatchNumber,
    syncing: Option<Syncing>,
    begun: u64,
    ended: u64,
    wanted: u64,
    waiting: VecDeque<Waiting>,
    waiting_durable: VecDeque<Waiting>,
    flushes: Vec<Flush>,
}

impl Journal {
    /// Goes on at `head`, with so many blocks of the ring still needed by the last checkpoint. Everything before is on stable media,
    /// but the disk only knows through `said`.
    pub(super) fn new(ring: u64, head: JournalHead, used: u64, said: BatchNumber) -> Self {
        let before = head.batch.previous();
        Self {
            next: head.batch,
            offset: head.offset,
            chain: head.chain,
            ring,
            used,
            building: Building::default(),
            flying: VecDeque::new(),
            writing: 0,
            done: before,
            synced: before,
            said,
            last: before,
            syncing: None,
            begun: 0,
            ended: 0,
            wanted: 0,
            waiting: VecDeque::new(),
            waiting_durable: VecDeque::new(),
            flushes: Vec::new(),
        }
    }

    /// Whether another operation's records surely fit into the ring.
    pub(super) fn has_room(&self) -> bool {
        // The batch being built, the one after it, what a wrap may leave empty, and the blocks that keep full from looking empty.
        let batch = (payload_max(self.ring) + header_max(self.ring)) as u64;
        self.used + 3 * batch + 2 <= self.ring
    }

    /// Blocks of the ring in use.
    pub(super) const fn used(&self) -> u64 {
        self.used
    }

    pub(super) const fn ring(&self) -> u64 {
        self.ring
    }

    /// The batch of the newest record.
    pub(super) const fn newest(&self) -> BatchNumber {
        if self.building.records > 0 { self.next } else { self.next.previous() }
    }

    /// Where the batch being built will be looked for.
    pub(super) const fn head(&self) -> JournalHead {
        JournalHead { batch: self.next, offset: self.offset, chain: self.chain }
    }

    /// A checkpoint doesn't need anything before `head`.
    pub(super) fn release(&mut self, head: &JournalHead) {
        self.used = if head.batch == self.next { 0 } else { (self.offset + self.ring - head.offset) % self.ring };
    }

    /// Asks for a sync that begins from now on. It has ended when [`Journal::has_ended`] says so of the ticket.
    pub(super) fn want_sync(&mut self) -> u64 {
        self.wanted = self.begun + 1;
        self.wanted
    }

    pub(super) const fn has_ended(&self, ticket: u64) -> bool {
        self.ended >= ticket
    }

    /// Whether anything is not yet on stable media.
    pub(super) fn is_dirty(&self) -> bool {
        self.synced < self.last || self.building.records > 0
    }

    /// Whether the disk doesn't yet know through which batch it has everything.
    pub(super) fn is_unsaid(&self) -> bool {
        self.said < self.last && self.last <= self.synced
    }

    pub(super) fn is_idle(&self) -> bool {
        self.flying.is_empty() && self.syncing.is_none() && self.waiting_durable.is_empty() && self.flushes.is_empty()
    }
}

impl<D: Disk> EpochMap<D> {
    /// Puts records that belong together into one batch, and says which.
    pub(super) fn record(&mut self, records: &[Record], payload: Vec<SharedBuffer>) -> BatchNumber {
        let mut body = Writer::default();
        records.iter().for_each(|record| record.encode(&mut body));
        let blocks: usize = payload.iter().map(|piece| piece.len() / BLOCK_SIZE as usize).sum();
        let building = &self.journal.building;
        let fits = building.body.bytes.len() + body.bytes.len() <= body_room(header_max(self.journal.ring))
            && building.payload_blocks + blocks <= payload_max(self.journal.ring);
        if !fits {
            self.seal();
        }
        let journal = &mut self.journal;
        if journal.building.records == 0 {
            journal.flying.push_back(Flying { number: journal.next, outstanding: 0, sealed: false });
        }
        let building = &mut journal.building;
        building.body.bytes(&body.bytes);
        building.records += u32::try_from(records.len()).unwrap_or(0);
        building.payload_blocks += blocks;
        building.payload.extend(payload);
        journal.next
    }

    /// The batch being built is also waited for until another I/O has ended.
    pub(super) fn hold(&mut self, batch: BatchNumber) {
        let flying = self.journal.flying.back_mut();
        assert!(flying.as_ref().is_some_and(|flying| flying.number == batch && !flying.sealed), "data is written while its batch is built");
        if let Some(flying) = flying {
            flying.outstanding += 1;
        }
    }

    /// Writes the batch being built, if there is anything in it.
    pub(super) fn seal(&mut self) {
        if self.journal.building.records > 0 {
            self.write_batch();
        }
    }

    /// Tells the disk through which batch it has everything, by a batch without records.
    pub(super) fn say_synced(&mut self) {
        if self.journal.building.records == 0 && self.journal.has_room() && self.journal.is_unsaid() {
            let number = self.journal.next;
            self.journal.flying.push_back(Flying { number, outstanding: 0, sealed: false });
            self.write_batch();
        }
    }

    fn write_batch(&mut self) {
        let copied = self.copying.copied_through(self.journal.next);
        let journal = &mut self.journal;
        let Building { body, records, payload, payload_blocks } = std::mem::take(&mut journal.building);
        let header_blocks = header_blocks(body.bytes.len());
        let blocks = (header_blocks + payload_blocks) as u64;
        let gap = if journal.offset + blocks > journal.ring { journal.ring - journal.offset } else { 0 };
        let offset = if gap > 0 { 0 } else { journal.offset };
        journal.used += gap + blocks;
        assert!(journal.used < journal.ring, "a batch is built only if there is room in the journal");
        let head = BatchHead {
            store: self.superblock.id,
            number: journal.next,
            incarnation: self.superblock.incarnation,
            chain: journal.chain,
            synced: journal.synced,
            copied,
            offset,
            header_blocks,
            payload_blocks,
        };
        let mut header = self.pool.take(header_blocks * BLOCK_SIZE as usize);
        journal.chain = encode_header(&head, records, &body.bytes, &mut header);
        journal.offset = (offset + blocks) % journal.ring;
        journal.said = journal.synced;
        if records > 0 {
            journal.last = head.number;
        }
        journal.next = journal.next.next();
        journal.writing += 1;
        if let Some(flying) = journal.flying.back_mut() {
            flying.sealed = true;
            flying.outstanding += 1;
        }
        self.counters.journal_written += blocks;
        let pieces = std::iter::once(header.share()).chain(payload).collect();
        let at = self.superblock.geometry.journal_start().plus(offset);
        self.start(Purpose::Batch(head.number), DiskWork::Write { at, pieces });
    }

    pub(super) fn on_batch(&mut self, batch: BatchNumber, result: io::Result<Option<Buffer>>) {
        self.journal.writing -= 1;
        match result {
            Ok(_) => self.release_batch(batch),
            Err(error) => self.poison("a write to the journal failed", &error),
        }
    }

    /// Data that a batch speaks of has been written.
    pub(super) fn on_fresh(&mut self, batch: BatchNumber, slot: Slot, op: OpId, result: io::Result<Option<Buffer>>) {
        if let Err(error) = result {
            return self.poison("a write of data failed", &error);
        }
        if let Some(replica) = self.replicas.get_mut(&slot)
            && let Some(position) = replica.unreadable.iter().position(|(write, _)| *write == op)
        {
            // One entry per I/O, so the last one makes the blocks readable.
            replica.unreadable.swap_remove(position);
            self.unpark(slot);
        }
        self.release_batch(batch);
    }

    fn release_batch(&mut self, batch: BatchNumber) {
        if let Some(flying) = self.journal.flying.iter_mut().find(|flying| flying.number == batch) {
            flying.outstanding -= 1;
        }
        while let Some(flying) = self.journal.flying.pop_front_if(|flying| flying.sealed && flying.outstanding == 0) {
            self.journal.done = flying.number;
        }
        let done = self.journal.done;
        while let Some(ended) = self.journal.waiting.pop_front_if(|waiting| waiting.batch <= done) {
            self.end(ended);
        }
    }

    fn end(&mut self, Waiting { slot, volume, answer, position, .. }: Waiting) {
        if let Some(position) = position
            && let Some(replica) = self.replicas.get_mut(&slot)
        {
            replica.acknowledged = position;
        }
        if let Some((token, outcome)) = answer {
            self.complete(volume, token, Ok(outcome));
        }
    }

    /// The operation ends when its batch is done.
    pub(super) fn end_with(&mut self, batch: BatchNumber, slot: Slot, token: Token, outcome: Outcome, position: Option<Seq>) {
        let Some(volume) = self.replicas.get(&slot).map(|replica| replica.record.volume) else { return };
        self.journal.waiting.push_back(Waiting { batch, slot, volume, answer: Some((token, outcome)), position });
    }

    /// The operation ends when its batch is on stable media.
    pub(super) fn end_durably(&mut self, batch: BatchNumber, slot: Slot, token: Token, outcome: Outcome, position: Option<Seq>) {
        let Some(volume) = self.replicas.get(&slot).map(|replica| replica.record.volume) else { return };
        // The position counts in order with those of writes.
        self.journal.waiting.push_back(Waiting { batch, slot, volume, answer: None, position });
        self.journal.waiting_durable.push_back(Waiting { batch, slot, volume, answer: Some((token, outcome)), position: None });
    }

    pub(super) fn flush(&mut self, slot: Slot, volume: VolumeId, token: Token) {
        self.counters.flushes += 1;
        self.journal.flushes.push(Flush { target: self.journal.done, slot, volume, token });
    }

    pub(super) fn advance_journal(&mut self) {
        if self.poisoned.is_some() {
            return;
        }
        self.end_flushes();
        if self.journal.writing < WRITING_MAX {
            self.seal();
        }
        let journal = &mut self.journal;
        let is_due = !journal.flushes.is_empty()
            || journal.wanted > journal.begun
            || journal.waiting_durable.front().is_some_and(|waiting| waiting.batch <= journal.done);
        if journal.syncing.is_some() || !is_due {
            return;
        }
        let positions = self.replicas.iter().filter(|(_, replica)| replica.durable != replica.acknowledged);
        let positions = positions.map(|(slot, replica)| (*slot, replica.acknowledged)).collect();
        journal.begun += 1;
        journal.syncing = Some(Syncing { covers: journal.done, positions, copied: self.copying.take_copied() });
        self.counters.syncs += 1;
        self.start(Purpose::Sync, DiskWork::Sync);
    }

    pub(super) fn on_synced(&mut self, result: io::Result<Option<Buffer>>) {
        let Some(Syncing { covers, positions, copied }) = self.journal.syncing.take() else { return };
        if let Err(error) = result {
            return self.poison("a sync failed", &error);
        }
        self.journal.ended += 1;
        self.journal.synced = covers;
        self.copying.release(&copied);
        for (slot, position) in positions {
            if let Some(replica) = self.replicas.get_mut(&slot) {
                replica.durable = position;
            }
        }
        while let Some(ended) = self.journal.waiting_durable.pop_front_if(|waiting| waiting.batch <= covers) {
            self.end(ended);
        }
        self.end_flushes();
    }

    fn end_flushes(&mut self) {
        let synced = self.journal.synced;
        if self.journal.flushes.iter().any(|flush| flush.target <= synced) {
            for Flush { slot, volume, token, .. } in self.journal.flushes.extract_if(.., |flush| flush.target <= synced).collect::<Vec<_>>()
            {
                let durable = self.replicas.get(&slot).map_or(Seq::ZERO, |replica| replica.durable);
                self.complete(volume, token, Ok(Outcome::Synced { durable }));
            }
        }
    }

    /// Nothing that waits will happen any more.
    pub(super) fn fail_waiting(&mut self) {
        let journal = &mut self.journal;
        let waiting = journal
            .waiting
            .drain(..)
            .chain(journal.waiting_durable.drain(..))
            .filter_map(|waiting| Some((waiting.volume, waiting.answer?.0)));
        let failed: Vec<_> = waiting.chain(journal.flushes.drain(..).map(|flush| (flush.volume, flush.token))).collect();
        for (volume, token) in failed {
            self.complete(volume, token, Err(StoreError::Poisoned(volume)));
        }
    }
}
