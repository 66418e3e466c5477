//! What can be changed of a volume at any time: written down first, then told to its target, if that runs. One that doesn't answer takes
//! it over with its next start.

use carrick_backing_store::ByteLength;
use carrick_backing_store::size::HumanSize;
use carrick_ctl::fault::Fault;
use carrick_replicator::control::TargetRequest;
use carrick_replicator::engine::COPY_RATE_MIN;
use carrick_replicator::limits::{Limits, Requests};

use crate::context::Context;
use crate::control;
use crate::metadata::{Mutation, VolumeRecord};
use crate::pace;
use crate::volumes::{not_found, parse_name};
use carrick_backing_store::VolumeId;

/// What is to change, as it came. Zero takes a limit away; what isn't given stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// Bytes a second.
    pub rebuild_rate: Option<u64>,
    /// Requests a second.
    pub iops: Option<u64>,
    /// Requests.
    pub iops_burst: Option<u64>,
    /// Bytes a second.
    pub bandwidth: Option<u64>,
    /// Bytes.
    pub bandwidth_burst: Option<u64>,
}

impl Changes {
    /// The record after them.
    fn apply(&self, volume: &VolumeRecord) -> Result<VolumeRecord, Fault> {
        let rebuild_rate = changed(volume.rebuild_rate, self.rebuild_rate, ByteLength::new);
        if rebuild_rate.is_some_and(|rate| rate < COPY_RATE_MIN) {
            let (rate, least) = (rebuild_rate.unwrap_or_default(), HumanSize(COPY_RATE_MIN.get()));
            let message = format!("a rebuild rate of {rate} bytes a second is not possible: it is at least {least}, or none");
            return Err(Fault::invalid("rebuild_rate", message));
        }
        let limits = self.limits(&volume.limits);
        limits.check().map_err(|error| Fault::invalid(error.field, error.message))?;
        Ok(VolumeRecord { rebuild_rate, limits, ..volume.clone() })
    }

    fn limits(&self, old: &Limits) -> Limits {
        let iops = changed(old.iops, self.iops, Requests::new);
        let bandwidth = changed(old.bandwidth, self.bandwidth, ByteLength::new);
        // A burst goes with its rate, unless somebody asks for it: then the mistake is told.
        let old_iops_burst = old.iops_burst.filter(|_| iops.is_some());
        let old_bandwidth_burst = old.bandwidth_burst.filter(|_| bandwidth.is_some());
        Limits {
            iops,
            iops_burst: changed(old_iops_burst, self.iops_burst, Requests::new),
            bandwidth,
            bandwidth_burst: changed(old_bandwidth_burst, self.bandwidth_burst, ByteLength::new),
        }
    }
}

fn changed<T>(old: Option<T>, new: Option<u64>, unit: fn(u64) -> T) -> Option<T> {
    match new {
        None => old,
        Some(0) => None,
        Some(value) => Some(unit(value)),
    }
}

/// Changes a volume.
pub async fn set(context: &Context, name: &str, changes: Changes) -> Result<VolumeId, Fault> {
    let name = parse_name(name)?;
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let volume = state.volume_by_name(&name).ok_or_else(|| not_found(&name))?;
    let new = changes.apply(volume)?;
    if new != *volume {
        context.apply(Mutation::ReplaceVolume { expected: volume.clone().into(), new: new.clone().into() }).await?;
    }
    if state.attachments.contains_key(&volume.id) {
        tell_target(context, volume, &new).await;
    }
    Ok(volume.id)
}

/// Also what it should have already: a target that didn't answer the last time may now.
async fn tell_target(context: &Context, old: &VolumeRecord, new: &VolumeRecord) {
    let rate = pace::rate(&context.state(), context.rebuild_rate, new);
    let requests = [TargetRequest::SetRebuildRate { rate }, TargetRequest::SetLimits { limits: new.limits }];
    for request in requests {
        if let Err(error) = control::set_target(&context.run.target_control(old.id), &request).await {
            tracing::warn!(volume = %old.name, %error, ?request, "this counts from the target's next start on");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Changes = Changes { rebuild_rate: None, iops: None, iops_burst: None, bandwidth: None, bandwidth_burst: None };

    fn limits(iops: Option<u64>, iops_burst: Option<u64>) -> Limits {
        Limits { iops: iops.map(Requests::new), iops_burst: iops_burst.map(Requests::new), ..Limits::default() }
    }

    #[test]
    fn what_is_not_given_stays_and_zero_takes_away() {
        let old = limits(Some(500), Some(50));
        assert_eq!(NOTHING.limits(&old), old);
        let changes = Changes { iops: Some(1000), bandwidth: Some(5 << 20), ..NOTHING };
        let new = changes.limits(&old);
        assert_eq!(new, Limits { bandwidth: Some(ByteLength::new(5 << 20)), ..limits(Some(1000), Some(50)) });
        assert_eq!(Changes { iops_burst: Some(0), ..NOTHING }.limits(&old), limits(Some(500), None));
        let lifted = Changes { iops: Some(0), ..NOTHING }.limits(&old);
        assert_eq!((lifted, lifted.check()), (Limits::default(), Ok(())), "the burst goes along");
        let alone = Changes { iops: Some(0), iops_burst: Some(7), ..NOTHING }.limits(&old);
        assert_eq!(alone.check().map_err(|error| error.field), Err("iops_burst"));
    }
}
