//! The operator moves a replica to another store, as `carrickd` does: targets that start are told that it is to go; once it no longer
//! counts, a new one takes its place.

use carrick_replicator::engine::{MemberIndex, MemberSet};

use super::{HEAL_LIMIT, SECOND, World};

impl World {
    /// Begins to move this replica, or goes on with the one that is being moved; sometimes it is to stay after all.
    pub(super) fn go_on_moving(&mut self, index: usize) {
        if self.retiring.is_empty() {
            if self.machines.len() > 1 && self.is_serving() {
                self.note(format!("replica {index} is to go"));
                self.retiring = [MemberIndex(index)].into_iter().collect();
                self.kill_target();
            }
        } else if let Some(gone) = self.gone() {
            self.replace_gone(gone);
        } else if self.dice.once_in(4) {
            self.stay();
        }
    }

    /// What was to go, if it no longer counts.
    pub(super) fn gone(&self) -> Option<usize> {
        self.retiring.iter().find(|index| !self.record.members.contains(*index)).map(|index| index.0)
    }

    /// A new one takes the place of what has gone.
    pub(super) fn replace_gone(&mut self, gone: usize) {
        self.coverage.moved += 1;
        self.retiring = MemberSet::NONE;
        self.renew(gone);
    }

    /// Whatever was to go stays.
    fn stay(&mut self) {
        if !self.retiring.is_empty() {
            self.note("what was to go stays".to_owned());
            self.retiring = MemberSet::NONE;
            self.kill_target();
        }
    }

    /// Without faults, what is to go goes.
    pub(super) fn finish_move(&mut self) -> Result<(), String> {
        let limit = self.now + HEAL_LIMIT;
        while self.retiring.iter().any(|index| self.record.members.contains(index)) {
            self.step()?;
            if self.now > limit {
                return Err(format!("what is to go still counts after {} s without faults: {}", HEAL_LIMIT / SECOND, self.describe()));
            }
        }
        self.stay();
        Ok(())
    }
}
