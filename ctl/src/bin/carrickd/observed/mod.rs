//! What is known of the processes and of unfinished work: events in, state out. No clock (`now` is passed in), no I/O.

mod process;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use carrick_backing_store::VolumeId;
use carrick_ctl::name::VolumeName;

use crate::health::Health;

pub use process::{Answers, EndRequest, Exit, Process, ProcessId, ProcessState};

/// A process that lived so long was healthy: its next death is restarted at once.
pub const STABLE_AFTER: Duration = Duration::from_secs(10);
/// Pause before the restart after the second quick death in a row; doubled with every further one.
pub const RESTART_PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause: a VM's I/O may wait for this restart, and a start that fails costs little.
pub const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Pause before unfinished work of a volume is tried again; doubled up to [`WORK_PAUSE_MAX`].
pub const WORK_PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause between two tries of unfinished work.
pub const WORK_PAUSE_MAX: Duration = Duration::from_secs(60);
/// First pause before an upgrade is looked at again that waits for something; doubled up to [`UPGRADE_PAUSE_MAX`].
pub const UPGRADE_PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest such pause: a replica may be away for days.
pub const UPGRADE_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Pause before a process that refused to end is asked again.
pub const STOP_PAUSE: Duration = Duration::from_secs(10);

/// Unfinished work of a volume that carrickd itself goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkState {
    /// It is under way.
    Running {
        /// How often in a row it failed before.
        failures: u32,
    },
    /// It failed, and is to be tried again.
    Paused {
        /// How often in a row.
        failures: u32,
        /// Not before.
        until: Instant,
    },
}

/// An upgrade of the node, which carrickd goes on with step by step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpgradeWork {
    /// Whether a step is under way.
    pub running: bool,
    /// The next one not before.
    pub until: Option<Instant>,
    /// How often in a row there was only to wait.
    pub waits: u32,
    /// For what, in words.
    pub waiting_for: Option<String>,
}

/// What was observed on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The processes.
    pub processes: BTreeMap<ProcessId, Process>,
    /// Unfinished work that is under way or paused.
    pub work: BTreeMap<VolumeId, WorkState>,
    /// The upgrade that is asked for, if one is.
    pub upgrade: UpgradeWork,
    /// Volumes that a caller's operation is working on: it does what is to do.
    pub busy: BTreeSet<VolumeName>,
    /// Those of them that no target is to tend meanwhile.
    pub alone: BTreeSet<VolumeName>,
    /// Everything is to end.
    pub stopping: bool,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A control socket was found in the run directory.
    Found(ProcessId),
    /// It runs: it was started or adopted.
    Alive {
        /// Which.
        process: ProcessId,
        /// Its process id.
        pid: u32,
        /// Whether an earlier carrickd started it.
        adopted: bool,
    },
    /// It answers.
    Answering(ProcessId),
    /// It doesn't answer in time.
    Hung(ProcessId),
    /// It is about to be killed by this carrickd, so that another is started. Sent before.
    Killed(ProcessId),
    /// It was looked for, and isn't there.
    Absent(ProcessId),
    /// An operation asks it to end. Sent before the request.
    EndAsked(ProcessId),
    /// The operation knows the answer.
    EndAnswered {
        /// Which.
        process: ProcessId,
        /// Whether it ends.
        granted: bool,
    },
    /// It isn't there any more, or couldn't be started.
    Ended {
        /// Which.
        process: ProcessId,
        /// How.
        exit: Exit,
    },
    /// It refused to end.
    Refused(ProcessId),
    /// Unfinished work of a volume ended, or failed.
    Worked {
        /// Whose.
        volume: VolumeId,
        /// Whether it is finished.
        finished: bool,
    },
    /// Somebody has asked for other work on a volume: how the former failed doesn't count for it.
    Anew(VolumeId),
    /// A step of the upgrade is done, or there is something to wait for.
    Upgraded {
        /// What, in words.
        waiting_for: Option<String>,
    },
    /// Everything is to end (or no longer).
    Stopping(bool),
}

impl Event {
    /// The process that it is about.
    pub const fn process(&self) -> Option<ProcessId> {
        match self {
            Self::Found(process)
            | Self::Alive { process, .. }
            | Self::Answering(process)
            | Self::Hung(process)
            | Self::Killed(process)
            | Self::Absent(process)
            | Self::EndAsked(process)
            | Self::EndAnswered { process, .. }
            | Self::Ended { process, .. }
            | Self::Refused(process) => Some(*process),
            Self::Worked { .. } | Self::Anew(_) | Self::Upgraded { .. } | Self::Stopping(_) => None,
        }
    }
}

