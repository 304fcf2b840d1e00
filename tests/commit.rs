//! What was written to a device becomes an image: through the programs, a real registry, and a second node.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/fault.rs"]
mod fault;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;
#[path = "common/registry.rs"]
mod registry;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use fault::Fault;
use nodes::{Compare, assert_same};
use program::{Node, wait_until};
use random::Random;
use registry::Registry;
use serde_json::{Value, json};

/// A tree with small files, large ones, and a directory of each.
fn tree(dir: &Path) -> PathBuf {
    let (tree, mut random) = (dir.join("tree"), Random(7));
    for (path, len) in [("etc/passwd", 700), ("etc/group", 200), ("usr/bin/tool", 1_000_000), ("srv/data", 3_000_000)] {
        fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
        fs::write(tree.join(path), random.bytes(len)).unwrap();
    }
    for number in 0..60 {
        let path = tree.join(format!("usr/share/doc/p{}/f{number}", number % 5));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, random.bytes(100 + number * 400)).unwrap();
    }
    tree
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A node with the image of [`tree`] mounted on `mnt`, writable.
fn mounted(registry: &Registry, upper: &str) -> (Node, PathBuf) {
    let node = Node::new();
    let reference = format!("{}/app:1", registry.host());
    let tree = tree(node.path());
    node.done(&["build", &format!("dir:{}", tree.display()), &reference, "--size", "300M", "--no-cache", "--quiet"]);
    let dir = node.mount_point("mnt");
    let upper = node.path().join(upper);
    node.done(&["mount", &reference, text(&dir), "--upper", text(&upper)]);
    (node, dir)
}

/// Changes something of each kind.
fn work(dir: &Path) {
    let mut random = Random(9);
    fs::write(dir.join("etc/passwd"), "root").unwrap();
    fs::write(dir.join("etc/new"), random.bytes(5000)).unwrap();
    fs::remove_file(dir.join("etc/group")).unwrap();
    fs::create_dir_all(dir.join("opt/made/here")).unwrap();
    for number in 0..30 {
        fs::write(dir.join(format!("opt/made/here/{number}")), random.bytes(number * 300)).unwrap();
    }
    fs::write(dir.join("opt/large"), random.bytes(2_000_000)).unwrap();
    symlink("large", dir.join("opt/link")).unwrap();
    fs::hard_link(dir.join("opt/large"), dir.join("opt/second")).unwrap();
    fs::set_permissions(dir.join("usr/bin/tool"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::remove_dir_all(dir.join("usr/share/doc/p3")).unwrap();
    // Twelve blocks in the middle of a large file, over the border of two of its chunks.
    let data = fs::File::options().write(true).open(dir.join("srv/data")).unwrap();
    data.write_all_at(&random.bytes(12 * 4096), 58 * 4096).unwrap();
    let sparse = fs::File::create(dir.join("opt/sparse")).unwrap();
    sparse.write_all_at(&random.bytes(10_000), 5_000_000).unwrap();
}

/// Mounts an image on another node, which has nothing of the first one's, and compares.
fn same_elsewhere(reference: &str, dir: &Path) {
    let second = Node::new();
    let other = second.mount_point("mnt");
    second.done(&["mount", reference, text(&other)]);
    assert_same(&nodes::read(dir), &nodes::read(&other), Compare::Everything);
}

fn digest_of(registry: &Registry, name: &str) -> (Value, Value) {
    let inspect = |what: &[&str]| {
        let output = Command::new("skopeo")
            .arg("inspect")
            .args(what)
            .arg("--tls-verify=false")
            .arg(name_of(registry, name))
            .output();
        serde_json::from_slice(&output.unwrap().stdout).unwrap()
    };
    (inspect(&["--raw"]), inspect(&["--raw", "--config"]))
}

fn name_of(registry: &Registry, name: &str) -> String {
    format!("docker://{}/{name}", registry.host())
}

#[test]
fn a_second_node_has_the_same_tree_and_only_what_is_new_was_pushed() {
    let registry = Registry::start();
    let (node, dir) = mounted(&registry, "upper");
    let (parent, _) = digest_of(&registry, "app:1");
    work(&dir);
    let child = format!("{}/app:2", registry.host());
    let report = node.json(&[
        "commit",
        "app-1",
        &child,
        "--change",
        r#"CMD ["/opt/large", "x"]"#,
        "--change",
        "ENV PATH=/opt:$PATH HOME=/srv",
        "-m",
        "what was done",
        "-a",
        "somebody",
    ]);
    for key in ["digest", "index_bytes", "stored_bytes", "new_bytes", "reused_bytes", "chunks", "new_chunks", "seconds"]
    {
        assert!(!report[key].is_null(), "{key}: {report}");
    }
    // Two chunks of the large file, eight of the new one, the small files, and the file system's own.
    let written = 2_000_000 + 2 * (256 << 10) + 30 * 31 / 2 * 300 + 30_000;
    let new = report["new_bytes"].as_u64().unwrap();
    assert!(new < written + 150_000, "{report}");
    assert!(report["new_chunks"].as_u64().unwrap() < 40, "{report}");
    assert!(report["reused_bytes"].as_u64().unwrap() > 3_000_000, "{report}");
    same_elsewhere(&child, &dir);

    let (manifest, config) = digest_of(&registry, "app:2");
    let layers = |manifest: &Value| -> Vec<Value> { manifest["layers"].as_array().unwrap().clone() };
    let (old, layers) = (layers(&parent), layers(&manifest));
    assert_eq!(layers.len(), old.len() + 1, "the parent's pack, a new one, the index");
    assert!(layers.iter().any(|layer| layer["digest"] == old[0]["digest"]), "the parent's pack is listed again");
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), layers.len());
    assert_eq!(config["config"]["Cmd"], json!(["/opt/large", "x"]));
    assert_eq!(config["config"]["Env"], json!(["PATH=/opt:", "HOME=/srv"]));
    assert_eq!(config["author"], "somebody");
    let history = config["history"].as_array().unwrap();
    let filled = history.iter().filter(|entry| entry["empty_layer"] != json!(true)).count();
    assert_eq!(filled, layers.len(), "one for each layer: {history:?}");
    let entry = history.iter().find(|entry| entry["comment"] == "what was done").expect("an entry for the commit");
    assert_eq!(entry["author"], "somebody");
    let base = &manifest["annotations"]["org.opencontainers.image.base.digest"];
    assert!(base.as_str().unwrap().starts_with("sha256:"), "{manifest}");

    // The device goes on over its old lower, and what is committed again is there already.
    fs::write(dir.join("etc/after"), "after").unwrap();
    let third = format!("{}/app:3", registry.host());
    let again = node.json(&["commit", text(&dir), &third, "--reuse", &child]);
    assert!(again["new_bytes"].as_u64() < Some(50_000), "{again}");
    same_elsewhere(&third, &dir);
    wait_until("the snapshots are gone", || fs::read_dir(node.root().join("snapshots")).unwrap().count() == 0);
}

