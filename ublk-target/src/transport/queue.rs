//! One ublk queue: its tags, its descriptors, its commands on the ring.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::time::Instant;

use carrick_backing_store::{Buffer, BufferPool};
use io_uring::{opcode, types};
use libublk_rs_sys as sys;

use super::budget::Budget;
use super::copy;
use super::descriptor::{Asked, Descriptor, Operation};
use super::throttle::Throttle;
use carrick_replicator::io::{Reactor, Source};
use carrick_replicator::limits::{Delays, Limits};
use carrick_replicator::time::Monotonic;

/// Deepest queue. All FETCHes of it fit into the ring's submission queue at once (T2).
pub const QUEUE_DEPTH_MAX: u16 = 512;

const QUEUE: u16 = 0;

/// Where a tag is (T1).
#[derive(Clone, Copy, Debug)]
enum Tag {
    /// A FETCH or COMMIT_AND_FETCH is at the kernel.
    AtKernel,
    /// Its request waits for its turn under the volume's limits.
    Held(Asked),
    /// Its request waits for memory.
    Waiting(Asked),
    /// Its request is in service.
    InService(Asked),
    /// The kernel wants no more of it: the device is being stopped.
    Ended,
}

/// A request taken from the kernel.
#[derive(Debug)]
pub struct Taken {
    /// Its tag, to be given back with what comes of it.
    pub tag: u16,
    /// What is asked.
    pub asked: Asked,
    /// The bytes of a write.
    pub data: Option<Buffer>,
}

/// A device's queue.
#[derive(Debug)]
pub struct UblkQueue {
    device: File,
    descriptors: Descriptors,
    tags: Vec<Tag>,
    throttle: Throttle,
    /// Start of the throttle's clock.
    started: Instant,
    budget: Budget,
    pool: BufferPool,
    in_service: u32,
    ended: u32,
}

