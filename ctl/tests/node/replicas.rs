//! Replicas that are replaced, given up, added and compared.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;

use super::support::{Node, signal};

/// Waits until the replicas that leave are deleted.
fn wait_left(node: &Node) {
    node.wait_for("the replicas that leave to be deleted", |node| {
        let shown = node.carrick(&["volume", "show", "vm1"]).ok();
        shown["leaving_stores"].as_array().is_none_or(Vec::is_empty).then_some(())
    });
}

#[test]
fn what_the_node_allows_to_be_copied_is_shared_by_volumes_that_may_copy() {
    let mut node = Node::new(3);
    let volumes = ["paced1", "paced2"].map(|name| {
        let volume = node.carrick(&["volume", "create", name, "--size", "1G"]).ok();
        node.carrick(&["attach", name]).ok();
        volume
    });
    let file = |node: &Node, volume: &Value| node.run(&format!("target/{}.rate", volume["id"].as_str().unwrap()));
    let rates = |node: &Node| {
        let rate = |volume: &Value| fs::read_to_string(file(node, volume)).unwrap_or_default();
        volumes.each_ref().map(|volume| rate(volume).parse::<u64>().unwrap_or(u64::MAX) >> 20)
    };
    let wait = |node: &Node, wanted| node.wait_for("the targets to be told", |node| (rates(node) == wanted).then_some(()));
    assert_eq!(rates(&node), [0, 0]);
    node.kill_daemon();
    node.options = vec!["--rebuild-rate", "80M"];
    node.start();
    wait(&node, [80, 80]);
    assert_eq!(node.carrick(&["status"]).ok()["rebuild_rate"], 80 << 20);
    node.leave_out(&volumes[0], volumes[0]["replicas"][1]["store"].as_str().unwrap());
    wait(&node, [80, 40]);
    node.leave_out(&volumes[1], volumes[1]["replicas"][1]["store"].as_str().unwrap());
    wait(&node, [40, 40]);
    node.carrick(&["volume", "set", "paced1", "rebuild-rate=10M"]).ok();
    wait(&node, [10, 40]);
    // A target that starts has it from its first moment.
    volumes.iter().for_each(|volume| fs::remove_file(file(&node, volume)).unwrap());
    node.pids("target").into_iter().for_each(|pid| signal(pid, Signal::KILL));
    wait(&node, [10, 40]);
    node.carrick(&["detach", "paced2"]).ok();
    node.carrick(&["volume", "set", "paced1", "rebuild-rate=none"]).ok();
    node.wait_for("the other to share it still: it is copied to although nobody uses it", |node| (rates(node) == [40, 40]).then_some(()));
    node.take_back(&volumes[1]);
    node.wait_for("the other to have it alone", |node| (rates(node)[0] == 80).then_some(()));
}

#[test]
fn a_replica_that_no_longer_counts_is_replaced_in_another_store() {
    let node = Node::new(4);
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let stores = |volume: &Value| -> Vec<String> {
        volume["replicas"].as_array().unwrap().iter().map(|replica| replica["store"].as_str().unwrap().to_owned()).collect()
    };
    let (before, target) = (stores(&volume), node.pids("target"));
    node.leave_out(&volume, &before[1]);

    node.carrick(&["volume", "replace", "vm1", "/nonexistent"]).fails(3, "STORE_NOT_FOUND");
    node.carrick(&["volume", "replace", "vm1", &before[1], "--with", &before[0]]).fails(2, "INVALID_FIELD");
    let shown = node.carrick(&["volume", "replace", "vm1", &before[1]]).ok();
    let after = stores(&shown);
    assert_eq!((&after[0], &after[2]), (&before[0], &before[2]), "in the same place");
    assert!(!before.contains(&after[1]), "{after:?}");
    wait_left(&node);
    assert_eq!(node.replicas_in_all(4), 3);
    node.wait_for("a target that knows it", |node| (!node.pids("target").is_empty() && node.pids("target") != target).then_some(()));
    // The store that lost it may be taken away now; the other may not.
    node.carrick(&["store", "remove", &before[1]]).ok();
    node.carrick(&["store", "remove", &after[1]]).fails(5, "STORE_IN_USE");
    assert_eq!(node.operation("replace"), ["running", "copy", ""]);
    node.take_back(&shown);
    assert_eq!(node.operation("replace"), ["succeeded", "copy", ""]);
}

