//! What the journal remembers: one record per change, and nothing that could not be said again.

use super::codec::{FormatError, Reader, Writer, count};
use crate::checksum::{Checksum, Checksums};
use crate::disk::DiskBlock;
use crate::store::{Content, ReplicaState, Synced};
use crate::units::{BlockIndex, Epoch, Seq, SnapshotId, Term, VolumeId, VolumeSize};

/// Number of a replica within a store, never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// Blocks that lie side by side on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The first.
    pub place: DiskBlock,
    /// How many.
    pub count: u32,
}

/// One change of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Blocks were written to fresh places.
    Write {
        /// Whose.
        slot: Slot,
        /// Which write it is, or is a part of; zero for a copied block.
        seq: Seq,
        /// The first block.
        block: BlockIndex,
        /// Where they are, in order.
        runs: Vec<Run>,
        /// One per block.
        checksums: Checksums,
    },
    /// Blocks are overwritten where they are; the data is in the batch, and is copied there later.
    Overwrite {
        /// Whose.
        slot: Slot,
        /// As in `Write`.
        seq: Seq,
        /// The first block.
        block: BlockIndex,
        /// One per block; the blocks' data are the next of the batch's payload.
        checksums: Checksums,
    },
    /// Blocks became zeros.
    Zeroes {
        /// Whose.
        slot: Slot,
        /// As in `Write`.
        seq: Seq,
        /// The first block.
        block: BlockIndex,
        /// How many.
        count: u64,
    },
    /// A replica's durable state was replaced.
    State {
        /// Whose.
        slot: Slot,
        /// By this.
        state: ReplicaState,
        /// And its position, unless that stays.
        position: Option<Seq>,
    },
    /// A replica was made.
    Create {
        /// Its number.
        slot: Slot,
        /// Whose it is.
        volume: VolumeId,
        /// Its size.
        size: VolumeSize,
        /// What it is a clone of.
        origin: Option<(Slot, SnapshotId)>,
    },
    /// A replica was given up.
    Delete {
        /// Whose.
        slot: Slot,
    },
    /// The epoch was raised.
    RaiseEpoch {
        /// Whose.
        slot: Slot,
        /// To this.
        epoch: Epoch,
        /// And with it [`Synced::epoch`]. The first stores of this format didn't say.
        synced: Option<Epoch>,
    },
    /// A snapshot was made, and the epoch raised to the one after its own.
    Snapshot {
        /// Whose.
        slot: Slot,
        /// Its identity.
        snapshot: SnapshotId,
        /// The epoch that it ended.
        epoch: Epoch,
    },
    /// A snapshot was given up.
    DeleteSnapshot {
        /// Whose.
        slot: Slot,
        /// Which.
        snapshot: SnapshotId,
    },
    /// The content went back to the newest snapshot's.
    Revert {
        /// Whose.
        slot: Slot,
        /// Which.
        snapshot: SnapshotId,
        /// The epoch from then on.
        epoch: Epoch,
    },
    /// The replica grew.
    Expand {
        /// Whose.
        slot: Slot,
        /// To this.
        size: VolumeSize,
    },
}

/// Bit of the content's byte: what a copy may leave out is said, too. Stores made before [`super::superblock::SYNCED_EPOCHS`] don't.
const SYNCED_FOLLOWS: u8 = 0x10;

/// A state that nothing could have made is damage that slipped through the checksum, or a mistake.
pub(super) fn write_state(writer: &mut Writer, state: &ReplicaState) {
    writer.u64(state.promised.get());
    writer.u64(state.log_term.get());
    let content = match state.content {
        Content::Complete => 0,
        Content::Mixed => 1,
        Content::Rebuilding => 2,
    };
    writer.u8(content | SYNCED_FOLLOWS);
    writer.u32(state.synced.epoch.get());
    writer.u40(state.synced.copied.get());
    writer.u32(state.synced.copied_epoch.get());
}

