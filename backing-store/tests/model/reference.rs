//! The oracle, twice: as everything submitted left it, and without what a crash may still take back.

use std::collections::BTreeMap;

use carrick_backing_store::{
    Epoch, Extent, LoggedExtents, MemoryStore, OpenedReplica, Operation, Outcome, ReplicaSpec, ReplicaStore, Seq, SnapshotId, SnapshotInfo,
    StoreError, StoreId, Token, VolumeId,
};

use super::content;
use super::expected::{Expected, covers};
use super::picture::{Ask, Picture, changed, end_block, extent, head_difference};

/// Logged writes of so many blocks may make a log forget what was before.
const LOG_BLOCKS: u64 = (1 << 30) / 4096;

/// An operation that changes something.
#[derive(Clone)]
struct Issued {
    token: Token,
    operation: Operation,
    acknowledged: bool,
}

impl Issued {
    /// For writes: the sequence, and where.
    const fn write(&self) -> Option<(Option<Seq>, Extent)> {
        match self.operation {
            Operation::Write { seq, extent, .. } | Operation::WriteZeroes { seq, extent } => Some((seq, extent)),
            _ => None,
        }
    }

    const fn reposition(&self) -> Option<Seq> {
        if let Operation::SetState { position, .. } = self.operation { position } else { None }
    }

    fn overlaps(&self, first: u64, end: u64) -> bool {
        self.write().is_some_and(|(_, extent)| extent.first_block().get() < end && first < end_block(extent))
    }
}

/// The position after some operations, if they change it.
fn last_position<'a>(queue: impl DoubleEndedIterator<Item = &'a Issued>) -> Option<Seq> {
    queue.rev().find_map(|issued| issued.reposition().or_else(|| issued.write()?.0))
}

/// What is known of a volume besides its content.
struct Track {
    /// In order of submission, those that `base` lacks.
    queue: Vec<Issued>,
    /// So many of these are on stable media.
    covered: usize,
    /// Epochs between which changes may be forgotten.
    reverted: (u32, u32),
    /// The log is as it was written, not as it was found at a start.
    log_exact: bool,
    log_may_forget: bool,
    /// The highest position that is known to be on stable media.
    synced: Seq,
    /// How often a position was set.
    repositions: u64,
}

impl Track {
    const fn new(reverted: (u32, u32)) -> Self {
        Self { queue: Vec::new(), covered: 0, reverted, log_exact: true, log_may_forget: false, synced: Seq::ZERO, repositions: 0 }
    }

    /// Hands to `base` what can't be lost any more.
    fn compact(&mut self, base: &mut MemoryStore, volume: VolumeId) {
        while self.covered > 0 && self.queue[0].acknowledged {
            run(base, volume, self.queue.remove(0).operation).unwrap();
            self.covered -= 1;
        }
    }
}

const NEVER_REVERTED: (u32, u32) = (u32::MAX, 0);

pub struct Reference {
    pub live: MemoryStore,
    /// Without the queues.
    base: MemoryStore,
    tracks: BTreeMap<VolumeId, Track>,
}

/// Runs an operation on an oracle.
pub fn run(store: &mut MemoryStore, volume: VolumeId, operation: Operation) -> Result<Outcome, StoreError> {
    store.submit(volume, Token(0), operation);
    let mut completions = Vec::new();
    store.reap(&mut completions);
    completions.remove(0).result
}

pub fn opened(store: &MemoryStore, volume: VolumeId) -> Option<OpenedReplica> {
    store.replicas().into_iter().find(|opened| opened.spec.volume == volume)
}

/// The epoch that a volume's next write carries.
pub fn epoch(store: &MemoryStore, volume: VolumeId) -> u32 {
    opened(store, volume).unwrap().epoch.get()
}

fn picture(store: &mut MemoryStore, volume: VolumeId, epochs: u32) -> Picture {
    let (opened, snapshots) = (opened(store, volume).unwrap(), store.snapshots(volume).unwrap());
    Picture::take(&mut |operation| run(store, volume, operation), opened, snapshots, epochs).unwrap()
}

