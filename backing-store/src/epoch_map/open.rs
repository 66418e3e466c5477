//! Making a store, and opening one: the newest superblock, its catalog and bits; `replay` does the journal from there.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::allocator::Allocator;
use super::background::Background;
use super::cache::PageCache;
use super::catalog::{Catalog, Limits, Owners};
use super::codec::FormatError;
use super::commit::Journal;
use super::copying::Copying;
use super::journal::BatchNumber;
use super::numbers::{NumberMap, NumberSet};
use super::page::{Node, PageIdentity, PagePointer};
use super::preparing::Below;
use super::reading::Reading;
use super::replay::Unsaid;
use super::replica::Replica;
use super::space::Space;
use super::superblock::{COPIES, FORMAT, Geometry, JournalHead, READ_ONLY_COMPATIBLE, SYNCED_EPOCHS, Superblock, SuperblockError};
use super::tree::Missing;
use super::{Counters, EpochMap};
use crate::buffer::{Buffer, BufferPool};
use crate::disk::{Disk, DiskBlock, DiskDone, DiskRequest, DiskWork, IoId};
use crate::store::{OpenedReplica, ReplicaStore, SnapshotInfo, StoreError, StoreUsage};
use crate::units::{BLOCK_SIZE, ByteLength, Epoch, StoreId};

const BLOCK: usize = BLOCK_SIZE as usize;
/// One write of a format: 1 MiB.
const ZEROES: usize = 1 << 20;
/// Pages of bits read at once.
const WINDOW: usize = 64;
/// Map pages in memory unless told otherwise: 64 MiB.
const CACHE: ByteLength = ByteLength::new(64 << 20);

/// How often [`look`] reads a store anew that changes while it is read.
const LOOKS: u32 = 5;

/// How to make a store.
#[derive(Clone, Copy, Debug, Default)]
pub struct FormatOptions {
    /// Its identity; a random one if none is given.
    pub id: Option<StoreId>,
}

/// How to open a store.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Memory for map pages, in bytes.
    pub cache: ByteLength,
    /// Volumes may be larger than what is free: then a write may find no space. Otherwise what a volume was made with is kept for
    /// it.
    pub overcommit: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { cache: CACHE, overcommit: false }
    }
}

/// What is in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Its identity.
    pub id: StoreId,
    /// Where everything lies.
    pub geometry: Geometry,
    /// How full it is.
    pub usage: StoreUsage,
    /// Its replicas, with their snapshots, oldest first. Positions are what a start after a crash would find at worst.
    pub replicas: Vec<(OpenedReplica, Vec<SnapshotInfo>)>,
}

/// Synchronous use of a disk on which nothing else is going on.
pub(super) struct Direct<'a, D: Disk> {
    pub(super) disk: &'a mut D,
    pub(super) pool: &'a BufferPool,
    pub(super) next: &'a mut u64,
}

impl<D: Disk> Direct<'_, D> {
    /// Does all of this, in any order, and gives the results in the order asked.
    fn run(&mut self, work: Vec<DiskWork>) -> Vec<io::Result<Option<Buffer>>> {
        let first = *self.next + 1;
        *self.next += work.len() as u64;
        let mut results: Vec<Option<io::Result<Option<Buffer>>>> = Vec::new();
        results.resize_with(work.len(), || None);
        for (id, work) in (first..).zip(work) {
            self.disk.submit(DiskRequest { id: IoId(id), work });
        }
        let mut done = Vec::new();
        while results.iter().any(Option::is_none) {
            self.disk.reap(&mut done);
            if done.is_empty()
                && let Err(error) = self.disk.wait()
            {
                let failed = |result: Option<_>| result.unwrap_or_else(|| Err(io::Error::from(error.kind())));
                return results.into_iter().map(failed).collect();
            }
            for DiskDone { id, result } in done.drain(..) {
                let index = id.0.checked_sub(first).and_then(|index| usize::try_from(index).ok());
                if let Some(place) = index.and_then(|index| results.get_mut(index)) {
                    *place = Some(result);
                }
            }
        }
        results.into_iter().flatten().collect()
    }

    pub(super) fn one(&mut self, work: DiskWork) -> io::Result<Option<Buffer>> {
        self.run(vec![work]).pop().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))
    }

    pub(super) fn read(&mut self, at: DiskBlock, blocks: usize) -> io::Result<Buffer> {
        let buffer = self.pool.take(blocks * BLOCK);
        self.one(DiskWork::Read { at, buffer })?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Single blocks, many at once.
    pub(super) fn read_pages(&mut self, places: &[DiskBlock]) -> Vec<io::Result<Buffer>> {
        let work = places.iter().map(|at| DiskWork::Read { at: *at, buffer: self.pool.take(BLOCK) }).collect();
        let pages = self.run(work).into_iter();
        pages.map(|page| page.and_then(|page| page.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()))).collect()
    }

    fn write(&mut self, at: DiskBlock, bytes: &[u8]) -> io::Result<()> {
        let mut buffer = self.pool.take(bytes.len().next_multiple_of(BLOCK));
        buffer[..bytes.len()].copy_from_slice(bytes);
        buffer[bytes.len()..].fill(0);
        self.one(DiskWork::Write { at, pieces: vec![buffer.share()] }).map(drop)
    }
}

