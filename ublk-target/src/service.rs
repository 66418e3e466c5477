//! The main thread: it makes or recovers the device once this process is primary, and removes it when asked.
//!
//! Order (I4): a majority has promised this process's term *before* anything is done to a device; what was half done by a
//! target that was killed is looked at and finished or undone first ([`crate::plan`]).
//!
//! SIGTERM and SIGINT end the process like `kill -9`, on purpose: the device stays, its requests wait in the kernel, and the next
//! target of the volume recovers it. Only a detach removes a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use carrick_backing_store::{VolumeId, VolumeSize};
use carrick_replicator::control::{ControlError, ControlErrorCode, RunDirectory, TargetAnswer, TargetConfig, TargetPhase};
use carrick_replicator::io::{ControlSocket, Reply, Sender};

use crate::driver::{Driver, DriverError, Stop};
use crate::features::Features;
use crate::files;
use crate::front::{Notice, Order};
use crate::identity;
use crate::openers::{self, Usage};
use crate::params::{self, LogicalBlock, SECTOR};
use crate::plan::{DeviceId, DeviceState, Found, Step, next_step};
use crate::progress::Progress;
use crate::sysfs;

/// Between two looks at a device that is not ready to be recovered.
const POLL: Duration = Duration::from_millis(20);
/// How long the driver may take to notice that a target is gone: before Linux 6.15 a request's time limit of 30 s may have to pass.
const RECOVERY_LIMIT: Duration = Duration::from_secs(120);
/// How long a disk may take to appear. The host reads the partition table of its own disks meanwhile, from the replicas.
const START_LIMIT: Duration = Duration::from_secs(30);
const START_LIMIT_HOST: Duration = Duration::from_secs(600);
/// How long requests under way may take when a device is stopped.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// The same when it is stopped by force: after this they are ended with errors.
const FORCE_AFTER: Duration = Duration::from_secs(3);
/// How long the queue thread may take to obey.
const ORDER_LIMIT: Duration = Duration::from_secs(10);
/// How long a detach waits for what was acknowledged to be on stable media. A majority's journals have it in any case.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);
/// How long the process's end waits for its last answer to be read.
const FAREWELL: Duration = Duration::from_secs(2);

const CHARACTER_CLASS: &str = "/sys/class/ublk-char";
const BLOCK_CLASS: &str = "/sys/block";

/// The main thread's state.
pub struct Service {
    /// What to serve.
    pub config: TargetConfig,
    /// Its logical block size.
    pub block: LogicalBlock,
    /// The configuration's file, removed by a detach.
    pub config_path: PathBuf,
    /// Where the shared files are.
    pub run: RunDirectory,
    /// The driver.
    pub driver: Driver,
    /// What it can do.
    pub features: Features,
    /// To the queue thread.
    pub orders: Sender<Order>,
    /// From the queue thread.
    pub notices: Receiver<Notice>,
    /// For the status.
    pub progress: Progress,
    /// Waited for at the end.
    pub socket: ControlSocket,
    /// Whether the queue thread has a character device open.
    pub queue_is_open: bool,
    /// Whether this process has told the driver to stop the device.
    pub is_stopping: bool,
}

/// How an attempt to recover a device went.
enum Recovered {
    Yes,
    NotYet(String),
}

impl Service {
    /// Serves until the device is detached.
    ///
    /// # Errors
    /// Why the process must end.
    pub fn run(&mut self) -> Result<(), ControlError> {
        loop {
            let notice = self.notices.recv().map_err(|_| failed("the queue thread has ended"))?;
            match notice {
                Notice::Serving(term) => {
                    tracing::info!(%term, volume = %self.config.volume, "this target is primary");
                    self.progress.set(|step| step.phase = TargetPhase::Starting);
                    if self.attach()?.is_none() {
                        return Ok(());
                    }
                }
                Notice::Detach { force, reply } => {
                    if self.on_detach(force, reply) {
                        return Ok(());
                    }
                }
                Notice::Grown(size) => self.on_grown(size),
                // By this process's own command.
                Notice::QueueEnded if self.is_stopping => {}
                Notice::QueueEnded => return Err(self.on_queue_ended()),
            }
        }
    }

