//! Going on with operations, showing, watching and cancelling them. What each does is in a module of its own; how steps follow each
//! other is in `metadata/operations.rs`.

use std::sync::Arc;

use carrick_backing_store::VolumeId;
use carrick_backing_store::size::HumanSize;
use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::context::{Context, unix_now};
use crate::metadata::{Mutation, OperationId, OperationRecord, OperationState, Outcome, State, Task, VolumeRecord};
use crate::{expand, relocate};

/// Changes that a watcher has not read before its stream waits for it.
const WATCH_QUEUE: usize = 16;

/// What a watcher reads.
pub type Watch = ReceiverStream<Result<v1::WatchOperationsResponse, Status>>;

/// The operation of this number.
pub fn resolve<'a>(state: &'a State, text: &str) -> Result<&'a OperationRecord, Fault> {
    let id: OperationId =
        text.parse().map_err(|_| Fault::invalid("operation", format!("{text:?} is not an operation: they have numbers, such as 17")))?;
    state.operations.get(&id).ok_or_else(|| {
        let message = format!("there is no operation {text}, or it ended long ago; see carrick operation list");
        Fault::new(Reason::OperationNotFound, text, message)
    })
}

/// Those that are asked for, the newest first.
pub fn list(state: &State, asked: &v1::ListOperationsRequest) -> Vec<v1::Operation> {
    let wanted = |operation: &&OperationRecord| {
        asked.volume.as_ref().is_none_or(|name| operation.name.as_str() == name) && (operation.is_running() || !asked.only_running)
    };
    let mut found: Vec<_> = state.operations.values().filter(wanted).collect();
    found.reverse();
    found.into_iter().map(|operation| message(state, operation)).collect()
}

/// Ends an operation, if that harms nobody.
pub async fn cancel(context: &Context, text: &str) -> Result<v1::Operation, Fault> {
    let name = resolve(&context.state(), text)?.name.clone();
    // Whoever does its steps has the volume's lock.
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let operation = resolve(&state, text)?;
    let Some(volume) = state.volumes.get(&operation.volume) else {
        return Err(Fault::new(Reason::OperationEnded, operation.id, format!("volume {name} is gone")));
    };
    let cancelled = operation.cancelled(volume, unix_now())?;
    write(context, volume, operation.undone(volume), cancelled.clone()).await?;
    tracing::info!(volume = %name, operation = %cancelled.id, "cancelled");
    Ok(message(&context.state(), &cancelled))
}

/// What came of a step, and what its volume is to be along with that.
pub struct Step {
    /// What came of it.
    pub outcome: Outcome,
    /// The volume, if it changes.
    pub volume: Option<VolumeRecord>,
}

impl From<Outcome> for Step {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, volume: None }
    }
}

/// Does as many steps of all operations on a volume as can be done now. `false`: one waits.
pub async fn go_on(context: &Arc<Context>, volume: VolumeId) -> Result<bool, Fault> {
    let running: Vec<_> = context.state().stepping(volume).map(|operation| operation.id).collect();
    let mut finished = true;
    for id in running {
        finished &= go_on_with(context, id).await?;
    }
    Ok(finished)
}

async fn go_on_with(context: &Arc<Context>, id: OperationId) -> Result<bool, Fault> {
    loop {
        let state = context.state();
        let Some(operation) = state.operations.get(&id).filter(|operation| operation.is_running()) else { return Ok(true) };
        let Some(volume) = state.volumes.get(&operation.volume) else { return Ok(true) };
        let Step { outcome, volume: new } = match operation.task {
            Task::Expand { to, step, .. } => expand::step(context, volume, to, step).await,
            Task::Move { from, to, step } => relocate::step(context, volume, [from, to], step).await,
            // Its steps are the records'.
            Task::Create | Task::Attach | Task::Detach | Task::Delete | Task::Build { .. } => return Ok(true),
        };
        context.crash_at(operation.task.step_name());
        let waits = matches!(outcome, Outcome::Waits(_));
        let next = operation.after(outcome, unix_now());
        let failed = matches!(next.state, OperationState::Failed(_));
        if !next.is_running() {
            tracing::info!(volume = %volume.name, operation = %next.id, state = ?next.state, "has ended");
        }
        let state = context.state();
        let volume = state.volumes.get(&operation.volume).unwrap_or(volume);
        write(context, volume, if failed { operation.undone(volume) } else { new }, next).await?;
        if waits {
            return Ok(false);
        }
    }
}

/// What follows the records can't go on: the operation that says so says why, too.
pub async fn waits(context: &Context, volume: VolumeId, is_it: impl Fn(&Task) -> bool, fault: &Fault) -> Result<(), Fault> {
    let state = context.state();
    let Some(operation) = state.running(volume).find(|operation| is_it(&operation.task)) else { return Ok(()) };
    let waiting = operation.after(Outcome::Waits(fault.clone()), unix_now());
    context.apply(Mutation::PutOperation(waiting.into())).await.map(drop)
}

