//! What a connection has received and not yet handed on: bytes in, frames out. No socket here.
//!
//! Invariants:
//! * Nothing is allocated for a frame before its header has been checked, and then never more than the largest frame needs.
//! * A frame is handed out whole or not at all, in the order of its bytes; after a [`WireError`] nothing more is handed out,
//!   because where the next frame would begin is unknown.

use carrick_backing_store::BufferPool;

use crate::wire::{DATA_LENGTH_MAX, Frame, HEADER_LENGTH, Header, MESSAGE_LENGTH_MAX, WireError};

/// What a quiet connection holds: some 15 frames of one block each.
pub(super) const START: usize = 64 << 10;
/// To how much it grows because much arrives at once: beyond, larger receives no longer save anything measurable.
const BURST_MAX: usize = 512 << 10;
/// A frame of which at least this much is missing is received alone and whole, with one wake-up.
const WHOLE_MIN: usize = 64 << 10;
/// The largest buffer: the largest frame with one checksum of four bytes per block.
const LARGEST: usize = HEADER_LENGTH + DATA_LENGTH_MAX as usize / 4096 * 4 + DATA_LENGTH_MAX as usize;

const _: () = assert!(HEADER_LENGTH + MESSAGE_LENGTH_MAX as usize <= LARGEST);

/// Where the next bytes go.
pub(super) struct Space {
    pub(super) start: *mut u8,
    pub(super) length: usize,
    /// Whether to complete only when all of it has arrived.
    pub(super) whole: bool,
}

/// The received bytes of one connection.
pub(super) struct Inbox {
    pool: BufferPool,
    /// Not from the pool: its memory becomes resident as bytes arrive, and not with what a header merely claims.
    buffer: Box<[u8]>,
    /// `buffer[start..end]` is received and not handed out.
    start: usize,
    end: usize,
    /// The header of the frame whose body is still incomplete.
    header: Option<Header>,
    /// How large the buffer may be for bursts.
    burst: usize,
    /// The length of the space given last.
    given: usize,
    broken: bool,
}

impl Inbox {
    pub(super) fn new(pool: BufferPool) -> Self {
        Self { pool, buffer: zeroed(START), start: 0, end: 0, header: None, burst: START, given: 0, broken: false }
    }

    /// The next frame, if it is here as a whole. Data is copied once, into a buffer of the pool that begins at its first block.
    pub(super) fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        if self.broken {
            return Ok(None);
        }
        let frame = self.parse();
        self.broken = frame.is_err();
        frame
    }

    fn parse(&mut self) -> Result<Option<Frame>, WireError> {
        let bytes = &self.buffer[self.start..self.end];
        let header = match self.header {
            Some(header) => header,
            None => match bytes.first_chunk() {
                Some(first) => Header::decode(first)?,
                None => return Ok(None),
            },
        };
        let length = HEADER_LENGTH + header.body_length();
        let Some(whole) = bytes.get(..length) else {
            self.header = Some(header);
            return Ok(None);
        };
        let frame = Frame::decode(header, &whole[HEADER_LENGTH..], &self.pool)?;
        self.header = None;
        self.start += length;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        Ok(Some(frame))
    }

    /// Makes room and says where the next bytes go. Call it when no receive is in flight and no whole frame is left.
    pub(super) fn space(&mut self) -> Space {
        let held = self.end - self.start;
        let needed = self.header.map_or(HEADER_LENGTH, |header| HEADER_LENGTH + header.body_length());
        let capacity = needed.max(self.burst);
        if self.buffer.len() < capacity {
            let mut larger = zeroed(capacity);
            larger[..held].copy_from_slice(&self.buffer[self.start..self.end]);
            self.buffer = larger;
            (self.start, self.end) = (0, held);
        } else if self.start > 0 {
            // What is held is less than one frame.
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, held);
        }
        let missing = needed.saturating_sub(held);
        let whole = missing >= WHOLE_MIN;
        let space = if whole { &mut self.buffer[self.end..needed] } else { &mut self.buffer[self.end..] };
        self.given = space.len();
        Space { start: space.as_mut_ptr(), length: space.len(), whole }
    }

    /// So many bytes came into the space.
    pub(super) fn received(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.given, "no more than there was room for");
        self.end += bytes;
        if bytes == self.given {
            self.burst = (self.burst * 2).min(BURST_MAX);
        }
    }

    /// Forgets all bytes: nobody wants them any more. The next space is at the buffer's start.
    pub(super) fn discard(&mut self) {
        (self.start, self.end) = (0, 0);
        self.header = None;
    }

    /// Whether part of a frame is here.
    pub(super) fn is_amid_frame(&self) -> bool {
        self.start != self.end
    }

    /// Whether [`Inbox::shrink`] would give memory back.
    pub(super) fn is_large(&self) -> bool {
        !self.is_amid_frame() && self.buffer.len() > START
    }

    /// Back to the size of a quiet connection. Call it when no receive is in flight.
    pub(super) fn shrink(&mut self) {
        if self.is_large() {
            self.buffer = zeroed(START);
            self.burst = START;
        }
    }
}

