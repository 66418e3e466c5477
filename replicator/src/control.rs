//! The control sockets of `carrick-replica` and `carrick-target`: what `carrickd` asks of them.
//!
//! A Unix stream socket, mode 0600. Each request and each answer is one line of JSON, at most [`LINE_MAX`] bytes with its
//! newline. A connection may carry many requests, one after the other. Whoever connects learns the process id from
//! `SO_PEERCRED`, which is how a restarted `carrickd` adopts what runs.
//!
//! Both ends may be of neighbouring releases, in either direction: while a node is upgraded they are. So
//! * a field that is unknown is ignored, in requests, answers and [`TargetConfig`];
//! * a new field has a default that means what was so before it;
//! * what must not be ignored is a new request, which an older process refuses, and goes on;
//! * a new word of an enumeration is sent by the release after the one that understands it.
//!
//! `tests/versions.rs` reads what the last release wrote.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use carrick_backing_store::{BlockIndex, ByteLength, ReplicaSpec, ReplicaState, Seq, StoreId, StoreUsage, Term, VolumeId, VolumeSize};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::engine::{Attachment, ConfigVersion, Predecessor};
use crate::limits::{Delays, Limits};

/// Longest line in either direction: a status of a thousand replicas fits with room to spare.
pub const LINE_MAX: u64 = 1 << 20;

/// What a running `carrick-replica` is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum ReplicaRequest {
    /// How are you, and what is in the store?
    Status,
    /// Make an empty replica. Idempotent.
    Create {
        /// What of.
        spec: ReplicaSpec,
    },
    /// Make a replica as large as this, unless it is; durable when it is answered. Idempotent.
    Expand {
        /// What of, and how large.
        spec: ReplicaSpec,
    },
    /// Delete a replica and end the session on it. Idempotent.
    Delete {
        /// Whose.
        volume: VolumeId,
    },
    /// Put everything on stable media and end.
    Shutdown,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum ReplicaAnswer {
    /// To `Status`.
    Status(Box<ReplicaProcessStatus>),
    /// It is done.
    Done,
    /// It is not, and nothing changed.
    Refused(ControlError),
}

/// The state of a `carrick-replica` process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaProcessStatus {
    /// Version of the program.
    pub version: String,
    /// Which store it serves.
    pub store: StoreId,
    /// Where that is.
    pub path: PathBuf,
    /// The addresses it serves on: the Unix socket, then the TCP address if there is one.
    pub endpoints: Vec<Endpoint>,
    /// How full it is.
    pub usage: StoreUsage,
    /// Why the whole store takes no more operations until its process is started anew, if so.
    #[serde(default)]
    pub poisoned: Option<String>,
    /// What the background scrub does and found.
    #[serde(default)]
    pub scrub: ScrubReport,
    /// What is in it.
    pub replicas: Vec<ReplicaReport>,
}

/// The background scrub of a store, since its process started. It reads all blocks, and compares their checksums.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Most bytes read in a second; 0: it is off.
    pub rate: ByteLength,
    /// How often it came to the end of the store.
    pub passes: u64,
    /// What was found right, in all passes.
    pub verified: ByteLength,
    /// Replicas with blocks that can't be read, or fail their checksum. A block that was replaced since is no longer counted when
    /// the next pass has ended.
    pub damaged: Vec<DamagedReplica>,
}

/// Damage in one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedReplica {
    /// Whose.
    pub volume: VolumeId,
    /// How many blocks of 4096 bytes.
    pub blocks: u64,
}

/// One replica in a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// What it is of.
    pub spec: ReplicaSpec,
    /// What it must not forget.
    pub state: ReplicaState,
    /// The writes of its log term that it has received.
    pub position: Seq,
    /// Those on stable media.
    pub durable: Seq,
    /// Whether a primary is connected.
    pub connected: bool,
    /// Why it takes no more operations, if so.
    pub failure: Option<String>,
}

