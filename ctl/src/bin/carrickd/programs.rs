//! Which program a process runs: the one that carrickd would start now, or one that was replaced on disk since.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use carrick_ctl::fault::{Fault, Reason};

use crate::context::Context;
use crate::metadata::State;
use crate::observed::{Observed, ProcessId};

/// What serves a store.
pub const REPLICA: &str = "carrick-replica";
/// What serves an attached volume.
const TARGET: &str = "carrick-target";

/// A process's program, in `bin_dir`.
pub const fn name(id: ProcessId) -> &'static str {
    match id {
        ProcessId::Replica(_) => REPLICA,
        ProcessId::Target(_) => TARGET,
    }
}

/// The processes whose program on disk is another file by now. Packages bring a new file in the place of the old one, which the
/// process keeps: so its number can't be the new one's, and what is in them needn't be compared. A process or program that isn't there
/// says nothing, and a process that nobody wants any more ends in any case.
pub fn outdated(bin_dir: &Path, state: &State, observed: &Observed) -> BTreeSet<ProcessId> {
    let is_wanted = |id: &ProcessId| match id {
        ProcessId::Replica(store) => state.stores.contains_key(store),
        ProcessId::Target(volume) => state.attachments.contains_key(volume),
    };
    let on_disk = [REPLICA, TARGET].map(|name| (name, file(&bin_dir.join(name))));
    let runs_another = |id: ProcessId, pid: u32| {
        let running = file(Path::new(&format!("/proc/{pid}/exe")));
        let installed = on_disk.iter().find(|(program, _)| *program == name(id)).and_then(|(_, file)| *file);
        running.is_some() && installed.is_some() && running != installed
    };
    let running = observed.processes.iter().filter_map(|(id, process)| Some((*id, process.pid()?)));
    running.filter(|(id, pid)| is_wanted(id) && runs_another(*id, *pid)).map(|(id, _)| id).collect()
}

/// Refuses if carrickd itself is of an older program than the one beside those that it would start, or they aren't there.
pub fn check(context: &Context) -> Result<(), Fault> {
    for name in [REPLICA, TARGET] {
        let path = context.bin_dir.join(name);
        if file(&path).is_none() {
            let message = format!("{} is not there: install it first", path.display());
            return Err(Fault::new(Reason::ProgramsUnusable, path.display(), message));
        }
    }
    // It may be installed elsewhere: then there is nothing to compare with.
    let installed = file(&context.bin_dir.join("carrickd"));
    if installed.is_some() && installed != file(Path::new("/proc/self/exe")) {
        let message = "carrickd itself runs an older program: restart it first (systemctl restart carrickd); volumes go on meanwhile";
        return Err(Fault::new(Reason::ProgramsUnusable, "carrickd", message));
    }
    Ok(())
}

/// What tells a file from every other, also if it has no name any more.
fn file(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::*;
    use crate::metadata::Mutation;
    use crate::metadata::tests::store;
    use crate::observed::Event;

    #[test]
    fn a_program_that_was_replaced_is_told_from_the_running_one() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("carrick-replica");
        let install = || {
            let new = folder.path().join("new");
            fs::copy("/bin/sleep", &new).unwrap();
            fs::rename(new, &program).unwrap();
        };
        install();
        // Another thread of the tests may have it open for writing in a child that isn't its program yet.
        let start = || Command::new(&program).arg("60").stdin(Stdio::null()).spawn();
        let mut child = loop {
            match start() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
                started => break started.unwrap(),
            }
        };
        let mut state = State::default();
        state.apply(&Mutation::PutStore(store(1))).unwrap();
        let id = ProcessId::Replica(store(1).id);
        let mut observed = Observed::default();
        observed.on_event(Event::Alive { process: id, pid: child.id(), adopted: false }, Instant::now());
        assert_eq!(outdated(folder.path(), &state, &observed), BTreeSet::new());
        install();
        assert_eq!(outdated(folder.path(), &state, &observed), BTreeSet::from([id]));
        assert_eq!(outdated(folder.path(), &State::default(), &observed), BTreeSet::new(), "its store was removed");
        fs::remove_file(&program).unwrap();
        assert_eq!(outdated(folder.path(), &state, &observed), BTreeSet::new(), "nothing could be started in its place");
        child.kill().unwrap();
        child.wait().unwrap();
        install();
        assert_eq!(outdated(folder.path(), &state, &observed), BTreeSet::new(), "it is gone");
    }
}
