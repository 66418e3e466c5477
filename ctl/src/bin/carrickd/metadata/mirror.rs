//! Operations that follow the records: creating, attaching, detaching, deleting, and building a replica have their steps as phases in the
//! records of volumes and attachments, where the rules for them are (M1 to M5), and the node's loop finishes or undoes them. Here such a
//! phase becomes an operation that is listed and watched as all are, in the same transaction. The records before and after in,
//! operations in the state. No clock, no I/O.

use std::mem::discriminant;

use super::operations::{BuildStep, OperationRecord, OperationState, Task, Why};
use super::records::{AttachmentPhase, VolumePhase, VolumeRecord};
use super::{EventKind, MetadataError, Occasion, State};

/// Ends the operations that the records end, and begins those that they begin.
pub fn follow(before: &State, after: &mut State, occasion: &Occasion) -> Result<(), MetadataError> {
    let running = after.operations.values().filter(|operation| operation.is_running() && !operation.task.has_own_steps());
    let changed: Vec<_> = running.filter_map(|operation| followed(after, operation, occasion)).collect();
    changed.iter().try_for_each(|operation| after.put_operation(operation))?;
    begun(before, after, occasion).iter().try_for_each(|operation| after.put_operation(operation))
}

/// An operation as the records have it now; `None`: as it was.
fn followed(state: &State, operation: &OperationRecord, occasion: &Occasion) -> Option<OperationRecord> {
    let volume = state.volumes.get(&operation.volume);
    let attachment = state.attachments.get(&operation.volume).map(|attachment| attachment.phase);
    let failed = |kind: EventKind, or: &str| {
        let message = occasion.remark.clone().unwrap_or_else(|| or.to_owned());
        OperationState::Failed(Why { reason: kind.as_str().to_owned(), message })
    };
    let (task, state) = match operation.task {
        Task::Create => match volume.map(|volume| volume.phase) {
            Some(VolumePhase::Creating) => return None,
            Some(VolumePhase::Ready) => (operation.task, OperationState::Succeeded),
            Some(VolumePhase::Deleting) | None => (operation.task, failed(EventKind::CreationUndone, "its creation is undone")),
        },
        Task::Attach => match attachment {
            Some(AttachmentPhase::Attaching) => return None,
            Some(AttachmentPhase::Attached) => (operation.task, OperationState::Succeeded),
            Some(AttachmentPhase::Detaching { .. }) | None => (operation.task, failed(EventKind::AttachFailed, "it is taken back")),
        },
        Task::Detach => match attachment {
            Some(AttachmentPhase::Detaching { .. }) => return None,
            Some(AttachmentPhase::Attached) => (operation.task, failed(EventKind::DetachFailed, "it stays attached")),
            Some(AttachmentPhase::Attaching) | None => (operation.task, OperationState::Succeeded),
        },
        Task::Delete if volume.is_some() => return None,
        Task::Delete => (operation.task, OperationState::Succeeded),
        Task::Build { instead_of, to, step: before } => {
            let volume = volume.filter(|volume| volume.phase == VolumePhase::Ready && volume.replicas.contains(&to));
            let (step, state) = match volume {
                None => (before, OperationState::Cancelled),
                Some(volume) if volume.joining.contains(&to) => (BuildStep::Make, OperationState::Running),
                Some(volume) if volume.config().members.contains(&to) => (BuildStep::Copy, OperationState::Succeeded),
                Some(_) => (BuildStep::Copy, OperationState::Running),
            };
            if (step, &state) == (before, &OperationState::Running) {
                return None;
            }
            (Task::Build { instead_of, to, step }, state)
        }
        Task::Expand { .. } | Task::Move { .. } => return None,
    };
    Some(OperationRecord { task, state, wait: None, updated_unix: occasion.at_unix, ..operation.clone() })
}

/// What is under way and no operation yet.
fn begun(before: &State, after: &State, occasion: &Occasion) -> Vec<OperationRecord> {
    let mut begun = Vec::new();
    for volume in after.volumes.values() {
        let attachment = after.attachments.get(&volume.id).map(|attachment| attachment.phase);
        let phase = match (volume.phase, attachment) {
            (VolumePhase::Creating, _) => Some(Task::Create),
            (VolumePhase::Deleting, _) => Some(Task::Delete),
            (VolumePhase::Ready, Some(AttachmentPhase::Attaching)) => Some(Task::Attach),
            (VolumePhase::Ready, Some(AttachmentPhase::Detaching { .. })) => Some(Task::Detach),
            (VolumePhase::Ready, Some(AttachmentPhase::Attached) | None) => None,
        };
        let runs = |task: &Task| after.running(volume.id).any(|operation| discriminant(&operation.task) == discriminant(task));
        let builds = before.volumes.get(&volume.id).map_or(Vec::new(), |before| builds(before, volume));
        let tasks = phase.filter(|task| !runs(task)).into_iter().chain(builds);
        begun.extend(tasks.map(|task| OperationRecord::new(volume.id, volume.name.clone(), task, occasion.at_unix)));
    }
    begun
}

