//! What replication must hold: replicas come back by themselves, with no more work than they missed.

mod resync;

use crate::report::Item;

/// The whole list.
pub fn items() -> Vec<Item> {
    vec![
        Item {
            name: "return",
            promise: "a replica that was away while a tenth of the data was overwritten gets at most a tenth more than that",
            run: resync::overwritten_while_away,
        },
        Item {
            name: "at-rest",
            promise: "a replica that was away while nothing was written gets nothing",
            run: resync::nothing_written_while_away,
        },
        Item {
            name: "rate",
            promise: "with rebuild-rate=20M, a copy beside I/O goes at 20 MiB/s at most; without a cap, faster",
            run: resync::capped,
        },
        Item {
            name: "resume",
            promise: "a copy interrupted twice, by a kill of the replica and of the target, goes on; all replicas byte-identical",
            run: resync::interrupted_twice,
        },
    ]
}
