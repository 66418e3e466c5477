//! What each command does. To add one: a variant of [`Command`] and an arm in [`run`].

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::v1;
use serde::Serialize;

use crate::arguments::{
    Arguments, Attach, Command, Detach, Kinds, MapWhen, NodeCommand, OperationCommand, Shutdown, StoreCommand, VolumeCommand,
};
use crate::bench;
use crate::client::{Client, change, question};
use crate::doctor;
use crate::events::{self, Events};
use crate::report::Problem;
use crate::settings;
use crate::upgrade::{self, Upgrade};
use crate::words;

/// For the daemon to be gone after it said that everything is shut down.
const GONE_LIMIT: Duration = Duration::from_secs(10);
/// Between two questions how far a comparison is: nobody waits long for the end of one that takes minutes.
const VERIFIED_POLL: Duration = Duration::from_millis(200);
/// Between two looks at a store that is being emptied, which takes as long as its volumes are large.
const EMPTY_POLL: Duration = Duration::from_millis(500);

/// Where results go.
struct Output {
    json: bool,
}

impl Output {
    /// Shows a result: as JSON, or in words.
    fn show<T: Serialize>(&self, result: &T, words: impl FnOnce(&T) -> String) -> Result<(), Problem> {
        self.write(if self.json { serde_json::to_string_pretty(result).map_err(Problem::local)? + "\n" } else { words(result) }).map(drop)
    }

    /// Shows one of many results: as JSON, one in a line. `false`: nobody reads any more.
    fn show_next<T: Serialize>(&self, result: &T, words: impl FnOnce(&T) -> String) -> Result<bool, Problem> {
        self.write(if self.json { serde_json::to_string(result).map_err(Problem::local)? + "\n" } else { words(result) })
    }

    /// Shows people how it goes on. Programs wait for the end.
    fn progress(&self, text: impl Into<String>) -> Result<(), Problem> {
        if self.json { Ok(()) } else { self.write(text.into()).map(drop) }
    }

    /// Tells somebody who watches. Programs see it by themselves.
    fn remark(&self, text: &str) {
        if !self.json {
            // Nobody to tell if this fails.
            let _ = writeln!(io::stderr(), "carrick: {text}");
        }
    }

    fn write(&self, text: String) -> Result<bool, Problem> {
        match io::stdout().lock().write_all(text.as_bytes()) {
            // The reader has seen enough (`carrick volume list | head -1`).
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            result => result.map(|()| true).map_err(Problem::local),
        }
    }
}

/// Runs a command.
pub async fn run(arguments: Arguments) -> Result<(), Problem> {
    let socket = arguments.socket();
    // Nothing is done before it is awaited: `bench` needs no carrickd.
    let client = Client::connect(&socket);
    let output = Output { json: arguments.json };
    match arguments.command {
        Command::Store(command) => store(&client.await?, &output, command).await,
        Command::Node(command) => node(&client.await?, &output, command).await,
        Command::Volume(command) => volume(&client.await?, &output, command).await,
        Command::Operation(command) => operation(&client.await?, &output, command).await,
        Command::Attach(arguments) => attach(&client.await?, &output, arguments).await,
        Command::Detach(arguments) => detach(&client.await?, &output, arguments).await,
        Command::Explain { name } => {
            let answer = client.await?.volumes().explain_volume(question(v1::ExplainVolumeRequest { name })).await?.into_inner();
            output.show(&answer, words::explanation)
        }
        Command::Events(arguments) => tell_events(client.await?, &output, &socket, arguments).await,
        Command::Doctor => doctor(client.await, &output).await,
        Command::Status => {
            let status = client.await?.node().get_status(question(v1::GetStatusRequest {})).await?.into_inner();
            output.show(&status, words::status)
        }
        Command::Shutdown(arguments) => shutdown(&client.await?, &output, &arguments).await,
        Command::Bench(arguments) => output.show(&bench::bench(&arguments)?, bench::words),
    }
}

