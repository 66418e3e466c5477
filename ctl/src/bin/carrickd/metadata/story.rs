//! What a change of the records tells: the records before and after in, events for the log out. They are written in the same transaction,
//! so what is in the log did happen, and nothing that happened is missing. No clock, no I/O.

use carrick_backing_store::size::HumanSize;
use carrick_backing_store::{ByteLength, StoreId};
use carrick_replicator::limits::Limits;

use super::events::{EventKind, NewEvent, Place, Subject};
use super::operations::{OperationRecord, OperationState, Task};
use super::records::{AttachmentPhase, Placement, StoreRecord, VerifiedRecord, VolumePhase, VolumeRecord};
use super::{Mutation, State};

/// On which occasion a change is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Occasion {
    /// When, in seconds since 1970.
    pub at_unix: u64,
    /// What the log is to say besides: why, or with which result.
    pub remark: Option<String>,
}

/// The events of a change that was made.
pub fn of_change(before: &State, after: &State, mutation: &Mutation, occasion: &Occasion) -> Vec<NewEvent> {
    Story { before, after, occasion }.of(mutation)
}

/// A store as it is called now.
pub fn place(state: &State, store: StoreId) -> Place {
    Place { id: store, path: state.place(store) }
}

/// A volume as it is called.
pub fn subject(volume: &VolumeRecord) -> Subject {
    Subject::Volume { id: volume.id, name: volume.name.clone() }
}

struct Story<'a> {
    before: &'a State,
    after: &'a State,
    occasion: &'a Occasion,
}

