//! The end of a run: everything settles, all volumes hold what they must and go, and nothing is left of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use serde_json::Value;

use super::client::{exercise, of, open, same};
use super::request::Request;
use super::slot::{Seen, Slot, Volume};
use super::stage::{ATTACH, Answer, DELETE, DETACH, Kind, Stage, VERIFY, locked};
use crate::site::{SOON, Site, path_text, wait_for};
use crate::store::program::check;

/// Bound of the promise: from the end of the last command, with nothing killed any more, until all is as it should be.
const SETTLED_MAX: Duration = Duration::from_secs(10);
/// As many as by default.
const QUEUE_DEPTH: u32 = 128;
/// Looks at carrickd's descriptors, and the pause between two: a second in all, in which a connection that has ended is closed.
const DESCRIPTOR_LOOKS: u32 = 20;
const DESCRIPTOR_PAUSE: Duration = Duration::from_millis(50);
/// Who does all this, in the journal.
const WHO: &str = "end";

/// What must be as it was at the beginning, of each store by its path.
pub type Stores = BTreeMap<String, [u64; 3]>;

/// What the stores hold, and what is promised in them.
pub fn stores(site: &Site) -> anyhow::Result<Stores> {
    let list = site.carrick(&["store", "list"])?;
    let store = |store: &Value| {
        let usage = &store["usage"];
        let field = |name: &str| usage[name].as_u64().with_context(|| format!("a store without {name}: {store}"));
        let path = store["path"].as_str().context("a store without path")?.to_owned();
        Ok((path, [field("used_bytes")?, field("snapshots_bytes")?, field("reserved_bytes")?]))
    };
    list.as_array().context("no stores")?.iter().map(store).collect()
}

/// Tries all that; what was found.
pub fn finish(site: &mut Site, stage: &Stage, empty: &Stores) -> anyhow::Result<String> {
    let begin = Instant::now();
    let settled = wait_for("everything to settle", SOON, || {
        attach_what_moves(site)?;
        Ok(unsettled(site)?.is_empty().then_some(()))
    });
    if settled.is_err() {
        bail!("after {SOON:?} it is still so: {:?}", unsettled(site)?);
    }
    let took = begin.elapsed();
    stage.note(format!("all has settled after {} ms", took.as_millis()));
    ensure!(took <= SETTLED_MAX, "everything has settled only after {took:?}");
    let bytes: u64 = thread::scope(|scope| {
        let ends: Vec<_> = stage.slots.iter().map(|slot| scope.spawn(move || verified_and_gone(stage, slot))).collect();
        let ends = ends.into_iter().zip(&stage.slots).map(|(end, slot)| {
            let size = end.join().unwrap_or_else(|_| Err(anyhow!("panicked")));
            size.with_context(|| format!("volume {}, at the end", slot.name))
        });
        ends.sum::<anyhow::Result<u64>>()
    })?;
    nothing_left(site, empty)?;
    let descriptors = descriptors_after(site, stage)?;
    site.carrick(&["shutdown"])?;
    site.wait_daemon_dead()?;
    for path in empty.keys() {
        let report = check(Path::new(path))?;
        ensure!(report["volumes"] == 0, "the store {path} still has replicas: {report}");
    }
    Ok(format!(
        "settled after {:.1} s (bound {}); {} MiB in the last volumes are right; nothing left, {descriptors} descriptors of carrickd as at its start",
        took.as_secs_f64(),
        SETTLED_MAX.as_secs(),
        bytes >> 20
    ))
}

/// A replica of a volume that isn't attached moves when it is: an operator attaches it, or cancels the move.
fn attach_what_moves(site: &Site) -> anyhow::Result<()> {
    for volume in site.carrick(&["volume", "list"])?.as_array().context("no volumes")? {
        if volume["attachment"].is_null() && volume["operation"]["kind"] == "move" {
            // Its stores may just be starting: then it is tried again.
            let _ = site.try_carrick(&["attach", volume["name"].as_str().context("no name")?])?;
        }
    }
    Ok(())
}

/// What is not as it should be.
fn unsettled(site: &Site) -> anyhow::Result<Vec<String>> {
    let status = site.carrick(&["status"])?;
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut found: Vec<_> = array(&status["problems"]).iter().map(Value::to_string).collect();
    let processes = array(&status["processes"]);
    found.extend(processes.iter().filter(|process| process["state"] != "running").map(Value::to_string));
    for volume in array(&status["volumes"]) {
        let attachment = &volume["attachment"];
        let is_still =
            volume["state"] == "ready" && volume["operation"].is_null() && volume["leaving_stores"].as_array().is_none_or(Vec::is_empty);
        if !is_still || !(attachment.is_null() || attachment["state"] == "attached" && attachment["phase"] == "serving") {
            found.push(volume.to_string());
        }
    }
    let operations = array(&site.carrick(&["operation", "list"])?);
    found.extend(operations.iter().filter(|operation| operation["state"] == "running").map(Value::to_string));
    Ok(found)
}

/// Nothing is killed any more: no command is refused, unless a child of this process still has the device open, for a moment.
fn must(stage: &Stage, kind: &Kind, slot: &Slot, request: &Request) -> anyhow::Result<Value> {
    wait_for("the command to be done", SOON, || match stage.call(WHO, kind, slot, request, &[])? {
        Answer::Done(value) => Ok(Some(value)),
        Answer::Refused(reason) if reason == "DEVICE_BUSY" => Ok(None),
        other => bail!("{request:?}: {other:?}"),
    })
}

