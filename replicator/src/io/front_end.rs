//! Where requests come from: the ublk queue of a target, or a load generator.

use std::io;
use std::time::Instant;

use carrick_backing_store::{Term, VolumeSize};

use super::reactor::{Completed, Reactor};
use crate::engine::{Engine, Request, RequestError, RequestTag, Response};

/// A source of requests that shares the primary's thread and ring. All calls come from that thread.
pub trait FrontEnd {
    /// The primary begins to run, long before it may serve: entries that wait for other threads may be pushed from now on.
    /// Called once, before everything else.
    ///
    /// # Errors
    /// End the primary.
    fn on_start(&mut self, _reactor: &mut Reactor) -> io::Result<()> {
        Ok(())
    }

    /// This engine became primary: requests may be taken from now on. Called once.
    ///
    /// # Errors
    /// End the primary.
    fn on_serve(&mut self, reactor: &mut Reactor, term: Term) -> io::Result<()>;

    /// The volume has this size from now on.
    fn on_grown(&mut self, _size: VolumeSize) {}

    /// An entry that this front end pushed with [`super::Source::FrontEnd`] or [`super::Source::Mailbox`] has completed.
    /// New requests are pushed to `requests`. The engine is there to be asked for its status, or to be told to abort.
    ///
    /// # Errors
    /// End the primary.
    fn on_completed(
        &mut self,
        reactor: &mut Reactor,
        engine: &mut Engine,
        completed: Completed,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()>;

    /// A request has ended. May push to `requests`, too (a load generator's next one).
    ///
    /// # Errors
    /// End the primary.
    fn on_response(
        &mut self,
        reactor: &mut Reactor,
        tag: RequestTag,
        result: Result<Response, RequestError>,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()>;

    /// When [`FrontEnd::on_due`] is to be called; `None`: nothing here waits for a time. Asked before each wait.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// The time that [`FrontEnd::due`] named has come.
    ///
    /// # Errors
    /// End the primary.
    fn on_due(&mut self, _reactor: &mut Reactor, _requests: &mut Vec<(RequestTag, Request)>) -> io::Result<()> {
        Ok(())
    }

    /// Whether the primary should end. Asked before each wait.
    fn is_finished(&self) -> bool;
}