/// What a running `carrick-target` is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum TargetRequest {
    /// How are you?
    Status,
    /// Stop and delete the device, then end. Refused while somebody has the device open, unless forced: then requests
    /// in flight finish or fail, and openers get errors from then on.
    Detach {
        /// Even while it is in use.
        force: bool,
    },
    /// Copy so many bytes a second at most to replicas that lack them; without a rate, as many as go.
    SetRebuildRate {
        /// At least [`crate::engine::COPY_RATE_MIN`].
        rate: Option<ByteLength>,
    },
    /// Compare the replicas, once. How far that is, the status tells.
    Verify,
    /// The volume is to have this size: its replicas have been made as large. The status tells when the device has it.
    Expand {
        /// Not below the present one.
        size: VolumeSize,
    },
    /// From now on these limits of the volume's requests. Those that wait go on under the new ones.
    SetLimits {
        /// All of them; what isn't given isn't limited.
        limits: Limits,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum TargetAnswer {
    /// To `Status`.
    Status(Box<TargetStatus>),
    /// To `Detach`: the device is gone, and the process ends now. To `SetRebuildRate`, `SetLimits` and `Verify`: from now on.
    Done,
    /// It is not, and nothing changed.
    Refused(ControlError),
}

/// Where a target stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetPhase {
    /// It connects to replicas and asks for their promises.
    Electing,
    /// It brings a majority to the same bytes.
    Reconciling,
    /// It is primary; the device is being made or recovered.
    Starting,
    /// The device answers.
    Serving,
    /// The device is being stopped.
    Stopping,
}

/// The state of a `carrick-target` process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetStatus {
    /// Version of the program.
    pub version: String,
    /// Which volume.
    pub volume: VolumeId,
    /// Where it stands.
    pub phase: TargetPhase,
    /// The block device, once there is one.
    pub device: Option<PathBuf>,
    /// How large it is.
    #[serde(default)]
    pub size: Option<VolumeSize>,
    /// Whether this kernel lets a device grow while it is used.
    #[serde(default)]
    pub grows_online: bool,
    /// Its term, once a majority has promised it.
    pub term: Option<Term>,
    /// The replicas, in the order of the configuration.
    pub replicas: Vec<MemberReport>,
    /// Requests taken from the kernel and not answered.
    pub requests_in_flight: u32,
    /// What is being waited for, in words, if I/O is.
    pub waiting_for: Option<String>,
    /// Data sent to replicas that lacked it, since the process started.
    #[serde(default)]
    pub copied: ByteLength,
    /// Damaged reads that another replica answered, and whose blocks were written anew where they were damaged, since then.
    #[serde(default)]
    pub repaired: u64,
    /// What the volume's limits did to its requests, since then.
    #[serde(default)]
    pub delays: Delays,
    /// The latest comparison of the replicas, if there was one since then.
    #[serde(default)]
    pub verification: Option<VerificationReport>,
}

/// What a comparison of all replicas in sync came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerificationReport {
    /// Whether it goes on.
    pub running: bool,
    /// The part of the volume that was looked at, from its beginning on.
    pub compared: ByteLength,
    /// The volume's size when it began.
    pub total: ByteLength,
    /// Of that, what could not be compared: fewer than two replicas can read their maps.
    pub skipped: ByteLength,
    /// Blocks that differed, and were written anew where fewer than half had them.
    pub repaired: u64,
    /// Blocks that differ, and nobody can tell which is right.
    pub unsettled: u64,
    /// Some of these.
    pub places: Vec<BlockIndex>,
}

/// How a primary sees a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberState {
    /// No connection; it is tried again and again.
    Disconnected,
    /// Connected, not yet a part of the term.
    Joining,
    /// It has all that was acknowledged, and takes every write.
    InSync,
    /// It takes every write, and gets a copy of the rest.
    Copying,
    /// It was left behind and waits to be copied.
    Behind,
    /// It refuses, and says why; it is asked again now and then.
    Refused,
}

/// A replica as a target sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberReport {
    /// In which store.
    pub store: StoreId,
    /// Where it is reached.
    pub endpoint: Endpoint,
    /// How it stands.
    pub state: MemberState,
    /// Whether it is one of those that count.
    #[serde(default)]
    pub counts: bool,
    /// Bytes copied so far and in all, while copying.
    pub copied: Option<(ByteLength, ByteLength)>,
    /// While copying: how many seconds that still takes, if it goes on as it did.
    #[serde(default)]
    pub seconds_left: Option<u64>,
    /// The last thing that went wrong with it, in words.
    pub last_error: Option<String>,
}

