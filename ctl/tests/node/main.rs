//! The whole control plane over stand-ins: what an operator does, and what survives which death.
//!
//! Each test has a node of its own in a temporary folder, needs no root, and waits for states, never for times.

#[expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]
mod events;
#[expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]
mod expand;
#[expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]
mod health;
#[expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]
mod placement;
mod replicas;
#[expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]
mod support;
#[expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]
mod tending;
#[expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]
mod upgrade;

use std::fs;

use rustix::process::Signal;
use support::{Answer, Node, alive, signal};

#[test]
fn a_volume_lives_from_creation_to_deletion() {
    let node = Node::new(3);
    let volume = node.carrick(&["volume", "create", "vm1", "--size", "20G"]).ok();
    assert_eq!((volume["size_bytes"].as_u64(), volume["state"].as_str()), (Some(20 << 30), Some("ready")));
    assert_eq!(volume["replicas"].as_array().unwrap().len(), 3);
    assert_eq!(node.replicas_in_all(3), 3);

    assert_eq!(node.carrick(&["attach", "vm1"]).ok()["device"], "/dev/ublkb7");
    let volume = node.carrick(&["volume", "show", "vm1"]).ok();
    assert_eq!(volume["attachment"]["phase"], "serving");
    assert!(volume["replicas"].as_array().unwrap().iter().all(|replica| replica["state"] == "in-sync"), "{volume}");
    let message = node.carrick(&["volume", "delete", "vm1"]).fails(5, "VOLUME_ATTACHED");
    assert!(message.contains("/dev/ublkb7") && message.contains("carrick detach vm1"), "{message}");

    node.carrick(&["detach", "vm1"]).ok();
    node.carrick(&["detach", "vm1"]).ok();
    assert_eq!(fs::read_dir(node.run("target")).unwrap().count(), 0, "the target left something");
    let logs =
        || fs::read_dir(node.path("state/log")).unwrap().flatten().filter(|log| log.file_name().to_string_lossy().starts_with("target"));
    assert_eq!(logs().count(), 1);
    node.carrick(&["volume", "delete", "vm1"]).ok();
    assert_eq!(node.replicas_in_all(3), 0);
    assert_eq!(logs().count(), 0, "its target's log is left");
    node.carrick(&["volume", "show", "vm1"]).fails(3, "VOLUME_NOT_FOUND");
    node.carrick(&["volume", "delete", "vm1"]).fails(3, "VOLUME_NOT_FOUND");
    assert_eq!(node.carrick(&["volume", "list"]).ok().as_array().unwrap().len(), 0);
}

#[test]
fn creating_again_is_the_same_or_a_conflict_that_names_the_difference() {
    let node = Node::new(3);
    let create = |more: &[&str]| node.carrick(&[&["volume", "create", "vm1"], more].concat());
    let first = create(&["--size", "1G"]).ok();
    assert_eq!(create(&["--size", "1024M", "--replicas", "3", "--block-size", "512"]).ok()["id"], first["id"]);
    for (request, difference) in [
        (&["--size", "2G"][..], "another size: 1 GiB (1073741824 bytes), not 2 GiB"),
        (&["--size", "1G", "--replicas", "2"], "another number of replicas: 3, not 2"),
        (&["--size", "1G", "--block-size", "4096"], "another block size: 512, not 4096"),
    ] {
        let message = create(request).fails(4, "VOLUME_EXISTS");
        assert!(message.contains(difference), "{message}");
    }
}

