//! Why a call failed: one table of reasons, with the gRPC code and the exit code of each, and its way over the wire.

use std::fmt;

use prost::Message;
use tonic::{Code, Status};

use crate::v1::ErrorDetail;

/// Type URL of [`ErrorDetail`] in a `google.rpc.Status`.
const DETAIL_TYPE_URL: &str = "type.googleapis.com/carrick.v1.ErrorDetail";

/// Exit codes of the `carrick` command. Scripts depend on them: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// None of the others.
    Failure = 1,
    /// The command line or a value in it makes no sense.
    Usage = 2,
    /// There is no such volume or store.
    NotFound = 3,
    /// There is one already, and it differs.
    Conflict = 4,
    /// Not in this state: attached, in use, too few stores.
    Precondition = 5,
    /// No room.
    NoSpace = 6,
    /// Something doesn't answer, or not in time; trying again may help.
    Unreachable = 7,
    /// This machine can't: no ublk, no io_uring, no privilege.
    Unsupported = 8,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $code:ident, $exit:ident;)*) => {
        /// Kinds of failures that callers act on differently.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word on the wire.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// Its gRPC code.
            #[must_use]
            pub const fn code(self) -> Code {
                match self {
                    $(Self::$name => Code::$code,)*
                }
            }

            /// The exit code of the command.
            #[must_use]
            pub const fn exit_code(self) -> ExitCode {
                match self {
                    $(Self::$name => ExitCode::$exit,)*
                }
            }
        }
    };
}

reasons! {
    /// A field of the request breaks a rule; the subject names the field.
    InvalidField = "INVALID_FIELD", InvalidArgument, Usage;
    /// No such volume.
    VolumeNotFound = "VOLUME_NOT_FOUND", NotFound, NotFound;
    /// No such store.
    StoreNotFound = "STORE_NOT_FOUND", NotFound, NotFound;
    /// A volume of this name is there and differs.
    VolumeExists = "VOLUME_EXISTS", AlreadyExists, Conflict;
    /// This store is added, with another address or path.
    StoreExists = "STORE_EXISTS", AlreadyExists, Conflict;
    /// It is attached with other options.
    AttachedDifferently = "ATTACHED_DIFFERENTLY", AlreadyExists, Conflict;
    /// Not enough stores for so many replicas.
    TooFewStores = "TOO_FEW_STORES", FailedPrecondition, Precondition;
    /// The volume is attached.
    VolumeAttached = "VOLUME_ATTACHED", FailedPrecondition, Precondition;
    /// The volume isn't attached.
    VolumeNotAttached = "VOLUME_NOT_ATTACHED", FailedPrecondition, Precondition;
    /// The volume is being created, deleted or detached.
    VolumeNotReady = "VOLUME_NOT_READY", FailedPrecondition, Precondition;
    /// Somebody has the device open.
    DeviceBusy = "DEVICE_BUSY", FailedPrecondition, Precondition;
    /// The replicas that count are there.
    NothingToSalvage = "NOTHING_TO_SALVAGE", FailedPrecondition, Precondition;
    /// There is one replica only.
    NothingToVerify = "NOTHING_TO_VERIFY", FailedPrecondition, Precondition;
    /// The replica that is to go counts still.
    ReplicaCounts = "REPLICA_COUNTS", FailedPrecondition, Precondition;
    /// A volume never shrinks.
    VolumeLarger = "VOLUME_LARGER", FailedPrecondition, Precondition;
    /// No such operation, or it has long ended.
    OperationNotFound = "OPERATION_NOT_FOUND", NotFound, NotFound;
    /// Another operation runs, beside which this one can't.
    OperationRuns = "OPERATION_RUNS", FailedPrecondition, Precondition;
    /// The operation has ended.
    OperationEnded = "OPERATION_ENDED", FailedPrecondition, Precondition;
    /// What the operation has changed can't be taken back.
    OperationPastCancelling = "OPERATION_PAST_CANCELLING", FailedPrecondition, Precondition;
    /// A volume has a replica on the store.
    StoreInUse = "STORE_IN_USE", FailedPrecondition, Precondition;
    /// The store takes no more replicas.
    StoreDisabled = "STORE_DISABLED", FailedPrecondition, Precondition;
    /// The node takes no more replicas, or attaches no more volumes.
    NodeDisabled = "NODE_DISABLED", FailedPrecondition, Precondition;
    /// The folder is neither empty nor a store, or the store can't be opened.
    StoreUnusable = "STORE_UNUSABLE", FailedPrecondition, Precondition;
    /// A program is not there, or carrickd itself is of an older one.
    ProgramsUnusable = "PROGRAMS_UNUSABLE", FailedPrecondition, Precondition;
    /// An upgrade waits for something that doesn't come; only the command itself says this.
    UpgradeWaits = "UPGRADE_WAITS", Unavailable, Unreachable;
    /// A store has no room.
    NoSpace = "NO_SPACE", ResourceExhausted, NoSpace;
    /// The process of a store doesn't answer.
    StoreUnreachable = "STORE_UNREACHABLE", Unavailable, Unreachable;
    /// The process of an attached volume doesn't answer.
    TargetUnreachable = "TARGET_UNREACHABLE", Unavailable, Unreachable;
    /// The device didn't come up in time.
    AttachTimeout = "ATTACH_TIMEOUT", DeadlineExceeded, Unreachable;
    /// The records can't be written.
    MetadataUnreachable = "METADATA_UNREACHABLE", Unavailable, Unreachable;
    /// The node is being shut down.
    ShuttingDown = "SHUTTING_DOWN", Unavailable, Unreachable;
    /// The daemon doesn't answer; only the command itself says this.
    DaemonUnreachable = "DAEMON_UNREACHABLE", Unavailable, Unreachable;
    /// The machine can't do it.
    Unsupported = "UNSUPPORTED", FailedPrecondition, Unsupported;
    /// The target ended with an error.
    TargetFailed = "TARGET_FAILED", Internal, Failure;
    /// Replicas hold different things, and nobody can tell which is right; only the command itself says this.
    ReplicasDiffer = "REPLICAS_DIFFER", DataLoss, Failure;
    /// A store's process refused or ended with an error.
    ReplicaFailed = "REPLICA_FAILED", Internal, Failure;
    /// The daemon's own records or files failed.
    Internal = "INTERNAL", Internal, Failure;
}

