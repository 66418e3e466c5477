//! Operations: what is remembered of them, and how each outcome of a step leads to the next. No I/O here.
//!
//! | Outcome of a step | What follows |
//! |---|---|
//! | done | the next step; after the last one it has succeeded |
//! | waits | the same step again, after a pause that grows |
//! | refused | it has failed; what it had done so far harms nobody, and another attempt finds it done |
//!
//! Every step may be done twice: a crash after it, and before that is written down, does it again.
//!
//! That is so of expansions and moves. All other kinds have their steps as phases in the records of volumes and attachments, and follow
//! them (`mirror.rs`).
//!
//! Which kinds may run beside which on one volume ([`Task::may_run_beside`]): an expansion beside a move. Two expansions become one; a
//! second move is refused until the first has ended, since each changes which replicas there are. The others run as the records allow
//! (M1 to M5).

use carrick_backing_store::{StoreId, VolumeId, VolumeSize};
use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::name::VolumeName;
use serde::{Deserialize, Serialize};

use super::records::VolumeRecord;

/// Operations of each kind that have ended and are remembered: whoever attaches often must not make an expansion forgotten.
pub const ENDED_MAX: usize = 128;
/// Notes of an operation.
const NOTES_MAX: usize = 16;
/// Bytes of an idempotency key.
pub const KEY_MAX: usize = 128;

/// Number of an operation: each gets the next, whatever volume it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OperationId(u64);

impl OperationId {
    /// Of one that gets its number when it is put into the records.
    pub const NEW: Self = Self(0);

    /// The one after.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl std::str::FromStr for OperationId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl std::fmt::Display for OperationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Task {
    /// A volume becomes larger.
    Expand {
        /// Its size when that was asked for first.
        from: VolumeSize,
        /// The largest that was asked for since.
        to: VolumeSize,
        /// What is done now.
        step: ExpandStep,
    },
    /// A replica that counts goes to another store.
    Move {
        /// From this one.
        from: StoreId,
        /// To this one.
        to: StoreId,
        /// What is done now.
        step: MoveStep,
    },
    /// A volume and its replicas are made.
    Create,
    /// A volume gets its device.
    Attach,
    /// Its device is taken away.
    Detach,
    /// Its replicas are deleted.
    Delete,
    /// A replica is made where there was none, and counts in the end.
    Build {
        /// The store with the one that it takes the place of, if it does.
        instead_of: Option<StoreId>,
        /// In this one.
        to: StoreId,
        /// What is done now.
        step: BuildStep,
    },
}

/// The steps of a new replica, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BuildStep {
    /// It is made, and the target told of it.
    Make,
    /// The target copies everything to it, and takes it in.
    Copy,
}

/// The steps of a move, in their order: the new replica counts before the old one no longer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveStep {
    /// The new replica is made, and the target told of it.
    Make,
    /// The target copies everything to it, takes it in, and leaves the old one out: from here on it can't be taken back.
    Copy,
    /// The record forgets the old one, and the target is told of that.
    Drop,
}

impl Task {
    /// Whether both may run on one volume at the same time.
    pub const fn may_run_beside(&self, other: &Self) -> bool {
        !matches!((self, other), (Self::Expand { .. }, Self::Expand { .. }) | (Self::Move { .. }, Self::Move { .. }))
    }

    /// The same with its next step; `None`: there is none.
    const fn next(self) -> Option<Self> {
        match self {
            Self::Expand { from, to, step } => match step {
                ExpandStep::Replicas => Some(Self::Expand { from, to, step: ExpandStep::Record }),
                ExpandStep::Record => Some(Self::Expand { from, to, step: ExpandStep::Device }),
                ExpandStep::Device => None,
            },
            Self::Move { from, to, step } => match step {
                MoveStep::Make => Some(Self::Move { from, to, step: MoveStep::Copy }),
                MoveStep::Copy => Some(Self::Move { from, to, step: MoveStep::Drop }),
                MoveStep::Drop => None,
            },
            Self::Create | Self::Attach | Self::Detach | Self::Delete | Self::Build { .. } => None,
        }
    }

    /// Whether its steps are done one by one as an operation's. Else it follows the records.
    pub const fn has_own_steps(&self) -> bool {
        matches!(self, Self::Expand { .. } | Self::Move { .. })
    }

