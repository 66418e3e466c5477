//! The records, as they are written: one JSON document each, with the number of its format inside.
//!
//! To change a record so that older versions would misread it: raise [`FORMAT`], keep the old structure beside the new one
//! with a conversion, and add a fixture of the old file (see `tests.rs`).

use std::net::SocketAddr;
use std::path::PathBuf;

use std::collections::BTreeMap;

use carrick_backing_store::{ByteLength, StoreId, StoreUsage, Term, VolumeId, VolumeSize};
use carrick_ctl::name::VolumeName;
use carrick_replicator::control::{Map, VolumeConfig};
use carrick_replicator::engine::{Attachment, ConfigVersion};
use carrick_replicator::limits::Limits;
use serde::{Deserialize, Serialize};

/// Format of the records that this version writes.
///
/// 1: the first.
pub const FORMAT: u32 = 1;

/// What may come to this node. What is there stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    /// No volume is attached any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refuses_targets: bool,
    /// No replica is made any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refuses_replicas: bool,
    /// Processes of older programs are replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeRecord>,
}

/// That the processes of older programs are to be replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpgradeRecord {
    /// When it was asked for, in seconds since 1970.
    pub since_unix: u64,
}

/// Whether replicas come to a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// They do.
    #[default]
    Enabled,
    /// None does; those that are there stay.
    Disabled,
    /// None does, and those that are there go to other stores.
    Evicting,
}

impl Placement {
    fn is_enabled(&self) -> bool {
        *self == Self::Enabled
    }
}

/// Of a store's capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Percent(u8);

impl Percent {
    /// All of it.
    pub const ALL: Self = Self(100);
    /// Where a warning is due unless somebody says otherwise: with the largest volumes still time to add a disk.
    pub const WARNING: Self = Self(85);

    /// 1 to 100.
    pub const fn new(percent: u32) -> Option<Self> {
        if percent >= 1 && percent <= 100 { Some(Self(percent as u8)) } else { None }
    }

    /// As a number.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// So much of it.
    pub fn of(self, whole: ByteLength) -> ByteLength {
        ByteLength::new(u64::try_from(u128::from(whole.get()) * u128::from(self.0) / 100).unwrap_or(u64::MAX))
    }

    fn is_all(&self) -> bool {
        *self == Self::ALL
    }

    fn is_warning(&self) -> bool {
        *self == Self::WARNING
    }

    const fn all() -> Self {
        Self::ALL
    }

    const fn warning() -> Self {
        Self::WARNING
    }
}

/// A store of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreRecord {
    /// Fixed when it was formatted.
    pub id: StoreId,
    /// Its folder, absolute.
    pub path: PathBuf,
    /// Where other nodes reach it.
    pub listen: Option<SocketAddr>,
    /// Without TLS.
    pub insecure: bool,
    /// When it was added, in seconds since 1970.
    pub added_unix: u64,
    /// Whether replicas come to it.
    #[serde(default, skip_serializing_if = "Placement::is_enabled")]
    pub placement: Placement,
    /// So much of it may be used by, and promised to, replicas that come or grow.
    #[serde(default = "Percent::all", skip_serializing_if = "Percent::is_all")]
    pub limit: Percent,
    /// From so much on it is told.
    #[serde(default = "Percent::warning", skip_serializing_if = "Percent::is_warning")]
    pub warning: Percent,
}

impl StoreRecord {
    /// One that is added.
    pub fn new(id: StoreId, path: PathBuf, listen: Option<SocketAddr>, insecure: bool, added_unix: u64) -> Self {
        let (limit, warning) = (Percent::ALL, Percent::WARNING);
        Self { id, path, listen, insecure, added_unix, placement: Placement::Enabled, limit, warning }
    }

    /// What replicas that come or grow may still have of it.
    pub fn room(&self, usage: &StoreUsage) -> ByteLength {
        let allowed = self.limit.of(usage.capacity).get();
        ByteLength::new(allowed.saturating_sub(taken(usage).get())).min(usage.available())
    }

    /// That it is nearly full, in words.
    pub fn warning(&self, usage: &StoreUsage) -> Option<String> {
        let percent = u128::from(taken(usage).get()) * 100 / u128::from(usage.capacity.get().max(1));
        let Percent(mark) = self.warning;
        (percent >= u128::from(mark)).then(|| format!("{percent} % of it are used or promised: the warning mark is {mark} %"))
    }
}

