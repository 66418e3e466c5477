//! The primary's engine: sans-I/O. Events come in through `submit` and the `on_` calls, actions go out through
//! [`Engine::next_action`]; it has no clock, no socket and no thread, so that a simulation can drive it through thousands of
//! schedules a second.
//!
//! Invariants, each checked by the simulation:
//! * A write completes only when a majority of the members has received it, a flush only when a majority has everything that
//!   completed before on stable media (I1, I2).
//! * Reads go only to members that were sent every acknowledged write on the same ordered connection, and are answered only while no
//!   other primary can serve (I3).
//! * A member's old content is destroyed by a copy only while a majority without it has all that was acknowledged (I5).
//!
//! Which file decides what: `election` (who is primary, what content counts), `requests` (locks, merging, sequences, completion),
//! `copy` (bringing replicas back), `difference` and `epochs` (by copying what they lack), `readers` and `lease` (whom to read from, and when that
//! is an answer), `verify` (whether all hold the same), `growth` (when the volume becomes larger), `liveness` (who is lost or left behind), `session` (the conversation with a replica).

mod api;
mod backlog;
mod config;
mod copy;
mod difference;
mod election;
mod epochs;
mod growth;
mod lease;
mod liveness;
mod member;
mod pace;
mod range_lock;
mod readers;
mod requests;
mod session;
mod verify;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

pub use api::{Action, EngineConfig, MemberIndex, Predecessor, ReadBytes, Request, RequestError, RequestTag, Response};
use backlog::Backlog;
use carrick_backing_store::{BLOCK_SIZE, BufferPool, ByteLength, ByteOffset, Epoch, Extent, Seq, SharedBuffer, Term};
use config::Configs;
pub use config::{Attachment, ConfigRecord, ConfigRequest, ConfigVersion, MemberSet};
use difference::Side;
use epochs::Epochs;
use growth::Growth;
use lease::Lease;
use member::Member;
pub use pace::COPY_RATE_MIN;
use pace::Pace;
use range_lock::RangeLock;
use readers::Readers;
use requests::{Job, JobId, Ongoing, Owner, Table, Waiter};
use verify::Verification;

use crate::control::MemberState;
use crate::time::Monotonic;
use crate::wire::{Header, Kind, RequestId};

/// Most replicas of a volume: a bit each in a byte, and more copies protect from nothing more.
pub const MEMBERS_MAX: usize = 7;

/// How far the engine has come.
#[derive(Debug)]
enum Phase {
    /// It learns what the members have promised. Since when a majority has answered.
    Electing { majority_at: Option<Monotonic> },
    /// It writes its term into the record.
    Taking,
    /// It asks for promises of its term. Since when a majority has promised.
    Gathering { majority_at: Option<Monotonic> },
    /// It asks what the members wrote last.
    Comparing,
    /// It brings a majority to the same content.
    Reconciling,
    /// It is primary.
    Serving,
    /// Another is.
    Superseded,
}

/// What an answer will be about.
#[derive(Clone, Copy, Debug)]
enum Outstanding {
    /// A step of the conversation: see [`member::Stage`].
    Control,
    Ping {
        asked: Monotonic,
    },
    /// The epoch whose raising counts for what is stable; none if it doesn't.
    Epoch(Epoch),
    /// What a side has written since what the destination of a copy knows as synced.
    Changed {
        destination: MemberIndex,
        side: Side,
    },
    /// Nothing depends on it, or nothing any more.
    Ignored,
    /// A read that was asked of another member since.
    Abandoned,
    Read {
        job: JobId,
        asked: Monotonic,
    },
    CopyRead {
        destination: MemberIndex,
        chunk: Extent,
        tried: u8,
    },
    CopyWrite {
        destination: MemberIndex,
        chunk: Extent,
    },
    /// Good blocks written over damaged ones.
    Repair,
    /// What a range that is being compared holds, in one number.
    Digest,
    /// A block that others hold differently.
    DigestRead,
    /// How large it is.
    Size,
}

/// How the engine sees a member.
#[derive(Clone, Debug)]
pub struct MemberStatus {
    /// How it stands.
    pub state: MemberState,
    /// Whether it is one of those that count.
    pub counts: bool,
    /// Bytes copied so far and in all, while copying.
    pub copied: Option<(ByteLength, ByteLength)>,
    /// While copying: how long that still takes, if it goes on as it did.
    pub time_left: Option<Duration>,
    /// The last thing that went wrong with it, in words.
    pub last_error: Option<String>,
}

