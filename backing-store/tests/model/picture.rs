//! All that can be seen of a replica: its content, its epochs and its snapshots.

use std::collections::BTreeMap;
use std::ops::Range;

use carrick_backing_store::{
    BLOCK_SIZE, BLOCKS_MAX, BlockIndex, ByteLength, ByteOffset, ChangedExtent, Checksum, Content, DIGEST_BLOCKS_MAX, Digest, Epoch, Extent,
    OpenedReplica, Operation, Outcome, ReadData, SnapshotInfo, StoreError, VolumeId, block_checksum,
};

/// Volumes up to so many blocks are read as a whole, larger ones around their data.
const SMALL: u64 = 2048;

const ZEROES: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];

pub fn extent(first: u64, count: u64) -> Extent {
    let block = u64::from(BLOCK_SIZE);
    Extent::new(ByteOffset::new(first * block), ByteLength::new(count * block)).unwrap()
}

pub fn end_block(extent: Extent) -> u64 {
    extent.first_block().get() + extent.block_count()
}

/// How a picture asks a store about one volume.
pub type Ask<'a> = dyn FnMut(Operation) -> Result<Outcome, StoreError> + 'a;

/// The number that a block was written with, and its checksum, which was found to be right.
type Cell = (u64, Checksum);

/// The volume as it is, or one of its snapshots.
pub struct View {
    /// What changed since each epoch, from 0 on; `None` if that is forgotten.
    changed: Vec<Option<Vec<ChangedExtent>>>,
    /// What is not zeros.
    pub blocks: BTreeMap<u64, Cell>,
}

pub struct Picture {
    pub opened: OpenedReplica,
    pub snapshots: Vec<SnapshotInfo>,
    pub live: View,
    kept: Vec<View>,
}

/// The whole answer to `Changed`, however many pieces it comes in.
pub fn changed(
    ask: &mut Ask<'_>,
    mut question: (Epoch, Option<carrick_backing_store::SnapshotId>, u64),
) -> Result<Vec<ChangedExtent>, StoreError> {
    let mut all: Vec<ChangedExtent> = Vec::new();
    loop {
        let (from, snapshot, start) = question;
        let Outcome::Changed(found) = ask(Operation::Changed { from, snapshot, start: BlockIndex::new(start) })? else {
            panic!("Changed is answered with something else");
        };
        for next in found.extents {
            match all.last_mut().filter(|last| last.extent.end() == next.extent.offset() && last.zeroes == next.zeroes) {
                Some(last) => last.extent = extent(last.extent.first_block().get(), last.extent.block_count() + next.extent.block_count()),
                None => all.push(next),
            }
        }
        let Some(next) = found.next else { return Ok(all) };
        assert!(next.get() > start, "Changed from block {start} goes on at {next}");
        question.2 = next.get();
    }
}

/// The digest is that of what was read.
fn check_digest(ask: &mut Ask<'_>, volume: VolumeId, cells: &BTreeMap<u64, Cell>, blocks: Range<u64>) -> Result<(), StoreError> {
    let mut expected = Digest::default();
    cells.range(blocks.clone()).for_each(|(block, (_, checksum))| expected.add(volume, BlockIndex::new(*block), *checksum));
    let found = ask(Operation::Digest { extent: extent(blocks.start, blocks.end - blocks.start) })?;
    assert!(matches!(found, Outcome::Digest(found) if found == expected), "the digest of blocks {blocks:?} is {found:?}, not {expected:?}");
    Ok(())
}

impl View {
    /// Looks at everything, at epochs up to `epochs`.
    fn take(ask: &mut Ask<'_>, volume: VolumeId, snapshot: Option<SnapshotInfo>, blocks: u64, epochs: u32) -> Result<Self, StoreError> {
        let id = snapshot.map(|info| info.id);
        let mut lists = Vec::new();
        for from in 0..=epochs {
            lists.push(match changed(ask, (Epoch::new(from), id, 0)) {
                Ok(list) => Some(list),
                Err(StoreError::EpochForgotten { .. }) => None,
                Err(error) => return Err(error),
            });
        }
        let written = lists[0].iter().flatten().filter(|run| !run.zeroes);
        // A block more on either side: what is beside data must not have come with it.
        let around = |run: &ChangedExtent| (run.extent.first_block().get().saturating_sub(1), (end_block(run.extent) + 1).min(blocks));
        let ranges = if blocks <= SMALL { vec![(0, blocks)] } else { written.map(around).collect() };
        let mut cells = BTreeMap::new();
        for (mut first, end) in ranges {
            while first < end {
                let count = BLOCKS_MAX.min(end - first);
                let found = ask(Operation::Read { extent: extent(first, count), snapshot: id })?;
                if let Outcome::Read(ReadData::Blocks { checksums, data }) = found {
                    assert_eq!((checksums.len() as u64, data.len() as u64), (count, count * u64::from(BLOCK_SIZE)), "length of a read");
                    for ((block, checksum), data) in (first..).zip(checksums).zip(data.chunks(BLOCK_SIZE as usize)) {
                        assert_eq!(block_checksum(volume, BlockIndex::new(block), data), checksum, "checksum of block {block}");
                        if data != ZEROES {
                            cells.insert(block, (super::content::number(data), checksum));
                        }
                    }
                }
                first += count;
            }
        }
        if snapshot.is_none() {
            let start = cells.first_key_value().map_or(0, |(first, _)| *first);
            check_digest(ask, volume, &cells, start..blocks.min(start + DIGEST_BLOCKS_MAX))?;
        }
        Ok(Self { changed: lists, blocks: cells })
    }

