//! Which operations must take effect in the order of their submission, by the contract of [`crate::ReplicaStore`].

use crate::store::Operation;
use crate::units::Extent;

/// What an operation touches.
enum Touch {
    /// Nothing whose order matters.
    Nothing,
    /// It looks at blocks of the volume as it is now; `None` for all of them.
    Reads(Option<Extent>),
    /// It looks at a snapshot.
    ReadsSnapshot,
    /// It changes blocks; in sequence or not.
    Writes(bool, Extent),
    /// It changes or reads what belongs to the sequence of writes: the log, the position, the state.
    State,
    /// It changes what the blocks of the volume, or of its snapshots, are.
    Shape,
}

impl Touch {
    const fn of(operation: &Operation) -> Self {
        match operation {
            Operation::Sync => Self::Nothing,
            Operation::Read { extent, snapshot: None } => Self::Reads(Some(*extent)),
            Operation::Digest { extent } => Self::Reads(Some(*extent)),
            Operation::Changed { snapshot: None, .. } | Operation::Scrub { .. } => Self::Reads(None),
            Operation::Read { snapshot: Some(_), .. } | Operation::Changed { snapshot: Some(_), .. } => Self::ReadsSnapshot,
            Operation::Write { seq, extent, .. } | Operation::WriteZeroes { seq, extent } => Self::Writes(seq.is_some(), *extent),
            Operation::SetState { .. } | Operation::LoggedAfter { .. } => Self::State,
            Operation::RaiseEpoch { .. }
            | Operation::Snapshot { .. }
            | Operation::DeleteSnapshot { .. }
            | Operation::Revert { .. }
            | Operation::Expand { .. } => Self::Shape,
        }
    }
}

/// Whether `later` must take effect after `earlier`.
pub(super) fn must_follow(earlier: &Operation, later: &Operation) -> bool {
    use Touch::{Nothing, Reads, ReadsSnapshot, Shape, State, Writes};
    match (Touch::of(earlier), Touch::of(later)) {
        (Writes(a, x), Writes(b, y)) => (a && b) || x.overlaps(y),
        (Writes(_, written), Reads(read)) | (Reads(read), Writes(_, written)) => read.is_none_or(|read| read.overlaps(written)),
        (Nothing, _) | (_, Nothing) => false,
        (Reads(_) | ReadsSnapshot, Reads(_) | ReadsSnapshot | State) | (State, Reads(_) | ReadsSnapshot) => false,
        (Writes(..), ReadsSnapshot) | (ReadsSnapshot, Writes(..)) => false,
        (Writes(..), State) | (State, Writes(..) | State) | (Shape, _) | (_, Shape) => true,
    }
}
