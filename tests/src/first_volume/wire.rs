//! Peers of the data protocol that speak it wrongly, on purpose or by age.

use std::path::Path;

use anyhow::{Context, ensure};
use carrick_backing_store::{ByteOffset, Seq, Term, VolumeId};
use carrick_replicator::wire::{Body, ErrorCode, Frame, Header, Hello, Kind};

use super::Plan;
use crate::fio::Fio;
use crate::peer::Peer;
use crate::report::Found;
use crate::site::Site;

pub fn hostile_peers(_: &Plan) -> Found {
    let site = Site::with_stores(3)?;
    site.carrick(&["volume", "create", "vm1", "--size", "64M"])?;
    let device = site.attach("vm1", &[])?;
    let mut fio = Fio::start(
        &device,
        &[
            "--rw=randwrite",
            "--bs=8k",
            "--iodepth=16",
            "--size=64M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=64",
            "--loops=3",
        ],
    )?;
    let shown = site.carrick(&["volume", "show", "vm1"])?;
    let volume: VolumeId = shown["id"].as_str().context("a volume without id")?.parse()?;
    let before = site.pids("replica")?;
    let store = shown["replicas"][0]["store"].as_str().context("a replica without store")?;
    let socket = site.path(&format!("run/replica/{store}.sock"));
    let tried = attack(&socket, volume)?;
    ensure!(fio.is_running()?, "the load ended while peers misbehaved");
    let said = fio.finish()?;
    ensure!(said.contains("err= 0"), "fio: {said}");
    ensure!(before == site.pids("replica")?, "a replica was restarted");
    ensure!(site.pids("target")?.len() == 1, "the target is gone");
    site.carrick(&["detach", "vm1"])?;
    Ok(format!("{tried} kinds of wrong bytes were answered with their error; fio verify clean meanwhile"))
}

/// Speaks wrongly in every way; how many there were.
fn attack(socket: &Path, volume: VolumeId) -> anyhow::Result<usize> {
    let silent = || Peer::connect_silently(socket, volume);
    let greeted = || Peer::connect(socket, volume);
    let mut tried = 0;
    let mut sends = |bytes: &[u8], code: ErrorCode, word: &str| -> anyhow::Result<()> {
        let mut peer = greeted()?;
        peer.send_bytes(bytes)?;
        let text = peer.expect_error(code)?;
        ensure!(text.contains(word), "{text:?} doesn't name {word:?}");
        ensure!(peer.is_closed(), "the connection stays open after {word:?}");
        tried += 1;
        Ok(())
    };
    let ping = Header::new(Kind::Ping, volume, Term::new(1));
    sends(&[0x47; 4096], ErrorCode::BadFrame, "magic")?;
    let mut newer = ping.encode();
    newer[4] = 9;
    sends(&sealed(newer), ErrorCode::UnsupportedVersion, "version")?;
    let mut strange = ping.encode();
    strange[5] = 0x6f;
    sends(&sealed(strange), ErrorCode::BadFrame, "kind")?;
    let long = Header { length: u32::MAX / 4096 * 4096, ..Header::new(Kind::Write, volume, Term::new(1)) };
    sends(&long.encode(), ErrorCode::BadFrame, "length")?;
    let ragged = Header { length: 4096, offset: ByteOffset::new(100), ..Header::new(Kind::Write, volume, Term::new(1)) };
    sends(&ragged.encode(), ErrorCode::BadFrame, "offset")?;
    let mut flipped = ping.encode();
    flipped[30] ^= 4;
    sends(&flipped, ErrorCode::BadFrame, "crc")?;

    // Half a frame, then silence, holds nobody up; it ends with the connection.
    let mut half = silent()?;
    half.send_bytes(&ping.encode()[..40])?;
    // No hello first.
    let mut rude = silent()?;
    rude.send_bytes(&ping.encode())?;
    rude.expect_error(ErrorCode::BadFrame)?;
    // A peer from the future, by its hello.
    let mut future = silent()?;
    let hello = Hello { version_min: 7, version_max: 9, ..Hello::OURS };
    let answer = future.ask(&Frame::new(future.header(Kind::Hello), Body::Hello(hello)))?;
    ensure!(matches!(&answer.body, Body::Error(error) if error.code == ErrorCode::UnsupportedVersion), "{answer:?}");
    // One that needs a feature nobody has.
    let mut needy = silent()?;
    let hello = Hello { features_incompatible: 1 << 40, ..Hello::OURS };
    let answer = needy.ask(&Frame::new(needy.header(Kind::Hello), Body::Hello(hello)))?;
    ensure!(matches!(&answer.body, Body::Error(error) if error.code == ErrorCode::UnsupportedFeature), "{answer:?}");
    // A term that was, and a write under no promise.
    let mut stale = greeted()?;
    let answer = stale.promise(Term::new(1))?;
    ensure!(matches!(&answer.body, Body::Error(error) if error.code == ErrorCode::StaleTerm), "{answer:?}");
    ensure!(answer.header.term > Term::new(1), "the answer names no promised term");
    let write = stale.write_frame(Seq::new(1))?;
    let answer = stale.ask(&write)?;
    ensure!(matches!(&answer.body, Body::Error(error) if error.code == ErrorCode::StaleTerm), "{answer:?}");
    // A volume that isn't here.
    let mut lost = Peer::connect(socket, VolumeId::from_bytes([9; 16]))?;
    let answer = lost.ask(&Frame::new(lost.header(Kind::Status), Body::Empty))?;
    ensure!(matches!(&answer.body, Body::Error(error) if error.code == ErrorCode::UnknownVolume), "{answer:?}");
    drop(half);
    Ok(tried + 7)
}

/// A header with a right checksum around a wrong field.
fn sealed(mut bytes: [u8; 64]) -> [u8; 64] {
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
    bytes
}
