//! Printing what a store says of itself, for those who look for what went wrong. Reads only, and stops at nothing it can step over.

use std::io::{self, Write};
use std::path::Path;

use super::EpochMap;
use super::catalog::{ReplicaRecord, Snapshot};
use super::journal::Batch;
use super::open::{OpenOptions, read_superblock_copy};
use super::page::Child;
use super::record::Record;
use super::superblock::{COPIES, Superblock};
use crate::disk::Disk;
use crate::store::StoreError;

/// Writes, as text: the superblocks, the last checkpoint's catalog, and the journal since then, with where it ends.
///
/// # Errors
/// If there is no superblock or catalog that can be read; [`StoreError::Io`] also if `out` can't be written.
pub fn dump<D: Disk>(disk: D, path: &Path, out: &mut dyn Write) -> Result<(), StoreError> {
    let mut store = EpochMap::read_checkpoint(disk, path, &OpenOptions::default())?;
    let failed = |source| StoreError::Io { action: "dump", path: path.to_owned(), source };
    store.dump_superblocks(out).map_err(failed)?;
    store.dump_catalog(out).map_err(failed)?;
    let mut at = store.superblock.journal;
    while let Some((batch, next)) = store.read_batch(&at)? {
        dump_batch(&batch, out).map_err(failed)?;
        at = next;
    }
    writeln!(out, "journal: the chain ends before batch {} at {}", at.batch.0, at.offset).map_err(failed)?;
    match store.replay() {
        Ok(_) => {
            let end = store.journal.head();
            writeln!(out, "journal: replayed up to batch {} at {}", end.batch.0, end.offset).map_err(failed)?;
            store.dump_replicas(out).map_err(failed)
        }
        Err(error) => writeln!(out, "journal: {error}").map_err(failed),
    }
}

impl<D: Disk> EpochMap<D> {
    fn dump_superblocks(&mut self, out: &mut dyn Write) -> io::Result<()> {
        for at in COPIES {
            match read_superblock_copy(&mut self.direct(), at) {
                Err(error) => writeln!(out, "superblock at {at}: {error}")?,
                Ok(Superblock {
                    id,
                    checkpoint,
                    incarnation,
                    journal,
                    catalog_length,
                    compatible,
                    read_only_compatible,
                    incompatible,
                    ..
                }) => {
                    writeln!(out, "superblock at {at}: store {id} checkpoint {checkpoint} incarnation {incarnation}")?;
                    writeln!(out, "  catalog of {catalog_length} bytes; journal from batch {} at {}", journal.batch.0, journal.offset)?;
                    writeln!(
                        out,
                        "  features: {compatible:#x} compatible, {read_only_compatible:#x} read-only, {incompatible:#x} incompatible"
                    )?;
                }
            }
        }
        let geometry = &self.superblock.geometry;
        let (half, journal, data) = (self.superblock.checkpoint & 1, geometry.journal_start(), geometry.data_start());
        writeln!(out, "blocks: {} in all, of 4 KiB", geometry.blocks)?;
        writeln!(out, "  catalog at {} and {}", geometry.catalog_at(half, 0), geometry.catalog_at(half, 1))?;
        writeln!(out, "  journal of {} at {journal}; data, {} blocks, at {data}", geometry.journal_blocks, geometry.data_blocks)
    }

    fn dump_catalog(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "checkpoint: {} blocks in use, {} prepared", self.allocator.used(), self.allocator.prepared())?;
        self.dump_replicas(out)?;
        for bad in &self.bad {
            writeln!(out, "bad block {bad}")?;
        }
        Ok(())
    }

    fn dump_replicas(&self, out: &mut dyn Write) -> io::Result<()> {
        for replica in self.replicas.values() {
            dump_replica(&replica.record, out)?;
        }
        for dead in &self.dead {
            let (slot, from, floors) = (dead.slot.0, dead.done_before, (dead.floor, dead.floor_before, dead.split));
            writeln!(out, "taken apart: replica {slot}, from block {from} on, page {} level {}", dead.root.place, dead.level)?;
            writeln!(out, "  base {}, above epochs {floors:?}, beside {}", dead.base, child(&dead.next.root))?;
        }
        Ok(())
    }
}

fn child(child: &Child) -> String {
    match child {
        Child::Hole => "nothing".into(),
        Child::Zeroes(epoch) => format!("zeros of epoch {epoch}"),
        Child::Disk(pointer) => format!("page {} of epoch {}", pointer.place, pointer.epoch),
        Child::Memory(node) => format!("a changed page of epoch {}", node.epoch),
    }
}

fn dump_replica(record: &ReplicaRecord, out: &mut dyn Write) -> io::Result<()> {
    let deleting = if record.deleting { ", being deleted" } else { "" };
    writeln!(
        out,
        "replica {} of volume {}, {} bytes, epoch {}{deleting}",
        record.slot.0,
        record.volume,
        record.size.bytes(),
        record.epoch
    )?;
    writeln!(out, "  position {}, {:?}", record.position, record.state)?;
    writeln!(out, "  {} blocks, {} of them in the volume; map: {}", record.allocated, record.live, child(&record.tree.root))?;
    for (epoch, volume) in &*record.lineage {
        writeln!(out, "  up to epoch {epoch}: volume {volume}")?;
    }
    if let Some((slot, snapshot)) = record.origin {
        writeln!(out, "  a clone of snapshot {snapshot} of replica {}", slot.0)?;
    }
    for revert in &record.reverts {
        writeln!(out, "  reverted to epoch {}, now {}", revert.to, revert.raised)?;
    }
    for Snapshot { id, epoch, size, tree, deleted_before, .. } in &record.snapshots {
        let leaving = deleted_before.map_or_else(String::new, |before| format!(", taken apart before block {before}"));
        writeln!(out, "  snapshot {id} of epoch {epoch}, {} bytes, map: {}{leaving}", size.bytes(), child(&tree.root))?;
    }
    Ok(())
}

fn dump_batch(batch: &Batch, out: &mut dyn Write) -> io::Result<()> {
    let head = &batch.head;
    writeln!(
        out,
        "batch {} at {}: incarnation {}, synced {}, copied {}, {}+{} blocks",
        head.number.0, head.offset, head.incarnation, head.synced.0, head.copied.0, head.header_blocks, head.payload_blocks
    )?;
    for record in &batch.records {
        match record {
            Record::Write { slot, seq, block, runs, checksums } => {
                let places: Vec<String> = runs.iter().map(|run| format!("{}+{}", run.place, run.count)).collect();
                writeln!(out, "  replica {} write {seq}: {block}+{} to {}", slot.0, checksums.len(), places.join(" "))?;
            }
            Record::Overwrite { slot, seq, block, checksums } => {
                writeln!(out, "  replica {} overwrite {seq}: {block}+{}", slot.0, checksums.len())?;
            }
            Record::Zeroes { slot, seq, block, count } => writeln!(out, "  replica {} zeros {seq}: {block}+{count}", slot.0)?,
            other => writeln!(out, "  {other:?}")?,
        }
    }
    Ok(())
}
