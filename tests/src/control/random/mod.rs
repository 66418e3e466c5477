//! Random operations of several clients at once, while `carrickd`, targets and replicas are killed and stopped. Whatever the order: each
//! command is done or refused for a reason that makes sense, what was acknowledged is there, and nothing is left in the end.

mod client;
mod end;
mod request;
mod slot;
mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, anyhow, bail, ensure};
use carrick_backing_store::dice::Dice;
use rustix::process::Signal;
use serde_json::Value;

use crate::report::{Found, Plan};
use crate::site::{Site, signal};
use client::Client;
use request::Request;
use slot::Slot;
use stage::{Answer, EXPLAIN, LIST, STATUS, Stage};

const STORES: usize = 4;
/// Of each store: room for all volumes at their largest.
const STORE_SIZE: &str = "1G";
const CLIENTS: usize = 5;
/// Volumes that a client has for itself.
const OWN: usize = 2;
/// Volumes that all clients share: most of the races are there.
const SHARED: usize = 3;
const SECONDS_QUICK: u64 = 50;
const SECONDS: u64 = 300;
/// An operation that stands still for longer must say why.
const OPERATION_MAX: Duration = Duration::from_secs(10);
/// Between two looks at the operations.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between two kills at most.
const KILL_EVERY_MAX: u64 = 1500;
/// How long a process is stopped at most: shorter than what makes a replica be left out.
const STOPPED_MAX: u64 = 1000;
/// How long a store's process is killed again and again at most, and how often: it stays away for longer each time.
const SIEGE_MAX: u64 = 6000;
const SIEGE_EVERY: Duration = Duration::from_millis(100);
/// How long carrickd is away before it is started again at most.
const AWAY_MAX: u64 = 500;
/// In the last part of the time carrickd lives, so that what it might leak adds up.
const SPARED_PART: u32 = 4;
/// For a client to end what it does: the longest that a command may take, and some reading.
const CLIENT_END_MAX: Duration = Duration::from_secs(120);

type Ends = Receiver<anyhow::Result<()>>;

pub fn random(plan: &Plan) -> Found {
    let mut site = Site::with_sized_stores(STORES, STORE_SIZE)?;
    let own = (0..CLIENTS * OWN).map(|number| Slot::new(format!("own{number}"), false));
    let shared = (0..SHARED).map(|number| Slot::new(format!("shared{number}"), true));
    let stage = Arc::new(Stage::new(site.command(), own.chain(shared).collect()));
    let empty = end::stores(&site)?;
    let result = run(&mut site, &stage, plan).and_then(|killed| Ok((killed, end::finish(&mut site, &stage, &empty)?)));
    stage.stop();
    let (killed, found) = result.inspect_err(|_| tell(&site, &stage))?;
    let tally = stage.tally();
    let counts: Vec<_> = tally.counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
    let longest: Vec<_> = tally.longest.iter().map(|(what, took)| format!("{what} {} ms", took.as_millis())).collect();
    Ok(format!("seed {}; {killed}; {}; longest: {}; {found}", plan.seed, counts.join(", "), longest.join(", ")))
}

