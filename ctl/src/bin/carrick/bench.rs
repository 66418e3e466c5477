//! `carrick bench`: measures the engine, the wire and the stores, without a block device and without `carrickd`.
//!
//! It runs replicas of its own, in a folder that goes away with it, and is itself the primary: the same code as in
//! `carrick-target`, with a load generator in the place of the kernel's queue. Where it leaves nothing behind:
//!
//! * at its end, good or bad: the folder is dropped;
//! * at SIGINT, SIGTERM and SIGHUP: a thread that waits for these drops it;
//! * if it is killed: the replicas are killed with it, by the kernel. Only the folder stays.

use std::fmt::Write as _;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use carrick_backing_store::size::HumanSize;
use carrick_backing_store::{BufferPool, ByteLength, ReplicaSpec, StoreId, Term, VolumeId, VolumeSize};
use carrick_ctl::fault::{Fault, Reason};
use carrick_replicator::control::{ControlErrorCode, MemberState, ReplicaAnswer, ReplicaRequest, RunDirectory, call};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::engine::{Engine, EngineConfig, Predecessor, Request, RequestError, RequestTag, Response};
use carrick_replicator::io::{
    Completed, FrontEnd, Histogram, LatencySummary, Load, LoadLimit, LoadPattern, LoadReport, LoadSpec, OperationReport, Primary,
    PrimaryError, Reactor, Verification,
};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::Serialize;

use crate::arguments::{Bench, ReadWrite};
use crate::report::Problem;
use crate::table::Table;

/// Unused buffers that are kept.
const POOL_BYTES: usize = 16 << 20;
/// For a replica to answer after its start.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a replica that starts.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Requests of the load that fills the volume: few and large.
const FILL_UNIT: u64 = 1 << 20;
const FILL_DEPTH: usize = 8;
/// What a store has beside the volume: its map, its journal, and room for what was overwritten and is not yet free again.
const STORE_PART: u64 = 4;
const STORE_BASE: u64 = 256 << 20;
/// Tags beside those of the load, which counts from 0.
const FLUSH: RequestTag = RequestTag(u64::MAX);
const FINAL_FLUSH: RequestTag = RequestTag(u64::MAX - 1);
/// What a shell shows after a signal: 128 and its number.
const SIGNAL_EXIT_BASE: i32 = 128;

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Outcome {
    replicas: usize,
    transport: &'static str,
    rw: ReadWrite,
    block_size: u64,
    depth: usize,
    size_bytes: u64,
    /// Seconds that it took to write the whole volume once, before the measurement, with a flush.
    fill_seconds: f64,
    #[serde(flatten)]
    load: LoadReport,
    /// FLUSH requests during the load.
    flushes: Flushes,
    /// Seconds of the FLUSH after the load; a load that only reads has none to speak of.
    final_flush_seconds: f64,
    /// Data written per second of the load and the final flush.
    write_mib_per_second_with_final_flush: f64,
    /// Replicas that had everything at the end.
    in_sync: usize,
}

#[derive(Debug, Default, Serialize)]
struct Flushes {
    count: u64,
    latency: LatencySummary,
}

/// Measures.
pub fn bench(arguments: &Bench) -> Result<Outcome, Problem> {
    let plan = Plan::new(arguments)?;
    let folder = Arc::new(Folder::make(&arguments.dir)?);
    // Before any thread starts, so that all of them leave these signals to the one that waits for them.
    clean_up_on_signals(Arc::clone(&folder)).map_err(Problem::local)?;
    let measured = plan.measure(&folder);
    folder.remove();
    measured
}

/// A command line that makes sense.
struct Plan<'a> {
    arguments: &'a Bench,
    size: VolumeSize,
    fill: LoadSpec,
    load: LoadSpec,
}

