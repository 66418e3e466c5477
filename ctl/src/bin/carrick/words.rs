//! What the daemon answers, for people.

mod events;
mod node;
mod operations;
mod upgrade;

use std::fmt::Write;
use std::time::SystemTime;

use carrick_backing_store::size::HumanSize;
use carrick_ctl::v1::{
    Attachment, AttachmentState, GetStatusResponse, Health, LastVerification, Process, ProcessKind, ProcessState, Replica, ReplicaState,
    Scrub, Store, StorePlacement, StoreUsage, TargetPhase, Upgrade, Verification, Volume, VolumeState,
};

use crate::table::Table;

pub use events::{event_line, events};
pub use node::{drained, eviction, node};
pub use operations::{expansion, explanation, operation, operation_line, operations};
pub use upgrade::upgrade;

/// What a cell without content shows.
const NONE: &str = "-";
/// How much of a store's id identifies it for people.
const SHORT_ID: usize = 8;

/// A table of stores.
pub fn stores(stores: &[Store]) -> String {
    if stores.is_empty() {
        return "no stores; add one with carrick store add PATH\n".into();
    }
    let mut table = Table::new(["STORE", "PATH", "STATE", "AVAILABLE", "SIZE", "VOLUMES", "PROBLEM"]);
    for store in stores {
        table.row([
            short(&store.id),
            store.path.clone(),
            store_state(store).into(),
            store.usage.map_or(NONE.into(), |usage| HumanSize(available(&usage)).to_string()),
            store.usage.map_or(NONE.into(), |usage| HumanSize(usage.capacity_bytes).to_string()),
            store.volumes.len().to_string(),
            store.problem.as_ref().or(store.warning.as_ref()).cloned().unwrap_or_default(),
        ]);
    }
    table.to_string()
}

/// What new volumes can have, in bytes.
const fn available(usage: &StoreUsage) -> u64 {
    usage.free_bytes.saturating_sub(usage.reserved_bytes)
}

fn store_state(store: &Store) -> &'static str {
    match store.placement() {
        _ if store.poisoned.is_some() => "poisoned",
        _ if store.health() > Health::Ready => health(store.health()),
        StorePlacement::Disabled if store.process() == ProcessState::Running => "disabled",
        StorePlacement::Evicting if store.process() == ProcessState::Running => "evicting",
        _ => process_state(store.process()),
    }
}

/// A line that says one thing.
fn property(text: &mut String, name: &str, value: &str) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "{name:<12}{value}");
}

/// How something is, by evidence over time.
fn health(health: Health) -> &'static str {
    match health {
        Health::Unspecified => "unknown",
        Health::Ready => "ready",
        Health::Reconnecting => "reconnecting",
        Health::Degraded => "degraded",
        Health::Failed => "failed",
    }
}

/// Whether replicas come to a store, and those that are there stay.
fn placement(store: &Store) -> &'static str {
    match store.placement() {
        StorePlacement::Disabled => "no new ones; those that are there stay",
        StorePlacement::Evicting => "no new ones; those that are there go to other stores",
        StorePlacement::Enabled | StorePlacement::Unspecified => "new ones may come",
    }
}

/// One store.
pub fn store(store: &Store) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| property(&mut text, name, value);
    line("id", &store.id);
    line("path", &store.path);
    line("state", store_state(store));
    line("process", process_state(store.process()));
    line("replicas", placement(store));
    if let Some(listen) = &store.listen {
        line("listens on", listen);
    }
    line("volumes", &if store.volumes.is_empty() { NONE.into() } else { store.volumes.join(", ") });
    if let Some(usage) = &store.usage {
        for (name, bytes, meaning) in usage_lines(usage) {
            line(name, format!("{:<12}{meaning}", HumanSize(bytes)).trim_end());
        }
    }
    if let Some(scrub) = &store.scrub {
        line("scrub", &scrub_state(scrub));
    }
    line("limit", &format!("{} % may be taken; warns from {} % on", store.limit_percent, store.warning_percent));
    line("poisoned", store.poisoned.as_deref().unwrap_or("no"));
    store.warning.as_deref().into_iter().for_each(|warning| line("warning", warning));
    store.problem.as_deref().into_iter().for_each(|problem| line("problem", problem));
    text
}