/// Lets the clients work, and kills, for the time of the plan; what was killed.
fn run(site: &mut Site, stage: &Arc<Stage>, plan: &Plan) -> anyhow::Result<String> {
    let length = Duration::from_secs(if plan.quick { SECONDS_QUICK } else { SECONDS });
    let mut dice = Dice::new(plan.seed);
    let ends = start_clients(stage, &mut dice);
    let begin = Instant::now();
    let mut killer = Killer { dice, killed: [0; 4] };
    let mut next_kill = killer.pause();
    while begin.elapsed() < length {
        match ends.recv_timeout(LOOK_EVERY.min(next_kill.saturating_duration_since(Instant::now()))) {
            Ok(end) => end?,
            Err(RecvTimeoutError::Disconnected) => bail!("the clients have ended"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() >= next_kill {
            let spared = begin.elapsed() > length - length / SPARED_PART;
            killer.kill(site, stage, spared)?;
            next_kill = killer.pause();
        }
        explained(stage)?;
    }
    stage.note("the killing is over".into());
    stage.stop();
    let until = Instant::now() + CLIENT_END_MAX;
    for _ in 0..CLIENTS {
        ends.recv_timeout(until.saturating_duration_since(Instant::now())).context("a client doesn't end")??;
    }
    let [daemons, targets, replicas, stops] = killer.killed;
    Ok(format!("killed: {daemons} carrickd, {targets} targets, {replicas} replicas; stopped for up to {STOPPED_MAX} ms: {stops} of these"))
}

/// Each tells how it has ended. They aren't waited for if one of them hangs.
fn start_clients(stage: &Arc<Stage>, dice: &mut Dice) -> Ends {
    let (sender, ends) = mpsc::channel();
    for number in 0..CLIENTS {
        let shared = CLIENTS * OWN..CLIENTS * OWN + SHARED;
        let slots = (number * OWN..(number + 1) * OWN).chain(shared).collect();
        let client = Client { stage: Arc::clone(stage), who: format!("client{number}"), slots, dice: Dice::new(dice.number()) };
        let sender = sender.clone();
        thread::spawn(move || _ = sender.send(client.run()));
    }
    ends
}

/// All operations; none if `carrickd` is away.
fn operations(stage: &Stage) -> anyhow::Result<Vec<Value>> {
    let all = Slot::new("all".into(), true);
    let Answer::Done(list) = stage.call("watch", &LIST, &all, &Request::Operations, &[])? else { return Ok(Vec::new()) };
    list.as_array().cloned().context("no list of operations")
}

/// No operation is older than its limit without a reason.
fn explained(stage: &Stage) -> anyhow::Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    for operation in operations(stage)? {
        // It is also changed by a request for more, which takes away what it waited for.
        let changed = operation["updated_unix"].as_u64().context("an operation without time")?;
        if operation["state"] != "running" || now.saturating_sub(changed) <= OPERATION_MAX.as_secs() {
            continue;
        }
        let name = operation["volume"].as_str().context("an operation without volume")?;
        let slot = Slot::new(name.into(), true);
        let Answer::Done(told) = stage.call("watch", &EXPLAIN, &slot, &Request::Explain, &[])? else { continue };
        let findings = told["findings"].as_array().context("no findings")?;
        let has = |reason: &str| findings.iter().any(|finding| finding["reason"] == reason);
        let why = !has("OPERATION_RUNS") || ["ATTACHING", "DETACHING", "IO_WAITS", "TARGET_DOWN"].into_iter().any(has);
        ensure!(why, "nobody says why an operation waits: {operation}; {told}");
        // It may have ended before it was asked for; then nothing is to be told of it.
        let is_told = !findings.is_empty() || !operations(stage)?.contains(&operation);
        ensure!(is_told, "nothing is told of an operation: {operation}; {told}");
    }
    Ok(())
}

/// Kills one after the other.
struct Killer {
    dice: Dice,
    /// carrickd, targets, replicas; and those that were only stopped.
    killed: [u64; 4],
}

impl Killer {
    fn pause(&mut self) -> Instant {
        Instant::now() + Duration::from_millis(self.dice.below(KILL_EVERY_MAX))
    }

    fn kill(&mut self, site: &mut Site, stage: &Stage, spares_daemon: bool) -> anyhow::Result<()> {
        match self.dice.below(8) {
            0 if !spares_daemon => self.kill_daemon(site, stage),
            0..=2 => self.strike(stage, "target", 1),
            3..=4 => self.strike(stage, "replica", 2),
            5 => self.stop(stage, "target"),
            6 => self.stop(stage, "replica"),
            _ => self.besiege(stage),
        }
    }

    fn kill_daemon(&mut self, site: &mut Site, stage: &Stage) -> anyhow::Result<()> {
        let away = Duration::from_millis(self.dice.below(AWAY_MAX));
        // Soon enough that replicas move while others are killed, or never.
        let replace = if self.dice.coin() { "3" } else { "never" };
        stage.note(format!("killer: carrickd is killed, away for {} ms, and replaces replicas after {replace}", away.as_millis()));
        self.killed[0] += 1;
        stage.restart(|| {
            site.kill_daemon()?;
            thread::sleep(away);
            site.start_daemon_with(&["--replace-after", replace, "--log", "debug,h2=info"])
        })?;
        stage.note("killer: carrickd answers".into());
        Ok(())
    }

    /// A process of this kind, if there is one.
    fn pick(&mut self, stage: &Stage, kind: &str) -> anyhow::Result<Option<i32>> {
        let pids = pids(stage, kind)?;
        Ok(pids.values().nth(self.dice.index(pids.len())).copied())
    }

    fn strike(&mut self, stage: &Stage, kind: &str, index: usize) -> anyhow::Result<()> {
        let Some(pid) = self.pick(stage, kind)? else { return Ok(()) };
        stage.note(format!("killer: {kind} {pid} is killed"));
        self.killed[index] += u64::from(signal(pid, Signal::KILL).is_ok());
        Ok(())
    }

    /// Keeps a store away: its replicas are left out, and replaced.
    fn besiege(&mut self, stage: &Stage) -> anyhow::Result<()> {
        let replicas = pids(stage, "replica")?;
        let Some(store) = replicas.keys().nth(self.dice.index(replicas.len())) else { return Ok(()) };
        let until = Instant::now() + Duration::from_millis(self.dice.below(SIEGE_MAX));
        stage.note(format!("killer: the replica of store {store} is killed for a while"));
        while Instant::now() < until {
            if let Some(pid) = pids(stage, "replica")?.get(store) {
                self.killed[2] += u64::from(signal(*pid, Signal::KILL).is_ok());
            }
            thread::sleep(SIEGE_EVERY);
        }
        Ok(())
    }

    fn stop(&mut self, stage: &Stage, kind: &str) -> anyhow::Result<()> {
        let Some(pid) = self.pick(stage, kind)? else { return Ok(()) };
        let pause = Duration::from_millis(self.dice.below(STOPPED_MAX));
        stage.note(format!("killer: {kind} {pid} is stopped for {} ms", pause.as_millis()));
        self.killed[3] += u64::from(signal(pid, Signal::STOP).is_ok());
        thread::sleep(pause);
        // It may have been killed meanwhile, by carrickd.
        _ = signal(pid, Signal::CONT);
        Ok(())
    }
}

/// The processes of a kind that run, by what they serve.
fn pids(stage: &Stage, kind: &str) -> anyhow::Result<BTreeMap<String, i32>> {
    let all = Slot::new("all".into(), true);
    let Answer::Done(status) = stage.call("killer", &STATUS, &all, &Request::Status, &[])? else { return Ok(BTreeMap::new()) };
    let process = |process: &Value| {
        let pid = i32::try_from(process["pid"].as_i64()?).ok()?;
        // It may have ended since, and its number be another's.
        let is_there = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with("carrick-"));
        Some((process["subject"].as_str()?.to_owned(), pid)).filter(|_| is_there && process["kind"] == kind)
    };
    Ok(status["processes"].as_array().context("no processes")?.iter().filter_map(process).collect())
}

/// Everything that helps to find out what happened: on standard error, and, on a kernel of the runner's, among the results.
fn tell(site: &Site, stage: &Stage) {
    let journal = stage.journal();
    let lines: Vec<_> = journal.lines().collect();
    eprintln!("the last of what happened:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
    eprintln!("carrickd's last words:\n{}", site.log_tail());
    let Some(results) = std::env::var_os("CARRICK_RESULTS") else { return };
    let results = Path::new(&results);
    let logs = fs::read_dir(site.path("state/log")).into_iter().flatten().flatten().map(|entry| entry.path());
    let kept = fs::write(results.join("journal"), journal).and_then(|()| {
        logs.chain([site.path("carrickd.log")])
            .try_for_each(|log| fs::copy(&log, results.join(log.file_name().unwrap_or_default())).map(drop))
    });
    if let Err(error) = kept {
        eprintln!("{:#}", anyhow!(error).context("the logs can't be kept"));
    }
}
