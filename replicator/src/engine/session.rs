//! The conversation with one replica: from the connection to its place among the joined.

use carrick_backing_store::{Content, Digest, Seq, Term};

use super::member::Stage;
use super::{Action, Engine, MemberIndex, Outstanding, Phase};
use crate::time::Monotonic;
use crate::wire::{Body, ErrorBody, ErrorCode, Frame, Header, Hello, Kind, RequestId, StatusAnswer, VERSION};

impl Engine {
    pub(super) fn connect(&mut self, now: Monotonic, index: MemberIndex) {
        self.members[index.0].stage = Stage::Connecting;
        self.members[index.0].quiet_since = now;
        self.actions.push_back(Action::Connect(index));
    }

    /// A member's connection is open.
    pub fn on_connected(&mut self, now: Monotonic, index: MemberIndex) {
        if !matches!(self.members[index.0].stage, Stage::Connecting) {
            return;
        }
        self.members[index.0].stage = Stage::Greeting;
        // A greeting names no volume's term.
        let header = Header { term: Term::ZERO, ..self.header(Kind::Hello) };
        self.request(now, index, Frame::new(header, Body::Hello(Hello::OURS)), Outstanding::Control);
    }

    /// A member's connection could not be opened, or is gone.
    pub fn on_disconnected(&mut self, now: Monotonic, index: MemberIndex, reason: String) {
        if !self.members[index.0].is_down() {
            self.lose_member(now, index, reason, false);
        }
    }

    /// Drops a member's connection.
    pub(super) fn drop_member(&mut self, now: Monotonic, index: MemberIndex, reason: String, refused: bool) {
        self.actions.push_back(Action::Disconnect(index));
        self.lose_member(now, index, reason, refused);
    }

    fn lose_member(&mut self, now: Monotonic, index: MemberIndex, reason: String, refused: bool) {
        let was_participant = !self.is_serving()
            && matches!(
                self.members[index.0].stage,
                Stage::Comparing { .. } | Stage::Reconciling { .. } | Stage::Reconciled | Stage::Adopting | Stage::Joined
            );
        self.members[index.0].went_down(now, reason, refused);
        self.drop_chunks(now, index);
        let mut lost: Vec<RequestId> =
            self.outstanding.iter().filter(|(_, (member, _))| *member == index).map(|(request, _)| *request).collect();
        lost.sort_unstable();
        for request in lost {
            match self.outstanding.remove(&request) {
                Some((_, Outstanding::Read { job, .. })) => self.read(now, job),
                Some((_, Outstanding::CopyRead { destination, chunk, tried })) => {
                    self.on_copy_read_failed(now, index, destination, chunk, tried);
                }
                Some((_, Outstanding::Changed { destination, side })) => self.on_changed_unanswered(now, destination, side),
                Some((_, Outstanding::Digest | Outstanding::DigestRead)) => self.retry_round(now),
                _ => {}
            }
        }
        if was_participant {
            self.restart_gathering(now);
        }
        self.arm_stall_retry(now);
    }

    /// Sends a frame that is to be answered under a request id of its own: this one.
    pub(super) fn request(&mut self, now: Monotonic, index: MemberIndex, mut frame: Frame, outstanding: Outstanding) -> RequestId {
        let request = self.next_request;
        self.next_request = RequestId(request.0 + 1);
        frame.header.request = request;
        let member = &mut self.members[index.0];
        if !member.owes() {
            member.quiet_since = now;
        }
        match outstanding {
            Outstanding::Read { .. } | Outstanding::CopyRead { .. } | Outstanding::DigestRead => member.reads += 1,
            _ => member.answers += 1,
        }
        self.outstanding.insert(request, (index, outstanding));
        self.actions.push_back(Action::Send(index, frame));
        request
    }

    /// Takes the request off the books that a frame answers.
    fn settle(&mut self, index: MemberIndex, request: RequestId) -> Option<Outstanding> {
        // An answer under another member's request id answers nothing.
        self.outstanding.get(&request).filter(|(member, _)| *member == index)?;
        let (_, outstanding) = self.outstanding.remove(&request)?;
        let member = &mut self.members[index.0];
        match outstanding {
            Outstanding::Read { .. } | Outstanding::Abandoned | Outstanding::CopyRead { .. } | Outstanding::DigestRead => member.reads -= 1,
            _ => member.answers -= 1,
        }
        self.trim_read_times();
        Some(outstanding)
    }

    /// Forgets what a member that stays connected still owes: the answers, if they come, mean nothing any more.
    pub(super) fn forget_outstanding(&mut self, index: MemberIndex) {
        self.outstanding.retain(|_, (member, _)| *member != index);
        let member = &mut self.members[index.0];
        (member.reads, member.answers, member.pinged) = (0, 0, false);
    }

