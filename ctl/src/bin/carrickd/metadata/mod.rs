//! What `carrickd` must not forget: stores, volumes, attachments, operations, and what happened to them.
//!
//! [`State`] holds the rules of what may change into what, without I/O; a [`MetadataStore`] applies one [`Mutation`] at a
//! time to it, durably. Rules kept here, whatever the callers do:
//! * M1. No two volumes that aren't being deleted have the same name.
//! * M2. A volume's replicas are on stores that are there, each on another one.
//! * M3. Only a ready volume is attached, and an attached one is not deleted.
//! * M4. A volume's config version only grows (compare-and-swap: whoever changes a volume says what it was).
//! * M5. Which replicas count changes from one version to the next, under terms that never fall; never are there none.
//!   A replica that counts stays: only one that no longer does is replaced by another. A salvage alone makes another one count; it is
//!   remembered, ends the targets of before, and leaves no replica that could be taken for one that agrees.
//! * M6. Each attachment has a number of its own, which is the volume's from then on: earlier ones change nothing any more.
//! * M7. Operations run on a volume beside each other only as the table says; one that has ended stays as it is.
//! * M8. A replica that is to go is one of the volume's.
//! * M9. What the records say is under way is an operation that runs, and ends when they no longer say so (`mirror`).
//!
//! What a change tells goes into the log with it (`story`). What is only noted is kept in memory until the next change, or until somebody
//! flushes: so it never costs a change a write of its own.

mod events;
#[cfg(test)]
mod full_disk_tests;
mod mirror;
mod operations;
mod records;
mod redb_store;
mod story;
#[cfg(test)]
pub mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use carrick_backing_store::{StoreId, VolumeId};
use carrick_ctl::name::VolumeName;
use carrick_replicator::control::VolumeConfig;
use tokio::sync::watch;

pub use events::{EventKind, EventLog, EventNumber, EventRecord, LogChanges, NewEvent, Subject, SubjectId};
pub use operations::{ENDED_MAX, ExpandStep, KEY_MAX, MoveStep, OperationId, OperationRecord, OperationState, Outcome, Task};
pub use records::{
    AttachmentPhase, AttachmentRecord, FORMAT, NodeRecord, Percent, Placement, SALVAGES_MAX, SalvageRecord, StoreRecord, UpgradeRecord,
    VerifiedRecord, VolumePhase, VolumeRecord,
};
pub use redb_store::RedbStore;
pub use story::{Occasion, place, subject};

/// Everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// What may come to the node.
    pub node: NodeRecord,
    /// The stores.
    pub stores: BTreeMap<StoreId, StoreRecord>,
    /// The volumes, those being made and deleted included.
    pub volumes: BTreeMap<VolumeId, VolumeRecord>,
    /// Which of them are to be attached here.
    pub attachments: BTreeMap<VolumeId, AttachmentRecord>,
    /// Those that run, and the last ones that have ended.
    pub operations: BTreeMap<OperationId, OperationRecord>,
}

/// One change, done as a whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Something else may come to the node.
    PutNode(NodeRecord),
    /// An upgrade is asked for, or done.
    SetUpgrade(Option<UpgradeRecord>),
    /// A store is added, or its options change.
    PutStore(StoreRecord),
    /// A store is forgotten.
    RemoveStore(StoreId),
    /// A new volume.
    InsertVolume(Box<VolumeRecord>),
    /// A volume changes.
    ReplaceVolume {
        /// What it was; if it is anything else by now, nothing is changed.
        expected: Box<VolumeRecord>,
        /// What it is to be.
        new: Box<VolumeRecord>,
    },
    /// Other replicas count, or another primary's term does.
    SwapConfig {
        /// Whose.
        volume: VolumeId,
        /// What is to be; its version says what it was.
        next: VolumeConfig,
        /// When, in seconds since 1970.
        at_unix: u64,
    },
    /// One replica's content becomes the volume's, and all others go.
    Salvage {
        /// Whose.
        volume: VolumeId,
        /// The store with that replica.
        from: StoreId,
        /// When, in seconds since 1970.
        at_unix: u64,
    },
    /// A volume's last replica is deleted.
    RemoveVolume(VolumeId),
    /// An attachment is wanted, or its phase changes.
    PutAttachment(AttachmentRecord),
    /// It is gone.
    RemoveAttachment(VolumeId),
    /// An operation begins, or goes on.
    PutOperation(Box<OperationRecord>),
    /// All of these, in this order.
    All(Vec<Mutation>),
}