impl UblkQueue {
    /// Maps the queue of an open character device and gives the kernel one FETCH per tag, all in one submission (T2).
    /// Requests may arrive from then on.
    ///
    /// # Errors
    /// The kernel's. `EINVAL` from the mapping: a target that was killed while it recovered the device has left it so.
    pub fn open(device: File, depth: u16, pool: BufferPool, reactor: &mut Reactor) -> io::Result<Self> {
        if !(1..=QUEUE_DEPTH_MAX).contains(&depth) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a queue of {depth} requests")));
        }
        let descriptors = Descriptors::map(&device, depth)?;
        let tags = vec![Tag::AtKernel; depth.into()];
        let (throttle, budget) = (Throttle::default(), Budget::new(depth));
        let queue = Self { device, descriptors, tags, throttle, started: Instant::now(), budget, pool, in_service: 0, ended: 0 };
        // What is in the submission queue already must not push the FETCHes over two submissions.
        reactor.submit()?;
        for tag in 0..depth {
            queue.command(reactor, sys::UBLK_U_IO_FETCH_REQ, tag, 0)?;
        }
        reactor.submit()?;
        Ok(queue)
    }

    /// A command of this queue has completed: its token is the tag. Gives a request, if it brought one that can be served now.
    ///
    /// # Errors
    /// The driver refuses the command, which ends the process: the next one recovers the device.
    pub fn on_completed(&mut self, reactor: &mut Reactor, token: u64, result: i32) -> io::Result<Option<Taken>> {
        let (tag, state) = self.state(token)?;
        if !matches!(state, Tag::AtKernel) {
            return Err(io::Error::other(format!("ublk completed tag {tag}, which is {state:?}")));
        }
        match result {
            0 => {}
            sys::UBLK_IO_RES_ABORT => {
                self.set(tag, Tag::Ended);
                self.ended += 1;
                return Ok(None);
            }
            error => {
                let error = io::Error::from_raw_os_error(error.saturating_neg());
                return Err(io::Error::new(error.kind(), format!("the ublk driver refused the command of tag {tag}: {error}")));
            }
        }
        let descriptor = self.descriptors.read(tag);
        match descriptor.decode() {
            Ok(asked) if self.throttle.is_on() && !self.throttle.take(self.now(), tag, asked) => {
                self.set(tag, Tag::Held(asked));
                Ok(None)
            }
            Ok(asked) => self.admit(reactor, tag, asked),
            Err(errno) => {
                tracing::error!(?descriptor, "a request that makes no sense");
                self.commit(reactor, tag, errno)?;
                Ok(None)
            }
        }
    }

    /// From now on these limits. Ask [`UblkQueue::next_waiting`] until `None` afterwards.
    pub fn set_limits(&mut self, limits: &Limits) {
        let (now, depth) = (self.now(), self.descriptors.depth);
        self.throttle.set(now, limits, depth);
    }

    /// When [`UblkQueue::next_waiting`] has a request that waits for its turn; `None`: none does.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.throttle.due().map(|due| self.started + due.since(Monotonic::default()))
    }

    /// What the limits have done so far.
    #[must_use]
    pub fn delays(&self) -> Delays {
        self.throttle.delays()
    }

    /// The next request that waited, for memory or for its turn, and can be served now. Ask until `None` after each
    /// [`UblkQueue::finish`], when it is [`UblkQueue::due`], and when limits have changed.
    ///
    /// # Errors
    /// As of [`UblkQueue::on_completed`].
    pub fn next_waiting(&mut self, reactor: &mut Reactor) -> io::Result<Option<Taken>> {
        while let Some(tag) = self.budget.next() {
            let (tag, Tag::Waiting(asked)) = self.state(tag.into())? else {
                return Err(io::Error::other(format!("tag {tag} has memory and doesn't wait for it")));
            };
            if let Some(taken) = self.serve(reactor, tag, asked)? {
                return Ok(Some(taken));
            }
        }
        self.next_held(reactor)
    }

    fn next_held(&mut self, reactor: &mut Reactor) -> io::Result<Option<Taken>> {
        if !self.throttle.holds_any() {
            return Ok(None);
        }
        let now = self.now();
        while let Some(tag) = self.throttle.next(now) {
            let (tag, Tag::Held(asked)) = self.state(tag.into())? else {
                return Err(io::Error::other(format!("it is the turn of tag {tag}, which doesn't wait for it")));
            };
            if let Some(taken) = self.admit(reactor, tag, asked)? {
                return Ok(Some(taken));
            }
        }
        Ok(None)
    }

    /// A request is done: `Ok` with the bytes read, if it was a read (`None`: only zeros), or a negative errno.
    ///
    /// # Errors
    /// The ring's, or a tag that is not in service.
    pub fn finish(&mut self, reactor: &mut Reactor, token: u64, result: Result<Option<&[u8]>, i32>) -> io::Result<()> {
        let (tag, Tag::InService(asked)) = self.state(token)? else {
            return Err(io::Error::other(format!("an answer to tag {token}, which is not in service")));
        };
        let bytes = asked.data_bytes();
        let result = match result {
            Ok(read) if asked.operation == Operation::Read => self.give(tag, bytes, read),
            // At most 1 MiB, so it fits.
            Ok(_) => bytes.cast_signed(),
            Err(errno) => errno,
        };
        self.in_service -= 1;
        self.budget.give_back(bytes);
        self.commit(reactor, tag, result)
    }

    /// Requests taken from the kernel and not answered.
    #[must_use]
    pub const fn in_service(&self) -> u32 {
        self.in_service
    }

    /// Whether the kernel has ended every tag: the device is stopped, and the queue may be dropped.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.ended as usize == self.tags.len()
    }

    fn now(&self) -> Monotonic {
        Monotonic::new(self.started.elapsed())
    }

    /// Serves a request if there is memory for it; else it waits for some.
    fn admit(&mut self, reactor: &mut Reactor, tag: u16, asked: Asked) -> io::Result<Option<Taken>> {
        if self.budget.take(tag, asked.data_bytes()) {
            return self.serve(reactor, tag, asked);
        }
        self.set(tag, Tag::Waiting(asked));
        Ok(None)
    }

    fn serve(&mut self, reactor: &mut Reactor, tag: u16, asked: Asked) -> io::Result<Option<Taken>> {
        let mut data = None;
        if matches!(asked.operation, Operation::Write { .. }) {
            let mut buffer = self.pool.take(asked.data_bytes() as usize);
            if let Err(error) = copy::from_request(&self.device, tag, &mut buffer) {
                tracing::error!(%error, tag, "can't copy the data of a write");
                self.budget.give_back(asked.data_bytes());
                self.commit(reactor, tag, -libc::EIO)?;
                return Ok(None);
            }
            data = Some(buffer);
        }
        self.set(tag, Tag::InService(asked));
        self.in_service += 1;
        Ok(Some(Taken { tag, asked, data }))
    }

    fn give(&self, tag: u16, length: u32, read: Option<&[u8]>) -> i32 {
        let copied = match read {
            Some(bytes) if bytes.len() == length as usize => copy::to_request(&self.device, tag, bytes),
            Some(bytes) => Err(io::Error::other(format!("{} bytes for a read of {length}", bytes.len()))),
            None => copy::zeroes_to_request(&self.device, tag, length as usize),
        };
        match copied {
            Ok(()) => length.cast_signed(),
            Err(error) => {
                tracing::error!(%error, tag, "can't copy the data of a read");
                -libc::EIO
            }
        }
    }

    fn commit(&mut self, reactor: &mut Reactor, tag: u16, result: i32) -> io::Result<()> {
        self.set(tag, Tag::AtKernel);
        self.command(reactor, sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, result)
    }

    fn command(&self, reactor: &mut Reactor, operation: u32, tag: u16, result: i32) -> io::Result<()> {
        // struct ublksrv_io_cmd: queue, tag, result, and an address that must be 0 with USER_COPY.
        let mut command = [0; size_of::<sys::ublksrv_io_cmd>()];
        command[0..2].copy_from_slice(&QUEUE.to_ne_bytes());
        command[2..4].copy_from_slice(&tag.to_ne_bytes());
        command[4..8].copy_from_slice(&result.to_ne_bytes());
        let entry = opcode::UringCmd16::new(types::Fd(self.device.as_raw_fd()), operation).cmd(command).build();
        // SAFETY: the command is in the entry itself, and the kernel holds the file while the command runs.
        unsafe { reactor.push(&entry.user_data(Source::FrontEnd.user_data(tag.into()))) }
    }

    fn state(&self, token: u64) -> io::Result<(u16, Tag)> {
        let tag = u16::try_from(token).ok().and_then(|tag| Some((tag, *self.tags.get(usize::from(tag))?)));
        tag.ok_or_else(|| io::Error::other(format!("tag {token} of a queue of {}", self.tags.len())))
    }

    fn set(&mut self, tag: u16, state: Tag) {
        self.tags[usize::from(tag)] = state;
    }
}

