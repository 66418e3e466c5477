//! Compiles the protocol definitions, without protoc, and keeps their descriptors for gRPC reflection.

use std::error::Error;
use std::fs;
use std::path::PathBuf;

const PROTO: [&str; 7] = [
    "carrick/v1/error.proto",
    "carrick/v1/event.proto",
    "carrick/v1/health.proto",
    "carrick/v1/node.proto",
    "carrick/v1/operation.proto",
    "carrick/v1/store.proto",
    "carrick/v1/volume.proto",
];

/// Enum fields, and the function of `crate::json` that writes them as words.
const ENUM_FIELDS: [(&str, &str); 15] = [
    ("Store.process", "process_state"),
    ("Store.placement", "store_placement"),
    ("Store.health", "health"),
    ("Replica.health", "health"),
    ("Node.health", "health"),
    ("Volume.state", "volume_state"),
    ("Replica.state", "replica_state"),
    ("Attachment.state", "attachment_state"),
    ("Attachment.phase", "target_phase"),
    ("Attachment.map", "map"),
    ("Process.kind", "process_kind"),
    ("Process.state", "process_state"),
    ("Operation.kind", "operation_kind"),
    ("ExpandVolumeResponse.device", "device_growth"),
    ("Operation.state", "operation_state"),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true).open_files(PROTO)?;
    let descriptors = PathBuf::from(std::env::var("OUT_DIR")?).join("carrick.descriptors");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;

    let mut build = tonic_prost_build::configure().type_attribute(".carrick.v1", "#[derive(serde::Serialize)]");
    for (field, writer) in ENUM_FIELDS {
        build = build.field_attribute(format!(".carrick.v1.{field}"), format!("#[serde(serialize_with = \"crate::json::{writer}\")]"));
    }
    build.compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