    /// Makes the device answer. `None` if it was detached meanwhile.
    fn attach(&mut self) -> Result<Option<DeviceId>, ControlError> {
        let begun = Instant::now();
        let id = loop {
            match next_step(&self.find()?) {
                Step::Create => break self.create()?,
                Step::Remove(id) => {
                    tracing::warn!(device = %sysfs::disk_name(id), "removing what an earlier target left half made");
                    self.remove(id)?;
                }
                Step::Recover(id) => match self.recover(id)? {
                    Recovered::Yes => break id,
                    Recovered::NotYet(why) => {
                        if self.pause(begun, why)? {
                            return Ok(None);
                        }
                    }
                },
                Step::Wait(id) => {
                    let why = format!("the kernel to notice that the previous target of /dev/{} is gone", sysfs::disk_name(id));
                    if self.pause(begun, why)? {
                        return Ok(None);
                    }
                }
                refused => return Err(refusal(refused)),
            }
        };
        sysfs::set_queue(&block_folder(id));
        self.grow(id);
        self.progress.set(|step| {
            step.phase = TargetPhase::Serving;
            step.device = Some(sysfs::disk_path(id));
            step.waiting_for = None;
        });
        tracing::info!(device = %sysfs::disk_path(id).display(), took = ?begun.elapsed(), "the device answers");
        Ok(Some(id))
    }

    /// Requests may reach up to this size: the device follows.
    fn on_grown(&mut self, size: VolumeSize) {
        self.config.size = self.config.size.max(size);
        let devices = if self.progress.get().phase == TargetPhase::Serving { self.find() } else { Ok(Vec::new()) };
        match devices {
            Ok(devices) => devices.iter().for_each(|device| self.grow(device.id)),
            Err(error) => tracing::warn!(%error, "the device keeps its size for now"),
        }
    }

    /// Makes a device as large as the volume, if the driver can, and remembers how large it is. It has a disk.
    fn grow(&mut self, id: DeviceId) {
        let sectors = self.config.size.bytes().get() / SECTOR;
        let mut found = match self.driver.params(id) {
            Ok(params) => params.basic.dev_sectors,
            Err(error) => return tracing::warn!(%error, "can't find out how large the device is"),
        };
        if found < sectors && self.features.grows_online() {
            match self.driver.update_size(id, sectors) {
                Ok(()) => {
                    tracing::info!(device = %sysfs::disk_path(id).display(), size = %self.config.size.bytes(), "the device has grown");
                    found = sectors;
                }
                Err(error) => tracing::error!(%error, "the device can't grow"),
            }
        }
        let grows_online = self.features.grows_online();
        self.progress.set(|step| (step.size, step.grows_online) = (VolumeSize::new(found * SECTOR).ok(), grows_online));
    }

    fn find(&mut self) -> Result<Vec<Found>, ControlError> {
        find(&mut self.driver, self.config.volume)
    }

    fn create(&mut self) -> Result<DeviceId, ControlError> {
        let mark = identity::device_mark(self.config.volume);
        let info = self.driver.add(self.config.queue_depth, self.features.device_flags(), mark).map_err(explain_add)?;
        let id = DeviceId(info.dev_id);
        if let Err(error) = self.start_new(id, info.queue_depth) {
            // The next target would do it, but perhaps there is none.
            if let Err(also) = self.remove(id) {
                tracing::warn!(error = %also, "can't remove the device that could not be started");
            }
            return Err(error);
        }
        Ok(id)
    }

