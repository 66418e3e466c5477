//! `carrick`: the command for operators and scripts. It talks to `carrickd` on this node and shows what that answers.

mod arguments;
mod client;
mod commands;
mod report;
mod table;
mod words;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::Arguments;
use crate::report::Problem;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
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
