//! A package is installed in a writable device, and what is pushed is about as much as the package's files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;
#[path = "common/registry.rs"]
mod registry;

use std::fs;
use std::path::Path;
use std::process::Command;

use nodes::{Compare, assert_same};
use program::Node;
use random::Random;
use registry::Registry;

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Bytes that compress to about a half.
fn content(random: &mut Random, len: usize) -> Vec<u8> {
    random.bytes(len).into_iter().map(|byte| byte & 0x8f).collect()
}

/// A package like many: a large binary, libraries, documentation and a lot of small files in directories of its own.
fn package(dir: &Path, name: &str) -> Vec<u8> {
    let (root, mut random) = (dir.join(name), Random(name.len() as u64));
    let mut files = vec![(format!("usr/bin/{name}"), 3_000_000), (format!("usr/lib/lib{name}.so.1"), 1_200_000)];
    files.extend((0..150).map(|number| (format!("usr/share/{name}/{}/m{number}", number % 7), 300 + number * 113)));
    files.extend((0..6).map(|number| (format!("usr/share/doc/{name}/d{number}"), 4000 * number + 10)));
    let mut all = Vec::new();
    for (path, len) in files {
        let bytes = content(&mut random, len);
        all.extend_from_slice(&bytes);
        fs::create_dir_all(root.join(&path).parent().unwrap()).unwrap();
        fs::write(root.join(path), bytes).unwrap();
    }
    fs::create_dir(root.join("DEBIAN")).unwrap();
    let control = format!("Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: a test\n");
    fs::write(root.join("DEBIAN/control"), control).unwrap();
    run(Command::new("dpkg-deb")
        .args(["--build", "--root-owner-group"])
        .arg(&root)
        .arg(dir.join(format!("{name}.deb"))));
    all
}

#[test]
fn an_installed_package_is_pushed_and_nothing_else() {
    let (registry, node, second) = (Registry::start(), Node::new(), Node::new());
    // The package is made elsewhere, and an image with another one is what it is installed in.
    let tree = node.path().join("tree");
    fs::create_dir_all(tree.join("var/lib/dpkg/info")).unwrap();
    fs::write(tree.join("var/lib/dpkg/status"), "").unwrap();
    package(node.path(), "first");
    let new = package(node.path(), "secondpackage");
    let install = |root: &Path, name: &str| {
        let deb = node.path().join(format!("{name}.deb"));
        run(Command::new("dpkg").arg(format!("--root={}", root.display())).args(["--force-depends", "-i"]).arg(deb))
    };
    install(&tree, "first");
    let (parent, child) = (format!("{}/app:1", registry.host()), format!("{}/app:2", registry.host()));
    node.done(&["build", &format!("dir:{}", tree.display()), &parent, "--size", "500M", "--no-cache", "--quiet"]);
    let dir = node.mount_point("mnt");
    node.done(&["mount", &parent, dir.to_str().unwrap(), "--rw"]);
    install(&dir, "secondpackage");
    let report = node.json(&["commit", dir.to_str().unwrap(), &child, "--quiet"]);
    let compressed = zstd::bulk::compress(&new, 3).unwrap().len() as u64;
    let pushed = report["new_bytes"].as_u64().unwrap();
    println!("{pushed} bytes were pushed, the new files are {compressed} compressed");
    assert!(pushed * 10 <= compressed * 13, "{pushed} bytes were pushed, the new files are {compressed} compressed");
    assert!(report["reused_bytes"].as_u64() > Some(compressed), "{report}");
    let other = second.mount_point("mnt");
    second.done(&["mount", &child, other.to_str().unwrap()]);
    assert_same(&nodes::read(&dir), &nodes::read(&other), Compare::Everything);
}
