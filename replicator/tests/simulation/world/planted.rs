//! Bugs that a test plants, to see that the simulation finds them: at the borders of engine, replica, store and metadata store, so
//! that nothing that ships knows of them.

use std::collections::BTreeSet;

use carrick_backing_store::{ByteOffset, Completion, LoggedExtents, OpenedReplica, Operation, Outcome, Term, Token};
use carrick_replicator::engine::ConfigRequest;
use carrick_replicator::replica::{ConnectionId, ReplicaService};
use carrick_replicator::wire::{Body, ChangedAnswer, Frame, Header, Kind, LogAnswer};

use super::faults::FaultKind;
use super::{Event, World};
use crate::machine_store::volume;

/// What somebody might have got wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A write counts as received as soon as it is sent.
    AcknowledgeOnSend,
    /// What a replica promises it forgets when it ends.
    ForgetPromise,
    /// Only the first replica is flushed; the others say that they were, too.
    FlushOne,
    /// The record is said to have changed, and has not.
    ForgetConfig,
    /// A replica writes two writes that follow each other in the other order.
    ApplyOutOfOrder,
    /// A replica that returns is said to lack nothing.
    CopyNothing,
    /// Replicas are said to hold the same, whatever they wrote last.
    ServeUnreconciled,
    /// A sync that has failed is answered like one that has not.
    IgnoreFailedSync,
    /// Nobody is said to have served before.
    ForgetPredecessor,
}

impl Bug {
    pub const ALL: [Self; 9] = [
        Self::AcknowledgeOnSend,
        Self::ForgetPromise,
        Self::FlushOne,
        Self::ForgetConfig,
        Self::ApplyOutOfOrder,
        Self::CopyNothing,
        Self::ServeUnreconciled,
        Self::IgnoreFailedSync,
        Self::ForgetPredecessor,
    ];

    /// The faults among which it matters, if it takes some that are rare together.
    pub(super) const fn faults(self) -> Option<&'static [FaultKind]> {
        match self {
            Self::FlushOne => Some(&[FaultKind::LastOne, FaultKind::KillReplica, FaultKind::PowerEverywhere]),
            Self::ForgetConfig => Some(&[FaultKind::LastOne, FaultKind::KillReplica]),
            Self::IgnoreFailedSync => Some(&[FaultKind::FailSync, FaultKind::PowerEverywhere]),
            Self::ForgetPredecessor => Some(&[FaultKind::TakeOver]),
            _ => None,
        }
    }
}

/// What a bug needs to know of a machine.
#[derive(Debug, Default)]
pub(super) struct Planted {
    /// What it had promised when it was started.
    promised: Term,
    syncs: BTreeSet<Token>,
    /// A write that the next one overtakes.
    held: Option<(Token, Operation)>,
}

impl Planted {
    pub(super) fn at_start(found: &[OpenedReplica]) -> Self {
        Self { promised: found.first().map_or(Term::ZERO, |found| found.state.promised), ..Self::default() }
    }
}

impl World {
    pub(super) fn has(&self, bug: Bug) -> bool {
        self.plan.bug == Some(bug)
    }

    /// A frame on its way, as the bug leaves it.
    pub(super) fn plant_in_frame(&mut self, connection: ConnectionId, frame: Frame, to_replica: bool) -> Frame {
        let header = frame.header;
        match (self.plan.bug, header.kind) {
            (Some(Bug::AcknowledgeOnSend), Kind::Write | Kind::WriteZeroes | Kind::Discard) if to_replica => {
                let ack = Header { sequence: header.sequence, ..Header::new(Kind::Ack, volume(), header.term) };
                self.schedule(self.now, Event::ToTarget(connection, Box::new(Frame::new(ack, Body::Empty))));
                frame
            }
            (Some(Bug::FlushOne), Kind::Ack | Kind::Pong) if !to_replica && self.connections[&connection].replica > 0 => {
                Frame::new(Header { offset: ByteOffset::new(header.sequence.get()), ..header }, Body::Empty)
            }
            (Some(Bug::CopyNothing), Kind::ChangedAnswer) => {
                Frame::new(header, Body::Changed(ChangedAnswer { extents: Vec::new(), next: None }))
            }
            (Some(Bug::ServeUnreconciled), Kind::LogAnswer) => {
                Frame::new(header, Body::Log(LogAnswer { extents: LoggedExtents::All(Vec::new()) }))
            }
            _ => frame,
        }
    }

    /// Whether what the metadata store is asked only seems to happen.
    pub(super) fn is_forgotten(&self, request: &ConfigRequest) -> bool {
        matches!(request, ConfigRequest::Swap(next) if next.members != self.record.members) && self.has(Bug::ForgetConfig)
    }

    /// Hands an operation to a replica's store, as the bug leaves it.
    pub(super) fn submit_planted(&mut self, index: usize, token: Token, mut operation: Operation) {
        let bug = self.plan.bug;
        let machine = &mut self.machines[index];
        let planted = &mut machine.planted;
        match (bug, &mut operation) {
            (Some(Bug::ForgetPromise), Operation::SetState { state, .. }) => state.promised = planted.promised,
            (Some(Bug::IgnoreFailedSync), Operation::Sync) => drop(planted.syncs.insert(token)),
            (Some(Bug::ApplyOutOfOrder), operation) if is_live_write(operation) => match planted.held.take() {
                // Only behind others: what ends it is sure to come.
                None if machine.operations > 1 => {
                    planted.held = Some((token, operation.clone()));
                    return;
                }
                None => {}
                Some((held_token, mut held)) => {
                    swap_sequences(&mut held, operation);
                    machine.store.submit(held_token, operation.clone());
                    return machine.store.submit(token, held);
                }
            },
            _ => {}
        }
        machine.store.submit(token, operation);
    }

    /// What a replica's store has done, as the bug tells it.
    pub(super) fn plant_in_completions(&mut self, index: usize, completions: &mut [Completion]) {
        let machine = &mut self.machines[index];
        if !completions.is_empty()
            && let Some((token, held)) = machine.planted.held.take()
        {
            machine.store.submit(token, held);
        }
        let Some(position) = machine.service.as_ref().map(ReplicaService::report).and_then(|report| Some(report.first()?.position)) else {
            return;
        };
        for completion in completions.iter_mut().filter(|completion| machine.planted.syncs.remove(&completion.token)) {
            if completion.result.is_err() {
                completion.result = Ok(Outcome::Synced { durable: position });
            }
        }
    }
}

fn is_live_write(operation: &Operation) -> bool {
    matches!(operation, Operation::Write { seq: Some(_), .. } | Operation::WriteZeroes { seq: Some(_), .. })
}

fn swap_sequences(one: &mut Operation, other: &mut Operation) {
    let (
        Operation::Write { seq: left, .. } | Operation::WriteZeroes { seq: left, .. },
        Operation::Write { seq: right, .. } | Operation::WriteZeroes { seq: right, .. },
    ) = (one, other)
    else {
        return;
    };
    std::mem::swap(left, right);
}
