//! Messages from other threads to one that waits on its ring: a queue and an eventfd.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, mpsc};

use io_uring::opcode;
use io_uring::types::Fd;
use rustix::event::EventfdFlags;

use super::reactor::{Reactor, Source};

/// Where other threads put messages.
#[derive(Debug)]
pub struct Sender<T> {
    queue: mpsc::Sender<T>,
    wake: Arc<OwnedFd>,
}

/// Where the ring's thread takes them.
#[derive(Debug)]
pub struct Mailbox<T> {
    queue: mpsc::Receiver<T>,
    wake: Arc<OwnedFd>,
}

/// Makes a mailbox.
///
/// # Errors
/// The kernel's, for the eventfd.
pub fn mailbox<T>() -> io::Result<(Sender<T>, Mailbox<T>)> {
    let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((Sender { queue: sender, wake: Arc::clone(&wake) }, Mailbox { queue: receiver, wake }))
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<T> Sender<T> {
    /// Puts a message and wakes the thread. False if nobody will ever take it.
    pub fn send(&self, message: T) -> bool {
        // The eventfd's write fails only when it is at its maximum, and then the thread is awake.
        self.queue.send(message).map(|()| rustix::io::write(&self.wake, &1_u64.to_ne_bytes())).is_ok()
    }
}

impl<T> Mailbox<T> {
    /// Asks the ring for one completion, [`Source::Mailbox`] with `token`, when there is a message.
    ///
    /// # Errors
    /// The ring's.
    pub fn arm(&self, reactor: &mut Reactor, token: u64) -> io::Result<()> {
        let entry = opcode::PollAdd::new(Fd(self.wake.as_raw_fd()), u32::from(libc::POLLIN.cast_unsigned()));
        // SAFETY: a poll points to no memory, and holds the file by itself.
        unsafe { reactor.push(&entry.build().user_data(Source::Mailbox.user_data(token))) }
    }

    /// Takes all messages. Call it when the completion came, then arm again.
    pub fn take(&self) -> impl Iterator<Item = T> {
        // First the signal, then the messages: one that comes in between signals again.
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        self.queue.try_iter()
    }
}
