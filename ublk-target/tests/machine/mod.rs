//! A node made of the real programs: replicas of one volume, its target, a run directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use carrick_backing_store::{ReplicaSpec, StoreId, VolumeId, VolumeSize};
use carrick_replicator::control::{
    Map, ReplicaAddress, ReplicaAnswer, ReplicaRequest, RunDirectory, TargetAnswer, TargetConfig, TargetPhase, TargetRequest, TargetStatus,
    call,
};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::engine::{Attachment, Predecessor};
use carrick_replicator::limits::Limits;
use tempfile::TempDir;

/// User-mode Linux on a busy machine is slow; nothing here is a measurement.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of each store: room for the volume.
const STORE_SIZE: &str = "512M";
/// The file that the udev rules read is in this folder, so that there is one machine at a time.
const RUN: &str = "/run/carrick";

pub struct Machine {
    pub config: TargetConfig,
    pub run: RunDirectory,
    pub folder: TempDir,
    pub replicas: Vec<Child>,
    pub target: Option<Child>,
}

impl Machine {
    /// A volume of 256 MiB with so many replicas.
    pub fn new(replicas: usize, block_size: u32) -> Self {
        let run = RunDirectory::new(RUN);
        let volume = VolumeId::random();
        let size = VolumeSize::new(256 << 20).unwrap();
        let config = TargetConfig {
            volume,
            name: "test".into(),
            size,
            block_size,
            queue_depth: 128,
            host: false,
            replicas: Vec::new(),
            rebuild_rate: None,
            records: None,
            retiring: Vec::new(),
            attachment: Attachment::NONE,
            limits: Limits::default(),
            map: map(),
            tends: false,
            predecessor: Predecessor::Ended,
        };
        let mut machine = Self { config, run, folder: tempfile::tempdir().unwrap(), replicas: Vec::new(), target: None };
        for number in 0..replicas {
            machine.add_replica(number);
        }
        machine
    }

    fn add_replica(&mut self, number: usize) {
        let program = Path::new(env!("CARGO_BIN_EXE_carrick-target")).with_file_name("carrick-replica");
        let path = self.folder.path().join(number.to_string());
        let made = Command::new(&program)
            .arg("format")
            .arg(&path)
            .args(["--size", STORE_SIZE])
            .output()
            .expect("carrick-replica is built beside carrick-target");
        assert!(made.status.success(), "{made:?}");
        let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
        let store: StoreId = made["store"].as_str().unwrap().parse().unwrap();
        let mut serve = Command::new(&program);
        serve.arg("serve").arg(&path).arg("--run-dir").arg(RUN).stderr(self.log("replica")).current_dir("/");
        self.replicas.push(serve.spawn().unwrap());
        let create = ReplicaRequest::Create { spec: ReplicaSpec { volume: self.config.volume, size: self.config.size } };
        let control = self.run.replica_control(store);
        wait_for("the replica to listen", || std::os::unix::net::UnixStream::connect(&control).is_ok());
        assert_eq!(call::<_, ReplicaAnswer>(&control, &create, PATIENCE).unwrap(), ReplicaAnswer::Done);
        self.config.replicas.push(ReplicaAddress { store, endpoint: Endpoint::Unix(self.run.replica_socket(store)) });
    }

    fn log(&self, name: &str) -> File {
        File::options().create(true).append(true).open(self.folder.path().join(format!("{name}.log"))).unwrap()
    }

    pub fn config_path(&self) -> PathBuf {
        self.run.target_config(self.config.volume)
    }

    pub fn write_config(&self) {
        fs::create_dir_all(self.config_path().parent().unwrap()).unwrap();
        fs::write(self.config_path(), serde_json::to_vec(&self.config).unwrap()).unwrap();
    }

    /// A target process, with this run directory.
    pub fn command(&self, run: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_carrick-target"));
        command.arg("run").arg("--config").arg(self.config_path()).arg("--run-dir").arg(run);
        command
    }

