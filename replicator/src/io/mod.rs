//! The thin I/O around the state machines: one thread, one io_uring, no lock.

mod connection;
mod control_socket;
mod front_end;
mod histogram;
mod listeners;
mod load;
mod mailbox;
mod primary;
mod reactor;
mod receive;
mod scrubber;
mod send;
mod server;
mod server_control;
mod server_stop;
mod socket;

pub use connection::{ConnectionKey, Connections, EndReason, Event};
pub use control_socket::{Command, ControlSocket, Reply};
pub use front_end::FrontEnd;
pub use histogram::{Histogram, LatencySummary};
pub use listeners::ReplicaListeners;
pub use load::{Load, LoadLimit, LoadPattern, LoadReport, LoadSpec, LoadSpecError, OperationReport, Verification};
pub use mailbox::{Mailbox, Sender, mailbox};
pub use primary::{Primary, PrimaryError, ring_unavailable};
pub use reactor::{Completed, Reactor, Source};
pub use server::{Server, ServerError};
pub use socket::listen_unix;
