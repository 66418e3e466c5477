//! The protocol: every step that a replica, a primary or the metadata store can take in a state.

use std::fmt;

use super::state::{ALL, Config, Log, PRIMARIES, Phase, Primary, REPLICAS, Replica, State, each, majority};

/// A rule that is left out, to show that the search finds what it is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shortcut {
    /// Commits the next config before its members prepared it.
    CommitUnprepared,
    /// Recovers without the store when a majority of the config has promised, not all.
    RecoverByMajority,
    /// Recovers without the store although a replica that answers has prepared a newer config.
    IgnorePrepared,
    /// Chooses by position, whatever the log term.
    ComparePositions,
    /// Acknowledges what one member received.
    AcknowledgeOnOne,
    /// Replicas take writes of a term below their promise.
    AcceptLowerTerm,
    /// Serves once one member is reconciled.
    ServeEarly,
    /// Changes to a config with members that lack acknowledged writes.
    AddLagging,
    /// Acknowledges by the old config's majority while the next one is on its way.
    AcknowledgeWhileChanging,
    /// The content of a replica counts for nothing as soon as another is copied over it, although nobody serves yet.
    DiscardWhileCopied,
    /// Chooses again under the same term after a replica may have adopted it.
    ChooseAgain,
}

/// What each primary may do, and how volumes begin.
#[derive(Clone, Copy)]
pub struct Bounds {
    pub primaries: u8,
    pub writes: u8,
    pub changes: u8,
    /// Members of the first config; one initial state for each.
    pub first: &'static [u8],
    /// As the code does it so far: nobody recovers without the record, so nothing is prepared; and while a config is being changed,
    /// majorities of both acknowledge. Whether the record has changed, the primary may learn later, or never.
    pub by_record: bool,
    pub shortcut: Option<Shortcut>,
}

/// A step and who takes it. Messages are steps of the replica that gets them; they may arrive late, or never.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub primary: usize,
    pub kind: Kind,
}

/// What happens in a step. Numbers name replicas, sets are masks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Take,
    Promise(usize),
    Tell(usize),
    Choose { config: Config, chosen: usize, stored: bool },
    Copy(usize),
    Adopt(usize),
    Serve,
    Receive(usize),
    Acknowledge,
    Decide(u8),
    Prepare(usize),
    Commit,
    Learn,
    Abandon,
}

impl Kind {
    /// A number for each kind of step.
    pub fn index(self) -> usize {
        match self {
            Kind::Take => 0,
            Kind::Promise(_) => 1,
            Kind::Tell(_) => 2,
            Kind::Choose { stored: true, .. } => 3,
            Kind::Choose { stored: false, .. } => 13,
            Kind::Copy(_) => 4,
            Kind::Adopt(_) => 5,
            Kind::Serve => 6,
            Kind::Receive(_) => 7,
            Kind::Acknowledge => 8,
            Kind::Decide(_) => 9,
            Kind::Prepare(_) => 10,
            Kind::Commit => 11,
            Kind::Abandon => 12,
            Kind::Learn => 14,
        }
    }

    pub const COUNT: usize = 15;
}

/// The names of the replicas in a mask.
pub fn names(mask: u8) -> String {
    let names: Vec<String> = each(mask).map(|replica| format!("r{replica}")).collect();
    format!("{{{}}}", names.join(" "))
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "primary {}: ", self.primary + 1)?;
        match self.kind {
            Kind::Take => write!(f, "takes the record"),
            Kind::Promise(replica) => write!(f, "r{replica} promises its term"),
            Kind::Tell(replica) => write!(f, "r{replica} is told the committed config"),
            Kind::Choose { config, chosen, stored } => {
                let source = if stored { "the record" } else { "the replicas, without the store" };
                write!(f, "chooses the content of r{chosen}, with config {} {} of {source}", config.version, names(config.members))
            }
            Kind::Copy(replica) => write!(f, "r{replica} gets the chosen content"),
            Kind::Adopt(replica) => write!(f, "r{replica} adopts its term"),
            Kind::Serve => write!(f, "serves"),
            Kind::Receive(replica) => write!(f, "r{replica} receives its next write"),
            Kind::Acknowledge => write!(f, "acknowledges its next write"),
            Kind::Decide(members) => write!(f, "decides to change the members to {}", names(members)),
            Kind::Prepare(replica) => write!(f, "r{replica} prepares the next config"),
            Kind::Commit => write!(f, "commits the next config in the record"),
            Kind::Learn => write!(f, "learns that the next config is committed"),
            Kind::Abandon => write!(f, "gives the change up before it asked the store"),
        }
    }
}

