//! One volume's replica: what it has promised, what it has received, and which primary may talk to it.
//!
//! Invariants:
//! * A term is promised durably before the promise is answered, and from the moment a higher promise is asked for, no message
//!   of a lower term changes anything (I4).
//! * Live writes reach the store in sequence order without a gap, so what was received is always a prefix.
//! * The durable state changes only while no write is in the store, so a state never claims a write that may still fail.

use std::collections::{BTreeMap, VecDeque};

use carrick_backing_store::{
    BlockIndex, ByteOffset, ChangedExtents, Content, Epoch, LoggedExtents, OpenedReplica, Operation, Outcome, ReadData, ReplicaSpec,
    ReplicaState, Seq, StoreError, Synced, Term, Token, VolumeSize,
};

use super::service::ConnectionId;
use crate::control::ReplicaReport;
use crate::wire::{Body, ChangedAnswer, ErrorCode, Flags, Frame, Header, Kind, LogAnswer, StatusAnswer};

/// A primary that is bound to this replica by its promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Session {
    connection: ConnectionId,
    term: Term,
    /// Whether live writes are taken: since a copy began or the term was adopted.
    live: bool,
}

/// A change of the durable state that waits for the store to be free of writes.
#[derive(Clone, Debug)]
struct StateChange {
    connection: ConnectionId,
    request: Header,
}

/// An operation in the store, and who asked for it.
#[derive(Debug)]
struct Pending {
    connection: ConnectionId,
    request: Header,
    /// What a `SetState` makes true.
    change: Option<Change>,
}

/// A `SetState` in the store.
#[derive(Clone, Copy, Debug)]
struct Change {
    state: ReplicaState,
    /// The position it sets, if any.
    position: Option<Seq>,
    /// The position when it was submitted: all up to it is on stable media once the state is.
    before: Seq,
}

/// What a replica wants done.
#[derive(Debug)]
pub(super) enum Effect {
    Send(ConnectionId, Frame),
    Close(ConnectionId),
    Store(Token, Operation),
    Expanded(u64, Result<(), StoreError>),
}

/// An expansion in the store, and the number that whoever asked for it gave it.
#[derive(Debug)]
struct Expansion {
    token: Token,
    size: VolumeSize,
    number: u64,
}

#[derive(Debug)]
pub(super) struct VolumeReplica {
    spec: ReplicaSpec,
    state: ReplicaState,
    /// Highest sequence handed to the store.
    received: Seq,
    /// Highest sequence that the store has completed.
    position: Seq,
    durable: Seq,
    /// What the next write carries.
    epoch: Epoch,
    session: Option<Session>,
    /// Highest term asked for, promised or about to be.
    term_asked: Term,
    changes: VecDeque<StateChange>,
    /// Flushes that wait for the writes received before them, up to this sequence.
    flushes: VecDeque<(Seq, ConnectionId, Header)>,
    pending: BTreeMap<Token, Pending>,
    expansions: Vec<Expansion>,
    /// Writes in the store, live and copied.
    writes: usize,
    changing: bool,
    ack_due: bool,
    /// Why blocks may be undefined.
    failure: Option<String>,
    /// A live write of this session has failed.
    failed_write: bool,
    /// A write found no room, and none has been taken since.
    full: Option<String>,
    effects: VecDeque<Effect>,
}

impl VolumeReplica {
    pub(super) fn new(opened: &OpenedReplica) -> Self {
        Self {
            spec: opened.spec,
            state: opened.state,
            received: opened.position,
            position: opened.position,
            durable: opened.durable,
            epoch: opened.epoch,
            session: None,
            term_asked: opened.state.promised,
            changes: VecDeque::new(),
            flushes: VecDeque::new(),
            pending: BTreeMap::new(),
            expansions: Vec::new(),
            writes: 0,
            changing: false,
            ack_due: false,
            failure: None,
            failed_write: false,
            full: None,
            effects: VecDeque::new(),
        }
    }

