//! Devices whose upper is kept get a journal, and what is committed of them has none. Needs root, FUSE and loop devices.
#![cfg(all(feature = "loop", feature = "programs"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use built::{Layout, tool};
use ext4::fsck;
use program::{Node, wait_until};
use random::Random;

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn dumped(device: &Path) -> String {
    String::from_utf8(tool("dumpe2fs", ["-h", text(device)])).unwrap()
}

fn has_journal(device: &Path) -> bool {
    dumped(device).lines().any(|line| line.starts_with("Filesystem features:") && line.contains("has_journal"))
}

/// A node with an image of a tree, in a layout.
fn node() -> (Node, Layout, String) {
    let node = Node::new();
    let tree = node.mount_point("tree");
    fs::write(tree.join("file"), Random(1).bytes(500_000)).unwrap();
    (0..50).for_each(|number| fs::write(tree.join(format!("small-{number}")), format!("{number}")).unwrap());
    let layout = Layout(node.path().join("layout"));
    let image = format!("oci:{}:1", layout.0.display());
    node.done(&["build", "--quiet", "--no-cache", "--size", "200M", &format!("dir:{}", text(&tree)), &image]);
    (node, layout, image)
}

fn umount(node: &Node, dir: &Path) {
    wait_until("nobody uses it any more", || node.run(&["umount", text(dir)]).status.success());
}

#[test]
fn what_is_kept_has_one_and_what_is_thrown_away_or_says_no_has_none() {
    let (node, _, image) = node();
    let dir = node.mount_point("mnt");
    let upper = node.path().join("upper");
    let device = |node: &Node| PathBuf::from(node.json(&["list"])[0]["device"].as_str().unwrap());
    let mount =
        |options: &[&str]| node.done(&[&["mount", "--transport", "loop", &image, text(&dir)], options].concat());
    mount(&["--rw"]);
    assert!(!has_journal(&device(&node)));
    umount(&node, &dir);
    node.fails(2, &["mount", "--rw", "--journal", "none", &image, text(&dir)]);
    node.fails(2, &["mount", "--upper", text(&upper), "--journal", "some", &image, text(&dir)]);
    mount(&["--upper", text(&upper), "--journal", "none"]);
    assert!(!has_journal(&device(&node)));
    fs::write(dir.join("new"), "new").unwrap();
    umount(&node, &dir);
    let room = |name: &str| fs::metadata(upper.join(name)).unwrap().blocks() * 512;
    let before = room("data");
    // One that was written without gets it then.
    mount(&["--upper", text(&upper)]);
    let said = dumped(&device(&node));
    assert!(has_journal(&device(&node)) && said.contains("Total journal size:       16M"), "{said}");
    let taken = room("data") - before;
    assert!(taken < 200 << 10, "it takes {taken} bytes");
    assert_eq!(fs::read(dir.join("new")).unwrap(), b"new");
    umount(&node, &dir);
    // It grows with it, and keeps it.
    mount(&["--upper", text(&upper), "--journal", "none", "--size", "1G"]);
    assert!(has_journal(&device(&node)));
    let found = rustix::fs::statvfs(&dir).unwrap();
    assert!(found.f_blocks * found.f_frsize > 950 * MIB);
    fs::write(dir.join("big"), vec![3; 300 << 20]).unwrap();
    umount(&node, &dir);
    let attached = node.json(&["attach", "--transport", "loop", "--upper", text(&upper), &image]);
    fsck(Path::new(attached["device"].as_str().unwrap()));
}

#[test]
fn commits_have_neither_the_journal_nor_what_was_not_replayed() {
    let (node, layout, image) = node();
    let dir = node.mount_point("mnt");
    let upper = node.path().join("upper");
    node.done(&["mount", "--transport", "loop", "--upper", text(&upper), &image, text(&dir)]);
    let child = |tag: &str| format!("oci:{}:{tag}", layout.0.display());
    let mut random = Random(3);
    // Megabytes of journal, kilobytes of files.
    for number in 0..300 {
        let path = dir.join(format!("d{}/n{number}", number % 40));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, random.bytes(300)).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
    }
    let check = |tag: &str| {
        let disk = node.path().join(tag);
        layout.device(&layout.top(tag), &disk);
        fsck(&disk);
        assert!(!has_journal(&disk));
        disk
    };
    let compare = |disk: &Path, expected: &nodes::Nodes| {
        let mount = ext4::Mount::new(disk, &node.path().join("look"), "ro");
        nodes::assert_same(expected, &nodes::read(mount.dir()), nodes::Compare::Everything);
    };
    // Frozen.
    let report = node.json(&["commit", "layout-1", &child("2"), "--quiet"]);
    let expected = nodes::read(&dir);
    compare(&check("2"), &expected);
    let new_bytes = report["new_bytes"].as_u64().unwrap();
    assert!(new_bytes < 400_000, "{report}");

    // As after a loss of power: what is on its way to the disk goes with the daemon, the journal is full of what was synced.
    fs::write(dir.join("last"), "synced").unwrap();
    File::open(dir.join("last")).unwrap().sync_all().unwrap();
    let expected = nodes::read(&dir);
    node.kill("-9");
    assert!(Command::new("umount").arg("-l").arg(&dir).status().unwrap().success());
    let report = node.json(&["commit", text(&upper), &child("3"), "--quiet", "--reuse", &child("2")]);
    compare(&check("3"), &expected);
    assert!(report["new_bytes"].as_u64().unwrap() < 400_000, "{report}");
    let changed = node.json(&["upper", "diff", text(&upper)]);
    assert!(changed.to_string().contains("/last"), "{changed}");

    // The image's own next device has one again.
    let other = node.path().join("other");
    node.done(&["mount", "--transport", "loop", "--upper", text(&other), &child("3"), text(&dir)]);
    let device = PathBuf::from(node.json(&["list"])[0]["device"].as_str().unwrap());
    assert!(has_journal(&device));
    nodes::assert_same(&expected, &nodes::read(&dir), nodes::Compare::Everything);
    umount(&node, &dir);
}
