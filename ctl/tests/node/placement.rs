//! What may come to the node and to its stores, and replicas that move.

use carrick_backing_store::StoreId;
use rustix::process::Signal;
use serde_json::Value;

use super::support::{Node, signal};

fn stores(volume: &Value) -> Vec<StoreId> {
    volume["replicas"].as_array().unwrap().iter().map(|replica| replica["store"].as_str().unwrap().parse().unwrap()).collect()
}

fn show(node: &Node) -> Value {
    node.carrick(&["volume", "show", "vm1"]).ok()
}

/// The newest operation that is so, once there is one.
fn operation(node: &Node, state: &str, step: &str) -> Value {
    node.wait_for("the operation", |node| {
        let operations = node.carrick(&["operation", "list"]).ok();
        operations.as_array().unwrap().iter().find(|found| found["state"] == state && found["step"] == step).cloned()
    })
}

/// What the target does once everything is copied: it takes the new replica in, and leaves the old one out.
fn take_in(node: &Node, volume: &Value, old: StoreId) {
    let new = *stores(&show(node)).last().unwrap();
    node.change_members(volume, |members| members.push(new));
    node.change_members(volume, |members| members.retain(|store| *store != old));
}

fn attached(node: &Node) -> Value {
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    volume
}

#[test]
fn a_store_is_emptied_while_its_volumes_are_used() {
    let node = Node::new(4);
    let volume = attached(&node);
    let [old, second, third] = stores(&volume)[..] else { panic!("{volume}") };
    let shown = node.carrick(&["store", "evict", &old.to_string()]).ok();
    assert_eq!(shown["placement"], "evicting");
    // Its target is being started anew at first.
    node.wait_for("the move to wait for the copy", |node| (operation(node, "running", "copy")["reason"] == "REPLICA_COUNTS").then_some(()));
    assert_eq!(operation(&node, "running", "copy")["kind"], "move");
    // All four are there until the new one counts, and the target knows which one is to go.
    let during = stores(&show(&node));
    assert_eq!((&during[..3], during.len()), (&[old, second, third][..], 4));
    let told = std::fs::read_to_string(node.run(&format!("target/{}.json", volume["id"].as_str().unwrap()))).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&told).unwrap()["retiring"], serde_json::json!([old]));
    let reasons = node.carrick(&["explain", "vm1"]).ok()["findings"].to_string();
    assert!(reasons.contains("REPLICA_COUNTS") && reasons.contains("goes to"), "{reasons}");
    // Another one of the volume's has to wait, the same is the same.
    node.carrick(&["volume", "replace", "vm1", &second.to_string()]).fails(5, "OPERATION_RUNS");
    node.carrick(&["volume", "replace", "vm1", &old.to_string()]).ok();
    assert_eq!(node.operations("move").len(), 1);
    // It may grow meanwhile.
    node.carrick(&["volume", "expand", "vm1", "2G", "--wait"]).ok();

    take_in(&node, &volume, old);
    operation(&node, "succeeded", "drop");
    assert_eq!(node.carrick(&["store", "evict", &old.to_string(), "--wait"]).ok()["volumes"], serde_json::json!([]));
    assert_eq!(stores(&show(&node)), [second, third, during[3]]);
    assert_eq!(node.replicas_in_all(4), 3);
    let kinds: Vec<String> =
        node.carrick(&["events", "vm1"]).ok().as_array().unwrap().iter().map(|event| event["kind"].to_string()).collect();
    for kind in ["REPLICA_RETIRING", "REPLICA_ADDED", "REPLICA_LEFT_OUT", "REPLICA_COUNTS", "REPLICA_DELETED", "OPERATION_SUCCEEDED"] {
        assert!(kinds.iter().any(|found| found.contains(kind)), "{kind}: {kinds:?}");
    }
    // Nothing comes to it, until that is allowed again.
    node.carrick(&["volume", "create", "vm2", "--size", "1G", "--replicas", "1", "--store", &old.to_string()]).fails(5, "STORE_DISABLED");
    let message = node.carrick(&["volume", "replace", "vm1", &second.to_string()]).fails(5, "TOO_FEW_STORES");
    assert!(message.contains("no other store"), "{message}");
    node.carrick(&["store", "enable", &old.to_string()]).ok();
    node.carrick(&["volume", "create", "vm2", "--size", "1G", "--replicas", "1", "--store", &old.to_string()]).ok();
}

#[test]
fn a_move_is_finished_by_the_next_daemon_whatever_step_the_last_one_died_at() {
    for step in ["make", "copy", "drop"] {
        let mut node = Node::new(4);
        let volume = attached(&node);
        let old = stores(&volume)[0];
        node.kill_daemon();
        node.options = vec!["--crash-at", step];
        node.start();
        drop(node.carrick(&["volume", "replace", "vm1", &old.to_string()]));
        if step == "drop" {
            // It gets there only when the old one no longer counts.
            operation(&node, "running", "copy");
            take_in(&node, &volume, old);
        }
        node.wait_crash();
        node.options.clear();
        node.start();
        if step != "drop" {
            operation(&node, "running", "copy");
            take_in(&node, &volume, old);
        }
        operation(&node, "succeeded", "drop");
        node.wait_for("the old one to be deleted", |node| (node.replicas_in_all(4) == 3).then_some(()));
        assert!(!stores(&show(&node)).contains(&old), "{step}");
        assert!(show(&node)["replicas"].as_array().unwrap().iter().all(|replica| replica["counts"] == true), "{step}");
    }
}

