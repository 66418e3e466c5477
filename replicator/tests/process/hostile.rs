//! What a peer can do to the process: lose its own connection, and nothing else.

use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use carrick_backing_store::{ByteLength, ByteOffset, Seq, Term, VolumeId};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::io::{LoadLimit, LoadPattern, LoadSpec};
use carrick_replicator::wire::{Body, ErrorCode, Frame, Header, Hello, Kind, RequestId};

use crate::support::{MIB, Peer, Replica, bytes_of, hello, load, load_spec, run_load, size, volume_on, wait_for};

/// What the process holds at most while one peer does its worst: 32 MiB of operations, 8 MiB of answers, 32 MiB of buffers kept
/// for reuse, and the socket's and the program's own.
const MEMORY_MAX: u64 = 128 * MIB;
/// What it holds when nobody asks for anything.
const MEMORY_IDLE: u64 = 24 * MIB;

/// The peer is told why and cut off.
fn refused(peer: &mut Peer) -> ErrorCode {
    let answer = peer.receive().expect("an error frame before the end");
    let Body::Error(error) = answer.body else { panic!("{answer:?}") };
    assert!(!error.text.is_empty());
    assert!(peer.receive().is_none(), "the connection is closed");
    error.code
}

/// Gives a header the checksum that its bytes need.
fn seal(header: &mut [u8]) {
    let crc = crc32c::crc32c(&header[..60]);
    header[60..64].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn garbage_ends_only_the_connection_it_came_on() {
    let replica = Replica::start();
    let mut bystander = Peer::greeted(&replica.unix());
    for endpoint in [replica.unix(), replica.tcp()] {
        for garbage in
            [&b"GET / HTTP/1.1\r\nHost: carrick\r\nUser-Agent: something that is long enough\r\n\r\n"[..], &[0; 64], &[0xff; 100_000]]
        {
            let mut peer = Peer::connect(&endpoint);
            // The process may have closed the connection before all of it is written.
            let _ = peer.stream.write_all(garbage);
            assert_eq!(refused(&mut peer), ErrorCode::BadFrame);
            assert!(bystander.is_served());
        }
    }
}

#[test]
fn every_flipped_bit_of_a_hello_is_noticed() {
    let replica = Replica::start();
    let bytes = bytes_of(&hello());
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let mut peer = Peer::connect(&replica.unix());
        peer.stream.write_all(&damaged).unwrap();
        let code = refused(&mut peer);
        assert_eq!(code, ErrorCode::BadFrame, "bit {bit}");
    }
    assert!(Peer::greeted(&replica.unix()).is_served());
    wait_for("the descriptors of the dead connections", || (replica.descriptors() < 40).then_some(()));
}

#[test]
fn frames_that_are_well_formed_but_wrong_are_refused_by_name() {
    let replica = Replica::start();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes_of(&hello());
        change(&mut bytes);
        seal(&mut bytes[..64]);
        let mut peer = Peer::connect(&replica.tcp());
        peer.stream.write_all(&bytes).unwrap();
        refused(&mut peer)
    };
    assert_eq!(with(&|bytes| bytes[4] = 9), ErrorCode::UnsupportedVersion, "a header of another version");
    assert_eq!(with(&|bytes| bytes[5] = 0x70), ErrorCode::BadFrame, "an unknown kind");
    assert_eq!(with(&|bytes| bytes[7] = 0x80), ErrorCode::BadFrame, "an undefined flag");
    assert_eq!(with(&|bytes| bytes[48..52].copy_from_slice(&u32::MAX.to_le_bytes())), ErrorCode::BadFrame, "4 GiB to come");
    assert_eq!(with(&|bytes| bytes[48..52].copy_from_slice(&3_u32.to_le_bytes())), ErrorCode::BadFrame, "too short");

    let greet = |hello: Hello| {
        let mut peer = Peer::connect(&replica.tcp());
        peer.send(&Frame::new(Header::new(Kind::Hello, VolumeId::from_bytes([0; 16]), Term::ZERO), Body::Hello(hello)));
        refused(&mut peer)
    };
    assert_eq!(greet(Hello { version_min: 5, version_max: 9, ..Hello::OURS }), ErrorCode::UnsupportedVersion);
    assert_eq!(greet(Hello { features_incompatible: 1 << 60, ..Hello::OURS }), ErrorCode::UnsupportedFeature);

    let mut hasty = Peer::connect(&replica.tcp());
    hasty.send(&Frame::new(Header::new(Kind::Ping, VolumeId::random(), Term::new(1)), Body::Empty));
    assert_eq!(refused(&mut hasty), ErrorCode::BadFrame, "something before Hello");

    // A write whose data was damaged on its way.
    let mut peer = Peer::greeted(&replica.tcp());
    let pool = carrick_backing_store::BufferPool::new(0);
    let mut data = pool.take(4096);
    data.fill(1);
    let extent = carrick_backing_store::Extent::new(ByteOffset::new(0), ByteLength::new(4096)).unwrap();
    peer.send(&Frame::data(Header::new(Kind::Write, VolumeId::random(), Term::new(1)), extent, vec![1].into(), data.share()));
    assert_eq!(refused(&mut peer), ErrorCode::BadFrame);
    assert!(Peer::greeted(&replica.unix()).is_served());
}

