//! What the block layer is told of a device.

use carrick_backing_store::{BLOCK_SIZE, VolumeSize};
use libublk_rs_sys as sys;

use crate::mapping;

/// Bytes of a sector, the unit of ublk's numbers, whatever the logical block size is.
pub const SECTOR: u64 = 512;

/// Largest read or write. The engine and the wire take no more.
pub const IO_BYTES_MAX: u32 = 1 << 20;

/// Largest discard or write-zeroes. The engine takes no more.
pub const RANGE_BYTES_MAX: u64 = 1 << 30;

const BLOCK_SHIFT: u8 = BLOCK_SIZE.ilog2() as u8;
const RANGE_SECTORS_MAX: u32 = (RANGE_BYTES_MAX / SECTOR) as u32;

/// Logical block sizes that a volume may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogicalBlock {
    /// 512 bytes.
    B512,
    /// 4096 bytes.
    B4096,
}

impl LogicalBlock {
    /// From a number of bytes.
    #[must_use]
    pub const fn new(bytes: u32) -> Option<Self> {
        match bytes {
            512 => Some(Self::B512),
            4096 => Some(Self::B4096),
            _ => None,
        }
    }

    const fn shift(self) -> u8 {
        match self {
            Self::B512 => 9,
            Self::B4096 => 12,
        }
    }
}

/// The parameters of a volume's device.
#[must_use]
pub fn device_params(size: VolumeSize, block: LogicalBlock) -> sys::ublk_params {
    sys::ublk_params {
        len: size_of::<sys::ublk_params>() as u32,
        types: sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD,
        basic: sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA,
            logical_bs_shift: block.shift(),
            physical_bs_shift: BLOCK_SHIFT,
            // Equal on purpose: file systems take a larger optimal size for the stripe width of an array.
            io_min_shift: BLOCK_SHIFT,
            io_opt_shift: BLOCK_SHIFT,
            max_sectors: IO_BYTES_MAX / SECTOR as u32,
            dev_sectors: size.bytes().get() / SECTOR,
            ..Default::default()
        },
        discard: sys::ublk_param_discard {
            discard_granularity: BLOCK_SIZE,
            max_discard_sectors: RANGE_SECTORS_MAX,
            max_write_zeroes_sectors: RANGE_SECTORS_MAX,
            // The driver takes no other number.
            max_discard_segments: 1,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// Why a device that was found can't be this volume's any more.
///
/// # Errors
/// In words.
pub fn check_found(params: &sys::ublk_params, size: VolumeSize, block: LogicalBlock) -> Result<(), String> {
    if params.types & sys::UBLK_PARAM_TYPE_BASIC == 0 {
        return Err("it has no parameters".to_owned());
    }
    if params.basic.logical_bs_shift != block.shift() {
        return Err(format!("its logical block size is not {} bytes", 1_u32 << block.shift()));
    }
    // A smaller device is a volume that grew while no target ran; one that is larger than any volume has a mapping in front of it.
    let bytes = params.basic.dev_sectors.saturating_mul(SECTOR);
    if bytes > size.bytes().get() && !mapping::is_below(params) {
        return Err(format!("it has {bytes} bytes, the volume only {}", size.bytes()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn params_say_what_the_engine_keeps() {
        let size = VolumeSize::new(10 << 30).unwrap();
        for (bytes, shift) in [(512, 9), (4096, 12)] {
            let params = device_params(size, LogicalBlock::new(bytes).unwrap());
            let basic = params.basic;
            assert_eq!((basic.logical_bs_shift, basic.physical_bs_shift, basic.io_min_shift), (shift, 12, 12));
            assert_eq!((basic.dev_sectors, basic.max_sectors), (20 << 20, 2048));
            assert_eq!(basic.attrs, 4 | 8, "volatile cache and FUA: flushes are sent");
            assert_eq!((params.discard.discard_granularity, params.discard.max_discard_sectors), (4096, 2 << 20));
            assert_eq!((params.discard.max_discard_segments, params.discard.max_write_zeroes_sectors), (1, 2 << 20));
        }
        assert_eq!(LogicalBlock::new(1024), None);
    }

    #[test]
    fn a_found_device_may_be_smaller_but_not_larger() {
        let sizes = [1 << 20, 2 << 20].map(|bytes| VolumeSize::new(bytes).unwrap());
        let params = sizes.map(|size| device_params(size, LogicalBlock::B512));
        assert_eq!(check_found(&params[0], sizes[1], LogicalBlock::B512), Ok(()));
        assert!(check_found(&params[1], sizes[0], LogicalBlock::B512).is_err());
        assert!(check_found(&params[0], sizes[0], LogicalBlock::B4096).is_err());
        let mut below = params[0];
        below.basic.dev_sectors = mapping::SECTORS_BELOW;
        assert_eq!(check_found(&below, sizes[0], LogicalBlock::B512), Ok(()));
        assert!(check_found(&sys::ublk_params::default(), sizes[0], LogicalBlock::B512).is_err());
    }
}
