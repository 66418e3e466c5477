use std::collections::BTreeSet;

use rustix::io::Errno;

use super::super::IoId;
use super::*;
use crate::buffer::{Buffer, BufferPool, SharedBuffer};

/// A store in a few lines: it submits one thing and waits for its end.
struct User {
    disk: SimulatedDisk,
    next: u64,
    pool: BufferPool,
}

impl User {
    fn new(disk: &SimulatedDisk) -> Self {
        Self { disk: disk.clone(), next: 0, pool: BufferPool::new(0) }
    }

    fn submit(&mut self, work: DiskWork) -> IoId {
        let id = IoId(self.next);
        self.next += 1;
        self.disk.submit(DiskRequest { id, work });
        id
    }

    fn filled(&self, blocks: usize, byte: u8) -> SharedBuffer {
        let mut buffer = self.pool.take(blocks * BLOCK);
        buffer.fill(byte);
        buffer.share()
    }

    fn submit_write(&mut self, at: u64, blocks: usize, byte: u8) -> IoId {
        let pieces = vec![self.filled(blocks, byte)];
        self.submit(DiskWork::Write { at: DiskBlock::new(at), pieces })
    }

    fn finish(&mut self, id: IoId) -> io::Result<Option<Buffer>> {
        let mut done = Vec::new();
        loop {
            self.disk.wait()?;
            self.disk.reap(&mut done);
            if let Some(index) = done.iter().position(|done| done.id == id) {
                return done.swap_remove(index).result;
            }
        }
    }

    fn run(&mut self, work: DiskWork) -> io::Result<Option<Buffer>> {
        let id = self.submit(work);
        self.finish(id)
    }

    fn write(&mut self, at: u64, byte: u8) -> io::Result<()> {
        let id = self.submit_write(at, 1, byte);
        self.finish(id).map(|_| ())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.run(DiskWork::Sync).map(|_| ())
    }

    fn read(&mut self, at: u64) -> io::Result<Vec<u8>> {
        let buffer = self.pool.take(BLOCK);
        Ok(self.run(DiskWork::Read { at: DiskBlock::new(at), buffer })?.unwrap().to_vec())
    }
}

/// What is left if the power goes now.
fn cut(disk: &SimulatedDisk, seed: u64) -> SimulatedDisk {
    let fork = disk.fork();
    fork.power_cut(seed);
    fork
}

/// The bytes that a block's sectors consist of.
fn values(bytes: &[u8]) -> BTreeSet<u8> {
    bytes.iter().copied().collect()
}

#[test]
fn a_loss_of_power_leaves_any_value_since_the_last_sync_and_nothing_else() {
    let disk = SimulatedDisk::new(16, 1);
    let mut user = User::new(&disk);
    for byte in [1, 2] {
        user.write(3, byte).unwrap();
    }
    user.sync().unwrap();
    for byte in [3, 4] {
        user.write(3, byte).unwrap();
    }
    user.write(9, 9).unwrap();
    user.sync().unwrap();
    user.write(3, 5).unwrap();
    user.write(3, 6).unwrap();
    let (mut seen, mut torn) = (BTreeSet::new(), 0);
    for seed in 0..200 {
        let mut after = User::new(&cut(&disk, seed).reopen());
        let found = values(&after.read(3).unwrap());
        torn += usize::from(found.len() > 1);
        seen.extend(found);
        assert_eq!(values(&after.read(9).unwrap()), [9].into(), "synced");
    }
    assert_eq!(seen, [4, 5, 6].into(), "what the sync replaced never comes back");
    assert!((10..190).contains(&torn), "both torn and whole blocks are found: {torn} of 200 were torn");
    assert_eq!(values(&user.read(3).unwrap()), [6].into(), "the fork's fate is not ours");
}

#[test]
fn a_sync_covers_only_what_completed_before_it_was_submitted() {
    let disk = SimulatedDisk::new(16, 2);
    disk.set_garbage_when_unwritten(false);
    disk.set_manual_completion(true);
    let mut user = User::new(&disk);
    for at in [0, 1] {
        user.write(at, 1).unwrap();
    }
    user.submit_write(1, 1, 2);
    user.submit_write(2, 1, 2);
    user.submit(DiskWork::Sync);
    disk.complete_all();
    let mut seen = [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()];
    for seed in 0..50 {
        let fork = cut(&disk, seed);
        for (block, seen) in seen.iter_mut().enumerate() {
            seen.extend(values(&*fork.content(DiskBlock::new(block as u64))));
        }
    }
    assert_eq!(seen, [[1].into(), [1, 2].into(), [0, 2].into()]);
}

