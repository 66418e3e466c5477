//! Programs that are replaced on disk, and the processes that follow.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::support::{Node, alive};

/// All processes, the stores' first.
fn pids(node: &Node) -> Vec<u32> {
    [node.pids("replica"), node.pids("target")].concat()
}

/// A node with three replicas of one volume and one of another, and its processes.
fn used() -> (Node, Vec<u32>) {
    let node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["volume", "create", "vm2", "--size", "1G", "--replicas", "1"]).ok();
    for volume in ["vm1", "vm2"] {
        node.carrick(&["attach", volume]).ok();
    }
    let before = pids(&node);
    assert_eq!(before.len(), 5);
    (node, before)
}

fn outdated(node: &Node) -> usize {
    let status = node.carrick(&["status"]).ok();
    status["processes"].as_array().unwrap().iter().filter(|process| process["outdated"] == true).count()
}

fn upgrade(node: &Node) -> Value {
    node.carrick(&["status"]).ok()["upgrade"].clone()
}

#[track_caller]
fn all_are_new(node: &Node, before: &[u32]) {
    let after = pids(node);
    assert_eq!(after.len(), before.len());
    assert!(after.iter().all(|pid| !before.contains(pid)), "{before:?} and {after:?}");
    assert!(before.iter().all(|pid| !alive(*pid)), "an old one is left");
    assert_eq!((outdated(node), upgrade(node)), (0, Value::Null));
}

#[test]
fn every_process_is_replaced_once_and_only_if_its_program_was() {
    let (node, before) = used();
    let nothing = node.carrick(&["node", "upgrade", "--wait"]).ok();
    assert_eq!((nothing["processes"].as_array().unwrap().len(), pids(&node)), (0, before.clone()));
    node.install("carrick-target");
    node.install("carrick-replica");
    assert_eq!(outdated(&node), 5);
    let dry = node.carrick(&["node", "upgrade", "--dry-run"]).ok();
    let kinds: Vec<_> = dry["processes"].as_array().unwrap().iter().map(|process| process["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["replica", "replica", "replica", "target", "target"]);
    assert_eq!((&dry["processes"][0]["version"], &dry["pausing_volumes"]), (&"stand-in".into(), &serde_json::json!(["vm2"])));
    assert_eq!((pids(&node), upgrade(&node)), (before.clone(), Value::Null));

    node.carrick(&["node", "upgrade", "--wait"]).ok();
    all_are_new(&node, &before);
    let status = node.carrick(&["status"]).ok();
    assert_eq!(status["problems"], serde_json::json!([]), "{status}");
    assert_eq!(node.own_events(), ["CARRICKD_STARTED", "UPGRADE_STARTED", "UPGRADE_FINISHED"]);

    let [replicas, targets] = ["replica", "target"].map(|kind| node.pids(kind));
    node.install("carrick-target");
    node.carrick(&["node", "upgrade", "--wait"]).ok();
    assert_eq!(node.pids("replica"), replicas, "their program is the same");
    assert!(node.pids("target").iter().all(|pid| !targets.contains(pid)));
}

#[test]
fn an_upgrade_goes_on_with_the_next_carrickd() {
    let (mut node, before) = used();
    node.stop_daemon();
    node.options = vec!["--crash-at", "upgrade"];
    node.start();
    node.install("carrick-target");
    node.install("carrick-replica");
    // It dies once it has ended the first.
    let mut asking = node.carrick_begin(&["node", "upgrade"]);
    node.wait_crash();
    asking.wait().unwrap();
    node.options.clear();
    let left = || before.iter().filter(|pid| alive(**pid)).count();
    assert_eq!(left(), 4);
    node.start();
    node.wait_for("another one to be replaced", |_| (left() < 4).then_some(()));
    node.kill_daemon();
    node.start();
    node.wait_for("the end of the upgrade", |node| upgrade(node).is_null().then_some(()));
    all_are_new(&node, &before);
}

#[test]
fn a_new_program_that_does_not_work_ends_it_after_the_first_process_until_there_is_a_better_one() {
    let (node, before) = used();
    node.install("carrick-replica");
    node.install_file("carrick-replica", Path::new("/bin/false"));
    node.carrick(&["node", "upgrade"]).ok();
    let why = node.wait_for("a reason", |node| {
        let upgrade = upgrade(node);
        let why = upgrade["waiting_for"].as_str().filter(|why| why.contains("exit code 1")).map(str::to_owned);
        why.filter(|_| upgrade["left"] == 2)
    });
    assert!(why.contains("the carrick-replica of store"), "{why}");
    assert_eq!(before.iter().filter(|pid| alive(**pid)).count(), 4, "only one has ended");
    node.wait_for("a problem", |node| {
        let problems = node.carrick(&["status"]).ok()["problems"].to_string();
        problems.contains("the upgrade of this node waits").then_some(())
    });
    // Whoever waits for it is told, too, and not for ever.
    let message = node.carrick(&["node", "upgrade", "--wait"]).fails(7, "UPGRADE_WAITS");
    assert!(message.contains("2 left") && message.contains("exit code 1"), "{message}");
    node.install("carrick-replica");
    node.wait_for("the end of the upgrade", |node| upgrade(node).is_null().then_some(()));
    assert_eq!(outdated(&node), 0);
    assert_eq!(node.pids("target"), before.get(3..).unwrap());
}

#[test]
fn an_older_carrickd_and_programs_that_are_gone_are_refused() {
    let (node, _) = used();
    fs::remove_file(node.path("bin/carrick-target")).unwrap();
    let message = node.carrick(&["node", "upgrade"]).fails(5, "PROGRAMS_UNUSABLE");
    assert!(message.contains("carrick-target is not there"), "{message}");
    node.install("carrick-target");
    node.install("carrickd");
    let message = node.carrick(&["node", "upgrade"]).fails(5, "PROGRAMS_UNUSABLE");
    assert!(message.contains("restart it first"), "{message}");
}
