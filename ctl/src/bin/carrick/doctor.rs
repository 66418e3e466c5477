//! `carrick doctor`: whether this machine can do what Carrick needs, measured where that is possible, and what to do where it can't.

mod disk;
mod smart;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use carrick_backing_store::size::HumanSize;
use carrick_ctl::v1;
use serde::Serialize;

use disk::{Disk, Flushes};

/// Files that `carrickd` may open, at least: some for each process that it looks after, and for its callers.
const OPEN_FILES_MIN: u64 = 1024;
/// Of a store: what is left when it is time to think of more room, and when it is urgent, in percent.
const ROOM_WARN: u64 = 10;
const ROOM_FAIL: u64 = 2;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is as it should be.
    Pass,
    /// It works, but not as it should, or could not be found out.
    Warn,
    /// It doesn't work, or data is at risk.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found, and how.
    pub found: String,
    /// What to do; empty if nothing is.
    pub advice: String,
}

impl Check {
    fn new(name: impl Into<String>, verdict: Verdict, found: impl Into<String>, advice: &str) -> Self {
        Self { name: name.into(), verdict, found: found.into(), advice: advice.into() }
    }

    fn pass(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(name, Verdict::Pass, found, "")
    }
}

/// Looks at everything. `status`: what `carrickd` said, or why it said nothing.
pub fn examine(status: &Result<v1::GetStatusResponse, String>) -> Vec<Check> {
    let mut checks = vec![io_uring(Path::new("/proc/sys/kernel/io_uring_disabled")), ublk(&beside("carrick-target"))];
    match status {
        Ok(status) => {
            checks.push(Check::pass("carrickd", format!("version {} answers, process {}", status.version, status.pid)));
            let limits = fs::read_to_string(format!("/proc/{}/limits", status.pid));
            checks.push(open_files(&limits.unwrap_or_default()));
            for store in &status.stores {
                checks.push(room(store));
                checks.push(flushes(store));
            }
            checks.extend(healths(&status.stores));
            if status.stores.is_empty() {
                checks.push(Check::new("stores", Verdict::Warn, "there are none", "carrick store add PATH, one for each disk"));
            }
        }
        Err(why) => checks.push(Check::new("carrickd", Verdict::Fail, why.clone(), "start it; its stores are looked at when it answers")),
    }
    checks
}

/// The program beside this one, or wherever it is found.
fn beside(name: &str) -> PathBuf {
    let own = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(name)));
    own.filter(|path| path.exists()).unwrap_or_else(|| name.into())
}

/// 0 allows io_uring to all, 1 to the privileged, 2 to nobody. Kernels before 6.6 have no such file.
fn io_uring(switch: &Path) -> Check {
    let name = "io_uring";
    match fs::read_to_string(switch).as_deref().map(str::trim) {
        Ok("2") => Check::new(
            name,
            Verdict::Fail,
            "kernel.io_uring_disabled is 2: nobody may use it",
            "sysctl kernel.io_uring_disabled=1 allows it to root; put that into /etc/sysctl.d",
        ),
        Ok(value) => Check::pass(name, format!("kernel.io_uring_disabled is {value}")),
        Err(_) => Check::pass(name, "this kernel has no switch for it"),
    }
}

/// What the ublk driver offers, as `carrick-target features` tells.
fn ublk(program: &Path) -> Check {
    let name = "ublk";
    let output = match Command::new(program).arg("features").output() {
        Ok(output) => output,
        Err(error) => {
            return Check::new(name, Verdict::Fail, format!("can't run {}: {error}", program.display()), "install it beside carrick");
        }
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let why = said.lines().last().unwrap_or_default().trim_start_matches("carrick-target: ");
        return Check::new(name, Verdict::Fail, why, "see the sentence before; volumes can't be attached here");
    }
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let words = |field: &str| -> Vec<String> {
        let listed = report[field].as_array().into_iter().flatten();
        listed.filter_map(|word| word.as_str().map(str::to_owned)).collect()
    };
    let (features, missing) = (words("features").join(", "), words("missing"));
    if !missing.is_empty() {
        let advice = "boot Linux 6.5 or newer (Debian 13 or newer has one)";
        return Check::new(name, Verdict::Fail, format!("the driver lacks {}", missing.join(", ")), advice);
    }
    if report["update_size"] != true && report["maps"] == true {
        return Check::pass(
            name,
            format!("the driver offers {features}; volumes grow by way of the device mapper, for want of UPDATE_SIZE"),
        );
    }
    if report["update_size"] != true {
        let advice = "install dmsetup, or boot Linux 6.16 or newer: here a volume that grew has its new size at its next attachment";
        return Check::new(name, Verdict::Warn, format!("the driver offers {features}, and not UPDATE_SIZE"), advice);
    }
    Check::pass(name, format!("the driver offers {features}"))
}

