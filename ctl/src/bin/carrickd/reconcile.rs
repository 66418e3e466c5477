//! What is to be done so that the node becomes what the records say: [`State`] and [`Observed`] in, a [`Plan`] out.
//!
//! Carrickd may be killed at any moment, so nothing here depends on what an earlier carrickd had in mind: whatever it left
//! half done is either in the records (a phase) or in what is found running.
//!
//! | Record | Process | Plan |
//! |---|---|---|
//! | ready volume, not attached, a replica that lacks something answers, or one may stop counting | none | start a target that tends it |
//! | store, attachment | not seen yet | look for it, start it if it isn't there |
//! | store, attachment | ended | start it again, after its pause |
//! | attaching | ended, saying why | wait: the attachment is being taken back |
//! | detaching | ended as asked | wait: the attachment is being removed |
//! | none | found | ask it to end |
//! | volume creating, nobody works on it | | undo it |
//! | volume deleting, a store with a replica answers | | delete that replica |
//! | attaching or detaching, nobody works on it | | go on with it |
//! | volume with a replica joining or leaving, its store answers | | make or delete that replica |
//! | an operation runs, nobody works on its volume | | go on with it |
//! | ready volume with a replica in a store that is being emptied | | begin to move it |
//! | an upgrade is asked for, nobody does a step of it | | do the next one |
//! | attached volume, a replica hasn't counted for `replace_after` | | replace it |

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use carrick_backing_store::{StoreId, VolumeId};

use crate::health::{self, Health, Patience};
use crate::metadata::{AttachmentPhase, State, VolumePhase, VolumeRecord};
use crate::observed::{EndRequest, Exit, Observed, Process, ProcessId, ProcessState, WorkState};

/// Work of a volume that nobody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Its creation was interrupted: delete what there is of it.
    UndoCreation,
    /// Delete the replicas that can be reached.
    Delete,
    /// See whether the device comes up; take the attachment back if it doesn't.
    Attach,
    /// Take the device away.
    Detach,
    /// Make the replica that replaces another, and delete that.
    Move,
    /// Go on with the operations that run on it, and with what [`Work::Move`] does.
    Operation,
    /// The store of this replica is being emptied: move it to another one.
    Evict(StoreId),
    /// A replica hasn't counted for long: replace it by one in another store.
    Replace(StoreId),
}

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Look for the process, and start it if it isn't there.
    Launch(ProcessId),
    /// Look for the process only.
    Look(ProcessId),
    /// Ask the process to end.
    Stop(ProcessId),
    /// It is gone and nobody wants it.
    Forget(ProcessId),
    /// Go on with a volume.
    Work(VolumeId, Work),
    /// Do the next step of the upgrade.
    Upgrade,
    /// Write down that a store's process is better or worse than it was.
    Tell(ProcessId, Health),
}

/// What to do, and when to think again if nothing happens before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In any order.
    pub actions: Vec<Action>,
    /// The earliest time at which the plan changes by itself.
    pub wake_at: Option<Instant>,
}

impl Plan {
    /// Does something now or later.
    fn at(&mut self, when: Instant, now: Instant, action: Action) {
        if when <= now {
            self.actions.push(action);
        } else {
            self.wake(when);
        }
    }

    /// Thinks again then.
    fn wake(&mut self, when: Instant) {
        self.wake_at = Some(self.wake_at.map_or(when, |earlier| earlier.min(when)));
    }
}

/// The time, and what depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub now: Instant,
    /// The same in seconds since 1970.
    pub unix: u64,
    /// A replica that doesn't count for so long is replaced; `None`: never.
    pub replace_after: Option<Duration>,
}

