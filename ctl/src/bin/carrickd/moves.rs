//! Replacing a replica that no longer counts by one in another store, and adding one.
//!
//! **Order:** 1. the record: the new store takes the old one's place, the new one is *joining*, the old one *leaving*; 2. the new
//! replica; 3. the target is killed, and with its next start, milliseconds later, it knows the new store: I/O waits so long; 4. the
//! record: nobody joins any more; 5. the old replica is deleted, when its store answers; 6. the record: nobody leaves any more. A crash
//! anywhere is followed by the same steps again from 2 on. The new replica counts once the target has copied everything to it. A target
//! that waits since all of its replicas have lost something is not killed: the operator is to decide, who alone may end it.

use std::time::Duration;

use carrick_backing_store::{ReplicaSpec, StoreId, VolumeId};
use carrick_ctl::fault::{Fault, Reason};
use carrick_replicator::control::{MemberState, TargetPhase};

use crate::context::Context;
use crate::control;
use crate::metadata::{Mutation, OperationRecord, Task, VolumeRecord};
use crate::observed::ProcessId;
use crate::volumes::{REPLICAS_MAX, delete_replica, make_replica, parse_name, ready};
use crate::{launch, operations, relocate, stores, survey};

/// For a store to delete a replica. It writes down that it does, and goes on by itself.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// Replaces the replica in one store by one in another: the given one, or that with the most free space. One that counts is moved, by an
/// operation.
pub async fn replace(context: &Context, name: &str, old: &str, with: Option<&str>) -> Result<(VolumeId, Option<OperationRecord>), Fault> {
    let name = parse_name(name)?;
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let volume = ready(&state, &name)?;
    let old = stores::resolve(&state, old)?;
    if !volume.replicas.contains(&old.id) {
        let message = format!("volume {name} has no replica in store {}; see carrick volume show {name}", old.path.display());
        return Err(Fault::invalid("store", message));
    }
    let operation = put_elsewhere(context, volume, old.id, with, "that was asked for").await?;
    Ok((volume.id, operation))
}

/// Puts a replica in the given store, or that with the most free space, in place of this one: at once if this one doesn't count, else by
/// the operation that is returned.
pub async fn put_elsewhere(
    context: &Context,
    volume: &VolumeRecord,
    old: StoreId,
    with: Option<&str>,
    why: &str,
) -> Result<Option<OperationRecord>, Fault> {
    if volume.config().members.contains(&old) {
        return relocate::begin(context, volume, old, with).await.map(Some);
    }
    let new = stores::choose_another(context, volume, with).await?;
    let record = begin(context, volume, [old, new], why).await?;
    // The old one is deleted when its store answers: that is not for the caller to wait for.
    join(context, record).await?;
    Ok(None)
}

/// Gives a volume one more replica: in the given store, or that with the most free space.
pub async fn add(context: &Context, name: &str, with: Option<&str>) -> Result<VolumeId, Fault> {
    let name = parse_name(name)?;
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let volume = ready(&state, &name)?;
    if volume.replicas.len() >= REPLICAS_MAX {
        return Err(Fault::invalid("name", format!("volume {name} has {REPLICAS_MAX} replicas, and can't have more")));
    }
    let new = stores::choose_another(context, volume, with).await?;
    tracing::info!(volume = %name, %new, "one more replica");
    let mut record = volume.clone();
    record.replicas.push(new);
    record.joining.push(new);
    record.config_version += 1;
    let record = change(context, volume.clone(), record).await?;
    join(context, record).await?;
    Ok(volume.id)
}

/// Replaces a replica that hasn't counted for long, if it isn't just being copied. `false`: not now.
pub async fn replace_lost(context: &Context, volume: VolumeRecord, store: StoreId) -> Result<bool, Fault> {
    if !volume.left_out.contains_key(&store) || volume.joining.contains(&store) {
        return Ok(true);
    }
    if !is_lost(context, &volume, store).await {
        return Ok(false);
    }
    put_elsewhere(context, &volume, store, None, "the old one hasn't counted for long").await?;
    Ok(true)
}

