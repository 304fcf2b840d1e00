//! Pinned images and the upkeep of the pool, with the programs and a real registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;
#[path = "common/registry.rs"]
mod registry;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use program::{Node, same_files};
use random::Random;
use registry::Registry;

/// Publishes a tree of `files` random files, and returns it.
fn publish(node: &Node, registry: &Registry, name: &str, files: u64) -> (std::path::PathBuf, String) {
    let top = node.path().join(name);
    fs::create_dir(&top).unwrap();
    let mut random = Random(files);
    for number in 0..files {
        let len = 1 + random.below(400_000) as usize;
        fs::write(top.join(format!("f{number}")), random.bytes(len)).unwrap();
    }
    let reference = format!("{}/{name}:v1", registry.host());
    let built = Command::new(env!("CARGO_BIN_EXE_firstread"))
        .args(["build", &format!("dir:{}", top.display()), &reference, "--quiet"])
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    (top, reference)
}

fn configure(node: &Node, limit: &str) -> String {
    let path = node.path().join("config.toml");
    fs::write(&path, format!("[pool]\nlimit = '{limit}'\nkeep_free = '0%'\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Settings of a node that does not wait for sources.
fn impatient(node: &Node) -> String {
    let path = node.path().join("config.toml");
    fs::write(&path, "[fetch]\non_outage = '1s'\n").unwrap();
    path.to_str().unwrap().to_owned()
}

fn last_slab(node: &Node) -> std::path::PathBuf {
    let files = fs::read_dir(node.root().join("pool")).unwrap().map(|entry| entry.unwrap().path());
    files.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap()
}

/// Flips a bit of the last chunk in a slab.
fn flip(slab: &Path) {
    let slab = fs::OpenOptions::new().read(true).write(true).open(slab).unwrap();
    let at = slab.metadata().unwrap().len() - 5000;
    let mut byte = [0];
    slab.read_exact_at(&mut byte, at).unwrap();
    slab.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn read_all(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::read(path).unwrap();
        }
    }
}

#[test]
fn a_pinned_image_starts_with_the_registry_gone_and_the_pool_full() {
    let node = Node::new();
    let mut registry = Registry::start();
    let (tree, pinned) = publish(&node, &registry, "pinned", 20);
    let (other_tree, other) = publish(&node, &registry, "other", 60);
    let config = configure(&node, "8M");
    let run = |arguments: &[&str]| node.done(&[&["--config", &config], arguments].concat());
    let said = run(&["pin", &pinned]);
    assert!(said.contains("pinned"), "{said}");
    let failed = node.fails(1, &["--config", &config, "pin", &other]);
    assert!(failed.contains("no room"), "{failed}");

    let (dir, other_dir) = (node.mount_point("pinned-mnt"), node.mount_point("other-mnt"));
    run(&["mount", &other, other_dir.to_str().unwrap()]);
    same_files(&other_tree, &other_dir);
    read_all(&other_dir);
    let stat = node.json(&["pool", "stat"]);
    assert!(stat["evicted"].as_u64() > Some(10) && stat["bytes"].as_u64() <= Some(8 << 20), "{stat}");
    run(&["umount", other_dir.to_str().unwrap()]);
    run(&["stop"]);

    registry.stop();
    run(&["mount", &pinned, dir.to_str().unwrap()]);
    same_files(&tree, &dir);
    run(&["umount", dir.to_str().unwrap()]);
    run(&["unpin", &pinned]);
    assert!(node.fails(1, &["unpin", &pinned]).contains("not pinned"));
    run(&["pool", "trim", "0"]);
    assert_eq!(node.json(&["pool", "stat"])["chunks"], 0);
    run(&["stop"]);
}

#[test]
fn a_scrub_finds_what_rotted() {
    let node = Node::new();
    let registry = Registry::start();
    let (_, reference) = publish(&node, &registry, "scrubbed", 20);
    let pinned = node.json(&["pin", &reference]);
    let found = node.json(&["pool", "scrub"]);
    assert_eq!((&found["chunks"], &found["damaged"]), (&pinned["chunks"], &0.into()));
    let slab = last_slab(&node);
    flip(&slab);
    // It is pinned: it comes back without anybody reading it.
    let found = node.json(&["pool", "scrub"]);
    assert_eq!((&found["damaged"], &found["refetched"]), (&1.into(), &1.into()), "{found}");
    let found = node.json(&["pool", "scrub"]);
    assert_eq!((&found["chunks"], &found["damaged"]), (&pinned["chunks"], &0.into()));
    // Nobody needs it: it is dropped, and that is that.
    node.done(&["unpin", &reference]);
    flip(&slab);
    let found = node.json(&["pool", "scrub"]);
    assert_eq!((&found["damaged"], &found["refetched"]), (&1.into(), &0.into()), "{found}");
    node.done(&["stop"]);
}

#[test]
fn the_background_scrub_finds_what_rots_and_what_is_open_is_mended() {
    let node = Node::new();
    let registry = Registry::start();
    let (tree, reference) = publish(&node, &registry, "open", 20);
    let config = node.path().join("config.toml");
    fs::write(&config, "[pool]\nscrub_rate = '500M'\n").unwrap();
    let dir = node.mount_point("mnt");
    node.done(&["--config", config.to_str().unwrap(), "mount", &reference, dir.to_str().unwrap()]);
    same_files(&tree, &dir);
    flip(&last_slab(&node));
    let mended = || {
        let stat = node.json(&["pool", "stat"]);
        (stat["scrub"]["damaged"] == 1 && stat["refetched"] == 1, stat)
    };
    program::wait_until("a scrub found it, and it was fetched again", || mended().0);
    let stat = mended().1;
    assert_eq!((&stat["quarantined"], &stat["scrub"]["rate"]), (&1.into(), &(500 << 20).into()), "{stat}");
    let found = node.json(&["pool", "scrub"]);
    assert_eq!((&found["chunks"], &found["damaged"]), (&stat["chunks"], &0.into()));
    same_files(&tree, &dir);
    node.done(&["umount", dir.to_str().unwrap()]);
    node.done(&["stop"]);
}

#[test]
fn a_pin_that_lost_chunks_is_completed_when_the_registry_is_back() {
    let node = Node::new();
    let mut registry = Registry::start();
    let (_, reference) = publish(&node, &registry, "pinned", 20);
    let run = |arguments: &[&str]| node.done(&[&["--config", &impatient(&node)], arguments].concat());
    run(&["pin", &reference]);
    run(&["stop"]);
    flip(&last_slab(&node));
    registry.stop();
    // The daemon starts, the damage is found; what was lost can't be had.
    let failed = node.fails(1, &["--config", &impatient(&node), "verify", "--offline", &reference]);
    assert!(failed.contains("1 of"), "{failed}");
    let found = node.json(&["pool", "scrub"]);
    assert_eq!(found["refetched"], 0, "{found}");
    registry.resume();
    program::wait_until("the lost chunk is local again", || {
        node.run(&["verify", "--offline", &reference]).status.success()
    });
    // Also when the slab went while no daemon ran.
    run(&["stop"]);
    fs::remove_file(last_slab(&node)).unwrap();
    run(&["pool", "stat"]);
    program::wait_until("all is local again", || node.run(&["verify", "--offline", &reference]).status.success());
    run(&["stop"]);
}

#[test]
fn what_is_local_is_proven_without_asking_anybody() {
    let node = Node::new();
    let mut registry = Registry::start();
    let (tree, reference) = publish(&node, &registry, "proven", 30);
    let never = node.fails(1, &["verify", "--offline", &reference]);
    assert!(never.contains("not local") && never.contains("firstread pin"), "{never}");

    let dir = node.mount_point("mnt");
    node.done(&["mount", &reference, dir.to_str().unwrap()]);
    fs::read(dir.join("f7")).unwrap();
    let part = node.run(&["--json", "verify", "--offline", &reference]);
    assert_eq!(part.status.code(), Some(1));
    let part: serde_json::Value = serde_json::from_slice(&part.stdout).unwrap();
    let number = |proof: &serde_json::Value, name: &str| proof[name].as_u64().unwrap();
    assert_eq!((&part["sound"], &part["pinned"]), (&false.into(), &false.into()));
    assert!(number(&part, "local_chunks") > 0 && number(&part, "missing") > 0, "{part}");
    assert_eq!(number(&part, "local_chunks") + number(&part, "missing"), number(&part, "chunks"));
    node.done(&["umount", dir.to_str().unwrap()]);

    node.json(&["pin", &reference]);
    node.done(&["stop"]);
    let asked = registry.settled_log();
    let whole = node.json(&["verify", "--offline", &reference]);
    assert_eq!((&whole["sound"], &whole["pinned"], &whole["missing"]), (&true.into(), &true.into(), &0.into()));
    assert_eq!(number(&whole, "local_bytes"), number(&whole, "bytes"));
    assert_eq!(registry.log(), asked, "somebody asked the registry");
    assert_eq!(node.json(&["inspect", &reference])["chunks"], whole["chunks"]);
    program::wait_until("the registry logs who asks", || registry.log() != asked);
    registry.stop();
    node.json(&["verify", "--offline", &reference]);

    flip(&last_slab(&node));
    let damaged = node.run(&["--json", "verify", "--offline", &reference]);
    assert_eq!(damaged.status.code(), Some(1));
    let proof: serde_json::Value = serde_json::from_slice(&damaged.stdout).unwrap();
    assert_eq!((number(&proof, "damaged"), proof["faults"].as_array().unwrap().len()), (1, 1), "{proof}");
    assert!(String::from_utf8_lossy(&damaged.stderr).contains("not local"));
    node.done(&["stop"]);
    drop(tree);
}

#[test]
fn the_pool_says_what_sharing_saves() {
    let node = Node::new();
    let registry = Registry::start();
    let (first, one) = publish(&node, &registry, "one", 20);
    // The same files and some more.
    let second = node.path().join("two");
    fs::create_dir(&second).unwrap();
    for entry in fs::read_dir(&first).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, second.join(path.file_name().unwrap())).unwrap();
    }
    fs::write(second.join("more"), Random(77).bytes(900_000)).unwrap();
    let two = format!("{}/two:v1", registry.host());
    node.done(&["build", &format!("dir:{}", second.display()), &two, "--quiet"]);
    let none = node.json(&["pool", "stat"]);
    assert_eq!((&none["images"], &none["sharing"]["saved_bytes"]), (&serde_json::json!([]), &0.into()));

    node.json(&["pin", &one]);
    let dir = node.mount_point("mnt");
    node.done(&["mount", &two, dir.to_str().unwrap()]);
    same_files(&second, &dir);
    let stat = node.json(&["pool", "stat"]);
    let sharing = |name: &str| stat["sharing"][name].as_u64().unwrap();
    assert_eq!(sharing("held_bytes"), stat["bytes"].as_u64().unwrap(), "all that the pool has is in use");
    assert_eq!(sharing("saved_bytes"), sharing("referenced_bytes") - sharing("held_bytes"));
    let images = stat["images"].as_array().unwrap();
    let share = |image: &str, name: &str| {
        let image = images.iter().find(|found| found["image"] == *image).unwrap_or_else(|| panic!("{stat}"));
        image[name].as_u64().unwrap()
    };
    for image in [&one, &two] {
        assert_eq!(share(image, "unique_bytes") + share(image, "shared_bytes"), share(image, "local_bytes"));
    }
    // Files of 64 KiB and more are chunks of their own: most of the tree.
    let large: u64 = fs::read_dir(&first)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .filter(|&len| len >= 65536)
        .sum();
    assert!(share(&one, "shared_bytes") >= large && sharing("saved_bytes") == share(&one, "shared_bytes"), "{stat}");
    assert!(share(&two, "unique_bytes") >= 900_000, "{stat}");
    let text = node.done(&["pool", "stat"]);
    assert!(text.contains("saved by sharing") && text.contains(&two), "{text}");
    node.done(&["umount", dir.to_str().unwrap()]);
    node.done(&["stop"]);
}

