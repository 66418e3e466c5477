//! What a target starts ends with it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_tied_process_ends_with_its_parent() {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("$TARGET tied $$ sleep 1000 >/dev/null & echo $!; read line").env("TARGET", env!("CARGO_BIN_EXE_carrick-target"));
    let mut parent = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(parent.stdout.take().unwrap()), &mut line).unwrap();
    let child: u32 = line.trim().parse().unwrap();
    // Once it has become another program it has been tied.
    let name = || fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
    wait_for("it becomes the program", || name() == "sleep\n");
    parent.kill().unwrap();
    parent.wait().unwrap();
    // Whoever has become its parent may leave it unreaped.
    let stat = || fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
    wait_for("it ends", || stat().is_empty() || stat().contains(") Z "));
}

#[test]
fn nobody_is_tied_to_another_process_and_a_program_that_is_not_there_is_told() {
    let target = || Command::new(env!("CARGO_BIN_EXE_carrick-target"));
    let run = |parent: &str, program: &str| target().args(["tied", parent, program, "--flag"]).output().unwrap();
    let own = std::process::id().to_string();
    assert_eq!(run("1", "echo").status.code(), Some(1));
    assert_eq!(run(&own, "/nonexistent").status.code(), Some(127));
    let echoed = run(&own, "echo");
    assert_eq!((echoed.status.code(), String::from_utf8(echoed.stdout).unwrap().as_str()), (Some(0), "--flag\n"));
}