/// Why a change wasn't made, or the records can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// M1.
    #[error("there is a volume of this name: {0}")]
    NameTaken(VolumeName),
    /// M2.
    #[error("store {0} is not there")]
    NoStore(StoreId),
    /// M2.
    #[error("volume {name} would have two replicas in store {store}")]
    SameStoreTwice {
        /// Which volume.
        name: VolumeName,
        /// Which store.
        store: StoreId,
    },
    /// M2.
    #[error("replicas are on store {store}: of {}", volumes.join(", "))]
    StoreInUse {
        /// Which store.
        store: StoreId,
        /// The volumes' names.
        volumes: Vec<String>,
    },
    /// M3.
    #[error("volume {0} is attached")]
    Attached(VolumeName),
    /// M3.
    #[error("volume {0} is not ready")]
    NotReady(VolumeName),
    /// M4, M5, or it is gone.
    #[error("volume {0} changed in the meantime")]
    Changed(VolumeId),
    /// M5.
    #[error(
        "which replicas of volume {0} count can't be changed so: none, some that it doesn't have, under a term that is past, or by an attachment that is"
    )]
    BadConfig(VolumeName),
    /// M5.
    #[error("a replica of volume {0} that is to be replaced counts")]
    StillCounts(VolumeName),
    /// M7.
    #[error("operation {0} has ended, or another one of its kind runs on its volume")]
    OperationOver(OperationId),
    /// Another process has the file.
    #[error("{0} is in use by another carrickd")]
    InUse(PathBuf),
    /// A newer version wrote it.
    #[error(
        "{path}: {what} has format {found}, this carrickd knows up to {known}: upgrade carrickd, or restore the file of the older version"
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Which record.
        what: String,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// A record isn't what this program writes.
    #[error("{path}: {what} can't be understood: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which record.
        what: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The database or the disk failed.
    #[error("{path}: {source}")]
    Storage {
        /// The file.
        path: PathBuf,
        /// What failed.
        source: Box<redb::Error>,
    },
}

/// Why nothing can be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Since when, in seconds since 1970.
    pub since_unix: u64,
    /// What was said last.
    pub why: String,
}

/// Keeps the [`State`].
#[tonic::async_trait]
pub trait MetadataStore: Send + Sync {
    /// As it is now.
    fn state(&self) -> Arc<State>;

    /// Makes a change, and tells of it in the log; both are durable when this returns.
    ///
    /// # Errors
    /// A rule forbids it, and nothing is changed; or the disk failed, and the next change shows whether this one was made.
    async fn apply_on(&self, occasion: Occasion, mutation: Mutation) -> Result<Arc<State>, MetadataError>;

    /// The same, on no occasion.
    #[cfg(test)]
    async fn apply(&self, mutation: Mutation) -> Result<Arc<State>, MetadataError> {
        self.apply_on(Occasion::default(), mutation).await
    }

    /// Whether the last attempt to write failed.
    fn trouble(&self) -> Option<Trouble>;

    /// What happened, as far as it is durable; changes when something is added.
    fn log(&self) -> watch::Receiver<Arc<EventLog>>;

    /// Something happened without a change. It is in memory only, until [`Self::flush`] or the next change. Never waits.
    fn note(&self, events: Vec<NewEvent>);

    /// Makes durable what was noted. Writes nothing if that is nothing.
    ///
    /// # Errors
    /// The disk failed: it stays noted.
    async fn flush(&self) -> Result<(), MetadataError>;
}