impl Reference {
    pub fn new() -> Self {
        let store = MemoryStore::with_id(StoreId::from_bytes([0; 16]));
        Self { base: store.fork(), live: store, tracks: BTreeMap::new() }
    }

    // Calls that are durable at once.

    pub fn create(&mut self, spec: ReplicaSpec) -> Result<(), StoreError> {
        self.live.create(spec)?;
        self.base.create(spec)?;
        self.tracks.entry(spec.volume).or_insert(Track::new(NEVER_REVERTED));
        Ok(())
    }

    /// Nothing of the origin is in flight.
    pub fn clone_snapshot(&mut self, origin: VolumeId, snapshot: SnapshotId, spec: ReplicaSpec) -> Result<(), StoreError> {
        self.live.clone_snapshot(origin, snapshot, spec)?;
        let Some(track) = self.tracks.get_mut(&origin) else { return Ok(()) };
        // Found after a kill, the snapshot may not have been on stable media; now it is.
        let is_it = |issued: &Issued| matches!(issued.operation, Operation::Snapshot { snapshot: id } if id == snapshot);
        track.covered = track.covered.max(track.queue.iter().rposition(is_it).map_or(0, |index| index + 1));
        track.compact(&mut self.base, origin);
        let reverted = track.reverted;
        self.base.clone_snapshot(origin, snapshot, spec)?;
        self.tracks.entry(spec.volume).or_insert(Track::new(reverted));
        Ok(())
    }

    pub fn delete(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        self.live.delete(volume)?;
        self.base.delete(volume)?;
        self.tracks.remove(&volume);
        Ok(())
    }

    // Operations.

    /// Says what the answer has to be.
    pub fn submit(&mut self, volume: VolumeId, token: Token, operation: Operation) -> Expected {
        let Some(track) = self.tracks.get_mut(&volume) else {
            return Expected::Exactly(run(&mut self.live, volume, operation));
        };
        let live = &mut self.live;
        match operation {
            Operation::Sync => {
                let covers = track.queue.iter().rfind(|issued| issued.acknowledged).map(|issued| issued.token);
                let unsettled = track.queue.iter().any(|issued| issued.reposition().is_some() && !issued.acknowledged);
                let position = last_position(track.queue.iter().filter(|issued| issued.acknowledged));
                let position = position.or(opened(&self.base, volume).map(|opened| opened.position));
                return Expected::Synced { covers, at_least: position.filter(|_| !unsettled), repositions: track.repositions };
            }
            Operation::Changed { from, snapshot, start } => {
                let list = changed(&mut |operation| run(live, volume, operation), (from, snapshot, start.get()));
                return Expected::Changed { list, from, start: start.get(), reverted: track.reverted };
            }
            Operation::Scrub { start, blocks } if (1..=512).contains(&blocks) => {
                let all = changed(&mut |operation| run(live, volume, operation), (Epoch::NEVER, None, 0)).unwrap();
                let data = all.iter().filter(|run| !run.zeroes).map(|run| run.extent).collect();
                return Expected::Scrubbed { data, start: start.get(), blocks };
            }
            Operation::LoggedAfter { .. } => {
                let Ok(Outcome::Logged(extents)) = run(live, volume, operation) else { panic!("the oracle can't answer") };
                return Expected::Logged { extents, exact: track.log_exact, may_forget: track.log_may_forget };
            }
            _ => {}
        }
        let snapshots = live.snapshots(volume).unwrap();
        let known = |id: &SnapshotId| snapshots.iter().any(|info| info.id == *id);
        let changes = match &operation {
            Operation::Snapshot { snapshot } => !known(snapshot),
            Operation::DeleteSnapshot { snapshot } => known(snapshot),
            Operation::Expand { size } => opened(live, volume).unwrap().spec.size != *size,
            Operation::Read { .. } | Operation::Digest { .. } | Operation::Scrub { .. } => false,
            _ => true,
        };
        let result = run(live, volume, operation.clone());
        if changes && result.is_ok() {
            match (&operation, &result, snapshots.last()) {
                (Operation::Revert { .. }, Ok(Outcome::Epoch(raised)), Some(newest)) => {
                    track.reverted = (track.reverted.0.min(newest.epoch.get()), track.reverted.1.max(raised.get()));
                }
                (Operation::SetState { position: Some(_), .. }, ..) => {
                    (track.log_exact, track.synced) = (true, Seq::ZERO);
                    track.repositions += 1;
                }
                (Operation::WriteZeroes { seq: Some(_), extent }, ..) => track.log_may_forget |= extent.block_count() >= LOG_BLOCKS,
                _ => {}
            }
            track.queue.push(Issued { token, operation, acknowledged: false });
        }
        Expected::Exactly(result)
    }

