//! Ending everything on this node, so that nothing is left. (SIGTERM ends carrickd alone.)

use std::fs;
use std::time::Duration;

use carrick_ctl::fault::{Fault, Reason};

use crate::attach;
use crate::context::Context;
use crate::observed::Event;

/// For all stores' processes to end; each is killed if it doesn't (see `launch::stop`).
const END_LIMIT: Duration = Duration::from_secs(60);

/// Detaches what is attached, if that is asked for, and ends every process. If that fails, the node goes on as before.
pub async fn everything(context: &Context, detach: bool, force: bool) -> Result<(), Fault> {
    context.gate.close().await;
    let result = end_all(context, detach, force).await;
    if result.is_err() {
        context.node.send(Event::Stopping(false)).await;
        context.gate.open();
    }
    result
}

async fn end_all(context: &Context, detach: bool, force: bool) -> Result<(), Fault> {
    let state = context.state();
    let attached = || state.attached().map(|volume| volume.name.to_string());
    if !detach
        && let names = attached().collect::<Vec<_>>()
        && !names.is_empty()
    {
        let message = format!("volumes are attached: {}; detach them first, or use carrick shutdown --detach", names.join(", "));
        return Err(Fault::new(Reason::VolumeAttached, names.join(","), message));
    }
    for name in attached() {
        attach::detach(context, &name, force).await?;
    }
    context.node.send(Event::Stopping(true)).await;
    let ended = context.node.wait_until(|observed| observed.stopping && observed.processes.is_empty());
    if tokio::time::timeout(END_LIMIT, ended).await.is_err() {
        let left: Vec<_> = context.node.observed().processes.keys().map(ToString::to_string).collect();
        return Err(Fault::new(Reason::Internal, "processes", format!("these don't end: {}", left.join(", "))));
    }
    for folder in FOLDERS {
        // Fails if something else is in it: that is not ours.
        let _ = fs::remove_dir(context.run.root().join(folder));
    }
    Ok(())
}

/// The folders in the run directory (see `RunDirectory`).
pub const FOLDERS: [&str; 3] = ["replica", "target", "udev"];