#[test]
fn a_commit_of_a_commit_is_one_and_an_upper_knows_its_image() {
    let registry = Registry::start();
    let (node, dir) = mounted(&registry, "upper");
    work(&dir);
    let second = format!("{}/app:2", registry.host());
    node.done(&["commit", "app-1", &second, "--quiet"]);
    let other = node.mount_point("other");
    // The upper of the first image over the second.
    node.done(&["umount", text(&dir)]);
    let refused = node.fails(1, &["mount", &second, text(&dir), "--upper", text(&node.path().join("upper"))]);
    assert!(refused.contains("belongs to") && refused.contains("app:1"), "{refused}");

    node.done(&["mount", &second, text(&other), "--upper", text(&node.path().join("next"))]);
    fs::write(other.join("opt/third"), Random(3).bytes(400_000)).unwrap();
    fs::remove_file(other.join("opt/large")).unwrap();
    fs::remove_file(other.join("srv/data")).unwrap();
    let third = format!("{}/app:3", registry.host());
    let report = node.json(&["commit", text(&other), &third]);
    assert!(report["new_bytes"].as_u64() < Some(600_000), "{report}");
    assert!(report["stored_bytes"].as_u64() < Some(5_000_000), "what was deleted is gone: {report}");
    same_elsewhere(&third, &other);

    // An upper that no device has, by its directory.
    node.done(&["umount", text(&other)]);
    let fourth = format!("{}/app:4", registry.host());
    let report = node.json(&["commit", text(&node.path().join("next")), &fourth]);
    assert!(report["new_chunks"].as_u64() > Some(0), "{report}");
    let last = Node::new();
    let mount = last.mount_point("mnt");
    last.done(&["mount", &fourth, text(&mount)]);
    assert_eq!(fs::read(mount.join("opt/third")).unwrap(), Random(3).bytes(400_000));
    assert!(!mount.join("srv/data").exists());
}

#[test]
fn a_diff_names_what_changed_and_how() {
    let registry = Registry::start();
    let (node, dir) = mounted(&registry, "upper");
    work(&dir);
    let difference = node.json(&["upper", "diff", "app-1", "--quiet"]);
    let kind = |path: &str| {
        let all = difference["changes"].as_array().unwrap();
        all.iter().find(|change| change["path"] == path).map(|change| (change["kind"].clone(), change["bytes"].clone()))
    };
    for (path, expected) in [
        ("/etc/passwd", ("C", 4096)),
        ("/etc/new", ("A", 8192)),
        ("/etc/group", ("D", 0)),
        ("/opt/made/here", ("A", 0)),
        ("/opt/link", ("A", 0)),
        ("/opt/second", ("A", 489 * 4096)),
        ("/usr/bin/tool", ("C", 0)),
        ("/srv/data", ("C", 12 * 4096)),
        ("/usr/share/doc/p3", ("D", 0)),
        ("/usr/share/doc/p3/f3", ("D", 0)),
        ("/opt/sparse", ("A", 4 * 4096)),
    ] {
        assert_eq!(kind(path), Some((json!(expected.0), json!(expected.1))), "{path}");
    }
    for path in ["/srv", "/usr/share/doc/p1/f1", "/usr"] {
        assert_eq!(kind(path), None, "{path}");
    }
    let table = node.done(&["--quiet", "upper", "diff", text(&dir)]);
    assert!(table.contains("/opt/made/here") && table.contains("(the file system's own)"), "{table}");
    let none = node.fails(1, &["upper", "diff", "nothing-1"]);
    assert!(none.contains("no device nothing-1"), "{none}");
}