impl State {
    /// The volume of this name that isn't being deleted.
    pub fn volume_by_name(&self, name: &VolumeName) -> Option<&VolumeRecord> {
        self.volumes.values().find(|volume| volume.name == *name && volume.phase != VolumePhase::Deleting)
    }

    /// A store's path, or, if it is gone, its id.
    pub fn place(&self, store: StoreId) -> String {
        self.stores.get(&store).map_or_else(|| store.to_string(), |record| record.path.display().to_string())
    }

    /// The volumes with a replica in this store.
    pub fn volumes_on(&self, store: StoreId) -> impl Iterator<Item = &VolumeRecord> {
        self.volumes.values().filter(move |volume| volume.replicas.contains(&store))
    }

    /// The volumes that are to be attached here.
    pub fn attached(&self) -> impl Iterator<Item = &VolumeRecord> {
        self.attachments.keys().filter_map(|id| self.volumes.get(id))
    }

    /// The stores that are being emptied and have a replica of this volume that is not on its way yet.
    pub fn to_evict(&self, volume: &VolumeRecord) -> impl Iterator<Item = StoreId> {
        let is_evicted = |store: &StoreId| self.stores.get(store).is_some_and(|record| record.placement == Placement::Evicting);
        volume.replicas.iter().copied().filter(move |store| is_evicted(store) && !volume.retiring.contains(store))
    }

    /// The volumes whose replica in this store has been replaced and isn't deleted yet.
    pub fn volumes_leaving(&self, store: StoreId) -> impl Iterator<Item = &VolumeRecord> {
        self.volumes.values().filter(move |volume| volume.leaving.contains(&store))
    }

    /// Whether a volume or store is there.
    pub fn has(&self, subject: SubjectId) -> bool {
        match subject {
            SubjectId::Volume(volume) => self.volumes.contains_key(&volume),
            SubjectId::Store(store) => self.stores.contains_key(&store),
            SubjectId::Node => true,
        }
    }

    /// As it is after a change, if the rules allow that.
    pub fn after(&self, mutation: &Mutation, occasion: &Occasion) -> Result<Self, MetadataError> {
        let mut after = self.clone();
        after.apply(mutation)?;
        mirror::follow(self, &mut after, occasion)?;
        Ok(after)
    }

    /// Makes a change, if the rules allow it; else this state is no longer to be used. What follows from it is left out: see [`Self::after`].
    pub fn apply(&mut self, mutation: &Mutation) -> Result<(), MetadataError> {
        match mutation {
            // What runs is another matter.
            Mutation::PutNode(record) => self.node = NodeRecord { upgrade: self.node.upgrade.take(), ..record.clone() },
            Mutation::SetUpgrade(upgrade) => self.node.upgrade.clone_from(upgrade),
            Mutation::PutStore(record) => {
                self.stores.insert(record.id, record.clone());
            }
            Mutation::RemoveStore(id) => {
                let volumes: Vec<_> = self.volumes_on(*id).map(|volume| volume.name.to_string()).collect();
                if !volumes.is_empty() {
                    return Err(MetadataError::StoreInUse { store: *id, volumes });
                }
                // What was to be deleted there goes with it.
                self.volumes.values_mut().for_each(|volume| volume.leaving.retain(|store| store != id));
                self.stores.remove(id);
            }
            Mutation::InsertVolume(record) => self.insert_volume(record)?,
            Mutation::ReplaceVolume { expected, new } => self.replace_volume(expected, new)?,
            Mutation::SwapConfig { volume, next, at_unix } => self.swap_config(*volume, next, *at_unix)?,
            Mutation::Salvage { volume, from, at_unix } => self.salvage(*volume, *from, *at_unix)?,
            Mutation::RemoveVolume(id) => {
                if let (Some(volume), true) = (self.volumes.get(id), self.attachments.contains_key(id)) {
                    return Err(MetadataError::Attached(volume.name.clone()));
                }
                self.volumes.remove(id);
            }
            Mutation::PutAttachment(record) => {
                self.put_attachment(record)?;
            }
            Mutation::RemoveAttachment(id) => {
                self.attachments.remove(id);
            }
            Mutation::PutOperation(record) => self.put_operation(record)?,
            Mutation::All(mutations) => mutations.iter().try_for_each(|mutation| self.apply(mutation))?,
        }
        Ok(())
    }

