//! What happened is told, in order, also by the next carrickd.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::support::{Node, PATIENCE, signal};

fn events(node: &Node, arguments: &[&str]) -> Vec<Value> {
    node.carrick(&[&["events"], arguments].concat()).ok().as_array().unwrap().clone()
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["kind"].as_str().unwrap()).collect()
}

/// Kills the first process of a kind, and waits for another in its place.
fn kill_first(node: &Node, kind: &str) {
    let before = node.pids(kind);
    signal(before[0], Signal::KILL);
    node.wait_for("a new process", |node| Some(node.pids(kind)).filter(|now| now.len() == before.len() && *now != before));
}

#[test]
fn a_volumes_life_is_told_in_order_and_killing_the_daemon_loses_nothing_of_it() {
    let mut node = Node::new(3);
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    kill_first(&node, "target");
    let of_others =
        |node: &Node| -> Vec<Value> { events(node, &[]).into_iter().filter(|event| event["kind"] != "CARRICKD_STARTED").collect() };
    let before = of_others(&node);
    node.kill_daemon();
    node.start();
    node.wait_for("everything to be adopted", |node| (node.pids("replica").len() + node.pids("target").len() == 4).then_some(()));
    assert_eq!(of_others(&node), before, "what is adopted is no news");
    assert_eq!(node.own_events(), ["CARRICKD_STARTED"; 2]);
    kill_first(&node, "replica");
    node.carrick(&["volume", "expand", "vm1", "2G", "--wait"]).ok();
    node.carrick(&["volume", "set", "vm1", "iops=500"]).ok();
    node.leave_out(&volume, volume["replicas"][1]["store"].as_str().unwrap());
    node.take_back(&volume);
    node.carrick(&["detach", "vm1"]).ok();
    node.carrick(&["volume", "delete", "vm1"]).ok();
    // As late as possible: the last change is durable, or the caller had no answer.
    node.kill_daemon();
    node.start();

    let told = events(&node, &["vm1"]);
    assert_eq!(
        kinds(&told),
        [
            "VOLUME_CREATED",
            "PROCESS_STARTED",
            "ATTACHED",
            "PROCESS_CRASHED",
            "PROCESS_RECOVERED",
            "OPERATION_STARTED",
            "VOLUME_EXPANDED",
            "OPERATION_SUCCEEDED",
            "LIMITS_SET",
            "REPLICA_LEFT_OUT",
            "REPLICA_COUNTS",
            "DETACHING",
            "DETACHED",
            "VOLUME_DELETING",
            "VOLUME_DELETED",
        ]
    );
    assert!(told.windows(2).all(|pair| pair[0]["number"].as_u64() < pair[1]["number"].as_u64()), "{told:?}");
    let text = |index: usize| told[index]["text"].as_str().unwrap();
    assert_eq!((text(2), text(3)), ("is attached: /dev/ublkb7", "its carrick-target was killed by signal 9"));
    assert_eq!(text(6), "was expanded from 1 GiB to 2 GiB");
    assert_eq!(told[9]["store_id"], volume["replicas"][1]["store"]);
    assert!(told.iter().all(|event| event["volume_id"] == volume["id"] && event["time_unix"].as_u64() > Some(1_700_000_000)), "{told:?}");
    assert_eq!(events(&node, &[volume["id"].as_str().unwrap()]), told, "also by its id");

    // What a store tells of itself, and of the replica that it had.
    let about_store = |number: usize| events(&node, &["--store", node.store_path(number).to_str().unwrap()]);
    let crashed: Vec<_> = (0..3).map(about_store).filter(|told| kinds(told).contains(&"PROCESS_CRASHED")).collect();
    assert_eq!(crashed.len(), 1);
    assert_eq!(kinds(&crashed[0])[..4], ["STORE_ADDED", "PROCESS_STARTED", "PROCESS_CRASHED", "PROCESS_RECOVERED"]);
    assert_eq!((0..3).filter(|number| kinds(&about_store(*number)).contains(&"REPLICA_LEFT_OUT")).count(), 1);
}

#[test]
fn those_that_nobody_knows_are_refused_and_reading_goes_on_from_a_number() {
    let node = Node::new(1);
    node.carrick(&["events", "vm1"]).fails(3, "VOLUME_NOT_FOUND");
    node.carrick(&["events", "v/m"]).fails(2, "INVALID_FIELD");
    node.carrick(&["events", "--store", "/nonexistent"]).fails(3, "STORE_NOT_FOUND");
    node.carrick(&["events", "vm1", "--store", "/nonexistent"]).fails(2, "USAGE");
    let all = events(&node, &[]);
    assert_eq!(kinds(&all), ["CARRICKD_STARTED", "STORE_ADDED", "PROCESS_STARTED"]);
    let first = all[0]["number"].to_string();
    assert_eq!(events(&node, &["--since", &first]), all[1..]);
    assert_eq!(events(&node, &["--since", &all[2]["number"].to_string()]), [] as [Value; 0]);
    assert_eq!(events(&node, &["--since", "777"]), all, "of another log");
    // A creation that fails says why.
    std::fs::write(node.store_path(0).join("broken"), "").unwrap();
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1"]).fails(1, "REPLICA_FAILED");
    let told = events(&node, &["vm1"]);
    assert_eq!(kinds(&told), ["CREATION_UNDONE", "VOLUME_DELETED"]);
    assert!(told[0]["text"].as_str().unwrap().contains("the disk failed"), "{told:?}");
}

