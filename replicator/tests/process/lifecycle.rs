//! How the process begins and ends, well or badly, and what it says then.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use carrick_backing_store::VolumeId;
use carrick_replicator::control::{DamagedReplica, ReplicaAnswer, ReplicaRequest};
use carrick_replicator::io::{LoadLimit, LoadPattern, LoadSpec};
use rustix::process::Signal;

use crate::support::{PATIENCE, Replica, STORE_SIZE, load, load_spec, run, run_load, size, volume_on, wait_for};

/// Runs the program, which must fail with this code and one sentence that has all of these in it.
fn fails(arguments: &[&dyn AsRef<OsStr>], code: i32, words: &[&str]) {
    let arguments: Vec<&OsStr> = arguments.iter().map(|argument| argument.as_ref()).collect();
    let output = run(&arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(output.stdout.is_empty());
    for word in words {
        assert!(text.contains(word), "{arguments:?} should say {word:?}: {text}");
    }
    if code == 1 {
        let sentences = text.lines().filter(|line| line.starts_with("carrick-replica: ")).count();
        assert_eq!(sentences, 1, "{text}");
    }
}

fn format(path: &Path) {
    let output = run(&["format".as_ref(), path.as_os_str(), "--size".as_ref(), STORE_SIZE.as_ref()]);
    assert!(output.status.success(), "{output:?}");
}

fn show(path: &Path) -> serde_json::Value {
    let output = run(&["show".as_ref(), path.as_os_str()]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What a check with all data says, and its exit code.
fn check(path: &Path) -> (i32, serde_json::Value) {
    let output = run(&["check".as_ref(), path.as_os_str(), "--data".as_ref(), "--json".as_ref()]);
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn folders_that_cannot_be_served_are_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let (place, run_dir) = (folder.path().join("place"), folder.path().join("run"));
    let serve: [&dyn AsRef<OsStr>; 4] = [&"serve", &place, &"--run-dir", &run_dir];
    let name = place.to_str().unwrap();
    fails(&serve, 1, &[name, "not a Carrick store"]);
    fails(&[&"show", &place], 1, &[name, "not a Carrick store"]);

    fs::create_dir(&place).unwrap();
    fs::write(place.join("thesis.txt"), "precious").unwrap();
    fails(&serve, 1, &[name, "not a Carrick store"]);
    fails(&[&"format", &place], 1, &[name, "thesis.txt"]);
    fs::remove_file(place.join("thesis.txt")).unwrap();

    fails(&[&"format", &place, &"--size", &"1M"], 1, &[name, "smallest"]);
    fails(&[&"format", &place, &"--size", &"large"], 2, &["--size"]);
    format(&place);
    fails(&[&"format", &place], 1, &[name, "already"]);
    let damage = fs::File::options().write(true).open(place.join("blocks")).unwrap();
    damage.write_all_at(&vec![0xa5; 1 << 20], 0).unwrap();
    for command in ["serve", "show", "dump"] {
        fails(&[&command, &place], 1, &[name, "not a Carrick store"]);
    }
    fails(&[&"check", &place], 2, &[name, "not a Carrick store"]);

    let old = folder.path().join("old");
    fs::create_dir(&old).unwrap();
    fs::write(old.join("carrick-store"), "of the first format").unwrap();
    for (command, code) in [("format", 1), ("serve", 1), ("show", 1), ("dump", 1), ("check", 2)] {
        fails(&[&command, &old], code, &[old.to_str().unwrap(), "made by an earlier Carrick", "rebuilt"]);
    }
    assert!(!run_dir.exists(), "nothing was made for stores that can't be served");
}

#[test]
fn wrong_command_lines_and_dangerous_addresses_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (place, run_dir) = (folder.path().join("store"), folder.path().join("run"));
    format(&place);
    fails(&[], 2, &["Usage"]);
    fails(&[&"serve"], 2, &["STORE"]);
    fails(&[&"serve", &place, &"--scrub-rate", &"1x"], 2, &["--scrub-rate"]);
    fails(&[&"serve", &place, &"--listen", &"localhost:1"], 2, &["--listen"]);
    fails(&[&"serve", &place, &"--insecure"], 2, &["--listen"]);
    fails(&[&"serve", &place, &"--run-dir", &run_dir, &"--listen", &"0.0.0.0:0"], 1, &["0.0.0.0", "--insecure"]);
    let long = folder.path().join("x".repeat(100));
    fails(&[&"serve", &place, &"--run-dir", &long], 1, &["too long"]);
}

#[test]
fn a_store_is_served_once_and_can_be_looked_at_meanwhile() {
    let mut replica = Replica::start();
    let volume = VolumeId::random();
    replica.create(volume, size(4));
    let other_run = tempfile::tempdir().unwrap();
    fails(&[&"serve", &replica.path(), &"--run-dir", &other_run.path()], 1, &["in use"]);
    replica.status();
    let seen = show(&replica.path());
    assert_eq!(seen["store"], replica.store.to_string());
    assert_eq!(seen["replicas"][0]["volume"], volume.to_string());
    assert_eq!(seen["replicas"][0]["size"], 4 << 20);
    assert_eq!(seen["size"], 1 << 30);
    let status = replica.status();
    assert_eq!(seen["usage"]["reserved"], status.usage.reserved.get());
    fails(&[&"check", &replica.path()], 2, &["in use"]);
    let dump = run(&["dump".as_ref(), replica.path().as_os_str()]);
    assert!(dump.status.success() && String::from_utf8(dump.stdout).unwrap().contains(&volume.to_string()));

    replica.signal(Signal::TERM);
    assert!(replica.ended_well());
    assert_eq!(show(&replica.path())["replicas"], seen["replicas"]);
    assert_eq!(check(&replica.path()), (0, check(&replica.path()).1));
}

/// Damages a block of data in a store that has little else in it.
fn damage(store: &Path) {
    // Most of what is in the store is that data: the middle of the longest run of blocks in use is a part of it.
    let blocks = fs::File::options().read(true).write(true).open(store.join("blocks")).unwrap();
    let (mut run, mut longest) = (0..0, 0..0);
    for block in 0..blocks.metadata().unwrap().len() / 4096 {
        let mut bytes = [0; 4096];
        blocks.read_exact_at(&mut bytes, block * 4096).unwrap();
        run = if bytes == [0; 4096] { block + 1..block + 1 } else { run.start..block + 1 };
        longest = if longest.end - longest.start < run.end - run.start { run.clone() } else { longest };
    }
    blocks.write_all_at(&[0x5a; 64], (longest.start + longest.end) / 2 * 4096 + 1000).unwrap();
}

#[test]
fn damage_is_found_by_a_check_and_told_by_its_exit_code() {
    let mut replicas = [Replica::start()];
    let size = size(4);
    let volume = volume_on(&replicas, size);
    let spec = LoadSpec { limit: LoadLimit::Requests(1024), write_percent: 100, pattern: LoadPattern::Sequential, ..load_spec(size) };
    run_load(load(spec), volume, size, vec![replicas[0].unix()]).unwrap();
    let [replica] = &mut replicas;
    replica.signal(Signal::TERM);
    assert!(replica.ended_well());
    let (code, report) = check(&replica.path());
    assert_eq!((code, &report["clean"], &report["verified"]), (0, &true.into(), &1024.into()), "{report}");

    damage(&replica.path());
    let (code, report) = check(&replica.path());
    assert_eq!((code, report["faults"].as_array().unwrap().len()), (1, 1), "{report}");
    let words = crate::support::run(&["check".as_ref(), replica.path().as_os_str(), "--data".as_ref()]);
    let words = String::from_utf8(words.stdout).unwrap();
    assert!(words.contains(&volume.to_string()) && words.contains("DAMAGED"), "{words}");
}

#[test]
fn both_signals_and_the_control_socket_end_it_cleanly_and_remove_the_sockets() {
    let mut replica = Replica::start();
    let sockets = replica.run().root().join("replica");
    let left = || fs::read_dir(&sockets).unwrap().count();
    // A port that is still taken by the predecessor's ring would show in some of the rounds.
    for signal in [Signal::TERM, Signal::INT].into_iter().cycle().take(20) {
        assert_eq!(left(), 2);
        replica.signal(signal);
        assert!(replica.ended_well());
        assert_eq!(left(), 0);
        replica.restart();
    }
    assert_eq!(replica.ask(&ReplicaRequest::Shutdown), ReplicaAnswer::Done);
    assert!(replica.ended_well());
    assert_eq!(left(), 0);
}

#[test]
fn a_killed_process_leaves_data_and_sockets_that_its_successor_takes_over() {
    let mut replicas = [Replica::start()];
    let size = size(16);
    let volume = volume_on(&replicas, size);
    let spec = LoadSpec { limit: LoadLimit::Requests(20_000), write_percent: 90, ..load_spec(size) };
    let (written, report) = run_load(load(spec), volume, size, vec![replicas[0].unix()]).unwrap();
    assert_eq!((report.errors, report.mismatches), (0, 0), "{:?}", report.first_failure);
    let position = replicas[0].status().replicas[0].position;

    for _ in 0..5 {
        replicas[0].kill();
        replicas[0].restart();
    }
    replicas[0].kill();
    assert!(replicas[0].run().replica_socket(replicas[0].store).exists());
    replicas[0].restart();
    assert_eq!(replicas[0].status().replicas[0].position, position, "a kill loses nothing that was acknowledged");
    let check = LoadSpec { write_percent: 0, pattern: LoadPattern::Sequential, limit: LoadLimit::Requests(4096), ..spec };
    let (_, report) = run_load(written.again(check), volume, size, vec![replicas[0].tcp()]).unwrap();
    assert_eq!((report.errors, report.mismatches, report.reads.count), (0, 0, 4096), "{:?}", report.first_failure);
}

#[test]
#[ignore = "takes over a minute: so long after the start of a process its scrub begins"]
fn the_scrub_finds_damage_and_tells_of_it() {
    let replicas = [Replica::start()];
    let size = size(4);
    let volume = volume_on(&replicas, size);
    let spec = LoadSpec { limit: LoadLimit::Requests(1024), write_percent: 100, pattern: LoadPattern::Sequential, ..load_spec(size) };
    run_load(load(spec), volume, size, vec![replicas[0].unix()]).unwrap();
    damage(&replicas[0].path());
    assert_eq!(replicas[0].status().scrub.damaged, []);
    thread::sleep(PATIENCE);
    let found = wait_for("the scrub's end", || Some(replicas[0].status().scrub).filter(|scrub| scrub.passes > 0));
    assert_eq!(found.damaged, [DamagedReplica { volume, blocks: 1 }]);
    assert_eq!(found.verified.get(), 1023 * 4096);
}