#[test]
fn requests_that_make_no_sense_name_the_field() {
    let node = Node::new(1);
    let refused = |arguments: &[&str], field: &str| {
        let answer = node.carrick(&[&["volume", "create"], arguments].concat());
        assert_eq!(answer.json["subject"], field, "{}", answer.text);
        answer.fails(2, "INVALID_FIELD");
    };
    refused(&["vm1", "--size", "0"], "size_bytes");
    refused(&["vm1", "--size", "4097"], "size_bytes");
    refused(&["vm1", "--size", "5P"], "size_bytes");
    refused(&["a/b", "--size", "1G"], "name");
    refused(&["vm1", "--size", "1G", "--replicas", "4"], "replicas");
    refused(&["vm1", "--size", "1G", "--block-size", "1024"], "block_size");
    let store = node.store_path(0);
    let store = store.to_str().unwrap();
    refused(&["vm1", "--size", "1G", "--store", store, "--store", store], "stores");
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--store", "/nonexistent"]).fails(3, "STORE_NOT_FOUND");
    let message = node.carrick(&["volume", "create", "vm1", "--size", "1G"]).fails(5, "TOO_FEW_STORES");
    assert!(message.contains("3 stores are needed for 3 replicas, there are 1"), "{message}");
    node.carrick(&["attach", "vm1", "--queue-depth", "513"]).fails(2, "INVALID_FIELD");
    node.carrick(&["attach", "vm1"]).fails(3, "VOLUME_NOT_FOUND");
}

#[test]
fn a_rebuild_rate_is_set_shown_kept_and_lifted() {
    let mut node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    assert_eq!(node.carrick(&["volume", "set", "vm1", "rebuild-rate=50M"]).ok()["rebuild_rate"], 50 << 20);
    node.kill_daemon();
    node.start();
    assert_eq!(node.carrick(&["volume", "show", "vm1"]).ok()["rebuild_rate"], 50 << 20);
    node.carrick(&["volume", "set", "vm1", "rebuild-rate=512K"]).fails(2, "INVALID_FIELD");
    node.carrick(&["volume", "set", "vm2", "rebuild-rate=none"]).fails(3, "VOLUME_NOT_FOUND");
    for wrong in ["rebuild-rate", "rebuild-rate=fast", "colour=blue"] {
        let answer = node.carrick(&["volume", "set", "vm1", wrong]);
        assert!(answer.text.contains("rebuild-rate"), "{}", answer.text);
        answer.fails(2, "USAGE");
    }
    assert_eq!(node.carrick(&["volume", "set", "vm1", "rebuild-rate=none"]).ok()["rebuild_rate"], 0);
}

