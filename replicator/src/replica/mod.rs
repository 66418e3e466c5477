//! The replica's side of the protocol: sessions of primaries on the replicas of one store.
//!
//! Sans-I/O, and without a clock: a replica waits for nobody.

mod service;
mod volume;

pub use service::{ConnectionId, ReplicaService, ServiceAction};
