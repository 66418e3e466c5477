//! The promises of a replicated volume on a real kernel.

pub mod chaos;
pub mod idle;
mod machine;
mod operator;
mod wire;

use crate::report::{Item, Plan};

/// The whole list, in the order of the story: what an operator does first comes first.
pub fn items() -> Vec<Item> {
    vec![
        Item {
            name: "create",
            promise: "a volume created twice is one volume, a different one is a typed conflict; unknown names and bad sizes are refused by name",
            run: operator::create,
        },
        Item {
            name: "stores",
            promise: "a folder that isn't ours, a store already in use and a full disk are typed errors that change nothing",
            run: operator::stores,
        },
        Item {
            name: "detach",
            promise: "detach in use and delete while attached are refused and say why; forced under load, nothing acknowledged is lost",
            run: operator::detach,
        },
        Item {
            name: "file-system",
            promise: "a mounted ext4 sees no error while target, replica and carrickd are killed; its files are the same afterwards",
            run: chaos::file_system,
        },
        Item {
            name: "chaos-512",
            promise: "fio verify at depth 32, 512 B to 1 MiB, with 20 kills of replicas, target and carrickd: zero errors, 512-byte sectors",
            run: chaos::sectors_512,
        },
        Item { name: "chaos-4096", promise: "the same with 4096-byte sectors", run: chaos::sectors_4096 },
        Item {
            name: "sigstop",
            promise: "a replica stopped by SIGSTOP: longest stall of any request at most 3 s; it catches up, all replicas byte-identical",
            run: chaos::stopped_replica,
        },
        Item {
            name: "wire",
            promise: "garbage, too long frames, wrong versions and stale terms get typed errors; I/O goes on, nobody crashes",
            run: wire::hostile_peers,
        },
        Item {
            name: "idle",
            promise: "idle and attached: at most 2 wakeups a second per process, at most 24 MiB resident in the target",
            run: idle::idle,
        },
        Item {
            name: "machine",
            promise: "no ublk, io_uring disabled, not root: one sentence that says what to do",
            run: machine::refusals,
        },
        Item {
            name: "clean",
            promise: "after detach and shutdown no device, socket, file in the run directory or process is left",
            run: idle::clean,
        },
    ]
}
