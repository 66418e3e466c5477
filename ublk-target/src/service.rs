//! The main thread: it makes or recovers the device once this process is primary, and removes it when asked.
//!
//! Order (I4): a majority has promised this process's term *before* anything is done to a device; what was half done by a
//! target that was killed is looked at and finished or undone first ([`crate::plan`]).
//!
//! One that only tends the replicas of a volume that nobody uses makes no device, and leaves alone what it finds: a device whose
//! attachment was forgotten waits for the next one.
//!
//! SIGTERM and SIGINT end the process like `kill -9`, on purpose: the device stays, its requests wait in the kernel, and the next
//! target of the volume recovers it. Only a detach removes a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use carrick_backing_store::{VolumeId, VolumeSize};
use carrick_replicator::control::{ControlError, ControlErrorCode, Map, RunDirectory, TargetConfig, TargetPhase};
use carrick_replicator::io::{ControlSocket, Reply, Sender};
use libublk_rs_sys as sys;

use crate::driver::{Driver, DriverError, Errand};
use crate::errand;
use crate::features::Features;
use crate::files;
use crate::front::{Notice, Order};
use crate::identity;
use crate::mapping::{self, Mapping, MappingError};
use crate::openers;
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
/// How long the queue thread may take to obey.
pub(crate) const ORDER_LIMIT: Duration = Duration::from_secs(10);

