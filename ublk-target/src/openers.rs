//! Who uses a disk: nobody's data is to be cut off unless they said so.
//!
//! No interface of the kernel names the users of a block device, so three are asked: claims (mounts, swap, the device
//! mapper) refuse an exclusive open, holders are in sysfs, and plain openers (a virtual machine) have a descriptor in `/proc`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, StatxFlags};

use crate::sysfs;

/// Most users that a message names.
const NAMED_MAX: usize = 5;

/// What was found.
#[derive(Debug)]
pub enum Usage {
    /// Nobody. The file, if there is one, is an exclusive open, which keeps mounts and the like off until it is closed.
    Unused(Option<File>),
    /// These, in words.
    UsedBy(Vec<String>),
}

/// Looks for users of a disk.
///
/// # Errors
/// Of looking.
pub fn look(node: &Path, disk: &Path) -> io::Result<Usage> {
    let devices = match sysfs::disk_and_partitions(disk) {
        // There is no disk, so nobody uses it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Usage::Unused(None)),
        devices => devices?,
    };
    let mut users = Vec::new();
    for (folder, number) in &devices {
        users.extend(holders(folder)?);
        users.extend(mounts(number)?);
    }
    users.extend(processes(Path::new("/proc"), &devices.iter().filter_map(|(_, number)| parse_number(number)).collect::<Vec<_>>()));
    // Last, so that this process isn't among the openers.
    let mut exclusive = None;
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(node) {
        Ok(file) => exclusive = Some(file),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            if users.is_empty() {
                users.push("it is claimed inside the kernel (swap, RAID, a mount of another namespace)".to_owned());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    if users.is_empty() {
        return Ok(Usage::Unused(exclusive));
    }
    let more = users.len().saturating_sub(NAMED_MAX);
    users.truncate(NAMED_MAX);
    if more > 0 {
        users.push(format!("{more} more"));
    }
    Ok(Usage::UsedBy(users))
}

/// Whether a process has this character or block device open.
#[must_use]
pub fn process_has_open(process: u32, device: &Path) -> bool {
    let Ok(stat) = rustix::fs::stat(device) else { return false };
    let number = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    has_open(&Path::new("/proc").join(process.to_string()), FileType::from_raw_mode(stat.st_mode), &[number])
}

fn holders(folder: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(folder.join("holders")) {
        Ok(entries) => entries.map(|entry| Ok(format!("{} is on top of it", entry?.file_name().display()))).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn mounts(number: &str) -> io::Result<Vec<String>> {
    // Fields: mount id, parent, device number, root, mount point, and more.
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(2);
        (fields.next() == Some(number)).then(|| fields.nth(1)).flatten()
    });
    Ok(points.map(|point| format!("it is mounted at {point}")).collect())
}

fn parse_number(number: &str) -> Option<(u32, u32)> {
    let (major, minor) = number.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn processes(proc: &Path, numbers: &[(u32, u32)]) -> Vec<String> {
    let Ok(entries) = fs::read_dir(proc) else { return Vec::new() };
    let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let ids = folders.filter_map(|folder| Some((folder.file_name()?.to_str()?.parse::<u32>().ok()?, folder.clone())));
    // A process may end while it is looked at: then it uses nothing.
    ids.filter(|(_, folder)| has_open(folder, FileType::BlockDevice, numbers))
        .map(|(id, folder)| {
            let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            format!("{} (process {id}) has it open", name.trim())
        })
        .collect()
}

fn has_open(process: &Path, kind: FileType, numbers: &[(u32, u32)]) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        // No synchronisation: a file on a network file system that hangs must not hang this process.
        let flags = AtFlags::STATX_DONT_SYNC;
        rustix::fs::statx(rustix::fs::CWD, descriptor.path(), flags, StatxFlags::TYPE).is_ok_and(|stat| {
            FileType::from_raw_mode(stat.stx_mode.into()) == kind && numbers.contains(&(stat.stx_rdev_major, stat.stx_rdev_minor))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_device_is_seen_in_its_process_only() {
        let null = File::open("/dev/null").unwrap();
        assert!(process_has_open(std::process::id(), Path::new("/dev/null")));
        assert!(!process_has_open(std::process::id(), Path::new("/dev/full")));
        assert!(!process_has_open(u32::MAX, Path::new("/dev/null")));
        assert!(!process_has_open(std::process::id(), Path::new("/dev/absent")));
        drop(null);
    }

    #[test]
    fn mounts_are_found_by_device_number() {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line: Vec<&str> = table.lines().next().unwrap().split(' ').collect();
        assert!(mounts(line[2]).unwrap().contains(&format!("it is mounted at {}", line[4])));
        assert_eq!(mounts("4095:1048575").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_disk_that_is_gone_is_unused() {
        assert!(matches!(look(Path::new("/dev/absent"), Path::new("/sys/block/absent")).unwrap(), Usage::Unused(None)));
        assert_eq!(parse_number("259:3"), Some((259, 3)));
    }
}
