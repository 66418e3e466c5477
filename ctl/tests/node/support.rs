//! A node in a temporary folder: carrickd with stand-ins for the other programs, and the `carrick` command.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use carrick_backing_store::{StoreId, VolumeId};
use carrick_replicator::control::{RecordsAnswer, RecordsRequest, VolumeConfig, call};
use serde_json::Value;
use tempfile::TempDir;

/// For anything that a test waits for. Only a failure takes so long.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    /// Exit code.
    pub code: i32,
    /// Standard output, or standard error if it failed, as JSON (`Null` if it isn't any).
    pub json: Value,
    /// All that was written.
    pub text: String,
}

impl Answer {
    #[track_caller]
    pub fn ok(self) -> Value {
        assert_eq!(self.code, 0, "{}", self.text);
        self.json
    }

    /// It failed with this exit code and reason; returns the message.
    #[track_caller]
    pub fn fails(self, code: i32, reason: &str) -> String {
        assert_eq!((self.code, self.json["reason"].as_str()), (code, Some(reason)), "{}", self.text);
        self.json["message"].as_str().unwrap().to_owned()
    }
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let json = serde_json::from_str(if output.status.success() { &out } else { &err }).unwrap_or(Value::Null);
        Self { code: output.status.code().unwrap_or(-1), json, text: format!("{out}{err}") }
    }
}

pub struct Node {
    folder: TempDir,
    daemon: Option<Child>,
    /// Of carrickd, besides where its files are.
    pub options: Vec<&'static str>,
}

impl Node {
    /// With carrickd running and this many stores.
    pub fn new(stores: usize) -> Self {
        // Not the default temporary folder: names of sockets must be short.
        let folder = tempfile::Builder::new().prefix("cctl").tempdir_in("/tmp").unwrap();
        let mut node = Self { folder, daemon: None, options: Vec::new() };
        fs::create_dir(node.path("bin")).unwrap();
        for name in ["carrick-replica", "carrick-target"] {
            symlink(stand_in(), node.path("bin").join(name)).unwrap();
        }
        node.start();
        for number in 0..stores {
            node.add_store(number);
        }
        node
    }

    /// Puts a new file in the place of a program, as a package does.
    pub fn install(&self, name: &str) {
        self.install_file(name, &stand_in());
    }

