//! How stores and replicas are, by evidence over time: one observation never condemns (I12). No clock, no I/O.
//!
//! | Evidence | Health |
//! |---|---|
//! | it answers, and nothing is wrong with it | ready |
//! | it doesn't answer | reconnecting; after [`GRACE`] degraded; after `replace_after` failed |
//! | a store's process has ended again and again, each time within seconds | degraded, until one lives for longer |
//! | a store has damaged blocks that nobody has replaced yet | degraded |
//! | a store says that its disk has failed a write | failed, until a new process looks at it |
//! | a replica doesn't count and answers | degraded: it lacks something |
//! | a replica doesn't count and doesn't answer, or refuses | as if silent since it was left out |

use std::time::{Duration, Instant};

use carrick_ctl::v1;
use carrick_replicator::control::ReplicaProcessStatus;

use crate::observed::{Process, ProcessState, STABLE_AFTER};
use crate::survey::Answer;

/// So long nothing that is silent is more than that: machines start, and cables are plugged in again.
const GRACE: Duration = Duration::from_secs(30);
/// After so long something has failed, if no replica is ever replaced for that.
const FAILED_AFTER: Duration = Duration::from_secs(600);
/// A process that has ended so often in a row within seconds will again.
const FLAPS: u32 = 3;

/// From the best to the worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// As it should be.
    #[default]
    Ready,
    /// Away, and not for long.
    Reconnecting,
    /// Away for longer, or not whole.
    Degraded,
    /// Away for so long that nobody counts on it, or useless by its own word.
    Failed,
}

/// How long something may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    grace: Duration,
    limit: Duration,
}

impl Patience {
    /// Of a node that replaces replicas after so long; `None`: never.
    pub fn new(replace_after: Option<Duration>) -> Self {
        let limit = replace_after.unwrap_or(FAILED_AFTER);
        Self { grace: GRACE.min(limit / 2), limit }
    }

    /// What has been silent for so long, and how much longer it stays that.
    fn after(self, silent: Duration) -> (Health, Option<Duration>) {
        if silent < self.grace {
            (Health::Reconnecting, Some(self.grace - silent))
        } else if silent < self.limit {
            (Health::Degraded, Some(self.limit - silent))
        } else {
            (Health::Failed, None)
        }
    }
}

/// A store's process, and when it may be another, if nothing happens.
pub fn of_process(process: &Process, patience: Patience, now: Instant) -> (Health, Option<Instant>) {
    if let Some(since) = process.silent_since {
        let (health, left) = patience.after(now.saturating_duration_since(since));
        return (health, left.map(|left| now + left));
    }
    match process.state {
        ProcessState::Alive { since, .. } if process.flaps >= FLAPS && now < since + STABLE_AFTER => {
            (Health::Degraded, Some(since + STABLE_AFTER))
        }
        _ if process.answers() => (Health::Ready, None),
        // It is being started, or ends as it was asked to.
        _ => (Health::Reconnecting, None),
    }
}

/// A store, by its process and what that says, if it was asked.
pub fn of_store(process: Option<&Process>, answer: Option<&Answer<ReplicaProcessStatus>>, patience: Patience, now: Instant) -> Health {
    let health = process.map_or(Health::Reconnecting, |process| of_process(process, patience, now).0);
    let says = match answer {
        Some(Ok(status)) if status.poisoned.is_some() => Health::Failed,
        Some(Ok(status)) if !status.scrub.damaged.is_empty() => Health::Degraded,
        Some(Err(_)) => Health::Reconnecting,
        Some(Ok(_)) | None => Health::Ready,
    };
    health.max(says)
}

/// A replica, by what is said of it. `silent`: how long it hasn't counted, if it doesn't. `store`: how its store is.
pub fn of_replica(replica: &v1::Replica, silent: Option<Duration>, patience: Patience, store: Health) -> Health {
    use v1::ReplicaState::{Behind, Copying, Disconnected, Idle, InSync, Joining, Missing, Refused, Unspecified};
    let since_left_out = silent.map_or(Health::Reconnecting, |silent| patience.after(silent).0);
    match replica.state() {
        Idle | InSync if replica.counts => Health::Ready,
        Idle | InSync | Copying | Behind => Health::Degraded,
        Disconnected | Joining if replica.counts => store.max(Health::Reconnecting),
        Disconnected | Joining | Unspecified => since_left_out,
        Refused | Missing => since_left_out.max(Health::Degraded),
    }
}

