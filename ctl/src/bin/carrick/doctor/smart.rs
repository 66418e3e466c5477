//! What a disk says of its own health, by way of `smartctl` (smartmontools), if that is there.

use std::path::Path;
use std::process::Command;

use super::{Check, Verdict};

/// A disk that is dying may take long to answer, or for ever: then that is the answer.
const LIMIT_SECONDS: &str = "10";
/// Exit code of `timeout`(1) when the time was over.
const TIMED_OUT: i32 = 124;

/// Asks a disk, such as `sda`. `None`: there is no smartctl.
pub fn health(program: &Path, disk: &str) -> Option<Check> {
    let name = format!("health of {disk}");
    let asked = Command::new("timeout").arg(LIMIT_SECONDS).arg(program).args(["--json", "--health", &format!("/dev/{disk}")]).output();
    // 126 and 127: it can't be run, or isn't there.
    let output = asked.ok().filter(|output| !matches!(output.status.code(), Some(126 | 127)))?;
    if output.status.code() == Some(TIMED_OUT) {
        let found = format!("smartctl had no answer from it within {LIMIT_SECONDS} s");
        return Some(Check::new(name, Verdict::Warn, found, "see the kernel's log; a disk that hangs is one to replace"));
    }
    // The exit code is a set of bits, some of which only tell of old entries in the disk's own log.
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Some(match report["smart_status"]["passed"].as_bool() {
        Some(true) => Check::pass(name, "the disk finds itself well (SMART)"),
        Some(false) => Check::new(
            name,
            Verdict::Fail,
            "the disk says that it is failing (SMART)",
            "when the other replicas of its volumes are in sync, take it out: what was on it is made anew in other stores, after carrickd's \
             --replace-after, or at once by carrick volume replace",
        ),
        None => {
            let why = report["smartctl"]["messages"][0]["string"].as_str().unwrap_or("no verdict");
            // Virtual disks have none, and that is no fault of theirs.
            Check::pass(name, format!("it doesn't say (SMART): {why}"))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::tests::write_script;

    #[test]
    fn a_disk_that_is_failing_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("smartctl");
        assert_eq!(health(&program, "sda"), None, "it isn't installed");
        let says = |script: &str| {
            write_script(&program, &format!("[ \"$3\" = /dev/sda ] || exit 1\n{script}"));
            health(&program, "sda").unwrap()
        };
        assert_eq!(says(r#"echo '{"smart_status":{"passed":true}}'; exit 64"#).verdict, Verdict::Pass);
        let failing = says(r#"echo '{"smart_status":{"passed":false}}'; exit 8"#);
        assert!(failing.verdict == Verdict::Fail && failing.advice.contains("volume replace"), "{failing:?}");
        let silent = says(r#"echo '{"smartctl":{"messages":[{"string":"Unable to detect device type"}]}}'; exit 1"#);
        assert!(silent.verdict == Verdict::Pass && silent.found.contains("Unable to detect"), "{silent:?}");
        assert_eq!(says("exit 124").verdict, Verdict::Warn);
    }
}
