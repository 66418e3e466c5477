//! A stand-in for `carrick-replica` and `carrick-target` in the tests of `carrickd`: it keeps their contract with the
//! daemon, and no data. Which of them it is, it takes from its own name.
//!
//! A store is a folder with `store.json`; a replica is a file in it; a device in the kernel is a file
//! `target/VOLUME.device` in the run directory, which survives the death of its target, as a real one does. The script:
//!
//! | Name of the volume begins with | The target |
//! |---|---|
//! | `no-ublk` | ends, saying that the machine can't |
//! | `never-up` | stays electing |
//! | `shy` | opens its control socket after two seconds only |
//! | `slow-up` | stays electing for a second |
//! | `busy` | refuses to detach, unless forced |
//! | `limited` | writes the limits under which it serves to `target/VOLUME.limits`, and leaves them there |
//! | `paced` | writes the rate at which it copies at most to `target/VOLUME.rate`, and leaves it there |
//! | `differs` | says that its replicas differ in a block, once they were compared |
//! | `deaf` | never answers a request to detach, unless a file `cured` is in the run directory |
//!
//! A file `lost` in the run directory makes all replicas come back without what was acknowledged last.
//!
//! A file `slow` in a store's folder makes each creation and expansion there last a second, a file `broken` makes it fail; what is in a file
//! `poisoned` is why the store takes no more operations.

use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::thread;
use std::time::{Duration, Instant};

use carrick_backing_store::{
    BlockIndex, ByteLength, Content, ReplicaSpec, ReplicaState, Seq, StoreId, StoreUsage, Synced, Term, VolumeSize,
};
use carrick_replicator::control::{
    ControlError, ControlErrorCode, MemberReport, MemberState, ReplicaAnswer, ReplicaProcessStatus, ReplicaReport, ReplicaRequest,
    RunDirectory, ScrubReport, TargetAnswer, TargetConfig, TargetPhase, TargetRequest, TargetStatus, VerificationReport, read_line,
    write_line,
};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::limits::{Delays, Limits};
use rustix::fs::FlockOperation;

/// Room in a store unless it is formatted with another size.
const CAPACITY: u64 = 100 << 30;
/// Nothing of a test is left behind for longer, whatever happens to it.
const LIFE_MAX: Duration = Duration::from_secs(120);

type Result<T> = std::result::Result<T, String>;

fn main() {
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    let arguments: Vec<_> = arguments.collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["format", path] => format(Path::new(path), CAPACITY),
        ["format", path, "--size", size] => format(Path::new(path), size.parse().unwrap_or_default()),
        ["show", path] => show(Path::new(path)),
        ["serve", path, "--run-dir", run, ..] => serve(Path::new(path), &RunDirectory::new(*run)),
        ["run", "--config", config, "--run-dir", run] => target(Path::new(config), &RunDirectory::new(*run)),
        other => Err(format!("{program}: unexpected arguments: {other:?}")),
    };
    if let Err(sentence) = result {
        eprintln!("{sentence}");
        exit(1);
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Ends with the test's folder.
fn end_with(run: &RunDirectory) {
    let root = run.root().to_path_buf();
    thread::spawn(move || {
        let started = Instant::now();
        while root.exists() && started.elapsed() < LIFE_MAX {
            thread::sleep(Duration::from_millis(200));
        }
        exit(3);
    });
}

fn lock(path: &Path) -> Option<File> {
    let file = File::create(path).ok()?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).ok().map(|()| file)
}

fn bind(path: &Path) -> Result<UnixListener> {
    let _ = fs::remove_file(path);
    UnixListener::bind(path).map_err(text)
}

fn format(path: &Path, capacity: u64) -> Result<()> {
    if fs::read_dir(path).map_err(text)?.next().is_some() {
        return Err(format!("{} is not empty", path.display()));
    }
    let store = StoreId::random();
    fs::write(path.join("store.json"), serde_json::to_vec(&store).map_err(text)?).map_err(text)?;
    fs::write(path.join("capacity"), capacity.to_string()).map_err(text)?;
    println!("{{\"store\":\"{store}\"}}");
    Ok(())
}