impl Bounds {
    fn takes(&self, shortcut: Shortcut) -> bool {
        self.shortcut == Some(shortcut)
    }

    /// By what contents are compared; nothing for a replica whose content doesn't count.
    fn rank(&self, state: &State, replica: usize) -> Option<(u8, u8)> {
        let replica = &state.replicas[replica];
        let log_term = if self.takes(Shortcut::ComparePositions) { 0 } else { replica.log_term };
        (!replica.discarded).then_some((log_term, replica.position))
    }

    /// The replicas whose content a primary may choose that knows the config from the record and has the promises of `promised`,
    /// or only got some of them in time.
    pub fn choices_by_record(&self, state: &State, config: Config, promised: u8) -> impl Iterator<Item = usize> {
        let answering = promised & config.members;
        each(answering).filter(move |chosen| {
            // A majority without any of higher rank must be among those that promised.
            let rank = self.rank(state, *chosen);
            let beaten = each(answering).filter(|replica| self.rank(state, *replica) <= rank).count() as u32;
            rank.is_some() && beaten >= majority(config.members)
        })
    }

    /// The configs and contents that a primary without the store may go on with when those in `promised`, or some of them, answered.
    pub fn choices_by_replicas(&self, state: &State, promised: u8) -> impl Iterator<Item = (Config, usize)> {
        let subsets = (1..=ALL).filter(move |answering| !self.by_record && answering & !promised == 0);
        subsets.flat_map(move |answering| {
            let known = each(answering).map(|replica| state.replicas[replica].config).max_by_key(|config| config.version);
            let config = known.unwrap_or(Config::NONE);
            let members = config.members & answering;
            let enough =
                members == config.members || self.takes(Shortcut::RecoverByMajority) && members.count_ones() >= majority(config.members);
            let newer = each(answering).any(|replica| state.replicas[replica].prepared.version > config.version);
            let allowed = config != Config::NONE && enough && (!newer || self.takes(Shortcut::IgnorePrepared));
            let best = each(members).map(|replica| self.rank(state, replica)).max().flatten();
            let chosen = each(members).filter(move |replica| allowed && best.is_some() && self.rank(state, *replica) == best);
            chosen.map(move |chosen| (config, chosen))
        })
    }

    /// All steps that can be taken in this state, with what they lead to.
    pub fn successors(&self, state: &State, found: &mut Vec<(Step, State)>) {
        found.clear();
        for primary in 0..usize::from(self.primaries) {
            let promised = (0..REPLICAS)
                .fold(0, |mask, replica| mask | u8::from(usize::from(state.replicas[replica].promised) == primary + 1) << replica);
            let mut add = |kind, next| found.push((Step { primary, kind }, next));
            self.store_steps(state, primary, &mut add);
            self.choosing_steps(state, primary, promised, &mut add);
            self.serving_steps(state, primary, &mut add);
            for replica in 0..REPLICAS {
                self.replica_steps(state, primary, replica, &mut add);
            }
        }
    }