pub(super) fn read_state(reader: &mut Reader<'_>) -> Result<ReplicaState, FormatError> {
    let (promised, log_term, content) = (Term::new(reader.u64()?), Term::new(reader.u64()?), reader.u8()?);
    let mut synced = Synced::default();
    if content & SYNCED_FOLLOWS != 0 {
        synced =
            Synced { epoch: Epoch::new(reader.u32()?), copied: BlockIndex::new(reader.u40()?), copied_epoch: Epoch::new(reader.u32()?) };
    }
    let content = match content & !SYNCED_FOLLOWS {
        0 => Content::Complete,
        1 => Content::Mixed,
        2 => Content::Rebuilding,
        _ => return Err(FormatError::Field("content")),
    };
    Ok(ReplicaState { promised, log_term, content, synced })
}

pub(super) fn read_size(reader: &mut Reader<'_>) -> Result<VolumeSize, FormatError> {
    VolumeSize::new(reader.u64()?).map_err(|_| FormatError::Field("size"))
}

/// A sequence, or none: zero is none, and no write has it.
fn write_option_seq(writer: &mut Writer, seq: Option<Seq>) {
    writer.u8(u8::from(seq.is_some()));
    writer.u64(seq.map_or(0, Seq::get));
}

fn read_option_seq(reader: &mut Reader<'_>) -> Result<Option<Seq>, FormatError> {
    let (is_some, seq) = (reader.u8()?, Seq::new(reader.u64()?));
    match is_some {
        0 => Ok(None),
        1 => Ok(Some(seq)),
        _ => Err(FormatError::Field("position")),
    }
}

impl Record {
    /// Whose change it is.
    #[must_use]
    pub const fn slot(&self) -> Slot {
        match self {
            Self::Write { slot, .. }
            | Self::Overwrite { slot, .. }
            | Self::Zeroes { slot, .. }
            | Self::State { slot, .. }
            | Self::Create { slot, .. }
            | Self::Delete { slot }
            | Self::RaiseEpoch { slot, .. }
            | Self::Snapshot { slot, .. }
            | Self::DeleteSnapshot { slot, .. }
            | Self::Revert { slot, .. }
            | Self::Expand { slot, .. } => *slot,
        }
    }

    /// How many blocks of the batch's payload are its data.
    #[must_use]
    pub fn payload_blocks(&self) -> usize {
        if let Self::Overwrite { checksums, .. } = self { checksums.len() } else { 0 }
    }

