//! [`RingDisk`]: a regular file or a block device behind an io_uring of its own.
//!
//! Everything runs on the caller's thread. The ring tells an eventfd of every completion, the alarm's timer included, and that
//! eventfd is what the store's owner polls. [`Disk::reap`] empties it *before* it looks at the completions: one that comes in
//! between leaves it readable, at worst for nothing, and none is missed.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FlockOperation, SeekFrom, flock, fstatvfs, major, minor, seek};

use crate::buffer::SharedBuffer;
use crate::units::BLOCK_SIZE;

use super::slots::Slots;
use super::{Disk, DiskDone, DiskRequest, DiskWork, IoId};

/// Completions handed out at once. What follows from them should reach the disk before the next are looked at: verifying what was
/// read takes longer than a request needs, and some virtual disks end requests in rounds of dozens. With 4, random reads at
/// depth 32 are a third faster than without a limit.
const REAPED_MAX: usize = 4;
/// Submission entries: far more than a disk does at once. There are twice as many completion entries, so none overflows.
const ENTRIES: u32 = 256;
/// Most I/O that the kernel has at a time. What is left of the entries is for the timer.
const IN_KERNEL_MAX: usize = ENTRIES as usize - 8;
/// Most vectors of one write: the kernel's `UIO_MAXIOV`.
const VECTORS_MAX: usize = 1024;
/// How often the kernel may answer "try again" before that is the result: it is rare, and more in a row mean something else.
const TRIES_MAX: u32 = 16;
/// Reserves blocks that hold zeros and need no bookkeeping when they are first written, on devices that can do it for free
/// (Linux 6.17; `FALLOC_FL_WRITE_ZEROES`, which no library names yet).
const WRITE_ZEROES: i32 = 0x80;

/// User data of the alarm's timer. That of I/O is a small number.
const TIMER: u64 = u64::MAX;
/// User data of what moves the timer.
const TIMER_MOVED: u64 = u64::MAX - 1;

/// What one entry of the ring does. The pointers lead into the job's buffers.
enum Action {
    Read(libc::iovec),
    Write(libc::iovec),
    WriteMany {
        all: Box<[libc::iovec]>,
        /// Those before it are done.
        first: usize,
    },
    Sync,
    Discard,
    Prepare {
        /// Whether it was submitted as [`WRITE_ZEROES`].
        zeroing: bool,
    },
}

/// A request, or as much of one as fits in one entry.
struct Part {
    job: usize,
    /// Where it begins, in bytes.
    from: u64,
    /// How many bytes are left.
    length: u64,
    action: Action,
    /// How often it was tried in vain.
    tries: u32,
}

/// A request under way.
struct Job {
    id: IoId,
    /// It owns the buffers, which the kernel uses until the last part has ended.
    work: DiskWork,
    /// How many parts have not ended.
    parts: usize,
    error: Option<io::Error>,
}

/// A disk that is a regular file or a block device.
///
/// It stays on its thread. When it is dropped it waits for what is in flight, since the kernel still uses the buffers.
pub struct RingDisk {
    ring: IoUring,
    wake: OwnedFd,
    file: File,
    blocks: u64,
    is_device: bool,
    discards: bool,
    /// Whether [`WRITE_ZEROES`] may work: until it did not.
    write_zeroes: bool,
    opened: Instant,
    jobs: Slots<Job>,
    parts: Slots<Part>,
    /// Parts that are not in the ring.
    waiting: VecDeque<usize>,
    /// How many are.
    in_kernel: usize,
    ended: Vec<DiskDone>,
    alarm: Option<Duration>,
    /// When the timer in the ring goes off, if there is one. There is never a second.
    timer: Option<Duration>,
    /// What the kernel reads when a timer is submitted.
    timespec: Box<Timespec>,
}

impl std::fmt::Debug for RingDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { file, blocks, in_kernel, waiting, .. } = self;
        f.debug_struct("RingDisk")
            .field("file", file)
            .field("blocks", blocks)
            .field("in_kernel", in_kernel)
            .field("waiting", &waiting.len())
            .finish_non_exhaustive()
    }
}

fn build_ring() -> io::Result<IoUring> {
    // COOP_TASKRUN: completions wait until this thread is in the kernel anyway, instead of interrupting it.
    match IoUring::builder().setup_clamp().setup_submit_all().setup_coop_taskrun().build(ENTRIES) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().setup_clamp().build(ENTRIES),
        built => built,
    }
}

/// Whether a block device (or the one that it is a part of) frees what is discarded.
fn device_discards(device: u64) -> bool {
    let queue = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let found = ["queue", "../queue"].iter().find_map(|place| std::fs::read_to_string(format!("{queue}/{place}/discard_max_bytes")).ok());
    found.and_then(|text| text.trim().parse::<u64>().ok()).is_some_and(|bytes| bytes > 0)
}

