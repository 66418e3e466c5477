//! What the kernel asks, read from its descriptor.

use carrick_backing_store::{ByteLength, ByteOffset, Extent};
use libublk_rs_sys as sys;

use crate::params::{IO_BYTES_MAX, RANGE_BYTES_MAX, SECTOR};

/// A copy of a tag's descriptor, taken once: the original is in memory that the kernel writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Operation in the low 8 bits, flags above.
    pub op_flags: u32,
    /// Length in sectors.
    pub sectors: u32,
    /// Start in sectors.
    pub start: u64,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Give bytes.
    Read,
    /// Take bytes.
    Write {
        /// To stable media.
        fua: bool,
    },
    /// Make bytes zero.
    WriteZeroes {
        /// On stable media.
        fua: bool,
    },
    /// Forget bytes.
    Discard,
    /// Everything to stable media.
    Flush,
}

/// A request of the kernel that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What.
    pub operation: Operation,
    /// Where; empty for a flush.
    pub extent: Extent,
}

impl Asked {
    /// Bytes that go between the kernel and this process.
    #[must_use]
    pub const fn data_bytes(self) -> u32 {
        match self.operation {
            // `decode` has checked that it is at most `IO_BYTES_MAX`.
            Operation::Read | Operation::Write { .. } => self.extent.length().get() as u32,
            Operation::WriteZeroes { .. } | Operation::Discard | Operation::Flush => 0,
        }
    }
}

impl Descriptor {
    /// Reads it.
    ///
    /// # Errors
    /// A negative errno for the kernel. The driver sends nothing of the kind to a device with our parameters.
    pub fn decode(self) -> Result<Asked, i32> {
        let fua = self.op_flags & sys::UBLK_IO_F_FUA != 0;
        let (operation, bytes_max) = match self.op_flags & 0xff {
            sys::UBLK_IO_OP_READ => (Operation::Read, IO_BYTES_MAX.into()),
            sys::UBLK_IO_OP_WRITE => (Operation::Write { fua }, IO_BYTES_MAX.into()),
            sys::UBLK_IO_OP_WRITE_ZEROES => (Operation::WriteZeroes { fua }, RANGE_BYTES_MAX),
            sys::UBLK_IO_OP_DISCARD => (Operation::Discard, RANGE_BYTES_MAX),
            sys::UBLK_IO_OP_FLUSH => {
                let nothing = Extent::new(ByteOffset::ZERO, ByteLength::ZERO).ok_or(-libc::EIO)?;
                return Ok(Asked { operation: Operation::Flush, extent: nothing });
            }
            _ => return Err(-libc::EOPNOTSUPP),
        };
        let length = u64::from(self.sectors) * SECTOR;
        let offset = self.start.checked_mul(SECTOR).ok_or(-libc::EIO)?;
        let extent = Extent::new(ByteOffset::new(offset), ByteLength::new(length)).ok_or(-libc::EIO)?;
        if extent.is_empty() || length > bytes_max {
            return Err(-libc::EIO);
        }
        Ok(Asked { operation, extent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(op_flags: u32, start: u64, sectors: u32) -> Descriptor {
        Descriptor { op_flags, sectors, start }
    }

    fn asked(operation: Operation, offset: u64, length: u64) -> Result<Asked, i32> {
        Ok(Asked { operation, extent: Extent::new(ByteOffset::new(offset), ByteLength::new(length)).unwrap() })
    }

    #[test]
    fn operations_and_flags_are_read_in_sectors() {
        let fua = sys::UBLK_IO_F_FUA;
        for (op_flags, operation, data) in [
            (0, Operation::Read, 4096),
            (1, Operation::Write { fua: false }, 4096),
            (1 | fua | sys::UBLK_IO_F_META, Operation::Write { fua: true }, 4096),
            (3, Operation::Discard, 0),
            (5, Operation::WriteZeroes { fua: false }, 0),
            (5 | fua | sys::UBLK_IO_F_NOUNMAP, Operation::WriteZeroes { fua: true }, 0),
        ] {
            let read = descriptor(op_flags, 3, 8).decode();
            assert_eq!(read, asked(operation, 1536, 4096));
            assert_eq!(read.unwrap().data_bytes(), data);
        }
        assert_eq!(descriptor(2, 77, 0).decode(), asked(Operation::Flush, 0, 0));
        assert_eq!(descriptor(0, 0, 2048).decode().unwrap().data_bytes(), 1 << 20);
        assert_eq!(descriptor(3, 0, 2 << 20).decode(), asked(Operation::Discard, 0, 1 << 30));
    }

    #[test]
    fn what_the_kernel_never_sends_is_an_error_of_that_request() {
        for op in [4, 10, 13, 18, 0xff] {
            assert_eq!(descriptor(op, 0, 8).decode(), Err(-libc::EOPNOTSUPP));
        }
        for (op, start, sectors) in [(0, 0, 0), (1, 0, 2049), (3, 0, (2 << 20) + 1), (0, u64::MAX, 8), (0, u64::MAX / 512, 8)] {
            assert_eq!(descriptor(op, start, sectors).decode(), Err(-libc::EIO));
        }
    }
}