    /// A member sent a frame.
    pub fn on_frame(&mut self, now: Monotonic, index: MemberIndex, frame: Frame) {
        if self.members[index.0].is_down() || matches!(self.phase, Phase::Superseded) {
            return;
        }
        self.members[index.0].quiet_since = now;
        let header = frame.header;
        if let Body::Error(error) = &frame.body {
            return self.on_error(now, index, &header, error);
        }
        if matches!(header.kind, Kind::Ack | Kind::Pong) {
            self.on_positions(now, index, &header);
        }
        let settled = if header.kind == Kind::Ack { None } else { self.settle(index, header.request) };
        match (header.kind, settled) {
            (Kind::Pong, Some(Outstanding::Ping { asked })) => {
                self.members[index.0].pinged = false;
                self.on_confirmed(now, index, asked);
            }
            (Kind::ReadAnswer, Some(Outstanding::Read { job, asked })) => {
                self.note_read_time(now, index, asked);
                self.on_confirmed(now, index, asked);
                self.on_read(now, job, frame);
            }
            (Kind::ReadAnswer, Some(Outstanding::CopyRead { destination, chunk, .. })) => {
                self.on_copy_read(now, destination, chunk, frame);
            }
            (Kind::DigestAnswer, Some(Outstanding::Digest)) => self.on_digest(now, index, Some(Digest::new(header.sequence.get()))),
            (Kind::ReadAnswer, Some(Outstanding::DigestRead)) => self.on_digest_read(now, Some(frame)),
            (Kind::CopyAnswer, Some(Outstanding::CopyWrite { destination, chunk })) => self.on_copy_written(now, destination, chunk),
            (Kind::RaiseEpochAnswer, Some(Outstanding::Epoch(epoch))) => self.on_epoch_raised(now, index, epoch),
            (Kind::ChangedAnswer, Some(Outstanding::Changed { destination, side })) => {
                self.on_changed(now, index, destination, side, frame);
            }
            (Kind::StatusAnswer, Some(Outstanding::Size)) => {
                if let Body::Status(status) = frame.body {
                    self.members[index.0].size = Some(status.size);
                }
            }
            (_, Some(Outstanding::Control)) => self.on_step(now, index, frame),
            _ => {}
        }
        self.arm_stall_retry(now);
    }

    /// A step of the conversation was answered.
    fn on_step(&mut self, now: Monotonic, index: MemberIndex, frame: Frame) {
        let kind = frame.header.kind;
        match (&mut self.members[index.0].stage, frame.body) {
            (Stage::Greeting, Body::HelloAnswer(answer)) if answer.version == VERSION => {
                self.inquire(now, index);
            }
            (Stage::Inquiring, Body::Status(status)) => self.on_status(now, index, status),
            (Stage::Promising, Body::Status(status)) => self.on_promised(now, index, status),
            (Stage::Comparing { logged, .. }, Body::Log(answer)) => {
                *logged = Some(answer.extents);
                self.advance_election(now);
            }
            (Stage::Reconciling { begun: false }, _) if kind == Kind::CopyBeginAnswer => {
                self.members[index.0].stage = Stage::Reconciling { begun: true };
                self.advance_copy(now, index);
            }
            (Stage::Adopting, _) if kind == Kind::AdoptAnswer => {
                self.members[index.0].joined();
                self.serve_when_adopted(now);
            }
            (Stage::CopyBeginning, _) if kind == Kind::CopyBeginAnswer => {
                self.members[index.0].stage = Stage::Copying;
                if self.members[index.0].epoch_told < self.epochs.current {
                    // It wasn't told of those that were raised while it began. No live write may carry an earlier one, either.
                    self.tell_epoch(now, index, true);
                }
                self.send_backlog(now, index);
                self.advance_copy(now, index);
            }
            (Stage::CopyAdopting, _) if kind == Kind::AdoptAnswer => self.on_joined(now, index),
            _ => {
                let reason = format!("it answered {kind:?} where that makes no sense");
                self.drop_member(now, index, reason, true);
            }
        }
    }

    pub(super) fn inquire(&mut self, now: Monotonic, index: MemberIndex) {
        self.members[index.0].stage = Stage::Inquiring;
        let status = Frame::new(self.header(Kind::Status), Body::Empty);
        self.request(now, index, status, Outstanding::Control);
    }

    fn on_status(&mut self, now: Monotonic, index: MemberIndex, status: StatusAnswer) {
        if !self.has_room(now, index, status.size) {
            return;
        }
        self.members[index.0].stage = Stage::Known(status);
        match self.term {
            None => self.advance_election(now),
            Some(term) if status.promised > term => self.supersede(status.promised),
            Some(_) => self.ask_promise(now, index),
        }
    }