    /// Compare-and-swap of the record. Read and swap are one step, as the swap fails if anything happened in between.
    fn store_steps(&self, state: &State, index: usize, add: &mut impl FnMut(Kind, State)) {
        let (primary, term) = (&state.primaries[index], index as u8 + 1);
        // One that recovered without the store, and reaches it again, must find the members that it serves with.
        let may_take = primary.phase == Phase::Gathering || primary.config.members == state.record.members;
        if !primary.took && state.record_term < term && may_take {
            let mut next = *state;
            next.record.version += 1;
            next.record_term = term;
            next.primaries[index].took = true;
            next.primaries[index].config = next.record;
            add(Kind::Take, next);
        }
        let is_prepared = primary.prepared == primary.next || self.by_record || self.takes(Shortcut::CommitUnprepared);
        let holds = state.record_term == term && state.record.version == primary.config.version;
        if primary.phase == Phase::Changing && is_prepared && holds {
            let mut next = *state;
            next.record = primary.config.next(primary.next);
            if !self.by_record {
                learn(&mut next.primaries[index]);
            }
            add(Kind::Commit, next);
        }
        let is_true = state.record == primary.config.next(primary.next) && state.record_term == term;
        if self.by_record && primary.phase == Phase::Changing && is_true {
            add(Kind::Learn, with(state, index, learn));
        }
    }

    fn choosing_steps(&self, state: &State, index: usize, promised: u8, add: &mut impl FnMut(Kind, State)) {
        let primary = &state.primaries[index];
        // It may lose a replica that takes part, and choose again among others, but not once any may have adopted its term.
        let again = primary.phase == Phase::Reconciling && (primary.reconciled == 0 || self.takes(Shortcut::ChooseAgain));
        if primary.phase != Phase::Gathering && !again {
            return;
        }
        let mut choose = |config, chosen: usize, stored| {
            let base = state.replicas[chosen].log;
            if again && base == primary.base && config == primary.config {
                return;
            }
            let next = with(state, index, |primary| {
                // The replicas that took part must adopt again.
                (primary.phase, primary.config, primary.base, primary.reconciled) = (Phase::Reconciling, config, base, 0);
            });
            add(Kind::Choose { config, chosen, stored }, next);
        };
        if primary.took {
            self.choices_by_record(state, primary.config, promised).for_each(|chosen| choose(primary.config, chosen, true));
        } else {
            self.choices_by_replicas(state, promised).for_each(|(config, chosen)| choose(config, chosen, false));
        }
    }

    fn serving_steps(&self, state: &State, index: usize, add: &mut impl FnMut(Kind, State)) {
        let (primary, term) = (&state.primaries[index], index as u8 + 1);
        let needed = majority(primary.config.members);
        let members = primary.config.members & primary.reconciled;
        if primary.phase == Phase::Reconciling && members.count_ones() >= if self.takes(Shortcut::ServeEarly) { 1 } else { needed } {
            let mut next = with(state, index, |primary| primary.phase = Phase::Serving);
            see(&mut next, term, primary.base);
            add(Kind::Serve, next);
        }
        if primary.phase < Phase::Serving {
            return;
        }
        let received = |members: u8| {
            let has = |replica: &usize| primary.received[*replica] > primary.acknowledged;
            each(members & primary.reconciled).filter(has).count() as u32
        };
        let is_free = primary.phase == Phase::Serving || self.takes(Shortcut::AcknowledgeWhileChanging);
        let may = is_free || self.by_record && received(primary.next) >= majority(primary.next);
        if may && received(members) >= if self.takes(Shortcut::AcknowledgeOnOne) { 1 } else { needed } {
            let mut next = with(state, index, |primary| primary.acknowledged += 1);
            let seen = (1..=primary.acknowledged + 1).fold(primary.base, |log, sequence| log.with(term, sequence));
            see(&mut next, term, seen);
            add(Kind::Acknowledge, next);
        }
        if primary.phase == Phase::Changing && self.by_record {
            // A message on its way may still make it true.
        } else if primary.phase == Phase::Changing {
            let given_up = |primary: &mut Primary| (primary.phase, primary.next, primary.prepared) = (Phase::Serving, 0, 0);
            add(Kind::Abandon, with(state, index, given_up));
        } else if primary.took && primary.changes < self.changes {
            let complete = |replica: usize| {
                let has_all = primary.received[replica] >= primary.acknowledged || self.takes(Shortcut::AddLagging);
                primary.reconciled & (1 << replica) != 0 && has_all
            };
            let others = (1..=ALL).filter(|next| next & primary.config.members != 0 && *next != primary.config.members);
            for members in others.filter(|next| each(*next).all(complete)) {
                let decided = |primary: &mut Primary| {
                    (primary.phase, primary.next, primary.changes) = (Phase::Changing, members, primary.changes + 1);
                };
                add(Kind::Decide(members), with(state, index, decided));
            }
        }
    }

