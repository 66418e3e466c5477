//! Listing what changed since an epoch.

use std::ops::Range;

use super::{Kind, ReadKey, ReadOperation, tree_of};
use crate::disk::Disk;
use crate::epoch_map::page::Body;
use crate::epoch_map::tree::Piece;
use crate::epoch_map::{EpochMap, Waiter};
use crate::store::{CHANGED_MAX, ChangedExtent, ChangedExtents, Outcome, StoreError};
use crate::units::{BLOCK_SIZE, BlockIndex, ByteLength, Extent};

impl<D: Disk> EpochMap<D> {
    pub(super) fn list(&mut self, key: ReadKey) {
        let Some(read) = self.reading.under_way.get_mut(&key) else { return };
        let Kind::Changed { from, snapshot, next, found } = &mut read.kind else { return };
        let (slot, from, snapshot, mut next, mut found) = (read.slot, *from, *snapshot, *next, std::mem::take(found));
        let Some(record) = self.replicas.get(&slot).map(|replica| &replica.record) else { return };
        let (tree, size) = match tree_of(record, snapshot) {
            Ok((tree, size)) => (tree.clone(), size),
            Err(error) => return self.end_read(key, Err(error)),
        };
        let owners = record.owners();
        let forgotten = self.replicas.get(&slot).and_then(|replica| {
            let end = snapshot.map_or(Some(replica.record.epoch), |id| Some(replica.record.snapshot(id)?.epoch))?;
            replica.record.forgotten(from, end)
        });
        if let Some(oldest) = forgotten {
            return self.end_read(key, Err(StoreError::EpochForgotten { volume: owners.volume, from, oldest }));
        }
        loop {
            match tree.next_piece(&mut self.cache, next, from) {
                Piece::Missing(missing) => {
                    if let Some(ReadOperation { kind: Kind::Changed { next: place, found: list, .. }, .. }) =
                        self.reading.under_way.get_mut(&key)
                    {
                        (*place, *list) = (next, found);
                    }
                    drop(tree);
                    return self.load(missing, &owners, Waiter::Read(key));
                }
                Piece::End => break,
                Piece::Zeroes(range) => {
                    if !list_run(&mut found, next.max(range.start)..range.end.min(size), true) {
                        next = next.max(range.start);
                        return self.end_listing(key, found, Some(next));
                    }
                    next = range.end;
                }
                Piece::Leaf(node, base) => {
                    let Body::Leaf(entries) = &node.body else { return };
                    for (block, entry) in (base..).zip(entries.iter()).filter(|(block, entry)| *block >= next && entry.epoch > from) {
                        if !list_run(&mut found, block..(block + 1).min(size), !entry.is_mapped()) {
                            return self.end_listing(key, found, Some(block));
                        }
                    }
                    next = base + entries.len() as u64;
                }
            }
            if next >= size {
                break;
            }
        }
        self.end_listing(key, found, None);
    }

    fn end_listing(&mut self, key: ReadKey, extents: Vec<ChangedExtent>, next: Option<u64>) {
        self.end_read(key, Ok(Outcome::Changed(ChangedExtents { extents, next: next.map(BlockIndex::new) })));
    }
}

/// Adds blocks to a listing. Whether there was room.
fn list_run(found: &mut Vec<ChangedExtent>, blocks: Range<u64>, zeroes: bool) -> bool {
    if blocks.is_empty() {
        return true;
    }
    let (start, length) = (BlockIndex::new(blocks.start).offset(), (blocks.end - blocks.start) * u64::from(BLOCK_SIZE));
    if let Some(last) = found.last_mut()
        && last.zeroes == zeroes
        && last.extent.end() == start
        && let Some(longer) = Extent::new(last.extent.offset(), ByteLength::new(last.extent.length().get() + length))
    {
        last.extent = longer;
        return true;
    }
    if found.len() == CHANGED_MAX {
        return false;
    }
    found.extend(Extent::new(start, ByteLength::new(length)).map(|extent| ChangedExtent { extent, zeroes }));
    true
}
