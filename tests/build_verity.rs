//! The hash tree behind a file system is one that `veritysetup` accepts, and no changed byte passes it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use built::{Layout, request, run, shell};
use firstread::build::{Report, Request, Tree};
use nodes::{Compare, assert_same};
use program::Node;
use tempfile::TempDir;

fn with_tree(source: &str, layout: &Layout) -> Request {
    let mut request = request(source, &format!("oci:{}:t", layout.0.display()));
    request.tree = Tree::Verity;
    request
}

fn verify(device: &Path, root: &str, offset: u64) -> bool {
    let output = Command::new("veritysetup")
        .arg("verify")
        .args([device, device])
        .args([root, &format!("--hash-offset={offset}")])
        .output()
        .unwrap();
    output.status.success()
}

/// Root hash and offset as the image's annotations have them.
fn annotated(layout: &Layout, report: &Report) -> (String, u64) {
    let manifest = layout.json(&report.digest.to_string());
    let annotations = &manifest["layers"].as_array().unwrap().last().unwrap()["annotations"];
    let text =
        |name: &str| annotations[format!("containerd.io/snapshot/firstread/{name}")].as_str().unwrap().to_owned();
    (text("verity-root"), text("verity-offset").parse().unwrap())
}

#[test]
fn a_file_system_with_a_tree() {
    let temp = TempDir::new().unwrap();
    let node = Node::new();
    shell(
        temp.path(),
        "mkdir -p tree/d; head -c 5000000 /dev/urandom > tree/large; head -c 300K /dev/zero > tree/zeros
        for n in $(seq 300); do echo $n > tree/d/$n; done",
    );
    let layout = Layout(temp.path().join("layout"));
    let mut request = with_tree(&format!("dir:{}", temp.path().join("tree").display()), &layout);
    // Three levels: holes behind the data, whose hashes are a part of the tree.
    request.size = Some(100 << 20);
    let report = run(&request).unwrap();
    let (root, offset) = annotated(&layout, &report);
    assert_eq!(report.verity, [root.clone()]);
    assert_eq!(offset, 100 << 20);
    let found = layout.tree(&report.digest.to_string(), temp.path());
    assert_same(&nodes::read(&temp.path().join("tree")), &found, Compare::AcrossFileSystems);
    let device = temp.path().join("device.img");
    assert!(verify(&device, &root, offset));
    let inspected = node.json(&["inspect", &format!("oci:{}:t", layout.0.display())]);
    assert_eq!(inspected["verity"]["root"], root);
    assert_eq!(inspected["verity"]["offset"], offset);
    let file = File::options().write(true).open(&device).unwrap();
    for at in [5000, 90 << 20] {
        file.write_all_at(&[1], at).unwrap();
        assert!(!verify(&device, &root, offset), "a byte was changed at {at}");
        layout.device(&report.digest.to_string(), &device);
    }
    let again = Layout(temp.path().join("again"));
    request.destination = format!("oci:{}:t", again.0.display()).parse().unwrap();
    request.workers = 5;
    assert_eq!(run(&request).unwrap().digest, report.digest);
    // The tree of a second image, whose chunks are all in the first.
    request.reuse = vec![format!("oci:{}:t", layout.0.display()).parse().unwrap()];
    assert_eq!(run(&request).unwrap().verity, [root]);
}

/// One block, the borders of a level, and one more.
#[test]
fn disks_of_every_depth() {
    let temp = TempDir::new().unwrap();
    for blocks in [1u64, 2, 128, 129, 128 * 128, 128 * 128 + 1] {
        let disk = temp.path().join("disk");
        let file = File::create(&disk).unwrap();
        file.set_len(blocks * 4096).unwrap();
        for block in [0, blocks / 2, blocks - 1] {
            file.write_all_at(&block.to_le_bytes().map(|byte| byte | 1), block * 4096).unwrap();
        }
        let layout = Layout(temp.path().join(format!("layout-{blocks}")));
        let report = run(&with_tree(&format!("raw:{}", disk.display()), &layout)).unwrap();
        let (root, offset) = annotated(&layout, &report);
        let device = temp.path().join("device");
        layout.device(&report.digest.to_string(), &device);
        assert!(verify(&device, &root, offset), "{blocks} blocks");
    }
}
