//! The whole way: a tree is packed by the builder, published, mounted before it is downloaded, and is the same tree.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use nodes::{Compare, assert_same};
use program::Node;
use serde_json::json;

/// Directories, files of many sizes, holes, links of both kinds, a device, modes.
fn tree(top: &Path) {
    for number in 0..60usize {
        let dir = top.join(format!("usr/share/d{}", number % 7));
        fs::create_dir_all(&dir).unwrap();
        let byte = |at: usize| (at.wrapping_mul(number + 7) / 11) as u8;
        let bytes: Vec<u8> = (0..number * number * 331).map(byte).collect();
        fs::write(dir.join(format!("f{number}")), bytes).unwrap();
    }
    fs::hard_link(top.join("usr/share/d0/f7"), top.join("hard")).unwrap();
    symlink("usr/share", top.join("short")).unwrap();
    symlink("x".repeat(300), top.join("long")).unwrap();
    let sparse = fs::File::create(top.join("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (2 << 20) + 5).unwrap();
    fs::set_permissions(top.join("hard"), fs::Permissions::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(top.join("usr/share/d1/f1"), Some(1000), Some(70_000)).unwrap();
    assert!(Command::new("mknod").arg(top.join("null")).args(["c", "1", "3"]).status().unwrap().success());
}

#[test]
fn a_built_tree_is_mounted_as_it_was() {
    let node = Node::new();
    let top = node.path().join("tree");
    fs::create_dir(&top).unwrap();
    tree(&top);
    let (layout, dir) = (node.path().join("layout"), node.mount_point("mnt"));
    let (source, destination) = (format!("dir:{}", top.display()), format!("oci:{}:v1", layout.display()));
    // What comes after the verb is the builder's, so that the verb comes first.
    let built =
        Command::new(env!("CARGO_BIN_EXE_firstread")).args(["build", &source, &destination, "--quiet"]).output();
    let built = built.unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    node.done(&["mount", &destination, dir.to_str().unwrap()]);
    let before = node.json(&["status", "layout-1"]);
    assert!(before["chunks"]["fetched"].as_u64() < before["chunks"]["total"].as_u64(), "{before}");
    assert_same(&nodes::read(&top), &nodes::read(&dir), Compare::Everything);
    let found = node.json(&["inspect", &destination]);
    assert_eq!(found["device_bytes"], before["device_bytes"]);
    assert_eq!(node.json(&["verify", "--deep", &destination])["sound"], true);

    // From a relative path, by a process that is elsewhere than the daemon.
    let mut command = node.command(&["attach", "oci:layout:v1"]);
    let output = command.current_dir(node.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(node.json(&["list"])[1]["image"], destination);
    node.done(&["umount", dir.to_str().unwrap()]);
    node.done(&["stop"]);
    assert_eq!(node.json(&["list"]), json!([]));
}