impl Reason {
    /// The reason of a word on the wire; `None` for a newer daemon's.
    #[must_use]
    pub fn from_wire(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.as_str() == text)
    }
}

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// For programs.
    pub reason: Reason,
    /// What it is about.
    pub subject: String,
    /// For people: what happened and what to do.
    pub message: String,
}

impl Fault {
    /// A fault about `subject`.
    pub fn new(reason: Reason, subject: impl fmt::Display, message: impl Into<String>) -> Self {
        Self { reason, subject: subject.to_string(), message: message.into() }
    }

    /// A field of a request breaks a rule.
    pub fn invalid(field: &str, message: impl Into<String>) -> Self {
        Self::new(Reason::InvalidField, field, message)
    }
}

/// `google.rpc.Status`: the envelope in which gRPC clients look for details.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<AnyMessage>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct AnyMessage {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let code = fault.reason.code();
        let detail = ErrorDetail { reason: fault.reason.as_str().into(), subject: fault.subject, message: fault.message.clone() };
        let envelope = RpcStatus {
            code: code.into(),
            message: fault.message.clone(),
            details: vec![AnyMessage { type_url: DETAIL_TYPE_URL.into(), value: detail.encode_to_vec() }],
        };
        Self::with_details(code, fault.message, envelope.encode_to_vec().into())
    }
}

/// The typed detail of a failed call, if it has one.
#[must_use]
pub fn detail(status: &Status) -> Option<ErrorDetail> {
    let envelope = RpcStatus::decode(status.details()).ok()?;
    let any = envelope.details.into_iter().find(|any| any.type_url == DETAIL_TYPE_URL)?;
    ErrorDetail::decode(any.value.as_slice()).ok()
}

/// The exit code for a failed call: by its reason, or by its gRPC code if the reason is unknown here.
#[must_use]
pub fn exit_code(status: &Status) -> ExitCode {
    if let Some(reason) = detail(status).and_then(|detail| Reason::from_wire(&detail.reason)) {
        return reason.exit_code();
    }
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange => ExitCode::Usage,
        Code::NotFound => ExitCode::NotFound,
        Code::AlreadyExists => ExitCode::Conflict,
        Code::FailedPrecondition | Code::Aborted => ExitCode::Precondition,
        Code::ResourceExhausted => ExitCode::NoSpace,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => ExitCode::Unreachable,
        Code::Unimplemented => ExitCode::Unsupported,
        _ => ExitCode::Failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_wire() {
        for &reason in Reason::ALL {
            let status = Status::from(Fault::new(reason, "vm1", "no"));
            assert_eq!(status.code(), reason.code());
            let detail = detail(&status).unwrap();
            assert_eq!((Reason::from_wire(&detail.reason), detail.subject.as_str()), (Some(reason), "vm1"));
            assert_eq!(exit_code(&status), reason.exit_code());
        }
    }

    #[test]
    fn every_reason_is_documented() {
        let readme = include_str!("../README.md");
        for reason in Reason::ALL {
            let row = format!("| `{}` | {:?} | {} |", reason.as_str(), reason.code(), reason.exit_code() as u8);
            assert!(readme.contains(&row), "README.md lacks the row {row}");
        }
    }

    #[test]
    fn a_status_without_detail_has_an_exit_code_too() {
        assert_eq!(exit_code(&Status::not_found("x")), ExitCode::NotFound);
        assert_eq!(exit_code(&Status::unavailable("x")), ExitCode::Unreachable);
        assert_eq!(detail(&Status::with_details(Code::Internal, "x", vec![0xff; 9].into())), None);
    }

    #[test]
    fn the_envelope_is_googles() {
        let status = Status::from(Fault::new(Reason::NoSpace, "a", "b"));
        // Field 1 (code) = 8 RESOURCE_EXHAUSTED, field 2 (message) = "b", field 3 (details) follows.
        assert_eq!(status.details().get(..6), Some(&[0x08, 8, 0x12, 1, b'b', 0x1a][..]));
    }
}
