//! The CRC32C of a block, bound to the volume and the block's place, so that a block that is right but in the wrong place
//! (a misdirected write, a mixed-up volume) is found as surely as a flipped bit.

use smallvec::SmallVec;

use crate::dice::Dice;
use crate::units::{BLOCK_SIZE, BlockIndex, VolumeId};

/// CRC32C over {volume id, block index as u64 little-endian, the block's 4096 bytes}.
pub type Checksum = u32;

/// Those of blocks side by side. Up to 32 KiB, what most requests have, nothing is allocated for them.
pub type Checksums = SmallVec<[Checksum; 8]>;

static ZERO_BLOCK: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];

/// The checksum of one block.
///
/// # Panics
/// If `data` is not exactly one block: a caller's mistake.
#[must_use]
pub fn block_checksum(volume: VolumeId, block: BlockIndex, data: &[u8]) -> Checksum {
    assert_eq!(data.len(), BLOCK_SIZE as usize, "a block checksum covers exactly one block");
    crc32c::crc32c_append(place_checksum(volume, block), data)
}

fn place_checksum(volume: VolumeId, block: BlockIndex) -> u32 {
    let mut place = [0; 24];
    place[..16].copy_from_slice(&volume.to_bytes());
    place[16..].copy_from_slice(&block.get().to_le_bytes());
    crc32c::crc32c(&place)
}

/// The checksum that a block has in `volume`, from the one that it has as a block of `owner`, of which `volume` is a clone.
pub(crate) fn checksum_for(volume: VolumeId, owner: VolumeId, block: BlockIndex, checksum: Checksum) -> Checksum {
    if owner == volume {
        return checksum;
    }
    // A CRC is linear: what the place adds to it is the same whatever follows.
    let places = place_checksum(volume, block) ^ place_checksum(owner, block);
    crc32c::crc32c_combine(places, checksum, BLOCK_SIZE as usize)
}

/// What the blocks of a range hold, in one number: the same for all replicas that hold the same, however they keep holes and zeros.
/// That two which differ have the same is as likely as that a damaged block has the right checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(u64);

impl Digest {
    /// From a number.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// As a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Adds a block with this checksum, in any order. One of zeros adds nothing.
    pub fn add(&mut self, volume: VolumeId, block: BlockIndex, checksum: Checksum) {
        if checksum != block_checksum(volume, block, &ZERO_BLOCK) {
            let place = Dice::new(block.get()).number();
            self.0 = self.0.wrapping_add(Dice::new(place ^ u64::from(checksum)).number());
        }
    }
}

/// The checksums of `count` blocks of zeros from `first` on.
pub fn zero_block_checksums(volume: VolumeId, first: BlockIndex, count: u64) -> impl Iterator<Item = Checksum> {
    (first.get()..first.get() + count).map(move |block| block_checksum(volume, BlockIndex::new(block), &ZERO_BLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_of_places_and_contents_whatever_the_order_and_the_owner() {
        let (volume, owner) = (VolumeId::from_bytes([1; 16]), VolumeId::from_bytes([2; 16]));
        let block = BlockIndex::new;
        let sum = |of: VolumeId, index: u64, byte: u8| block_checksum(of, block(index), &[byte; 4096]);
        let digest = |blocks: &[(u64, u8)]| {
            let mut digest = Digest::default();
            blocks.iter().for_each(|(index, byte)| digest.add(volume, block(*index), sum(volume, *index, *byte)));
            digest
        };
        assert_eq!(digest(&[(3, 7), (4, 8), (5, 0)]), digest(&[(4, 8), (3, 7)]), "zeros are as good as a hole");
        assert_eq!(digest(&[(9, 0)]), Digest::default());
        assert_ne!(digest(&[(3, 7), (4, 8)]), digest(&[(3, 8), (4, 7)]));
        assert_ne!(digest(&[(3, 7)]), digest(&[(3, 6)]));
        assert_eq!(checksum_for(volume, owner, block(3), sum(owner, 3, 7)), sum(volume, 3, 7));
        assert_eq!(checksum_for(volume, volume, block(3), sum(volume, 3, 7)), sum(volume, 3, 7));
        // It goes over the wire: this value may never change.
        assert_eq!(digest(&[(3, 7), (1 << 30, 200)]).get(), 209_148_051_193_535_177);
    }

    #[test]
    fn place_and_content_both_count() {
        let (volume, other) = (VolumeId::from_bytes([1; 16]), VolumeId::from_bytes([2; 16]));
        let block = [7; 4096];
        let sum = block_checksum(volume, BlockIndex::new(3), &block);
        assert_ne!(sum, block_checksum(other, BlockIndex::new(3), &block));
        assert_ne!(sum, block_checksum(volume, BlockIndex::new(4), &block));
        let mut flipped = block;
        flipped[4095] ^= 1;
        assert_ne!(sum, block_checksum(volume, BlockIndex::new(3), &flipped));
        // The formula is part of the wire and of the disk format: this value may never change.
        assert_eq!(sum, 0x5e3e_0223);
    }
}
