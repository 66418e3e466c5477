//! The log of what happened: what an event is, which ones are folded into one, and which are forgotten. No clock, no I/O.
//!
//! Events have numbers that only grow, so a reader goes on from the last one it saw. What happens again by itself, as when a process
//! flaps, is taken out and put at the end again with a new number, counted: readers see it, and the log does not grow.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use carrick_backing_store::{StoreId, VolumeId};
use carrick_ctl::name::VolumeName;
use serde::{Deserialize, Serialize};

/// Events of one volume or store. Enough for years of a quiet one, and to see how a troubled one came into trouble.
pub const SUBJECT_MAX: usize = 256;
/// Events of all volumes and stores that are gone, together: whoever asks after one does so soon.
pub const GONE_MAX: usize = 1024;
/// Events altogether: some MiB in memory and in the file, however many volumes there are.
pub const ALL_MAX: usize = 16_384;
/// Bytes of an event's words: a process may say anything before it ends.
pub const TEXT_MAX: usize = 1024;
/// The same that happens again within so many seconds is one event: processes are started again after at most five.
pub const FOLD_WITHIN: u64 = 600;

/// Number of an event: each of the node gets the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventNumber(u64);

impl EventNumber {
    /// A number from elsewhere.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// As on the wire.
    pub const fn get(self) -> u64 {
        self.0
    }

    const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl std::fmt::Display for EventNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $folds:literal;)*) => {
        /// What happened.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum EventKind {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
        }

        impl EventKind {
            /// All of them.
            #[cfg(test)]
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word on the wire and in the records.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// Whether it may happen again and again by itself.
            const fn folds(self) -> bool {
                match self {
                    $(Self::$name => $folds,)*
                }
            }
        }
    };
}

kinds! {
    /// A volume is ready.
    VolumeCreated = "VOLUME_CREATED", false;
    /// Its replicas couldn't be made.
    CreationUndone = "CREATION_UNDONE", true;
    /// Its deletion was asked for.
    VolumeDeleting = "VOLUME_DELETING", false;
    /// Its last replica is deleted.
    VolumeDeleted = "VOLUME_DELETED", false;
    /// Its device was handed out.
    Attached = "ATTACHED", false;
    /// The device didn't come up.
    AttachFailed = "ATTACH_FAILED", true;
    /// Its detachment was asked for.
    Detaching = "DETACHING", false;
    /// The device stays.
    DetachFailed = "DETACH_FAILED", true;
    /// The device is gone.
    Detached = "DETACHED", false;
    /// What it may take.
    LimitsSet = "LIMITS_SET", false;
    /// Its replicas were compared.
    VolumeVerified = "VOLUME_VERIFIED", false;
    /// It has another size.
    VolumeExpanded = "VOLUME_EXPANDED", false;
    /// A replica no longer counts.
    ReplicaLeftOut = "REPLICA_LEFT_OUT", true;
    /// A replica gets what it lacks.
    ReplicaRebuilding = "REPLICA_REBUILDING", true;
    /// A replica counts.
    ReplicaCounts = "REPLICA_COUNTS", true;
    /// A replica is to be in another store.
    ReplicaReplaced = "REPLICA_REPLACED", false;
    /// A replica is to go once all others count.
    ReplicaRetiring = "REPLICA_RETIRING", false;
    /// There is to be one more.
    ReplicaAdded = "REPLICA_ADDED", false;
    /// One that was replaced is deleted.
    ReplicaDeleted = "REPLICA_DELETED", false;
    /// One replica's content was made the volume's.
    VolumeSalvaged = "VOLUME_SALVAGED", false;
    /// An operation begins.
    OperationStarted = "OPERATION_STARTED", false;
    /// It is to do more.
    OperationExtended = "OPERATION_EXTENDED", false;
    /// It can't go on yet.
    OperationWaits = "OPERATION_WAITS", true;
    /// It is done.
    OperationSucceeded = "OPERATION_SUCCEEDED", false;
    /// It can't be done.
    OperationFailed = "OPERATION_FAILED", false;
    /// Somebody ended it.
    OperationCancelled = "OPERATION_CANCELLED", false;
    /// A store's or a volume's process was started.
    ProcessStarted = "PROCESS_STARTED", true;
    /// It was killed, or ended without a word.
    ProcessCrashed = "PROCESS_CRASHED", true;
    /// It ended, or couldn't be started, saying why.
    ProcessFailed = "PROCESS_FAILED", true;
    /// It runs, and doesn't answer.
    ProcessSilent = "PROCESS_SILENT", true;
    /// It answers again.
    ProcessRecovered = "PROCESS_RECOVERED", true;
    /// Carrickd ended it, to start another.
    ProcessReplaced = "PROCESS_REPLACED", true;
    /// It ended as it was asked to.
    ProcessStopped = "PROCESS_STOPPED", true;
    /// A store is used.
    StoreAdded = "STORE_ADDED", false;
    /// It is no longer.
    StoreRemoved = "STORE_REMOVED", false;
    /// It takes new replicas again.
    StoreEnabled = "STORE_ENABLED", false;
    /// It takes none.
    StoreDisabled = "STORE_DISABLED", false;
    /// It takes none, and those that are there go elsewhere.
    StoreEvicting = "STORE_EVICTING", false;
    /// It has been away for a while, or flaps.
    StoreDegraded = "STORE_DEGRADED", true;
    /// It has been away for long.
    StoreFailed = "STORE_FAILED", true;
    /// It is as it should be, after that.
    StoreReady = "STORE_READY", true;
    /// A carrickd serves.
    DaemonStarted = "CARRICKD_STARTED", false;
    /// What may come to the node.
    NodeChanged = "NODE_CHANGED", false;
    /// An upgrade of the node's processes was asked for.
    UpgradeStarted = "UPGRADE_STARTED", false;
    /// It is done.
    UpgradeFinished = "UPGRADE_FINISHED", false;
}

