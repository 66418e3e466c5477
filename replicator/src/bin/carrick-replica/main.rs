//! `carrick-replica`: serves the replicas of one store. One process per disk, so that a disk that hangs hangs nothing else.

mod bench;
mod check;
mod inspect;
mod serve;
mod signals;
mod store;

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use carrick_backing_store::ByteLength;
use carrick_backing_store::size::{SizeError, parse_size};
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Keeps replicas of Carrick volumes on a disk and serves them to the volumes' targets.
#[derive(Debug, Parser)]
#[command(name = "carrick-replica", version, after_help = "Sizes: 10G, 512M are powers of 1024; 10GB, 512MB are powers of 1000.")]
enum Command {
    /// Make an empty store in an empty folder or on an empty block device, and print its identity as JSON.
    Format(FormatArguments),
    /// Print a store's identity, how full it is, and its replicas, as JSON. Reads only; the store may be in use.
    Show {
        /// The store's folder or block device.
        store: PathBuf,
    },
    /// Serve a store until SIGTERM, SIGINT or a shutdown request on the control socket.
    Serve(ServeArguments),
    /// Look for damage in a store that nobody serves. Reads only. Exit code 0: it is clean; 1: it isn't; 2: it can't be checked.
    Check(CheckArguments),
    /// Measure a store that nobody serves, without network and device around it, and print the result as JSON.
    Bench(BenchArguments),
    /// Print a store's structures as text, for those who look for what went wrong. Reads only.
    Dump {
        /// The store's folder or block device.
        store: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct FormatArguments {
    /// The folder, which is made if it isn't there, or the block device.
    store: PathBuf,
    /// How large the store becomes, such as 10G [default: as large as the file system or the device].
    #[arg(long, value_name = "BYTES", value_parser = size)]
    size: Option<ByteLength>,
    /// Write zeros over all of it now: then no space can be wanting later, whoever else uses the file system, and no first write is
    /// slow.
    #[arg(long)]
    prewrite: bool,
    /// Take a block device that isn't empty. What is on it is lost.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
struct ServeArguments {
    /// The store's folder or block device.
    store: PathBuf,
    /// Where the sockets are made, in the folder `replica` below.
    #[arg(long, value_name = "DIR", default_value = "/run/carrick")]
    run_dir: PathBuf,
    /// Serve targets on this TCP address, too.
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// Let other hosts connect without encryption or authentication. Anybody who reaches the address can read and change every
    /// volume in this store.
    #[arg(long, requires = "listen")]
    insecure: bool,
    /// Memory for the volumes' maps, of which 1 GiB of data needs 4 MiB; what doesn't fit is read from the disk when it is needed.
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = size)]
    cache: ByteLength,
    /// Take volumes that are larger than what is free: then a write may find no room.
    #[arg(long)]
    overcommit: bool,
    /// Verify all blocks in the background, reading so much per second at most; 0: not at all.
    #[arg(long, value_name = "BYTES_PER_SECOND", default_value = "4M", value_parser = size)]
    scrub_rate: ByteLength,
    /// Keep the space of deleted data in the store's file, instead of giving it back to the file system. A file that has all its
    /// space from the beginning (format --prewrite) keeps it in any case.
    #[arg(long)]
    keep_space: bool,
}

#[derive(Debug, clap::Args)]
struct BenchArguments {
    /// The store's folder or block device.
    store: PathBuf,
    /// What is done, on a volume of its own in the store.
    #[arg(long)]
    load: bench::Load,
    /// Size of the volume that the load fill makes.
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = size)]
    size: ByteLength,
    /// For how long.
    #[arg(long, default_value = "5")]
    seconds: u64,
    /// How many snapshots the load snapshots makes.
    #[arg(long, default_value = "250")]
    snapshots: u16,
}

#[derive(Debug, clap::Args)]
struct CheckArguments {
    /// The store's folder or block device.
    store: PathBuf,
    /// Read all data, too, and compare its checksums.
    #[arg(long)]
    data: bool,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

fn size(text: &str) -> Result<ByteLength, SizeError> {
    parse_size(text).map(ByteLength::new)
}

fn main() -> ExitCode {
    // A wrong command line ends here, with code 2.
    let command = Command::parse();
    let filter = EnvFilter::try_from_env("CARRICK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).init();
    let ended = match command {
        Command::Format(arguments) => store::format(&arguments),
        Command::Show { store } => inspect::show(&store),
        Command::Serve(arguments) => serve::serve(&arguments),
        Command::Check(arguments) => return check::check(&arguments),
        Command::Bench(arguments) => bench::bench(&arguments),
        Command::Dump { store } => inspect::dump(&store),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// Tells in a sentence what went wrong.
fn complain(error: &anyhow::Error) {
    // Nobody to tell if even that fails.
    let _ = writeln!(io::stderr(), "carrick-replica: {}", sentence(error));
}

/// The error and its causes, but for those that the one before has told already.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match &*told {
        "" => cause,
        _ if told.contains(&cause) => told,
        _ => format!("{told}: {cause}"),
    })
}

/// Prints one line of JSON.
fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{value}").context("can't write to the standard output")
}