/// Works without carrickd, too, as far as that goes.
async fn doctor(client: Result<Client, Problem>, output: &Output) -> Result<(), Problem> {
    let status = match client {
        Ok(client) => client.node().get_status(question(v1::GetStatusRequest {})).await.map_err(Problem::from),
        Err(problem) => Err(problem),
    };
    let checks = doctor::examine(&status.map(tonic::Response::into_inner).map_err(|problem| problem.message().to_owned()));
    output.show(&checks, |checks| doctor::words(checks))?;
    let failed = checks.iter().filter(|check| check.verdict == doctor::Verdict::Fail).count();
    if failed == 0 {
        return Ok(());
    }
    Err(Fault::new(Reason::Unsupported, "doctor", format!("{failed} of {} checks failed", checks.len())).into())
}

async fn store(client: &Client, output: &Output, command: StoreCommand) -> Result<(), Problem> {
    let mut stores = client.stores();
    match command {
        StoreCommand::Add { path, size, listen, insecure } => {
            // The daemon has another working directory.
            let path = std::path::absolute(path).map_err(Problem::local)?;
            let Some(path) = path.to_str().map(str::to_owned) else {
                return Err(Fault::invalid("path", "a store's path must be UTF-8").into());
            };
            let request = v1::AddStoreRequest { path, listen, insecure, size_bytes: size };
            let answer = stores.add_store(change(request)).await?.into_inner();
            let store = answer.store.unwrap_or_default();
            output.show(&store, |store| format!("{}\n", store.id))
        }
        StoreCommand::List => {
            let answer = stores.list_stores(question(v1::ListStoresRequest {})).await?.into_inner();
            output.show(&answer.stores, |stores| words::stores(stores))
        }
        StoreCommand::Show { store } => {
            let answer = stores.get_store(question(v1::GetStoreRequest { store })).await?.into_inner();
            // And what its disks say of themselves: programs ask carrick doctor.
            let disks = |store: &v1::Store| doctor::words(&doctor::healths(std::slice::from_ref(store)));
            output.show(&answer.store.unwrap_or_default(), |store| words::store(store) + &disks(store))
        }
        StoreCommand::Enable { store } => output.show(&place(client, store, v1::StorePlacement::Enabled).await?, words::store),
        StoreCommand::Disable { store } => output.show(&place(client, store, v1::StorePlacement::Disabled).await?, words::store),
        StoreCommand::Evict { store, wait } => {
            let found = place(client, store, v1::StorePlacement::Evicting).await?;
            let found = if wait { wait_until_empty(client, output, found.id).await? } else { found };
            output.show(&found, words::store)
        }
        StoreCommand::Set { store, limit, warn } => {
            let request = v1::SetStoreRequest { store, placement: None, limit_percent: limit, warning_percent: warn };
            output.show(&set_store(client, request).await?, words::store)
        }
        StoreCommand::Remove { store } => {
            let answer = stores.remove_store(change(v1::RemoveStoreRequest { store })).await?.into_inner();
            output.show(&answer, |_| String::new())
        }
    }
}

/// Says whether replicas come to a store.
async fn place(client: &Client, store: String, placement: v1::StorePlacement) -> Result<v1::Store, Problem> {
    let request = v1::SetStoreRequest { store, placement: Some(placement.into()), ..v1::SetStoreRequest::default() };
    set_store(client, request).await
}

async fn set_store(client: &Client, request: v1::SetStoreRequest) -> Result<v1::Store, Problem> {
    Ok(client.stores().set_store(change(request)).await?.into_inner().store.unwrap_or_default())
}

/// Returns when no replica is left in a store that is being emptied.
async fn wait_until_empty(client: &Client, output: &Output, store: String) -> Result<v1::Store, Problem> {
    let mut shown = String::new();
    loop {
        let answer = client.stores().get_store(question(v1::GetStoreRequest { store: store.clone() })).await?.into_inner();
        let store = answer.store.unwrap_or_default();
        if store.placement() != v1::StorePlacement::Evicting {
            let message = format!("store {} is no longer to be emptied: somebody else has said so", store.path);
            return Err(Fault::new(Reason::StoreInUse, &store.id, message).into());
        }
        if store.volumes.is_empty() && store.leaving_volumes.is_empty() {
            return Ok(store);
        }
        let running = v1::ListOperationsRequest { volume: None, only_running: true };
        let operations = client.operations().list_operations(question(running)).await?.into_inner();
        let progress = words::eviction(&store, &operations.operations);
        if progress != shown {
            output.progress(&progress)?;
            shown = progress;
        }
        tokio::time::sleep(EMPTY_POLL).await;
    }
}