#[test]
fn a_kill_keeps_what_completed_and_may_tear_what_did_not() {
    let disk = SimulatedDisk::new(16, 3);
    disk.set_garbage_when_unwritten(false);
    disk.set_manual_completion(true);
    let mut user = User::new(&disk);
    let first = user.submit_write(0, 1, 1);
    user.finish(first).unwrap();
    user.submit_write(4, 2, 7);
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let fork = disk.fork();
        fork.kill(seed);
        assert_eq!(values(&*fork.content(DiskBlock::new(0))), [1].into());
        seen.insert([4, 5].map(|block| values(&*fork.content(DiskBlock::new(block)))));
    }
    let [none, whole, part] = [[0].into(), [7].into(), [0, 7].into()];
    for both in [[&none, &none], [&whole, &whole], [&whole, &none], [&part, &part]] {
        assert!(seen.contains(&both.map(BTreeSet::clone)), "{both:?} never happened");
    }

    disk.kill(0);
    user.submit_write(0, 1, 9);
    user.disk.reap(&mut Vec::new());
    assert!(user.disk.wait().is_err(), "a dead handle would wait for ever");
    let mut after = User::new(&disk.reopen());
    assert_eq!(values(&after.read(0).unwrap()), [1].into(), "a dead handle writes nothing");
    disk.power_cut(0);
    assert_eq!(disk.counters().syncs, 0, "a kill is no sync: the power may still take it");
}

#[test]
fn a_failed_sync_is_not_made_good_by_the_next() {
    let disk = SimulatedDisk::new(16, 4);
    disk.set_garbage_when_unwritten(false);
    let mut user = User::new(&disk);
    user.write(0, 1).unwrap();
    disk.fail_next_sync();
    assert_eq!(user.sync().unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()));
    user.write(1, 2).unwrap();
    user.sync().unwrap();
    let found = |block| (0..50).map(|seed| values(&*cut(&disk, seed).content(DiskBlock::new(block)))).collect::<BTreeSet<_>>();
    assert!(found(0).contains(&BTreeSet::from([0])), "lost in spite of the later sync");
    assert_eq!(found(1), [[2].into()].into());
    assert_eq!(values(&user.read(0).unwrap()), [1].into(), "and until then one reads it");
    user.write(0, 3).unwrap();
    user.sync().unwrap();
    assert_eq!(found(0), [[3].into()].into(), "written and synced anew, it is safe");
}

#[test]
fn blocks_read_and_write_fail_where_they_are_told_to() {
    let disk = SimulatedDisk::new(16, 5);
    let mut user = User::new(&disk);
    let blocks = |range: Range<u64>| DiskBlock::new(range.start)..DiskBlock::new(range.end);
    user.write(2, 2).unwrap();
    disk.fail_read(blocks(2..4), Some(1));
    assert!(user.read(1).is_ok());
    assert!(user.read(2).is_err());
    assert_eq!(values(&user.read(2).unwrap()), [2].into());
    disk.fail_write(blocks(2..3), None);
    for _ in 0..3 {
        assert!(user.write(2, 3).is_err());
    }
    assert!(values(&user.read(2).unwrap()).is_subset(&[2, 3].into()));
    disk.heal();
    user.write(2, 4).unwrap();

    disk.short_next_write();
    assert_eq!(user.write(2, 5).unwrap_err().kind(), io::ErrorKind::WriteZero);
    disk.lose_next_write();
    user.write(5, 50).unwrap();
    user.write(5, 51).unwrap();
    disk.lose_next_write();
    user.write(5, 52).unwrap();
    assert_eq!(values(&user.read(5).unwrap()), [51].into());
    disk.misdirect_next_write(DiskBlock::new(6));
    user.write(5, 53).unwrap();
    assert_eq!((values(&user.read(5).unwrap()), values(&user.read(6).unwrap())), ([51].into(), [53].into()));

    disk.flip_bit(DiskBlock::new(5), 9);
    assert_eq!(user.read(5).unwrap()[..3], [51, 49, 51]);
    disk.overwrite(DiskBlock::new(5), b"new");
    user.sync().unwrap();
    disk.power_cut(1);
    assert_eq!(&disk.content(DiskBlock::new(5))[..4], b"new3");
    assert_eq!(disk.counters().failed, 5);
}

#[test]
fn a_block_goes_stale_once() {
    let disk = SimulatedDisk::new(16, 6);
    let mut user = User::new(&disk);
    assert!(!disk.stale(DiskBlock::new(0)));
    for byte in [1, 2] {
        user.write(0, byte).unwrap();
        user.sync().unwrap();
    }
    assert!(disk.stale(DiskBlock::new(0)));
    assert_eq!(values(&user.read(0).unwrap()), [1].into());
    assert!(!disk.stale(DiskBlock::new(0)));
}