/// Compares what is wanted with what is there.
pub fn reconcile(state: &State, observed: &Observed, moment: Moment) -> Plan {
    let now = moment.now;
    let mut plan = Plan::default();
    let wanted = wanted(state, observed);
    for &id in &wanted {
        start_what_is_missing(&mut plan, state, id, observed.processes.get(&id), now);
        judge(&mut plan, id, observed.processes.get(&id), moment);
    }
    for (&id, process) in observed.processes.iter().filter(|(id, _)| !wanted.contains(id)) {
        match process.state {
            ProcessState::Unseen => plan.actions.push(Action::Look(id)),
            ProcessState::Alive { ask_not_before, .. } => plan.at(ask_not_before.unwrap_or(now), now, Action::Stop(id)),
            ProcessState::Down { .. } => plan.actions.push(Action::Forget(id)),
            ProcessState::Launching | ProcessState::Stopping { .. } => {}
        }
    }
    if !observed.stopping {
        if state.node.upgrade.is_some() && !observed.upgrade.running {
            plan.at(observed.upgrade.until.unwrap_or(now), now, Action::Upgrade);
        }
        for volume in state.volumes.values().filter(|volume| !observed.busy.contains(&volume.name)) {
            let work = work_on(state, observed, volume).map(|work| (now, work));
            if let Some((due, work)) = work.or_else(|| replacement(state, volume, moment)) {
                match observed.work.get(&volume.id) {
                    Some(WorkState::Running { .. }) => {}
                    Some(WorkState::Paused { until, .. }) => plan.at(due.max(*until), now, Action::Work(volume.id, work)),
                    None => plan.at(due, now, Action::Work(volume.id, work)),
                }
            }
        }
    }
    plan
}

/// The processes that should run.
fn wanted(state: &State, observed: &Observed) -> BTreeSet<ProcessId> {
    let targets = state.attachments.keys().map(|volume| ProcessId::Target(*volume));
    if observed.stopping {
        return targets.collect();
    }
    let replicas = state.stores.keys().map(|store| ProcessId::Replica(*store));
    let tended = state.volumes.values().filter(|volume| is_tended(state, observed, volume)).map(|volume| ProcessId::Target(volume.id));
    replicas.chain(targets).chain(tended).collect()
}

/// Whether a target is to see to the replicas of a volume that isn't attached: there is something to be done for them, and it can be.
fn is_tended(state: &State, observed: &Observed, volume: &VolumeRecord) -> bool {
    let is_free = volume.phase == VolumePhase::Ready && !state.attachments.contains_key(&volume.id);
    let answers = |store: &StoreId| observed.answers(ProcessId::Replica(*store));
    is_free && !observed.alone.contains(&volume.name) && (volume.lacking().iter().any(answers) || volume.may_retire())
}

fn start_what_is_missing(plan: &mut Plan, state: &State, id: ProcessId, process: Option<&Process>, now: Instant) {
    match process.map(|process| process.state) {
        None | Some(ProcessState::Unseen) => plan.actions.push(Action::Launch(id)),
        Some(ProcessState::Down { not_before }) if !is_over(state, id, process) && !is_asked(process) => {
            plan.at(not_before, now, Action::Launch(id))
        }
        Some(_) => {}
    }
}

/// What is away for a while is no news beyond its end, of which the log is told anyway.
fn judge(plan: &mut Plan, id: ProcessId, process: Option<&Process>, moment: Moment) {
    let (ProcessId::Replica(_), Some(process)) = (id, process) else { return };
    let (health, change) = health::of_process(process, Patience::new(moment.replace_after), moment.now);
    if health != Health::Reconnecting && health != process.told {
        plan.actions.push(Action::Tell(id, health));
    }
    change.into_iter().for_each(|change| plan.wake(change));
}

/// Whether an operation waits for the answer to its request to end: it decides what the end meant.
fn is_asked(process: Option<&Process>) -> bool {
    process.is_some_and(|process| process.request == EndRequest::Asked)
}

/// Whether an attachment's process ended in a way after which the attachment ends too.
fn is_over(state: &State, id: ProcessId, process: Option<&Process>) -> bool {
    let ProcessId::Target(volume) = id else { return false };
    let phase = state.attachments.get(&volume).map(|attachment| attachment.phase);
    match process.and_then(|process| process.last_exit.as_ref()) {
        Some(Exit::Failed(_)) => phase == Some(AttachmentPhase::Attaching),
        Some(Exit::Asked) => matches!(phase, Some(AttachmentPhase::Detaching { .. })),
        Some(Exit::Died(_)) | None => false,
    }
}

