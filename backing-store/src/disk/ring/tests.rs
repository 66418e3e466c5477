use std::collections::HashMap;
use std::os::unix::fs::FileExt;

use rustix::event::{PollFd, PollFlags, Timespec as PollTime, poll};

use super::*;
use crate::buffer::{Buffer, BufferPool};
use crate::disk::DiskBlock;

const BLOCK: usize = BLOCK_SIZE as usize;
const BLOCKS: u64 = 4096;

/// A sparse file without a name, opened as stores open theirs.
fn file_in(folder: &str) -> File {
    let folder = tempfile::tempdir_in(folder).unwrap();
    let path = folder.path().join("blocks");
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = crate::disk::place::open_direct(&mut options, &path, 0).unwrap();
    file.set_len(BLOCKS * BLOCK as u64).unwrap();
    file
}

fn usual_folder() -> String {
    std::env::temp_dir().to_str().unwrap().to_owned()
}

fn disk() -> RingDisk {
    RingDisk::new(file_in(&usual_folder())).unwrap()
}

fn submit(disk: &mut RingDisk, id: u64, work: DiskWork) {
    disk.submit(DiskRequest { id: IoId(id), work });
}

fn run(disk: &mut RingDisk, work: DiskWork) -> io::Result<Option<Buffer>> {
    submit(disk, 0, work);
    let mut done = Vec::new();
    while done.is_empty() {
        disk.wait().unwrap();
        disk.reap(&mut done);
    }
    assert_eq!(done.len(), 1);
    done.remove(0).result
}

fn pool() -> BufferPool {
    BufferPool::new(1 << 20)
}

/// Blocks that each begin with their number.
fn numbered(first: u64, blocks: usize) -> SharedBuffer {
    let mut buffer = pool().take(blocks * BLOCK);
    for (number, block) in (first..).zip(buffer.chunks_exact_mut(BLOCK)) {
        block.fill(number.to_le_bytes()[0]);
        block[..8].copy_from_slice(&number.to_le_bytes());
    }
    buffer.share()
}

fn read(disk: &mut RingDisk, at: u64, blocks: usize) -> Buffer {
    let mut buffer = pool().take(blocks * BLOCK);
    buffer.fill(0xee);
    run(disk, DiskWork::Read { at: DiskBlock::new(at), buffer }).unwrap().unwrap()
}

/// Whether these blocks hold their numbers.
fn check_numbered(disk: &mut RingDisk, at: u64, blocks: usize) {
    for (index, part) in (0..blocks).step_by(256).enumerate() {
        let (at, count) = (at + index as u64 * 256, (blocks - part).min(256));
        assert_eq!(*read(disk, at, count), *numbered(at, count), "from block {at}");
    }
}

fn write(at: u64, pieces: Vec<SharedBuffer>) -> DiskWork {
    DiskWork::Write { at: DiskBlock::new(at), pieces }
}

/// Whether the disk wants to be reaped within so many milliseconds.
fn is_awake(disk: &RingDisk, millis: i64) -> bool {
    let timeout = PollTime { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 };
    let wake = disk.wake_fd().unwrap();
    let mut fds = [PollFd::new(&wake, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&timeout)) {
            // COOP_TASKRUN: the kernel interrupts us to run a completion.
            Err(rustix::io::Errno::INTR) => {}
            found => return found.unwrap() == 1,
        }
    }
}

/// Checks that nothing is left to reap, and that the disk knows. A worker of the kernel may tell the eventfd a moment after the
/// completion was there to take, so it may take a few rounds.
fn settle(disk: &mut RingDisk) {
    let mut done = Vec::new();
    for _ in 0..100 {
        disk.reap(&mut done);
        assert!(done.is_empty());
        if !is_awake(disk, 0) {
            return;
        }
    }
    panic!("it stays awake for nothing");
}

