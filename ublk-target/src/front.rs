//! The queue thread's part: it joins the ublk queue to the engine, obeys the main thread and answers status.

use std::fs::File;
use std::io;
use std::sync::mpsc;
use std::time::Instant;

use carrick_backing_store::{BufferPool, Term, VolumeSize};
use carrick_replicator::control::{
    ControlError, ControlErrorCode, MemberReport, TargetAnswer, TargetConfig, TargetPhase, TargetRequest, TargetStatus,
};
use carrick_replicator::engine::{ConfigRecord, Engine, ReadBytes, Request, RequestError, RequestTag, Response};
use carrick_replicator::io::{Command, Completed, FrontEnd, Mailbox, Reactor, Reply, Source};
use carrick_replicator::limits::Limits;

use crate::process;
use crate::progress::Progress;
use crate::transport::{Operation, Taken, UblkQueue};

/// Tokens of the two mailboxes.
const COMMANDS: u64 = 0;
const ORDERS: u64 = 1;

/// The tag of the flush before a detach; the kernel's tags are below 512.
const LAST_FLUSH: RequestTag = RequestTag(u64::MAX);

/// What the main thread wants of the queue thread.
#[derive(Debug)]
pub enum Order {
    /// Give the driver the FETCHes of this character device.
    Open {
        /// The character device.
        device: File,
        /// How many requests.
        depth: u16,
        /// Whether the host may look for partitions on it.
        may_be_parsed: bool,
        /// What came of it.
        done: Reply<io::Result<()>>,
    },
    /// Whether requests wait for the volume's limits. They don't when the device goes, whoever uses it.
    Limit(bool),
    /// End all requests, those to come included.
    Abort,
    /// The metadata store says which replicas count, or why it can't.
    Config(Result<ConfigRecord, String>),
    /// Everything acknowledged to stable media.
    Flush {
        /// Whether it is there.
        done: Reply<bool>,
    },
    /// Let go of the character device once the driver has ended the queue.
    Release {
        /// It is let go of.
        done: Reply<()>,
    },
}

/// What the queue thread tells the main thread.
#[derive(Debug)]
pub enum Notice {
    /// This process is the volume's primary.
    Serving(Term),
    /// The device is to go.
    Detach {
        /// Even while it is in use.
        force: bool,
        /// The answer.
        reply: Reply<TargetAnswer>,
    },
    /// Requests may reach up to this size now.
    Grown(VolumeSize),
    /// The driver has ended the queue, and nobody here has asked for that.
    QueueEnded,
}

/// What the main thread and the control socket send here.
pub struct Mailboxes {
    /// From the control socket.
    pub commands: Mailbox<Command<TargetRequest, TargetAnswer>>,
    /// From the main thread.
    pub orders: Mailbox<Order>,
}

/// The front end of a volume's primary.
pub struct TargetFrontEnd {
    config: TargetConfig,
    mailboxes: Mailboxes,
    notices: mpsc::Sender<Notice>,
    progress: Progress,
    pool: BufferPool,
    queue: Option<UblkQueue>,
    flushing: Option<Reply<bool>>,
    releasing: Option<Reply<()>>,
}

impl TargetFrontEnd {
    /// The front end of the volume of `config`. Data is copied into buffers of `pool`.
    #[must_use]
    pub const fn new(
        config: TargetConfig,
        mailboxes: Mailboxes,
        notices: mpsc::Sender<Notice>,
        progress: Progress,
        pool: BufferPool,
    ) -> Self {
        Self { config, mailboxes, notices, progress, pool, queue: None, flushing: None, releasing: None }
    }

    fn on_command(
        &mut self,
        reactor: &mut Reactor,
        engine: &mut Engine,
        command: Command<TargetRequest, TargetAnswer>,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        match command.request {
            TargetRequest::Status => command.reply.send(TargetAnswer::Status(Box::new(self.status(engine)))),
            TargetRequest::Detach { force } => self.notify(Notice::Detach { force, reply: command.reply }),
            TargetRequest::SetRebuildRate { rate } => {
                engine.set_copy_rate(rate);
                command.reply.send(TargetAnswer::Done);
            }
            TargetRequest::Expand { size } => {
                engine.expand(size);
                command.reply.send(TargetAnswer::Done);
            }
            TargetRequest::Verify => {
                engine.verify();
                command.reply.send(TargetAnswer::Done);
            }
            TargetRequest::SetLimits { limits } => match limits.check() {
                Ok(()) => {
                    self.config.limits = limits;
                    self.limit(reactor, &limits, requests)?;
                    command.reply.send(TargetAnswer::Done);
                }
                Err(error) => {
                    let error = ControlError { code: ControlErrorCode::Invalid, message: error.to_string() };
                    command.reply.send(TargetAnswer::Refused(error));
                }
            },
        }
        Ok(())
    }

