//! Commands to the ublk driver, on a ring of their own, each with a time limit.
//!
//! Why not `libublk`'s `UblkCtrl`: START_DEV and END_USER_RECOVERY are only in its `start_dev`, which needs its `UblkDev`, and
//! that opens the character device, which the driver lets only one opener have; it says "busy" as a success, sends each
//! failed command a second time in its old encoding, and waits without a limit. Its bindings of the kernel's
//! header are used here; the commands themselves are one structure in a ring entry.
//!
//! A command that doesn't end in time leaves its buffer to the kernel, which may still write to it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::str::FromStr;
use std::time::{Duration, Instant};

use io_uring::squeue::Entry128;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, types};
use libublk_rs_sys as sys;

use crate::features::Features;
use crate::plan::DeviceId;

/// The driver's own device.
pub const CONTROL_PATH: &str = "/dev/ublk-control";

/// Commands that only read or note something down.
const QUICK: Duration = Duration::from_secs(10);
/// A kernel bug (Linux 6.18.4) made ADD_DEV hang for ever; a good one takes milliseconds even on a busy machine.
const ADD: Duration = Duration::from_secs(30);
/// For commands that nobody waits for any more: longer than any machine is up without news.
const FOR_GOOD: Duration = Duration::from_secs(100 * 365 * 86_400);
/// Commands at once: one, and what has timed out before.
const ENTRIES: u32 = 8;

/// No queue in particular.
const NO_QUEUE: u16 = u16::MAX;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[error("{command}{}: {cause}", .device.map(|id| format!(" of /dev/ublkb{}", id.0)).unwrap_or_default())]
pub struct DriverError {
    /// The driver's name of it.
    pub command: &'static str,
    /// To which device.
    pub device: Option<DeviceId>,
    /// Why.
    #[source]
    pub cause: Cause,
}

/// What went wrong with a command.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The driver's answer.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// No answer. It may still come to an end, or never.
    #[error("the driver has not answered within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// The command could not be sent.
    #[error("{0}")]
    Ring(io::Error),
}

impl DriverError {
    /// The driver's errno.
    #[must_use]
    pub const fn errno(&self) -> Option<i32> {
        match self.cause {
            Cause::Errno(errno) => Some(errno),
            Cause::TimedOut(_) | Cause::Ring(_) => None,
        }
    }

    /// Whether the driver didn't answer.
    #[must_use]
    pub const fn is_timeout(&self) -> bool {
        matches!(self.cause, Cause::TimedOut(_))
    }
}

/// Commands that wait for requests to end, which this process may serve: [`crate::errand`] sends them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Make the disk, and read its partitions. Every FETCH must be at the driver.
    Start,
    /// Remove the disk. Whoever has it open gets errors from then on.
    Stop,
    /// The same, but `EBUSY` if somebody has it open. Only where SAFE_STOP_DEV is offered.
    StopIfUnused,
}

impl Errand {
    const fn command(self) -> (&'static str, u32) {
        match self {
            Self::Start => ("START_DEV", sys::UBLK_U_CMD_START_DEV),
            Self::Stop => ("STOP_DEV", sys::UBLK_U_CMD_STOP_DEV),
            Self::StopIfUnused => ("TRY_STOP_DEV", sys::UBLK_U_CMD_TRY_STOP_DEV),
        }
    }

    /// The driver's name of it.
    pub(crate) const fn name(self) -> &'static str {
        self.command().0
    }

    /// The error that it has failed with.
    pub(crate) const fn failed(self, device: DeviceId, cause: Cause) -> DriverError {
        DriverError { command: self.name(), device: Some(device), cause }
    }
}

impl FromStr for Errand {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Start, Self::Stop, Self::StopIfUnused];
        all.into_iter().find(|errand| errand.name() == text).ok_or_else(|| format!("{text:?} is no errand"))
    }
}

#[derive(Clone, Copy)]
struct Command {
    name: &'static str,
    operation: u32,
    device: Option<DeviceId>,
    data: u64,
    limit: Duration,
}

/// A command that is under way.
struct Pending {
    name: &'static str,
    device: Option<DeviceId>,
    token: u64,
    begun: Instant,
}

/// The driver. Used on the thread that made it.
pub struct Driver {
    control: File,
    ring: IoUring<Entry128, cqueue::Entry>,
    next_token: u64,
}