/// Why a control request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// For programs.
    pub code: ControlErrorCode,
    /// For people: what happened, to what, and what to do.
    pub message: String,
}

/// Kinds of refusals that callers act on differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ControlErrorCode {
    /// The request makes no sense.
    Invalid,
    /// It is not there.
    NotFound,
    /// It is there already, and differs.
    Conflict,
    /// Somebody uses it.
    Busy,
    /// No room.
    NoSpace,
    /// The machine can't: no ublk, no io_uring, no privilege.
    Unsupported,
    /// The disk or the kernel failed.
    Failed,
}

/// What `carrick-target` is told at its start, as a JSON file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetConfig {
    /// The volume.
    pub volume: VolumeId,
    /// Its name, for the link under /dev/carrick.
    pub name: String,
    /// Its size.
    pub size: VolumeSize,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// Requests in flight at most: 1 to 512.
    pub queue_depth: u16,
    /// Whether the host itself uses the device (it may then scan partitions and labels); a guest's disk is left alone (I13).
    pub host: bool,
    /// The volume's replicas: all members of the config.
    pub replicas: Vec<ReplicaAddress>,
    /// Those of their stores whose replicas are to stop counting once all others do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retiring: Vec<StoreId>,
    /// As in [`TargetRequest::SetRebuildRate`].
    #[serde(default)]
    pub rebuild_rate: Option<ByteLength>,
    /// As in [`TargetRequest::SetLimits`].
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub limits: Limits,
    /// The socket of the metadata store that says which replicas count. Without one all do, always.
    #[serde(default)]
    pub records: Option<PathBuf>,
    /// Which attachment of the volume this is, for that metadata store.
    #[serde(default)]
    pub attachment: Attachment,
    /// Whether users get a mapped device.
    #[serde(default, skip_serializing_if = "Map::is_auto")]
    pub map: Map,
    /// Whether there is to be no device at all: nobody uses the volume, and its replicas get what they lack.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tends: bool,
    /// Whether another host's target may still serve the volume, which is to be fenced.
    #[serde(default, skip_serializing_if = "Predecessor::has_ended")]
    pub predecessor: Predecessor,
}

/// Whether what users get is a device of the device mapper in front of the ublk device. It can grow while it is used on kernels that can't
/// change the size of a ublk device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Map {
    /// Where the kernel can't change the size of a ublk device, and has a device mapper.
    #[default]
    Auto,
    /// It is, or there is no device.
    Always,
    /// It isn't: the ublk device itself.
    Never,
}

impl Map {
    /// Whether it is left to the kernel.
    #[must_use]
    pub const fn is_auto(&self) -> bool {
        matches!(self, Self::Auto)
    }
}

/// Which of a volume's replicas count: what the metadata store keeps, in one record that only a compare-and-swap changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeConfig {
    /// Each change makes the next.
    pub version: ConfigVersion,
    /// The stores whose replicas count. Never empty.
    pub members: Vec<StoreId>,
    /// The term of the primary that wrote it.
    pub term: Term,
    /// The latest attachment. Configs of before have none.
    #[serde(default)]
    pub attachment: Attachment,
}

/// What a target asks `carrickd`, on the socket that [`TargetConfig::records`] names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum RecordsRequest {
    /// What does the record say?
    Read {
        /// Of which volume.
        volume: VolumeId,
    },
    /// Let it say this, if its version is the one before.
    Swap {
        /// Of which volume.
        volume: VolumeId,
        /// What it is to say.
        next: VolumeConfig,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum RecordsAnswer {
    /// What the record says now, whether it was changed or not.
    Config(VolumeConfig),
    /// It can't be read, or must not say that.
    Refused(ControlError),
}

/// Where one replica is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaAddress {
    /// In which store.
    pub store: StoreId,
    /// How to reach it.
    pub endpoint: Endpoint,
}

/// The names of the files that the processes share under the run directory (`/run/carrick` by default).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDirectory {
    root: PathBuf,
}

