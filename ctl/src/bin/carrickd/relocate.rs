//! Moving a replica that counts to another store, and emptying stores by that.
//!
//! **Order:** 1. the record: the new store is *joining*, the old one *retiring*, and the operation begins; 2. the new replica is made, and
//! the target started anew, which then knows both; 3. the target copies everything to the new one, takes it into the config, and leaves
//! the retiring one out of it as soon as all others count: I/O goes on, and no copy is lost meanwhile; 4. the record forgets the old one,
//! which is deleted when its store answers (as in `moves`). A crash anywhere is followed by the same step again. Until the new one counts
//! everything can be taken back.

use std::sync::Arc;

use carrick_backing_store::StoreId;
use carrick_backing_store::size::HumanSize;
use carrick_ctl::fault::{Fault, Reason};

use crate::context::{Context, unix_now};
use crate::metadata::{MoveStep, OperationRecord, OperationState, Outcome, State, Task, VolumeRecord};
use crate::operations::{self, Step};
use crate::{moves, stores, survey};

/// Seconds after which a replica whose move failed or was cancelled is moved again, if its store is still to be emptied.
const AGAIN_AFTER: u64 = 60;

/// Begins to move a replica to the given store, or to that with the most free space. Asked for again, finds what runs.
pub async fn begin(context: &Context, volume: &VolumeRecord, from: StoreId, with: Option<&str>) -> Result<OperationRecord, Fault> {
    let state = context.state();
    if let Some(running) = state.relocation(volume.id) {
        return same_move(running, from, with.map(|text| stores::resolve(&state, text).map(|record| record.id)).transpose()?);
    }
    let to = stores::choose_another(context, volume, with).await?;
    tracing::info!(volume = %volume.name, %from, %to, "a replica is to be moved");
    let mut record = volume.clone();
    record.replicas.push(to);
    record.joining.push(to);
    record.retiring.push(from);
    record.config_version += 1;
    let operation = OperationRecord::relocate(volume.id, volume.name.clone(), [from, to], unix_now());
    let state = operations::write(context, volume, Some(record), operation).await?;
    let gone = || Fault::new(Reason::Internal, &volume.name, "the operation that began is gone");
    state.relocation(volume.id).cloned().ok_or_else(gone)
}

fn same_move(running: &OperationRecord, from: StoreId, to: Option<StoreId>) -> Result<OperationRecord, Fault> {
    match running.task {
        Task::Move { from: known, to: goal, .. } if known == from && to.is_none_or(|to| to == goal) => Ok(running.clone()),
        _ => {
            let message = format!("operation {} moves a replica of volume {} already: wait for it, or cancel it", running.id, running.name);
            Err(Fault::new(Reason::OperationRuns, &running.name, message))
        }
    }
}

/// Empties a store of one volume's replica. `false`: that can't begin yet.
pub async fn evict(context: &Context, volume: &VolumeRecord, from: StoreId) -> Result<bool, Fault> {
    if !volume.replicas.contains(&from) || volume.retiring.contains(&from) {
        return Ok(true);
    }
    if has_just_ended(&context.state(), volume, from) {
        return Ok(false);
    }
    // What is begun is unfinished work of its own.
    moves::put_elsewhere(context, volume, from, None, "its store is being emptied").await?;
    Ok(true)
}

/// Whether a move of this replica has come to nothing so lately that the next one would, too, or that somebody wants it to stay for now.
fn has_just_ended(state: &State, volume: &VolumeRecord, from: StoreId) -> bool {
    let of_it =
        |operation: &&OperationRecord| operation.volume == volume.id && matches!(operation.task, Task::Move { from: it, .. } if it == from);
    let last = state.operations.values().rfind(of_it);
    let came_to_nothing = |state: &OperationState| matches!(state, OperationState::Failed(_) | OperationState::Cancelled);
    last.is_some_and(|operation| came_to_nothing(&operation.state) && unix_now() < operation.updated_unix.saturating_add(AGAIN_AFTER))
}

/// Does a step, or finds it done.
pub async fn step(context: &Arc<Context>, volume: &VolumeRecord, [from, to]: [StoreId; 2], step: MoveStep) -> Step {
    let place = |store| context.state().place(store);
    if step != MoveStep::Drop && !volume.retiring.contains(&from) {
        let message = format!("the replica in {} is no longer to go: the volume was salvaged, or it was replaced", place(from));
        return Outcome::Refused(Fault::new(Reason::OperationEnded, &volume.name, message)).into();
    }
    match step {
        MoveStep::Make => match moves::join(context, volume.clone()).await {
            Ok(_) => Outcome::Done(Vec::new()).into(),
            Err(fault) if matches!(fault.reason, Reason::NoSpace | Reason::ReplicaFailed | Reason::Unsupported) => {
                Outcome::Refused(fault).into()
            }
            Err(fault) => Outcome::Waits(fault).into(),
        },
        MoveStep::Copy if !volume.config().members.contains(&from) => Outcome::Done(Vec::new()).into(),
        MoveStep::Copy => Outcome::Waits(why_it_counts(context, volume, [from, to]).await).into(),
        MoveStep::Drop => Step { outcome: Outcome::Done(Vec::new()), volume: forgotten(volume, from) },
    }
}

/// Why the old replica counts still: how far the new one is, or what that waits for.
async fn why_it_counts(context: &Context, volume: &VolumeRecord, [from, to]: [StoreId; 2]) -> Fault {
    let state = context.state();
    let name = &volume.name;
    match survey::targets(context, [volume.id]).await.remove(&volume.id) {
        Some(Ok(status)) => {
            let counts = |store: StoreId| status.replicas.iter().any(|member| member.store == store && member.counts);
            let away = volume.replicas.iter().copied().find(|store| *store != from && *store != to && !counts(*store));
            let copied = status.replicas.iter().find(|member| member.store == to).and_then(|member| member.copied);
            let message = match (away, copied) {
                (Some(store), _) if counts(to) => {
                    format!("the replica in {} must count before that in {} can go", state.place(store), state.place(from))
                }
                (_, Some((copied, total))) => format!("{} of {} are copied", HumanSize(copied.get()), HumanSize(total.get())),
                (_, None) => format!("the replica in {} is about to be copied to", state.place(to)),
            };
            Fault::new(Reason::ReplicaCounts, name, message)
        }
        Some(Err(why)) => Fault::new(Reason::TargetUnreachable, name, format!("its carrick-target {why}")),
        None => Fault::new(Reason::TargetUnreachable, name, "its carrick-target is not there"),
    }
}

/// The volume without the replica that no longer counts. `None`: it is so.
fn forgotten(volume: &VolumeRecord, from: StoreId) -> Option<VolumeRecord> {
    if !volume.replicas.contains(&from) || !volume.retiring.contains(&from) {
        return None;
    }
    let mut record = volume.clone();
    record.replicas.retain(|store| *store != from);
    record.retiring.retain(|store| *store != from);
    record.leaving.push(from);
    record.change_replicas(volume.config().members.first().copied());
    Some(record)
}
