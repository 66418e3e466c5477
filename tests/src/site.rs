//! A node of its own: folders, a `carrickd`, stores, and the `carrick` command as a user has it. Dropping it ends every process and
//! device that it made, also after a failure.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How often a state is looked at while it is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long a state is waited for that should come at once, on a slow machine.
pub const SOON: Duration = Duration::from_secs(60);

/// Of each store: room for what a test has in it. The file grows only as far as it is used.
const STORE_SIZE: &str = "512M";

/// A node under test.
pub struct Site {
    folder: PathBuf,
    /// Removes the folder, if it isn't kept.
    _temporary: Option<TempDir>,
    daemon: Option<Child>,
    /// Where `carrickd` finds what it starts.
    bin_dir: PathBuf,
}

/// The `carrick` command, for one node.
#[derive(Clone, Debug)]
pub struct Carrick {
    run: PathBuf,
}

/// What a refused command said.
#[derive(Debug)]
pub struct Refusal {
    pub code: i32,
    pub reason: String,
    pub message: String,
}

/// A process that `carrickd` looks after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub kind: String,
    pub subject: String,
    pub pid: i32,
}

/// Where the programs under test are: beside this one.
pub fn programs() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    Ok(own.parent().context("this program has no folder")?.to_owned())
}

impl Site {
    /// A daemon without stores.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(programs()?)
    }

    /// The same, with the programs that it starts in this folder.
    pub fn start_with(bin_dir: PathBuf) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("carrick-site-").tempdir()?;
        Self::in_folder(folder.path().to_owned(), Some(folder), bin_dir)
    }

    /// A daemon whose folder stays. If there is one, it goes on with it.
    pub fn kept_in(folder: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir_all(&folder)?;
        Self::in_folder(folder, None, programs()?)
    }

    fn in_folder(folder: PathBuf, temporary: Option<TempDir>, bin_dir: PathBuf) -> anyhow::Result<Self> {
        let mut site = Self { folder, _temporary: temporary, daemon: None, bin_dir };
        site.start_daemon()?;
        Ok(site)
    }

    /// A daemon with this many stores in folders of its own.
    pub fn with_stores(count: usize) -> anyhow::Result<Self> {
        Self::with_sized_stores(count, STORE_SIZE)
    }

    /// The same, each of this size.
    pub fn with_sized_stores(count: usize, size: &str) -> anyhow::Result<Self> {
        let site = Self::start()?;
        site.add_stores(count, size)?;
        Ok(site)
    }

    /// Adds this many stores of this size, in folders of its own.
    pub fn add_stores(&self, count: usize, size: &str) -> anyhow::Result<()> {
        for index in 0..count {
            let path = self.path(&format!("store{index}"));
            fs::create_dir_all(&path)?;
            self.carrick(&["store", "add", path_text(&path)?, "--size", size])?;
        }
        Ok(())
    }

    /// A path in the site's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Starts `carrickd`, and waits until it answers.
    pub fn start_daemon(&mut self) -> anyhow::Result<()> {
        self.start_daemon_with(&[])
    }

    /// The same, told more.
    pub fn start_daemon_with(&mut self, options: &[&str]) -> anyhow::Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("carrickd.log"))?;
        let daemon = Command::new(programs()?.join("carrickd"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--bin-dir")
            .arg(&self.bin_dir)
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("starting carrickd")?;
        self.daemon = Some(daemon);
        wait_for("carrickd to answer", SOON, || Ok(self.carrick(&["status"]).ok().map(|_| ())))
    }

    /// Kills `carrickd` alone.
    pub fn kill_daemon(&mut self) -> anyhow::Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill()?;
            daemon.wait()?;
        }
        Ok(())
    }

    /// Waits until `carrickd` has died by its own hand.
    pub fn wait_daemon_dead(&mut self) -> anyhow::Result<()> {
        let mut daemon = self.daemon.take().context("there is no carrickd")?;
        let ended = wait_for("carrickd to die", SOON, || Ok(daemon.try_wait()?));
        if ended.is_err() {
            self.daemon = Some(daemon);
        }
        ended.map(drop)
    }

    /// Runs `carrick --json`; what it prints, or why it refused.
    pub fn try_carrick(&self, arguments: &[&str]) -> anyhow::Result<Result<Value, Refusal>> {
        self.command().run(arguments)
    }

    /// The `carrick` command for others, who use it whatever becomes of the daemon.
    pub fn command(&self) -> Carrick {
        Carrick { run: self.path("run") }
    }

    /// Runs `carrick`, which must succeed.
    pub fn carrick(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        self.try_carrick(arguments)?.map_err(|refusal| anyhow!("carrick {}: {}", arguments.join(" "), refusal.message))
    }

    /// Runs `carrick`, which must refuse with this exit code and reason; returns its sentence.
    pub fn refused(&self, arguments: &[&str], code: i32, reason: &str) -> anyhow::Result<String> {
        match self.try_carrick(arguments)? {
            Ok(value) => bail!("carrick {} was not refused: {value}", arguments.join(" ")),
            Err(refusal) => {
                let right = refusal.code == code && refusal.reason == reason && !refusal.message.is_empty();
                ensure!(right, "carrick {}: wanted {code} {reason}, got {refusal:?}", arguments.join(" "));
                Ok(refusal.message)
            }
        }
    }

    /// The id of the store in this place.
    pub fn store_at(&self, path: &str) -> anyhow::Result<String> {
        let status = self.carrick(&["status"])?;
        let stores = status["stores"].as_array().context("no stores")?;
        let found = stores.iter().find(|store| store["path"] == path).context("the store is not listed")?;
        Ok(found["id"].as_str().context("a store without id")?.to_owned())
    }

    /// Attaches a volume; its device.
    pub fn attach(&self, volume: &str, more: &[&str]) -> anyhow::Result<PathBuf> {
        let answer = self.carrick(&[&["attach", volume], more].concat())?;
        device_of(&answer).with_context(|| format!("attach said {answer}"))
    }

    /// The running replicas and targets.
    pub fn processes(&self) -> anyhow::Result<Vec<Process>> {
        let status = self.carrick(&["status"])?;
        let list = status["processes"].as_array().context("status has no processes")?;
        let process = |value: &Value| {
            let pid = i32::try_from(value["pid"].as_i64()?).ok()?;
            Some(Process { kind: value["kind"].as_str()?.to_owned(), subject: value["subject"].as_str()?.to_owned(), pid })
        };
        Ok(list.iter().filter_map(process).collect())
    }

    /// The pid of the process of a store or a volume.
    pub fn pid_of(&self, subject: &str) -> anyhow::Result<i32> {
        let found = self.processes()?.into_iter().find(|process| process.subject == subject);
        found.map(|process| process.pid).with_context(|| format!("no process of {subject}"))
    }

    /// Waits until the replicas of a volume that were replaced or given up are deleted.
    pub fn wait_left(&self, volume: &str) -> anyhow::Result<()> {
        wait_for("the replicas that leave to be deleted", SOON, || {
            let shown = self.carrick(&["volume", "show", volume])?;
            Ok(shown["leaving_stores"].as_array().is_none_or(Vec::is_empty).then_some(()))
        })
    }

    /// The pids of one kind, in the order of the stores or volumes.
    pub fn pids(&self, kind: &str) -> anyhow::Result<Vec<i32>> {
        Ok(self.processes()?.into_iter().filter(|process| process.kind == kind).map(|process| process.pid).collect())
    }

    /// Waits until all replicas of an attached volume are in sync.
    pub fn wait_in_sync(&self, volume: &str, limit: Duration) -> anyhow::Result<()> {
        wait_for("all replicas to be in sync", limit, || {
            let shown = self.carrick(&["volume", "show", volume])?;
            let replicas = shown["replicas"].as_array().context("no replicas")?;
            Ok(replicas.iter().all(|replica| replica["state"] == "in-sync").then_some(()))
        })
        .with_context(|| {
            let told = self.carrick(&["explain", volume]).map(|told| told.to_string());
            format!("{}\n{}", told.unwrap_or_else(|error| error.to_string()), self.log_tail())
        })
    }

    /// Detaches, however long the last opener takes to close.
    pub fn detach(&self, volume: &str) -> anyhow::Result<()> {
        wait_for("the device to be free", SOON, || Ok(self.try_carrick(&["detach", volume])?.ok().map(|_| ())))
    }

    /// The last lines of the daemon's log, for failures.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.path("carrickd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }
}

