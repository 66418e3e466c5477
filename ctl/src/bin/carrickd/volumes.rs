//! Creating and deleting volumes.
//!
//! **Order of a creation:** 1. the record, *creating*; 2. the replicas; 3. the record, *ready*; 4. the answer. A crash before
//! 3 leaves a record that says where replicas may be: they are deleted, then the record. Nobody was told of the volume.
//!
//! **Order of a deletion:** 1. the record, *deleting*: from here on the volume is gone for callers, and its name is free;
//! 2. replica by replica: delete it, then strike it from the record; 3. the last one takes the record along, and before it what its
//! targets logged. A crash anywhere is followed by the same steps again: deleting a replica twice changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use carrick_backing_store::size::HumanSize;
use carrick_backing_store::{ReplicaSpec, StoreId, VolumeId, VolumeSize};
use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::name::VolumeName;
use carrick_replicator::control::{ControlErrorCode, ReplicaRequest};
use carrick_replicator::limits::Limits;

use crate::attach;
use crate::context::{Context, unix_now};
use crate::control::{self, CallError};
use crate::expand;
use crate::launch;
use crate::metadata::{Mutation, Percent, State, Task, VolumePhase, VolumeRecord};
use crate::moves;
use crate::observed::ProcessId;
use crate::operations;
use crate::reconcile::Work;
use crate::relocate;
use crate::stores;

/// Replicas of a volume if nobody says how many: it survives the loss of one and goes on.
pub const REPLICAS_DEFAULT: u32 = 3;
/// How many there may be. Four and six cost a replica more than three and five and survive no further loss.
const REPLICAS_ALLOWED: [u32; 4] = [1, 2, 3, 5];
/// However they came to be.
pub const REPLICAS_MAX: usize = 5;
/// Every guest can boot from a disk with such blocks.
pub const BLOCK_SIZE_DEFAULT: u32 = 512;
/// What ublk and all guests know.
const BLOCK_SIZES_ALLOWED: [u32; 2] = [512, 4096];

/// A request for a volume, as it came.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its name.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// How many, if it matters.
    pub replicas: Option<u32>,
    /// In bytes, if it matters.
    pub block_size: Option<u32>,
    /// On which stores, if it matters.
    pub stores: Vec<String>,
}

/// The same, checked.
struct Checked {
    name: VolumeName,
    size: VolumeSize,
    replicas: u32,
    block_size: u32,
    stores: Vec<String>,
}

impl NewVolume {
    fn check(self) -> Result<Checked, Fault> {
        let name = parse_name(&self.name)?;
        let size = VolumeSize::new(self.size).map_err(|error| Fault::invalid("size_bytes", error.to_string()))?;
        let block_size = self.block_size.unwrap_or(BLOCK_SIZE_DEFAULT);
        if !BLOCK_SIZES_ALLOWED.contains(&block_size) {
            return Err(Fault::invalid("block_size", format!("block size {block_size} is not possible: it is 512 or 4096")));
        }
        let given = u32::try_from(self.stores.len()).unwrap_or(u32::MAX);
        let replicas = self.replicas.unwrap_or(if given == 0 { REPLICAS_DEFAULT } else { given });
        if !REPLICAS_ALLOWED.contains(&replicas) {
            return Err(Fault::invalid("replicas", format!("{replicas} replicas are not possible: there can be 1, 2, 3 or 5")));
        }
        if given != 0 && given != replicas {
            let message = format!("{given} stores are given for {replicas} replicas: each replica needs a store of its own");
            return Err(Fault::invalid("stores", message));
        }
        Ok(Checked { name, size, replicas, block_size, stores: self.stores })
    }
}

/// A name, checked.
pub fn parse_name(text: &str) -> Result<VolumeName, Fault> {
    text.parse().map_err(|error: carrick_ctl::name::NameError| Fault::invalid("name", error.to_string()))
}

