//! What a store must hold: whatever happens to its process, its disk and its bytes.

pub mod devices;
mod library;
mod log_writes;
mod numbered;
mod power;
mod process;
pub mod program;
mod start;

use crate::report::Item;

/// What needs a kernel.
pub fn items() -> Vec<Item> {
    vec![
        Item {
            name: "power",
            promise: "losses of power on a logged disk: at every flush point, all of them clean, with all that was flushed",
            run: power::losses,
        },
        Item { name: "start", promise: "start after kill -9 with a full journal: at most 2 s", run: start::full_journal },
        Item {
            name: "kills",
            promise: "kill -9 of the store's process again and again under fio verify: zero errors, check --data clean",
            run: process::kills,
        },
        Item {
            name: "idle",
            promise: "a store without load: 0 wakeups of its threads and 0 requests to the disk over 5 s, at most 2 wakeups of the kernel's workers",
            run: process::idle,
        },
    ]
}

/// What the library's own tests find out, on any machine.
pub fn library_items() -> Vec<Item> {
    vec![
        Item {
            name: "crashes",
            promise: "kills and losses of power at random moments of random histories: 0 failures",
            run: library::crashes,
        },
        Item { name: "flips", promise: "a flipped bit in any structure is repaired or told, never taken for right", run: library::flips },
        Item {
            name: "forged",
            promise: "structures with right checksums and wrong content, and garbage: refused or reported",
            run: library::forged,
        },
        Item {
            name: "damage",
            promise: "damaged data, pages and failed syncs: typed errors, and nothing that was flushed is lost",
            run: library::damage,
        },
        Item { name: "format", promise: "a store of format 2 opens for ever", run: library::format },
        Item { name: "full", promise: "a full store goes on, and its space comes back", run: library::full },
        Item { name: "overwrite", promise: "blocks written per random 4 KiB overwrite: at most 2.3", run: library::overwrite },
        Item { name: "read", promise: "reads of the disk per 1000 random reads with a warm map: 1000", run: library::read },
        Item { name: "flush", promise: "syncs per 1000 flushes of 8 volumes: at most 300", run: library::flush },
        Item { name: "snapshot", promise: "blocks written per snapshot: at most 2, whatever the size", run: library::snapshot },
        Item { name: "difference", promise: "map pages read for what changed in 1 TiB: at most 1000", run: library::difference },
        Item {
            name: "memory",
            promise: "MiB for the map of a huge volume: at most 8 of cache and 64 of changed pages",
            run: library::memory,
        },
    ]
}
