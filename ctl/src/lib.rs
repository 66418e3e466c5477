//! Carrick's control plane: what the `carrickd` daemon and the `carrick` command have in common.
//!
//! The daemon's own modules are in `src/bin/carrickd/`, the command's in `src/bin/carrick/`.

pub mod fault;
mod json;
pub mod name;

/// The messages and services of `carrick.v1`, generated from `proto/carrick/v1/`; their text is documented there.
#[allow(missing_docs, rustdoc::all, clippy::all, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("carrick.v1");

    /// The definitions as an encoded `FileDescriptorSet`, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/carrick.descriptors"));
}