impl RingDisk {
    /// The disk that a file is: as many whole blocks as it has now. Discards of a regular file do nothing until
    /// [`RingDisk::punch_holes`].
    ///
    /// # Errors
    /// What the system says: `EPERM` if `kernel.io_uring_disabled` forbids rings, `ENOSYS` if the kernel has none.
    pub fn new(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        let bytes = if is_device { seek(&file, SeekFrom::End(0))? } else { metadata.len() };
        let ring = build_ring()?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        ring.submitter().register_eventfd(wake.as_raw_fd())?;
        // The file is not registered with the ring: a ring goes away some time after its last user, and would keep the file, and
        // a device's exclusive opening with it.
        Ok(Self {
            ring,
            wake,
            file,
            blocks: bytes / u64::from(BLOCK_SIZE),
            is_device,
            discards: is_device && device_discards(metadata.rdev()),
            write_zeroes: true,
            opened: Instant::now(),
            jobs: Slots::new(),
            parts: Slots::new(),
            waiting: VecDeque::new(),
            in_kernel: 0,
            ended: Vec::new(),
            alarm: None,
            timer: None,
            timespec: Box::new(Timespec::new()),
        })
    }

    /// Whether a regular file gives discarded blocks back to its file system. A device does what it can in any case.
    pub fn punch_holes(&mut self, punch: bool) {
        if !self.is_device {
            self.discards = punch;
        }
    }

    /// Uses only so many blocks, if there are more.
    pub(super) fn limit(&mut self, blocks: u64) {
        self.blocks = self.blocks.min(blocks);
    }

    /// Makes [`Disk::wake_fd`] readable, so that `reap` is called.
    fn nudge(&self) {
        // It fails only if the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Ends a request that the kernel has no part in.
    fn end(&mut self, id: IoId, result: io::Result<()>) {
        self.ended.push(DiskDone { id, result: result.map(|()| None) });
        self.nudge();
    }

    fn start(&mut self, id: IoId, mut work: DiskWork) {
        let (at, length) = work.span();
        let actions: Vec<Action> = match &mut work {
            DiskWork::Read { buffer, .. } => {
                vec![Action::Read(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })]
            }
            DiskWork::Write { pieces, .. } => pieces.chunks(VECTORS_MAX).map(Action::write).collect(),
            DiskWork::Sync => vec![Action::Sync],
            DiskWork::Discard { .. } => vec![Action::Discard],
            DiskWork::Prepare { .. } => vec![Action::Prepare { zeroing: false }],
        };
        let job = self.jobs.insert(Job { id, work, parts: actions.len(), error: None });
        let mut from = at.get() * u64::from(BLOCK_SIZE);
        for action in actions {
            let length = action.in_memory().unwrap_or(length);
            self.waiting.push_back(self.parts.insert(Part { job, from, length, action, tries: 0 }));
            from += length;
        }
    }

