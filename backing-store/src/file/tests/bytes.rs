//! Goal: the format never changes by accident, and no bytes make a parser panic. Method: the fixture (a store written by the first
//! version) is opened and taken apart; every byte of each structure is changed; random bytes are parsed.

use std::fs;

use proptest::prelude::*;

use super::super::format::{Applied, Entry, FormatError, LogRecord, PAGE, RECORD, StateSlot, Superblock};
use super::*;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/v1");
const BLOCKS: u64 = 8;

fn fixture_file() -> PathBuf {
    Path::new(FIXTURE).join("replicas").join(VOLUME.to_string())
}

/// Made the fixture. Run again only for a new version, into a new folder.
#[test]
#[ignore = "writes a fixture into the source tree"]
fn write_the_fixture() {
    let path = Path::new(FIXTURE).with_file_name("new");
    FileStore::format(&path).unwrap();
    let mut store = FileStore::open_with(&path, options(BOOT)).unwrap();
    store.create(spec(BLOCKS)).unwrap();
    run(&mut store, set_state(0x1_0000_0007, Content::Complete, Some(40))).unwrap();
    run(&mut store, write(Some(41), 1, 4, 5)).unwrap();
    run(&mut store, zeroes(Some(42), 3, 1)).unwrap();
    run(&mut store, write(None, 7, 1, 6)).unwrap();
    store.close().unwrap();
}

fn copy_of_the_fixture() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("replicas")).unwrap();
    fs::copy(Path::new(FIXTURE).join("carrick-store"), folder.path().join("carrick-store")).unwrap();
    fs::copy(fixture_file(), folder.path().join("replicas").join(VOLUME.to_string())).unwrap();
    folder
}

#[test]
fn a_store_of_format_1_opens_and_has_everything() {
    let folder = copy_of_the_fixture();
    let mut store = FileStore::open_with(folder.path(), options(OTHER_BOOT)).unwrap();
    let opened = store.replicas()[0];
    assert_eq!((opened.spec, opened.position, opened.durable), (spec(BLOCKS), Seq::new(42), Seq::new(42)));
    let term = Term::new(0x1_0000_0007);
    assert_eq!(opened.state, ReplicaState { promised: term, log_term: term, content: Content::Complete });
    let zero = || vec![0; BLOCK];
    let expected = [zero(), pattern(1, 5), pattern(2, 5), zero(), pattern(4, 5), zero(), zero(), pattern(7, 6)].concat();
    assert!(read(&mut store, 0, BLOCKS).unwrap() == expected);
    assert_eq!(logged(&mut store, 40), LoggedExtents::All(vec![extent(1, 4), extent(3, 1)]));
    run(&mut store, write(Some(43), 0, 8, 9)).unwrap();
    assert!(read(&mut store, 3, 1).unwrap() == pattern(3, 9));
}

#[test]
fn a_damaged_store_of_format_1_is_refused() {
    let folder = copy_of_the_fixture();
    let place = folder.path().join("replicas").join(VOLUME.to_string());
    let mut bytes = fs::read(&place).unwrap();
    bytes[60] ^= 4;
    fs::write(&place, bytes).unwrap();
    let store = FileStore::open_with(folder.path(), options(OTHER_BOOT)).unwrap();
    assert!(matches!(store.unusable().next(), Some((VOLUME, StoreError::Damaged { .. }))));
    drop(store);
    let mut bytes = fs::read(folder.path().join("carrick-store")).unwrap();
    for byte in [9, 4096 + 9] {
        bytes[byte] = 1;
    }
    fs::write(folder.path().join("carrick-store"), bytes).unwrap();
    assert!(matches!(FileStore::open(folder.path()), Err(StoreError::Damaged { .. })));
}

#[test]
fn the_fixture_is_what_the_encoders_write() {
    let superblock = fs::read(Path::new(FIXTURE).join("carrick-store")).unwrap();
    let encoded = Superblock::decode(&superblock).unwrap().encode();
    assert!(superblock == [encoded, encoded].concat());
    let file = fs::read(fixture_file()).unwrap();
    let at = |place: u64, length: usize| &file[usize::try_from(place).unwrap()..][..length];
    let header = Header::decode(&file).unwrap();
    assert!(header.encode() == at(0, PAGE));
    assert_eq!(header.layout, Layout::new(header.size, 64, 4096).unwrap());
    let slots = Layout::SLOTS_AT.map(|place| StateSlot::decode(at(place, PAGE), VOLUME).unwrap());
    for (slot, place) in slots.iter().zip(Layout::SLOTS_AT) {
        assert!(slot.encode(VOLUME) == at(place, PAGE));
        assert_eq!((slot.boot, slot.adoption, slot.base), (BOOT, 2, Seq::new(40)));
    }
    assert_eq!(slots.map(|slot| slot.clean), [true, false]);
    let applied = Applied::decode_copies(at(Layout::APPLIED_AT, 2 * RECORD), VOLUME).unwrap();
    assert_eq!(applied, Applied { adoption: 2, position: Seq::new(42), suspect: false });
    assert!(applied.encode(VOLUME) == at(Layout::APPLIED_AT, 2 * RECORD));
    let record = LogRecord { seq: Seq::new(41), adoption: 2, extent: extent(1, 4) };
    assert!(record.encode(VOLUME) == at(header.layout.log_record(record.seq), RECORD));
    let sum = block_checksum(VOLUME, BlockIndex::new(7), &pattern(7, 6));
    assert!(Entry::Written(sum).encode() == at(header.layout.entry(BlockIndex::new(7)), 8));
    assert!(pattern(7, 6) == at(header.layout.block(BlockIndex::new(7)), BLOCK));
}