/// Only the target knows what was acknowledged: if it were killed, to be told of another replica, the next one would go on with less.
#[test]
fn a_target_whose_replicas_have_all_lost_something_lives_until_the_operator_decides() {
    let node = Node::new(4);
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let (old, target) = (volume["replicas"][1]["store"].as_str().unwrap(), node.pids("target"));
    node.leave_out(&volume, old);
    std::fs::write(node.run("lost"), "").unwrap();
    let message = node.carrick(&["volume", "replace", "vm1", old]).fails(5, "VOLUME_NOT_READY");
    assert!(message.contains("volume vm1 gets no other replica as long as requests wait"), "{message}");
    assert_eq!((node.operation("replace"), node.pids("target")), (["running", "make", "VOLUME_NOT_READY"].map(Into::into), target.clone()));
    let told = node.carrick(&["explain", "vm1"]).ok()["findings"].to_string();
    assert!(told.contains("gets no other replica"), "{told}");
    node.carrick(&["detach", "--force", "vm1"]).ok();
    std::fs::remove_file(node.run("lost")).unwrap();
    node.carrick(&["attach", "vm1"]).ok();
    node.wait_for("the new replica to be told of", |node| (node.operation("replace")[1] == "copy").then_some(()));
}

#[test]
fn a_volume_whose_counting_replicas_are_lost_is_salvaged_only_if_that_is_said() {
    let node = Node::new(3);
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "2"]).ok();
    let stores: Vec<&str> = volume["replicas"].as_array().unwrap().iter().map(|replica| replica["store"].as_str().unwrap()).collect();
    let salvage = |from: &str| node.carrick(&["volume", "salvage", "vm1", "--from", from, "--give-up-the-rest"]);
    let message = node.carrick(&["volume", "salvage", "vm1", "--from", stores[0]]).fails(2, "INVALID_FIELD");
    assert!(message.contains("lost for ever") && message.contains("--give-up-the-rest"), "{message}");
    let message = salvage(stores[0]).fails(5, "NOTHING_TO_SALVAGE");
    assert!(message.contains("2 of the 2 replicas"), "{message}");
    salvage("/nonexistent").fails(3, "STORE_NOT_FOUND");
    let other = (0..3).map(|number| node.store_path(number)).find(|path| {
        let id = node.carrick(&["store", "show", path.to_str().unwrap()]).ok()["id"].as_str().unwrap().to_owned();
        !stores.contains(&id.as_str())
    });
    salvage(other.unwrap().to_str().unwrap()).fails(2, "INVALID_FIELD");

    // One of the two is gone: nobody can say that the other has everything.
    let processes = node.carrick(&["status"]).ok()["processes"].clone();
    let lost = processes.as_array().unwrap().iter().find(|process| process["subject"] == stores[1]).unwrap();
    signal(u32::try_from(lost["pid"].as_u64().unwrap()).unwrap(), Signal::STOP);
    let shown = salvage(stores[0]).ok();
    assert_eq!(shown["replicas"].as_array().unwrap().len(), 1);
    assert_eq!(shown["salvages"][0]["given_up_stores"].as_array().unwrap().len(), 1);
    assert_eq!(shown["leaving_stores"].as_array().unwrap().len(), 1);
    signal(u32::try_from(lost["pid"].as_u64().unwrap()).unwrap(), Signal::CONT);
    wait_left(&node);
    assert_eq!(node.replicas_in_all(3), 1);
    // With more replicas it is as before.
    assert_eq!(node.carrick(&["volume", "add-replica", "vm1"]).ok()["replicas"].as_array().unwrap().len(), 2);
    let shown = node.carrick(&["volume", "add-replica", "vm1"]).ok();
    assert_eq!(shown["replicas"].as_array().unwrap().iter().filter(|replica| replica["counts"] == true).count(), 1);
    node.carrick(&["volume", "add-replica", "vm1"]).fails(5, "TOO_FEW_STORES");
}

