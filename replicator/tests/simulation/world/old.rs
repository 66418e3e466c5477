//! A target that the client has left, and that may not know it yet: somebody still reads from it.

use carrick_backing_store::Extent;
use carrick_replicator::engine::{ConfigRecord, MemberIndex, Request, RequestError, RequestTag, Response};
use carrick_replicator::replica::ConnectionId;

use super::client::{bytes_read, random_extent};
use super::target::Incarnation;
use super::{Event, MILLISECOND, Micros, SECOND, World};
use crate::checker::SECTOR;

/// The longest time between two reads.
const ASK_PAUSE: Micros = 300 * MILLISECOND;

/// A read that an old target was asked for.
pub(super) struct Asked {
    extent: Extent,
    began: u64,
}

/// A replica that only the old target reaches, while that reaches no other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Apart {
    old: Incarnation,
    replica: usize,
    until: Micros,
}

impl World {
    pub(super) fn kill_old(&mut self) {
        if let Some(old) = self.old.take() {
            self.note(format!("target {}, which nobody uses, is killed", old.incarnation));
            self.apart = None;
            self.bury(old);
        }
    }

    /// The client moves to another target, while the one that it used lives on, or is stopped for a while. Some connections of that
    /// one break, others stay; or all but one are cut off.
    pub(super) fn take_over(&mut self) {
        self.kill_old();
        let Some(mut old) = self.target.take() else { return };
        self.note(format!("target {} is left alone", old.incarnation));
        self.coverage.takeovers += 1;
        let (version, attachment) = (self.record.version.next(), self.record.attachment.next());
        self.record = ConfigRecord { version, attachment, ..self.record };
        if self.dice.coin() {
            old.stopped_until = self.now + self.dice.skewed(8 * SECOND);
            // Then it looks at the clock.
            self.timer_number += 1;
            old.timer = Some((old.stopped_until, self.timer_number));
            self.schedule(old.stopped_until, Event::Timer(old.incarnation, self.timer_number));
        }
        if self.dice.coin() {
            let replica = self.dice.index(self.machines.len());
            let until = self.now + self.dice.skewed(8 * SECOND);
            self.set_apart(&old.links, Apart { old: old.incarnation, replica, until });
        } else {
            for link in old.links.clone().into_iter().flatten() {
                if self.dice.coin() {
                    self.break_at_replica(link);
                    let delay = self.dice.skewed(3 * SECOND);
                    self.schedule(self.now + delay, Event::GoneAtTarget(link));
                }
            }
        }
        self.schedule(self.now, Event::AskOld(old.incarnation));
        self.old = Some(old);
        let begin = self.now + 1 + self.dice.skewed(SECOND);
        self.schedule(begin, Event::StartTarget);
    }

    fn set_apart(&mut self, links: &[Option<ConnectionId>], apart: Apart) {
        self.note(format!("of the replicas it reaches only {}, which nobody else does", apart.replica));
        for link in links.iter().enumerate().filter(|(index, _)| *index != apart.replica).filter_map(|(_, link)| *link) {
            self.cut(link);
            self.mute(link);
        }
        self.apart = Some(apart);
    }

    /// From when on a target reaches a replica.
    pub(super) fn reachable_from(&self, incarnation: Incarnation, member: MemberIndex) -> Micros {
        let is_cut_off = |apart: &Apart| (incarnation == apart.old) != (member.0 == apart.replica);
        self.apart.filter(is_cut_off).map_or(0, |apart| apart.until)
    }

    /// Somebody reads from the old target, as long as it lives.
    pub(super) fn ask_old(&mut self, incarnation: Incarnation) {
        let Some(size) = self.target_of(incarnation).map(|target| target.engine.size()) else { return };
        let (extent, now) = (random_extent(&mut self.dice, size), self.monotonic());
        if self.is_current(incarnation) || !self.faults {
            return;
        }
        self.next_tag += 1;
        let (tag, began) = (RequestTag(self.next_tag), self.checker.tick());
        let Some(target) = self.target_of(incarnation) else { return };
        target.asked.insert(tag, Asked { extent, began });
        target.engine.submit(now, tag, Request::Read { extent });
        let pause = self.dice.skewed(ASK_PAUSE);
        self.schedule(self.now + pause, Event::AskOld(incarnation));
    }

    /// The old target has answered: what it gave must not be older than what others gave. Of the client's own requests it answers
    /// nobody.
    pub(super) fn on_old_complete(&mut self, tag: RequestTag, result: Result<Response, RequestError>) -> Result<(), String> {
        let Some(asked) = self.old.as_mut().and_then(|old| old.asked.remove(&tag)) else { return Ok(()) };
        let Ok(Response::Read(found)) = result else { return Ok(()) };
        self.coverage.reads_from_old += 1;
        let read = self.checker.read_ends(asked.began, asked.extent.offset().get() / SECTOR, &bytes_read(asked.extent, found));
        read.map_err(|reason| format!("from a target that was left: {reason}"))
    }
}
