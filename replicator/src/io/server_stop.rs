//! The end of a [`Server`]: nothing that a peer was promised, or a replica has taken, is left undone.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use carrick_backing_store::{Completion, Operation, ReplicaStore, Token};

use super::reactor::{Completed, Source};
use super::server::{PAUSE, STORE, Server, ServerError};

/// How long connections may take to close at the end.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

impl<S: ReplicaStore> Server<S> {
    /// Ends every connection, waits for the store, and syncs every replica.
    pub(super) fn stop(&mut self, completed: &mut Vec<Completed>) -> Result<(), ServerError> {
        tracing::info!(store = %self.store_id, connections = self.peers.len(), "stopping");
        self.listeners.shut_down();
        for key in self.peers.keys().copied().collect::<Vec<_>>() {
            self.connections.close(&mut self.reactor, key)?;
            self.forget(key);
        }
        // What peers sent before is still carried out, and what that brings about.
        self.act()?;
        while self.in_store > 0 {
            if self.reap() {
                self.act()?;
            } else {
                self.wait_stopping(None, completed)?;
            }
        }
        self.finish_deletions();
        self.sync_all(completed)?;
        let until = Instant::now() + CLOSE_LIMIT;
        self.connections.close_all(&mut self.reactor)?;
        while self.connections.in_use() > 0 && Instant::now() < until {
            self.wait_stopping(Some(until.saturating_duration_since(Instant::now())), completed)?;
        }
        Ok(())
    }

    fn sync_all(&mut self, completed: &mut Vec<Completed>) -> Result<(), ServerError> {
        let replicas = self.store.replicas();
        let mut waiting = replicas.len();
        for (number, replica) in (0..).zip(&replicas) {
            self.store.submit(replica.spec.volume, Token(number), Operation::Sync);
        }
        let mut failed = None;
        while waiting > 0 {
            let mut completions = Vec::new();
            self.store.reap(&mut completions);
            waiting -= completions.len();
            for Completion { volume, result, .. } in completions.drain(..) {
                if let Err(source) = result {
                    tracing::error!(store = %self.store_id, %volume, error = %source, "the last sync failed");
                    failed = failed.or(Some(ServerError::Sync { volume, source }));
                }
            }
            if waiting > 0 {
                self.wait_stopping(None, completed)?;
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Waits while stopping: only the store and connections that are closing matter.
    fn wait_stopping(&mut self, timeout: Option<Duration>, completed: &mut Vec<Completed>) -> io::Result<()> {
        self.reactor.wait(timeout, completed)?;
        for completed in completed.drain(..) {
            match (completed.source, completed.token) {
                (Some(Source::Connection), _) => {
                    self.connections.on_completed(&mut self.reactor, &completed)?;
                }
                (Some(Source::Mailbox), STORE) => {
                    self.store_woke = true;
                    self.arm_store()?;
                }
                (Some(Source::FrontEnd), 0..PAUSE) if completed.result >= 0 => {
                    // SAFETY: the kernel has just made this descriptor for us; nobody is served any more.
                    drop(unsafe { OwnedFd::from_raw_fd(completed.result) });
                }
                _ => {}
            }
        }
        Ok(())
    }
}