#[test]
fn a_pinned_start_up_set_starts_with_the_registry_gone() {
    let node = Node::new();
    let mut registry = Registry::start();
    let (tree, reference) = publish(&node, &registry, "app", 40);
    // Another version: files came and went before those that the start reads.
    let next = node.path().join("next");
    fs::create_dir(&next).unwrap();
    for number in 3..40 {
        fs::copy(tree.join(format!("f{number}")), next.join(format!("f{number}"))).unwrap();
    }
    fs::write(next.join("added"), Random(5).bytes(700_000)).unwrap();
    let version = format!("{}/app:v2", registry.host());
    node.done(&["build", &format!("dir:{}", next.display()), &version, "--quiet"]);

    let config = impatient(&node);
    let run = |arguments: &[&str]| node.done(&[&["--config", &config], arguments].concat());
    let start = ["f7", "f21", "f33"];
    let (dir, profile) = (node.mount_point("mnt"), node.path().join("profile"));
    let (dir_name, profile) = (dir.to_str().unwrap(), profile.to_str().unwrap());
    run(&["mount", &reference, dir_name]);
    for name in start {
        fs::read(dir.join(name)).unwrap();
    }
    run(&["profile", dir_name, "-o", profile]);
    run(&["umount", dir_name]);
    run(&["pool", "trim", "0"]);

    for image in [&reference, &version] {
        let pinned = node.json(&["pin", image, "--profile", profile]);
        let total = node.json(&["inspect", image])["chunks"].as_u64().unwrap();
        assert!((3..total / 2).contains(&pinned["chunks"].as_u64().unwrap()), "{pinned} of {total}");
        assert_eq!((&pinned["profile"], &pinned["part"]), (&profile.into(), &serde_json::Value::Null));
    }
    run(&["stop"]);
    run(&["pool", "trim", "0"]);
    registry.stop();
    for image in [&reference, &version] {
        run(&["mount", image, dir_name]);
        for name in start {
            assert!(fs::read(dir.join(name)).unwrap() == fs::read(tree.join(name)).unwrap(), "{name} of {image}");
        }
        fs::read(dir.join("f38")).expect_err("it is not in the start-up set, and the registry is gone");
        run(&["umount", dir_name]);
    }
    for image in [&reference, &version] {
        run(&["unpin", image]);
    }
    run(&["pool", "trim", "0"]);
    assert_eq!(node.json(&["pool", "stat"])["chunks"], 0);

    registry.resume();
    fs::write(profile, "no profile").unwrap();
    assert!(node.fails(1, &["pin", &reference, "--profile", profile]).contains("profile"));
    assert!(node.fails(1, &["pin", &reference, "--profile", "/does/not/exist"]).contains("/does/not/exist"));
    run(&["stop"]);
}
