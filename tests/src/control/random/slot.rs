//! The name of a volume that comes and goes, and what must be true of it, whoever else works on it: a volume that was there is there
//! until somebody deletes it, one that was attached until somebody detaches it, and it never becomes smaller.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::request::Request;
use super::stage::{Answer, SHOW, Stage, locked};
use crate::history::Region;

/// A kind of attempts: how many have begun, and how many of them are over.
#[derive(Default)]
pub struct Attempts {
    begun: AtomicU64,
    over: AtomicU64,
}

impl Attempts {
    pub fn during<T>(&self, attempt: impl FnOnce() -> T) -> T {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let result = attempt();
        self.over.fetch_add(1, Ordering::SeqCst);
        result
    }

    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    /// How many have begun, if none is under way.
    pub fn quiet(&self) -> Option<u64> {
        let over = self.over.load(Ordering::SeqCst);
        (over == self.begun()).then_some(over)
    }
}

/// See the module.
pub struct Slot {
    pub name: String,
    /// Whether several clients use it.
    pub is_shared: bool,
    pub deletes: Attempts,
    pub detaches: Attempts,
    pub forced: Attempts,
    known: Mutex<Option<Known>>,
    /// Held by whoever reads and writes.
    pub contents: Mutex<Option<Contents>>,
}

/// What was seen while nobody deleted it.
#[derive(Clone)]
struct Known {
    id: String,
    size: u64,
    /// Deletions that had begun then.
    deletes: u64,
    /// Detachments that had begun when it was seen attached.
    attached: Option<u64>,
}

/// What a volume must hold.
pub struct Contents {
    pub id: String,
    pub region: Region,
    /// Detachments that had begun when all of it was read.
    pub read: Option<u64>,
}

/// How it stands.
pub enum Seen {
    /// `carrickd` doesn't answer.
    Away,
    Absent,
    There(Volume),
}

/// A volume that is there.
#[derive(Clone)]
pub struct Volume {
    pub id: String,
    pub size: u64,
    /// It is not being created.
    pub is_ready: bool,
    /// `attaching`, `attached`, `detaching`.
    pub attachment: Option<String>,
    pub device: Option<String>,
    pub shown: Value,
}

impl Volume {
    pub fn is_attached(&self) -> bool {
        self.attachment.as_deref() == Some("attached")
    }

    fn new(shown: Value) -> anyhow::Result<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let attachment = &shown["attachment"];
        Ok(Self {
            id: text(&shown["id"]).context("a volume without id")?,
            size: shown["size_bytes"].as_u64().context("a volume without size")?,
            is_ready: shown["state"] == "ready",
            attachment: text(&attachment["state"]),
            device: text(&attachment["device"]),
            shown,
        })
    }
}

impl Slot {
    /// Whether its devices are mapped ones: some are.
    pub fn is_mapped(&self) -> bool {
        self.name.bytes().map(u64::from).sum::<u64>().is_multiple_of(3)
    }

    pub fn new(name: String, is_shared: bool) -> Self {
        Self {
            name,
            is_shared,
            deletes: Attempts::default(),
            detaches: Attempts::default(),
            forced: Attempts::default(),
            known: Mutex::default(),
            contents: Mutex::default(),
        }
    }

    /// Looks how it stands, and whether that can be.
    pub fn look(&self, stage: &Stage, who: &str) -> anyhow::Result<Seen> {
        // All of this was true before the answer was made.
        let before = locked(&self.known).clone();
        let (deletes, detaches) = (self.deletes.quiet(), self.detaches.quiet());
        let volume = match stage.call(who, &SHOW, self, &Request::Show, &["VOLUME_NOT_FOUND"])? {
            Answer::Away => return Ok(Seen::Away),
            Answer::Refused(_) => None,
            Answer::Done(shown) => Some(Volume::new(shown)?),
        };
        if let Some(before) = before {
            self.compare(&before, volume.as_ref())?;
        }
        let Some(volume) = volume else { return Ok(Seen::Absent) };
        let mut known = locked(&self.known);
        if let Some(deletes) = deletes.filter(|deletes| volume.is_ready && *deletes == self.deletes.begun()) {
            let attached = detaches.filter(|detaches| volume.is_attached() && *detaches == self.detaches.begun());
            let size = known.as_ref().filter(|known| known.id == volume.id).map_or(0, |known| known.size).max(volume.size);
            *known = Some(Known { id: volume.id.clone(), size, deletes, attached });
        }
        Ok(Seen::There(volume))
    }

    fn compare(&self, before: &Known, now: Option<&Volume>) -> anyhow::Result<()> {
        let name = &self.name;
        let Some(volume) = now.filter(|volume| volume.id == before.id) else {
            let other = now.map_or("nothing", |volume| volume.id.as_str());
            ensure!(self.deletes.begun() > before.deletes, "volume {name} is gone, and nobody deleted it: {} then, now {other}", before.id);
            return Ok(());
        };
        ensure!(volume.size >= before.size, "volume {name} had {} bytes, now {}", before.size, volume.size);
        if let Some(attached) = before.attached {
            let stays = volume.is_attached() || self.detaches.begun() > attached;
            ensure!(stays, "volume {name} was attached, nobody detached it, and it is {}", volume.shown);
        }
        Ok(())
    }

    /// It was made larger.
    pub fn grown(&self, id: &str, size: u64) {
        if let Some(known) = locked(&self.known).as_mut().filter(|known| known.id == id) {
            known.size = known.size.max(size);
        }
    }
}