impl<'a> Plan<'a> {
    fn new(arguments: &'a Bench) -> Result<Self, Problem> {
        let wrong = |field: &str, message: String| Problem::from(Fault::new(Reason::InvalidField, field, message));
        let size = VolumeSize::new(arguments.size).map_err(|error| wrong("size", error.to_string()))?;
        if !arguments.size.is_multiple_of(FILL_UNIT) {
            return Err(wrong("size", format!("size {}: give a multiple of 1 MiB", arguments.size)));
        }
        let (pattern, write_percent) = match arguments.rw {
            ReadWrite::Randread => (LoadPattern::Random, 0),
            ReadWrite::Randwrite => (LoadPattern::Random, 100),
            ReadWrite::Randrw => (LoadPattern::Random, 100 - arguments.read_percent),
            ReadWrite::Read => (LoadPattern::Sequential, 0),
            ReadWrite::Write => (LoadPattern::Sequential, 100),
        };
        let load = LoadSpec {
            region: size.extent(),
            unit: ByteLength::new(arguments.block_size),
            depth: arguments.depth,
            write_percent,
            pattern,
            limit: LoadLimit::Time(Duration::from_secs(arguments.seconds)),
            verify: Verification::Off,
            seed: std::process::id().into(),
        };
        let fill = LoadSpec {
            unit: ByteLength::new(FILL_UNIT),
            depth: FILL_DEPTH,
            write_percent: 100,
            pattern: LoadPattern::Sequential,
            limit: LoadLimit::Requests(arguments.size / FILL_UNIT),
            ..load
        };
        // Now, and not when the stores are made.
        Load::new(load, BufferPool::new(0)).map_err(|error| wrong("load", error.to_string()))?;
        Ok(Self { arguments, size, fill, load })
    }

    fn measure(&self, folder: &Folder) -> Result<Outcome, Problem> {
        let volume = VolumeId::random();
        let spec = ReplicaSpec { volume, size: self.size };
        let endpoints = (0..self.arguments.replicas)
            .map(|index| Replica::start(folder, index, self.size, self.arguments.unix)?.create(spec))
            .collect::<Result<Vec<_>, _>>()?;
        // Blocks that were never written would be read, and written for the first time, faster or slower than others.
        let filled = self.run(volume, &endpoints, self.fill, None)?;
        let ran = self.run(volume, &endpoints, self.load, self.arguments.fsync_every)?;
        let load = ran.load.report();
        let (flush, written) = (ran.final_flush.as_secs_f64(), load.writes.mib_per_second * load.seconds);
        Ok(Outcome {
            replicas: self.arguments.replicas,
            transport: if self.arguments.unix { "unix" } else { "tcp" },
            rw: self.arguments.rw,
            block_size: self.arguments.block_size,
            depth: self.arguments.depth,
            size_bytes: self.arguments.size,
            fill_seconds: filled.load.report().seconds + filled.final_flush.as_secs_f64(),
            flushes: Flushes { count: ran.flushes.total(), latency: ran.flushes.summary() },
            final_flush_seconds: flush,
            write_mib_per_second_with_final_flush: written / (load.seconds + flush),
            in_sync: ran.in_sync,
            load,
        })
    }

    /// Runs one load to its end, and a flush after it.
    fn run(&self, volume: VolumeId, endpoints: &[Endpoint], spec: LoadSpec, flush_every: Option<u64>) -> Result<Measured, Problem> {
        let config = EngineConfig { predecessor: Predecessor::Ended, ..EngineConfig::new(volume, self.size, endpoints.len(), rand_seed()) };
        let pool = BufferPool::new(POOL_BYTES);
        let load = Load::new(spec, pool.clone()).map_err(Problem::local)?;
        let mut measured = Measured::new(load, flush_every);
        let mut primary = Primary::new(config, endpoints.to_vec(), pool, false).map_err(primary_problem)?;
        primary.run(&mut measured).map_err(primary_problem)?;
        measured.in_sync = primary.engine().members().iter().filter(|member| member.state == MemberState::InSync).count();
        match measured.failure.take().or_else(|| measured.load.report().first_failure) {
            Some(failure) => Err(Problem::local(format!("a request failed: {failure}"))),
            None => Ok(measured),
        }
    }
}

/// Terms of the two primaries of one run must differ.
fn rand_seed() -> u64 {
    u64::from_le_bytes(VolumeId::random().to_bytes()[..8].try_into().unwrap_or_default())
}

