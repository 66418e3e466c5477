//! A map on a simulated disk, and what it must hold.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use carrick_backing_store::disk::{DiskBlock, SimulatedDisk};
use carrick_backing_store::epoch_map::{CheckOptions, CheckReport, EpochMap, FormatOptions, OpenOptions, check, format};
use carrick_backing_store::{
    BLOCK_SIZE, BlockIndex, BufferPool, ByteLength, Checksums, Completion, Extent, Operation, Outcome, ReadData, ReplicaSpec, ReplicaStore,
    Seq, SnapshotId, StoreError, StoreId, Token, VolumeId, VolumeSize, block_checksum,
};

pub const BLOCK: usize = BLOCK_SIZE as usize;
/// Rounds after which an operation is said never to end.
const PATIENCE: u32 = 10_000;
/// Blocks of one read.
const READ: u64 = 512;

pub type Map = EpochMap<SimulatedDisk>;
pub type Answer = Result<Outcome, StoreError>;
/// What is read: a volume as it is, or a snapshot of it.
pub type Image = (VolumeId, Option<SnapshotId>);

pub fn path() -> &'static Path {
    Path::new("simulated")
}

pub fn volume(number: u8) -> VolumeId {
    VolumeId::from_bytes([number; 16])
}

pub fn snapshot(number: u8) -> SnapshotId {
    SnapshotId::from_bytes([number; 16])
}

pub fn size(blocks: u64) -> VolumeSize {
    VolumeSize::new(blocks * u64::from(BLOCK_SIZE)).unwrap()
}

pub fn extent(first: u64, count: u64) -> Extent {
    Extent::new(BlockIndex::new(first).offset(), ByteLength::new(count * u64::from(BLOCK_SIZE))).unwrap()
}

pub fn disk_blocks(first: u64, count: u64) -> std::ops::Range<DiskBlock> {
    DiskBlock::new(first)..DiskBlock::new(first + count)
}

/// A block of the write of this number; number 0 is a block of zeros.
pub fn fill(number: u64, block: u64, place: &mut [u8]) {
    place.fill(u8::try_from((number ^ block) % 251).unwrap());
    place[..8].copy_from_slice(&number.to_le_bytes());
    place[8..16].copy_from_slice(&block.to_le_bytes());
    if number == 0 {
        place.fill(0);
    }
}

pub fn write(volume: VolumeId, seq: Option<u64>, number: u64, first: u64, count: u64) -> Operation {
    let mut buffer = BufferPool::new(0).take(usize::try_from(count).unwrap() * BLOCK);
    let mut checksums = Checksums::new();
    for (block, place) in (first..).zip(buffer.chunks_exact_mut(BLOCK)) {
        fill(number, block, place);
        checksums.push(block_checksum(volume, BlockIndex::new(block), place));
    }
    Operation::Write { seq: seq.map(Seq::new), extent: extent(first, count), checksums, data: buffer.share() }
}

pub fn read(first: u64, count: u64) -> Operation {
    Operation::Read { extent: extent(first, count), snapshot: None }
}

/// What volumes and snapshots hold: which write each of their blocks is of.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    pub images: BTreeMap<Image, Vec<u64>>,
    /// Writes that may have happened, too.
    pub perhaps: BTreeMap<(VolumeId, u64), Vec<u64>>,
}

impl Picture {
    pub fn put(&mut self, volume: VolumeId, number: u64, first: u64, count: u64) {
        let blocks = self.images.get_mut(&(volume, None)).unwrap();
        blocks[usize::try_from(first).unwrap()..usize::try_from(first + count).unwrap()].fill(number);
    }

    /// These blocks may be of this write, too, as long as nobody says so.
    pub fn put_perhaps(&mut self, volume: VolumeId, number: u64, first: u64, count: u64) {
        (first..first + count).for_each(|block| self.perhaps.entry((volume, block)).or_default().push(number));
    }