    /// Puts limits into effect: whoever waits and needn't any more goes on now.
    fn limit(&mut self, reactor: &mut Reactor, limits: &Limits, requests: &mut Vec<(RequestTag, Request)>) -> io::Result<()> {
        if let Some(queue) = &mut self.queue {
            queue.set_limits(limits);
        }
        self.serve_waiting(reactor, requests)
    }

    fn serve_waiting(&mut self, reactor: &mut Reactor, requests: &mut Vec<(RequestTag, Request)>) -> io::Result<()> {
        let Some(queue) = &mut self.queue else { return Ok(()) };
        while let Some(taken) = queue.next_waiting(reactor)? {
            requests.push(request(taken));
        }
        Ok(())
    }

    fn status(&self, engine: &Engine) -> TargetStatus {
        let step = self.progress.get();
        let term = engine.term();
        let phase = match step.phase {
            // The main thread hears of neither.
            TargetPhase::Electing if term.is_some() => TargetPhase::Reconciling,
            phase => phase,
        };
        let members = self.config.replicas.iter().zip(engine.members());
        TargetStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            volume: self.config.volume,
            phase,
            device: step.device,
            size: step.size,
            grows_online: step.grows_online,
            term,
            replicas: members
                .map(|(address, member)| MemberReport {
                    store: address.store,
                    endpoint: address.endpoint.clone(),
                    state: member.state,
                    counts: member.counts,
                    copied: member.copied,
                    seconds_left: member.time_left.map(|left| left.as_secs()),
                    last_error: member.last_error,
                })
                .collect(),
            requests_in_flight: self.queue.as_ref().map_or(0, UblkQueue::in_service),
            waiting_for: step.waiting_for.or_else(|| engine.waiting_for()),
            copied: engine.copied(),
            repaired: engine.repaired(),
            delays: self.queue.as_ref().map_or_else(Default::default, UblkQueue::delays),
            verification: engine.verification().cloned(),
        }
    }

    fn on_order(
        &mut self,
        reactor: &mut Reactor,
        engine: &mut Engine,
        order: Order,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        match order {
            Order::Open { device, depth, may_be_parsed, done } => done.send(self.open(reactor, device, depth, may_be_parsed)),
            Order::Config(answer) => engine.on_config(answer),
            Order::Limit(is_on) => {
                let limits = if is_on { self.config.limits } else { Limits::default() };
                self.limit(reactor, &limits, requests)?;
            }
            Order::Abort => {
                engine.abort();
                // Those that wait for their turn are to end, too.
                self.limit(reactor, &Limits::default(), requests)?;
            }
            Order::Flush { done } => {
                self.flushing = Some(done);
                requests.push((LAST_FLUSH, Request::Flush));
            }
            Order::Release { done } => {
                self.releasing = Some(done);
                self.release_if_drained();
            }
        }
        Ok(())
    }

    fn open(&mut self, reactor: &mut Reactor, device: File, depth: u16, may_be_parsed: bool) -> io::Result<()> {
        if !may_be_parsed {
            // The driver looks at whoever sends a FETCH: without the privilege the host never reads the disk's partition
            // table (I13). The driver's commands are sent by the main thread, which keeps it.
            process::drop_sys_admin()?;
        }
        let mut queue = UblkQueue::open(device, depth, self.pool.clone(), reactor)?;
        queue.set_limits(&self.config.limits);
        self.queue = Some(queue);
        Ok(())
    }

    fn on_queue(&mut self, reactor: &mut Reactor, completed: Completed, requests: &mut Vec<(RequestTag, Request)>) -> io::Result<()> {
        let Some(queue) = &mut self.queue else { return Err(io::Error::other("a command of a queue that is closed")) };
        if let Some(taken) = queue.on_completed(reactor, completed.token, completed.result)? {
            requests.push(request(taken));
        }
        self.release_if_drained();
        Ok(())
    }

    fn release_if_drained(&mut self) {
        let drained = self.queue.as_ref().is_none_or(UblkQueue::is_drained);
        if !drained {
            return;
        }
        match self.releasing.take() {
            Some(done) => {
                // The driver deletes the device only when the mapping and the file are gone.
                self.queue = None;
                done.send(());
            }
            // The order may still come; whether it will is for the main thread to know.
            None => self.notify(Notice::QueueEnded),
        }
    }

    fn notify(&self, notice: Notice) {
        // The main thread ends only with the process.
        let _ = self.notices.send(notice);
    }
}

