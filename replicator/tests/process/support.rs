//! Replica processes in temporary folders, and a peer that speaks the protocol by hand.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use carrick_backing_store::{BufferPool, ByteLength, ReplicaSpec, StoreId, Term, VolumeId, VolumeSize};
use carrick_replicator::control::{ReplicaAnswer, ReplicaProcessStatus, ReplicaRequest, RunDirectory, call};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::engine::{EngineConfig, Predecessor};
use carrick_replicator::io::{Load, LoadLimit, LoadPattern, LoadReport, LoadSpec, Primary, PrimaryError, Verification};
use carrick_replicator::wire::{Body, Frame, HEADER_LENGTH, Header, Hello, Kind};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Longest wait for a state, on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Of each store: room for a few volumes, without much to be written by its formatting.
pub const STORE_SIZE: &str = "1G";

pub fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_carrick-replica"))
}

/// Waits until a question has an answer.
pub fn wait_for<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < until, "waited {PATIENCE:?} for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A store and the process that serves it.
pub struct Replica {
    folder: TempDir,
    pub store: StoreId,
    child: Child,
    listen: Option<SocketAddr>,
    arguments: &'static [&'static str],
}

impl Replica {
    /// A new store, served on its Unix socket and a TCP port.
    pub fn start() -> Self {
        Self::start_with(STORE_SIZE, &[])
    }

