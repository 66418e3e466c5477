//! `carrick-replica serve`: puts store, sockets and server together, and takes them apart in order.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use carrick_backing_store::ReplicaStore;
use carrick_backing_store::disk::Disk;
use carrick_backing_store::epoch_map::{EpochMap, OpenOptions};
use carrick_replicator::control::{ControlError, ControlErrorCode, ReplicaAnswer, RunDirectory};
use carrick_replicator::io::{ControlSocket, Reactor, ReplicaListeners, Server, ServerError, listen_unix, mailbox};

use super::ServeArguments;
use super::signals::EndSignals;
use super::store::open_exclusively;

/// How long the end waits for answers to be written.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// A socket file that goes away at the end.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

pub(crate) fn serve(arguments: &ServeArguments) -> anyhow::Result<()> {
    // Before any thread starts, so that all of them leave these signals to the one that waits for them.
    let signals = EndSignals::block().context("can't block signals")?;
    // Before the store is opened, which may take long after a loss of power.
    drop(Reactor::new().map_err(ServerError::Ring)?);
    let path = std::path::absolute(&arguments.store).with_context(|| format!("can't tell where {} is", arguments.store.display()))?;
    let mut disk = open_exclusively(&path)?;
    // A file that has all its space was made so on purpose: what it gave back could be wanting later.
    let has_all_space = disk.preparable().with_context(|| format!("can't measure {}", path.display()))?.is_none();
    disk.punch_holes(!arguments.keep_space && !has_all_space);
    let store = EpochMap::open(disk, &path, &OpenOptions { cache: arguments.cache, overcommit: arguments.overcommit })?;
    let id = store.id();

    let run = RunDirectory::new(&arguments.run_dir);
    make_folders(&run.replica_socket(id))?;
    // The store's lock is held: whatever socket is found belongs to a dead process.
    let listeners = ReplicaListeners::bind(&run.replica_socket(id), arguments.listen, arguments.insecure)?;
    let control_path = run.replica_control(id);
    let control = listen_unix(&control_path).with_context(|| format!("can't listen on {}", control_path.display()))?;
    let control_file = SocketFile(control_path);
    let endpoints: Vec<_> = listeners.endpoints().iter().map(ToString::to_string).collect();

    let (sender, mailbox) = mailbox().context("can't make an eventfd")?;
    let server = Server::new(store, path.clone(), listeners, mailbox, arguments.scrub_rate)?;
    let control = ControlSocket::serve(control, sender.clone(), ReplicaAnswer::Refused).context("can't start the control thread")?;
    signals.forward(sender).context("can't start the signal thread")?;
    tracing::info!(store = %id, path = %path.display(), endpoints = endpoints.join(" "), "serving");

    let (store, waiting) = server.run()?;
    // The sockets are gone before the lock is, so that a successor's are not taken for ours.
    drop(control_file);
    let closed = store.close();
    let answer = match &closed {
        Ok(()) => ReplicaAnswer::Done,
        Err(error) => ReplicaAnswer::Refused(ControlError { code: ControlErrorCode::Failed, message: error.to_string() }),
    };
    waiting.into_iter().for_each(|reply| reply.send(answer.clone()));
    control.drain(DRAIN_LIMIT);
    closed?;
    tracing::info!(store = %id, "ended; everything is on stable media");
    Ok(())
}

/// Makes the folder of the sockets, private, and the run directory, which others may pass through.
fn make_folders(socket: &Path) -> anyhow::Result<()> {
    let Some(folder) = socket.parent() else { return Ok(()) };
    let failed = |path: &Path| format!("can't make the folder {}", path.display());
    if let Some(root) = folder.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(root).with_context(|| failed(root))?;
    }
    DirBuilder::new().recursive(true).mode(0o700).create(folder).with_context(|| failed(folder))
}