/// Reads what is in a store. Of one that is being served it is what was there a moment ago.
///
/// # Errors
/// As [`EpochMap::open`]; what `open_disk` says. A store that is served under heavy load may look damaged five times in a row.
pub fn look<D: Disk>(mut open_disk: impl FnMut() -> Result<D, StoreError>, path: &Path) -> Result<Contents, StoreError> {
    let mut tried = 0;
    loop {
        tried += 1;
        match EpochMap::read_all(open_disk()?, path, &OpenOptions::default()) {
            Ok((store, _)) => return store.contents(),
            // A checkpoint may have come, and what the one before it named may be something else by now.
            Err(StoreError::Damaged { .. }) if tried < LOOKS => {}
            Err(error) => return Err(error),
        }
    }
}

/// Makes an empty store on a disk, durably. What was on it is gone.
///
/// # Errors
/// [`StoreError::StoreSize`] if the disk is too small or too large; I/O.
pub fn format<D: Disk>(disk: &mut D, path: &Path, options: &FormatOptions) -> Result<StoreId, StoreError> {
    let failed = |source| StoreError::Io { action: "format", path: path.to_owned(), source };
    let blocks = disk.blocks();
    let given = ByteLength::new(blocks.saturating_mul(u64::from(BLOCK_SIZE)));
    let geometry =
        Geometry::new(blocks).ok_or(StoreError::StoreSize { path: path.to_owned(), given, reason: "a store has 8 MiB to 4 PiB".into() })?;
    let pool = BufferPool::new(0);
    let mut direct = Direct { disk, pool: &pool, next: &mut 0 };
    let head = geometry.data_start().get();
    direct.one(DiskWork::Prepare { at: DiskBlock::new(0), count: head }).map_err(failed)?;
    let mut zeroes = pool.take(ZEROES);
    zeroes.fill(0);
    let zeroes = zeroes.share();
    // Written, not only prepared: overwriting what was written costs the file system nothing.
    let piece = |at: u64| zeroes.slice(0..ZEROES.min(usize::try_from(head - at).unwrap_or(ZEROES) * BLOCK));
    let starts: Vec<u64> = (0..head).step_by(ZEROES / BLOCK).collect();
    for starts in starts.chunks(8) {
        let work = starts.iter().map(|at| DiskWork::Write { at: DiskBlock::new(*at), pieces: vec![piece(*at)] }).collect();
        direct.run(work).into_iter().try_for_each(|result| result.map(drop)).map_err(failed)?;
    }
    let directory = Allocator::new(&geometry).directory().to_vec();
    let catalog = Catalog { next_slot: 1, prepared: 0, replicas: [].into(), dead: Vec::new(), bad: BTreeSet::new(), directory };
    let bytes = catalog.encode(|_| PagePointer { place: DiskBlock::new(0), checksum: 0, epoch: Epoch::NEVER });
    let superblock = Superblock {
        id: options.id.unwrap_or_else(StoreId::random),
        compatible: 0,
        read_only_compatible: 0,
        incompatible: SYNCED_EPOCHS,
        geometry,
        checkpoint: 1,
        catalog_length: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
        catalog_checksum: crc32c::crc32c(&bytes),
        incarnation: 0,
        journal: JournalHead { batch: BatchNumber(1), offset: 0, chain: 0 },
    };
    for copy in 0..2 {
        direct.write(geometry.catalog_at(1, copy), &bytes).map_err(failed)?;
    }
    direct.one(DiskWork::Sync).map_err(failed)?;
    for copy in COPIES {
        direct.write(copy, &superblock.encode()).map_err(failed)?;
    }
    direct.one(DiskWork::Sync).map_err(failed)?;
    Ok(superblock.id)
}

