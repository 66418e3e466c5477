//! Volumes that become larger, whatever dies meanwhile.

use std::thread;

use rustix::process::Signal;
use serde_json::Value;

use super::support::{Answer, Node, signal};

const GIB: u64 = 1 << 30;

fn size(node: &Node, name: &str) -> u64 {
    node.carrick(&["volume", "show", name]).ok()["size_bytes"].as_u64().unwrap()
}

fn device_size(node: &Node, name: &str) -> Option<u64> {
    node.carrick(&["volume", "show", name]).ok()["attachment"]["device_size_bytes"].as_u64()
}

/// The sizes of all replicas, smallest first.
fn replica_sizes(node: &Node, stores: usize) -> Vec<u64> {
    let entries = (0..stores).flat_map(|store| std::fs::read_dir(node.store_path(store)).unwrap().flatten());
    let documents = entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "replica"));
    let spec = |path| serde_json::from_slice::<Value>(&std::fs::read(path).unwrap()).unwrap();
    let mut sizes: Vec<u64> = documents.map(|entry| spec(entry.path())["size"].as_u64().unwrap()).collect();
    sizes.sort_unstable();
    sizes
}

fn wait_ended(node: &Node) -> Value {
    node.wait_for("the operation to end", |node| node.operations("expand").into_iter().next().filter(|found| found["state"] != "running"))
}

#[test]
fn a_volume_grows_and_never_shrinks() {
    let node = Node::new(3);
    node.carrick(&["explain", "vm1"]).fails(3, "VOLUME_NOT_FOUND");
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    let answer = node.carrick(&["explain", "vm1"]).ok();
    assert_eq!((&answer["findings"], &answer["serves"]), (&serde_json::json!([]), &false.into()), "{answer}");
    let answer = node.carrick(&["volume", "expand", "vm1", "2G", "--dry-run"]).ok();
    assert_eq!((answer["device"].as_str(), answer["operation"].is_null()), (Some("not-attached"), true), "{answer}");
    assert_eq!((size(&node, "vm1"), node.operations("expand").len()), (GIB, 0));

    let answer = node.carrick(&["volume", "expand", "vm1", "2G", "--wait"]).ok();
    assert_eq!((answer["operation"]["state"].as_str(), answer["from_bytes"].as_u64()), (Some("succeeded"), Some(GIB)), "{answer}");
    assert_eq!((size(&node, "vm1"), replica_sizes(&node, 3)), (2 * GIB, vec![2 * GIB; 3]));
    // The same again changes nothing; less is refused with both sizes.
    assert!(node.carrick(&["volume", "expand", "vm1", "2G"]).ok()["operation"].is_null());
    let message = node.carrick(&["volume", "expand", "vm1", "1G"]).fails(5, "VOLUME_LARGER");
    assert!(message.contains("2 GiB") && message.contains("1 GiB"), "{message}");
    for (wrong, code, reason) in [("4097", 2, "INVALID_FIELD"), ("200G", 6, "NO_SPACE")] {
        node.carrick(&["volume", "expand", "vm1", wrong]).fails(code, reason);
    }
    node.carrick(&["volume", "expand", "nothing", "2G"]).fails(3, "VOLUME_NOT_FOUND");

    assert_eq!(node.carrick(&["attach", "vm1"]).ok()["device"], "/dev/ublkb7");
    node.carrick(&["volume", "expand", "vm1", "3G", "--wait"]).ok();
    assert_eq!((size(&node, "vm1"), device_size(&node, "vm1")), (3 * GIB, Some(3 * GIB)));

    let id = node.operations("expand")[0]["id"].as_str().unwrap().to_owned();
    let others = ["create", "expand", "attach", "expand"].into_iter().rev();
    let listed = node.carrick(&["operation", "list"]).ok();
    let listed =
        listed.as_array().unwrap().iter().map(|operation| (operation["kind"].as_str().unwrap(), operation["state"].as_str().unwrap()));
    assert!(listed.eq(others.map(|kind| (kind, "succeeded"))), "the newest first");
    assert_eq!(id, "4");
    node.carrick(&["operation", "show", "two"]).fails(2, "INVALID_FIELD");
    let shown = node.carrick(&["operation", "show", &id]).ok();
    assert_eq!((shown["volume"].as_str(), shown["to_bytes"].as_u64()), (Some("vm1"), Some(3 * GIB)));
    node.carrick(&["operation", "show", "777"]).fails(3, "OPERATION_NOT_FOUND");
    node.carrick(&["operation", "cancel", &id]).fails(5, "OPERATION_ENDED");
}

