//! `carrick-target`: serves one attached volume as a block device.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use carrick_replicator::control::{ControlError, ControlErrorCode, RunDirectory};
use carrick_target::driver::Errand;
use carrick_target::plan::DeviceId;
use carrick_target::{child, errand, mapping, preflight, service, start};
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Serves one attached volume as a block device. carrickd starts it; people rarely need to.
///
/// SIGTERM and SIGINT end the process and keep the device: requests wait in the kernel until the next target of the volume
/// takes over. To remove the device, detach the volume.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a volume until it is detached
    Run {
        /// What to serve, as JSON
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Where sockets, locks and the files for udev are
        #[arg(long, value_name = "DIR", default_value = "/run/carrick")]
        run_dir: PathBuf,
        /// Reach replicas on other hosts without TLS: everybody in between can read and change the data
        #[arg(long)]
        insecure: bool,
    },
    /// Print what this kernel's ublk driver can do, as JSON
    Features,
    /// Send one command to the ublk driver, for the target that serves the device
    #[command(hide = true)]
    Errand {
        /// What is to be done
        errand: Errand,
        /// The N of /dev/ublkbN
        device: u32,
        /// The target's process
        server: u32,
    },
    /// Become a program that ends with the target that starts it
    #[command(hide = true)]
    Tied {
        /// The target's process
        parent: u32,
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        program: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("CARRICK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).init();
    match Arguments::parse().command {
        Command::Run { config, run_dir, insecure } => start::run(start::Options { config, run: RunDirectory::new(run_dir), insecure }),
        Command::Features => features(),
        Command::Errand { errand, device, server } => match errand::run(errand, DeviceId(device), server) {
            Ok(code) => ExitCode::from(code),
            Err(error) => start::complain(&service::failed(error)),
        },
        Command::Tied { parent, program } => ExitCode::from(child::tie(parent, &program)),
    }
}

fn features() -> ExitCode {
    let report = preflight::open_driver().and_then(|(_, features)| {
        serde_json::to_string_pretty(&features.report(mapping::check().is_ok()))
            .map_err(|error| ControlError { code: ControlErrorCode::Failed, message: error.to_string() })
    });
    match report {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => start::complain(&error),
    }
}