    /// The word for what is done now, as callers see it.
    pub const fn step_name(&self) -> &'static str {
        match self {
            Self::Expand { step: ExpandStep::Replicas, .. } => "replicas",
            Self::Expand { step: ExpandStep::Record, .. } => "record",
            Self::Expand { step: ExpandStep::Device, .. } => "device",
            Self::Move { step: MoveStep::Make, .. } => "make",
            Self::Move { step: MoveStep::Copy, .. } => "copy",
            Self::Move { step: MoveStep::Drop, .. } => "drop",
            Self::Create | Self::Delete => "replicas",
            Self::Attach | Self::Detach => "device",
            Self::Build { step: BuildStep::Make, .. } => "make",
            Self::Build { step: BuildStep::Copy, .. } => "copy",
        }
    }
}

/// The steps of an expansion, in their order: nothing beyond the old end is written before every replica has room for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExpandStep {
    /// The replicas that answer are made larger.
    Replicas,
    /// The volume's record says so: from here on it can't be taken back.
    Record,
    /// The device of an attached volume follows.
    Device,
}

/// How far an operation is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OperationState {
    /// Its next step is to be done.
    Running,
    /// All is done.
    Succeeded,
    /// A step was refused.
    Failed(Why),
    /// Somebody has ended it.
    Cancelled,
}

/// A reason that survives: as in [`Fault`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Why {
    /// As on the wire.
    pub reason: String,
    /// In words.
    pub message: String,
}

impl From<&Fault> for Why {
    fn from(fault: &Fault) -> Self {
        Self { reason: fault.reason.as_str().to_owned(), message: fault.message.clone() }
    }
}

/// What a running operation waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wait {
    /// Why.
    pub why: Why,
    /// Since when, in seconds since 1970.
    pub since_unix: u64,
    /// How often the step was tried in vain.
    pub attempts: u32,
}

/// An operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperationRecord {
    /// Which.
    pub id: OperationId,
    /// Of which volume.
    pub volume: VolumeId,
    /// What that was called.
    pub name: VolumeName,
    /// What is to be done.
    pub task: Task,
    /// How far it is.
    pub state: OperationState,
    /// Why its present step isn't done yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<Wait>,
    /// The caller's name for the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// What is worth knowing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// When it was asked for, in seconds since 1970.
    pub created_unix: u64,
    /// When it changed last.
    pub updated_unix: u64,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; what is worth knowing of that.
    Done(Vec<String>),
    /// It can't be done yet.
    Waits(Fault),
    /// It can't be done.
    Refused(Fault),
}

impl OperationRecord {
    /// An expansion that begins.
    pub fn expand(volume: VolumeId, name: VolumeName, [from, to]: [VolumeSize; 2], key: Option<String>, now_unix: u64) -> Self {
        Self { key, ..Self::new(volume, name, Task::Expand { from, to, step: ExpandStep::Replicas }, now_unix) }
    }

    /// A move that begins.
    pub fn relocate(volume: VolumeId, name: VolumeName, [from, to]: [StoreId; 2], now_unix: u64) -> Self {
        Self::new(volume, name, Task::Move { from, to, step: MoveStep::Make }, now_unix)
    }

    /// One that begins.
    pub const fn new(volume: VolumeId, name: VolumeName, task: Task, now_unix: u64) -> Self {
        Self {
            id: OperationId::NEW,
            volume,
            name,
            task,
            state: OperationState::Running,
            wait: None,
            key: None,
            notes: Vec::new(),
            created_unix: now_unix,
            updated_unix: now_unix,
        }
    }

    /// Whether there is still something to be done.
    pub fn is_running(&self) -> bool {
        self.state == OperationState::Running
    }

    /// What it is after an outcome of its present step.
    pub fn after(&self, outcome: Outcome, now_unix: u64) -> Self {
        let mut next = Self { updated_unix: now_unix, wait: None, ..self.clone() };
        match outcome {
            Outcome::Done(notes) => {
                match next.task.next() {
                    Some(task) => next.task = task,
                    None => next.state = OperationState::Succeeded,
                }
                for note in notes {
                    if !next.notes.contains(&note) && next.notes.len() < NOTES_MAX {
                        next.notes.push(note);
                    }
                }
            }
            Outcome::Waits(fault) => {
                let before = self.wait.as_ref();
                let since_unix = before.map_or(now_unix, |wait| wait.since_unix);
                let attempts = before.map_or(0, |wait| wait.attempts).saturating_add(1);
                next.wait = Some(Wait { why: Why::from(&fault), since_unix, attempts });
            }
            Outcome::Refused(fault) => next.state = OperationState::Failed(Why::from(&fault)),
        }
        next
    }