/// A store, as it was when something happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Which.
    pub id: StoreId,
    /// Its folder, or its id if it was gone.
    pub path: String,
}

/// What something happened to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A volume.
    Volume {
        /// Which.
        id: VolumeId,
        /// What it was called.
        name: VolumeName,
    },
    /// A store.
    Store(Place),
    /// The node itself.
    Node,
}

/// The same, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SubjectId {
    /// A volume.
    Volume(VolumeId),
    /// A store.
    Store(StoreId),
    /// The node itself.
    Node,
}

impl Subject {
    /// Which it is.
    pub const fn id(&self) -> SubjectId {
        match self {
            Self::Volume { id, .. } => SubjectId::Volume(*id),
            Self::Store(place) => SubjectId::Store(place.id),
            Self::Node => SubjectId::Node,
        }
    }
}

/// Something that happened, before it is in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEvent {
    /// When, in seconds since 1970.
    pub at_unix: u64,
    /// What.
    pub kind: EventKind,
    /// To whom.
    pub subject: Subject,
    /// If it is about one of a volume's replicas: the store with that.
    pub replica: Option<Place>,
    /// In words.
    pub text: String,
}

/// Something that happened, as it is written. Fields that this version doesn't know are no reason to refuse it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Which.
    pub number: EventNumber,
    /// What.
    pub kind: EventKind,
    /// To whom.
    pub subject: Subject,
    /// If it is about one of a volume's replicas: the store with that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<Place>,
    /// In words.
    pub text: String,
    /// When first, in seconds since 1970.
    pub first_unix: u64,
    /// When last.
    pub last_unix: u64,
    /// How often.
    pub times: u32,
}

impl EventRecord {
    /// The store that it is about, if it is about one.
    pub fn place(&self) -> Option<&Place> {
        match &self.subject {
            Subject::Store(place) => Some(place),
            Subject::Volume { .. } | Subject::Node => self.replica.as_ref(),
        }
    }

    fn is_same(&self, event: &NewEvent) -> bool {
        self.kind == event.kind && self.replica == event.replica && self.text == event.text
    }
}

/// What is to be written so that the file is as the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogChanges {
    /// What is new.
    pub put: BTreeMap<EventNumber, Arc<EventRecord>>,
    /// What was there, and is no longer.
    pub removed: Vec<EventNumber>,
}

impl LogChanges {
    fn remove(&mut self, number: EventNumber) {
        if self.put.remove(&number).is_none() {
            self.removed.push(number);
        }
    }
}

/// The log. A clone shares what is not changed later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventLog {
    newest: EventNumber,
    /// Of each subject, the oldest first.
    events: BTreeMap<SubjectId, Arc<VecDeque<Arc<EventRecord>>>>,
}

impl EventLog {
    /// As it was written. Numbers up to `newest` were given out, whatever became of them.
    pub fn load(newest: EventNumber, mut records: Vec<EventRecord>) -> Self {
        records.sort_unstable_by_key(|record| record.number);
        let mut log = Self { newest, ..Self::default() };
        for record in records {
            log.newest = log.newest.max(record.number);
            Arc::make_mut(log.events.entry(record.subject.id()).or_default()).push_back(Arc::new(record));
        }
        log
    }

    /// The number given out last.
    pub const fn newest(&self) -> EventNumber {
        self.newest
    }

