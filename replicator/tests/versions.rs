//! Processes of neighbouring releases understand each other: what the last release wrote on control sockets and in files is read, and so
//! is what a newer one might add to it.
//!
//! At a release, `CARRICK_RELEASE=1 cargo test -p carrick-replicator --test versions` writes down what that one writes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

use std::fmt::Debug;
use std::fs;
use std::path::Path;

use carrick_backing_store::{
    BlockIndex, ByteLength, Content, Epoch, ReplicaSpec, ReplicaState, Seq, StoreId, StoreUsage, Synced, Term, VolumeId, VolumeSize,
};
use carrick_replicator::control::{
    ControlError, ControlErrorCode, DamagedReplica, Map, MemberReport, MemberState, RecordsAnswer, RecordsRequest, ReplicaAddress,
    ReplicaAnswer, ReplicaProcessStatus, ReplicaReport, ReplicaRequest, ScrubReport, TargetAnswer, TargetConfig, TargetPhase,
    TargetRequest, TargetStatus, VerificationReport, VolumeConfig,
};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::engine::{Attachment, ConfigVersion, Predecessor};
use carrick_replicator::limits::{Delays, Limits, Requests};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

const VOLUME: VolumeId = VolumeId::from_bytes([5; 16]);
const STORE: StoreId = StoreId::from_bytes([1; 16]);

/// Reads what the last release wrote, and the same with a field more in each object. Nothing that it says is lost.
#[track_caller]
fn understands<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, today: &[T]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/control/{name}.json"));
    if std::env::var_os("CARRICK_RELEASE").is_some() {
        fs::write(&path, serde_json::to_string_pretty(today).unwrap() + "\n").unwrap();
    }
    let written: Vec<Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(!written.is_empty());
    for value in written {
        let read: T = serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{name}: {error} in {value:#}"));
        lacks_nothing(&value, &serde_json::to_value(&read).unwrap());
        let mut newer = value;
        add_fields(&mut newer);
        let of_newer: T = serde_json::from_value(newer.clone()).unwrap_or_else(|error| panic!("{name}: {error} in {newer:#}"));
        assert_eq!(of_newer, read);
    }
}

/// A field that says nothing may be left out, and one that is new may be there.
#[track_caller]
fn lacks_nothing(before: &Value, after: &Value) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            for (name, value) in before.iter().filter(|(_, value)| !value.is_null()) {
                lacks_nothing(value, after.get(name).unwrap_or_else(|| panic!("{name} is not understood any more")));
            }
        }
        (Value::Array(before), Value::Array(after)) => {
            assert_eq!(before.len(), after.len());
            before.iter().zip(after).for_each(|(before, after)| lacks_nothing(before, after));
        }
        _ => assert_eq!(before, after),
    }
}

fn add_fields(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.values_mut().for_each(add_fields);
            fields.insert("of-a-newer-release".into(), serde_json::json!({ "x": [1] }));
        }
        Value::Array(values) => values.iter_mut().for_each(add_fields),
        _ => {}
    }
}

fn size() -> VolumeSize {
    VolumeSize::new(20 << 30).unwrap()
}

fn error() -> ControlError {
    ControlError { code: ControlErrorCode::NoSpace, message: "no room".into() }
}

fn limits() -> Limits {
    Limits {
        iops: Some(Requests::new(500)),
        iops_burst: Some(Requests::new(50)),
        bandwidth: Some(ByteLength::new(50 << 20)),
        bandwidth_burst: Some(ByteLength::new(1 << 30)),
    }
}

#[test]
fn what_a_target_is_told_at_its_start() {
    let address = |endpoint| ReplicaAddress { store: STORE, endpoint };
    let full = TargetConfig {
        volume: VOLUME,
        name: "vm1".into(),
        size: size(),
        block_size: 512,
        queue_depth: 128,
        host: true,
        replicas: vec![
            address(Endpoint::Unix("/run/carrick/replica/a.sock".into())),
            address(Endpoint::Tcp("192.0.2.1:7100".parse().unwrap())),
        ],
        retiring: vec![STORE],
        rebuild_rate: Some(ByteLength::new(50 << 20)),
        limits: limits(),
        records: Some("/run/carrick/records.sock".into()),
        attachment: Attachment::new(3),
        map: Map::Always,
        tends: true,
        predecessor: Predecessor::MayServe,
    };
    let least = TargetConfig {
        retiring: Vec::new(),
        rebuild_rate: None,
        limits: Limits::default(),
        records: None,
        map: Map::Auto,
        tends: false,
        predecessor: Predecessor::Ended,
        ..full.clone()
    };
    understands("target-config", &[full, least]);
}

