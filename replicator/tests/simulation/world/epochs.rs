//! No replica may write anything with an earlier epoch than its primary meant: it would pass for older than it is, and be left out
//! of a copy, much later.

use carrick_backing_store::{Epoch, Operation};
use carrick_replicator::replica::ReplicaService;
use carrick_replicator::wire::{Frame, Kind};

use super::World;
use super::target::Incarnation;

impl World {
    /// A target sends a frame.
    pub(super) fn note_epoch(&mut self, incarnation: Incarnation, frame: &Frame) {
        let header = &frame.header;
        let Some(target) = self.target_of(incarnation) else { return };
        match header.kind {
            Kind::RaiseEpoch => {
                let epoch = Epoch::new(u32::try_from(header.offset.get()).unwrap());
                target.epoch = target.epoch.max(epoch);
            }
            Kind::Write | Kind::WriteZeroes | Kind::Discard => {
                let epoch = target.epoch;
                self.written_in.entry((header.term, header.sequence)).or_insert(epoch);
            }
            _ => {}
        }
    }

    /// A replica hands an operation to its store.
    pub(super) fn check_epoch(&mut self, index: usize, operation: &Operation) -> Result<(), String> {
        let machine = &mut self.machines[index];
        match operation {
            Operation::RaiseEpoch { to, .. } => machine.epoch = machine.epoch.max(*to),
            Operation::Write { seq: Some(seq), .. } | Operation::WriteZeroes { seq: Some(seq), .. } => {
                let report = machine.service.as_ref().map(ReplicaService::report).unwrap_or_default();
                let Some(term) = report.first().map(|replica| replica.state.log_term) else { return Ok(()) };
                let (has, wanted) = (machine.epoch, self.written_in.get(&(term, *seq)).copied().unwrap_or_default());
                if has < wanted {
                    return Err(format!("replica {index} writes {seq} of term {term} in epoch {has}, not {wanted}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