fn work_on(state: &State, observed: &Observed, volume: &VolumeRecord) -> Option<Work> {
    let target = ProcessId::Target(volume.id);
    let answers = |store: &StoreId| observed.answers(ProcessId::Replica(*store));
    match volume.phase {
        VolumePhase::Creating => Some(Work::UndoCreation),
        VolumePhase::Deleting => {
            let reachable = volume.replicas.iter().any(answers);
            (reachable || volume.replicas.is_empty()).then_some(Work::Delete)
        }
        VolumePhase::Ready => {
            let attachment = match state.attachments.get(&volume.id).map(|attachment| attachment.phase) {
                Some(AttachmentPhase::Attaching) => Some(Work::Attach),
                Some(AttachmentPhase::Detaching { .. }) => {
                    let process = observed.processes.get(&target);
                    (process.is_some_and(Process::answers) || is_over(state, target, process)).then_some(Work::Detach)
                }
                Some(AttachmentPhase::Attached) | None => None,
            };
            attachment
                .or_else(|| state.stepping(volume.id).next().map(|_| Work::Operation))
                .or_else(|| volume.joining.iter().chain(&volume.leaving).any(answers).then_some(Work::Move))
                .or_else(|| state.to_evict(volume).next().map(Work::Evict))
        }
    }
}

/// Which replica is replaced next, and when.
fn replacement(state: &State, volume: &VolumeRecord, moment: Moment) -> Option<(Instant, Work)> {
    let after = moment.replace_after?;
    let attachment = state.attachments.get(&volume.id).map(|attachment| attachment.phase);
    let is_settled = volume.phase == VolumePhase::Ready && matches!(attachment, None | Some(AttachmentPhase::Attached));
    let is_known = |store: &StoreId| volume.joining.contains(store) || volume.retiring.contains(store);
    let lost = volume.left_out.iter().filter(|(store, _)| is_settled && !is_known(store));
    let (store, since) = lost.min_by_key(|(_, since)| **since)?;
    // A clock that was set back counts anew.
    let waited = Duration::from_secs(moment.unix.saturating_sub(*since));
    Some((moment.now + after.saturating_sub(waited), Work::Replace(*store)))
}

#[cfg(test)]
mod tests {
    //! A table: each row sets up a node and says what is to be done.

    use std::collections::BTreeMap;

    use carrick_backing_store::VolumeSize;
    use carrick_replicator::engine::Attachment;
    use carrick_replicator::limits::Limits;

    use super::*;
    use crate::metadata::{AttachmentRecord, Mutation, OperationRecord, StoreRecord, UpgradeRecord};
    use crate::observed::{Event, STOP_PAUSE, UPGRADE_PAUSE_MIN};

    const STORE: StoreId = StoreId::from_bytes([1; 16]);
    const VOLUME: VolumeId = VolumeId::from_bytes([5; 16]);
    const REPLICA: ProcessId = ProcessId::Replica(STORE);
    const TARGET: ProcessId = ProcessId::Target(VOLUME);
    const UNIX: u64 = 1_700_000_000;
    const REPLACE_AFTER: Duration = Duration::from_secs(600);

    struct Node {
        state: State,
        observed: Observed,
        now: Instant,
    }

    impl Node {
        fn new() -> Self {
            Self { state: State::default(), observed: Observed::default(), now: Instant::now() }
        }

        fn store(mut self) -> Self {
            let record = StoreRecord::new(STORE, "/srv/a".into(), None, false, 0);
            self.state.stores.insert(STORE, record);
            self
        }

        fn volume(mut self, phase: VolumePhase) -> Self {
            let record = VolumeRecord {
                id: VOLUME,
                name: "vm1".parse().unwrap(),
                size: VolumeSize::new(4096).unwrap(),
                block_size: 512,
                replicas: vec![STORE],
                config_version: 1,
                created_unix: 0,
                phase,
                rebuild_rate: None,
                limits: Limits::default(),
                config: None,
                left_out: BTreeMap::new(),
                joining: Vec::new(),
                retiring: Vec::new(),
                leaving: Vec::new(),
                salvages: Vec::new(),
                verified: None,
            };
            self.state.volumes.insert(VOLUME, record);
            self
        }

