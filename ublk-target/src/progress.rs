//! What the main thread has got to, for the status that the queue thread answers.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use carrick_backing_store::VolumeSize;
use carrick_replicator::control::TargetPhase;

/// Where the main thread stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The phase.
    pub phase: TargetPhase,
    /// The block device, once there is one.
    pub device: Option<PathBuf>,
    /// How large that is.
    pub size: Option<VolumeSize>,
    /// Whether it may grow while it is used.
    pub grows_online: bool,
    /// What the main thread waits for, in words, if it does.
    pub waiting_for: Option<String>,
}

impl Default for Step {
    fn default() -> Self {
        Self { phase: TargetPhase::Electing, device: None, size: None, grows_online: false, waiting_for: None }
    }
}

/// The shared step.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Mutex<Step>>);

impl Progress {
    /// As it is now.
    #[must_use]
    pub fn get(&self) -> Step {
        self.lock().clone()
    }

    /// Changes it.
    pub fn set(&self, change: impl FnOnce(&mut Step)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Step> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
