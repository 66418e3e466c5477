//! What is written: blocks that tell which write they are of.

use carrick_backing_store::{BLOCK_SIZE, BlockIndex, BufferPool, Checksums, Extent, Operation, Seq, VolumeId, block_checksum};

/// Blocks of the write of this number, which is not 0.
pub fn write(volume: VolumeId, number: u64, seq: Option<Seq>, extent: Extent) -> Operation {
    let mut buffer = BufferPool::new(0).take(usize::try_from(extent.length().get()).unwrap());
    let mut checksums = Checksums::new();
    for (block, place) in (extent.first_block().get()..).zip(buffer.chunks_exact_mut(BLOCK_SIZE as usize)) {
        place.fill(u8::try_from((number ^ block) % 251).unwrap());
        place[..8].copy_from_slice(&number.to_le_bytes());
        place[8..16].copy_from_slice(&block.to_le_bytes());
        checksums.push(block_checksum(volume, BlockIndex::new(block), place));
    }
    Operation::Write { seq, extent, checksums, data: buffer.share() }
}

/// Which write a block is of; 0 for zeros.
pub fn number(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

/// Which write an operation is; 0 for zeros.
pub fn number_of(operation: &Operation) -> u64 {
    match operation {
        Operation::Write { data, .. } if !data.is_empty() => number(data),
        _ => 0,
    }
}

/// An operation in a few words.
pub fn describe(operation: &Operation) -> String {
    match operation {
        Operation::Write { seq, extent, .. } => {
            let (number, seq) = (number_of(operation), seq.map_or(0, Seq::get));
            format!("write {number} seq {seq}: {}+{}", extent.first_block(), extent.block_count())
        }
        Operation::WriteZeroes { seq, extent } => {
            format!("zero seq {}: {}+{}", seq.map_or(0, Seq::get), extent.first_block(), extent.block_count())
        }
        Operation::Read { extent, snapshot: None } => format!("read {}+{}", extent.first_block(), extent.block_count()),
        other => format!("{other:?}"),
    }
}
