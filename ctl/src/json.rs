//! How the enums of `carrick.v1` are written in `--json` output: as lower-case words, without the enum's own name.

use serde::Serializer;

use crate::v1::{
    AttachmentState, DeviceGrowth, Health, Map, OperationKind, OperationState, ProcessKind, ProcessState, ReplicaState, StorePlacement,
    TargetPhase, VolumeState,
};

macro_rules! as_words {
    ($($function:ident: $type:ident, $prefix:literal;)*) => {
        $(
            pub(crate) fn $function<S: Serializer>(value: &i32, serializer: S) -> Result<S::Ok, S::Error> {
                match $type::try_from(*value) {
                    Ok(known) => serializer.serialize_str(&word(known.as_str_name(), $prefix)),
                    // A newer daemon's value: the number says more than a guess.
                    Err(_) => serializer.serialize_i32(*value),
                }
            }
        )*
    };
}

as_words! {
    process_state: ProcessState, "PROCESS_STATE_";
    process_kind: ProcessKind, "PROCESS_KIND_";
    store_placement: StorePlacement, "STORE_PLACEMENT_";
    volume_state: VolumeState, "VOLUME_STATE_";
    replica_state: ReplicaState, "REPLICA_STATE_";
    attachment_state: AttachmentState, "ATTACHMENT_STATE_";
    target_phase: TargetPhase, "TARGET_PHASE_";
    device_growth: DeviceGrowth, "DEVICE_GROWTH_";
    map: Map, "MAP_";
    health: Health, "HEALTH_";
    operation_kind: OperationKind, "OPERATION_KIND_";
    operation_state: OperationState, "OPERATION_STATE_";
}

/// `PREFIX_IN_SYNC` becomes `in-sync`.
fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase().replace('_', "-")
}

#[cfg(test)]
mod tests {
    use crate::v1::{Replica, ReplicaState};

    #[test]
    fn enums_are_words_and_absent_fields_are_null() {
        let replica = Replica { state: ReplicaState::InSync.into(), ..Replica::default() };
        let json = serde_json::to_value(&replica).unwrap();
        assert_eq!(json["state"], "in-sync");
        assert_eq!(json["copied_bytes"], serde_json::Value::Null);
        let json = serde_json::to_value(Replica { state: 99, ..Replica::default() }).unwrap();
        assert_eq!(json["state"], 99);
    }
}
