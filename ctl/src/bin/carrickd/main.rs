//! `carrickd`: the daemon of a node. It makes the node what the records say, and is never in the path of I/O: it may be
//! stopped, killed or upgraded at any time, and the next one takes over what runs.

mod attach;
mod context;
mod control;
mod events;
mod expand;
mod explain;
mod health;
mod launch;
mod lives;
mod locks;
mod metadata;
mod moves;
mod node;
mod observed;
mod operations;
mod pace;
mod pidfd;
mod placement;
mod programs;
mod reconcile;
mod records;
mod relocate;
mod salvage;
mod service;
mod settings;
mod shutdown;
mod startup;
mod stores;
mod survey;
mod upgrade;
mod verify;
mod view;
mod volumes;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use carrick_backing_store::ByteLength;
use carrick_backing_store::size::{HumanSize, parse_size};
use carrick_ctl::v1;
use carrick_replicator::control::RunDirectory;
use carrick_replicator::engine::COPY_RATE_MIN;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio_stream::wrappers::UnixListenerStream;
use tracing_subscriber::EnvFilter;

use crate::context::{Context, Gate, unix_now};
use crate::metadata::RedbStore;
use crate::service::Services;

/// For calls that are under way when the daemon is told to end. What they do is in the records; the next carrickd goes on.
const LAST_CALLS_LIMIT: Duration = Duration::from_secs(2);

/// Ten years: beyond that, clocks overflow.
const TIME_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The Carrick daemon: looks after the stores and the attached volumes of this node.
///
/// SIGTERM ends the daemon alone; attached volumes go on. To end everything, use `carrick shutdown`.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Folder of sockets, emptied at a restart of the machine
    #[arg(long, value_name = "DIR", default_value = "/run/carrick")]
    run_dir: PathBuf,
    /// Folder of the records and logs
    #[arg(long, value_name = "DIR", default_value = "/var/lib/carrick")]
    state_dir: PathBuf,
    /// Where carrick-replica and carrick-target are [default: beside carrickd]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// What to log: error, warn, info, debug, or a tracing filter
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
    /// Replace a replica by one in another store when it hasn't counted for so long, such as 10m, or never
    #[arg(long, value_name = "TIME|never", default_value = "10m", value_parser = time_or_never)]
    replace_after: TimeOrNever,
    /// Compare the replicas of each attached volume when that was last done so long ago, such as 7d, or never
    #[arg(long, value_name = "TIME|never", default_value = "7d", value_parser = time_or_never)]
    verify_every: TimeOrNever,
    /// Let all volumes together copy so many bytes a second at most to replicas that lack them, such as 200M
    #[arg(long, value_name = "BYTES", value_parser = rebuild_rate)]
    rebuild_rate: Option<ByteLength>,
    /// For tests: die when this step of an operation is done
    #[arg(long, hide = true, value_name = "STEP")]
    crash_at: Option<String>,
    /// For tests: without root there are no block devices
    #[arg(long, hide = true)]
    allow_non_root: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TimeOrNever(Option<Duration>);

/// A number of seconds, or of what a letter after it says.
fn time_or_never(text: &str) -> Result<TimeOrNever, String> {
    if text == "never" {
        return Ok(TimeOrNever(None));
    }
    let (number, unit) = text.split_at(text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic()).len());
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => 0,
    };
    let time = number.parse::<u64>().ok().filter(|_| seconds > 0).map(|number| Duration::from_secs(number.saturating_mul(seconds)));
    time.map(|time| TimeOrNever(Some(time.min(TIME_MAX)))).ok_or_else(|| "give a time such as 90s, 10m, 12h or 7d, or never".to_owned())
}

fn rebuild_rate(text: &str) -> Result<ByteLength, String> {
    let rate = parse_size(text).map(ByteLength::new).map_err(|error| error.to_string())?;
    if rate < COPY_RATE_MIN { Err(format!("at least {}", HumanSize(COPY_RATE_MIN.get()))) } else { Ok(rate) }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("carrickd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&arguments.log).with_context(|| format!("--log {}", arguments.log))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    if !arguments.allow_non_root {
        startup::check_root()?;
    }
    let bin_dir = match &arguments.bin_dir {
        Some(given) => startup::folder(given, 0o755)?,
        None => std::env::current_exe()?.parent().context("carrickd is in no folder")?.to_path_buf(),
    };
    startup::check_programs(&bin_dir)?;
    let state_dir = startup::folder(&arguments.state_dir, 0o750)?;
    let _state_lock = startup::lock(&state_dir, "--state-dir")?;
    startup::folder(&state_dir.join("log"), 0o750)?;
    let run_dir = startup::run_folder(&arguments.run_dir)?;
    let _run_lock = startup::lock(&run_dir, "--run-dir")?;
    let metadata = Arc::new(RedbStore::open(&state_dir.join("metadata.redb"))?);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let changed = Arc::new(Notify::new());
    let (node, inbox) = node::channel(Arc::clone(&changed));
    let context = Arc::new(Context {
        run: RunDirectory::new(run_dir),
        state_dir,
        bin_dir,
        metadata,
        node,
        locks: locks::Locks::new(changed),
        stores: tokio::sync::Mutex::default(),
        gate: Gate::default(),
        replace_after: arguments.replace_after.0,
        verify_every: arguments.verify_every.0,
        rebuild_rate: arguments.rebuild_rate,
        operations: tokio::sync::watch::Sender::default(),
        crash_at: arguments.crash_at.clone(),
        rates: Notify::new(),
        noted: Notify::new(),
        verifications: verify::Verifications::default(),
        ending: tokio::sync::watch::Sender::default(),
        started: Instant::now(),
    });
    let result = runtime.block_on(run(Arc::clone(&context), inbox));
    // A call to the disk may hang: it must not keep the daemon.
    runtime.shutdown_background();
    let _ = fs::remove_file(context.run.daemon_socket());
    let _ = fs::remove_file(context.run.records_socket());
    result
}