fn identity(path: &Path) -> Result<StoreId> {
    let document =
        fs::read(path.join("store.json")).map_err(|_| format!("{} is not a Carrick store: it has no store.json", path.display()))?;
    serde_json::from_slice(&document).map_err(text)
}

fn show(path: &Path) -> Result<()> {
    println!("{{\"store\":\"{}\",\"version\":\"stand-in\"}}", identity(path)?);
    Ok(())
}

fn replicas(path: &Path) -> Vec<ReplicaSpec> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(".replica"))
        .filter_map(|entry| serde_json::from_slice(&fs::read(entry.path()).ok()?).ok())
        .collect()
}

fn serve(path: &Path, run: &RunDirectory) -> Result<()> {
    end_with(run);
    let store = identity(path)?;
    let _lock = lock(&path.join("lock")).ok_or_else(|| format!("store {} is in use by another carrick-replica process", path.display()))?;
    let _data = bind(&run.replica_socket(store))?;
    let control = bind(&run.replica_control(store))?;
    for stream in control.incoming() {
        let stream = stream.map_err(text)?;
        let mut reader = BufReader::new(stream.try_clone().map_err(text)?);
        let mut writer = stream;
        while let Ok(Some(request)) = read_line(&mut reader) {
            let answer = replica_answer(path, run, store, &request)?;
            let _ = write_line(&mut writer, &answer);
            if request == ReplicaRequest::Shutdown {
                for socket in [run.replica_socket(store), run.replica_control(store)] {
                    fs::remove_file(socket).map_err(text)?;
                }
                return Ok(());
            }
        }
    }
    Ok(())
}

/// As a store that is slow does.
fn take_time(path: &Path) {
    if path.join("slow").exists() {
        thread::sleep(Duration::from_secs(1));
    }
}

fn replica_answer(path: &Path, run: &RunDirectory, store: StoreId, request: &ReplicaRequest) -> Result<ReplicaAnswer> {
    let there = replicas(path);
    let capacity: u64 = fs::read_to_string(path.join("capacity")).map_err(text)?.parse().map_err(text)?;
    let reserved: u64 = there.iter().map(|spec| spec.size.bytes().get()).sum();
    match request {
        ReplicaRequest::Status => {
            let state = ReplicaState { promised: Term::ZERO, log_term: Term::ZERO, content: Content::Complete, synced: Synced::default() };
            let report = |spec| ReplicaReport { spec, state, position: Seq::ZERO, durable: Seq::ZERO, connected: false, failure: None };
            Ok(ReplicaAnswer::Status(Box::new(ReplicaProcessStatus {
                version: "stand-in".into(),
                store,
                path: path.into(),
                endpoints: vec![Endpoint::Unix(run.replica_socket(store))],
                usage: StoreUsage {
                    capacity: ByteLength::new(capacity),
                    free: ByteLength::new(capacity),
                    reserved: ByteLength::new(reserved),
                    ..StoreUsage::default()
                },
                poisoned: fs::read_to_string(path.join("poisoned")).ok(),
                scrub: ScrubReport::default(),
                replicas: there.into_iter().map(report).collect(),
            })))
        }
        ReplicaRequest::Create { spec } => {
            take_time(path);
            let refused = |code, message| Ok(ReplicaAnswer::Refused(ControlError { code, message }));
            if path.join("broken").exists() {
                return refused(ControlErrorCode::Failed, "the disk failed".into());
            }
            if let Some(known) = there.iter().find(|known| known.volume == spec.volume) {
                let message = format!("there is a replica of volume {} with {} bytes", spec.volume, known.size.bytes());
                return if known.size == spec.size { Ok(ReplicaAnswer::Done) } else { refused(ControlErrorCode::Conflict, message) };
            }
            if spec.size.bytes().get() > capacity - reserved {
                let (needed, free) = (spec.size.bytes(), capacity - reserved);
                let message = format!("no room in store {}: {needed} bytes are needed, {free} are free", path.display());
                return refused(ControlErrorCode::NoSpace, message);
            }
            let document = serde_json::to_vec(spec).map_err(text)?;
            fs::write(path.join(format!("{}.replica", spec.volume)), document).map_err(text)?;
            Ok(ReplicaAnswer::Done)
        }
        ReplicaRequest::Expand { spec } => {
            let refused = |code, message: String| Ok(ReplicaAnswer::Refused(ControlError { code, message }));
            let Some(known) = there.iter().find(|known| known.volume == spec.volume) else {
                return refused(ControlErrorCode::NotFound, format!("there is no replica of volume {}", spec.volume));
            };
            let more = spec.size.bytes().get().saturating_sub(known.size.bytes().get());
            if more > capacity - reserved {
                let message = format!("no room in store {}: {more} bytes are needed, {} are free", path.display(), capacity - reserved);
                return refused(ControlErrorCode::NoSpace, message);
            }
            if more > 0 {
                let document = serde_json::to_vec(spec).map_err(text)?;
                fs::write(path.join(format!("{}.replica", spec.volume)), document).map_err(text)?;
            }
            take_time(path);
            Ok(ReplicaAnswer::Done)
        }
        ReplicaRequest::Delete { volume } => {
            let _ = fs::remove_file(path.join(format!("{volume}.replica")));
            Ok(ReplicaAnswer::Done)
        }
        ReplicaRequest::Shutdown => Ok(ReplicaAnswer::Done),
    }
}

