//! Connections over socket pairs whose other end is as nasty as a peer can be.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use carrick_backing_store::{BlockIndex, ByteLength, ByteOffset, Extent, Term, VolumeId, block_checksum};
use rustix::net::sockopt;

use super::*;
use crate::wire::{Body, Header, Kind, RequestId};

const PATIENCE: Duration = Duration::from_secs(30);

struct Rig {
    reactor: Reactor,
    connections: Connections,
    pool: BufferPool,
}

impl Rig {
    fn new() -> Self {
        let pool = BufferPool::new(4 << 20);
        Self { reactor: Reactor::new().unwrap(), connections: Connections::new(pool.clone()), pool }
    }

    fn pair(&mut self) -> (ConnectionKey, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        theirs.set_write_timeout(Some(PATIENCE)).unwrap();
        let key = self.connections.adopt(ours.into()).unwrap();
        self.connections.receive(&mut self.reactor, key).unwrap();
        (key, theirs)
    }

    /// Submits, waits at most `limit`, and returns what happened.
    fn step(&mut self, limit: Duration) -> Vec<(ConnectionKey, Event)> {
        self.connections.flush(&mut self.reactor).unwrap();
        let mut completed = Vec::new();
        self.reactor.wait(Some(limit), &mut completed).unwrap();
        completed.iter().filter_map(|completed| self.connections.on_completed(&mut self.reactor, completed).unwrap()).collect()
    }

    /// Steps until something happened that the test waits for.
    fn until<T>(&mut self, mut wanted: impl FnMut(&mut Self, ConnectionKey, Event) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            for (key, event) in self.step(Duration::from_millis(100)) {
                if let Some(found) = wanted(self, key, event) {
                    return found;
                }
            }
        }
        panic!("it did not happen within {PATIENCE:?}");
    }

    fn ended(&mut self, key: ConnectionKey) -> EndReason {
        self.until(|rig, which, event| match event {
            Event::Ended(reason) if which == key => Some(reason),
            Event::Received => {
                while rig.connections.next_frame(which).unwrap().is_some() {}
                rig.connections.receive(&mut rig.reactor, which).unwrap();
                None
            }
            _ => None,
        })
    }

    /// Waits until the kernel has let go of everything.
    fn settle(&mut self) {
        let end = Instant::now() + PATIENCE;
        while self.connections.in_use() > 0 {
            assert!(Instant::now() < end, "{} slots are still in use", self.connections.in_use());
            self.step(Duration::from_millis(100));
        }
    }

    fn write(&self, request: u64, blocks: u64) -> Frame {
        let volume = VolumeId::from_bytes([3; 16]);
        let extent = Extent::new(ByteOffset::new(0), ByteLength::new(blocks * 4096)).unwrap();
        let mut data = self.pool.take((blocks * 4096) as usize);
        data.iter_mut().zip(request..).for_each(|(byte, value)| *byte = (value % 251) as u8);
        let sums = (0..blocks).map(|b| block_checksum(volume, BlockIndex::new(b), &data[(b * 4096) as usize..][..4096])).collect();
        let header = Header { request: RequestId(request), ..Header::new(Kind::Write, volume, Term::new(1)) };
        Frame::data(header, extent, sums, data.share())
    }
}

fn ping(request: u64) -> Frame {
    let header = Header::new(Kind::Ping, VolumeId::from_bytes([3; 16]), Term::new(1));
    Frame::new(Header { request: RequestId(request), ..header }, Body::Empty)
}

fn bytes_of(frames: &[Frame]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for frame in frames {
        frame.encode_head(&mut bytes);
        bytes.extend_from_slice(frame.payload().map_or(&[], |payload| payload));
    }
    bytes
}

#[test]
fn frames_arrive_whole_from_a_peer_that_sends_single_bytes() {
    let mut rig = Rig::new();
    let (key, mut peer) = rig.pair();
    let bytes = bytes_of(&[ping(1), rig.write(2, 1), ping(3)]);
    let mut requests = Vec::new();
    for byte in bytes {
        peer.write_all(&[byte]).unwrap();
        rig.until(|_, which, event| (which == key && matches!(event, Event::Received)).then_some(()));
        while let Some(frame) = rig.connections.next_frame(key).unwrap() {
            requests.push(frame.header.request.0);
        }
        rig.connections.receive(&mut rig.reactor, key).unwrap();
    }
    assert_eq!(requests, [1, 2, 3]);
    drop(peer);
    assert!(matches!(rig.ended(key), EndReason::Closed));
    rig.settle();
}

