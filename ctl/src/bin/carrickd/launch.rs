//! Starting, adopting, watching and ending one process.
//!
//! Processes outlive carrickd: each has a session of its own and writes to a file, not to a pipe that could break. A new
//! carrickd finds them by their control sockets. **Order of adoption:** connect and learn the process id, take a pidfd of
//! that id, connect again: if the same process still listens, the pidfd can't be of another one that got its number.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use carrick_backing_store::VolumeId;
use carrick_replicator::control::{ControlError, ControlErrorCode, Map, ReplicaAddress, ReplicaRequest, RunDirectory, TargetConfig};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::engine::Predecessor;
use rustix::fs::FlockOperation;

use crate::context::Context;
use crate::control::{self, CallError};
use crate::expand;
use crate::metadata::State;
use crate::observed::{Event, Exit, ProcessId};
use crate::pace;
use crate::pidfd::{Ending, PidFd};
use crate::programs;

/// A process that doesn't answer so long after its start is reported as hung. A replica's journal is replayed in less.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// First pause between two looks at a starting process; doubled up to [`ANSWER_PAUSE_MAX`].
const ANSWER_PAUSE_MIN: Duration = Duration::from_millis(5);
/// Longest pause between two looks: a hung process costs one wake-up in this time.
const ANSWER_PAUSE_MAX: Duration = Duration::from_secs(2);
/// A process that said that it ends is killed if it hasn't by then.
pub const END_LIMIT: Duration = Duration::from_secs(10);
/// For a target without a device to take the request to end. Somebody may wait for that who wants to attach the volume.
const TENDER_LIMIT: Duration = Duration::from_secs(5);
/// A log file over this size is put aside (as `.old`) at the next start of its process.
const LOG_MAX: u64 = 16 << 20;
/// Longest end of a log file that is searched for the last sentence of a process.
const LAST_WORDS_MAX: u64 = 4096;
/// How long the control socket of a process that holds a volume's lock is looked for.
const OTHER_LIMIT: Duration = Duration::from_secs(5);

/// What to do if a process isn't there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfAbsent {
    /// Start it.
    Start,
    /// Say so.
    Report,
}

/// A process that runs, and from where its words count.
struct Running {
    pidfd: Arc<PidFd>,
    log_start: u64,
    /// Somebody else started it.
    adopted: bool,
}

/// Finds or starts a process, and reports its life until it ends.
pub async fn look_after(context: Arc<Context>, id: ProcessId, if_absent: IfAbsent) {
    let mut running = match find(&context.control_socket(id)).await {
        Ok(Some(pidfd)) => {
            tracing::info!(process = %id, pid = pidfd.pid(), "adopted");
            Running { pidfd, log_start: log_length(&context.log_file(id)), adopted: true }
        }
        Ok(None) if if_absent == IfAbsent::Report => return context.node.send(Event::Absent(id)).await,
        Ok(None) => match start(&context, id).await {
            Ok(running) => running,
            Err(exit) => return context.node.send(Event::Ended { process: id, exit }).await,
        },
        Err(error) => {
            let exit = Exit::Died(error.to_string());
            return context.node.send(Event::Ended { process: id, exit }).await;
        }
    };
    loop {
        let exit = watch(&context, id, &running).await;
        if found_another(&context, id, &exit)
            && let Some(pidfd) = find_within(&context.control_socket(id), OTHER_LIMIT).await
        {
            tracing::info!(process = %id, pid = pidfd.pid(), "adopted another one that was faster");
            running = Running { pidfd, log_start: log_length(&context.log_file(id)), adopted: true };
            continue;
        }
        return context.node.send(Event::Ended { process: id, exit }).await;
    }
}

/// Whether a target ended because there is one already: an earlier carrickd was killed just after it had started that, and
/// it had no control socket yet when it was looked for. (A carrick-replica in this place is found at the next restart.)
fn found_another(context: &Context, id: ProcessId, exit: &Exit) -> bool {
    match (id, exit) {
        (ProcessId::Target(_), Exit::Failed(ControlError { code: ControlErrorCode::Busy, .. })) => true,
        // Nobody else starts a target of this volume now, so taking the lock for a moment disturbs none.
        (ProcessId::Target(volume), Exit::Failed(_)) => File::open(context.run.target_lock(volume))
            .is_ok_and(|lock| rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) == Err(rustix::io::Errno::WOULDBLOCK)),
        _ => false,
    }
}