/// Makes a page out of what was read.
pub(super) fn decode_page(
    missing: &Missing,
    owners: &Owners,
    geometry: &Geometry,
    result: io::Result<Option<Buffer>>,
) -> Result<Arc<Node>, String> {
    let place = missing.pointer.place;
    let page = result.map_err(|error| format!("the map page in block {place} can't be read: {error}"))?;
    let page = page.ok_or_else(|| format!("the map page in block {place} can't be read"))?;
    let identity = PageIdentity { volume: owners.of(missing.pointer.epoch), level: missing.level, index: missing.index };
    let node = Node::decode(&page, &missing.pointer, identity, geometry);
    node.map(Arc::new).map_err(|error| format!("the map page in block {place} is damaged: {error}"))
}

impl<D: Disk> EpochMap<D> {
    /// Opens the store on a disk, replays its journal, and makes what it found durable.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`], [`StoreError::UnknownFormat`], [`StoreError::UnknownFeatures`], [`StoreError::Damaged`]; I/O.
    pub fn open(disk: D, path: &Path, options: &OpenOptions) -> Result<Self, StoreError> {
        let (mut store, unsaid) = Self::read_all(disk, path, options)?;
        let unknown = store.superblock.read_only_compatible & !READ_ONLY_COMPATIBLE;
        if unknown != 0 {
            return Err(StoreError::UnknownFeatures { path: path.to_owned(), features: unknown });
        }
        store.suspect_holes();
        store.write_again(&unsaid)?;
        let found = store.superblock;
        store.superblock.incarnation += 1;
        // A store of before knows it from now on.
        store.superblock.incompatible |= SYNCED_EPOCHS;
        store.write_incarnation(&found).map_err(|source| StoreError::Io { action: "write", path: path.to_owned(), source })?;
        Ok(store)
    }

    /// Makes what was found durable, and says that from here on another incarnation writes. It must be one that never wrote
    /// anything: what is left on the disk of batches that were not found would else continue the chain, if those before it are
    /// written again with the same content.
    ///
    /// The copy that was found comes last: a crash may have left the other one torn, and another crash, now, may tear the one that is
    /// written first. From here on both are whole and alike whenever a checkpoint begins to write them.
    fn write_incarnation(&mut self, found: &Superblock) -> io::Result<()> {
        let superblock = self.superblock.encode();
        let mut direct = self.direct();
        let [first, second] = COPIES;
        let is_first_found = read_superblock_copy(&mut direct, first).is_ok_and(|copy| copy == *found);
        direct.one(DiskWork::Sync)?;
        for copy in if is_first_found { [second, first] } else { [first, second] } {
            direct.write(copy, &superblock)?;
            direct.one(DiskWork::Sync)?;
        }
        Ok(())
    }

    /// Reads everything, and writes nothing.
    pub(super) fn read_all(disk: D, path: &Path, options: &OpenOptions) -> Result<(Self, Unsaid), StoreError> {
        let mut store = Self::read_checkpoint(disk, path, options)?;
        let unsaid = store.replay()?;
        if store.contradicted {
            return Err(store.damaged("the journal contradicts the map or the catalog"));
        }
        for replica in store.replicas.values_mut() {
            replica.acknowledged = replica.record.position;
            replica.durable = replica.record.position;
        }
        store.count_space();
        store.background.wake();
        Ok((store, unsaid))
    }

