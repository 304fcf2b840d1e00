//! An image is mounted, read, unmounted; what is asked for in between has the documented form.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/image.rs"]
mod image;
#[path = "common/program.rs"]
mod program;

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use program::{Node, same_files, wait_until};
use serde_json::{Value, json};

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn has_keys(value: &Value, expected: &[&str]) {
    for key in expected {
        assert!(keys(value).contains(key), "{key} is not in {value}");
    }
}

/// The status once everything that was fetched is in the pool: readers do not wait for that.
fn settled(node: &Node, id: &str) -> Value {
    let mut status = Value::Null;
    wait_until("what was fetched is in the pool", || {
        status = node.json(&["status", id]);
        status["chunks"]["fetched"] == status["chunks"]["local"]
    });
    status
}

#[test]
fn a_mounted_image_has_the_files_and_the_numbers_and_leaves_nothing() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 24);
    let dir = node.mount_point("mnt");
    let mounted = node.json(&["mount", &image.reference(), dir.to_str().unwrap()]);
    assert_eq!(mounted["id"], "app-1");
    assert_eq!(mounted["transport"], "loop");
    assert_eq!(mounted["read_only"], true);
    assert_eq!(mounted["mountpoint"], json!(dir));
    assert_eq!(mounted["image"], image.reference());
    let device = mounted["device"].as_str().unwrap().to_owned();
    assert!(device.starts_with("/dev/loop"), "{device}");
    assert_eq!(node.json(&["list"]).as_array().unwrap().len(), 1);

    same_files(&image.tree, &dir);
    let status = settled(&node, "app-1");
    has_keys(
        &status,
        &[
            "id",
            "image",
            "device_bytes",
            "chunks",
            "bytes",
            "requests",
            "hits",
            "misses",
            "verify_failures",
            "outage_seconds",
            "waits",
        ],
    );
    has_keys(&status["chunks"], &["total", "local", "fetched", "failed"]);
    has_keys(&status["bytes"], &["read", "fetched", "startup"]);
    has_keys(&status["waits"], &["count", "total", "max"]);
    assert_eq!(status["chunks"]["total"], image.index.chunk_count());
    assert_eq!(status["chunks"]["fetched"], status["chunks"]["local"]);
    assert_eq!(status["chunks"]["failed"], 0);
    assert!(status["requests"].as_u64() > Some(0) && status["misses"].as_u64() > Some(0), "{status}");
    assert_eq!(status["device_bytes"], fs::metadata(&image.disk).unwrap().len());
    let whole = node.json(&["status", dir.to_str().unwrap()]);
    assert_eq!(whole["id"], "app-1");
    assert_eq!(node.json(&["status"]).as_array().unwrap().len(), 1);

    let pool = node.json(&["pool", "stat"]);
    has_keys(&pool, &["bytes", "limit", "chunks", "hits", "misses", "evicted", "quarantined"]);
    assert_eq!(pool["chunks"], status["chunks"]["local"]);

    node.done(&["umount", dir.to_str().unwrap()]);
    assert_eq!(node.json(&["list"]), json!([]));
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir.to_str().unwrap()));
    assert_eq!(fs::read_dir(node.root().join("devices")).unwrap().count(), 0);
    let name = device.trim_start_matches("/dev/");
    wait_until("the loop device is free", || !fs::exists(format!("/sys/block/{name}/loop")).unwrap());
}

#[test]
fn what_is_in_the_pool_is_read_without_a_request() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 12);
    let dir = node.mount_point("mnt");
    let mount = ["mount", &image.reference(), dir.to_str().unwrap()];
    node.done(&mount);
    same_files(&image.tree, &dir);
    settled(&node, "app-1");
    node.done(&["umount", dir.to_str().unwrap()]);
    fs::remove_file(&image.pack).unwrap();

    // In the same daemon, and in the next one.
    for restart in [false, true] {
        if restart {
            node.done(&["stop"]);
        }
        let mounted = node.json(&mount);
        same_files(&image.tree, &dir);
        let status = node.json(&["status", mounted["id"].as_str().unwrap()]);
        assert_eq!((&status["requests"], &status["misses"]), (&json!(0), &json!(0)), "{status}");
        node.done(&["umount", dir.to_str().unwrap()]);
    }
}

#[test]
fn devices_of_one_image_share_what_is_fetched() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 8);
    let (one, two) = (node.mount_point("one"), node.mount_point("two"));
    for dir in [&one, &two] {
        node.done(&["mount", &image.reference(), dir.to_str().unwrap()]);
    }
    std::thread::scope(|scope| {
        for dir in [&one, &two] {
            scope.spawn(|| same_files(&image.tree, dir));
        }
    });
    settled(&node, "app-1");
    let all = node.json(&["status"]);
    assert_eq!(all[0]["id"], "app-1");
    assert_eq!(all[1]["id"], "app-2");
    assert_eq!(all[0]["chunks"], all[1]["chunks"]);
    assert_eq!(all[0]["chunks"]["fetched"], all[0]["chunks"]["local"], "nothing was fetched twice: {all}");
}

