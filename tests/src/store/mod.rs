//! What a store must hold: whatever happens to its process, its disk and its bytes.

mod devices;
mod log_writes;
mod numbered;
mod power;
mod program;
mod start;

use crate::report::Item;

/// The whole list.
pub fn items() -> Vec<Item> {
    vec![
        Item {
            name: "power",
            promise: "losses of power on a logged disk: at every flush point, all of them clean, with all that was flushed",
            run: power::losses,
        },
        Item { name: "start", promise: "start after kill -9 with a full journal: at most 2 s", run: start::full_journal },
    ]
}
