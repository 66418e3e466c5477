//! Replacing the processes of an older program by new ones, one at a time and without an I/O error.
//!
//! **Order:** 1. the record: an upgrade is asked for; 2. for each store whose carrick-replica is outdated, when all other replicas of its
//! attached volumes count: that process ends, another is started, and its replicas count again before the next; 3. for each attached volume
//! whose carrick-target is outdated: that process is killed, the next one takes the device over, and serves before the next; 4. the record:
//! none is asked for. [`next_step`] decides by what is seen alone, so a crash anywhere is followed by the same steps.

use std::time::Duration;

use carrick_backing_store::StoreId;
use carrick_ctl::fault::Fault;
use carrick_replicator::control::{MemberReport, MemberState, ReplicaRequest, TargetPhase, TargetStatus};

use crate::context::{Context, unix_now};
use crate::control::{self, SHUTDOWN_LIMIT};
use crate::metadata::{AttachmentPhase, AttachmentRecord, Mutation, State, UpgradeRecord};
use crate::observed::{Event, ProcessId};
use crate::view::View;
use crate::{launch, programs, survey};

/// For a process that was told to end, or killed, to be gone: longer than [`launch::END_LIMIT`], after which it is killed.
const GONE_LIMIT: Duration = Duration::from_secs(15);

/// What an upgrade does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Let another one take the place of this process.
    Replace(ProcessId),
    /// Look again soon: for this, in words.
    Wait(String),
    /// All processes are of the programs on disk, and do their work.
    Done,
}

/// What is to be replaced, in the order in which that is tried.
pub struct Outlook {
    /// The processes.
    pub processes: Vec<ProcessId>,
    /// The names of attached volumes with one replica, whose process is among these: I/O waits while it is replaced.
    pub pausing: Vec<String>,
}

/// Asks for an upgrade, unless one is under way already. Returns what it has to do.
pub async fn begin(context: &Context, dry_run: bool) -> Result<Outlook, Fault> {
    programs::check(context)?;
    let state = context.state();
    let outlook = outlook(&state, programs::outdated(&context.bin_dir, &state, &context.node.observed()).into_iter().collect());
    if !dry_run && !outlook.processes.is_empty() && state.node.upgrade.is_none() {
        tracing::info!(processes = outlook.processes.len(), "an upgrade begins");
        let upgrade = Some(UpgradeRecord { since_unix: unix_now() });
        context.apply(Mutation::SetUpgrade(upgrade)).await?;
    }
    Ok(outlook)
}

fn outlook(state: &State, processes: Vec<ProcessId>) -> Outlook {
    let pauses = |volume: &&crate::metadata::VolumeRecord| matches!(volume.config().members.as_slice(), [only] if processes.contains(&ProcessId::Replica(*only)));
    let pausing = state.attached().filter(pauses).map(|volume| volume.name.to_string()).collect();
    Outlook { processes, pausing }
}

/// Does one step. `None`: it is done; else what is waited for.
pub async fn go_on(context: &Context) -> Option<String> {
    let _pass = match context.gate.enter().await {
        Ok(pass) => pass,
        Err(fault) => return Some(fault.message),
    };
    match survey::look(context, next_step).await {
        Step::Replace(id) => replace(context, id).await,
        Step::Wait(why) => Some(why),
        Step::Done => {
            tracing::info!("the upgrade is done");
            context.apply(Mutation::SetUpgrade(None)).await.err().map(|fault| fault.message)
        }
    }
}

async fn replace(context: &Context, id: ProcessId) -> Option<String> {
    let pidfd = context.node.pidfd(id)?;
    tracing::info!(process = %id, pid = pidfd.pid(), "is replaced by one of the program on disk");
    match id {
        ProcessId::Replica(store) => {
            context.node.send(Event::EndAsked(id)).await;
            let socket = context.run.replica_control(store);
            let answered = control::replica(&socket, &ReplicaRequest::Shutdown, SHUTDOWN_LIMIT).await;
            context.node.send(Event::EndAnswered { process: id, granted: answered.is_ok() }).await;
            match answered {
                Ok(()) => launch::kill_unless_it_ends(id, &pidfd).await,
                // What it has acknowledged survives its death.
                Err(error) => {
                    tracing::warn!(process = %id, %error, "is killed: it didn't take the request to end");
                    launch::kill(context, id, &pidfd).await;
                }
            }
        }
        ProcessId::Target(_) => launch::kill(context, id, &pidfd).await,
    }
    match tokio::time::timeout(GONE_LIMIT, context.node.wait_ended(id, pidfd.pid())).await {
        Ok(()) => {
            context.crash_at("upgrade");
            None
        }
        Err(_) => Some(format!("{id}: process {} was killed, and doesn't end: its disk or the kernel hangs", pidfd.pid())),
    }
}