#[test]
fn a_request_that_is_made_again_under_its_name_finds_its_operation() {
    let node = Node::new(1);
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1"]).ok();
    let first = node.carrick(&["volume", "expand", "vm1", "2G", "--wait", "--key", "a"]).ok();
    node.carrick(&["volume", "expand", "vm1", "3G", "--wait"]).ok();
    // By now that would be too small.
    let again = node.carrick(&["volume", "expand", "vm1", "2G", "--key", "a"]).ok();
    assert_eq!(again["operation"], first["operation"]);
    let message = node.carrick(&["volume", "expand", "vm1", "5G", "--key", "a"]).fails(2, "INVALID_FIELD");
    assert!(message.contains("another request had this key"), "{message}");
    node.carrick(&["volume", "expand", "vm1", "5G", "--key", &"k".repeat(129)]).fails(2, "INVALID_FIELD");
    assert_eq!((size(&node, "vm1"), node.operations("expand").len()), (3 * GIB, 2));
}

#[test]
fn where_the_kernel_cannot_the_device_has_the_new_size_at_the_next_attachment() {
    let node = Node::new(1);
    node.carrick(&["volume", "create", "rigid", "--size", "1G", "--replicas", "1"]).ok();
    node.carrick(&["attach", "rigid"]).ok();
    assert_eq!(node.carrick(&["volume", "expand", "rigid", "2G", "--dry-run"]).ok()["device"], "next-attachment");
    let answer = node.carrick(&["volume", "expand", "rigid", "2G", "--wait"]).ok();
    assert!(answer["operation"]["notes"][0].as_str().unwrap().contains("detached and attached again"), "{answer}");
    assert_eq!((size(&node, "rigid"), device_size(&node, "rigid")), (2 * GIB, Some(GIB)));
    assert_eq!(node.carrick(&["explain", "rigid"]).ok()["findings"][0]["reason"], "DEVICE_SMALLER");
    node.carrick(&["detach", "rigid"]).ok();
    node.carrick(&["attach", "rigid"]).ok();
    assert_eq!(device_size(&node, "rigid"), Some(2 * GIB));
}

#[test]
fn requests_at_the_same_time_end_at_the_largest() {
    let node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let sizes: Vec<String> = (2..=13).map(|gib| format!("{gib}G")).collect();
    thread::scope(|scope| {
        for size in &sizes {
            let node = &node;
            // Some come when the volume is larger already.
            scope.spawn(move || drop(node.carrick(&["volume", "expand", "vm1", size, "--wait"])));
        }
    });
    node.wait_for("all to end", |node| node.operations("expand").iter().all(|found| found["state"] == "succeeded").then_some(()));
    assert_eq!((size(&node, "vm1"), device_size(&node, "vm1"), replica_sizes(&node, 3)), (13 * GIB, Some(13 * GIB), vec![13 * GIB; 3]));
}

#[test]
fn a_daemon_that_dies_at_any_step_finishes_with_the_next_one() {
    for step in ["replicas", "record", "device"] {
        let mut node = Node::new(3);
        node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
        node.carrick(&["attach", "vm1"]).ok();
        node.kill_daemon();
        node.options = vec!["--crash-at", step];
        node.start();
        // Whether there is an answer before it dies is a matter of luck.
        drop(node.carrick(&["volume", "expand", "vm1", "2G"]));
        node.wait_crash();
        node.options.clear();
        node.start();
        assert_eq!(wait_ended(&node)["state"], "succeeded", "{step}");
        assert_eq!((size(&node, "vm1"), device_size(&node, "vm1")), (2 * GIB, Some(2 * GIB)), "{step}");
        assert_eq!(replica_sizes(&node, 3), [2 * GIB; 3], "{step}");
    }
}

#[test]
fn a_store_without_room_leaves_the_volume_as_it_was_and_another_attempt_works() {
    let node = Node::new(2);
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1"]).ok();
    node.carrick(&["volume", "create", "large", "--size", "98G", "--replicas", "1"]).ok();
    node.carrick(&["volume", "create", "large2", "--size", "97G", "--replicas", "1"]).ok();
    let message = node.carrick(&["volume", "expand", "vm1", "4G"]).fails(6, "NO_SPACE");
    assert!(message.contains("needs 3 GiB more"), "{message}");
    assert_eq!((size(&node, "vm1"), node.operations("expand").len()), (GIB, 0));
    node.carrick(&["volume", "delete", "large"]).ok();
    node.carrick(&["volume", "delete", "large2"]).ok();
    node.carrick(&["volume", "expand", "vm1", "4G", "--wait"]).ok();
    assert_eq!(size(&node, "vm1"), 4 * GIB);
}