fn usage_lines(usage: &StoreUsage) -> [(&'static str, u64, &'static str); 9] {
    [
        ("capacity", usage.capacity_bytes, "in all"),
        ("used", usage.used_bytes, "by volumes as they are now"),
        ("snapshots", usage.snapshots_bytes, "only snapshots have it"),
        ("reclaimable", usage.reclaimable_bytes, "comes back by itself"),
        ("metadata", usage.metadata_bytes, "journal and maps"),
        ("bad", usage.bad_bytes, "never used again"),
        ("free", usage.free_bytes, ""),
        ("reserved", usage.reserved_bytes, "of what is free: promised to volumes"),
        ("available", available(usage), "of what is free: for new volumes"),
    ]
}

fn scrub_state(scrub: &Scrub) -> String {
    let Scrub { bytes_per_second, passes, verified_bytes, damaged_blocks } = scrub;
    if *bytes_per_second == 0 {
        return "off".into();
    }
    let pass = if *passes == 1 { "pass" } else { "passes" };
    let block = if *damaged_blocks == 1 { "block" } else { "blocks" };
    format!("{passes} {pass}, {} verified, {damaged_blocks} damaged {block}", HumanSize(*verified_bytes))
}

/// A table of volumes.
pub fn volumes(volumes: &[Volume]) -> String {
    if volumes.is_empty() {
        return "no volumes; make one with carrick volume create NAME --size SIZE\n".into();
    }
    let mut table = Table::new(["NAME", "SIZE", "STATE", "DEVICE", "REPLICAS"]);
    for volume in volumes {
        let device = volume.attachment.as_ref().and_then(|attachment| attachment.device.clone());
        table.row([
            volume.name.clone(),
            HumanSize(volume.size_bytes).to_string(),
            volume_state(volume),
            device.unwrap_or_else(|| NONE.into()),
            replica_summary(volume),
        ]);
    }
    table.to_string()
}

/// One volume, with its replicas.
pub fn volume(volume: &Volume) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| property(&mut text, name, value);
    line("name", &volume.name);
    line("id", &volume.id);
    line("size", &format!("{} ({} bytes)", HumanSize(volume.size_bytes), volume.size_bytes));
    line("block size", &volume.block_size.to_string());
    line("state", &volume_state(volume));
    line("config", &volume.config_version.to_string());
    line("can lose", &may_lose(volume));
    if volume.rebuild_rate > 0 {
        line("rebuilds at", &format!("{} a second at most", HumanSize(volume.rebuild_rate)));
    }
    if volume.iops > 0 {
        let burst = at_once(volume.iops_burst, volume.iops);
        line("requests", &format!("{} a second at most, {burst} more at once after a pause", volume.iops));
    }
    if volume.bandwidth > 0 {
        let (rate, burst) = (HumanSize(volume.bandwidth), HumanSize(at_once(volume.bandwidth_burst, volume.bandwidth)));
        line("bandwidth", &format!("{rate} a second at most, {burst} more at once after a pause"));
    }
    for operation in volume.operation.iter().chain(&volume.more_operations) {
        line("operation", operation_line(operation).trim_end());
    }
    if let Some(attachment) = &volume.attachment {
        line("device", attachment.device.as_deref().unwrap_or(NONE));
        if let Some(bytes) = attachment.device_size_bytes.filter(|bytes| *bytes < volume.size_bytes) {
            line("device size", &format!("{}: it has the volume's when that is detached and attached again", HumanSize(bytes)));
        }
        line("used by", if attachment.host { "the host" } else { "a guest" });
        line("queue depth", &attachment.queue_depth.to_string());
        line("term", attachment.term.as_deref().unwrap_or(NONE));
        line("in flight", &attachment.requests_in_flight.to_string());
        line("copied", &format!("{} to replicas that lacked it", HumanSize(attachment.copied_bytes)));
        line("repaired", &format!("{} damaged reads", attachment.repaired_reads));
        attachment.verification.iter().for_each(|found| line("verified", &verification(found)));
        delays(volume, attachment).into_iter().for_each(|what| line("delayed", &what));
        attachment.waiting_for.as_deref().into_iter().for_each(|what| line("waits for", what));
        attachment.problem.as_deref().into_iter().for_each(|what| line("problem", what));
    }
    if let Some(last) = &volume.last_verification {
        let LastVerification { at_unix, skipped_bytes, repaired_blocks, unsettled_blocks } = *last;
        line("compared", &format!("{} ago: {}", ago(at_unix), differences(repaired_blocks, unsettled_blocks, "", skipped_bytes)));
    }
    for salvage in &volume.salvages {
        let given_up = salvage.given_up_stores.join(", ");
        line("SALVAGED", &format!("{} ago from {}; what only {given_up} had is lost", ago(salvage.at_unix), salvage.from_store));
    }
    for store in &volume.leaving_stores {
        line("leaves", &format!("{store}: the replica there was replaced, and is deleted when the store is back"));
    }
    let mut table = Table::new(["REPLICA IN", "STORE", "STATE", "LAST ERROR"]);
    for replica in &volume.replicas {
        let error = replica.last_error.clone().unwrap_or_default();
        table.row([replica.store_path.clone(), short(&replica.store), replica_state(replica), error]);
    }
    let _ = write!(text, "\n{table}");
    text
}