    /// The same expansion, if somebody asks for a larger size meanwhile. `None`: it is as large as that already.
    pub fn folded(&self, larger: VolumeSize, now_unix: u64) -> Option<Self> {
        let Task::Expand { from, to, .. } = self.task else { return None };
        let task = Task::Expand { from, to: larger, step: ExpandStep::Replicas };
        (larger > to).then(|| Self { task, wait: None, updated_unix: now_unix, ..self.clone() })
    }

    /// The same, because its volume is being deleted.
    pub fn given_up(&self, now_unix: u64) -> Self {
        Self { state: OperationState::Cancelled, wait: None, updated_unix: now_unix, ..self.clone() }
    }

    /// The same, ended by somebody while the volume is so.
    ///
    /// # Errors
    /// Why that can't be any more.
    pub fn cancelled(&self, volume: &VolumeRecord, now_unix: u64) -> Result<Self, Fault> {
        if !self.is_running() {
            return Err(Fault::new(Reason::OperationEnded, self.id, format!("operation {} has ended already", self.id)));
        }
        let past = |message| Err(Fault::new(Reason::OperationPastCancelling, self.id, message));
        let name = &self.name;
        match self.task {
            Task::Expand { to, .. } if volume.size >= to => past(format!(
                "volume {name} has {} bytes already, and a volume never shrinks: only its device is still to follow",
                to.bytes()
            )),
            Task::Move { to, .. } if volume.config().members.contains(&to) => {
                past(format!("the new replica of volume {name} counts already: the old one is about to go"))
            }
            Task::Expand { .. } | Task::Move { .. } => Ok(self.given_up(now_unix)),
            Task::Create => past(format!("volume {name} is being made: once it is, carrick volume delete {name}")),
            Task::Attach => past(format!("volume {name} is being attached: carrick detach {name} takes that back")),
            Task::Detach => past(format!("volume {name} is being detached: once it is, carrick attach {name}")),
            Task::Delete => past(format!("volume {name} is gone already: only what its replicas take is still to be freed")),
            Task::Build { .. } => past(format!(
                "volume {name} has the new replica already, and no other in its place: carrick volume replace {name} puts it elsewhere"
            )),
        }
    }