#[test]
fn what_can_not_be_committed_says_why() {
    let registry = Registry::start();
    let (node, _) = mounted(&registry, "upper");
    let child = format!("{}/app:2", registry.host());
    let read_only = node.mount_point("ro");
    node.done(&["mount", &format!("{}/app:1", registry.host()), text(&read_only)]);
    let refused = node.fails(1, &["commit", "app-2", &child]);
    assert!(refused.contains("can't be written"), "{refused}");
    let wrong = node.fails(2, &["commit", "app-1", &child, "--change", "RUN true"]);
    assert!(wrong.contains("none of CMD"), "{wrong}");
    let unknown = node.fails(1, &["commit", "app-9", &child]);
    assert!(unknown.contains("no device app-9"), "{unknown}");
    let unreachable = node.fails(1, &["commit", "app-1", "127.0.0.1:9/app:2", "--quiet"]);
    assert!(unreachable.contains("127.0.0.1:9"), "{unreachable}");
    wait_until("the snapshots are gone", || fs::read_dir(node.root().join("snapshots")).unwrap().count() == 0);
}

#[test]
fn a_registry_that_fails_halfway_has_no_half_an_image() {
    let registry = Registry::start();
    let (node, dir) = mounted(&registry, "upper");
    work(&dir);
    let proxy = Fault::start(&format!("http://{}", registry.host()), &[]);
    let child = format!("{}/app:2", proxy.host());
    let tags = || {
        let listed = Command::new("skopeo")
            .args(["list-tags", "--tls-verify=false", &format!("docker://{}/app", registry.host())])
            .output()
            .unwrap();
        let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
        let mut tags: Vec<String> = serde_json::from_value(listed["Tags"].clone()).unwrap();
        tags.sort_unstable();
        tags
    };
    // Each blob's upload in turn, its end, and the manifest.
    for rule in [
        "status:code=500,method=POST",
        "status:code=503,method=PUT",
        "reset:method=PUT,path=/blobs/",
        "status:code=500,method=PUT,path=/blobs/,skip=1",
        "status:code=500,method=PUT,path=/manifests/",
        "status:code=403,method=POST",
    ] {
        proxy.arm(rule);
        let output = node.run(&["commit", "app-1", &child, "--quiet"]);
        proxy.heal();
        assert_eq!(output.status.code(), Some(1), "{rule}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(proxy.host()), "{rule}: {said}");
        assert_eq!(tags(), ["1"], "{rule}");
    }
    node.done(&["commit", "app-1", &child, "--quiet"]);
    assert_eq!(tags(), ["1", "2"]);
    same_elsewhere(&format!("{}/app:2", registry.host()), &dir);
}

#[test]
fn an_export_is_committed_by_the_directory_of_its_upper_while_a_guest_has_it() {
    let node = Node::new();
    let path = |name: &str| node.path().join(name);
    let disk = Random(4).bytes(3 << 20);
    fs::write(path("disk"), &disk).unwrap();
    let image = |tag: &str| format!("oci:{}:{tag}", path("layout").display());
    node.done(&["build", &format!("raw:{}", path("disk").display()), &image("1"), "--no-cache", "--quiet"]);
    let socket = format!("unix:{}", path("s.sock").display());
    let upper = path("upper");
    let mut export = node
        .command(&["--quiet", "export", &image("1"), "--nbd", &socket, "--upper", text(&upper)])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it is served", || path("s.sock").exists());
    let script = "import nbd, sys
h = nbd.NBD()
h.connect_uri('nbd+unix:///?socket=' + sys.argv[1])
h.pwrite(b'z' * 8192, 1 << 20)";
    let written = Command::new("/usr/bin/python3").args(["-c", script, text(&path("s.sock"))]).status().unwrap();
    assert!(written.success());
    let report = node.json(&["commit", text(&upper), &image("2"), "--quiet"]);
    assert_eq!(report["new_chunks"], 1, "{report}");
    assert!(export.try_wait().unwrap().is_none(), "it goes on");
    assert!(Command::new("kill").arg(export.id().to_string()).status().unwrap().success());
    export.wait().unwrap();
    // Nobody has it any more: the directory itself is committed.
    let again = node.json(&["commit", text(&upper), &image("3"), "--quiet", "--reuse", &image("2")]);
    assert_eq!(again["new_chunks"], 0, "{again}");
    let attached = node.json(&["attach", &image("2")]);
    let mut expected = disk;
    expected[1 << 20..][..8192].fill(b'z');
    assert!(fs::read(attached["device"].as_str().unwrap()).unwrap() == expected);
}