    /// What runs on a volume, the oldest first.
    pub fn running(&self, volume: VolumeId) -> impl Iterator<Item = &OperationRecord> {
        self.operations.values().filter(move |operation| operation.volume == volume && operation.is_running())
    }

    /// What of that has steps of its own that are to be done.
    pub fn stepping(&self, volume: VolumeId) -> impl Iterator<Item = &OperationRecord> {
        self.running(volume).filter(|operation| operation.task.has_own_steps())
    }

    /// The expansion that runs on a volume.
    pub fn expansion(&self, volume: VolumeId) -> Option<&OperationRecord> {
        self.running(volume).find(|operation| matches!(operation.task, Task::Expand { .. }))
    }

    /// The move that runs on a volume.
    pub fn relocation(&self, volume: VolumeId) -> Option<&OperationRecord> {
        self.running(volume).find(|operation| matches!(operation.task, Task::Move { .. }))
    }

    fn put_operation(&mut self, record: &OperationRecord) -> Result<(), MetadataError> {
        let is_over = self.operations.get(&record.id).is_some_and(|known| !known.is_running());
        let another = self.running(record.volume).any(|other| other.id != record.id && !other.task.may_run_beside(&record.task));
        if is_over || another && record.is_running() {
            return Err(MetadataError::OperationOver(record.id));
        }
        let last = self.operations.keys().next_back().copied().unwrap_or(OperationId::NEW);
        let id = if record.id == OperationId::NEW { last.next() } else { record.id };
        self.operations.insert(id, OperationRecord { id, ..record.clone() });
        let mut ended: Vec<_> = self.operations.values().filter(|operation| !operation.is_running()).collect();
        ended.sort_unstable_by_key(|operation| std::cmp::Reverse((operation.updated_unix, operation.id)));
        let mut known = HashMap::new();
        let is_beyond = |operation: &&&OperationRecord| {
            let of_its_kind = known.entry(std::mem::discriminant(&operation.task)).or_insert(0);
            *of_its_kind += 1;
            *of_its_kind > ENDED_MAX
        };
        let forgotten: Vec<_> = ended.iter().filter(is_beyond).map(|operation| operation.id).collect();
        forgotten.iter().for_each(|id| _ = self.operations.remove(id));
        Ok(())
    }

    fn insert_volume(&mut self, record: &VolumeRecord) -> Result<(), MetadataError> {
        if self.volume_by_name(&record.name).is_some() || self.volumes.contains_key(&record.id) {
            return Err(MetadataError::NameTaken(record.name.clone()));
        }
        self.check_replicas(record)?;
        self.volumes.insert(record.id, record.clone());
        Ok(())
    }

    fn check_replicas(&self, record: &VolumeRecord) -> Result<(), MetadataError> {
        for (index, store) in record.replicas.iter().enumerate() {
            if !self.stores.contains_key(store) {
                return Err(MetadataError::NoStore(*store));
            }
            if record.replicas.iter().take(index).chain(&record.leaving).any(|other| other == store) {
                return Err(MetadataError::SameStoreTwice { name: record.name.clone(), store: *store });
            }
        }
        Ok(())
    }