/// The replicas that the volume has now and hadn't before, unless they come by a move.
fn builds(before: &VolumeRecord, after: &VolumeRecord) -> Vec<Task> {
    let moves = after.retiring.iter().any(|store| !before.retiring.contains(store));
    if moves || after.phase != VolumePhase::Ready {
        return Vec::new();
    }
    let mut replaced = before.replicas.iter().copied().filter(|store| !after.replicas.contains(store));
    let new = after.replicas.iter().copied().filter(|store| !before.replicas.contains(store));
    new.map(|to| Task::Build { instead_of: replaced.next(), to, step: BuildStep::Make }).collect()
}

#[cfg(test)]
mod tests {
    //! Changes of the records, and what is listed of them.

    use carrick_replicator::control::VolumeConfig;

    use super::super::tests::{attachment, store, volume};
    use super::super::{Mutation, OperationId};
    use super::*;

    use AttachmentPhase::{Attached, Attaching, Detaching};

    struct Node {
        state: State,
        at_unix: u64,
    }

    impl Node {
        fn new() -> Self {
            let mut node = Self { state: State::default(), at_unix: 100 };
            (1..=4).for_each(|number| assert_eq!(node.change(Mutation::PutStore(store(number))), ""));
            node
        }

        /// With the volume `vm1` in stores 1 and 2.
        fn ready() -> Self {
            let mut node = Self::new();
            assert_eq!(node.change(Mutation::InsertVolume(volume(5, "vm1", &[1, 2]).into())), "");
            node
        }

        /// What changes with the operations by that, one in a line.
        fn change(&mut self, mutation: Mutation) -> String {
            self.change_because(mutation, None)
        }

        fn change_because(&mut self, mutation: Mutation, remark: Option<&str>) -> String {
            self.at_unix += 1;
            let occasion = Occasion { at_unix: self.at_unix, remark: remark.map(Into::into) };
            let after = self.state.after(&mutation, &occasion).unwrap();
            let changed = after.operations.iter().filter(|(id, operation)| self.state.operations.get(id) != Some(operation));
            let told = changed.map(|(id, operation)| {
                assert_eq!(operation.updated_unix, self.at_unix);
                let state = match &operation.state {
                    OperationState::Running => format!("running {}", operation.task.step_name()),
                    OperationState::Failed(why) => format!("failed {}: {}", why.reason, why.message),
                    other => format!("{other:?}"),
                };
                format!("{id} {state}")
            });
            let told: Vec<_> = told.collect();
            self.state = after;
            told.join("\n")
        }

        fn volume(&self) -> VolumeRecord {
            self.state.volumes.values().next().unwrap().clone()
        }

        fn replace(&mut self, change: impl FnOnce(&mut VolumeRecord)) -> String {
            let mut new = self.volume();
            change(&mut new);
            self.change(Mutation::ReplaceVolume { expected: self.volume().into(), new: new.into() })
        }

        fn counts(&mut self, members: &[u8]) -> String {
            let config = self.volume().config();
            let members = members.iter().map(|number| store(*number).id).collect();
            let next = VolumeConfig { version: config.version.next(), members, ..config };
            self.change(Mutation::SwapConfig { volume: self.volume().id, next, at_unix: 7 })
        }

        fn attachment(&mut self, phase: AttachmentPhase) -> String {
            self.change(Mutation::PutAttachment(attachment(5, phase)))
        }

        fn task(&self, id: &str) -> Task {
            self.state.operations[&id.parse::<OperationId>().unwrap()].task
        }
    }

    fn creating() -> Mutation {
        Mutation::InsertVolume(VolumeRecord { phase: VolumePhase::Creating, ..volume(5, "vm1", &[1, 2]) }.into())
    }