    fn on_promised(&mut self, now: Monotonic, index: MemberIndex, status: StatusAnswer) {
        if !self.has_room(now, index, status.size) {
            return;
        }
        self.members[index.0].stage = Stage::Promised(status);
        if !self.is_serving() {
            if self.stalled_chunks.is_empty() {
                return self.advance_election(now);
            }
            // The chosen content has a damaged block; this member may hold the same content undamaged.
            return self.restart_gathering(now);
        }
        let member = &self.members[index.0];
        let here = Some(status.log_term) == self.term && status.content == Content::Complete;
        // A position below what it once acknowledged means that its machine lost power: it is not what it was.
        let kept = status.position >= member.received && status.position >= self.backlog.before();
        if member.in_sync && here && kept {
            let member = &mut self.members[index.0];
            (member.received, member.durable) = (status.position, status.durable);
            (member.sent, member.flush_sent) = (status.position, Seq::ZERO);
            // It lacks what was written since, and so far its answer says nothing of that.
            self.tell_epoch(now, index, false);
            // The backlog goes first: a read that is sent after it finds every acknowledged write.
            self.send_backlog(now, index);
            self.on_joined(now, index);
        } else {
            // What it lost no longer counts as held. It stays in the count until a majority without it has everything.
            let member = &mut self.members[index.0];
            member.received = if here { status.position.min(member.received) } else { Seq::ZERO };
            member.durable = member.durable.min(member.received);
            if self.may_destroy(index) {
                let member = &mut self.members[index.0];
                (member.in_sync, member.left_at) = (false, None);
                self.start_rebuilds(now);
            }
        }
    }

    fn on_joined(&mut self, now: Monotonic, index: MemberIndex) {
        self.members[index.0].joined();
        self.tell_synced_soon(now);
        self.advance_acknowledged(now);
        self.start_rebuilds(now);
        self.retry_reads(now);
        self.retry_stalled_chunks(now);
        self.propose_change(now);
    }

    /// An acknowledgement or a pong tells what a member has.
    fn on_positions(&mut self, now: Monotonic, index: MemberIndex, header: &Header) {
        let member = &mut self.members[index.0];
        if !member.takes_writes() || Some(header.term) != self.term {
            return;
        }
        let (received, durable) = (header.sequence, Seq::new(header.offset.get()));
        if received > member.sent || durable > received {
            let reason = format!("it acknowledges write {received} (durable {durable}), {} was the last sent", member.sent);
            return self.drop_member(now, index, reason, true);
        }
        member.received = member.received.max(received);
        member.durable = member.durable.max(durable);
        self.advance_acknowledged(now);
        self.start_rebuilds(now);
    }

    fn on_error(&mut self, now: Monotonic, index: MemberIndex, header: &Header, error: &ErrorBody) {
        let settled = self.settle(index, header.request);
        match (error.code, settled) {
            (ErrorCode::StaleTerm, _) if self.term.is_some_and(|term| header.term > term) => self.supersede(header.term),
            (ErrorCode::Corrupt | ErrorCode::Io, Some(Outstanding::Read { job, .. })) => {
                self.members[index.0].last_error = Some(error.text.clone());
                self.on_damaged_read(now, index, job);
            }
            (ErrorCode::Corrupt | ErrorCode::Io, Some(Outstanding::CopyRead { destination, chunk, tried })) => {
                self.members[index.0].last_error = Some(error.text.clone());
                self.on_copy_read_failed(now, index, destination, chunk, tried);
            }
            (ErrorCode::Corrupt | ErrorCode::Io | ErrorCode::EpochForgotten, Some(Outstanding::Changed { destination, .. })) => {
                self.members[index.0].last_error = Some(error.text.clone());
                self.copy_whole(now, destination);
            }
            (ErrorCode::Corrupt | ErrorCode::Io, Some(Outstanding::Digest)) => self.on_digest(now, index, None),
            (ErrorCode::Corrupt | ErrorCode::Io, Some(Outstanding::DigestRead)) => self.on_digest_read(now, None),
            // To a read that nobody waits for any more.
            (
                ErrorCode::Corrupt | ErrorCode::Io | ErrorCode::EpochForgotten,
                None | Some(Outstanding::Abandoned | Outstanding::Ignored),
            ) if header.request != RequestId(0) => {}
            (code, settled) => {
                // What was settled above is still to be done: put back what losing the member hands on.
                let is_handed_on = |settled: &Outstanding| match settled {
                    Outstanding::Read { .. } | Outstanding::CopyRead { .. } | Outstanding::DigestRead => Some(true),
                    Outstanding::Changed { .. } | Outstanding::Digest => Some(false),
                    _ => None,
                };
                if let Some((outstanding, is_read)) = settled.and_then(|settled| Some((settled, is_handed_on(&settled)?))) {
                    let member = &mut self.members[index.0];
                    *(if is_read { &mut member.reads } else { &mut member.answers }) += 1;
                    self.outstanding.insert(header.request, (index, outstanding));
                }
                let final_code = !matches!(code, ErrorCode::StaleTerm | ErrorCode::OutOfOrder | ErrorCode::Busy);
                self.drop_member(now, index, error.text.clone(), final_code);
            }
        }
        self.arm_stall_retry(now);
    }

    fn on_damaged_read(&mut self, now: Monotonic, index: MemberIndex, job: super::JobId) {
        if let Some(job) = self.jobs.get_mut(job.0) {
            job.damaged |= 1 << index.0;
        }
        self.read(now, job);
    }

    /// Another primary has taken over: nothing is completed any more.
    pub(super) fn supersede(&mut self, promised: Term) {
        self.phase = Phase::Superseded;
        self.actions.push_back(Action::Superseded { promised });
    }
}