    /// A message of the primary reaches the replica, and its answer the primary. (An answer that comes late, or never, is like a
    /// primary that makes no use of it, which is among the steps, too.)
    fn replica_steps(&self, state: &State, index: usize, at: usize, add: &mut impl FnMut(Kind, State)) {
        let (primary, replica, term, bit) = (&state.primaries[index], &state.replicas[at], index as u8 + 1, 1 << at);
        let mut reach = |kind, change: &dyn Fn(&mut State)| {
            let mut next = *state;
            change(&mut next);
            add(kind, next);
        };
        let is_reconciled = primary.reconciled & bit != 0;
        if replica.promised < term {
            reach(Kind::Promise(at), &|next| next.replicas[at].promised = term);
        }
        let is_late = replica.promised > term && self.takes(Shortcut::AcceptLowerTerm);
        if primary.phase >= Phase::Serving && is_reconciled && primary.received[at] < self.writes && (replica.promised == term || is_late) {
            let sequence = primary.received[at] + 1;
            reach(Kind::Receive(at), &|next| {
                next.primaries[index].received[at] = sequence;
                next.replicas[at].position += 1;
                next.replicas[at].log = replica.log.with(term, sequence);
            });
        }
        // Everything else is refused, or has no effect, unless this is the term it promised.
        if replica.promised != term {
            return;
        }
        if !self.by_record && primary.took && replica.config.version < primary.config.version {
            reach(Kind::Tell(at), &|next| {
                next.replicas[at].config = primary.config;
                if replica.prepared.version <= primary.config.version {
                    next.replicas[at].prepared = Config::NONE;
                }
            });
        }
        if primary.phase >= Phase::Reconciling && !is_reconciled {
            // As it would be of one that another with the chosen content is ahead of.
            let is_ahead = |other: &Replica| other.promised == term && other.log == primary.base && other.log_term > replica.log_term;
            let discards = self.takes(Shortcut::DiscardWhileCopied) && !replica.discarded && state.replicas.iter().any(is_ahead);
            if replica.log == primary.base {
                reach(Kind::Adopt(at), &|next| {
                    next.primaries[index].reconciled |= bit;
                    let replica = &mut next.replicas[at];
                    (replica.log_term, replica.position, replica.discarded) = (term, 0, false);
                });
            }
            if (replica.log != primary.base || discards) && (replica.log_term < term || self.takes(Shortcut::ChooseAgain)) {
                // Until it adopts the term, it keeps its log term and position.
                reach(Kind::Copy(at), &|next| {
                    next.replicas[at].log = primary.base;
                    next.replicas[at].discarded |= discards;
                });
            }
        }
        if primary.phase == Phase::Changing && !self.by_record && (primary.next & !primary.prepared) & bit != 0 {
            reach(Kind::Prepare(at), &|next| {
                next.primaries[index].prepared |= bit;
                next.replicas[at].prepared = primary.config.next(primary.next);
            });
        }
    }
}

fn learn(primary: &mut Primary) {
    primary.config = primary.config.next(primary.next);
    (primary.phase, primary.next, primary.prepared) = (Phase::Serving, 0, 0);
}

fn with(state: &State, primary: usize, change: impl FnOnce(&mut Primary)) -> State {
    let mut next = *state;
    change(&mut next.primaries[primary]);
    next
}

/// Users of this term's primary can now have seen all of this content. What the highest term shows must go on from what was seen
/// before; a lower one shows, late, a part of that.
fn see(state: &mut State, term: u8, content: Log) {
    if term < state.last_served() {
        state.torn |= state.seen.after(content).is_none();
    } else {
        state.torn |= content.after(state.seen).is_none();
        state.seen = content;
    }
}

const _: () = assert!(PRIMARIES <= 3, "a term has two bits");
