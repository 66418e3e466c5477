//! The operator makes the volume larger, as `carrickd` does: first the replicas that answer, then the record, then the target; and a
//! replica that was away meanwhile when it is back.

use carrick_backing_store::{ReplicaSpec, StoreError, VolumeSize};

use super::{Event, MILLISECOND, SECOND, World};
use crate::machine_store::{BLOCKS, volume, volume_of};

/// Until the volume first grows, at most, and between two steps.
const FIRST: u64 = 5 * SECOND;
const PAUSE: u64 = 300 * MILLISECOND;
/// By how much it grows at once.
const STEP: u64 = 5;

/// The volume's size, and what it is to become.
#[derive(Debug)]
pub(super) struct Growth {
    /// What the record says: the size of targets and replicas that are made.
    pub(super) size: VolumeSize,
    wanted: VolumeSize,
    /// What each replica has said to be.
    replicas: Vec<VolumeSize>,
}

impl Growth {
    pub(super) fn new(blocks: u64, replicas: usize) -> Self {
        let size = volume_of(blocks);
        Self { size, wanted: size, replicas: vec![size; replicas] }
    }

    /// A replica is made anew.
    pub(super) fn renew(&mut self, index: usize) {
        self.replicas[index] = self.size;
    }

    /// Whether nothing is left to be done, ever.
    pub(super) fn is_over(&self) -> bool {
        self.size == volume_of(BLOCKS) && self.replicas.iter().all(|size| *size == self.size)
    }
}

impl World {
    pub(super) fn schedule_growth(&mut self) {
        let at = 1 + self.dice.below(FIRST);
        self.schedule(at, Event::Grow);
    }

    /// The operator takes the next step, and comes back until the volume is as large as it ever will be.
    pub(super) fn grow(&mut self) {
        if !self.faults && self.has_grown() {
            return;
        }
        if self.growth.wanted == self.growth.size {
            let blocks = (self.growth.size.blocks() + STEP).min(BLOCKS);
            self.growth.wanted = volume_of(blocks);
        }
        self.grow_replicas();
        self.write_size();
        if let Some(target) = &mut self.target {
            target.engine.expand(self.growth.size);
        }
        let at = self.now + 1 + self.dice.below(PAUSE);
        self.schedule(at, Event::Grow);
    }

    fn grow_replicas(&mut self) {
        for (machine, known) in self.machines.iter_mut().zip(&self.growth.replicas) {
            if *known < self.growth.wanted
                && machine.stopped.is_none()
                && let Some(service) = &mut machine.service
            {
                let size = self.growth.wanted;
                service.expand(ReplicaSpec { volume: volume(), size }, size.blocks());
            }
        }
    }

    /// Once all that answer are as large, and a majority of those that count.
    fn write_size(&mut self) {
        let is_large = |index: usize| self.growth.replicas[index] >= self.growth.wanted;
        let answers = |index: usize| self.machines[index].service.is_some() && self.machines[index].stopped.is_none();
        let large = self.record.members.iter().filter(|member| is_large(member.0)).count();
        let all = (0..self.machines.len()).all(|index| is_large(index) || !answers(index));
        if self.growth.size < self.growth.wanted && all && large >= self.record.members.majority() {
            self.growth.size = self.growth.wanted;
            self.note(format!("the volume is to have {} blocks", self.growth.size.blocks()));
            self.coverage.grown += 1;
        }
    }

    /// A replica has told its size, or can't grow: then it is asked again.
    pub(super) fn on_expanded(&mut self, index: usize, blocks: u64, result: Result<(), StoreError>) {
        if result.is_ok() {
            let known = &mut self.growth.replicas[index];
            *known = (*known).max(volume_of(blocks));
        }
    }

    /// Whether the volume is as large as it will be, and so is its target.
    pub(super) fn has_grown(&self) -> bool {
        !self.plan.grows || self.growth.is_over() && self.engine().is_some_and(|engine| engine.size() == self.growth.size)
    }
}
