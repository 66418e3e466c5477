//! How a device is recognised as a volume's after a crash, even if `/run` is gone.
//!
//! The kernel keeps the 64 bits of `ublksrv_flags` for the life of a device and never reads them.

use carrick_backing_store::VolumeId;

/// Odd multipliers with well-mixed bits (from the SplitMix64 generator).
const MIX: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

/// The mark of a volume's devices. It must never change: a device that an older version made is recognised by it.
#[must_use]
pub fn device_mark(volume: VolumeId) -> u64 {
    let id = u128::from_be_bytes(volume.to_bytes());
    let (high, low) = ((id >> 64) as u64, id as u64);
    // Programs made with libublk keep small numbers or nothing in the field, so that 0 must not be a mark.
    mix(mix(high) ^ low).max(1)
}

const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(MIX[0]);
    let value = (value ^ (value >> 27)).wrapping_mul(MIX[1]);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_pinned() {
        // Seen on devices of released versions: a change here orphans them.
        let volume: VolumeId = "0f8fad5b-d9cb-469f-a165-70867728950e".parse().unwrap();
        assert_eq!(device_mark(volume), 17_600_049_678_613_293_682);
        assert_eq!(device_mark(VolumeId::from_bytes([0; 16])), 1);
    }

    #[test]
    fn each_bit_of_the_id_changes_the_mark() {
        let bytes = *b"sixteen bytes ok";
        let mark = device_mark(VolumeId::from_bytes(bytes));
        for bit in 0..128 {
            let mut other = bytes;
            other[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(device_mark(VolumeId::from_bytes(other)), mark, "bit {bit}");
        }
    }
}