#[test]
fn everything_works_on_a_file_system_and_in_memory() {
    for folder in [usual_folder().as_str(), "/dev/shm"] {
        let mut disk = RingDisk::new(file_in(folder)).unwrap();
        assert_eq!((disk.blocks(), disk.wants_discards()), (BLOCKS, false));
        run(&mut disk, write(7, vec![numbered(7, 3)])).unwrap();
        run(&mut disk, write(10, vec![numbered(10, 1), numbered(11, 2), numbered(13, 512)])).unwrap();
        run(&mut disk, DiskWork::Sync).unwrap();
        check_numbered(&mut disk, 7, 518);
        assert!(disk.preparable().unwrap().unwrap() > 0);
        let (at, count) = (DiskBlock::new(2048), 2048);
        run(&mut disk, DiskWork::Prepare { at, count }).unwrap();
        assert!(disk.file.metadata().unwrap().blocks() > 2048 * 8, "the space is there");
        run(&mut disk, DiskWork::Discard { at, count }).unwrap();
        assert!(disk.file.metadata().unwrap().blocks() > 2048 * 8, "nobody asked for holes");
        disk.punch_holes(true);
        run(&mut disk, DiskWork::Discard { at, count }).unwrap();
        assert!(disk.file.metadata().unwrap().blocks() < 2048 * 8);
        check_numbered(&mut disk, 7, 518);
        let (at, count) = (DiskBlock::new(0), BLOCKS);
        run(&mut disk, DiskWork::Prepare { at, count }).unwrap();
        assert_eq!(disk.preparable().unwrap(), None, "all space is there");
        assert_eq!(disk.file.metadata().unwrap().len(), BLOCKS * BLOCK as u64);
    }
}

#[test]
fn a_write_of_very_many_pieces_is_split_and_complete() {
    let mut disk = disk();
    let all: Vec<SharedBuffer> = (0..2500).map(|number| numbered(100 + number, 1)).collect();
    submit(&mut disk, 0, write(100, all));
    assert_eq!(disk.waiting.len(), 3);
    disk.wait().unwrap();
    check_ends(&mut disk, 1);
    check_numbered(&mut disk, 100, 2500);
}

/// Reaps until so many requests have ended well, each once.
fn check_ends(disk: &mut RingDisk, count: usize) {
    let mut seen = HashMap::new();
    let mut done = Vec::new();
    while seen.len() < count {
        disk.wait().unwrap();
        disk.reap(&mut done);
        for done in done.drain(..) {
            done.result.unwrap();
            assert_eq!(seen.insert(done.id, ()), None);
        }
    }
    assert!(disk.jobs.is_empty() && disk.parts.is_empty() && disk.waiting.is_empty());
    assert_eq!(disk.in_kernel, 0);
    settle(disk);
}

#[test]
fn more_requests_than_the_ring_holds_wait_for_their_turn() {
    let mut disk = disk();
    for number in 0..1000 {
        submit(&mut disk, number, write(number, vec![numbered(number, 1)]));
    }
    check_ends(&mut disk, 1000);
    check_numbered(&mut disk, 0, 1000);
    for number in 0..1000 {
        submit(&mut disk, number, DiskWork::Read { at: DiskBlock::new(number), buffer: pool().take(BLOCK) });
    }
    check_ends(&mut disk, 1000);
}

/// Submits work, and answers for the kernel as long as `answers` lasts.
fn answered(disk: &mut RingDisk, work: DiskWork, answers: &[i32]) -> io::Result<Option<Buffer>> {
    submit(disk, 0, work);
    for answer in answers {
        let index = disk.waiting.pop_front().unwrap();
        assert!(disk.entry(index).is_some());
        disk.on_completed(index, *answer);
    }
    let mut done = Vec::new();
    disk.wait().unwrap();
    disk.reap(&mut done);
    done.remove(0).result
}