    /// A new store of this size, served with these arguments.
    pub fn start_with(size: &str, arguments: &'static [&'static str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let made = program().arg("format").arg(folder.path().join("store")).args(["--size", size]).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let answer: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
        let store = answer["store"].as_str().unwrap().parse().unwrap();
        let child = spawn(folder.path(), "127.0.0.1:0".parse().unwrap(), arguments);
        let mut replica = Self { folder, store, child, listen: None, arguments };
        replica.listen = replica.status().endpoints.iter().find_map(|endpoint| match endpoint {
            Endpoint::Tcp(address) => Some(*address),
            Endpoint::Unix(_) => None,
        });
        replica
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    pub fn run(&self) -> RunDirectory {
        RunDirectory::new(self.folder.path().join("run"))
    }

    pub fn tcp(&self) -> Endpoint {
        Endpoint::Tcp(self.listen.unwrap())
    }

    pub fn unix(&self) -> Endpoint {
        Endpoint::Unix(self.run().replica_socket(self.store))
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Asks; waits for the process to be up.
    pub fn ask(&self, request: &ReplicaRequest) -> ReplicaAnswer {
        let control = self.run().replica_control(self.store);
        wait_for("the control socket", || match call(&control, request, PATIENCE) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => None,
            answer => Some(answer.unwrap()),
        })
    }

    pub fn status(&self) -> ReplicaProcessStatus {
        match self.ask(&ReplicaRequest::Status) {
            ReplicaAnswer::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    pub fn create(&self, volume: VolumeId, size: VolumeSize) {
        assert_eq!(self.ask(&ReplicaRequest::Create { spec: ReplicaSpec { volume, size } }), ReplicaAnswer::Done);
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for the end of the process. True if it ended well.
    pub fn ended_well(&mut self) -> bool {
        wait_for("the end of the process", || self.child.try_wait().unwrap()).success()
    }

    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        assert!(!self.ended_well());
    }

    /// Serves the store again, at the same addresses.
    pub fn restart(&mut self) {
        self.child = spawn(self.folder.path(), self.listen.unwrap(), self.arguments);
        self.status();
    }

    /// Resident memory in bytes.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Open descriptors of the process.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(folder: &Path, listen: SocketAddr, arguments: &[&str]) -> Child {
    let mut serve = program();
    serve.arg("serve").arg(folder.join("store")).arg("--run-dir").arg(folder.join("run")).arg("--listen").arg(listen.to_string());
    serve.args(arguments).env("CARRICK_LOG", "error").stdin(Stdio::null()).spawn().unwrap()
}

/// Runs the program to its end.
pub fn run(arguments: &[&std::ffi::OsStr]) -> Output {
    program().args(arguments).output().unwrap()
}

pub trait Stream: Read + Write {
    fn set_timeout(&self, timeout: Duration);
}

impl Stream for TcpStream {
    fn set_timeout(&self, timeout: Duration) {
        self.set_read_timeout(Some(timeout)).unwrap();
        self.set_write_timeout(Some(timeout)).unwrap();
    }
}

impl Stream for UnixStream {
    fn set_timeout(&self, timeout: Duration) {
        self.set_read_timeout(Some(timeout)).unwrap();
        self.set_write_timeout(Some(timeout)).unwrap();
    }
}

/// A peer that speaks the protocol by hand, well or badly.
pub struct Peer {
    pub stream: Box<dyn Stream>,
    pool: BufferPool,
}

impl Peer {
    pub fn connect(endpoint: &Endpoint) -> Self {
        let stream: Box<dyn Stream> = match endpoint {
            Endpoint::Unix(path) => Box::new(UnixStream::connect(path).unwrap()),
            Endpoint::Tcp(address) => Box::new(TcpStream::connect(address).unwrap()),
        };
        stream.set_timeout(PATIENCE);
        Self { stream, pool: BufferPool::new(0) }
    }

    /// A connection that is past its Hello.
    pub fn greeted(endpoint: &Endpoint) -> Self {
        let mut peer = Self::connect(endpoint);
        peer.send(&hello());
        assert_eq!(peer.receive().unwrap().header.kind, Kind::HelloAnswer);
        peer
    }

    pub fn send(&mut self, frame: &Frame) {
        self.stream.write_all(&bytes_of(frame)).unwrap();
    }

    /// The next frame; `None` at the end of the connection.
    pub fn receive(&mut self) -> Option<Frame> {
        let mut header = [0; HEADER_LENGTH];
        match self.stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => return None,
            Err(error) => panic!("{error}"),
        }
        let header = Header::decode(&header).unwrap();
        let mut body = vec![0; header.body_length()];
        self.stream.read_exact(&mut body).unwrap();
        Some(Frame::decode(header, &body, &self.pool).unwrap())
    }

    /// The replica answers: it serves this peer.
    pub fn is_served(&mut self) -> bool {
        self.send(&Frame::new(Header::new(Kind::Status, VolumeId::random(), Term::ZERO), Body::Empty));
        self.receive().is_some()
    }
}

pub fn hello() -> Frame {
    Frame::new(Header::new(Kind::Hello, VolumeId::from_bytes([0; 16]), Term::ZERO), Body::Hello(Hello::OURS))
}

pub fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode_head(&mut bytes);
    bytes.extend_from_slice(frame.payload().map_or(&[], |payload| payload));
    bytes
}

pub const MIB: u64 = 1 << 20;

pub fn size(mib: u64) -> VolumeSize {
    VolumeSize::new(mib * MIB).unwrap()
}

pub fn load_spec(size: VolumeSize) -> LoadSpec {
    LoadSpec {
        region: size.extent(),
        unit: ByteLength::new(4096),
        depth: 32,
        write_percent: 50,
        pattern: LoadPattern::Random,
        limit: LoadLimit::Requests(10_000),
        verify: Verification::FromZeroes,
        seed: 1,
    }
}

pub fn engine_config(volume: VolumeId, size: VolumeSize, members: usize) -> EngineConfig {
    EngineConfig { predecessor: Predecessor::Ended, ..EngineConfig::new(volume, size, members, std::process::id().into()) }
}

/// Makes a volume on these replicas.
pub fn volume_on(replicas: &[Replica], size: VolumeSize) -> VolumeId {
    let volume = VolumeId::random();
    replicas.iter().for_each(|replica| replica.create(volume, size));
    volume
}

/// Runs a load to its end through a primary of its own.
pub fn run_load(load: Load, volume: VolumeId, size: VolumeSize, endpoints: Vec<Endpoint>) -> Result<(Load, LoadReport), PrimaryError> {
    let mut load = load;
    let pool = BufferPool::new(16 << 20);
    let mut primary = Primary::new(engine_config(volume, size, endpoints.len()), endpoints, pool, false)?;
    primary.run(&mut load)?;
    let report = load.report();
    Ok((load, report))
}

/// A load within the volume.
pub fn load(spec: LoadSpec) -> Load {
    Load::new(spec, BufferPool::new(16 << 20)).unwrap()
}