#[test]
fn what_a_target_is_asked_and_answers() {
    let requests = [
        TargetRequest::Status,
        TargetRequest::Detach { force: true },
        TargetRequest::SetRebuildRate { rate: Some(ByteLength::new(50 << 20)) },
        TargetRequest::SetRebuildRate { rate: None },
        TargetRequest::Verify,
        TargetRequest::Expand { size: size() },
        TargetRequest::SetLimits { limits: limits() },
        TargetRequest::SetLimits { limits: Limits::default() },
    ];
    understands("target-requests", &requests);
    let member = |state| MemberReport {
        store: STORE,
        endpoint: Endpoint::Unix("/run/carrick/replica/a.sock".into()),
        state,
        counts: true,
        copied: Some((ByteLength::new(4096), ByteLength::new(8192))),
        seconds_left: Some(2),
        last_error: Some("it was away".into()),
    };
    use MemberState::{Behind, Copying, Disconnected, InSync, Joining, Refused};
    let status = |phase| TargetStatus {
        version: "0.1.0".into(),
        volume: VOLUME,
        phase,
        device: Some("/dev/ublkb0".into()),
        size: Some(size()),
        grows_online: true,
        term: Some(Term::new(7)),
        replicas: [Disconnected, Joining, InSync, Copying, Behind, Refused].map(member).into(),
        requests_in_flight: 3,
        waiting_for: Some("a majority".into()),
        copied: ByteLength::new(4096),
        repaired: 1,
        delays: Delays { requests: 3, micros: 4500, waiting: 2 },
        verification: Some(VerificationReport {
            running: true,
            compared: ByteLength::new(4096),
            total: ByteLength::new(8192),
            skipped: ByteLength::new(4096),
            repaired: 1,
            unsettled: 1,
            places: vec![BlockIndex::new(3)],
        }),
    };
    use TargetPhase::{Electing, Reconciling, Serving, Starting, Stopping};
    let statuses = [Electing, Reconciling, Starting, Serving, Stopping].map(|phase| TargetAnswer::Status(status(phase).into()));
    let answers = statuses.into_iter().chain([TargetAnswer::Done, TargetAnswer::Refused(error())]);
    understands("target-answers", &answers.collect::<Vec<_>>());
}

#[test]
fn what_a_replica_process_is_asked_and_answers() {
    let spec = ReplicaSpec { volume: VOLUME, size: size() };
    let requests = [
        ReplicaRequest::Status,
        ReplicaRequest::Create { spec },
        ReplicaRequest::Expand { spec },
        ReplicaRequest::Delete { volume: VOLUME },
        ReplicaRequest::Shutdown,
    ];
    understands("replica-requests", &requests);
    let report = |content| ReplicaReport {
        spec,
        state: ReplicaState {
            promised: Term::new(7),
            log_term: Term::new(6),
            content,
            synced: Synced { epoch: Epoch::NEVER, copied: BlockIndex::new(3), copied_epoch: Epoch::NEVER },
        },
        position: Seq::new(9),
        durable: Seq::new(8),
        connected: true,
        failure: Some("the disk failed".into()),
    };
    let status = ReplicaProcessStatus {
        version: "0.1.0".into(),
        store: STORE,
        path: "/srv/a".into(),
        endpoints: vec![Endpoint::Unix("/run/carrick/replica/a.sock".into()), Endpoint::Tcp("192.0.2.1:7100".parse().unwrap())],
        usage: StoreUsage { capacity: ByteLength::new(1 << 40), free: ByteLength::new(1 << 39), ..StoreUsage::default() },
        poisoned: Some("a write failed".into()),
        scrub: ScrubReport {
            rate: ByteLength::new(8 << 20),
            passes: 2,
            verified: ByteLength::new(1 << 39),
            damaged: vec![DamagedReplica { volume: VOLUME, blocks: 1 }],
        },
        replicas: [Content::Complete, Content::Mixed, Content::Rebuilding].map(report).into(),
    };
    let answers = [ReplicaAnswer::Status(status.into()), ReplicaAnswer::Done, ReplicaAnswer::Refused(error())];
    understands("replica-answers", &answers);
}

#[test]
fn what_carrickd_is_asked_and_answers() {
    let config = VolumeConfig { version: ConfigVersion::FIRST, members: vec![STORE], term: Term::new(7), attachment: Attachment::new(3) };
    understands(
        "records-requests",
        &[RecordsRequest::Read { volume: VOLUME }, RecordsRequest::Swap { volume: VOLUME, next: config.clone() }],
    );
    understands("records-answers", &[RecordsAnswer::Config(config), RecordsAnswer::Refused(error())]);
}
