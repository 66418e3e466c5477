//! How a target process starts, and how it ends with an error.

use std::io;
use std::path::{self, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread;

use carrick_backing_store::{BufferPool, VolumeId};
use carrick_replicator::control::{ControlError, ControlErrorCode, RunDirectory, TargetAnswer, TargetConfig};
use carrick_replicator::engine::{ConfigRequest, EngineConfig, MemberIndex, MemberSet};
use carrick_replicator::io::{ControlSocket, Primary, PrimaryError, Sender, listen_unix, mailbox};
use uuid::Uuid;

use crate::files::{self, Lock};
use crate::front::{Mailboxes, Notice, Order, TargetFrontEnd};
use crate::mapping::Mapping;
use crate::params::LogicalBlock;
use crate::preflight;
use crate::process;
use crate::progress::Progress;
use crate::records;
use crate::service::{self, Service};

/// Free buffers kept under load; all are given back when nothing happens.
const POOL_KEEP: usize = 16 << 20;

/// What `carrick-target run` is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration.
    pub config: PathBuf,
    /// The run directory.
    pub run: RunDirectory,
    /// Whether replicas on other hosts may be reached without TLS.
    pub insecure: bool,
}

/// Runs a target until it is detached or fails.
pub fn run(options: Options) -> ExitCode {
    let options = match leave_folder(options) {
        Ok(options) => options,
        Err(error) => return complain(&failed(format!("can't leave the current folder: {error}"))),
    };
    let (farewell, config, block) = match lock(&options) {
        Ok(locked) => locked,
        // Another target lives, or has done all: the file that says why a target ended is not about this one.
        Err(error) => return complain(&error),
    };
    files::remove_whole(&options.run.target_failure(config.volume));
    let farewell = Arc::new(farewell);
    let of_panic = Arc::clone(&farewell);
    std::panic::set_hook(Box::new(move |panic| {
        let error = ControlError { code: ControlErrorCode::Failed, message: format!("internal error: {panic}") };
        of_panic.record(&error);
    }));
    match start(&options, config, block, &farewell).and_then(|mut service| service.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => farewell.say(&error),
    }
}

/// Takes the volume's lock, which is kept until the process ends, and reads what is to be served: by then, another target may have served
/// it, and taken the device and the configuration away.
fn lock(options: &Options) -> Result<(Farewell, TargetConfig, LogicalBlock), ControlError> {
    let volume = files::read_config(&options.config)?.0.volume;
    let lock = files::lock(&options.run.target_lock(volume), volume)?;
    match files::read_config(&options.config) {
        Ok((config, block)) => Ok((Farewell { run: options.run.clone(), volume, lock }, config, block)),
        Err(error) => {
            lock.remove();
            Err(error)
        }
    }
}

/// How a target that holds its volume's lock says why it ends.
#[derive(Debug)]
struct Farewell {
    run: RunDirectory,
    volume: VolumeId,
    lock: Lock,
}

impl Farewell {
    /// One sentence for people, one file for `carrickd`.
    fn say(&self, error: &ControlError) -> ExitCode {
        self.record(error);
        complain(error)
    }

    /// Unless this target is done, and the files are gone: the next one's are nothing to it, and nobody would remove it.
    fn record(&self, error: &ControlError) {
        let written = match self.lock.has_its_name() {
            Ok(false) => return,
            Ok(true) => files::write_failure(&self.run, self.volume, error),
            Err(failed) => Err(failed),
        };
        if let Err(also) = written {
            tracing::warn!(error = %also, "can't write down why this target ends");
        }
    }
}

/// A target started in a folder on its own disk would keep that from being unmounted.
fn leave_folder(options: Options) -> io::Result<Options> {
    let config = path::absolute(options.config)?;
    let run = RunDirectory::new(path::absolute(options.run.root())?);
    std::env::set_current_dir("/")?;
    Ok(Options { config, run, ..options })
}

