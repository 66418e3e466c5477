//! Why a volume is as it is: what is not as it should be, since when, what happens next by itself, and what an operator can do. No I/O:
//! it reads what was asked of all processes before.

use std::time::Duration;

use carrick_backing_store::StoreId;
use carrick_backing_store::size::HumanSize;
use carrick_ctl::v1;

use crate::metadata::{EventKind, EventLog, SubjectId, Trouble, VolumeRecord};
use crate::operations;
use crate::view::{self, View};

/// Explains one volume. Nothing found: it is as it should be.
pub fn explain(view: &View<'_>, record: &VolumeRecord, replace_after: Option<Duration>, log: &EventLog) -> v1::ExplainVolumeResponse {
    let volume = view.volume(record);
    let mut findings: Vec<_> = view.trouble.iter().map(of_records).collect();
    match volume.state() {
        v1::VolumeState::Creating => findings.push(finding(
            "VOLUME_CREATING",
            "its replicas are being made".into(),
            "it is ready when all are; if that is interrupted, it is undone",
            "wait; if it stays so, see carrick status for the stores",
        )),
        v1::VolumeState::Deleting => {
            let stores: Vec<_> = volume.replicas.iter().map(|replica| replica.store_path.as_str()).collect();
            findings.push(finding(
                "VOLUME_DELETING",
                format!("it is deleted, but for its replicas in {}", stores.join(", ")),
                "they are deleted when their stores answer; its name is free already",
                "bring the stores back, or remove them for good: carrick store remove",
            ));
        }
        v1::VolumeState::Ready | v1::VolumeState::Unspecified => {
            findings.extend(of_attachment(&volume));
            findings.extend(of_verification(&volume));
            findings.extend(
                view.state
                    .running(record.id)
                    .filter_map(|operation| of_operation(&operations::message(view.state, operation), operation.task.has_own_steps())),
            );
            findings.extend(of_eviction(view, record));
            findings.extend(record.replicas.iter().zip(&volume.replicas).filter_map(|(store, replica)| {
                let since = record.left_out.get(store).copied();
                of_replica(replica, since, replace_after, record.joining.contains(store))
            }));
            findings.extend(volume.leaving_stores.iter().map(|store| {
                finding(
                    "REPLICA_LEAVING",
                    format!("the replica that was replaced in {store} is still to be deleted"),
                    "it is deleted when that store answers",
                    "bring the store back, or remove it for good: carrick store remove",
                )
            }));
        }
    }
    for finding in findings.iter_mut().filter(|finding| finding.since_unix.is_none()) {
        finding.since_unix = since(log, SubjectId::Volume(record.id), &finding.reason);
    }
    let stalls = |finding: &v1::Finding| matches!(finding.reason.as_str(), "IO_WAITS" | "TARGET_DOWN" | "ATTACHING" | "DETACHING");
    let serves = volume.attachment.is_some() && !findings.iter().any(stalls);
    v1::ExplainVolumeResponse { volume: volume.name, serves, findings }
}

/// Since when that is so, if the log tells: nothing has happened after it that ended it.
fn since(log: &EventLog, subject: SubjectId, reason: &str) -> Option<u64> {
    use EventKind::{
        Attached, DetachFailed, Detaching, ProcessCrashed, ProcessFailed, ProcessRecovered, ProcessReplaced, ProcessSilent, ProcessStarted,
    };
    let (begins, ends): (&[_], &[_]) = match reason {
        "DETACHING" => (&[Detaching], &[DetachFailed, Attached]),
        "TARGET_DOWN" => (&[ProcessCrashed, ProcessFailed, ProcessReplaced, ProcessSilent], &[ProcessRecovered, ProcessStarted, Attached]),
        _ => return None,
    };
    let last = log.last_of(subject, |event| begins.contains(&event.kind) || ends.contains(&event.kind))?;
    begins.contains(&last.kind).then_some(last.last_unix)
}

fn finding(reason: &str, message: String, next: &str, advice: &str) -> v1::Finding {
    v1::Finding { reason: reason.into(), message, since_unix: None, next: next.into(), advice: advice.into() }
}

fn of_records(trouble: &Trouble) -> v1::Finding {
    let found = finding(
        "METADATA_UNREACHABLE",
        format!("carrickd's records can't be written: {}", trouble.why),
        "requests go on as long as a majority of the replicas that count is there; what needs a record waits or fails, and is tried again",
        "make room in carrickd's state directory, or see to its disk",
    );
    v1::Finding { since_unix: Some(trouble.since_unix), ..found }
}