        fn attachment(mut self, phase: AttachmentPhase) -> Self {
            let record = AttachmentRecord {
                volume: VOLUME,
                host: false,
                queue_depth: 128,
                phase,
                since_unix: 0,
                number: Attachment::NONE,
                map: carrick_replicator::control::Map::Auto,
            };
            self.state.attachments.insert(VOLUME, record);
            self
        }

        fn event(mut self, event: Event) -> Self {
            self.observed.on_event(event, self.now);
            self
        }

        fn answering(self, process: ProcessId) -> Self {
            self.event(Event::Alive { process, pid: 9, adopted: false }).event(Event::Answering(process))
        }

        fn ended(self, process: ProcessId, exit: Exit) -> Self {
            self.event(Event::Alive { process, pid: 9, adopted: false }).event(Event::Ended { process, exit })
        }

        fn busy(mut self) -> Self {
            self.observed.busy.insert("vm1".parse().unwrap());
            self
        }

        fn stopping(self) -> Self {
            self.event(Event::Stopping(true))
        }

        fn change(mut self, change: impl FnOnce(&mut Observed)) -> Self {
            change(&mut self.observed);
            self
        }

        fn plan(&self) -> Plan {
            reconcile(&self.state, &self.observed, Moment { now: self.now, unix: UNIX, replace_after: Some(REPLACE_AFTER) })
        }

        #[track_caller]
        fn does(self, actions: &[Action]) -> Self {
            // A store that is silent is judged again.
            let silent = self.observed.processes.get(&REPLICA).filter(|_| !self.state.stores.is_empty() && !self.observed.stopping);
            let wake_at = silent.and_then(|process| process.silent_since).map(|since| since + Duration::from_secs(30));
            assert_eq!(self.plan(), Plan { actions: actions.to_vec(), wake_at });
            self
        }
    }

    fn killed() -> Exit {
        Exit::Died("killed by signal 9".into())
    }

    #[test]
    fn nothing_is_wanted_and_nothing_is_there() {
        Node::new().does(&[]);
    }

    #[test]
    fn processes_are_started_once_and_again_when_they_end() {
        use Action::{Forget, Launch, Look, Stop};
        let store = || Node::new().store();
        store().does(&[Launch(REPLICA)]);
        store().event(Event::Found(REPLICA)).does(&[Launch(REPLICA)]);
        store().change(|o| o.on_launch(REPLICA)).does(&[]);
        store().event(Event::Alive { process: REPLICA, pid: 1, adopted: false }).does(&[]);
        store().answering(REPLICA).does(&[]);
        store().answering(REPLICA).event(Event::Hung(REPLICA)).does(&[]);
        store().ended(REPLICA, killed()).does(&[Launch(REPLICA)]);
        store().ended(REPLICA, Exit::failed("no such store")).does(&[Launch(REPLICA)]);
        // Asked by somebody else, or stopped while it was not wanted and wanted again now.
        store().ended(REPLICA, Exit::Asked).does(&[Launch(REPLICA)]);

        Node::new().event(Event::Found(REPLICA)).does(&[Look(REPLICA)]);
        Node::new().answering(REPLICA).does(&[Stop(REPLICA)]);
        Node::new().answering(REPLICA).change(|o| o.on_stop(REPLICA)).does(&[]);
        Node::new().ended(REPLICA, killed()).does(&[Forget(REPLICA)]);
        Node::new().event(Event::Found(TARGET)).event(Event::Absent(TARGET)).does(&[Forget(TARGET)]);
    }

    #[test]
    fn quick_deaths_are_restarted_after_their_pause() {
        let node = Node::new().store().ended(REPLICA, killed()).ended(REPLICA, killed());
        let pause = Duration::from_millis(100);
        assert_eq!(node.plan(), Plan { actions: vec![], wake_at: Some(node.now + pause) });
        let later = Node { now: node.now + pause, ..node };
        later.does(&[Action::Launch(REPLICA)]);
    }