fn open_files(limits: &str) -> Check {
    let name = "open files";
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    match soft {
        Some("unlimited") => Check::pass(name, "carrickd may open any number"),
        Some(text) => match text.parse::<u64>() {
            Ok(limit) if limit >= OPEN_FILES_MIN => Check::pass(name, format!("carrickd may open {limit}")),
            _ => Check::new(name, Verdict::Warn, format!("carrickd may open {text}"), "LimitNOFILE=65536 in its unit, or ulimit -n"),
        },
        None => Check::new(name, Verdict::Warn, "the limits of carrickd can't be read", "run this as root"),
    }
}

fn room(store: &v1::Store) -> Check {
    let name = format!("room in {}", store.path);
    let Some(usage) = &store.usage else {
        let why = store.problem.clone().unwrap_or_else(|| "its process doesn't answer".into());
        return Check::new(name, Verdict::Fail, why, "see to the disk; carrickd starts its process again and again");
    };
    let percent = usage.free_bytes.saturating_mul(100).checked_div(usage.capacity_bytes).unwrap_or(0);
    let found = format!("{} of {} free, {percent} %", HumanSize(usage.free_bytes), HumanSize(usage.capacity_bytes));
    let advice = "delete volumes or snapshots, move replicas elsewhere (carrick volume replace), or add a store";
    match percent {
        ..ROOM_FAIL => Check::new(name, Verdict::Fail, found, advice),
        ROOM_FAIL..ROOM_WARN => Check::new(name, Verdict::Warn, found, advice),
        ROOM_WARN.. => Check::pass(name, found),
    }
}

/// Whether what is to be on stable media gets there: fdatasync and O_DSYNC, as far as the kernel counts what it sends to the disk.
fn flushes(store: &v1::Store) -> Check {
    let name = format!("flushes to {}", store.path);
    let path = Path::new(&store.path);
    let measured = Disk::of(path).and_then(|disk| disk.measure(path).map(|flushes| (disk, flushes)));
    match measured {
        Ok((disk, flushes)) => judge(name, &disk, &flushes),
        Err(error) => Check::new(name, Verdict::Warn, format!("could not be measured: {error}"), "run this as root, on the store's node"),
    }
}

fn judge(name: String, disk: &Disk, flushes: &Flushes) -> Check {
    let Flushes { syncs, seen, durable_writes, seen_durable, took } = flushes;
    if disk.is_memory() {
        return Check::new(name, Verdict::Warn, "it is in memory, and gone after a restart", "use a disk, but for tests");
    }
    let devices = disk.names();
    let millis = took.as_secs_f64() * 1e3;
    if !disk.has_volatile_cache() {
        return Check::pass(name, format!("{devices} has no volatile cache, says the kernel; fdatasync takes {millis:.2} ms"));
    }
    let found = format!(
        "{syncs} fdatasyncs sent {seen} flushes to {devices}, {durable_writes} writes with O_DSYNC sent {seen_durable}{}; fdatasync takes \
         {millis:.2} ms",
        if disk.takes_fua() { " (the disk takes FUA writes instead)" } else { "" }
    );
    let are_enough = seen >= syncs && (seen_durable >= durable_writes || disk.takes_fua());
    if are_enough {
        Check::pass(name, found)
    } else {
        let advice = "data that was flushed may be lost with the power: mount its file system without nobarrier, and see that whatever is \
                      between it and the disk passes flushes on";
        Check::new(name, Verdict::Fail, found, advice)
    }
}

/// What the disks under the stores say of themselves, each once.
pub fn healths(stores: &[v1::Store]) -> Vec<Check> {
    // Whose disk can't be found was told with its flushes.
    let disks: BTreeSet<_> = stores.iter().filter_map(|store| Disk::of(Path::new(&store.path)).ok()).flat_map(|disk| disk.each()).collect();
    disks.iter().filter_map(|disk| smart::health(Path::new("smartctl"), disk)).collect()
}

