//! The files under the run directory: lock, configuration, udev environment, reason of a failure.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use carrick_backing_store::VolumeId;
use carrick_replicator::control::{ControlError, ControlErrorCode, RunDirectory, TargetConfig};
use carrick_replicator::engine::MEMBERS_MAX;
use rustix::fs::FlockOperation;

use crate::params::LogicalBlock;
use crate::transport::QUEUE_DEPTH_MAX;

/// Longest volume name.
const NAME_MAX: usize = 63;
/// A configuration of seven replicas has a few kilobytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Reads and checks a target's configuration.
///
/// # Errors
/// In one sentence, which rule it breaks.
pub fn read_config(path: &Path) -> Result<(TargetConfig, LogicalBlock), ControlError> {
    let invalid = |why: String| ControlError {
        code: ControlErrorCode::Invalid,
        message: format!("the configuration {} can't be used: {why}", path.display()),
    };
    let size = fs::metadata(path).map_err(|error| invalid(error.to_string()))?.len();
    if size > CONFIG_BYTES_MAX {
        return Err(invalid(format!("it has {size} bytes, {CONFIG_BYTES_MAX} is the limit")));
    }
    let text = fs::read(path).map_err(|error| invalid(error.to_string()))?;
    let config: TargetConfig = serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
    let block = check(&config).map_err(invalid)?;
    Ok((config, block))
}

fn check(config: &TargetConfig) -> Result<LogicalBlock, String> {
    if !is_name(&config.name) {
        return Err(format!("{:?} is no volume name: letters, digits, dots, dashes, underscores, {NAME_MAX} at most", config.name));
    }
    if !(1..=QUEUE_DEPTH_MAX).contains(&config.queue_depth) {
        return Err(format!("the queue depth is {}: choose 1 to {QUEUE_DEPTH_MAX}", config.queue_depth));
    }
    if !(1..=MEMBERS_MAX).contains(&config.replicas.len()) {
        return Err(format!("there are {} replicas: 1 to {MEMBERS_MAX} are possible", config.replicas.len()));
    }
    config.limits.check().map_err(|error| error.to_string())?;
    LogicalBlock::new(config.block_size).ok_or_else(|| format!("the block size is {}: choose 512 or 4096", config.block_size))
}

/// Names go into udev's environment and into links under `/dev`, so that nothing else may be in them.
fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=NAME_MAX).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
}

/// Makes the folder of a file, for root alone to write to.
///
/// # Errors
/// The file system's.
pub fn make_folder_of(file: &Path) -> io::Result<()> {
    file.parent().map_or(Ok(()), |folder| fs::DirBuilder::new().recursive(true).mode(0o755).create(folder))
}

/// Takes the lock of the one target of a volume on this host. It is held as long as the file is open.
///
/// # Errors
/// `Busy` if another process has it.
pub fn lock(path: &Path, volume: VolumeId) -> Result<Lock, ControlError> {
    let failed = |error: io::Error| failed(&format!("can't lock {}", path.display()), &error);
    make_folder_of(path).map_err(failed)?;
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(ControlError {
                    code: ControlErrorCode::Busy,
                    message: format!("another target of volume {volume} runs on this host: it holds {}", path.display()),
                });
            }
            Err(error) => return Err(failed(error.into())),
        }
        // A target that ended in between has removed the file: the lock of a file without a name keeps nobody out.
        let lock = Lock { file, path: path.to_owned() };
        if lock.has_its_name().map_err(failed)? {
            return Ok(lock);
        }
    }
}

/// The lock of a volume's target, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Whether others who want it meet this one: not if the file was removed, by a target that was done, or after it had ended.
    ///
    /// # Errors
    /// The file system's.
    pub fn has_its_name(&self) -> io::Result<bool> {
        let held = self.file.metadata()?;
        Ok(fs::metadata(&self.path).is_ok_and(|named| (named.dev(), named.ino()) == (held.dev(), held.ino())))
    }

    /// Removes the file, for one who has nothing to do with it after all.
    pub fn remove(self) {
        remove(&self.path);
    }
}

/// What udev is told of a device: the rules import it as the disk appears.
#[must_use]
pub fn udev_environment(config: &TargetConfig) -> String {
    let guest = if config.host { "" } else { "CARRICK_GUEST=1\n" };
    format!("CARRICK_VOLUME={}\nCARRICK_NAME={}\n{guest}", config.volume, config.name)
}

/// The same of a ublk device under a mapping: nobody is to look at it, and the links are the mapped device's.
#[must_use]
pub fn udev_environment_below(config: &TargetConfig) -> String {
    format!("CARRICK_VOLUME={}\nCARRICK_BELOW=1\nCARRICK_GUEST=1\n", config.volume)
}

/// Writes a file as a whole or not at all. Whether its content is new.
///
/// # Errors
/// The file system's.
pub fn write_whole(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    if fs::read(path).is_ok_and(|there| there == content) {
        return Ok(false);
    }
    make_folder_of(path)?;
    let new = new_name(path);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
    // Whatever the umask says.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(content)?;
    drop(file);
    fs::rename(&new, path)?;
    Ok(true)
}