/// The fault for a volume that isn't there.
pub fn not_found(name: &VolumeName) -> Fault {
    Fault::new(Reason::VolumeNotFound, name, format!("there is no volume {name}; see carrick volume list"))
}

/// The volume of this name, which must be there and ready.
pub fn ready<'a>(state: &'a State, name: &VolumeName) -> Result<&'a VolumeRecord, Fault> {
    let volume = state.volume_by_name(name).ok_or_else(|| not_found(name))?;
    match volume.phase {
        VolumePhase::Ready => Ok(volume),
        _ => Err(Fault::new(Reason::VolumeNotReady, name, format!("volume {name} is not ready yet"))),
    }
}

/// Makes a volume, or finds the one that the same request made before.
pub async fn create(context: &Context, new: NewVolume) -> Result<VolumeId, Fault> {
    let new = new.check()?;
    let _guard = context.locks.lock(&new.name).await;
    let existing = context.state().volume_by_name(&new.name).cloned();
    let record = match existing {
        Some(volume) => {
            same_request(context, &volume, &new)?;
            volume
        }
        None => {
            let record = VolumeRecord {
                id: VolumeId::random(),
                replicas: stores::choose(context, &new.stores, new.replicas as usize).await?,
                name: new.name,
                size: new.size,
                block_size: new.block_size,
                config_version: 1,
                created_unix: unix_now(),
                phase: VolumePhase::Creating,
                rebuild_rate: None,
                limits: Limits::default(),
                config: None,
                left_out: BTreeMap::new(),
                joining: Vec::new(),
                retiring: Vec::new(),
                leaving: Vec::new(),
                salvages: Vec::new(),
                verified: None,
            };
            context.apply(Mutation::InsertVolume(record.clone().into())).await?;
            record
        }
    };
    if record.phase == VolumePhase::Ready {
        return Ok(record.id);
    }
    if let Err(fault) = make_replicas(context, &record).await {
        undo_creation(context, &record, &fault.message).await?;
        return Err(fault);
    }
    set_phase(context, &record, VolumePhase::Ready, None).await?;
    tracing::info!(volume = %record.name, id = %record.id, "created");
    Ok(record.id)
}

fn same_request(context: &Context, volume: &VolumeRecord, new: &Checked) -> Result<(), Fault> {
    let name = &volume.name;
    let differs = |what: &str, there: String, asked: String| {
        Fault::new(Reason::VolumeExists, name, format!("volume {name} exists with another {what}: {there}, not {asked}"))
    };
    if volume.size != new.size {
        let text = |size: VolumeSize| format!("{} ({} bytes)", HumanSize(size.bytes().get()), size.bytes());
        return Err(differs("size", text(volume.size), text(new.size)));
    }
    if volume.block_size != new.block_size {
        return Err(differs("block size", volume.block_size.to_string(), new.block_size.to_string()));
    }
    if volume.replicas.len() != new.replicas as usize {
        return Err(differs("number of replicas", volume.replicas.len().to_string(), new.replicas.to_string()));
    }
    let state = context.state();
    for text in &new.stores {
        if !volume.replicas.contains(&stores::resolve(&state, text)?.id) {
            let there: Vec<_> = volume.replicas.iter().map(ToString::to_string).collect();
            return Err(differs("choice of stores", there.join(", "), new.stores.join(", ")));
        }
    }
    Ok(())
}

async fn make_replicas(context: &Context, volume: &VolumeRecord) -> Result<(), Fault> {
    let spec = ReplicaSpec { volume: volume.id, size: volume.size };
    for &store in &volume.replicas {
        make_replica(context, spec, store).await?;
    }
    Ok(())
}