    pub(super) fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Whose an operation is.
    pub(super) fn owner(&self, token: Token) -> Option<ConnectionId> {
        self.pending.get(&token).map(|pending| pending.connection)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.expansions.is_empty()
    }

    /// Makes it as large, unless it is.
    pub(super) fn expand(&mut self, size: VolumeSize, number: u64, token: Token) {
        let largest = self.expansions.iter().map(|expansion| expansion.size).fold(self.spec.size, VolumeSize::max);
        if size <= self.spec.size {
            return self.effects.push_back(Effect::Expanded(number, Ok(())));
        }
        // The store never shrinks a volume, and does one after the other.
        let size = size.max(largest);
        self.expansions.push(Expansion { token, size, number });
        self.effects.push_back(Effect::Store(token, Operation::Expand { size }));
    }

    fn on_expanded(&mut self, Expansion { size, number, .. }: Expansion, result: Result<(), StoreError>) {
        if result.is_ok() {
            self.spec.size = self.spec.size.max(size);
        }
        self.effects.push_back(Effect::Expanded(number, result));
    }

    pub(super) fn report(&self) -> ReplicaReport {
        ReplicaReport {
            spec: self.spec,
            state: self.state,
            position: self.position,
            durable: self.durable,
            connected: self.session.is_some(),
            failure: self.failure.as_ref().or(self.full.as_ref()).cloned(),
        }
    }

    /// Ends the session, if there is one, and with it the connection.
    pub(super) fn end_session(&mut self) {
        if let Some(session) = self.session.take() {
            self.effects.push_back(Effect::Close(session.connection));
            self.changes.retain(|change| change.connection != session.connection);
        }
    }

    pub(super) fn on_disconnected(&mut self, connection: ConnectionId) {
        self.session = self.session.filter(|session| session.connection != connection);
        self.changes.retain(|change| change.connection != connection);
    }

    pub(super) fn on_frame(&mut self, connection: ConnectionId, frame: Frame, token: &mut impl FnMut() -> Token) {
        let header = frame.header;
        match header.kind {
            Kind::Status => {
                let answer = self.status_answer(&header, Kind::StatusAnswer);
                self.effects.push_back(Effect::Send(connection, answer));
            }
            Kind::Promise => self.on_promise(connection, header, token),
            _ => match self.check_session(connection, &header) {
                Ok(session) => self.on_session_frame(session, frame, token),
                Err((code, text)) => self.refuse(connection, &header, code, text),
            },
        }
    }

    fn on_promise(&mut self, connection: ConnectionId, header: Header, token: &mut impl FnMut() -> Token) {
        if header.term < self.term_asked || header.term == Term::ZERO {
            let text = format!("term {} is promised, {} comes too late: another primary has taken over", self.term_asked, header.term);
            return self.refuse(connection, &header, ErrorCode::StaleTerm, text);
        }
        self.term_asked = header.term;
        // From here on the session before has no say, whether the promise becomes durable or not.
        if self.session.is_some_and(|session| session.connection != connection) {
            self.end_session();
        }
        self.session = None;
        self.flushes.clear();
        self.changes.push_back(StateChange { connection, request: header });
        self.advance_changes(token);
    }

    fn check_session(&self, connection: ConnectionId, header: &Header) -> Result<Session, (ErrorCode, String)> {
        let session = self.session.filter(|session| session.connection == connection && session.term == header.term).ok_or_else(|| {
            let text = format!("term {} is not promised to this connection; {} is the highest promised", header.term, self.term_asked);
            (ErrorCode::StaleTerm, text)
        })?;
        let ranged = matches!(
            header.kind,
            Kind::Write | Kind::WriteZeroes | Kind::Discard | Kind::Read | Kind::CopyWrite | Kind::CopyZeroes | Kind::Digest
        );
        if ranged && !header.extent().is_some_and(|extent| self.spec.size.extent().contains(extent)) {
            let text = format!("{header} is outside the volume of {} bytes", self.spec.size.bytes());
            return Err((ErrorCode::OutOfRange, text));
        }
        Ok(session)
    }