#[test]
fn limits_are_set_shown_kept_changed_and_lifted() {
    let mut node = Node::new(3);
    let id = node.carrick(&["volume", "create", "limited1", "--size", "1G"]).ok()["id"].as_str().unwrap().to_owned();
    node.carrick(&["attach", "limited1"]).ok();
    // Under which the target serves, by its own word.
    let served = |node: &Node| fs::read_to_string(node.run(&format!("target/{id}.limits"))).unwrap();
    assert_eq!(served(&node), "{}");
    let targets = node.pids("target");
    let shown = node.carrick(&["volume", "set", "limited1", "iops=500", "bandwidth=50M", "bandwidth-burst=1G"]).ok();
    assert_eq!((&shown["iops"], &shown["iops_burst"]), (&500.into(), &0.into()));
    assert_eq!((&shown["bandwidth"], &shown["bandwidth_burst"]), (&(50_u64 << 20).into(), &(1_u64 << 30).into()));
    assert_eq!((&shown["attachment"]["delayed_requests"], &shown["attachment"]["delayed_micros"]), (&3.into(), &4500.into()));
    assert_eq!(served(&node), r#"{"iops":500,"bandwidth":52428800,"bandwidth_burst":1073741824}"#);
    // One is changed, the rest stays; the daemon's death changes nothing.
    node.carrick(&["volume", "set", "limited1", "iops=1000", "iops-burst=20"]).ok();
    node.kill_daemon();
    node.start();
    assert_eq!(node.pids("target"), targets, "the same target all the time");
    let wanted = r#"{"iops":1000,"iops_burst":20,"bandwidth":52428800,"bandwidth_burst":1073741824}"#;
    assert_eq!(served(&node), wanted);
    // A new target begins with them.
    fs::remove_file(node.run(&format!("target/{id}.limits"))).unwrap();
    node.carrick(&["detach", "limited1"]).ok();
    node.carrick(&["attach", "limited1"]).ok();
    assert_eq!(served(&node), wanted);
    // Lifted along with its burst.
    let shown = node.carrick(&["volume", "set", "limited1", "iops=none", "bandwidth-burst=none"]).ok();
    assert_eq!((&shown["iops"], &shown["iops_burst"], &shown["bandwidth_burst"]), (&0.into(), &0.into(), &0.into()));
    assert_eq!(served(&node), r#"{"bandwidth":52428800}"#);
    node.carrick(&["volume", "set", "limited1", "bandwidth=none"]).ok();
    assert_eq!(served(&node), "{}");
}

#[test]
fn limits_that_cannot_be_are_refused_by_name_and_nothing_changes() {
    let node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["volume", "set", "vm1", "iops=500"]).ok();
    let before = node.carrick(&["volume", "show", "vm1"]).ok();
    for (settings, field) in [
        (&["iops=0"][..], "iops"),
        (&["bandwidth=50M", "iops=9"], "iops"),
        (&["iops=100000001"], "iops"),
        (&["iops-burst=0"], "iops_burst"),
        (&["iops=none", "iops-burst=5"], "iops_burst"),
        (&["bandwidth=0"], "bandwidth"),
        (&["bandwidth=512K"], "bandwidth"),
        (&["iops=600", "bandwidth=2T"], "bandwidth"),
        (&["bandwidth-burst=1M"], "bandwidth_burst"),
        (&["bandwidth=1M", "bandwidth-burst=2T"], "bandwidth_burst"),
    ] {
        let answer = node.carrick(&[&["volume", "set", "vm1"], settings].concat());
        assert_eq!(answer.json["subject"], field, "{}", answer.text);
        answer.fails(2, "INVALID_FIELD");
    }
    for wrong in ["iops=fast", "iops=1.5", "iops=-1", "bandwidth=fast"] {
        let answer = node.carrick(&["volume", "set", "vm1", wrong]);
        assert!(answer.text.contains(wrong.split('=').next().unwrap()), "{}", answer.text);
        answer.fails(2, "USAGE");
    }
    node.carrick(&["volume", "set", "vm2", "iops=500"]).fails(3, "VOLUME_NOT_FOUND");
    assert_eq!(node.carrick(&["volume", "show", "vm1"]).ok(), before);
}

#[test]
fn a_full_store_fails_the_creation_and_nothing_of_it_is_left() {
    let node = Node::new(3);
    let store = node.store_path(2);
    let filler = ["volume", "create", "filler", "--size", "90G", "--store", store.to_str().unwrap()];
    node.carrick(&filler).ok();
    let message = node.carrick(&["volume", "create", "vm1", "--size", "20G"]).fails(6, "NO_SPACE");
    assert!(message.contains("/store2") && message.contains("21474836480 bytes are needed, 10737418240 are free"), "{message}");
    assert_eq!([0, 1, 2].map(|store| node.replicas_in(store)), [0, 0, 1]);
    node.carrick(&["volume", "show", "vm1"]).fails(3, "VOLUME_NOT_FOUND");
    // Those with the most room are taken.
    node.carrick(&["volume", "create", "vm1", "--size", "20G", "--replicas", "2"]).ok();
    assert_eq!([0, 1, 2].map(|store| node.replicas_in(store)), [1, 1, 1]);
}

#[test]
fn stores_are_added_once_and_only_if_they_are_empty_or_ours() {
    let node = Node::new(2);
    let first = node.add_store(0);
    assert_eq!(first["process"], "running");
    assert_eq!(node.carrick(&["store", "list"]).ok().as_array().unwrap().len(), 2);
    let foreign = node.path("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("letter"), "dear diary").unwrap();
    let message = node.carrick(&["store", "add", foreign.to_str().unwrap()]).fails(5, "STORE_UNUSABLE");
    assert!(message.contains("is not a Carrick store"), "{message}");
    let message = node.carrick(&["store", "add", "/nonexistent"]).fails(2, "INVALID_FIELD");
    assert!(message.contains("mount the disk"), "{message}");
    let path = node.store_path(0);
    node.carrick(&["store", "add", path.to_str().unwrap(), "--listen", "127.0.0.1:7100"]).fails(4, "STORE_EXISTS");
    node.carrick(&["store", "add", path.to_str().unwrap(), "--listen", "localhost"]).fails(2, "INVALID_FIELD");

    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1", "--store", path.to_str().unwrap()]).ok();
    let message = node.carrick(&["store", "remove", path.to_str().unwrap()]).fails(5, "STORE_IN_USE");
    assert!(message.contains("vm1"), "{message}");
    node.carrick(&["volume", "delete", "vm1"]).ok();
    let id = first["id"].as_str().unwrap();
    node.carrick(&["store", "remove", &id[..8]]).ok();
    assert_eq!(node.pids("replica").len(), 1);
    node.carrick(&["store", "remove", id]).fails(3, "STORE_NOT_FOUND");
    // It is ours still, with the same identity.
    assert_eq!(node.add_store(0)["id"], first["id"]);
}

#[test]
fn a_store_shows_its_room_and_a_poisoned_one_is_a_problem_that_nobody_overlooks() {
    let node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "10G"]).ok();
    let path = node.store_path(1);
    let path = path.to_str().unwrap();
    let store = node.carrick(&["store", "show", path]).ok();
    assert_eq!((store["usage"]["free_bytes"].as_u64(), store["usage"]["reserved_bytes"].as_u64()), (Some(100 << 30), Some(10 << 30)));
    assert_eq!((&store["poisoned"], &store["problem"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    assert_eq!(node.carrick(&["store", "show", &store["id"].as_str().unwrap()[..8]]).ok(), store);
    node.carrick(&["store", "show", "/nonexistent"]).fails(3, "STORE_NOT_FOUND");

    fs::write(node.store_path(1).join("poisoned"), "a sync failed: Input/output error").unwrap();
    let store = node.carrick(&["store", "show", path]).ok();
    assert_eq!(store["poisoned"], "a sync failed: Input/output error");
    let problems = node.carrick(&["status"]).ok()["problems"].to_string();
    for words in ["/store1: it takes no more operations: a sync failed", "volume vm1: the replica in", "is refusing"] {
        assert!(problems.contains(words), "{words:?}: {problems}");
    }
    // It gets no new replicas.
    let message = node.carrick(&["volume", "create", "vm2", "--size", "1G"]).fails(5, "TOO_FEW_STORES");
    assert!(message.contains("there are 2, and 1 that can't be used"), "{message}");
}

#[test]
fn a_store_gets_the_size_that_was_asked_for_when_it_is_formatted() {
    let node = Node::new(0);
    let path = node.store_path(0);
    fs::create_dir_all(&path).unwrap();
    let add = ["store", "add", path.to_str().unwrap(), "--size", "20G"];
    let store = node.carrick(&add).ok();
    assert_eq!(store["usage"]["capacity_bytes"], 20_u64 << 30);
    assert_eq!(node.carrick(&add).ok()["id"], store["id"]);
    node.carrick(&["store", "add", path.to_str().unwrap(), "--size", "20X"]).fails(2, "USAGE");
}

#[test]
fn a_dead_process_is_replaced_at_once_while_the_volume_stays_attached() {
    let node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    for kind in ["target", "replica"] {
        let before = node.pids(kind);
        signal(before[0], Signal::KILL);
        let after = node.wait_for("a new process", |node| Some(node.pids(kind)).filter(|now| now.len() == before.len() && *now != before));
        assert_eq!(after[1..], before[1..], "only the dead one is replaced");
        assert!(!alive(before[0]), "a zombie is left");
    }
    // Attaching again finds the device, also while the target comes back.
    signal(node.pids("target")[0], Signal::KILL);
    assert_eq!(node.carrick(&["attach", "vm1"]).ok()["device"], "/dev/ublkb7");
    node.carrick(&["attach", "vm1", "--host"]).fails(4, "ATTACHED_DIFFERENTLY");
    node.carrick(&["attach", "vm1", "--queue-depth", "64"]).fails(4, "ATTACHED_DIFFERENTLY");
    node.carrick(&["detach", "vm1"]).ok();
}

#[test]
fn a_killed_or_stopped_carrickd_leaves_everything_running_and_the_next_one_adopts_it() {
    let mut node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let before = [node.pids("replica"), node.pids("target")];
    for kill in [true, false, true] {
        if kill {
            node.kill_daemon()
        } else {
            node.stop_daemon()
        }
        assert!(before.iter().flatten().all(|pid| alive(*pid)));
        node.carrick(&["status"]).fails(7, "DAEMON_UNREACHABLE");
        node.start();
        node.wait_for("the same processes", |node| (before == [node.pids("replica"), node.pids("target")]).then_some(()));
    }
    assert_eq!(node.carrick(&["attach", "vm1"]).ok()["device"], "/dev/ublkb7");
    // The end of an adopted process is noticed too.
    signal(before[1][0], Signal::KILL);
    node.wait_for("a new target", |node| Some(node.pids("target")).filter(|now| now.len() == 1 && *now != before[1]));
    // And what died while nobody looked is started.
    node.kill_daemon();
    signal(before[0][1], Signal::KILL);
    node.start();
    node.wait_for("three replicas", |node| (node.pids("replica").len() == 3).then_some(()));
    node.carrick(&["detach", "vm1"]).ok();
}

#[test]
fn a_creation_cut_off_by_a_crash_is_undone_and_can_be_repeated() {
    let mut node = Node::new(3);
    fs::write(node.store_path(2).join("slow"), "").unwrap();
    let stores = [0, 1, 2].map(|number| node.store_path(number).to_str().unwrap().to_owned());
    let mut create = vec!["volume", "create", "vm1", "--size", "1G"];
    stores.iter().for_each(|store| create.extend(["--store", store]));
    let client = node.carrick_begin(&create);
    node.wait_for("the first replicas", |node| (node.replicas_in(1) == 1).then_some(()));
    assert_eq!(node.operation("create"), ["running", "replicas", ""]);
    node.kill_daemon();
    let message = Answer::from(client.wait_with_output().unwrap()).fails(7, "DAEMON_UNREACHABLE");
    assert!(message.contains("may be done, or not"), "{message}");
    fs::remove_file(node.store_path(2).join("slow")).unwrap();
    node.start();
    node.wait_for("nothing of it", |node| {
        let none = [0, 1, 2].iter().all(|store| node.replicas_in(*store) == 0);
        (none && node.carrick(&["volume", "list"]).ok().as_array().unwrap().is_empty()).then_some(())
    });
    assert_eq!(node.operation("create"), ["failed", "replicas", "CREATION_UNDONE"]);
    assert_eq!(node.operation("delete"), ["succeeded", "replicas", ""]);
    node.carrick(&create).ok();
    assert_eq!([0, 1, 2].map(|store| node.replicas_in(store)), [1, 1, 1]);
    assert_eq!(node.operation("create"), ["succeeded", "replicas", ""]);
}

#[test]
fn a_caller_that_goes_away_does_not_leave_its_operation_half_done() {
    let node = Node::new(3);
    fs::write(node.store_path(0).join("slow"), "").unwrap();
    let mut client = node.carrick_begin(&["volume", "create", "vm1", "--size", "1G"]);
    node.wait_for("the volume", |node| (node.carrick(&["volume", "show", "vm1"]).code == 0).then_some(()));
    client.kill().unwrap();
    client.wait().unwrap();
    node.wait_for("ready", |node| (node.carrick(&["volume", "show", "vm1"]).ok()["state"] == "ready").then_some(()));
}

#[test]
fn a_deletion_is_finished_when_its_store_is_back() {
    let node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    // The process of one store can neither answer nor be started again.
    let document = node.store_path(1).join("store.json");
    let saved = fs::read(&document).unwrap();
    fs::remove_file(&document).unwrap();
    let store = node.carrick(&["store", "list"]).ok()[1]["id"].as_str().unwrap().to_owned();
    let status = node.carrick(&["status"]).ok();
    let process = status["processes"].as_array().unwrap().iter().find(|process| process["subject"] == store.as_str()).unwrap().clone();
    signal(u32::try_from(process["pid"].as_u64().unwrap()).unwrap(), Signal::KILL);
    node.wait_for("its death", |node| (node.pids("replica").len() == 2).then_some(()));

    let answer = node.carrick(&["volume", "delete", "vm1"]).ok();
    assert_eq!(answer["pending_stores"][0], store.as_str());
    node.carrick(&["volume", "show", "vm1"]).fails(3, "VOLUME_NOT_FOUND");
    assert_eq!(node.replicas_in(1), 1);
    // Why its process can't be started is known when it was tried: until then it says that it is being started.
    node.wait_for("both problems", |node| {
        let problems = node.carrick(&["status"]).ok()["problems"].to_string();
        let told = problems.contains("volume vm1 is deleted, but for its replicas in") && problems.contains("is not a Carrick store");
        told.then_some(())
    });
    assert_eq!(node.operation("delete"), ["running", "replicas", "STORE_UNREACHABLE"]);
    let id = node.operations("delete")[0]["id"].as_str().unwrap().to_owned();
    node.carrick(&["operation", "cancel", &id]).fails(5, "OPERATION_PAST_CANCELLING");
    // Its name is free meanwhile.
    node.carrick(&["volume", "create", "vm1", "--size", "2G", "--replicas", "2"]).ok();
    node.carrick(&["volume", "create", "vm2", "--size", "2G"]).fails(5, "TOO_FEW_STORES");

    fs::write(&document, saved).unwrap();
    node.wait_for("the end of the deletion", |node| {
        let list = node.carrick(&["volume", "list"]).ok();
        (node.replicas_in(1) == 0 && list.as_array().unwrap().len() == 1).then_some(())
    });
    assert_eq!(node.operation("delete"), ["succeeded", "replicas", ""]);
}

#[test]
fn a_target_that_says_why_it_cannot_takes_its_attachment_back() {
    let node = Node::new(1);
    node.carrick(&["volume", "create", "no-ublk", "--size", "1G", "--replicas", "1"]).ok();
    let message = node.carrick(&["attach", "no-ublk"]).fails(8, "UNSUPPORTED");
    assert!(message.contains("load the module ublk_drv"), "{message}");
    assert_eq!(node.operation("attach"), ["failed", "device", "ATTACH_FAILED"]);
    assert!(node.operations("attach")[0]["message"].as_str().unwrap().contains("ublk_drv"));
    assert_eq!(node.carrick(&["volume", "show", "no-ublk"]).ok()["attachment"], serde_json::Value::Null);
    assert_eq!(fs::read_dir(node.run("target")).unwrap().count(), 0);
    node.carrick(&["volume", "delete", "no-ublk"]).ok();
}

#[test]
fn a_target_that_never_comes_up_is_taken_back_with_what_it_waits_for() {
    let node = Node::new(1);
    node.carrick(&["volume", "create", "never-up", "--size", "1G", "--replicas", "1"]).ok();
    let message = node.carrick(&["attach", "never-up"]).fails(7, "ATTACH_TIMEOUT");
    assert!(message.contains("it waits for a majority of its replicas: 0 of 3 answer"), "{message}");
    assert_eq!(node.carrick(&["volume", "show", "never-up"]).ok()["attachment"], serde_json::Value::Null);
    assert!(node.pids("target").is_empty());
}

#[test]
fn a_device_in_use_stays_unless_it_is_forced() {
    let node = Node::new(1);
    node.carrick(&["volume", "create", "busy", "--size", "1G", "--replicas", "1"]).ok();
    node.carrick(&["attach", "busy"]).ok();
    let message = node.carrick(&["detach", "busy"]).fails(5, "DEVICE_BUSY");
    assert!(message.contains("/dev/ublkb7 is in use"), "{message}");
    assert_eq!(node.operation("detach"), ["failed", "device", "DETACH_FAILED"]);
    assert_eq!(node.carrick(&["volume", "show", "busy"]).ok()["attachment"]["state"], "attached");
    node.carrick(&["shutdown"]).fails(5, "VOLUME_ATTACHED");
    node.carrick(&["shutdown", "--detach"]).fails(5, "DEVICE_BUSY");
    assert_eq!(node.pids("replica").len(), 1, "a shutdown that is refused changes nothing");
    node.carrick(&["detach", "busy", "--force"]).ok();
    assert!(!node.run("target").read_dir().unwrap().any(|_| true));
}

#[test]
fn a_target_that_hangs_is_replaced_when_the_detachment_is_forced() {
    let node = Node::new(1);
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let hung = node.pids("target")[0];
    signal(hung, Signal::STOP);
    // Whoever asks for the state is not kept waiting for long, and is told.
    let status = node.carrick(&["status"]).ok();
    assert!(status["problems"].to_string().contains("volume vm1: carrick-target didn't answer within 3 s"), "{status}");
    node.carrick(&["detach", "vm1", "--force"]).ok();
    assert!(!alive(hung));
    assert!(!node.run("target").read_dir().unwrap().any(|_| true), "the device is gone, and all that belonged to it");
}

#[test]
fn a_detachment_cut_off_by_a_crash_is_finished() {
    let mut node = Node::new(1);
    node.carrick(&["volume", "create", "deaf", "--size", "1G", "--replicas", "1"]).ok();
    node.carrick(&["attach", "deaf"]).ok();
    let mut client = node.carrick_begin(&["detach", "deaf"]);
    node.wait_for("detaching", |node| (node.carrick(&["volume", "show", "deaf"]).ok()["attachment"]["state"] == "detaching").then_some(()));
    node.kill_daemon();
    client.wait().unwrap();
    node.start();
    assert_eq!(node.operation("detach")[0], "running");
    assert_eq!(node.carrick(&["operation", "list", "--running"]).ok().as_array().unwrap().len(), 1);
    assert_eq!(node.carrick(&["operation", "list", "deaf"]).ok().as_array().unwrap().len(), 3);
    fs::write(node.run("cured"), "").unwrap();
    node.wait_for("its end", |node| node.carrick(&["volume", "show", "deaf"]).ok()["attachment"].is_null().then_some(()));
    assert_eq!(node.operation("detach"), ["succeeded", "device", ""]);
    assert!(!node.run("target").read_dir().unwrap().any(|_| true));
}

#[test]
fn an_attachment_cut_off_by_a_crash_is_finished() {
    let mut node = Node::new(1);
    node.carrick(&["volume", "create", "slow-up", "--size", "1G", "--replicas", "1"]).ok();
    let mut client = node.carrick_begin(&["attach", "slow-up"]);
    node.wait_for("a target", |node| (node.pids("target").len() == 1).then_some(()));
    let before = node.pids("target");
    node.kill_daemon();
    client.wait().unwrap();
    node.start();
    node.wait_for("attached", |node| {
        (node.carrick(&["volume", "show", "slow-up"]).ok()["attachment"]["state"] == "attached").then_some(())
    });
    assert_eq!(node.pids("target"), before);
    assert_eq!((node.operation("attach"), node.operations("attach").len()), (["succeeded", "device", ""].map(Into::into), 1));
}

#[test]
fn a_target_that_was_started_just_before_a_crash_is_found_though_it_has_no_socket_yet() {
    let mut node = Node::new(1);
    node.carrick(&["volume", "create", "shy", "--size", "1G", "--replicas", "1"]).ok();
    let mut client = node.carrick_begin(&["attach", "shy"]);
    let locked =
        |node: &Node| node.run("target").read_dir().unwrap().flatten().any(|entry| entry.path().extension().is_some_and(|e| e == "lock"));
    node.wait_for("its lock", |node| locked(node).then_some(()));
    node.kill_daemon();
    client.wait().unwrap();
    node.start();
    node.wait_for("attached", |node| (node.carrick(&["volume", "show", "shy"]).ok()["attachment"]["state"] == "attached").then_some(()));
    let log = fs::read_to_string(node.path("carrickd.log")).unwrap();
    assert!(log.contains("adopted another one that was faster"), "{log}");
    node.carrick(&["detach", "shy"]).ok();
    assert!(!node.run("target").read_dir().unwrap().any(|_| true));
}

#[test]
fn carrickd_may_be_killed_at_any_moment_of_an_attachment() {
    let mut node = Node::new(1);
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "1"]).ok();
    for millis in [0, 1, 2, 3, 5, 8, 13, 21, 34] {
        let mut client = node.carrick_begin(&["attach", "vm1"]);
        // Not a wait for something: the moment of the crash is what is tried out.
        std::thread::sleep(std::time::Duration::from_millis(millis));
        node.kill_daemon();
        client.wait().unwrap();
        node.start();
        node.carrick(&["attach", "vm1"]).ok();
        assert_eq!(node.pids("target").len(), 1);
        node.carrick(&["detach", "vm1"]).ok();
        assert!(node.pids("target").is_empty());
        let left: Vec<_> = node.run("target").read_dir().unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn shutdown_leaves_nothing() {
    let mut node = Node::new(3);
    node.carrick(&["volume", "create", "vm1", "--size", "1G"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let message = node.carrick(&["shutdown"]).fails(5, "VOLUME_ATTACHED");
    assert!(message.contains("vm1") && message.contains("--detach"), "{message}");
    let pids = [node.pids("replica"), node.pids("target"), vec![node.daemon_pid()]].concat();
    assert_eq!(pids.len(), 5);
    node.carrick(&["shutdown", "--detach"]).ok();
    node.wait_daemon();
    assert!(pids.iter().all(|pid| !alive(*pid)));
    let left: Vec<_> = node.path("run").read_dir().unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    // The volumes are there at the next start, and detached.
    node.start();
    // Whoever comes first waits for the stores to be there.
    node.carrick(&["volume", "create", "vm2", "--size", "1G"]).ok();
    assert!(node.carrick(&["volume", "show", "vm1"]).ok()["attachment"].is_null());
}

#[test]
fn errors_are_json_too_even_those_of_the_command_line() {
    let node = Node::new(0);
    let message = node.carrick(&["volume", "create", "vm1", "--size", "1.5G"]).fails(2, "USAGE");
    assert!(message.contains("such as 20G"), "{message}");
    node.carrick(&["volume", "explode"]).fails(2, "USAGE");
    let help = node.carrick(&["--help"]);
    assert!(help.code == 0 && help.text.contains("Exit codes:"), "{}", help.text);
}

#[test]
fn an_idle_daemon_does_not_wake_up() {
    let node = Node::new(2);
    node.carrick(&["volume", "create", "vm1", "--size", "1G", "--replicas", "2"]).ok();
    node.carrick(&["attach", "vm1"]).ok();
    let switches = || {
        let status = fs::read_to_string(format!("/proc/{}/status", node.daemon_pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse::<u64>().unwrap()
    };
    // Not a wait for something: silence can only be seen over some time. What the last command left is over by its end.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let before = switches();
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert!(switches() - before <= 6, "{} wake-ups in 3 s", switches() - before);
}

#[test]
fn clients_of_any_language_find_health_reflection_and_typed_errors() {
    let node = Node::new(0);
    let socket = format!("unix:{}", node.run("carrickd.sock").display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = tonic::transport::Endpoint::from_shared(socket).unwrap().connect().await.unwrap();
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
        for service in ["", "carrick.v1.StoreService", "carrick.v1.VolumeService", "carrick.v1.EventService", "carrick.v1.NodeService"] {
            let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
            assert_eq!(health.check(request).await.unwrap().into_inner().status, 1, "{service}");
        }
        use tonic_reflection::pb::v1 as reflection;
        let request = reflection::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(reflection::server_reflection_request::MessageRequest::ListServices(String::new())),
        };
        let mut client = reflection::server_reflection_client::ServerReflectionClient::new(channel.clone());
        let mut answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
        let listed = format!("{:?}", answers.message().await.unwrap());
        assert!(listed.contains("carrick.v1.VolumeService"), "{listed}");

        let mut volumes = carrick_ctl::v1::volume_service_client::VolumeServiceClient::new(channel);
        let status = volumes.get_volume(carrick_ctl::v1::GetVolumeRequest { name: "vm1".into() }).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::NotFound);
        let detail = carrick_ctl::fault::detail(&status).unwrap();
        assert_eq!((detail.reason.as_str(), detail.subject.as_str()), ("VOLUME_NOT_FOUND", "vm1"));
    });
}

#[test]
fn one_carrickd_for_each_folder() {
    let node = Node::new(0);
    for (run_dir, state_dir, flag) in [("run", "state", "--state-dir"), ("other", "state", "--state-dir"), ("run", "other", "--run-dir")] {
        let answer = node.start_another(run_dir, state_dir);
        assert!(answer.code == 1 && answer.text.contains("another carrickd uses") && answer.text.contains(flag), "{}", answer.text);
    }
    assert_eq!(node.carrick(&["status"]).code, 0, "the first one goes on");
}
