//! What replication must hold: replicas come back by themselves, with no more work than they missed; volumes keep to their limits.

mod qos;
mod resync;
mod survivors;

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
        Item {
            name: "down-to-one",
            promise: "two of three replicas lost one after the other: the volume stays writable; both come back",
            run: survivors::down_to_one,
        },
        Item {
            name: "no-split",
            promise: "of two replicas, the one that lacks what was written last doesn't become the volume, and it says where the data is",
            run: survivors::never_split,
        },
        Item {
            name: "no-records",
            promise: "with carrickd away, writes that need a lost replica of two wait without an error, and go on when it is back",
            run: survivors::daemon_away,
        },
        Item {
            name: "qos",
            promise: "iops and bandwidth are kept to within 10 %, changed and lifted while fio runs; kills and detaching go on as without",
            run: qos::limits,
        },
        Item {
            name: "qos-neighbour",
            promise: "a volume without limits isn't held back by one on the same stores whose requests wait for a low limit",
            run: qos::neighbours,
        },
    ]
}