    fn on_session_frame(&mut self, session: Session, frame: Frame, token: &mut impl FnMut() -> Token) {
        let (connection, header) = (session.connection, frame.header);
        match header.kind {
            Kind::Write | Kind::WriteZeroes | Kind::Discard => self.on_live_write(session, frame, token),
            Kind::CopyWrite | Kind::CopyZeroes => self.submit_write(connection, frame, None, token),
            Kind::RaiseEpoch => self.on_raise_epoch(session, header, token),
            Kind::Changed => self.on_changed(session, header, token),
            Kind::CopyBegin | Kind::CopyMark | Kind::Adopt => {
                self.changes.push_back(StateChange { connection, request: header });
                self.advance_changes(token);
            }
            Kind::Flush => {
                self.flushes.push_back((self.received, connection, header));
                self.advance_flushes(token);
            }
            Kind::Log => self.submit(connection, header, Operation::LoggedAfter { after: header.sequence }, token),
            Kind::Read => {
                if let Some(extent) = header.extent() {
                    self.submit(connection, header, Operation::Read { extent, snapshot: None }, token);
                }
            }
            Kind::Digest => {
                if let Some(extent) = header.extent() {
                    self.submit(connection, header, Operation::Digest { extent }, token);
                }
            }
            Kind::Ping => {
                let pong = self.positions(Header { kind: Kind::Pong, ..header });
                self.effects.push_back(Effect::Send(connection, pong));
            }
            _ => self.refuse(connection, &header, ErrorCode::BadFrame, format!("header.kind {:?} is not a request", header.kind)),
        }
    }

    fn on_raise_epoch(&mut self, session: Session, header: Header, token: &mut impl FnMut() -> Token) {
        let (Some(to), Some(synced)) = (epoch_of(header.offset.get()), epoch_of(header.sequence.get())) else {
            let text = format!("header.offset {} or header.sequence {} is no epoch", header.offset, header.sequence);
            return self.refuse(session.connection, &header, ErrorCode::BadFrame, text);
        };
        // Of blocks that are being copied, the copy's marks tell.
        let counts = session.live && self.state.content == Content::Complete;
        let synced = if counts { synced } else { Epoch::NEVER };
        let request = Header { sequence: Seq::new(u64::from(synced.get())), ..header };
        self.submit(session.connection, request, Operation::RaiseEpoch { to, synced }, token);
    }

    fn on_changed(&mut self, session: Session, header: Header, token: &mut impl FnMut() -> Token) {
        let Some(from) = epoch_of(header.sequence.get()) else {
            let text = format!("header.sequence {} is no epoch", header.sequence);
            return self.refuse(session.connection, &header, ErrorCode::BadFrame, text);
        };
        let start = header.offset.block();
        self.submit(session.connection, header, Operation::Changed { from, snapshot: None, start }, token);
    }

    fn on_live_write(&mut self, session: Session, frame: Frame, token: &mut impl FnMut() -> Token) {
        let header = frame.header;
        let expected = self.received.next();
        if !session.live || header.sequence > expected {
            let text = format!("write {} came where {expected} was due (live writes taken: {})", header.sequence, session.live);
            return self.refuse(session.connection, &header, ErrorCode::OutOfOrder, text);
        }
        if header.sequence < expected {
            // Sent again after a reconnection; it is here already, or in the store and acknowledged from there.
            self.ack_due = true;
            return;
        }
        self.received = expected;
        self.submit_write(session.connection, frame, Some(expected), token);
    }

    fn submit_write(&mut self, connection: ConnectionId, frame: Frame, seq: Option<Seq>, token: &mut impl FnMut() -> Token) {
        let Some(extent) = frame.header.extent() else { return };
        let operation = match frame.body {
            Body::Data { checksums, data } => Operation::Write { seq, extent, checksums, data },
            _ => Operation::WriteZeroes { seq, extent },
        };
        self.writes += 1;
        self.submit(connection, frame.header, operation, token);
    }