/// All checks, for people.
pub fn words(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let line = |check: &Check| {
        let verdict = match check.verdict {
            Verdict::Pass => "pass",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        let advice = if check.advice.is_empty() { String::new() } else { format!("\n      {:width$}  to do: {}", "", check.advice) };
        format!("{verdict}  {:width$}  {}{advice}\n", check.name, check.found)
    };
    checks.iter().map(line).collect()
}

#[cfg(test)]
pub mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    /// A program that says what a real one would.
    pub fn write_script(path: &Path, commands: &str) {
        fs::write(path, format!("#!/bin/sh\n{commands}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn a_switch_that_forbids_io_uring_is_told_with_its_cure() {
        let folder = tempfile::tempdir().unwrap();
        let switch = folder.path().join("io_uring_disabled");
        assert_eq!(io_uring(&switch).verdict, Verdict::Pass, "an older kernel");
        for (value, verdict) in [("0\n", Verdict::Pass), ("1\n", Verdict::Pass), ("2\n", Verdict::Fail)] {
            fs::write(&switch, value).unwrap();
            assert_eq!(io_uring(&switch).verdict, verdict, "{value}");
        }
    }

    #[test]
    fn what_the_driver_lacks_is_told_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let answer = |script: &str| {
            let program = folder.path().join("carrick-target");
            write_script(&program, script);
            ublk(&program)
        };
        let report = |missing: &str, can: &str| {
            let features = r#""features":["USER_COPY"]"#;
            answer(&format!(r#"echo '{{{features},"missing":[{missing}],{can}}}'"#))
        };
        let (grows, maps, neither) =
            (r#""update_size":true,"maps":false"#, r#""update_size":false,"maps":true"#, r#""update_size":false,"maps":false"#);
        assert_eq!(report("", grows).verdict, Verdict::Pass);
        let mapped = report("", maps);
        assert!(mapped.verdict == Verdict::Pass && mapped.found.contains("device mapper"), "{mapped:?}");
        let old = report("", neither);
        assert!(old.verdict == Verdict::Warn && old.advice.contains("dmsetup"), "{old:?}");
        let lacking = report(r#""USER_RECOVERY""#, grows);
        assert!(lacking.verdict == Verdict::Fail && lacking.found.contains("USER_RECOVERY"), "{lacking:?}");
        let none = answer("echo carrick-target: there is no /dev/ublk-control >&2; exit 1");
        assert_eq!((none.verdict, none.found.as_str()), (Verdict::Fail, "there is no /dev/ublk-control"));
        assert_eq!(ublk(Path::new("/nonexistent/carrick-target")).verdict, Verdict::Fail);
    }

    #[test]
    fn few_files_and_little_room_are_told() {
        let line = |limit: &str| format!("Limit  Soft Limit\nMax open files            {limit}              524288               files\n");
        for (limit, verdict) in [("1024", Verdict::Pass), ("unlimited", Verdict::Pass), ("256", Verdict::Warn)] {
            assert_eq!(open_files(&line(limit)).verdict, verdict, "{limit}");
        }
        assert_eq!(open_files("").verdict, Verdict::Warn);
        let store = |free| v1::Store {
            path: "/srv/a".into(),
            usage: Some(v1::StoreUsage { capacity_bytes: 1000, free_bytes: free, ..v1::StoreUsage::default() }),
            ..v1::Store::default()
        };
        for (free, verdict) in [(100, Verdict::Pass), (99, Verdict::Warn), (20, Verdict::Warn), (19, Verdict::Fail)] {
            assert_eq!(room(&store(free)).verdict, verdict, "{free}");
        }
        assert_eq!(room(&v1::Store::default()).verdict, Verdict::Fail, "no answer");
    }

    #[test]
    fn flushes_that_do_not_arrive_are_a_failure() {
        let flushes = |seen, seen_durable| Flushes { syncs: 16, seen, durable_writes: 16, seen_durable, took: Duration::from_micros(700) };
        let verdict = |disk: &Disk, flushes| judge("x".into(), disk, &flushes).verdict;
        let [volatile, with_fua, safe] = [(true, false), (true, true), (false, false)].map(|(cache, fua)| Disk::example(cache, fua));
        assert_eq!(verdict(&volatile, flushes(16, 17)), Verdict::Pass);
        assert_eq!(verdict(&volatile, flushes(15, 17)), Verdict::Fail);
        assert_eq!(verdict(&volatile, flushes(16, 0)), Verdict::Fail);
        assert_eq!(verdict(&with_fua, flushes(16, 0)), Verdict::Pass);
        assert_eq!(verdict(&safe, flushes(0, 0)), Verdict::Pass);
        assert_eq!(verdict(&Disk::default(), flushes(0, 0)), Verdict::Warn, "memory");
    }
}
