//! The wire format: the golden frames of `docs/protocol.md`, round trips of every kind, and foreign bytes of every sort.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

use carrick_backing_store::{
    BLOCK_SIZE, BlockIndex, BufferPool, ByteLength, ByteOffset, Content, Epoch, Extent, LoggedExtents, Seq, StoreId, Synced, Term,
    VolumeId, VolumeSize, block_checksum,
};
use carrick_replicator::wire::{
    Body, ChangedAnswer, DATA_LENGTH_MAX, ErrorBody, ErrorCode, Flags, Frame, HEADER_LENGTH, Header, Hello, HelloAnswer, Kind, LogAnswer,
    RequestId, StatusAnswer, WireError,
};
use proptest::prelude::*;

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const TERM: Term = Term::new(3 << 32 | 10);

fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode_head(&mut bytes);
    if let Some(payload) = frame.payload() {
        bytes.extend_from_slice(payload);
    }
    assert_eq!(bytes.len(), frame.wire_length());
    bytes
}

/// Decodes the way a connection does: header, length, body.
fn decode(bytes: &[u8], pool: &BufferPool) -> Result<Option<Frame>, WireError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LENGTH>() else { return Ok(None) };
    let header = Header::decode(header)?;
    rest.get(..header.body_length()).map(|body| Frame::decode(header, body, pool)).transpose()
}

fn extent(offset: u64, length: u64) -> Extent {
    Extent::new(ByteOffset::new(offset), ByteLength::new(length)).unwrap()
}

/// A frame that carries blocks.
fn data_frame(pool: &BufferPool, kind: Kind, offset: u64, bytes: &[u8]) -> Frame {
    let mut buffer = pool.take(bytes.len());
    buffer.copy_from_slice(bytes);
    let extent = extent(offset, bytes.len() as u64);
    let blocks = bytes.chunks_exact(BLOCK_SIZE as usize).zip(extent.first_block().get()..);
    let checksums = blocks.map(|(block, index)| block_checksum(VOLUME, carrick_backing_store::BlockIndex::new(index), block)).collect();
    Frame::data(Header { sequence: Seq::new(5), ..Header::new(kind, VOLUME, TERM) }, extent, checksums, buffer.share())
}

/// The hexadecimal blocks of the page's last section, in order.
fn golden() -> Vec<Vec<u8>> {
    let page = include_str!("../../docs/protocol.md");
    let section = page.split("## Golden frames").nth(1).unwrap();
    let blocks = section.split("```").skip(1).step_by(2);
    blocks
        .map(|block| {
            let text = block.replace("07 × 4096", &"07".repeat(4096));
            let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
            digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
        })
        .collect()
}

#[test]
fn golden_frames_are_what_the_page_says() {
    let pool = BufferPool::new(0);
    let write = data_frame(&pool, Kind::Write, 12288, &[7; 4096]);
    let frames = [
        Frame::new(Header { request: RequestId(7), ..Header::new(Kind::Ping, VOLUME, TERM) }, Body::Empty),
        Frame::new(Header { request: RequestId(1), ..Header::new(Kind::Hello, VOLUME, Term::ZERO) }, Body::Hello(Hello::OURS)),
        Frame { header: Header { flags: Flags::FUA, ..write.header }, ..write },
        Frame::new(Header { sequence: Seq::new(5), offset: ByteOffset::new(4), ..Header::new(Kind::Ack, VOLUME, TERM) }, Body::Empty),
        Frame::new(
            Header { request: RequestId(9), ..Header::new(Kind::Error, VOLUME, Term::new(4 << 32)) },
            Body::Error(ErrorBody { code: ErrorCode::StaleTerm, text: "late".to_owned() }),
        ),
    ];
    let golden = golden();
    assert_eq!(golden.len(), frames.len());
    for (frame, golden) in frames.iter().zip(golden) {
        assert_eq!(bytes_of(frame), golden, "{:?}", frame.header.kind);
        let decoded = decode(&golden, &pool).unwrap().unwrap();
        assert_eq!(decoded.header, frame.header);
    }
}