impl Story<'_> {
    fn of(&self, mutation: &Mutation) -> Vec<NewEvent> {
        match mutation {
            Mutation::PutNode(_) => self.node_changed().into_iter().collect(),
            Mutation::SetUpgrade(_) => self.upgrade().into_iter().collect(),
            Mutation::PutStore(record) => self.put_store(record).into_iter().collect(),
            Mutation::RemoveStore(id) => {
                let record = self.before.stores.get(id);
                record.map(|record| self.store(EventKind::StoreRemoved, record, "was removed; its files stay")).into_iter().collect()
            }
            Mutation::InsertVolume(_) => Vec::new(),
            Mutation::ReplaceVolume { new, .. } => self.volume_changed(new),
            Mutation::SwapConfig { volume, .. } => match (self.before.volumes.get(volume), self.after.volumes.get(volume)) {
                (Some(before), Some(after)) => self.config(before, after),
                _ => Vec::new(),
            },
            Mutation::Salvage { volume, from, .. } => {
                self.after.volumes.get(volume).map(|volume| self.salvage(volume, *from)).into_iter().collect()
            }
            Mutation::RemoveVolume(id) => {
                let volume = self.before.volumes.get(id);
                volume.map(|volume| self.volume(EventKind::VolumeDeleted, volume, "all of its replicas are deleted")).into_iter().collect()
            }
            Mutation::PutAttachment(super::AttachmentRecord { volume, .. }) | Mutation::RemoveAttachment(volume) => {
                let phase = |state: &State| state.attachments.get(volume).map(|attachment| attachment.phase);
                let event = attachment(phase(self.before), phase(self.after));
                let of = |(kind, text): (EventKind, &str)| Some(self.volume(kind, self.after.volumes.get(volume)?, text));
                event.and_then(of).into_iter().collect()
            }
            Mutation::PutOperation(_) => self.after.operations.values().filter_map(|operation| self.operation(operation)).collect(),
            Mutation::All(mutations) => mutations.iter().flat_map(|mutation| self.of(mutation)).collect(),
        }
    }

    fn event(&self, kind: EventKind, subject: Subject, replica: Option<Place>, text: &str) -> NewEvent {
        let text = match &self.occasion.remark {
            Some(remark) => format!("{text}: {remark}"),
            None => text.to_owned(),
        };
        NewEvent { at_unix: self.occasion.at_unix, kind, subject, replica, text }
    }

    fn node_changed(&self) -> Option<NewEvent> {
        let what = |state: &State| (state.node.refuses_targets, state.node.refuses_replicas);
        if what(self.before) == what(self.after) {
            return None;
        }
        let takes = |refuses: bool| if refuses { "no more" } else { "new" };
        let (targets, replicas) = what(self.after);
        let text = format!("the node takes {} volumes and {} replicas", takes(targets), takes(replicas));
        Some(self.event(EventKind::NodeChanged, Subject::Node, None, &text))
    }

    fn upgrade(&self) -> Option<NewEvent> {
        let (kind, text) = match (&self.before.node.upgrade, &self.after.node.upgrade) {
            (None, Some(_)) => (EventKind::UpgradeStarted, "processes of older programs are replaced, one at a time"),
            (Some(_), None) => (EventKind::UpgradeFinished, "all processes run the programs that are installed"),
            _ => return None,
        };
        Some(self.event(kind, Subject::Node, None, text))
    }

    fn put_store(&self, record: &StoreRecord) -> Option<NewEvent> {
        let (kind, text) = match (self.before.stores.get(&record.id).map(|before| before.placement), record.placement) {
            (None, _) => (EventKind::StoreAdded, "was added"),
            (Some(before), after) if before == after => return None,
            (_, Placement::Enabled) => (EventKind::StoreEnabled, "takes new replicas again"),
            (_, Placement::Disabled) => (EventKind::StoreDisabled, "takes no new replicas; those that are there stay"),
            (_, Placement::Evicting) => (EventKind::StoreEvicting, "takes no new replicas; those that are there go to other stores"),
        };
        Some(self.store(kind, record, text))
    }

    fn store(&self, kind: EventKind, record: &StoreRecord, text: &str) -> NewEvent {
        self.event(kind, Subject::Store(Place { id: record.id, path: record.path.display().to_string() }), None, text)
    }

    fn volume(&self, kind: EventKind, volume: &VolumeRecord, text: &str) -> NewEvent {
        self.event(kind, subject(volume), None, text)
    }

    /// About the replica in one store; `text` has `{}` for that.
    fn replica(&self, kind: EventKind, volume: &VolumeRecord, store: StoreId, text: &str) -> NewEvent {
        let place = place(self.before, store);
        let text = text.replace("{}", &place.path);
        self.event(kind, subject(volume), Some(place), &text)
    }

    fn volume_changed(&self, new: &VolumeRecord) -> Vec<NewEvent> {
        let (Some(before), Some(after)) = (self.before.volumes.get(&new.id), self.after.volumes.get(&new.id)) else { return Vec::new() };
        match (before.phase, after.phase) {
            (VolumePhase::Creating, VolumePhase::Ready) => {
                let stores: Vec<_> = after.replicas.iter().map(|store| self.after.place(*store)).collect();
                let text = format!("was created: {}, replicas in {}", HumanSize(after.size.bytes().get()), stores.join(", "));
                vec![self.volume(EventKind::VolumeCreated, after, &text)]
            }
            (VolumePhase::Creating, VolumePhase::Deleting) => vec![self.volume(EventKind::CreationUndone, after, "its creation is undone")],
            (VolumePhase::Ready, VolumePhase::Deleting) => vec![self.volume(EventKind::VolumeDeleting, after, "is to be deleted")],
            (VolumePhase::Ready, VolumePhase::Ready) => self.ready_volume_changed(before, after),
            _ => Vec::new(),
        }
    }

    fn ready_volume_changed(&self, before: &VolumeRecord, after: &VolumeRecord) -> Vec<NewEvent> {
        let mut events = Vec::new();
        if before.size != after.size {
            let sizes = [before.size, after.size].map(|size| HumanSize(size.bytes().get()));
            events.push(self.volume(EventKind::VolumeExpanded, after, &format!("was expanded from {} to {}", sizes[0], sizes[1])));
        }
        if (before.limits, before.rebuild_rate) != (after.limits, after.rebuild_rate) {
            events.push(self.volume(EventKind::LimitsSet, after, &format!("limits were set: {}", limits(after))));
        }
        if let Some(verified) = after.verified.filter(|_| before.verified != after.verified) {
            events.push(self.volume(EventKind::VolumeVerified, after, &found(&verified)));
        }
        let replaced = after.leaving.iter().find(|store| before.replicas.contains(store));
        for store in after.retiring.iter().filter(|store| !before.retiring.contains(store)) {
            events.push(self.replica(EventKind::ReplicaRetiring, after, *store, "the replica in {} is to go once all others count"));
        }
        for store in after.replicas.iter().filter(|store| !before.replicas.contains(store)) {
            events.push(match replaced {
                Some(old) => {
                    let text = format!("the replica in {} is replaced by one in {{}}", self.before.place(*old));
                    self.replica(EventKind::ReplicaReplaced, after, *store, &text)
                }
                None => self.replica(EventKind::ReplicaAdded, after, *store, "gets one more replica, in {}"),
            });
        }
        let members = after.config().members;
        for store in before.joining.iter().filter(|store| !after.joining.contains(store) && !members.contains(store)) {
            let text = "the replica in {} is made, and counts once everything is copied to it";
            events.push(self.replica(EventKind::ReplicaRebuilding, after, *store, text));
        }
        for store in before.leaving.iter().filter(|store| !after.leaving.contains(store)) {
            events.push(self.replica(EventKind::ReplicaDeleted, after, *store, "the replica that was in {} is deleted"));
        }
        events
    }

    fn config(&self, before: &VolumeRecord, after: &VolumeRecord) -> Vec<NewEvent> {
        let (old, new) = (before.config().members, after.config().members);
        let left_out = old.iter().filter(|store| !new.contains(store));
        let left_out = left_out.map(|store| self.replica(EventKind::ReplicaLeftOut, after, *store, "the replica in {} no longer counts"));
        let back = new.iter().filter(|store| !old.contains(store));
        let text = "the replica in {} has everything, and counts";
        // Why one is left out says nothing of those that are taken in.
        let plain = Story { occasion: &Occasion { remark: None, ..self.occasion.clone() }, ..*self };
        let back = back.map(|store| plain.replica(EventKind::ReplicaCounts, after, *store, text));
        left_out.chain(back).collect()
    }

    fn salvage(&self, volume: &VolumeRecord, from: StoreId) -> NewEvent {
        let given_up = volume.salvages.last().map_or(Vec::new(), |salvage| salvage.given_up.clone());
        let places: Vec<_> = given_up.iter().map(|store| self.after.place(*store)).collect();
        let text = format!("was salvaged from {{}}; what only {} had is lost", places.join(", "));
        self.replica(EventKind::VolumeSalvaged, volume, from, &text)
    }

    /// What it is to do; `None`: what it comes to is told as events of their own.
    fn goal(&self, operation: &OperationRecord) -> Option<String> {
        Some(match operation.task {
            Task::Expand { to, .. } => format!("expand it to {}", HumanSize(to.bytes().get())),
            Task::Move { from, to, .. } => format!("move its replica in {} to {}", self.before.place(from), self.before.place(to)),
            Task::Create | Task::Attach | Task::Detach | Task::Delete | Task::Build { .. } => return None,
        })
    }

    fn operation(&self, operation: &OperationRecord) -> Option<NewEvent> {
        let before = self.before.operations.get(&operation.id);
        let goals = [self.goal(before.unwrap_or(operation))?, self.goal(operation)?];
        let (kind, text) = progress(before, operation, goals)?;
        let subject = Subject::Volume { id: operation.volume, name: operation.name.clone() };
        Some(self.event(kind, subject, None, &text))
    }
}

