//! The command line.

use std::fmt;
use std::path::PathBuf;

use carrick_backing_store::size::{SizeError, parse_size};
use carrick_replicator::control::RunDirectory;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::events::Events;
use crate::settings::Setting;
use crate::upgrade::Upgrade;

/// Printed below the help: scripts rely on it.
const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed for another reason
  2  the command line, or a value in it, makes no sense
  3  there is no such volume or store
  4  there is one already, and it differs from what was asked for
  5  not in this state: attached, in use, or too few stores
  6  no room
  7  something doesn't answer, or not in time; trying again may help
  8  this machine can't do it: no ublk, no privilege

With --json, results go to standard output as JSON, and errors to standard error as one object:
  {\"code\": 5, \"reason\": \"VOLUME_ATTACHED\", \"subject\": \"vm1\", \"message\": \"…\"}

Sizes: 20G, 512M, 1T are powers of 1024 (so are GiB, MiB, TiB); 20GB, 512MB, 1TB are powers of 1000; 4096 is bytes.";

/// Replicated block devices for virtual machines.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub struct Arguments {
    /// Folder of carrickd's sockets
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/carrick")]
    run_dir: PathBuf,
    /// carrickd's socket [default: carrickd.sock in the folder of sockets]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Write JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

impl Arguments {
    /// Where carrickd is reached.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| RunDirectory::new(&self.run_dir).daemon_socket())
    }
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Stores: folders or block devices that hold replicas, one per disk
    #[command(subcommand)]
    Store(StoreCommand),
    /// Volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// This node: what may come to it
    #[command(subcommand)]
    Node(NodeCommand),
    /// Work on volumes that takes time: what is under way, and what became of it
    #[command(subcommand)]
    Operation(OperationCommand),
    /// Make a volume a block device of this node; prints the device
    Attach(Attach),
    /// Take a volume's block device away
    Detach(Detach),
    /// Say what a volume waits for, since when and why, what happens next, and what to do
    Explain {
        /// The volume's name
        name: String,
    },
    /// Tell what happened to volumes and stores, and when
    Events(Events),
    /// Show how this node does
    Status,
    /// Check whether this machine can do what Carrick needs, and whether flushes reach its disks; run it as root
    Doctor,
    /// End everything on this node, carrickd included (to end carrickd alone, send it SIGTERM)
    Shutdown(Shutdown),
    /// Measure replication on this machine, with replicas of its own; needs neither carrickd nor ublk
    Bench(Bench),
}

/// What can be done with stores.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Use a folder or a block device as a store: an empty one is formatted, a Carrick store is taken over
    Add {
        /// The folder, or the device; of a device give a name that stays, such as one in /dev/disk/by-id
        path: PathBuf,
        /// If it is formatted: how large the store becomes [default: as large as the file system or the device]
        #[arg(long, value_parser = size)]
        size: Option<u64>,
        /// Let other nodes reach it at this address
        #[arg(long, value_name = "IP:PORT")]
        listen: Option<String>,
        /// Without TLS
        #[arg(long, requires = "listen")]
        insecure: bool,
    },
    /// List the stores
    List,
    /// Show how full a store is, and whether it is sound
    Show {
        /// Its id, the beginning of that, or its path
        store: String,
    },
    /// Let new replicas come to a store
    Enable {
        /// Its id, the beginning of that, or its path
        store: String,
    },
    /// Let no new replicas come to a store; those that are there stay
    Disable {
        /// Its id, the beginning of that, or its path
        store: String,
    },
    /// Let no new replicas come to a store, and move those that are there to other stores, while their volumes are used
    Evict {
        /// Its id, the beginning of that, or its path
        store: String,
        /// Return when none is left, and show how it goes on
        #[arg(long)]
        wait: bool,
    },
    /// Say how full a store may become
    Set {
        /// Its id, the beginning of that, or its path
        store: String,
        /// So much of it may be used by, and promised to, replicas that come or grow [at first: 100]
        #[arg(long, value_name = "PERCENT", required_unless_present = "warn")]
        limit: Option<u32>,
        /// From so much on carrick status warns [at first: 85]
        #[arg(long, value_name = "PERCENT")]
        warn: Option<u32>,
    },
    /// Stop using a store that has no replicas; its files stay
    Remove {
        /// Its id, the beginning of that, or its path
        store: String,
    },
}