    fn start_new(&mut self, id: DeviceId, depth: u16) -> Result<(), ControlError> {
        self.driver.set_params(id, params::device_params(self.config.size, self.block)).map_err(failed)?;
        let device = open_character(id).map_err(|error| failed(format!("can't open /dev/ublkc{}: {error}", id.0)))?;
        self.open_queue(device, depth)?.map_err(|error| failed(format!("can't serve /dev/ublkc{}: {error}", id.0)))?;
        // udev reads it when the disk appears.
        self.write_environment(id)?;
        let limit = if self.config.host { START_LIMIT_HOST } else { START_LIMIT };
        self.driver.start(id, limit).map_err(failed)
    }

    /// Takes over a device whose target is gone. Nothing slow happens between the first and the last command: a target killed
    /// in between can leave Linux 6.12 with a device that can only be removed.
    fn recover(&mut self, id: DeviceId) -> Result<Recovered, ControlError> {
        let info = self.driver.info(id).map_err(failed)?;
        let refused = |why: String| ControlError {
            code: ControlErrorCode::Conflict,
            message: format!("{} can't be recovered: {why}; detach the volume to remove it", sysfs::disk_path(id).display()),
        };
        if !Features::are_recoverable(info.flags) || info.nr_hw_queues != 1 {
            return Err(refused("another program made it".to_owned()));
        }
        let params = self.driver.params(id).map_err(failed)?;
        params::check_found(&params, self.config.size, self.block).map_err(refused)?;
        // EINVAL: an earlier target was killed after this command. The queue is as it should be, and so is what follows.
        match self.driver.start_recovery(id) {
            Ok(()) => {}
            Err(error) if error.errno() == Some(libc::EINVAL) => {}
            Err(error) if matches!(error.errno(), Some(libc::EBUSY | libc::ENODEV)) => {
                return Ok(Recovered::NotYet(format!("the kernel to end the previous target of {}", sysfs::disk_path(id).display())));
            }
            Err(error) => return Err(failed(error)),
        }
        let device = match open_character(id) {
            Ok(device) => device,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                return Ok(Recovered::NotYet(format!("the previous target to let go of /dev/ublkc{}", id.0)));
            }
            Err(error) => return Err(failed(format!("can't open /dev/ublkc{}: {error}", id.0))),
        };
        self.open_queue(device, info.queue_depth)?.map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => refused(format!(
                "an earlier target was killed in the middle of recovering it, after which this kernel allows no other ({error})"
            )),
            _ => failed(format!("can't serve /dev/ublkc{}: {error}", id.0)),
        })?;
        self.driver.end_recovery(id).map_err(failed)?;
        if self.write_environment(id)? {
            // The run directory was lost, and udev's links with it.
            sysfs::announce_change(&block_folder(id));
        }
        Ok(Recovered::Yes)
    }

    /// Lets a moment pass. True if the device was detached meanwhile.
    fn pause(&mut self, begun: Instant, waiting_for: String) -> Result<bool, ControlError> {
        if begun.elapsed() > RECOVERY_LIMIT {
            return Err(failed(format!("{} s have not been enough for {waiting_for}", RECOVERY_LIMIT.as_secs())));
        }
        self.progress.set(|step| {
            step.waiting_for = Some(format!("{waiting_for} (at most {} s)", RECOVERY_LIMIT.as_secs()));
        });
        match self.notices.recv_timeout(POLL) {
            Ok(Notice::Detach { force, reply }) => Ok(self.on_detach(force, reply)),
            Ok(Notice::Grown(size)) => {
                self.on_grown(size);
                Ok(false)
            }
            Ok(Notice::Serving(_) | Notice::QueueEnded) | Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(failed("the queue thread has ended")),
        }
    }

    fn write_environment(&self, id: DeviceId) -> Result<bool, ControlError> {
        let path = self.run.udev_environment(&sysfs::disk_name(id));
        files::write_whole(&path, files::udev_environment(&self.config).as_bytes(), 0o644)
            .map_err(|error| failed(format!("can't write {}: {error}", path.display())))
    }

    /// True if the process is to end.
    fn on_detach(&mut self, force: bool, reply: Reply<TargetAnswer>) -> bool {
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
                self.progress.set(|step| *step = before);
                let _ = force && self.orders.send(Order::Limit(true));
                reply.send(TargetAnswer::Refused(error));
                false
            }
        }
    }

    fn detach(&mut self, force: bool) -> Result<(), ControlError> {
        for device in self.find()? {
            if device.server.is_some_and(|server| server != std::process::id()) {
                return Err(refusal(next_step(&[device])));
            }
            if !force {
                self.stop_unused(device.id)?;
                self.flush();
            }
            self.remove(device.id)?;
        }
        files::remove(&self.config_path);
        files::remove(&self.run.target_control(self.config.volume));
        files::remove(&self.run.target_failure(self.config.volume));
        files::remove(&self.run.target_lock(self.config.volume));
        Ok(())
    }

    /// Stops a device unless somebody uses it.
    fn stop_unused(&mut self, id: DeviceId) -> Result<(), ControlError> {
        let path = sysfs::disk_path(id);
        let busy = |users: &str| ControlError {
            code: ControlErrorCode::Busy,
            message: format!("{} is in use: {users}; end that first, or detach by force", path.display()),
        };
        let usage = openers::look(&path, &block_folder(id))
            .map_err(|error| failed(format!("can't find out who uses {}: {error}", path.display())))?;
        let exclusive = match usage {
            Usage::UsedBy(users) => return Err(busy(&users.join("; "))),
            Usage::Unused(exclusive) => exclusive,
        };
        let pending = if self.features.offers(libublk_rs_sys::UBLK_F_SAFE_STOP_DEV) {
            // The driver itself looks, and lets nobody in afterwards. It counts this process, too.
            drop(exclusive);
            self.driver.begin_stop(id, Stop::IfUnused).map_err(failed)?
        } else {
            let pending = self.driver.begin_stop(id, Stop::Anyway).map_err(failed)?;
            // Held until the driver has the command: nobody could mount the disk in between.
            drop(exclusive);
            pending
        };
        match self.driver.finish(&pending, STOP_LIMIT) {
            Err(error) if error.errno() == Some(libc::EBUSY) => Err(busy("something has it open")),
            // There was no disk to stop: half made, or stopped already.
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            stopped => stopped.map_err(failed),
        }
    }

    /// Stops and deletes a device. Requests that can't end are ended with errors.
    fn remove(&mut self, id: DeviceId) -> Result<(), ControlError> {
        self.is_stopping = self.queue_is_open;
        let pending = self.driver.begin_stop(id, Stop::Anyway).map_err(failed)?;
        let mut stopped = self.driver.finish(&pending, FORCE_AFTER);
        if stopped.as_ref().is_err_and(DriverError::is_timeout) {
            self.order(Order::Abort)?;
            stopped = self.driver.finish(&pending, STOP_LIMIT);
        }
        ignore_absent(stopped)?;
        if self.queue_is_open {
            let (done, released) = Reply::new();
            self.order(Order::Release { done })?;
            released.recv_timeout(ORDER_LIMIT).map_err(|_| failed("the queue thread has not let go of the stopped device"))?;
            self.queue_is_open = false;
            self.is_stopping = false;
        }
        ignore_absent(self.driver.delete(id))?;
        files::remove(&self.run.udev_environment(&sysfs::disk_name(id)));
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

    fn open_queue(&mut self, device: File, depth: u16) -> Result<io::Result<()>, ControlError> {
        let (done, opened) = Reply::new();
        self.order(Order::Open { device, depth, done })?;
        let opened = opened.recv_timeout(ORDER_LIMIT).map_err(|_| failed("the queue thread has not opened the queue"))?;
        self.queue_is_open = opened.is_ok();
        Ok(opened)
    }

    fn order(&self, order: Order) -> Result<(), ControlError> {
        self.orders.send(order).then_some(()).ok_or_else(|| failed("the queue thread has ended"))
    }

    /// Another program has stopped or quiesced the device.
    fn on_queue_ended(&mut self) -> ControlError {
        let dead: Vec<Found> = self.find().unwrap_or_default().into_iter().filter(|device| device.state == DeviceState::Dead).collect();
        for device in dead {
            if let Err(error) = self.remove(device.id) {
                tracing::warn!(%error, "can't remove the stopped device");
            }
        }
        failed("another program has stopped the device: attach the volume again")
    }
}