/// Makes a replica, unless it is there.
pub async fn make_replica(context: &Context, spec: ReplicaSpec, store: StoreId) -> Result<(), Fault> {
    check_limit(context, spec, store).await?;
    let request = ReplicaRequest::Create { spec };
    let made = match control::replica(&context.run.replica_control(store), &request, control::CHANGE_LIMIT).await {
        // It was made before the volume grew; or an expansion that came to nothing has made it larger, which harms nobody.
        Err(CallError::Refused(error)) if error.code == ControlErrorCode::Conflict => expand::grow_replica(context, spec, store).await,
        made => made.map(drop),
    };
    made.map_err(|error| replica_fault(context, store, error))
}

/// Whether a replica that isn't there may come, as far as the operator's limit goes. The store itself knows whether it has the room.
async fn check_limit(context: &Context, spec: ReplicaSpec, store: StoreId) -> Result<(), Fault> {
    let state = context.state();
    let Some(record) = state.stores.get(&store).filter(|record| record.limit < Percent::ALL) else { return Ok(()) };
    let status = control::replica_status(&context.run.replica_control(store)).await;
    let status = status.map_err(|error| replica_fault(context, store, error))?;
    let (needed, room) = (spec.size.bytes(), record.room(&status.usage));
    if room >= needed || status.replicas.iter().any(|report| report.spec.volume == spec.volume) {
        return Ok(());
    }
    let message = format!(
        "no room in store {}: {} are needed, {} are left of the {} % that may be taken (carrick store set --limit)",
        record.path.display(),
        HumanSize(needed.get()),
        HumanSize(room.get()),
        record.limit.get()
    );
    Err(Fault::new(Reason::NoSpace, store, message))
}

/// Deletes a replica, if it is there and its store answers. Returns whether it is gone.
pub async fn delete_replica(context: &Context, volume: VolumeId, store: StoreId, limit: Duration) -> bool {
    if !context.node.observed().answers(ProcessId::Replica(store)) {
        return false;
    }
    let request = ReplicaRequest::Delete { volume };
    let deleted = control::replica(&context.run.replica_control(store), &request, limit).await;
    if let Err(error) = &deleted {
        tracing::warn!(%volume, %store, %error, "a replica can't be deleted yet");
    }
    deleted.is_ok()
}

/// What a caller is told when a store didn't do something.
pub fn replica_fault(context: &Context, store: StoreId, error: CallError) -> Fault {
    let state = context.state();
    let place = state.place(store);
    match error {
        CallError::Refused(refused) => {
            let reason = match refused.code {
                ControlErrorCode::NoSpace => Reason::NoSpace,
                ControlErrorCode::Unsupported => Reason::Unsupported,
                _ => Reason::ReplicaFailed,
            };
            // The store names itself in "no room"; elsewhere it may not.
            let message = if refused.message.contains(&place) { refused.message } else { format!("store {place}: {refused}") };
            Fault::new(reason, store, message)
        }
        other => Fault::new(Reason::StoreUnreachable, store, format!("store {place} can't be reached: its carrick-replica {other}")),
    }
}

async fn set_phase(context: &Context, volume: &VolumeRecord, phase: VolumePhase, remark: Option<String>) -> Result<VolumeRecord, Fault> {
    let mut new = VolumeRecord { phase, ..volume.clone() };
    if phase == VolumePhase::Deleting {
        new.replicas.append(&mut new.leaving);
        new.joining.clear();
        new.retiring.clear();
    }
    let mutation = Mutation::ReplaceVolume { expected: volume.clone().into(), new: new.clone().into() };
    context.apply_saying(remark, mutation).await?;
    Ok(new)
}

/// Deletes a volume. Returns the stores where its replica couldn't be deleted yet.
pub async fn delete(context: &Context, name: &str) -> Result<Vec<StoreId>, Fault> {
    let name = parse_name(name)?;
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let volume = state.volume_by_name(&name).ok_or_else(|| not_found(&name))?;
    if state.attachments.contains_key(&volume.id) {
        let device = attach::device(context, volume.id).await;
        let place = device.map_or("this node".to_owned(), |device| format!("this node as {}", device.display()));
        let message = format!("volume {name} is attached to {place}: detach it first (carrick detach {name})");
        return Err(Fault::new(Reason::VolumeAttached, &name, message));
    }
    for operation in state.running(volume.id) {
        let remark = "the volume is deleted".into();
        context.apply_saying(Some(remark), Mutation::PutOperation(operation.given_up(unix_now()).into())).await?;
    }
    attach::end_tending(context, volume).await?;
    let volume = set_phase(context, volume, VolumePhase::Deleting, None).await?;
    tracing::info!(volume = %name, id = %volume.id, "deleting");
    delete_replicas(context, volume).await
}