/// Where a file is written before it takes its place. Whatever a writer that was killed left there is written over by the next: there is
/// one target for each volume, and one device for each target.
fn new_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    path.with_file_name(name)
}

/// Removes a file that is written as a whole, and what a writer that was killed left of it.
pub fn remove_whole(path: &Path) {
    remove(&new_name(path));
    remove(path);
}

/// Says on the run directory why this target ends.
///
/// # Errors
/// The file system's.
pub fn write_failure(run: &RunDirectory, volume: VolumeId, error: &ControlError) -> io::Result<()> {
    let mut json = serde_json::to_vec(error)?;
    json.push(b'\n');
    write_whole(&run.target_failure(volume), &json, 0o600).map(drop)
}

/// Removes a file that may not be there.
pub fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "can't remove a file");
        }
        _ => {}
    }
}

fn failed(what: &str, error: &io::Error) -> ControlError {
    ControlError { code: ControlErrorCode::Failed, message: format!("{what}: {error}") }
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::VolumeSize;
    use carrick_replicator::control::{Map, ReplicaAddress};
    use carrick_replicator::engine::{Attachment, Predecessor};
    use carrick_replicator::limits::{Limits, Requests};

    use super::*;

    fn config() -> TargetConfig {
        TargetConfig {
            volume: VolumeId::from_bytes([7; 16]),
            name: "web-1".into(),
            size: VolumeSize::new(1 << 30).unwrap(),
            block_size: 512,
            queue_depth: 128,
            host: false,
            rebuild_rate: None,
            records: None,
            retiring: Vec::new(),
            attachment: Attachment::NONE,
            limits: Limits::default(),
            map: Map::Auto,
            tends: false,
            predecessor: Predecessor::Ended,
            replicas: vec![ReplicaAddress {
                store: "0f8fad5b-d9cb-469f-a165-70867728950e".parse().unwrap(),
                endpoint: "unix:/run/carrick/replica/x.sock".parse().unwrap(),
            }],
        }
    }

    #[test]
    fn only_possible_configurations_are_taken() {
        let good = config();
        assert_eq!(check(&good), Ok(LogicalBlock::B512));
        let changed = |change: fn(&mut TargetConfig)| {
            let mut config = good.clone();
            change(&mut config);
            check(&config).is_err()
        };
        assert!(changed(|config| config.name = "a\nCARRICK_GUEST=".into()));
        assert!(changed(|config| config.name = String::new()));
        assert!(changed(|config| config.name = ".hidden".into()));
        assert!(changed(|config| config.name = "n".repeat(64)));
        assert!(changed(|config| config.block_size = 1024));
        assert!(changed(|config| config.queue_depth = 0));
        assert!(changed(|config| config.queue_depth = 513));
        assert!(changed(|config| config.replicas.clear()));
        assert!(changed(|config| config.limits.iops = Some(Requests::new(0))));
    }

    #[test]
    fn a_configuration_error_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.json");
        assert!(read_config(&path).unwrap_err().message.contains("c.json"));
        fs::write(&path, serde_json::to_vec(&config()).unwrap()).unwrap();
        assert_eq!(read_config(&path).unwrap(), (config(), LogicalBlock::B512));
        fs::write(&path, "{\"unknown\":1}").unwrap();
        assert_eq!(read_config(&path).unwrap_err().code, ControlErrorCode::Invalid);
    }

    #[test]
    fn only_a_guests_disk_is_hidden_from_the_host() {
        let mut config = config();
        let volume = config.volume;
        assert_eq!(udev_environment(&config), format!("CARRICK_VOLUME={volume}\nCARRICK_NAME=web-1\nCARRICK_GUEST=1\n"));
        config.host = true;
        assert_eq!(udev_environment(&config), format!("CARRICK_VOLUME={volume}\nCARRICK_NAME=web-1\n"));
    }

    #[test]
    fn the_lock_is_for_one_and_survives_the_removal_of_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("target/v.lock");
        let volume = config().volume;
        let first = lock(&path, volume).unwrap();
        assert_eq!(lock(&path, volume).unwrap_err().code, ControlErrorCode::Busy);
        assert!(first.has_its_name().unwrap());
        fs::remove_file(&path).unwrap();
        assert!(!first.has_its_name().unwrap());
        let second = lock(&path, volume).unwrap();
        assert!(second.has_its_name().unwrap() && !first.has_its_name().unwrap(), "another file has the name");
        drop(first);
        assert_eq!(lock(&path, volume).unwrap_err().code, ControlErrorCode::Busy);
        drop(second);
        lock(&path, volume).unwrap();
    }

    #[test]
    fn files_are_written_whole_and_only_when_they_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("udev/ublkb0.env");
        assert!(write_whole(&path, b"one", 0o644).unwrap());
        assert!(!write_whole(&path, b"one", 0o644).unwrap());
        assert!(write_whole(&path, b"two", 0o644).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no half-written file stays");
        fs::write(path.with_file_name("ublkb0.env.new"), b"half").unwrap();
        assert!(write_whole(&path, b"three", 0o644).unwrap());
        fs::write(path.with_file_name("ublkb0.env.new"), b"half").unwrap();
        remove_whole(&path);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0, "nor after a kill");
    }
}