/// The devices with the volume's mark.
fn find(driver: &mut Driver, volume: VolumeId) -> Result<Vec<Found>, ControlError> {
    let mark = identity::device_mark(volume);
    let ids = sysfs::devices(Path::new(CHARACTER_CLASS)).map_err(|error| failed(format!("can't list ublk devices: {error}")))?;
    let mut found = Vec::new();
    for id in ids {
        let info = match driver.info(id) {
            Ok(info) => info,
            // Gone meanwhile, or of a user who may make devices of their own: not ours.
            Err(error) if error.errno().is_some() => continue,
            Err(error) => return Err(failed(error)),
        };
        if info.ublksrv_flags == mark {
            let server = u32::try_from(info.ublksrv_pid).ok();
            let server = server.filter(|process| openers::process_has_open(*process, &sysfs::character_path(id)));
            found.push(Found { id, state: DeviceState::new(info.state), server });
        }
    }
    Ok(found)
}

/// Refuses before anything is done if a target with another run directory, which the lock doesn't show, serves the volume:
/// to become primary would end it.
///
/// # Errors
/// Names the process.
pub fn check_unserved(driver: &mut Driver, volume: VolumeId) -> Result<(), ControlError> {
    match next_step(&find(driver, volume)?) {
        served @ Step::Served { .. } => Err(refusal(served)),
        _ => Ok(()),
    }
}