#[test]
fn a_move_is_taken_back_until_the_new_replica_counts() {
    let node = Node::new(4);
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    let before = stores(&volume);
    node.carrick(&["volume", "replace", "vm1", &before[1].to_string()]).ok();
    let waiting = node.wait_for("the move to say what it waits for", |node| {
        Some(operation(node, "running", "copy")).filter(|found| found["reason"] == "REPLICA_COUNTS")
    });
    node.carrick(&["operation", "cancel", waiting["id"].as_str().unwrap()]).ok();
    let unmade = |node: &Node| {
        node.wait_for("the new replica to be deleted", |node| (node.replicas_in_all(4) == 3).then_some(()));
    };
    unmade(&node);
    assert_eq!(stores(&show(&node)), before);
    // The new store is gone before its replica was made.
    let spare = (0..4).find(|store| node.replicas_in(*store) == 0).unwrap();
    let spare = node.carrick(&["store", "show", node.store_path(spare).to_str().unwrap()]).ok()["id"].as_str().unwrap().to_owned();
    node.carrick(&["attach", "vm1"]).ok();
    node.carrick(&["volume", "replace", "vm1", &before[1].to_string(), "--with", &spare]).ok();
    let moving = operation(&node, "running", "copy");
    node.carrick(&["operation", "cancel", moving["id"].as_str().unwrap()]).ok();
    unmade(&node);
    assert_eq!(stores(&show(&node)), before);
    // Once it counts, it stays.
    node.carrick(&["volume", "replace", "vm1", &before[1].to_string()]).ok();
    let moving = operation(&node, "running", "copy");
    let new = *stores(&show(&node)).last().unwrap();
    node.change_members(&volume, |members| members.push(new));
    node.carrick(&["operation", "cancel", moving["id"].as_str().unwrap()]).fails(5, "OPERATION_PAST_CANCELLING");
    node.change_members(&volume, |members| members.retain(|store| *store != before[1]));
    operation(&node, "succeeded", "drop");
}

#[test]
fn a_replica_that_is_larger_than_its_volume_is_in_no_moves_way() {
    let node = Node::new(4);
    let volume = attached(&node);
    // What an expansion leaves that was cancelled.
    for path in (0..4).flat_map(|store| std::fs::read_dir(node.store_path(store)).unwrap()).map(|entry| entry.unwrap().path()) {
        if path.extension().is_some_and(|extension| extension == "replica") {
            let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            spec["size"] = (2_u64 << 30).into();
            std::fs::write(&path, spec.to_string()).unwrap();
        }
    }
    let old = stores(&volume)[0];
    node.carrick(&["volume", "replace", "vm1", &old.to_string()]).ok();
    operation(&node, "running", "copy");
    take_in(&node, &volume, old);
    operation(&node, "succeeded", "drop");
    node.wait_for("the old one to be deleted", |node| (node.replicas_in_all(4) == 3).then_some(()));
    let findings = node.carrick(&["explain", "vm1"]).ok()["findings"].clone();
    assert!(!findings.to_string().contains("REPLICA_JOINING"), "{findings}");
}

#[test]
fn a_cancelled_move_out_of_a_store_that_is_to_be_emptied_is_not_begun_again_at_once() {
    let node = Node::new(4);
    let volume = attached(&node);
    let old = stores(&volume)[0];
    node.carrick(&["store", "evict", &old.to_string()]).ok();
    let moving = operation(&node, "running", "copy");
    node.carrick(&["operation", "cancel", moving["id"].as_str().unwrap()]).ok();
    node.wait_for("explain to tell", |node| {
        node.carrick(&["explain", "vm1"]).ok()["findings"].to_string().contains("STORE_EVICTING").then_some(())
    });
    assert_eq!(node.operations("move").len(), 1);
}

#[test]
fn a_lost_replica_leaves_a_store_that_is_emptied_at_once_and_a_deleted_volume_ends_its_move() {
    let node = Node::new(4);
    let volume = attached(&node);
    let before = stores(&volume);
    node.leave_out(&volume, &before[2].to_string());
    node.carrick(&["store", "evict", &before[2].to_string()]).ok();
    node.wait_for("the lost one to be replaced", |node| (!stores(&show(node)).contains(&before[2])).then_some(()));
    assert_eq!(node.operations("move"), Vec::<Value>::new(), "there is nothing to be kept");
    let replaced = node.operations("replace").remove(0);
    assert_eq!((replaced["state"].as_str(), &replaced["from_store"]), (Some("running"), &volume["replicas"][2]["store_path"]));
    // Its place is taken, so the next one can't go before the first store may be used again.
    node.carrick(&["store", "evict", &before[0].to_string()]).ok();
    let told = node.wait_for("explain to tell", |node| {
        let findings = node.carrick(&["explain", "vm1"]).ok()["findings"].to_string();
        findings.contains("STORE_EVICTING").then_some(findings)
    });
    assert!(told.contains("has none yet"), "{told}");
    node.carrick(&["store", "enable", &before[2].to_string()]).ok();
    operation(&node, "running", "copy");
    node.carrick(&["detach", "vm1"]).ok();
    node.carrick(&["volume", "delete", "vm1"]).ok();
    assert_eq!(node.operations("move")[0]["state"], "cancelled");
    node.wait_for("all replicas to be deleted", |node| (node.replicas_in_all(4) == 0).then_some(()));
}

