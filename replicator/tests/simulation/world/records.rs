//! The metadata store: one record, changed by compare-and-swap. What is asked of it may arrive late, even when who asked is dead;
//! its answers may be lost.

use carrick_replicator::engine::{ConfigRequest, MemberSet};

use super::target::Incarnation;
use super::{Event, MILLISECOND, SECOND, World};

impl World {
    pub(super) fn ask_config(&mut self, asker: Incarnation, request: ConfigRequest) {
        let longest = self.longest_ask();
        let delay = 10 + self.dice.skewed(longest);
        self.schedule(self.now + delay, Event::ConfigAsked(asker, request));
    }

    pub(super) fn on_config_asked(&mut self, asker: Incarnation, request: ConfigRequest) {
        let is_away = self.now < self.records_away;
        // Blocks rot on one of many: if that one could become the only one that counts, they would be lost for good.
        let is_refused = self.plan.rot && self.faults && self.is_serving();
        let answer = if is_away || is_refused {
            if !is_refused && self.dice.once_in(4) {
                let late = self.dice.skewed(4 * SECOND);
                self.schedule(self.records_away + late, Event::ConfigAsked(0, request));
            }
            Err("out of reach".to_owned())
        } else {
            let before = self.record;
            let mut forgotten = self.record;
            let record = request.apply(if self.is_forgotten(&request) { &mut forgotten } else { &mut self.record });
            if self.record != before {
                self.count_config(before.members, asker);
            }
            if self.faults && self.dice.once_in(16) { Err("the answer is lost".to_owned()) } else { Ok(record) }
        };
        let delay = 10 + self.dice.skewed(20 * MILLISECOND);
        self.schedule(self.now + delay, Event::ConfigAnswered(asker, answer));
    }

    fn count_config(&mut self, before: MemberSet, asker: Incarnation) {
        let members = self.record.members;
        self.note(format!("config {} of term {}: {members:?}", self.record.version.get(), self.record.term));
        self.coverage.left_out += u64::from(before.iter().any(|index| !members.contains(index)));
        self.coverage.taken_in += u64::from(members.iter().any(|index| !before.contains(index)));
        self.coverage.down_to_one += u64::from(members != before && members.count() == 1);
        if members != before && members.count() == 1 {
            self.on_only_one();
        }
        self.coverage.configs_untold += u64::from(asker != self.incarnation);
    }

    /// Every replica counts, and none is about to be left out.
    pub(super) fn all_count(&self) -> bool {
        let all = MemberSet::first(self.machines.len());
        self.engine().is_some_and(|engine| engine.counting() == Some(all) && !engine.is_changing_config())
    }
}
