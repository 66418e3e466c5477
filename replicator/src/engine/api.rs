//! What goes into the engine and what comes out of it.

use std::time::Duration;

use carrick_backing_store::{ByteLength, Extent, SharedBuffer, Term, VolumeId, VolumeSize};
use serde::{Deserialize, Serialize};

use super::config::{Attachment, ConfigRequest, MemberSet};
use crate::wire::Frame;

/// Index of a replica in the volume's config.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberIndex(pub usize);

/// Ties a result to its request; the front end chooses it (a ublk tag, a simulated client's number).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestTag(pub u64);

/// What is known of whoever was primary before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Predecessor {
    /// All who ever were have ended, or there was none.
    #[default]
    Ended,
    /// One may still run, and answer reads until its lease ends: nothing is served before.
    MayServe,
}

impl Predecessor {
    /// Whether nobody is there any more.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        matches!(self, Self::Ended)
    }
}

/// What an engine is for, and its limits.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The volume.
    pub volume: VolumeId,
    /// Its size.
    pub size: VolumeSize,
    /// How many replicas the config has: 1 to [`super::MEMBERS_MAX`].
    pub members: usize,
    /// A replica that answers nothing for this long is left behind (I7).
    pub replica_timeout: Duration,
    /// The most bytes of writes kept for replicas that have not received them; a replica that needs more is behind.
    pub backlog_bytes: u64,
    /// The epoch is raised when so many bytes were written or copied in it, and a copy's progress is remembered as often. A replica
    /// that returns is copied at most twice so much more than it lacks.
    pub epoch_bytes: u64,
    /// And after this time, if anything was. Costs a durable record each.
    pub epoch_time: Duration,
    /// Most bytes copied in a second to replicas that lack them, while the volume serves; `None`: as many as go.
    pub copy_rate: Option<ByteLength>,
    /// Whether replicas that are lost are left out of the config. Only with a record that outlives this process.
    pub changes_config: bool,
    /// Replicas that are to go: each stops counting once all others count, and is not copied to or taken in any more.
    pub retiring: MemberSet,
    /// Which attachment of the volume this is: the metadata store lets no earlier one go on.
    pub attachment: Attachment,
    /// Whether somebody else may still be primary.
    pub predecessor: Predecessor,
    /// Seed of what is random: the nonces of terms.
    pub seed: u64,
    /// What people call the replicas, in the order of their indices, for messages.
    pub labels: Vec<String>,
}

impl EngineConfig {
    /// With the limits that volumes have.
    #[must_use]
    pub const fn new(volume: VolumeId, size: VolumeSize, members: usize, seed: u64) -> Self {
        Self {
            volume,
            size,
            members,
            replica_timeout: Duration::from_millis(1500),
            backlog_bytes: 64 << 20,
            epoch_bytes: 64 << 20,
            epoch_time: Duration::from_secs(1),
            copy_rate: None,
            changes_config: false,
            retiring: MemberSet::NONE,
            attachment: Attachment::NONE,
            predecessor: Predecessor::MayServe,
            labels: Vec::new(),
            seed,
        }
    }
}

/// A request of the kernel or of another user of the volume. Ranges may begin and end anywhere at multiples of 512 bytes.
#[derive(Clone, Debug)]
pub enum Request {
    /// Give these bytes.
    Read {
        /// At most 1 MiB.
        extent: Extent,
    },
    /// Put these bytes.
    Write {
        /// At most 1 MiB.
        extent: Extent,
        /// Exactly as many bytes.
        data: SharedBuffer,
        /// Complete only when it is on stable media.
        fua: bool,
    },
    /// Make these bytes zero.
    WriteZeroes {
        /// At most 1 GiB.
        extent: Extent,
        /// Complete only when it is on stable media.
        fua: bool,
    },
    /// These bytes are no longer needed. Whole blocks in the range read as zeros afterwards, the rest stays.
    Discard {
        /// At most 1 GiB.
        extent: Extent,
    },
    /// Put everything completed before on stable media.
    Flush,
}

/// What a read found.
#[derive(Clone, Debug)]
pub enum ReadBytes {
    /// Only zeros.
    Zeroes,
    /// Exactly the bytes asked for.
    Bytes(SharedBuffer),
}

/// How a request ended well.
#[derive(Clone, Debug)]
pub enum Response {
    /// Done.
    Done,
    /// Done; these are the bytes.
    Read(ReadBytes),
}

/// How a request ended badly. Requests that merely wait for replicas don't end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Not within the volume, not at multiples of 512 bytes, or too long.
    #[error("the range is outside the volume, not at a multiple of 512 bytes, or over the limit")]
    Range,
    /// Every replica's copy of a block fails its checksum.
    #[error("all replicas' copies are damaged")]
    Damaged,
    /// The engine was told to give up.
    #[error("the volume is being detached by force")]
    Aborted,
}

/// What the engine wants done. The driver does it and reports what came of it.
#[derive(Debug)]
pub enum Action {
    /// Open a connection to this member; report [`super::Engine::on_connected`] or [`super::Engine::on_disconnected`].
    Connect(MemberIndex),
    /// Queue this frame on the member's connection.
    Send(MemberIndex, Frame),
    /// Drop the member's connection, or the attempt to open one, with all that is queued. Nothing more may come from it:
    /// no frame, and no `on_disconnected`.
    Disconnect(MemberIndex),
    /// Ask the metadata store; report [`super::Engine::on_config`], always.
    Config(ConfigRequest),
    /// The request has ended.
    Complete(RequestTag, Result<Response, RequestError>),
    /// This engine is the volume's primary, and a majority holds the same bytes: requests may be taken from the kernel.
    Serve(Term),
    /// The volume has this size now: requests may reach up to its end.
    Grown(VolumeSize),
    /// Another primary has taken over: end the process. No request will be completed any more.
    Superseded {
        /// Its term, or, as long as it has none, the one before.
        promised: Term,
    },
}
