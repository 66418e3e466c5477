//! A whole volume: a primary with a load that checks what it reads, over three replica processes.

use std::io;
use std::thread;
use std::time::Duration;

use carrick_backing_store::{BufferPool, ByteLength, MemoryStore, ReplicaSpec, ReplicaStore, Term, VolumeId, VolumeSize};
use carrick_replicator::control::{MemberState, ReplicaAnswer, ReplicaRequest};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::engine::{Engine, Request, RequestError, RequestTag, Response};
use carrick_replicator::io::{
    Command, Completed, FrontEnd, LoadLimit, LoadPattern, LoadReport, LoadSpec, Primary, PrimaryError, Reactor, ReplicaListeners, Reply,
    Server, Source, mailbox,
};
use io_uring::opcode;
use io_uring::types::Timespec;
use rustix::process::Signal;

use crate::support::{Replica, engine_config, load, load_spec, run_load, size, volume_on};

static TICK: Timespec = Timespec::new().nsec(10_000_000);

/// A front end that only waits until every replica is in sync.
struct UntilInSync {
    done: bool,
}

impl UntilInSync {
    fn tick(reactor: &mut Reactor) -> io::Result<()> {
        let timer = opcode::Timeout::new(&raw const TICK).build().user_data(Source::FrontEnd.user_data(0));
        // SAFETY: the time is static.
        unsafe { reactor.push(&timer) }
    }
}

impl FrontEnd for UntilInSync {
    fn on_start(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        Self::tick(reactor)
    }

    fn on_serve(&mut self, _reactor: &mut Reactor, _term: Term) -> io::Result<()> {
        Ok(())
    }

    fn on_completed(
        &mut self,
        reactor: &mut Reactor,
        engine: &mut Engine,
        _completed: Completed,
        _requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        self.done = engine.members().iter().all(|member| member.state == MemberState::InSync);
        Self::tick(reactor)
    }

    fn on_response(
        &mut self,
        _reactor: &mut Reactor,
        _tag: RequestTag,
        _result: Result<Response, RequestError>,
        _requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.done
    }
}

fn synchronise(volume: VolumeId, size: VolumeSize, endpoints: Vec<Endpoint>) {
    let config = engine_config(volume, size, endpoints.len());
    let mut primary = Primary::new(config, endpoints, BufferPool::new(16 << 20), false).unwrap();
    primary.run(&mut UntilInSync { done: false }).unwrap();
}

fn is_right(report: &LoadReport) {
    assert_eq!((report.errors, report.mismatches), (0, 0), "{:?}", report.first_failure);
}

#[test]
fn a_volume_reads_as_written_while_replicas_are_killed_or_hang_and_come_back() {
    let mut replicas: Vec<_> = (0..3).map(|_| Replica::start()).collect();
    let size = size(64);
    let volume = volume_on(&replicas, size);
    // Two over TCP, one over its Unix socket.
    let endpoints = vec![replicas[0].tcp(), replicas[1].tcp(), replicas[2].unix()];
    let spec = LoadSpec { write_percent: 70, limit: LoadLimit::Time(Duration::from_secs(8)), ..load_spec(size) };
    let (mut written, report) = thread::scope(|scope| {
        let all = endpoints.clone();
        scope.spawn(|| {
            for victim in [0, 2] {
                thread::sleep(Duration::from_millis(700));
                replicas[victim].kill();
                thread::sleep(Duration::from_millis(700));
                replicas[victim].restart();
            }
            // One that hangs and goes on later: long enough to be left behind (I7).
            thread::sleep(Duration::from_millis(300));
            replicas[1].signal(Signal::STOP);
            thread::sleep(Duration::from_millis(2200));
            replicas[1].signal(Signal::CONT);
        });
        run_load(load(spec), volume, size, all).unwrap()
    });
    is_right(&report);
    assert!(report.writes.count > 1000 && report.reads.count > 1000, "{report:?}");

    synchronise(volume, size, endpoints.clone());
    let check = LoadSpec { write_percent: 0, pattern: LoadPattern::Sequential, limit: LoadLimit::Requests(size.blocks()), ..spec };
    for each in endpoints.iter().map(|endpoint| vec![endpoint.clone()]).chain([endpoints.clone()]) {
        let (load, report) = run_load(written.again(check), volume, size, each).unwrap();
        is_right(&report);
        assert_eq!(report.reads.count, size.blocks());
        written = load;
    }
}

#[test]
fn requests_of_every_size_read_as_written() {
    let replicas: Vec<_> = (0..3).map(|_| Replica::start()).collect();
    let size = size(64);
    for unit in [512, 1024, 4096, 4096 + 512, 65_536, (1 << 20) - 512, 1 << 20] {
        let volume = volume_on(&replicas, size);
        let spec = LoadSpec { unit: ByteLength::new(unit), depth: 16, limit: LoadLimit::Requests(1000), ..load_spec(size) };
        let (_, report) = run_load(load(spec), volume, size, replicas.iter().map(Replica::unix).collect()).unwrap();
        is_right(&report);
        assert_eq!(report.reads.count + report.writes.count, 1000, "{unit}");
    }
}

