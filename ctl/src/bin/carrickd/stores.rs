//! Adding and removing stores, and choosing some for a new volume.

use std::ffi::OsStr;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use carrick_backing_store::size::HumanSize;
use carrick_backing_store::{ByteLength, StoreId};
use carrick_ctl::fault::{Fault, Reason};
use carrick_replicator::control::ReplicaProcessStatus;
use serde::Deserialize;
use tokio::process::Command;

use crate::context::{Context, unix_now};
use crate::health::{self, Patience};
use crate::metadata::{Mutation, Placement, State, StoreRecord, VolumeRecord};
use crate::observed::ProcessId;
use crate::{placement, programs, survey};

/// For formatting a store, which writes its journal once, of up to 256 MiB; for looking into one, and for its process to answer for the
/// first time, which both replay that.
const OPEN_LIMIT: Duration = Duration::from_secs(120);
/// For a store's process to end: it syncs, then is killed (see `launch::stop`).
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// For stores that are just being started or adopted (carrickd itself may have started a moment ago).
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// Shortest beginning of a store's id that stands for it.
const PREFIX_MIN: usize = 4;

/// What `carrick-replica format` and `show` print first; the rest is not for us.
#[derive(Deserialize)]
struct Identity {
    store: StoreId,
}

/// The store that a caller means: by id, by the beginning of it, or by path.
pub fn resolve<'a>(state: &'a State, text: &str) -> Result<&'a StoreRecord, Fault> {
    if let Some(record) = state.stores.values().find(|record| record.path == Path::new(text)) {
        return Ok(record);
    }
    let mut matches = state.stores.values().filter(|record| is_beginning(record.id, text));
    match (matches.next(), matches.next()) {
        (Some(record), None) => Ok(record),
        (Some(_), Some(_)) => Err(Fault::invalid("store", format!("{text:?} is the beginning of several stores' ids: write more of it"))),
        (None, _) => Err(Fault::new(Reason::StoreNotFound, text, format!("there is no store {text:?}; see carrick store list"))),
    }
}

/// Whether this is the beginning of a store's id that may stand for it.
pub fn is_beginning(store: StoreId, text: &str) -> bool {
    text.len() >= PREFIX_MIN && store.to_string().starts_with(&text.to_ascii_lowercase())
}

/// How a store is to be added.
pub struct NewStore {
    /// Where other nodes reach it.
    pub listen: Option<SocketAddr>,
    /// Without TLS.
    pub insecure: bool,
    /// How large it becomes, if it is formatted.
    pub size: Option<ByteLength>,
}

/// What is where a store shall be.
enum Place {
    /// A folder with nothing of anybody's.
    EmptyFolder,
    /// One with something in it.
    Folder,
    Device,
}

/// Adds a folder or a device as a store and starts serving it.
pub async fn add(context: &Context, path: &str, new: NewStore) -> Result<StoreId, Fault> {
    let NewStore { listen, insecure, size } = new;
    let _one_at_a_time = context.stores.lock().await;
    let (path, place) = look_into(Path::new(path))?;
    let state = context.state();
    if let Some(known) = state.stores.values().find(|record| record.path == path) {
        return same_options(known, listen, insecure).map(|()| known.id);
    }
    let show = [OsStr::new("show"), path.as_os_str()];
    let mut format = vec![OsStr::new("format"), path.as_os_str()];
    let size = size.map(|size| size.to_string());
    size.iter().for_each(|size| format.extend([OsStr::new("--size"), OsStr::new(size)]));
    let identity = match place {
        Place::EmptyFolder => tool(context, &path, &format).await?,
        Place::Folder => tool(context, &path, &show).await?,
        Place::Device => match tool(context, &path, &show).await {
            Ok(identity) => identity,
            // It refuses a device that isn't empty. If there is a store, only the first says what is wrong with it.
            Err(shown) => {
                tool(context, &path, &format).await.map_err(|refused| Fault { message: format!("{shown}; {refused}"), ..refused })?
            }
        },
    };
    if let Some(known) = state.stores.get(&identity.store) {
        let message = format!("the store in {} is added already, at {}", path.display(), known.path.display());
        return Err(Fault::new(Reason::StoreExists, known.id, message));
    }
    let record = StoreRecord::new(identity.store, path, listen, insecure, unix_now());
    context.apply(Mutation::PutStore(record.clone())).await?;
    if let Err(fault) = wait_until_served(context, &record).await {
        context.apply_saying(Some(fault.message.clone()), Mutation::RemoveStore(record.id)).await?;
        wait_gone(context, record.id).await?;
        return Err(fault);
    }
    Ok(record.id)
}