    fn submit(&mut self, connection: ConnectionId, request: Header, operation: Operation, token: &mut impl FnMut() -> Token) {
        let token = token();
        self.pending.insert(token, Pending { connection, request, change: None });
        self.effects.push_back(Effect::Store(token, operation));
    }

    /// Starts the flushes whose writes are all in the store's completed part.
    fn advance_flushes(&mut self, token: &mut impl FnMut() -> Token) {
        while let Some((_, connection, header)) = self.flushes.pop_front_if(|(received, ..)| *received <= self.position) {
            self.submit(connection, header, Operation::Sync, token);
        }
    }

    /// Starts the next change of the durable state once no write is in the store. A copy's mark speaks of writes that have ended,
    /// and waits for none.
    fn advance_changes(&mut self, token: &mut impl FnMut() -> Token) {
        while !self.changing
            && let Some(change) = self.changes.pop_front_if(|change| self.writes == 0 || change.request.kind == Kind::CopyMark)
        {
            let request = change.request;
            let mut state = self.state;
            let mut position = None;
            match request.kind {
                Kind::Promise if request.term == state.promised => {
                    self.bind(change.connection, request);
                    continue;
                }
                Kind::Promise => state.promised = request.term,
                Kind::CopyBegin if request.flags.contains(Flags::REBUILD) => {
                    state = ReplicaState { log_term: request.term, content: Content::Rebuilding, ..state };
                    position = Some(request.sequence);
                }
                Kind::CopyBegin if state.content == Content::Complete => state.content = Content::Mixed,
                Kind::CopyBegin => {}
                Kind::CopyMark if state.content == Content::Rebuilding => {
                    state.synced.copied = request.offset.block();
                    state.synced.copied_epoch = epoch_of(request.sequence.get()).unwrap_or_default();
                }
                Kind::CopyMark => {}
                _ => {
                    // Adopt. A rebuilt replica has counted this term's writes since its copy began.
                    position = (state.log_term != request.term).then_some(request.sequence);
                    let synced = self.synced_when_adopted();
                    state = ReplicaState { log_term: request.term, content: Content::Complete, synced, ..state };
                }
            }
            let token = token();
            self.changing = true;
            self.pending.insert(
                token,
                Pending { connection: change.connection, request, change: Some(Change { state, position, before: self.position }) },
            );
            self.effects.push_back(Effect::Store(token, Operation::SetState { state, position }));
        }
    }

    /// After a copy up to the end, its mark counts for everything.
    fn synced_when_adopted(&self) -> Synced {
        let Synced { epoch, copied, copied_epoch } = self.state.synced;
        let is_whole = self.state.content == Content::Rebuilding && copied.get() >= self.spec.size.blocks();
        Synced { epoch: if is_whole { epoch.max(copied_epoch) } else { epoch }, ..Synced::default() }
    }

    /// The promise is durable: from now on this connection's messages count.
    fn bind(&mut self, connection: ConnectionId, request: Header) {
        // A later promise may already be waiting; then this one is void before it is answered.
        if request.term != self.term_asked {
            let text = format!("term {} was overtaken by {}", request.term, self.term_asked);
            return self.refuse(connection, &request, ErrorCode::StaleTerm, text);
        }
        // After a failed write the primary sends again from the position.
        self.received = self.position;
        self.failed_write = false;
        let live = self.state.log_term == request.term;
        self.session = Some(Session { connection, term: request.term, live });
        let answer = self.status_answer(&request, Kind::PromiseAnswer);
        self.effects.push_back(Effect::Send(connection, answer));
    }

