//! Making volumes larger.
//!
//! **Order:** 1. every replica that answers, durably; 2. the record; 3. the device. A crash anywhere is followed by the same step again,
//! which finds done what is done. A replica that was away is made larger when its store's process answers again: until then the target
//! doesn't take it. If a store has no room, the operation has failed, and the volume goes on as it was: that other replicas are
//! larger than the volume harms nobody.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use carrick_backing_store::size::HumanSize;
use carrick_backing_store::{ReplicaSpec, StoreId, VolumeSize};
use carrick_ctl::fault::{Fault, Reason};
use carrick_replicator::control::{ReplicaProcessStatus, ReplicaRequest, TargetRequest};

use crate::context::{Context, unix_now};
use crate::control::{self, CallError};
use crate::metadata::{ExpandStep, KEY_MAX, Mutation, OperationRecord, Outcome, State, Task, VolumeRecord};
use crate::observed::Event;
use crate::operations::Step;
use crate::survey::{self, Answer};
use crate::volumes::{parse_name, ready, replica_fault};

/// For a device to have the new size: the target asks its replicas first. One that is being started anew takes longer: then it is
/// looked at again.
const DEVICE_LIMIT: Duration = Duration::from_secs(3);
/// Between two looks at it.
const DEVICE_POLL: Duration = Duration::from_millis(10);
/// Between two attempts to make replicas larger that were away, and the longest such pause.
const CATCH_UP_MIN: Duration = Duration::from_secs(1);
const CATCH_UP_MAX: Duration = Duration::from_secs(60);

/// A request, as it came.
#[derive(Clone, Debug)]
pub struct Request {
    /// The volume's name.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Only look.
    pub dry_run: bool,
    /// The caller's name for it.
    pub key: Option<String>,
}

/// How the device follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceGrowth {
    /// There is none.
    NotAttached,
    /// At once.
    Online,
    /// When it is made anew.
    NextAttachment,
}

/// What was found, and what came of the request.
#[derive(Clone, Debug)]
pub struct Answered {
    /// What does it, unless nothing is to be done.
    pub operation: Option<OperationRecord>,
    /// The size that the volume has, and the one it is to have.
    pub sizes: [VolumeSize; 2],
    /// How the device follows.
    pub device: DeviceGrowth,
    /// Paths of stores that don't answer.
    pub away: Vec<String>,
}

/// Begins an expansion, or makes the one that is under way larger.
pub async fn expand(context: &Context, request: Request) -> Result<Answered, Fault> {
    let name = parse_name(&request.name)?;
    let to = VolumeSize::new(request.size).map_err(|error| Fault::invalid("size_bytes", error.to_string()))?;
    if request.key.as_ref().is_some_and(|key| key.is_empty() || key.len() > KEY_MAX) {
        return Err(Fault::invalid("idempotency_key", format!("an idempotency key has 1 to {KEY_MAX} bytes")));
    }
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let volume = ready(&state, &name)?;
    let sizes = [volume.size, to];
    let device = device_growth(context, &state, volume).await;
    let before = request.key.as_ref().and_then(|key| state.operations.values().find(|operation| operation.key.as_ref() == Some(key)));
    if let Some(operation) = before {
        return same_request(operation, volume, to, device);
    }
    let found = look(context, &state, volume, to).await?;
    let away = found.away.iter().map(|store| state.place(*store)).collect();
    let mut answered = Answered { operation: None, sizes, device, away };
    if to == volume.size || request.dry_run {
        return Ok(answered);
    }
    let record = match state.expansion(volume.id) {
        Some(running) => running.folded(to, unix_now()),
        None => Some(OperationRecord::expand(volume.id, name.clone(), sizes, request.key, unix_now())),
    };
    if let Some(record) = record {
        context.apply(Mutation::PutOperation(record.into())).await?;
        context.node.send(Event::Anew(volume.id)).await;
        tracing::info!(volume = %name, from = %volume.size.bytes(), to = %to.bytes(), "is to become larger");
    }
    answered.operation = context.state().expansion(volume.id).cloned();
    Ok(answered)
}

