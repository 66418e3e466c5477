//! Looking into a store, also while somebody serves it.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::Context;
use carrick_backing_store::epoch_map::{self, Contents};
use carrick_backing_store::{BLOCK_SIZE, OpenedReplica, SnapshotInfo};
use serde_json::{Value, json};

use super::print_json;
use super::store::open_to_look;

/// Prints what is in a store. Of one that is served this is what was there a moment ago; its process knows better.
pub(crate) fn show(path: &Path) -> anyhow::Result<()> {
    let Contents { id, geometry, usage, replicas } = epoch_map::look(|| open_to_look(path), path)?;
    let size = geometry.blocks * u64::from(BLOCK_SIZE);
    let replicas: Vec<Value> = replicas.iter().map(|(replica, snapshots)| replica_json(replica, snapshots)).collect();
    print_json(&json!({ "store": id, "path": path, "size": size, "usage": usage, "replicas": replicas }))
}

fn replica_json(replica: &OpenedReplica, snapshots: &[SnapshotInfo]) -> Value {
    let OpenedReplica { spec, state, position, .. } = replica;
    json!({ "volume": spec.volume, "size": spec.size, "state": state, "position": position, "snapshots": snapshots })
}

/// Prints what the store's structures say.
pub(crate) fn dump(path: &Path) -> anyhow::Result<()> {
    let disk = open_to_look(path)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let dumped = epoch_map::dump(disk, path, &mut out).map_err(anyhow::Error::from);
    // What was found before an error is told as well.
    let flushed = out.flush().context("can't write to the standard output");
    dumped.and(flushed)
}
