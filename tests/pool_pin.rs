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
    let files = fs::read_dir(node.root().join("pool")).unwrap().map(|entry| entry.unwrap().path());
    let slab = files.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let slab = fs::OpenOptions::new().read(true).write(true).open(slab).unwrap();
    let at = slab.metadata().unwrap().len() - 5000;
    let mut byte = [0];
    slab.read_exact_at(&mut byte, at).unwrap();
    slab.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let found = node.json(&["pool", "scrub"]);
    assert_eq!(found["damaged"], 1, "{found}");
    assert_eq!(node.json(&["pool", "scrub"])["damaged"], 0);
    node.json(&["pin", &reference]);
    assert_eq!(node.json(&["pool", "scrub"])["chunks"], pinned["chunks"]);
    node.done(&["stop"]);
}
