//! Carrick's replication: the wire protocol, the sans-I/O primary engine and replica session, and the I/O drivers.

pub mod control;
pub mod endpoint;