#[test]
fn damaged_bytes_are_never_read() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 12);
    // Not the first chunk, which has what mounting needs.
    let chunk = image.damage(image.index.chunk_count() - 2);
    let dir = node.mount_point("mnt");
    node.done(&["mount", &image.reference(), dir.to_str().unwrap()]);
    let mut errors = 0;
    for number in 0..12 {
        let path = format!("d{}/f{number}", number % 4);
        match fs::read(dir.join(&path)) {
            Ok(bytes) => assert!(bytes == fs::read(image.tree.join(&path)).unwrap(), "{path} differs"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(5), "{error}");
                errors += 1;
            }
        }
    }
    assert!(errors > 0);
    assert!(node.log().contains(&chunk.digest.hex()), "{}", node.log());
    let status = node.json(&["status", "app-1"]);
    assert!(status["verify_failures"].as_u64() > Some(0), "{status}");

    let output = node.run(&["--json", "verify", &image.reference()]);
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["damaged"].as_array().unwrap().len(), 1);
    assert_eq!(found["damaged"][0]["chunk"], chunk.digest.to_string());
    assert!(found["damaged"][0]["source"].as_str().unwrap().contains("app"), "{found}");
    let text = node.run(&["verify", "--deep", &image.reference()]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains(&chunk.digest.to_string()) && text.contains("whole pack"), "{text}");
}

#[test]
fn a_device_in_use_is_not_detached_and_its_user_is_named() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 4);
    let dir = node.mount_point("mnt");
    let dir_text = dir.to_str().unwrap();
    node.done(&["mount", &image.reference(), dir_text]);
    for target in ["app-1", dir_text] {
        let error = node.fails(1, &["detach", target]);
        assert!(error.contains(dir_text), "{error}");
    }
    let error = node.fails(1, &["stop"]);
    assert!(error.contains(dir_text) && node.pid().is_some(), "{error}");
    node.fails(1, &["detach", "--all"]);

    let mut user = Command::new("sleep").arg("60").current_dir(dir.join("d0")).stdout(Stdio::null()).spawn().unwrap();
    let error = node.fails(1, &["umount", dir_text]);
    user.kill().unwrap();
    user.wait().unwrap();
    assert!(error.contains("sleep") && error.contains(&user.id().to_string()), "{error}");
    node.done(&["umount", dir_text]);

    let attached = node.json(&["attach", &image.reference()]);
    let device = attached["device"].as_str().unwrap();
    assert_eq!(attached["mountpoint"], Value::Null);
    node.done(&["detach", device]);
    node.done(&["attach", &image.reference()]);
    node.done(&["attach", &image.reference()]);
    let detached = node.json(&["detach", "--all"]);
    assert_eq!(detached.as_array().unwrap().len(), 2);
    node.done(&["stop"]);
    assert!(node.pid().is_none());
}

#[test]
fn a_mount_is_undone_while_a_container_is_made() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 4);
    let dir = node.mount_point("mnt");
    node.done(&["mount", &image.reference(), dir.to_str().unwrap()]);
    // Who makes a container has a copy of all mounts, until it has left the old root.
    let mut maker = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", "echo copied; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 7];
    maker.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    let umount = node.command(&["umount", dir.to_str().unwrap()]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it is not mounted any more", || {
        !fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir.to_str().unwrap())
    });
    std::thread::sleep(std::time::Duration::from_millis(200));
    drop(maker.stdin.take());
    maker.wait().unwrap();
    let output = umount.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(node.json(&["list"]).as_array().unwrap().len(), 0);
}

#[test]
fn a_mount_that_fails_leaves_no_device() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 4);
    // The superblock's chunk: mount(2) fails.
    image.damage(0);
    let dir = node.mount_point("mnt");
    node.fails(1, &["mount", &image.reference(), dir.to_str().unwrap()]);
    wait_until("the device is detached", || node.json(&["list"]) == json!([]));
    let error = node.fails(1, &["mount", &image.reference(), "/nowhere/at/all"]);
    assert!(error.contains("/nowhere/at/all"), "{error}");
    let error = node.fails(1, &["umount", dir.to_str().unwrap()]);
    assert!(error.contains(dir.to_str().unwrap()), "{error}");
    assert_eq!(node.json(&["list"]), json!([]));
}

#[test]
fn an_image_is_inspected_and_verified_without_a_daemon() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 8);
    let found = node.json(&["inspect", &image.reference()]);
    has_keys(
        &found,
        &[
            "digest",
            "device_bytes",
            "file_system",
            "chunks",
            "unique_chunks",
            "plain_bytes",
            "stored_bytes",
            "index_bytes",
            "packs",
        ],
    );
    has_keys(&found["packs"][0], &["digest", "stored_bytes", "chunks", "role", "reused"]);
    assert_eq!(found["chunks"], image.index.chunk_count());
    assert_eq!(found["packs"][0]["chunks"], image.index.chunk_count());
    assert_eq!(found["packs"][0]["stored_bytes"], fs::metadata(&image.pack).unwrap().len());
    assert_eq!(found["file_system"], "ext4");
    let verified = node.json(&["verify", "--deep", &image.reference()]);
    assert_eq!(verified["sound"], true);
    assert_eq!(verified["chunks"], image.index.chunk_count());
    assert!(node.pid().is_none(), "no daemon was started");
    fs::remove_file(&image.pack).unwrap();
    let error = node.fails(1, &["verify", &image.reference()]);
    assert!(error.contains("failed"), "{error}");
}
