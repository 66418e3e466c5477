//! The volume becomes larger while it is served: once every replica that is there is known to be as large.
//!
//! Whoever decides on the new size has made the replicas larger before. One that was away may not be: it is dropped, and comes back when
//! it is. So no request beyond the old end ever reaches a replica that is too small for it.

use carrick_backing_store::VolumeSize;

use super::config::MemberSet;
use super::{Action, Engine, MemberIndex, Outstanding};
use crate::time::Monotonic;
use crate::wire::{Body, Frame, Kind};

/// The volume is to grow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Growth {
    size: VolumeSize,
    /// Whether those who are there were asked how large they are.
    is_asked: bool,
}

impl Engine {
    /// The volume is to have this size; a smaller one changes nothing. [`Action::Grown`] tells when it has. Look at
    /// [`Engine::deadline`] afterwards.
    pub fn expand(&mut self, size: VolumeSize) {
        if size > self.growing.map_or(self.config.size, |growth| growth.size) {
            self.growing = Some(Growth { size, is_asked: false });
        }
    }

    /// Its size: no request may reach beyond.
    #[must_use]
    pub fn size(&self) -> VolumeSize {
        self.config.size
    }

    /// Whether a member may take part: its replica isn't smaller than the volume. Remembers its size.
    pub(super) fn has_room(&mut self, now: Monotonic, index: MemberIndex, size: VolumeSize) -> bool {
        self.members[index.0].size = Some(size);
        let fits = size >= self.config.size;
        if !fits {
            let reason = format!("its replica has {} bytes, the volume has {}", size.bytes(), self.config.size.bytes());
            self.drop_member(now, index, reason, true);
        }
        fits
    }

    /// When [`Engine::advance_growth`] wants to be called: at once, to ask, or when all who are there have answered.
    pub(super) fn growth_deadline(&self) -> Option<Monotonic> {
        let is_due = self.growing.is_some_and(|growth| !growth.is_asked || self.are_sizes_known());
        is_due.then(Monotonic::default)
    }

    fn are_sizes_known(&self) -> bool {
        self.members.iter().all(|member| !member.has_answered() || member.size.is_some())
    }

    /// Asks, or grows, if it is time.
    pub(super) fn advance_growth(&mut self, now: Monotonic) {
        match &mut self.growing {
            Some(growth) if !growth.is_asked => {
                growth.is_asked = true;
                self.ask_sizes(now);
            }
            Some(growth) => {
                let size = growth.size;
                if self.are_sizes_known() {
                    self.grow(now, size);
                }
            }
            None => {}
        }
    }

    fn ask_sizes(&mut self, now: Monotonic) {
        for index in self.member_indices().filter(|index| self.members[index.0].has_answered()).collect::<MemberSet>().iter() {
            self.members[index.0].size = None;
            let status = Frame::new(self.header(Kind::Status), Body::Empty);
            self.request(now, index, status, Outstanding::Size);
        }
    }

    fn grow(&mut self, now: Monotonic, size: VolumeSize) {
        self.growing = None;
        self.config.size = size;
        for index in self.member_indices() {
            if let Some(size) = self.members[index.0].size {
                self.has_room(now, index, size);
            }
        }
        self.actions.push_back(Action::Grown(size));
    }
}