fn of_attachment(volume: &v1::Volume) -> Vec<v1::Finding> {
    let Some(attachment) = &volume.attachment else { return Vec::new() };
    let name = &volume.name;
    let mut findings = Vec::new();
    match attachment.state() {
        v1::AttachmentState::Attaching => findings.push(finding(
            "ATTACHING",
            "its device has not answered yet".into(),
            "if it doesn't within 30 s, the attachment is taken back",
            "wait for carrick attach to say what came of it",
        )),
        v1::AttachmentState::Detaching => findings.push(finding(
            "DETACHING",
            "its device is being taken away".into(),
            "it is tried again until it is gone",
            &format!("if its target hangs: carrick detach --force {name}"),
        )),
        v1::AttachmentState::Attached | v1::AttachmentState::Unspecified => {}
    }
    if let Some(what) = &attachment.waiting_for {
        findings.push(finding(
            "IO_WAITS",
            format!("requests wait for {what}"),
            "they go on, without an error, when that is so",
            "bring those replicas' stores back; if they are gone for good: carrick volume salvage",
        ));
    }
    if let Some(problem) = &attachment.problem {
        findings.push(finding(
            "TARGET_DOWN",
            problem.clone(),
            "a target is started again and takes the device over; requests wait in the kernel",
            "if it stays so, see the target's log in the state directory",
        ));
    }
    if let Some(device) = attachment.device_size_bytes.filter(|device| *device < volume.size_bytes) {
        findings.push(finding(
            "DEVICE_SMALLER",
            format!("its device has {}, the volume {}", HumanSize(device), HumanSize(volume.size_bytes)),
            "a kernel that can changes the device at once; this one does not",
            &format!("when it suits its user: carrick detach {name}, carrick attach {name}"),
        ));
    }
    findings
}

fn of_verification(volume: &v1::Volume) -> Option<v1::Finding> {
    let unsettled = view::unsettled(volume);
    (unsettled > 0).then(|| {
        finding(
            "REPLICAS_DIFFER",
            format!("its replicas differ in {unsettled} blocks, and nobody can tell which is right"),
            "reads of these blocks are answered by either",
            &format!("compare with a backup, and write what is right; then: carrick volume verify {}", volume.name),
        )
    })
}

fn of_operation(operation: &v1::Operation, has_own_steps: bool) -> Option<v1::Finding> {
    let goal = operations::goal(operation);
    let Some(why) = &operation.message else {
        let runs = finding(
            "OPERATION_RUNS",
            format!("operation {}: {goal} (step {})", operation.id, operation.step),
            "it goes on by itself, also after a restart of anything",
            &format!("carrick operation watch {}", operation.id),
        );
        // What the others do is told of the attachment or the replica.
        return has_own_steps.then_some(runs);
    };
    let advice = match has_own_steps {
        true => format!("see to what it waits for, or, while it can be taken back: carrick operation cancel {}", operation.id),
        false => "see to what it waits for".into(),
    };
    let waits = finding(
        operation.reason.as_deref().unwrap_or("OPERATION_WAITS"),
        format!("operation {}: that {goal} waits at step {}: {why}", operation.id, operation.step),
        "the step is tried again, after pauses of at most a minute",
        &advice,
    );
    Some(v1::Finding { since_unix: operation.waiting_since_unix, ..waits })
}

/// A replica that is to leave its store, and has no other yet.
fn of_eviction(view: &View<'_>, record: &VolumeRecord) -> Vec<v1::Finding> {
    let told = |store: StoreId| {
        finding(
            "STORE_EVICTING",
            format!("the replica in {} is to go to another store, and has none yet", view.state.place(store)),
            "it is moved, one replica of a volume at a time, as soon as another store answers, takes new replicas and has room",
            "carrick store add; or let replicas come to others: carrick store enable, carrick node enable",
        )
    };
    view.state.to_evict(record).map(told).collect()
}