async fn undo_creation(context: &Context, volume: &VolumeRecord, why: &str) -> Result<bool, Fault> {
    tracing::info!(volume = %volume.name, id = %volume.id, "its creation is undone");
    let volume = set_phase(context, volume, VolumePhase::Deleting, Some(why.to_owned())).await?;
    Ok(delete_replicas(context, volume).await?.is_empty())
}

/// Deletes what can be reached. Returns the stores that are left; the reconciler goes on when they are back.
async fn delete_replicas(context: &Context, mut volume: VolumeRecord) -> Result<Vec<StoreId>, Fault> {
    for store in volume.replicas.clone() {
        if !delete_replica(context, volume.id, store, control::CHANGE_LIMIT).await {
            continue;
        }
        let rest = volume.replicas.iter().copied().filter(|other| *other != store).collect();
        let struck = VolumeRecord { replicas: rest, ..volume.clone() };
        context.apply(Mutation::ReplaceVolume { expected: volume.into(), new: struck.clone().into() }).await?;
        volume = struck;
    }
    if volume.replicas.is_empty() {
        launch::remove_logs(context, ProcessId::Target(volume.id));
        context.apply(Mutation::RemoveVolume(volume.id)).await?;
    } else {
        let state = context.state();
        let places: Vec<_> = volume.replicas.iter().map(|store| state.place(*store)).collect();
        let why = Fault::new(Reason::StoreUnreachable, &volume.name, format!("these stores are to answer: {}", places.join(", ")));
        operations::waits(context, volume.id, |task| matches!(task, Task::Delete), &why).await?;
    }
    Ok(volume.replicas)
}

/// Goes on with a volume that an earlier carrickd, or an unreachable store, left unfinished. Returns whether that is over.
pub async fn resume(context: &Arc<Context>, id: VolumeId, work: Work) -> bool {
    let Some(name) = context.state().volumes.get(&id).map(|volume| volume.name.clone()) else { return true };
    // Somebody works on it: when he is done, the records are looked at again.
    let Some(_guard) = context.locks.try_lock(&name) else { return true };
    // As it is now, under the lock: the plan may be older.
    let Some(volume) = context.state().volumes.get(&id).cloned() else { return true };
    let result = match (work, volume.phase) {
        (Work::UndoCreation, VolumePhase::Creating) => undo_creation(context, &volume, "it was interrupted").await,
        (Work::Delete, VolumePhase::Deleting) => delete_replicas(context, volume).await.map(|left| left.is_empty()),
        (Work::Attach, VolumePhase::Ready) => attach::resume_attach(context, &volume).await.map(|()| true),
        (Work::Move, VolumePhase::Ready) => moves::go_on(context, volume).await,
        (Work::Operation, VolumePhase::Ready) => {
            let moved = moves::go_on(context, volume).await;
            operations::go_on(context, id).await.and_then(|finished| Ok(moved? && finished))
        }
        (Work::Evict(store), VolumePhase::Ready) => relocate::evict(context, &volume, store).await,
        (Work::Replace(store), VolumePhase::Ready) => moves::replace_lost(context, volume, store).await,
        (Work::Detach, VolumePhase::Ready) => attach::resume_detach(context, &volume).await.map(|()| true),
        _ => Ok(true),
    };
    result.unwrap_or_else(|fault| {
        tracing::warn!(volume = %name, error = %fault, ?work, "unfinished work");
        false
    })
}
