//! The target with real replicas on a real ublk driver. Run it where there is one, as root, one test at a time:
//!
//!     cargo build --release -p carrick-replicator
//!     cargo test --release -p carrick-target --features kernel-tests --test target --no-run
//!     tests/kernel/run -- target/release/deps/target-… --test-threads=1
//!
//! With `CARRICK_TEST_MAPPED` set, all devices are mapped ones.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

mod machine;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use carrick_backing_store::{BufferPool, Term};
use carrick_replicator::control::{ControlError, ControlErrorCode, Map, TargetAnswer, TargetRequest, call};
use carrick_replicator::engine::{Engine, EngineConfig, Request, RequestError, RequestTag, Response};
use carrick_replicator::io::{Completed, FrontEnd, Primary, Reactor};
use machine::{Machine, Mounted, devices, run, wait_for};

/// Kills of a target that takes a device away, each 4 ms later than the one before.
const ROUNDS_OF_REMOVAL: u64 = 16;

fn fio(directory: &str, seconds: u32) -> Child {
    let directory = format!("--directory={directory}");
    let runtime = format!("--runtime={seconds}");
    // It leaves the state of its verification where it runs.
    let folder = std::env::temp_dir();
    let job = ["--name=verify", "--size=48m", "--bs=4k", "--rw=randrw", "--ioengine=libaio", "--direct=1", "--iodepth=32"];
    let check = ["--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--time_based", &runtime, &directory];
    Command::new("fio").args(job).args(check).current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

fn refused(answer: TargetAnswer) -> ControlError {
    match answer {
        TargetAnswer::Refused(error) => error,
        other => panic!("not refused: {other:?}"),
    }
}

/// Kills the target under a verifying load on a file system: there is no I/O error, and no byte is wrong.
fn survives_kills(replicas: usize, block_size: u32) {
    let mut machine = Machine::new(replicas, block_size);
    let device = machine.serve();
    let logical = fs::read_to_string("/sys/block/ublkb0/queue/logical_block_size").unwrap();
    assert_eq!(logical.trim(), block_size.to_string());
    let mount = Mounted::new(&device);
    let mut load = fio(mount.path(), 12);
    for pause in [300, 900, 50, 1200] {
        thread::sleep(Duration::from_millis(pause));
        machine.kill();
        assert_eq!(machine.serve(), device, "recovered, not made anew");
    }
    assert!(load.wait().unwrap().success(), "{}", machine.target_log());
    assert_eq!(refused(machine.detach(false)).code, ControlErrorCode::Busy);
    mount.unmount();
    run("e2fsck", &["-fn", device.to_str().unwrap()]);
    machine.detach_cleanly(false);
}

#[test]
fn a_file_system_on_one_replica_survives_kills_of_its_target() {
    survives_kills(1, 512);
}

#[test]
fn a_file_system_on_three_replicas_survives_kills_of_its_target() {
    survives_kills(3, 4096);
}

/// Kills the target at many moments of its start, with and without requests waiting, then serves and compares.
#[test]
fn a_target_killed_at_any_moment_of_its_start_is_followed_by_one_that_serves() {
    let mut machine = Machine::new(1, 512);
    for round in 0..2_u64 {
        for step in 0..40 {
            machine.start();
            thread::sleep(Duration::from_millis(step * 6 + round * 3));
            machine.kill();
        }
        let device = machine.serve();
        let data = vec![0xa5 ^ round as u8; 1 << 20];
        let mut file = File::options().write(true).open(&device).unwrap();
        file.write_all(&data).unwrap();
        file.sync_all().unwrap();
        drop(file);
        machine.kill();
        // Reads past the page cache: it waits in the kernel until somebody serves.
        let source = format!("if={}", device.display());
        let reading =
            Command::new("dd").args([&source, "bs=1M", "count=1", "iflag=direct"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        for step in 0..40 {
            machine.start();
            thread::sleep(Duration::from_millis(step * 6 + round * 3));
            machine.kill();
        }
        machine.serve();
        let read = reading.unwrap().wait_with_output().unwrap();
        assert!(read.status.success() && read.stdout == data, "round {round}");
        assert_eq!(devices(), ["ublkc0"], "no half-made device is left");
        machine.detach_cleanly(false);
    }
}

#[test]
fn sigterm_keeps_the_device_for_the_next_target() {
    let mut machine = Machine::new(1, 512);
    let device = machine.serve();
    File::options().write(true).open(&device).unwrap().write_all_at(&[7; 4096], 8192).unwrap();
    let mut target = machine.target.take().unwrap();
    run("kill", &[&target.id().to_string()]);
    assert!(!target.wait().unwrap().success());
    assert!(device.exists());
    assert_eq!(machine.serve(), device);
    let mut read = [0; 4096];
    File::open(&device).unwrap().read_exact_at(&mut read, 8192).unwrap();
    assert_eq!(read, [7; 4096]);
    machine.detach_cleanly(false);
}

#[test]
fn a_second_target_of_a_volume_is_refused_and_the_first_serves_on() {
    let mut machine = Machine::new(1, 512);
    machine.serve();
    let term = machine.status().unwrap().term;
    let elsewhere = tempfile::tempdir().unwrap();
    for (run, why) in [(machine.run.root(), "another target of volume"), (elsewhere.path(), "serves the volume already")] {
        let second = machine.command(run).output().unwrap();
        let said = String::from_utf8(second.stderr).unwrap();
        assert!(!second.status.success() && said.contains(why), "{said}");
    }
    assert_eq!(machine.status().unwrap().term, term, "nobody has asked for a term");
    machine.detach_cleanly(false);
}

#[test]
fn a_disk_in_use_goes_only_by_force() {
    let mut machine = Machine::new(1, 512);
    let device = machine.serve();
    assert_eq!(device.starts_with("/dev/dm-0"), machine.config.map == Map::Always);
    let mut opener = Command::new("sleep").arg("1000").stdin(File::open(&device).unwrap()).spawn().unwrap();
    let error = refused(machine.detach(false));
    assert!(error.message.contains(&format!("sleep (process {})", opener.id())), "{error}");
    opener.kill().unwrap();
    opener.wait().unwrap();

    let mount = Mounted::new(&device);
    let error = refused(machine.detach(false));
    assert_eq!(error.code, ControlErrorCode::Busy);
    assert!(error.message.contains(mount.path()), "{error}");
    let mut load = fio(mount.path(), 60);
    wait_for("requests", || machine.status().unwrap().requests_in_flight > 0);
    machine.detach_by_force();
    assert!(!load.wait().unwrap().success(), "openers get errors");
    // What is still open is in nobody's way.
    machine.config.attachment = machine.config.attachment.next();
    let again = machine.serve();
    mount.unmount();
    run("e2fsck", &["-fy", again.to_str().unwrap()]);
    machine.detach_cleanly(false);
}

#[test]
fn force_ends_requests_that_wait_for_replicas() {
    let mut machine = Machine::new(3, 512);
    let device = machine.serve();
    machine.signal_replicas("-STOP");
    let write = |device: &Path| {
        let target = format!("of={}", device.display());
        Command::new("dd").args(["if=/dev/zero", &target, "bs=64k", "count=1", "oflag=direct"]).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut waiting = write(&device);
    wait_for("the status to say why", || machine.status().unwrap().waiting_for.is_some());
    machine.detach_cleanly(true);
    assert!(!waiting.wait().unwrap().success());

    // The same while there is no primary: the requests wait in the kernel.
    machine.signal_replicas("-CONT");
    let device = machine.serve();
    machine.kill();
    machine.signal_replicas("-STOP");
    let mut waiting = write(&device);
    machine.start();
    wait_for("a status", || machine.status().is_some());
    assert_eq!(refused(machine.detach(false)).code, ControlErrorCode::Busy);
    machine.detach_cleanly(true);
    assert!(!waiting.wait().unwrap().success());
    machine.signal_replicas("-CONT");
    machine.serve();
    machine.detach_cleanly(false);
}

/// Kills the target at many moments of a detach by force, while requests are in flight: nothing waits for ever, and the next target
/// takes the device away.
#[test]
fn a_target_killed_while_it_takes_a_used_device_away_is_followed_by_one_that_does() {
    let mut machine = Machine::new(1, 512);
    for round in 0..ROUNDS_OF_REMOVAL {
        machine.config.attachment = machine.config.attachment.next();
        let device = machine.serve();
        let filename = format!("--filename={}", device.display());
        let job = ["--name=load", "--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--direct=1", "--iodepth=64", "--time_based"];
        let quiet = |command: &mut Command| command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut load = quiet(Command::new("fio").args(job).args(["--runtime=60", &filename]).current_dir(std::env::temp_dir()));
        wait_for("requests", || machine.status().unwrap().requests_in_flight > 0);
        let socket = machine.run.target_control(machine.config.volume);
        let asked =
            thread::spawn(move || call::<_, TargetAnswer>(&socket, &TargetRequest::Detach { force: true }, Duration::from_secs(60)));
        thread::sleep(Duration::from_millis(round * 4));
        machine.kill();
        // It may have been done by then.
        _ = asked.join().unwrap();
        machine.start();
        wait_for("a status", || machine.status().is_some());
        machine.detach_by_force();
        assert!(!load.wait().unwrap().success(), "openers get errors");
    }
}

/// A primary elsewhere that takes the volume over and does nothing with it.
struct Rival {
    serves: bool,
}

impl FrontEnd for Rival {
    fn on_serve(&mut self, _reactor: &mut Reactor, _term: Term) -> io::Result<()> {
        self.serves = true;
        Ok(())
    }

    fn on_completed(&mut self, _: &mut Reactor, _: &mut Engine, _: Completed, _: &mut Vec<(RequestTag, Request)>) -> io::Result<()> {
        Ok(())
    }

    fn on_response(
        &mut self,
        _: &mut Reactor,
        _: RequestTag,
        _: Result<Response, RequestError>,
        _: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.serves
    }
}

/// Takes the volume over while a write is under way: the target ends, the write is neither acknowledged nor failed by it, and
/// the next target of this host ends it.
#[test]
fn a_superseded_target_ends_and_leaves_its_requests_to_the_kernel() {
    let mut machine = Machine::new(3, 512);
    let device = machine.serve();
    let mount = Mounted::new(&device);
    let mut load = fio(mount.path(), 6);
    wait_for("requests", || machine.status().unwrap().requests_in_flight > 0);

    let config = EngineConfig::new(machine.config.volume, machine.config.size, 3, 1);
    let endpoints = machine.config.replicas.iter().map(|replica| replica.endpoint.clone()).collect();
    Primary::new(config, endpoints, BufferPool::new(0), false).unwrap().run(&mut Rival { serves: false }).unwrap();

    let ended = machine.target.take().unwrap().wait().unwrap();
    assert_eq!(ended.code(), Some(1));
    let failure: ControlError = serde_json::from_slice(&fs::read(machine.run.target_failure(machine.config.volume)).unwrap()).unwrap();
    assert_eq!(failure.code, ControlErrorCode::Conflict);
    // By a refused message, or by losing the promise of a majority: whichever comes first.
    assert!(failure.message.starts_with("another primary "), "{failure}");
    assert_eq!(load.try_wait().unwrap(), None, "its requests wait");
    assert_eq!(machine.serve(), device);
    assert!(load.wait().unwrap().success());
    mount.unmount();
    machine.detach_cleanly(false);
}

/// Writes a partition table, then looks whether the host has read it.
#[test]
fn only_the_hosts_own_disks_have_their_partitions_read() {
    let mut machine = Machine::new(1, 512);
    let device = machine.serve();
    let mut table = [0; 512];
    table[450] = 0x83;
    table[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    table[458..462].copy_from_slice(&4096_u32.to_le_bytes());
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    File::options().write(true).open(&device).unwrap().write_all_at(&table, 0).unwrap();
    let partition = Path::new("/sys/block/ublkb0/ublkb0p1");
    let reread = || Command::new("blockdev").args(["--rereadpt", "/dev/ublkb0"]).output().unwrap().status.success();
    assert!(!reread() && !partition.exists());
    machine.kill();
    machine.serve();
    assert!(!reread() && !partition.exists(), "after a recovery neither");
    machine.detach_cleanly(false);
    machine.serve();
    thread::sleep(Duration::from_millis(500));
    assert!(!partition.exists(), "newer kernels read it in the background");
    machine.detach_cleanly(false);

    machine.config.host = true;
    machine.serve();
    if machine.config.map == Map::Never {
        wait_for("the partition", || partition.exists());
    } else {
        thread::sleep(Duration::from_millis(500));
        assert!(!partition.exists(), "the kernel looks for none on mapped devices, and not on those under them");
    }
    machine.detach_cleanly(false);
}

#[test]
fn udev_names_the_disk_and_hides_a_guests_labels() {
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../udev");
    let daemon = Path::new("/lib/systemd/systemd-udevd");
    assert!(daemon.exists(), "install udev: its daemon is started here");
    fs::create_dir_all("/run/udev/rules.d").unwrap();
    for name in ["11-dm-carrick.rules", "59-carrick.rules", "61-carrick-nowatch.rules"] {
        fs::copy(rules.join(name), Path::new("/run/udev/rules.d").join(name)).unwrap();
    }
    let mut udevd = Command::new(daemon).spawn().unwrap();
    wait_for("udev", || Path::new("/run/udev/control").exists());
    let mut machine = Machine::new(1, 512);
    let device = machine.serve();
    let link = Path::new("/dev/carrick/test");
    wait_for("the link", || fs::canonicalize(link).is_ok_and(|target| target == device));
    let by_id = format!("/dev/disk/by-id/carrick-{}", machine.config.volume);
    wait_for("the other link", || fs::canonicalize(&by_id).is_ok_and(|target| target == device));
    run("mkfs.ext4", &["-q", "-L", "carrick-guest", device.to_str().unwrap()]);
    let trigger = || {
        run("udevadm", &["trigger", "--action=change", "--name-match", device.to_str().unwrap()]);
        run("udevadm", &["settle"]);
    };
    let label = Path::new("/dev/disk/by-label/carrick-guest");
    trigger();
    assert!(!label.exists(), "a guest's label is not among the host's");

    // The links come back when the run directory was lost.
    machine.kill();
    fs::remove_dir_all(machine.run.root().join("udev")).unwrap();
    trigger();
    assert!(!link.exists());
    machine.serve();
    wait_for("the link", || fs::canonicalize(link).is_ok_and(|target| target == device));
    machine.detach_cleanly(false);
    wait_for("the link to go", || !link.exists());
    udevd.kill().unwrap();
    udevd.wait().unwrap();
}
