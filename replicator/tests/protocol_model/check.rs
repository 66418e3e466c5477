//! What must hold in every state.

use super::rules::Bounds;
use super::state::{ALL, PRIMARIES, Phase, REPLICAS, State, each, majority};

/// What a state must never show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// A primary that starts now may choose a content without an acknowledged write.
    LostWrite,
    /// A primary that starts now, or one that serves, may show what does not go on from what users have seen.
    ChangedBack,
    /// Two primaries can both go on acknowledging.
    TwoPrimaries,
    /// Replicas that adopted the same term do not hold the same.
    Disagreement,
}

impl Bounds {
    /// The first violation found in this state.
    pub fn violation(&self, state: &State) -> Option<Violation> {
        if state.torn {
            return Some(Violation::ChangedBack);
        }
        let can_acknowledge = (0..PRIMARIES).filter(|primary| is_capable(state, *primary)).count();
        if can_acknowledge > 1 {
            return Some(Violation::TwoPrimaries);
        }
        if (0..PRIMARIES).any(|primary| disagrees(state, primary)) {
            return Some(Violation::Disagreement);
        }
        // Whoever takes the record now, and whoever recovers now without the store, under a term above all others.
        let by_record = self.choices_by_record(state, state.record, ALL);
        let by_replicas = self.choices_by_replicas(state, ALL).map(|(_, chosen)| chosen);
        by_record.chain(by_replicas).find_map(|chosen| lost_by(state, chosen))
    }
}

/// Whether enough members of the primary's config still follow it.
fn is_capable(state: &State, primary: usize) -> bool {
    let (term, primary) = (primary as u8 + 1, &state.primaries[primary]);
    let is_majority_of = |members: u8| {
        let following = each(members & primary.reconciled).filter(|replica| state.replicas[*replica].promised == term);
        following.count() as u32 >= majority(members)
    };
    let next = Some(primary.next).filter(|_| primary.phase == Phase::Changing);
    primary.phase >= Phase::Serving && is_majority_of(primary.config.members) && next.is_none_or(is_majority_of)
}

/// Whether replicas that adopted this primary's term, and follow it, differ in more than what one has not received yet.
fn disagrees(state: &State, primary: usize) -> bool {
    let term = primary as u8 + 1;
    let is_in_sync = |replica: &usize| state.replicas[*replica].promised == term && state.replicas[*replica].log_term == term;
    let serves = state.primaries[primary].phase >= Phase::Serving;
    let mut logs = (0..REPLICAS).filter(is_in_sync).map(|replica| state.replicas[replica].log);
    let Some(first) = logs.next().filter(|_| serves) else { return false };
    let mut longest = first;
    logs.any(|log| {
        let differs = log.after(longest).is_none() && longest.after(log).is_none();
        longest = if log.after(longest).is_some() { log } else { longest };
        differs
    })
}

/// What users would notice if a new primary chose the content of this replica.
fn lost_by(state: &State, chosen: usize) -> Option<Violation> {
    let content = state.replicas[chosen].log;
    let last = state.last_served();
    // A write of an older term that nobody saw is gone for good.
    let goes_on = content.after(state.seen).is_some_and(|rest| rest.writes().all(|(term, _)| term >= last));
    if goes_on {
        return None;
    }
    let holds = |term: u8, sequence: u8| content.writes().any(|write| write == (term, sequence));
    let mut acknowledged = state.primaries.iter().zip(1..).flat_map(|(primary, term)| (1..=primary.acknowledged).map(move |n| (term, n)));
    let has_all = acknowledged.all(|(term, sequence)| holds(term, sequence));
    Some(if has_all { Violation::ChangedBack } else { Violation::LostWrite })
}
