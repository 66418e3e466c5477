//! Volumes that nobody uses, whose replicas are seen to all the same.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;

use super::support::{Node, signal};

fn show(node: &Node) -> Value {
    node.carrick(&["volume", "show", "vm1"]).ok()
}

fn created(node: &Node) -> (Value, Vec<String>) {
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    let stores = volume["replicas"].as_array().unwrap().iter().map(|replica| replica["store"].as_str().unwrap().to_owned());
    (volume.clone(), stores.collect())
}

/// What its target was told, if it has one.
fn told(node: &Node, volume: &Value) -> Option<Value> {
    let path = node.run(&format!("target/{}.json", volume["id"].as_str().unwrap()));
    Some(serde_json::from_slice(&fs::read(path).ok()?).unwrap())
}

fn wait_tended(node: &Node) -> Value {
    node.wait_for("a target that tends it", |node| Some(show(node)).filter(|shown| shown["tended"] == true))
}

fn wait_at_rest(node: &Node) {
    node.wait_for("its target to end", |node| (show(node)["tended"] == false && node.pids("target").is_empty()).then_some(()));
}

#[test]
fn a_store_is_emptied_of_a_volume_that_nobody_uses() {
    let node = Node::new(4);
    let (volume, stores) = created(&node);
    assert_eq!((told(&node, &volume), show(&node)["tended"].clone()), (None, false.into()));
    node.carrick(&["store", "evict", &stores[0]]).ok();
    let during = wait_tended(&node);
    assert_eq!((&during["attachment"], told(&node, &volume).unwrap()["tends"].clone()), (&Value::Null, true.into()));
    assert!(!node.run(&format!("target/{}.device", volume["id"].as_str().unwrap())).exists(), "nobody uses it");
    let new = during["replicas"][3]["store"].as_str().unwrap().parse().unwrap();
    node.change_members(&volume, |members| members.retain(|store| store.to_string() != stores[0] && *store != new));
    node.change_members(&volume, |members| members.push(new));
    node.carrick(&["store", "evict", "--wait", &stores[0]]).ok();
    wait_at_rest(&node);
    assert_eq!(told(&node, &volume), None, "nothing of it is left");
    let words = node.carrick(&["events", "vm1"]).ok().to_string();
    assert!(!words.contains("CRASHED") && !words.contains("ATTACHED"), "{words}");
}

#[test]
fn what_lacks_something_gets_it_though_the_volume_is_detached() {
    let mut node = Node::new(3);
    let (volume, stores) = created(&node);
    node.carrick(&["attach", "vm1"]).ok();
    node.leave_out(&volume, &stores[1]);
    node.carrick(&["detach", "vm1"]).ok();
    let state = wait_tended(&node);
    assert_eq!(state["attachment"], Value::Null, "{state}");
    // Whoever wants to use it needn't wait for that, and nothing is lost of it.
    let device = node.carrick(&["attach", "vm1"]).ok();
    assert_eq!(device["device"], "/dev/ublkb7", "{device}");
    assert_eq!(told(&node, &volume).unwrap()["tends"], Value::Null);
    node.carrick(&["detach", "vm1"]).ok();
    wait_tended(&node);
    // One that hangs is in nobody's way.
    let tender = node.wait_for("its process", |node| node.pids("target").first().copied());
    signal(tender, Signal::STOP);
    node.carrick(&["attach", "vm1"]).ok();
    node.carrick(&["detach", "vm1"]).ok();
    wait_tended(&node);
    // Nor is anything in the way of the next daemon.
    node.kill_daemon();
    node.start();
    wait_tended(&node);
    node.carrick(&["attach", "vm1"]).ok();
    node.carrick(&["detach", "vm1"]).ok();
    wait_tended(&node);
    node.take_back(&volume);
    wait_at_rest(&node);
}

#[test]
fn a_store_that_is_away_keeps_no_process_busy_and_a_deleted_volume_none() {
    let node = Node::new(3);
    let (volume, stores) = created(&node);
    node.carrick(&["attach", "vm1"]).ok();
    node.take_away(&stores[1]);
    node.leave_out(&volume, &stores[1]);
    node.carrick(&["detach", "vm1"]).ok();
    wait_at_rest(&node);
    node.bring_back(&stores[1]);
    wait_tended(&node);
    node.carrick(&["volume", "delete", "vm1"]).ok();
    node.carrick(&["volume", "show", "vm1"]).fails(3, "VOLUME_NOT_FOUND");
    assert_eq!(node.pids("target"), [0_u32; 0]);
    assert_eq!(node.replicas_in_all(3), 0);
}

#[test]
fn a_lost_replica_of_a_volume_that_nobody_uses_is_replaced() {
    let mut node = Node::new(4);
    node.kill_daemon();
    node.options = vec!["--replace-after", "1"];
    node.start();
    let (volume, stores) = created(&node);
    node.carrick(&["attach", "vm1"]).ok();
    node.carrick(&["detach", "vm1"]).ok();
    node.take_away(&stores[1]);
    node.leave_out(&volume, &stores[1]);
    let after = node
        .wait_for("another one in its place", |node| Some(show(node)).filter(|shown| !shown["replicas"].to_string().contains(&stores[1])));
    assert_eq!(after["replicas"].as_array().unwrap().len(), 3);
    wait_tended(&node);
    node.take_back(&after);
    wait_at_rest(&node);
}
