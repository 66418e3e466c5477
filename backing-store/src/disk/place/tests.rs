use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use super::*;

const SIZE: ByteLength = ByteLength::new(64 << 20);

fn options() -> PlaceOptions {
    PlaceOptions { size: Some(SIZE), ..PlaceOptions::default() }
}

fn run(disk: &mut RingDisk, work: DiskWork) -> io::Result<()> {
    disk.submit(DiskRequest { id: IoId(0), work });
    finish_one(disk)?.result.map(|_| ())
}

fn write(disk: &mut RingDisk, byte: u8) -> io::Result<()> {
    let mut buffer = BufferPool::new(0).take(BLOCK_SIZE as usize);
    buffer.fill(byte);
    buffer[..8].copy_from_slice(&MAGIC);
    run(disk, DiskWork::Write { at: DiskBlock::new(0), pieces: vec![buffer.share()] })
}

fn says(result: Result<RingDisk, StoreError>, words: &[&str]) -> StoreError {
    let error = result.unwrap_err();
    for word in words {
        assert!(error.to_string().contains(word), "{word:?} is not in {error}");
    }
    error
}

#[test]
fn a_store_is_made_published_opened_and_not_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/store");
    let (place, name) = (StorePlace::new(&path), path.to_str().unwrap());
    says(place.open(Access::Exclusive), &[name, "not a Carrick store", "no such folder"]);

    let mut disk = place.create(&options()).unwrap();
    assert_eq!(disk.blocks(), SIZE.get() / 4096);
    says(place.open(Access::Exclusive), &[name, "not a Carrick store", "interrupted"]);
    assert!(matches!(place.create(&options()), Err(StoreError::InUse(_))), "somebody else is at it");
    write(&mut disk, 1).unwrap();
    drop(disk);

    let mut disk = place.create(&options()).unwrap();
    assert!(disk.preparable().unwrap().is_some(), "it is sparse, and what an interrupted format wrote is gone");
    write(&mut disk, 2).unwrap();
    run(&mut disk, DiskWork::Sync).unwrap();
    place.publish().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&path.join("blocks"))), (0o700, 0o600));
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1);

    assert!(matches!(place.open(Access::Exclusive), Err(StoreError::InUse(_))), "its maker has it");
    let mut looked_at = place.open(Access::ReadOnly).unwrap();
    assert_eq!(write(&mut looked_at, 3).unwrap_err().raw_os_error(), Some(libc::EBADF));
    drop(looked_at);
    assert!(matches!(place.open(Access::Exclusive), Err(StoreError::InUse(_))), "the lock is the maker's still");
    drop(disk);
    let disk = place.open(Access::Exclusive).unwrap();
    assert_eq!(disk.blocks(), SIZE.get() / 4096);
    drop(disk);
    for _ in 0..20 {
        let mut disk = place.open(Access::Exclusive).unwrap();
        disk.submit(DiskRequest { id: IoId(0), work: DiskWork::Sync });
        disk.reap(&mut Vec::new());
    }
    assert!(matches!(says(place.create(&options()), &[name, "already"]), StoreError::Occupied { .. }));
    assert_eq!(fs::read(path.join("blocks")).unwrap()[8..10], [2, 2], "and it is as it was");
}

#[test]
fn the_page_cache_is_passed_by_where_that_works_and_only_there() {
    let is_direct = |file: &File| rustix::fs::fcntl_getfl(file).unwrap().contains(rustix::fs::OFlags::DIRECT);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, "").unwrap();
    let can = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).is_ok();
    assert_eq!(is_direct(&open_direct(OpenOptions::new().read(true), &path, 0).unwrap()), can);
    let elsewhere = open_direct(OpenOptions::new().read(true), Path::new("/proc/self/status"), 0).unwrap();
    assert!(!is_direct(&elsewhere), "a file system that can't");
}

#[test]
fn what_is_no_store_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let (place, name) = (StorePlace::new(folder.path()), folder.path().to_str().unwrap());
    fs::create_dir(folder.path().join("lost+found")).unwrap();
    says(place.open(Access::ReadOnly), &[name, "not a Carrick store", "no file blocks"]);
    drop(place.create(&options()).unwrap());

    fs::write(folder.path().join("thesis.txt"), "precious").unwrap();
    says(place.create(&options()), &[name, "thesis.txt"]);
    fs::create_dir(folder.path().join("replicas")).unwrap();
    fs::write(folder.path().join("carrick-store"), "old").unwrap();
    for refused in [place.create(&options()), place.open(Access::Exclusive), place.open(Access::ReadOnly)] {
        assert!(matches!(says(refused, &[name, "no longer read", "format a new store elsewhere"]), StoreError::OldFormat(_)));
    }
    fs::remove_file(folder.path().join("carrick-store")).unwrap();

    let thesis = StorePlace::new(&folder.path().join("thesis.txt"));
    says(thesis.open(Access::ReadOnly), &["neither a folder nor a block device"]);
    says(thesis.create(&options()), &["neither a folder nor a block device"]);
    fs::write(folder.path().join("blocks"), "short").unwrap();
    says(place.open(Access::ReadOnly), &[name, "empty"]);
    fs::remove_file(folder.path().join("blocks")).unwrap();
    symlink("/dev/null", folder.path().join("blocks")).unwrap();
    says(place.open(Access::ReadOnly), &[name, "blocks"]);
}