#[test]
fn replicas_are_compared_where_a_target_runs_and_differences_are_told() {
    let mut node = Node::new(3);
    for name in ["vm1", "differs1"] {
        node.carrick(&["volume", "create", name, "--size", "1G"]).ok();
        node.carrick(&["volume", "verify", name]).fails(5, "VOLUME_NOT_ATTACHED");
        node.carrick(&["attach", name]).ok();
    }
    node.carrick(&["volume", "verify", "vm2"]).fails(3, "VOLUME_NOT_FOUND");
    node.carrick(&["volume", "create", "single", "--size", "1G", "--replicas", "1"]).ok();
    node.carrick(&["volume", "verify", "single"]).fails(5, "NOTHING_TO_VERIFY");
    assert_eq!(node.carrick(&["volume", "show", "vm1"]).ok()["attachment"]["verification"], serde_json::Value::Null);
    let shown = node.carrick(&["volume", "verify", "vm1", "--wait"]).ok();
    let found = &shown["attachment"]["verification"];
    assert_eq!((&found["running"], &found["compared_bytes"], &found["unsettled_blocks"]), (&false.into(), &(1 << 30).into(), &0.into()));
    let message = node.carrick(&["volume", "verify", "differs1", "--wait"]).fails(1, "REPLICAS_DIFFER");
    assert!(message.contains("1 differ and nobody can tell which is right (at bytes 12288)"), "{message}");
    let problems = node.carrick(&["status"]).ok()["problems"].to_string();
    assert!(problems.contains("volume differs1: its replicas differ in 1 blocks"), "{problems}");
    // The next target knows nothing of it; the records do.
    let last = |node: &Node, name: &str| node.carrick(&["volume", "show", name]).ok()["last_verification"].clone();
    for name in ["vm1", "differs1"] {
        node.wait_for("what came of it to be written down", |node| last(node, name).is_object().then_some(()));
        node.carrick(&["detach", name]).ok();
    }
    node.kill_daemon();
    node.start();
    assert_eq!(last(&node, "vm1")["unsettled_blocks"], 0);
    assert_eq!(last(&node, "differs1")["unsettled_blocks"], 1);
    let problems = node.carrick(&["status"]).ok()["problems"].to_string();
    assert!(problems.contains("volume differs1: its replicas differ in 1 blocks"), "{problems}");
    assert_eq!(node.carrick(&["explain", "differs1"]).ok()["findings"][0]["reason"], "REPLICAS_DIFFER");
    let events = node.carrick(&["events", "vm1"]).ok().to_string();
    assert!(events.contains("its replicas were compared: no difference"), "{events}");
}

#[test]
fn attached_volumes_are_compared_by_themselves_now_and_then() {
    let mut node = Node::new(3);
    for name in ["vm1", "unused"] {
        node.carrick(&["volume", "create", name, "--size", "1G"]).ok();
    }
    node.carrick(&["attach", "vm1"]).ok();
    let when = |node: &Node, name: &str| node.carrick(&["volume", "show", name]).ok()["last_verification"]["at_unix"].as_u64();
    assert_eq!(when(&node, "vm1"), None, "a new volume isn't compared for a week");
    node.kill_daemon();
    node.options = vec!["--verify-every", "2s"];
    node.start();
    let first = node.wait_for("the first comparison", |node| when(node, "vm1"));
    node.wait_for("the next one", |node| when(node, "vm1").filter(|at| *at >= first + 2));
    assert_eq!(when(&node, "unused"), None);
}