    /// Whether this is the answer to a read of these blocks; wrong bytes are a panic, since nothing excuses them.
    pub fn judge(&self, image: Image, first: u64, count: u64, answer: &Answer) -> bool {
        let data = match answer {
            Ok(Outcome::Read(ReadData::Zeroes)) => vec![0; usize::try_from(count).unwrap() * BLOCK],
            Ok(Outcome::Read(ReadData::Blocks { checksums, data })) => {
                for ((block, checksum), bytes) in (first..).zip(checksums).zip(data.chunks_exact(BLOCK)) {
                    assert_eq!(*checksum, block_checksum(image.0, BlockIndex::new(block), bytes), "the checksum of block {block}");
                }
                data.to_vec()
            }
            Ok(other) => panic!("a read was answered with {other:?}"),
            Err(_) => return false,
        };
        assert_eq!(data.len(), usize::try_from(count).unwrap() * BLOCK);
        let numbers = &self.images[&image];
        let mut expected = vec![0; BLOCK];
        for (block, bytes) in (first..).zip(data.chunks_exact(BLOCK)) {
            let number = numbers[usize::try_from(block).unwrap()];
            let others = self.perhaps.get(&(image.0, block)).filter(|_| image.1.is_none()).into_iter().flatten();
            let is_right = std::iter::once(&number).chain(others).any(|number| {
                fill(*number, block, &mut expected);
                bytes == expected
            });
            assert!(is_right, "{image:?}, block {block}: {:?} was read, write {number} was expected", &bytes[..16]);
        }
        true
    }
}

pub struct Rig {
    pub disk: SimulatedDisk,
    pub store: Map,
    pub picture: Picture,
    next: u64,
    completions: Vec<Completion>,
}

pub fn formatted(blocks: u64, seed: u64) -> SimulatedDisk {
    let disk = SimulatedDisk::new(blocks, seed);
    make(&disk);
    disk
}

pub fn make(disk: &SimulatedDisk) {
    format(&mut disk.reopen(), path(), &FormatOptions { id: Some(StoreId::from_bytes([1; 16])) }).unwrap();
}

pub fn checked(disk: &SimulatedDisk) -> Result<CheckReport, StoreError> {
    check(disk.reopen(), path(), &CheckOptions { data: true })
}

impl Rig {
    /// A new store.
    pub fn new(blocks: u64, seed: u64, options: &OpenOptions) -> Self {
        Self::open(formatted(blocks, seed), Picture::default(), options).unwrap()
    }

    pub fn open(disk: SimulatedDisk, picture: Picture, options: &OpenOptions) -> Result<Self, StoreError> {
        let store = EpochMap::open(disk.reopen(), path(), options)?;
        Ok(Self { disk, store, picture, next: 0, completions: Vec::new() })
    }

    /// Opens it again, as it is, after the process or the machine (with a seed) has ended; first it is checked.
    pub fn reopen(self, power: Option<u64>, options: &OpenOptions) -> Self {
        let Self { disk, store, picture, .. } = self;
        disk.heal();
        match power {
            Some(seed) => disk.power_cut(seed),
            None => disk.kill(0),
        }
        drop(store);
        let report = checked(&disk).unwrap();
        assert!(report.is_clean(), "{report:?}");
        Self::open(disk, picture, options).unwrap()
    }

    pub fn submit(&mut self, volume: VolumeId, operation: Operation) -> Token {
        self.next += 1;
        self.store.submit(volume, Token(self.next), operation);
        Token(self.next)
    }

    /// The answer to an operation.
    pub fn answer(&mut self, token: Token) -> Answer {
        for _ in 0..PATIENCE {
            if let Some(index) = self.completions.iter().position(|completion| completion.token == token) {
                return self.completions.swap_remove(index).result;
            }
            self.store.reap(&mut self.completions);
            if self.disk.in_flight() == 0 {
                self.disk.advance(Duration::from_millis(10));
            }
        }
        panic!("{token:?} never ends");
    }

    pub fn ask(&mut self, volume: VolumeId, operation: Operation) -> Answer {
        let token = self.submit(volume, operation);
        self.answer(token)
    }

    /// A write, which is pictured if it succeeds.
    pub fn write(&mut self, volume: VolumeId, number: u64, first: u64, count: u64) -> Result<(), StoreError> {
        self.ask(volume, write(volume, None, number, first, count))?;
        self.picture.put(volume, number, first, count);
        Ok(())
    }