/// What an attachment came to.
fn attachment(before: Option<AttachmentPhase>, after: Option<AttachmentPhase>) -> Option<(EventKind, &'static str)> {
    use AttachmentPhase::{Attached, Attaching, Detaching};
    match (before, after) {
        (Some(Attached), Some(Attached)) => None,
        (None | Some(Attaching), Some(Attached)) => Some((EventKind::Attached, "is attached")),
        (Some(Detaching { .. }), Some(Attached)) => Some((EventKind::DetachFailed, "stays attached")),
        (Some(Attaching), Some(Detaching { .. }) | None) => Some((EventKind::AttachFailed, "its attachment is taken back")),
        (_, Some(Detaching { force: true })) if before != after => Some((EventKind::Detaching, "is to be detached, by force")),
        (Some(Attached), Some(Detaching { force: false })) => Some((EventKind::Detaching, "is to be detached")),
        (Some(_), None) => Some((EventKind::Detached, "is detached")),
        _ => None,
    }
}

/// What an operation came to.
fn progress(before: Option<&OperationRecord>, after: &OperationRecord, goals: [String; 2]) -> Option<(EventKind, String)> {
    let (id, [goal_before, goal]) = (after.id, goals);
    let Some(before) = before else {
        return Some((EventKind::OperationStarted, format!("operation {id} begins: to {goal}")));
    };
    match (&before.state, &after.state) {
        (OperationState::Running, OperationState::Running) => match &after.wait {
            _ if goal_before != goal => Some((EventKind::OperationExtended, format!("operation {id} is to {goal}"))),
            Some(wait) if before.wait.is_none() => Some((EventKind::OperationWaits, format!("operation {id} waits: {}", wait.why.message))),
            _ => None,
        },
        (OperationState::Running, OperationState::Succeeded) => {
            let notes: String = after.notes.iter().map(|note| format!("; {note}")).collect();
            Some((EventKind::OperationSucceeded, format!("operation {id} is done: to {goal}{notes}")))
        }
        (OperationState::Running, OperationState::Failed(why)) => {
            Some((EventKind::OperationFailed, format!("operation {id} failed: {}", why.message)))
        }
        (OperationState::Running, OperationState::Cancelled) => {
            Some((EventKind::OperationCancelled, format!("operation {id} was cancelled")))
        }
        _ => None,
    }
}

