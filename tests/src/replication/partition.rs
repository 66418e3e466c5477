//! Replicas on nodes of their own that the target doesn't reach for a while.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;

use super::network::{BOTH, Way};
use super::nodes::{Nodes, REPLICAS, VOLUME};
use crate::fio::Fio;
use crate::first_volume::chaos::{traffic, verifying_load};
use crate::probe::Probe;
use crate::replicas::identical;
use crate::report::{Found, Plan};
use crate::site::{SOON, signal, wait_for};

/// Bound of the promise.
pub const STALL_MAX: Duration = Duration::from_secs(3);
/// The same when two of three are lost at once: missed after 1.5 s, given up after 1.5 s more, and the record is changed.
const TWO_LOST_MAX: Duration = Duration::from_secs(5);
/// From healing on to the next request: the target tries every 5 s at least.
const GOES_ON_MAX: Duration = Duration::from_secs(10);
/// How long a copy beside the load may take on a slow machine.
pub const COPY_LIMIT: Duration = Duration::from_secs(180);
/// A replica that can't be reached must be missed within this.
const MISSED_MAX: Duration = Duration::from_secs(6);
/// Blocks before this are fio's.
const PROBED: u64 = (64 << 20) / 4096;

/// Nodes under load, every request of which is verified.
pub struct Loaded {
    pub nodes: Nodes,
    pub probe: Probe,
    pub fio: Fio,
}

impl Loaded {
    pub fn new(plan: &Plan) -> anyhow::Result<Self> {
        Self::on(plan, Nodes::new()?)
    }

    pub fn on(plan: &Plan, nodes: Nodes) -> anyhow::Result<Self> {
        let fio = verifying_load(&nodes.device, ("4k", "64k"), plan.seed, &nodes.site.path("stop-fio"))?;
        let probe = Probe::start(&nodes.device, PROBED)?;
        let loaded = Self { nodes, probe, fio };
        loaded.wait_round().context("before anything was done to the network")?;
        Ok(loaded)
    }

    /// Waits until a request was answered that was made from now on.
    pub fn wait_round(&self) -> anyhow::Result<Duration> {
        // The round under way, then one more.
        let (begin, wanted) = (Instant::now(), self.probe.rounds()? + 2);
        let went_on = wait_for("the probe's requests to go on", SOON, || Ok((self.probe.rounds()? >= wanted).then_some(())));
        went_on.with_context(|| self.nodes.site.log_tail())?;
        Ok(begin.elapsed())
    }

    /// Ends the load, and compares everything; what to say of it.
    pub fn end(self) -> anyhow::Result<String> {
        self.compare().map(|(said, _)| said)
    }

    /// The same; leaves the nodes without load.
    pub fn compare(self) -> anyhow::Result<(String, Nodes)> {
        let Self { nodes, probe, mut fio } = self;
        ensure!(fio.is_running()?, "fio ended early: {:?}", fio.finish());
        probe.finish()?;
        fs::write(nodes.site.path("stop-fio"), "")?;
        let said = fio.finish().with_context(|| nodes.site.log_tail())?;
        nodes.wait_in_sync(COPY_LIMIT)?;
        let sent = nodes.sent_mib(1)?;
        nodes.site.detach(VOLUME)?;
        let bytes = identical(&nodes.site, VOLUME)?;
        let said = format!("fio verify {}, {sent} MiB and more over each link; {bytes} bytes the same on all replicas", traffic(&said));
        Ok((said, nodes))
    }

    /// One replica out of reach: I/O goes on. The longest request, and how long the replica took to be in sync again.
    fn without_one(&self, node: usize, ways: &[Way], hold: Duration) -> anyhow::Result<(Duration, Duration)> {
        self.wait_round()?;
        self.probe.longest();
        let begin = Instant::now();
        self.nodes.network.cut(node, ways)?;
        self.nodes.wait_missed(node, MISSED_MAX)?;
        sleep(hold.saturating_sub(begin.elapsed()));
        self.wait_round()?;
        self.nodes.network.heal(node, ways)?;
        let in_sync = self.nodes.wait_in_sync(COPY_LIMIT)?;
        self.wait_round()?;
        let longest = self.probe.longest();
        ensure!(longest <= STALL_MAX, "a request took {longest:?} while {ways:?} of node {node} were cut, and after that");
        Ok((longest, in_sync))
    }
}

pub fn one_node(plan: &Plan) -> Found {
    let hold = Duration::from_secs(if plan.quick { 3 } else { 6 });
    let nodes = if plan.quick { 1 } else { REPLICAS };
    let cuts: Vec<(usize, &[Way])> = (0..nodes).map(|node| (node, &BOTH[..])).collect();
    without_each(plan, &cuts, hold)
}

pub fn one_way(plan: &Plan) -> Found {
    let hold = Duration::from_secs(if plan.quick { 3 } else { 6 });
    without_each(plan, &[(0, &[Way::ToReplica]), (1, &[Way::FromReplica])], hold)
}