impl Carrick {
    /// Runs it with `--json`; what it prints, or why it refused.
    pub fn run(&self, arguments: &[&str]) -> anyhow::Result<Result<Value, Refusal>> {
        answered(arguments, self.tell(Command::new(programs()?.join("carrick"))).args(arguments))
    }

    /// The same, which must not take longer than so.
    pub fn run_within(&self, limit: Duration, arguments: &[&str]) -> anyhow::Result<Result<Value, Refusal>> {
        let mut command = Command::new("timeout");
        command.arg("--signal=KILL").arg(limit.as_secs().to_string()).arg(programs()?.join("carrick"));
        let begin = Instant::now();
        let answer = answered(arguments, self.tell(command).args(arguments));
        ensure!(begin.elapsed() < limit, "carrick {} had no answer after {limit:?}", arguments.join(" "));
        answer
    }

    /// Where `carrickd` is reached.
    pub fn socket(&self) -> PathBuf {
        self.run.join("carrickd.sock")
    }

    fn tell(&self, mut command: Command) -> Command {
        command.arg("--json").arg("--run-dir").arg(&self.run);
        command
    }
}

/// Runs the command; what it printed, or why it refused.
fn answered(arguments: &[&str], command: &mut Command) -> anyhow::Result<Result<Value, Refusal>> {
    let Output { status, stdout, stderr } = command.output()?;
    if status.success() {
        let text = String::from_utf8(stdout)?;
        return Ok(Ok(if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text)? }));
    }
    let text = String::from_utf8_lossy(&stderr).into_owned();
    let value: Value = serde_json::from_str(&text).with_context(|| format!("carrick {arguments:?} said {text:?}"))?;
    let field = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
    let code = status.code().context("carrick was killed")?;
    Ok(Err(Refusal { code, reason: field("reason"), message: field("message") }))
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.daemon.is_none() {
            // A test left without its daemon: a new one takes over what still runs, and ends it.
            let _ = self.start_daemon();
        }
        let _ = self.try_carrick(&["shutdown", "--force"]);
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// The device in an answer that shows an attachment.
fn device_of(answer: &Value) -> Option<PathBuf> {
    let device = answer["device"].as_str().or_else(|| answer["attachment"]["device"].as_str())?;
    Some(PathBuf::from(device))
}

/// A path as text.
pub fn path_text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path that isn't UTF-8")
}

/// Runs a program, which must succeed; what it prints.
pub fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("running {program}"))?;
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{program} {}: {} {complained}", arguments.join(" "), output.status);
    Ok(said.into_owned())
}

/// Sends a signal.
pub fn signal(pid: i32, signal: Signal) -> anyhow::Result<()> {
    let pid = Pid::from_raw(pid).context("pid 0")?;
    kill_process(pid, signal).with_context(|| format!("sending {signal:?} to {pid:?}"))
}

/// Waits until `look` finds something.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(begin.elapsed() < limit, "waited {limit:?} in vain for {what}");
        sleep(LOOK_AGAIN);
    }
}

/// Whether the path is a block device.
pub fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}