/// What a comparison of the replicas came to.
pub fn verification(found: &Verification) -> String {
    let done = u128::from(found.compared_bytes) * 100 / u128::from(found.total_bytes.max(1));
    let how_far = if found.running { format!("{done} % so far") } else { "all of it".to_owned() };
    let places: Vec<String> = found.unsettled_offsets.iter().map(ToString::to_string).collect();
    let places = if places.is_empty() { String::new() } else { format!(" (at bytes {})", places.join(", ")) };
    format!("{how_far}; {}", differences(found.repaired_blocks, found.unsettled_blocks, &places, found.skipped_bytes))
}

fn differences(repaired: u64, unsettled: u64, places: &str, skipped: u64) -> String {
    let differed = match (repaired, unsettled) {
        (0, 0) => "no difference".to_owned(),
        (repaired, 0) => format!("{repaired} blocks differed and were repaired"),
        (repaired, unsettled) => format!("{repaired} blocks repaired, {unsettled} differ and nobody can tell which is right{places}"),
    };
    if skipped > 0 { format!("{differed}; {} could not be compared", HumanSize(skipped)) } else { differed }
}

/// What may come at once, if that isn't given: a second's worth.
const fn at_once(burst: u64, rate: u64) -> u64 {
    if burst == 0 { rate } else { burst }
}

/// What the limits did, if there are any or were.
fn delays(volume: &Volume, attachment: &Attachment) -> Option<String> {
    let Attachment { delayed_requests: requests, delayed_micros, requests_delayed_now: now, .. } = attachment;
    if volume.iops == 0 && volume.bandwidth == 0 && *requests == 0 {
        return None;
    }
    let average = delayed_micros.checked_div(*requests).unwrap_or(0) as f64 / 1000.0;
    Some(format!("{requests} requests waited for these limits, {average:.1} ms on average; {now} wait now"))
}

/// The whole node.
pub fn status(status: &GetStatusResponse) -> String {
    let mut text = String::new();
    let up = uptime(status.uptime_seconds);
    // Writing to a string can't fail.
    let _ = writeln!(text, "carrickd {}, process {}, up {up}", status.version, status.pid);
    let _ = writeln!(text, "run directory {}, state directory {}", status.run_dir, status.state_dir);
    if status.rebuild_rate > 0 {
        let _ = writeln!(text, "rebuilds at {} a second at most, all volumes together", HumanSize(status.rebuild_rate));
    }
    text.push('\n');
    let _ = writeln!(text, "{}", stores(&status.stores));
    let _ = writeln!(text, "{}", volumes(&status.volumes));
    if !status.processes.is_empty() {
        let _ = writeln!(text, "{}", processes(status));
    }
    if let Some(Upgrade { left, waiting_for, .. }) = &status.upgrade {
        let why = waiting_for.as_ref().map_or(String::new(), |why| format!("; waits: {why}"));
        let _ = writeln!(text, "is being upgraded: {left} processes are still to be replaced{why}");
    }
    if status.problems.is_empty() {
        let _ = writeln!(text, "all is well");
    }
    for problem in &status.problems {
        let _ = writeln!(text, "problem: {problem}");
    }
    text
}

fn processes(status: &GetStatusResponse) -> Table {
    let mut table = Table::new(["PROCESS", "OF", "STATE", "PID", "VERSION", "RESTARTS", ""]);
    for process in &status.processes {
        table.row([
            program(process).into(),
            process_subject(status, process),
            process_state(process.state()).into(),
            process.pid.map_or(NONE.into(), |pid| pid.to_string()),
            version(process),
            process.restarts.to_string(),
            process.problem.clone().unwrap_or_default(),
        ]);
    }
    table
}