#[test]
fn every_kind_and_message_survives_the_way() {
    let pool = BufferPool::new(0);
    let status = StatusAnswer {
        promised: TERM,
        log_term: Term::new(9),
        position: Seq::new(4),
        durable: Seq::new(3),
        size: VolumeSize::new(8192).unwrap(),
        content: Content::Mixed,
        epoch: Epoch::new(12),
        synced: Synced { epoch: Epoch::new(10), copied: BlockIndex::new(77), copied_epoch: Epoch::new(11) },
    };
    let changed = ChangedAnswer { extents: vec![extent(0, 4096), extent(8192, 4096)], next: Some(ByteOffset::new(12288)) };
    let hello = HelloAnswer { version: 1, features_incompatible: 0, features_compatible: 6, store: StoreId::from_bytes([9; 16]) };
    let log = LogAnswer { extents: LoggedExtents::All(vec![extent(0, 4096), extent(8192, 4096)]) };
    for kind in Kind::ALL.iter().copied() {
        let header = Header { request: RequestId(3), ..Header::new(kind, VOLUME, TERM) };
        let frame = match kind {
            Kind::Hello => Frame::new(header, Body::Hello(Hello::OURS)),
            Kind::HelloAnswer => Frame::new(header, Body::HelloAnswer(hello)),
            Kind::StatusAnswer | Kind::PromiseAnswer => Frame::new(header, Body::Status(status)),
            Kind::LogAnswer => Frame::new(header, Body::Log(log.clone())),
            Kind::ChangedAnswer => Frame::new(header, Body::Changed(changed.clone())),
            Kind::Error => Frame::error(&header, ErrorCode::NoSpace, "é".repeat(2000)),
            Kind::Write | Kind::CopyWrite | Kind::ReadAnswer => data_frame(&pool, kind, 4096, &[9; 8192]),
            Kind::WriteZeroes | Kind::Discard | Kind::Read | Kind::CopyZeroes | Kind::Digest | Kind::DigestAnswer => {
                Frame::range(header, extent(4096, 8192))
            }
            _ => Frame::new(header, Body::Empty),
        };
        let decoded = decode(&bytes_of(&frame), &pool).unwrap().unwrap();
        assert_eq!(decoded.header, frame.header);
        match (decoded.body, frame.body) {
            (Body::Data { checksums, data }, Body::Data { checksums: sent, data: sent_data }) => {
                assert!(checksums == sent && *data == *sent_data)
            }
            (Body::Status(got), Body::Status(sent)) => assert_eq!(got, sent),
            (Body::HelloAnswer(got), Body::HelloAnswer(sent)) => assert_eq!(got, sent),
            (Body::Hello(got), Body::Hello(sent)) => assert_eq!(got, sent),
            (Body::Log(got), Body::Log(sent)) => assert_eq!(got, sent),
            (Body::Changed(got), Body::Changed(sent)) => assert_eq!(got, sent),
            (Body::Error(got), Body::Error(sent)) => {
                assert_eq!(got.code, sent.code);
                assert!(sent.text.starts_with(&got.text) && got.text.len() == 1024, "cut at a character's border");
            }
            (Body::Empty, Body::Empty) => {}
            (got, sent) => panic!("{got:?} is not {sent:?}"),
        }
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let pool = BufferPool::new(0);
    let frames = [
        data_frame(&pool, Kind::Write, 4096, &[3; 4096]),
        Frame::new(Header::new(Kind::Hello, VOLUME, TERM), Body::Hello(Hello::OURS)),
        Frame::new(Header::new(Kind::Ping, VOLUME, TERM), Body::Empty),
    ];
    for frame in frames {
        let good = bytes_of(&frame);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes, &pool).is_err(), "bit {bit} of a {:?} frame", frame.header.kind);
        }
    }
}

/// A header with a right checksum around wrong fields.
fn sealed(mut bytes: [u8; HEADER_LENGTH]) -> [u8; HEADER_LENGTH] {
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn errors_name_the_field() {
    let good = Header::new(Kind::Ping, VOLUME, TERM).encode();
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good;
        bytes[at..at + value.len()].copy_from_slice(value);
        Header::decode(&sealed(bytes)).unwrap_err()
    };
    assert_eq!(Header::decode(&[0; HEADER_LENGTH]).unwrap_err(), WireError::Magic(0));
    assert_eq!(with(4, &[2]), WireError::Version(2));
    assert_eq!(with(5, &[0x70]), WireError::Kind(0x70));
    assert_eq!(with(6, &[0x80, 0]), WireError::Flags(0x80));
    assert_eq!(with(48, &[1]), WireError::TooLong { kind: Kind::Ping, got: 1, limit: 0 });
    let write = Header { length: DATA_LENGTH_MAX + BLOCK_SIZE, ..Header::new(Kind::Write, VOLUME, TERM) };
    assert_eq!(Header::decode(&write.encode()), Err(WireError::TooLong { kind: Kind::Write, got: write.length, limit: DATA_LENGTH_MAX }));
    let unaligned = Header { length: BLOCK_SIZE, offset: ByteOffset::new(512), ..Header::new(Kind::Write, VOLUME, TERM) };
    assert_eq!(Header::decode(&unaligned.encode()), Err(WireError::Range { offset: 512, length: BLOCK_SIZE }));
    let beyond = Header { length: BLOCK_SIZE, offset: ByteOffset::new(u64::MAX - 4095), ..Header::new(Kind::Read, VOLUME, TERM) };
    assert!(matches!(Header::decode(&beyond.encode()), Err(WireError::Range { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Any header with a right checksum decodes to an error, or to a length within the limits; the body to an error or a frame.
    #[test]
    fn foreign_bytes_never_panic(
        version in 0_u8..3, kind in any::<u8>(), flags in 0_u16..16, length in prop_oneof![0_u32..64, 4090_u32..4100, any::<u32>()],
        offset in prop_oneof![Just(0_u64), any::<u64>()], sum_right in any::<bool>(),
        mut body in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut bytes = Header::new(Kind::Ping, VOLUME, TERM).encode();
        bytes[4] = version;
        bytes[5] = kind;
        bytes[6..8].copy_from_slice(&flags.to_le_bytes());
        bytes[40..48].copy_from_slice(&offset.to_le_bytes());
        bytes[48..52].copy_from_slice(&length.to_le_bytes());
        if let Ok(header) = Header::decode(&sealed(bytes)) {
            prop_assert!(header.body_length() <= DATA_LENGTH_MAX as usize + 257 * 4);
            body.resize(header.body_length(), 0);
            if sum_right && body.len() >= 4 {
                let crc = crc32c::crc32c(&body[4..]);
                body[..4].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = Frame::decode(header, &body, &BufferPool::new(0));
        }
    }
}