impl Driver {
    /// Opens it.
    ///
    /// # Errors
    /// The kernel's: no `/dev/ublk-control`, no ring.
    pub fn open() -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL_PATH)?;
        Ok(Self { control, ring: IoUring::builder().build(ENTRIES)?, next_token: 0 })
    }

    /// What it can do.
    ///
    /// # Errors
    /// [`DriverError`]; `EINVAL` or `EOPNOTSUPP` before Linux 6.5.
    pub fn features(&mut self) -> Result<Features, DriverError> {
        let bits = self.call_with(command("GET_FEATURES", sys::UBLK_U_CMD_GET_FEATURES, None, QUICK), 0_u64)?;
        Ok(Features::new(bits))
    }

    /// Makes a character device with one queue. Gives the device as the driver made it.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn add(&mut self, depth: u16, flags: u64, mark: u64) -> Result<sys::ublksrv_ctrl_dev_info, DriverError> {
        let info = sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: 1,
            queue_depth: depth,
            max_io_buf_bytes: crate::params::IO_BYTES_MAX,
            // The driver chooses.
            dev_id: u32::MAX,
            ublksrv_pid: process_id(),
            flags,
            ublksrv_flags: mark,
            ..Default::default()
        };
        self.call_with(command("ADD_DEV", sys::UBLK_U_CMD_ADD_DEV, None, ADD), info)
    }

    /// How a device stands.
    ///
    /// # Errors
    /// [`DriverError`]; `ENODEV` if it is not there.
    pub fn info(&mut self, id: DeviceId) -> Result<sys::ublksrv_ctrl_dev_info, DriverError> {
        // Not GET_DEV_INFO2: that one only adds a path by which other users' devices can be asked for, and ours are root's.
        let command = command("GET_DEV_INFO", sys::UBLK_U_CMD_GET_DEV_INFO, Some(id), QUICK);
        self.call_with(command, sys::ublksrv_ctrl_dev_info::default())
    }

    /// Sets the parameters of a device that is not started.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn set_params(&mut self, id: DeviceId, params: sys::ublk_params) -> Result<(), DriverError> {
        self.call_with(command("SET_PARAMS", sys::UBLK_U_CMD_SET_PARAMS, Some(id), QUICK), params).map(drop)
    }

    /// A device's parameters.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn params(&mut self, id: DeviceId) -> Result<sys::ublk_params, DriverError> {
        let empty = sys::ublk_params { len: size_of::<sys::ublk_params>() as u32, ..Default::default() };
        self.call_with(command("GET_PARAMS", sys::UBLK_U_CMD_GET_PARAMS, Some(id), QUICK), empty)
    }

    /// Makes the disk of a guest, whose partitions nobody reads, so that it waits for no request. Every FETCH must be at the driver.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn start(&mut self, id: DeviceId, limit: Duration) -> Result<(), DriverError> {
        // The driver checks that this process has the character device open.
        self.call(Command { data: own_process(), ..command("START_DEV", sys::UBLK_U_CMD_START_DEV, Some(id), limit) })
    }

    /// Does what another process, the `server` of the device, wants done, however long that takes.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn run(&mut self, errand: Errand, id: DeviceId, server: u32) -> Result<(), DriverError> {
        let (name, operation) = errand.command();
        self.call(Command { data: server.into(), ..command(name, operation, Some(id), FOR_GOOD) })
    }

    /// Prepares a device for a new server.
    ///
    /// # Errors
    /// [`DriverError`]; `EBUSY` while the old server is there, `EINVAL` if this was done before and not finished.
    pub fn start_recovery(&mut self, id: DeviceId) -> Result<(), DriverError> {
        self.call(command("START_USER_RECOVERY", sys::UBLK_U_CMD_START_USER_RECOVERY, Some(id), QUICK))
    }

    /// Gives the disk to the new server. Every FETCH must be at the driver.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn end_recovery(&mut self, id: DeviceId) -> Result<(), DriverError> {
        let command = command("END_USER_RECOVERY", sys::UBLK_U_CMD_END_USER_RECOVERY, Some(id), QUICK);
        self.call(Command { data: own_process(), ..command })
    }

    /// Gives the disk of a started device another size. From Linux 6.16 on, where the driver takes any size: a smaller one cuts the disk
    /// off, and without a disk it crashes before 7.0.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn update_size(&mut self, id: DeviceId, sectors: u64) -> Result<(), DriverError> {
        self.call(Command { data: sectors, ..command("UPDATE_SIZE", sys::UBLK_U_CMD_UPDATE_SIZE, Some(id), QUICK) })
    }

    /// Deletes a stopped device. Its number is free again when its last user, an opener of the disk perhaps, has gone.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn delete(&mut self, id: DeviceId) -> Result<(), DriverError> {
        match self.call(command("DEL_DEV_ASYNC", sys::UBLK_U_CMD_DEL_DEV_ASYNC, Some(id), QUICK)) {
            // Before Linux 6.9 there is only the command that waits for the last user.
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => {
                self.call(command("DEL_DEV", sys::UBLK_U_CMD_DEL_DEV, Some(id), QUICK))
            }
            deleted => deleted,
        }
    }

    fn finish(&mut self, pending: &Pending, limit: Duration) -> Result<(), DriverError> {
        let failed = |cause| DriverError { command: pending.name, device: pending.device, cause };
        loop {
            // Answers to commands that were given up come late, and nobody wants them.
            let answer = self.ring.completion().find(|entry| entry.user_data() == pending.token).map(|entry| entry.result());
            match answer {
                Some(errno) if errno < 0 => return Err(failed(Cause::Errno(errno.saturating_neg()))),
                Some(_) => return Ok(()),
                None => {}
            }
            let left = limit.saturating_sub(pending.begun.elapsed());
            if left.is_zero() {
                return Err(failed(Cause::TimedOut(limit)));
            }
            let timespec = Timespec::from(left);
            match self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec)) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {}
                Err(error) => return Err(failed(Cause::Ring(error))),
            }
        }
    }

    fn call(&mut self, command: Command) -> Result<(), DriverError> {
        let pending = self.begin(command, 0, 0)?;
        self.finish(&pending, command.limit)
    }

    /// Sends a command with a structure of the driver's header, which holds the answer afterwards.
    fn call_with<T: Payload>(&mut self, command: Command, payload: T) -> Result<T, DriverError> {
        let payload = Box::into_raw(Box::new(payload));
        let result = match self.begin(command, payload as u64, size_of::<T>() as u16) {
            Ok(pending) => self.finish(&pending, command.limit),
            Err(error) => Err(error),
        };
        if result.as_ref().is_err_and(|error| error.errno().is_none()) {
            // The driver has not answered and may still write there: the memory is never used again.
            return result.map(|()| T::default());
        }
        // SAFETY: made by `into_raw` above, and the command that knew of it has ended. Any bytes are a valid `T`.
        let payload = unsafe { Box::from_raw(payload) };
        result.map(|()| *payload)
    }

    fn begin(&mut self, command: Command, address: u64, length: u16) -> Result<Pending, DriverError> {
        let failed = |error| DriverError { command: command.name, device: command.device, cause: Cause::Ring(error) };
        // struct ublksrv_ctrl_cmd at the start of the entry's 80 bytes.
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&command.device.map_or(u32::MAX, |id| id.0).to_ne_bytes());
        bytes[4..6].copy_from_slice(&NO_QUEUE.to_ne_bytes());
        bytes[6..8].copy_from_slice(&length.to_ne_bytes());
        bytes[8..16].copy_from_slice(&address.to_ne_bytes());
        bytes[16..24].copy_from_slice(&command.data.to_ne_bytes());
        let token = self.next_token;
        self.next_token += 1;
        let entry = opcode::UringCmd80::new(types::Fd(self.control.as_raw_fd()), command.operation).cmd(bytes).build();
        // SAFETY: what the address points to is kept until the command's end, or for ever, by `call_with`.
        unsafe { self.ring.submission().push(&entry.user_data(token)) }
            .map_err(|_| failed(io::Error::other("the ring is full of commands without an answer")))?;
        self.ring.submit().map_err(failed)?;
        Ok(Pending { name: command.name, device: command.device, token, begun: Instant::now() })
    }
}