const CHARACTER_CLASS: &str = "/sys/class/ublk-char";

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
    /// In front of the device, if it is one under a mapping.
    pub mapping: Mapping,
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
                    tracing::info!(%term, volume = %self.config.volume, tends = self.config.tends, "this target is primary");
                    if self.config.tends {
                        self.progress.set(|step| step.phase = TargetPhase::Serving);
                        continue;
                    }
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
                    Recovered::Yes => {
                        self.show(id)?;
                        break id;
                    }
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
        self.progress.set(|step| (step.phase, step.waiting_for) = (TargetPhase::Serving, None));
        let device = self.progress.get().device.unwrap_or_default();
        tracing::info!(device = %device.display(), took = ?begun.elapsed(), "the device answers");
        Ok(Some(id))
    }

    /// Requests may reach up to this size: the device follows.
    fn on_grown(&mut self, size: VolumeSize) {
        self.config.size = self.config.size.max(size);
        let has_device = self.progress.get().phase == TargetPhase::Serving && !self.config.tends;
        let devices = if has_device { self.find() } else { Ok(Vec::new()) };
        let shown = match devices {
            Ok(devices) => devices.into_iter().try_for_each(|device| self.show(device.id)),
            Err(error) => Err(error),
        };
        if let Err(error) = shown {
            tracing::warn!(%error, "the device keeps its size for now");
        }
    }

    /// Says where users find a device that has a disk, once that is as large as the volume, if it can be.
    ///
    /// # Errors
    /// There is nothing to be found.
    pub(crate) fn show(&mut self, id: DeviceId) -> Result<(), ControlError> {
        let disk = sysfs::disk_path(id);
        sysfs::set_queue(&sysfs::block_folder(&disk));
        let params = self.driver.params(id).map_err(failed)?;
        let (device, sectors) = if mapping::is_below(&params) {
            let device = self.mapping.fit(&disk, self.config.size).or_else(|error| match self.mapping.find() {
                Ok(Some(device)) => {
                    tracing::error!(%error, device = %device.display(), "the device can't grow");
                    Ok(device)
                }
                Ok(None) | Err(_) => Err(failed(error)),
            })?;
            let sectors = sysfs::sectors(&device).map_err(|error| failed(format!("{} has no size: {error}", device.display())))?;
            (device, sectors)
        } else {
            let sectors = self.grow(id, params.basic.dev_sectors);
            (disk, sectors)
        };
        let grows_online = mapping::is_below(&params) || self.features.grows_online();
        self.progress.set(|step| {
            step.device = Some(device);
            (step.size, step.grows_online) = (VolumeSize::new(sectors * SECTOR).ok(), grows_online);
        });
        Ok(())
    }

    /// Makes a ublk disk as large as the volume, if the driver can. Gives the sectors that it has then.
    fn grow(&mut self, id: DeviceId, found: u64) -> u64 {
        let sectors = self.config.size.bytes().get() / SECTOR;
        if found >= sectors || !self.features.grows_online() {
            return found;
        }
        match self.driver.update_size(id, sectors) {
            Ok(()) => {
                tracing::info!(device = %sysfs::disk_path(id).display(), size = %self.config.size.bytes(), "the device has grown");
                sectors
            }
            Err(error) => {
                tracing::error!(%error, "the device can't grow");
                found
            }
        }
    }

    pub(crate) fn find(&mut self) -> Result<Vec<Found>, ControlError> {
        find(&mut self.driver, self.config.volume)
    }

    fn create(&mut self) -> Result<DeviceId, ControlError> {
        let params = self.new_params()?;
        let mark = identity::device_mark(self.config.volume);
        let info = self.driver.add(self.config.queue_depth, self.features.device_flags(), mark).map_err(explain_add)?;
        let id = DeviceId(info.dev_id);
        if let Err(error) = self.start_new(id, info.queue_depth, params).and_then(|()| self.show(id)) {
            // The next target would do it, but perhaps there is none.
            if let Err(also) = self.remove(id) {
                tracing::warn!(error = %also, "can't remove the device that could not be started");
            }
            return Err(error);
        }
        Ok(id)
    }

    /// The parameters of a new device, which is one under a mapping if it should and can be.
    fn new_params(&self) -> Result<sys::ublk_params, ControlError> {
        let mut params = params::device_params(self.config.size, self.block);
        let is_mapped = match self.config.map {
            Map::Never => false,
            Map::Auto if self.features.grows_online() => false,
            Map::Auto => mapping::check().inspect_err(|error| tracing::warn!(%error, "the device won't grow while it is used")).is_ok(),
            Map::Always => {
                let unsupported = |error: MappingError| ControlError { code: ControlErrorCode::Unsupported, message: error.to_string() };
                mapping::check().map_err(unsupported)?;
                true
            }
        };
        if is_mapped {
            params.basic.dev_sectors = mapping::SECTORS_BELOW;
        }
        Ok(params)
    }

    fn start_new(&mut self, id: DeviceId, depth: u16, params: sys::ublk_params) -> Result<(), ControlError> {
        self.driver.set_params(id, params).map_err(failed)?;
        let device = open_character(id).map_err(|error| failed(format!("can't open /dev/ublkc{}: {error}", id.0)))?;
        let may_be_parsed = self.may_be_parsed(&params);
        self.open_queue(device, depth, may_be_parsed)?.map_err(|error| failed(format!("can't serve /dev/ublkc{}: {error}", id.0)))?;
        // udev reads it when the disk appears.
        self.write_environment(id, &params)?;
        let started = if may_be_parsed {
            errand::begin(Errand::Start, id).and_then(|mut start| start.finish(START_LIMIT_HOST))
        } else {
            self.driver.start(id, START_LIMIT)
        };
        started.map_err(failed)
    }

    /// Whether the host may look for partitions on the ublk disk itself.
    const fn may_be_parsed(&self, params: &sys::ublk_params) -> bool {
        self.config.host && !mapping::is_below(params)
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
        self.open_queue(device, info.queue_depth, self.may_be_parsed(&params))?.map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => refused(format!(
                "an earlier target was killed in the middle of recovering it, after which this kernel allows no other ({error})"
            )),
            _ => failed(format!("can't serve /dev/ublkc{}: {error}", id.0)),
        })?;
        self.driver.end_recovery(id).map_err(failed)?;
        if self.write_environment(id, &params)? {
            // The run directory was lost, and udev's links with it.
            for device in [Some(sysfs::disk_path(id)), self.mapping.find().ok().flatten()].into_iter().flatten() {
                sysfs::announce_change(&sysfs::block_folder(&device));
            }
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

    /// Tells udev of a device and of its mapping. Whether that is new.
    fn write_environment(&self, id: DeviceId, params: &sys::ublk_params) -> Result<bool, ControlError> {
        let disk = sysfs::disk_name(id);
        let write = |device: &str, content: String| {
            let path = self.run.udev_environment(device);
            files::write_whole(&path, content.as_bytes(), 0o644).map_err(|error| failed(format!("can't write {}: {error}", path.display())))
        };
        if mapping::is_below(params) {
            let is_new = write(self.mapping.name(), files::udev_environment(&self.config))?;
            Ok(write(&disk, files::udev_environment_below(&self.config))? || is_new)
        } else {
            write(&disk, files::udev_environment(&self.config))
        }
    }

    fn open_queue(&mut self, device: File, depth: u16, may_be_parsed: bool) -> Result<io::Result<()>, ControlError> {
        let (done, opened) = Reply::new();
        self.order(Order::Open { device, depth, may_be_parsed, done })?;
        let opened = opened.recv_timeout(ORDER_LIMIT).map_err(|_| failed("the queue thread has not opened the queue"))?;
        self.queue_is_open = opened.is_ok();
        Ok(opened)
    }

    pub(crate) fn order(&self, order: Order) -> Result<(), ControlError> {
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

fn open_character(id: DeviceId) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(sysfs::character_path(id))
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

pub(crate) fn refusal(step: Step) -> ControlError {
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

/// An error of no particular kind.
pub fn failed(why: impl ToString) -> ControlError {
    ControlError { code: ControlErrorCode::Failed, message: why.to_string() }
}