    /// What the last checkpoint says.
    pub(super) fn read_checkpoint(mut disk: D, path: &Path, options: &OpenOptions) -> Result<Self, StoreError> {
        let pool = BufferPool::new(super::POOL_KEEP);
        let mut next_io = 0;
        let mut direct = Direct { disk: &mut disk, pool: &pool, next: &mut next_io };
        let superblock = read_superblock(&mut direct, path)?;
        let catalog = read_catalog(&mut direct, path, &superblock)?;
        let mut allocator = Allocator::new(&superblock.geometry);
        read_bits(&mut direct, path, &mut allocator, &catalog)?;
        allocator.set_prepared(catalog.prepared);
        if !allocator.is_prepared() {
            let reason = "the catalog: blocks are in use where the disk is not prepared".into();
            return Err(StoreError::Damaged { path: path.to_owned(), reason });
        }
        let replicas = catalog.replicas.into_iter().map(|(slot, record)| (slot, Replica::new(record)));
        let mut store = Self {
            path: path.to_owned(),
            pool,
            superblock,
            replicas: replicas.collect(),
            by_volume: HashMap::new(),
            next_slot: catalog.next_slot,
            next_op: 0,
            next_io,
            in_flight: NumberMap::default(),
            cache: PageCache::new(usize::try_from(options.cache.get()).unwrap_or(usize::MAX)),
            waiters: NumberMap::default(),
            allocator,
            space: Space::new(superblock.geometry.data_blocks, options.overcommit),
            below: Below::default(),
            journal: Journal::new(superblock.geometry.journal_blocks, superblock.journal, 0, superblock.journal.batch.previous()),
            copying: Copying::default(),
            reading: Reading::default(),
            checkpoint: None,
            checkpoint_wanted: false,
            background: Background::default(),
            dead: catalog.dead,
            bad: catalog.bad,
            limits: Limits::new(&superblock.geometry),
            suspect: NumberSet::default(),
            ahead: None,
            dirty: 0,
            ready: VecDeque::new(),
            completions: Vec::new(),
            contradicted: false,
            poisoned: None,
            active_at: Duration::ZERO,
            idle_at: Duration::ZERO,
            counters: Counters::default(),
            disk,
        };
        let kept = store.replicas.values().filter(|replica| !replica.record.deleting);
        store.by_volume = kept.map(|replica| (replica.record.volume, replica.record.slot)).collect();
        store.count_space();
        Ok(store)
    }

    fn contents(&self) -> Result<Contents, StoreError> {
        let opened = self.replicas().into_iter();
        let replicas = opened.map(|replica| Ok((replica, self.snapshots(replica.spec.volume)?)));
        Ok(Contents {
            id: self.id(),
            geometry: self.superblock.geometry,
            usage: self.usage()?,
            replicas: replicas.collect::<Result<_, StoreError>>()?,
        })
    }

    pub(super) fn damaged(&self, reason: impl std::fmt::Display) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), reason: reason.to_string() }
    }

    pub(super) fn direct(&mut self) -> Direct<'_, D> {
        Direct { disk: &mut self.disk, pool: &self.pool, next: &mut self.next_io }
    }

    /// Ends the store: everything is on stable media, and a checkpoint makes the next start quick.
    ///
    /// # Errors
    /// What a sync or a write said; the journal has everything that was synced before.
    pub fn close(mut self) -> Result<(), StoreError> {
        self.wait_for(|store| store.replicas.values().all(Replica::is_idle) && store.journal.is_idle())?;
        let clean = self.dirty == 0 && self.copying.is_empty() && self.journal.used() == 0;
        if clean { Ok(()) } else { self.checkpoint_now() }
    }
}

pub(super) fn read_superblock_copy<D: Disk>(direct: &mut Direct<'_, D>, at: DiskBlock) -> Result<Superblock, SuperblockError> {
    match direct.read(at, 1) {
        Ok(page) => Superblock::decode(&page),
        Err(error) => {
            tracing::warn!(block = at.get(), %error, "a superblock can't be read");
            Err(SuperblockError::Damaged(FormatError::Checksum))
        }
    }
}

