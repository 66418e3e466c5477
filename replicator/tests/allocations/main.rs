//! Nothing is allocated for a request in the steady state: counted on the thread of a primary that writes to, and reads from, three
//! replica processes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

#[path = "../process/support.rs"]
#[allow(dead_code, reason = "other tests need more of it")]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;

use carrick_backing_store::{BufferPool, Term};
use carrick_replicator::engine::{Engine, Request, RequestError, RequestTag, Response};
use carrick_replicator::io::{Completed, FrontEnd, Load, LoadLimit, LoadPattern, LoadSpec, Primary, Reactor, Verification};
use support::{Replica, engine_config, load, load_spec, run_load, size, volume_on};

/// The system's allocator, which counts what each thread asks of it.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: all is passed on; counting allocates nothing, since the counter is made without a destructor or an initialiser.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(start, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Requests before the steady state: tables, queues and the pool have grown to what the load needs.
const WARM_UP: u64 = 20_000;
const COUNTED: u64 = 20_000;
/// What is not per request in that time: epochs that are raised, a ping, a queue that grows for a burst.
const OTHERS_MAX: u64 = 200;

/// A load, and what was allocated while it was in its steady state.
struct Counted {
    load: Load,
    ended: u64,
    before: u64,
    allocated: Option<u64>,
}

impl FrontEnd for Counted {
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
        self.load.on_completed(reactor, engine, completed, requests)
    }

    fn on_response(
        &mut self,
        reactor: &mut Reactor,
        tag: RequestTag,
        result: Result<Response, RequestError>,
        requests: &mut Vec<(RequestTag, Request)>,
    ) -> io::Result<()> {
        self.ended += 1;
        match self.ended {
            WARM_UP => self.before = ALLOCATIONS.get(),
            ended if ended == WARM_UP + COUNTED => self.allocated = Some(ALLOCATIONS.get() - self.before),
            _ => {}
        }
        self.load.on_response(reactor, tag, result, requests)
    }

    fn is_finished(&self) -> bool {
        self.load.is_finished()
    }
}

/// Allocations of the primary's thread in [`COUNTED`] requests to a volume that was written to.
fn allocations(write_percent: u8) -> u64 {
    let replicas = [Replica::start(), Replica::start(), Replica::start()];
    let volume = volume_on(&replicas, size(64));
    let endpoints: Vec<_> = replicas.iter().map(Replica::tcp).collect();
    let fill = LoadSpec {
        write_percent: 100,
        pattern: LoadPattern::Sequential,
        limit: LoadLimit::Requests(size(64).blocks()),
        verify: Verification::Off,
        ..load_spec(size(64))
    };
    run_load(load(fill), volume, size(64), endpoints.clone()).unwrap();
    let limit = LoadLimit::Requests(WARM_UP + COUNTED);
    let spec = LoadSpec { write_percent, pattern: LoadPattern::Random, limit, ..fill };
    let pool = BufferPool::new(16 << 20);
    let mut counted = Counted { load: Load::new(spec, pool.clone()).unwrap(), ended: 0, before: 0, allocated: None };
    let mut primary = Primary::new(engine_config(volume, size(64), 3), endpoints, pool, false).unwrap();
    primary.run(&mut counted).unwrap();
    counted.allocated.unwrap()
}

#[test]
fn nothing_is_allocated_for_a_write() {
    let allocated = allocations(100);
    println!("{allocated} allocations for {COUNTED} writes to three replicas");
    assert!(allocated <= OTHERS_MAX, "{allocated} allocations for {COUNTED} writes");
}

#[test]
fn nothing_is_allocated_for_a_read() {
    let allocated = allocations(0);
    println!("{allocated} allocations for {COUNTED} reads");
    assert!(allocated <= OTHERS_MAX, "{allocated} allocations for {COUNTED} reads");
}

#[test]
fn the_counter_counts() {
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(vec![1_u8; 100]));
    assert_eq!(ALLOCATIONS.get() - before, 1);
}
