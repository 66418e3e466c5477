//! Records and answers of processes, as the messages of `carrick.v1`. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use carrick_backing_store::{StoreId, StoreUsage, VolumeId};
use carrick_ctl::v1;
use carrick_replicator::control::{
    DamagedReplica, Map, MemberReport, MemberState, ReplicaProcessStatus, ScrubReport, TargetPhase, TargetStatus, VerificationReport,
};

use crate::health::{self, Health, Patience};
use crate::metadata::{
    AttachmentPhase, AttachmentRecord, Placement, SalvageRecord, State, StoreRecord, Trouble, VerifiedRecord, VolumePhase, VolumeRecord,
};
use crate::observed::{Answers, Observed, Process, ProcessId, ProcessState};
use crate::operations;
use crate::reconcile::Moment;
use crate::survey::Answer;

/// An upgrade that had to wait so often in a row, over about five seconds, waits for more than the start of a process.
const WAITS_MAX: u32 = 8;

/// Everything that is known at one moment.
pub struct View<'a> {
    /// What is wanted.
    pub state: &'a State,
    /// Why nothing can be written, if it can't.
    pub trouble: Option<Trouble>,
    /// What runs.
    pub observed: &'a Observed,
    /// Which of these run another program than the one on disk.
    pub outdated: &'a BTreeSet<ProcessId>,
    /// What the stores' processes say.
    pub replicas: &'a BTreeMap<StoreId, Answer<ReplicaProcessStatus>>,
    /// What the attached volumes' processes say.
    pub targets: &'a BTreeMap<VolumeId, Answer<TargetStatus>>,
    /// When.
    pub moment: Moment,
}

