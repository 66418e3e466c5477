//! Links that lose some of what is sent, or are slow.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::network::{BOTH, Way};
use super::nodes::{Nodes, REPLICAS, VOLUME};
use super::partition::{COPY_LIMIT, Loaded, STALL_MAX};
use crate::fio::Fio;
use crate::replicas::identical;
use crate::report::{Found, Plan};

const LOSS: &str = "5%";
/// What one replica's answers are late by, and the bound for a request's 99th percentile, which no answer of that replica can meet.
const DELAY: Duration = Duration::from_millis(200);
const P99_MAX: Duration = Duration::from_millis(150);
const DELAYED: usize = 1;
/// Requests a second while latencies are measured: few enough for a connection that gets an answer five times a second.
const RATE: &str = "--rate_iops=300";

pub fn loss(plan: &Plan) -> Found {
    let seconds = if plan.quick { 5 } else { 20 };
    let loaded = Loaded::new(plan)?;
    let before = loaded.probe.rounds()?;
    loaded.probe.longest();
    (0..REPLICAS).try_for_each(|node| loaded.nodes.network.impair(node, &BOTH, &["loss", LOSS]))?;
    sleep(Duration::from_secs(seconds));
    loaded.wait_round()?;
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

pub fn delayed_writes(plan: &Plan) -> Found {
    delayed(plan, "write")
}

pub fn delayed_reads(plan: &Plan) -> Found {
    delayed(plan, "read")
}

fn delayed(plan: &Plan, way: &str) -> Found {
    let nodes = Nodes::new()?;
    Fio::start(&nodes.device, &["--rw=write", "--bs=1M", "--iodepth=4", "--size=100%"])?.finish().context("filling")?;
    let before = p99(&nodes, plan, way)?;
    nodes.network.impair(DELAYED, &[Way::FromReplica], &["delay", &format!("{}ms", DELAY.as_millis())])?;
    let connected = nodes.network.time_to_connect(DELAYED)?;
    ensure!(connected >= DELAY, "a connection to the delayed replica takes {connected:?}");
    let late = p99(&nodes, plan, way)?;
    let replica = nodes.replica(DELAYED)?;
    let said = format!("p99 of {way}s {:.1} ms, before {:.1} ms", late.as_secs_f32() * 1e3, before.as_secs_f32() * 1e3);
    ensure!(before.max(late) <= P99_MAX, "{said}; the bound is {} ms", P99_MAX.as_millis());
    ensure!(replica["state"] == "in-sync", "{said}, but the delayed replica was left behind: {replica}");
    nodes.network.heal(DELAYED, &[Way::FromReplica])?;
    nodes.wait_in_sync(COPY_LIMIT)?;
    nodes.site.detach(VOLUME)?;
    let bytes = identical(&nodes.site, VOLUME)?;
    Ok(format!("{said}, bound {} ms; {bytes} bytes the same on all replicas", P99_MAX.as_millis()))
}

/// The 99th percentile of the latency of reads or writes at random.
fn p99(nodes: &Nodes, plan: &Plan, way: &str) -> anyhow::Result<Duration> {
    let seconds = if plan.quick { 4 } else { 10 };
    let (rw, seed, runtime) = (format!("--rw=rand{way}"), format!("--randseed={}", plan.seed), format!("--runtime={seconds}"));
    let options = ["--bs=4k", "--iodepth=4", "--size=100%", "--time_based", "--output-format=normal,json", RATE, &rw, &seed, &runtime];
    let said = Fio::start(&nodes.device, &options)?.finish().with_context(|| nodes.site.log_tail())?;
    let (first, last) = (said.find("\n{").context("no JSON")?, said.rfind("\n}").context("no JSON")?);
    let report: Value = serde_json::from_str(&said[first..last + 2])?;
    let p99 =
        report["jobs"][0][way]["clat_ns"]["percentile"]["99.000000"].as_u64().with_context(|| format!("no percentile in {report}"))?;
    Ok(Duration::from_nanos(p99))
}