    #[test]
    fn the_log_is_told_once_when_a_store_is_worse_and_when_it_is_ready() {
        let silent = Node::new().store().answering(REPLICA).event(Event::Ended { process: REPLICA, exit: killed() });
        let launching = silent.change(|o| o.on_launch(REPLICA));
        let after = |node: Node, seconds: u64| Node { now: node.now + Duration::from_secs(seconds), ..node };
        let plan = |node: &Node, actions: &[Action], wake: Option<u64>| {
            let wake_at = wake.map(|seconds| node.now + Duration::from_secs(seconds));
            assert_eq!(node.plan(), Plan { actions: actions.to_vec(), wake_at });
        };
        plan(&launching, &[], Some(30));
        let degraded = after(launching, 30);
        plan(&degraded, &[Action::Tell(REPLICA, Health::Degraded)], Some(570));
        let told = degraded.change(|o| o.on_told(REPLICA, Health::Degraded));
        plan(&told, &[], Some(570));
        let failed = after(told, 570);
        plan(&failed, &[Action::Tell(REPLICA, Health::Failed)], None);
        let back = failed.change(|o| o.on_told(REPLICA, Health::Failed)).answering(REPLICA);
        plan(&back, &[Action::Tell(REPLICA, Health::Ready)], None);
        plan(&back.change(|o| o.on_told(REPLICA, Health::Ready)), &[], None);
    }

    #[test]
    fn what_refuses_to_end_is_asked_again_later() {
        let node = Node::new().answering(TARGET).change(|o| o.on_stop(TARGET)).event(Event::Refused(TARGET));
        assert_eq!(node.plan(), Plan { actions: vec![], wake_at: Some(node.now + STOP_PAUSE) });
    }

    #[test]
    fn an_upgrade_goes_on_step_by_step_as_long_as_it_is_asked_for() {
        let node = || {
            let mut node = Node::new();
            let upgrade = Some(UpgradeRecord { since_unix: UNIX });
            node.state.apply(&Mutation::SetUpgrade(upgrade)).unwrap();
            node
        };
        node().does(&[Action::Upgrade]);
        node().stopping().does(&[]);
        let at_work = || node().change(Observed::on_upgrade);
        at_work().does(&[]);
        at_work().event(Event::Upgraded { waiting_for: None }).does(&[Action::Upgrade]);
        let waits = || at_work().event(Event::Upgraded { waiting_for: Some("a replica".into()) });
        let paused = waits();
        assert_eq!(paused.plan(), Plan { actions: vec![], wake_at: Some(paused.now + UPGRADE_PAUSE_MIN) });
        // What it waits for may be this.
        waits().answering(TARGET).does(&[Action::Stop(TARGET), Action::Upgrade]);
        let done = Node { state: State::default(), ..waits() };
        done.does(&[]);
    }

    #[test]
    fn what_runs_on_a_volume_goes_on_when_nobody_works_on_it() {
        let size = |blocks: u64| VolumeSize::new(blocks * 4096).unwrap();
        let record = OperationRecord::expand(VOLUME, "vm1".parse().unwrap(), [size(1), size(2)], None, UNIX);
        let node = |record: OperationRecord| {
            let mut node = Node::new().volume(VolumePhase::Ready);
            node.state.apply(&Mutation::PutOperation(record.into())).unwrap();
            node
        };
        let go_on = [Action::Work(VOLUME, Work::Operation)];
        node(record.clone()).does(&go_on);
        node(record.clone()).busy().does(&[]);
        node(record.clone()).stopping().does(&[]);
        node(record.given_up(UNIX)).does(&[]);
        let waits = node(record).event(Event::Worked { volume: VOLUME, finished: false });
        assert_eq!(waits.plan(), Plan { actions: vec![], wake_at: Some(waits.now + Duration::from_secs(1)) });
    }

