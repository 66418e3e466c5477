//! Showing, watching and cancelling operations. What each does is in a module of its own; how steps follow each other is in
//! `metadata/operations.rs`.

use std::sync::Arc;

use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::context::{Context, unix_now};
use crate::expand::step_name;
use crate::metadata::{Mutation, OperationId, OperationRecord, OperationState, State, Task};

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

/// All, or those of one volume, the newest first.
pub fn list(state: &State, volume: Option<&str>) -> Vec<v1::Operation> {
    let wanted = |operation: &&OperationRecord| volume.is_none_or(|name| operation.name.as_str() == name);
    let mut found: Vec<_> = state.operations.values().filter(wanted).collect();
    found.reverse();
    found.into_iter().map(message).collect()
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
    let cancelled = operation.cancelled(volume.size, unix_now())?;
    context.apply(Mutation::PutOperation(cancelled.clone().into())).await?;
    tracing::info!(volume = %name, operation = %cancelled.id, "cancelled");
    Ok(message(&cancelled))
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
                let response = v1::WatchOperationsResponse { operation: Some(message(operation)) };
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

/// As callers see it.
pub fn message(operation: &OperationRecord) -> v1::Operation {
    let Task::Expand { from, to, step } = operation.task;
    let (state, failure) = match &operation.state {
        OperationState::Running => (v1::OperationState::Running, None),
        OperationState::Succeeded => (v1::OperationState::Succeeded, None),
        OperationState::Failed(why) => (v1::OperationState::Failed, Some(why)),
        OperationState::Cancelled => (v1::OperationState::Cancelled, None),
    };
    let why = failure.or(operation.wait.as_ref().map(|wait| &wait.why));
    v1::Operation {
        id: operation.id.to_string(),
        kind: v1::OperationKind::Expand.into(),
        volume_id: operation.volume.to_string(),
        volume: operation.name.to_string(),
        state: state.into(),
        step: step_name(step).into(),
        reason: why.map(|why| why.reason.clone()),
        message: why.map(|why| why.message.clone()),
        waiting_since_unix: operation.wait.as_ref().map(|wait| wait.since_unix),
        attempts: operation.wait.as_ref().map_or(0, |wait| wait.attempts),
        created_unix: operation.created_unix,
        updated_unix: operation.updated_unix,
        idempotency_key: operation.key.clone(),
        from_bytes: from.bytes().get(),
        to_bytes: to.bytes().get(),
        notes: operation.notes.clone(),
    }
}
