//! What the primary knows of one replica.

use std::time::Duration;

use carrick_backing_store::{Epoch, LoggedExtents, Seq, VolumeSize};

use super::copy::Copy;
use crate::control::MemberState;
use crate::time::Monotonic;
use crate::wire::StatusAnswer;

/// First wait before a connection is tried again: a replica that was restarted at once is back within it.
const RETRY_FIRST: Duration = Duration::from_millis(20);
/// Longest wait: a dead replica costs one wakeup in this time.
const RETRY_LAST: Duration = Duration::from_secs(5);

/// How far the conversation with a replica has come. Each step waits for the answer that leads to the next.
#[derive(Debug)]
pub(super) enum Stage {
    /// No connection; one is tried again at this time.
    Down { retry_at: Monotonic },
    /// A connection was asked for.
    Connecting,
    /// Hello is sent.
    Greeting,
    /// Status is asked for.
    Inquiring,
    /// Its status is known; there is no term yet to ask a promise for.
    Known(StatusAnswer),
    /// It had promised a term that is given up; the next one is being written into the record.
    Idle,
    /// The promise is asked for.
    Promising,
    /// It has promised, and waits to be reconciled, copied or resumed.
    Promised(StatusAnswer),
    /// Before serving: its log is asked for, `None` until it has answered.
    Comparing { status: StatusAnswer, logged: Option<LoggedExtents> },
    /// Before serving: a copy into it begins, or goes on.
    Reconciling { begun: bool },
    /// Before serving: it has the chosen content.
    Reconciled,
    /// Before serving: it was told to adopt the term.
    Adopting,
    /// While serving: a copy into it begins; live writes after the base go to it once it has answered.
    CopyBeginning,
    /// While serving: it takes live writes and gets a copy of the rest.
    Copying,
    /// While serving: the copy is complete, and it was told to adopt the term.
    CopyAdopting,
    /// It takes live writes, and has all that it was sent before.
    Joined,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) stage: Stage,
    /// Whether it counts towards majorities: it was reconciled or copied under this term, and not left behind since.
    pub(super) in_sync: bool,
    /// Since when an in-sync member is not joined.
    pub(super) left_at: Option<Monotonic>,
    /// The writes of this term that it has received.
    pub(super) received: Seq,
    /// Those on stable media.
    pub(super) durable: Seq,
    /// The last epoch before which it has everything, durably, once it is in sync.
    pub(super) epoch: Epoch,
    /// The same, once it has answered what it was told.
    pub(super) epoch_told: Epoch,
    /// What it was last told that it may remember as synced.
    pub(super) synced_told: Epoch,
    /// The last write sent on this connection.
    pub(super) sent: Seq,
    /// The writes that a flush or FUA sent on this connection covers.
    pub(super) flush_sent: Seq,
    /// Reads that it owes.
    pub(super) reads: usize,
    /// How long its answers to reads took lately; zero: not known.
    pub(super) read_time: Duration,
    /// Other answers that it owes, acknowledgements aside.
    pub(super) answers: usize,
    /// When something was last heard from it, or when it came to owe something.
    pub(super) quiet_since: Monotonic,
    /// When it was last asked something that it has answered: it had promised no later term then.
    pub(super) confirmed: Option<Monotonic>,
    /// Whether a ping is among the answers it owes.
    pub(super) pinged: bool,
    pub(super) copy: Option<Copy>,
    /// Before serving: a block of it could not be read.
    pub(super) damaged: bool,
    /// How large its replica is, if it has said so on this connection.
    pub(super) size: Option<VolumeSize>,
    pub(super) last_error: Option<String>,
    backoff: Duration,
    /// Whether it said no, rather than nothing.
    refused: bool,
}

impl Member {
    pub(super) fn new(now: Monotonic) -> Self {
        Self {
            stage: Stage::Down { retry_at: now },
            in_sync: false,
            left_at: None,
            received: Seq::ZERO,
            durable: Seq::ZERO,
            epoch: Epoch::NEVER,
            epoch_told: Epoch::NEVER,
            synced_told: Epoch::NEVER,
            sent: Seq::ZERO,
            flush_sent: Seq::ZERO,
            reads: 0,
            read_time: Duration::ZERO,
            answers: 0,
            quiet_since: now,
            confirmed: None,
            pinged: false,
            copy: None,
            damaged: false,
            size: None,
            last_error: None,
            backoff: RETRY_FIRST,
            refused: false,
        }
    }

