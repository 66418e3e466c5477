//! The node as a whole, for people.

use std::fmt::Write;

use carrick_backing_store::size::HumanSize;
use carrick_ctl::v1::{DrainNodeResponse, Node, Operation, Store};

use super::{NONE, health, operation_line, property};

/// What may come to a node, and what is there.
pub fn node(node: &Node) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| property(&mut text, name, value);
    line("carrickd", &node.version);
    line("health", health(node.health()));
    if let Some(upgrade) = &node.upgrade {
        line("upgrade", &format!("under way, {} processes are left", upgrade.left));
    }
    line("targets", if node.takes_targets { "volumes may be attached" } else { "no more volumes are attached" });
    line("replicas", if node.takes_replicas { "replicas may be made" } else { "no more replicas are made" });
    let (available, capacity) = (HumanSize(node.available_bytes), HumanSize(node.capacity_bytes));
    line("stores", &format!("{}, {available} of {capacity} available", node.stores));
    line("volumes", &node.volumes.to_string());
    line("attached", &if node.attached_volumes.is_empty() { NONE.into() } else { node.attached_volumes.join(", ") });
    text
}

/// What became of the attached volumes of a node that was drained.
pub fn drained(answer: &DrainNodeResponse) -> String {
    let mut text = String::new();
    answer.detached_volumes.iter().for_each(|volume| _ = writeln!(text, "detached {volume}"));
    answer.in_use.iter().for_each(|left| _ = writeln!(text, "still attached: {}: {}", left.volume, left.reason));
    if answer.in_use.is_empty() {
        text.push_str("nothing is attached, and nothing comes\n");
    }
    text
}

/// How far a store is that is being emptied.
pub fn eviction(store: &Store, operations: &[Operation]) -> String {
    let mut text = String::new();
    for operation in operations {
        if operation.from_store.as_deref() == Some(store.path.as_str()) {
            text.push_str(&operation_line(operation));
        }
    }
    let (there, leaving) = (store.volumes.len(), store.leaving_volumes.len());
    let _ = writeln!(text, "{there} replicas are to go, {leaving} more are to be deleted");
    text
}