    /// What becomes of the volume when this ends before it has succeeded; `None`: it is as it was.
    pub fn undone(&self, volume: &VolumeRecord) -> Option<VolumeRecord> {
        let Task::Move { from, to, .. } = self.task else { return None };
        let members = volume.config().members;
        if !volume.retiring.contains(&from) {
            return None;
        }
        let mut undone = volume.clone();
        undone.retiring.retain(|store| *store != from);
        if volume.replicas.contains(&to) && !members.contains(&to) {
            undone.replicas.retain(|store| *store != to);
            undone.leaving.push(to);
        }
        undone.change_replicas(members.first().copied());
        Some(undone)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::volume;
    use super::*;

    fn size(blocks: u64) -> VolumeSize {
        VolumeSize::new(blocks * 4096).unwrap()
    }

    fn begun() -> OperationRecord {
        OperationRecord::expand(VolumeId::from_bytes([7; 16]), "vm1".parse().unwrap(), [size(1), size(2)], None, 100)
    }

    fn step(record: &OperationRecord) -> ExpandStep {
        let Task::Expand { step, .. } = record.task else { panic!("{record:?}") };
        step
    }

    fn of_size(blocks: u64) -> VolumeRecord {
        VolumeRecord { size: size(blocks), ..volume(7, "vm1", &[1, 2, 3]) }
    }

    fn done() -> Outcome {
        Outcome::Done(Vec::new())
    }

    fn full() -> Fault {
        Fault::new(Reason::NoSpace, "store", "no room")
    }

    #[test]
    fn steps_follow_each_other_to_the_end() {
        let mut record = begun();
        let mut steps = Vec::new();
        while record.is_running() {
            steps.push(step(&record));
            record = record.after(done(), 101);
        }
        assert_eq!(steps, [ExpandStep::Replicas, ExpandStep::Record, ExpandStep::Device]);
        assert_eq!(record.state, OperationState::Succeeded);
    }

    #[test]
    fn a_wait_keeps_its_beginning_and_counts() {
        let waiting = begun().after(Outcome::Waits(full()), 110).after(Outcome::Waits(full()), 120);
        let wait = waiting.wait.clone().unwrap();
        assert_eq!((wait.since_unix, wait.attempts, wait.why.reason.as_str()), (110, 2, "NO_SPACE"));
        assert_eq!((step(&waiting), waiting.is_running()), (ExpandStep::Replicas, true));
        assert_eq!(waiting.after(done(), 130).wait, None);
    }

    #[test]
    fn a_refusal_ends_it_and_says_why() {
        let failed = begun().after(Outcome::Refused(full()), 110);
        assert_eq!(failed.state, OperationState::Failed(Why { reason: "NO_SPACE".into(), message: "no room".into() }));
        assert_eq!(failed.cancelled(&of_size(1), 120).unwrap_err().reason, Reason::OperationEnded);
    }

    #[test]
    fn a_larger_size_begins_anew_and_a_smaller_one_changes_nothing() {
        let at_device = begun().after(done(), 110).after(done(), 120);
        assert_eq!(at_device.folded(size(2), 130), None);
        let folded = at_device.folded(size(3), 130).unwrap();
        assert_eq!((folded.id, step(&folded)), (at_device.id, ExpandStep::Replicas));
        assert_eq!(folded.task, Task::Expand { from: size(1), to: size(3), step: ExpandStep::Replicas });
    }

    #[test]
    fn it_can_be_cancelled_until_the_record_says_the_new_size() {
        let record = begun().after(done(), 110);
        assert_eq!(record.cancelled(&of_size(1), 120).unwrap().state, OperationState::Cancelled);
        let fault = record.cancelled(&of_size(2), 120).unwrap_err();
        assert_eq!(fault.reason, Reason::OperationPastCancelling);
        assert!(fault.message.contains("8192 bytes"), "{}", fault.message);
    }

    fn store(number: u8) -> StoreId {
        StoreId::from_bytes([number; 16])
    }

    #[test]
    fn a_move_goes_on_to_its_end_and_is_taken_back_until_the_new_replica_counts() {
        let begun = OperationRecord::relocate(VolumeId::from_bytes([7; 16]), "vm1".parse().unwrap(), [store(1), store(4)], 100);
        let names: Vec<_> = [begun.clone(), begun.after(done(), 101), begun.after(done(), 101).after(done(), 102)]
            .iter()
            .map(|record| record.task.step_name())
            .collect();
        assert_eq!(names, ["make", "copy", "drop"]);
        let moving = VolumeRecord {
            replicas: [1, 2, 3, 4].map(store).to_vec(),
            joining: vec![store(4)],
            retiring: vec![store(1)],
            config: Some(volume(7, "vm1", &[1, 2, 3]).config()),
            ..volume(7, "vm1", &[])
        };
        assert_eq!(begun.cancelled(&moving, 110).unwrap().state, OperationState::Cancelled);
        let undone = begun.undone(&moving).unwrap();
        assert_eq!((undone.replicas, undone.leaving, undone.retiring), ([1, 2, 3].map(store).to_vec(), vec![store(4)], vec![]));
        assert_eq!((undone.joining, undone.config_version), (vec![store(1)], 2), "its target is to be told");
        let counts = VolumeRecord { config: Some(volume(7, "vm1", &[1, 2, 3, 4]).config()), ..moving };
        assert_eq!(begun.cancelled(&counts, 110).unwrap_err().reason, Reason::OperationPastCancelling);
        // Whatever ends it then, nothing that counts is dropped.
        assert_eq!(begun.undone(&counts).unwrap().replicas, [1, 2, 3, 4].map(store));
        assert_eq!(begun.undone(&of_size(1)), None, "somebody else has seen to it");
    }

    #[test]
    fn kinds_run_beside_each_other_as_the_table_says() {
        let expand = begun().task;
        let relocate = OperationRecord::relocate(VolumeId::from_bytes([7; 16]), "vm1".parse().unwrap(), [store(1), store(4)], 1).task;
        assert!(expand.may_run_beside(&relocate) && relocate.may_run_beside(&expand));
        assert!(!expand.may_run_beside(&expand) && !relocate.may_run_beside(&relocate));
    }
}