impl View<'_> {
    /// All stores, by path.
    pub fn stores(&self) -> Vec<v1::Store> {
        let mut stores: Vec<_> = self.state.stores.values().map(|record| self.store(record)).collect();
        stores.sort_by(|a, b| a.path.cmp(&b.path));
        stores
    }

    /// One store.
    pub fn store(&self, record: &StoreRecord) -> v1::Store {
        let answer = self.replicas.get(&record.id);
        let status = answer.and_then(|answer| answer.as_ref().ok());
        let poisoned = status.and_then(|status| status.poisoned.clone());
        let silent = answer.and_then(|answer| answer.as_ref().err()).map(|why| format!("carrick-replica {why}"));
        v1::Store {
            id: record.id.to_string(),
            path: record.path.display().to_string(),
            listen: record.listen.map(|address| address.to_string()),
            insecure: record.insecure,
            process: process_state(self.observed.processes.get(&ProcessId::Replica(record.id))).into(),
            usage: status.map(|status| usage(&status.usage)),
            volumes: self.state.volumes_on(record.id).map(|volume| volume.name.to_string()).collect(),
            problem: silent.or_else(|| poisoned.as_deref().map(poison_in_words)).or_else(|| self.damage(status?)),
            poisoned,
            scrub: status.map(|status| scrub(&status.scrub)),
            placement: match record.placement {
                Placement::Enabled => v1::StorePlacement::Enabled,
                Placement::Disabled => v1::StorePlacement::Disabled,
                Placement::Evicting => v1::StorePlacement::Evicting,
            }
            .into(),
            limit_percent: record.limit.get().into(),
            warning_percent: record.warning.get().into(),
            warning: status.and_then(|status| record.warning(&status.usage)),
            leaving_volumes: self.state.volumes_leaving(record.id).map(|volume| volume.name.to_string()).collect(),
            health: v1::Health::from(self.health(record.id)).into(),
        }
    }

    fn patience(&self) -> Patience {
        Patience::new(self.moment.replace_after)
    }

    /// How a store is.
    fn health(&self, store: StoreId) -> Health {
        let process = self.observed.processes.get(&ProcessId::Replica(store));
        health::of_store(process, self.replicas.get(&store), self.patience(), self.moment.now)
    }

    /// The node in a few numbers.
    pub fn node(&self) -> v1::Node {
        let usages = || self.replicas.values().flatten().map(|status| &status.usage);
        let mut attached_volumes: Vec<_> = self.state.attached().map(|volume| volume.name.to_string()).collect();
        attached_volumes.sort();
        let worst = self.state.stores.keys().map(|store| self.health(*store)).max().unwrap_or_default();
        let own = if self.trouble.is_some() { Health::Degraded } else { Health::Ready };
        v1::Node {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            takes_targets: !self.state.node.refuses_targets,
            takes_replicas: !self.state.node.refuses_replicas,
            stores: u32::try_from(self.state.stores.len()).unwrap_or(u32::MAX),
            volumes: u32::try_from(self.state.volumes.len()).unwrap_or(u32::MAX),
            capacity_bytes: usages().map(|usage| usage.capacity.get()).sum(),
            available_bytes: usages().map(|usage| usage.available().get()).sum(),
            attached_volumes,
            health: v1::Health::from(worst.max(own).min(Health::Degraded)).into(),
            upgrade: self.upgrade(),
        }
    }

    /// What the scrub found, if it found any damage.
    fn damage(&self, status: &ReplicaProcessStatus) -> Option<String> {
        let of = |damaged: &DamagedReplica| match self.state.volumes.get(&damaged.volume) {
            Some(volume) => format!("{} of volume {}", damaged.blocks, volume.name),
            None => format!("{} of volume {}", damaged.blocks, damaged.volume),
        };
        let found: Vec<_> = status.scrub.damaged.iter().map(of).collect();
        (!found.is_empty()).then(|| format!("damaged blocks: {}; they are replaced when they are read", found.join(", ")))
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Vec<v1::Volume> {
        let mut volumes: Vec<_> = self.state.volumes.values().map(|record| self.volume(record)).collect();
        volumes.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        volumes
    }

    /// One volume.
    pub fn volume(&self, record: &VolumeRecord) -> v1::Volume {
        let attachment = self.state.attachments.get(&record.id);
        let target = self.targets.get(&record.id);
        let members = target.and_then(|answer| answer.as_ref().ok()).map_or(&[][..], |status| &status.replicas);
        let config = record.config();
        let replica = |store: &StoreId| {
            let place = self.state.place(*store);
            let shown = match members.iter().find(|member| member.store == *store) {
                Some(member) => replica_in_target(member, place),
                None => self.replica_in_store(record.id, *store, place),
            };
            let shown = v1::Replica { counts: config.members.contains(store), ..shown };
            let silent = record.left_out.get(store).map(|since| Duration::from_secs(self.moment.unix.saturating_sub(*since)));
            let health = health::of_replica(&shown, silent, self.patience(), self.health(*store));
            v1::Replica { health: v1::Health::from(health).into(), ..shown }
        };
        let state = match record.phase {
            VolumePhase::Creating => v1::VolumeState::Creating,
            VolumePhase::Ready => v1::VolumeState::Ready,
            VolumePhase::Deleting => v1::VolumeState::Deleting,
        };
        let mut operations = self.state.running(record.id).map(|operation| operations::message(self.state, operation));
        v1::Volume {
            id: record.id.to_string(),
            name: record.name.to_string(),
            size_bytes: record.size.bytes().get(),
            block_size: record.block_size,
            config_version: config.version.get(),
            created_unix: record.created_unix,
            rebuild_rate: record.rebuild_rate.map_or(0, |rate| rate.get()),
            iops: record.limits.iops.map_or(0, |iops| iops.get()),
            iops_burst: record.limits.iops_burst.map_or(0, |burst| burst.get()),
            bandwidth: record.limits.bandwidth.map_or(0, |bandwidth| bandwidth.get()),
            bandwidth_burst: record.limits.bandwidth_burst.map_or(0, |burst| burst.get()),
            state: state.into(),
            replicas: record.replicas.iter().map(replica).collect(),
            leaving_stores: record.leaving.iter().map(|store| self.state.place(*store)).collect(),
            salvages: record.salvages.iter().map(|salvage| self.salvage(salvage)).collect(),
            attachment: attachment.map(|attachment| attachment_message(attachment, target)),
            tended: attachment.is_none() && target.is_some(),
            operation: operations.next(),
            more_operations: operations.collect(),
            last_verification: record.verified.as_ref().map(last_verification),
        }
    }

    fn salvage(&self, record: &SalvageRecord) -> v1::Salvage {
        v1::Salvage {
            at_unix: record.at_unix,
            from_store: self.state.place(record.from),
            given_up_stores: record.given_up.iter().map(|store| self.state.place(*store)).collect(),
        }
    }

    fn replica_in_store(&self, volume: VolumeId, store: StoreId, store_path: String) -> v1::Replica {
        let (state, last_error) = match self.replicas.get(&store) {
            Some(Ok(ReplicaProcessStatus { poisoned: Some(why), .. })) => (v1::ReplicaState::Refused, Some(poison_in_words(why))),
            Some(Ok(status)) => match status.replicas.iter().find(|report| report.spec.volume == volume) {
                Some(report) if report.failure.is_some() => (v1::ReplicaState::Refused, report.failure.clone()),
                Some(_) => (v1::ReplicaState::Idle, None),
                None => (v1::ReplicaState::Missing, Some("its store doesn't have it".to_owned())),
            },
            Some(Err(why)) => (v1::ReplicaState::Disconnected, Some(format!("carrick-replica {why}"))),
            None => (v1::ReplicaState::Disconnected, None),
        };
        v1::Replica { store: store.to_string(), store_path, state: state.into(), last_error, ..v1::Replica::default() }
    }

    /// The processes that carrickd looks after.
    pub fn processes(&self) -> Vec<v1::Process> {
        self.observed.processes.iter().map(|(id, process)| self.process(*id, process)).collect()
    }

    /// One of them.
    fn process(&self, id: ProcessId, process: &Process) -> v1::Process {
        let (kind, subject, version) = match id {
            ProcessId::Replica(store) => {
                let status = self.replicas.get(&store).and_then(|answer| answer.as_ref().ok());
                (v1::ProcessKind::Replica, store.to_string(), status.map(|status| status.version.clone()))
            }
            ProcessId::Target(volume) => {
                let status = self.targets.get(&volume).and_then(|answer| answer.as_ref().ok());
                (v1::ProcessKind::Target, volume.to_string(), status.map(|status| status.version.clone()))
            }
        };
        let ended = process.last_exit.as_ref().map(|exit| format!("before: {exit}"));
        v1::Process {
            kind: kind.into(),
            subject,
            state: process_state(Some(process)).into(),
            pid: process.pid(),
            restarts: process.restarts,
            problem: if process.hangs() { Some("it runs but doesn't answer".into()) } else { ended },
            version,
            outdated: self.outdated.contains(&id),
        }
    }

    /// These of the processes, in this order.
    pub fn processes_of(&self, ids: &[ProcessId]) -> Vec<v1::Process> {
        ids.iter().filter_map(|id| Some(self.process(*id, self.observed.processes.get(id)?))).collect()
    }

    /// The upgrade that is under way.
    pub fn upgrade(&self) -> Option<v1::Upgrade> {
        let upgrade = self.state.node.upgrade.as_ref()?;
        let left = u32::try_from(self.outdated.len()).unwrap_or(u32::MAX);
        Some(v1::Upgrade { since_unix: upgrade.since_unix, left, waiting_for: self.observed.upgrade.waiting_for.clone() })
    }

    /// Everything that is not as it should be, in words.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<_> = self.trouble.iter().map(|trouble| format!("records can't be written: {}", trouble.why)).collect();
        let upgrade = &self.observed.upgrade;
        let stuck = upgrade.waiting_for.as_ref().filter(|_| upgrade.waits >= WAITS_MAX);
        problems.extend(stuck.map(|why| format!("the upgrade of this node waits: {why}")));
        for store in self.stores() {
            problems.extend(store.problem.iter().chain(&store.warning).map(|problem| format!("store {}: {problem}", store.path)));
        }
        for volume in self.volumes() {
            let name = &volume.name;
            if let Some(attachment) = &volume.attachment {
                problems.extend(attachment.problem.as_ref().map(|problem| format!("volume {name}: {problem}")));
                problems.extend(attachment.waiting_for.as_ref().map(|what| format!("volume {name} waits for {what}")));
            }
            let unsettled = unsettled(&volume);
            if unsettled > 0 {
                problems.push(format!("volume {name}: its replicas differ in {unsettled} blocks, and nobody can tell which is right"));
            }
            if volume.state() == v1::VolumeState::Deleting {
                let stores: Vec<_> = volume.replicas.iter().map(|replica| replica.store_path.as_str()).collect();
                problems.push(format!("volume {name} is deleted, but for its replicas in {}", stores.join(", ")));
                continue;
            }
            for operation in volume.operation.iter().chain(&volume.more_operations) {
                let waits = |why| format!("volume {name}: that {} waits: {why}", operations::goal(operation));
                problems.extend(operation.message.as_ref().map(waits));
            }
            let left = volume.leaving_stores.iter();
            problems
                .extend(left.map(|store| format!("volume {name}: the replica that was replaced in {store} is deleted when that is back")));
            for replica in &volume.replicas {
                if !matches!(replica.state(), v1::ReplicaState::Idle | v1::ReplicaState::InSync) {
                    let detail = replica.last_error.as_ref().map_or(String::new(), |error| format!(" ({error})"));
                    let word = replica_word(replica);
                    problems.push(format!("volume {name}: the replica in {} is {word}{detail}", replica.store_path));
                }
            }
        }
        problems
    }
}