impl From<Health> for v1::Health {
    fn from(health: Health) -> Self {
        match health {
            Health::Ready => Self::Ready,
            Health::Reconnecting => Self::Reconnecting,
            Health::Degraded => Self::Degraded,
            Health::Failed => Self::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::StoreId;

    use super::*;
    use crate::observed::{Event, Exit, Observed, ProcessId};
    use Health::{Degraded, Failed, Ready, Reconnecting};

    const STORE: ProcessId = ProcessId::Replica(StoreId::from_bytes([1; 16]));

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn patience() -> Patience {
        Patience::new(Some(seconds(600)))
    }

    fn alive() -> Event {
        Event::Alive { process: STORE, pid: 9, adopted: false }
    }

    fn died() -> Event {
        Event::Ended { process: STORE, exit: Exit::Died("killed".into()) }
    }

    #[test]
    fn silence_is_judged_by_its_length_and_forgotten_with_the_first_answer() {
        let begin = Instant::now();
        let mut observed = Observed::default();
        for event in [alive(), Event::Answering(STORE)] {
            observed.on_event(event, begin);
        }
        let look = |observed: &Observed, after: u64| {
            let now = begin + seconds(after);
            let (health, change) = of_process(&observed.processes[&STORE], patience(), now);
            (health, change.map(|change| change.duration_since(begin).as_secs()))
        };
        assert_eq!(look(&observed, 100), (Ready, None));
        observed.on_event(died(), begin + seconds(100));
        assert_eq!(look(&observed, 100), (Reconnecting, Some(130)));
        // Attempts that come to nothing don't count anew.
        for event in [alive(), died(), alive(), Event::Hung(STORE)] {
            observed.on_event(event, begin + seconds(120));
        }
        assert_eq!(look(&observed, 129), (Reconnecting, Some(130)));
        assert_eq!(look(&observed, 130), (Degraded, Some(700)));
        assert_eq!(look(&observed, 700), (Failed, None));
        observed.on_event(Event::Answering(STORE), begin + seconds(800));
        assert_eq!(look(&observed, 800), (Ready, None));
        // One that ends as it was asked to is no worse for that.
        observed.on_event(Event::EndAsked(STORE), begin + seconds(801));
        observed.on_event(Event::EndAnswered { process: STORE, granted: true }, begin + seconds(801));
        observed.on_event(died(), begin + seconds(801));
        assert_eq!(look(&observed, 900), (Reconnecting, None));
    }

    #[test]
    fn one_that_ends_again_and_again_is_degraded_until_it_lives() {
        let begin = Instant::now();
        let mut observed = Observed::default();
        // It couldn't start: that is silence.
        for _ in 0..FLAPS {
            [alive(), died()].into_iter().for_each(|event| observed.on_event(event, begin));
        }
        [alive(), Event::Answering(STORE)].into_iter().for_each(|event| observed.on_event(event, begin));
        assert_eq!(of_process(&observed.processes[&STORE], patience(), begin), (Ready, None));
        for _ in 0..FLAPS {
            [alive(), Event::Answering(STORE), died()].into_iter().for_each(|event| observed.on_event(event, begin));
        }
        [alive(), Event::Answering(STORE)].into_iter().for_each(|event| observed.on_event(event, begin));
        let at = |now| of_process(&observed.processes[&STORE], patience(), now);
        assert_eq!(at(begin), (Degraded, Some(begin + STABLE_AFTER)));
        assert_eq!(at(begin + STABLE_AFTER), (Ready, None));
    }

    #[test]
    fn a_short_patience_has_a_short_grace() {
        let short = Patience::new(Some(seconds(4)));
        assert_eq!([0, 1, 2, 3, 4].map(|silent| short.after(seconds(silent)).0), [Reconnecting, Reconnecting, Degraded, Degraded, Failed]);
        let never = Patience::new(None);
        assert_eq!([29, 30, 599, 600].map(|silent| never.after(seconds(silent)).0), [Reconnecting, Degraded, Degraded, Failed]);
    }

    #[test]
    fn a_replica_is_what_it_lacks_and_for_how_long_it_has_been_away() {
        use v1::ReplicaState::{Copying, Disconnected, Idle, InSync, Joining, Missing, Refused};
        let look = |state: v1::ReplicaState, counts: bool, silent: Option<u64>, store: Health| {
            let replica = v1::Replica { state: state.into(), counts, ..v1::Replica::default() };
            of_replica(&replica, silent.map(seconds), patience(), store)
        };
        assert_eq!([InSync, Idle].map(|state| look(state, true, None, Ready)), [Ready; 2]);
        assert_eq!([InSync, Idle, Copying].map(|state| look(state, false, Some(0), Ready)), [Degraded; 3]);
        // It counts: nobody has missed it for long.
        assert_eq!([Disconnected, Joining].map(|state| look(state, true, None, Ready)), [Reconnecting; 2]);
        assert_eq!(look(Disconnected, true, None, Failed), Failed, "of a volume that nobody uses: like its store");
        for (silent, health) in [(0, Reconnecting), (29, Reconnecting), (30, Degraded), (600, Failed)] {
            assert_eq!(look(Disconnected, false, Some(silent), Ready), health, "{silent}");
        }
        assert_eq!([Refused, Missing].map(|state| look(state, false, Some(1), Ready)), [Degraded; 2]);
        assert_eq!([Refused, Missing].map(|state| look(state, false, Some(601), Ready)), [Failed; 2]);
    }
}