fn program(process: &Process) -> &'static str {
    match process.kind() {
        ProcessKind::Replica => "carrick-replica",
        ProcessKind::Target => "carrick-target",
        ProcessKind::Unspecified => NONE,
    }
}

/// Of which version it is, and whether another program is there by now.
fn version(process: &Process) -> String {
    let version = process.version.as_deref().unwrap_or(NONE);
    if process.outdated { format!("{version} (outdated)") } else { version.to_owned() }
}

/// The store's path or the volume's name rather than an id.
fn process_subject(status: &GetStatusResponse, process: &Process) -> String {
    let store = status.stores.iter().find(|store| store.id == process.subject).map(|store| &store.path);
    let volume = status.volumes.iter().find(|volume| volume.id == process.subject).map(|volume| &volume.name);
    store.or(volume).unwrap_or(&process.subject).clone()
}

/// Where a volume stands, in words.
fn volume_state(volume: &Volume) -> String {
    match (volume.state(), &volume.attachment) {
        (VolumeState::Creating, _) => "creating".into(),
        (VolumeState::Deleting, _) => "deleting".into(),
        (VolumeState::Unspecified, _) => "unknown".into(),
        (VolumeState::Ready, None) if volume.tended => "detached, replicas tended".into(),
        (VolumeState::Ready, None) => "detached".into(),
        (VolumeState::Ready, Some(attachment)) => attachment_state(attachment),
    }
}

fn attachment_state(attachment: &Attachment) -> String {
    let word = match attachment.state() {
        AttachmentState::Attaching => "attaching",
        AttachmentState::Attached => "attached",
        AttachmentState::Detaching => "detaching",
        AttachmentState::Unspecified => "unknown",
    };
    match attachment.phase() {
        TargetPhase::Serving => word.into(),
        TargetPhase::Unspecified => format!("{word}, no target"),
        TargetPhase::Electing => format!("{word}, connecting to replicas"),
        TargetPhase::Reconciling => format!("{word}, bringing replicas to the same bytes"),
        TargetPhase::Starting => format!("{word}, making the device"),
        TargetPhase::Stopping => format!("{word}, stopping the device"),
    }
}

fn process_state(state: ProcessState) -> &'static str {
    match state {
        ProcessState::Unspecified => "unknown",
        ProcessState::Starting => "starting",
        ProcessState::Running => "running",
        ProcessState::Stopping => "stopping",
        ProcessState::Down => "down",
    }
}

/// `3 in sync`, or `2 in sync, 1 copying 40 %`.
fn replica_summary(volume: &Volume) -> String {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for word in volume.replicas.iter().map(replica_state) {
        match counts.iter_mut().find(|(known, _)| *known == word) {
            Some((_, count)) => *count += 1,
            None => counts.push((word, 1)),
        }
    }
    if counts.is_empty() {
        return NONE.into();
    }
    counts.iter().map(|(word, count)| format!("{count} {word}")).collect::<Vec<_>>().join(", ")
}

/// What may be lost without a loss of data, in words.
fn may_lose(volume: &Volume) -> String {
    let counting = volume.replicas.iter().filter(|replica| replica.counts).count();
    // Of a volume that is not attached, all that count have the same, or soon will.
    let has_all = |replica: &&Replica| replica.counts && (volume.attachment.is_none() || replica.state() == ReplicaState::InSync);
    let whole: Vec<&Replica> = volume.replicas.iter().filter(has_all).collect();
    match whole[..] {
        [] => "nothing: no replica that counts is in sync, and I/O waits".into(),
        [only] => format!("nothing: what was written last is in {} alone", only.store_path),
        [..] => {
            // A write is complete when a majority has it.
            let (one_by_one, at_once) = (whole.len() - 1, (counting / 2).min(whole.len() - 1));
            let rest = if one_by_one > at_once { format!(", and {one_by_one} one after the other") } else { String::new() };
            format!("any {at_once} of {} copies at once{rest}", whole.len())
        }
    }
}

/// What a replica does, in words.
fn replica_state(replica: &Replica) -> String {
    let state = replica_stage(replica);
    if replica.counts { state } else { format!("{state}, doesn't count") }
}