#[test]
fn every_byte_is_sent_once_and_in_order_to_a_peer_that_reads_little() {
    let mut rig = Rig::new();
    let (key, mut peer) = rig.pair();
    sockopt::set_socket_send_buffer_size(&rig.connections.get(key).unwrap().socket, 4096).unwrap();
    let frames: Vec<_> =
        (0..300).map(|request| if request % 3 == 0 { ping(request) } else { rig.write(request, request % 9 + 1) }).collect();
    let expected = bytes_of(&frames);
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        let mut piece = [0; 4099];
        loop {
            // Lengths that fit nothing: 1, 2, 4 … bytes, and the odd buffer.
            let want = (1_usize << (got.len() % 13)).min(piece.len());
            match peer.read(&mut piece[..want]).unwrap() {
                0 => return got,
                read => got.extend_from_slice(&piece[..read]),
            }
        }
    });
    for frame in frames {
        rig.connections.send(key, frame);
        rig.step(Duration::ZERO);
    }
    rig.connections.finish(&mut rig.reactor, key).unwrap();
    rig.settle();
    assert!(reader.join().unwrap() == expected, "what was read is what was queued");
}

#[test]
fn memory_stays_until_the_kernel_is_done_and_a_key_never_comes_back() {
    let mut rig = Rig::new();
    let (key, peer) = rig.pair();
    // Far more than the socket takes, so that a send is in flight, and a receive, too.
    (0..64).for_each(|request| rig.connections.send(key, rig.write(request, 64)));
    rig.step(Duration::ZERO);
    assert!(rig.connections.queued_bytes(key) > 1 << 20);
    rig.connections.close(&mut rig.reactor, key).unwrap();
    assert_eq!(rig.connections.in_use(), 1, "the slot waits for two completions");
    assert!(!rig.connections.is_open(key));
    assert!(rig.connections.next_frame(key).unwrap().is_none());

    let (second, mut other) = rig.pair();
    assert_ne!(key.slot(), second.slot(), "its slot is still taken");
    let end = Instant::now() + PATIENCE;
    while rig.connections.in_use() > 1 {
        assert!(Instant::now() < end);
        let events = rig.step(Duration::from_millis(100));
        assert!(events.is_empty(), "{events:?}: the connection was closed by its owner");
    }
    let (third, _peer) = rig.pair();
    assert_eq!(third.slot(), key.slot());
    assert_ne!(third, key);
    // A late completion with the old name, were there one, means nothing to the new connection.
    let late = Completed { source: Some(Source::Connection), token: Step::Receive.token(key), result: 5, more: false };
    assert!(rig.connections.on_completed(&mut rig.reactor, &late).unwrap().is_none());
    assert!(rig.connections.get(third).unwrap().receiving);
    other.write_all(&bytes_of(&[ping(9)])).unwrap();
    rig.until(|_, which, event| (which == second && matches!(event, Event::Received)).then_some(()));
    drop(peer);
    rig.connections.close_all(&mut rig.reactor).unwrap();
    rig.settle();
}

#[test]
fn dropping_everything_with_operations_in_flight_harms_nobody() {
    let mut rig = Rig::new();
    let (key, mut peer) = rig.pair();
    (0..64).for_each(|request| rig.connections.send(key, rig.write(request, 64)));
    rig.step(Duration::ZERO);
    rig.connections = Connections::new(rig.pool.clone());
    let mut rest = Vec::new();
    // What is left in the socket, then the end: the peer learns that nobody is there any more.
    let _ = peer.read_to_end(&mut rest);
    let _ = peer.write_all(&[1; 4096]);
    rig.step(Duration::from_millis(10));
}

#[test]
fn what_a_peer_said_before_it_closed_is_still_heard() {
    let mut rig = Rig::new();
    let (key, mut peer) = rig.pair();
    peer.write_all(&bytes_of(&[ping(7)])).unwrap();
    drop(peer);
    rig.connections.send(key, rig.write(1, 1));
    let mut heard = Vec::new();
    rig.until(|rig, _, event| match event {
        Event::Received => {
            while let Some(frame) = rig.connections.next_frame(key).unwrap() {
                heard.push(frame.header.request.0);
            }
            rig.connections.receive(&mut rig.reactor, key).unwrap();
            None
        }
        Event::Ended(_) => Some(()),
        _ => None,
    });
    assert_eq!(heard, [7]);
    rig.settle();
}

