//! Data between the kernel's requests and this process, by `pread` and `pwrite` on the character device (USER_COPY).
//!
//! The calls are synchronous: they copy memory and never wait, and through the ring they would go to a worker thread.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;

use libublk_rs_sys as sys;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Where a tag's data begins in the character device. There is one queue, number 0.
fn position(tag: u16) -> u64 {
    u64::from(sys::UBLKSRV_IO_BUF_OFFSET) + (u64::from(tag) << sys::UBLK_IO_BUF_BITS)
}

/// Copies the data of a write request.
///
/// # Errors
/// The kernel's; `UnexpectedEof` if the request has less.
pub fn from_request(device: &File, tag: u16, mut bytes: &mut [u8]) -> io::Result<()> {
    let mut at = position(tag);
    while !bytes.is_empty() {
        let copied = rustix::io::retry_on_intr(|| rustix::io::pread(device.as_fd(), &mut *bytes, at))?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at += copied as u64;
        bytes = &mut bytes[copied..];
    }
    Ok(())
}

/// Copies bytes into a read request.
///
/// # Errors
/// The kernel's; `WriteZero` if the request takes less.
pub fn to_request(device: &File, tag: u16, mut bytes: &[u8]) -> io::Result<()> {
    let mut at = position(tag);
    while !bytes.is_empty() {
        let copied = rustix::io::retry_on_intr(|| rustix::io::pwrite(device.as_fd(), bytes, at))?;
        if copied == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        at += copied as u64;
        bytes = &bytes[copied..];
    }
    Ok(())
}

/// Fills a read request of `length` bytes with zeros.
///
/// # Errors
/// As of [`to_request`].
pub fn zeroes_to_request(device: &File, tag: u16, length: usize) -> io::Result<()> {
    /// One call suffices for the largest request.
    const SLICES: usize = crate::params::IO_BYTES_MAX as usize / ZEROES.len();

    let (mut at, end) = (position(tag), position(tag) + length as u64);
    while at < end {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut left = usize::try_from(end - at).unwrap_or(usize::MAX);
        let mut used = 0;
        while left > 0 && used < SLICES {
            let part = left.min(ZEROES.len());
            slices[used] = IoSlice::new(&ZEROES[..part]);
            left -= part;
            used += 1;
        }
        let copied = rustix::io::retry_on_intr(|| rustix::io::pwritev(device.as_fd(), &slices[..used], at))?;
        if copied == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        at += copied as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn data_is_at_the_tags_place() {
        // A sparse file stands for the character device: the positions are the same.
        let file = tempfile::tempfile().unwrap();
        for tag in [0, 1, 511] {
            let at = 0x8000_0000 + (u64::from(tag) << 25);
            assert_eq!(position(tag), at);
            to_request(&file, tag, b"into the request").unwrap();
            let mut seen = [0; 16];
            file.read_exact_at(&mut seen, at).unwrap();
            assert_eq!(&seen, b"into the request");
            let mut back = [0; 16];
            from_request(&file, tag, &mut back).unwrap();
            assert_eq!(back, seen);
        }
        assert!(from_request(&file, 511, &mut [0; 17]).is_err(), "shorter than asked for");
    }

    #[test]
    fn zeroes_reach_exactly_as_far_as_the_request() {
        let file = tempfile::tempfile().unwrap();
        for length in [512, 65_536, 66_048, 1 << 20] {
            file.write_all_at(&vec![7; (1 << 20) + 1], position(1)).unwrap();
            zeroes_to_request(&file, 1, length).unwrap();
            let mut seen = vec![1; (1 << 20) + 1];
            file.read_exact_at(&mut seen, position(1)).unwrap();
            assert!(seen[..length].iter().all(|byte| *byte == 0));
            assert!(seen[length..].iter().all(|byte| *byte == 7));
        }
    }
}