    pub(super) fn on_completion(&mut self, token: Token, result: Result<Outcome, StoreError>, next: &mut impl FnMut() -> Token) {
        if let Some(index) = self.expansions.iter().position(|expansion| expansion.token == token) {
            let expansion = self.expansions.remove(index);
            return self.on_expanded(expansion, result.map(drop));
        }
        let Some(pending) = self.pending.remove(&token) else { return };
        let request = pending.request;
        let is_write = matches!(request.kind, Kind::Write | Kind::WriteZeroes | Kind::Discard | Kind::CopyWrite | Kind::CopyZeroes);
        if is_write {
            self.writes -= 1;
        }
        if pending.change.is_some() {
            self.changing = false;
        }
        match result {
            Ok(outcome) => self.on_done(pending, outcome, next),
            Err(error) => self.on_failed(pending.connection, &request, &error),
        }
        self.advance_changes(next);
    }

    fn on_done(&mut self, pending: Pending, outcome: Outcome, next: &mut impl FnMut() -> Token) {
        let (connection, request) = (pending.connection, pending.request);
        match outcome {
            Outcome::Written if matches!(request.kind, Kind::CopyWrite | Kind::CopyZeroes) => {
                self.answer(connection, Header { kind: Kind::CopyAnswer, length: 0, ..request }, Body::Empty);
            }
            Outcome::Written => {
                assert_eq!(request.sequence, self.position.next(), "live writes complete in sequence order");
                self.position = request.sequence;
                self.full = None;
                self.ack_due = true;
                if request.flags.contains(Flags::FUA) {
                    self.submit(connection, Header { kind: Kind::Flush, ..request }, Operation::Sync, next);
                }
                self.advance_flushes(next);
            }
            Outcome::Synced { durable } => {
                // A sync that began under an earlier position count says nothing about this one.
                if request.term == self.state.log_term {
                    self.durable = self.durable.max(durable);
                }
                self.ack_due = true;
            }
            Outcome::StateSet => self.on_state_set(pending),
            Outcome::Read(ReadData::Zeroes) => {
                self.answer(connection, Header { kind: Kind::ReadAnswer, flags: Flags::ZEROES, ..request }, Body::Empty);
            }
            Outcome::Read(ReadData::Blocks { checksums, data }) => {
                let header = Header { kind: Kind::ReadAnswer, flags: Flags::NONE, ..request };
                self.answer(connection, header, Body::Data { checksums, data });
            }
            Outcome::Logged(extents) => {
                let extents = if self.failure.is_some() { LoggedExtents::Forgotten } else { extents };
                self.answer(connection, Header { kind: Kind::LogAnswer, ..request }, Body::Log(LogAnswer { extents }));
            }
            Outcome::Epoch(epoch) => {
                self.epoch = epoch;
                let synced = epoch_of(request.sequence.get()).unwrap_or_default();
                self.state.synced.epoch = self.state.synced.epoch.max(synced);
                let offset = ByteOffset::new(u64::from(epoch.get()));
                self.answer(connection, Header { kind: Kind::RaiseEpochAnswer, offset, ..request }, Body::Empty);
            }
            Outcome::Changed(ChangedExtents { extents, next }) => {
                let extents = extents.into_iter().map(|changed| changed.extent).collect();
                let found = ChangedAnswer { extents, next: next.map(BlockIndex::offset) };
                self.answer(connection, Header { kind: Kind::ChangedAnswer, ..request }, Body::Changed(found));
            }
            Outcome::Digest(digest) => {
                let sequence = Seq::new(digest.get());
                self.answer(connection, Header { kind: Kind::DigestAnswer, sequence, ..request }, Body::Empty);
            }
            // Nothing here asks for these yet.
            Outcome::Done | Outcome::Scrubbed(_) => {}
        }
    }

