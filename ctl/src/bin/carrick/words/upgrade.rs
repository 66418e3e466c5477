//! An upgrade of the node, for people.

use std::fmt::Write;

use carrick_ctl::v1::{GetStatusResponse, UpgradeNodeResponse};

use super::{process_subject, program, version};

/// What is to be replaced, and who notices.
pub fn upgrade(answer: &UpgradeNodeResponse, status: &GetStatusResponse) -> String {
    if answer.processes.is_empty() {
        return "every process runs the program on disk: nothing is to be replaced\n".into();
    }
    let mut text = String::new();
    for process in &answer.processes {
        // Writing to a string can't fail.
        let _ =
            writeln!(text, "to be replaced: {} of {}, version {}", program(process), process_subject(status, process), version(process));
    }
    if !answer.pausing_volumes.is_empty() {
        let volumes = answer.pausing_volumes.join(", ");
        let _ = writeln!(text, "volumes with one replica, whose I/O waits while the process of its store is replaced: {volumes}");
    }
    text
}
