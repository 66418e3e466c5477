//! What the life of a process tells: what was known of it before and after an event in, events for the log out. No clock, no I/O.
//!
//! | Before | After | Event |
//! |---|---|---|
//! | wasn't there, or ended as asked | runs, started by this carrickd | started |
//! | ran, or was being started | crashed, or ended by itself saying why | crashed, failed |
//! | ran | killed by carrickd, to start another | replaced |
//! | ran (of a store) | ended as asked | stopped; of a volume, its detachment says so |
//! | runs | should answer by now | silent |
//! | was silent, or ended by itself before | answers | recovered |

use crate::health::Health;
use crate::metadata::{EventKind, NewEvent, State, Subject, VolumeRecord, place, subject};
use crate::observed::{EndRequest, Exit, Process, ProcessId, ProcessState};

/// What the log is told of a process that this is known of.
pub fn told(state: &State, id: ProcessId, before: Option<&Process>, after: &Process, at_unix: u64) -> Vec<NewEvent> {
    let (subject, program) = match id {
        ProcessId::Replica(store) if state.stores.contains_key(&store) => (Subject::Store(place(state, store)), "carrick-replica"),
        ProcessId::Target(volume) => match state.volumes.get(&volume) {
            Some(record) => (subject(record), "carrick-target"),
            None => return Vec::new(),
        },
        // What becomes of the process of a store that was removed is nobody's concern.
        ProcessId::Replica(_) => return Vec::new(),
    };
    let of = |(kind, what): (EventKind, String)| NewEvent { at_unix, kind, subject, replica: None, text: format!("its {program} {what}") };
    let mut events: Vec<_> = turn(id, before, after).map(of).into_iter().collect();
    if let ProcessId::Replica(store) = id
        && answers_now(before, after)
        && !after.adopted
    {
        let lacks = |volume: &&VolumeRecord| volume.left_out.contains_key(&store) && !volume.joining.contains(&store);
        events.extend(state.volumes.values().filter(lacks).map(|volume| {
            let (kind, place) = (EventKind::ReplicaRebuilding, place(state, store));
            let text = format!("the replica in {} gets what it lacks: its store answers again", place.path);
            NewEvent { at_unix, kind, subject: crate::metadata::subject(volume), replica: Some(place), text }
        }));
    }
    events
}

/// That this carrickd serves.
pub fn daemon_started(at_unix: u64) -> NewEvent {
    let text = format!("carrickd {} serves", env!("CARGO_PKG_VERSION"));
    NewEvent { at_unix, kind: EventKind::DaemonStarted, subject: Subject::Node, replica: None, text }
}

/// What the log is told when a store is better or worse than it was.
pub fn judged(state: &State, id: ProcessId, health: Health, at_unix: u64) -> Option<NewEvent> {
    let ProcessId::Replica(store) = id else { return None };
    let (kind, text) = match health {
        Health::Ready => (EventKind::StoreReady, "is ready again"),
        Health::Degraded => (EventKind::StoreDegraded, "is degraded: its carrick-replica doesn't come back, or ends again and again"),
        Health::Failed => (EventKind::StoreFailed, "has failed: its carrick-replica hasn't answered for long"),
        Health::Reconnecting => return None,
    };
    let subject = Subject::Store(place(state, store));
    state.stores.contains_key(&store).then(|| NewEvent { at_unix, kind, subject, replica: None, text: text.into() })
}

/// What has changed for those who need the process.
fn turn(id: ProcessId, before: Option<&Process>, after: &Process) -> Option<(EventKind, String)> {
    let ended_badly = matches!(after.last_exit, Some(Exit::Died(_) | Exit::Failed(_)));
    if has_ended(after) && !before.is_some_and(has_ended) {
        let was_killed = before.is_some_and(|before| before.killed);
        return match after.last_exit.as_ref()? {
            Exit::Asked if matches!(id, ProcessId::Replica(_)) => Some((EventKind::ProcessStopped, "ended as it was asked to".into())),
            Exit::Asked => None,
            Exit::Died(_) if was_killed => Some((EventKind::ProcessReplaced, "was killed by carrickd, which starts another".into())),
            Exit::Died(how) => Some((EventKind::ProcessCrashed, how.clone())),
            Exit::Failed(error) => Some((EventKind::ProcessFailed, format!("ended: {}", error.message))),
        };
    }
    if after.hangs() && !before.is_some_and(Process::hangs) {
        return Some((EventKind::ProcessSilent, "runs, but doesn't answer".into()));
    }
    if answers_now(before, after) && (ended_badly || before.is_some_and(Process::hangs)) {
        return Some((EventKind::ProcessRecovered, "answers again".into()));
    }
    let is_new = after.pid().is_some() && before.is_none_or(|before| before.pid().is_none());
    (is_new && !after.adopted && !ended_badly).then(|| (EventKind::ProcessStarted, "was started".into()))
}

/// It ended, and how is settled: not while whoever asked it to end waits for the answer.
fn has_ended(process: &Process) -> bool {
    matches!(process.state, ProcessState::Down { .. }) && process.last_exit.is_some() && process.request != EndRequest::Asked
}

/// It answers for the first time in its life, or since it was silent.
fn answers_now(before: Option<&Process>, after: &Process) -> bool {
    let before = before.map(|before| (before.answers(), before.state));
    // One that refuses to end answered all the time.
    after.answers() && !matches!(before, Some((true, _) | (_, ProcessState::Stopping { .. })))
}

#[cfg(test)]
mod tests {
    //! Lives, and what is told of them.

    use std::time::{Duration, Instant};

    use carrick_backing_store::{StoreId, VolumeId};
    use carrick_replicator::control::{ControlError, ControlErrorCode};