fn usage(usage: &StoreUsage) -> v1::StoreUsage {
    v1::StoreUsage {
        capacity_bytes: usage.capacity.get(),
        free_bytes: usage.free.get(),
        reserved_bytes: usage.reserved.get(),
        used_bytes: usage.used.get(),
        snapshots_bytes: usage.snapshots.get(),
        reclaimable_bytes: usage.reclaimable.get(),
        metadata_bytes: usage.metadata.get(),
        bad_bytes: usage.bad.get(),
    }
}

fn scrub(report: &ScrubReport) -> v1::Scrub {
    v1::Scrub {
        bytes_per_second: report.rate.get(),
        passes: report.passes,
        verified_bytes: report.verified.get(),
        damaged_blocks: report.damaged.iter().map(|damaged| damaged.blocks).sum(),
    }
}

fn poison_in_words(why: &str) -> String {
    format!(
        "it takes no more operations: {why}; see to the disk, then kill its carrick-replica: another one is started, and looks at it afresh"
    )
}

/// What a replica does, in words.
fn replica_word(replica: &v1::Replica) -> &'static str {
    match replica.state() {
        v1::ReplicaState::Unspecified => "in an unknown state",
        v1::ReplicaState::Idle => "idle",
        v1::ReplicaState::Disconnected => "not connected",
        v1::ReplicaState::Joining => "joining",
        v1::ReplicaState::InSync => "in sync",
        v1::ReplicaState::Copying => "being copied",
        v1::ReplicaState::Behind => "behind",
        v1::ReplicaState::Refused => "refusing",
        v1::ReplicaState::Missing => "missing",
    }
}