impl Observed {
    /// Whether this process is there and answers on its control socket.
    pub fn answers(&self, id: ProcessId) -> bool {
        self.processes.get(&id).is_some_and(Process::answers)
    }

    /// Takes an event in.
    pub fn on_event(&mut self, event: Event, now: Instant) {
        match event {
            Event::Found(id) => {
                self.processes.entry(id).or_insert(Process::new(ProcessState::Unseen));
            }
            Event::Alive { process, pid, adopted } => {
                let entry = self.process(process);
                entry.adopted = adopted;
                entry.killed = false;
                entry.state = ProcessState::Alive { pid, since: now, answers: Answers::NotYet, ask_not_before: None };
                if entry.request == EndRequest::Granted {
                    entry.request = EndRequest::None;
                }
            }
            Event::Answering(id) => {
                self.set_answers(id, Answers::Yes);
                self.process(id).silent_since = None;
                self.on_answering(id, now);
            }
            Event::Hung(id) => {
                self.set_answers(id, Answers::Hung);
                self.process(id).silent_since.get_or_insert(now);
            }
            Event::Killed(id) => self.process(id).killed = true,
            Event::Absent(id) => self.process(id).state = ProcessState::Down { not_before: now },
            Event::EndAsked(id) => self.process(id).request = EndRequest::Asked,
            Event::EndAnswered { process, granted } => {
                let entry = self.process(process);
                let down = matches!(entry.state, ProcessState::Down { .. });
                entry.request = if granted && !down { EndRequest::Granted } else { EndRequest::None };
                if granted && down {
                    // Its end was noticed before its answer.
                    entry.last_exit = Some(Exit::Asked);
                    entry.quick_deaths = 0;
                }
            }
            Event::Ended { process, exit } => self.on_ended(process, exit, now),
            Event::Refused(id) => {
                let entry = self.process(id);
                if let ProcessState::Stopping { pid } = entry.state {
                    let ask_not_before = Some(now + STOP_PAUSE);
                    entry.state = ProcessState::Alive { pid, since: now, answers: Answers::Yes, ask_not_before };
                }
            }
            Event::Worked { volume, finished: true } => {
                self.work.remove(&volume);
            }
            Event::Anew(volume) => {
                if let Some(WorkState::Paused { .. }) = self.work.get(&volume) {
                    self.work.remove(&volume);
                }
            }
            Event::Worked { volume, finished: false } => {
                let failures = match self.work.get(&volume) {
                    Some(WorkState::Running { failures } | WorkState::Paused { failures, .. }) => failures.saturating_add(1),
                    None => 1,
                };
                let until = now + doubled(WORK_PAUSE_MIN, failures - 1, WORK_PAUSE_MAX);
                self.work.insert(volume, WorkState::Paused { failures, until });
            }
            Event::Upgraded { waiting_for: None } => self.upgrade = UpgradeWork::default(),
            Event::Upgraded { waiting_for } => {
                let waits = self.upgrade.waits.saturating_add(1);
                let until = Some(now + doubled(UPGRADE_PAUSE_MIN, waits - 1, UPGRADE_PAUSE_MAX));
                self.upgrade = UpgradeWork { running: false, until, waits, waiting_for };
            }
            Event::Stopping(stopping) => self.stopping = stopping,
        }
    }

    /// A process is being looked for or started.
    pub fn on_launch(&mut self, id: ProcessId) {
        let entry = self.process(id);
        if entry.last_exit.is_some() {
            entry.restarts = entry.restarts.saturating_add(1);
        }
        entry.state = ProcessState::Launching;
    }

    /// A process is being asked to end.
    pub fn on_stop(&mut self, id: ProcessId) {
        let entry = self.process(id);
        if let ProcessState::Alive { pid, .. } = entry.state {
            entry.state = ProcessState::Stopping { pid };
        }
    }

    /// Unfinished work of a volume begins.
    pub fn on_work(&mut self, volume: VolumeId) {
        let failures = match self.work.get(&volume) {
            Some(WorkState::Running { failures } | WorkState::Paused { failures, .. }) => *failures,
            None => 0,
        };
        self.work.insert(volume, WorkState::Running { failures });
    }