fn same_request(operation: &OperationRecord, volume: &VolumeRecord, to: VolumeSize, device: DeviceGrowth) -> Result<Answered, Fault> {
    match operation.task {
        Task::Expand { from, to: known, .. } if operation.volume == volume.id && known >= to => {
            Ok(Answered { operation: Some(operation.clone()), sizes: [from, known], device, away: Vec::new() })
        }
        _ => {
            let message = format!("another request had this key: it began operation {} on volume {}", operation.id, operation.name);
            Err(Fault::invalid("idempotency_key", message))
        }
    }
}

async fn device_growth(context: &Context, state: &State, volume: &VolumeRecord) -> DeviceGrowth {
    if !state.attachments.contains_key(&volume.id) {
        return DeviceGrowth::NotAttached;
    }
    match survey::targets(context, [volume.id]).await.remove(&volume.id) {
        Some(Ok(status)) if status.device.is_some() && !status.grows_online => DeviceGrowth::NextAttachment,
        _ => DeviceGrowth::Online,
    }
}

/// How the stores of a volume stand.
struct Found {
    answers: BTreeMap<StoreId, Answer<ReplicaProcessStatus>>,
    away: Vec<StoreId>,
}

/// Whether the volume can get this size, as far as that can be known before.
async fn look(context: &Context, state: &State, volume: &VolumeRecord, to: VolumeSize) -> Result<Found, Fault> {
    let name = &volume.name;
    if to < volume.size {
        let message = format!(
            "volume {name} has {} ({} bytes), which is more than {} ({} bytes): a volume never shrinks",
            HumanSize(volume.size.bytes().get()),
            volume.size.bytes(),
            HumanSize(to.bytes().get()),
            to.bytes()
        );
        return Err(Fault::new(Reason::VolumeLarger, name, message));
    }
    let replicas = volume.replicas.iter().copied().filter(|store| !volume.joining.contains(store));
    let answers = survey::replicas(context, replicas).await;
    let away = answers.iter().filter(|(_, answer)| answer.is_err()).map(|(store, _)| *store).collect();
    let found = Found { answers, away };
    for (store, answer) in &found.answers {
        let Ok(status) = answer else { continue };
        let known = status.replicas.iter().find(|report| report.spec.volume == volume.id);
        let has = known.map_or(volume.size, |report| report.spec.size);
        let more = to.bytes().get().saturating_sub(has.bytes().get());
        let available = state.stores.get(store).map_or(0, |record| record.room(&status.usage).get());
        if more > available {
            let message = format!(
                "no room in store {}: volume {name} needs {} more, {} are available; free some, or move the replica to another store",
                state.place(*store),
                HumanSize(more),
                HumanSize(available)
            );
            return Err(Fault::new(Reason::NoSpace, store, message));
        }
    }
    check_majority(state, volume, &found)?;
    Ok(found)
}

/// Enough replicas must answer to go on with, if those that don't stay away.
fn check_majority(state: &State, volume: &VolumeRecord, found: &Found) -> Result<(), Fault> {
    let members = volume.config().members;
    let there = members.iter().filter(|store| !found.away.contains(store)).count();
    if there > members.len() / 2 {
        return Ok(());
    }
    let places: Vec<_> = found.away.iter().map(|store| state.place(*store)).collect();
    let message = format!(
        "{there} of the {} replicas of volume {} that count answer, a majority must; these stores don't: {}",
        members.len(),
        volume.name,
        places.join(", ")
    );
    Err(Fault::new(Reason::StoreUnreachable, &volume.name, message))
}

/// Does a step, or finds it done.
pub async fn step(context: &Arc<Context>, volume: &VolumeRecord, to: VolumeSize, step: ExpandStep) -> Step {
    match step {
        ExpandStep::Replicas => grow_replicas(context, volume, to).await.into(),
        ExpandStep::Record => {
            let larger = (volume.size < to).then(|| VolumeRecord { size: to, ..volume.clone() });
            Step { outcome: Outcome::Done(Vec::new()), volume: larger }
        }
        ExpandStep::Device => grow_device(context, volume).await.into(),
    }
}