fn process_state(process: Option<&Process>) -> v1::ProcessState {
    match process.map(|process| process.state) {
        Some(ProcessState::Alive { answers: Answers::Yes, .. }) => v1::ProcessState::Running,
        Some(ProcessState::Alive { .. } | ProcessState::Launching | ProcessState::Unseen) | None => v1::ProcessState::Starting,
        Some(ProcessState::Stopping { .. }) => v1::ProcessState::Stopping,
        Some(ProcessState::Down { .. }) => v1::ProcessState::Down,
    }
}

fn replica_in_target(member: &MemberReport, store_path: String) -> v1::Replica {
    let state = match member.state {
        MemberState::Disconnected => v1::ReplicaState::Disconnected,
        MemberState::Joining => v1::ReplicaState::Joining,
        MemberState::InSync => v1::ReplicaState::InSync,
        MemberState::Copying => v1::ReplicaState::Copying,
        MemberState::Behind => v1::ReplicaState::Behind,
        MemberState::Refused => v1::ReplicaState::Refused,
    };
    v1::Replica {
        store: member.store.to_string(),
        store_path,
        state: state.into(),
        copied_bytes: member.copied.map(|(copied, _)| copied.get()),
        copy_total_bytes: member.copied.map(|(_, total)| total.get()),
        copy_seconds_left: member.seconds_left,
        last_error: member.last_error.clone(),
        counts: member.counts,
        health: v1::Health::Unspecified.into(),
    }
}

