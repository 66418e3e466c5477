//! The records on a disk that takes nothing for a while.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use redb::{Database, StorageBackend};

use super::redb_store::RedbStore;
use super::tests::{store, volume};
use super::{MetadataError, MetadataStore, Mutation};

/// A file whose disk may be full: at once, or after so many writes.
#[derive(Debug)]
struct Disk {
    file: File,
    full: Arc<AtomicBool>,
    room: Arc<AtomicU32>,
}

impl Disk {
    fn take(&self) -> io::Result<()> {
        let is_full = self.full.load(Ordering::SeqCst)
            && self.room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |room| room.checked_sub(1)).is_err();
        if is_full { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.take()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.take()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.take()?;
        self.file.write_all_at(data, offset)
    }
}

#[tokio::test]
async fn records_are_written_again_when_there_is_room() {
    for room in 0..12 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.redb");
        let (full, left) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(room)));
        let opened = (path.clone(), Arc::clone(&full), Arc::clone(&left));
        let open = move || {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&opened.0).unwrap();
            Database::builder().create_with_backend(Disk { file, full: Arc::clone(&opened.1), room: Arc::clone(&opened.2) })
        };
        let metadata = RedbStore::open_by(&path, Box::new(open)).unwrap();
        metadata.apply(Mutation::PutStore(store(1))).await.unwrap();
        let before = metadata.state();

        full.store(true, Ordering::SeqCst);
        let insert = || Mutation::InsertVolume(volume(5, "vm1", &[1]).into());
        let mut attempts = 0;
        while metadata.apply(insert()).await.is_ok() {
            // There was room for it: the next change will find none.
            metadata.apply(Mutation::RemoveVolume(volume(5, "vm1", &[1]).id)).await.ok();
            attempts += 1;
            assert!(attempts < 12, "the disk is full");
        }
        let error = metadata.apply(insert()).await.unwrap_err();
        let trouble = metadata.trouble().unwrap();
        assert!(matches!(error, MetadataError::Storage { .. }) && trouble.why == error.to_string(), "{error}");
        assert_eq!(metadata.state().stores, before.stores, "what there was can still be read");

        full.store(false, Ordering::SeqCst);
        // A change that nobody was told of may have been made: then it shows now.
        match metadata.apply(insert()).await {
            Ok(_) | Err(MetadataError::NameTaken(_)) => {}
            Err(error) => panic!("with room for {room} writes: {error}"),
        }
        metadata.apply(Mutation::PutStore(store(2))).await.unwrap();
        assert_eq!(metadata.trouble(), None);
        let state = metadata.state();
        assert_eq!((state.stores.len(), state.volumes.len()), (2, 1));
        drop(metadata);
        assert_eq!(RedbStore::open(&path).unwrap().state(), state, "with room for {room} writes");
    }
}