    /// How the subject's differs from the oracle's. Between the epochs of `reverted` the subject may have forgotten more.
    fn difference(&self, subject: &Self, reverted: (u32, u32)) -> Option<String> {
        let mut blocks = self.blocks.keys().chain(subject.blocks.keys());
        if let Some(block) = blocks.find(|block| self.blocks.get(block) != subject.blocks.get(block)) {
            let number = |view: &Self| view.blocks.get(block).map_or(0, |cell| cell.0);
            return Some(format!("block {block} has the content of write {}, not {}", number(subject), number(self)));
        }
        let lists = (0..).zip(self.changed.iter().zip(&subject.changed));
        let differs = |(from, (oracle, subject)): &(u32, (&Option<_>, &Option<_>))| match (oracle, subject) {
            (Some(_), None) => !(reverted.0 < *from && *from < reverted.1),
            (oracle, subject) => oracle != subject,
        };
        lists.filter(|pair| differs(pair)).map(|(from, pair)| format!("changed since epoch {from}: {}", first_difference(pair))).next()
    }

    /// The blocks that are not holes, in runs that are alike: first block, end, and what they are.
    pub fn runs(&self) -> BTreeMap<u64, (u64, Kind)> {
        // At each block: how many lists begin, less how many end.
        let mut borders: BTreeMap<u64, i64> = BTreeMap::new();
        for run in self.changed.iter().flatten().flatten() {
            *borders.entry(run.extent.first_block().get()).or_default() += 1;
            *borders.entry(end_block(run.extent)).or_default() -= 1;
        }
        for block in self.blocks.keys() {
            borders.entry(*block).or_default();
            borders.entry(block + 1).or_default();
        }
        let mut lists = 0;
        let ends = borders.keys().skip(1);
        let pieces = borders.iter().zip(ends).filter_map(|((first, change), end)| {
            lists += change;
            let number = self.blocks.get(first).map_or(0, |cell| cell.0);
            (lists > 0).then_some((*first, (*end, Kind { number, lists })))
        });
        pieces.collect()
    }
}

/// What blocks of a run have in common: the write that they are of, and in how many lists they are, which is their age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    pub number: u64,
    lists: i64,
}

fn first_difference((oracle, subject): (&Option<Vec<ChangedExtent>>, &Option<Vec<ChangedExtent>>)) -> String {
    let (Some(oracle), Some(subject)) = (oracle, subject) else {
        return format!("answered by the subject: {}, by the oracle: {}", subject.is_some(), oracle.is_some());
    };
    let at = oracle.iter().zip(subject).take_while(|(a, b)| a == b).count();
    format!("extent {at} is {:?}, not {:?}", subject.get(at), oracle.get(at))
}

impl Picture {
    /// Looks at a replica.
    ///
    /// # Errors
    /// Of whatever the store refuses to show.
    pub fn take(ask: &mut Ask<'_>, opened: OpenedReplica, snapshots: Vec<SnapshotInfo>, epochs: u32) -> Result<Self, StoreError> {
        let volume = opened.spec.volume;
        let live = View::take(ask, volume, None, opened.spec.size.blocks(), epochs)?;
        let keep = |info: &SnapshotInfo| View::take(ask, volume, Some(*info), info.size.blocks(), epochs);
        let kept = snapshots.iter().map(keep).collect::<Result<_, _>>()?;
        Ok(Self { opened, snapshots, live, kept })
    }

    /// How the subject's differs from this one, the oracle's.
    pub fn difference(&self, subject: &Self, reverted: (u32, u32), power_cut: bool) -> Option<String> {
        head_difference((self.opened, &self.snapshots), (subject.opened, &subject.snapshots), power_cut)
            .or_else(|| self.live.difference(&subject.live, reverted))
            .or_else(|| {
                let views = self.snapshots.iter().zip(self.kept.iter().zip(&subject.kept));
                let differs = |(info, (oracle, subject)): (&SnapshotInfo, (&View, &View))| {
                    oracle.difference(subject, reverted).map(|text| format!("snapshot {}: {text}", info.id))
                };
                views.filter_map(differs).next()
            })
    }
}

/// How the subject differs in what is known without looking at blocks.
pub fn head_difference(
    oracle: (OpenedReplica, &[SnapshotInfo]),
    subject: (OpenedReplica, &[SnapshotInfo]),
    power_cut: bool,
) -> Option<String> {
    let mut expected = oracle.0.state;
    // A store may say after a loss of power that a replica is mixed, though it is not.
    if power_cut && expected.content == Content::Complete && subject.0.state.content == Content::Mixed {
        expected.content = Content::Mixed;
    }
    if oracle.0.spec != subject.0.spec {
        Some(format!("it is {:?}, not {:?}", subject.0.spec, oracle.0.spec))
    } else if oracle.0.position != subject.0.position {
        Some(format!("the position is {}, not {}", subject.0.position, oracle.0.position))
    } else if expected != subject.0.state {
        Some(format!("the state is {:?}, not {expected:?}", subject.0.state))
    } else if oracle.0.epoch != subject.0.epoch {
        Some(format!("the epoch is {}, not {}", subject.0.epoch, oracle.0.epoch))
    } else if oracle.1 != subject.1 {
        Some(format!("the snapshots are {:?}, not {:?}", subject.1, oracle.1))
    } else {
        None
    }
}