async fn node(client: &Client, output: &Output, command: NodeCommand) -> Result<(), Problem> {
    let mut node = client.node();
    let takes = |Kinds { targets, replicas }: Kinds, takes: bool| v1::SetNodeRequest {
        takes_targets: (targets || !replicas).then_some(takes),
        takes_replicas: (replicas || !targets).then_some(takes),
    };
    let found = match command {
        NodeCommand::Show => node.get_node(question(v1::GetNodeRequest {})).await?.into_inner().node,
        NodeCommand::Enable(kinds) => node.set_node(change(takes(kinds, true))).await?.into_inner().node,
        NodeCommand::Disable(kinds) => node.set_node(change(takes(kinds, false))).await?.into_inner().node,
        NodeCommand::Drain => {
            let answer = node.drain_node(change(v1::DrainNodeRequest {})).await?.into_inner();
            output.show(&answer, words::drained)?;
            let Some(first) = answer.in_use.first() else { return Ok(()) };
            let message = format!("{} volumes are still attached; {}: {}", answer.in_use.len(), first.volume, first.reason);
            return Err(Fault::new(Reason::DeviceBusy, &first.volume, message).into());
        }
        NodeCommand::Upgrade(arguments) => return upgrade(client, output, &arguments).await,
    };
    output.show(&found.unwrap_or_default(), words::node)
}

async fn upgrade(client: &Client, output: &Output, arguments: &Upgrade) -> Result<(), Problem> {
    let request = v1::UpgradeNodeRequest { dry_run: arguments.dry_run };
    let answer = client.node().upgrade_node(change(request)).await?.into_inner();
    let status = client.node().get_status(question(v1::GetStatusRequest {})).await?.into_inner();
    output.show(&answer, |answer| words::upgrade(answer, &status))?;
    if !arguments.wait {
        return Ok(());
    }
    upgrade::wait(client.socket(), |progress| output.progress(format!("{progress}\n"))).await
}