fn replica_stage(replica: &Replica) -> String {
    match replica.state() {
        ReplicaState::Unspecified => "unknown".into(),
        ReplicaState::Idle => "idle".into(),
        ReplicaState::Disconnected => match replica.health() {
            Health::Degraded => "disconnected for a while".into(),
            Health::Failed => "disconnected for long".into(),
            Health::Unspecified | Health::Ready | Health::Reconnecting => "disconnected".into(),
        },
        ReplicaState::Joining => "joining".into(),
        ReplicaState::InSync => "in sync".into(),
        ReplicaState::Copying => match (replica.copied_bytes, replica.copy_total_bytes) {
            (Some(copied), Some(total)) if total > 0 => {
                let left = replica.copy_seconds_left.map_or(String::new(), |seconds| format!(", about {} left", rough_time(seconds)));
                format!("copying {} %{left}", u128::from(copied) * 100 / u128::from(total))
            }
            _ => "copying".into(),
        },
        ReplicaState::Behind => "behind".into(),
        ReplicaState::Refused => "refused".into(),
        ReplicaState::Missing => "missing".into(),
    }
}

/// As precise as a guess may be.
fn rough_time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// How long ago that was, in seconds since 1970.
fn ago(unix: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    rough_time(now.saturating_sub(unix))
}

fn short(id: &str) -> String {
    id.chars().take(SHORT_ID).collect()
}