    /// The first ones with a greater number, the oldest first, of those that are `wanted`.
    pub fn after(&self, since: EventNumber, limit: usize, wanted: impl Fn(&EventRecord) -> bool) -> Vec<Arc<EventRecord>> {
        let newer = |events: &VecDeque<Arc<EventRecord>>| events.partition_point(|event| event.number <= since);
        let all = self.events.values().flat_map(|events| events.range(newer(events)..));
        let mut found: Vec<_> = all.filter(|event| wanted(event)).cloned().collect();
        found.sort_unstable_by_key(|event| event.number);
        found.truncate(limit);
        found
    }

    /// Of one subject, the newest that is `wanted`.
    pub fn last_of(&self, subject: SubjectId, wanted: impl Fn(&EventRecord) -> bool) -> Option<&EventRecord> {
        self.events.get(&subject)?.iter().rev().map(Arc::as_ref).find(|event| wanted(event))
    }

    /// Takes in what happened, in this order, and forgets what is too much then. `is_there`: whether the subject still is.
    pub fn add(&mut self, events: Vec<NewEvent>, is_there: impl Fn(SubjectId) -> bool) -> LogChanges {
        let mut changes = LogChanges::default();
        for event in events {
            let subject = event.subject.id();
            self.add_one(event, &mut changes);
            self.forget(SUBJECT_MAX, |id| id == subject, &mut changes);
        }
        self.forget(GONE_MAX, |id| !is_there(id), &mut changes);
        self.forget(ALL_MAX, |_| true, &mut changes);
        changes
    }

    fn add_one(&mut self, mut event: NewEvent, changes: &mut LogChanges) {
        event.text.truncate(event.text.floor_char_boundary(TEXT_MAX));
        let events = Arc::make_mut(self.events.entry(event.subject.id()).or_default());
        let before = same_before(events, &event).and_then(|place| events.remove(place));
        if let Some(before) = &before {
            changes.remove(before.number);
        }
        self.newest = self.newest.next();
        let NewEvent { at_unix, kind, subject, replica, text } = event;
        let first_unix = before.as_ref().map_or(at_unix, |before| before.first_unix);
        let times = before.map_or(0, |before| before.times).saturating_add(1);
        let record = EventRecord { number: self.newest, kind, subject, replica, text, first_unix, last_unix: at_unix, times };
        let record = Arc::new(record);
        changes.put.insert(record.number, Arc::clone(&record));
        events.push_back(record);
    }

    /// Forgets the oldest, as long as there are more than `max` of those that count.
    fn forget(&mut self, max: usize, counts: impl Fn(SubjectId) -> bool, changes: &mut LogChanges) {
        let mut count: usize = self.events.iter().filter(|(id, _)| counts(**id)).map(|(_, events)| events.len()).sum();
        while count > max {
            let oldest =
                self.events.iter().filter(|(id, _)| counts(**id)).min_by_key(|(_, events)| events.front().map(|event| event.number));
            let Some((id, events)) = oldest.map(|(id, _)| *id).and_then(|id| Some((id, self.events.get_mut(&id)?))) else { return };
            if let Some(event) = Arc::make_mut(events).pop_front() {
                changes.remove(event.number);
                count -= 1;
            }
            if events.is_empty() {
                self.events.remove(&id);
            }
        }
    }
}