async fn volume(client: &Client, output: &Output, command: VolumeCommand) -> Result<(), Problem> {
    let mut volumes = client.volumes();
    match command {
        VolumeCommand::Create { name, size, replicas, block_size, stores } => {
            let request = v1::CreateVolumeRequest { name, size_bytes: size, replicas, block_size, stores };
            let answer = volumes.create_volume(change(request)).await?.into_inner();
            output.show(&answer.volume.unwrap_or_default(), words::volume)
        }
        VolumeCommand::List => {
            let answer = volumes.list_volumes(question(v1::ListVolumesRequest {})).await?.into_inner();
            output.show(&answer.volumes, |volumes| words::volumes(volumes))
        }
        VolumeCommand::Show { name } => {
            let answer = volumes.get_volume(question(v1::GetVolumeRequest { name })).await?.into_inner();
            output.show(&answer.volume.unwrap_or_default(), words::volume)
        }
        VolumeCommand::Expand { name, size, dry_run, wait, key } => {
            let request = v1::ExpandVolumeRequest { name, size_bytes: size, dry_run, idempotency_key: key };
            let answer = volumes.expand_volume(change(request)).await?.into_inner();
            match &answer.operation {
                Some(operation) if wait => {
                    let ended = wait_until_done(client, output, operation).await?;
                    if output.json {
                        output.show(&v1::ExpandVolumeResponse { operation: Some(ended), ..answer }, words::expansion)
                    } else {
                        Ok(())
                    }
                }
                _ => output.show(&answer, words::expansion),
            }
        }
        VolumeCommand::Set { name, settings } => {
            let answer = volumes.set_volume(change(settings::request(name, &settings)?)).await?.into_inner();
            output.show(&answer.volume.unwrap_or_default(), words::volume)
        }
        VolumeCommand::Verify { name, wait } => {
            let answer = volumes.verify_volume(change(v1::VerifyVolumeRequest { name: name.clone() })).await?.into_inner();
            let volume = if wait { wait_until_verified(client, name).await? } else { answer.volume.unwrap_or_default() };
            output.show(&volume, words::volume)
        }
        VolumeCommand::Replace { name, store, with, wait } => {
            let answer = volumes.replace_replica(change(v1::ReplaceReplicaRequest { name: name.clone(), store, with })).await?.into_inner();
            let volume = match &answer.operation {
                Some(operation) if wait => {
                    wait_until_done(client, output, operation).await?;
                    volumes.get_volume(question(v1::GetVolumeRequest { name })).await?.into_inner().volume
                }
                _ => answer.volume,
            };
            output.show(&volume.unwrap_or_default(), words::volume)
        }
        VolumeCommand::AddReplica { name, with } => {
            let answer = volumes.add_replica(change(v1::AddReplicaRequest { name, with })).await?.into_inner();
            output.show(&answer.volume.unwrap_or_default(), words::volume)
        }
        VolumeCommand::Salvage { name, from, give_up_the_rest } => {
            let request = v1::SalvageVolumeRequest { name, from, give_up_the_rest };
            let answer = volumes.salvage_volume(change(request)).await?.into_inner();
            output.show(&answer.volume.unwrap_or_default(), words::volume)
        }
        VolumeCommand::Delete { name } => {
            let answer = volumes.delete_volume(change(v1::DeleteVolumeRequest { name })).await?.into_inner();
            output.show(&answer, |answer| match answer.pending_stores.as_slice() {
                [] => String::new(),
                stores => format!("deleted; these stores can't be reached and delete their replica later: {}\n", stores.join(", ")),
            })
        }
    }
}

async fn operation(client: &Client, output: &Output, command: OperationCommand) -> Result<(), Problem> {
    let mut operations = client.operations();
    match command {
        OperationCommand::List { volume, running } => {
            let request = v1::ListOperationsRequest { volume, only_running: running };
            let answer = operations.list_operations(question(request)).await?.into_inner();
            output.show(&answer.operations, |operations| words::operations(operations))
        }
        OperationCommand::Show { operation } => {
            let answer = operations.get_operation(question(v1::GetOperationRequest { operation })).await?.into_inner();
            output.show(&answer.operation.unwrap_or_default(), words::operation)
        }
        OperationCommand::Watch { operation } => {
            let tell = |operation: &v1::Operation| output.show_next(operation, words::operation_line).map(drop);
            watch_operation(client, operation, tell).await.map(drop)
        }
        OperationCommand::Cancel { operation } => {
            let answer = operations.cancel_operation(change(v1::CancelOperationRequest { operation })).await?.into_inner();
            output.show(&answer.operation.unwrap_or_default(), words::operation)
        }
    }
}

async fn tell_events(client: Client, output: &Output, socket: &Path, arguments: Events) -> Result<(), Problem> {
    let request = arguments.request();
    if request.follow {
        let tell = |event: &v1::Event| output.show_next(event, words::event_line);
        return events::follow(socket, client, request, tell, || output.remark("carrickd is away; this goes on when it is back")).await;
    }
    output.show(&events::read(&client, request).await?, |events| words::events(events))
}

/// Shows an operation until it has ended; fails if it has not succeeded.
async fn wait_until_done(client: &Client, output: &Output, operation: &v1::Operation) -> Result<v1::Operation, Problem> {
    let progress = |operation: &v1::Operation| output.progress(words::operation_line(operation));
    let ended = watch_operation(client, Some(operation.id.clone()), progress).await?.unwrap_or_default();
    outcome(&ended).map(|()| ended)
}

