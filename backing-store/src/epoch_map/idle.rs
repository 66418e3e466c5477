//! What happens when nothing comes in: within a second everything is on stable media, then the overwrites are copied, the journal
//! says so, and after ten seconds a checkpoint makes the next start quick and the file system gets free space back. After that the
//! store sleeps: no timer runs.

use std::time::Duration;

use super::EpochMap;
use super::checkpoint;
use crate::disk::Disk;

/// Time from a change to the sync that nobody asked for.
const TICK: Duration = Duration::from_secs(1);

impl<D: Disk> EpochMap<D> {
    /// Takes the next step if its time has come.
    pub(super) fn on_time(&mut self) {
        if self.poisoned.is_some() || self.disk.now() < self.idle_at {
            return;
        }
        self.idle_at = self.disk.now() + TICK;
        if self.journal.is_dirty() {
            self.journal.want_sync();
        } else if !self.copying.is_empty() {
            self.copying.eager = true;
            if self.copying.has_copied() {
                self.journal.want_sync();
            }
        } else if self.disk.now().saturating_sub(self.active_at) < checkpoint::IDLE {
            self.say_synced();
        } else if self.is_worth_a_checkpoint() {
            self.checkpoint_wanted = true;
        } else if self.below.keeps() {
            self.give_back();
        } else {
            self.say_synced();
        }
    }

    fn is_worth_a_checkpoint(&self) -> bool {
        self.checkpoint.is_none() && (self.dirty > 0 || self.allocator.resting() > 0)
    }

    /// When it wants to be asked again. `None`: not before something comes in or ends.
    pub(super) fn next_time(&mut self) -> Option<Duration> {
        if self.poisoned.is_some() {
            return None;
        }
        if self.is_working() {
            return Some(self.disk.now());
        }
        let waits = self.journal.is_dirty()
            || !self.copying.is_empty()
            || self.is_worth_a_checkpoint()
            || self.below.keeps()
            || self.journal.is_unsaid();
        // Counted from now if the clock stood still: a change is never synced at once for having come after a pause.
        if waits && self.idle_at <= self.disk.now() {
            self.idle_at = self.disk.now() + TICK;
        }
        waits.then_some(self.idle_at)
    }
}