#[test]
fn room_is_taken_once_and_given_back_by_a_discard() {
    let disk = SimulatedDisk::new(16, 7);
    disk.set_discards(true);
    disk.set_room(Some(3 * BLOCK as u64));
    let mut user = User::new(&disk);
    let (at, count) = (DiskBlock::new(0), 2);
    user.run(DiskWork::Prepare { at, count }).unwrap();
    user.write(0, 1).unwrap();
    assert_eq!(user.disk.preparable().unwrap(), Some(BLOCK as u64));
    user.write(2, 1).unwrap();
    assert_eq!(user.write(3, 1).unwrap_err().raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
    assert!(user.run(DiskWork::Prepare { at, count: 4 }).is_err(), "all or nothing");
    user.run(DiskWork::Discard { at, count }).unwrap();
    assert_eq!(user.disk.preparable().unwrap(), Some(2 * BLOCK as u64));
    let reads: BTreeSet<Vec<u8>> = (0..50).map(|_| user.read(0).unwrap()).collect();
    assert!(reads.len() > 3, "a discarded block reads as anything, and never the same");
    user.write(0, 8).unwrap();
    assert_eq!(values(&user.read(0).unwrap()), [8].into());
    disk.set_room(None);
    disk.fail_next_prepare();
    assert!(user.run(DiskWork::Prepare { at: DiskBlock::new(8), count }).is_err());
    assert_eq!((disk.counters().prepares, disk.counters().prepared_blocks), (3, 8));
}

#[test]
fn random_completion_is_random_complete_and_the_same_for_a_seed() {
    let order = |seed| {
        let disk = SimulatedDisk::new(64, seed);
        disk.set_manual_completion(true);
        let mut user = User::new(&disk);
        for at in 0..20 {
            user.submit_write(at, 1, 1);
        }
        let mut done = Vec::new();
        user.disk.reap(&mut done);
        assert!(done.is_empty(), "only the test completes");
        disk.complete_some();
        assert!(disk.complete_one() || disk.in_flight() == 0);
        while disk.in_flight() > 0 {
            user.disk.wait().unwrap();
            user.disk.reap(&mut done);
        }
        user.disk.wait().unwrap();
        user.disk.reap(&mut done);
        let order: Vec<u64> = done.iter().map(|done| done.id.0).collect();
        assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), 20, "each exactly once");
        order
    };
    assert_eq!(order(8), order(8));
    assert_ne!(order(8), order(9));
    assert!(!order(8).is_sorted());
}

#[test]
fn a_read_beside_a_write_in_flight_is_torn_and_counted() {
    let disk = SimulatedDisk::new(16, 9);
    disk.set_garbage_when_unwritten(false);
    disk.set_manual_completion(true);
    let mut user = User::new(&disk);
    let buffer = user.pool.take(BLOCK);
    let read = user.submit(DiskWork::Read { at: DiskBlock::new(5), buffer });
    user.submit_write(4, 3, 1);
    disk.state().complete(0);
    assert_eq!(values(&user.finish(read).unwrap().unwrap()), [0, 1].into());
    assert_eq!(disk.counters().overlaps, 1);
}

#[test]
fn work_that_no_disk_could_do_is_refused() {
    let disk = SimulatedDisk::new(16, 10);
    let mut user = User::new(&disk);
    let odd = user.filled(2, 1).slice(8..BLOCK + 8);
    let (whole, short) = (user.filled(2, 1), user.filled(1, 1).slice(0..100));
    let at = DiskBlock::new(15);
    for pieces in [vec![whole], vec![short], vec![odd], vec![]] {
        assert_eq!(user.run(DiskWork::Write { at, pieces }).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    for count in [0, 2, u64::MAX] {
        assert!(user.run(DiskWork::Discard { at, count }).is_err());
    }
    assert_eq!((disk.counters().misuses, disk.counters().writes), (7, 0));
}

#[test]
fn a_disk_stops_where_it_is_told_to() {
    let disk = SimulatedDisk::new(16, 11);
    let mut user = User::new(&disk);
    disk.stop_after(2);
    user.write(0, 1).unwrap();
    user.write(1, 1).unwrap();
    assert!(!disk.has_stopped());
    assert_eq!(user.write(2, 1).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert!(disk.has_stopped());
    disk.kill(0);
    let mut after = User::new(&disk.reopen());
    assert_eq!(values(&after.read(1).unwrap()), [1].into());
    assert!(values(&after.read(2).unwrap()).len() > 100, "never written: garbage");
}

#[test]
fn the_clock_is_the_tests_and_the_alarm_goes_off_once() {
    let disk = SimulatedDisk::new(16, 12);
    disk.advance(Duration::from_secs(5));
    let mut live = disk.reopen();
    assert_eq!(live.now(), Duration::ZERO);
    live.set_alarm(Some(Duration::from_secs(2)));
    disk.clone().reap(&mut Vec::new());
    disk.advance(Duration::from_secs(1));
    live.reap(&mut Vec::new());
    assert_eq!(disk.alarm(), Some(Duration::from_secs(2)));
    disk.advance(Duration::from_secs(1));
    assert_eq!(live.now(), disk.alarm().unwrap());
    live.reap(&mut Vec::new());
    assert_eq!(disk.alarm(), None);
}
