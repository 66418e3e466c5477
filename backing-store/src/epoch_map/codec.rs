//! Little-endian numbers into bytes and back. Nothing is believed: reading past the end is an error, never a panic.

/// Why bytes of the disk can't be what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not the structure that belongs there.
    #[error("its magic number is wrong")]
    Magic,
    /// A checksum fails.
    #[error("its checksum is wrong")]
    Checksum,
    /// The structure ends too early.
    #[error("it ends in the middle of {0}")]
    Truncated(&'static str),
    /// A field has a value that nothing writes.
    #[error("its field {0} has an impossible value")]
    Field(&'static str),
    /// It belongs somewhere else.
    #[error("it belongs to another place, volume or store")]
    Misplaced,
}

/// Appends numbers to bytes.
#[derive(Debug, Default)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// The lower 40 bits: places and block indices of up to 4 PiB.
    pub(super) fn u40(&mut self, value: u64) {
        debug_assert!(value < 1 << 40, "{value} has more than 40 bits");
        self.bytes.extend_from_slice(&value.to_le_bytes()[..5]);
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, value: &[u8]) {
        self.bytes.extend_from_slice(value);
    }
}

/// Takes numbers from the front of bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`, which are `what`.
    pub(super) const fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(FormatError::Truncated(self.what))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        self.bytes(N)?.try_into().map_err(|_| FormatError::Truncated(self.what))
    }

    pub(super) fn u8(&mut self) -> Result<u8, FormatError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u40(&mut self) -> Result<u64, FormatError> {
        let [a, b, c, d, e] = self.array()?;
        Ok(u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]))
    }

    pub(super) fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }
}

/// The number of things that follow, which can't be more than would fit: so no allocation follows a damaged number.
pub(super) fn count(reader: &Reader<'_>, count: u32, least_bytes_each: usize) -> Result<usize, FormatError> {
    let count = count as usize;
    if count.saturating_mul(least_bytes_each) > reader.rest.len() {
        return Err(FormatError::Truncated(reader.what));
    }
    Ok(count)
}