/// Reports a running process's life; returns how it ended.
async fn watch(context: &Context, id: ProcessId, running: &Running) -> Exit {
    context.node.register(id, &running.pidfd);
    context.node.send(Event::Alive { process: id, pid: running.pidfd.pid(), adopted: running.adopted }).await;
    tokio::select! {
        biased;
        () = running.pidfd.ended() => {}
        () = attend(context, id) => {}
    }
    let ending = running.pidfd.reap();
    last_words(context, id, ending, running.log_start)
}

/// Waits until it answers, and sees to what it is then to be told. Ends never.
async fn attend(context: &Context, id: ProcessId) {
    until_it_answers(context, id).await;
    if let ProcessId::Replica(store) = id {
        expand::catch_up(context, store).await;
    }
    std::future::pending().await
}

async fn until_it_answers(context: &Context, id: ProcessId) {
    let socket = context.control_socket(id);
    let started = Instant::now();
    let mut pause = ANSWER_PAUSE_MIN;
    let mut reported = false;
    loop {
        let answer = match id {
            ProcessId::Replica(_) => control::replica_status(&socket).await.map(drop),
            ProcessId::Target(_) => control::target_status(&socket).await.map(drop),
        };
        match answer {
            Ok(()) => return context.node.send(Event::Answering(id)).await,
            Err(error) if !reported && started.elapsed() >= ANSWER_LIMIT => {
                tracing::warn!(process = %id, %error, "no answer");
                context.node.send(Event::Hung(id)).await;
                reported = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(ANSWER_PAUSE_MAX);
    }
}

/// The process that listens on a control socket. See the module for the order.
async fn find(socket: &Path) -> Result<Option<Arc<PidFd>>, CallError> {
    // Each time round, another process than before has the socket.
    for _ in 0..10 {
        let Some(pid) = control::listener(socket).await? else { return Ok(None) };
        let Ok(pidfd) = PidFd::open(pid) else { continue };
        if control::listener(socket).await? == Some(pid) {
            return Ok(Some(Arc::new(pidfd)));
        }
    }
    Err(io::Error::other("its process changes all the time").into())
}

async fn find_within(socket: &Path, limit: Duration) -> Option<Arc<PidFd>> {
    let started = Instant::now();
    while started.elapsed() < limit {
        if let Ok(Some(pidfd)) = find(socket).await {
            return Some(pidfd);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    None
}

async fn start(context: &Arc<Context>, id: ProcessId) -> Result<Running, Exit> {
    let starting = Arc::clone(context);
    let started = tokio::task::spawn_blocking(move || start_now(&starting, id)).await;
    let (pid, log_start) = started.map_err(|error| Exit::failed(error.to_string()))??;
    // Not reaped yet, so the number is still this child's.
    let pidfd = PidFd::open(pid).map_err(|error| Exit::failed(format!("can't watch process {pid}: {error}")))?;
    tracing::info!(process = %id, pid, "started");
    Ok(Running { pidfd: Arc::new(pidfd), log_start, adopted: false })
}

/// Does what waits for the disk, or copies the process: not for the loop's thread.
fn start_now(context: &Context, id: ProcessId) -> Result<(u32, u64), Exit> {
    let mut command = command(context, &context.state(), id)?;
    let (log, log_start) = open_log(&context.log_file(id)).map_err(|error| Exit::failed(error.to_string()))?;
    let log_error = log.try_clone().map_err(|error| Exit::failed(error.to_string()))?;
    command.stdin(Stdio::null()).stdout(log).stderr(log_error).current_dir("/");
    // SAFETY: between fork and exec the child calls only setsid, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let program = command.get_program().to_owned();
    let child = command.spawn().map_err(|error| Exit::failed(format!("can't start {}: {error}", program.display())))?;
    Ok((child.id(), log_start))
}

fn command(context: &Context, state: &State, id: ProcessId) -> Result<Command, Exit> {
    let gone = || Exit::failed("its record is gone");
    match id {
        ProcessId::Replica(store) => {
            let record = state.stores.get(&store).ok_or_else(gone)?;
            let mut command = Command::new(context.bin_dir.join(programs::name(id)));
            command.arg("serve").arg(&record.path).arg("--run-dir").arg(context.run.root());
            if let Some(listen) = record.listen {
                command.arg("--listen").arg(listen.to_string());
            }
            if record.insecure {
                command.arg("--insecure");
            }
            Ok(command)
        }
        ProcessId::Target(volume) => {
            let config = target_config(context, state, id).ok_or_else(gone)?;
            let path = context.run.target_config(volume);
            write_atomically(&path, &config).map_err(|error| Exit::failed(format!("{}: {error}", path.display())))?;
            // Of an earlier life: it must not be taken for this one's.
            let _ = fs::remove_file(context.run.target_failure(volume));
            let mut command = Command::new(context.bin_dir.join(programs::name(id)));
            command.arg("run").arg("--config").arg(&path).arg("--run-dir").arg(context.run.root());
            Ok(command)
        }
    }
}

fn target_config(context: &Context, state: &State, id: ProcessId) -> Option<TargetConfig> {
    let ProcessId::Target(id) = id else { return None };
    let volume = state.volumes.get(&id)?;
    let attachment = state.attachments.get(&id);
    let replica = |store: &_| ReplicaAddress { store: *store, endpoint: Endpoint::Unix(context.run.replica_socket(*store)) };
    Some(TargetConfig {
        volume: id,
        name: volume.name.to_string(),
        size: volume.size,
        block_size: volume.block_size,
        queue_depth: attachment.map_or(1, |attachment| attachment.queue_depth),
        host: attachment.is_some_and(|attachment| attachment.host),
        replicas: volume.replicas.iter().map(replica).collect(),
        retiring: volume.retiring.clone(),
        rebuild_rate: pace::rate(state, context.rebuild_rate, volume),
        records: Some(context.run.records_socket()),
        // Of the last one, which nobody takes part in any more.
        attachment: attachment.map_or_else(|| volume.config().attachment, |attachment| attachment.number),
        limits: volume.limits,
        map: attachment.map_or(Map::Never, |attachment| attachment.map),
        tends: attachment.is_none(),
        // One target is started after the other has ended, and the kernel gives a device to one process at a time.
        predecessor: Predecessor::Ended,
    })
}

/// Whoever reads the file finds the old content or the new, also after a crash.
fn write_atomically(path: &Path, config: &TargetConfig) -> io::Result<()> {
    let temporary = path.with_extension("json.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(config)?)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Opens a log for appending; also says where it ends now.
fn open_log(path: &Path) -> io::Result<(File, u64)> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    if log_length(path) > LOG_MAX {
        fs::rename(path, old_log(path)).map_err(named)?;
    }
    let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path).map_err(named)?;
    let length = file.metadata().map_err(named)?.len();
    Ok((file, length))
}

/// Where a log is put aside.
fn old_log(path: &Path) -> PathBuf {
    path.with_extension("log.old")
}

/// Removes what a process that never comes again has logged.
pub fn remove_logs(context: &Context, id: ProcessId) {
    let log = context.log_file(id);
    for file in [old_log(&log), log] {
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!(file = %file.display(), %error, "can't be removed"),
            _ => {}
        }
    }
}

fn log_length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Why a process ended: what it wrote into its failure file, or its last line, or the kernel's word.
fn last_words(context: &Context, id: ProcessId, ending: Ending, log_start: u64) -> Exit {
    if let ProcessId::Target(volume) = id
        && let Ok(text) = fs::read(context.run.target_failure(volume))
        && let Ok(error) = serde_json::from_slice::<ControlError>(&text)
    {
        return Exit::Failed(error);
    }
    let log = context.log_file(id);
    match ending {
        Ending::Code(code) if code != 0 => {
            Exit::failed(last_line(&log, log_start).unwrap_or_else(|| format!("{ending}; see {}", log.display())))
        }
        Ending::Code(_) | Ending::Signal(_) | Ending::Unknown => Exit::Died(ending.to_string()),
    }
}

/// The last line of a log that isn't empty, if it was written after `start`.
fn last_line(path: &Path, start: u64) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(start.max(length.saturating_sub(LAST_WORDS_MAX)))).ok()?;
    let mut text = Vec::new();
    file.take(LAST_WORDS_MAX).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    Some(line.strip_prefix("Error: ").or_else(|| line.strip_prefix("error: ")).unwrap_or(line).to_owned())
}

/// Asks a process that nobody wants any more to end.
pub async fn stop(context: Arc<Context>, id: ProcessId) {
    let socket = context.control_socket(id);
    let Some(pidfd) = context.node.pidfd(id) else { return };
    match id {
        ProcessId::Replica(_) => {
            if let Err(error) = control::replica(&socket, &ReplicaRequest::Shutdown, control::SHUTDOWN_LIMIT).await {
                tracing::warn!(process = %id, %error, "didn't take the request to end");
            }
        }
        ProcessId::Target(volume) if tends(&context.run, volume) => {
            // It has no device, and what it was copying is copied again: it may as well be killed.
            if !matches!(tokio::time::timeout(TENDER_LIMIT, control::detach(&socket, false)).await, Ok(Ok(()))) {
                tracing::warn!(process = %id, "doesn't answer, and is killed");
                pidfd.kill();
            }
        }
        ProcessId::Target(_) => {
            if let Err(error) = control::detach(&socket, false).await {
                tracing::warn!(process = %id, %error, "runs without an attachment, and doesn't end");
                return context.node.send(Event::Refused(id)).await;
            }
        }
    }
    kill_unless_it_ends(id, &pidfd).await;
}

/// Whether the target that runs makes no device.
fn tends(run: &RunDirectory, volume: VolumeId) -> bool {
    let config = fs::read(run.target_config(volume)).ok();
    config.and_then(|text| serde_json::from_slice::<TargetConfig>(&text).ok()).is_some_and(|config| config.tends)
}

/// Kills a process, for another one to be started in its place.
pub async fn kill(context: &Context, id: ProcessId, pidfd: &PidFd) {
    context.node.send(Event::Killed(id)).await;
    pidfd.kill();
}

/// The same by its name, if it runs.
pub async fn kill_what_runs(context: &Context, id: ProcessId) {
    if let Some(pidfd) = context.node.pidfd(id) {
        kill(context, id, &pidfd).await;
    }
}

/// For a process that is done: losing it loses nothing (a replica's acknowledged writes survive its death).
pub async fn kill_unless_it_ends(id: ProcessId, pidfd: &PidFd) {
    if tokio::time::timeout(END_LIMIT, pidfd.ended()).await.is_err() {
        tracing::warn!(process = %id, "is killed: it didn't end in time");
        pidfd.kill();
    }
}

/// The processes whose control sockets are in the run directory.
pub fn leftovers(run: &RunDirectory) -> Vec<ProcessId> {
    let named = |socket: PathBuf| {
        let folder = socket.parent().map(Path::to_path_buf).unwrap_or_default();
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.strip_suffix(".control").map(str::to_owned)))
    };
    // Any id will do: only the folder counts.
    let replicas = named(run.replica_control(carrick_backing_store::StoreId::from_bytes([0; 16])));
    let targets = named(run.target_control(carrick_backing_store::VolumeId::from_bytes([0; 16])));
    let replicas = replicas.filter_map(|name| name.parse().ok().map(ProcessId::Replica));
    let targets = targets.filter_map(|name| name.parse().ok().map(ProcessId::Target));
    replicas.chain(targets).collect()
}

