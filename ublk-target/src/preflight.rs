//! What must be true of the machine, each with one sentence that says what to do if it isn't.

use std::fs;
use std::io;
use std::path::Path;

use carrick_replicator::control::{ControlError, ControlErrorCode};

use crate::driver::{CONTROL_PATH, Driver};
use crate::features::Features;

const URING_SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

/// Opens the driver and asks what it can do.
///
/// # Errors
/// In one sentence, what is missing.
pub fn open_driver() -> Result<(Driver, Features), ControlError> {
    if !rustix::process::geteuid().is_root() {
        return Err(unsupported("a target must run as root: only root may make block devices".to_owned()));
    }
    check_uring(Path::new(URING_SWITCH))?;
    let mut driver = Driver::open().map_err(|error| unsupported(explain_open(&error)))?;
    let features = driver.features().map_err(|error| match error.errno() {
        Some(libc::EINVAL | libc::EOPNOTSUPP) => unsupported(format!(
            "this kernel's ublk driver is too old to say what it can do ({error}): boot Linux 6.5 or newer (Debian 13 or newer has one)"
        )),
        _ => unsupported(format!("the ublk driver can't be asked what it can do: {error}")),
    })?;
    Ok((driver, features))
}

/// 0 allows io_uring to all, 1 to the privileged, 2 to nobody. Kernels before 6.6 have no such file.
fn check_uring(switch: &Path) -> Result<(), ControlError> {
    match fs::read_to_string(switch) {
        Ok(value) if value.trim() == "2" => Err(unsupported(
            "io_uring is switched off on this host: run 'sysctl kernel.io_uring_disabled=1', which allows it to root".to_owned(),
        )),
        _ => Ok(()),
    }
}

fn explain_open(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => format!(
            "there is no {CONTROL_PATH}: run 'modprobe ublk_drv'; if there is no such module, boot Linux 6.5 or newer with \
             CONFIG_BLK_DEV_UBLK (Debian 13 or newer has one)"
        ),
        Some(libc::ENOSYS | libc::EPERM) => carrick_replicator::io::ring_unavailable(error),
        _ => format!("can't open {CONTROL_PATH}: {error}"),
    }
}

fn unsupported(message: String) -> ControlError {
    ControlError { code: ControlErrorCode::Unsupported, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_forbids_io_uring_is_told_how_to_allow_it() {
        let folder = tempfile::tempdir().unwrap();
        let switch = folder.path().join("io_uring_disabled");
        assert_eq!(check_uring(&switch), Ok(()), "an older kernel");
        for (value, allowed) in [("0\n", true), ("1\n", true), ("2\n", false)] {
            fs::write(&switch, value).unwrap();
            assert_eq!(check_uring(&switch).is_ok(), allowed);
        }
    }

    #[test]
    fn a_missing_driver_is_told_from_a_broken_one() {
        assert!(explain_open(&io::Error::from_raw_os_error(libc::ENOENT)).contains("modprobe ublk_drv"));
        assert!(explain_open(&io::Error::from_raw_os_error(libc::EACCES)).starts_with("can't open /dev/ublk-control"));
    }
}