    /// The subject answered, and rightly.
    pub fn acknowledged(&mut self, volume: VolumeId, token: Token, expected: &Expected, outcome: Option<&Outcome>) {
        let Some(track) = self.tracks.get_mut(&volume) else { return };
        let place = |token| track.queue.iter().position(|issued| issued.token == token);
        if let (Expected::Synced { covers, at_least, repositions }, Some(Outcome::Synced { durable })) = (expected, outcome) {
            if let Some(last) = covers.and_then(place) {
                track.covered = track.covered.max(last + 1);
            }
            if let Some(least) = at_least
                && *repositions == track.repositions
            {
                assert!(least <= durable, "durable is {durable}, but {least} was acknowledged before");
                assert!(*durable <= opened(&self.live, volume).unwrap().position, "durable is {durable}, beyond the last write");
                track.synced = track.synced.max(*durable);
            }
        } else if let Some(index) = place(token) {
            track.queue[index].acknowledged = true;
            if track.queue[index].write().is_none() {
                track.covered = track.covered.max(index + 1);
                if !track.queue[index + 1..].iter().any(|issued| issued.reposition().is_some()) {
                    track.synced = track.synced.max(last_position(track.queue[..=index].iter()).unwrap_or_default());
                }
            }
        }
        track.compact(&mut self.base, volume);
    }

    /// How the subject differs while it serves and nothing is in flight.
    pub fn difference(&mut self, volume: VolumeId, snapshots: Vec<SnapshotInfo>, ask: &mut Ask<'_>) -> Option<String> {
        let epochs = epoch(&self.live, volume);
        let oracle = picture(&mut self.live, volume, epochs);
        match Picture::take(ask, oracle.opened, snapshots, epochs) {
            Ok(subject) => oracle.difference(&subject, self.tracks[&volume].reverted, false),
            Err(error) => Some(error.to_string()),
        }
    }

    // Ends.

    /// It was closed in good order: nothing can be lost any more.
    pub fn closed(&mut self) {
        for (volume, track) in &mut self.tracks {
            for issued in track.queue.drain(..) {
                run(&mut self.base, *volume, issued.operation).unwrap();
            }
            (track.covered, track.log_exact) = (0, false);
        }
    }