fn primary_problem(error: PrimaryError) -> Problem {
    match error {
        PrimaryError::Ring(_) => Fault::new(Reason::Unsupported, "io_uring", error.to_string()).into(),
        other => Problem::local(other),
    }
}

/// A load with flushes: some beside it, one at its end, whose time is taken.
struct Measured {
    load: Load,
    flush_every: Option<u64>,
    writes_since_flush: u64,
    flush_began: Option<Instant>,
    flushes: Histogram,
    final_flush_began: Option<Instant>,
    final_flush: Duration,
    finished: bool,
    failure: Option<String>,
    in_sync: usize,
}

impl Measured {
    fn new(load: Load, flush_every: Option<u64>) -> Self {
        Self {
            load,
            flush_every,
            writes_since_flush: 0,
            flush_began: None,
            flushes: Histogram::default(),
            final_flush_began: None,
            final_flush: Duration::ZERO,
            finished: false,
            failure: None,
            in_sync: 0,
        }
    }

    /// Asks for the flushes that are due: one at a time.
    fn flush(&mut self, requests: &mut Vec<(RequestTag, Request)>) {
        if self.flush_began.is_some() || self.final_flush_began.is_some() {
            return;
        }
        let now = Instant::now();
        if self.load.is_finished() {
            self.final_flush_began = Some(now);
            requests.push((FINAL_FLUSH, Request::Flush));
        } else if self.flush_every.is_some_and(|every| self.writes_since_flush >= every) {
            self.writes_since_flush = 0;
            self.flush_began = Some(now);
            requests.push((FLUSH, Request::Flush));
        }
    }

    fn fail(&mut self, what: &str, result: &Result<Response, RequestError>) {
        if let Err(error) = result {
            self.failure.get_or_insert_with(|| format!("{what}: {error}"));
        }
    }
}

impl FrontEnd for Measured {
    fn on_serve(&mut self, reactor: &mut Reactor, term: Term) -> io::Result<()> {
        self.load.on_serve(reactor, term)
    }

    fn on_completed(
        &mut self,
        reactor: &mut Reactor,
        engine: &mut Engine,
        completed: Completed,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        self.load.on_completed(reactor, engine, completed, requests)?;
        self.flush(requests);
        Ok(())
    }

    fn on_response(
        &mut self,
        reactor: &mut Reactor,
        tag: RequestTag,
        result: Result<Response, RequestError>,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        match tag {
            FLUSH => {
                self.fail("flush", &result);
                self.flushes.record(self.flush_began.take().map(|began| began.elapsed()).unwrap_or_default());
            }
            FINAL_FLUSH => {
                self.fail("final flush", &result);
                self.final_flush = self.final_flush_began.map(|began| began.elapsed()).unwrap_or_default();
                self.finished = true;
            }
            _ => {
                self.writes_since_flush += u64::from(matches!(result, Ok(Response::Done)));
                self.load.on_response(reactor, tag, result, requests)?;
            }
        }
        self.flush(requests);
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.finished
    }
}

/// A replica process, alive as long as the folder.
struct Replica {
    control: PathBuf,
    data: Endpoint,
    unix: bool,
}

