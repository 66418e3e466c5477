//! What a connection has to send: frames in, one gathered message at a time out. No socket here.
//!
//! Invariants:
//! * What a message points to neither moves nor changes until [`Outbox::advance`] has counted all of it as sent.
//! * Bytes leave in the order of the frames, each exactly once, however the kernel cuts them.

use std::collections::VecDeque;

use carrick_backing_store::SharedBuffer;

use crate::wire::Frame;

/// Most pieces in one message; the kernel takes 1024. 128 frames of one block each fit.
const PIECES_MAX: usize = 256;
/// A message is closed once it has this many bytes: a larger one would not be sent in one go anyway.
const MESSAGE_BYTES: usize = 1 << 20;
/// Memory for heads that a quiet connection keeps.
const HEADS_KEPT: usize = 16 << 10;

/// The frames of one connection that are not sent yet.
pub(super) struct Outbox {
    waiting: VecDeque<Frame>,
    waiting_bytes: usize,
    /// The encoded heads of the message in hand, one after the other.
    heads: Vec<u8>,
    /// The data of the message in hand.
    payloads: Vec<SharedBuffer>,
    /// Where its bytes are; those before `sent_pieces` are sent.
    pieces: Vec<libc::iovec>,
    sent_pieces: usize,
    /// Bytes of the message in hand that are not sent.
    message_bytes: usize,
    message: Box<libc::msghdr>,
}

impl Outbox {
    pub(super) fn new() -> Self {
        // SAFETY: all zeros is a valid message without name, pieces or control data.
        let message = Box::new(unsafe { std::mem::zeroed() });
        Self {
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            heads: Vec::new(),
            payloads: Vec::new(),
            pieces: Vec::new(),
            sent_pieces: 0,
            message_bytes: 0,
            message,
        }
    }

    pub(super) fn push(&mut self, frame: Frame) {
        self.waiting_bytes += frame.wire_length();
        self.waiting.push_back(frame);
    }

    /// Bytes pushed and not yet sent.
    pub(super) fn bytes(&self) -> usize {
        self.waiting_bytes + self.message_bytes
    }

    /// The message to send next: the rest of the one in hand, or a new one. `None` if everything is sent. What it points to
    /// stays where it is until the next call of [`Outbox::advance`] or [`Outbox::clear`].
    pub(super) fn message(&mut self) -> Option<*const libc::msghdr> {
        if self.message_bytes == 0 {
            self.gather();
        }
        let pieces = &mut self.pieces[self.sent_pieces..];
        if pieces.is_empty() {
            return None;
        }
        self.message.msg_iov = pieces.as_mut_ptr();
        self.message.msg_iovlen = pieces.len();
        Some(&raw const *self.message)
    }

    fn gather(&mut self) {
        self.heads.clear();
        self.payloads.clear();
        self.pieces.clear();
        self.sent_pieces = 0;
        // First where each head ends, since the heads move while they are written; then the places.
        let mut ends = Ends::default();
        while self.message_bytes < MESSAGE_BYTES && ends.count < PIECES_MAX / 2 {
            let Some(frame) = self.waiting.pop_front() else { break };
            self.waiting_bytes -= frame.wire_length();
            self.message_bytes += frame.wire_length();
            frame.encode_head(&mut self.heads);
            if let Some(payload) = frame.payload() {
                self.payloads.push(payload.clone());
                ends.push(self.heads.len());
            }
        }
        let mut start = 0;
        for (end, payload) in ends.iter().zip(&self.payloads) {
            self.pieces.push(piece(&self.heads[start..end]));
            self.pieces.push(piece(payload));
            start = end;
        }
        if start < self.heads.len() {
            self.pieces.push(piece(&self.heads[start..]));
        }
    }

    /// So many bytes of the message were sent.
    pub(super) fn advance(&mut self, mut sent: usize) {
        assert!(sent <= self.message_bytes, "{sent} bytes sent of a message with {} left", self.message_bytes);
        self.message_bytes -= sent;
        for piece in &mut self.pieces[self.sent_pieces..] {
            if sent < piece.iov_len {
                // SAFETY: `sent` is within the piece.
                piece.iov_base = unsafe { piece.iov_base.cast::<u8>().add(sent) }.cast();
                piece.iov_len -= sent;
                break;
            }
            sent -= piece.iov_len;
            self.sent_pieces += 1;
        }
        if self.message_bytes == 0 {
            self.payloads.clear();
        }
    }

