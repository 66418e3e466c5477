//! What the control socket asks of a [`Server`]: create, expand, delete, status.

use carrick_backing_store::{ReplicaSpec, ReplicaStore, StoreError};

use super::control_socket::Command;
use super::server::Server;
use crate::control::{ControlError, ControlErrorCode, ReplicaAnswer, ReplicaProcessStatus, ReplicaRequest};

impl<S: ReplicaStore> Server<S> {
    /// Answers, now or, for a deletion, when the store has finished with the replica.
    pub(super) fn on_control(&mut self, command: Command<ReplicaRequest, ReplicaAnswer>) {
        let answer = match command.request {
            ReplicaRequest::Status => self.status(),
            ReplicaRequest::Create { spec } => self.create(spec),
            ReplicaRequest::Expand { spec } => {
                self.expansions += 1;
                self.expanding.push((self.expansions, spec, command.reply));
                return self.service.expand(spec, self.expansions);
            }
            ReplicaRequest::Delete { volume } => {
                self.deleting.push((volume, command.reply));
                return self.finish_deletions();
            }
            // The data thread's loop has taken it.
            ReplicaRequest::Shutdown => Ok(ReplicaAnswer::Done),
        };
        command.reply.send(answer.unwrap_or_else(ReplicaAnswer::Refused));
    }

    fn status(&self) -> Result<ReplicaAnswer, ControlError> {
        Ok(ReplicaAnswer::Status(Box::new(ReplicaProcessStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            store: self.store_id,
            path: self.path.clone(),
            endpoints: self.listeners.endpoints(),
            usage: self.store.usage().map_err(refusal)?,
            poisoned: self.store.poisoned().map(str::to_owned),
            scrub: self.scrubber.report(),
            replicas: self.service.report(),
        })))
    }

    fn create(&mut self, spec: ReplicaSpec) -> Result<ReplicaAnswer, ControlError> {
        let volume = spec.volume;
        if self.deleting.iter().any(|(deleting, _)| *deleting == volume) {
            let message = format!("the replica of volume {volume} is being deleted: ask again when that is done");
            return Err(ControlError { code: ControlErrorCode::Busy, message });
        }
        if self.half_deleted.contains(&volume) {
            // The store's memory of it is of the time when it was opened: served from that, it would claim too little.
            let message = format!("the replica of volume {volume} could not be deleted: restart carrick-replica to look at it afresh");
            return Err(ControlError { code: ControlErrorCode::Failed, message });
        }
        let created = self.store.create(spec);
        // It has begun things, and wants to be asked when they go on.
        self.store_woke = true;
        created.map_err(refusal)?;
        if !self.service.report().iter().any(|known| known.spec.volume == volume) {
            let created = self.store.replicas().into_iter().find(|replica| replica.spec.volume == volume);
            self.service.add(created.ok_or_else(|| refusal(StoreError::UnknownVolume(volume)))?);
            tracing::info!(store = %self.store_id, %volume, bytes = spec.size.bytes().get(), "replica created");
        }
        Ok(ReplicaAnswer::Done)
    }

    /// The store has made a replica larger, or can't.
    pub(super) fn on_expanded(&mut self, number: u64, result: Result<(), StoreError>) {
        let Some(index) = self.expanding.iter().position(|(expanding, ..)| *expanding == number) else { return };
        let (_, spec, reply) = self.expanding.swap_remove(index);
        let (store, volume, bytes) = (self.store_id, spec.volume, spec.size.bytes());
        reply.send(match result {
            Ok(()) => {
                tracing::info!(%store, %volume, %bytes, "the replica is as large as it is to be");
                ReplicaAnswer::Done
            }
            Err(error) => {
                tracing::warn!(%store, %volume, %bytes, %error, "a replica can't be made larger");
                ReplicaAnswer::Refused(refusal(error))
            }
        });
    }

    /// Deletes what is to be deleted and no longer in use.
    pub(super) fn finish_deletions(&mut self) {
        if self.deleting.is_empty() {
            return;
        }
        let (service, scrubbed) = (&mut self.service, self.scrubber.reading());
        for (volume, reply) in self.deleting.extract_if(.., |(volume, _)| service.remove(*volume) && scrubbed != Some(*volume)) {
            let deleted = self.store.delete(volume);
            self.store_woke = true;
            match deleted {
                Ok(()) => {
                    self.scrubber.forget(volume);
                    tracing::info!(store = %self.store_id, %volume, "replica deleted");
                    self.half_deleted.retain(|half| *half != volume);
                    reply.send(ReplicaAnswer::Done);
                }
                Err(error) => {
                    tracing::error!(store = %self.store_id, %volume, %error, "a replica could not be deleted; it is no longer served");
                    self.half_deleted.push(volume);
                    reply.send(ReplicaAnswer::Refused(refusal(error)));
                }
            }
        }
    }
}

fn refusal(error: StoreError) -> ControlError {
    let code = match &error {
        StoreError::NoSpace { .. } => ControlErrorCode::NoSpace,
        StoreError::Conflict { .. } => ControlErrorCode::Conflict,
        StoreError::UnknownVolume(_) => ControlErrorCode::NotFound,
        _ => ControlErrorCode::Failed,
    };
    ControlError { code, message: error.to_string() }
}