fn without_each(plan: &Plan, cuts: &[(usize, &[Way])], hold: Duration) -> Found {
    let loaded = Loaded::new(plan)?;
    let (mut longest, mut slowest) = (Duration::ZERO, Duration::ZERO);
    for (node, ways) in cuts {
        let found = loaded.without_one(*node, ways, hold)?;
        (longest, slowest) = (longest.max(found.0), slowest.max(found.1));
    }
    let said = loaded.end()?;
    Ok(format!(
        "{} cuts of {} s: longest request {} ms of {}, in sync at most {:.1} s after healing; {said}",
        cuts.len(),
        hold.as_secs(),
        longest.as_millis(),
        STALL_MAX.as_millis(),
        slowest.as_secs_f32(),
    ))
}

pub fn two_nodes(plan: &Plan) -> Found {
    let cuts: &[[usize; 2]] = if plan.quick { &[[0, 1]] } else { &[[0, 1], [1, 2], [2, 0]] };
    let loaded = Loaded::new(plan)?;
    let Loaded { nodes, probe, .. } = &loaded;
    let mut longest = Duration::ZERO;
    for cut in cuts {
        loaded.wait_round()?;
        probe.longest();
        cut.iter().try_for_each(|node| nodes.network.cut(*node, &BOTH))?;
        let left_out = || Ok((!cut.iter().any(|node| nodes.replica(*node).is_ok_and(|replica| replica["counts"] == true))).then_some(()));
        wait_for("two replicas to be left out", GOES_ON_MAX, left_out).with_context(|| nodes.site.log_tail())?;
        loaded.wait_round()?;
        cut.iter().try_for_each(|node| nodes.network.heal(*node, &BOTH))?;
        nodes.wait_in_sync(COPY_LIMIT)?;
        longest = longest.max(probe.longest());
        ensure!(longest <= TWO_LOST_MAX, "a request took {longest:?} when replicas {cut:?} were lost at once");
    }
    let said = loaded.end()?;
    Ok(format!("{} cuts: longest request {} ms of {}; {said}", cuts.len(), longest.as_millis(), TWO_LOST_MAX.as_millis()))
}

pub fn all_nodes(plan: &Plan) -> Found {
    let hold = Duration::from_secs(if plan.quick { 3 } else { 6 });
    let loaded = Loaded::new(plan)?;
    let went_on = without_all(&loaded, hold)?;
    let said = loaded.end()?;
    Ok(format!(
        "no request answered in {} s, the next {:.1} s after healing (bound {}); {said}",
        hold.as_secs(),
        went_on.as_secs_f32(),
        GOES_ON_MAX.as_secs(),
    ))
}

/// All replicas out of reach: I/O waits. How long after healing it went on.
fn without_all(loaded: &Loaded, hold: Duration) -> anyhow::Result<Duration> {
    let Loaded { nodes, probe, .. } = loaded;
    loaded.wait_round()?;
    nodes.network.cut_all()?;
    (0..REPLICAS).try_for_each(|node| nodes.wait_missed(node, MISSED_MAX).map(drop))?;
    let waiting_for = nodes.show()?["attachment"]["waiting_for"].clone();
    ensure!(waiting_for.is_string(), "without any replica, `carrick volume show` says that I/O waits for {waiting_for}");
    let before = probe.rounds()?;
    sleep(hold);
    let answered = probe.rounds()? - before;
    ensure!(answered == 0, "{answered} rounds of requests were answered without any replica");
    let begin = Instant::now();
    nodes.network.heal_all()?;
    let went_on = wait_for("I/O to go on", GOES_ON_MAX, || Ok((probe.rounds()? > before).then_some(())));
    let went_on = went_on.with_context(|| nodes.site.log_tail()).map(|()| begin.elapsed())?;
    nodes.wait_in_sync(COPY_LIMIT)?;
    Ok(went_on)
}

/// The target is killed while it doesn't reach one replica, whose connection to it stays half open.
pub fn takeover(plan: &Plan) -> Found {
    let nodes = if plan.quick { 1 } else { REPLICAS };
    let loaded = Loaded::new(plan)?;
    let mut slowest = Duration::ZERO;
    for node in 0..nodes {
        loaded.wait_round()?;
        loaded.nodes.network.cut(node, &BOTH)?;
        let target = loaded.nodes.site.pids("target")?.first().copied().context("no target")?;
        signal(target, Signal::KILL)?;
        let went_on = loaded.wait_round()?;
        ensure!(went_on <= GOES_ON_MAX, "with node {node} lost, requests went on {went_on:?} after the target was killed");
        slowest = slowest.max(went_on);
        loaded.nodes.network.heal(node, &BOTH)?;
        loaded.nodes.wait_in_sync(COPY_LIMIT)?;
    }
    let said = loaded.end()?;
    let (slowest, bound) = (slowest.as_secs_f32(), GOES_ON_MAX.as_secs());
    Ok(format!("{nodes} kills: requests went on at most {slowest:.1} s later (bound {bound}); {said}"))
}
