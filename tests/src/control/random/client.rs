//! A client: looks how one of its volumes stands, and does something with it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use carrick_backing_store::dice::Dice;

use super::request::Request;
use super::slot::{Contents, Seen, Slot, Volume};
use super::stage::{ATTACH, Answer, CANCEL, CREATE, DELETE, DETACH, EXPAND, FORCE, REPLACE, SET, Stage, VERIFY};
use crate::history::Region;

const MIB: u64 = 1 << 20;
/// A new volume has so many MiB at most.
const NEW_MAX: u64 = 16;
/// None becomes larger than so many MiB: all of them fit into the stores.
const GROWN_MAX: u64 = 32;
/// Limits that delay a little, and let everything end.
const IOPS: u64 = 2000;
const REBUILD_RATE: u64 = 50 << 20;
/// Requests to a device before it is let go: others want to detach it.
const REQUESTS_MAX: u64 = 48;

/// See the module.
pub struct Client {
    pub stage: Arc<Stage>,
    pub who: String,
    /// Which slots are its own, or shared with others.
    pub slots: Vec<usize>,
    pub dice: Dice,
}

impl Client {
    /// Works until it is told to stop, or something is wrong.
    pub fn run(mut self) -> anyhow::Result<()> {
        let stage = Arc::clone(&self.stage);
        while !stage.is_stopped() {
            let index = self.slots[self.dice.index(self.slots.len())];
            let slot = &stage.slots[index];
            self.step(slot).with_context(|| format!("volume {}", slot.name))?;
        }
        Ok(())
    }

    fn step(&mut self, slot: &Slot) -> anyhow::Result<()> {
        match slot.look(&self.stage, &self.who)? {
            Seen::Away => self.stage.wait_for_daemon(),
            Seen::Absent => self.create(slot),
            Seen::There(volume) if !volume.is_ready => Ok(()),
            Seen::There(volume) if volume.is_attached() => self.with_attached(slot, &volume),
            Seen::There(volume) => self.with_detached(slot, &volume),
        }
    }

    fn with_detached(&mut self, slot: &Slot, volume: &Volume) -> anyhow::Result<()> {
        match self.dice.below(20) {
            0..=9 => self.attach(slot, volume),
            10..=12 => self.expand(slot, volume),
            13..=15 => self.delete(slot, volume),
            16 => self.detach(slot),
            17 => self.set(slot),
            18 => self.verify(slot, volume),
            _ => self.replace(slot, volume),
        }
    }

    fn with_attached(&mut self, slot: &Slot, volume: &Volume) -> anyhow::Result<()> {
        match self.dice.below(20) {
            0..=7 => self.use_device(slot, volume),
            8..=9 => self.expand(slot, volume),
            10..=12 => self.detach(slot),
            13 => self.force(slot),
            14 => self.delete(slot, volume),
            15 => self.set(slot),
            16..=17 => self.verify(slot, volume),
            18 => self.attach(slot, volume),
            _ => self.replace(slot, volume),
        }
    }

    fn create(&mut self, slot: &Slot) -> anyhow::Result<()> {
        let bytes = (1 + self.dice.below(NEW_MAX)) * MIB;
        let replicas = [1, 2, 3, 3, 3][self.dice.index(5)];
        let block_size = if self.dice.coin() { 512 } else { 4096 };
        self.stage.call(&self.who, &CREATE, slot, &Request::Create { bytes, replicas, block_size }, &[]).map(drop)
    }

    fn attach(&mut self, slot: &Slot, volume: &Volume) -> anyhow::Result<()> {
        let queue_depth = if self.dice.once_in(8) { 16 } else { 128 };
        let also: &[&str] = if volume.attachment.is_some() { &["ATTACHED_DIFFERENTLY"] } else { &[] };
        self.stage.call(&self.who, &ATTACH, slot, &Request::Attach { queue_depth, mapped: slot.is_mapped() }, also).map(drop)
    }

    fn detach(&self, slot: &Slot) -> anyhow::Result<()> {
        slot.detaches.during(|| self.stage.call(&self.who, &DETACH, slot, &Request::Detach { force: false }, &[])).map(drop)
    }

    fn force(&self, slot: &Slot) -> anyhow::Result<()> {
        let call = || self.stage.call(&self.who, &FORCE, slot, &Request::Detach { force: true }, &[]);
        slot.detaches.during(|| slot.forced.during(call)).map(drop)
    }

    fn delete(&self, slot: &Slot, volume: &Volume) -> anyhow::Result<()> {
        let also: &[&str] = if volume.attachment.is_some() { &["VOLUME_ATTACHED"] } else { &[] };
        let detaches = slot.detaches.begun();
        let answer = slot.deletes.during(|| self.stage.call(&self.who, &DELETE, slot, &Request::Delete, also))?;
        let was_used = volume.is_attached() && slot.detaches.begun() == detaches && !slot.is_shared;
        ensure!(!was_used || !matches!(answer, Answer::Done(_)), "deleted while it was attached");
        Ok(())
    }

    fn expand(&mut self, slot: &Slot, volume: &Volume) -> anyhow::Result<()> {
        let bytes = (volume.size / MIB + 1 + self.dice.below(4)).min(GROWN_MAX) * MIB;
        let wait = self.dice.once_in(4);
        let answer = self.stage.call(&self.who, &EXPAND, slot, &Request::Expand { bytes, wait }, &[])?;
        let Answer::Done(value) = answer else { return Ok(()) };
        let operation = &value["operation"];
        if wait {
            ensure!(operation.is_null() || operation["state"] == "succeeded", "the command returned before its operation: {value}");
            if operation["volume_id"] == volume.id.as_str() {
                slot.grown(&volume.id, bytes);
            }
        } else if let Some(operation) = operation["id"].as_str().filter(|_| self.dice.once_in(4)) {
            self.stage.call(&self.who, &CANCEL, slot, &Request::Cancel { operation: operation.into() }, &[])?;
        }
        Ok(())
    }

