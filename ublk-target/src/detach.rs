//! How a device goes: when the volume is detached, or because it was only half made.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use carrick_replicator::control::{ControlError, ControlErrorCode, TargetAnswer, TargetPhase};
use carrick_replicator::io::Reply;

use crate::driver::{DriverError, Errand};
use crate::errand;
use crate::files;
use crate::front::Order;
use crate::mapping;
use crate::openers::{self, Usage};
use crate::plan::{DeviceId, next_step};
use crate::service::{ORDER_LIMIT, Service, failed, refusal};
use crate::sysfs;

/// How long requests under way may take when a device is stopped.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// The same when it is stopped by force: after this they are ended with errors.
const FORCE_AFTER: Duration = Duration::from_secs(3);
/// How long a detach waits for what was acknowledged to be on stable media. A majority's journals have it in any case.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);
/// How long the process's end waits for its last answer to be read.
const FAREWELL: Duration = Duration::from_secs(2);

impl Service {
    /// True if the process is to end.
    pub(crate) fn on_detach(&mut self, force: bool, reply: Reply<TargetAnswer>) -> bool {
        let before = self.progress.get();
        self.progress.set(|step| step.phase = TargetPhase::Stopping);
        // What waits for the limits is to be done, not to fail. If the thread is gone, its word says why.
        let _ = force && self.orders.send(Order::Limit(false));
        match self.detach(force) {
            Ok(()) => {
                tracing::info!(volume = %self.config.volume, force, "detached");
                reply.send(TargetAnswer::Done);
                self.socket.drain(FAREWELL);
                true
            }
            Err(error) => {
                tracing::warn!(%error, force, "not detached");
                // Not the device: its mapping may have been made anew.
                self.progress.set(|step| (step.phase, step.waiting_for) = (before.phase, before.waiting_for));
                let _ = force && self.orders.send(Order::Limit(true));
                reply.send(TargetAnswer::Refused(error));
                false
            }
        }
    }

    fn detach(&mut self, force: bool) -> Result<(), ControlError> {
        let devices = if self.config.tends { Vec::new() } else { self.find()? };
        for device in devices {
            if device.server.is_some_and(|server| server != std::process::id()) {
                return Err(refusal(next_step(&[device])));
            }
            if !force {
                self.stop_unused_mapping(device.id)?;
                if let Err(error) = self.stop_unused(device.id) {
                    // It is used as before, by its mapping too.
                    self.show(device.id)?;
                    return Err(error);
                }
                self.flush();
            }
            self.remove(device.id)?;
        }
        files::remove(&self.config_path);
        files::remove(&self.run.target_control(self.config.volume));
        files::remove_whole(&self.run.target_failure(self.config.volume));
        files::remove(&self.run.target_lock(self.config.volume));
        Ok(())
    }

    /// Removes the mapping in front of a device unless somebody uses it.
    fn stop_unused_mapping(&mut self, id: DeviceId) -> Result<(), ControlError> {
        if !self.is_below(id) {
            return Ok(());
        }
        let Some(path) = self.mapping.find().map_err(failed)? else { return Ok(()) };
        // The kernel doesn't remove one that is open, an exclusive open of this process included.
        drop(exclusive_open(&path)?);
        self.mapping.remove().map_err(|error| match exclusive_open(&path) {
            Err(used) if used.code == ControlErrorCode::Busy => used,
            Ok(_) | Err(_) => failed(error),
        })
    }

    /// Whether a device has, or had, a mapping in front of it. One that doesn't say has none.
    fn is_below(&mut self, id: DeviceId) -> bool {
        self.driver.params(id).is_ok_and(|params| mapping::is_below(&params))
    }

    /// Stops a device unless somebody uses it.
    fn stop_unused(&mut self, id: DeviceId) -> Result<(), ControlError> {
        let path = sysfs::disk_path(id);
        let exclusive = exclusive_open(&path)?;
        let looks = self.features.offers(libublk_rs_sys::UBLK_F_SAFE_STOP_DEV);
        // Where the driver itself looks, it lets nobody in afterwards, and counts this process, too. Elsewhere this process holds the disk
        // until there is none any more: nobody could mount it in between.
        let held = exclusive.filter(|_| !looks);
        let stopped =
            errand::begin(if looks { Errand::StopIfUnused } else { Errand::Stop }, id).and_then(|mut stop| stop.finish(STOP_LIMIT));
        drop(held);
        match stopped {
            Err(error) if error.errno() == Some(libc::EBUSY) => Err(busy(&path, "something has it open")),
            // There was no disk to stop: half made, or stopped already.
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            stopped => stopped.map_err(failed),
        }
    }

    /// Stops and deletes a device. Requests that can't end are ended with errors.
    pub(crate) fn remove(&mut self, id: DeviceId) -> Result<(), ControlError> {
        self.is_stopping = self.queue_is_open;
        let is_below = self.is_below(id);
        let mut stop = errand::begin(Errand::Stop, id).map_err(failed)?;
        let mut stopped = stop.finish(FORCE_AFTER);
        if stopped.as_ref().is_err_and(DriverError::is_timeout) {
            self.order(Order::Abort)?;
            stopped = stop.finish(STOP_LIMIT);
        }
        ignore_absent(stopped)?;
        if self.queue_is_open {
            let (done, released) = Reply::new();
            self.order(Order::Release { done })?;
            released.recv_timeout(ORDER_LIMIT).map_err(|_| failed("the queue thread has not let go of the stopped device"))?;
            self.queue_is_open = false;
            self.is_stopping = false;
        }
        // Before the device is forgotten, by which a mapping that is still there would be found again.
        if is_below {
            self.mapping.retire().map_err(failed)?;
            files::remove_whole(&self.run.udev_environment(self.mapping.name()));
        }
        ignore_absent(self.driver.delete(id))?;
        files::remove_whole(&self.run.udev_environment(&sysfs::disk_name(id)));
        self.progress.set(|step| (step.device, step.size) = (None, None));
        Ok(())
    }

    /// Puts what was acknowledged on stable media, if that is quickly done.
    fn flush(&mut self) {
        if !self.queue_is_open {
            return;
        }
        let (done, flushed) = Reply::new();
        let sent = self.orders.send(Order::Flush { done });
        if !sent || !flushed.recv_timeout(FLUSH_LIMIT).unwrap_or(false) {
            tracing::warn!("detaching before a majority has confirmed that everything is on stable media");
        }
    }
}

/// Opens a disk that nobody uses, so that nobody else can mount it; `None` if there is no such disk.
fn exclusive_open(path: &Path) -> Result<Option<File>, ControlError> {
    let usage = openers::look(path, &sysfs::block_folder(path))
        .map_err(|error| failed(format!("can't find out who uses {}: {error}", path.display())))?;
    match usage {
        Usage::UsedBy(users) => Err(busy(path, &users.join("; "))),
        Usage::Unused(exclusive) => Ok(exclusive),
    }
}

fn busy(path: &Path, users: &str) -> ControlError {
    let message = format!("{} is in use: {users}; end that first, or detach by force", path.display());
    ControlError { code: ControlErrorCode::Busy, message }
}

/// A device that isn't there needs no removal.
fn ignore_absent(result: Result<(), DriverError>) -> Result<(), ControlError> {
    match result {
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        result => result.map_err(failed),
    }
}