async fn is_lost(context: &Context, volume: &VolumeRecord, store: StoreId) -> bool {
    // A process that does nothing still has its connections taken by the kernel.
    let is_silent = control::replica_status(&context.run.replica_control(store)).await.is_err();
    match survey::targets(context, [volume.id]).await.remove(&volume.id) {
        Some(Ok(status)) => match status.replicas.iter().find(|member| member.store == store).map(|member| member.state) {
            Some(MemberState::Disconnected | MemberState::Refused) => true,
            Some(MemberState::Joining) => is_silent,
            _ => false,
        },
        // Nobody uses the volume, and nobody can do anything for this replica.
        _ => is_silent && !context.state().attachments.contains_key(&volume.id),
    }
}

async fn begin(context: &Context, volume: &VolumeRecord, [old, new]: [StoreId; 2], why: &str) -> Result<VolumeRecord, Fault> {
    tracing::info!(volume = %volume.name, %old, %new, "a replica is replaced");
    let mut record = volume.clone();
    record.replicas.iter_mut().filter(|store| **store == old).for_each(|store| *store = new);
    record.config_version += 1;
    record.joining.retain(|store| *store != old);
    record.retiring.retain(|store| *store != old);
    record.joining.push(new);
    record.leaving.push(old);
    let mutation = Mutation::ReplaceVolume { expected: volume.clone().into(), new: record.clone().into() };
    context.apply_saying(Some(why.to_owned()), mutation).await?;
    Ok(record)
}

/// Goes on with what [`begin`] wrote down. What can't be done yet is left for when its store answers.
pub async fn go_on(context: &Context, volume: VolumeRecord) -> Result<bool, Fault> {
    let volume = join(context, volume).await?;
    leave(context, volume).await
}

/// Makes the new replicas, unless they are there, and has the target learn of them.
pub async fn join(context: &Context, volume: VolumeRecord) -> Result<VolumeRecord, Fault> {
    let spec = ReplicaSpec { volume: volume.id, size: volume.size };
    for store in volume.joining.clone() {
        if let Err(fault) = make_replica(context, spec, store).await {
            return cannot_join(context, &volume, store, fault).await;
        }
    }
    let Some(&first) = volume.joining.first() else { return Ok(volume) };
    if let Some(fault) = waits_for_an_operator(context, &volume).await {
        return cannot_join(context, &volume, first, fault).await;
    }
    launch::kill_what_runs(context, ProcessId::Target(volume.id)).await;
    change(context, volume.clone(), VolumeRecord { joining: Vec::new(), ..volume }).await
}

/// Its operation says why.
async fn cannot_join(context: &Context, volume: &VolumeRecord, store: StoreId, fault: Fault) -> Result<VolumeRecord, Fault> {
    let is_it = |task: &Task| matches!(task, Task::Build { to, .. } if *to == store);
    operations::waits(context, volume.id, is_it, &fault).await?;
    Err(fault)
}

/// Why the target must live on: all that counts and answers has come back without what it had acknowledged, which only this target knows.
/// The next one would go on with less, and tell nobody.
async fn waits_for_an_operator(context: &Context, volume: &VolumeRecord) -> Option<Fault> {
    if !context.state().attachments.contains_key(&volume.id) {
        return None;
    }
    let Some(Ok(status)) = survey::targets(context, [volume.id]).await.remove(&volume.id) else { return None };
    let is_any = |state: MemberState| status.replicas.iter().any(|member| member.counts && member.state == state);
    if status.phase != TargetPhase::Serving || is_any(MemberState::InSync) || !is_any(MemberState::Behind) {
        return None;
    }
    let what = status.waiting_for.unwrap_or_else(|| "a replica with everything".into());
    let message = format!("volume {} gets no other replica as long as requests wait for {what}", volume.name);
    Some(Fault::new(Reason::VolumeNotReady, &volume.name, message))
}

/// Deletes the old ones. `false` if a store did not do it: it is asked again, and meanwhile others may work on the volume.
async fn leave(context: &Context, mut volume: VolumeRecord) -> Result<bool, Fault> {
    for store in volume.leaving.clone() {
        if !delete_replica(context, volume.id, store, LEAVE_LIMIT).await {
            return Ok(false);
        }
        let leaving = volume.leaving.iter().copied().filter(|other| *other != store).collect();
        volume = change(context, volume.clone(), VolumeRecord { leaving, ..volume }).await?;
    }
    Ok(true)
}

async fn change(context: &Context, expected: VolumeRecord, new: VolumeRecord) -> Result<VolumeRecord, Fault> {
    context.apply(Mutation::ReplaceVolume { expected: expected.into(), new: new.clone().into() }).await?;
    Ok(new)
}