/// The primary of a volume, or a target on its way to become it.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    /// The size that the volume gets once all who are there are as large.
    growing: Option<Growth>,
    pool: BufferPool,
    phase: Phase,
    term: Option<Term>,
    configs: Configs,
    members: Vec<Member>,
    /// The member whose content counts, before serving.
    chosen: Option<MemberIndex>,
    /// Before serving: some member may have adopted the term.
    adopting: bool,
    epochs: Epochs,
    backlog: Backlog,
    /// A majority has received the writes up to this.
    acknowledged: Seq,
    /// A flush up to here was completed.
    flushed: Seq,
    locks: RangeLock<Owner>,
    jobs: Table<Job>,
    requests: Table<Ongoing>,
    /// Requests that came before serving.
    queued: VecDeque<(RequestTag, Request)>,
    /// Flushes and FUA writes that wait for a majority's stable media to have this sequence.
    waiters: Vec<(Seq, Waiter)>,
    /// Copied chunks that wait for a lock or a read, by destination and offset.
    chunks: BTreeMap<(MemberIndex, ByteOffset), Extent>,
    /// In no order. Unlike a tree it keeps its memory, so that nothing is allocated per request.
    outstanding: HashMap<RequestId, (MemberIndex, Outstanding)>,
    next_request: RequestId,
    stalled_reads: Vec<JobId>,
    stalled_chunks: Vec<(MemberIndex, Extent)>,
    /// Copies into these found nobody to ask what changed.
    stalled_copies: Vec<MemberIndex>,
    stall_deadline: Option<Monotonic>,
    readers: Readers,
    lease: Lease,
    repaired: u64,
    copied: ByteLength,
    pace: Pace,
    verification: Verification,
    aborted: bool,
    /// What keeps the election from going on, if it is not just missing members.
    note: Option<String>,
    random: u64,
    zeroes: SharedBuffer,
    actions: VecDeque<Action>,
}

impl Engine {
    /// A primary-to-be; it asks for connections at once.
    ///
    /// # Panics
    /// If the config has no members or more than [`MEMBERS_MAX`].
    #[must_use]
    pub fn new(config: EngineConfig, pool: BufferPool, now: Monotonic) -> Self {
        assert!((1..=MEMBERS_MAX).contains(&config.members), "1 to {MEMBERS_MAX} members, not {}", config.members);
        let mut zeroes = pool.take(2 * BLOCK_SIZE as usize);
        zeroes.fill(0);
        let mut engine = Self {
            growing: None,
            phase: Phase::Electing { majority_at: None },
            term: None,
            configs: Configs::default(),
            members: (0..config.members).map(|_| Member::new(now)).collect(),
            chosen: None,
            adopting: false,
            epochs: Epochs::default(),
            backlog: Backlog::new(),
            acknowledged: Seq::ZERO,
            flushed: Seq::ZERO,
            locks: RangeLock::new(),
            jobs: Table::new(),
            requests: Table::new(),
            queued: VecDeque::new(),
            waiters: Vec::new(),
            chunks: BTreeMap::new(),
            outstanding: HashMap::new(),
            next_request: RequestId(1),
            stalled_reads: Vec::new(),
            stalled_chunks: Vec::new(),
            stalled_copies: Vec::new(),
            stall_deadline: None,
            readers: Readers::default(),
            lease: Lease::default(),
            repaired: 0,
            copied: ByteLength::ZERO,
            pace: Pace::new(config.copy_rate, now),
            verification: Verification::default(),
            aborted: false,
            note: None,
            random: config.seed,
            zeroes: zeroes.share(),
            actions: VecDeque::new(),
            config,
            pool,
        };
        engine.ask_config(ConfigRequest::Read);
        engine.on_timer(now);
        engine
    }

    /// What to do next. Call it until `None` after every other call.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Its term, once it has chosen one.
    #[must_use]
    pub fn term(&self) -> Option<Term> {
        self.term
    }

