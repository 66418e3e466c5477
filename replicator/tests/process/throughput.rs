//! Numbers for people, on request: `cargo test --release -p carrick-replicator --test process -- --ignored --nocapture measure`.

use std::io;
use std::time::Duration;

use carrick_backing_store::{BufferPool, Term};
use carrick_replicator::engine::{Engine, Request, RequestError, RequestTag, Response};
use carrick_replicator::io::{Completed, FrontEnd, Load, LoadLimit, LoadSpec, Primary, Reactor, Source, Verification};
use io_uring::opcode;
use io_uring::types::Timespec;

use crate::support::{Replica, engine_config, load, load_spec, run_load, size, volume_on};

#[test]
#[ignore = "measures, and asserts nothing about time"]
fn measure() {
    let seconds = std::env::var("SECONDS_EACH").map_or(3, |text| text.parse().unwrap());
    for replicas in [1, 3] {
        let processes: Vec<_> = (0..replicas).map(|_| Replica::start()).collect();
        let size = size(256);
        let volume = volume_on(&processes, size);
        let endpoints: Vec<_> = processes.iter().map(Replica::tcp).collect();
        for (name, unit, write_percent, depth) in [
            ("4 KiB writes", 4096, 100, 32),
            ("4 KiB reads", 4096, 0, 32),
            ("4 KiB writes", 4096, 100, 128),
            ("4 KiB reads", 4096, 0, 128),
            ("4 KiB writes", 4096, 100, 1),
            ("1 MiB writes", 1 << 20, 100, 8),
            ("1 MiB reads", 1 << 20, 0, 8),
        ] {
            let spec = LoadSpec {
                unit: carrick_backing_store::ByteLength::new(unit),
                depth,
                write_percent,
                verify: Verification::Off,
                limit: LoadLimit::Time(Duration::from_secs(seconds)),
                ..load_spec(size)
            };
            let (_, report) = run_load(load(spec), volume, size, endpoints.clone()).unwrap();
            assert_eq!(report.errors, 0);
            let kind = if write_percent > 0 { report.writes } else { report.reads };
            println!(
                "{replicas} replicas, {name}, depth {depth}: {:.0}/s, {:.0} MiB/s, p50 {:.0} us, p99 {:.0} us, p99.9 {:.0} us, max {:.0} us",
                kind.iops, kind.mib_per_second, kind.latency.p50_us, kind.latency.p99_us, kind.latency.p99_9_us, kind.latency.max_us
            );
        }
    }
}

static PAUSE: Timespec = Timespec::new().sec(5);
const PAUSE_OVER: u64 = 99;

/// A load, then twice a pause: in the first everything may come to rest, the second is measured.
struct ThenIdle {
    load: Load,
    pauses: u32,
    before: u64,
}

impl ThenIdle {
    fn pause(reactor: &mut Reactor) -> io::Result<()> {
        let timer = opcode::Timeout::new(&raw const PAUSE).build().user_data(Source::FrontEnd.user_data(PAUSE_OVER));
        // SAFETY: the time is static.
        unsafe { reactor.push(&timer) }
    }
}

impl FrontEnd for ThenIdle {
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
        if completed.token != PAUSE_OVER {
            return self.load.on_completed(reactor, engine, completed, requests);
        }
        self.pauses += 1;
        if self.pauses == 1 {
            self.before = of_this_thread("voluntary_ctxt_switches:");
            return Self::pause(reactor);
        }
        let wakes = of_this_thread("voluntary_ctxt_switches:") - self.before;
        println!("idle primary: {} KiB resident, {wakes} wake-ups in 5 s", of_this_thread("VmRSS:"));
        Ok(())
    }

    fn on_response(
        &mut self,
        reactor: &mut Reactor,
        tag: RequestTag,
        result: Result<Response, RequestError>,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        self.load.on_response(reactor, tag, result, requests)?;
        if self.load.is_finished() { Self::pause(reactor) } else { Ok(()) }
    }

    fn is_finished(&self) -> bool {
        self.pauses == 2
    }
}

fn of_this_thread(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
#[ignore = "measures, and asserts nothing about time"]
fn measure_idle() {
    let processes: Vec<_> = (0..3).map(|_| Replica::start()).collect();
    let size = size(256);
    let volume = volume_on(&processes, size);
    let unit = carrick_backing_store::ByteLength::new(1 << 20);
    let spec = LoadSpec { unit, limit: LoadLimit::Requests(2000), verify: Verification::Off, ..load_spec(size) };
    let pool = BufferPool::new(16 << 20);
    let endpoints = processes.iter().map(Replica::tcp).collect();
    let mut primary = Primary::new(engine_config(volume, size, 3), endpoints, pool.clone(), false).unwrap();
    let load = Load::new(spec, pool).unwrap();
    primary.run(&mut ThenIdle { load, pauses: 0, before: 0 }).unwrap();
    for process in &processes {
        println!("idle replica: {} KiB resident", process.memory() / 1024);
    }
}