#[test]
fn finishing_sends_what_is_queued_and_gives_the_peer_time_to_read_it() {
    let mut rig = Rig::new();
    let (key, mut peer) = rig.pair();
    // Unread bytes of the peer would make a plain close throw away what it has not read.
    peer.write_all(&bytes_of(&[ping(1), ping(2)])).unwrap();
    rig.connections.send(key, ping(8));
    rig.connections.finish(&mut rig.reactor, key).unwrap();
    rig.connections.finish(&mut rig.reactor, key).unwrap();
    assert!(!rig.connections.is_open(key));
    rig.connections.send(key, ping(9));
    let mut got = Vec::new();
    let reader = std::thread::spawn(move || {
        peer.read_to_end(&mut got).unwrap();
        got
    });
    rig.settle();
    assert_eq!(reader.join().unwrap(), bytes_of(&[ping(8)]));
}

#[test]
fn a_connection_that_is_cut_in_a_frame_says_so() {
    let mut rig = Rig::new();
    let (key, mut peer) = rig.pair();
    peer.write_all(&bytes_of(&[rig.write(1, 256)])[..1000]).unwrap();
    drop(peer);
    assert!(matches!(rig.ended(key), EndReason::ClosedAmidFrame));
    rig.settle();
}

#[test]
fn attempts_to_connect_fail_with_a_reason_or_can_be_given_up() {
    let mut rig = Rig::new();
    let folder = tempfile::tempdir().unwrap();
    let nobody = rig.connections.connect(&mut rig.reactor, &Endpoint::Unix(folder.path().join("nobody"))).unwrap();
    let reason = rig.ended(nobody);
    assert!(matches!(&reason, EndReason::Connect(error) if error.kind() == io::ErrorKind::NotFound), "{reason}");

    // A listener that accepts nobody and has no room in its queue: the attempt hangs until it is given up.
    let path = folder.path().join("deaf");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let key = rig.connections.connect(&mut rig.reactor, &Endpoint::Unix(path.clone())).unwrap();
            rig.step(Duration::from_millis(50));
            key
        })
        .collect();
    assert!(waiting.iter().any(|key| rig.connections.get(*key).is_some_and(|connection| connection.connecting)));
    rig.connections.close_all(&mut rig.reactor).unwrap();
    rig.settle();
}

#[test]
fn a_timer_runs_out_once_and_only_the_last_one_counts() {
    static SHORT: Timespec = Timespec::new().nsec(1_000_000);
    static LONG: Timespec = Timespec::new().sec(3600);
    let mut rig = Rig::new();
    let (key, _peer) = rig.pair();
    rig.connections.set_timer(&mut rig.reactor, key, &LONG).unwrap();
    rig.connections.set_timer(&mut rig.reactor, key, &SHORT).unwrap();
    rig.until(|_, which, event| (which == key && matches!(event, Event::TimerExpired)).then_some(()));
    // Replaced in the very moment in which it runs out: its completion is already there.
    rig.connections.set_timer(&mut rig.reactor, key, &SHORT).unwrap();
    rig.reactor.submit().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    rig.connections.set_timer(&mut rig.reactor, key, &LONG).unwrap();
    for _ in 0..5 {
        let events = rig.step(Duration::from_millis(10));
        assert!(events.is_empty(), "{events:?}");
    }
    rig.connections.close_all(&mut rig.reactor).unwrap();
    rig.settle();
}

#[test]
fn a_quiet_connection_gives_its_buffer_back_and_still_receives() {
    let mut rig = Rig::new();
    let (key, mut peer) = rig.pair();
    let large = bytes_of(&[rig.write(1, 256)]);
    let writer = std::thread::spawn(move || {
        peer.write_all(&large).unwrap();
        peer
    });
    let receive = |rig: &mut Rig| {
        rig.until(|rig, _, event| {
            let mut found = None;
            if let Event::Received = event {
                while let Some(frame) = rig.connections.next_frame(key).unwrap() {
                    found = Some(frame.header.request.0);
                }
                rig.connections.receive(&mut rig.reactor, key).unwrap();
            }
            found
        })
    };
    assert_eq!(receive(&mut rig), 1);
    let mut peer = writer.join().unwrap();
    rig.step(Duration::ZERO);
    assert!(rig.connections.get(key).unwrap().inbox.is_large());
    rig.connections.shrink(&mut rig.reactor).unwrap();
    let end = Instant::now() + PATIENCE;
    while rig.connections.get(key).unwrap().inbox.is_large() {
        assert!(Instant::now() < end);
        assert!(rig.step(Duration::from_millis(10)).is_empty());
    }
    peer.write_all(&bytes_of(&[ping(2)])).unwrap();
    assert_eq!(receive(&mut rig), 2);
    rig.connections.close_all(&mut rig.reactor).unwrap();
    rig.settle();
}