/// Decides by what is seen. What is not as it should be with a new process ends the upgrade there: it may be the new program's fault.
fn next_step(view: &View<'_>) -> Step {
    if let Some(why) = unhealthy(view) {
        return Step::Wait(why);
    }
    // It does no work, and only it knows whether a replica of its volume may go.
    let is_silent = |id: &&ProcessId| matches!(id, ProcessId::Target(volume) if matches!(view.targets.get(volume), Some(Err(_))));
    if let Some(id) = view.outdated.iter().find(is_silent) {
        return Step::Replace(*id);
    }
    let replicas = view.outdated.iter().filter_map(|id| if let ProcessId::Replica(store) = id { Some(*store) } else { None });
    let mut first_reason = None;
    for store in replicas {
        match needs_others(view, store) {
            None => return Step::Replace(ProcessId::Replica(store)),
            Some(why) => first_reason = first_reason.or(Some(why)),
        }
    }
    if let Some(why) = first_reason {
        return Step::Wait(why);
    }
    match view.outdated.iter().next() {
        Some(id) => Step::Replace(*id),
        None => Step::Done,
    }
}

/// What is wanted and isn't there yet, of the processes that need not be replaced, and of what they brought back.
fn unhealthy(view: &View<'_>) -> Option<String> {
    let stores = view.state.stores.values().filter(|store| !view.outdated.contains(&ProcessId::Replica(store.id)));
    for store in stores {
        let why = match view.replicas.get(&store.id) {
            Some(Ok(status)) => status.poisoned.as_ref().map(|why| format!("takes no more operations: {why}")),
            Some(Err(why)) => Some(why.clone()),
            None => Some("is not started yet".to_owned()),
        };
        if let Some(why) = why {
            return Some(format!("the carrick-replica of store {} {why}", store.path.display()));
        }
    }
    view.state.attachments.values().find_map(|attachment| unhealthy_volume(view, attachment))
}

fn unhealthy_volume(view: &View<'_>, attachment: &AttachmentRecord) -> Option<String> {
    let name = &view.state.volumes.get(&attachment.volume)?.name;
    if let AttachmentPhase::Detaching { .. } = attachment.phase {
        return Some(format!("volume {name} is being detached"));
    }
    let is_outdated = view.outdated.contains(&ProcessId::Target(attachment.volume));
    let status = match view.targets.get(&attachment.volume) {
        Some(Ok(status)) => status,
        // Nothing is known of its replicas; its own turn comes.
        Some(Err(_)) | None if is_outdated => return None,
        Some(Err(why)) => return Some(format!("the carrick-target of volume {name} {why}")),
        None => return Some(format!("the carrick-target of volume {name} is not started yet")),
    };
    if status.phase != TargetPhase::Serving && !is_outdated {
        let what = status.waiting_for.as_ref().map_or(String::new(), |what| format!(", which waits for {what}"));
        return Some(format!("the device of volume {name} to be taken over by its carrick-target{what}"));
    }
    // One whose store answers comes back by itself.
    let returns = |member: &&MemberReport| matches!(view.replicas.get(&member.store), Some(Ok(_))) && !is_whole(view, status, member);
    status.replicas.iter().find(returns).map(|member| lacks(view, status, member))
}

/// Why the process of a store must not be ended now: of an attached volume, another replica would have to do its work alone.
fn needs_others(view: &View<'_>, store: StoreId) -> Option<String> {
    let volumes = view.state.volumes_on(store).filter(|volume| view.state.attachments.contains_key(&volume.id));
    for volume in volumes {
        let Some(Ok(status)) = view.targets.get(&volume.id) else {
            return Some(format!("the carrick-target of volume {} to answer", volume.name));
        };
        if let Some(member) = status.replicas.iter().find(|member| member.store != store && !is_whole(view, status, member)) {
            return Some(lacks(view, status, member));
        }
    }
    None
}

/// Whether a volume has what it is to have of a replica: of one that is to go, it is nothing.
fn is_whole(view: &View<'_>, status: &TargetStatus, member: &MemberReport) -> bool {
    let is_to_go = view.state.volumes.get(&status.volume).is_some_and(|volume| volume.retiring.contains(&member.store));
    is_to_go || member.counts && member.state == MemberState::InSync
}

fn lacks(view: &View<'_>, status: &TargetStatus, member: &MemberReport) -> String {
    let name = view.state.volumes.get(&status.volume).map_or_else(|| status.volume.to_string(), |volume| volume.name.to_string());
    let progress = member.copied.map_or(String::new(), |(copied, total)| format!(": {copied} of {total} bytes are copied"));
    format!("the replica of volume {name} in {} to be in sync{progress}", view.state.place(member.store))
}

