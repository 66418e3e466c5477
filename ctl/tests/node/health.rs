//! How stores, replicas and the node are, by evidence over time.

use std::fs;
use std::path::Path;

use rustix::process::Signal;

use super::support::{Node, signal};

/// The health of a store, of its replica of the volume, and of the node.
fn healths(node: &Node, store: &str) -> [String; 3] {
    let volume = node.carrick(&["volume", "show", "vm1"]).ok();
    let replicas = volume["replicas"].as_array().unwrap();
    let replica = replicas.iter().find(|replica| replica["store"] == store).unwrap();
    let store = node.carrick(&["store", "show", store]).ok();
    let node = node.carrick(&["node", "show"]).ok();
    [&store, replica, &node].map(|found| found["health"].as_str().unwrap().to_owned())
}

fn wait(node: &Node, store: &str, wanted: [&str; 3]) {
    node.wait_for(&format!("{wanted:?}"), |node| (healths(node, store) == wanted).then_some(()));
}

#[test]
fn a_store_that_is_away_is_reconnecting_then_degraded_then_failed_and_ready_by_itself() {
    let mut node = Node::new(3);
    node.kill_daemon();
    // Nothing can take the replica's place: there is no other store.
    node.options = vec!["--replace-after", "6"];
    node.start();
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    let store = volume["replicas"][1]["store"].as_str().unwrap();
    node.carrick(&["attach", "vm1"]).ok();
    node.carrick(&["detach", "vm1"]).ok();
    wait(&node, store, ["ready"; 3]);
    node.take_away(store);
    wait(&node, store, ["reconnecting"; 3]);
    wait(&node, store, ["degraded"; 3]);
    // The node itself answers.
    wait(&node, store, ["failed", "failed", "degraded"]);
    let told = |node: &Node| -> Vec<String> {
        let events = node.carrick(&["events", "--store", store]).ok();
        let kinds = events.as_array().unwrap().iter().map(|event| event["kind"].as_str().unwrap().to_owned());
        kinds.filter(|kind| ["STORE_DEGRADED", "STORE_FAILED", "STORE_READY"].contains(&kind.as_str())).collect()
    };
    node.wait_for("the log to tell", |node| (told(node) == ["STORE_DEGRADED", "STORE_FAILED"]).then_some(()));
    node.bring_back(store);
    wait(&node, store, ["ready"; 3]);
    node.wait_for("the log to tell", |node| (told(node) == ["STORE_DEGRADED", "STORE_FAILED", "STORE_READY"]).then_some(()));
    // A restart of the daemon is no news.
    node.kill_daemon();
    node.start();
    wait(&node, store, ["ready"; 3]);
    assert_eq!(told(&node).len(), 3);
}

#[test]
fn one_that_flaps_is_degraded_though_it_answers_and_new_replicas_go_elsewhere() {
    let node = Node::new(4);
    let shown = node.carrick(&["store", "show", node.store_path(0).to_str().unwrap()]).ok();
    let store = shown["id"].as_str().unwrap();
    for _ in 0..4 {
        let pid = node.pid_of(store);
        signal(pid, Signal::KILL);
        node.wait_for("another process", |node| {
            let process = node.carrick(&["status"]).ok()["processes"].clone();
            let process = process.as_array().unwrap().iter().find(|process| process["subject"] == store).unwrap().clone();
            (process["state"] == "running" && process["pid"] != pid).then_some(())
        });
    }
    assert_eq!(node.carrick(&["store", "show", store]).ok()["health"], "degraded");
    // It would be the first one: all have as much room.
    for name in ["vm1", "vm2"] {
        let volume = node.carrick(&["volume", "create", name, "--size", "1G"]).ok();
        assert!(!volume["replicas"].to_string().contains(store), "{volume}");
    }
    // Once it lives for a while, it is as good as any.
    node.wait_for("it to be ready", |node| (node.carrick(&["store", "show", store]).ok()["health"] == "ready").then_some(()));
}

#[test]
fn a_store_whose_disk_fails_has_failed_by_its_own_word() {
    let node = Node::new(1);
    let path = node.store_path(0);
    let health = |node: &Node| node.carrick(&["store", "show", path.to_str().unwrap()]).ok()["health"].clone();
    assert_eq!(health(&node), "ready");
    fs::write(Path::new(&path).join("poisoned"), "a write to stable media failed").unwrap();
    assert_eq!(health(&node), "failed");
    assert_eq!(node.carrick(&["node", "show"]).ok()["health"], "degraded");
    fs::remove_file(path.join("poisoned")).unwrap();
    assert_eq!(health(&node), "ready");
}