fn target(config: &Path, run: &RunDirectory) -> Result<()> {
    end_with(run);
    let config: TargetConfig = serde_json::from_slice(&fs::read(config).map_err(text)?).map_err(text)?;
    let fail = |code, message: &str| -> Result<()> {
        let error = ControlError { code, message: message.into() };
        fs::write(run.target_failure(config.volume), serde_json::to_vec(&error).map_err(text)?).map_err(text)?;
        Err(message.into())
    };
    let Some(_lock) = lock(&run.target_lock(config.volume)) else {
        return Err("another carrick-target serves this volume".into());
    };
    if config.name.starts_with("shy") {
        thread::sleep(Duration::from_secs(2));
    }
    if config.name.starts_with("no-ublk") {
        return fail(ControlErrorCode::Unsupported, "this kernel has no ublk driver: load the module ublk_drv");
    }
    if !config.tends && (!config.name.starts_with("rigid") || !device_size_file(&config, run).exists()) {
        fs::write(device_size_file(&config, run), config.size.bytes().to_string()).map_err(text)?;
    }
    write_limits(&config, run, &config.limits)?;
    write_rate(&config, run, config.rebuild_rate)?;
    let control = bind(&run.target_control(config.volume))?;
    let started = Instant::now();
    for stream in control.incoming() {
        let stream = stream.map_err(text)?;
        let mut reader = BufReader::new(stream.try_clone().map_err(text)?);
        let mut writer = stream;
        while let Ok(Some(request)) = read_line(&mut reader) {
            let answer = target_answer(&config, run, started, &request)?;
            let _ = write_line(&mut writer, &answer);
            if answer == TargetAnswer::Done && matches!(request, TargetRequest::Detach { .. }) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// At what it would copy.
fn write_rate(config: &TargetConfig, run: &RunDirectory, rate: Option<ByteLength>) -> Result<()> {
    if !config.name.starts_with("paced") {
        return Ok(());
    }
    let rate = rate.map_or(0, |rate| rate.get()).to_string();
    fs::write(run.root().join(format!("target/{}.rate", config.volume)), rate).map_err(text)
}

fn write_limits(config: &TargetConfig, run: &RunDirectory, limits: &Limits) -> Result<()> {
    if !config.name.starts_with("limited") {
        return Ok(());
    }
    let path = run.root().join(format!("target/{}.limits", config.volume));
    fs::write(path, serde_json::to_vec(limits).map_err(text)?).map_err(text)
}

/// How large the device is; it goes with the device.
fn device_size_file(config: &TargetConfig, run: &RunDirectory) -> PathBuf {
    run.root().join(format!("target/{}.size", config.volume))
}

fn size_of_device(config: &TargetConfig, run: &RunDirectory) -> Option<VolumeSize> {
    VolumeSize::new(fs::read_to_string(device_size_file(config, run)).ok()?.parse().ok()?).ok()
}

/// It is there once the replicas were compared.
fn verified_file(config: &TargetConfig, run: &RunDirectory) -> PathBuf {
    run.root().join(format!("target/{}.verified", config.volume))
}

fn target_answer(config: &TargetConfig, run: &RunDirectory, started: Instant, request: &TargetRequest) -> Result<TargetAnswer> {
    let device_file: PathBuf = run.root().join(format!("target/{}.device", config.volume));
    let named = |prefix| config.name.starts_with(prefix);
    match request {
        TargetRequest::Status => {
            let serving = !named("never-up") && (!named("slow-up") || started.elapsed() > Duration::from_secs(1));
            let has_device = serving && !config.tends;
            if has_device {
                fs::write(&device_file, &config.name).map_err(text)?;
            }
            let lost = run.root().join("lost").exists();
            let member = |replica: &carrick_replicator::control::ReplicaAddress| MemberReport {
                store: replica.store,
                endpoint: replica.endpoint.clone(),
                state: match serving {
                    true if lost => MemberState::Behind,
                    true => MemberState::InSync,
                    false => MemberState::Disconnected,
                },
                counts: true,
                copied: None,
                seconds_left: None,
                last_error: None,
            };
            Ok(TargetAnswer::Status(Box::new(TargetStatus {
                version: "stand-in".into(),
                volume: config.volume,
                phase: if serving { TargetPhase::Serving } else { TargetPhase::Electing },
                device: has_device.then(|| PathBuf::from("/dev/ublkb7")),
                size: size_of_device(config, run),
                grows_online: !named("rigid"),
                term: serving.then_some(Term::new(1 << 32)),
                replicas: config.replicas.iter().map(member).collect(),
                requests_in_flight: 0,
                waiting_for: (!serving).then(|| "a majority of its replicas: 0 of 3 answer".into()),
                copied: ByteLength::ZERO,
                repaired: 0,
                delays: Delays { requests: 3, micros: 4500, waiting: 2 },
                verification: verified_file(config, run).exists().then(|| VerificationReport {
                    compared: config.size.bytes(),
                    total: config.size.bytes(),
                    unsettled: u64::from(named("differs")),
                    places: Vec::from_iter(named("differs").then(|| BlockIndex::new(3))),
                    ..VerificationReport::default()
                }),
            })))
        }
        TargetRequest::SetRebuildRate { rate } => {
            write_rate(config, run, *rate)?;
            Ok(TargetAnswer::Done)
        }
        TargetRequest::Expand { size } => {
            if !named("rigid") {
                fs::write(device_size_file(config, run), size.bytes().to_string()).map_err(text)?;
            }
            Ok(TargetAnswer::Done)
        }
        TargetRequest::Verify => {
            fs::write(verified_file(config, run), []).map_err(text)?;
            Ok(TargetAnswer::Done)
        }
        TargetRequest::SetLimits { limits } => {
            write_limits(config, run, limits)?;
            Ok(TargetAnswer::Done)
        }
        TargetRequest::Detach { force } => {
            if named("busy") && !force {
                let message = format!("/dev/ublkb7 is in use: stop what has volume {} open, or use --force", config.name);
                return Ok(TargetAnswer::Refused(ControlError { code: ControlErrorCode::Busy, message }));
            }
            while named("deaf") && !run.root().join("cured").exists() {
                thread::sleep(Duration::from_millis(100));
            }
            let _ = fs::remove_file(device_file);
            let _ = fs::remove_file(device_size_file(config, run));
            let _ = fs::remove_file(run.target_control(config.volume));
            let _ = fs::remove_file(run.target_lock(config.volume));
            Ok(TargetAnswer::Done)
        }
    }
}
