//! A device of the device mapper in front of a volume's ublk device, for kernels that can't change a ublk device's size.
//!
//! The ublk device is larger than any volume, and the mapped device shows as much of it as the volume has. A larger table takes the place
//! of the smaller one in one step of the kernel, while the device is used. There is no state beside the kernel's: a device is known by
//! its identifier, which has the volume and the number of the attachment in it, and every step may be done again.
//!
//! `dmsetup` does it: it also agrees with udev, which the ioctls alone don't.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use carrick_backing_store::VolumeSize;
use carrick_backing_store::units::VOLUME_SIZE_MAX;
use carrick_replicator::control::TargetConfig;
use libublk_rs_sys as sys;

use crate::child;
use crate::params::SECTOR;
use crate::sysfs;

/// Sectors of a ublk device under a mapping: more than any volume has, so that one can be told by it.
pub const SECTORS_BELOW: u64 = VOLUME_SIZE_MAX / SECTOR + 8;

/// What the identifiers of Carrick's devices begin with. udev's rules know it.
const PREFIX: &str = "CARRICK-";
/// What the names of those begin with that went while somebody used them; the rest is that of the identifier.
const GONE: &str = "carrick-gone-";
/// `dmsetup` takes milliseconds, but waits for udev, and for requests under way when it changes a table.
const LIMIT: Duration = Duration::from_secs(20);
/// After it was killed. It may be inside the kernel, and is left there then.
const KILL_LIMIT: Duration = Duration::from_secs(1);
/// Of what it says, as much as a message needs. A list of a thousand devices has 100 KiB.
const OUTPUT_MAX: u64 = 4 << 20;

/// What went wrong with a mapped device.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The program isn't there, or can't be waited for.
    #[error("can't run dmsetup: {0}; install the package dmsetup, or attach with --map never")]
    NoProgram(io::Error),
    /// It took too long.
    #[error("dmsetup {command} has not ended within {} s", LIMIT.as_secs())]
    TimedOut {
        /// What it was to do.
        command: String,
    },
    /// It says no.
    #[error("dmsetup {command}: {said}")]
    Refused {
        /// What it was to do.
        command: String,
        /// What it said.
        said: String,
    },
}

/// The mapped device of one attachment of a volume.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// Of the identifiers of all the volume's devices.
    volume_prefix: String,
    /// Of the names of those that went while somebody used them.
    gone_prefix: String,
    uuid: String,
    name: String,
}

/// A device as `dmsetup` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    name: String,
    uuid: String,
    /// Of its number, and the N of its name, `dm-N` (`drivers/md/dm.c`). It has that name only once it has a table.
    minor: String,
}

/// Whether a ublk device is one under a mapping.
#[must_use]
pub const fn is_below(params: &sys::ublk_params) -> bool {
    params.basic.dev_sectors == SECTORS_BELOW
}

/// Whether there can be mapped devices here.
///
/// # Errors
/// Why not.
pub fn check() -> Result<(), MappingError> {
    dmsetup(&["targets", "--target", "linear"]).map(drop)
}

impl Mapping {
    /// Of the attachment that a target is told to serve.
    #[must_use]
    pub fn new(config: &TargetConfig) -> Self {
        let volume_prefix = format!("{PREFIX}{}-", config.volume);
        let uuid = format!("{volume_prefix}{}", config.attachment.get());
        let gone_prefix = format!("{GONE}{}-", config.volume);
        Self { volume_prefix, gone_prefix, uuid, name: format!("carrick-{}", config.name) }
    }