/// Tells each change; returns what came last.
async fn watch_operation(
    client: &Client,
    operation: Option<String>,
    mut tell: impl FnMut(&v1::Operation) -> Result<(), Problem>,
) -> Result<Option<v1::Operation>, Problem> {
    let request = v1::WatchOperationsRequest { operation };
    // It may take as long as it likes.
    let mut changes = client.operations().watch_operations(request).await?.into_inner();
    let mut last = None;
    while let Some(change) = changes.message().await? {
        if let Some(operation) = change.operation {
            tell(&operation)?;
            last = Some(operation);
        }
    }
    Ok(last)
}

/// How an operation has ended, as the command's own end.
fn outcome(operation: &v1::Operation) -> Result<(), Problem> {
    match operation.state() {
        v1::OperationState::Succeeded => Ok(()),
        v1::OperationState::Failed => {
            let reason = operation.reason.as_deref().and_then(Reason::from_wire).unwrap_or(Reason::Internal);
            let message = operation.message.clone().unwrap_or_else(|| "it failed".into());
            Err(Fault::new(reason, &operation.volume, message).into())
        }
        v1::OperationState::Cancelled => {
            Err(Fault::new(Reason::OperationEnded, &operation.volume, format!("operation {} was cancelled", operation.id)).into())
        }
        // The daemon has ended, and the operation goes on with the next one.
        v1::OperationState::Running | v1::OperationState::Unspecified => {
            let message = format!("carrickd has ended; operation {} goes on when it is back", operation.id);
            Err(Fault::new(Reason::DaemonUnreachable, &operation.volume, message).into())
        }
    }
}

/// Asks again and again, as long as the comparison goes on.
async fn wait_until_verified(client: &Client, name: String) -> Result<v1::Volume, Problem> {
    loop {
        let answer = client.volumes().get_volume(question(v1::GetVolumeRequest { name: name.clone() })).await?.into_inner();
        let volume = answer.volume.unwrap_or_default();
        match volume.attachment.as_ref().and_then(|attachment| attachment.verification.as_ref()) {
            // The target has been started anew, and knows nothing of it.
            None => {
                let message = format!("volume {name} was left while it was verified: begin again");
                return Err(Fault::new(Reason::TargetUnreachable, name, message).into());
            }
            Some(found) if found.running => tokio::time::sleep(VERIFIED_POLL).await,
            Some(found) if found.unsettled_blocks > 0 => {
                let message = format!("replicas of volume {name} differ: {}", words::verification(found));
                return Err(Fault::new(Reason::ReplicasDiffer, name, message).into());
            }
            Some(_) => return Ok(volume),
        }
    }
}

async fn attach(client: &Client, output: &Output, arguments: Attach) -> Result<(), Problem> {
    let Attach { name, host, queue_depth, map } = arguments;
    let map = match map {
        MapWhen::Auto => v1::Map::Auto,
        MapWhen::Always => v1::Map::Always,
        MapWhen::Never => v1::Map::Never,
    };
    let request = v1::AttachVolumeRequest { name, host, queue_depth, map: map.into() };
    let answer = client.volumes().attach_volume(change(request)).await?.into_inner();
    output.show(&answer, |answer| format!("{}\n", answer.device))
}

async fn detach(client: &Client, output: &Output, arguments: Detach) -> Result<(), Problem> {
    let Detach { name, force } = arguments;
    let answer = client.volumes().detach_volume(change(v1::DetachVolumeRequest { name, force })).await?.into_inner();
    output.show(&answer, |_| String::new())
}

async fn shutdown(client: &Client, output: &Output, arguments: &Shutdown) -> Result<(), Problem> {
    let request = v1::ShutdownRequest { detach: arguments.detach, force: arguments.force };
    let answer = client.node().shutdown(change(request)).await?.into_inner();
    wait_until_gone(client.socket()).await?;
    output.show(&answer, |_| String::new())
}

/// The daemon answers, and then ends: whoever runs this command next must not meet it.
async fn wait_until_gone(socket: &Path) -> Result<(), Problem> {
    let started = Instant::now();
    while socket.exists() {
        if started.elapsed() >= GONE_LIMIT {
            return Err(Problem::local(format!(
                "everything is shut down, but carrickd itself doesn't end; {} is still there",
                socket.display()
            )));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