fn attachment_message(record: &AttachmentRecord, target: Option<&Answer<TargetStatus>>) -> v1::Attachment {
    let state = match record.phase {
        AttachmentPhase::Attaching => v1::AttachmentState::Attaching,
        AttachmentPhase::Attached => v1::AttachmentState::Attached,
        AttachmentPhase::Detaching { .. } => v1::AttachmentState::Detaching,
    };
    let mut message = v1::Attachment {
        state: state.into(),
        host: record.host,
        queue_depth: record.queue_depth.into(),
        map: match record.map {
            Map::Auto => v1::Map::Auto,
            Map::Always => v1::Map::Always,
            Map::Never => v1::Map::Never,
        }
        .into(),
        device: None,
        term: None,
        phase: v1::TargetPhase::Unspecified.into(),
        requests_in_flight: 0,
        waiting_for: None,
        problem: None,
        copied_bytes: 0,
        repaired_reads: 0,
        delayed_requests: 0,
        delayed_micros: 0,
        requests_delayed_now: 0,
        verification: None,
        device_size_bytes: None,
    };
    match target {
        Some(Ok(status)) => {
            message.device = status.device.as_ref().map(|device| device.display().to_string());
            message.term = status.term.map(|term| term.to_string());
            message.phase = target_phase(status.phase).into();
            message.requests_in_flight = status.requests_in_flight;
            message.waiting_for.clone_from(&status.waiting_for);
            message.copied_bytes = status.copied.get();
            message.repaired_reads = status.repaired;
            message.delayed_requests = status.delays.requests;
            message.delayed_micros = status.delays.micros;
            message.requests_delayed_now = status.delays.waiting;
            message.verification = status.verification.as_ref().map(verification);
            message.device_size_bytes = status.size.map(|size| size.bytes().get());
        }
        Some(Err(why)) => message.problem = Some(format!("carrick-target {why}")),
        None => {}
    }
    message
}

fn last_verification(record: &VerifiedRecord) -> v1::LastVerification {
    v1::LastVerification {
        at_unix: record.at_unix,
        skipped_bytes: record.skipped.get(),
        repaired_blocks: record.repaired,
        unsettled_blocks: record.unsettled,
    }
}

/// In how many blocks replicas of a volume differ, and nobody can tell which is right, as far as anybody knows.
pub fn unsettled(volume: &v1::Volume) -> u64 {
    let now = volume.attachment.as_ref().and_then(|attachment| attachment.verification.as_ref());
    // One that goes on may still come to what the last one has found.
    let last = volume.last_verification.as_ref().filter(|_| now.is_none_or(|found| found.running));
    now.map_or(0, |found| found.unsettled_blocks).max(last.map_or(0, |last| last.unsettled_blocks))
}

fn verification(report: &VerificationReport) -> v1::Verification {
    v1::Verification {
        running: report.running,
        compared_bytes: report.compared.get(),
        total_bytes: report.total.get(),
        skipped_bytes: report.skipped.get(),
        repaired_blocks: report.repaired,
        unsettled_blocks: report.unsettled,
        unsettled_offsets: report.places.iter().map(|block| block.offset().get()).collect(),
    }
}

fn target_phase(phase: TargetPhase) -> v1::TargetPhase {
    match phase {
        TargetPhase::Electing => v1::TargetPhase::Electing,
        TargetPhase::Reconciling => v1::TargetPhase::Reconciling,
        TargetPhase::Starting => v1::TargetPhase::Starting,
        TargetPhase::Serving => v1::TargetPhase::Serving,
        TargetPhase::Stopping => v1::TargetPhase::Stopping,
    }
}