    /// Its name for the device mapper and for udev.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is, if it is there.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn find(&self) -> Result<Option<PathBuf>, MappingError> {
        Ok(self.listed()?.into_iter().find(|there| there.uuid == self.uuid).map(|there| there.path()))
    }

    /// Makes the device, or makes it as large as the volume. `disk` is the ublk disk.
    ///
    /// # Errors
    /// [`MappingError`]. What was there is as it was.
    pub fn fit(&self, disk: &Path, size: VolumeSize) -> Result<PathBuf, MappingError> {
        let (ours, old): (Vec<_>, Vec<_>) = self.listed()?.into_iter().partition(|there| there.uuid == self.uuid);
        // Of an attachment that was ended by force while somebody used it.
        old.iter().try_for_each(Self::retire_listed)?;
        let device = match ours.first() {
            Some(there) => there.path(),
            None => {
                dmsetup(&["create", &self.name, "--uuid", &self.uuid, "--notable"])?;
                let gone = || MappingError::Refused { command: "ls".into(), said: format!("{} is gone again", self.name) };
                self.find()?.ok_or_else(gone)?
            }
        };
        let number = std::fs::read_to_string(sysfs::block_folder(disk).join("dev")).map_err(MappingError::NoProgram)?;
        let table = table(number.trim(), size);
        if dmsetup(&["table", "--uuid", &self.uuid])?.trim() != table {
            dmsetup(&["load", "--uuid", &self.uuid, "--table", &table])?;
            // Takes the place of the old table: the kernel holds new requests back and waits for those under way. File systems
            // needn't be quiet for that, and freezing one would wait for all that it has to write.
            dmsetup(&["resume", "--nolockfs", "--uuid", &self.uuid])?;
        }
        Ok(device)
    }

    /// Removes the device if nobody has it open.
    ///
    /// # Errors
    /// [`MappingError`]; refused if it is open.
    pub fn remove(&self) -> Result<(), MappingError> {
        self.find()?.map_or(Ok(()), |_| dmsetup(&["remove", "--uuid", &self.uuid]).map(drop))
    }

    /// Cuts all devices of the volume off from their disks, and removes them as soon as nobody has them open. Whoever has gets errors.
    /// Requests under way are waited for.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn retire(&self) -> Result<(), MappingError> {
        self.listed()?.iter().try_for_each(Self::retire_listed)
    }

    fn retire_listed(there: &Listed) -> Result<(), MappingError> {
        // By name: some of these commands know no other way.
        if dmsetup(&["remove", &there.name]).is_ok() {
            return Ok(());
        }
        dmsetup(&["wipe_table", "--nolockfs", &there.name])?;
        // The name is for the next attachment.
        let gone = format!("{GONE}{}", there.uuid.trim_start_matches(PREFIX));
        if there.name != gone {
            dmsetup(&["rename", &there.name, &gone])?;
        }
        dmsetup(&["remove", "--deferred", &gone]).map(drop)
    }

    /// All that there are of the volume.
    fn listed(&self) -> Result<Vec<Listed>, MappingError> {
        let mut found = Vec::new();
        for (name, minor) in names()?.into_iter().filter(|(name, _)| *name == self.name || name.starts_with(&self.gone_prefix)) {
            match dmsetup(&["info", "--columns", "--noheadings", "-o", "uuid", &name]) {
                Ok(uuid) => found.push(Listed { name, uuid: uuid.trim().to_owned(), minor }),
                // It went in between.
                Err(_) if !names()?.iter().any(|(there, _)| *there == name) => {}
                Err(error) => return Err(error),
            }
        }
        // Others may call theirs so, too.
        found.retain(|there| there.uuid.starts_with(&self.volume_prefix));
        Ok(found)
    }
}

impl Listed {
    fn path(&self) -> PathBuf {
        // The kernel's own name: it is there whatever udev does.
        PathBuf::from(format!("/dev/dm-{}", self.minor))
    }
}

/// Names and minor numbers of all mapped devices. One question to the kernel: others' devices come and go meanwhile.
fn names() -> Result<Vec<(String, String)>, MappingError> {
    Ok(dmsetup(&["ls"])?.lines().filter_map(read_name).collect())
}

/// From `NAME\t(252:3)`, or, by old ones, `NAME\t(252, 3)`.
fn read_name(line: &str) -> Option<(String, String)> {
    let (name, number) = line.split_once('\t')?;
    let minor = number.trim().strip_prefix('(')?.strip_suffix(')')?.rsplit([':', ',']).next()?.trim();
    minor.bytes().all(|byte| byte.is_ascii_digit()).then(|| (name.to_owned(), minor.to_owned()))
}

fn table(disk_number: &str, size: VolumeSize) -> String {
    format!("0 {} linear {disk_number} 0", size.bytes().get() / SECTOR)
}

fn dmsetup(arguments: &[&str]) -> Result<String, MappingError> {
    let command = arguments.join(" ");
    tracing::debug!(command, "dmsetup");
    // Left alone, one that was to remove a device by its name might remove the next target's.
    let mut child = child::tied("dmsetup")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(MappingError::NoProgram)?;
    let readers = (read_all(child.stdout.take()), read_all(child.stderr.take()));
    let Some(status) = child::wait(&mut child, LIMIT).map_err(MappingError::NoProgram)? else {
        child.kill().map_err(MappingError::NoProgram)?;
        // The readers end with it.
        child::wait(&mut child, KILL_LIMIT).map_err(MappingError::NoProgram)?;
        return Err(MappingError::TimedOut { command });
    };
    let said = readers.0.join().unwrap_or_default();
    let complaint = readers.1.join().unwrap_or_default();
    if status.success() {
        return Ok(said);
    }
    if status.code() == Some(child::NO_PROGRAM.into()) {
        return Err(MappingError::NoProgram(io::ErrorKind::NotFound.into()));
    }
    let complaint = complaint.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    Err(MappingError::Refused { command, said: if complaint.is_empty() { status.to_string() } else { complaint } })
}

fn read_all(source: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = Vec::new();
        // What can't be read isn't told.
        let _ = source.map(|source| source.take(OUTPUT_MAX).read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_all_versions_print_them() {
        for line in ["carrick-vm1\t(252:4)", "carrick-vm1\t(252, 4)"] {
            assert_eq!(read_name(line), Some(("carrick-vm1".into(), "4".into())));
        }
        for line in ["No devices found", "", "carrick-vm1\t", "carrick-vm1\t(252:x)"] {
            assert_eq!(read_name(line), None, "{line}");
        }
    }

    #[test]
    fn a_table_shows_as_much_as_the_volume_has() {
        assert_eq!(table("259:3", VolumeSize::new(1 << 20).unwrap()), "0 2048 linear 259:3 0");
        assert!(SECTORS_BELOW > VolumeSize::new(VOLUME_SIZE_MAX).unwrap().bytes().get() / SECTOR);
    }

    #[test]
    fn a_refusal_says_what_was_to_be_done() {
        let error = MappingError::Refused { command: "remove --uuid X".into(), said: "Device or resource busy".into() };
        assert_eq!(error.to_string(), "dmsetup remove --uuid X: Device or resource busy");
    }
}
