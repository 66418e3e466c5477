//! Carrick's replication: the wire protocol, the sans-I/O primary engine and replica service, and the I/O around them.

pub mod bucket;
pub mod control;
pub mod endpoint;
pub mod engine;
pub mod io;
pub mod limits;
pub mod replica;
pub mod time;
pub mod wire;