    fn set(&mut self, slot: &Slot) -> anyhow::Result<()> {
        let request = match self.dice.below(4) {
            0 => Request::Iops(IOPS),
            1 => Request::Iops(0),
            2 => Request::RebuildRate(REBUILD_RATE),
            _ => Request::RebuildRate(0),
        };
        self.stage.call(&self.who, &SET, slot, &request, &[]).map(drop)
    }

    fn verify(&mut self, slot: &Slot, volume: &Volume) -> anyhow::Result<()> {
        let single = volume.shown["replicas"].as_array().is_some_and(|replicas| replicas.len() == 1);
        // One that was being detached may be so by now.
        let also: &[&str] = match (volume.is_attached(), single || slot.is_shared) {
            (true, true) => &["NOTHING_TO_VERIFY"],
            (true, false) => &[],
            (false, true) => &["VOLUME_NOT_ATTACHED", "NOTHING_TO_VERIFY"],
            (false, false) => &["VOLUME_NOT_ATTACHED"],
        };
        let wait = self.dice.coin();
        match self.stage.call(&self.who, &VERIFY, slot, &Request::Verify { wait }, also)? {
            Answer::Done(shown) if wait => same(&shown),
            _ => Ok(()),
        }
    }

    fn replace(&mut self, slot: &Slot, volume: &Volume) -> anyhow::Result<()> {
        let replicas = volume.shown["replicas"].as_array().context("no replicas")?;
        // Only one that doesn't count can be replaced.
        let lost = replicas.iter().find(|replica| replica["counts"] == false);
        let store = lost.unwrap_or(&replicas[self.dice.index(replicas.len())])["store"].as_str().context("a replica without store")?;
        self.stage.call(&self.who, &REPLACE, slot, &Request::Replace { store: store.into() }, &["INVALID_FIELD"]).map(drop)
    }

    /// Reads and writes, if nobody else does.
    fn use_device(&mut self, slot: &Slot, volume: &Volume) -> anyhow::Result<()> {
        let Ok(mut contents) = slot.contents.try_lock() else { return Ok(()) };
        let (Some(forced), Some(detaches)) = (slot.forced.quiet(), slot.detaches.quiet()) else { return Ok(()) };
        let Some(device) = &volume.device else { return Ok(()) };
        let file = open(device);
        // From here on it can only be detached by force: if it is still this volume's device.
        let Seen::There(now) = slot.look(&self.stage, &self.who)? else { return Ok(()) };
        if !now.is_attached() || now.id != volume.id || now.device != volume.device || slot.detaches.begun() != detaches {
            return Ok(());
        }
        let file = match file {
            Ok(file) => file,
            // It had another name a moment ago. Now it has this one, unless somebody detaches it.
            Err(_) => return open(device).map(drop).or_else(|error| if slot.detaches.begun() > detaches { Ok(()) } else { Err(error) }),
        };
        let requests = 1 + self.dice.below(REQUESTS_MAX);
        let contents = of(&mut contents, &now, self.dice.number())?;
        let done = exercise(contents, device, &file, detaches, requests);
        self.stage.count("requests to devices", requests);
        match done {
            Err(error) if slot.forced.begun() > forced => {
                self.stage.count("cut off by a forced detachment", 1);
                self.note(slot, &format!("cut off: {error:#}"))
            }
            done => done.with_context(|| format!("{} on {device}", self.who)),
        }
    }

    fn note(&self, slot: &Slot, what: &str) -> anyhow::Result<()> {
        self.stage.note(format!("{} {}: {what}", self.who, slot.name));
        Ok(())
    }
}

/// What a volume must hold; a new one holds zeros.
pub fn of<'a>(contents: &'a mut Option<Contents>, volume: &Volume, seed: u64) -> anyhow::Result<&'a mut Contents> {
    if contents.as_ref().is_none_or(|contents| contents.id != volume.id) {
        let align = volume.shown["block_size"].as_u64().context("a volume without block size")?;
        *contents = Some(Contents { id: volume.id.clone(), region: Region::new(0, 0, align, seed)?, read: None });
    }
    contents.as_mut().context("just made")
}

/// Reads all of it if it was detached since that was last done; then makes some requests.
pub fn exercise(contents: &mut Contents, device: &str, file: &File, detaches: u64, requests: u64) -> anyhow::Result<()> {
    let name = Path::new(device).file_name().context("a device without name")?;
    let sectors: u64 = fs::read_to_string(Path::new("/sys/block").join(name).join("size"))?.trim().parse()?;
    ensure!(sectors * 512 >= contents.region.length(), "{device} has {sectors} sectors, had {} bytes", contents.region.length());
    contents.region.grow(sectors * 512)?;
    if contents.read != Some(detaches) {
        contents.region.check_all(file)?;
        contents.read = Some(detaches);
    }
    (0..requests).try_for_each(|_| contents.region.request(file))
}

pub fn open(device: &str) -> anyhow::Result<File> {
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
    OpenOptions::new().read(true).write(true).custom_flags(direct).open(device).with_context(|| format!("opening {device}"))
}

/// What a comparison found: nothing.
pub fn same(shown: &serde_json::Value) -> anyhow::Result<()> {
    let found = &shown["attachment"]["verification"];
    let nothing = found["repaired_blocks"] == 0 && found["unsettled_blocks"] == 0 && found["running"] == false;
    ensure!(nothing, "replicas that are in sync differ: {found}");
    Ok(())
}
