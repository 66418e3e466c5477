//! What all clients of a run share: the `carrick` command with what it may answer, when `carrickd` was away, and what happened so far.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use carrick_ctl::fault::Reason;
use serde_json::Value;

use super::request::Request;
use super::slot::{Attempts, Slot};
use crate::site::{Carrick, Refusal, SOON};

/// A question is answered from memory, by processes that have 3 s for it each.
const QUESTION_MAX: Duration = Duration::from_secs(20);
/// A change ends, or is refused with what it waits for, after the sum of carrickd's own limits at most.
const CHANGE_MAX: Duration = Duration::from_secs(60);
/// One of so many requests is made by the command, which is slow to start.
const COMMAND_EVERY: u64 = 16;
/// What the kernel calls this process: the first 15 bytes.
const OWN_NAME: &str = "carrick-accepta";
/// What happened lately, for a failure: enough for the last minute.
const JOURNAL_MAX: usize = 20_000;

/// A command, with the reasons for which it may be refused.
pub struct Kind {
    pub name: &'static str,
    limit: Duration,
    /// Because a process was killed, or is just being started again.
    by_death: &'static [&'static str],
    /// Because another client changed the same volume meanwhile.
    by_rival: &'static [&'static str],
}

impl Kind {
    const fn question(name: &'static str, by_rival: &'static [&'static str]) -> Self {
        Self { name, limit: QUESTION_MAX, by_death: &[], by_rival }
    }

    const fn change(name: &'static str, by_death: &'static [&'static str], by_rival: &'static [&'static str]) -> Self {
        Self { name, limit: CHANGE_MAX, by_death, by_rival }
    }
}

pub const SHOW: Kind = Kind::question("show", &["VOLUME_NOT_FOUND"]);
pub const EXPLAIN: Kind = Kind::question("explain", &["VOLUME_NOT_FOUND"]);
pub const STATUS: Kind = Kind::question("status", &[]);
pub const LIST: Kind = Kind::question("list", &[]);
pub const CREATE: Kind =
    Kind::change("create", &["TOO_FEW_STORES", "STORE_UNREACHABLE"], &["VOLUME_EXISTS", "VOLUME_NOT_READY", "VOLUME_NOT_FOUND"]);
pub const ATTACH: Kind = Kind::change("attach", &["TARGET_UNREACHABLE", "VOLUME_NOT_READY"], &["VOLUME_NOT_FOUND", "ATTACHED_DIFFERENTLY"]);
pub const DETACH: Kind = Kind::change("detach", &["TARGET_UNREACHABLE"], &["VOLUME_NOT_FOUND", "DEVICE_BUSY"]);
pub const FORCE: Kind = Kind::change("detach --force", &["TARGET_UNREACHABLE"], &["VOLUME_NOT_FOUND"]);
pub const DELETE: Kind = Kind::change("delete", &[], &["VOLUME_NOT_FOUND", "VOLUME_ATTACHED"]);
pub const EXPAND: Kind = Kind::change(
    "expand",
    // The last one: an expansion that nobody waited for was done meanwhile.
    &["STORE_UNREACHABLE", "VOLUME_NOT_READY", "VOLUME_LARGER"],
    &["VOLUME_NOT_FOUND", "OPERATION_ENDED"],
);
pub const CANCEL: Kind =
    Kind::change("cancel", &["OPERATION_ENDED", "OPERATION_PAST_CANCELLING"], &["VOLUME_NOT_FOUND", "OPERATION_NOT_FOUND"]);
pub const SET: Kind = Kind::change("set", &[], &["VOLUME_NOT_FOUND"]);
pub const VERIFY: Kind = Kind::change("verify", &["TARGET_UNREACHABLE", "VOLUME_NOT_READY"], &["VOLUME_NOT_FOUND", "VOLUME_NOT_ATTACHED"]);
pub const REPLACE: Kind = Kind::change(
    "replace",
    &["TOO_FEW_STORES", "STORE_UNREACHABLE", "VOLUME_NOT_READY", "OPERATION_RUNS"],
    // A replica that another client, or carrickd itself, has moved already.
    &["VOLUME_NOT_FOUND", "INVALID_FIELD"],
);

/// What came of a command.
#[derive(Debug)]
pub enum Answer {
    Done(Value),
    Refused(String),
    /// `carrickd` was being killed or started.
    Away,
}

/// How often `carrickd` was killed, and how often it was there again.
#[derive(Clone, Copy, Default)]
struct Restarts {
    begun: u64,
    done: u64,
}

/// See the module.
pub struct Stage {
    pub slots: Vec<Slot>,
    carrick: Carrick,
    restarts: Mutex<Restarts>,
    restarted: Condvar,
    stopped: AtomicBool,
    requests: AtomicU64,
    /// Programs that are started.
    forks: Attempts,
    began: Instant,
    journal: Mutex<VecDeque<String>>,
    tally: Mutex<Tally>,
}

/// What was counted.
#[derive(Default)]
pub struct Tally {
    pub counts: BTreeMap<String, u64>,
    /// Of each command, the one that took longest.
    pub longest: BTreeMap<&'static str, Duration>,
}

/// Nothing here is left half changed by a panic.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stage {
    pub fn new(carrick: Carrick, slots: Vec<Slot>) -> Self {
        Self {
            slots,
            carrick,
            restarts: Mutex::default(),
            restarted: Condvar::new(),
            stopped: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            forks: Attempts::default(),
            began: Instant::now(),
            journal: Mutex::default(),
            tally: Mutex::default(),
        }
    }

    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Makes a request about a volume. `also`: for what else it may be refused, as the volume stands.
    pub fn call(&self, who: &str, kind: &Kind, slot: &Slot, request: &Request, also: &[&str]) -> anyhow::Result<Answer> {
        let line = request.arguments(&slot.name).join(" ");
        self.note(format!("{who} {}: {line}", slot.name));
        let before = *locked(&self.restarts);
        let forks = self.forks.quiet();
        let begin = Instant::now();
        let answer = self.ask(kind, &slot.name, request).with_context(|| format!("{who}: carrick {line}"))?;
        let took = begin.elapsed();
        let was_away = locked(&self.restarts).begun > before.done;
        let answer = match answer {
            Ok(value) => Answer::Done(value),
            Err(refusal) if refusal.reason == Reason::DaemonUnreachable.as_str() && was_away => Answer::Away,
            Err(refusal) => {
                let rival = slot.is_shared && kind.by_rival.contains(&refusal.reason.as_str());
                // Until it becomes another program, a child of this process has open what this one has.
                let child = refusal.message.contains(OWN_NAME) && forks != Some(self.forks.begun());
                let rival = rival || refusal.reason == "DEVICE_BUSY" && child;
                let is_right = rival || kind.by_death.iter().chain(also).any(|reason| *reason == refusal.reason);
                self.note(format!("{who} {}: {line}: {}", slot.name, refusal.message));
                ensure!(is_right, "{who}: carrick {line}: {refusal:?}");
                ensure!(!refusal.message.is_empty(), "{who}: carrick {line} was refused without a word: {refusal:?}");
                Answer::Refused(refusal.reason)
            }
        };
        let word = match &answer {
            Answer::Done(_) => "done",
            Answer::Refused(reason) => reason,
            Answer::Away => "carrickd away",
        };
        self.note(format!("{who} {}: {line}: {word} after {} ms", slot.name, took.as_millis()));
        let mut tally = locked(&self.tally);
        *tally.counts.entry(format!("{} {word}", kind.name)).or_default() += 1;
        let longest = tally.longest.entry(kind.name).or_default();
        *longest = took.max(*longest);
        Ok(answer)
    }

    /// By the command once in a while, for what becomes of its errors.
    fn ask(&self, kind: &Kind, name: &str, request: &Request) -> anyhow::Result<Result<Value, Refusal>> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        if request.is_long() || number.is_multiple_of(COMMAND_EVERY) {
            let arguments = request.arguments(name);
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            return self.forks.during(|| self.carrick.run_within(kind.limit, &arguments));
        }
        let answer = request.ask(&self.carrick.socket(), name, kind.limit)?;
        answer.with_context(|| format!("no answer after {:?}", kind.limit))
    }

    /// Kills or starts `carrickd` around this.
    pub fn restart<T>(&self, restart: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        locked(&self.restarts).begun += 1;
        let result = self.forks.during(restart)?;
        locked(&self.restarts).done += 1;
        self.restarted.notify_all();
        Ok(result)
    }

    /// Waits until it is there again.
    pub fn wait_for_daemon(&self) -> anyhow::Result<()> {
        let restarts = locked(&self.restarts);
        let away = |restarts: &mut Restarts| restarts.begun > restarts.done;
        let waited = self.restarted.wait_timeout_while(restarts, SOON, away).unwrap_or_else(PoisonError::into_inner);
        if waited.1.timed_out() && !self.is_stopped() {
            bail!("carrickd is away for {SOON:?}");
        }
        Ok(())
    }

    /// Remembers what happened.
    pub fn note(&self, line: String) {
        let mut journal = locked(&self.journal);
        if journal.len() == JOURNAL_MAX {
            journal.pop_front();
        }
        journal.push_back(format!("{:8.3} {line}", self.began.elapsed().as_secs_f64()));
    }

    pub fn count(&self, what: &str, more: u64) {
        *locked(&self.tally).counts.entry(what.to_owned()).or_default() += more;
    }

    pub fn tally(&self) -> MutexGuard<'_, Tally> {
        locked(&self.tally)
    }

    /// All that happened.
    pub fn journal(&self) -> String {
        locked(&self.journal).iter().map(|line| format!("{line}\n")).collect()
    }
}
