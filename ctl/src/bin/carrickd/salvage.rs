//! The last resort, when the replicas that count are gone for good: a volume is given the content of one that is left, whatever the
//! others had. It is written down for ever, and nothing does it by itself.

use carrick_backing_store::{Content, StoreId, VolumeId};
use carrick_ctl::fault::{Fault, Reason};
use carrick_replicator::control::{ReplicaProcessStatus, TargetPhase};

use crate::context::{Context, unix_now};
use crate::metadata::{Mutation, VolumeRecord};
use crate::volumes::{parse_name, ready};
use crate::{attach, moves, stores, survey};

/// Makes the content of the replica in one store the volume's.
pub async fn salvage(context: &Context, name: &str, from: &str) -> Result<VolumeId, Fault> {
    let name = parse_name(name)?;
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let volume = ready(&state, &name)?;
    let from = stores::resolve(&state, from)?;
    if !volume.replicas.contains(&from.id) || volume.joining.contains(&from.id) {
        let message = format!("volume {name} has no data in store {}; see carrick volume show {name}", from.path.display());
        return Err(Fault::invalid("from", message));
    }
    let answers = survey::replicas(context, state.stores.keys().copied()).await;
    let of = |store: &StoreId| answers.get(store)?.as_ref().ok();
    check_content(volume, &from.path.display().to_string(), of(&from.id))?;
    check_need(context, volume, |store| of(store).is_some_and(|status| holds(status, volume.id))).await?;
    if !state.attachments.contains_key(&volume.id) {
        attach::end_tending(context, volume).await?;
    }
    let state = context.apply(Mutation::Salvage { volume: volume.id, from: from.id, at_unix: unix_now() }).await?;
    tracing::warn!(
        volume = %name, store = %from.id,
        "SALVAGED: the replica in this store is the volume from now on; what only the others had is given up"
    );
    if let Some(salvaged) = state.volumes.get(&volume.id) {
        moves::join(context, salvaged.clone()).await?;
    }
    Ok(volume.id)
}

fn holds(status: &ReplicaProcessStatus, volume: VolumeId) -> bool {
    status.replicas.iter().any(|report| report.spec.volume == volume)
}

/// Half a copy is nobody's content.
fn check_content(volume: &VolumeRecord, place: &str, status: Option<&ReplicaProcessStatus>) -> Result<(), Fault> {
    let refused = |why: &str| Err(Fault::new(Reason::ReplicaFailed, &volume.name, format!("the replica in store {place} {why}")));
    let report = status.and_then(|status| status.replicas.iter().find(|report| report.spec.volume == volume.id));
    match report {
        None => refused("doesn't answer, or isn't there: start its store first"),
        Some(report) if report.state.content == Content::Rebuilding => {
            refused("was being copied to when it was lost: half of it is new and half old, so it is no volume")
        }
        Some(_) => Ok(()),
    }
}

/// Nothing is given up while those that have everything are there.
async fn check_need(context: &Context, volume: &VolumeRecord, answers: impl Fn(&StoreId) -> bool) -> Result<(), Fault> {
    let name = &volume.name;
    let refused = |why: String| Err(Fault::new(Reason::NothingToSalvage, name, why));
    let target = survey::targets(context, [volume.id]).await.remove(&volume.id);
    if let Some(Ok(status)) = target
        && status.phase == TargetPhase::Serving
        && status.waiting_for.is_none()
    {
        return refused(format!("volume {name} serves: there is nothing to salvage"));
    }
    let members = volume.config().members;
    let there = members.iter().filter(|store| answers(store)).count();
    if there > members.len() / 2 {
        return refused(format!(
            "{there} of the {} replicas of volume {name} that count answer: it can be attached with all of its data",
            members.len()
        ));
    }
    Ok(())
}
