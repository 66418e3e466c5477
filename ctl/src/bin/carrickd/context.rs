//! What every part of the daemon has at hand.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use carrick_backing_store::ByteLength;
use carrick_ctl::fault::{Fault, Reason};
use carrick_replicator::control::RunDirectory;
use tokio::sync::{Notify, RwLockReadGuard};

use crate::locks::Locks;
use crate::metadata::{MetadataError, MetadataStore, Mutation, NewEvent, Occasion, State};
use crate::node::NodeHandle;
use crate::observed::ProcessId;
use crate::reconcile::Moment;
use crate::verify::Verifications;

/// See the module.
pub struct Context {
    /// The files shared with the other processes; an absolute path.
    pub run: RunDirectory,
    /// What must survive a restart of the machine.
    pub state_dir: PathBuf,
    /// Where carrick-replica and carrick-target are.
    pub bin_dir: PathBuf,
    /// What is wanted.
    pub metadata: Arc<dyn MetadataStore>,
    /// What is there.
    pub node: NodeHandle,
    /// One operation at a time for each volume.
    pub locks: Locks,
    /// Stores are added and removed one after the other.
    pub stores: tokio::sync::Mutex<()>,
    /// Who may change something.
    pub gate: Gate,
    /// A replica that doesn't count for so long is replaced; `None`: never.
    pub replace_after: Option<Duration>,
    /// How often the replicas of each attached volume are compared; `None`: when somebody asks for it.
    pub verify_every: Option<Duration>,
    /// Most bytes that all volumes of the node copy in a second to replicas that lack them; `None`: as many as go.
    pub rebuild_rate: Option<ByteLength>,
    /// Tells whoever watches operations that one has changed.
    pub operations: tokio::sync::watch::Sender<()>,
    /// For tests: the daemon dies when this step of an operation is done, and before that is written down.
    pub crash_at: Option<String>,
    /// Whoever may copy may have changed.
    pub rates: Notify,
    /// Something was noted that is not written down yet.
    pub noted: Notify,
    /// The comparisons of replicas whose end is waited for.
    pub verifications: Verifications,
    /// Whether this daemon ends: then whoever waits for news has waited long enough.
    pub ending: tokio::sync::watch::Sender<bool>,
    /// When this carrickd started.
    pub started: Instant,
}

/// Operations pass it; once it is closed no new one does, and whoever closed it waits for those inside.
#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    inside: tokio::sync::RwLock<()>,
}

impl Gate {
    /// Lets an operation in until it drops the pass.
    pub async fn enter(&self) -> Result<RwLockReadGuard<'_, ()>, Fault> {
        let pass = self.inside.read().await;
        if self.closed.load(Ordering::Relaxed) {
            return Err(Fault::new(Reason::ShuttingDown, "carrickd", "this node is being shut down"));
        }
        Ok(pass)
    }

    /// Lets nobody in any more, and waits until nobody is inside.
    pub async fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        drop(self.inside.write().await);
    }

    /// Lets operations in again.
    pub fn open(&self) {
        self.closed.store(false, Ordering::Relaxed);
    }
}

impl Context {
    /// The time, and what depends on it.
    pub fn moment(&self) -> Moment {
        Moment { now: Instant::now(), unix: unix_now(), replace_after: self.replace_after }
    }

    /// What is wanted now.
    pub fn state(&self) -> Arc<State> {
        self.metadata.state()
    }

    /// Changes what is wanted, durably, and lets the node follow.
    pub async fn apply(&self, mutation: Mutation) -> Result<Arc<State>, Fault> {
        self.apply_saying(None, mutation).await
    }

    /// The same, with something that the log is to say of it: why, or with which result.
    pub async fn apply_saying(&self, remark: Option<String>, mutation: Mutation) -> Result<Arc<State>, Fault> {
        let occasion = Occasion { at_unix: unix_now(), remark };
        let state = self.metadata.apply_on(occasion, mutation).await.map_err(metadata_fault)?;
        self.operations.send_replace(());
        self.follow();
        Ok(state)
    }

    /// The records have changed: the node follows.
    pub fn follow(&self) {
        self.node.poke();
        self.rates.notify_one();
    }

    /// Something happened that no change tells of. It is written down soon, or with the next change.
    pub fn note(&self, events: Vec<NewEvent>) {
        if !events.is_empty() {
            self.metadata.note(events);
            self.noted.notify_one();
        }
    }

    /// Dies here, if a test wants that.
    pub fn crash_at(&self, step: &str) {
        if self.crash_at.as_deref() == Some(step) {
            tracing::error!(step, "dies on purpose");
            std::process::abort();
        }
    }

    /// A process's control socket.
    pub fn control_socket(&self, id: ProcessId) -> PathBuf {
        match id {
            ProcessId::Replica(store) => self.run.replica_control(store),
            ProcessId::Target(volume) => self.run.target_control(volume),
        }
    }

    /// What a process says on its standard output and error.
    pub fn log_file(&self, id: ProcessId) -> PathBuf {
        let name = match id {
            ProcessId::Replica(store) => format!("replica-{store}.log"),
            ProcessId::Target(volume) => format!("target-{volume}.log"),
        };
        self.state_dir.join("log").join(name)
    }
}

/// Seconds since 1970.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What a caller is told when a record can't be changed. Callers check the rules before, for a better text; one of them
/// failing here means that somebody else was faster.
fn metadata_fault(error: MetadataError) -> Fault {
    let message = error.to_string();
    match error {
        MetadataError::NameTaken(name) => Fault::new(Reason::VolumeExists, name, message),
        MetadataError::NoStore(store) => Fault::new(Reason::StoreNotFound, store, message),
        MetadataError::StoreInUse { store, .. } => Fault::new(Reason::StoreInUse, store, message),
        MetadataError::Attached(name) => Fault::new(Reason::VolumeAttached, name, message),
        MetadataError::StillCounts(name) | MetadataError::NotReady(name) => Fault::new(Reason::VolumeNotReady, name, message),
        MetadataError::OperationOver(id) => Fault::new(Reason::OperationEnded, id, message),
        MetadataError::Changed(volume) => Fault::new(Reason::VolumeNotReady, volume, message),
        MetadataError::SameStoreTwice { name, .. } | MetadataError::BadConfig(name) => Fault::new(Reason::Internal, name, message),
        MetadataError::InUse(path) | MetadataError::UnknownFormat { path, .. } | MetadataError::Damaged { path, .. } => {
            Fault::new(Reason::Internal, path.display(), message)
        }
        MetadataError::Storage { path, .. } => Fault::new(Reason::MetadataUnreachable, path.display(), message),
    }
}
