//! The store on a real file system: what it serves, what it refuses, and that it finds everything again.

use std::fs;

use super::*;

fn formatted() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    FileStore::format(&path).unwrap();
    (folder, path)
}

fn open(path: &Path) -> FileStore {
    FileStore::open_with(path, options(BOOT)).unwrap()
}

const _: () = {
    const fn moves_between_threads<T: Send>() {}
    moves_between_threads::<FileStore>();
};

#[test]
fn what_was_written_is_found_again_after_a_close() {
    let (_folder, path) = formatted();
    let mut store = open(&path);
    store.create(spec(1000)).unwrap();
    store.create(spec(1000)).unwrap();
    run(&mut store, write(Some(1), 2, 300, 5)).unwrap();
    run(&mut store, zeroes(Some(2), 100, 100)).unwrap();
    run(&mut store, write(None, 999, 1, 6)).unwrap();
    run(&mut store, set_state(9, Content::Complete, None)).unwrap();
    let id = store.id();
    store.close().unwrap();
    let mut store = FileStore::open_with(&path, options(OTHER_BOOT)).unwrap();
    assert_eq!(store.id(), id);
    let opened = store.replicas()[0];
    assert_eq!((opened.spec, opened.position, opened.durable), (spec(1000), Seq::new(2), Seq::new(2)));
    assert_eq!((opened.state.promised, opened.state.content), (Term::new(9), Content::Complete));
    assert_eq!(read(&mut store, 99, 1).unwrap(), pattern(99, 5));
    assert_eq!(read(&mut store, 100, 100).unwrap(), [0; 100 * BLOCK]);
    assert_eq!(read(&mut store, 199, 2).unwrap(), [vec![0; BLOCK], pattern(200, 5)].concat());
    assert_eq!(read(&mut store, 999, 1).unwrap(), pattern(999, 6));
    assert_eq!(logged(&mut store, 0), LoggedExtents::All(vec![extent(2, 300), extent(100, 100)]));
}

#[test]
fn a_kill_keeps_what_was_completed() {
    let (_folder, path) = formatted();
    let mut store = open(&path);
    store.create(spec(100)).unwrap();
    run(&mut store, write(Some(1), 0, 50, 5)).unwrap();
    assert!(matches!(run(&mut store, Operation::Sync).unwrap(), Outcome::Synced { durable } if durable == Seq::new(1)));
    run(&mut store, write(Some(2), 10, 1, 6)).unwrap();
    store.abandon();
    let mut store = open(&path);
    let opened = store.replicas()[0];
    assert_eq!((opened.position, opened.durable, opened.state.content), (Seq::new(2), Seq::new(1), Content::Complete));
    assert_eq!(read(&mut store, 9, 2).unwrap(), [pattern(9, 5), pattern(10, 6)].concat());
    assert_eq!(logged(&mut store, 1), LoggedExtents::All(vec![extent(10, 1)]));
}

#[test]
fn a_loss_of_power_falls_back_to_the_durable_position() {
    let (_folder, path) = formatted();
    let mut store = open(&path);
    store.create(spec(100)).unwrap();
    run(&mut store, write(Some(1), 0, 50, 5)).unwrap();
    run(&mut store, Operation::Sync).unwrap();
    run(&mut store, write(Some(2), 10, 1, 6)).unwrap();
    store.abandon();
    let mut store = FileStore::open_with(&path, options(OTHER_BOOT)).unwrap();
    let opened = store.replicas()[0];
    assert_eq!((opened.position, opened.durable, opened.state.content), (Seq::new(1), Seq::new(1), Content::Mixed));
    assert_eq!(logged(&mut store, 1), LoggedExtents::Forgotten);
    run(&mut store, set_state(3, Content::Complete, Some(0))).unwrap();
    assert_eq!(logged(&mut store, 0), LoggedExtents::All(vec![]));
    assert!(matches!(run(&mut store, write(Some(2), 10, 1, 6)), Err(StoreError::Misuse { .. })));
    run(&mut store, write(Some(1), 10, 1, 7)).unwrap();
    assert_eq!(read(&mut store, 10, 1).unwrap(), pattern(10, 7));
}

#[test]
fn reads_see_all_writes_before_them_and_none_after() {
    let (_folder, path) = formatted();
    let mut store = open(&path);
    store.create(spec(64)).unwrap();
    for round in 0..500_u64 {
        let fill = u8::try_from(round % 250).unwrap() + 1;
        store.submit(VOLUME, Token(0), write(Some(round * 2 + 1), 0, 64, fill));
        store.submit(VOLUME, Token(1), Operation::Read { extent: extent(round % 60, 4), snapshot: None });
        store.submit(VOLUME, Token(2), write(Some(round * 2 + 2), 0, 64, fill + 1));
        store.submit(VOLUME, Token(3), Operation::Sync);
        let mut done = wait(&mut store, 4);
        let Ok(Outcome::Read(ReadData::Blocks { data, .. })) = done.remove(&Token(1)).unwrap() else { panic!() };
        assert_eq!(data[9], fill);
        assert!(done.into_values().all(|result| result.is_ok()));
    }
    assert_eq!(store.replicas()[0].position, Seq::new(1000));
}