/// What a volume may take, in words.
fn found(verified: &VerifiedRecord) -> String {
    match *verified {
        VerifiedRecord { skipped: ByteLength::ZERO, repaired: 0, unsettled: 0, .. } => "its replicas were compared: no difference".into(),
        VerifiedRecord { skipped, repaired, unsettled, .. } => {
            let skipped = HumanSize(skipped.get());
            format!("its replicas were compared: {repaired} blocks repaired, {unsettled} differ still, {skipped} could not be compared")
        }
    }
}

fn limits(volume: &VolumeRecord) -> String {
    let Limits { iops, iops_burst, bandwidth, bandwidth_burst } = volume.limits;
    let bytes = |name: &str, bytes: u64| format!("{name}={}", HumanSize(bytes));
    let set: Vec<_> = [
        iops.map(|iops| format!("iops={iops}")),
        iops_burst.map(|burst| format!("iops-burst={burst}")),
        bandwidth.map(|rate| bytes("bandwidth", rate.get())),
        bandwidth_burst.map(|burst| bytes("bandwidth-burst", burst.get())),
        volume.rebuild_rate.map(|rate| bytes("rebuild-rate", rate.get())),
    ]
    .into_iter()
    .flatten()
    .collect();
    if set.is_empty() { "none".into() } else { set.join(", ") }
}

#[cfg(test)]
mod tests {
    //! Changes, and what is told of them.

    use carrick_backing_store::{ByteLength, Term, VolumeSize};
    use carrick_ctl::fault::{Fault, Reason};
    use carrick_replicator::control::VolumeConfig;
    use carrick_replicator::limits::Requests;

    use super::super::tests::{attachment, store, volume};
    use super::*;
    use crate::metadata::Outcome;

    use AttachmentPhase::{Attached, Attaching, Detaching};

    /// Makes changes, and tells.
    struct Node(State);

    impl Node {
        fn new() -> Self {
            let mut node = Self(State::default());
            (1..=4).for_each(|number| assert!(node.tells(Mutation::PutStore(store(number))).starts_with("STORE_ADDED was added")));
            node
        }

        /// Kinds and words, one event in a line.
        fn tells(&mut self, mutation: Mutation) -> String {
            self.tells_of(mutation, None)
        }

        fn tells_of(&mut self, mutation: Mutation, remark: Option<&str>) -> String {
            let before = self.0.clone();
            self.0.apply(&mutation).unwrap();
            let occasion = Occasion { at_unix: 7, remark: remark.map(Into::into) };
            let events = of_change(&before, &self.0, &mutation, &occasion);
            assert!(events.iter().all(|event| event.at_unix == 7));
            events.iter().map(|event| format!("{} {}", event.kind.as_str(), event.text)).collect::<Vec<_>>().join("\n")
        }

        fn volume(&self) -> VolumeRecord {
            self.0.volumes.values().next().unwrap().clone()
        }

        fn replace(&mut self, change: impl FnOnce(&mut VolumeRecord)) -> String {
            let mut new = self.volume();
            change(&mut new);
            self.tells(Mutation::ReplaceVolume { expected: self.volume().into(), new: new.into() })
        }