fn of_replica(replica: &v1::Replica, since: Option<u64>, replace_after: Option<Duration>, joins: bool) -> Option<v1::Finding> {
    let place = &replica.store_path;
    let detail = replica.last_error.as_ref().map_or(String::new(), |error| format!(": {error}"));
    let replaced = || match replace_after {
        Some(after) => format!("if it doesn't count for {} s, it is replaced in another store that has room", after.as_secs()),
        None => "it is never replaced by itself (carrickd --replace-after never)".into(),
    };
    let come_back = "it is taken back, and gets what it lacks, when it answers";
    let advice = "see to its store: carrick store show; or put the replica elsewhere: carrick volume replace";
    let (reason, what, next) = match replica.state() {
        _ if joins => ("REPLICA_JOINING", "is still to be made", "it is made when its store answers".into()),
        v1::ReplicaState::Disconnected => ("REPLICA_AWAY", "doesn't answer", format!("{come_back}; {}", replaced())),
        v1::ReplicaState::Joining => ("REPLICA_JOINING", "is connecting", come_back.into()),
        v1::ReplicaState::Copying => {
            let left = replica.copy_seconds_left.map_or(String::new(), |seconds| format!(", about {seconds} s left"));
            let how_far = match (replica.copied_bytes, replica.copy_total_bytes) {
                (Some(copied), Some(total)) => format!("{} of {}{left}", HumanSize(copied), HumanSize(total)),
                _ => "how far is not known yet".into(),
            };
            ("REPLICA_COPYING", "gets what it lacks", format!("it counts when that is done: {how_far}"))
        }
        v1::ReplicaState::Behind => ("REPLICA_BEHIND", "lacks something", "it is copied to as soon as that risks nothing".into()),
        v1::ReplicaState::Refused => ("REPLICA_REFUSES", "refuses", format!("it is asked again every few seconds; {}", replaced())),
        v1::ReplicaState::Missing => ("REPLICA_MISSING", "is not in its store", replaced()),
        v1::ReplicaState::Idle | v1::ReplicaState::InSync | v1::ReplicaState::Unspecified => return None,
    };
    Some(v1::Finding { since_unix: since, ..finding(reason, format!("the replica in {place} {what}{detail}"), &next, advice) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(state: v1::ReplicaState) -> v1::Replica {
        v1::Replica { store_path: "/srv/a".into(), state: state.into(), ..v1::Replica::default() }
    }

    #[test]
    fn what_is_as_it_should_be_needs_no_words() {
        for state in [v1::ReplicaState::Idle, v1::ReplicaState::InSync] {
            assert_eq!(of_replica(&replica(state), None, None, false), None);
        }
        assert_eq!(of_attachment(&v1::Volume::default()), Vec::new());
    }

    #[test]
    fn every_other_state_of_a_replica_has_a_reason_and_a_next_step() {
        use v1::ReplicaState::{Behind, Copying, Disconnected, Joining, Missing, Refused};
        for state in [Behind, Copying, Disconnected, Joining, Missing, Refused] {
            let found = of_replica(&replica(state), Some(7), Some(Duration::from_secs(600)), false).unwrap();
            assert!(found.reason.starts_with("REPLICA_") && found.message.contains("/srv/a"), "{found:?}");
            assert!(!found.next.is_empty() && !found.advice.is_empty(), "{found:?}");
            assert_eq!(found.since_unix, Some(7));
        }
        let away = of_replica(&replica(Disconnected), None, Some(Duration::from_secs(600)), false).unwrap();
        assert!(away.next.contains("600 s"), "{away:?}");
        let never = of_replica(&replica(Missing), None, None, false).unwrap();
        assert!(never.next.contains("never"), "{never:?}");
    }

    #[test]
    fn the_log_tells_since_when_if_nothing_came_after() {
        use crate::metadata::{NewEvent, Subject};
        let mut log = EventLog::default();
        let id = carrick_backing_store::VolumeId::from_bytes([5; 16]);
        let mut add = |kind, at_unix| {
            let subject = Subject::Volume { id, name: "vm1".parse().unwrap() };
            log.add(vec![NewEvent { at_unix, kind, subject, replica: None, text: String::new() }], |_| true);
            ["TARGET_DOWN", "DETACHING", "IO_WAITS"].map(|reason| since(&log, SubjectId::Volume(id), reason))
        };
        assert_eq!(add(EventKind::Attached, 7), [None; 3]);
        assert_eq!(add(EventKind::ProcessCrashed, 8), [Some(8), None, None]);
        assert_eq!(add(EventKind::ReplicaLeftOut, 9), [Some(8), None, None]);
        assert_eq!(add(EventKind::ProcessRecovered, 10), [None; 3]);
        assert_eq!(add(EventKind::Detaching, 11), [None, Some(11), None]);
        assert_eq!(add(EventKind::DetachFailed, 12), [None; 3]);
    }

    #[test]
    fn an_operation_that_waits_is_told_with_its_own_reason() {
        let operation = v1::Operation {
            id: "3".into(),
            kind: v1::OperationKind::Expand.into(),
            to_bytes: 2 << 30,
            step: "device".into(),
            reason: Some("TARGET_UNREACHABLE".into()),
            message: Some("its carrick-target isn't running".into()),
            waiting_since_unix: Some(9),
            ..v1::Operation::default()
        };
        let found = of_operation(&operation, true).unwrap();
        assert_eq!((found.reason.as_str(), found.since_unix), ("TARGET_UNREACHABLE", Some(9)));
        assert!(found.message.contains("2 GiB") && found.advice.contains("carrick operation cancel 3"), "{found:?}");
    }
}