async fn grow_replicas(context: &Context, volume: &VolumeRecord, to: VolumeSize) -> Outcome {
    let state = context.state();
    let found = match look(context, &state, volume, to).await {
        Ok(found) => found,
        Err(fault) if fault.reason == Reason::StoreUnreachable => return Outcome::Waits(fault),
        Err(fault) => return Outcome::Refused(fault),
    };
    let spec = ReplicaSpec { volume: volume.id, size: to };
    for (store, _) in found.answers.iter().filter(|(_, answer)| answer.is_ok()) {
        match grow_replica(context, spec, *store).await {
            Ok(()) => {}
            Err(error @ CallError::Refused(_)) => return Outcome::Refused(replica_fault(context, *store, error)),
            Err(error) => return Outcome::Waits(replica_fault(context, *store, error)),
        }
    }
    let note = |store: &StoreId| format!("the replica in store {} was away, and becomes larger when it is back", state.place(*store));
    Outcome::Done(found.away.iter().map(note).collect())
}

/// Makes a replica as large as that, unless it is.
pub async fn grow_replica(context: &Context, spec: ReplicaSpec, store: StoreId) -> Result<(), CallError> {
    control::replica(&context.run.replica_control(store), &ReplicaRequest::Expand { spec }, control::CHANGE_LIMIT).await
}

async fn grow_device(context: &Arc<Context>, volume: &VolumeRecord) -> Outcome {
    // Those that were away in the first step, or have come back since, and were told the old size.
    let state = context.state();
    let is_small = |status: &ReplicaProcessStatus| {
        status.replicas.iter().any(|report| report.spec.volume == volume.id && report.spec.size < volume.size)
    };
    for (store, answer) in survey::replicas(context, volume.replicas.iter().copied()).await {
        if answer.as_ref().is_ok_and(is_small) {
            // One that fails is found small again when its store answers next, and the target doesn't take it before.
            _ = grow_replica(context, ReplicaSpec { volume: volume.id, size: volume.size }, store).await;
        } else if answer.is_err() {
            let context = Arc::clone(context);
            tokio::spawn(async move { catch_up(&context, store).await });
        }
    }
    if !state.attachments.contains_key(&volume.id) {
        return Outcome::Done(Vec::new());
    }
    let socket = context.run.target_control(volume.id);
    let waits = |why: String| Outcome::Waits(Fault::new(Reason::TargetUnreachable, &volume.name, format!("its carrick-target {why}")));
    // One that starts from now on knows the new size.
    if let Err(error) = control::set_target(&socket, &TargetRequest::Expand { size: volume.size }).await {
        return waits(error.to_string());
    }
    let began = Instant::now();
    loop {
        match control::target_status(&socket).await {
            Ok(status) if status.device.is_some() && !status.grows_online && status.size < Some(volume.size) => {
                return Outcome::Done(vec![
                    "this kernel can't change the size of a device: it has the new one when the volume is detached and attached again"
                        .into(),
                ]);
            }
            Ok(status) if status.size >= Some(volume.size) => return Outcome::Done(Vec::new()),
            Ok(_) if began.elapsed() < DEVICE_LIMIT => tokio::time::sleep(DEVICE_POLL).await,
            Ok(status) => {
                let why = status.waiting_for.map_or("has not made the device larger yet".into(), |what| format!("waits for {what}"));
                return waits(why);
            }
            Err(error) => return waits(error.to_string()),
        }
    }
}

/// Makes the replicas of a store larger whose volumes have grown while it was away. Returns when all are, or the store is removed.
pub async fn catch_up(context: &Context, store: StoreId) {
    let mut pause = CATCH_UP_MIN;
    while let Err(error) = catch_up_once(context, store).await {
        tracing::warn!(%store, %error, "replicas that are smaller than their volumes can't be made larger yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(CATCH_UP_MAX);
    }
}

async fn catch_up_once(context: &Context, store: StoreId) -> Result<(), CallError> {
    let state = context.state();
    if !state.stores.contains_key(&store) {
        return Ok(());
    }
    let status = control::replica_status(&context.run.replica_control(store)).await?;
    let mut result = Ok(());
    for report in status.replicas {
        let size = state.volumes.get(&report.spec.volume).map_or(report.spec.size, |volume| volume.size);
        if size > report.spec.size {
            let spec = ReplicaSpec { size, ..report.spec };
            // The others needn't wait for this one.
            result = result.and(grow_replica(context, spec, store).await);
        }
    }
    result
}