#[test]
fn every_changed_byte_is_noticed() {
    let noticed = |bytes: &[u8], parse: &dyn Fn(&[u8]) -> Option<FormatError>| {
        for at in 0..bytes.len() {
            let mut bytes = bytes.to_vec();
            bytes[at] ^= 1 << (at % 8);
            let error = parse(&bytes).unwrap_or_else(|| panic!("byte {at}"));
            assert!(matches!(error, FormatError::Magic | FormatError::Checksum { .. }), "byte {at}: {error}");
        }
    };
    let file = fs::read(fixture_file()).unwrap();
    let superblock = fs::read(Path::new(FIXTURE).join("carrick-store")).unwrap();
    noticed(&superblock[..PAGE], &|bytes| Superblock::decode(bytes).err());
    noticed(&file[..PAGE], &|bytes| Header::decode(bytes).err());
    noticed(&file[PAGE..2 * PAGE], &|bytes| StateSlot::decode(bytes, VOLUME).err());
    noticed(&file[3 * PAGE..3 * PAGE + RECORD], &|bytes| Applied::decode(bytes, VOLUME).err());
    let record = LogRecord { seq: Seq::new(1), adoption: 1, extent: extent(0, 1) }.encode(VOLUME);
    noticed(&record, &|bytes| LogRecord::decode(bytes, VOLUME).err());
}

#[test]
fn structures_of_another_volume_are_not_believed() {
    let other = VolumeId::from_bytes([8; 16]);
    let file = fs::read(fixture_file()).unwrap();
    assert!(StateSlot::decode(&file[PAGE..], other).is_err());
    assert!(Applied::decode_copies(&file[3 * PAGE..], other).is_err());
    let record = LogRecord { seq: Seq::new(1), adoption: 1, extent: extent(0, 1) };
    assert!(LogRecord::decode(&record.encode(VOLUME), other).is_err());
}

/// Valid checksums over foreign fields: what damage can't make, a newer or an evil program can.
fn resealed(mut page: Vec<u8>) -> Vec<u8> {
    let sum = crc32c::crc32c(&page[..4092]);
    page[4092..4096].copy_from_slice(&sum.to_le_bytes());
    page
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
        let _ = Superblock::decode(&bytes);
        let _ = Header::decode(&bytes);
        let _ = StateSlot::decode(&bytes, VOLUME);
        let _ = Applied::decode_copies(&bytes, VOLUME);
        let _ = LogRecord::decode(&bytes, VOLUME);
    }

    #[test]
    fn no_fields_make_a_parser_panic_or_reach_outside_the_file(changes in prop::collection::vec((8..128_usize, any::<u64>()), 1..4)) {
        let file = fs::read(fixture_file()).unwrap();
        for place in [0, PAGE] {
            let mut page = file[place..place + PAGE].to_vec();
            for (at, value) in &changes {
                page[*at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            let page = resealed(page);
            let _ = StateSlot::decode(&page, VOLUME);
            if let Ok(header) = Header::decode(&page) {
                let last = BlockIndex::new(header.size.blocks() - 1);
                let (layout, end) = (header.layout, header.layout.file_length().get());
                prop_assert!(layout.log_record(Seq::new(u64::MAX)) < layout.entry(BlockIndex::ZERO));
                prop_assert!(layout.entry(last) + 8 <= layout.block(BlockIndex::ZERO));
                prop_assert!(layout.block(last) + 4096 == end);
                prop_assert!(page == header.encode() || changes.iter().any(|(at, _)| *at >= 16 && *at < 24 || *at + 8 > 96));
            }
        }
    }

    #[test]
    fn what_is_encoded_is_decoded(seq: u64, adoption: u64, first in 0..1_u64 << 40, count in 0..1_u64 << 30, suspect: bool, sum: u32) {
        let record = LogRecord { seq: Seq::new(seq), adoption, extent: extent(first, count) };
        prop_assert_eq!(LogRecord::decode(&record.encode(VOLUME), VOLUME), Ok(record));
        let applied = Applied { adoption, position: Seq::new(seq >> 2), suspect };
        prop_assert_eq!(Applied::decode_copies(&applied.encode(VOLUME), VOLUME), Ok(applied));
        prop_assert_eq!(Entry::decode(Entry::Written(sum).encode()), Entry::Written(sum));
    }
}
