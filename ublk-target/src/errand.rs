//! Commands to the driver that wait for requests, sent by a process of its own.
//!
//! STOP_DEV and START_DEV wait for requests that this process serves, in a thread of the kernel's that no signal ends. If this process were
//! killed meanwhile, its end would wait for that thread, the thread for the requests, and the requests for the end of this process, by
//! which the driver learns that nobody serves them: for ever. A process that serves nothing may be killed, and so may we: then the driver
//! ends the requests, and the errand is done.

use std::io::{self, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::child;
use crate::driver::{Cause, Driver, DriverError, Errand};
use crate::plan::DeviceId;

/// The exit code of an errand that the driver refused; its errno is the output.
const REFUSED: u8 = 3;

/// An errand that is under way.
#[derive(Debug)]
pub struct Pending {
    child: Child,
    errand: Errand,
    device: DeviceId,
    begun: Instant,
}

/// Sends a process on an errand.
///
/// # Errors
/// There can be no such process.
pub fn begin(errand: Errand, device: DeviceId) -> Result<Pending, DriverError> {
    let begun = Instant::now();
    let mut command = Command::new(child::OWN_PROGRAM);
    command.arg("errand").arg(errand.name()).arg(device.0.to_string()).arg(std::process::id().to_string());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let child = child.map_err(|error| errand.failed(device, Cause::Ring(error)))?;
    Ok(Pending { child, errand, device, begun })
}

impl Pending {
    /// Waits for the end, at most until `limit` after it began. After a timeout it may be waited for again.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn finish(&mut self, limit: Duration) -> Result<(), DriverError> {
        let failed = |cause| self.errand.failed(self.device, cause);
        let left = limit.saturating_sub(self.begun.elapsed());
        let status = child::wait(&mut self.child, left).map_err(|error| failed(Cause::Ring(error)))?;
        let Some(status) = status else { return Err(failed(Cause::TimedOut(limit))) };
        let mut said = String::new();
        let read = self.child.stdout.take().map(|mut output| output.read_to_string(&mut said));
        match (status.code(), said.trim().parse()) {
            (Some(0), _) => Ok(()),
            (Some(code), Ok(errno)) if code == i32::from(REFUSED) => Err(failed(Cause::Errno(errno))),
            _ => Err(failed(Cause::Ring(io::Error::other(format!("the process that was to send it ended with {status} ({read:?})"))))),
        }
    }
}

/// What such a process does. Gives its exit code.
///
/// # Errors
/// Nothing was sent.
pub fn run(errand: Errand, device: DeviceId, server: u32) -> Result<u8, DriverError> {
    let no_driver = |error| errand.failed(device, Cause::Ring(error));
    match Driver::open().map_err(no_driver)?.run(errand, device, server) {
        Ok(()) => Ok(0),
        Err(DriverError { cause: Cause::Errno(errno), .. }) => {
            println!("{errno}");
            Ok(REFUSED)
        }
        Err(error) => Err(error),
    }
}
