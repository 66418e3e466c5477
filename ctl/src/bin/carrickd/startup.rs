//! What is checked and made before anything is served.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use tokio::net::UnixListener;

use crate::shutdown::FOLDERS;

/// Longest path of the run directory: the longest name below it, `/replica/UUID.control`, must fit the 107 bytes of a Unix
/// socket's address.
const RUN_DIR_MAX: usize = 107 - "/replica/.control".len() - 36;
/// Who may use the socket besides root, if the machine has this group.
const GROUP: &str = "carrick";

/// A carrickd that was killed may leave a child for a moment that isn't the program yet which it was to become, and has the lock.
const LOCK_LIMIT: Duration = Duration::from_secs(1);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// Why the daemon doesn't start.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// Not root.
    #[error("carrickd must run as root, because it makes block devices: start it with sudo, or as the systemd service")]
    NotRoot,
    /// Socket names would not fit.
    #[error("the run directory's path {path} is longer than {RUN_DIR_MAX} bytes: names of sockets below it would not fit")]
    RunDirTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Another one is there.
    #[error("another carrickd uses {path}: stop it first, or give this one another {flag}")]
    InUse {
        /// Which folder.
        path: PathBuf,
        /// How to give another.
        flag: &'static str,
    },
    /// A program isn't there.
    #[error("{path} is not there: install it, or say with --bin-dir where carrick-replica and carrick-target are")]
    NoProgram {
        /// Which.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StartupError {
    move |source| StartupError::Io { action, path: path.into(), source }
}

/// Whether the daemon may run at all.
pub fn check_root() -> Result<(), StartupError> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(StartupError::NotRoot) }
}

/// Makes a folder if it isn't there; returns its real path.
pub fn folder(path: &Path, mode: u32) -> Result<PathBuf, StartupError> {
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed("can't make the folder", path))?;
    path.canonicalize().map_err(failed("can't find", path))
}

/// The run directory with its folders, or why it can't be used.
pub fn run_folder(path: &Path) -> Result<PathBuf, StartupError> {
    let path = folder(path, 0o755)?;
    if path.as_os_str().len() > RUN_DIR_MAX {
        return Err(StartupError::RunDirTooLong { path });
    }
    for name in FOLDERS {
        folder(&path.join(name), 0o755)?;
    }
    Ok(path)
}

/// Makes sure that no other carrickd uses a folder, as long as the result lives. The lock leaves no file behind.
pub fn lock(path: &Path, flag: &'static str) -> Result<File, StartupError> {
    let folder = File::open(path).map_err(failed("can't open", path))?;
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(folder),
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_LIMIT => thread::sleep(LOCK_POLL),
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StartupError::InUse { path: path.into(), flag }),
            Err(error) => return Err(failed("can't lock", path)(error.into())),
        }
    }
}

/// Makes sure that the programs are there before a volume depends on them.
pub fn check_programs(folder: &Path) -> Result<(), StartupError> {
    for name in ["carrick-replica", "carrick-target"] {
        let path = folder.join(name);
        if !path.is_file() {
            return Err(StartupError::NoProgram { path });
        }
    }
    Ok(())
}

/// The socket that callers connect to. The run directory must be locked: an old socket is removed.
pub fn listen(path: &Path) -> Result<UnixListener, StartupError> {
    let listener = listen_alone(path)?;
    if let Some(group) = group_id(GROUP) {
        std::os::unix::fs::chown(path, None, Some(group)).map_err(failed("can't give the group", path))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(failed("can't set the mode of", path))?;
    Ok(listener)
}

/// A socket for processes of this user alone.
pub fn listen_alone(path: &Path) -> Result<UnixListener, StartupError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("can't remove the old socket", path)(error)),
        _ => {}
    }
    // Nobody else may connect before the mode is set.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    listener.map_err(failed("can't listen on", path))
}

/// A group of this machine. Only `/etc/group` is asked: that is where packages put system groups.
fn group_id(name: &str) -> Option<u32> {
    find_group(&fs::read_to_string("/etc/group").ok()?, name)
}

fn find_group(file: &str, name: &str) -> Option<u32> {
    file.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_their_whole_name() {
        let file = "root:x:0:\ncarrickers:x:7:\ncarrick:x:998:alice,bob\n";
        assert_eq!(find_group(file, "carrick"), Some(998));
        assert_eq!(find_group(file, "carr"), None);
        assert_eq!(find_group("carrick:x\n", "carrick"), None);
    }

    #[test]
    fn a_folder_is_used_by_one_only() {
        let folder = tempfile::tempdir().unwrap();
        let held = lock(folder.path(), "--state-dir").unwrap();
        assert!(matches!(lock(folder.path(), "--state-dir"), Err(StartupError::InUse { .. })));
        thread::scope(|scope| {
            let waits = scope.spawn(|| lock(folder.path(), "--state-dir"));
            drop(held);
            waits.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(60));
        assert!(matches!(run_folder(&long), Err(StartupError::RunDirTooLong { .. })));
    }
}
