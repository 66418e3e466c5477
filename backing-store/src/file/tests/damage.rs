//! Goal: no damaged byte makes the store panic or return wrong data. Method: a small replica is written, one byte of it is changed
//! (every byte of the structures, samples of the data), and the store is opened and read: it must say what is wrong, or be right.

use super::nasty::{Fault, NastyFolder};
use super::*;

const BLOCKS: u64 = 8;

fn open_boot(folder: &NastyFolder, boot: BootId) -> FileStore {
    let id = StoreId::from_bytes([9; 16]);
    FileStore::open_folder(Path::new("nasty"), Box::new(folder.clone()), id, options(boot), None).unwrap()
}

fn open(folder: &NastyFolder) -> FileStore {
    open_boot(folder, BOOT)
}

/// Blocks 0..4 are written, the rest are holes; promised 7, position 3.
fn prepared(clean: bool) -> (NastyFolder, Vec<u8>) {
    let folder = NastyFolder::new(1);
    folder.calm();
    let mut store = open(&folder);
    store.create(spec(BLOCKS)).unwrap();
    run(&mut store, set_state(7, Content::Complete, Some(1))).unwrap();
    run(&mut store, write(Some(2), 0, 3, 5)).unwrap();
    run(&mut store, write(Some(3), 3, 1, 6)).unwrap();
    if clean {
        store.close().unwrap();
    } else {
        store.abandon();
    }
    let bytes = folder.bytes(&VOLUME.to_string());
    (folder, bytes)
}

fn right(block: u64) -> Vec<u8> {
    match block {
        0..3 => pattern(block, 5),
        3 => pattern(3, 6),
        _ => vec![0; BLOCK],
    }
}