#[test]
fn a_size_is_checked_rounded_and_by_default_the_file_systems() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("store");
    let place = StorePlace::new(&path);
    let sized = |size| PlaceOptions { size: Some(ByteLength::new(size)), ..PlaceOptions::default() };
    let error = says(place.create(&sized(SIZE.get() - 1)), &[path.to_str().unwrap(), "67108863", "67108864"]);
    assert!(matches!(error, StoreError::StoreSize { .. }));
    assert!(!path.exists(), "nothing was made");
    let disk = place.create(&sized(SIZE.get() + 5000)).unwrap();
    assert_eq!(disk.blocks(), SIZE.get() / 4096);
    drop(disk);
    let on_disk = tempfile::tempdir().unwrap();
    says(StorePlace::new(on_disk.path()).create(&sized(u64::MAX >> 1)), &["smaller"]);

    let found = statvfs(folder.path()).unwrap();
    let disk = place.create(&PlaceOptions::default()).unwrap();
    assert_eq!(disk.blocks(), found.f_blocks * found.f_frsize / UNIT * 256);
    drop(disk);
    // Twice what there is in all: nothing could free so much while the test runs, and nothing must be written.
    let too_much = PlaceOptions { prewrite: true, ..sized(2 * found.f_blocks * found.f_frsize) };
    assert!(matches!(place.create(&too_much), Err(StoreError::NoSpace { .. })), "found before the first byte is written");
}

#[test]
fn a_store_written_in_advance_needs_no_more_space() {
    let folder = tempfile::tempdir().unwrap();
    let place = StorePlace::new(folder.path());
    let disk = place.create(&PlaceOptions { prewrite: true, ..options() }).unwrap();
    assert_eq!(disk.preparable().unwrap(), None);
    assert!(fs::read(folder.path().join("blocks.new")).unwrap().iter().all(|byte| *byte == 0));
}

/// A block device that is a file.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Self {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_device_is_taken_only_if_it_is_empty_and_free() {
    let folder = tempfile::tempdir().unwrap();
    let backing = folder.path().join("backing");
    File::create(&backing).unwrap().set_len(80 << 20).unwrap();
    let device = Loop::new(&backing);
    let place = StorePlace::new(Path::new(&device.0));

    let mut disk = place.create(&PlaceOptions::default()).unwrap();
    assert_eq!((disk.blocks(), disk.preparable().unwrap()), ((80 << 20) / 4096, None));
    assert!(disk.wants_discards(), "a loop device punches holes");
    assert!(matches!(place.open(Access::Exclusive), Err(StoreError::DeviceInUse(_))));
    write(&mut disk, 1).unwrap();
    let (at, count) = (DiskBlock::new(1000), 1000);
    run(&mut disk, DiskWork::Prepare { at, count }).unwrap();
    run(&mut disk, DiskWork::Discard { at, count }).unwrap();
    assert!(disk.wants_discards(), "it did not fail");
    run(&mut disk, DiskWork::Sync).unwrap();
    place.publish().unwrap();
    drop(place.open(Access::ReadOnly).unwrap());
    drop(disk);
    says(place.create(&options()), &[&device.0, "already"]);
    drop(place.open(Access::Exclusive).unwrap());

    let forced = PlaceOptions { force: true, ..options() };
    let disk = place.create(&forced).unwrap();
    assert_eq!(disk.blocks(), SIZE.get() / 4096, "smaller than the device, as asked for");
    drop(disk);
    drop(place.create(&options()).unwrap());
    says(place.create(&PlaceOptions { size: Some(ByteLength::new(81 << 20)), ..options() }), &["83886080"]);

    assert!(Command::new("mkfs.ext4").args(["-q", &device.0]).status().unwrap().success());
    says(place.create(&options()), &[&device.0, "not empty"]);
    let mounted = folder.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    assert!(Command::new("mount").args([Path::new(&device.0), &mounted]).status().unwrap().success());
    let refused = place.create(&forced);
    assert!(Command::new("umount").arg(&mounted).status().unwrap().success());
    assert!(matches!(says(refused, &[&device.0, "mounted"]), StoreError::DeviceInUse(_)));
    let disk = place.create(&PlaceOptions { prewrite: true, ..forced }).unwrap();
    drop(disk);
    drop(device);
    assert!(fs::read(&backing).unwrap()[..64 << 20].iter().all(|byte| *byte == 0));
}
