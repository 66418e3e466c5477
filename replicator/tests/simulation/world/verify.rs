//! Comparing replicas: never a difference, unless one was made.

use carrick_backing_store::{BlockIndex, ByteLength, Extent, Operation, block_checksum};
use carrick_replicator::control::VerificationReport;
use carrick_replicator::engine::Engine;

use super::{HEAL_LIMIT, World};
use crate::checker::{SECTOR, sector_bytes};
use crate::machine_store::{BLOCKS, volume};

impl World {
    /// Whatever happens, replicas in sync hold the same.
    pub(super) fn check_verification(&self) -> Result<(), String> {
        let reports = [&self.target, &self.old].into_iter().flatten().filter_map(|target| target.engine.verification());
        match reports.into_iter().find(|report| report.repaired + report.unsettled > 0 && !self.is_made_different) {
            Some(report) => Err(format!("replicas in sync differ: {report:?}")),
            None => Ok(()),
        }
    }

    /// At the end of a run: makes one replica differ in one block, with a checksum that is right, and has that found and repaired.
    pub(super) fn verify(&mut self) -> Result<(), String> {
        if self.machines.len() < 2 {
            return Ok(());
        }
        // What is rotten may have been the block's only other copy.
        let differs = self.machines.len() > 2 && !self.plan.rot;
        if differs {
            self.make_different()?;
        }
        if let Some(target) = &mut self.target {
            target.engine.verify();
        }
        let limit = self.now + HEAL_LIMIT;
        let done =
            |engine: &Engine| engine.verification().cloned().filter(|report| !report.running || report.repaired + report.unsettled > 0);
        let report = loop {
            if let Some(report) = self.engine().and_then(done).filter(|_| self.all_in_sync()) {
                break report;
            }
            self.step()?;
            if self.now > limit {
                return Err(format!("replicas are not compared: {}", self.describe()));
            }
        };
        let VerificationReport { repaired, unsettled, .. } = report;
        if (repaired, unsettled) != (u64::from(differs), 0) {
            return Err(format!("of replicas that differ in a block: {differs}, it is said: {report:?}"));
        }
        self.coverage.settled += repaired;
        Ok(())
    }

    fn make_different(&mut self) -> Result<(), String> {
        let (index, block) = (self.dice.index(self.machines.len()), BlockIndex::new(self.dice.below(BLOCKS)));
        self.note(format!("replica {index} is made to differ in block {block}"));
        self.is_made_different = true;
        let mut data = self.pool.take(4096);
        for (sector, bytes) in (block.offset().get() / SECTOR..).zip(data.chunks_exact_mut(SECTOR as usize)) {
            bytes.copy_from_slice(&sector_bytes(u64::MAX, sector));
        }
        let checksums = [block_checksum(volume(), block, &data)].as_slice().into();
        let extent = Extent::new(block.offset(), ByteLength::new(4096)).unwrap();
        let write = Operation::Write { seq: None, extent, checksums, data: data.share() };
        self.machines[index].store.do_now(write).map(drop)
    }
}
