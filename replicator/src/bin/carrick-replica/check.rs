//! `carrick-replica check`: looks for damage in a store that nobody serves.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context;
use carrick_backing_store::epoch_map::{self, CheckOptions, CheckReport};
use serde_json::json;

use super::store::open_exclusively;
use super::{CheckArguments, complain};

/// Something is wrong with the store.
const FAULTS: u8 = 1;
/// It is not known whether something is.
const UNCHECKED: u8 = 2;

pub(crate) fn check(arguments: &CheckArguments) -> ExitCode {
    match look_for_faults(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(FAULTS),
        Err(error) => {
            complain(&error);
            ExitCode::from(UNCHECKED)
        }
    }
}

/// Whether it is clean.
fn look_for_faults(arguments: &CheckArguments) -> anyhow::Result<bool> {
    let CheckArguments { store: path, data, json } = arguments;
    let report = epoch_map::check(open_exclusively(path)?, path, &CheckOptions { data: *data })?;
    let text = if *json { as_json(&report).to_string() + "\n" } else { in_words(&report, *data) };
    io::stdout().write_all(text.as_bytes()).context("can't write to the standard output")?;
    Ok(report.is_clean())
}

fn as_json(report: &CheckReport) -> serde_json::Value {
    let CheckReport { volumes, snapshots, pages, blocks, verified, batches, faults, more } = report;
    let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
    json!({
        "clean": report.is_clean(),
        "volumes": volumes,
        "snapshots": snapshots,
        "pages": pages,
        "blocks": blocks,
        "verified": verified,
        "batches": batches,
        "faults": faults,
        "more_faults": more,
    })
}

fn in_words(report: &CheckReport, data: bool) -> String {
    let CheckReport { volumes, snapshots, pages, blocks, verified, batches, faults, more } = report;
    let mut text = String::new();
    // Writing to a string can't fail.
    for fault in faults {
        let _ = writeln!(text, "{fault}");
    }
    if *more > 0 {
        let _ = writeln!(text, "... and {more} more faults");
    }
    let _ =
        writeln!(text, "{volumes} volumes, {snapshots} snapshots, {pages} map pages, {blocks} blocks of data, {batches} batches to replay");
    if data {
        let _ = writeln!(text, "{verified} blocks have the right checksum");
    } else {
        let _ = writeln!(text, "the data itself was not read; --data does that");
    }
    let verdict = if report.is_clean() { "clean" } else { "DAMAGED: what is named above has to come from other replicas" };
    let _ = writeln!(text, "{verdict}");
    text
}