/// Stops serving a store and forgets it. Its files stay.
pub async fn remove(context: &Context, text: &str) -> Result<(), Fault> {
    let _one_at_a_time = context.stores.lock().await;
    let state = context.state();
    let record = resolve(&state, text)?;
    let volumes: Vec<_> = state.volumes_on(record.id).map(|volume| volume.name.to_string()).collect();
    if !volumes.is_empty() {
        let message = format!("store {} has replicas of {}: delete these volumes first", record.path.display(), volumes.join(", "));
        return Err(Fault::new(Reason::StoreInUse, record.id, message));
    }
    context.apply(Mutation::RemoveStore(record.id)).await?;
    wait_gone(context, record.id).await
}

/// Waits until each store either answers or failed to.
async fn settle(context: &Context) {
    let state = context.state();
    let settled = context.node.wait_until(|observed| {
        let known = |id: &StoreId| observed.processes.get(&ProcessId::Replica(*id));
        state.stores.keys().all(|id| known(id).is_some_and(|process| process.answers() || process.last_exit.is_some() || process.hangs()))
    });
    // Over the limit, the caller sees for himself.
    let _ = tokio::time::timeout(SETTLE_LIMIT, settled).await;
}

/// Different stores for a new volume: the given ones, or those with the most free space.
pub async fn choose(context: &Context, given: &[String], count: usize) -> Result<Vec<StoreId>, Fault> {
    settle(context).await;
    let state = context.state();
    placement::check_replicas(&state)?;
    if !given.is_empty() {
        let mut chosen = Vec::new();
        for text in given {
            let record = resolve(&state, text)?;
            placement::check_store(record)?;
            let id = record.id;
            if chosen.contains(&id) {
                return Err(Fault::invalid("stores", format!("store {text} is given twice: each replica needs a store of its own")));
            }
            chosen.push(id);
        }
        return Ok(chosen);
    }
    let free = with_most_room(context, &state).await;
    if free.len() < count {
        let away = state.stores.len() - free.len();
        let but = if away == 0 { String::new() } else { format!(", and {away} that can't be used") };
        let message = format!(
            "{count} stores are needed for {count} replicas, there are {}{but}: add one with carrick store add, or ask for fewer replicas",
            free.len()
        );
        return Err(Fault::new(Reason::TooFewStores, "stores", message));
    }
    Ok(free.into_iter().take(count).map(|(_, id)| id).collect())
}

/// The stores that answer and take new replicas, and how much room each has: those that are as they should be, those with the most first.
async fn with_most_room(context: &Context, state: &State) -> Vec<(ByteLength, StoreId)> {
    let enabled = state.stores.values().filter(|record| record.placement == Placement::Enabled).map(|record| record.id);
    let answers = survey::replicas(context, enabled).await.into_iter();
    let usable = answers.filter_map(|(id, status)| Some((id, status.ok().filter(|status| status.poisoned.is_none())?)));
    let (observed, moment) = (context.node.observed(), context.moment());
    let patience = Patience::new(moment.replace_after);
    let judged = |(id, status): (StoreId, ReplicaProcessStatus)| {
        let room = state.stores.get(&id)?.room(&status.usage);
        let process = observed.processes.get(&ProcessId::Replica(id));
        Some((health::of_store(process, Some(&Ok(status)), patience, moment.now), std::cmp::Reverse(room), id))
    };
    let mut free: Vec<_> = usable.filter_map(judged).collect();
    free.sort_unstable();
    free.into_iter().map(|(_, std::cmp::Reverse(room), id)| (room, id)).collect()
}

/// A store for one more replica of a volume: the given one, or of those without one that with the most free space.
pub async fn choose_another(context: &Context, volume: &VolumeRecord, given: Option<&str>) -> Result<StoreId, Fault> {
    settle(context).await;
    let state = context.state();
    placement::check_replicas(&state)?;
    let has_one = |store: &StoreId| volume.replicas.contains(store) || volume.leaving.contains(store);
    if let Some(text) = given {
        let record = resolve(&state, text)?;
        placement::check_store(record)?;
        let store = record.id;
        if has_one(&store) {
            let message = format!("store {text} has a replica of volume {}, or had one that is still to be deleted", volume.name);
            return Err(Fault::invalid("with", message));
        }
        return Ok(store);
    }
    let needed = volume.size.bytes();
    let free = with_most_room(context, &state).await;
    let fits = free.iter().find(|(free, store)| *free >= needed && !has_one(store));
    fits.map(|(_, store)| *store).ok_or_else(|| {
        let message = format!(
            "no other store answers and has room for a replica of volume {} ({}): add one with carrick store add",
            volume.name,
            HumanSize(needed.get())
        );
        Fault::new(Reason::TooFewStores, &volume.name, message)
    })
}

