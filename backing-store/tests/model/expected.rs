//! What the subject has to answer.

use carrick_backing_store::{
    BlockIndex, CHANGED_MAX, ChangedExtent, Completion, Epoch, Extent, LoggedExtents, Outcome, ReadData, Scrubbed, Seq, StoreError, Token,
};

use super::picture::{end_block, extent};

#[derive(Debug)]
pub enum Expected {
    /// What the oracle answered.
    Exactly(Result<Outcome, StoreError>),
    /// The first part of this, from a block on. Between the epochs of `reverted` more may be forgotten.
    Changed { list: Result<Vec<ChangedExtent>, StoreError>, from: Epoch, start: u64, reverted: (u32, u32) },
    /// These runs of data, from a block on, up to so many blocks.
    Scrubbed { data: Vec<Extent>, start: u64, blocks: u64 },
    /// What was acknowledged before, of which this operation is the last, and, if no position is set beside it, a position.
    Synced { covers: Option<Token>, at_least: Option<Seq>, repositions: u64 },
    /// These extents, and perhaps more or nothing.
    Logged { extents: LoggedExtents, exact: bool, may_forget: bool },
    /// The volume was deleted beside it.
    Anything,
}

fn same_error(a: &StoreError, b: &StoreError) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}

/// Blocks that are in any of the extents, as joined runs.
fn union(extents: &[Extent]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = extents.iter().map(|extent| (extent.first_block().get(), end_block(*extent))).collect();
    runs.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (first, end) in runs.into_iter().filter(|(first, end)| first < end) {
        match joined.last_mut().filter(|last| first <= last.1) {
            Some(last) => last.1 = last.1.max(end),
            None => joined.push((first, end)),
        }
    }
    joined
}

/// Whether every block of `inner` is in `outer`.
pub fn covers(outer: &[Extent], inner: &[Extent]) -> bool {
    let outer = union(outer);
    union(inner).iter().all(|(first, end)| outer.iter().any(|run| run.0 <= *first && *end <= run.1))
}

impl Expected {
    /// What is wrong with an answer.
    pub fn objection(&self, completion: &Completion) -> Option<String> {
        let right = match (self, &completion.result) {
            (Self::Anything, _) => true,
            (Self::Exactly(Err(oracle)), Err(subject)) => same_error(oracle, subject),
            (Self::Exactly(Ok(oracle)), Ok(subject)) => same_outcome(oracle, subject),
            (Self::Changed { list: Err(oracle), .. }, Err(subject)) => same_error(oracle, subject),
            (Self::Changed { list: Ok(_), from, reverted, .. }, Err(StoreError::EpochForgotten { .. })) => {
                reverted.0 < from.get() && from.get() < reverted.1
            }
            (Self::Changed { list: Ok(list), start, .. }, Ok(Outcome::Changed(found))) => {
                let end = found.next.map_or(u64::MAX, BlockIndex::get);
                let expected: Vec<ChangedExtent> = list.iter().filter_map(|run| clipped(*run, *start, end)).collect();
                found.extents.len() <= CHANGED_MAX && end > *start && found.extents == expected
            }
            (Self::Scrubbed { data, start, blocks }, Ok(Outcome::Scrubbed(Scrubbed { verified, bad, next }))) => {
                let end = next.map_or(u64::MAX, BlockIndex::get);
                let data = data.iter().map(|run| end_block(*run).min(end).saturating_sub(run.first_block().get().max(*start)));
                bad.is_empty() && *verified == data.sum::<u64>() && verified <= blocks && end > *start
            }
            (Self::Synced { .. }, Ok(Outcome::Synced { .. })) => true,
            (Self::Logged { may_forget: true, .. }, Ok(Outcome::Logged(LoggedExtents::Forgotten))) => true,
            (Self::Logged { extents, exact, .. }, Ok(Outcome::Logged(found))) => match (extents, found) {
                (LoggedExtents::Forgotten, LoggedExtents::Forgotten) => true,
                (LoggedExtents::All(oracle), LoggedExtents::All(subject)) if *exact => union(oracle) == union(subject),
                (LoggedExtents::All(oracle), LoggedExtents::All(subject)) => covers(subject, oracle),
                _ => false,
            },
            _ => false,
        };
        (!right).then(|| format!("the answer is {}, expected was {}", short(&completion.result), short(self)))
    }
}

fn same_outcome(oracle: &Outcome, subject: &Outcome) -> bool {
    match (oracle, subject) {
        (Outcome::Read(ReadData::Zeroes), Outcome::Read(subject)) => match subject {
            ReadData::Zeroes => true,
            ReadData::Blocks { data, .. } => data.iter().all(|byte| *byte == 0),
        },
        (Outcome::Read(ReadData::Blocks { checksums: a, data: x }), Outcome::Read(ReadData::Blocks { checksums: b, data: y })) => {
            a == b && **x == **y
        }
        (Outcome::Read(_), Outcome::Read(_)) => false,
        (Outcome::Epoch(oracle), Outcome::Epoch(subject)) => oracle == subject,
        (Outcome::Digest(oracle), Outcome::Digest(subject)) => oracle == subject,
        (oracle, subject) => std::mem::discriminant(oracle) == std::mem::discriminant(subject),
    }
}

fn clipped(run: ChangedExtent, start: u64, end: u64) -> Option<ChangedExtent> {
    let (first, last) = (run.extent.first_block().get().max(start), end_block(run.extent).min(end));
    (first < last).then(|| ChangedExtent { extent: extent(first, last - first), zeroes: run.zeroes })
}

/// Without the bytes of blocks.
fn short(thing: &impl std::fmt::Debug) -> String {
    let text = format!("{thing:?}");
    if text.len() > 1000 { format!("{}…", text.chars().take(1000).collect::<String>()) } else { text }
}