    #[test]
    fn targets_follow_their_attachment() {
        use Action::{Launch, Stop};
        use AttachmentPhase::{Attached, Attaching, Detaching};
        let attached = |phase| Node::new().volume(VolumePhase::Ready).attachment(phase);
        attached(Attached).does(&[Launch(TARGET)]);
        attached(Attached).answering(TARGET).does(&[]);
        // A device that is in use gets its target back, whatever that says.
        attached(Attached).ended(TARGET, killed()).does(&[Launch(TARGET)]);
        attached(Attached).ended(TARGET, Exit::failed("no ublk")).does(&[Launch(TARGET)]);
        attached(Attached).ended(TARGET, Exit::Asked).does(&[Launch(TARGET)]);
        // One that never came up is not tried again once its target said why; a crash is.
        attached(Attaching).busy().does(&[Launch(TARGET)]);
        attached(Attaching).busy().ended(TARGET, killed()).does(&[Launch(TARGET)]);
        attached(Attaching).busy().ended(TARGET, Exit::failed("no ublk")).does(&[]);
        // The device may still be there: only a target can take it away, so one is started for that.
        let detaching = || attached(Detaching { force: false }).busy();
        detaching().does(&[Launch(TARGET)]);
        detaching().ended(TARGET, killed()).does(&[Launch(TARGET)]);
        let asked = || detaching().answering(TARGET).event(Event::EndAsked(TARGET));
        let answered = |granted| Event::EndAnswered { process: TARGET, granted };
        let ended = || Event::Ended { process: TARGET, exit: killed() };
        asked().event(answered(true)).event(ended()).does(&[]);
        // Its end is noticed before its answer.
        asked().event(ended()).does(&[]).event(answered(true)).does(&[]);
        // It died instead of answering: the device is still there.
        asked().event(ended()).event(answered(false)).does(&[Launch(TARGET)]);
        // Nobody wants it.
        Node::new().volume(VolumePhase::Ready).answering(TARGET).does(&[Stop(TARGET)]);
    }

    #[test]
    fn unfinished_work_is_gone_on_with_unless_somebody_does() {
        use Action::{Launch, Work as Do};
        use AttachmentPhase::{Attached, Attaching, Detaching};
        use VolumePhase::{Creating, Deleting, Ready};
        let node = || Node::new().store().answering(REPLICA);
        node().volume(Creating).does(&[Do(VOLUME, Work::UndoCreation)]);
        node().volume(Creating).busy().does(&[]);
        node().volume(Creating).change(|o| o.on_work(VOLUME)).does(&[]);
        node().volume(Deleting).does(&[Do(VOLUME, Work::Delete)]);
        node().volume(Deleting).busy().does(&[]);
        // Its store is away: nothing to do until it is back.
        Node::new().store().volume(Deleting).change(|o| o.on_launch(REPLICA)).does(&[]);
        node().volume(Ready).does(&[]);
        node().volume(Ready).attachment(Attached).answering(TARGET).does(&[]);
        node().volume(Ready).attachment(Attaching).does(&[Launch(TARGET), Do(VOLUME, Work::Attach)]);
        let detaching = || node().volume(Ready).attachment(Detaching { force: false });
        detaching().does(&[Launch(TARGET)]);
        detaching().answering(TARGET).does(&[Do(VOLUME, Work::Detach)]);
        detaching().answering(TARGET).busy().does(&[]);
        let done = detaching().answering(TARGET).event(Event::EndAnswered { process: TARGET, granted: true });
        done.event(Event::Ended { process: TARGET, exit: killed() }).does(&[Do(VOLUME, Work::Detach)]);
        // It failed a moment ago.
        let paused = detaching().answering(TARGET).event(Event::Worked { volume: VOLUME, finished: false });
        assert_eq!(paused.plan(), Plan { actions: vec![], wake_at: Some(paused.now + Duration::from_secs(1)) });
    }