        fn swap(&mut self, members: &[u8], remark: Option<&str>) -> String {
            let config = self.volume().config();
            let members = members.iter().map(|number| store(*number).id).collect();
            let next = VolumeConfig { version: config.version.next(), term: Term::new(7), members, ..config };
            self.tells_of(Mutation::SwapConfig { volume: self.volume().id, next, at_unix: 7 }, remark)
        }

        fn ready(mut self) -> Self {
            self.tells(Mutation::InsertVolume(volume(5, "vm1", &[1, 2, 3]).into()));
            self
        }
    }

    #[test]
    fn a_volumes_life() {
        let mut node = Node::new();
        let creating = VolumeRecord { phase: VolumePhase::Creating, ..volume(5, "vm1", &[1, 2]) };
        assert_eq!(node.tells(Mutation::InsertVolume(creating.into())), "", "it may still be undone");
        let created = "VOLUME_CREATED was created: 20 GiB, replicas in /srv/store1, /srv/store2";
        assert_eq!(node.replace(|volume| volume.phase = VolumePhase::Ready), created);
        let limits = node.replace(|volume| {
            volume.limits.iops = Some(Requests::new(500));
            volume.rebuild_rate = Some(ByteLength::new(50 << 20));
        });
        assert_eq!(limits, "LIMITS_SET limits were set: iops=500, rebuild-rate=50 MiB");
        let mut compared = |unsettled| {
            let verified = VerifiedRecord { at_unix: 9, skipped: ByteLength::ZERO, repaired: 0, unsettled };
            node.replace(|volume| volume.verified = Some(verified))
        };
        assert_eq!(compared(0), "VOLUME_VERIFIED its replicas were compared: no difference");
        let differ = "VOLUME_VERIFIED its replicas were compared: 0 blocks repaired, 2 differ still, 0 B could not be compared";
        assert_eq!(compared(2), differ);
        let lifted = node.replace(|volume| (volume.limits, volume.rebuild_rate) = (Limits::default(), None));
        assert_eq!(lifted, "LIMITS_SET limits were set: none");
        let larger = node.replace(|volume| volume.size = VolumeSize::new(40 << 30).unwrap());
        assert_eq!(larger, "VOLUME_EXPANDED was expanded from 20 GiB to 40 GiB");
        assert_eq!(node.replace(|volume| volume.phase = VolumePhase::Deleting), "VOLUME_DELETING is to be deleted");
        assert_eq!(node.replace(|volume| volume.replicas.truncate(1)), "");
        assert_eq!(node.tells(Mutation::RemoveVolume(node.volume().id)), "VOLUME_DELETED all of its replicas are deleted");
        assert_eq!(node.tells(Mutation::RemoveStore(store(1).id)), "STORE_REMOVED was removed; its files stay");
        assert_eq!(node.tells(Mutation::RemoveStore(store(1).id)), "");
    }

    #[test]
    fn attachments() {
        let detaching = |force| Detaching { force };
        for (phases, told) in [
            (&[Some(Attaching), Some(Attached)][..], "ATTACHED is attached: x"),
            (&[Some(Attaching), None], "ATTACH_FAILED its attachment is taken back: x"),
            (&[Some(Attaching), Some(detaching(false))], "ATTACH_FAILED its attachment is taken back: x"),
            (&[Some(Attached), Some(Attached)], ""),
            (&[Some(Attached), Some(detaching(false))], "DETACHING is to be detached: x"),
            (&[Some(Attached), Some(detaching(true))], "DETACHING is to be detached, by force: x"),
            (&[Some(detaching(false)), Some(detaching(true))], "DETACHING is to be detached, by force: x"),
            (&[Some(detaching(true)), Some(detaching(true))], ""),
            (&[Some(detaching(false)), Some(Attached)], "DETACH_FAILED stays attached: x"),
            (&[Some(detaching(false)), None], "DETACHED is detached: x"),
            (&[Some(Attaching)], ""),
        ] {
            let mut node = Node::new().ready();
            let mut last = String::new();
            for phase in phases {
                last = match phase {
                    Some(phase) => node.tells_of(Mutation::PutAttachment(attachment(5, *phase)), Some("x")),
                    None => node.tells_of(Mutation::RemoveAttachment(node.volume().id), Some("x")),
                };
            }
            assert_eq!(last, told, "{phases:?}");
        }
    }

