//! What replication must hold: replicas come back by themselves, with no more work than they missed; volumes keep to their limits.

mod damage;
mod disk_faults;
mod flakey;
mod link;
mod network;
mod nodes;
mod other_host;
mod partition;
mod qos;
mod replace;
mod resync;
mod survivors;
mod verify;

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
            name: "salvage",
            promise: "only a stale replica left: on the operator's word it becomes the volume; what was given up is written down, and not mixed in",
            run: survivors::salvage,
        },
        Item {
            name: "replace",
            promise: "50 replicas lost one after the other, each replaced in another store, with data carried from lap to lap; none lost",
            run: replace::again_and_again,
        },
        Item {
            name: "verify",
            promise: "blocks that differ in one of three replicas, with right checksums, are found and repaired under load; of two, it is told",
            run: verify::differences,
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
        Item {
            name: "partition",
            promise: "a node that the network loses, each in turn: longest request at most 3 s, then in sync again, nothing wrong in fio verify",
            run: partition::one_node,
        },
        Item {
            name: "one-way",
            promise: "the same when only what the target sends, or only what the replica answers, is lost",
            run: partition::one_way,
        },
        Item {
            name: "two-lost",
            promise: "two nodes of three lost at once: the third goes on, longest request at most 5 s; both come back",
            run: partition::two_nodes,
        },
        Item {
            name: "all-lost",
            promise: "all nodes lost: requests wait without an error, and go on at most 10 s after healing",
            run: partition::all_nodes,
        },
        Item {
            name: "takeover",
            promise: "the target killed while one node is lost: its successor serves at most 10 s later, nothing wrong in fio verify",
            run: partition::takeover,
        },
        Item {
            name: "other-host",
            promise: "a target on another host takes over while the first is cut off or stopped, in a loop: when it is back, it reads and \
                      writes nothing, and ends; nothing wrong in fio verify",
            run: other_host::takeovers,
        },
        Item {
            name: "loss",
            promise: "5 % of all packets lost: longest request at most 3 s, nothing wrong in fio verify",
            run: link::loss,
        },
        Item {
            name: "delay-writes",
            promise: "one replica's answers 200 ms late: p99 of writes at most 150 ms, and it stays in sync",
            run: link::delayed_writes,
        },
        Item {
            name: "delay-reads",
            promise: "one replica's answers 200 ms late: p99 of reads at most 150 ms, and it stays in sync",
            run: link::delayed_reads,
        },
        Item {
            name: "damage",
            promise: "garbage written under a serving replica: never seen by fio verify, each piece repaired and counted, store clean afterwards",
            run: damage::silent,
        },
        Item {
            name: "all-copies",
            promise: "a block damaged in all copies: an I/O error, never wrong bytes, until it is overwritten; in one of two: read and healed",
            run: damage::every_copy,
        },
        Item {
            name: "power-cut",
            promise: "a replica's disk that drops writes until its process is killed: nothing wrong in fio verify, all replicas the same",
            run: disk_faults::power_cuts,
        },
        Item {
            name: "full",
            promise: "a full file system under one replica: longest request at most 3 s, no error; with room again it is in sync",
            run: disk_faults::full,
        },
    ]
}