fn block_folder(id: DeviceId) -> PathBuf {
    Path::new(BLOCK_CLASS).join(sysfs::disk_name(id))
}

fn open_character(id: DeviceId) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(sysfs::character_path(id))
}

/// A device that isn't there needs no removal.
fn ignore_absent(result: Result<(), DriverError>) -> Result<(), ControlError> {
    match result {
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        result => result.map_err(failed),
    }
}

fn explain_add(error: DriverError) -> ControlError {
    match error.errno() {
        Some(libc::EACCES) => failed(format!(
            "{error}: the driver's limit of devices is reached; write a larger number to /sys/module/ublk_drv/parameters/ublks_max"
        )),
        _ if error.is_timeout() => failed(format!("{error}: some kernels have a bug there (6.18.4, 6.18.5); boot another one")),
        _ => failed(error),
    }
}

fn refusal(step: Step) -> ControlError {
    let (code, message) = match step {
        Step::Served { id, server } => {
            (ControlErrorCode::Busy, format!("process {server} serves the volume already, as {}", sysfs::disk_path(id).display()))
        }
        Step::Ambiguous(first, second) => (
            ControlErrorCode::Conflict,
            format!(
                "{} and {} both belong to this volume: remove the wrong one",
                sysfs::disk_path(first).display(),
                sysfs::disk_path(second).display()
            ),
        ),
        Step::UnknownState(id, state) => (
            ControlErrorCode::Unsupported,
            format!("{} is in state {state}, which this version doesn't know: update Carrick", sysfs::disk_path(id).display()),
        ),
        // The caller's to do, not to refuse.
        Step::Create | Step::Remove(_) | Step::Recover(_) | Step::Wait(_) => (ControlErrorCode::Failed, format!("{step:?} was not done")),
    };
    ControlError { code, message }
}

fn failed(why: impl ToString) -> ControlError {
    ControlError { code: ControlErrorCode::Failed, message: why.to_string() }
}
