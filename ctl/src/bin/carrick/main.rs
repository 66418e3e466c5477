//! `carrick`: the command for operators and scripts. It talks to `carrickd` on this node and shows what that answers;
//! `bench` alone works without.

mod arguments;
mod bench;
mod client;
mod commands;
mod doctor;
mod events;
mod report;
mod settings;
mod table;
mod upgrade;
mod words;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::Arguments;
use crate::report::Problem;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        // What can't be parsed can't say how it wants to be told, except so.
        Err(error) if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") => {
            return Problem::usage(&error).report(true);
        }
        Err(error) => error.exit(),
    };
    let json = arguments.json;
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => problem.report(json),
    }
}

fn run(arguments: Arguments) -> Result<(), Problem> {
    // One call at a time: one thread is enough, and it starts fast.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Problem::local)?;
    runtime.block_on(commands::run(arguments))
}