#[test]
fn a_target_that_flaps_is_one_event_and_a_failed_attachment_says_why() {
    let node = Node::new(1);
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    (0..5).for_each(|_| kill_first(&node, "target"));
    let told = events(&node, &["vm1"]);
    assert_eq!(kinds(&told), ["VOLUME_CREATED", "PROCESS_STARTED", "ATTACHED", "PROCESS_CRASHED", "PROCESS_RECOVERED"]);
    assert_eq!((&told[3]["times"], &told[4]["times"]), (&5.into(), &5.into()), "{told:?}");
    assert!(told[3]["number"].as_u64() > Some(10), "{told:?}");

    node.carrick(&["volume", "create", "no-ublk", "--size", "1G", "--replicas", "1"]).ok();
    for _ in 0..3 {
        node.carrick(&["attach", "no-ublk"]).fails(8, "UNSUPPORTED");
    }
    let told = events(&node, &["no-ublk"]);
    let failed = told.iter().find(|event| event["kind"] == "ATTACH_FAILED").unwrap();
    assert_eq!(failed["times"], 3, "{told:?}");
    assert!(failed["text"].as_str().unwrap().contains("load the module ublk_drv"), "{told:?}");

    node.carrick(&["volume", "create", "busy", "--size", "1G", "--replicas", "1"]).ok();
    node.carrick(&["attach", "busy"]).ok();
    node.carrick(&["detach", "busy"]).fails(5, "DEVICE_BUSY");
    let told = events(&node, &["busy"]);
    assert_eq!(kinds(&told)[2..], ["ATTACHED", "DETACHING", "DETACH_FAILED"]);
    assert!(told[4]["text"].as_str().unwrap().contains("/dev/ublkb7 is in use"), "{told:?}");
}

#[test]
fn a_replica_that_is_replaced_is_a_story() {
    let node = Node::new(4);
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let lost = volume["replicas"][1]["store"].as_str().unwrap();
    node.leave_out(&volume, lost);
    node.carrick(&["volume", "replace", "vm1", lost]).ok();
    let told = node.wait_for("the end of it", |node| {
        let told = events(node, &["vm1"]);
        let ended = ["PROCESS_RECOVERED", "REPLICA_DELETED"].iter().all(|kind| kinds(&told).contains(kind));
        ended.then_some(told)
    });
    let of_replicas: Vec<_> = kinds(&told).into_iter().filter(|kind| kind.starts_with("REPLICA_")).collect();
    assert_eq!(of_replicas, ["REPLICA_LEFT_OUT", "REPLICA_REPLACED", "REPLICA_REBUILDING", "REPLICA_DELETED"]);
    assert!(kinds(&told).contains(&"PROCESS_REPLACED") && !kinds(&told).contains(&"PROCESS_CRASHED"), "nothing crashed: {told:?}");
}

/// Somebody who follows, until it is dropped.
struct Follower {
    process: Child,
    events: Receiver<Value>,
}

impl Follower {
    fn new(node: &Node, arguments: &[&str]) -> Self {
        let mut process = node.carrick_begin(&[&["events", "--follow"], arguments].concat());
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let (sender, events) = channel();
        thread::spawn(move || {
            let events = lines.map_while(Result::ok).map(|line| serde_json::from_str(&line).unwrap());
            events.for_each(|event: Value| drop(sender.send(event)));
        });
        Self { process, events }
    }

    /// All up to the first of this kind.
    fn until(&self, kind: &str) -> Vec<Value> {
        let mut seen = Vec::new();
        while seen.last().is_none_or(|event: &Value| event["kind"] != kind) {
            seen.push(self.events.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("waited in vain for {kind} after {seen:?}")));
        }
        seen
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn whoever_follows_sees_everything_once_whatever_becomes_of_the_daemon() {
    let mut node = Node::new(1);
    let follower = Follower::new(&node, &[]);
    let of_store = Follower::new(&node, &["--since", "0", "--store", node.store_path(0).to_str().unwrap()]);
    let mut seen = follower.until("PROCESS_STARTED");
    of_store.until("PROCESS_STARTED");
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1"]).ok();
    seen.extend(follower.until("VOLUME_CREATED"));
    node.kill_daemon();
    node.start();
    node.carrick(&["attach", "vm1"]).ok();
    seen.extend(follower.until("ATTACHED"));
    // Live, without anybody asking.
    signal(node.pids("target")[0], Signal::KILL);
    seen.extend(follower.until("PROCESS_RECOVERED"));
    // Those who follow don't keep the daemon.
    let began = Instant::now();
    node.stop_daemon();
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    node.start();
    node.carrick(&["detach", "vm1"]).ok();
    seen.extend(follower.until("DETACHED"));
    assert_eq!(seen, events(&node, &[]), "nothing twice, and nothing is missing");
    node.carrick(&["volume", "delete", "vm1"]).ok();
    let path = node.store_path(0);
    node.carrick(&["store", "remove", path.to_str().unwrap()]).ok();
    assert_eq!(kinds(&of_store.until("STORE_REMOVED")), ["STORE_REMOVED"]);
}

#[test]
fn whoever_follows_ends_when_nobody_reads_any_more() {
    let node = Node::new(1);
    let mut process = node.carrick_begin(&["events", "--follow"]);
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    drop(lines);
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1"]).ok();
    let mut ended = None;
    node.wait_for("its end", |_| {
        ended = process.try_wait().unwrap();
        ended
    });
    assert!(ended.unwrap().success());
}