    /// Fills the ring with what waits.
    fn push_waiting(&mut self) {
        while self.in_kernel < IN_KERNEL_MAX
            && let Some(index) = self.waiting.pop_front()
        {
            let Some(entry) = self.entry(index) else { continue };
            // SAFETY: the buffers belong to the job and the vectors to the part, neither of which goes before the completion has
            // come; `drop` waits for that too.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                self.waiting.push_front(index);
                return;
            }
            self.in_kernel += 1;
        }
    }

    fn entry(&mut self, index: usize) -> Option<squeue::Entry> {
        let Part { from, length, action, .. } = self.parts.get_mut(index)?;
        let (fd, from) = (Fd(self.file.as_raw_fd()), *from);
        let entry = match action {
            Action::Read(to) => opcode::Read::new(fd, to.iov_base.cast(), in_one(to)).offset(from).build(),
            Action::Write(of) => opcode::Write::new(fd, of.iov_base.cast_const().cast(), in_one(of)).offset(from).build(),
            Action::WriteMany { all, first } => {
                let left = &all[*first..];
                opcode::Writev::new(fd, left.as_ptr(), u32::try_from(left.len()).ok()?).offset(from).build()
            }
            Action::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Action::Discard => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, *length).offset(from).mode(mode).build()
            }
            Action::Prepare { zeroing } => {
                *zeroing = self.write_zeroes;
                let mode = if *zeroing { WRITE_ZEROES | libc::FALLOC_FL_KEEP_SIZE } else { 0 };
                opcode::Fallocate::new(fd, *length).offset(from).mode(mode).build()
            }
        };
        Some(entry.user_data(index as u64))
    }

    /// Gives the kernel what is in the ring, and waits for so many completions. That it wants to be asked again is no error.
    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        if wanted == 0 && self.ring.submission().is_empty() {
            return Ok(());
        }
        match self.ring.submit_and_wait(wanted) {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Err(error),
            _ => Ok(()),
        }
    }

    fn next_completion(&mut self) -> Option<(u64, i32)> {
        self.ring.completion().next().map(|entry| (entry.user_data(), entry.result()))
    }

    /// Takes completions that are there, but not so many that the disk has nothing to do meanwhile.
    fn take_completions(&mut self) {
        while self.ended.len() < REAPED_MAX
            && let Some((user_data, result)) = self.next_completion()
        {
            match user_data {
                TIMER => self.timer = None,
                TIMER_MOVED => {}
                index => {
                    self.in_kernel = self.in_kernel.saturating_sub(1);
                    self.on_completed(usize::try_from(index).unwrap_or(usize::MAX), result);
                }
            }
        }
    }

    fn on_completed(&mut self, index: usize, result: i32) {
        let Some(part) = self.parts.get_mut(index) else { return };
        let Some(job) = self.jobs.get_mut(part.job) else { return };
        let outcome = match (&part.action, u32::try_from(result)) {
            (Action::Read(_) | Action::Write(_) | Action::WriteMany { .. }, Ok(bytes)) if bytes > 0 => {
                part.advance(u64::from(bytes));
                if part.length > 0 {
                    return self.waiting.push_front(index);
                }
                Ok(())
            }
            (Action::Read(_), Ok(_)) => Err(io::ErrorKind::UnexpectedEof.into()),
            (Action::Write(_) | Action::WriteMany { .. }, Ok(_)) => Err(io::ErrorKind::WriteZero.into()),
            (Action::Sync | Action::Discard | Action::Prepare { .. }, Ok(_)) => Ok(()),
            // Never again: what the kernel could not write it has forgotten, and would call the next sync a success.
            (Action::Sync, Err(_)) => Err(io::Error::from_raw_os_error(-result)),
            (_, Err(_)) if matches!(-result, libc::EINTR | libc::EAGAIN) && part.tries < TRIES_MAX => {
                part.tries += 1;
                return self.waiting.push_front(index);
            }
            (Action::Prepare { zeroing: true }, Err(_)) if matches!(-result, libc::EOPNOTSUPP | libc::EINVAL) => {
                self.write_zeroes = false;
                return self.waiting.push_front(index);
            }
            (Action::Discard, Err(_)) if -result == libc::EOPNOTSUPP => {
                self.discards = false;
                Ok(())
            }
            (_, Err(_)) => Err(io::Error::from_raw_os_error(-result)),
        };
        let place = part.job;
        if let Err(error) = outcome {
            job.error.get_or_insert(error);
        }
        job.parts -= 1;
        let is_last = job.parts == 0;
        self.parts.remove(index);
        if is_last && let Some(Job { id, work, error, .. }) = self.jobs.remove(place) {
            let result = match (error, work) {
                (Some(error), _) => Err(error),
                (None, DiskWork::Read { buffer, .. }) => Ok(Some(buffer)),
                (None, _) => Ok(None),
            };
            self.ended.push(DiskDone { id, result });
        }
    }

    /// Sees to it that the timer goes off no later than the alarm. One that goes off earlier is left: `reap` arms it anew then.
    /// So an alarm that only moves away costs nothing.
    fn arm(&mut self) {
        let Some(at) = self.alarm else { return };
        if self.timer.is_some_and(|timer| timer <= at) {
            return;
        }
        // A time of zero would be no timer at all in some of the kernel's interfaces.
        *self.timespec = Timespec::from(at.saturating_sub(self.now()).max(Duration::from_nanos(1)));
        let timespec = &raw const *self.timespec;
        let entry = if self.timer.is_none() {
            opcode::Timeout::new(timespec).build().user_data(TIMER)
        } else {
            // If it has gone off meanwhile, this finds nothing; `reap` sees the timer's end, and arms it anew.
            opcode::TimeoutUpdate::new(TIMER, timespec).build().user_data(TIMER_MOVED).flags(squeue::Flags::SKIP_SUCCESS)
        };
        // SAFETY: the kernel reads the time when the entry is submitted, and it lives in the heap as long as the ring. If it
        // is overwritten before, then by an earlier time, which is right for both.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            self.timer = Some(at);
        }
    }

    /// Submits, and makes sure that this is tried again if it fails.
    fn submit_all(&mut self) {
        if let Err(error) = self.enter(0) {
            tracing::error!(%error, "the kernel does not take a store's I/O");
        }
        if !self.ring.submission().is_empty() {
            self.nudge();
        }
    }
}

