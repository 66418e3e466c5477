//! What runs came to, so that a simulation in which nothing happens is seen to be one.

use std::fmt;

use carrick_replicator::engine::Engine;

use crate::machine_store::StoreCounts;

/// What happened in runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Coverage {
    pub runs: u64,
    pub target_starts: u64,
    /// Targets that became primary.
    pub elections: u64,
    /// Targets that were left, and lived on.
    pub takeovers: u64,
    /// Reads that these answered.
    pub reads_from_old: u64,
    /// Replicas that came back too late, or were too slow, and were copied to while the target served.
    pub left_behind: u64,
    /// Times that a volume became larger.
    pub grown: u64,
    /// Copies of what a replica lacked since an epoch, and of all that there is.
    pub differences: u64,
    pub whole: u64,
    /// Data in all copies.
    pub copied_bytes: u64,
    /// Targets that copied anything.
    pub copied_anything: u64,
    /// Of one machine, and of all.
    pub power_losses: u64,
    pub power_losses_everywhere: u64,
    pub failed_syncs: u64,
    pub rotten: u64,
    /// Reads that were asked of another replica since the first was slow.
    pub hedged: u64,
    /// Damaged reads that another replica answered.
    pub repaired: u64,
    /// Comparisons of all replicas that came to their end, and blocks in which one was made to differ, and was repaired.
    pub verified: u64,
    pub settled: u64,
    /// Configs with fewer members, with more, and with a single one of several replicas.
    pub left_out: u64,
    pub taken_in: u64,
    pub down_to_one: u64,
    /// Replicas that were replaced by new ones.
    pub renewed: u64,
    /// Replicas that stopped counting because they were to go.
    pub moved: u64,
    /// Configs that a primary was not told of.
    pub configs_untold: u64,
    pub stores: StoreCounts,
}

impl Coverage {
    /// A target has ended.
    pub fn add_engine(&mut self, engine: &Engine) {
        self.copied_bytes += engine.copied().get();
        self.copied_anything += u64::from(engine.copied().get() > 0);
        self.repaired += engine.repaired();
        self.hedged += engine.hedged();
        self.verified += u64::from(engine.verification().is_some_and(|report| !report.running));
    }

    pub fn add_store(&mut self, counts: StoreCounts) {
        let StoreCounts { reopened, interrupted, checked, checkpoints } = counts;
        self.stores.reopened += reopened;
        self.stores.interrupted += interrupted;
        self.stores.checked += checked;
        self.stores.checkpoints += checkpoints;
    }

    pub fn add(&mut self, other: &Self) {
        for ((_, total), (_, more)) in self.numbers().into_iter().zip(other.clone().numbers()) {
            *total += *more;
        }
    }

    pub fn never_happened(mut self) -> Vec<&'static str> {
        self.numbers().into_iter().filter(|(_, number)| **number == 0).map(|(name, _)| name).collect()
    }

    fn numbers(&mut self) -> [(&'static str, &mut u64); 29] {
        [
            ("runs", &mut self.runs),
            ("target starts", &mut self.target_starts),
            ("elections", &mut self.elections),
            ("takeovers", &mut self.takeovers),
            ("reads from old targets", &mut self.reads_from_old),
            ("left behind", &mut self.left_behind),
            ("copies by difference", &mut self.differences),
            ("whole copies", &mut self.whole),
            ("targets that copied", &mut self.copied_anything),
            ("bytes copied", &mut self.copied_bytes),
            ("power losses of one", &mut self.power_losses),
            ("power losses of all", &mut self.power_losses_everywhere),
            ("failed syncs", &mut self.failed_syncs),
            ("reads hedged", &mut self.hedged),
            ("rotten blocks", &mut self.rotten),
            ("damaged reads repaired", &mut self.repaired),
            ("comparisons", &mut self.verified),
            ("volumes grown", &mut self.grown),
            ("differences repaired", &mut self.settled),
            ("replicas left out", &mut self.left_out),
            ("replicas taken in", &mut self.taken_in),
            ("configs of one", &mut self.down_to_one),
            ("replicas renewed", &mut self.renewed),
            ("replicas moved", &mut self.moved),
            ("configs untold", &mut self.configs_untold),
            ("stores reopened", &mut self.stores.reopened),
            ("openings interrupted", &mut self.stores.interrupted),
            ("stores checked", &mut self.stores.checked),
            ("checkpoints", &mut self.stores.checkpoints),
        ]
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut copy = *self;
        let numbers: Vec<String> = copy.numbers().into_iter().map(|(name, number)| format!("{name} {number}")).collect();
        f.write_str(&numbers.join(", "))
    }
}