impl RunDirectory {
    /// Names below this folder.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where `carrickd` serves gRPC.
    #[must_use]
    pub fn daemon_socket(&self) -> PathBuf {
        self.root.join("carrickd.sock")
    }

    /// Where `carrickd` tells targets which replicas count.
    #[must_use]
    pub fn records_socket(&self) -> PathBuf {
        self.root.join("records.sock")
    }

    /// A replica process's data socket.
    #[must_use]
    pub fn replica_socket(&self, store: StoreId) -> PathBuf {
        self.root.join(format!("replica/{store}.sock"))
    }

    /// A replica process's control socket.
    #[must_use]
    pub fn replica_control(&self, store: StoreId) -> PathBuf {
        self.root.join(format!("replica/{store}.control"))
    }

    /// What a target is told at its start.
    #[must_use]
    pub fn target_config(&self, volume: VolumeId) -> PathBuf {
        self.root.join(format!("target/{volume}.json"))
    }

    /// A target's control socket.
    #[must_use]
    pub fn target_control(&self, volume: VolumeId) -> PathBuf {
        self.root.join(format!("target/{volume}.control"))
    }

    /// Held with flock by the one target of a volume on this host.
    #[must_use]
    pub fn target_lock(&self, volume: VolumeId) -> PathBuf {
        self.root.join(format!("target/{volume}.lock"))
    }

    /// Why a target ended with an error: one [`ControlError`] as JSON.
    #[must_use]
    pub fn target_failure(&self, volume: VolumeId) -> PathBuf {
        self.root.join(format!("target/{volume}.failure"))
    }

    /// What udev is told of a device (`ublkb0`).
    #[must_use]
    pub fn udev_environment(&self, device: &str) -> PathBuf {
        self.root.join(format!("udev/{device}.env"))
    }
}

/// Sends one request to a control socket and waits for its answer.
///
/// # Errors
/// The socket's, `TimedOut`/`WouldBlock` after `timeout`, `InvalidData` if the answer is not what was expected.
pub fn call<Q: Serialize, A: DeserializeOwned>(socket: &Path, request: &Q, timeout: Duration) -> io::Result<A> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    write_line(&mut stream, request)?;
    read_line(&mut BufReader::new(stream))?.ok_or_else(|| {
        io::Error::new(io::ErrorKind::UnexpectedEof, format!("{} closed the connection without an answer", socket.display()))
    })
}

/// Writes one line.
///
/// # Errors
/// The stream's.
pub fn write_line<T: Serialize>(stream: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads one line; `None` at the end of the stream.
///
/// # Errors
/// The stream's; `InvalidData` for a line that is too long or isn't a `T`.
pub fn read_line<T: DeserializeOwned>(stream: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    stream.take(LINE_MAX).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a control line is cut off or over {LINE_MAX} bytes")));
    }
    serde_json::from_slice(&line).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_lines_and_those_of_a_newer_release_are_refused_as_a_whole_or_understood() {
        let mut line = Vec::new();
        write_line(&mut line, &TargetRequest::Detach { force: true }).unwrap();
        assert_eq!(line, b"{\"op\":\"detach\",\"force\":true}\n");
        assert_eq!(read_line::<TargetRequest>(&mut &line[..]).unwrap(), Some(TargetRequest::Detach { force: true }));
        let newer = &b"{\"op\":\"detach\",\"force\":true,\"x\":1}\n{\"op\":\"status\",\"x\":1}\n{\"op\":\"x\"}\n{\"op\":\"status\"}\n"[..];
        let mut newer = BufReader::new(newer);
        assert_eq!(read_line::<TargetRequest>(&mut newer).unwrap(), Some(TargetRequest::Detach { force: true }));
        assert_eq!(read_line::<TargetRequest>(&mut newer).unwrap(), Some(TargetRequest::Status));
        assert_eq!(read_line::<TargetRequest>(&mut newer).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read_line::<TargetRequest>(&mut newer).unwrap(), Some(TargetRequest::Status), "the next one is read");
        assert!(read_line::<TargetRequest>(&mut &b"{\"op\":\"status\"}"[..]).is_err(), "cut off");
        assert_eq!(read_line::<TargetRequest>(&mut &b""[..]).unwrap(), None);
    }
}