/// The length of a vector for an entry. The kernel cuts such long ones short anyway, and they go on from there.
fn in_one(vector: &libc::iovec) -> u32 {
    u32::try_from(vector.iov_len).unwrap_or(1 << 30)
}

/// Moves the beginning of a vector by up to `bytes`, and says by how many.
fn advance(vector: &mut libc::iovec, bytes: u64) -> u64 {
    let step = usize::try_from(bytes).unwrap_or(usize::MAX).min(vector.iov_len);
    vector.iov_base = vector.iov_base.wrapping_byte_add(step);
    vector.iov_len -= step;
    step as u64
}

impl Action {
    fn write(pieces: &[SharedBuffer]) -> Self {
        let vector = |piece: &SharedBuffer| libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() };
        match pieces {
            [piece] => Self::Write(vector(piece)),
            pieces => Self::WriteMany { all: pieces.iter().map(vector).collect(), first: 0 },
        }
    }

    /// How many bytes of memory it is about.
    fn in_memory(&self) -> Option<u64> {
        match self {
            Self::Read(vector) | Self::Write(vector) => Some(vector.iov_len as u64),
            Self::WriteMany { all, .. } => Some(all.iter().map(|vector| vector.iov_len as u64).sum()),
            Self::Sync | Self::Discard | Self::Prepare { .. } => None,
        }
    }
}

impl Part {
    /// So many more bytes are done.
    fn advance(&mut self, bytes: u64) {
        self.from += bytes;
        self.length = self.length.saturating_sub(bytes);
        match &mut self.action {
            Action::Read(vector) | Action::Write(vector) => {
                advance(vector, bytes);
            }
            Action::WriteMany { all, first } => {
                let mut left = bytes;
                while let Some(vector) = all.get_mut(*first) {
                    left -= advance(vector, left);
                    if vector.iov_len > 0 {
                        break;
                    }
                    *first += 1;
                }
            }
            Action::Sync | Action::Discard | Action::Prepare { .. } => {}
        }
    }
}

impl Disk for RingDisk {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn preparable(&self) -> io::Result<Option<u64>> {
        let metadata = self.file.metadata()?;
        // `blocks` of 512 bytes, whatever the file system's are.
        if self.is_device || metadata.blocks().saturating_mul(512) >= metadata.len() {
            return Ok(None);
        }
        let found = fstatvfs(&self.file)?;
        Ok(Some(found.f_bavail.saturating_mul(found.f_frsize)))
    }

    fn wants_discards(&self) -> bool {
        self.discards
    }

    /// Work that is not whole blocks within the disk, or not aligned to 4096 bytes in memory, ends with `InvalidInput`. A
    /// discard ends at once if it is not wanted, a prepare if this is a device.
    fn submit(&mut self, request: DiskRequest) {
        let DiskRequest { id, work } = request;
        if let Some(reason) = work.misuse(self.blocks) {
            return self.end(id, Err(io::Error::new(io::ErrorKind::InvalidInput, reason)));
        }
        match &work {
            DiskWork::Discard { .. } if !self.discards => self.end(id, Ok(())),
            DiskWork::Prepare { .. } if self.is_device => self.end(id, Ok(())),
            _ => self.start(id, work),
        }
    }

    fn push(&mut self) {
        self.push_waiting();
        self.submit_all();
    }

    fn reap(&mut self, done: &mut Vec<DiskDone>) {
        loop {
            self.push();
            // It fails only if there is nothing to read.
            let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
            self.take_completions();
            if self.waiting.is_empty() || self.in_kernel >= IN_KERNEL_MAX || !self.ring.submission().is_empty() {
                break;
            }
        }
        if self.alarm.is_some_and(|at| at <= self.now()) {
            self.alarm = None;
        }
        self.arm();
        self.submit_all();
        if self.ended.len() >= REAPED_MAX {
            self.nudge();
        }
        done.append(&mut self.ended);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.take_completions();
        while self.ended.is_empty() && !self.jobs.is_empty() {
            self.push_waiting();
            self.enter(1)?;
            self.take_completions();
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        self.opened.elapsed()
    }

    fn set_alarm(&mut self, at: Option<Duration>) {
        self.alarm = at;
        self.arm();
        self.submit_all();
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
}

impl Drop for RingDisk {
    fn drop(&mut self) {
        while self.in_kernel > 0 {
            if let Err(error) = self.enter(1) {
                tracing::error!(%error, "can't wait for a store's I/O: its buffers are lost");
                // The kernel may still write to them.
                mem::forget(mem::take(&mut self.jobs));
                mem::forget(mem::take(&mut self.parts));
                break;
            }
            self.take_completions();
            self.ended.clear();
        }
        // The kernel may hold the file for a moment yet, and would hold the lock with it.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests;
