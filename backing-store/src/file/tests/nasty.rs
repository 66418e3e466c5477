//! A folder in memory that behaves as badly as a real one may: reads and writes are short, cached reads miss, what was not synced
//! is lost sector by sector, a file never synced may be empty, names fall back to an earlier set, a failed sync forgets what it was to
//! write, and at a chosen event everything stops.
//!
//! Not simulated, because no single replica could survive it: synced bytes that change later (the `damage` tests do that), and
//! sectors that are neither the old nor the new.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::super::disk::{Disk, Folder, Space};
use super::super::replica::lock;

/// What happens at the chosen event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing works from here on.
    Down,
    /// This write or sync fails; the rest goes on.
    Error,
}

#[derive(Debug, Default)]
struct NastyFile {
    now: Vec<u8>,
    /// What is on stable media; `None` before the first sync.
    stable: Option<Vec<u8>>,
    /// Writes that are not, oldest first.
    pending: Vec<(usize, Vec<u8>)>,
}

impl NastyFile {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.now[at..at + bytes.len()].copy_from_slice(bytes);
        self.pending.push((at, bytes.to_vec()));
    }

    /// What a loss of power leaves: of each sector any of the states that it had since the last sync.
    fn after_power_loss(&self, sector: usize, dice: &mut Dice) -> Vec<u8> {
        let mut found = match &self.stable {
            Some(stable) => stable.clone(),
            None if dice.below(2) == 0 => return Vec::new(),
            None => vec![0; self.now.len()],
        };
        let mut kept: BTreeMap<usize, usize> = BTreeMap::new();
        for (number, (at, bytes)) in self.pending.iter().enumerate() {
            for place in *at / sector..(*at + bytes.len()).div_ceil(sector) {
                let kept = *kept.entry(place).or_insert_with(|| dice.below(self.pending.len() + 1));
                if number >= kept {
                    continue;
                }
                let (from, to) = ((place * sector).max(*at), ((place + 1) * sector).min(at + bytes.len()));
                found[from..to].copy_from_slice(&bytes[from - at..to - at]);
            }
        }
        found
    }
}

#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % bound
    }
}

#[derive(Debug)]
struct World {
    files: Vec<NastyFile>,
    names: BTreeMap<String, usize>,
    /// The sets of names since the folder was last synced, the stable one first.
    names_before: Vec<BTreeMap<String, usize>>,
    events: u64,
    fault: Option<(u64, Fault)>,
    down: bool,
    calm: bool,
    dice: Dice,
    free: u64,
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(5)
}

impl World {
    /// Counts an event. `Some` if it is the one that goes wrong.
    fn event(&mut self) -> io::Result<Option<Fault>> {
        self.alive()?;
        self.events += 1;
        let fault = self.fault.filter(|(at, _)| *at == self.events).map(|(_, fault)| fault);
        self.down |= fault == Some(Fault::Down);
        Ok(fault)
    }

    fn alive(&self) -> io::Result<()> {
        if self.down { Err(eio()) } else { Ok(()) }
    }

    /// How much of a call of this length is done.
    fn some(&mut self, length: usize) -> usize {
        // Aligned words, and sectors of data, are always whole: processors and page caches see to that.
        let unit = if length < 512 { 8 } else { 512 };
        if self.calm || length < 2 * unit || self.dice.below(6) > 0 { length } else { unit * (1 + self.dice.below(length / unit - 1)) }
    }

    fn write(&mut self, inode: usize, at: u64, bytes: &[u8]) -> io::Result<usize> {
        let at = usize::try_from(at).unwrap();
        let fault = self.event()?;
        // A call that is cut off has done a part: of data whole sectors, as the tests judge sectors.
        let length = match fault {
            None => bytes.len(),
            Some(_) if bytes.len() < 512 => self.dice.below(bytes.len() / 8 + 1) * 8,
            Some(_) => self.dice.below(bytes.len() / 512 + 1) * 512,
        };
        self.files[inode].write(at, &bytes[..length]);
        if fault.is_some() { Err(eio()) } else { Ok(length) }
    }

    fn sync(&mut self, inode: usize) -> io::Result<()> {
        let fault = self.event()?;
        if fault == Some(Fault::Down) {
            return Err(eio());
        }
        let lost = fault.is_some();
        let Self { files, dice, .. } = self;
        let file = &mut files[inode];
        // After a failed sync the pages count as clean, whatever became of them.
        file.stable = Some(if lost { file.after_power_loss(512, dice) } else { file.now.clone() });
        file.pending.clear();
        if lost { Err(eio()) } else { Ok(()) }
    }
}

/// See the module's text. Clones are the same folder.
#[derive(Clone, Debug)]
pub(super) struct NastyFolder {
    world: Arc<Mutex<World>>,
}

impl NastyFolder {
    pub(super) fn new(seed: u64) -> Self {
        let world = World {
            files: Vec::new(),
            names: BTreeMap::new(),
            names_before: vec![BTreeMap::new()],
            events: 0,
            fault: None,
            down: false,
            calm: false,
            dice: Dice(seed | 1),
            free: 1 << 30,
        };
        Self { world: Arc::new(Mutex::new(world)) }
    }

    pub(super) fn events(&self) -> u64 {
        lock(&self.world).events
    }

    pub(super) fn set_free(&self, free: u64) {
        lock(&self.world).free = free;
    }

    /// Lets the `after`-th event from now go wrong.
    pub(super) fn plan(&self, after: u64, fault: Fault) {
        let mut world = lock(&self.world);
        world.fault = Some((world.events + after, fault));
    }

    pub(super) fn is_down(&self) -> bool {
        lock(&self.world).down
    }