async fn run(context: Arc<Context>, inbox: node::NodeInbox) -> anyhow::Result<()> {
    let end = Arc::new(Notify::new());
    let listener = startup::listen(&context.run.daemon_socket())?;
    let records_listener = startup::listen_alone(&context.run.records_socket())?;
    let (health_reporter, health) = tonic_health::server::health_reporter();
    let services = Services::new(Arc::clone(&context), Arc::clone(&end));
    let stores = v1::store_service_server::StoreServiceServer::new(services.clone());
    let volumes = v1::volume_service_server::VolumeServiceServer::new(services.clone());
    let operations = v1::operation_service_server::OperationServiceServer::new(services.clone());
    let events = v1::event_service_server::EventServiceServer::new(services.clone());
    let nodes = v1::node_service_server::NodeServiceServer::new(services);
    health_reporter.set_serving::<v1::store_service_server::StoreServiceServer<Services>>().await;
    health_reporter.set_serving::<v1::volume_service_server::VolumeServiceServer<Services>>().await;
    health_reporter.set_serving::<v1::operation_service_server::OperationServiceServer<Services>>().await;
    health_reporter.set_serving::<v1::event_service_server::EventServiceServer<Services>>().await;
    health_reporter.set_serving::<v1::node_service_server::NodeServiceServer<Services>>().await;
    let reflection = tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(v1::DESCRIPTORS).build_v1()?;

    tokio::spawn(records::serve(Arc::clone(&context), records_listener));
    tokio::spawn(node::run(Arc::clone(&context), inbox));
    tokio::spawn(events::write_down(Arc::clone(&context)));
    if context.rebuild_rate.is_some() {
        tokio::spawn(pace::run(Arc::clone(&context)));
    }
    if let Some(every) = context.verify_every {
        tokio::spawn(verify::run(Arc::clone(&context), every));
    }
    let ending = Arc::new(Notify::new());
    let ends = Arc::clone(&ending);
    let server = tonic::transport::Server::builder()
        .add_service(health)
        .add_service(reflection)
        .add_service(stores)
        .add_service(volumes)
        .add_service(operations)
        .add_service(events)
        .add_service(nodes)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move { ends.notified().await });
    tracing::info!(version = env!("CARGO_PKG_VERSION"), run_dir = %context.run.root().display(), "serving");
    context.note(vec![lives::daemon_started(unix_now())]);

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::pin!(server);
    tokio::select! {
        result = &mut server => return Ok(result?),
        _ = terminate.recv() => tracing::info!("ending on SIGTERM; stores and volumes go on"),
        _ = interrupt.recv() => tracing::info!("ending on SIGINT; stores and volumes go on"),
        () = end.notified() => tracing::info!("everything is shut down"),
    }
    context.ending.send_replace(true);
    ending.notify_one();
    // Over the limit, the calls are given up.
    let _ = tokio::time::timeout(LAST_CALLS_LIMIT, server).await;
    // A disk that hangs must not keep the daemon.
    let _ = tokio::time::timeout(LAST_CALLS_LIMIT, context.metadata.flush()).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units_and_never_is_none() {
        let seconds = |text| time_or_never(text).map(|time| time.0.map(|time| time.as_secs()));
        for (text, wanted) in [("0", 0), ("600", 600), ("90s", 90), ("10m", 600), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(seconds(text), Ok(Some(wanted)), "{text}");
        }
        assert_eq!(seconds("never"), Ok(None));
        assert_eq!(seconds("18446744073709551615d"), Ok(Some(TIME_MAX.as_secs())));
        for wrong in ["", "d", "7w", "-1", "1.5h", "7 d", "Never", "18446744073709551616"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