    /// Forgets everything: it can't be sent any more.
    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }

    /// Gives memory back, if nothing is left to send.
    pub(super) fn shrink(&mut self) {
        if self.bytes() == 0 {
            self.waiting = VecDeque::new();
            self.heads.clear();
            self.heads.shrink_to(HEADS_KEPT);
        }
    }
}

/// Where the heads before each payload end, on the stack.
struct Ends {
    ends: [usize; PIECES_MAX / 2],
    count: usize,
}

impl Default for Ends {
    fn default() -> Self {
        Self { ends: [0; PIECES_MAX / 2], count: 0 }
    }
}

impl Ends {
    fn push(&mut self, end: usize) {
        self.ends[self.count] = end;
        self.count += 1;
    }

    fn iter(&self) -> impl Iterator<Item = usize> {
        self.ends[..self.count].iter().copied()
    }
}

fn piece(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::{BufferPool, ByteLength, ByteOffset, Extent, Term, VolumeId};

    use super::*;
    use crate::wire::{Body, Header, Kind, RequestId};

    fn frames(count: u64) -> Vec<Frame> {
        let pool = BufferPool::new(0);
        let header =
            |kind, request| Header { request: RequestId(request), ..Header::new(kind, VolumeId::from_bytes([9; 16]), Term::new(3)) };
        (0..count)
            .map(|request| match request % 3 {
                0 => Frame::new(header(Kind::Ping, request), Body::Empty),
                kind => {
                    let length = 4096 * kind;
                    let mut data = pool.take(length as usize);
                    data.fill(request as u8);
                    let extent = Extent::new(ByteOffset::new(0), ByteLength::new(length)).unwrap();
                    Frame::data(header(Kind::Write, request), extent, vec![request as u32; kind as usize].into(), data.share())
                }
            })
            .collect()
    }

    fn expected(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            frame.encode_head(&mut bytes);
            bytes.extend_from_slice(frame.payload().map_or(&[], |payload| payload));
        }
        bytes
    }

    /// Takes at most `step` bytes of each message, as a kernel with a full socket buffer would.
    fn drain(outbox: &mut Outbox, step: usize, out: &mut Vec<u8>) {
        while let Some(message) = outbox.message() {
            // SAFETY: the message and its pieces are valid until `advance`.
            let pieces = unsafe { std::slice::from_raw_parts((*message).msg_iov, (*message).msg_iovlen) };
            assert!(pieces.len() <= PIECES_MAX + 1);
            let mut taken = 0;
            for piece in pieces {
                let now = piece.iov_len.min(step - taken);
                // SAFETY: the piece is valid until `advance`.
                out.extend_from_slice(unsafe { std::slice::from_raw_parts(piece.iov_base.cast::<u8>(), now) });
                taken += now;
            }
            outbox.advance(taken);
        }
    }

    #[test]
    fn bytes_leave_in_order_and_once_however_they_are_cut() {
        let frames = frames(7);
        let expected = expected(&frames);
        for step in (1..130).chain([4095, 4096, 4097, 4160, 4161, 1 << 20]) {
            let mut outbox = Outbox::new();
            frames.iter().for_each(|frame| outbox.push(frame.clone()));
            assert_eq!(outbox.bytes(), expected.len());
            let mut out = Vec::new();
            drain(&mut outbox, step, &mut out);
            assert!(out == expected, "step {step}");
            assert_eq!(outbox.bytes(), 0);
        }
    }

    #[test]
    fn frames_pushed_while_a_message_is_half_sent_come_after_it() {
        let frames = frames(400);
        let expected = expected(&frames);
        let mut outbox = Outbox::new();
        let mut out = Vec::new();
        for frame in &frames {
            outbox.push(frame.clone());
            if let Some(message) = outbox.message() {
                // SAFETY: the message has at least one piece, valid until `advance`.
                let first = unsafe { *(*message).msg_iov };
                let now = first.iov_len.min(100);
                // SAFETY: within the first piece.
                out.extend_from_slice(unsafe { std::slice::from_raw_parts(first.iov_base.cast::<u8>(), now) });
                outbox.advance(now);
            }
            assert_eq!(outbox.bytes() + out.len(), out.len() + outbox.waiting_bytes + outbox.message_bytes);
        }
        drain(&mut outbox, 5000, &mut out);
        assert!(out == expected);
        outbox.shrink();
        assert_eq!(outbox.waiting.capacity(), 0);
    }
}