    fn on_state_set(&mut self, pending: Pending) {
        let (connection, request) = (pending.connection, pending.request);
        let Some(change) = pending.change else { return };
        self.state = change.state;
        if let Some(position) = change.position {
            self.position = position;
            self.received = position;
        }
        self.durable = change.position.unwrap_or(self.durable.max(change.before));
        if request.kind == Kind::Promise {
            return self.bind(connection, request);
        }
        if let Some(session) = &mut self.session {
            session.live = self.state.log_term == session.term;
        }
        let kind = match request.kind {
            Kind::CopyBegin => Kind::CopyBeginAnswer,
            Kind::CopyMark => Kind::CopyMarkAnswer,
            _ => Kind::AdoptAnswer,
        };
        self.answer(connection, Header { kind, flags: Flags::NONE, sequence: self.position, ..request }, Body::Empty);
    }

    fn on_failed(&mut self, connection: ConnectionId, request: &Header, error: &StoreError) {
        let is_live = matches!(request.kind, Kind::Write | Kind::WriteZeroes | Kind::Discard);
        if is_live && std::mem::replace(&mut self.failed_write, true) {
            // Behind one that has failed, which has told why and ended the session.
            return;
        }
        let code = match error {
            StoreError::Corrupt { .. } => ErrorCode::Corrupt,
            StoreError::NoSpace { .. } => ErrorCode::NoSpace,
            StoreError::Poisoned(_) => ErrorCode::Poisoned,
            StoreError::UnknownVolume(_) => ErrorCode::UnknownVolume,
            StoreError::EpochForgotten { .. } => ErrorCode::EpochForgotten,
            _ => ErrorCode::Io,
        };
        match error {
            _ if matches!(request.kind, Kind::Read | Kind::Changed | Kind::Digest) => {}
            // It has changed nothing: the primary comes back, and sends it again.
            StoreError::NoSpace { .. } => self.full = Some(error.to_string()),
            _ => self.failure = Some(error.to_string()),
        }
        self.refuse(connection, request, code, error.to_string());
        // A write or a state that failed ends the session: the primary must not count on anything after it.
        if !matches!(request.kind, Kind::Read | Kind::Log | Kind::Changed | Kind::Digest)
            && self.session.is_some_and(|session| session.connection == connection)
        {
            self.end_session();
        }
    }

    /// An acknowledgement, if one is due: cumulative, so one tells of all writes completed since the last.
    pub(super) fn take_ack(&mut self) -> Option<(ConnectionId, Frame)> {
        if !std::mem::take(&mut self.ack_due) {
            return None;
        }
        let session = self.session?;
        Some((session.connection, self.positions(Header::new(Kind::Ack, self.spec.volume, session.term))))
    }

    /// `header` with the positions of Ack and Pong.
    fn positions(&self, header: Header) -> Frame {
        let durable = carrick_backing_store::ByteOffset::new(self.durable.get());
        Frame::new(Header { sequence: self.position, offset: durable, ..header }, Body::Empty)
    }

    fn status_answer(&self, request: &Header, kind: Kind) -> Frame {
        let status = StatusAnswer {
            promised: self.term_asked.max(self.state.promised),
            log_term: self.state.log_term,
            position: self.position,
            durable: self.durable,
            size: self.spec.size,
            content: self.state.content,
            epoch: self.epoch,
            synced: self.state.synced,
        };
        Frame::new(Header { kind, flags: Flags::NONE, ..*request }, Body::Status(status))
    }

    fn answer(&mut self, connection: ConnectionId, header: Header, body: Body) {
        let frame = match body {
            Body::Data { .. } => Frame { header, body },
            body => Frame::new(header, body),
        };
        self.effects.push_back(Effect::Send(connection, frame));
    }

    fn refuse(&mut self, connection: ConnectionId, request: &Header, code: ErrorCode, text: String) {
        let mut frame = Frame::error(request, code, text);
        match code {
            ErrorCode::StaleTerm => frame.header.term = self.term_asked,
            ErrorCode::OutOfOrder => frame.header.sequence = self.position,
            _ => {}
        }
        self.effects.push_back(Effect::Send(connection, frame));
    }
}

/// An epoch in a field that has room for more.
fn epoch_of(field: u64) -> Option<Epoch> {
    u32::try_from(field).ok().map(Epoch::new)
}