#[test]
fn a_store_that_gets_full_in_the_middle_leaves_the_volume_as_it_was_too() {
    let node = Node::new(3);
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let mut stores: Vec<_> = volume["replicas"].as_array().unwrap().iter().map(|replica| replica["store"].as_str().unwrap()).collect();
    stores.sort_unstable();
    // The first one has grown when the last one gets full.
    let place =
        |id: &str| (0..3).find(|number| node.carrick(&["store", "show", node.store_path(*number).to_str().unwrap()]).ok()["id"] == id);
    std::fs::write(node.store_path(place(stores[0]).unwrap()).join("slow"), "").unwrap();
    let client = node.carrick_begin(&["volume", "expand", "vm1", "4G", "--wait"]);
    node.wait_for("the first replica to grow", |node| (replica_sizes(node, 3) == [GIB, GIB, 4 * GIB]).then_some(()));
    node.carrick(&["volume", "create", "filler", "--size", "98G", "--store", stores[2]]).ok();
    let message = Answer::from(client.wait_with_output().unwrap()).fails(6, "NO_SPACE");
    assert!(message.contains("no room in store"), "{message}");
    assert_eq!(node.operation("expand"), ["failed", "replicas", "NO_SPACE"]);
    assert_eq!((size(&node, "vm1"), device_size(&node, "vm1")), (GIB, Some(GIB)));
    assert_eq!(node.carrick(&["explain", "vm1"]).ok()["findings"], serde_json::json!([]), "it is used as before");
    // The same again finds what is done, and does the rest.
    node.carrick(&["volume", "delete", "filler"]).ok();
    node.carrick(&["volume", "expand", "vm1", "4G", "--wait"]).ok();
    assert_eq!((size(&node, "vm1"), device_size(&node, "vm1"), replica_sizes(&node, 3)), (4 * GIB, Some(4 * GIB), vec![4 * GIB; 3]));
}

#[test]
fn a_replica_that_is_away_grows_when_it_is_back() {
    let node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    let away = node.pids("replica")[0];
    signal(away, Signal::STOP);
    let answer = node.carrick(&["volume", "expand", "vm1", "2G", "--wait"]).ok();
    assert_eq!(answer["away_stores"].as_array().unwrap().len(), 1, "{answer}");
    assert!(answer["operation"]["notes"][0].as_str().unwrap().contains("becomes larger when it is back"), "{answer}");
    assert_eq!((size(&node, "vm1"), replica_sizes(&node, 3)), (2 * GIB, vec![GIB, 2 * GIB, 2 * GIB]));
    signal(away, Signal::CONT);
    node.wait_for("the replica to grow", |node| (replica_sizes(node, 3) == [2 * GIB; 3]).then_some(()));
}

#[test]
fn an_operation_that_waits_says_why_and_can_be_cancelled() {
    let mut node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    let away: Vec<u32> = node.pids("replica")[..2].to_vec();
    node.kill_daemon();
    node.options = vec!["--crash-at", "replicas"];
    node.start();
    drop(node.carrick(&["volume", "expand", "vm1", "2G"]));
    node.wait_crash();
    away.iter().for_each(|pid| signal(*pid, Signal::STOP));
    node.options.clear();
    node.start();
    // First it knows of no store at all.
    let is_waiting = |found: &Value| found["message"].as_str().is_some_and(|why| why.starts_with("1 of the 3 replicas"));
    let waiting = node.wait_for("it to wait", |node| node.operations("expand").into_iter().next().filter(is_waiting));
    assert_eq!((waiting["state"].as_str(), waiting["reason"].as_str()), (Some("running"), Some("STORE_UNREACHABLE")), "{waiting}");
    let problems = node.carrick(&["status"]).ok()["problems"].to_string();
    assert!(problems.contains("becomes larger (2 GiB) waits: 1 of the 3 replicas"), "{problems}");
    let found = node.carrick(&["explain", "vm1"]).ok()["findings"].as_array().unwrap().clone();
    let reasons: Vec<_> = found.iter().map(|finding| finding["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["STORE_UNREACHABLE", "REPLICA_AWAY", "REPLICA_AWAY"], "{found:?}");
    let id = waiting["id"].as_str().unwrap();
    assert_eq!(node.carrick(&["operation", "cancel", id]).ok()["state"], "cancelled");
    away.iter().for_each(|pid| signal(*pid, Signal::CONT));
    assert_eq!(size(&node, "vm1"), GIB);
    // Larger replicas harm nobody, and the next attempt finds them.
    node.wait_for("the stores to answer", |node| {
        let answer = node.carrick(&["volume", "expand", "vm1", "3G", "--dry-run"]).ok();
        answer["away_stores"].as_array().unwrap().is_empty().then_some(())
    });
    node.carrick(&["volume", "expand", "vm1", "3G", "--wait"]).ok();
    assert_eq!((size(&node, "vm1"), replica_sizes(&node, 3)), (3 * GIB, vec![3 * GIB; 3]));
}