#[test]
fn a_store_takes_no_more_than_its_limit_and_warns_before() {
    let node = Node::new(1);
    let path = node.store_path(0).to_str().unwrap().to_owned();
    let capacity = node.carrick(&["store", "show", &path]).ok()["usage"]["capacity_bytes"].as_u64().unwrap();
    let quarter = (capacity / 4).to_string();
    node.carrick(&["volume", "create", "vm1", "--size", &quarter, "--replicas", "1"]).ok();
    for (wrong, field) in [("0", "limit_percent"), ("101", "limit_percent")] {
        let message = node.carrick(&["store", "set", &path, "--limit", wrong]).fails(2, "INVALID_FIELD");
        assert!(message.contains("1 to 100"), "{field}: {message}");
    }
    let set = node.carrick(&["store", "set", &path, "--limit", "40", "--warn", "20"]).ok();
    assert_eq!((&set["limit_percent"], &set["warning_percent"]), (&40.into(), &20.into()), "{set}");
    assert!(set["warning"].as_str().unwrap().contains("the warning mark is 20 %"), "{set}");
    assert!(node.carrick(&["status"]).ok()["problems"].to_string().contains("the warning mark is 20 %"));
    // What is there stays; more is refused.
    node.carrick(&["volume", "expand", "vm1", &(capacity / 2 / 4096 * 4096).to_string()]).fails(6, "NO_SPACE");
    node.carrick(&["volume", "create", "vm2", "--size", &quarter, "--replicas", "1"]).fails(6, "NO_SPACE");
    node.carrick(&["store", "set", &path, "--limit", "100", "--warn", "90"]).ok();
    assert_eq!(node.carrick(&["store", "show", &path]).ok()["warning"], Value::Null);
    node.carrick(&["volume", "create", "vm2", "--size", &quarter, "--replicas", "1"]).ok();
}

#[test]
fn a_node_refuses_what_it_is_told_to_and_gives_up_what_nobody_uses() {
    let mut node = Node::new(3);
    attached(&node);
    node.carrick(&["volume", "create", "vm2", "--size", "1G"]).ok();
    assert_eq!(node.carrick(&["node", "disable", "--targets"]).ok()["takes_replicas"], true);
    let message = node.carrick(&["attach", "vm2"]).fails(5, "NODE_DISABLED");
    assert!(message.contains("carrick node enable"), "{message}");
    // What is attached stays so, and more replicas may come.
    node.carrick(&["attach", "vm1"]).ok();
    node.carrick(&["volume", "create", "vm3", "--size", "1G"]).ok();
    node.carrick(&["node", "enable"]).ok();
    node.carrick(&["node", "disable", "--replicas"]).ok();
    node.carrick(&["volume", "create", "vm4", "--size", "1G"]).fails(5, "NODE_DISABLED");
    node.carrick(&["volume", "create", "vm4", "--size", "1G", "--store", node.store_path(0).to_str().unwrap(), "--replicas", "1"])
        .fails(5, "NODE_DISABLED");
    node.carrick(&["attach", "vm2"]).ok();
    // That outlives a crash.
    node.kill_daemon();
    node.start();
    let shown = node.carrick(&["node", "show"]).ok();
    assert_eq!((&shown["takes_targets"], &shown["takes_replicas"]), (&true.into(), &false.into()), "{shown}");
    assert_eq!(shown["attached_volumes"], serde_json::json!(["vm1", "vm2"]));
    let told = node.own_events();
    assert_eq!(told.iter().filter(|kind| *kind == "NODE_CHANGED").count(), 3, "{told:?}");

    let drained = node.carrick(&["node", "drain"]).ok();
    assert_eq!(drained["detached_volumes"], serde_json::json!(["vm1", "vm2"]), "{drained}");
    assert_eq!(drained["node"]["takes_targets"], false);
    node.carrick(&["node", "drain"]).ok();
    node.carrick(&["node", "enable"]).ok();
    // One that can't be detached is told, and keeps its device.
    node.carrick(&["attach", "vm1"]).ok();
    let target = node.pids("target")[0];
    signal(target, Signal::STOP);
    let message = node.carrick(&["node", "drain"]).fails(5, "DEVICE_BUSY");
    assert!(message.contains("1 volumes are still attached; vm1"), "{message}");
    signal(target, Signal::CONT);
    assert_eq!(node.carrick(&["node", "show"]).ok()["attached_volumes"], serde_json::json!(["vm1"]));
}
