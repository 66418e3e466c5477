//! What control must hold: operations that finish, growth that never sticks, restarts that nobody notices.

mod boot;
mod doctor;
mod evict;
mod expand;
mod node;
mod random;
mod records;
mod upgrade;

use crate::report::Item;

/// The whole list.
pub fn items() -> Vec<Item> {
    vec![
        Item {
            name: "expand",
            promise: "a volume in use grows once, then ten times in a row: the device has the new size, the old data and room for more",
            run: expand::in_a_row,
        },
        Item {
            name: "expand-many",
            promise: "100 requests of mixed sizes from 20 clients at once: all end, at the largest size, none stuck",
            run: expand::at_once,
        },
        Item {
            name: "expand-load",
            promise: "a volume grows five times under fio verify: no error, and all replicas are byte-identical afterwards",
            run: expand::under_load,
        },
        Item {
            name: "expand-ext4",
            promise: "a mounted ext4 grows with its device, is filled beyond its old size, and is found clean",
            run: expand::file_system,
        },
        Item {
            name: "expand-kills",
            promise: "carrickd killed after each step, the target and each replica in the middle, under load: done within 10 s, no error",
            run: expand::killed,
        },
        Item {
            name: "expand-mapped",
            promise: "the last two with a mapped device, which grows at once on kernels that can't change a ublk device",
            run: expand::mapped,
        },
        Item {
            name: "expand-away",
            promise: "a replica that is away while the volume grows is taken back, larger, when it answers again",
            run: expand::replica_away,
        },
        Item {
            name: "expand-full",
            promise: "a store without room: refused with the sizes, the volume goes on at its old size, and grows when there is room",
            run: expand::no_room,
        },
        Item {
            name: "evict",
            promise: "a store is emptied under fio verify, whatever dies meanwhile: a replica goes when the new one counts, no error",
            run: evict::emptied,
        },
        Item {
            name: "records-full",
            promise: "the disk of carrickd's records is full: changes are refused, explain says why, I/O goes on, and all is well with room",
            run: records::full,
        },
        Item {
            name: "doctor",
            promise: "carrick doctor counts the flushes that reach a store's disk, passes a good one, and fails one that sends none",
            run: doctor::machine,
        },
        Item {
            name: "fifty",
            promise: "50 volumes created and attached within 60 s; carrickd killed and started: all adopted within 5 s, no I/O stalls",
            run: node::fifty_volumes,
        },
        Item {
            name: "node-killed",
            promise: "every process of the node killed at once under load, then carrickd started: fio verify goes on without an error",
            run: node::all_killed,
        },
        Item {
            name: "upgrade",
            promise: "the programs are replaced under load, and so is every process, also if carrickd is killed meanwhile: no error, and all replicas \
                      are byte-identical afterwards",
            run: upgrade::upgrade,
        },
        Item {
            name: "random",
            promise: "random operations of several clients on real devices, with kills of everything: every answer makes sense, no operation \
                      is late without a reason, no data is lost, nothing is left",
            run: random::random,
        },
    ]
}

/// Before the machine's power goes.
pub fn before_boot() -> Vec<Item> {
    vec![Item {
        name: "boot-before",
        promise: "a machine with volumes attached, one of them mapped, one for the host, loses its power",
        run: boot::before,
    }]
}

/// After that, on another machine with the same disk.
pub fn after_boot() -> Vec<Item> {
    vec![Item {
        name: "boot-after",
        promise: "booted again, carrickd attaches by itself what was attached, within 30 s, and what was flushed is there",
        run: boot::after,
    }]
}