    /// Whether live writes are sent to it.
    pub(super) fn takes_writes(&self) -> bool {
        matches!(self.stage, Stage::Joined | Stage::Copying | Stage::CopyAdopting)
    }

    /// Whether the backlog is kept for it.
    pub(super) fn needs_backlog(&self) -> bool {
        self.in_sync || self.takes_writes() || matches!(self.stage, Stage::CopyBeginning | Stage::Adopting)
    }

    pub(super) fn is_joined(&self) -> bool {
        matches!(self.stage, Stage::Joined)
    }

    pub(super) fn is_down(&self) -> bool {
        matches!(self.stage, Stage::Down { .. })
    }

    /// Whether it has said how it stands. A stopped process takes connections, and says nothing.
    pub(super) fn has_answered(&self) -> bool {
        !matches!(self.stage, Stage::Down { .. } | Stage::Connecting | Stage::Greeting | Stage::Inquiring)
    }

    /// Whether it owes an answer of any kind.
    pub(super) fn owes(&self) -> bool {
        self.answers > 0
            || self.reads > 0
            || matches!(self.stage, Stage::Connecting)
            || self.takes_writes() && (self.received < self.sent || self.durable < self.flush_sent)
    }

    /// Whether it has a term to answer a ping under, and is not asked already.
    pub(super) fn may_be_pinged(&self) -> bool {
        !self.pinged
            && !matches!(
                self.stage,
                Stage::Down { .. }
                    | Stage::Connecting
                    | Stage::Greeting
                    | Stage::Inquiring
                    | Stage::Known(_)
                    | Stage::Idle
                    | Stage::Promising
            )
    }

    /// The status it gave with its promise, while nothing was made of it.
    pub(super) fn promised(&self) -> Option<&StatusAnswer> {
        if let Stage::Promised(status) = &self.stage { Some(status) } else { None }
    }

    /// It is gone, or was dropped: forgets what belonged to the connection.
    pub(super) fn went_down(&mut self, now: Monotonic, reason: String, refused: bool) {
        if refused {
            self.backoff = RETRY_LAST;
        }
        self.stage = Stage::Down { retry_at: now + self.backoff };
        self.backoff = (self.backoff * 2).min(RETRY_LAST);
        self.refused = refused;
        self.last_error = Some(reason);
        self.copy = None;
        self.size = None;
        self.forget_epochs();
        (self.reads, self.read_time) = (0, Duration::ZERO);
        self.answers = 0;
        self.pinged = false;
        if self.in_sync && self.left_at.is_none() {
            self.left_at = Some(now);
        }
    }

    /// What it was told, and answered, of epochs counts no longer.
    pub(super) fn forget_epochs(&mut self) {
        (self.epoch, self.epoch_told, self.synced_told) = (Epoch::NEVER, Epoch::NEVER, Epoch::NEVER);
    }

    /// It takes part again.
    pub(super) fn joined(&mut self) {
        self.stage = Stage::Joined;
        self.in_sync = true;
        // While it was copied into, it remembered nothing of what it was told.
        self.synced_told = Epoch::NEVER;
        self.left_at = None;
        self.backoff = RETRY_FIRST;
        self.last_error = None;
    }

    pub(super) fn state(&self) -> MemberState {
        match self.stage {
            Stage::Down { .. } if self.refused => MemberState::Refused,
            Stage::Down { .. } | Stage::Connecting => MemberState::Disconnected,
            Stage::Joined => MemberState::InSync,
            Stage::CopyBeginning | Stage::Copying | Stage::CopyAdopting | Stage::Reconciling { .. } => MemberState::Copying,
            Stage::Promised(_) => MemberState::Behind,
            _ => MemberState::Joining,
        }
    }
}