impl Replica {
    /// Formats a store and serves it.
    fn start(folder: &Folder, index: usize, volume: VolumeSize, unix: bool) -> Result<Self, Problem> {
        let program = program()?;
        let path = folder.path.join(index.to_string());
        let failed = |error: String| Problem::local(format!("{} {error}", program.display()));
        let size = volume.bytes().get() + volume.bytes().get() / STORE_PART + STORE_BASE;
        let made = Command::new(&program).arg("format").arg(&path).arg("--size").arg(size.to_string()).output();
        let made = made.map_err(|error| failed(format!("can't be started: {error}")))?;
        if !made.status.success() {
            return Err(failed(format!("format failed: {}", String::from_utf8_lossy(&made.stderr).trim_end())));
        }
        let answer: serde_json::Value = serde_json::from_slice(&made.stdout).map_err(Problem::local)?;
        let store: Option<StoreId> = answer["store"].as_str().and_then(|text| text.parse().ok());
        let store = store.ok_or_else(|| failed(format!("format answered {answer}")))?;

        let mut serve = Command::new(&program);
        serve.arg("serve").arg(&path).arg("--run-dir").arg(&folder.path);
        if !unix {
            serve.args(["--listen", "127.0.0.1:0"]);
        }
        if std::env::var_os("CARRICK_LOG").is_none() {
            serve.env("CARRICK_LOG", "error");
        }
        // A group of its own: a Ctrl-C is for us, who then end it. Its standard error is ours: it says what fails.
        serve.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        // SAFETY: between fork and exec it only makes one system call, on its own process.
        unsafe { serve.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
        folder.keep(|| serve.spawn()).map_err(|error| failed(format!("can't be started: {error}")))?;
        let run = RunDirectory::new(&folder.path);
        Ok(Self { control: run.replica_control(store), data: Endpoint::Unix(run.replica_socket(store)), unix })
    }

    /// Makes an empty replica; returns where it is reached.
    fn create(self, spec: ReplicaSpec) -> Result<Endpoint, Problem> {
        let endpoint = match self.ask(&ReplicaRequest::Status)? {
            _ if self.unix => self.data.clone(),
            ReplicaAnswer::Status(status) => {
                let tcp = status.endpoints.into_iter().find(|endpoint| matches!(endpoint, Endpoint::Tcp(_)));
                tcp.ok_or_else(|| Problem::local("a replica doesn't listen on TCP"))?
            }
            other => return Err(Problem::local(format!("a replica answered {other:?} when asked for its status"))),
        };
        match self.ask(&ReplicaRequest::Create { spec })? {
            ReplicaAnswer::Done => Ok(endpoint),
            ReplicaAnswer::Refused(error) if error.code == ControlErrorCode::NoSpace => {
                Err(Fault::new(Reason::NoSpace, "dir", error.message).into())
            }
            ReplicaAnswer::Refused(error) => Err(Problem::local(error)),
            other @ ReplicaAnswer::Status(_) => Err(Problem::local(format!("a replica answered {other:?} when asked for a replica"))),
        }
    }

    /// Asks; waits for the process to be up.
    fn ask(&self, request: &ReplicaRequest) -> Result<ReplicaAnswer, Problem> {
        let until = Instant::now() + ANSWER_LIMIT;
        loop {
            match call(&self.control, request, ANSWER_LIMIT) {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) && Instant::now() < until =>
                {
                    thread::sleep(LOOK_AGAIN);
                }
                Err(error) => {
                    return Err(Problem::local(format!("a replica can't be reached at {}: {error}", self.control.display())));
                }
                Ok(answer) => return Ok(answer),
            }
        }
    }
}

fn program() -> Result<PathBuf, Problem> {
    let own = std::env::current_exe().map_err(Problem::local)?;
    Ok(own.with_file_name("carrick-replica"))
}

/// The folder with the stores and sockets, and the processes that live on it.
struct Folder {
    path: PathBuf,
    /// `None` once it is removed.
    children: Mutex<Option<Vec<Child>>>,
}

impl Folder {
    fn make(dir: &Path) -> Result<Self, Problem> {
        let failed = |path: &Path, error: io::Error| Problem::local(format!("can't make a folder in {}: {error}", path.display()));
        let dir = std::path::absolute(dir).map_err(|error| failed(dir, error))?;
        let path = dir.join(format!("carrick-bench-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| failed(&dir, error))?;
        Ok(Self { path, children: Mutex::new(Some(Vec::new())) })
    }

    fn children(&self) -> MutexGuard<'_, Option<Vec<Child>>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process that ends with the folder. None is started once that is removed.
    fn keep(&self, start: impl FnOnce() -> io::Result<Child>) -> io::Result<()> {
        match &mut *self.children() {
            Some(children) => {
                children.push(start()?);
                Ok(())
            }
            None => Err(io::Error::from(io::ErrorKind::Interrupted)),
        }
    }

    /// Ends the processes and removes everything. The second time, nothing.
    fn remove(&self) {
        let mut children = self.children();
        for mut child in children.take().into_iter().flatten() {
            // Its store is thrown away: no need to let it end well.
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Err(error) = std::fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            eprintln!("carrick: can't remove {}: {error}", self.path.display());
        }
    }
}

/// Blocks the signals that end a command, and lets a thread wait for them.
fn clean_up_on_signals(folder: Arc<Folder>) -> io::Result<()> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set, the others get a valid one.
    let (set, error) = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        let set = set.assume_init();
        (set, libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))
    };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let wait = move || {
        let mut signal = 0;
        // SAFETY: both point to valid values of this thread.
        while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
        folder.remove();
        std::process::exit(SIGNAL_EXIT_BASE + signal);
    };
    thread::Builder::new().name("signals".into()).spawn(wait).map(drop)
}