fn uptime(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use carrick_ctl::v1::Salvage;

    use super::*;

    fn replica(state: ReplicaState, copied: Option<(u64, u64)>) -> Replica {
        Replica {
            store: "0123456789abcdef".into(),
            store_path: "/srv/a".into(),
            state: state.into(),
            copied_bytes: copied.map(|copied| copied.0),
            copy_total_bytes: copied.map(|copied| copied.1),
            copy_seconds_left: copied.map(|_| 200),
            last_error: None,
            counts: true,
            health: Health::Unspecified.into(),
        }
    }

    #[test]
    fn a_volume_says_in_words_what_its_replicas_do() {
        let attachment = Attachment {
            state: AttachmentState::Attached.into(),
            queue_depth: 128,
            map: 0,
            device: Some("/dev/ublkb0".into()),
            term: Some("3.0000abcd".into()),
            phase: TargetPhase::Serving.into(),
            delayed_requests: 4,
            delayed_micros: 50_000,
            requests_delayed_now: 7,
            ..Attachment::default()
        };
        let shown = Volume {
            id: "5".into(),
            name: "vm1".into(),
            size_bytes: 20 << 30,
            block_size: 512,
            config_version: 1,
            created_unix: 0,
            rebuild_rate: 0,
            iops: 500,
            iops_burst: 0,
            bandwidth: 50 << 20,
            bandwidth_burst: 1 << 30,
            state: VolumeState::Ready.into(),
            replicas: vec![
                replica(ReplicaState::InSync, None),
                replica(ReplicaState::Copying, Some((2, 5))),
                replica(ReplicaState::InSync, None),
            ],
            attachment: Some(attachment),
            leaving_stores: vec!["/srv/old".into()],
            operation: None,
            more_operations: Vec::new(),
            tended: false,
            salvages: vec![Salvage { at_unix: 1_700_000_000, from_store: "/srv/a".into(), given_up_stores: vec!["/srv/b".into()] }],
            last_verification: Some(LastVerification { at_unix: 1_700_000_000, repaired_blocks: 2, ..LastVerification::default() }),
        };
        assert_eq!(
            volumes(std::slice::from_ref(&shown)),
            "NAME  SIZE    STATE     DEVICE       REPLICAS\nvm1   20 GiB  attached  /dev/ublkb0  2 in sync, 1 copying 40 %, about 3 min left\n"
        );
        let text = volume(&shown);
        assert!(text.contains("state       attached\n"), "{text}");
        for line in [
            "requests    500 a second at most, 500 more at once after a pause\n",
            "bandwidth   50 MiB a second at most, 1 GiB more at once after a pause\n",
            " days ago from /srv/a; what only /srv/b had is lost\n",
            " days ago: 2 blocks differed and were repaired\n",
            "leaves      /srv/old: the replica there was replaced, and is deleted when the store is back\n",
            "delayed     4 requests waited for these limits, 12.5 ms on average; 7 wait now\n",
        ] {
            assert!(text.contains(line), "{line:?}: {text}");
        }
        let free = Volume { iops: 0, bandwidth: 0, attachment: Some(Attachment::default()), ..shown.clone() };
        let text_of_free = volume(&free);
        assert!(!text_of_free.contains("delayed") && !text_of_free.contains("after a pause"), "{text_of_free}");
        assert!(
            text.contains("REPLICA IN  STORE     STATE                           LAST ERROR\n/srv/a      01234567  in sync\n"),
            "{text}"
        );
        assert_eq!(replica_state(&replica(ReplicaState::Copying, Some((0, 0)))), "copying");
        assert_eq!(replica_state(&replica(ReplicaState::Copying, Some((u64::MAX, u64::MAX)))), "copying 100 %, about 3 min left");
    }

    #[test]
    fn a_volume_says_what_it_may_lose() {
        let of = |replicas: &[(ReplicaState, bool)]| {
            let replicas = replicas.iter().map(|(state, counts)| Replica { counts: *counts, ..replica(*state, None) }).collect();
            may_lose(&Volume { replicas, attachment: Some(Attachment::default()), ..Volume::default() })
        };
        use ReplicaState::{Copying, Disconnected, InSync};
        assert_eq!(of(&[(InSync, true); 3]), "any 1 of 3 copies at once, and 2 one after the other");
        assert_eq!(of(&[(InSync, true); 2]), "any 1 of 2 copies at once");
        assert_eq!(of(&[(InSync, true); 5]), "any 2 of 5 copies at once, and 4 one after the other");
        assert_eq!(of(&[(InSync, true), (InSync, true), (Copying, false)]), "any 1 of 2 copies at once");
        assert_eq!(of(&[(InSync, true), (InSync, true), (Disconnected, true)]), "any 1 of 2 copies at once");
        assert_eq!(of(&[(InSync, true), (Copying, false)]), "nothing: what was written last is in /srv/a alone");
        assert!(of(&[(Disconnected, true), (Copying, false)]).starts_with("nothing: no replica"));
        let away = |health: Health| replica_state(&Replica { counts: false, health: health.into(), ..replica(Disconnected, None) });
        assert_eq!(away(Health::Reconnecting), "disconnected, doesn't count");
        assert_eq!(away(Health::Failed), "disconnected for long, doesn't count");
    }

    #[test]
    fn a_store_says_where_its_room_is_and_what_is_wrong() {
        let usage = StoreUsage { capacity_bytes: 10 << 30, free_bytes: 6 << 30, reserved_bytes: 4 << 30, ..StoreUsage::default() };
        let shown = Store {
            path: "/srv/a".into(),
            process: ProcessState::Running.into(),
            usage: Some(usage),
            scrub: Some(Scrub { bytes_per_second: 1, passes: 2, verified_bytes: 1 << 30, damaged_blocks: 3 }),
            poisoned: Some("a sync failed".into()),
            ..Store::default()
        };
        let text = store(&shown);
        for line in ["state       poisoned\n", "poisoned    a sync failed\n", "2 passes, 1 GiB verified, 3 damaged blocks\n"] {
            assert!(text.contains(line), "{line:?}: {text}");
        }
        assert!(text.contains("available   2 GiB       of what is free: for new volumes\n"), "{text}");
        let list = stores(std::slice::from_ref(&shown));
        assert!(list.contains("/srv/a  poisoned  2 GiB      10 GiB"), "{list}");
        let away = Store { poisoned: None, health: Health::Reconnecting.into(), ..shown.clone() };
        assert!(stores(std::slice::from_ref(&away)).contains("/srv/a  reconnecting"));
        let healthy = Store { poisoned: None, health: Health::Ready.into(), ..shown };
        assert!(store(&healthy).contains("poisoned    no\n") && store(&healthy).contains("state       running\n"));
        let once = Scrub { bytes_per_second: 1, passes: 1, damaged_blocks: 1, ..Scrub::default() };
        assert_eq!(scrub_state(&once), "1 pass, 0 B verified, 1 damaged block");
        assert_eq!(scrub_state(&Scrub::default()), "off");
    }

    #[test]
    fn an_empty_node_says_what_to_do() {
        let text = status(&GetStatusResponse { version: "1".into(), pid: 7, uptime_seconds: 3725, ..GetStatusResponse::default() });
        assert!(text.starts_with("carrickd 1, process 7, up 1 h 2 min\n"), "{text}");
        assert!(text.contains("carrick store add PATH"), "{text}");
        assert!(text.ends_with("all is well\n"), "{text}");
    }
}