#[test]
fn short_reads_and_writes_go_on_where_they_ended() {
    let mut disk = disk();
    run(&mut disk, write(0, vec![numbered(0, 8)])).unwrap();
    let mut buffer = pool().take(8 * BLOCK);
    buffer[..3 * BLOCK].copy_from_slice(&numbered(0, 3));
    let work = DiskWork::Read { at: DiskBlock::new(0), buffer };
    let filled = answered(&mut disk, work, &[BLOCK as i32, 2 * BLOCK as i32]).unwrap().unwrap();
    assert_eq!(*filled, *numbered(0, 8));

    // What the kernel claims to have written stays as it was: holes.
    let pieces = vec![numbered(20, 2), numbered(22, 1), numbered(23, 4)];
    answered(&mut disk, write(20, pieces), &[BLOCK as i32, 3 * BLOCK as i32]).unwrap();
    assert!(read(&mut disk, 20, 4).iter().all(|byte| *byte == 0));
    check_numbered(&mut disk, 24, 3);
    answered(&mut disk, write(30, vec![numbered(30, 4)]), &[2 * BLOCK as i32]).unwrap();
    assert!(read(&mut disk, 30, 2).iter().all(|byte| *byte == 0));
    check_numbered(&mut disk, 32, 2);

    let work = DiskWork::Read { at: DiskBlock::new(0), buffer: pool().take(BLOCK) };
    assert_eq!(answered(&mut disk, work, &[0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(answered(&mut disk, write(0, vec![numbered(0, 1)]), &[0]).unwrap_err().kind(), io::ErrorKind::WriteZero);
}

#[test]
fn what_may_be_tried_again_is_and_a_sync_never() {
    let mut disk = disk();
    let errno = |result: io::Result<Option<Buffer>>| result.unwrap_err().raw_os_error().unwrap();
    answered(&mut disk, write(0, vec![numbered(0, 2)]), &[-libc::EINTR, -libc::EAGAIN]).unwrap();
    check_numbered(&mut disk, 0, 2);
    let for_ever = [-libc::EAGAIN; TRIES_MAX as usize + 1];
    assert_eq!(errno(answered(&mut disk, write(0, vec![numbered(0, 1)]), &for_ever)), libc::EAGAIN);
    assert_eq!(errno(answered(&mut disk, write(0, vec![numbered(0, 1)]), &[-libc::EIO])), libc::EIO);
    for error in [libc::EINTR, libc::EAGAIN, libc::EIO] {
        assert_eq!(errno(answered(&mut disk, DiskWork::Sync, &[-error])), error);
    }
    let (at, count) = (DiskBlock::new(0), 1);
    assert_eq!(errno(answered(&mut disk, DiskWork::Prepare { at, count }, &[-libc::EOPNOTSUPP, -libc::ENOSPC])), libc::ENOSPC);
    assert!(!disk.write_zeroes, "it isn't tried in vain each time");
    disk.punch_holes(true);
    answered(&mut disk, DiskWork::Discard { at, count }, &[-libc::EOPNOTSUPP]).unwrap();
    assert!(!disk.wants_discards());

    // One part of two fails: so does the whole, when both have ended.
    let pieces = (0..VECTORS_MAX as u64 + 1).map(|number| numbered(number, 1)).collect();
    assert_eq!(errno(answered(&mut disk, write(0, pieces), &[-libc::EIO])), libc::EIO);
}

#[test]
fn work_that_no_disk_could_do_ends_with_an_error() {
    let mut disk = disk();
    let odd = numbered(0, 2).slice(512..512 + BLOCK);
    for work in [write(BLOCKS, vec![numbered(0, 1)]), write(0, vec![odd]), write(0, vec![])] {
        submit(&mut disk, 0, work);
        assert!(is_awake(&disk, 0));
        let mut done = Vec::new();
        disk.reap(&mut done);
        assert_eq!(done.remove(0).result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        settle(&mut disk);
    }
    disk.wait().unwrap();
}

#[test]
fn it_wakes_when_something_has_ended_and_then_no_more() {
    let mut disk = disk();
    assert!(!is_awake(&disk, 0));
    for round in 0..100 {
        submit(&mut disk, round, if round % 3 == 0 { DiskWork::Sync } else { write(round, vec![numbered(round, 1)]) });
        let mut done = Vec::new();
        disk.reap(&mut done);
        while done.is_empty() {
            assert!(is_awake(&disk, 5000), "round {round}");
            disk.reap(&mut done);
        }
        settle(&mut disk);
    }
    assert!(!is_awake(&disk, 50));

    submit(&mut disk, 0, write(0, vec![numbered(0, 1)]));
    disk.wait().unwrap();
    assert!(is_awake(&disk, 5000), "what was waited for is not reaped yet");
}

#[test]
fn another_ring_of_the_same_thread_can_wait_for_it() {
    let mut disk = disk();
    let mut other: IoUring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(8).unwrap();
    let wake = Fd(disk.wake_fd().unwrap().as_raw_fd());
    let entry = opcode::PollAdd::new(wake, u32::from(libc::POLLIN.cast_unsigned())).build();
    let mut is_polled = false;
    for round in 0..200 {
        let with_alarm = round % 2 == 1;
        if with_alarm {
            disk.set_alarm(Some(disk.now() + Duration::from_micros(300)));
        } else {
            submit(&mut disk, round, write(round, vec![numbered(round, 1)]));
        }
        let mut done = Vec::new();
        loop {
            disk.reap(&mut done);
            if !done.is_empty() || with_alarm && disk.alarm.is_none() {
                break;
            }
            if !is_polled {
                // SAFETY: a poll points to no memory.
                unsafe { other.submission().push(&entry) }.unwrap();
                is_polled = true;
            }
            if let Err(error) = other.submit_and_wait(1) {
                assert_eq!(error.raw_os_error(), Some(libc::EINTR));
            }
            is_polled &= other.completion().count() == 0;
        }
    }
}

#[test]
fn the_alarm_goes_off_once_at_its_time_however_it_is_moved() {
    let mut disk = disk();
    let from_now = |disk: &RingDisk, millis| Some(disk.now() + Duration::from_millis(millis));
    // Moved far away and back: one timer, and no wake before its time.
    disk.set_alarm(from_now(&disk, 3_600_000));
    disk.set_alarm(from_now(&disk, 350));
    let at = from_now(&disk, 300);
    disk.set_alarm(at);
    assert!(!is_awake(&disk, 10));
    assert!(is_awake(&disk, 5000));
    assert!(Some(disk.now()) >= at);
    settle(&mut disk);
    assert_eq!((disk.alarm, disk.timer), (None, None));
    assert!(!is_awake(&disk, 100), "neither the first nor the second time of it comes");

    // Moved away: the timer goes off for nothing, once, and is armed anew.
    disk.set_alarm(from_now(&disk, 10));
    let at = from_now(&disk, 60);
    disk.set_alarm(at);
    while disk.alarm.is_some() {
        assert!(is_awake(&disk, 5000));
        disk.reap(&mut Vec::new());
    }
    assert!(Some(disk.now()) >= at);

    // Taken back: at most one wake for nothing.
    disk.set_alarm(from_now(&disk, 10));
    disk.set_alarm(None);
    assert!(is_awake(&disk, 5000));
    settle(&mut disk);
    assert!(!is_awake(&disk, 50));

    // In the past.
    disk.set_alarm(Some(Duration::ZERO));
    assert!(is_awake(&disk, 5000));
    settle(&mut disk);
    // While something else is waited for.
    disk.set_alarm(from_now(&disk, 1));
    for round in 0..50 {
        run(&mut disk, write(round, vec![numbered(round, 1)])).unwrap();
        disk.set_alarm(from_now(&disk, round % 3));
    }
    while disk.alarm.is_some() {
        assert!(is_awake(&disk, 5000));
        disk.reap(&mut Vec::new());
    }
}

#[test]
fn dropping_it_waits_for_what_is_in_flight() {
    let file = file_in(&usual_folder());
    let again = file.try_clone().unwrap();
    let pool = BufferPool::new(64 << 20);
    let mut disk = RingDisk::new(file).unwrap();
    disk.set_alarm(Some(Duration::from_secs(3600)));
    for number in 0..200 {
        submit(&mut disk, number, write(number, vec![numbered(number, 1)]));
        submit(&mut disk, number + 1000, DiskWork::Read { at: DiskBlock::new(2000 + number), buffer: pool.take(BLOCK) });
    }
    disk.push_waiting();
    let submitted = disk.in_kernel as u64 / 2;
    disk.enter(0).unwrap();
    let begun = Instant::now();
    drop(disk);
    assert!(begun.elapsed() < Duration::from_secs(60), "the alarm is not waited for");
    let mut buffer = pool.take(BLOCK);
    for number in 0..submitted {
        again.read_exact_at(&mut buffer, number * BLOCK as u64).unwrap();
        assert_eq!(*buffer, *numbered(number, 1));
    }
}