    /// The same, with other content.
    pub fn install_file(&self, name: &str, content: &Path) {
        let new = self.path("bin").join("new");
        fs::copy(content, &new).unwrap();
        fs::rename(new, self.path("bin").join(name)).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file in the run directory.
    pub fn run(&self, name: &str) -> PathBuf {
        self.path("run").join(name)
    }

    pub fn store_path(&self, number: usize) -> PathBuf {
        self.path(&format!("store{number}"))
    }

    pub fn add_store(&self, number: usize) -> Value {
        let path = self.store_path(number);
        fs::create_dir_all(&path).unwrap();
        self.carrick(&["store", "add", path.to_str().unwrap()]).ok()
    }

    /// Number of replica files in a store.
    pub fn replicas_in(&self, number: usize) -> usize {
        let entries = fs::read_dir(self.store_path(number)).unwrap().flatten();
        entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "replica")).count()
    }

    /// The same of so many stores together.
    pub fn replicas_in_all(&self, stores: usize) -> usize {
        (0..stores).map(|number| self.replicas_in(number)).sum()
    }

    fn daemon_command(&self, run_dir: &str, state_dir: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_carrickd"));
        command.arg("--run-dir").arg(self.path(run_dir)).arg("--state-dir").arg(self.path(state_dir));
        command.arg("--bin-dir").arg(self.path("bin")).args(["--allow-non-root", "--log", "debug"]).args(&self.options);
        command.stdin(Stdio::null());
        command
    }

    /// Starts carrickd and waits until it answers.
    /// The operations of this kind, the newest first.
    pub fn operations(&self, kind: &str) -> Vec<Value> {
        let mut operations = self.carrick(&["operation", "list"]).ok().as_array().unwrap().clone();
        operations.retain(|operation| operation["kind"] == kind);
        operations
    }

    /// State, step, and why, of the newest operation of this kind.
    pub fn operation(&self, kind: &str) -> [String; 3] {
        let newest = self.operations(kind).into_iter().next().unwrap_or_default();
        ["state", "step", "reason"].map(|field| newest[field].as_str().unwrap_or_default().to_owned())
    }

    pub fn start(&mut self) {
        let log = fs::OpenOptions::new().append(true).create(true).open(self.path("carrickd.log")).unwrap();
        self.daemon = Some(self.daemon_command("run", "state").stderr(log).spawn().unwrap());
        self.wait_for("carrickd", |node| (node.carrick(&["status"]).code == 0).then_some(()));
    }

    /// A second carrickd, which must not start.
    pub fn start_another(&self, run_dir: &str, state_dir: &str) -> Answer {
        self.daemon_command(run_dir, state_dir).output().unwrap().into()
    }

    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// What a target says that has lost a replica.
    pub fn leave_out(&self, volume: &Value, lost: &str) {
        self.change_members(volume, |members| members.retain(|store| store.to_string() != lost));
    }

    /// The kinds of what has happened to the node itself.
    pub fn own_events(&self) -> Vec<String> {
        let events = self.carrick(&["events"]).ok();
        let own = events.as_array().unwrap().iter().filter(|event| event["volume"].is_null() && event["store"].is_null());
        own.map(|event| event["kind"].as_str().unwrap().to_owned()).collect()
    }

    /// The process of a store, by its id.
    pub fn pid_of(&self, store: &str) -> u32 {
        let processes = self.carrick(&["status"]).ok()["processes"].clone();
        let process = processes.as_array().unwrap().iter().find(|process| process["subject"] == store).unwrap();
        u32::try_from(process["pid"].as_u64().unwrap()).unwrap()
    }

    /// Ends a store's process, which doesn't come back, as its files are gone.
    pub fn take_away(&self, store: &str) {
        let path = self.path_of(store);
        fs::rename(path.join("store.json"), path.join("aside")).unwrap();
        signal(self.pid_of(store), rustix::process::Signal::KILL);
    }

    pub fn bring_back(&self, store: &str) {
        let path = self.path_of(store);
        fs::rename(path.join("aside"), path.join("store.json")).unwrap();
    }

    fn path_of(&self, store: &str) -> PathBuf {
        self.carrick(&["store", "show", store]).ok()["path"].as_str().map(PathBuf::from).unwrap()
    }

    /// What a target says when all replicas have everything.
    pub fn take_back(&self, volume: &Value) {
        let stores = volume["replicas"].as_array().unwrap().iter().map(|replica| replica["store"].as_str().unwrap().parse().unwrap());
        self.change_members(volume, |members| *members = stores.collect());
    }

    /// What a target says when other replicas count.
    pub fn change_members(&self, volume: &Value, change: impl FnOnce(&mut Vec<StoreId>)) {
        let id: VolumeId = volume["id"].as_str().unwrap().parse().unwrap();
        let ask = |request: &RecordsRequest| call::<_, RecordsAnswer>(&self.run("records.sock"), request, PATIENCE).unwrap();
        let RecordsAnswer::Config(config) = ask(&RecordsRequest::Read { volume: id }) else { panic!("no config") };
        let mut members = config.members.clone();
        change(&mut members);
        let next = VolumeConfig { version: config.version.next(), members, ..config };
        assert_eq!(ask(&RecordsRequest::Swap { volume: id, next: next.clone() }), RecordsAnswer::Config(next));
    }

    /// kill -9.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// SIGTERM.
    pub fn stop_daemon(&mut self) {
        signal(self.daemon_pid(), rustix::process::Signal::TERM);
        self.wait_daemon();
    }

    /// Waits until the daemon has died by its own hand.
    pub fn wait_crash(&mut self) {
        let status = self.wait_end();
        assert!(!status.success(), "{status}");
    }

    /// Waits until it has ended well.
    pub fn wait_daemon(&mut self) {
        let status = self.wait_end();
        assert!(status.success(), "{status}");
    }

    fn wait_end(&mut self) -> ExitStatus {
        let pid = self.daemon_pid();
        self.wait_for("carrickd's end", |_| (!alive(pid)).then_some(()));
        self.daemon.take().unwrap().wait().unwrap()
    }

    fn carrick_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_carrick"));
        command.arg("--run-dir").arg(self.path("run")).arg("--json").args(arguments).stdin(Stdio::null());
        command
    }

    pub fn carrick(&self, arguments: &[&str]) -> Answer {
        self.carrick_command(arguments).output().unwrap().into()
    }

    /// Without waiting for its end.
    pub fn carrick_begin(&self, arguments: &[&str]) -> Child {
        self.carrick_command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Process ids of the running processes of a kind (`replica`, `target`), in the order of their ids.
    pub fn pids(&self, kind: &str) -> Vec<u32> {
        let status = self.carrick(&["status"]).ok();
        let processes = status["processes"].as_array().unwrap().clone();
        let running = processes.iter().filter(|process| process["kind"] == kind && process["state"] == "running");
        running.map(|process| u32::try_from(process["pid"].as_u64().unwrap()).unwrap()).collect()
    }

    /// Waits until something is there.
    #[track_caller]
    pub fn wait_for<T>(&self, what: &str, mut condition: impl FnMut(&Self) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = condition(self) {
                return found;
            }
            if started.elapsed() > PATIENCE {
                let log = fs::read_to_string(self.path("carrickd.log")).unwrap_or_default();
                panic!("waited in vain for {what}; carrickd's log:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // Stand-ins end when their folder goes; those that a test has stopped can't.
        let folder = self.folder.path().to_str().unwrap();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&command).contains(folder) {
                let _ = rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL);
            }
        }
    }
}

/// Is there such a process, and is it no zombie?
pub fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// The example `stand_in`: Cargo builds it with all tests, beside the programs.
fn stand_in() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_carrickd")).with_file_name("examples").join("stand_in");
    let made = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/stand_in.rs");
    assert!(made(&path) > made(&source), "{} is missing or old: run cargo build --release -p carrick-ctl --examples", path.display());
    path
}