    /// The log is told of a process's health.
    pub fn on_told(&mut self, id: ProcessId, health: Health) {
        self.process(id).told = health;
    }

    /// A step of the upgrade is under way.
    pub fn on_upgrade(&mut self) {
        self.upgrade.running = true;
    }

    /// Work that failed may have waited for this process: it needn't wait any longer.
    fn on_answering(&mut self, id: ProcessId, now: Instant) {
        self.upgrade.until = self.upgrade.until.map(|until| now.min(until));
        for (volume, work) in &mut self.work {
            let may_concern = matches!(id, ProcessId::Replica(_)) || id == ProcessId::Target(*volume);
            if let WorkState::Paused { until, .. } = work
                && may_concern
            {
                *until = now.min(*until);
            }
        }
    }

    fn on_ended(&mut self, id: ProcessId, exit: Exit, now: Instant) {
        let entry = self.process(id);
        let asked = entry.request == EndRequest::Granted || matches!(entry.state, ProcessState::Stopping { .. });
        let stable = matches!(entry.state, ProcessState::Alive { since, .. } if now.duration_since(since) >= STABLE_AFTER);
        let was_quick = !(stable || asked || entry.killed);
        entry.quick_deaths = if was_quick { entry.quick_deaths.saturating_add(1) } else { 0 };
        entry.flaps = if was_quick { entry.flaps.saturating_add(entry.answers().into()) } else { 0 };
        let pause = match entry.quick_deaths {
            0 | 1 => Duration::ZERO,
            deaths => doubled(RESTART_PAUSE_MIN, deaths - 2, RESTART_PAUSE_MAX),
        };
        entry.state = ProcessState::Down { not_before: now + pause };
        entry.last_exit = Some(if asked { Exit::Asked } else { exit });
        entry.killed = false;
        if asked {
            entry.request = EndRequest::None;
        } else {
            entry.silent_since.get_or_insert(now);
        }
    }

    fn set_answers(&mut self, id: ProcessId, new: Answers) {
        if let ProcessState::Alive { answers, .. } = &mut self.process(id).state {
            *answers = new;
        }
    }

    fn process(&mut self, id: ProcessId) -> &mut Process {
        self.processes.entry(id).or_insert(Process::new(ProcessState::Unseen))
    }
}