#[test]
fn a_store_has_one_user_and_a_folder_one_store() {
    let (folder, path) = formatted();
    let store = open(&path);
    assert!(matches!(FileStore::open(&path), Err(StoreError::InUse(_))));
    drop(store);
    drop(open(&path));
    assert!(matches!(FileStore::format(&path), Err(StoreError::NotAStore { .. })));
    assert!(matches!(FileStore::open(folder.path()), Err(StoreError::NotAStore { .. })));
    let other = folder.path().join("other");
    fs::create_dir_all(other.join("lost+found")).unwrap();
    fs::create_dir(other.join("replicas")).unwrap();
    FileStore::format(&other).unwrap();
    let home = folder.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("thesis"), "text").unwrap();
    assert!(matches!(FileStore::format(&home), Err(StoreError::NotAStore { .. })));
}

#[test]
fn creation_needs_room_and_deletion_gives_it_back() {
    let (_folder, path) = formatted();
    let mut store = open(&path);
    let free = store.usage().unwrap().free.get();
    let size = VolumeSize::new((free / 4096 + 1) * 8192).unwrap();
    assert!(matches!(store.create(ReplicaSpec { volume: VOLUME, size }), Err(StoreError::NoSpace { .. })));
    assert_eq!(fs::read_dir(path.join("replicas")).unwrap().count(), 0);
    store.create(spec(1 << 14)).unwrap();
    assert!(matches!(store.create(spec(1)), Err(StoreError::Conflict { .. })));
    assert!(store.usage().unwrap().used.get() > 64 << 20);
    store.delete(VOLUME).unwrap();
    store.delete(VOLUME).unwrap();
    assert_eq!((store.usage().unwrap().used, store.replicas().len()), (ByteLength::ZERO, 0));
    assert!(matches!(run(&mut store, Operation::Sync), Err(StoreError::UnknownVolume(_))));
    fs::write(path.join("replicas").join(format!("{VOLUME}.new")), "half").unwrap();
    drop(store);
    let mut store = open(&path);
    assert_eq!(fs::read_dir(path.join("replicas")).unwrap().count(), 0);
    store.create(spec(1)).unwrap();
}

#[test]
fn operations_in_flight_complete_although_the_replica_is_deleted() {
    let (_folder, path) = formatted();
    let mut store = open(&path);
    store.create(spec(512)).unwrap();
    for token in 0..100 {
        store.submit(VOLUME, Token(token), write(Some(token + 1), 0, 512, 5));
    }
    store.delete(VOLUME).unwrap();
    store.create(spec(1)).unwrap();
    assert!(wait(&mut store, 100).into_values().all(|result| result.is_ok()));
    assert_eq!(read(&mut store, 0, 1).unwrap(), [0; BLOCK]);
}

#[test]
fn a_hole_gives_back_no_old_bytes_even_from_the_disk() {
    let (_folder, path) = formatted();
    let mut store = open(&path);
    store.create(spec(600)).unwrap();
    run(&mut store, write(Some(1), 0, 512, 5)).unwrap();
    run(&mut store, write(Some(2), 512, 88, 5)).unwrap();
    run(&mut store, zeroes(Some(3), 1, 598)).unwrap();
    store.close().unwrap();
    let bytes = fs::read(path.join("replicas").join(VOLUME.to_string())).unwrap();
    let data = &bytes[bytes.len() - 600 * BLOCK..];
    assert_eq!(data[..BLOCK], pattern(0, 5));
    assert!(data[BLOCK..599 * BLOCK].iter().all(|byte| *byte == 0));
    assert_eq!(data[599 * BLOCK..], pattern(599, 5));
}

#[test]
fn the_log_reaches_back_as_far_as_it_holds() {
    let (_folder, path) = formatted();
    let mut store = open(&path);
    store.create(spec(64)).unwrap();
    for seq in 1..=150 {
        run(&mut store, write(Some(seq), seq % 64, 1, 5)).unwrap();
    }
    assert_eq!(logged(&mut store, 85), LoggedExtents::Forgotten);
    let LoggedExtents::All(mut extents) = logged(&mut store, 86) else { panic!() };
    extents.dedup();
    assert_eq!(extents.len(), 64);
    assert_eq!(logged(&mut store, 148), LoggedExtents::All(vec![extent(21, 1), extent(22, 1)]));
    assert_eq!(logged(&mut store, 150), LoggedExtents::All(vec![]));
}
