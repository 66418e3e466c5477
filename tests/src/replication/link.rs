//! Links that lose some of what is sent, or are slow.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::network::Way;
use super::nodes::{Nodes, REPLICAS, VOLUME};
use super::partition::{Loaded, STALL_MAX};
use crate::fio::Fio;
use crate::replicas::identical;
use crate::report::{Found, Plan};
use crate::site::SOON;

const LOSS: &str = "5%";
const BOTH: [Way; 2] = [Way::ToReplica, Way::FromReplica];
/// What one replica's answers are late by, and the bound for a request's 99th percentile, which no answer of that replica can meet.
const DELAY: Duration = Duration::from_millis(200);
const P99_MAX: Duration = Duration::from_millis(150);
const DELAYED: usize = 1;

pub fn loss(plan: &Plan) -> Found {
    let seconds = if plan.quick { 5 } else { 20 };
    let loaded = Loaded::new(plan)?;
    let before = loaded.probe.rounds()?;
    loaded.probe.longest();
    (0..REPLICAS).try_for_each(|node| loaded.nodes.network.impair(node, &BOTH, &["loss", LOSS]))?;
    sleep(Duration::from_secs(seconds));
    loaded.wait_round().with_context(|| loaded.nodes.site.log_tail())?;
    let (longest, rounds) = (loaded.probe.longest(), loaded.probe.rounds()? - before);
    let lost = (0..REPLICAS).map(|node| loaded.nodes.network.lost(node)).sum::<anyhow::Result<u64>>()?;
    (0..REPLICAS).try_for_each(|node| loaded.nodes.network.heal(node, &BOTH))?;
    ensure!(lost > 0, "nothing was lost");
    ensure!(longest <= STALL_MAX, "a request took {longest:?}");
    let said = loaded.end()?;
    Ok(format!(
        "{lost} packets lost in {seconds} s: longest of {} requests {} ms of {}; {said}",
        rounds * 8,
        longest.as_millis(),
        STALL_MAX.as_millis()
    ))
}

pub fn delay(plan: &Plan) -> Found {
    let nodes = Nodes::new()?;
    measured(&nodes, plan, "write", 4).context("filling")?;
    let mut found = Vec::new();
    for delayed in [false, true] {
        if delayed {
            nodes.network.impair(DELAYED, &[Way::FromReplica], &["delay", &format!("{}ms", DELAY.as_millis())])?;
            let connected = nodes.network.time_to_connect(DELAYED)?;
            ensure!(connected >= DELAY, "a connection to the delayed replica takes {connected:?}");
        }
        for (name, rw) in [("writes", "randwrite"), ("reads", "randread")] {
            let p99 = measured(&nodes, plan, rw, if plan.quick { 3 } else { 8 }).with_context(|| nodes.site.log_tail())?;
            found.push((name, delayed, p99));
        }
    }
    ensure!(nodes.replica(DELAYED)?["state"] == "in-sync", "the delayed replica was left behind: {}", nodes.replica(DELAYED)?);
    nodes.network.heal(DELAYED, &[Way::FromReplica])?;
    let words = |(name, delayed, p99): &(&str, bool, Duration)| {
        format!("{name} {:.1} ms {} it", p99.as_secs_f32() * 1e3, if *delayed { "with" } else { "without" })
    };
    let said = found.iter().map(words).collect::<Vec<_>>().join(", ");
    ensure!(found.iter().all(|(_, _, p99)| *p99 <= P99_MAX), "p99 with {DELAY:?} of delay on one replica: {said}; bound {P99_MAX:?}");
    nodes.wait_in_sync(SOON)?;
    nodes.site.detach(VOLUME)?;
    let bytes = identical(&nodes.site, VOLUME)?;
    Ok(format!("p99 of {said}, bound {} ms; {bytes} bytes the same on all replicas", P99_MAX.as_millis()))
}

/// The 99th percentile of the latency of a kind of requests over so many seconds.
fn measured(nodes: &Nodes, plan: &Plan, rw: &str, seconds: u32) -> anyhow::Result<Duration> {
    let (rw, seed, runtime) = (format!("--rw={rw}"), format!("--randseed={}", plan.seed), format!("--runtime={seconds}"));
    let options = ["--bs=4k", "--iodepth=4", "--size=100%", "--time_based", "--output-format=normal,json", &rw, &seed, &runtime];
    let said = Fio::start(&nodes.device, &options)?.finish()?;
    let (first, last) = (said.find("\n{").context("no JSON")?, said.rfind("\n}").context("no JSON")?);
    let report: Value = serde_json::from_str(&said[first..last + 2])?;
    let way = if rw.ends_with("read") { "read" } else { "write" };
    let p99 =
        report["jobs"][0][way]["clat_ns"]["percentile"]["99.000000"].as_u64().with_context(|| format!("no percentile in {report}"))?;
    Ok(Duration::from_nanos(p99))
}