#[cfg(test)]
mod tests {
    //! A table: each row sets up a node that is healthy but for something, and says what is done next.

    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Instant;

    use carrick_backing_store::{ByteLength, StoreUsage, VolumeId, VolumeSize};
    use carrick_replicator::control::{ReplicaProcessStatus, ScrubReport};
    use carrick_replicator::endpoint::Endpoint;
    use carrick_replicator::limits::Delays;

    use super::*;
    use crate::metadata::tests::{attachment, store, volume};
    use crate::observed::Observed;
    use crate::reconcile::Moment;
    use crate::survey::Answer;

    const A: ProcessId = replica(1);
    const B: ProcessId = replica(2);
    const TARGET: ProcessId = target(5);

    const fn replica(number: u8) -> ProcessId {
        ProcessId::Replica(StoreId::from_bytes([number; 16]))
    }

    const fn target(number: u8) -> ProcessId {
        ProcessId::Target(VolumeId::from_bytes([number; 16]))
    }

    /// Three stores; of the volume vm1 each has a replica, of vm2 the first alone has one. Both are attached.
    struct Node {
        state: State,
        outdated: BTreeSet<ProcessId>,
        replicas: BTreeMap<StoreId, Answer<ReplicaProcessStatus>>,
        targets: BTreeMap<VolumeId, Answer<TargetStatus>>,
    }

    impl Node {
        fn new(outdated: &[ProcessId]) -> Self {
            let mut state = State::default();
            for number in 1..=3 {
                state.apply(&Mutation::PutStore(store(number))).unwrap();
            }
            for (number, name, stores) in [(5, "vm1", &[1, 2, 3][..]), (6, "vm2", &[1])] {
                state.apply(&Mutation::InsertVolume(volume(number, name, stores).into())).unwrap();
                state.apply(&Mutation::PutAttachment(attachment(number, AttachmentPhase::Attached))).unwrap();
            }
            let replicas = state.stores.keys().map(|store| (*store, Ok(replica_status(*store)))).collect();
            let targets = state.volumes.values().map(|volume| (volume.id, Ok(target_status(volume.id, &volume.replicas)))).collect();
            Self { state, outdated: outdated.iter().copied().collect(), replicas, targets }
        }

        fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
            change(&mut self);
            self
        }

        /// How the target of vm1 sees the replica in a store.
        fn member(self, number: u8, state: MemberState, counts: bool) -> Self {
            self.with(|node| {
                let member = node.target(5).replicas.iter_mut().find(|member| replica(number) == ProcessId::Replica(member.store));
                let member = member.unwrap();
                (member.state, member.counts) = (state, counts);
            })
        }

        fn store_is(self, number: u8, how: &str) -> Self {
            self.with(|node| _ = node.replicas.insert(StoreId::from_bytes([number; 16]), Err(how.into())))
        }

        fn target_is(self, number: u8, how: &str) -> Self {
            self.with(|node| _ = node.targets.insert(VolumeId::from_bytes([number; 16]), Err(how.into())))
        }

        fn target(&mut self, number: u8) -> &mut TargetStatus {
            self.targets.get_mut(&VolumeId::from_bytes([number; 16])).unwrap().as_mut().unwrap()
        }

        fn step(&self) -> Step {
            let (observed, Self { state, outdated, replicas, targets }) = (Observed::default(), self);
            let moment = Moment { now: Instant::now(), unix: 0, replace_after: None };
            next_step(&View { state, trouble: None, observed: &observed, outdated, replicas, targets, moment })
        }

