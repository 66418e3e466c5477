//! A peer of the data protocol that speaks it by hand: for reading a replica's whole content, and for speaking it wrongly.

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use carrick_backing_store::dice::Dice;
use carrick_backing_store::{BlockIndex, BufferPool, ByteLength, ByteOffset, Extent, Seq, Term, VolumeId, block_checksum};
use carrick_replicator::wire::{Body, ErrorCode, Frame, HEADER_LENGTH, Header, Hello, Kind};

/// How long a replica may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Bytes per read.
const CHUNK: u64 = 1 << 20;

/// A connection to a replica.
pub struct Peer {
    stream: UnixStream,
    pool: BufferPool,
    volume: VolumeId,
    term: Term,
}

impl Peer {
    /// Connects and says hello.
    pub fn connect(socket: &Path, volume: VolumeId) -> anyhow::Result<Self> {
        let mut peer = Self::connect_silently(socket, volume)?;
        let hello = Frame::new(peer.header(Kind::Hello), Body::Hello(Hello::OURS));
        match peer.ask(&hello)?.body {
            Body::HelloAnswer(_) => Ok(peer),
            other => bail!("hello was answered with {other:?}"),
        }
    }

    /// Connects and says nothing.
    pub fn connect_silently(socket: &Path, volume: VolumeId) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self { stream, pool: BufferPool::new(0), volume, term: Term::ZERO })
    }

    pub fn header(&self, kind: Kind) -> Header {
        Header::new(kind, self.volume, self.term)
    }

    /// Sends raw bytes.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Sends a frame and takes the next one.
    pub fn ask(&mut self, frame: &Frame) -> anyhow::Result<Frame> {
        let mut bytes = Vec::new();
        frame.encode_head(&mut bytes);
        if let Some(data) = frame.payload() {
            bytes.extend_from_slice(data);
        }
        self.send_bytes(&bytes)?;
        self.receive()
    }

    /// Takes the next frame.
    pub fn receive(&mut self) -> anyhow::Result<Frame> {
        let mut head = [0; HEADER_LENGTH];
        self.stream.read_exact(&mut head)?;
        let header = Header::decode(&head)?;
        let mut body = vec![0; header.body_length()];
        self.stream.read_exact(&mut body)?;
        Ok(Frame::decode(header, &body, &self.pool)?)
    }

    /// The next frame must be this error.
    pub fn expect_error(&mut self, code: ErrorCode) -> anyhow::Result<String> {
        match self.receive()?.body {
            Body::Error(error) if error.code == code => Ok(error.text),
            other => bail!("wanted {code:?}, got {other:?}"),
        }
    }

    /// Whether the replica has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0)) || self.stream.peer_addr().is_err()
    }

    /// Takes a term above every promise, and with it the right to read. Ends whoever was primary.
    pub fn take_over(&mut self) -> anyhow::Result<()> {
        let status = Frame::new(self.header(Kind::Status), Body::Empty);
        let Body::Status(status) = self.ask(&status)?.body else { bail!("no status") };
        self.term = status.promised.successor(7).context("terms are used up")?;
        let promise = Frame::new(self.header(Kind::Promise), Body::Empty);
        match self.ask(&promise)?.body {
            Body::Status(_) => Ok(()),
            other => bail!("promise was answered with {other:?}"),
        }
    }

    /// Asks for a promise of this very term.
    pub fn promise(&mut self, term: Term) -> anyhow::Result<Frame> {
        self.term = term;
        let promise = Frame::new(self.header(Kind::Promise), Body::Empty);
        self.ask(&promise)
    }

    /// A write of one block with this sequence.
    pub fn write_frame(&self, seq: Seq) -> anyhow::Result<Frame> {
        let extent = Extent::new(ByteOffset::ZERO, ByteLength::new(4096)).context("an extent")?;
        Ok(Frame::range(Header { sequence: seq, ..self.header(Kind::WriteZeroes) }, extent))
    }

    /// Copies a block of noise into the replica, as if from another one.
    pub fn overwrite(&mut self, block: BlockIndex) -> anyhow::Result<()> {
        let mut data = self.pool.take(4096);
        let mut dice = Dice::new(block.get());
        data.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&dice.number().to_le_bytes()));
        let checksums = [block_checksum(self.volume, block, &data)].as_slice().into();
        let extent = Extent::new(block.offset(), ByteLength::new(4096)).context("an extent")?;
        let answer = self.ask(&Frame::data(self.header(Kind::CopyWrite), extent, checksums, data.share()))?;
        ensure!(answer.header.kind == Kind::CopyAnswer, "a copied block was answered with {answer:?}");
        Ok(())
    }

    /// A digest of every byte of the replica.
    pub fn digest(&mut self, size: u64) -> anyhow::Result<u64> {
        let mut digest = DefaultHasher::new();
        let zeroes = vec![0; usize::try_from(CHUNK)?];
        let mut offset = 0;
        while offset < size {
            let length = CHUNK.min(size - offset);
            let extent = Extent::new(ByteOffset::new(offset), ByteLength::new(length)).context("an extent")?;
            let read = Frame::range(self.header(Kind::Read), extent);
            match self.ask(&read)?.body {
                Body::Data { data, .. } => digest.write(&data),
                Body::Empty => digest.write(&zeroes[..usize::try_from(length)?]),
                other => bail!("read was answered with {other:?}"),
            }
            offset += length;
        }
        Ok(digest.finish())
    }
}
