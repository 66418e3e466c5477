//! The dirty-region log: where a replica was written lately, so that replicas that differ by writes in flight need not be
//! compared everywhere.
//!
//! The last [`EXTENTS_MAX`] writes are known exactly while the store is open. Over a checkpoint and a restart, regions of 1 MiB
//! are remembered, each with its last write; what falls out of both is forgotten, and said to be.

use std::collections::{BTreeMap, VecDeque};

use super::codec::{FormatError, Reader, Writer, count};
use crate::store::LoggedExtents;
use crate::units::{ByteLength, ByteOffset, Extent, Seq, VolumeSize};

/// Exact extents kept per replica: 1.5 MiB of memory.
const EXTENTS_MAX: usize = 65_536;
/// Regions kept per replica: 12 KiB in the catalog, 1 GiB to copy at most.
pub(super) const REGIONS_MAX: usize = 1024;
const REGION: u64 = 1 << 20;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DirtyLog {
    /// Writes above this are all in `extents`.
    exact_above: Seq,
    extents: VecDeque<(Seq, Extent)>,
    /// Writes above this are all in `regions`. `None`: nothing is known.
    known_above: Seq,
    /// Region: its last write.
    regions: BTreeMap<u64, Seq>,
    /// The other way round.
    by_age: BTreeMap<Seq, Vec<u64>>,
}

impl DirtyLog {
    /// Forgets everything: positions count anew from here.
    pub(super) fn restart(&mut self, position: Seq) {
        *self = Self { exact_above: position, known_above: position, ..Self::default() };
    }

    /// A write.
    pub(super) fn insert(&mut self, seq: Seq, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        self.extents.push_back((seq, extent));
        while self.extents.len() > EXTENTS_MAX {
            if let Some((forgotten, _)) = self.extents.pop_front() {
                self.exact_above = forgotten;
            }
        }
        let (first, last) = (extent.offset().get() / REGION, (extent.end().get() - 1) / REGION);
        if last - first >= REGIONS_MAX as u64 {
            // One write over more than can be remembered: what was before is lost among it.
            self.regions.clear();
            self.by_age.clear();
            self.known_above = seq;
            return;
        }
        for region in first..=last {
            if let Some(before) = self.regions.insert(region, seq)
                && let Some(regions) = self.by_age.get_mut(&before)
            {
                regions.retain(|other| *other != region);
                if regions.is_empty() {
                    self.by_age.remove(&before);
                }
            }
            self.by_age.entry(seq).or_default().push(region);
        }
        self.forget_above(REGIONS_MAX);
    }

    fn forget_above(&mut self, most: usize) {
        while self.regions.len() > most {
            let Some((oldest, regions)) = self.by_age.pop_first() else { return };
            for region in &regions {
                self.regions.remove(region);
            }
            self.known_above = oldest;
        }
    }

    /// Forgets the oldest regions but so many, in what [`DirtyLog::without_extents`] gave.
    pub(super) fn keep_newest(&mut self, most: usize) {
        for (region, seq) in &self.regions {
            self.by_age.entry(*seq).or_default().push(*region);
        }
        self.forget_above(most);
        self.by_age.clear();
    }

    /// What was written after `after`.
    pub(super) fn after(&self, after: Seq, size: VolumeSize) -> LoggedExtents {
        if after >= self.exact_above {
            let later = self.extents.iter().filter(|(seq, _)| *seq > after);
            return LoggedExtents::All(later.map(|(_, extent)| *extent).collect());
        }
        if after < self.known_above {
            return LoggedExtents::Forgotten;
        }
        let later = self.regions.iter().filter(|(_, seq)| **seq > after);
        let extent = |region: u64| {
            let start = region * REGION;
            let length = REGION.min(size.bytes().get().saturating_sub(start));
            Extent::new(ByteOffset::new(start), ByteLength::new(length))
        };
        LoggedExtents::All(later.filter_map(|(region, _)| extent(*region)).filter(|extent| !extent.is_empty()).collect())
    }

    /// What a checkpoint keeps of it.
    pub(super) fn without_extents(&self) -> Self {
        Self { known_above: self.known_above, regions: self.regions.clone(), ..Self::default() }
    }

    pub(super) fn encode(&self, writer: &mut Writer) {
        writer.u64(self.known_above.get());
        writer.u32(u32::try_from(self.regions.len()).unwrap_or(u32::MAX));
        for (region, seq) in &self.regions {
            writer.u32(u32::try_from(*region).unwrap_or(u32::MAX));
            writer.u64(seq.get());
        }
    }

    /// What was read of it knows regions only.
    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let known_above = Seq::new(reader.u64()?);
        let length = reader.u32()?;
        let mut log = Self { known_above, exact_above: known_above, ..Self::default() };
        for _ in 0..count(reader, length, 12)? {
            let (region, seq) = (u64::from(reader.u32()?), Seq::new(reader.u64()?));
            log.regions.insert(region, seq);
            log.by_age.entry(seq).or_default().push(region);
            log.exact_above = log.exact_above.max(seq);
        }
        Ok(log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(block: u64, blocks: u64) -> Extent {
        Extent::new(ByteOffset::new(block * 4096), ByteLength::new(blocks * 4096)).unwrap()
    }

    #[test]
    fn a_reread_log_knows_regions_and_what_it_forgot() {
        let size = VolumeSize::new(8 << 30).unwrap();
        let mut log = DirtyLog::default();
        for seq in 1..=3000 {
            log.insert(Seq::new(seq), extent(seq * 256, 1));
        }
        assert_eq!(log.after(Seq::new(2999), size), LoggedExtents::All(vec![extent(3000 * 256, 1)]));
        let mut writer = Writer::default();
        log.encode(&mut writer);
        let reread = DirtyLog::decode(&mut Reader::new(&writer.bytes, "log")).unwrap();
        assert_eq!(reread.after(Seq::new(2999), size), LoggedExtents::All(vec![extent(3000 * 256, 256)]));
        assert_eq!(reread.after(Seq::new(100), size), LoggedExtents::Forgotten);
        assert_eq!(reread.after(Seq::new(3000), size), LoggedExtents::All(vec![]));
    }
}