/// The outcome for people.
pub fn words(outcome: &Outcome) -> String {
    let Outcome { replicas, transport, rw, block_size, depth, load, .. } = outcome;
    let size = HumanSize(outcome.size_bytes);
    let noun = if *replicas == 1 { "replica" } else { "replicas" };
    let mut text = format!(
        "{rw} of {} at depth {depth} for {:.1} s; a volume of {size} on {replicas} {noun} over {transport}, filled in {:.1} s\n\n",
        HumanSize(*block_size),
        load.seconds,
        outcome.fill_seconds
    );
    let mut table = Table::new(["", "COUNT", "IOPS", "MiB/s", "P50 us", "P99 us", "P99.9 us", "MAX us"]);
    for (name, kind) in [("reads", &load.reads), ("writes", &load.writes)] {
        if kind.count > 0 {
            table.row(row(name, kind));
        }
    }
    if outcome.flushes.count > 0 {
        let count = outcome.flushes.count;
        let per_second = count as f64 / load.seconds;
        table.row(row("flushes", &OperationReport { count, iops: per_second, mib_per_second: 0.0, latency: outcome.flushes.latency }));
    }
    let _ = write!(text, "{table}");
    if load.writes.count > 0 {
        let _ = write!(
            text,
            "\nfinal flush: {:.2} s; {:.1} MiB/s written including it\n\
             A write is acknowledged when a majority has written it to its disk; the flush empties the disks' caches.\n",
            outcome.final_flush_seconds, outcome.write_mib_per_second_with_final_flush
        );
    }
    if outcome.in_sync < *replicas {
        let _ = writeln!(text, "Only {} of {replicas} replicas were in sync at the end.", outcome.in_sync);
    }
    text
}

fn row(name: &str, kind: &OperationReport) -> [String; 8] {
    let OperationReport { count, iops, mib_per_second, latency } = kind;
    let whole = |number: f64| format!("{number:.0}");
    [
        name.into(),
        count.to_string(),
        whole(*iops),
        format!("{mib_per_second:.1}"),
        whole(latency.p50_us),
        whole(latency.p99_us),
        whole(latency.p99_9_us),
        whole(latency.max_us),
    ]
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::arguments::{Arguments, Command};

    fn parse(line: &str) -> Bench {
        let words = ["carrick", "bench", "--dir", "/x"].into_iter().chain(line.split_whitespace());
        match Arguments::try_parse_from(words).unwrap().command {
            Command::Bench(bench) => bench,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_load_is_what_the_command_line_says() {
        let bench = parse("--rw randrw --read-percent 70 --block-size 8k --depth 5 --seconds 3 --size 2G");
        let plan = Plan::new(&bench).unwrap();
        let LoadSpec { unit, depth, write_percent, pattern, limit, .. } = plan.load;
        assert_eq!((unit.get(), depth, write_percent, pattern), (8192, 5, 30, LoadPattern::Random));
        assert_eq!(limit, LoadLimit::Time(Duration::from_secs(3)));
        assert_eq!(plan.fill.limit, LoadLimit::Requests(2048), "each byte of 2 GiB once");
        let bench = parse("--rw read");
        assert_eq!(Plan::new(&bench).unwrap().load.write_percent, 0);
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for line in ["--block-size 100", "--block-size 2M", "--depth 0", "--size 4k", "--size 0"] {
            assert!(Plan::new(&parse(line)).is_err(), "{line}");
        }
    }
}
