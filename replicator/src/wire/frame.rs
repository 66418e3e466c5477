//! A frame: header and body, to and from bytes.

use carrick_backing_store::{BLOCK_SIZE, BlockIndex, BufferPool, Checksum, Checksums, Extent, SharedBuffer, VolumeId, block_checksum};

use super::header::{BodyShape, HEADER_LENGTH, Header, Kind, read_u32};
use super::message::{self, ChangedAnswer, ErrorBody, Hello, HelloAnswer, LogAnswer, StatusAnswer};
use super::{ErrorCode, WireError};

/// What follows a header.
#[derive(Clone, Debug)]
pub enum Body {
    /// Nothing.
    Empty,
    /// Blocks, each with its checksum.
    Data {
        /// One per block.
        checksums: Checksums,
        /// The blocks.
        data: SharedBuffer,
    },
    /// Of [`Kind::Hello`].
    Hello(Hello),
    /// Of [`Kind::HelloAnswer`].
    HelloAnswer(HelloAnswer),
    /// Of [`Kind::StatusAnswer`] and [`Kind::PromiseAnswer`].
    Status(StatusAnswer),
    /// Of [`Kind::LogAnswer`].
    Log(LogAnswer),
    /// Of [`Kind::ChangedAnswer`].
    Changed(ChangedAnswer),
    /// Of [`Kind::Error`].
    Error(ErrorBody),
}

/// One message of the data protocol.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its fixed part. `length` is set by [`Frame::new`] and [`Frame::data`] from the body.
    pub header: Header,
    /// The rest.
    pub body: Body,
}

impl Frame {
    /// A frame without data. For kinds with a message body, the header's length is set from it.
    #[must_use]
    pub fn new(mut header: Header, body: Body) -> Self {
        if let BodyShape::Message = header.kind.shape(header.flags) {
            let mut bytes = Vec::new();
            encode_message(&body, &mut bytes);
            // Messages are bounded far below 4 GiB by their encoders.
            header.length = u32::try_from(bytes.len() + 4).unwrap_or(u32::MAX);
        }
        Self { header, body }
    }

    /// A frame that carries the blocks of `extent`.
    ///
    /// # Panics
    /// If data, checksums and extent don't fit each other: a caller's mistake.
    #[must_use]
    pub fn data(mut header: Header, extent: Extent, checksums: Checksums, data: SharedBuffer) -> Self {
        assert!(extent.is_block_aligned() && data.len() as u64 == extent.length().get(), "data of {} bytes for {extent}", data.len());
        assert_eq!(checksums.len() as u64, extent.block_count(), "one checksum per block");
        header.offset = extent.offset();
        header.length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        Self { header, body: Body::Data { checksums, data } }
    }

    /// A frame about the blocks of `extent` that carries none of them.
    ///
    /// # Panics
    /// If the extent is not whole blocks or over 4 GiB: a caller's mistake.
    #[must_use]
    pub fn range(header: Header, extent: Extent) -> Self {
        assert!(extent.is_block_aligned(), "a range of whole blocks, not {extent}");
        let length = u32::try_from(extent.length().get());
        assert!(length.is_ok(), "a range below 4 GiB, not {extent}");
        Self { header: Header { offset: extent.offset(), length: length.unwrap_or(0), ..header }, body: Body::Empty }
    }

    /// An error instead of the answer to `request`.
    #[must_use]
    pub fn error(request: &Header, code: ErrorCode, text: String) -> Self {
        let header = Header { kind: Kind::Error, flags: super::Flags::NONE, length: 0, ..*request };
        Self::new(header, Body::Error(ErrorBody { code, text }))
    }

    /// Appends everything but the data: header, then checksums or message.
    pub fn encode_head(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.header.encode());
        match &self.body {
            Body::Empty => {}
            Body::Data { checksums, .. } => {
                for checksum in checksums {
                    out.extend_from_slice(&checksum.to_le_bytes());
                }
            }
            message => {
                let start = out.len();
                out.extend_from_slice(&[0; 4]);
                encode_message(message, out);
                let crc = crc32c::crc32c(&out[start + 4..]);
                out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
            }
        }
    }

    /// The data, which follows the head on the wire.
    #[must_use]
    pub fn payload(&self) -> Option<&SharedBuffer> {
        match &self.body {
            Body::Data { data, .. } => Some(data),
            _ => None,
        }
    }

    /// Bytes on the wire.
    #[must_use]
    pub fn wire_length(&self) -> usize {
        HEADER_LENGTH + self.header.body_length()
    }

    /// Reads the body that follows a decoded header. Data is copied into a buffer of the pool, and each block is checked.
    ///
    /// # Errors
    /// [`WireError`] names what is wrong.
    ///
    /// # Panics
    /// If `body` is not exactly [`Header::body_length`] bytes: a caller's mistake.
    pub fn decode(header: Header, body: &[u8], pool: &BufferPool) -> Result<Self, WireError> {
        assert_eq!(body.len(), header.body_length(), "the whole body and nothing else");
        let body = match header.kind.shape(header.flags) {
            BodyShape::Nothing | BodyShape::Range => Body::Empty,
            BodyShape::Data => decode_data(&header, body, pool)?,
            BodyShape::Message => {
                let message = message::checked(header.kind, body)?;
                match header.kind {
                    Kind::Hello => Body::Hello(Hello::decode(message)?),
                    Kind::HelloAnswer => Body::HelloAnswer(HelloAnswer::decode(message)?),
                    Kind::StatusAnswer | Kind::PromiseAnswer => Body::Status(StatusAnswer::decode(header.kind, message)?),
                    Kind::LogAnswer => Body::Log(LogAnswer::decode(message)?),
                    Kind::ChangedAnswer => Body::Changed(ChangedAnswer::decode(message)?),
                    _ => Body::Error(ErrorBody::decode(message)?),
                }
            }
        };
        Ok(Self { header, body })
    }
}

fn encode_message(body: &Body, out: &mut Vec<u8>) {
    match body {
        Body::Empty | Body::Data { .. } => {}
        Body::Hello(message) => message.encode(out),
        Body::HelloAnswer(message) => message.encode(out),
        Body::Status(message) => message.encode(out),
        Body::Log(message) => message.encode(out),
        Body::Changed(message) => message.encode(out),
        Body::Error(message) => message.encode(out),
    }
}

fn decode_data(header: &Header, body: &[u8], pool: &BufferPool) -> Result<Body, WireError> {
    let blocks = header.length as usize / BLOCK_SIZE as usize;
    let (sums, bytes) = body.split_at(blocks * size_of::<Checksum>());
    let mut buffer = pool.take(bytes.len());
    buffer.copy_from_slice(bytes);
    let checksums: Checksums = (0..blocks).map(|index| read_u32(sums, index * size_of::<Checksum>())).collect();
    verify(header.volume, header.offset.block(), &checksums, &buffer)?;
    Ok(Body::Data { checksums, data: buffer.share() })
}

fn verify(volume: VolumeId, first: BlockIndex, checksums: &[Checksum], data: &[u8]) -> Result<(), WireError> {
    for (index, (expected, block)) in (first.get()..).zip(checksums.iter().zip(data.chunks_exact(BLOCK_SIZE as usize))) {
        let got = block_checksum(volume, BlockIndex::new(index), block);
        if got != *expected {
            return Err(WireError::BlockChecksum { volume, block: BlockIndex::new(index), expected: *expected, got });
        }
    }
    Ok(())
}