impl FrontEnd for TargetFrontEnd {
    fn on_start(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        self.mailboxes.commands.arm(reactor, COMMANDS)?;
        self.mailboxes.orders.arm(reactor, ORDERS)
    }

    fn on_serve(&mut self, _reactor: &mut Reactor, term: Term) -> io::Result<()> {
        self.notify(Notice::Serving(term));
        Ok(())
    }

    fn on_grown(&mut self, size: VolumeSize) {
        self.notify(Notice::Grown(size));
    }

    fn on_completed(
        &mut self,
        reactor: &mut Reactor,
        engine: &mut Engine,
        completed: Completed,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        match (completed.source, completed.token) {
            (Some(Source::Mailbox), COMMANDS) => {
                let commands: Vec<_> = self.mailboxes.commands.take().collect();
                for command in commands {
                    self.on_command(reactor, engine, command, requests)?;
                }
                self.mailboxes.commands.arm(reactor, COMMANDS)
            }
            (Some(Source::Mailbox), _) => {
                let orders: Vec<Order> = self.mailboxes.orders.take().collect();
                for order in orders {
                    self.on_order(reactor, engine, order, requests)?;
                }
                self.mailboxes.orders.arm(reactor, ORDERS)
            }
            _ => self.on_queue(reactor, completed, requests),
        }
    }

    fn on_response(
        &mut self,
        reactor: &mut Reactor,
        tag: RequestTag,
        result: Result<Response, RequestError>,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        if tag == LAST_FLUSH {
            if let Some(done) = self.flushing.take() {
                done.send(result.is_ok());
            }
            return Ok(());
        }
        let Some(queue) = &mut self.queue else { return Err(io::Error::other("an answer for a queue that is closed")) };
        let read = match &result {
            Ok(Response::Read(ReadBytes::Bytes(bytes))) => Ok(Some(&**bytes)),
            Ok(Response::Read(ReadBytes::Zeroes) | Response::Done) => Ok(None),
            Err(error) => {
                tracing::warn!(%error, tag = tag.0, "a request failed");
                Err(errno(*error))
            }
        };
        queue.finish(reactor, tag.0, read)?;
        self.serve_waiting(reactor, requests)
    }

    fn due(&self) -> Option<Instant> {
        self.queue.as_ref().and_then(UblkQueue::due)
    }

    fn on_due(&mut self, reactor: &mut Reactor, requests: &mut Vec<(RequestTag, Request)>) -> io::Result<()> {
        self.serve_waiting(reactor, requests)
    }

    fn is_finished(&self) -> bool {
        // The process ends by the main thread's word, or by a signal.
        false
    }
}

/// All are EIO. File systems and virtual machines act on nothing finer: they take EILSEQ for a fault of the cable, and EINVAL
/// for one of their own.
const fn errno(error: RequestError) -> i32 {
    match error {
        RequestError::Range | RequestError::Damaged | RequestError::Aborted => -libc::EIO,
    }
}

fn request(Taken { tag, asked, data }: Taken) -> (RequestTag, Request) {
    let extent = asked.extent;
    let request = match (asked.operation, data) {
        (Operation::Write { fua }, Some(data)) => Request::Write { extent, data: data.share(), fua },
        (Operation::WriteZeroes { fua }, _) => Request::WriteZeroes { extent, fua },
        (Operation::Discard, _) => Request::Discard { extent },
        (Operation::Flush, _) => Request::Flush,
        // A write always comes with its data.
        (Operation::Read | Operation::Write { .. }, _) => Request::Read { extent },
    };
    (RequestTag(tag.into()), request)
}
