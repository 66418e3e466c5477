//! What sysfs says of ublk devices, and what it is told.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::plan::DeviceId;

/// Attributes of a new or recovered disk's queue, with their reasons.
const QUEUE: [(&str, &str); 3] = [
    // There is one queue, and what is behind it orders by itself.
    ("scheduler", "none"),
    // Milliseconds. A live server's requests never time out, but before Linux 6.15 a dead one's end is noticed only by this
    // timer when every request of the queue was with it; 30 s is the default.
    ("io_timeout", "2000"),
    // The pages of a write must not change between its checksum and its end.
    ("stable_writes", "1"),
];

/// Name of the block device.
#[must_use]
pub fn disk_name(id: DeviceId) -> String {
    format!("ublkb{}", id.0)
}

/// Path of the block device.
#[must_use]
pub fn disk_path(id: DeviceId) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{}", id.0))
}

/// Path of the character device.
#[must_use]
pub fn character_path(id: DeviceId) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{}", id.0))
}

/// What sysfs has of a disk, by its path under `/dev`.
#[must_use]
pub fn block_folder(disk: &Path) -> PathBuf {
    Path::new("/sys/block").join(disk.file_name().unwrap_or_default())
}

/// Sectors of a disk.
///
/// # Errors
/// Of reading the attribute.
pub fn sectors(disk: &Path) -> io::Result<u64> {
    fs::read_to_string(block_folder(disk).join("size"))?.trim().parse().map_err(io::Error::other)
}

/// The devices that there are, in order.
///
/// # Errors
/// Of reading the folder.
pub fn devices(class: &Path) -> io::Result<Vec<DeviceId>> {
    let mut found = Vec::new();
    match fs::read_dir(class) {
        Ok(entries) => {
            for entry in entries {
                let name = entry?.file_name();
                let number = name.to_str().and_then(|name| name.strip_prefix("ublkc")).and_then(|number| number.parse().ok());
                found.extend(number.map(DeviceId));
            }
        }
        // The class comes with the first device.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    found.sort_unstable();
    Ok(found)
}

/// Sets the disk's queue up. What the kernel refuses is logged: the disk works without.
pub fn set_queue(disk: &Path) {
    for (name, value) in QUEUE {
        let path = disk.join("queue").join(name);
        // Some of these stop the queue for a moment, even if nothing changes: a recovered disk is full of waiting requests.
        if fs::read_to_string(&path).is_ok_and(|now| is_set(&now, value)) {
            continue;
        }
        if let Err(error) = fs::write(&path, value) {
            tracing::warn!(%error, attribute = %path.display(), value, "can't set an attribute of the disk");
        }
    }
}

/// Attributes with a choice list all values, the chosen one in brackets.
fn is_set(now: &str, value: &str) -> bool {
    let now = now.trim();
    now == value || now.split_whitespace().any(|word| word.strip_prefix('[').and_then(|word| word.strip_suffix(']')) == Some(value))
}

/// Lets udev look at the disk again.
pub fn announce_change(disk: &Path) {
    if let Err(error) = fs::write(disk.join("uevent"), "change") {
        tracing::warn!(%error, disk = %disk.display(), "can't tell udev of the disk");
    }
}

/// A disk and its partitions: folder in sysfs, and device number as sysfs writes it (`259:3`).
///
/// # Errors
/// Of reading the folder.
pub fn disk_and_partitions(disk: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let mut found = vec![(disk.to_owned(), fs::read_to_string(disk.join("dev"))?.trim().to_owned())];
    for entry in fs::read_dir(disk)? {
        let folder = entry?.path();
        if folder.join("partition").exists() {
            found.push((folder.clone(), fs::read_to_string(folder.join("dev"))?.trim().to_owned()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_by_name() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(devices(&folder.path().join("absent")).unwrap(), []);
        for name in ["ublkc11", "ublkc2", "ublkb1", "ublkcx", "other"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        assert_eq!(devices(folder.path()).unwrap(), [DeviceId(2), DeviceId(11)]);
    }

    #[test]
    fn attributes_that_are_right_are_left_alone() {
        assert!(is_set("[none] mq-deadline\n", "none"));
        assert!(!is_set("none [mq-deadline]\n", "none"));
        assert!(is_set("none\n", "none"));
        assert!(is_set("2000\n", "2000"));
        assert!(!is_set("30000\n", "2000"));
    }

    #[test]
    fn the_queue_is_set_up_once() {
        let disk = tempfile::tempdir().unwrap();
        fs::create_dir(disk.path().join("queue")).unwrap();
        for (name, value) in [("scheduler", "[none] mq-deadline\n"), ("io_timeout", "30000\n"), ("stable_writes", "0\n")] {
            fs::write(disk.path().join("queue").join(name), value).unwrap();
        }
        set_queue(disk.path());
        let read = |name: &str| fs::read_to_string(disk.path().join("queue").join(name)).unwrap();
        assert_eq!((read("scheduler").as_str(), read("io_timeout").as_str()), ("[none] mq-deadline\n", "2000"));
        assert_eq!(read("stable_writes"), "1");
    }

    #[test]
    fn partitions_belong_to_their_disk() {
        let disk = tempfile::tempdir().unwrap();
        fs::write(disk.path().join("dev"), "259:0\n").unwrap();
        for folder in ["queue", "ublkb0p1"] {
            fs::create_dir(disk.path().join(folder)).unwrap();
        }
        fs::write(disk.path().join("ublkb0p1/partition"), "1\n").unwrap();
        fs::write(disk.path().join("ublkb0p1/dev"), "259:1\n").unwrap();
        let found: Vec<String> = disk_and_partitions(disk.path()).unwrap().into_iter().map(|(_, number)| number).collect();
        assert_eq!(found, ["259:0", "259:1"]);
    }
}