    #[test]
    fn replicas_are_replaced_when_they_are_lost_for_long() {
        use Action::Work as Do;
        use AttachmentPhase::Attached;
        let other = StoreId::from_bytes([2; 16]);
        let node = |change: &dyn Fn(&mut VolumeRecord)| {
            let mut node = Node::new().store().answering(REPLICA).volume(VolumePhase::Ready);
            change(node.state.volumes.get_mut(&VOLUME).unwrap());
            node
        };
        let lost = |since: u64| {
            let node = node(&|volume| volume.left_out = [(other, since)].into());
            node.attachment(Attached).answering(TARGET)
        };
        lost(UNIX - 600).does(&[Do(VOLUME, Work::Replace(other))]);
        lost(UNIX - 700).busy().does(&[]);
        lost(UNIX - 700).change(|o| o.on_work(VOLUME)).does(&[]);
        let early = lost(UNIX - 500);
        assert_eq!(early.plan(), Plan { actions: vec![], wake_at: Some(early.now + Duration::from_secs(100)) });
        // By a clock that was set back since.
        let back = lost(UNIX + 500);
        assert_eq!(back.plan(), Plan { actions: vec![], wake_at: Some(back.now + REPLACE_AFTER) });
        let never = lost(UNIX - 700);
        let moment = Moment { now: never.now, unix: UNIX, replace_after: None };
        assert_eq!(reconcile(&never.state, &never.observed, moment), Plan::default());
        // Used or not.
        node(&|volume| volume.left_out = [(other, 0)].into()).does(&[Do(VOLUME, Work::Replace(other))]);
        // What was begun goes on when its store answers, attached or not.
        node(&|volume| volume.joining.push(STORE)).does(&[Do(VOLUME, Work::Move)]);
        node(&|volume| volume.leaving.push(STORE)).does(&[Do(VOLUME, Work::Move)]);
        node(&|volume| volume.leaving.push(other)).does(&[]);
    }

    #[test]
    fn what_nobody_uses_is_tended_as_long_as_that_is_of_use() {
        use Action::{Launch, Stop, Work as Do};
        use carrick_replicator::control::VolumeConfig;
        let other = StoreId::from_bytes([2; 16]);
        let volume = |members: &[StoreId], change: &dyn Fn(&mut VolumeRecord)| {
            let mut node = Node::new().store().volume(VolumePhase::Ready);
            let record = node.state.volumes.get_mut(&VOLUME).unwrap();
            record.replicas = vec![STORE, other];
            record.config = Some(VolumeConfig { members: members.to_vec(), ..record.config() });
            change(record);
            node.answering(REPLICA)
        };
        let lacks = || volume(&[other], &|_| ());
        lacks().does(&[Launch(TARGET)]);
        lacks().answering(TARGET).does(&[]);
        lacks().answering(TARGET).stopping().does(&[Stop(REPLICA), Stop(TARGET)]);
        // Whoever works on the volume may want that.
        lacks().busy().answering(TARGET).does(&[]);
        lacks().busy().answering(TARGET).change(|o| o.alone = o.busy.clone()).does(&[Stop(TARGET)]);
        // What lacks something can't be reached, or isn't made yet, or is to go anyway.
        volume(&[STORE], &|_| ()).answering(TARGET).does(&[Stop(TARGET)]);
        volume(&[other], &|volume| volume.joining = vec![STORE]).does(&[Do(VOLUME, Work::Move)]);
        volume(&[other], &|volume| volume.retiring = vec![STORE]).does(&[]);
        // One that is to go does when all others count.
        volume(&[STORE, other], &|volume| volume.retiring = vec![STORE]).does(&[Launch(TARGET)]);
        volume(&[STORE], &|volume| volume.retiring = vec![STORE]).does(&[]);
        volume(&[STORE, other], &|_| ()).does(&[]);
        // Its target may still be that of an attachment which has just ended.
        lacks().attachment(AttachmentPhase::Detaching { force: false }).ended(TARGET, Exit::Asked).does(&[Do(VOLUME, Work::Detach)]);
        lacks().ended(TARGET, Exit::Asked).does(&[Launch(TARGET)]);
    }

    #[test]
    fn at_the_end_stores_are_stopped_and_no_work_begins() {
        let node = || Node::new().store().volume(VolumePhase::Creating);
        node().answering(REPLICA).stopping().does(&[Action::Stop(REPLICA)]);
        node().ended(REPLICA, killed()).stopping().does(&[Action::Forget(REPLICA)]);
        let attached = Node::new().store().volume(VolumePhase::Ready).attachment(AttachmentPhase::Attached);
        // Shutdown detaches first; should an attachment be left, its target stays.
        attached.answering(TARGET).ended(REPLICA, killed()).stopping().does(&[Action::Forget(REPLICA)]);
    }
}