    /// After a crash: finds out what is left of a volume's operations, or why nothing that may be left looks like the subject.
    pub fn resolve(
        &mut self,
        (found, snapshots): (OpenedReplica, Vec<SnapshotInfo>),
        ask: &mut Ask<'_>,
        power_cut: bool,
    ) -> Result<String, String> {
        let volume = found.spec.volume;
        let epochs = epoch(&self.live, volume);
        let subject = Picture::take(ask, found, snapshots, epochs).map_err(|error| error.to_string())?;
        let track = self.tracks.get_mut(&volume).ok_or("it was deleted")?;
        let acknowledged = track.queue.iter().rposition(|issued| issued.acknowledged).map_or(0, |index| index + 1);
        let least = if power_cut { track.covered } else { acknowledged.max(track.covered) };
        let (all, mut reasons) = (track.queue.len(), Vec::new());
        // After how many operations it would look so.
        let mut fits: Vec<usize> = Vec::new();
        let mut store = self.base.fork();
        for count in 0..=all {
            if count >= least {
                let head = (opened(&store, volume).unwrap(), &*store.snapshots(volume).unwrap());
                let reason = head_difference(head, (subject.opened, &subject.snapshots), power_cut)
                    .or_else(|| picture(&mut store, volume, epochs).difference(&subject, track.reverted, power_cut));
                match reason {
                    None => fits.push(count),
                    Some(reason) => reasons.push(format!("after {count} of {all} operations: {reason}")),
                }
            }
            if let Some(issued) = track.queue.get(count) {
                run(&mut store, volume, issued.operation.clone()).unwrap();
            }
        }
        // A change of the position that was in flight says nothing of what was told before it.
        let told = if track.queue.iter().any(|issued| issued.reposition().is_some()) { Seq::ZERO } else { track.synced };
        if found.durable < told || found.position < found.durable {
            return Err(format!("position {}, durable {}, but {told} was told", found.position, found.durable));
        }
        let mut summary = format!("{least}..={all} operations can be there; as {fits:?}");
        let kept = if let Some(count) = fits.first().copied() {
            track.queue[..count].to_vec()
        } else if power_cut {
            return Err(reasons.join("\n"));
        } else {
            summary = format!("{least}..={all} operations can be there; some in part");
            in_part(&self.base, &track.queue, &subject, (epochs, track.reverted), ask)
                .map_err(|reason| format!("{}\nin part: {reason}", reasons.join("\n")))?
        };
        track.queue = kept;
        track.queue.iter_mut().for_each(|issued| issued.acknowledged = true);
        track.covered = if power_cut { track.queue.len() } else { track.covered.min(track.queue.len()) };
        (track.log_exact, track.synced) = (false, Seq::ZERO);
        track.log_may_forget |= power_cut;
        for issued in track.queue.drain(..std::mem::take(&mut track.covered)) {
            run(&mut self.base, volume, issued.operation).unwrap();
        }
        if power_cut {
            run(&mut self.base, volume, Operation::SetState { state: found.state, position: None }).unwrap();
        }
        Ok(summary)
    }

    /// After all volumes are resolved: goes on from there.
    pub fn resume(&mut self) {
        self.live = self.base.fork();
        for (volume, track) in &self.tracks {
            for issued in &track.queue {
                run(&mut self.live, *volume, issued.operation.clone()).unwrap();
            }
        }
    }
}

/// After a kill: the operations that make the subject what it is, if writes that were in flight may be there block by block.
fn in_part(
    base: &MemoryStore,
    queue: &[Issued],
    subject: &Picture,
    (epochs, reverted): (u32, (u32, u32)),
    ask: &mut Ask<'_>,
) -> Result<Vec<Issued>, String> {
    let volume = subject.opened.spec.volume;
    // What is no write waits for all before it, and all after it wait for that. So there is a last one that took effect, with
    // everything before it; only writes between that and the next one can be there in part.
    let is_barrier = |index: &usize| queue[*index].write().is_none();
    let acknowledged = (0..queue.len()).rfind(|index| is_barrier(index) && queue[*index].acknowledged).map_or(0, |index| index + 1);
    let later = (acknowledged..queue.len()).filter(is_barrier).map(|index| index + 1);
    let mut reasons = Vec::new();
    for first in std::iter::once(acknowledged).chain(later) {
        let end = (first..queue.len()).find(is_barrier).unwrap_or(queue.len());
        let position = subject.opened.position;
        let is_whole =
            |issued: &&Issued| issued.acknowledged || issued.write().is_some_and(|(seq, _)| seq.is_some_and(|seq| seq <= position));
        let mut kept: Vec<Issued> = queue[..first].iter().chain(queue[first..end].iter().filter(is_whole)).cloned().collect();
        let mut store = base.fork();
        for issued in &kept {
            if let Err(error) = run(&mut store, volume, issued.operation.clone()) {
                reasons.push(error.to_string());
            }
        }
        let oracle = picture(&mut store, volume, epochs);
        if let Some(reason) = head_difference((oracle.opened, &oracle.snapshots), (subject.opened, &subject.snapshots), false) {
            reasons.push(reason);
            continue;
        }
        let (mut logged, patches) = match patches(&queue[first..end], is_whole, &oracle, subject) {
            Ok(patches) => patches,
            Err(reason) => {
                reasons.push(reason);
                continue;
            }
        };
        for issued in &patches {
            run(&mut store, volume, issued.operation.clone()).unwrap();
        }
        if let Some(reason) = picture(&mut store, volume, epochs).difference(subject, reverted, false) {
            reasons.push(reason);
            continue;
        }
        logged.retain(|extent| !extent.is_empty());
        match ask(Operation::LoggedAfter { after: position }) {
            Ok(Outcome::Logged(LoggedExtents::Forgotten)) => {}
            Ok(Outcome::Logged(LoggedExtents::All(extents))) if covers(&extents, &logged) => {}
            other => return Err(format!("{logged:?} are there in part; logged after {position}: {other:?}")),
        }
        kept.extend(patches);
        return Ok(kept);
    }
    Err(reasons.join("; "))
}