/// Where the same event is, if it is to be folded: not long ago, and nothing that was asked for has happened since.
fn same_before(events: &VecDeque<Arc<EventRecord>>, event: &NewEvent) -> Option<usize> {
    let recent = |known: &EventRecord| known.kind.folds() && event.at_unix.saturating_sub(known.last_unix) <= FOLD_WITHIN;
    let mut latest = events.iter().enumerate().rev().take_while(|(_, known)| event.kind.folds() && recent(known));
    latest.find(|(_, known)| known.is_same(event)).map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn event(volume: u8, kind: EventKind, at_unix: u64) -> NewEvent {
        let subject = Subject::Volume { id: VolumeId::from_bytes([volume; 16]), name: format!("vm{volume}").parse().unwrap() };
        NewEvent { at_unix, kind, subject, replica: None, text: kind.as_str().to_lowercase() }
    }

    fn seen(log: &EventLog) -> Vec<(u64, EventKind, u32)> {
        log.after(EventNumber::default(), usize::MAX, |_| true).iter().map(|event| (event.number.get(), event.kind, event.times)).collect()
    }

    /// What a file has in it after these changes.
    fn write(file: &mut BTreeMap<EventNumber, EventRecord>, changes: LogChanges) {
        for number in changes.removed {
            assert!(file.remove(&number).is_some(), "{number} was never written");
        }
        file.extend(changes.put.into_iter().map(|(number, record)| (number, EventRecord::clone(&record))));
    }

    use EventKind::{Attached, Detached, ProcessCrashed, ProcessRecovered, VolumeDeleted};

    #[test]
    fn a_process_that_flaps_is_counted_and_every_count_has_a_new_number() {
        let mut log = EventLog::default();
        log.add(vec![event(1, Attached, 100)], |_| true);
        for round in 0..1000 {
            log.add(vec![event(1, ProcessCrashed, 100 + 5 * round), event(1, ProcessRecovered, 101 + 5 * round)], |_| true);
        }
        assert_eq!(seen(&log), [(1, Attached, 1), (2000, ProcessCrashed, 1000), (2001, ProcessRecovered, 1000)]);
        let crashed = log.last_of(SubjectId::Volume(VolumeId::from_bytes([1; 16])), |event| event.kind == ProcessCrashed).unwrap();
        assert_eq!((crashed.first_unix, crashed.last_unix), (100, 100 + 5 * 999));
    }

    #[test]
    fn what_was_asked_for_long_ago_other_words_and_other_volumes_are_events_of_their_own() {
        let mut log = EventLog::default();
        let mut add = |event| drop(log.add(vec![event], |_| true));
        add(event(1, Attached, 100));
        add(event(1, ProcessCrashed, 100));
        add(event(2, ProcessCrashed, 100));
        add(event(1, Attached, 101));
        add(event(1, ProcessCrashed, 102));
        add(NewEvent { text: "otherwise".into(), ..event(1, ProcessCrashed, 103) });
        add(event(1, ProcessCrashed, 102 + FOLD_WITHIN + 1));
        // A clock that was set back is no reason not to fold.
        add(event(1, ProcessCrashed, 50));
        let times: Vec<_> = seen(&log).into_iter().map(|(_, kind, times)| (kind, times)).collect();
        let crashed = |times| (ProcessCrashed, times);
        assert_eq!(times, [(Attached, 1), crashed(1), crashed(1), (Attached, 1), crashed(1), crashed(1), crashed(2)]);
    }

    #[test]
    fn the_oldest_are_forgotten_of_each_of_those_that_are_gone_and_of_all() {
        let mut log = EventLog::default();
        let mut file = BTreeMap::new();
        let there = |id: SubjectId| id >= SubjectId::Volume(VolumeId::from_bytes([100; 16]));
        for at in 0..1000 {
            let kind = if at % 2 == 0 { Attached } else { Detached };
            write(&mut file, log.add(vec![event(200, kind, at)], there));
        }
        assert_eq!(file.len(), SUBJECT_MAX);
        assert_eq!(seen(&log).last(), Some(&(1000, Detached, 1)));
        for volume in 0..20 {
            for at in 0..100 {
                write(&mut file, log.add(vec![event(volume, VolumeDeleted, at)], there));
            }
        }
        assert_eq!(file.len(), SUBJECT_MAX + GONE_MAX, "those that are there lose nothing by those that are gone");
        for volume in 100..=u8::MAX {
            for at in 0..SUBJECT_MAX as u64 {
                write(&mut file, log.add(vec![event(volume, Attached, at), event(volume, Detached, at)], there));
            }
        }
        assert_eq!(file.len(), ALL_MAX);
        assert_eq!(EventLog::load(EventNumber::default(), file.into_values().collect()), log, "the file is as the log");
    }

    #[test]
    fn words_have_an_end() {
        let mut log = EventLog::default();
        log.add(vec![NewEvent { text: "ü".repeat(TEXT_MAX), ..event(1, ProcessCrashed, 1) }], |_| true);
        assert_eq!(log.after(EventNumber::default(), 1, |_| true)[0].text, "ü".repeat(TEXT_MAX / 2));
        log.add(vec![NewEvent { text: "a".repeat(7) + &"ü".repeat(TEXT_MAX), ..event(1, ProcessCrashed, 1) }], |_| true);
        assert_eq!(log.after(EventNumber::new(1), 1, |_| true)[0].text.len(), TEXT_MAX - 1);
    }

    #[test]
    fn a_reader_goes_on_from_its_number_in_parts() {
        let mut log = EventLog::default();
        for at in 0..10 {
            let kind = if at % 2 == 0 { Attached } else { Detached };
            log.add(vec![event(1 + (at % 3) as u8, kind, at)], |_| true);
        }
        let mut read = Vec::new();
        while let Some(last) = {
            let since = read.last().copied().map_or(EventNumber::new(4), EventNumber::new);
            let part = log.after(since, 2, |event| event.kind == Attached);
            read.extend(part.iter().map(|event| event.number.get()));
            part.last().cloned()
        } {
            assert!(last.number <= log.newest());
        }
        assert_eq!(read, [5, 7, 9]);
    }

    #[test]
    fn every_kind_is_documented() {
        let readme = include_str!("../../../../README.md");
        for kind in EventKind::ALL {
            assert!(readme.contains(&format!("`{}`", kind.as_str())), "README.md lacks {}", kind.as_str());
        }
    }
}