/// Structures of integers only, for which any bytes are valid.
trait Payload: Copy + Default {}
impl Payload for u64 {}
impl Payload for sys::ublksrv_ctrl_dev_info {}
impl Payload for sys::ublk_params {}

const fn command(name: &'static str, operation: u32, device: Option<DeviceId>, limit: Duration) -> Command {
    Command { name, operation, device, data: 0, limit }
}

fn process_id() -> i32 {
    std::process::id().cast_signed()
}

fn own_process() -> u64 {
    std::process::id().into()
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_command_is_laid_out_as_in_the_header() {
        use sys::ublksrv_ctrl_cmd as Header;
        let offsets = [
            offset_of!(Header, dev_id),
            offset_of!(Header, queue_id),
            offset_of!(Header, len),
            offset_of!(Header, addr),
            offset_of!(Header, data),
        ];
        assert_eq!(offsets, [0, 4, 6, 8, 16]);
        use sys::ublksrv_io_cmd as Io;
        assert_eq!([offset_of!(Io, q_id), offset_of!(Io, tag), offset_of!(Io, result), size_of::<Io>()], [0, 2, 4, 16]);
    }

    #[test]
    fn errors_name_the_command_the_device_and_the_cause() {
        let device = Some(DeviceId(4));
        let error = DriverError { command: "ADD_DEV", device: None, cause: Cause::TimedOut(ADD) };
        assert_eq!(error.to_string(), "ADD_DEV: the driver has not answered within 30 s");
        let error = DriverError { command: "START_DEV", device, cause: Cause::Errno(libc::EEXIST) };
        assert_eq!(error.to_string(), "START_DEV of /dev/ublkb4: File exists (os error 17)");
        assert_eq!(error.errno(), Some(libc::EEXIST));
    }
}