/// Writes down how far an operation is, and what its volume has become with that.
pub async fn write(
    context: &Context,
    volume: &VolumeRecord,
    new: Option<VolumeRecord>,
    operation: OperationRecord,
) -> Result<Arc<State>, Fault> {
    let change = new.map(|new| Mutation::ReplaceVolume { expected: volume.clone().into(), new: new.into() });
    let all = change.into_iter().chain([Mutation::PutOperation(operation.into())]).collect();
    context.apply(Mutation::All(all)).await
}

/// Sends an operation whenever it changes: one until it has ended, or all that run for as long as somebody listens.
pub fn watch(context: &Arc<Context>, only: Option<OperationId>) -> Watch {
    let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
    let context = Arc::clone(context);
    tokio::spawn(async move {
        let mut changes = context.operations.subscribe();
        let mut sent = State::default().operations;
        loop {
            let state = context.state();
            for operation in state.operations.values() {
                let is_wanted = only.map_or(operation.is_running() || sent.contains_key(&operation.id), |id| id == operation.id);
                if !is_wanted || sent.get(&operation.id) == Some(operation) {
                    continue;
                }
                sent.insert(operation.id, operation.clone());
                let response = v1::WatchOperationsResponse { operation: Some(message(&state, operation)) };
                if sender.send(Ok(response)).await.is_err() {
                    return;
                }
            }
            if only.is_some_and(|id| state.operations.get(&id).is_none_or(|operation| !operation.is_running())) {
                return;
            }
            // Only what may still change needs to be remembered.
            sent.retain(|_, operation| operation.is_running());
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// What comes of it, in words.
pub fn goal(operation: &v1::Operation) -> String {
    match (operation.kind(), &operation.from_store, &operation.to_store) {
        (v1::OperationKind::Move, Some(from), Some(to)) => format!("its replica in {from} goes to {to}"),
        (v1::OperationKind::Replace, Some(from), Some(to)) => format!("its replica in {from} is replaced by one in {to}"),
        (v1::OperationKind::Add, _, Some(to)) => format!("it gets one more replica, in {to}"),
        (v1::OperationKind::Create, ..) => "it is made".into(),
        (v1::OperationKind::Attach, ..) => "it is attached".into(),
        (v1::OperationKind::Detach, ..) => "it is detached".into(),
        (v1::OperationKind::Delete, ..) => "it is deleted".into(),
        _ => format!("it becomes larger ({})", HumanSize(operation.to_bytes)),
    }
}

/// As callers see it.
pub fn message(state: &State, operation: &OperationRecord) -> v1::Operation {
    let (status, failure) = match &operation.state {
        OperationState::Running => (v1::OperationState::Running, None),
        OperationState::Succeeded => (v1::OperationState::Succeeded, None),
        OperationState::Failed(why) => (v1::OperationState::Failed, Some(why)),
        OperationState::Cancelled => (v1::OperationState::Cancelled, None),
    };
    let why = failure.or(operation.wait.as_ref().map(|wait| &wait.why));
    let (mut sizes, mut stores) = ([0, 0], [None, None]);
    let kind = match operation.task {
        Task::Expand { from, to, .. } => {
            sizes = [from, to].map(|size| size.bytes().get());
            v1::OperationKind::Expand
        }
        Task::Move { from, to, .. } => {
            stores = [Some(from), Some(to)];
            v1::OperationKind::Move
        }
        Task::Build { instead_of, to, .. } => {
            stores = [instead_of, Some(to)];
            if instead_of.is_some() { v1::OperationKind::Replace } else { v1::OperationKind::Add }
        }
        Task::Create => v1::OperationKind::Create,
        Task::Attach => v1::OperationKind::Attach,
        Task::Detach => v1::OperationKind::Detach,
        Task::Delete => v1::OperationKind::Delete,
    };
    let [from_store, to_store] = stores.map(|store| store.map(|store| state.place(store)));
    v1::Operation {
        id: operation.id.to_string(),
        kind: kind.into(),
        volume_id: operation.volume.to_string(),
        volume: operation.name.to_string(),
        state: status.into(),
        step: operation.task.step_name().into(),
        reason: why.map(|why| why.reason.clone()),
        message: why.map(|why| why.message.clone()),
        waiting_since_unix: operation.wait.as_ref().map(|wait| wait.since_unix),
        attempts: operation.wait.as_ref().map_or(0, |wait| wait.attempts),
        created_unix: operation.created_unix,
        updated_unix: operation.updated_unix,
        idempotency_key: operation.key.clone(),
        from_bytes: sizes[0],
        to_bytes: sizes[1],
        notes: operation.notes.clone(),
        from_store,
        to_store,
    }
}
