//! `carrick-replica`: serves the replicas of one store. One process per disk, so that a disk that hangs hangs nothing else.

mod serve;
mod show;
mod signals;

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use carrick_backing_store::FileStore;
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Keeps replicas of Carrick volumes in a folder and serves them to the volumes' targets.
#[derive(Debug, Parser)]
#[command(name = "carrick-replica", version)]
enum Command {
    /// Make an empty store in an empty folder, and print its identity as JSON.
    Format {
        /// The folder; it is made if it isn't there.
        path: PathBuf,
    },
    /// Print a store's identity and its replicas as JSON. Reads only; the store may be in use.
    Show {
        /// The store's folder.
        path: PathBuf,
    },
    /// Serve a store until SIGTERM, SIGINT or a shutdown request on the control socket.
    Serve(ServeArguments),
}

#[derive(Debug, clap::Args)]
struct ServeArguments {
    /// The store's folder.
    path: PathBuf,
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
}

fn main() -> ExitCode {
    // A wrong command line ends here, with code 2.
    let command = Command::parse();
    let filter = EnvFilter::try_from_env("CARRICK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).init();
    let ended = match command {
        Command::Format { path } => format(&path),
        Command::Show { path } => show::show(&path),
        Command::Serve(arguments) => serve::serve(&arguments),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody to tell if even that fails.
            let _ = writeln!(io::stderr(), "carrick-replica: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, but for those that the one before has told already.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match &*told {
        "" => cause,
        _ if told.contains(&cause) => told,
        _ => format!("{told}: {cause}"),
    })
}

fn format(path: &std::path::Path) -> anyhow::Result<()> {
    let store = FileStore::format(path)?;
    print_json(&serde_json::json!({ "store": store }))
}

/// Prints one line of JSON.
fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{value}").context("can't write to the standard output")
}