/// What can be done with the node.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Show what may come to it, and what is there
    Show,
    /// Let volumes be attached and replicas be made again
    Enable(Kinds),
    /// Let no more volumes be attached, and no more replicas be made; what is there stays
    Disable(Kinds),
    /// Let nothing come any more, and detach the volumes that nobody uses
    Drain,
    /// Replace the running processes whose programs on disk are newer, one at a time, while the volumes are used
    Upgrade(Upgrade),
}

/// What may come to a node. If neither is given, both are meant.
#[derive(Debug, Args)]
pub struct Kinds {
    /// Volumes that are attached
    #[arg(long)]
    pub targets: bool,
    /// Replicas in its stores
    #[arg(long)]
    pub replicas: bool,
}

/// What can be done with operations.
#[derive(Debug, Subcommand)]
pub enum OperationCommand {
    /// List those that are under way, and the last ones that have ended
    List {
        /// Of this volume only
        volume: Option<String>,
        /// Only what is under way
        #[arg(long)]
        running: bool,
    },
    /// Show one
    Show {
        /// Its number
        operation: String,
    },
    /// Print those that are under way, and each change; one that is named until it has ended
    Watch {
        /// Its number
        operation: Option<String>,
    },
    /// End one that has not changed anything for users of its volume
    Cancel {
        /// Its number
        operation: String,
    },
}

/// What can be done with volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume
    Create {
        /// Letters, digits, dots, dashes and underscores
        name: String,
        /// Such as 20G
        #[arg(long, value_parser = size)]
        size: u64,
        /// How many copies: 1, 2, 3 or 5 [default: 3, or as many as stores are given]
        #[arg(long, value_name = "N")]
        replicas: Option<u32>,
        /// Logical block size: 512 or 4096 [default: 512]
        #[arg(long, value_name = "BYTES")]
        block_size: Option<u32>,
        /// Put a replica on this store; repeat for each replica [default: the stores with the most free space]
        #[arg(long = "store", value_name = "STORE")]
        stores: Vec<String>,
    },
    /// List the volumes
    List,
    /// Show a volume and what each of its replicas does
    Show {
        /// Its name
        name: String,
    },
    /// Make a volume larger, also while it is used
    Expand {
        /// Its name
        name: String,
        /// Its new size, such as 40G
        #[arg(value_parser = size)]
        size: u64,
        /// Only say what would be done, and whether it could be
        #[arg(long, conflicts_with = "wait")]
        dry_run: bool,
        /// Return when it is done, and show how it goes on
        #[arg(long)]
        wait: bool,
        /// A name for this request: made again under the same one, it finds the operation that it made before
        #[arg(long, value_name = "NAME")]
        key: Option<String>,
    },
    /// Change how a volume is run, at any time
    Set {
        /// Its name
        name: String,
        /// iops=500: so many requests a second at most; bandwidth=50M: so many bytes; those above wait. iops-burst=2000,
        /// bandwidth-burst=1G: so much above that may come at once after a pause (by default a second's worth). rebuild-rate=50M:
        /// copy so many bytes a second at most to replicas that lack them (at least 1M). KEY=none takes a limit away
        #[arg(required = true, value_name = "KEY=VALUE", value_parser = Setting::parse)]
        settings: Vec<Setting>,
    },
    /// Compare what the replicas of an attached volume hold, and repair what differs from most of them. Waits while fewer than two are in sync
    Verify {
        /// Its name
        name: String,
        /// Return when it is done; fail if replicas differ and nobody can tell which is right
        #[arg(long)]
        wait: bool,
    },
    /// Put a replica in another store in place of one there is, while the volume is used; carrickd does so by itself after a while with one
    /// that is lost
    Replace {
        /// The volume's name
        name: String,
        /// The store that has one now: its id, the beginning of that, or its path
        store: String,
        /// The store that gets the new replica [default: of the others, that with the most free space]
        #[arg(long, value_name = "STORE")]
        with: Option<String>,
        /// Return when the new one counts in place of the old one, and show how it goes on
        #[arg(long)]
        wait: bool,
    },
    /// Give a volume one more replica
    AddReplica {
        /// The volume's name
        name: String,
        /// The store that gets it [default: of the others, that with the most free space]
        #[arg(long, value_name = "STORE")]
        with: Option<String>,
    },
    /// The last resort when the replicas that count are gone for good: make another one the volume
    Salvage {
        /// The volume's name
        name: String,
        /// The store whose replica becomes the volume
        #[arg(long, value_name = "STORE")]
        from: String,
        /// What only the other replicas have is lost for ever; they are deleted when their stores are back
        #[arg(long)]
        give_up_the_rest: bool,
    },
    /// Delete a volume with its data
    Delete {
        /// Its name
        name: String,
    },
}