#[test]
fn a_connection_that_says_nothing_sensible_is_closed_and_one_that_stops_later_disturbs_nobody() {
    let replica = Replica::start();
    let mut silent = Peer::connect(&replica.tcp());
    let mut half = Peer::connect(&replica.unix());
    half.stream.write_all(&bytes_of(&hello())[..70]).unwrap();
    let mut stopped = Peer::greeted(&replica.unix());
    stopped.stream.write_all(b"CR").unwrap();
    let mut other = Peer::greeted(&replica.tcp());
    assert!(other.is_served());
    // Both wait out the time limit; what matters is that it ends.
    assert!(silent.receive().is_none());
    assert!(half.receive().is_none());
    assert!(other.is_served());
    // The rest of its frame comes late, and counts.
    let frame = Frame::new(Header::new(Kind::Status, VolumeId::random(), Term::ZERO), Body::Empty);
    stopped.stream.write_all(&bytes_of(&frame)[2..]).unwrap();
    assert!(stopped.receive().is_some());
}

#[test]
fn the_65th_connection_is_told_that_it_is_one_too_many() {
    let replica = Replica::start();
    let mut peers: Vec<_> = (0..64).map(|number| Peer::greeted(&if number % 2 == 0 { replica.unix() } else { replica.tcp() })).collect();
    for endpoint in [replica.unix(), replica.tcp()] {
        assert_eq!(refused(&mut Peer::connect(&endpoint)), ErrorCode::Busy);
    }
    assert!(peers.iter_mut().all(Peer::is_served));
    drop(peers.pop());
    wait_for("room for another", || {
        let mut peer = Peer::connect(&replica.unix());
        peer.send(&hello());
        (peer.receive()?.header.kind == Kind::HelloAnswer).then_some(())
    });
    // A crowd that connects and connects doesn't lock out those who are in.
    let crowd: Vec<_> = (0..300).map(|_| Peer::connect(&replica.tcp())).collect();
    assert!(peers.iter_mut().all(Peer::is_served));
    drop(crowd);
    drop(peers);
    wait_for("the descriptors of the crowd", || (replica.descriptors() < 40).then_some(()));
}

#[test]
fn half_sent_large_frames_on_many_connections_hold_bounded_memory_and_give_it_back() {
    let replica = Replica::start();
    let header = Header { length: (MIB).try_into().unwrap(), ..Header::new(Kind::Write, VolumeId::random(), Term::new(1)) };
    let mut peers: Vec<_> = (0..60).map(|_| Peer::greeted(&replica.unix())).collect();
    for peer in &mut peers {
        peer.stream.write_all(&header.encode()).unwrap();
        peer.stream.write_all(&vec![7; 900_000]).unwrap();
    }
    let mut other = Peer::greeted(&replica.tcp());
    assert!(other.is_served());
    // 60 frames of 1 MiB, each in a buffer of at most 2 MiB of which only what came is resident.
    assert!(replica.memory() < MEMORY_MAX, "{} bytes", replica.memory());
    drop(peers);
    assert!(other.is_served());
}

#[test]
fn a_peer_that_reads_nothing_is_cut_off_with_bounded_memory_while_others_are_served() {
    let replicas = [Replica::start()];
    let size = size(16);
    let volume = volume_on(&replicas, size);
    let replica = &replicas[0];
    let fill = LoadSpec {
        unit: ByteLength::new(MIB),
        depth: 4,
        write_percent: 100,
        pattern: LoadPattern::Sequential,
        limit: LoadLimit::Requests(16),
        ..load_spec(size)
    };
    run_load(load(fill), volume, size, vec![replica.unix()]).unwrap();

    for endpoint in [replica.unix(), replica.tcp()] {
        reads_nothing(replica, &endpoint, volume);
    }
    wait_for("memory to be given back", || (replica.memory() < MEMORY_IDLE).then_some(()));
}

fn reads_nothing(replica: &Replica, endpoint: &Endpoint, volume: VolumeId) {
    let mut peer = Peer::greeted(endpoint);
    let state = replica.status().replicas[0].state;
    let term = state.promised.successor(1).unwrap();
    peer.send(&Frame::new(Header::new(Kind::Promise, volume, term), Body::Empty));
    assert_eq!(peer.receive().unwrap().header.kind, Kind::PromiseAnswer);
    peer.stream.set_timeout(Duration::from_millis(200));
    let mut other = Peer::greeted(&replica.unix());
    let mut request = 0;
    let mut most = 0;
    wait_for("the end of the connection", || {
        request += 1;
        let header = Header {
            sequence: Seq::ZERO,
            offset: ByteOffset::new(request % 16 * MIB),
            length: MIB as u32,
            request: RequestId(request),
            ..Header::new(Kind::Read, volume, term)
        };
        assert!(other.is_served());
        most = most.max(replica.memory());
        match peer.stream.write_all(&header.encode()) {
            Ok(()) => None,
            // Nobody takes the requests any more: as it must be.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
            Err(_) => Some(()),
        }
    });
    assert!(most < MEMORY_MAX, "{most} bytes");
    assert!(request > 16, "it was the silence that ended it, not a request");
    let _ = peer.stream.read(&mut [0; 1]);
}
