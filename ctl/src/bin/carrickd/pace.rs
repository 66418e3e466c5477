//! How fast each volume may copy to replicas that lack something: its own cap, and its share of the node's (`carrickd --rebuild-rate`).
//!
//! Whoever has replicas that don't count may copy, now or as soon as they answer: the node's cap is divided among these. The record says
//! which ones they are, from before a copy begins until after it has ended, so nobody needs to be asked. A volume whose replicas all count
//! is told the share that it would have, so that no copy begins without a cap.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use carrick_backing_store::{ByteLength, VolumeId};
use carrick_replicator::control::TargetRequest;
use carrick_replicator::engine::COPY_RATE_MIN;

use crate::context::Context;
use crate::control;
use crate::metadata::{State, VolumePhase, VolumeRecord};
use crate::observed::ProcessId;

/// A target that couldn't be told is told again after this.
const TELL_AGAIN: Duration = Duration::from_secs(2);

/// What a volume may copy in a second. Nobody gets less than [`COPY_RATE_MIN`]: else a copy would never end.
pub fn rate(state: &State, node: Option<ByteLength>, volume: &VolumeRecord) -> Option<ByteLength> {
    let may_copy = |volume: &VolumeRecord| volume.config().members.len() < volume.replicas.len();
    let ready = state.volumes.values().filter(|volume| volume.phase == VolumePhase::Ready);
    let others = ready.filter(|other| other.id != volume.id && may_copy(other)).count() as u64;
    let share = node.map(|node| ByteLength::new(node.get() / (others + 1)).max(COPY_RATE_MIN));
    [volume.rebuild_rate, share].into_iter().flatten().min()
}

/// Tells targets their rates whenever these change, until the daemon ends.
pub async fn run(context: Arc<Context>) {
    // What those that run were told, or started with.
    let mut told: BTreeMap<VolumeId, Option<ByteLength>> = BTreeMap::new();
    loop {
        let state = context.state();
        let observed = context.node.observed();
        let has_target = |volume: &VolumeId| state.attachments.contains_key(volume) || observed.answers(ProcessId::Target(*volume));
        told.retain(|volume, _| has_target(volume));
        let mut all_told = true;
        for volume in state.volumes.values().filter(|volume| has_target(&volume.id)) {
            let rate = rate(&state, context.rebuild_rate, volume);
            if told.get(&volume.id) == Some(&rate) {
                continue;
            }
            let request = TargetRequest::SetRebuildRate { rate };
            match control::set_target(&context.run.target_control(volume.id), &request).await {
                Ok(()) => drop(told.insert(volume.id, rate)),
                Err(error) => {
                    tracing::debug!(volume = %volume.name, %error, "the target can't be told its rate now");
                    all_told = false;
                }
            }
        }
        let changed = context.rates.notified();
        if all_told {
            changed.await;
        } else {
            let _ = tokio::time::timeout(TELL_AGAIN, changed).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use carrick_replicator::control::VolumeConfig;
    use carrick_replicator::engine::{Attachment, ConfigVersion};

    use super::*;
    use crate::metadata::AttachmentPhase;
    use crate::metadata::tests::{attachment, volume};

    /// So many attached volumes with three replicas; the first `incomplete` of them have lost one.
    fn state(volumes: u8, incomplete: u8) -> State {
        let mut state = State::default();
        for number in 1..=volumes {
            let mut record = volume(number, &format!("vm{number}"), &[1, 2, 3]);
            if number <= incomplete {
                let members = record.replicas[..2].to_vec();
                let (version, attachment) = (ConfigVersion::default(), Attachment::NONE);
                record.config = Some(VolumeConfig { version, members, term: carrick_backing_store::Term::ZERO, attachment });
            }
            state.attachments.insert(record.id, attachment(number, AttachmentPhase::Attached));
            state.volumes.insert(record.id, record);
        }
        state
    }

    fn rates(state: &State, node: Option<u64>) -> Vec<Option<u64>> {
        let mib = |rate: ByteLength| rate.get() >> 20;
        state.volumes.values().map(|volume| rate(state, node.map(|node| ByteLength::new(node << 20)), volume).map(mib)).collect()
    }

    #[test]
    fn those_that_may_copy_share_what_the_node_allows() {
        assert_eq!(rates(&state(3, 0), Some(90)), [Some(90), Some(90), Some(90)], "whoever begins has it alone");
        assert_eq!(rates(&state(3, 1), Some(90)), [Some(90), Some(45), Some(45)]);
        assert_eq!(rates(&state(3, 2), Some(90)), [Some(45), Some(45), Some(30)]);
        assert_eq!(rates(&state(3, 3), Some(90)), [Some(30); 3]);
        assert_eq!(rates(&state(3, 3), None), [None; 3]);
    }

    #[test]
    fn a_volumes_own_cap_counts_if_it_is_lower_and_nobody_stands_still() {
        let mut state = state(2, 2);
        state.volumes.values_mut().next().unwrap().rebuild_rate = Some(ByteLength::new(10 << 20));
        assert_eq!(rates(&state, Some(90)), [Some(10), Some(45)]);
        assert_eq!(rates(&state, None), [Some(10), None]);
        assert_eq!(rates(&state, Some(1)), [Some(1), Some(1)]);
    }

    #[test]
    fn volumes_that_nobody_uses_have_their_share_and_those_that_are_deleted_none() {
        let mut state = state(2, 2);
        state.attachments.pop_first();
        assert_eq!(rates(&state, Some(90)), [Some(45), Some(45)]);
        state.volumes.values_mut().next().unwrap().phase = VolumePhase::Deleting;
        assert_eq!(rates(&state, Some(90))[1], Some(90));
    }
}