    fn replace_volume(&mut self, expected: &VolumeRecord, new: &VolumeRecord) -> Result<(), MetadataError> {
        let changed = || MetadataError::Changed(expected.id);
        let current = self.volumes.get(&expected.id).ok_or_else(changed)?;
        // Targets change that at any time, and nobody else does.
        let (config, left_out) = (current.config.clone(), current.left_out.clone());
        let as_expected = *current == VolumeRecord { config: config.clone(), left_out: left_out.clone(), ..expected.clone() };
        if !as_expected || new.id != expected.id || new.config_version < expected.config_version {
            return Err(changed());
        }
        if new.phase != VolumePhase::Ready && self.attachments.contains_key(&new.id) {
            return Err(MetadataError::Attached(new.name.clone()));
        }
        if new.phase == VolumePhase::Ready {
            self.check_replicas(new)?;
            if current.config().members.iter().any(|store| !new.replicas.contains(store)) {
                return Err(MetadataError::StillCounts(new.name.clone()));
            }
        }
        let left_out = left_out.into_iter().filter(|(store, _)| new.replicas.contains(store)).collect();
        // While nothing else is written down all count, and a new one must not.
        let config = if new.replicas == current.replicas { config } else { Some(current.config()) };
        let retiring = new.retiring.iter().copied().filter(|store| new.replicas.contains(store)).collect();
        self.volumes.insert(new.id, VolumeRecord { config, left_out, retiring, ..new.clone() });
        Ok(())
    }

    fn salvage(&mut self, id: VolumeId, from: StoreId, at_unix: u64) -> Result<(), MetadataError> {
        let volume = self.volumes.get_mut(&id).ok_or(MetadataError::Changed(id))?;
        if volume.phase != VolumePhase::Ready || !volume.replicas.contains(&from) || volume.joining.contains(&from) {
            return Err(MetadataError::Changed(id));
        }
        let config = volume.config();
        let given_up = config.members.iter().copied().filter(|store| *store != from).collect();
        volume.salvages.push(SalvageRecord { at_unix, from, given_up });
        let beyond = volume.salvages.len().saturating_sub(SALVAGES_MAX);
        volume.salvages.drain(..beyond);
        volume.leaving.extend(volume.replicas.iter().filter(|store| **store != from));
        // A target that is there must be told, whatever becomes of this carrickd: one of the others may come back to it.
        (volume.replicas, volume.joining, volume.left_out) = (vec![from], vec![from], BTreeMap::new());
        volume.retiring.clear();
        volume.config_version += 1;
        let (version, attachment) = (config.version.next(), config.attachment.next());
        volume.config = Some(VolumeConfig { version, members: vec![from], attachment, ..config });
        if let Some(current) = self.attachments.get_mut(&id) {
            current.number = attachment;
        }
        Ok(())
    }

    fn put_attachment(&mut self, record: &AttachmentRecord) -> Result<(), MetadataError> {
        let volume = self.volumes.get_mut(&record.volume).ok_or(MetadataError::Changed(record.volume))?;
        if volume.phase != VolumePhase::Ready {
            return Err(MetadataError::NotReady(volume.name.clone()));
        }
        let number = match self.attachments.get(&record.volume) {
            Some(current) => current.number,
            None => {
                let config = volume.config();
                let (version, attachment) = (config.version.next(), config.attachment.next());
                volume.config = Some(VolumeConfig { version, attachment, ..config });
                attachment
            }
        };
        self.attachments.insert(record.volume, AttachmentRecord { number, ..record.clone() });
        Ok(())
    }

    fn swap_config(&mut self, id: VolumeId, next: &VolumeConfig, at_unix: u64) -> Result<(), MetadataError> {
        let volume = self.volumes.get_mut(&id).ok_or(MetadataError::Changed(id))?;
        let current = volume.config();
        if next.version != current.version.next() {
            return Err(MetadataError::Changed(id));
        }
        let is_sound = !next.members.is_empty()
            && next.term >= current.term
            && next.attachment == current.attachment
            && next
                .members
                .iter()
                .enumerate()
                .all(|(index, store)| volume.replicas.contains(store) && !next.members[..index].contains(store));
        if !is_sound {
            return Err(MetadataError::BadConfig(volume.name.clone()));
        }
        let left_out = volume.replicas.iter().filter(|store| !next.members.contains(store));
        volume.left_out = left_out.map(|store| (*store, volume.left_out.get(store).copied().unwrap_or(at_unix))).collect();
        volume.config = Some(next.clone());
        Ok(())
    }
}
