//! `carrick-replica show`: what is in a store, read beside whoever serves it.
//!
//! Without the lock a page may be read while it is being written: then its checksum fails and the other copy counts, as after
//! a crash. Positions are in the memory of the process that serves; its status tells them.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use carrick_backing_store::VolumeId;
use carrick_backing_store::file::format::{Header, Layout, PAGE, StateSlot, Superblock};
use serde_json::{Value, json};

const SUPERBLOCK: &str = "carrick-store";
const REPLICAS: &str = "replicas";

pub(crate) fn show(path: &Path) -> anyhow::Result<()> {
    let superblock = superblock(path)?;
    let folder = path.join(REPLICAS);
    let mut volumes: Vec<VolumeId> = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| format!("can't list {}", folder.display()))? {
        let name = entry.with_context(|| format!("can't list {}", folder.display()))?.file_name();
        // Anything else is being made, or is no replica.
        volumes.extend(name.to_str().and_then(|name| name.parse::<VolumeId>().ok().filter(|volume| volume.to_string() == name)));
    }
    volumes.sort_unstable();
    let replicas: Vec<Value> = volumes
        .into_iter()
        .map(|volume| replica(&folder, volume).unwrap_or_else(|error| json!({ "volume": volume, "error": format!("{error:#}") })))
        .collect();
    super::print_json(&json!({ "store": superblock.id, "path": path, "replicas": replicas }))
}

fn superblock(path: &Path) -> anyhow::Result<Superblock> {
    let place = path.join(SUPERBLOCK);
    let file = match File::open(&place) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("{} is not a Carrick store: there is no file {SUPERBLOCK} in it", path.display());
        }
        Err(error) => return Err(error).with_context(|| format!("can't open {}", place.display())),
    };
    let copy = |number: u64| Ok::<_, anyhow::Error>(Superblock::decode(&page(&file, number * PAGE as u64)?)?);
    copy(0).or_else(|first| copy(1).map_err(|_| first)).with_context(|| format!("{} is damaged or no Carrick store", place.display()))
}

fn replica(folder: &Path, volume: VolumeId) -> anyhow::Result<Value> {
    let file = File::open(folder.join(volume.to_string()))?;
    let header = Header::decode(&page(&file, 0)?)?;
    if header.volume != volume {
        bail!("the file is of volume {}", header.volume);
    }
    let slots = Layout::SLOTS_AT.map(|at| page(&file, at).and_then(|bytes| Ok(StateSlot::decode(&bytes, volume)?)));
    let slot = slots.into_iter().flatten().max_by_key(|slot| slot.generation).ok_or_else(|| anyhow!("both state slots are damaged"))?;
    Ok(json!({
        "volume": volume,
        "size": header.size,
        "state": slot.state,
        "durable": slot.durable,
        "clean": slot.clean,
    }))
}

fn page(file: &File, at: u64) -> anyhow::Result<[u8; PAGE]> {
    let mut bytes = [0; PAGE];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}