/// What is used or promised.
fn taken(usage: &StoreUsage) -> ByteLength {
    ByteLength::new(usage.capacity.get().saturating_sub(usage.available().get()))
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    /// For ever.
    pub id: VolumeId,
    /// Unique among the volumes that aren't being deleted.
    pub name: VolumeName,
    /// In bytes.
    pub size: VolumeSize,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// The stores with a replica (while deleting: those where it isn't deleted yet).
    pub replicas: Vec<StoreId>,
    /// Version of that list, not of those that count.
    pub config_version: u64,
    /// When it was made, in seconds since 1970.
    pub created_unix: u64,
    /// Where it stands.
    pub phase: VolumePhase,
    /// Most bytes copied in a second to replicas that lack them. Volumes of before have no cap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuild_rate: Option<ByteLength>,
    /// Of its requests. Volumes of before have none.
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub limits: Limits,
    /// Which replicas count; `None`: all, as when it was made. Changed by [`super::Mutation::SwapConfig`] alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<VolumeConfig>,
    /// Those of the stores whose replicas don't count, and since when, in seconds since 1970. Follows the config.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left_out: BTreeMap<StoreId, u64>,
    /// Those of the stores where the replica is still to be made, and the target to be told of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joining: Vec<StoreId>,
    /// Those of the stores whose replicas are to stop counting once all others do, and then to go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retiring: Vec<StoreId>,
    /// Other stores, where a replica that was replaced is still to be deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leaving: Vec<StoreId>,
    /// What was given up, the latest last; at most [`SALVAGES_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub salvages: Vec<SalvageRecord>,
    /// What the last comparison of its replicas that came to its end has found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<VerifiedRecord>,
}

/// That all replicas were compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifiedRecord {
    /// When, in seconds since 1970.
    pub at_unix: u64,
    /// What could not be compared.
    pub skipped: ByteLength,
    /// Blocks that differed, and no longer do.
    pub repaired: u64,
    /// Blocks that differ, and nobody can tell which is right.
    pub unsettled: u64,
}

/// Salvages that are remembered. Nobody needs more of them and keeps the volume.
pub const SALVAGES_MAX: usize = 16;

/// That one replica's content was made the volume's, whatever others had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SalvageRecord {
    /// When, in seconds since 1970.
    pub at_unix: u64,
    /// Whose content it was.
    pub from: StoreId,
    /// The stores whose replicas counted: what only these had is gone.
    pub given_up: Vec<StoreId>,
}

impl VolumeRecord {
    /// Which replicas count.
    pub fn config(&self) -> VolumeConfig {
        let first = || VolumeConfig {
            version: ConfigVersion::FIRST,
            members: self.replicas.clone(),
            term: Term::ZERO,
            attachment: Attachment::NONE,
        };
        self.config.clone().unwrap_or_else(first)
    }

    /// The stores whose replicas are made and should count, and don't.
    pub fn lacking(&self) -> Vec<StoreId> {
        let members = self.config().members;
        let lacks = |store: &StoreId| !members.contains(store) && !self.joining.contains(store) && !self.retiring.contains(store);
        self.replicas.iter().copied().filter(lacks).collect()
    }

    /// Whether a replica that is to go needn't count any longer, as all that are to stay do.
    pub fn may_retire(&self) -> bool {
        let members = self.config().members;
        let mut stay = self.replicas.iter().filter(|store| !self.retiring.contains(store));
        self.retiring.iter().any(|store| members.contains(store))
            && stay.all(|store| members.contains(store) && !self.joining.contains(store))
    }

    /// Other replicas are there than before: whoever reads the record later has the target learn of it, by way of one that is there.
    pub fn change_replicas(&mut self, there: Option<StoreId>) {
        self.config_version += 1;
        self.joining.retain(|store| self.replicas.contains(store));
        if self.joining.is_empty() {
            self.joining.extend(there);
        }
    }
}

/// Where a volume stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumePhase {
    /// Its replicas are being made. Nobody was told that it exists: after a crash it is deleted.
    Creating,
    /// It can be used.
    Ready,
    /// Its replicas are being deleted, which goes on until they are.
    Deleting,
}

/// That a volume is to be attached here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachmentRecord {
    /// Which volume.
    pub volume: VolumeId,
    /// Whether the host itself uses the device.
    pub host: bool,
    /// Requests in flight at most.
    pub queue_depth: u16,
    /// Where it stands.
    pub phase: AttachmentPhase,
    /// When it was asked for, in seconds since 1970.
    pub since_unix: u64,
    /// Which of the volume's attachments this is: given by [`super::State`]. Those of before have none.
    #[serde(default)]
    pub number: Attachment,
    /// Whether users get a mapped device.
    #[serde(default, skip_serializing_if = "Map::is_auto")]
    pub map: Map,
}

/// Where an attachment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentPhase {
    /// The device never answered yet; if it can't, the attachment is taken back.
    Attaching,
    /// The device was handed out: its target is kept alive whatever happens.
    Attached,
    /// The device is being taken away.
    Detaching {
        /// Even while it is in use.
        force: bool,
    },
}