#[test]
fn a_primary_that_was_taken_over_ends_with_that_error() {
    let replicas: Vec<_> = (0..3).map(|_| Replica::start()).collect();
    let size = size(16);
    let volume = volume_on(&replicas, size);
    let endpoints: Vec<_> = replicas.iter().map(Replica::tcp).collect();
    let forever = LoadSpec { limit: LoadLimit::Time(Duration::from_secs(3600)), ..load_spec(size) };
    let first = {
        let endpoints = endpoints.clone();
        thread::spawn(move || run_load(load(forever), volume, size, endpoints).map(|_| ()))
    };
    crate::support::wait_for("the first primary", || replicas[0].status().replicas[0].connected.then_some(()));
    thread::sleep(Duration::from_millis(300));
    let brief = LoadSpec { verify: carrick_replicator::io::Verification::Off, ..load_spec(size) };
    let (_, report) = run_load(load(brief), volume, size, endpoints).unwrap();
    assert_eq!(report.errors, 0);
    let ended = first.join().unwrap();
    assert!(matches!(ended, Err(PrimaryError::Superseded { .. })), "{ended:?}");
}

#[test]
fn a_volume_that_finds_no_room_waits_for_it_and_says_so_while_others_go_on() {
    // More is promised than there is.
    let replica = [Replica::start_with("64M", &["--overcommit"])];
    let endpoints = vec![replica[0].unix()];
    let whole = |mib: u64| LoadSpec {
        unit: ByteLength::new(1 << 20),
        depth: 4,
        write_percent: 100,
        pattern: LoadPattern::Sequential,
        limit: LoadLimit::Requests(mib),
        ..load_spec(size(mib))
    };
    let (first, second) = (volume_on(&replica, size(24)), volume_on(&replica, size(48)));
    let (written, report) = run_load(load(whole(24)), first, size(24), endpoints.clone()).unwrap();
    is_right(&report);
    let waiting = {
        let endpoints = endpoints.clone();
        thread::spawn(move || run_load(load(whole(48)), second, size(48), endpoints).unwrap().1)
    };
    let failure = || replica[0].status().replicas.into_iter().find(|report| report.spec.volume == second).unwrap().failure;
    let said = crate::support::wait_for("a full store", failure);
    assert!(said.contains("no room in store"), "{said}");

    let spec = LoadSpec { limit: LoadLimit::Requests(200), write_percent: 50, pattern: LoadPattern::Random, ..whole(24) };
    let (_, report) = run_load(written.again(spec), first, size(24), endpoints).unwrap();
    is_right(&report);
    assert!(!waiting.is_finished());
    assert_eq!(replica[0].ask(&ReplicaRequest::Delete { volume: first }), ReplicaAnswer::Done);
    is_right(&waiting.join().unwrap());
    assert_eq!(failure(), None);
}

#[test]
fn plain_tcp_to_another_host_needs_to_be_asked_for() {
    let far: Endpoint = "tcp:192.0.2.1:7100".parse().unwrap();
    let make = |insecure| Primary::new(engine_config(VolumeId::random(), size(1), 1), vec![far.clone()], BufferPool::new(0), insecure);
    assert!(matches!(make(false).err(), Some(PrimaryError::Insecure(endpoint)) if endpoint == far));
    assert!(make(true).is_ok());
    let none = Primary::new(engine_config(VolumeId::random(), size(1), 2), vec![far], BufferPool::new(0), true);
    assert!(matches!(none.err(), Some(PrimaryError::Endpoints { members: 2, endpoints: 1 })));
}

#[test]
fn a_store_that_completes_at_once_is_served_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let (sender, mailbox) = mailbox().unwrap();
    let path = folder.path().join("socket");
    let listeners = ReplicaListeners::bind(&path, None, false).unwrap();
    let serving = thread::spawn(move || {
        let server = Server::new(MemoryStore::new(), "memory".into(), listeners, mailbox, ByteLength::ZERO).unwrap();
        server.run().map(|(store, replies)| (store.replicas().len(), replies.len())).unwrap()
    });
    let ask = |request| {
        let (reply, answer) = Reply::new();
        assert!(sender.send(Command { request, reply }));
        answer
    };
    let (volume, size) = (VolumeId::random(), size(16));
    let spec = ReplicaSpec { volume, size };
    assert_eq!(ask(ReplicaRequest::Create { spec }).recv().unwrap(), ReplicaAnswer::Done);
    let (_, report) = run_load(load(load_spec(size)), volume, size, vec![Endpoint::Unix(path.clone())]).unwrap();
    is_right(&report);
    let _answer = ask(ReplicaRequest::Shutdown);
    assert_eq!(serving.join().unwrap(), (1, 1));
    assert!(!path.exists());
}