/// `first` · 2^`doublings`, at most `limit`.
fn doubled(first: Duration, doublings: u32, limit: Duration) -> Duration {
    first.saturating_mul(2_u32.saturating_pow(doublings)).min(limit)
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::StoreId;

    use super::*;

    const PROCESS: ProcessId = ProcessId::Target(VolumeId::from_bytes([7; 16]));

    fn died() -> Event {
        Event::Ended { process: PROCESS, exit: Exit::Died("killed".into()) }
    }

    fn pause(observed: &Observed, now: Instant) -> Duration {
        match observed.processes[&PROCESS].state {
            ProcessState::Down { not_before } => not_before.saturating_duration_since(now),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_restart_is_at_once_and_the_pauses_double_up_to_a_limit_until_it_lives() {
        let mut now = Instant::now();
        let mut observed = Observed::default();
        let mut pauses = Vec::new();
        for _ in 0..10 {
            observed.on_launch(PROCESS);
            observed.on_event(Event::Alive { process: PROCESS, pid: 1, adopted: false }, now);
            now += Duration::from_secs(1);
            observed.on_event(died(), now);
            pauses.push(pause(&observed, now).as_millis());
        }
        assert_eq!(pauses, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(observed.processes[&PROCESS].restarts, 9);
        observed.on_event(Event::Alive { process: PROCESS, pid: 1, adopted: false }, now);
        now += STABLE_AFTER;
        observed.on_event(died(), now);
        assert_eq!(pause(&observed, now), Duration::ZERO);
    }

    #[test]
    fn an_end_that_was_announced_or_asked_for_is_no_failure() {
        let now = Instant::now();
        let mut observed = Observed::default();
        observed.on_event(Event::Alive { process: PROCESS, pid: 1, adopted: false }, now);
        observed.on_event(Event::EndAsked(PROCESS), now);
        observed.on_event(Event::EndAnswered { process: PROCESS, granted: true }, now);
        observed.on_event(died(), now);
        assert_eq!(observed.processes[&PROCESS].last_exit, Some(Exit::Asked));
        // The announcement counts for that life only.
        observed.on_event(Event::Alive { process: PROCESS, pid: 2, adopted: false }, now);
        observed.on_event(died(), now);
        assert_eq!(observed.processes[&PROCESS].last_exit, Some(Exit::Died("killed".into())));
        observed.on_event(Event::Alive { process: PROCESS, pid: 3, adopted: false }, now);
        observed.on_stop(PROCESS);
        observed.on_event(died(), now);
        assert_eq!(observed.processes[&PROCESS].last_exit, Some(Exit::Asked));
    }

    #[test]
    fn an_end_that_is_noticed_before_the_answer_is_judged_by_the_answer() {
        let now = Instant::now();
        for granted in [true, false] {
            let mut observed = Observed::default();
            observed.on_event(Event::Alive { process: PROCESS, pid: 1, adopted: false }, now);
            observed.on_event(Event::EndAsked(PROCESS), now);
            observed.on_event(died(), now);
            assert_eq!(observed.processes[&PROCESS].request, EndRequest::Asked);
            observed.on_event(Event::EndAnswered { process: PROCESS, granted }, now);
            let process = &observed.processes[&PROCESS];
            assert_eq!(process.request, EndRequest::None);
            assert_eq!(process.last_exit == Some(Exit::Asked), granted);
        }
    }

    #[test]
    fn one_that_carrickd_kills_to_start_another_is_started_at_once() {
        let now = Instant::now();
        let mut observed = Observed::default();
        for _ in 0..3 {
            observed.on_event(Event::Alive { process: PROCESS, pid: 1, adopted: false }, now);
            observed.on_event(Event::Killed(PROCESS), now);
            observed.on_event(died(), now);
            assert_eq!(pause(&observed, now), Duration::ZERO);
        }
    }

    #[test]
    fn an_upgrade_that_waits_is_looked_at_less_and_less_often() {
        let now = Instant::now();
        let mut observed = Observed::default();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            observed.on_upgrade();
            observed.on_event(Event::Upgraded { waiting_for: Some("a replica".into()) }, now);
            pauses.push(observed.upgrade.until.unwrap().duration_since(now).as_millis());
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        observed.on_event(Event::Upgraded { waiting_for: None }, now);
        assert_eq!(observed.upgrade, UpgradeWork::default());
    }

    #[test]
    fn work_that_fails_is_paused_longer_each_time() {
        let now = Instant::now();
        let volume = VolumeId::from_bytes([7; 16]);
        let mut observed = Observed::default();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            observed.on_work(volume);
            observed.on_event(Event::Worked { volume, finished: false }, now);
            match observed.work[&volume] {
                WorkState::Paused { until, .. } => pauses.push(until.duration_since(now).as_secs()),
                WorkState::Running { .. } => panic!("still running"),
            }
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        observed.on_event(Event::Worked { volume, finished: true }, now);
        assert!(observed.work.is_empty());
    }

    #[test]
    fn paused_work_goes_on_when_what_it_may_wait_for_answers_or_when_other_work_is_asked_for() {
        let now = Instant::now();
        let (volume, another) = (VolumeId::from_bytes([7; 16]), VolumeId::from_bytes([8; 16]));
        let mut paused = Observed::default();
        for _ in 0..5 {
            paused.on_work(volume);
            paused.on_event(Event::Worked { volume, finished: false }, now);
        }
        let later = now + Duration::from_secs(1);
        let until_after = |event: Event| {
            let mut observed = paused.clone();
            observed.on_event(event, later);
            match observed.work.get(&volume) {
                Some(WorkState::Paused { failures, until }) => Some((*failures, until.duration_since(now).as_secs())),
                _ => None,
            }
        };
        assert_eq!(until_after(Event::Answering(ProcessId::Target(another))), Some((5, 16)));
        assert_eq!(until_after(Event::Answering(ProcessId::Target(volume))), Some((5, 1)));
        assert_eq!(until_after(Event::Answering(ProcessId::Replica(StoreId::from_bytes([1; 16])))), Some((5, 1)));
        assert_eq!(until_after(Event::Anew(another)), Some((5, 16)));
        assert_eq!(until_after(Event::Anew(volume)), None);
    }
}
