//! Digests, from the map alone: no data is read.

use super::{Kind, ReadKey, ReadOperation};
use crate::checksum::{Digest, checksum_for};
use crate::disk::Disk;
use crate::epoch_map::write::block_range;
use crate::epoch_map::{EpochMap, Waiter};
use crate::store::Outcome;
use crate::units::BlockIndex;

impl<D: Disk> EpochMap<D> {
    pub(super) fn digest(&mut self, key: ReadKey) {
        let Some(ReadOperation { slot, kind: Kind::Digest { extent }, .. }) = self.reading.under_way.get(&key) else { return };
        let blocks = block_range(*extent);
        let Some(record) = self.replicas.get(slot).map(|replica| &replica.record) else { return };
        let owners = record.owners();
        let entries = match record.tree.entries(&mut self.cache, &blocks) {
            Ok(entries) => entries,
            Err(missing) => return missing.iter().for_each(|missing| self.load(*missing, &owners, Waiter::Read(key))),
        };
        let mut digest = Digest::default();
        for (index, entry) in blocks.zip(&entries).filter(|(_, entry)| entry.is_mapped()) {
            let block = BlockIndex::new(index);
            digest.add(owners.volume, block, checksum_for(owners.volume, owners.of(entry.epoch), block, entry.checksum));
        }
        self.end_read(key, Ok(Outcome::Digest(digest)));
    }
}