/// The parts of writes that the subject has and the oracle lacks: where those with a sequence are, and as writes without one.
fn patches(
    writes: &[Issued],
    is_whole: impl Fn(&&Issued) -> bool,
    oracle: &Picture,
    subject: &Picture,
) -> Result<(Vec<Extent>, Vec<Issued>), String> {
    let volume = subject.opened.spec.volume;
    let (old, new) = (oracle.live.runs(), subject.live.runs());
    let mut borders: Vec<u64> = old.iter().chain(&new).flat_map(|(first, (end, _))| [*first, *end]).collect();
    borders.extend(writes.iter().filter_map(Issued::write).flat_map(|(_, extent)| [extent.first_block().get(), end_block(extent)]));
    borders.sort_unstable();
    borders.dedup();
    let (mut logged, mut patches) = (Vec::new(), Vec::new());
    for (first, end) in borders.iter().copied().zip(borders.iter().copied().skip(1)) {
        let at = |runs: &BTreeMap<u64, (u64, _)>| runs.range(..=first).next_back().filter(|(_, run)| first < run.0).map(|(_, run)| run.1);
        let (was, is) = (at(&old), at(&new));
        if was == is {
            continue;
        }
        let number = is.map_or(0, |kind| kind.number);
        let last = writes.iter().rposition(|issued| is_whole(&issued) && issued.overlaps(first, end)).map_or(0, |index| index + 1);
        let explains = |issued: &&Issued| issued.overlaps(first, end) && content::number_of(&issued.operation) == number;
        let Some(issued) = writes[last..].iter().rfind(explains) else {
            return Err(format!("block {first} is {is:?}, was {was:?}, and no write in flight made it that"));
        };
        let part = extent(first, end - first);
        // Zeroes look the same whichever write wrote them: it is in the log for sure only if all that may have are.
        if writes[last..].iter().filter(explains).all(|issued| issued.write().is_some_and(|(seq, _)| seq.is_some())) {
            logged.push(part);
        }
        let operation = match issued.operation {
            Operation::Write { .. } => content::write(volume, number, None, part),
            _ => Operation::WriteZeroes { seq: None, extent: part },
        };
        patches.push(Issued { token: Token(0), operation, acknowledged: true });
    }
    Ok((logged, patches))
}

/// A volume's snapshots, oldest first.
pub fn snapshot_ids(store: &MemoryStore, volume: VolumeId) -> Vec<SnapshotId> {
    store.snapshots(volume).unwrap_or_default().iter().map(|info| info.id).collect()
}

/// How many blocks a volume has.
pub fn blocks(store: &MemoryStore, volume: VolumeId) -> u64 {
    opened(store, volume).map_or(0, |opened| opened.spec.size.blocks())
}
