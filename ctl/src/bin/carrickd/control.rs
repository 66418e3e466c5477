//! Calls to the control sockets of carrick-replica and carrick-target: one line of JSON each way, always with a time limit.

use std::io;
use std::path::Path;
use std::time::Duration;

use carrick_replicator::control::{
    ControlError, LINE_MAX, ReplicaAnswer, ReplicaProcessStatus, ReplicaRequest, TargetAnswer, TargetRequest, TargetStatus,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// For a status: it is made from memory, and one that comes later helps nobody who waits for it.
pub const STATUS_LIMIT: Duration = Duration::from_secs(3);
/// For making, expanding or deleting a replica: the store allocates or frees its space, on a disk that may be busy.
pub const CHANGE_LIMIT: Duration = Duration::from_secs(60);
/// For taking a device away: requests in flight finish first, and a replica that answers nothing is given up after seconds.
pub const DETACH_LIMIT: Duration = Duration::from_secs(30);
/// For ending a carrick-replica: it puts everything on stable media first.
pub const SHUTDOWN_LIMIT: Duration = Duration::from_secs(20);

/// Why there is no answer: the end of a sentence that begins with the process.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens there.
    #[error("isn't running")]
    NotThere,
    /// It took too long.
    #[error("didn't answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// The connection failed, or the answer is not one.
    #[error("can't be talked to: {0}")]
    Io(#[from] io::Error),
    /// It refused, and nothing changed.
    #[error("refuses: {0}")]
    Refused(ControlError),
    /// It wasn't even asked.
    #[error("{0}")]
    Silent(String),
}

impl CallError {
    fn from_connect(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Self::NotThere,
            _ => Self::Io(error),
        }
    }
}

/// Process id of whoever listens on a socket, if anybody does.
pub async fn listener(socket: &Path) -> Result<Option<u32>, CallError> {
    match UnixStream::connect(socket).await.map_err(CallError::from_connect) {
        Ok(stream) => {
            let pid = stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok());
            pid.map(Some).ok_or_else(|| io::Error::other("the kernel doesn't say who listens").into())
        }
        Err(CallError::NotThere) => Ok(None),
        Err(error) => Err(error),
    }
}

/// How a carrick-replica does.
pub async fn replica_status(socket: &Path) -> Result<ReplicaProcessStatus, CallError> {
    match ask(socket, &ReplicaRequest::Status, STATUS_LIMIT).await? {
        ReplicaAnswer::Status(status) => Ok(*status),
        ReplicaAnswer::Refused(error) => Err(CallError::Refused(error)),
        ReplicaAnswer::Done => Err(unexpected()),
    }
}

/// Asks a carrick-replica for anything but its status.
pub async fn replica(socket: &Path, request: &ReplicaRequest, limit: Duration) -> Result<(), CallError> {
    match ask(socket, request, limit).await? {
        ReplicaAnswer::Done => Ok(()),
        ReplicaAnswer::Refused(error) => Err(CallError::Refused(error)),
        ReplicaAnswer::Status(_) => Err(unexpected()),
    }
}

/// How a carrick-target does.
pub async fn target_status(socket: &Path) -> Result<TargetStatus, CallError> {
    match ask(socket, &TargetRequest::Status, STATUS_LIMIT).await? {
        TargetAnswer::Status(status) => Ok(*status),
        TargetAnswer::Refused(error) => Err(CallError::Refused(error)),
        TargetAnswer::Done => Err(unexpected()),
    }
}

/// Asks a carrick-target to take its device away and end.
pub async fn detach(socket: &Path, force: bool) -> Result<(), CallError> {
    match ask(socket, &TargetRequest::Detach { force }, DETACH_LIMIT).await? {
        TargetAnswer::Done => Ok(()),
        TargetAnswer::Refused(error) => Err(CallError::Refused(error)),
        TargetAnswer::Status(_) => Err(unexpected()),
    }
}

/// Tells a carrick-target to go on in another way: `SetRebuildRate`, `SetLimits`, `Verify`, `Expand`.
pub async fn set_target(socket: &Path, request: &TargetRequest) -> Result<(), CallError> {
    match ask(socket, request, STATUS_LIMIT).await? {
        TargetAnswer::Done => Ok(()),
        TargetAnswer::Refused(error) => Err(CallError::Refused(error)),
        TargetAnswer::Status(_) => Err(unexpected()),
    }
}

fn unexpected() -> CallError {
    io::Error::new(io::ErrorKind::InvalidData, "the answer is to another question").into()
}

async fn ask<Q: Serialize, A: DeserializeOwned>(socket: &Path, request: &Q, limit: Duration) -> Result<A, CallError> {
    let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
    line.push(b'\n');
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await.map_err(CallError::from_connect)?;
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        BufReader::new(stream).take(LINE_MAX).read_until(b'\n', &mut answer).await?;
        if answer.last() != Some(&b'\n') {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended without an answer").into());
        }
        Ok(serde_json::from_slice(&answer).map_err(io::Error::from)?)
    };
    tokio::time::timeout(limit, exchange).await.unwrap_or(Err(CallError::TimedOut(limit)))
}
