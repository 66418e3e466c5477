//! Runs the acceptance list of a topic on this machine's kernel, which must have ublk: `tests/acceptance TOPIC` boots one where
//! the host has none. Prints a line per item: what was done, the figure, the bound, pass or fail.

mod control;
mod disk;
mod fio;
mod first_volume;
mod history;
mod mount;
mod peer;
mod probe;
mod replicas;
mod replication;
mod report;
mod site;
mod small_disk;
mod store;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

/// What an issue of a topic promises, tried on real devices.
#[derive(Debug, Parser)]
struct Arguments {
    /// Which list.
    topic: Topic,
    /// Only items whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// The short form: fewer kills and seconds, for slow machines and CI.
    #[arg(long)]
    quick: bool,
    /// Seed of what is random.
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Topic {
    /// Operations that finish, growth that never sticks, restarts that nobody notices.
    Control,
    /// The part of that before the machine's power goes.
    ControlBeforeBoot,
    /// The part after it came back.
    ControlAfterBoot,
    /// A replicated volume on a real kernel, end to end.
    FirstVolume,
    /// Replicas that come back by themselves, with no more work than they missed.
    Replication,
    /// What a store must hold, whatever happens to its process and its disk.
    Store,
    /// The part of that which needs no kernel: on a simulated disk.
    StoreLibrary,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed}");
    let plan = report::Plan { quick: arguments.quick, seed };
    let items = match arguments.topic {
        Topic::Control => control::items(),
        Topic::ControlBeforeBoot => control::before_boot(),
        Topic::ControlAfterBoot => control::after_boot(),
        Topic::FirstVolume => first_volume::items(),
        Topic::Replication => replication::items(),
        Topic::Store => store::items(),
        Topic::StoreLibrary => store::library_items(),
    };
    report::run(&items, &plan, &arguments.only)
}