    pub(super) fn encode(&self, writer: &mut Writer) {
        writer.u8(match self {
            Self::Write { .. } => 1,
            Self::Overwrite { .. } => 2,
            Self::Zeroes { .. } => 3,
            Self::State { .. } => 4,
            Self::Create { .. } => 5,
            Self::Delete { .. } => 6,
            Self::RaiseEpoch { synced: None, .. } => 7,
            Self::RaiseEpoch { synced: Some(_), .. } => 12,
            Self::Snapshot { .. } => 8,
            Self::DeleteSnapshot { .. } => 9,
            Self::Revert { .. } => 10,
            Self::Expand { .. } => 11,
        });
        writer.u32(self.slot().0);
        match self {
            Self::Write { seq, block, runs, checksums, .. } => {
                writer.u64(seq.get());
                writer.u40(block.get());
                writer.u32(u32::try_from(runs.len()).unwrap_or(u32::MAX));
                for run in runs {
                    writer.u40(run.place.get());
                    writer.u32(run.count);
                }
                write_checksums(writer, checksums);
            }
            Self::Overwrite { seq, block, checksums, .. } => {
                writer.u64(seq.get());
                writer.u40(block.get());
                write_checksums(writer, checksums);
            }
            Self::Zeroes { seq, block, count, .. } => {
                writer.u64(seq.get());
                writer.u40(block.get());
                writer.u64(*count);
            }
            Self::State { state, position, .. } => {
                write_state(writer, state);
                write_option_seq(writer, *position);
            }
            Self::Create { volume, size, origin, .. } => {
                writer.bytes(&volume.to_bytes());
                writer.u64(size.bytes().get());
                writer.u8(u8::from(origin.is_some()));
                if let Some((slot, snapshot)) = origin {
                    writer.u32(slot.0);
                    writer.bytes(&snapshot.to_bytes());
                }
            }
            Self::Delete { .. } => {}
            Self::RaiseEpoch { epoch, synced, .. } => {
                writer.u32(epoch.get());
                if let Some(synced) = synced {
                    writer.u32(synced.get());
                }
            }
            Self::Snapshot { snapshot, epoch, .. } | Self::Revert { snapshot, epoch, .. } => {
                writer.bytes(&snapshot.to_bytes());
                writer.u32(epoch.get());
            }
            Self::DeleteSnapshot { snapshot, .. } => writer.bytes(&snapshot.to_bytes()),
            Self::Expand { size, .. } => writer.u64(size.bytes().get()),
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let kind = reader.u8()?;
        let slot = Slot(reader.u32()?);
        Ok(match kind {
            1 => {
                let (seq, block) = (Seq::new(reader.u64()?), BlockIndex::new(reader.u40()?));
                let length = reader.u32()?;
                let mut runs = Vec::with_capacity(count(reader, length, 9)?);
                for _ in 0..length {
                    runs.push(Run { place: DiskBlock::new(reader.u40()?), count: reader.u32()? });
                }
                let checksums = read_checksums(reader)?;
                if runs.iter().map(|run| u64::from(run.count)).sum::<u64>() != checksums.len() as u64 {
                    return Err(FormatError::Field("runs"));
                }
                Self::Write { slot, seq, block, runs, checksums }
            }
            2 => {
                let (seq, block) = (Seq::new(reader.u64()?), BlockIndex::new(reader.u40()?));
                Self::Overwrite { slot, seq, block, checksums: read_checksums(reader)? }
            }
            3 => {
                let (seq, block) = (Seq::new(reader.u64()?), BlockIndex::new(reader.u40()?));
                Self::Zeroes { slot, seq, block, count: reader.u64()? }
            }
            4 => Self::State { slot, state: read_state(reader)?, position: read_option_seq(reader)? },
            5 => {
                let (volume, size) = (VolumeId::from_bytes(reader.array()?), read_size(reader)?);
                let origin = match reader.u8()? {
                    0 => None,
                    1 => Some((Slot(reader.u32()?), SnapshotId::from_bytes(reader.array()?))),
                    _ => return Err(FormatError::Field("origin")),
                };
                Self::Create { slot, volume, size, origin }
            }
            6 => Self::Delete { slot },
            7 => Self::RaiseEpoch { slot, epoch: Epoch::new(reader.u32()?), synced: None },
            8 => Self::Snapshot { slot, snapshot: SnapshotId::from_bytes(reader.array()?), epoch: Epoch::new(reader.u32()?) },
            9 => Self::DeleteSnapshot { slot, snapshot: SnapshotId::from_bytes(reader.array()?) },
            10 => Self::Revert { slot, snapshot: SnapshotId::from_bytes(reader.array()?), epoch: Epoch::new(reader.u32()?) },
            11 => Self::Expand { slot, size: read_size(reader)? },
            12 => Self::RaiseEpoch { slot, epoch: Epoch::new(reader.u32()?), synced: Some(Epoch::new(reader.u32()?)) },
            _ => return Err(FormatError::Field("record kind")),
        })
    }
}

fn write_checksums(writer: &mut Writer, checksums: &[Checksum]) {
    writer.u32(u32::try_from(checksums.len()).unwrap_or(u32::MAX));
    for checksum in checksums {
        writer.u32(*checksum);
    }
}

fn read_checksums(reader: &mut Reader<'_>) -> Result<Checksums, FormatError> {
    let length = reader.u32()?;
    let length = count(reader, length, 4)?;
    (0..length).map(|_| reader.u32()).collect()
}