/// Removes what a process that is gone left in the run directory.
pub fn clean_up(run: &RunDirectory, id: ProcessId) {
    let files = match id {
        ProcessId::Replica(store) => vec![run.replica_socket(store), run.replica_control(store)],
        ProcessId::Target(volume) => {
            vec![run.target_control(volume), run.target_config(volume), run.target_failure(volume), run.target_lock(volume)]
        }
    };
    for file in files {
        // Most are gone already.
        let _ = fs::remove_file(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_sentence_is_found_and_an_older_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.log");
        fs::write(&path, "Error: old\n").unwrap();
        assert_eq!(last_line(&path, 11), None);
        assert_eq!(last_line(&path, 0).as_deref(), Some("old"));
        fs::write(&path, format!("Error: old\n{}\nstore /x is in use\n\n", "y".repeat(10_000))).unwrap();
        assert_eq!(last_line(&path, 11).as_deref(), Some("store /x is in use"));
        assert_eq!(last_line(Path::new("/nonexistent"), 0), None);
    }

    #[test]
    fn logs_do_not_grow_without_bound() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.log");
        File::create(&path).unwrap().set_len(LOG_MAX + 1).unwrap();
        assert_eq!(open_log(&path).unwrap().1, 0);
        assert_eq!(fs::metadata(folder.path().join("x.log.old")).unwrap().len(), LOG_MAX + 1);
        fs::write(&path, "abc").unwrap();
        assert_eq!(open_log(&path).unwrap().1, 3);
    }
}