fn zeroed(length: usize) -> Box<[u8]> {
    vec![0; length].into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::{BlockIndex, ByteLength, ByteOffset, Extent, Term, VolumeId, block_checksum};

    use super::*;
    use crate::wire::{Body, Kind, RequestId};

    fn write_frame(pool: &BufferPool, blocks: u64, request: u64) -> Frame {
        let volume = VolumeId::from_bytes([7; 16]);
        let extent = Extent::new(ByteOffset::new(4096 * request), ByteLength::new(4096 * blocks)).unwrap();
        let mut data = pool.take((4096 * blocks) as usize);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = (index as u64 * 31 + request) as u8;
        }
        let sums =
            (0..blocks).map(|b| block_checksum(volume, BlockIndex::new(request + b), &data[(b * 4096) as usize..][..4096])).collect();
        let header = Header { request: RequestId(request), ..Header::new(Kind::Write, volume, Term::new(1)) };
        Frame::data(header, extent, sums, data.share())
    }

    fn bytes_of(frame: &Frame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.encode_head(&mut bytes);
        bytes.extend_from_slice(frame.payload().map_or(&[], |payload| payload));
        bytes
    }

    /// Gives the inbox at most `step` bytes at a time and returns the requests of the frames that came out.
    fn feed(inbox: &mut Inbox, mut bytes: &[u8], step: usize) -> Result<Vec<u64>, WireError> {
        let mut requests = Vec::new();
        while !bytes.is_empty() {
            let space = inbox.space();
            let now = space.length.min(step).min(bytes.len());
            assert!(now > 0, "there is always room");
            // SAFETY: the space is `length` writable bytes of the inbox's buffer.
            unsafe { std::slice::from_raw_parts_mut(space.start, now) }.copy_from_slice(&bytes[..now]);
            inbox.received(now);
            bytes = &bytes[now..];
            while let Some(frame) = inbox.next_frame()? {
                if let Body::Data { data, .. } = &frame.body {
                    assert!(data.iter().enumerate().all(|(i, byte)| *byte == (i as u64 * 31 + frame.header.request.0) as u8));
                }
                requests.push(frame.header.request.0);
            }
        }
        Ok(requests)
    }

    #[test]
    fn frames_come_out_whole_however_the_bytes_are_cut() {
        let pool = BufferPool::new(8 << 20);
        let mut bytes = Vec::new();
        let ping = |request| {
            Frame::new(
                Header { request: RequestId(request), ..Header::new(Kind::Ping, VolumeId::from_bytes([7; 16]), Term::new(1)) },
                Body::Empty,
            )
        };
        for frame in [ping(1), write_frame(&pool, 1, 2), ping(3), write_frame(&pool, 257, 4), ping(5), ping(6)] {
            bytes.extend_from_slice(&bytes_of(&frame));
        }
        for step in [1, 2, 3, 63, 64, 65, 127, 4095, 4096, 4097, 65_536, 1 << 20, usize::MAX] {
            let mut inbox = Inbox::new(pool.clone());
            assert_eq!(feed(&mut inbox, &bytes, step).unwrap(), [1, 2, 3, 4, 5, 6], "step {step}");
            assert!(!inbox.is_amid_frame());
        }
    }

    #[test]
    fn every_single_cut_of_two_frames_is_the_same() {
        let pool = BufferPool::new(8 << 20);
        let mut bytes = bytes_of(&write_frame(&pool, 1, 1));
        bytes.extend_from_slice(&bytes_of(&write_frame(&pool, 1, 2)));
        let mut inbox = Inbox::new(pool.clone());
        for cut in 0..bytes.len() {
            let mut requests = feed(&mut inbox, &bytes[..cut], usize::MAX).unwrap();
            requests.extend(feed(&mut inbox, &bytes[cut..], usize::MAX).unwrap());
            assert_eq!(requests, [1, 2], "cut at {cut}");
        }
    }

    #[test]
    fn the_buffer_grows_for_a_large_frame_and_shrinks_when_asked() {
        let pool = BufferPool::new(0);
        let mut inbox = Inbox::new(pool.clone());
        assert_eq!(inbox.space().length, START);
        feed(&mut inbox, &bytes_of(&write_frame(&pool, 257, 1)), usize::MAX).unwrap();
        assert!(inbox.is_large());
        inbox.shrink();
        assert_eq!(inbox.space().length, START);
        for request in 0..100 {
            feed(&mut inbox, &bytes_of(&write_frame(&pool, 257, request)), usize::MAX).unwrap();
            assert!(inbox.buffer.len() <= LARGEST);
        }
    }

    #[test]
    fn after_garbage_nothing_comes_out() {
        let pool = BufferPool::new(8 << 20);
        let mut bytes = vec![0xa5; 64];
        bytes.extend_from_slice(&bytes_of(&write_frame(&pool, 1, 1)));
        let mut inbox = Inbox::new(pool);
        assert!(matches!(feed(&mut inbox, &bytes, usize::MAX), Err(WireError::Magic(_))));
        assert!(inbox.next_frame().unwrap().is_none());
    }
}