/// The kernel's descriptors, one per tag, in memory that it shares with us and only it writes to.
#[derive(Debug)]
struct Descriptors {
    start: NonNull<sys::ublksrv_io_desc>,
    bytes: usize,
    depth: u16,
}

impl Descriptors {
    fn map(device: &File, depth: u16) -> io::Result<Self> {
        // The driver accepts exactly this size.
        let bytes = (usize::from(depth) * size_of::<sys::ublksrv_io_desc>()).next_multiple_of(page_size());
        let (access, flags, offset) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_POPULATE, sys::UBLKSRV_CMD_BUF_OFFSET.into());
        // SAFETY: a new mapping at a place that the kernel chooses.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, flags, device.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, bytes, depth })
    }

    fn read(&self, tag: u16) -> Descriptor {
        assert!(tag < self.depth, "tag {tag} of a queue of {}", self.depth);
        // SAFETY: inside the mapping, by the assertion; volatile, since the kernel wrote it after the mapping was made.
        let raw = unsafe { self.start.add(tag.into()).read_volatile() };
        Descriptor { op_flags: raw.op_flags, sectors: raw.nr_sectors, start: raw.start_sector }
    }
}

fn page_size() -> usize {
    // SAFETY: takes a number, gives a number.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size, and no reference into it is ever given out.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
