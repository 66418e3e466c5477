//! What happens in a run: one step after the other, by chance.

use carrick_backing_store::{
    BLOCKS_MAX, BlockIndex, Content, Epoch, Extent, Operation, ReplicaSpec, ReplicaState, Seq, SnapshotId, Synced, Term, VolumeId,
};

use super::content;
use super::picture::extent;
use super::reference::{blocks, epoch, opened, snapshot_ids};
use super::subject::Subject;
use super::world::{End, World, size};

/// Volumes that can exist at a time. The first begins as the big one.
const VOLUMES: u64 = 5;
/// Sizes of the others, in blocks.
const SIZES: [u64; 5] = [16, 60, 256, 700, 1024];
const SNAPSHOTS_MAX: usize = 6;
/// A volume of more blocks is touched in few places.
const BIG: u64 = 1 << 20;

fn volume(index: u64) -> VolumeId {
    VolumeId::from_bytes([u8::try_from(index + 1).unwrap(); 16])
}

impl<S: Subject> World<S> {
    pub fn begin(&mut self) {
        (0..3).for_each(|index| self.create_some(index));
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.dice.index(choices.len())]
    }

    pub fn random_step(&mut self) {
        if self.dice.once_in(4) {
            self.at = self.dice.below(VOLUMES);
        }
        let index = self.at;
        let volume = volume(index);
        if opened(&self.reference.live, volume).is_none() {
            return match self.dice.below(16) {
                0..=1 => self.create_some(index),
                2 => self.submit(volume, Operation::Sync),
                3 => self.delete(volume),
                _ => {}
            };
        }
        match self.dice.below(200) {
            0..=69 => self.write(volume),
            70..=89 => self.write_zeroes(volume),
            90..=119 => self.read(volume),
            120..=129 => self.submit(volume, Operation::Sync),
            130..=132 => self.set_state(volume),
            133..=137 => self.raise_epoch(volume),
            138..=147 => self.snapshot(volume),
            148..=153 => self.delete_snapshot(volume),
            154..=157 => self.revert(volume),
            158..=160 => self.clone_some(volume),
            161..=163 => self.expand(volume),
            164..=165 => self.delete(volume),
            166..=167 => self.create_some(index),
            168..=177 => self.changed(volume),
            178..=182 => self.scrub(volume),
            183..=189 => self.logged_after(volume),
            190..=191 => self.audit(),
            192 => self.end(End::Close),
            193..=195 => self.end(End::Kill),
            _ => self.end(if S::POWER_CUTS { End::PowerCut } else { End::Kill }),
        }
    }

    /// Some blocks: mostly inside the volume, of a big one in few places.
    fn some_extent(&mut self, volume: VolumeId, longest: u64) -> Extent {
        let blocks = blocks(&self.reference.live, volume);
        if self.dice.once_in(100) {
            return extent(blocks - self.dice.below(blocks.min(8)), 9);
        }
        let first = if blocks > BIG {
            self.pick(&[0, 65_000, BIG - 300, blocks / 2, blocks - 600]) + self.dice.below(600)
        } else {
            self.dice.below(blocks)
        };
        let longest = longest.min(blocks - first);
        let count = match self.dice.below(100) {
            0 => 0,
            1..=10 => longest,
            _ => 1 + self.dice.skewed(longest),
        };
        extent(first, count)
    }

    /// The next sequence, none, or a wrong one.
    fn some_seq(&mut self, volume: VolumeId) -> Option<Seq> {
        let next = opened(&self.reference.live, volume)?.position.next();
        match self.dice.below(60) {
            0 => Some(next.next()),
            1..=40 => Some(next),
            _ => None,
        }
    }

    fn write(&mut self, volume: VolumeId) {
        let longest = self.pick(&[4, 24, 24, BLOCKS_MAX]);
        let (seq, extent) = (self.some_seq(volume), self.some_extent(volume, longest));
        self.submit(volume, content::write(volume, self.number + 1, seq, extent));
    }

    fn write_zeroes(&mut self, volume: VolumeId) {
        let seq = self.some_seq(volume);
        let longest = self.pick(&[8, BLOCKS_MAX, 1 << 14, u64::MAX]);
        let whole = size(blocks(&self.reference.live, volume)).extent();
        let extent = if self.dice.once_in(10) { whole } else { self.some_extent(volume, longest) };
        self.submit(volume, Operation::WriteZeroes { seq, extent });
    }

    fn read(&mut self, volume: VolumeId) {
        let snapshot = if self.dice.once_in(3) { self.some_snapshot(volume) } else { None };
        let extent = self.some_extent(volume, BLOCKS_MAX);
        self.submit(volume, Operation::Read { extent, snapshot });
    }

    fn set_state(&mut self, volume: VolumeId) {
        let content = self.pick(&[Content::Complete, Content::Mixed, Content::Rebuilding]);
        let mut some_epoch = || Epoch::new(u32::try_from(self.dice.below(100)).unwrap());
        let synced = Synced { epoch: some_epoch(), copied_epoch: some_epoch(), copied: BlockIndex::new(self.dice.below(1 << 40)) };
        let state = ReplicaState { promised: Term::new(self.number), log_term: Term::new(self.dice.below(1 << 40)), content, synced };
        let position = match self.dice.below(20) {
            0 => Some(Seq::new(u64::MAX)),
            1..=9 => Some(Seq::new(self.dice.below(1000))),
            _ => None,
        };
        self.submit(volume, Operation::SetState { state, position });
    }

    /// Mostly to the next.
    fn raise_epoch(&mut self, volume: VolumeId) {
        let present = epoch(&self.reference.live, volume);
        let to = Epoch::new(present + self.pick(&[0, 1, 1, 1, 2]));
        let synced = Epoch::new(u32::try_from(self.dice.below(u64::from(present) + 1)).unwrap());
        self.submit(volume, Operation::RaiseEpoch { to, synced });
    }

    /// One that was never there.
    fn new_snapshot(&self) -> SnapshotId {
        SnapshotId::from_bytes((u128::from(self.number) + 1).to_be_bytes())
    }

    /// Mostly one that is there.
    fn some_snapshot(&mut self, volume: VolumeId) -> Option<SnapshotId> {
        let ids = snapshot_ids(&self.reference.live, volume);
        if ids.is_empty() || self.dice.once_in(20) {
            return self.dice.once_in(4).then(|| self.new_snapshot());
        }
        Some(self.pick(&ids))
    }

    fn snapshot(&mut self, volume: VolumeId) {
        let ids = snapshot_ids(&self.reference.live, volume);
        let snapshot = match self.dice.below(10) {
            0 => ids.last().copied(),
            1 => self.some_snapshot(volume),
            _ if ids.len() < SNAPSHOTS_MAX => None,
            _ => return,
        };
        let snapshot = snapshot.unwrap_or(self.new_snapshot());
        self.submit(volume, Operation::Snapshot { snapshot });
    }

    fn delete_snapshot(&mut self, volume: VolumeId) {
        let snapshot = self.some_snapshot(volume).unwrap_or(self.new_snapshot());
        self.submit(volume, Operation::DeleteSnapshot { snapshot });
        if self.dice.once_in(8) {
            // The same name again.
            self.submit(volume, Operation::Snapshot { snapshot });
        }
    }

    fn revert(&mut self, volume: VolumeId) {
        let newest = snapshot_ids(&self.reference.live, volume).last().copied();
        let wanted = if self.dice.once_in(5) { self.some_snapshot(volume) } else { newest };
        let snapshot = wanted.unwrap_or(self.new_snapshot());
        self.submit(volume, Operation::Revert { snapshot });
    }

    fn expand(&mut self, volume: VolumeId) {
        let blocks = blocks(&self.reference.live, volume);
        let less = self.dice.below(blocks.min(9));
        let new = if self.dice.once_in(8) { blocks - less } else { blocks + self.dice.skewed(300) };
        self.submit(volume, Operation::Expand { size: size(new) });
    }

    fn changed(&mut self, volume: VolumeId) {
        let epochs = u64::from(epoch(&self.reference.live, volume)) + 2;
        let from = Epoch::new(u32::try_from(self.dice.below(epochs)).unwrap());
        let snapshot = if self.dice.once_in(3) { self.some_snapshot(volume) } else { None };
        let start = self.some_start(volume);
        self.submit(volume, Operation::Changed { from, snapshot, start });
        // It may tell of changes after it, too.
        self.drain();
    }

    fn some_start(&mut self, volume: VolumeId) -> BlockIndex {
        if self.dice.once_in(2) { BlockIndex::new(0) } else { self.some_extent(volume, 1).first_block() }
    }

    fn scrub(&mut self, volume: VolumeId) {
        let start = self.some_start(volume);
        let blocks = if self.dice.once_in(20) { BLOCKS_MAX + 1 } else { 1 + self.dice.below(BLOCKS_MAX) };
        self.submit(volume, Operation::Scrub { start, blocks });
        self.drain();
    }

    fn logged_after(&mut self, volume: VolumeId) {
        let position = opened(&self.reference.live, volume).unwrap().position.get();
        let after = Seq::new((position + 2).saturating_sub(self.dice.skewed(40)));
        self.submit(volume, Operation::LoggedAfter { after });
    }

    fn create_some(&mut self, index: u64) {
        let blocks = if index == 0 { self.plan.big } else { self.pick(&SIZES) };
        self.create(ReplicaSpec { volume: volume(index), size: size(blocks) });
    }

    fn clone_some(&mut self, origin: VolumeId) {
        let target = volume(self.dice.below(VOLUMES));
        let snapshot = self.some_snapshot(origin).unwrap_or(self.new_snapshot());
        let (more, less) = (self.dice.skewed(300), u64::from(self.dice.once_in(10)));
        self.clone_snapshot(origin, snapshot, target, |blocks| if less == 1 { (blocks - 1).max(1) } else { blocks + more });
    }
}