    /// The process starts again: what it wrote is there.
    pub(super) fn restart(&self) {
        let mut world = lock(&self.world);
        (world.down, world.fault) = (false, None);
    }

    /// The machine starts again: only what was synced is there for certain.
    pub(super) fn reboot(&self, sector: usize) {
        let mut world = lock(&self.world);
        (world.down, world.fault) = (false, None);
        let World { files, dice, names, names_before, .. } = &mut *world;
        let sets = names_before.len() + 1;
        let chosen = dice.below(sets);
        if chosen < names_before.len() {
            *names = names_before[chosen].clone();
        }
        *names_before = vec![names.clone()];
        for file in files {
            file.now = file.after_power_loss(sector, dice);
            file.stable = Some(file.now.clone());
            file.pending.clear();
        }
    }

    /// The page cache gives up what a failed sync did not write.
    pub(super) fn evict(&self) {
        for file in &mut lock(&self.world).files {
            if let Some(stable) = &file.stable {
                let mut found = stable.clone();
                for (at, bytes) in &file.pending {
                    found[*at..*at + bytes.len()].copy_from_slice(bytes);
                }
                file.now = found;
            }
        }
    }

    /// The bytes of a file.
    pub(super) fn bytes(&self, name: &str) -> Vec<u8> {
        let world = lock(&self.world);
        world.files[world.names[name]].now.clone()
    }

    /// Puts other bytes into a file, as if they had always been there.
    pub(super) fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut world = lock(&self.world);
        let inode = match world.names.get(name) {
            Some(inode) => *inode,
            None => {
                world.files.push(NastyFile::default());
                let inode = world.files.len() - 1;
                world.names.insert(name.to_owned(), inode);
                world.names_before = vec![world.names.clone()];
                inode
            }
        };
        world.files[inode] = NastyFile { now: bytes.clone(), stable: Some(bytes), pending: Vec::new() };
    }

    /// No short calls and no misses from now on.
    pub(super) fn calm(&self) {
        lock(&self.world).calm = true;
    }

    fn change_names(&self, change: impl FnOnce(&mut BTreeMap<String, usize>) -> io::Result<()>) -> io::Result<()> {
        let mut world = lock(&self.world);
        if world.event()?.is_some() {
            return Err(eio());
        }
        let before = world.names.clone();
        change(&mut world.names)?;
        world.names_before.push(before);
        Ok(())
    }
}

#[derive(Debug)]
struct NastyDisk {
    world: Arc<Mutex<World>>,
    inode: usize,
}

impl Disk for NastyDisk {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let mut world = lock(&self.world);
        world.alive()?;
        let at = usize::try_from(at).unwrap();
        let wanted = world.some(buffer.len());
        let bytes = world.files[self.inode].now.get(at..).unwrap_or_default();
        let length = wanted.min(bytes.len());
        buffer[..length].copy_from_slice(&bytes[..length]);
        Ok(length)
    }

    fn read_cached(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let miss = {
            let mut world = lock(&self.world);
            !world.calm && world.dice.below(2) == 0
        };
        if miss { Err(io::ErrorKind::WouldBlock.into()) } else { self.read_at(buffer, at) }
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let mut world = lock(&self.world);
        let length = world.some(bytes.len());
        world.write(self.inode, at, &bytes[..length])
    }

    fn write_durably(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let mut world = lock(&self.world);
        let length = world.write(self.inode, at, bytes)?;
        let start = usize::try_from(at).unwrap();
        let file = &mut world.files[self.inode];
        if let Some(stable) = &mut file.stable {
            stable[start..start + length].copy_from_slice(bytes);
        }
        file.pending.retain(|(place, _)| *place != start);
        Ok(length)
    }

    fn sync(&self) -> io::Result<()> {
        lock(&self.world).sync(self.inode)
    }

    fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        let mut world = lock(&self.world);
        if world.dice.below(3) == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        world.write(self.inode, at, &vec![0; usize::try_from(length).unwrap()]).map(drop)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        let world = lock(&self.world);
        world.alive()?;
        let pages = world.files[self.inode].now.chunks(4096).enumerate();
        let mut places = pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0)).map(|(index, _)| index as u64 * 4096);
        Ok(places.find(|place| place + 4096 > at).map(|place| place.max(at)))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(lock(&self.world).files[self.inode].now.len() as u64)
    }
}

impl Folder for NastyFolder {
    fn open(&self, name: &str) -> io::Result<Box<dyn Disk>> {
        let world = lock(&self.world);
        world.alive()?;
        let inode = *world.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(NastyDisk { world: Arc::clone(&self.world), inode }))
    }

    fn create(&self, name: &str, length: u64) -> io::Result<Box<dyn Disk>> {
        self.change_names(|names| if names.contains_key(name) { Err(io::ErrorKind::AlreadyExists.into()) } else { Ok(()) })?;
        let mut world = lock(&self.world);
        if length > world.free {
            return Err(io::ErrorKind::StorageFull.into());
        }
        world.files.push(NastyFile { now: vec![0; usize::try_from(length).unwrap()], ..NastyFile::default() });
        let inode = world.files.len() - 1;
        world.names.insert(name.to_owned(), inode);
        Ok(Box::new(NastyDisk { world: Arc::clone(&self.world), inode }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change_names(|names| {
            let inode = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            names.insert(to.to_owned(), inode);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change_names(|names| names.remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into()))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let world = lock(&self.world);
        world.alive()?;
        Ok(world.names.keys().cloned().collect())
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = lock(&self.world);
        if world.event()?.is_some() {
            return Err(eio());
        }
        world.names_before = vec![world.names.clone()];
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        Ok(Space { capacity: 1 << 30, free: lock(&self.world).free })
    }

    fn path(&self) -> &Path {
        Path::new("nasty")
    }
}
