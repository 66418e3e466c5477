//! What the kernel's ublk driver can do, by its own account and never by version number.

use carrick_replicator::control::{ControlError, ControlErrorCode};
use libublk_rs_sys as sys;
use serde::Serialize;

/// Bits of `UBLK_U_CMD_GET_FEATURES`, with the kernel that brought each, for messages.
const NAMES: [(u32, &str, &str); 20] = [
    (sys::UBLK_F_SUPPORT_ZERO_COPY, "SUPPORT_ZERO_COPY", "6.15"),
    (sys::UBLK_F_URING_CMD_COMP_IN_TASK, "URING_CMD_COMP_IN_TASK", "6.0"),
    (sys::UBLK_F_NEED_GET_DATA, "NEED_GET_DATA", "6.0"),
    (sys::UBLK_F_USER_RECOVERY, "USER_RECOVERY", "6.1"),
    (sys::UBLK_F_USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE", "6.1"),
    (sys::UBLK_F_UNPRIVILEGED_DEV, "UNPRIVILEGED_DEV", "6.3"),
    (sys::UBLK_F_CMD_IOCTL_ENCODE, "CMD_IOCTL_ENCODE", "6.4"),
    (sys::UBLK_F_USER_COPY, "USER_COPY", "6.5"),
    (sys::UBLK_F_ZONED, "ZONED", "6.6"),
    (sys::UBLK_F_USER_RECOVERY_FAIL_IO, "USER_RECOVERY_FAIL_IO", "6.13"),
    (sys::UBLK_F_UPDATE_SIZE, "UPDATE_SIZE", "6.16"),
    (sys::UBLK_F_AUTO_BUF_REG, "AUTO_BUF_REG", "6.16"),
    (sys::UBLK_F_QUIESCE, "QUIESCE", "6.16"),
    (sys::UBLK_F_PER_IO_DAEMON, "PER_IO_DAEMON", "6.16"),
    (sys::UBLK_F_BUF_REG_OFF_DAEMON, "BUF_REG_OFF_DAEMON", "6.17"),
    (sys::UBLK_F_BATCH_IO, "BATCH_IO", "7.0"),
    (sys::UBLK_F_INTEGRITY, "INTEGRITY", "7.0"),
    (sys::UBLK_F_SAFE_STOP_DEV, "SAFE_STOP_DEV", "7.0"),
    (sys::UBLK_F_NO_AUTO_PART_SCAN, "NO_AUTO_PART_SCAN", "7.0"),
    (sys::UBLK_F_SHMEM_ZC, "SHMEM_ZC", "7.1"),
];

/// Without these there is no recovery without I/O errors, or no data path.
const REQUIRED: u32 = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE | sys::UBLK_F_CMD_IOCTL_ENCODE | sys::UBLK_F_USER_COPY;

/// The driver's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u64);

/// `carrick-target features`, for programs.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct FeatureReport {
    /// All that the driver says, in hexadecimal.
    pub bits: String,
    /// Those with a name.
    pub features: Vec<&'static str>,
    /// Those that a target needs and this kernel lacks.
    pub missing: Vec<&'static str>,
    /// Whether the size of a device can change while it is open.
    pub update_size: bool,
    /// Whether there can be mapped devices, which don't need that.
    pub maps: bool,
}

impl Features {
    /// From the driver's answer.
    #[must_use]
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// Whether a `UBLK_F_` bit is offered.
    #[must_use]
    pub const fn offers(self, bit: u32) -> bool {
        self.0 & bit as u64 != 0
    }

    /// The flags of a new device.
    #[must_use]
    pub const fn device_flags(self) -> u64 {
        // QUIESCE only allows the command of that name.
        (REQUIRED as u64) | (self.0 & sys::UBLK_F_QUIESCE as u64)
    }

    /// Whether a device with these flags can be served and recovered.
    #[must_use]
    pub const fn are_recoverable(device_flags: u64) -> bool {
        device_flags & REQUIRED as u64 == REQUIRED as u64
    }

    /// Everything, for programs.
    #[must_use]
    pub fn report(self, maps: bool) -> FeatureReport {
        FeatureReport {
            bits: format!("{:#x}", self.0),
            features: NAMES.iter().filter(|(bit, ..)| self.offers(*bit)).map(|(_, name, _)| *name).collect(),
            missing: self.missing().map(|(name, _)| name).collect(),
            update_size: self.grows_online(),
            maps,
        }
    }

    /// Whether the size of a device can change while it is open.
    #[must_use]
    pub const fn grows_online(self) -> bool {
        self.offers(sys::UBLK_F_UPDATE_SIZE)
    }

    /// Refuses a kernel that lacks what a target needs.
    ///
    /// # Errors
    /// Names what is missing.
    pub fn check(self) -> Result<(), ControlError> {
        let missing: Vec<String> = self.missing().map(|(name, since)| format!("{name} (Linux {since})")).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(ControlError {
            code: ControlErrorCode::Unsupported,
            message: format!(
                "this kernel's ublk driver lacks {}: boot Linux 6.5 or newer (Debian 13 or newer has one)",
                missing.join(", ")
            ),
        })
    }

    fn missing(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        NAMES.iter().filter(move |(bit, ..)| REQUIRED & bit != 0 && !self.offers(*bit)).map(|(_, name, since)| (*name, *since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_user_copy_is_refused_by_name() {
        let old = Features::new(u64::from(REQUIRED & !sys::UBLK_F_USER_COPY));
        let error = old.check().unwrap_err();
        assert_eq!(error.code, ControlErrorCode::Unsupported);
        assert!(error.message.contains("lacks USER_COPY (Linux 6.5):"), "{error}");
        assert_eq!(old.report(false).missing, ["USER_COPY"]);
    }

    #[test]
    fn quiesce_is_asked_for_only_where_it_is_offered() {
        let debian_13 = Features::new(u64::from(REQUIRED | sys::UBLK_F_ZONED));
        assert_eq!(debian_13.check(), Ok(()));
        assert_eq!(debian_13.device_flags(), u64::from(REQUIRED));
        assert!(!debian_13.report(false).update_size);
        let newer = Features::new(u64::MAX);
        assert_eq!(newer.device_flags(), u64::from(REQUIRED | sys::UBLK_F_QUIESCE));
        assert_eq!(newer.report(false).features.len(), NAMES.len());
        assert!(Features::are_recoverable(newer.device_flags()));
        assert!(!Features::are_recoverable(u64::from(sys::UBLK_F_USER_RECOVERY)));
    }
}