        #[track_caller]
        fn waits(&self, why: &str) {
            match self.step() {
                Step::Wait(said) => assert!(said.contains(why), "{said}"),
                other => panic!("{other:?}, not to wait for {why}"),
            }
        }
    }

    fn replica_status(store: StoreId) -> ReplicaProcessStatus {
        ReplicaProcessStatus {
            version: "1".into(),
            store,
            path: "/x".into(),
            endpoints: Vec::new(),
            usage: StoreUsage::default(),
            poisoned: None,
            scrub: ScrubReport::default(),
            replicas: Vec::new(),
        }
    }

    fn target_status(volume: VolumeId, stores: &[StoreId]) -> TargetStatus {
        let member = |store: &StoreId| MemberReport {
            store: *store,
            endpoint: Endpoint::Unix("/x".into()),
            state: MemberState::InSync,
            counts: true,
            copied: None,
            seconds_left: None,
            last_error: None,
        };
        TargetStatus {
            version: "1".into(),
            volume,
            phase: TargetPhase::Serving,
            device: Some("/dev/ublkb0".into()),
            size: VolumeSize::new(4096).ok(),
            grows_online: true,
            term: None,
            replicas: stores.iter().map(member).collect(),
            requests_in_flight: 0,
            waiting_for: None,
            copied: ByteLength::ZERO,
            repaired: 0,
            delays: Delays::default(),
            verification: None,
        }
    }

    #[test]
    fn stores_come_first_then_volumes_one_at_a_time() {
        use Step::{Done, Replace};
        assert_eq!(Node::new(&[]).step(), Done);
        assert_eq!(Node::new(&[A, B, TARGET, target(6)]).step(), Replace(A));
        assert_eq!(Node::new(&[B, TARGET, target(6)]).step(), Replace(B));
        assert_eq!(Node::new(&[TARGET, target(6)]).step(), Replace(TARGET));
        assert_eq!(Node::new(&[target(6)]).step(), Replace(target(6)));
    }

    #[test]
    fn nothing_is_replaced_before_the_last_one_does_its_work() {
        for left in [&[B, TARGET][..], &[TARGET], &[]] {
            let node = || Node::new(left);
            node().store_is(1, "is being started").waits("store /srv/store1 is being started");
            node().with(|node| node.replicas.clear()).waits("is not started yet");
            let poisoned = |node: &mut Node| node.replicas.values_mut().flatten().for_each(|status| status.poisoned = Some("no".into()));
            if !left.contains(&B) {
                node().with(poisoned).waits("takes no more operations: no");
            }
            node().target_is(6, "runs but doesn't answer").waits("the carrick-target of volume vm2 runs but doesn't answer");
            node().with(|node| node.target(6).phase = TargetPhase::Electing).waits("the device of volume vm2");
            for (state, counts) in [(MemberState::Copying, true), (MemberState::Disconnected, true), (MemberState::InSync, false)] {
                node().member(1, state, counts).waits("the replica of volume vm1 in /srv/store1 to be in sync");
            }
        }
    }

    #[test]
    fn no_replica_is_taken_from_a_volume_that_lacks_another() {
        // It is there no more, so nobody waits until it is back before the volumes' turn comes.
        let away = |outdated: &[ProcessId]| Node::new(outdated).member(3, MemberState::Disconnected, false).store_is(3, "hangs");
        away(&[A, B, replica(3)]).with(|node| drop(node.targets.remove(&VolumeId::from_bytes([6; 16])))).waits("vm2");
        assert_eq!(away(&[A, B, replica(3)]).step(), Step::Replace(replica(3)), "the others have what it has");
        away(&[A, B]).waits("the carrick-replica of store /srv/store3 hangs");
        // Two lack something, and are of the old program: neither may go.
        let two = away(&[A, B, replica(3)]).member(2, MemberState::Disconnected, true).store_is(2, "hangs");
        two.waits("in /srv/store2 to be in sync");
        // Only the target knows. If that is silent and old itself, it goes first.
        let unknown = |outdated: &[ProcessId]| Node::new(outdated).target_is(5, "runs but doesn't answer");
        unknown(&[A]).waits("the carrick-target of volume vm1 runs but doesn't answer");
        assert_eq!(unknown(&[A, TARGET]).step(), Step::Replace(TARGET));
        // One that is to go stops counting as soon as all others do.
        let retiring = |node: &mut Node| node.state.volumes.values_mut().for_each(|volume| volume.retiring = vec![store(3).id]);
        assert_eq!(Node::new(&[A]).member(3, MemberState::InSync, false).with(retiring).step(), Step::Replace(A));
    }

    #[test]
    fn what_nobody_uses_stops_nothing() {
        let vm1 = VolumeId::from_bytes([5; 16]);
        let detached = Node::new(&[A, B]).member(3, MemberState::Disconnected, false).with(|node| {
            node.state.apply(&Mutation::RemoveAttachment(vm1)).unwrap();
            node.targets.remove(&vm1);
        });
        assert_eq!(detached.step(), Step::Replace(A));
        let detaching = |node: &mut Node| {
            node.state.apply(&Mutation::PutAttachment(attachment(5, AttachmentPhase::Detaching { force: false }))).unwrap();
        };
        Node::new(&[TARGET]).with(detaching).waits("volume vm1 is being detached");
    }

    #[test]
    fn volumes_with_one_replica_that_counts_are_named() {
        let node = Node::new(&[]);
        let names = |processes: &[ProcessId]| outlook(&node.state, processes.to_vec()).pausing;
        assert_eq!(names(&[A, B, TARGET]), ["vm2"]);
        assert_eq!(names(&[B, TARGET, target(6)]), [] as [&str; 0]);
    }
}