    /// Starts the target.
    pub fn start(&mut self) {
        self.write_config();
        self.target = Some(self.command(Path::new(RUN)).stderr(self.log("target")).spawn().unwrap());
    }

    /// Starts the target and waits until it serves. Gives the device.
    pub fn serve(&mut self) -> PathBuf {
        self.start();
        let begun = Instant::now();
        loop {
            if let Some(TargetStatus { phase: TargetPhase::Serving, device: Some(device), .. }) = self.status() {
                return device;
            }
            if begun.elapsed() > PATIENCE {
                panic!("the target doesn't serve: {:?}\n{}", self.status(), self.target_log());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn target_log(&self) -> String {
        fs::read_to_string(self.folder.path().join("target.log")).unwrap_or_default()
    }

    fn ask(&self, request: &TargetRequest) -> Option<TargetAnswer> {
        call(&self.run.target_control(self.config.volume), request, PATIENCE).ok()
    }

    pub fn status(&self) -> Option<TargetStatus> {
        match self.ask(&TargetRequest::Status)? {
            TargetAnswer::Status(status) => Some(*status),
            other => panic!("not a status: {other:?}"),
        }
    }

    pub fn detach(&self, force: bool) -> TargetAnswer {
        self.ask(&TargetRequest::Detach { force }).expect("an answer")
    }

    /// Detaches by force, and checks that no file of it is left. A mapped device that is open stays until it is closed.
    pub fn detach_by_force(&mut self) {
        self.detach_and_look(true);
    }

    /// Detaches and checks that nothing of it is left.
    pub fn detach_cleanly(&mut self, force: bool) {
        let device = self.detach_and_look(force);
        assert!(device.is_none_or(|device| !device.exists()));
        assert_eq!(mapped_devices(), Vec::<String>::new());
    }

    fn detach_and_look(&mut self, force: bool) -> Option<PathBuf> {
        let device = self.status().unwrap().device;
        assert_eq!(self.detach(force), TargetAnswer::Done, "{}", self.target_log());
        assert!(self.target.take().unwrap().wait().unwrap().success());
        for path in [self.config_path(), self.run.target_control(self.config.volume), self.run.target_lock(self.config.volume)] {
            assert!(!path.exists(), "{} is left", path.display());
        }
        let told = fs::read_dir(self.run.root().join("udev")).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(told, Vec::<std::ffi::OsString>::new(), "udev is told of no device");
        assert_eq!(devices(), Vec::<String>::new());
        device
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let mut target = self.target.take().unwrap();
        target.kill().unwrap();
        target.wait().unwrap();
    }

    pub fn signal_replicas(&self, signal: &str) {
        for replica in &self.replicas {
            run("kill", &[signal, &replica.id().to_string()]);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for mut child in self.replicas.drain(..).chain(self.target.take()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// All tests are to pass with either kind of device.
pub fn map() -> Map {
    if std::env::var_os("CARRICK_TEST_MAPPED").is_some() { Map::Always } else { Map::Never }
}

/// A mounted device. A test that fails leaves it behind without waiting for a disk that may not answer.
pub struct Mounted(TempDir);

impl Mounted {
    /// Makes a file system on the device and mounts it.
    pub fn new(device: &Path) -> Self {
        let mounted = Self(tempfile::tempdir().unwrap());
        run("mkfs.ext4", &["-q", device.to_str().unwrap()]);
        run("mount", &[device.to_str().unwrap(), mounted.path()]);
        mounted
    }

    pub fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    pub fn unmount(self) {
        run("umount", &[self.path()]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).stderr(Stdio::null()).status();
    }
}

/// ublk devices, by the driver.
pub fn devices() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/ublk-char").map(|entries| entries.map(|entry| entry.unwrap().file_name()).collect());
    let names: Vec<std::ffi::OsString> = entries.unwrap_or_default();
    names.into_iter().map(|name| name.into_string().unwrap()).collect()
}

/// Mapped devices, by sysfs.
pub fn mapped_devices() -> Vec<String> {
    let names = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("dm-")).collect()
}

/// Waits for a state.
pub fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program that must succeed.
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}