/// Opens the store with a byte changed. Gives whether it was found out.
fn changed(folder: &NastyFolder, bytes: &[u8], at: usize, flip: u8, boot: BootId) -> bool {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= flip;
    folder.put(&VOLUME.to_string(), bytes);
    let mut store = open_boot(folder, boot);
    let refused = store.unusable().next().map(|(_, error)| matches!(error, StoreError::Damaged { .. }));
    if let Some(damaged) = refused {
        assert!(damaged, "byte {at}");
        assert!(run(&mut store, Operation::Sync).is_err());
        assert!(store.create(spec(BLOCKS)).is_err(), "byte {at}: a damaged replica is not silently replaced");
        return true;
    }
    let opened = store.replicas()[0];
    assert_eq!(opened.spec, spec(BLOCKS), "byte {at}");
    assert_eq!(opened.state.promised, Term::new(7), "byte {at}");
    assert_eq!(opened.position, Seq::new(3), "byte {at}");
    let mut found = false;
    for block in 0..BLOCKS {
        match read(&mut store, block, 1) {
            Ok(data) => assert_eq!(data, right(block), "byte {at}, block {block}"),
            Err(StoreError::Corrupt { .. }) => found = true,
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
    store.abandon();
    found
}

#[test]
fn no_damaged_byte_of_the_structures_gives_wrong_data() {
    for clean in [true, false] {
        let (folder, bytes) = prepared(clean);
        let data_at = bytes.len() - usize::try_from(BLOCKS).unwrap() * BLOCK;
        // All fields are in the first and the last bytes of their pages; `bytes` shows that each byte between counts as well.
        for at in (0..data_at).filter(|at| at % 4096 < 128 || at % 4096 > 4088 || at % 61 == 0) {
            changed(&folder, &bytes, at, 1 << (at % 8), BOOT);
        }
    }
}

#[test]
fn every_damaged_entry_is_found() {
    let (folder, bytes) = prepared(true);
    let layout = Header::decode(&bytes).unwrap().layout;
    let entries = usize::try_from(layout.entry(BlockIndex::new(0))).unwrap();
    for at in entries..entries + 8 * usize::try_from(BLOCKS).unwrap() {
        assert!(changed(&folder, &bytes, at, 0x81, BOOT), "byte {at}");
    }
}

#[test]
fn every_damaged_byte_of_data_is_found() {
    let (folder, bytes) = prepared(true);
    let data_at = bytes.len() - usize::try_from(BLOCKS).unwrap() * BLOCK;
    for at in (data_at..data_at + 4 * BLOCK).step_by(61) {
        assert!(changed(&folder, &bytes, at, 0x10, BOOT), "byte {at}");
    }
    for at in (data_at + 4 * BLOCK..bytes.len()).step_by(509) {
        assert!(!changed(&folder, &bytes, at, 0x10, BOOT), "byte {at} is of a hole and means nothing");
    }
}

#[test]
fn damage_to_one_slot_after_a_close_costs_the_clean_flag_at_most() {
    let (folder, bytes) = prepared(true);
    for slot in Layout::SLOTS_AT {
        let mut damaged = bytes.clone();
        damaged[usize::try_from(slot).unwrap() + 40] ^= 1;
        folder.put(&VOLUME.to_string(), damaged);
        let mut store = open_boot(&folder, OTHER_BOOT);
        let opened = store.replicas()[0];
        assert_eq!((opened.state.promised, opened.position), (Term::new(7), Seq::new(3)));
        assert_eq!(read(&mut store, 3, 1).unwrap(), right(3));
    }
    let mut damaged = bytes;
    for slot in Layout::SLOTS_AT {
        damaged[usize::try_from(slot).unwrap() + 40] ^= 1;
    }
    folder.put(&VOLUME.to_string(), damaged);
    let mut store = open(&folder);
    assert!(matches!(store.unusable().next(), Some((VOLUME, StoreError::Damaged { .. }))));
    store.delete(VOLUME).unwrap();
    store.create(spec(BLOCKS)).unwrap();
}

#[test]
fn damage_to_one_slot_brings_no_earlier_clean_flag_back() {
    for slot in Layout::SLOTS_AT {
        let (folder, _) = prepared(true);
        let mut store = open(&folder);
        run(&mut store, write(Some(4), 0, 1, 9)).unwrap();
        store.abandon();
        let mut bytes = folder.bytes(&VOLUME.to_string());
        bytes[usize::try_from(slot).unwrap() + 40] ^= 1;
        folder.put(&VOLUME.to_string(), bytes);
        let store = open_boot(&folder, OTHER_BOOT);
        let opened = store.replicas()[0];
        assert_eq!((opened.position, opened.state.content), (Seq::new(3), Content::Mixed));
    }
}

#[test]
fn a_truncated_or_misplaced_file_is_refused_and_others_are_served() {
    let (folder, bytes) = prepared(true);
    let other = VolumeId::from_bytes([8; 16]);
    for length in [0, 100, 4096, 20_000, bytes.len() - 1] {
        folder.put(&other.to_string(), bytes[..length].to_vec());
        let store = open(&folder);
        assert_eq!((store.unusable().count(), store.replicas().len()), (1, 1), "{length} bytes");
        assert!(store.usage().unwrap().used.get() >= length as u64);
    }
    folder.put(&other.to_string(), bytes);
    let mut store = open(&folder);
    assert!(matches!(store.unusable().next(), Some((_, StoreError::Damaged { .. }))));
    assert_eq!(read(&mut store, 0, 1).unwrap(), right(0));
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let (folder, bytes) = prepared(true);
    for (at, newer) in [(8, 2), (24, 1), (32, 1)] {
        let mut bytes = bytes.clone();
        bytes[at] = newer;
        let sum = crc32c::crc32c(&bytes[..4092]);
        bytes[4092..4096].copy_from_slice(&sum.to_le_bytes());
        folder.put(&VOLUME.to_string(), bytes);
        let mut store = open(&folder);
        let newer = |error: &StoreError| {
            matches!(error, StoreError::UnknownFormat { found: 2, .. } | StoreError::UnknownFeatures { features: 1, .. })
        };
        assert!(newer(store.unusable().next().unwrap().1));
        assert!(newer(&run(&mut store, Operation::Sync).unwrap_err()));
        assert!(newer(&store.create(spec(BLOCKS)).unwrap_err()));
    }
}

#[test]
fn every_damaged_byte_of_a_superblock_copy_leaves_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let id = FileStore::format(folder.path()).unwrap();
    let place = folder.path().join("carrick-store");
    let good = std::fs::read(&place).unwrap();
    assert_eq!(good.len(), 8192);
    for at in 0..8192 {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&place, &bytes).unwrap();
        assert_eq!(setup::lock(folder.path()).unwrap().1.id, id);
        bytes[(at + 4096) % 8192] ^= 0x40;
        std::fs::write(&place, bytes).unwrap();
        let error = setup::lock(folder.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. } | StoreError::NotAStore { .. }), "byte {at}: {error}");
    }
}

// What fails while it is in service.