    use super::*;
    use crate::metadata::tests::{attachment, store, volume};
    use crate::metadata::{AttachmentPhase, Mutation};
    use crate::observed::{Event, Observed};

    const TARGET: ProcessId = ProcessId::Target(VolumeId::from_bytes([5; 16]));
    const REPLICA: ProcessId = ProcessId::Replica(StoreId::from_bytes([1; 16]));

    fn state() -> State {
        let mut state = State::default();
        for mutation in [
            Mutation::PutStore(store(1)),
            Mutation::PutStore(store(2)),
            Mutation::InsertVolume(volume(5, "vm1", &[1, 2]).into()),
            Mutation::PutAttachment(attachment(5, AttachmentPhase::Attached)),
        ] {
            state.apply(&mutation).unwrap();
        }
        state
    }

    fn live(state: &State, id: ProcessId, events: Vec<Event>) -> Vec<(EventKind, String)> {
        let mut observed = Observed::default();
        let mut told = Vec::new();
        for event in events {
            if matches!(event, Event::Alive { .. }) {
                observed.on_launch(id);
            }
            let before = observed.processes.get(&id).cloned();
            observed.on_event(event, Instant::now() + Duration::from_secs(1));
            told.extend(super::told(state, id, before.as_ref(), &observed.processes[&id], 7));
        }
        told.into_iter().map(|event| (event.kind, event.text)).collect()
    }

    fn kinds(id: ProcessId, events: Vec<Event>) -> Vec<EventKind> {
        live(&state(), id, events).into_iter().map(|(kind, _)| kind).collect()
    }

    fn alive(process: ProcessId) -> Event {
        Event::Alive { process, pid: 9, adopted: false }
    }

    fn died(process: ProcessId) -> Event {
        Event::Ended { process, exit: Exit::Died("was killed by signal 9".into()) }
    }

    use EventKind::{
        ProcessCrashed, ProcessFailed, ProcessRecovered, ProcessReplaced, ProcessSilent, ProcessStarted, ProcessStopped, ReplicaRebuilding,
    };

    #[test]
    fn a_crash_and_what_follows_is_told_once() {
        let answers = || vec![alive(TARGET), Event::Answering(TARGET)];
        let life = [answers(), vec![died(TARGET)], vec![alive(TARGET)], vec![died(TARGET)], answers()].concat();
        assert_eq!(kinds(TARGET, life), [ProcessStarted, ProcessCrashed, ProcessCrashed, ProcessRecovered]);
        let words = live(&state(), TARGET, vec![alive(TARGET), died(TARGET)]);
        assert_eq!(words[1].1, "its carrick-target was killed by signal 9");
        let error = ControlError { code: ControlErrorCode::Unsupported, message: "no ublk".into() };
        let failed = vec![alive(TARGET), Event::Ended { process: TARGET, exit: Exit::Failed(error) }];
        let words = live(&state(), TARGET, failed);
        assert_eq!(words[1], (ProcessFailed, "its carrick-target ended: no ublk".into()));
    }

    #[test]
    fn one_that_is_adopted_is_no_news_and_its_silence_is() {
        let adopted = |id| Event::Alive { process: id, pid: 9, adopted: true };
        assert_eq!(kinds(REPLICA, vec![adopted(REPLICA), Event::Answering(REPLICA)]), []);
        let silent = vec![adopted(REPLICA), Event::Hung(REPLICA), Event::Answering(REPLICA)];
        assert_eq!(kinds(REPLICA, silent), [ProcessSilent, ProcessRecovered]);
    }

    #[test]
    fn an_end_that_was_asked_for_is_no_crash_whenever_that_is_known() {
        for early in [true, false] {
            let answer = |granted| Event::EndAnswered { process: TARGET, granted };
            let begin = vec![alive(TARGET), Event::EndAsked(TARGET)];
            let end = |granted| if early { vec![answer(granted), died(TARGET)] } else { vec![died(TARGET), answer(granted)] };
            assert_eq!(kinds(TARGET, [begin.clone(), end(true)].concat()), [ProcessStarted]);
            assert_eq!(kinds(TARGET, [begin, end(false)].concat()), [ProcessStarted, ProcessCrashed], "{early}");
        }
        let killed = vec![alive(TARGET), Event::Killed(TARGET), died(TARGET), alive(TARGET), Event::Answering(TARGET), died(TARGET)];
        assert_eq!(kinds(TARGET, killed), [ProcessStarted, ProcessReplaced, ProcessRecovered, ProcessCrashed]);
        let too_late = vec![alive(TARGET), died(TARGET), Event::Killed(TARGET), alive(TARGET), died(TARGET)];
        assert_eq!(kinds(TARGET, too_late), [ProcessStarted, ProcessCrashed, ProcessCrashed]);
        let stopped = vec![
            alive(REPLICA),
            Event::EndAsked(REPLICA),
            Event::EndAnswered { process: REPLICA, granted: true },
            died(REPLICA),
            alive(REPLICA),
        ];
        assert_eq!(kinds(REPLICA, stopped), [ProcessStarted, ProcessStopped, ProcessStarted]);
    }

    #[test]
    fn a_store_that_is_back_brings_back_what_was_left_out() {
        let mut state = state();
        let life = || vec![alive(REPLICA), Event::Answering(REPLICA)];
        assert_eq!(live(&state, REPLICA, life()).len(), 1);
        state.volumes.values_mut().for_each(|volume| _ = volume.left_out.insert(StoreId::from_bytes([1; 16]), 7));
        let told = live(&state, REPLICA, life());
        assert_eq!(told[1].0, ReplicaRebuilding);
        assert!(told[1].1.contains("/srv/store1"), "{told:?}");
        state.stores.clear();
        assert_eq!(live(&state, REPLICA, life()), [], "nobody's store");
    }
}