/// The folder's real path, or the device's as it was given, and what is there.
fn look_into(path: &Path) -> Result<(PathBuf, Place), Fault> {
    let invalid = |message: String| Fault::invalid("path", message);
    if !path.is_absolute() {
        return Err(invalid(format!("{} is not an absolute path", path.display())));
    }
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => invalid(format!("{} is not there: make the folder, or mount the disk, first", path.display())),
        _ => invalid(format!("{}: {error}", path.display())),
    };
    if path.metadata().map_err(failed)?.file_type().is_block_device() {
        // Its real path may be another device's after the next start of the machine.
        return Ok((path.to_path_buf(), Place::Device));
    }
    let path = path.canonicalize().map_err(failed)?;
    let mut place = Place::EmptyFolder;
    for entry in path.read_dir().map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        // What every new ext4 file system has, and what an interrupted format leaves.
        if name != "lost+found" && name != "blocks.new" {
            place = Place::Folder;
        }
    }
    Ok((path, place))
}

fn same_options(known: &StoreRecord, listen: Option<SocketAddr>, insecure: bool) -> Result<(), Fault> {
    let written = |listen: Option<SocketAddr>| listen.map_or("no address".to_owned(), |address| address.to_string());
    if known.listen != listen {
        let message = format!("store {} is added already, with {}, not {}", known.path.display(), written(known.listen), written(listen));
        return Err(Fault::new(Reason::StoreExists, known.id, message));
    }
    if known.insecure != insecure {
        let how = if known.insecure { "without" } else { "with" };
        let message = format!("store {} is added already, {how} TLS", known.path.display());
        return Err(Fault::new(Reason::StoreExists, known.id, message));
    }
    Ok(())
}

/// Runs `carrick-replica`, with these arguments, about this place.
async fn tool(context: &Context, path: &Path, arguments: &[&OsStr]) -> Result<Identity, Fault> {
    let what = arguments.first().map_or("", |what| what.to_str().unwrap_or_default());
    let program = context.bin_dir.join(programs::REPLICA);
    let unusable = |message: String| Fault::new(Reason::StoreUnusable, path.display(), message);
    let run = Command::new(&program).args(arguments).kill_on_drop(true).output();
    let output = match tokio::time::timeout(OPEN_LIMIT, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            return Err(Fault::new(Reason::Internal, program.display(), format!("can't start {}: {error}", program.display())));
        }
        Err(_) => {
            let limit = OPEN_LIMIT.as_secs();
            return Err(unusable(format!("{} doesn't answer: carrick-replica {what} was given up after {limit} s", path.display())));
        }
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let sentence = said.lines().rev().map(str::trim).find(|line| !line.is_empty());
        let fallback = || format!("carrick-replica {what} {} ended with {}", path.display(), output.status);
        return Err(unusable(sentence.map_or_else(fallback, |line| line.trim_start_matches("Error: ").to_owned())));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| Fault::new(Reason::Internal, program.display(), format!("carrick-replica {what} answered nonsense: {error}")))
}

async fn wait_until_served(context: &Context, record: &StoreRecord) -> Result<(), Fault> {
    let id = ProcessId::Replica(record.id);
    let mut failure = None;
    let served = context.node.wait_until(|observed| {
        let Some(process) = observed.processes.get(&id) else { return false };
        failure = process.last_exit.as_ref().map(ToString::to_string);
        process.answers() || failure.is_some()
    });
    let in_time = tokio::time::timeout(OPEN_LIMIT, served).await.is_ok();
    match failure {
        Some(message) => Err(Fault::new(Reason::StoreUnusable, record.path.display(), message)),
        None if in_time => Ok(()),
        None => {
            let message = format!("carrick-replica doesn't serve {} after {} s", record.path.display(), OPEN_LIMIT.as_secs());
            Err(Fault::new(Reason::StoreUnreachable, record.path.display(), message))
        }
    }
}

async fn wait_gone(context: &Context, store: StoreId) -> Result<(), Fault> {
    let id = ProcessId::Replica(store);
    tokio::time::timeout(STOP_LIMIT, context.node.wait_gone(id))
        .await
        .map_err(|_| Fault::new(Reason::StoreUnreachable, store, format!("the {id} doesn't end")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_found_by_id_its_beginning_and_path() {
        let mut state = State::default();
        for number in [0x11, 0x12] {
            let id = StoreId::from_bytes([0xab, 0xcd, number, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            let path = format!("/srv/{number}").into();
            state.stores.insert(id, StoreRecord::new(id, path, None, false, 0));
        }
        for good in ["/srv/17", "abcd11", "ABCD1100", "abcd1100-0000-0000-0000-000000000000"] {
            assert_eq!(resolve(&state, good).unwrap().path, Path::new("/srv/17"), "{good}");
        }
        assert_eq!(resolve(&state, "abcd").unwrap_err().reason, Reason::InvalidField);
        for bad in ["", "abc", "/srv", "abcd13"] {
            assert_eq!(resolve(&state, bad).unwrap_err().reason, Reason::StoreNotFound, "{bad}");
        }
    }
}