#[test]
fn a_failed_sync_ends_the_replicas_service_and_is_not_believed_later() {
    for evicted in [false, true] {
        for operation in [|| Operation::Sync, || set_state(9, Content::Complete, None)] {
            // Events: the data's sync, the slot (a state is written to both).
            for event in 1..4 {
                let folder = NastyFolder::new(3);
                folder.calm();
                let mut store = open(&folder);
                store.create(spec(BLOCKS)).unwrap();
                run(&mut store, write(Some(1), 0, 2, 5)).unwrap();
                run(&mut store, Operation::Sync).unwrap();
                run(&mut store, write(Some(2), 1, 2, 6)).unwrap();
                folder.plan(event, Fault::Error);
                let result = run(&mut store, operation());
                if result.is_ok() {
                    assert!(event == 3 && matches!(result, Ok(Outcome::Synced { .. })));
                    continue;
                }
                assert!(matches!(result, Err(StoreError::Io { .. })));
                for refused in
                    [Operation::Sync, Operation::Read { extent: extent(0, 1), snapshot: None }, write(Some(3), 0, 1, 7), operation()]
                {
                    assert!(matches!(run(&mut store, refused), Err(StoreError::Poisoned(_))));
                }
                drop(store);
                if evicted {
                    folder.evict();
                }
                let mut store = open(&folder);
                let opened = store.replicas()[0];
                assert!((1..=2).contains(&opened.position.get()), "{}", opened.position);
                assert_eq!((opened.position, opened.state.content), (opened.durable, Content::Mixed));
                assert_eq!(read(&mut store, 0, 1).unwrap(), pattern(0, 5));
                let found = read(&mut store, 1, 1).unwrap();
                let either = |index: usize| found[index] == pattern(1, 5)[index] || found[index] == pattern(1, 6)[index];
                assert!((0..BLOCK).all(either));
            }
        }
    }
}

#[test]
fn a_failed_write_stops_writes_and_is_settled_by_the_next_start() {
    // Events: the log record, the bytes, the entries, the applied record.
    for event in 1..=4 {
        let folder = NastyFolder::new(event + 10);
        folder.calm();
        let mut store = open(&folder);
        store.create(spec(BLOCKS)).unwrap();
        run(&mut store, write(Some(1), 0, 4, 5)).unwrap();
        folder.plan(event, Fault::Error);
        assert!(matches!(run(&mut store, write(Some(2), 1, 2, 6)), Err(StoreError::Io { .. })));
        assert!(matches!(run(&mut store, write(None, 5, 1, 6)), Err(StoreError::Poisoned(_))));
        assert_eq!(store.replicas()[0].position, Seq::new(1));
        assert_eq!(read(&mut store, 3, 1).unwrap(), pattern(3, 5));
        assert!(matches!(run(&mut store, Operation::Sync), Ok(Outcome::Synced { durable }) if durable == Seq::new(1)));
        assert!(store.close().is_err());
        let mut store = open(&folder);
        assert!((1..=2).contains(&store.replicas()[0].position.get()));
        let found = read(&mut store, 0, 4).unwrap();
        assert!(found[..BLOCK] == pattern(0, 5) && found[3 * BLOCK..] == pattern(3, 5));
        if event > 1 {
            assert_eq!(logged(&mut store, 1), LoggedExtents::All(vec![extent(1, 2)]));
        }
    }
}

#[test]
fn creation_and_deletion_are_all_or_nothing_at_every_event() {
    for power_loss in [false, true] {
        for event in 0..24 {
            let folder = NastyFolder::new(event + 1);
            let mut store = open(&folder);
            folder.plan(event + 1, Fault::Down);
            let created = store.create(spec(BLOCKS));
            let deleted = created.is_ok().then(|| store.delete(VOLUME));
            store.abandon();
            if power_loss {
                folder.reboot(512)
            } else {
                folder.restart()
            }
            let mut store = open_boot(&folder, if power_loss { OTHER_BOOT } else { BOOT });
            assert_eq!(store.unusable().count(), 0, "event {event}");
            match (created.is_ok(), deleted.map(|result| result.is_ok())) {
                (true, Some(true)) => assert!(store.replicas().is_empty(), "event {event}"),
                // Whoever asked does not know, and asks again.
                (true, _) | (false, _) => assert!(store.replicas().len() <= 1),
            }
            store.create(spec(BLOCKS)).unwrap();
            run(&mut store, write(Some(1), 0, 1, 5)).unwrap();
            assert_eq!(read(&mut store, 0, 2).unwrap(), [pattern(0, 5), vec![0; BLOCK]].concat());
            store.close().unwrap();
        }
    }
}

#[test]
fn a_full_store_makes_nothing() {
    let folder = NastyFolder::new(5);
    folder.set_free(20_000);
    let mut store = open(&folder);
    let before = folder.events();
    assert!(matches!(store.create(spec(BLOCKS)), Err(StoreError::NoSpace { .. })));
    assert_eq!(folder.events(), before);
}