fn look(stage: &Stage, slot: &Slot) -> anyhow::Result<Option<Volume>> {
    match slot.look(stage, WHO)? {
        Seen::There(volume) => Ok(Some(volume)),
        Seen::Absent => Ok(None),
        Seen::Away => bail!("carrickd is away"),
    }
}

/// Reads a volume whole, from a device that is made anew, compares its replicas, and deletes it; its size.
fn verified_and_gone(stage: &Stage, slot: &Slot) -> anyhow::Result<u64> {
    let Some(volume) = look(stage, slot)? else { return Ok(0) };
    slot.detaches.during(|| must(stage, &DETACH, slot, &Request::Detach { force: false }))?;
    must(stage, &ATTACH, slot, &Request::Attach { queue_depth: QUEUE_DEPTH, mapped: slot.is_mapped() })?;
    let volume = look(stage, slot)?.filter(|now| now.id == volume.id).context("it is gone")?;
    let device = volume.device.as_deref().context("attached without a device")?;
    let mut contents = locked(&slot.contents);
    let contents = of(&mut contents, &volume, 0)?;
    exercise(contents, device, &open(device)?, slot.detaches.begun(), 1)?;
    ensure!(contents.region.length() == volume.size, "{device} has {} bytes: {}", contents.region.length(), volume.shown);
    if volume.shown["replicas"].as_array().is_some_and(|replicas| replicas.len() > 1) {
        let shown = must(stage, &VERIFY, slot, &Request::Verify { wait: true })?;
        same(&shown)?;
        ensure!(shown["attachment"]["verification"]["skipped_bytes"] == 0, "not all was compared: {shown}");
    }
    slot.detaches.during(|| must(stage, &DETACH, slot, &Request::Detach { force: false }))?;
    let answer = slot.deletes.during(|| must(stage, &DELETE, slot, &Request::Delete))?;
    ensure!(answer["pending_stores"].as_array().is_some_and(Vec::is_empty), "not deleted everywhere: {answer}");
    Ok(volume.size)
}

/// No volume, device, process or file, and the stores as they were.
fn nothing_left(site: &Site, empty: &Stores) -> anyhow::Result<()> {
    let status = site.carrick(&["status"])?;
    ensure!(status["volumes"].as_array().is_some_and(Vec::is_empty), "volumes are left: {}", status["volumes"]);
    let found = site.pids("target")?;
    ensure!(found.is_empty(), "targets are left: {found:?}");
    let found = targets(site)?;
    ensure!(found.is_empty(), "processes are left: {found:?}");
    let found: Vec<_> =
        names(Path::new("/dev"))?.into_iter().filter(|name| name.starts_with("ublkb") || name.starts_with("ublkc")).collect();
    ensure!(found.is_empty(), "devices are left: {found:?}");
    let found: Vec<_> = names(Path::new("/sys/block"))?.into_iter().filter(|name| name.starts_with("dm-")).collect();
    ensure!(found.is_empty(), "mapped devices are left: {found:?}");
    let found = names(&site.path("run/target"))?;
    ensure!(found.is_empty(), "files are left in the run directory: {found:?}");
    let found: Vec<_> = names(&site.path("state/log"))?.into_iter().filter(|name| name.starts_with("target-")).collect();
    ensure!(found.is_empty(), "files are left in the state directory: {found:?}");
    // What was deleted is taken apart in the background.
    let given_back = wait_for("the stores to be as they were", SOON, || Ok((stores(site)? == *empty).then_some(())));
    given_back.with_context(|| format!("used, in snapshots, reserved: at first {empty:?}, now {:?}", stores(site)))
}

/// Targets of this site that run, whoever knows of them.
fn targets(site: &Site) -> anyhow::Result<Vec<String>> {
    let run = site.path("run");
    let run = path_text(&run)?;
    let lines = names(Path::new("/proc"))?.into_iter().filter_map(|name| fs::read_to_string(format!("/proc/{name}/cmdline")).ok());
    Ok(lines.filter(|line| line.contains("carrick-target") && line.contains(run)).collect())
}

fn names(folder: &Path) -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// How many descriptors carrickd has, which must be as many as it has just after its start with the same to look after.
fn descriptors_after(site: &mut Site, stage: &Stage) -> anyhow::Result<usize> {
    let grown = descriptors(site)?;
    stage.restart(|| {
        site.kill_daemon()?;
        site.start_daemon()
    })?;
    wait_for("carrickd to have adopted the stores", SOON, || Ok(unsettled(site)?.is_empty().then_some(())))?;
    let fresh = descriptors(site)?;
    ensure!(grown.len() <= fresh.len(), "carrickd had the descriptors {grown:?}, one just started has {fresh:?}");
    Ok(fresh.len())
}

/// The descriptors that carrickd keeps: the fewest that it has in a while, since it closes the connection of a command, such as the
/// one that asks for its number, only after that has ended.
fn descriptors(site: &Site) -> anyhow::Result<Vec<String>> {
    let pid = site.carrick(&["status"])?["pid"].as_u64().context("no pid")?;
    let folder = PathBuf::from(format!("/proc/{pid}/fd"));
    let mut kept: Option<Vec<String>> = None;
    for _ in 0..DESCRIPTOR_LOOKS {
        let now = names(&folder)?;
        let what =
            now.iter().map(|number| fs::read_link(folder.join(number)).map_or_else(|_| "gone".into(), |to| to.display().to_string()));
        let what: Vec<_> = what.collect();
        if kept.as_ref().is_none_or(|kept| what.len() < kept.len()) {
            kept = Some(what);
        }
        thread::sleep(DESCRIPTOR_PAUSE);
    }
    kept.context("no look at the descriptors")
}
