//! The CRC32C of a block, bound to the volume and the block's place, so that a block that is right but in the wrong place
//! (a misdirected write, a mixed-up volume) is found as surely as a flipped bit.

use smallvec::SmallVec;

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
    let mut place = [0; 24];
    place[..16].copy_from_slice(&volume.to_bytes());
    place[16..].copy_from_slice(&block.get().to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&place), data)
}

/// The checksums of `count` blocks of zeros from `first` on.
pub fn zero_block_checksums(volume: VolumeId, first: BlockIndex, count: u64) -> impl Iterator<Item = Checksum> {
    (first.get()..first.get() + count).map(move |block| block_checksum(volume, BlockIndex::new(block), &ZERO_BLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

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