/// How to attach.
#[derive(Debug, Args)]
pub struct Attach {
    /// The volume's name
    pub name: String,
    /// The host itself uses the device, and may look for partitions and file systems on it
    #[arg(long)]
    pub host: bool,
    /// Requests in flight at most, 1 to 512 [default: 128]
    #[arg(long, value_name = "N")]
    pub queue_depth: Option<u32>,
    /// Whether the device is one of the device mapper, which can grow while it is used whatever the kernel's ublk can
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub map: MapWhen,
}

/// When a device is mapped.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum MapWhen {
    /// Where this kernel's ublk can't change the size of a device
    #[default]
    Auto,
    /// It is, or there is none
    Always,
    /// The ublk device itself, of which the kernel reads the partitions with --host
    Never,
}

/// How to detach.
#[derive(Debug, Args)]
pub struct Detach {
    /// The volume's name
    pub name: String,
    /// Even while the device is open: whoever has it open gets errors from then on
    #[arg(long)]
    pub force: bool,
}

/// How to shut down.
#[derive(Debug, Args)]
pub struct Shutdown {
    /// Detach what is attached first
    #[arg(long)]
    pub detach: bool,
    /// Detach even what is in use
    #[arg(long)]
    pub force: bool,
}

/// What to measure.
#[derive(Debug, Args)]
pub struct Bench {
    /// Make the replicas below this folder, on the disk to be measured; they are removed at the end
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// How many replicas: 1, 2, 3 or 5
    #[arg(long, value_name = "N", default_value = "3", value_parser = replicas)]
    pub replicas: usize,
    /// Reach the replicas over TCP on the loopback interface, as if they were on other nodes (the default)
    #[arg(long, conflicts_with = "unix")]
    pub tcp: bool,
    /// Reach the replicas over Unix sockets, as carrickd does on one node
    #[arg(long)]
    pub unix: bool,
    /// The kind of load
    #[arg(long, value_enum, default_value_t = ReadWrite::Randwrite)]
    pub rw: ReadWrite,
    /// With --rw randrw: how many of 100 requests are reads
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u8).range(..=100))]
    pub read_percent: u8,
    /// Bytes per request: a multiple of 512 up to 1M
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = size)]
    pub block_size: u64,
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub depth: usize,
    /// How long
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// The volume's size; it is written once before
    #[arg(long, default_value = "1G", value_parser = size)]
    pub size: u64,
    /// Put everything on stable media after every so many writes; the load goes on meanwhile
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub fsync_every: Option<u64>,
}

/// Kinds of load, by the names that fio has for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadWrite {
    /// Writes to random places
    Randwrite,
    /// Reads from random places
    Randread,
    /// Both, mixed
    Randrw,
    /// Writes, one after the other
    Write,
    /// Reads, one after the other
    Read,
}

impl fmt::Display for ReadWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Randwrite => "randwrite",
            Self::Randread => "randread",
            Self::Randrw => "randrw",
            Self::Write => "write",
            Self::Read => "read",
        })
    }
}

fn replicas(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(replicas @ (1 | 2 | 3 | 5)) => Ok(replicas),
        _ => Err("give 1, 2, 3 or 5".into()),
    }
}

fn size(text: &str) -> Result<u64, SizeError> {
    parse_size(text)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_socket_is_in_the_run_directory_unless_it_is_given() {
        let parse = |line: &str| Arguments::try_parse_from(line.split(' ')).unwrap();
        assert_eq!(parse("carrick status").socket(), PathBuf::from("/run/carrick/carrickd.sock"));
        assert_eq!(parse("carrick status --run-dir /x").socket(), PathBuf::from("/x/carrickd.sock"));
        assert_eq!(parse("carrick --socket /y status --run-dir /x").socket(), PathBuf::from("/y"));
    }

    #[test]
    fn a_wrong_size_is_a_usage_error() {
        let error = Arguments::try_parse_from("carrick volume create a --size 1.5G".split(' ')).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("such as 20G"), "{error}");
    }
}
