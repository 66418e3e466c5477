//! The control socket, as `carrickd` and people use it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use carrick_backing_store::{ReplicaSpec, Term, VolumeId};
use carrick_replicator::control::{ControlErrorCode, ReplicaAnswer, ReplicaRequest, read_line, write_line};
use carrick_replicator::endpoint::Endpoint;
use carrick_replicator::wire::{Body, Frame, Header, Kind};

use crate::support::{Peer, Replica, size};

fn refusal(answer: ReplicaAnswer) -> ControlErrorCode {
    match answer {
        ReplicaAnswer::Refused(error) => error.code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn replicas_are_created_listed_and_deleted_and_every_request_may_be_repeated() {
    let replica = Replica::start();
    let spec = ReplicaSpec { volume: VolumeId::random(), size: size(8) };
    let before = replica.status();
    assert!(before.replicas.is_empty());
    assert_eq!(before.store, replica.store);
    assert_eq!(before.path, replica.path());
    assert!(matches!(&before.endpoints[..], [Endpoint::Unix(_), Endpoint::Tcp(address)] if address.port() != 0));

    for _ in 0..2 {
        assert_eq!(replica.ask(&ReplicaRequest::Create { spec }), ReplicaAnswer::Done);
    }
    let other_size = ReplicaSpec { size: size(9), ..spec };
    assert_eq!(refusal(replica.ask(&ReplicaRequest::Create { spec: other_size })), ControlErrorCode::Conflict);
    let huge = ReplicaSpec { volume: VolumeId::random(), size: size(1 << 30) };
    assert_eq!(refusal(replica.ask(&ReplicaRequest::Create { spec: huge })), ControlErrorCode::NoSpace);
    let status = replica.status();
    assert_eq!(status.replicas.iter().map(|replica| replica.spec).collect::<Vec<_>>(), [spec]);
    assert!(status.usage.reserved >= spec.size.bytes(), "promised, and not used yet: {:?}", status.usage);
    assert_eq!((status.poisoned, status.scrub.rate.get(), status.scrub.damaged.len()), (None, 4 << 20, 0));

    for _ in 0..2 {
        assert_eq!(replica.ask(&ReplicaRequest::Delete { volume: spec.volume }), ReplicaAnswer::Done);
    }
    assert!(replica.status().replicas.is_empty());
    assert_eq!(replica.ask(&ReplicaRequest::Create { spec: other_size }), ReplicaAnswer::Done);
}

#[test]
fn a_deleted_replica_ends_the_session_on_it() {
    let replica = Replica::start();
    let volume = VolumeId::random();
    replica.create(volume, size(8));
    let mut primary = Peer::greeted(&replica.unix());
    primary.send(&Frame::new(Header::new(Kind::Promise, volume, Term::ZERO.successor(1).unwrap()), Body::Empty));
    assert_eq!(primary.receive().unwrap().header.kind, Kind::PromiseAnswer);
    assert!(replica.status().replicas[0].connected);
    assert_eq!(replica.ask(&ReplicaRequest::Delete { volume }), ReplicaAnswer::Done);
    assert!(primary.receive().is_none());
    assert!(Peer::greeted(&replica.unix()).is_served());
}

#[test]
fn lines_that_are_no_requests_are_refused_and_others_go_on() {
    let replica = Replica::start();
    let control = replica.run().replica_control(replica.store);
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&control), mode(&replica.run().replica_socket(replica.store))), (0o600, 0o600));

    let mut kept = UnixStream::connect(&control).unwrap();
    let mut answers = BufReader::new(kept.try_clone().unwrap());
    for line in [&b"{\"op\":\"explode\"}\n"[..], b"not json\n", b"{\"op\":\"delete\"}\n", &[b'x'; (1 << 20) + 1]] {
        let mut stream = UnixStream::connect(&control).unwrap();
        let _ = stream.write_all(line);
        let answer: ReplicaAnswer = read_line(&mut BufReader::new(stream)).unwrap().unwrap();
        assert_eq!(refusal(answer), ControlErrorCode::Invalid);
        // Many requests on one connection.
        write_line(&mut kept, &ReplicaRequest::Status).unwrap();
        assert!(matches!(read_line(&mut answers).unwrap(), Some(ReplicaAnswer::Status(_))));
    }
}

#[test]
fn control_connections_are_limited() {
    let replica = Replica::start();
    replica.status();
    let control = replica.run().replica_control(replica.store);
    let held: Vec<_> = (0..16)
        .map(|_| {
            let mut stream = UnixStream::connect(&control).unwrap();
            write_line(&mut stream, &ReplicaRequest::Status).unwrap();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
            stream
        })
        .collect();
    let mut one_too_many = UnixStream::connect(&control).unwrap();
    one_too_many.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut answer = String::new();
    one_too_many.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"busy\""), "{answer}");
    drop(held);
    crate::support::wait_for("room again", || {
        let mut stream = UnixStream::connect(&control).unwrap();
        write_line(&mut stream, &ReplicaRequest::Status).ok()?;
        matches!(read_line(&mut BufReader::new(stream)), Ok(Some(ReplicaAnswer::Status(_)))).then_some(())
    });
}
