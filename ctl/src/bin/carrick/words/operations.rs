//! Operations, for people.

use std::fmt::Write;

use carrick_backing_store::size::HumanSize;
use carrick_ctl::v1::{DeviceGrowth, ExpandVolumeResponse, ExplainVolumeResponse, Finding, Operation, OperationKind, OperationState};

use super::{NONE, ago, property};
use crate::table::Table;

/// What becomes of a request to expand a volume, or would.
pub fn expansion(answer: &ExpandVolumeResponse) -> String {
    let (from, to) = (HumanSize(answer.from_bytes), HumanSize(answer.to_bytes));
    let device = match answer.device() {
        DeviceGrowth::NotAttached => "it isn't attached: its device has the new size at the next attachment",
        DeviceGrowth::Online => "its device grows at once, while it is used",
        DeviceGrowth::NextAttachment => {
            "this kernel can't change the size of a device: it has the new one when the volume is detached and attached again"
        }
        DeviceGrowth::Unspecified => "what becomes of its device is unknown",
    };
    let mut text = match &answer.operation {
        _ if answer.from_bytes == answer.to_bytes => return format!("it has {to} already\n"),
        Some(operation) => format!("operation {}: from {from} to {to}; {device}\n", operation.id),
        None => format!("would grow from {from} to {to}; {device}\n"),
    };
    if !answer.away_stores.is_empty() {
        let _ = writeln!(text, "these stores don't answer, and their replicas grow when they are back: {}", answer.away_stores.join(", "));
    }
    text
}

/// What is not as it should be with a volume.
pub fn explanation(answer: &ExplainVolumeResponse) -> String {
    let serves = if answer.serves { "its device answers" } else { "no device answers for it now" };
    let mut text = format!("volume {}: {serves}\n", answer.volume);
    if answer.findings.is_empty() {
        text.push_str("all is well\n");
    }
    for Finding { reason, message, since_unix, next, advice } in &answer.findings {
        let since = since_unix.map_or(String::new(), |unix| format!(" (since {} ago)", ago(unix)));
        let _ = writeln!(text, "\n{reason}{since}\n  {message}\n  next: {next}\n  to do: {advice}");
    }
    text
}

/// A table of operations.
pub fn operations(operations: &[Operation]) -> String {
    if operations.is_empty() {
        return "no operations\n".into();
    }
    let mut table = Table::new(["OPERATION", "VOLUME", "WHAT", "STATE", "SINCE", ""]);
    for operation in operations {
        table.row([
            operation.id.clone(),
            operation.volume.clone(),
            what(operation),
            state(operation),
            format!("{} ago", ago(operation.updated_unix)),
            operation.message.clone().unwrap_or_default(),
        ]);
    }
    table.to_string()
}

/// One operation.
pub fn operation(operation: &Operation) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| property(&mut text, name, value);
    line("operation", &operation.id);
    line("volume", &operation.volume);
    line("what", &what(operation));
    line("state", &state(operation));
    line("asked for", &format!("{} ago", ago(operation.created_unix)));
    line("changed", &format!("{} ago", ago(operation.updated_unix)));
    if let Some(since) = operation.waiting_since_unix {
        line("waits since", &format!("{} ago, tried {} times", ago(since), operation.attempts));
    }
    operation.message.as_deref().into_iter().for_each(|why| line("because", why));
    operation.notes.iter().for_each(|note| line("note", note));
    text
}

/// One operation in a line, for somebody who watches.
pub fn operation_line(operation: &Operation) -> String {
    let why = operation.message.as_ref().map_or(String::new(), |why| format!(": {why}"));
    let notes = operation.notes.iter().filter(|_| operation.state() != OperationState::Running);
    let notes: String = notes.map(|note| format!("; {note}")).collect();
    format!("{} {} {}: {}{why}{notes}\n", operation.id, operation.volume, what(operation), state(operation))
}

fn what(operation: &Operation) -> String {
    let [from, to] = [&operation.from_store, &operation.to_store].map(|store| store.as_deref().unwrap_or(NONE));
    match operation.kind() {
        OperationKind::Expand => format!("expand to {}", HumanSize(operation.to_bytes)),
        OperationKind::Move => format!("move {from} to {to}"),
        OperationKind::Replace => format!("replace {from} by {to}"),
        OperationKind::Add => format!("add a replica in {to}"),
        OperationKind::Create => "create".into(),
        OperationKind::Attach => "attach".into(),
        OperationKind::Detach => "detach".into(),
        OperationKind::Delete => "delete".into(),
        OperationKind::Unspecified => NONE.into(),
    }
}

fn state(operation: &Operation) -> String {
    match operation.state() {
        OperationState::Running if operation.waiting_since_unix.is_some() => format!("waiting ({})", operation.step),
        OperationState::Running => format!("running ({})", operation.step),
        OperationState::Succeeded => "done".into(),
        OperationState::Failed => format!("failed ({})", operation.step),
        OperationState::Cancelled => "cancelled".into(),
        OperationState::Unspecified => NONE.into(),
    }
}
