//! What is known of one process.

use std::fmt;
use std::time::Instant;

use carrick_backing_store::{StoreId, VolumeId};
use carrick_replicator::control::{ControlError, ControlErrorCode};

use crate::health::Health;

/// A process that `carrickd` looks after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProcessId {
    /// The carrick-replica of a store.
    Replica(StoreId),
    /// The carrick-target of a volume.
    Target(VolumeId),
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replica(store) => write!(f, "carrick-replica of store {store}"),
            Self::Target(volume) => write!(f, "carrick-target of volume {volume}"),
        }
    }
}

/// Whether a process answers on its control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// Not yet.
    NotYet,
    /// It did.
    Yes,
    /// It should have long ago.
    Hung,
}

/// Where a process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessState {
    /// It may run: nobody looked yet.
    Unseen,
    /// It is being looked for, and started if it isn't there.
    Launching,
    /// It runs.
    Alive {
        /// Its process id.
        pid: u32,
        /// Since when, as far as is known.
        since: Instant,
        /// Whether it answers.
        answers: Answers,
        /// If it is to end: not to be asked before.
        ask_not_before: Option<Instant>,
    },
    /// It is being asked to end.
    Stopping {
        /// Its process id.
        pid: u32,
    },
    /// It isn't there.
    Down {
        /// Not to be started before.
        not_before: Instant,
    },
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As it was asked to.
    Asked,
    /// By itself, saying why.
    Failed(ControlError),
    /// Without a word: killed, or crashed.
    Died(String),
}

impl Exit {
    /// A failure that the process couldn't tell itself.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::Failed(ControlError { code: ControlErrorCode::Failed, message: message.into() })
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("ended as asked"),
            Self::Failed(error) => write!(f, "{}", error.message),
            Self::Died(how) => write!(f, "{how}"),
        }
    }
}

/// All that is known of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Where it stands.
    pub state: ProcessState,
    /// How often it was started after the first time.
    pub restarts: u32,
    /// How often in a row it didn't live for [`super::STABLE_AFTER`].
    pub quick_deaths: u32,
    /// How it ended last.
    pub last_exit: Option<Exit>,
    /// Whether it is being asked to end, by an operation.
    pub request: EndRequest,
    /// Whether an earlier carrickd started the one that runs, or ran last.
    pub adopted: bool,
    /// Whether this carrickd kills it, to start another.
    pub killed: bool,
    /// How often in a row it didn't, although it had answered.
    pub flaps: u32,
    /// Since when it doesn't answer although it should.
    pub silent_since: Option<Instant>,
    /// What the log was told of its health, which begins as ready.
    pub told: Health,
}

/// Where an operation's request to a process to end stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndRequest {
    /// There is none.
    None,
    /// It is under way. If the process ends now, only the answer tells whether that is as it should be.
    Asked,
    /// It was granted: the process ends, and its end is no accident.
    Granted,
}

impl Process {
    pub(super) fn new(state: ProcessState) -> Self {
        let (last_exit, request) = (None, EndRequest::None);
        let (restarts, quick_deaths, flaps) = (0, 0, 0);
        let (adopted, killed, silent_since, told) = (false, false, None, Health::Ready);
        Self { state, restarts, quick_deaths, last_exit, request, adopted, killed, flaps, silent_since, told }
    }

    /// Whether it answers on its control socket.
    pub fn answers(&self) -> bool {
        matches!(self.state, ProcessState::Alive { answers: Answers::Yes, .. })
    }

    /// Whether it should answer, and doesn't.
    pub fn hangs(&self) -> bool {
        matches!(self.state, ProcessState::Alive { answers: Answers::Hung, .. })
    }

    /// Whether it is there, and a signal could reach it.
    pub fn pid(&self) -> Option<u32> {
        match self.state {
            ProcessState::Alive { pid, .. } | ProcessState::Stopping { pid } => Some(pid),
            ProcessState::Unseen | ProcessState::Launching | ProcessState::Down { .. } => None,
        }
    }
}