fn start(options: &Options, config: TargetConfig, block: LogicalBlock, farewell: &Arc<Farewell>) -> Result<Service, ControlError> {
    let (mut driver, features) = preflight::open_driver()?;
    features.check()?;
    if config.predecessor.has_ended() {
        service::check_unserved(&mut driver, config.volume)?;
    }
    // Before threads are made.
    process::prepare();
    let path = options.run.target_control(config.volume);
    let listening = files::make_folder_of(&path).and_then(|()| listen_unix(&path));
    let listener = listening.map_err(|error| failed(format!("can't listen on {}: {error}", path.display())))?;
    let no_mailbox = |error| failed(format!("can't make a mailbox: {error}"));
    let (command_sender, commands) = mailbox().map_err(no_mailbox)?;
    let (orders, order_receiver) = mailbox().map_err(no_mailbox)?;
    let (notices, notice_receiver) = mpsc::channel();
    let progress = Progress::default();
    let mailboxes = Mailboxes { commands, orders: order_receiver };
    spawn_queue_thread(options, &config, mailboxes, orders.clone(), notices, &progress, farewell)?;
    let socket = ControlSocket::serve(listener, command_sender, TargetAnswer::Refused)
        .map_err(|error| failed(format!("can't serve the control socket: {error}")))?;
    let mapping = Mapping::new(&config);
    Ok(Service {
        config,
        block,
        config_path: options.config.clone(),
        run: options.run.clone(),
        driver,
        features,
        mapping,
        orders,
        notices: notice_receiver,
        progress,
        socket,
        queue_is_open: false,
        is_stopping: false,
    })
}

fn spawn_queue_thread(
    options: &Options,
    config: &TargetConfig,
    mailboxes: Mailboxes,
    orders: Sender<Order>,
    notices: mpsc::Sender<Notice>,
    progress: &Progress,
    farewell: &Arc<Farewell>,
) -> Result<(), ControlError> {
    let (options, config, progress, farewell) = (options.clone(), config.clone(), progress.clone(), Arc::clone(farewell));
    let records = config.records.as_ref().map(|socket| records::spawn(&config, socket, orders));
    let records = records.transpose().map_err(|error| failed(format!("can't start the thread for the records: {error}")))?;
    let thread = move || {
        // The main thread must not take the end of the front end for the reason of the end.
        let _main_thread_waits = notices.clone();
        let error = match serve(&options, config, records, mailboxes, notices, progress) {
            Ok(()) => failed("the queue thread has ended"),
            Err(error) => explain(&error),
        };
        // Not by way of the main thread, which may wait for the driver: requests under way stay with the kernel.
        farewell.say(&error);
        std::process::exit(1);
    };
    thread::Builder::new()
        .name("queue".into())
        .spawn(thread)
        .map(drop)
        .map_err(|error| failed(format!("can't start the queue thread: {error}")))
}

fn serve(
    options: &Options,
    config: TargetConfig,
    records: Option<mpsc::SyncSender<ConfigRequest>>,
    mailboxes: Mailboxes,
    notices: mpsc::Sender<Notice>,
    progress: Progress,
) -> Result<(), PrimaryError> {
    let pool = BufferPool::new(POOL_KEEP);
    let seed = Uuid::new_v4().as_u64_pair().0;
    let engine = EngineConfig {
        copy_rate: config.rebuild_rate,
        changes_config: records.is_some(),
        retiring: retiring(&config),
        attachment: config.attachment,
        predecessor: config.predecessor,
        labels: config.replicas.iter().map(|replica| format!("the replica in store {}", replica.store)).collect(),
        ..EngineConfig::new(config.volume, config.size, config.replicas.len(), seed)
    };
    let endpoints = config.replicas.iter().map(|replica| replica.endpoint.clone()).collect();
    let mut primary = Primary::new(engine, endpoints, pool.clone(), options.insecure)?;
    if let Some(records) = records {
        // The thread lives as long as this one, and has room for what the engine may ask.
        primary = primary.with_records(move |request| assert!(records.try_send(request).is_ok(), "{request:?} is not asked"));
    }
    primary.run(&mut TargetFrontEnd::new(config, mailboxes, notices, progress, pool))
}

/// Which of the replicas are to stop counting.
fn retiring(config: &TargetConfig) -> MemberSet {
    let indices = config.replicas.iter().enumerate().filter(|(_, replica)| config.retiring.contains(&replica.store));
    indices.map(|(index, _)| MemberIndex(index)).collect()
}

fn explain(error: &PrimaryError) -> ControlError {
    match error {
        PrimaryError::Superseded { .. } => ControlError {
            code: ControlErrorCode::Conflict,
            message: format!("{error}: this target ends, and what it has not answered stays with the kernel"),
        },
        PrimaryError::Insecure(_) => ControlError { code: ControlErrorCode::Invalid, message: error.to_string() },
        PrimaryError::Ring(_) => ControlError { code: ControlErrorCode::Unsupported, message: error.to_string() },
        PrimaryError::Endpoints { .. } | PrimaryError::Io(_) => failed(error),
    }
}

/// Says on standard error why the program ends.
pub fn complain(error: &ControlError) -> ExitCode {
    eprintln!("carrick-target: {error}");
    ExitCode::FAILURE
}

fn failed(why: impl ToString) -> ControlError {
    ControlError { code: ControlErrorCode::Failed, message: why.to_string() }
}