    pub fn zero(&mut self, volume: VolumeId, first: u64, count: u64) -> Result<(), StoreError> {
        self.ask(volume, Operation::WriteZeroes { seq: None, extent: extent(first, count) })?;
        self.picture.put(volume, 0, first, count);
        Ok(())
    }

    pub fn flush(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        self.ask(volume, Operation::Sync).map(drop)
    }

    pub fn create(&mut self, volume: VolumeId, blocks: u64) -> Result<(), StoreError> {
        self.store.create(ReplicaSpec { volume, size: size(blocks) })?;
        self.picture.images.insert((volume, None), vec![0; usize::try_from(blocks).unwrap()]);
        Ok(())
    }

    pub fn snapshot(&mut self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), StoreError> {
        self.ask(volume, Operation::Snapshot { snapshot })?;
        let kept = self.picture.images[&(volume, None)].clone();
        self.picture.images.insert((volume, Some(snapshot)), kept);
        Ok(())
    }

    pub fn delete_snapshot(&mut self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), StoreError> {
        self.ask(volume, Operation::DeleteSnapshot { snapshot })?;
        self.picture.images.remove(&(volume, Some(snapshot)));
        Ok(())
    }

    pub fn clone_of(&mut self, origin: VolumeId, snapshot: SnapshotId, clone: VolumeId) -> Result<(), StoreError> {
        let content = self.picture.images[&(origin, Some(snapshot))].clone();
        self.store.clone_snapshot(origin, snapshot, ReplicaSpec { volume: clone, size: size(content.len() as u64) })?;
        self.picture.images.insert((clone, None), content);
        Ok(())
    }

    pub fn delete(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        self.store.delete(volume)?;
        self.picture.images.retain(|(owner, _), _| *owner != volume);
        Ok(())
    }

    /// Reads everything, in pieces of so many blocks, and says how many reads failed, all of them with a typed error.
    pub fn read_all(&mut self, piece: u64) -> Vec<(Image, u64, StoreError)> {
        let images: Vec<(Image, u64)> = self.picture.images.iter().map(|(image, numbers)| (*image, numbers.len() as u64)).collect();
        let mut failed = Vec::new();
        for (image, blocks) in images {
            let pieces: Vec<(u64, u64)> =
                (0..blocks).step_by(usize::try_from(piece).unwrap()).map(|first| (first, piece.min(blocks - first))).collect();
            let read = |rig: &mut Self, (first, count): (u64, u64)| {
                rig.submit(image.0, Operation::Read { extent: extent(first, count), snapshot: image.1 })
            };
            let tokens: Vec<Token> = pieces.iter().map(|piece| read(self, *piece)).collect();
            for ((first, count), token) in pieces.into_iter().zip(tokens) {
                let answer = self.answer(token);
                self.picture.judge(image, first, count, &answer);
                failed.extend(answer.err().map(|error| (image, first, error)));
            }
        }
        failed
    }

    /// Everything must be there.
    pub fn verify(&mut self) {
        let failed = self.read_all(READ);
        assert!(failed.is_empty(), "{failed:?}");
    }

    /// Lets everything happen that happens by itself.
    pub fn settle(&mut self) {
        for _ in 0..1000 {
            self.store.reap(&mut self.completions);
            if self.disk.alarm().is_none() && self.disk.in_flight() == 0 {
                return;
            }
            self.disk.advance(Duration::from_secs(1));
        }
        panic!("the store never sleeps");
    }

    /// The place of a block of the disk that holds exactly these bytes, in the data area; the only one.
    pub fn place_of(&self, number: u64, block: u64, range: std::ops::Range<u64>) -> u64 {
        let mut expected = [0; BLOCK];
        fill(number, block, &mut expected);
        let found: Vec<u64> = range.filter(|at| *self.disk.content(DiskBlock::new(*at)) == expected).collect();
        assert_eq!(found.len(), 1, "write {number} of block {block} is in {found:?}");
        found[0]
    }
}