    #[test]
    fn a_volumes_life() {
        let mut node = Node::new();
        assert_eq!(node.change(creating()), "1 running replicas");
        assert_eq!(node.task("1"), Task::Create);
        assert_eq!(node.replace(|volume| volume.phase = VolumePhase::Ready), "1 Succeeded");
        assert_eq!(node.attachment(Attaching), "2 running device");
        assert_eq!(node.task("2"), Task::Attach);
        assert_eq!(node.attachment(Attached), "2 Succeeded");
        assert_eq!(node.attachment(Detaching { force: false }), "3 running device");
        assert_eq!(node.attachment(Detaching { force: true }), "", "it is the same");
        assert_eq!(node.task("3"), Task::Detach);
        assert_eq!(node.change(Mutation::RemoveAttachment(node.volume().id)), "3 Succeeded");
        assert_eq!(node.replace(|volume| volume.phase = VolumePhase::Deleting), "4 running replicas");
        assert_eq!(node.task("4"), Task::Delete);
        assert_eq!(node.replace(|volume| volume.replicas = vec![store(2).id]), "");
        assert_eq!(node.change(Mutation::RemoveVolume(node.volume().id)), "4 Succeeded");
    }

    #[test]
    fn what_is_taken_back_says_why() {
        let mut node = Node::new();
        node.change(creating());
        let deleting = VolumeRecord { phase: VolumePhase::Deleting, ..node.volume() };
        let undo = Mutation::ReplaceVolume { expected: node.volume().into(), new: deleting.into() };
        assert_eq!(node.change_because(undo, Some("no room")), "1 failed CREATION_UNDONE: no room\n2 running replicas");
        let mut node = Node::ready();
        assert_eq!(node.attachment(Attaching), "1 running device");
        let back = Mutation::RemoveAttachment(node.volume().id);
        assert_eq!(node.change_because(back.clone(), Some("no ublk")), "1 failed ATTACH_FAILED: no ublk");
        node.attachment(Attaching);
        let detaching = "2 failed ATTACH_FAILED: it is taken back\n3 running device";
        assert_eq!(node.attachment(Detaching { force: false }), detaching);
        let busy = Mutation::PutAttachment(attachment(5, Attached));
        assert_eq!(node.change_because(busy, Some("mounted")), "3 failed DETACH_FAILED: mounted");
    }

    #[test]
    fn a_replica_is_built_until_it_counts() {
        let mut node = Node::ready();
        node.counts(&[1]);
        let swapped = |volume: &mut VolumeRecord| {
            volume.replicas[1] = store(3).id;
            volume.joining.push(store(3).id);
            volume.leaving.push(store(2).id);
        };
        assert_eq!(node.replace(swapped), "1 running make");
        assert_eq!(node.task("1"), Task::Build { instead_of: Some(store(2).id), to: store(3).id, step: BuildStep::Make });
        assert_eq!(node.replace(|volume| volume.joining.clear()), "1 running copy");
        assert_eq!(node.replace(|volume| volume.leaving.clear()), "");
        assert_eq!(node.counts(&[1, 3]), "1 Succeeded");
        let one_more = |volume: &mut VolumeRecord| {
            volume.replicas.push(store(4).id);
            volume.joining.push(store(4).id);
        };
        assert_eq!(node.replace(one_more), "2 running make");
        assert_eq!(node.task("2"), Task::Build { instead_of: None, to: store(4).id, step: BuildStep::Make });
        assert_eq!(node.replace(|volume| volume.phase = VolumePhase::Deleting), "2 Cancelled\n3 running replicas");
    }

    #[test]
    fn what_a_move_brings_is_the_moves() {
        let mut node = Node::ready();
        let moving = |volume: &mut VolumeRecord| {
            volume.replicas.push(store(3).id);
            volume.joining.push(store(3).id);
            volume.retiring.push(store(1).id);
        };
        assert_eq!(node.replace(moving), "");
        node.replace(|volume| volume.joining.clear());
        node.counts(&[2, 3]);
        let forgets = |volume: &mut VolumeRecord| {
            volume.replicas.remove(0);
            volume.retiring.clear();
            volume.leaving.push(store(1).id);
        };
        assert_eq!(node.replace(forgets), "");
        assert!(node.state.operations.is_empty());
    }

    #[test]
    fn what_was_under_way_before_there_were_such_operations_becomes_one() {
        let mut old = Node::ready();
        old.state.apply(&Mutation::PutAttachment(attachment(5, Attaching))).unwrap();
        assert_eq!(old.change(Mutation::PutStore(store(1))), "1 running device");
        assert_eq!(old.change(Mutation::PutStore(store(1))), "");
    }

    #[test]
    fn only_those_with_steps_of_their_own_can_be_cancelled() {
        let mut node = Node::ready();
        node.attachment(Attaching);
        let operation = node.state.running(node.volume().id).next().unwrap().clone();
        let fault = operation.cancelled(&node.volume(), 1).unwrap_err();
        assert_eq!(fault.reason, carrick_ctl::fault::Reason::OperationPastCancelling);
        assert!(fault.message.contains("carrick detach vm1"), "{fault}");
    }
}
