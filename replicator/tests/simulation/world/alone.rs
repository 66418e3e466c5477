//! The only replica's machine loses power while the target lives: what was acknowledged and not flushed may be lost, and nobody else has it.

use carrick_backing_store::PowerLoss;

use carrick_replicator::control::MemberState;

use super::faults::FaultKind;
use super::{SECOND, World};

/// So many requests are done before.
const BEFORE: u64 = 20;
/// It may have lost nothing, and go on: then once more.
const TRIES: usize = 50;

impl World {
    /// Gives what the target says it waits for then. Fails if the volume always goes on, or doesn't when the target is started anew.
    pub fn lose_what_one_alone_had(&mut self) -> Result<String, String> {
        // Where one machine is all there is, it does nothing.
        self.fault_kinds = vec![FaultKind::FailSync];
        let mut told = None;
        for _ in 0..TRIES {
            let before = self.completed;
            self.step_until("requests are done", |world| world.completed > before + BEFORE)?;
            self.kill_replica(0, PowerLoss::Yes);
            self.step_until("it is back", |world| world.machines[0].service.is_some())?;
            let until = self.now + 10 * SECOND;
            self.step_until("time passes", |world| world.now > until)?;
            told = self.engine().and_then(|engine| engine.waiting_for());
            if told.is_some() {
                break;
            }
        }
        // By this carrickd knows that it mustn't end this target (`ctl/src/bin/carrickd/moves.rs`).
        let member = self.engine().map(|engine| engine.members().remove(0));
        if !member.as_ref().is_some_and(|member| member.counts && member.state == MemberState::Behind) {
            return Err(format!("it is not shown as one that counts and lacks something: {member:?}"));
        }
        let told = told.ok_or_else(|| format!("it waits for nothing: {}", self.describe()))?;
        let completed = self.completed;
        // By force: the client sees errors, as after a loss of power.
        self.kill_target();
        self.pending.clear();
        self.checker.power_fails();
        self.step_until("it goes on with what there is", |world| world.completed > completed)?;
        Ok(told)
    }

    fn step_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) -> Result<(), String> {
        let limit = self.now + 100 * SECOND;
        while !is_so(self) {
            self.step()?;
            if self.now > limit {
                return Err(format!("in vain until {what}: {}", self.describe()));
            }
        }
        Ok(())
    }
}