    #[test]
    fn replicas() {
        let mut node = Node::new().ready();
        assert_eq!(node.swap(&[1, 2, 3], None), "", "another primary");
        let left_out = node.swap(&[1, 2], Some("it was killed"));
        assert_eq!(left_out, "REPLICA_LEFT_OUT the replica in /srv/store3 no longer counts: it was killed");
        let both = node.swap(&[1, 3], Some("it hangs"));
        assert_eq!(
            both,
            "REPLICA_LEFT_OUT the replica in /srv/store2 no longer counts: it hangs\n\
             REPLICA_COUNTS the replica in /srv/store3 has everything, and counts"
        );
        let replaced = node.replace(|volume| {
            (volume.replicas[1], volume.joining) = (store(4).id, vec![store(4).id]);
            volume.leaving = vec![store(2).id];
        });
        assert_eq!(replaced, "REPLICA_REPLACED the replica in /srv/store2 is replaced by one in /srv/store4");
        let made = node.replace(|volume| volume.joining.clear());
        assert_eq!(made, "REPLICA_REBUILDING the replica in /srv/store4 is made, and counts once everything is copied to it");
        let left = node.replace(|volume| volume.leaving.clear());
        assert_eq!(left, "REPLICA_DELETED the replica that was in /srv/store2 is deleted");
        let added = node.replace(|volume| {
            volume.replicas.push(store(2).id);
            volume.joining.push(store(2).id);
        });
        assert_eq!(added, "REPLICA_ADDED gets one more replica, in /srv/store2");
        node.replace(|volume| volume.joining.clear());
        let salvaged = node.tells(Mutation::Salvage { volume: node.volume().id, from: store(4).id, at_unix: 7 });
        assert_eq!(salvaged, "VOLUME_SALVAGED was salvaged from /srv/store4; what only /srv/store1, /srv/store3 had is lost");
        assert_eq!(node.replace(|volume| volume.joining.clear()), "", "the one that is the volume lacks nothing");
    }

    #[test]
    fn operations() {
        let mut node = Node::new().ready();
        let sizes = [20, 30, 40].map(|gib: u64| VolumeSize::new(gib << 30).unwrap());
        let begun = || OperationRecord::expand(volume(5, "vm1", &[]).id, "vm1".parse().unwrap(), [sizes[0], sizes[1]], None, 7);
        let mut put = |record: OperationRecord| {
            let told = node.tells(Mutation::PutOperation(record.into()));
            (told, node.0.operations.values().next_back().unwrap().clone())
        };
        let (told, running) = put(begun());
        assert_eq!(told, "OPERATION_STARTED operation 1 begins: to expand it to 30 GiB");
        let waits = || Outcome::Waits(Fault::new(Reason::StoreUnreachable, "x", "a store is away"));
        let (told, running) = put(running.after(waits(), 7));
        assert_eq!(told, "OPERATION_WAITS operation 1 waits: a store is away");
        let (told, running) = put(running.after(waits(), 8));
        assert_eq!(told, "", "it still waits");
        let (told, running) = put(running.folded(sizes[2], 9).unwrap());
        assert_eq!(told, "OPERATION_EXTENDED operation 1 is to expand it to 40 GiB");
        let (told, running) = put(running.after(Outcome::Done(vec!["a note".into()]), 7));
        assert_eq!(told, "", "a step is no news");
        let (_, running) = put(running.after(Outcome::Done(Vec::new()), 7));
        let (told, _) = put(running.after(Outcome::Done(Vec::new()), 7));
        assert_eq!(told, "OPERATION_SUCCEEDED operation 1 is done: to expand it to 40 GiB; a note");
        let (_, running) = put(begun());
        let (told, _) = put(running.after(Outcome::Refused(Fault::new(Reason::NoSpace, "x", "no room")), 7));
        assert_eq!(told, "OPERATION_FAILED operation 2 failed: no room");
        let (_, running) = put(begun());
        assert_eq!(put(running.given_up(7)).0, "OPERATION_CANCELLED operation 3 was cancelled");
    }
}
