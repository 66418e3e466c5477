//! Asks all processes that answer how they do, at the same time.

use std::collections::{BTreeMap, BTreeSet};

use carrick_backing_store::{StoreId, VolumeId};
use carrick_replicator::control::{ReplicaProcessStatus, TargetStatus};
use tokio::task::JoinSet;

use crate::context::Context;
use crate::control::{self, CallError};
use crate::metadata::State;
use crate::observed::{Answers, Observed, Process, ProcessId, ProcessState};
use crate::programs;
use crate::view::View;

/// Looks at everything, with all answers that can be had.
pub async fn look<T>(context: &Context, what: impl FnOnce(&View<'_>) -> T) -> T {
    let state = context.state();
    let volumes = with_targets(&state, &context.node.observed());
    let (replicas, targets) = tokio::join!(self::replicas(context, state.stores.keys().copied()), self::targets(context, volumes));
    let observed = context.node.observed();
    let outdated = programs::outdated(&context.bin_dir, &state, &observed);
    what(&View {
        state: &state,
        trouble: context.metadata.trouble(),
        observed: &observed,
        outdated: &outdated,
        replicas: &replicas,
        targets: &targets,
        moment: context.moment(),
    })
}

/// The volumes that have a target, or are to have one since they are attached.
pub fn with_targets(state: &State, observed: &Observed) -> BTreeSet<VolumeId> {
    let target = |id: &ProcessId| match id {
        ProcessId::Target(volume) => Some(*volume),
        ProcessId::Replica(_) => None,
    };
    observed.processes.keys().filter_map(target).chain(state.attachments.keys().copied()).collect()
}

/// An answer, or why there is none.
pub type Answer<T> = Result<T, String>;

/// How these stores do.
pub async fn replicas(context: &Context, stores: impl IntoIterator<Item = StoreId>) -> BTreeMap<StoreId, Answer<ReplicaProcessStatus>> {
    let observed = context.node.observed();
    let mut answers = BTreeMap::new();
    let mut asking = JoinSet::new();
    for store in stores {
        match why_silent(&observed, ProcessId::Replica(store)) {
            Some(why) => drop(answers.insert(store, Err(why))),
            None => {
                let socket = context.run.replica_control(store);
                let starting = starting(&observed, ProcessId::Replica(store));
                asking.spawn(async move { (store, control::replica_status(&socket).await.map_err(|error| explain(&error, starting))) });
            }
        }
    }
    answers.extend(asking.join_all().await);
    answers
}

/// How the targets of these volumes do.
pub async fn targets(context: &Context, volumes: impl IntoIterator<Item = VolumeId>) -> BTreeMap<VolumeId, Answer<TargetStatus>> {
    let observed = context.node.observed();
    let mut answers = BTreeMap::new();
    let mut asking = JoinSet::new();
    for volume in volumes {
        match why_silent(&observed, ProcessId::Target(volume)) {
            Some(why) => drop(answers.insert(volume, Err(why))),
            None => {
                let socket = context.run.target_control(volume);
                let starting = starting(&observed, ProcessId::Target(volume));
                asking.spawn(async move { (volume, control::target_status(&socket).await.map_err(|error| explain(&error, starting))) });
            }
        }
    }
    answers.extend(asking.join_all().await);
    answers
}

/// Why a process is not asked at all; `None` if it is. One that never answered yet is asked: it may by now.
pub fn why_silent(observed: &Observed, id: ProcessId) -> Option<String> {
    let Some(process) = observed.processes.get(&id) else { return Some("is not started yet".into()) };
    match process.state {
        ProcessState::Alive { answers: Answers::Hung, pid, .. } => Some(format!("process {pid} runs but doesn't answer")),
        ProcessState::Alive { .. } | ProcessState::Stopping { .. } => None,
        ProcessState::Unseen | ProcessState::Launching => Some(being_started(process)),
        ProcessState::Down { .. } => Some(process.last_exit.as_ref().map_or("is not running".into(), ToString::to_string)),
    }
}

/// What to say of a process that doesn't answer although it is there: if it never did, how the one before it ended.
fn starting(observed: &Observed, id: ProcessId) -> Option<String> {
    let process = observed.processes.get(&id)?;
    matches!(process.state, ProcessState::Alive { answers: Answers::NotYet, .. }).then(|| being_started(process))
}

fn being_started(process: &Process) -> String {
    let last = process.last_exit.as_ref().map_or(String::new(), |exit| format!(" (before: {exit})"));
    format!("is being started{last}")
}

fn explain(error: &CallError, starting: Option<String>) -> String {
    starting.unwrap_or_else(|| error.to_string())
}