/// The newest superblock that is whole.
pub(super) fn read_superblock<D: Disk>(direct: &mut Direct<'_, D>, path: &Path) -> Result<Superblock, StoreError> {
    let mut newest: Option<Superblock> = None;
    let mut failures = Vec::new();
    for copy in COPIES {
        let age = |superblock: &Superblock| (superblock.checkpoint, superblock.incarnation);
        match read_superblock_copy(direct, copy) {
            Ok(superblock) if newest.is_none_or(|newest| age(&newest) < age(&superblock)) => newest = Some(superblock),
            Ok(_) => {}
            Err(error) => failures.push(error),
        }
    }
    if let Some(superblock) = newest {
        if !failures.is_empty() {
            tracing::warn!(store = %superblock.id, path = %path.display(), "one of two superblocks is damaged; the next checkpoint writes both");
        }
        if superblock.geometry.blocks > direct.disk.blocks() {
            let reason = format!("it has {} blocks, the disk only {}", superblock.geometry.blocks, direct.disk.blocks());
            return Err(StoreError::Damaged { path: path.to_owned(), reason });
        }
        return Ok(superblock);
    }
    let path = path.to_owned();
    let worst = failures.into_iter().find(|error| *error != SuperblockError::Damaged(FormatError::Magic));
    Err(match worst {
        Some(SuperblockError::Version(found)) => StoreError::UnknownFormat { path, found, known: FORMAT },
        Some(SuperblockError::Features(features)) => StoreError::UnknownFeatures { path, features },
        Some(SuperblockError::Damaged(error)) => StoreError::Damaged { path, reason: format!("both superblocks: {error}") },
        None => StoreError::NotAStore { path, reason: "there is no Carrick superblock on it".into() },
    })
}

fn read_catalog<D: Disk>(direct: &mut Direct<'_, D>, path: &Path, superblock: &Superblock) -> Result<Catalog, StoreError> {
    let damaged = |reason: String| StoreError::Damaged { path: path.to_owned(), reason };
    let mut failure = String::new();
    for copy in 0..2 {
        let at = superblock.geometry.catalog_at(superblock.checkpoint & 1, copy);
        match read_catalog_copy(direct, at, superblock.catalog_length as usize) {
            Ok(bytes) if crc32c::crc32c(&bytes) == superblock.catalog_checksum => {
                return Catalog::decode(&bytes, &superblock.geometry).map_err(|error| damaged(format!("the catalog: {error}")));
            }
            Ok(_) => failure = FormatError::Checksum.to_string(),
            Err(error) => failure = error.to_string(),
        }
        tracing::warn!(store = %superblock.id, path = %path.display(), copy, failure, "a copy of the catalog is damaged");
    }
    Err(damaged(format!("both copies of the catalog: {failure}")))
}

pub(super) fn read_catalog_copy<D: Disk>(direct: &mut Direct<'_, D>, mut at: DiskBlock, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(length.next_multiple_of(BLOCK));
    while bytes.len() < length {
        let blocks = (length - bytes.len()).div_ceil(BLOCK).min(ZEROES / BLOCK);
        bytes.extend_from_slice(&direct.read(at, blocks)?);
        at = at.plus(blocks as u64);
    }
    bytes.truncate(length);
    Ok(bytes)
}

fn read_bits<D: Disk>(direct: &mut Direct<'_, D>, path: &Path, allocator: &mut Allocator, catalog: &Catalog) -> Result<(), StoreError> {
    let damaged =
        |what: &str, error: &dyn std::fmt::Display| StoreError::Damaged { path: path.to_owned(), reason: format!("{what}: {error}") };
    allocator.set_directory(&catalog.directory).map_err(|error| damaged("the catalog", &error))?;
    for (number, pointer) in catalog.directory.iter().enumerate() {
        let Some(place) = pointer.place else { continue };
        let page = direct.read(place, 1).map_err(|error| damaged("a page of the directory", &error))?;
        let groups = allocator.decode_directory(number, &page).map_err(|error| damaged("a page of the directory", &error))?;
        for groups in groups.chunks(WINDOW) {
            let places: Vec<DiskBlock> = groups.iter().map(|(_, place)| *place).collect();
            for ((group, _), page) in groups.iter().zip(direct.read_pages(&places)) {
                let page = page.map_err(|error| damaged("a page of bits", &error))?;
                allocator.decode_group(*group, &page).map_err(|error| damaged("a page of bits", &error))?;
            }
        }
    }
    Ok(())
}
