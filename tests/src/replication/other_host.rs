//! A volume's target on another host, which takes over while the first one is cut off, stopped, or in the middle of something.
//!
//! The other host's target has no device, as the kernel of this machine has given the volume's to the first one already: it wins the
//! volume's term, brings the replicas in order, and would serve.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::nodes::Nodes;
use super::partition::{COPY_LIMIT, Loaded};
use crate::report::{Found, Plan};
use crate::site::{SOON, path_text, programs, signal, wait_for};

/// Where targets reach the volumes' records.
const RECORDS: &str = "run/records.sock";
/// What a target says when it is primary, and when it is so no more.
const SERVES: &str = "this target is primary";
const ENDS: &str = "this target ends, and what it has not answered stays with the kernel";
/// How long the network is away when it returns before the other host serves: between its first promise and the end of the old lease.
const RETURNS: [u64; 6] = [0, 200, 500, 1000, 1500, 2100];
/// A target that is told that it isn't primary any more must end within this: it tries to reach its replicas every 5 s at least.
const END_MAX: Duration = Duration::from_secs(10);

/// The other host's target.
struct Other {
    child: Child,
    log: PathBuf,
}

impl Other {
    /// It finds the volume's record at this socket.
    fn start(nodes: &Nodes, records: &Path) -> anyhow::Result<Self> {
        let mut config = nodes.target_config()?;
        config["records"] = json!(records);
        config["tends"] = json!(true);
        config["predecessor"] = json!("may-serve");
        let (path, log, run) = (nodes.site.path("other.json"), nodes.site.path("other.log"), nodes.site.path("other-run"));
        fs::write(&path, config.to_string())?;
        let network = format!("--net=/run/netns/{}", nodes.network.other());
        let target = programs()?.join("carrick-target");
        let child = Command::new("nsenter")
            .args([&network, path_text(&target)?, "run", "--config", path_text(&path)?, "--run-dir", path_text(&run)?, "--insecure"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("starting a target on the other host")?;
        Ok(Self { child, log })
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn wait_serving(&self) -> anyhow::Result<()> {
        let serves = wait_for("the other host to serve", SOON, || Ok(self.said().contains(SERVES).then_some(())));
        serves.with_context(|| self.said())
    }

    /// Waits until it has ended by itself, and has said why.
    fn wait_superseded(mut self) -> anyhow::Result<()> {
        let ended = wait_for("the other host's target to end", SOON, || Ok(self.child.try_wait()?));
        ended.with_context(|| self.said())?;
        let said = self.said();
        ensure!(said.contains(ENDS), "the other host's target ended with {said}");
        Ok(())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_alive(pid: i32) -> bool {
    // A zombie is none: nobody may be there to look after it.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

/// How the first host is out of the way while the other one takes over.
#[derive(Clone, Copy, Debug)]
enum Away {
    CutOff,
    Stopped,
}

pub fn takeovers(plan: &Plan) -> Found {
    let mut loaded = Loaded::new(plan)?;
    loaded.nodes.network.add_other()?;
    let rounds = if plan.quick { 1 } else { 3 };
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds {
        for away in [Away::CutOff, Away::Stopped] {
            slowest = slowest.max(fenced(&mut loaded, away).with_context(|| format!("{away:?}"))?);
        }
    }
    let returns = if plan.quick { &RETURNS[3..] } else { &RETURNS[..] };
    for milliseconds in returns {
        meets(&loaded, Duration::from_millis(*milliseconds)).with_context(|| format!("network back after {milliseconds} ms"))?;
    }
    let said = loaded.end()?;
    Ok(format!(
        "{} takeovers: nothing read or written by the old target, which ended at most {:.1} s (bound {}) after it was back; {} with the \
         network back in the middle of one; {said}",
        2 * rounds,
        slowest.as_secs_f32(),
        END_MAX.as_secs(),
        returns.len(),
    ))
}

/// The other host takes over, then the first is back, with its requests of before: it must end, having changed and answered nothing. How
/// long that took. Nobody starts another target meanwhile.
fn fenced(loaded: &mut Loaded, away: Away) -> anyhow::Result<Duration> {
    loaded.wait_round()?;
    let Loaded { nodes, probe, .. } = loaded;
    let old = nodes.site.pids("target")?.first().copied().context("no target")?;
    // The first host's way to the record goes with the others: else it may find out there, and end before it is back.
    let records = nodes.site.path("other-records.sock");
    fs::rename(nodes.site.path(RECORDS), &records)?;
    match away {
        Away::CutOff => nodes.network.cut_all()?,
        Away::Stopped => signal(old, Signal::STOP)?,
    }
    let other = Other::start(nodes, &records)?;
    other.wait_serving()?;
    nodes.site.kill_daemon()?;
    let (rounds, positions) = (probe.rounds()?, nodes.positions()?);
    let begin = Instant::now();
    match away {
        Away::CutOff => nodes.network.heal_all()?,
        Away::Stopped => signal(old, Signal::CONT)?,
    }
    wait_for("the old target to end", SOON, || Ok((!is_alive(old)).then_some(())))?;
    let ended = begin.elapsed();
    ensure!(ended <= END_MAX, "the old target ended {ended:?} after it was back");
    let volume = nodes.target_config()?["volume"].as_str().context("a target without volume")?.to_owned();
    let failure = fs::read_to_string(nodes.site.path(&format!("run/target/{volume}.failure")))?;
    ensure!(failure.contains(ENDS), "the old target ended with {failure}");
    let answered = probe.rounds()? - rounds;
    ensure!(answered == 0, "the old target answered {answered} rounds of requests while the other host was primary");
    let after = nodes.positions()?;
    ensure!(after == positions, "the old target changed replicas from {positions:?} to {after:?}");
    nodes.site.start_daemon()?;
    other.wait_superseded()?;
    nodes.wait_in_sync(COPY_LIMIT)?;
    loaded.wait_round()?;
    Ok(ended)
}

/// The network comes back while the other host takes over; the first one's target, or its successor, takes it back.
fn meets(loaded: &Loaded, after: Duration) -> anyhow::Result<()> {
    loaded.wait_round()?;
    let nodes = &loaded.nodes;
    nodes.network.cut_all()?;
    let other = Other::start(nodes, &nodes.site.path(RECORDS))?;
    sleep(after);
    nodes.network.heal_all()?;
    other.wait_superseded()?;
    nodes.wait_in_sync(COPY_LIMIT)?;
    loaded.wait_round().map(drop)
}
