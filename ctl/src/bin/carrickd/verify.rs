//! Having a volume's replicas compared: the target does it, and tells how far it is with its status.

use carrick_backing_store::VolumeId;
use carrick_ctl::fault::{Fault, Reason};
use carrick_replicator::control::TargetRequest;

use crate::context::Context;
use crate::control;
use crate::volumes::{parse_name, ready};

/// Begins a comparison.
pub async fn verify(context: &Context, name: &str) -> Result<VolumeId, Fault> {
    let name = parse_name(name)?;
    let state = context.state();
    let volume = ready(&state, &name)?;
    if volume.replicas.len() < 2 {
        let message = format!("volume {name} has one replica: there is nothing to compare it with");
        return Err(Fault::new(Reason::NothingToVerify, &name, message));
    }
    if !state.attachments.contains_key(&volume.id) {
        let message = format!("volume {name} isn't attached, and its replicas are compared by its target: attach it first");
        return Err(Fault::new(Reason::VolumeNotAttached, &name, message));
    }
    let asked = control::set_target(&context.run.target_control(volume.id), &TargetRequest::Verify).await;
    asked.map(|()| volume.id).map_err(|error| {
        Fault::new(Reason::TargetUnreachable, &name, format!("volume {name} can't be verified: its carrick-target {error}"))
    })
}