    /// Whether it is primary.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        matches!(self.phase, Phase::Serving)
    }

    /// Whether it is on its way to bring a majority to the same content.
    #[must_use]
    pub fn is_reconciling(&self) -> bool {
        matches!(self.phase, Phase::Comparing | Phase::Reconciling)
    }

    /// How many damaged copies of blocks were written anew from a good one.
    #[must_use]
    pub fn repaired(&self) -> u64 {
        self.repaired
    }

    /// How much data was sent to members that lacked it. Holes are none.
    #[must_use]
    pub fn copied(&self) -> ByteLength {
        self.copied
    }

    /// How each member stands.
    #[must_use]
    pub fn members(&self) -> Vec<MemberStatus> {
        let voters = self.voters();
        let status = |(index, member): (usize, &Member)| MemberStatus {
            state: member.state(),
            counts: voters.contains(MemberIndex(index)),
            copied: member.copy.as_ref().map(copy::Copy::progress),
            time_left: member.copy.as_ref().and_then(copy::Copy::time_left),
            last_error: member.last_error.clone(),
        };
        self.members.iter().enumerate().map(status).collect()
    }

    /// What I/O waits for, in words, if it does.
    #[must_use]
    pub fn waiting_for(&self) -> Option<String> {
        let voters = self.voters();
        let (majority, all) = (voters.majority(), voters.count());
        let count = |is: fn(&Member) -> bool| voters.iter().filter(|index| is(&self.members[index.0])).count();
        match self.phase {
            Phase::Serving if self.is_majority(|_, member| member.is_joined()) => None,
            Phase::Serving => {
                let joined = count(Member::is_joined);
                let trouble = self.config_trouble().map_or(String::new(), |trouble| format!("; {trouble}"));
                let lost = self.lost();
                Some(format!("{joined} of the {all} replicas that count are in sync and connected, {majority} are needed{lost}{trouble}"))
            }
            _ if self.configs.record().is_none() || matches!(self.phase, Phase::Taking) => {
                Some(self.config_trouble().unwrap_or_else(|| "the metadata store is asked which replicas count".to_owned()))
            }
            Phase::Electing { .. } | Phase::Gathering { .. } => self.note.clone().or_else(|| {
                let answering = count(Member::has_answered);
                Some(format!("{answering} of the {all} replicas that count answer, the promises of {majority} are needed{}", self.absent()))
            }),
            Phase::Taking | Phase::Comparing | Phase::Reconciling => Some("replicas are being brought to the same content".to_owned()),
            Phase::Superseded => Some("another primary has taken over".to_owned()),
        }
    }

    /// Whom it waits for, if others that don't count answer.
    fn absent(&self) -> String {
        let voters = self.voters();
        let stale = self.member_indices().any(|index| !voters.contains(index) && self.members[index.0].has_answered());
        let absent: Vec<&str> =
            voters.iter().filter(|index| !self.members[index.0].has_answered()).map(|index| self.label(index)).collect();
        if !stale || absent.is_empty() {
            return String::new();
        }
        format!("; {} must come back: what was written last is there, and the replicas that answer lack it", absent.join(" or "))
    }

    /// Who has come back without what it had acknowledged, and what can be done about it.
    fn lost(&self) -> String {
        let voters = self.voters();
        let lost: Vec<&str> =
            voters.iter().filter(|index| self.members[index.0].promised().is_some()).map(|index| self.label(index)).collect();
        if lost.is_empty() {
            return String::new();
        }
        let what = "without what was acknowledged last, since its disk has failed or its machine has lost power";
        let all_are_there = voters.iter().all(|index| self.members[index.0].promised().is_some() || self.members[index.0].is_joined());
        let way_out = if all_are_there {
            "no other has it: once the volume is detached by force and attached again, it goes on with what there is"
        } else {
            "another must come back"
        };
        format!("; {} has come back {what}, and {way_out}", lost.join(" and "))
    }

    /// What people call a replica.
    fn label(&self, index: MemberIndex) -> &str {
        self.config.labels.get(index.0).map_or("a replica", String::as_str)
    }

    fn member_indices(&self) -> impl Iterator<Item = MemberIndex> + use<> {
        (0..self.members.len()).map(MemberIndex)
    }

    /// The members that live writes are sent to.
    fn writers(&self) -> impl Iterator<Item = MemberIndex> + use<> {
        let mut writers = [false; MEMBERS_MAX];
        for (writes, member) in writers.iter_mut().zip(&self.members) {
            *writes = member.takes_writes();
        }
        (0..self.members.len()).filter(move |index| writers[*index]).map(MemberIndex)
    }

    /// Forgets the writes that nobody needs any more.
    fn trim_backlog(&mut self) {
        let needed = self.members.iter().filter(|member| member.needs_backlog()).map(|member| member.received).min();
        self.backlog.trim(needed.unwrap_or(Seq::ZERO).min(self.acknowledged));
    }

    fn header(&self, kind: Kind) -> Header {
        Header::new(kind, self.config.volume, self.term.unwrap_or(Term::ZERO))
    }

    /// SplitMix64 (Steele, Lea, Flood 2014) over the seed: nonces only need to differ.
    fn random(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((mixed ^ mixed >> 31) >> 32).unwrap_or(0)
    }
}
