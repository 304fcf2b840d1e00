//! A start is recorded, the image optimized, and the start repeated on a node that has nothing: from a real registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;

use std::fs;
use std::path::{Path, PathBuf};

use program::{Node, wait_until};
use registry::Registry;
use serde_json::Value;

/// Unmounts. A test beside this one that starts a program has our files open in it for a moment.
fn umount(node: &Node, dir: &Path) {
    wait_until("nobody uses it any more", || node.run(&["umount", dir.to_str().unwrap()]).status.success());
}

fn image(registry: &Registry, name: &str) -> String {
    format!("{}/{name}", registry.host())
}

/// A tree of directories with small files and some large ones; `version` changes a few of them.
fn tree(dir: &Path, version: u64) -> PathBuf {
    let tree = dir.join(format!("tree-{version}"));
    for number in 0..400u64 {
        let parent = tree.join(format!("usr/lib/d{}", number % 20));
        fs::create_dir_all(&parent).unwrap();
        let len = if number % 40 == 0 { 900_000 + number * 1111 } else { 3000 + number * 57 };
        let seed = if number % 50 == 7 { number + version * 1000 } else { number };
        fs::write(parent.join(format!("f{number}")), noise(seed, len)).unwrap();
    }
    fs::write(tree.join("only"), version.to_string()).unwrap();
    tree
}

fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|at| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if at % 3 == 0 { b'a' } else { (state >> 32) as u8 }
        })
        .collect()
}

/// What the "program" reads: parts of large files and whole small ones, here and there.
fn start(dir: &Path) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut read = Vec::new();
    for number in [3u64, 43, 57, 80, 120, 199, 207, 240, 305, 399] {
        let path = dir.join(format!("usr/lib/d{}/f{number}", number % 20));
        if number % 40 == 0 {
            let file = fs::File::open(path).unwrap();
            for at in [600_000u64, 4096, 300_000] {
                let mut part = vec![0; 5000];
                file.read_exact_at(&mut part, at).unwrap();
                read.extend(part);
            }
        } else {
            read.extend(fs::read(path).unwrap());
        }
    }
    read
}

/// Mounts `image` on a node that has nothing, runs the start, and gives out the status, with what `also` did before it.
fn cold_start(image: &str, expected: &[u8], also: impl Fn(&Node, &Path)) -> Value {
    let node = Node::new();
    let dir = node.mount_point("mnt");
    node.done(&["mount", image, dir.to_str().unwrap()]);
    assert!(start(&dir) == expected, "{image}");
    let mut status = Value::Null;
    wait_until("the stream has ended", || {
        status = node.json(&["status", dir.to_str().unwrap()]);
        status["startup"]["streaming"] == false
    });
    also(&node, &dir);
    umount(&node, &dir);
    status
}

fn build(node: &Node, source: &Path, image: &str, more: &[&str]) -> Value {
    let source = format!("dir:{}", source.display());
    let mut all = vec!["--quiet", "build", &source, image];
    all.extend(more);
    node.json(&all)
}

fn optimize(node: &Node, from: &str, to: &str, profile: &Path) -> Value {
    node.json(&["--quiet", "optimize", from, to, "--profile", profile.to_str().unwrap()])
}

#[test]
fn a_recorded_start_needs_one_stream_and_no_misses() {
    let registry = Registry::start();
    let node = Node::new();
    let (plain, fast) = (image(&registry, "app:1"), image(&registry, "app:1-fast"));
    let source = tree(node.path(), 1);
    let built = build(&node, &source, &plain, &[]);
    let profile = node.path().join("profile");
    let expected = start(&source);
    let before = cold_start(&plain, &expected, |node, dir| {
        node.done(&["ready", dir.to_str().unwrap()]);
        fs::read(dir.join("usr/lib/d1/f1")).unwrap();
        node.done(&["profile", dir.to_str().unwrap(), "-o", profile.to_str().unwrap()]);
    });
    assert_eq!(before["bytes"]["startup"], 0);

    let optimized = optimize(&node, &plain, &fast, &profile);
    assert_eq!(optimized["startup"]["same_device"], true);
    assert_eq!(optimized["startup"]["lost_blocks"], 0);
    assert_eq!(optimized["startup"]["read_ahead_kb"], 128);
    assert!(optimized["new_bytes"].as_u64() < built["stored_bytes"].as_u64().map(|bytes| bytes / 2), "{optimized}");
    let inspected = node.json(&["inspect", &fast]);
    assert_eq!(inspected["packs"][0]["role"], "startup", "it is the first layer: {inspected}");

    let after = cold_start(&fast, &expected, |node, dir| {
        program::same_files(&source, dir);
        umount(node, dir);
        node.done(&["verify", &fast]);
        node.done(&["mount", &fast, dir.to_str().unwrap()]);
    });
    let misses = |status: &Value| status["startup"]["missed_outside"].as_u64().unwrap();
    assert!(misses(&before) > 10, "{before}");
    assert!(misses(&after) <= 5, "{after}");
    assert!(after["requests"].as_u64() <= Some(20), "{after}");
    let chunks = optimized["startup"]["stored_bytes"].as_u64().unwrap() - 1500;
    assert!(after["bytes"]["startup"].as_u64() > Some(chunks), "all but the tar around it: {after}");
    assert!(after["bytes"]["fetched"].as_u64() < before["bytes"]["fetched"].as_u64(), "{before} {after}");

    // Once more, over itself: the start-up pack is replaced.
    let again = optimize(&node, &fast, &fast, &profile);
    assert_eq!(again["digest"], optimized["digest"], "the same profile gives the same image");
    assert_eq!(node.json(&["inspect", &fast])["packs"].as_array().unwrap().len(), 2);
}

#[test]
fn a_profile_of_another_version_applies_by_path_and_shares_most_chunks() {
    let registry = Registry::start();
    let node = Node::new();
    let sources = [tree(node.path(), 1), tree(node.path(), 2)];
    let images = [image(&registry, "app:1"), image(&registry, "app:2")];
    let fast = [image(&registry, "app:1-fast"), image(&registry, "app:2-fast")];
    build(&node, &sources[0], &images[0], &[]);
    build(&node, &sources[1], &images[1], &["--reuse", &images[0]]);
    let profile = node.path().join("profile");
    cold_start(&images[0], &start(&sources[0]), |node, dir| {
        node.done(&["profile", dir.to_str().unwrap(), "-o", profile.to_str().unwrap()]);
    });
    let first = optimize(&node, &images[0], &fast[0], &profile);
    let second = optimize(&node, &images[1], &fast[1], &profile);
    assert_eq!(second["startup"]["same_device"], false);
    assert_eq!(second["startup"]["found_blocks"], first["startup"]["found_blocks"]);
    let status = cold_start(&fast[1], &start(&sources[1]), |_, _| ());
    assert!(status["startup"]["missed_outside"].as_u64() <= Some(5), "{status}");

    // A node that ran the older version streams what is new only.
    let node = Node::new();
    let dir = node.mount_point("mnt");
    let mut streamed = Vec::new();
    for (image, source) in fast.iter().zip(&sources) {
        node.done(&["mount", image, dir.to_str().unwrap()]);
        assert!(start(&dir) == start(source));
        wait_until("the stream has ended", || {
            node.json(&["status", dir.to_str().unwrap()])["startup"]["streaming"] == false
        });
        let status = node.json(&["status", dir.to_str().unwrap()]);
        streamed.push(status["startup"]["planned_bytes"].as_u64().unwrap());
        umount(&node, &dir);
    }
    assert!(streamed[1] * 10 <= streamed[0] * 4, "{streamed:?}");
}

/// What the second of two starts streams on a node that has nothing but the first one's chunks.
fn streamed_after(first: &str, second: &str, expected: &[u8]) -> u64 {
    let node = Node::new();
    let dir = node.mount_point("mnt");
    let mut streamed = 0;
    for image in [first, second] {
        node.done(&["mount", image, dir.to_str().unwrap()]);
        assert!(start(&dir) == expected, "{image}");
        let status = || node.json(&["status", dir.to_str().unwrap()]);
        wait_until("the stream has ended", || status()["startup"]["streaming"] == false);
        streamed = status()["startup"]["planned_bytes"].as_u64().unwrap();
        umount(&node, &dir);
    }
    streamed
}

#[test]
fn hot_chunks_of_an_earlier_image_are_kept_when_a_start_differs_a_little() {
    let registry = Registry::start();
    let node = Node::new();
    let source = tree(node.path(), 1);
    let expected = start(&source);
    let names = ["plain", "first", "alone", "kept", "again"];
    let [plain, first, alone, kept, again] = names.map(|name| image(&registry, &format!("app:{name}")));
    build(&node, &source, &plain, &[]);
    let profiles = [node.path().join("a"), node.path().join("b")];
    for (number, profile) in profiles.iter().enumerate() {
        cold_start(&plain, &expected, |node, dir| {
            for file in [80, 120, 240].iter().take(number * 3) {
                use std::os::unix::fs::FileExt;
                let file = fs::File::open(dir.join(format!("usr/lib/d{}/f{file}", file % 20))).unwrap();
                file.read_exact_at(&mut [0], 720_000).unwrap();
            }
            node.done(&["profile", dir.to_str().unwrap(), "-o", profile.to_str().unwrap()]);
        });
    }
    let [a, b] = profiles;
    optimize(&node, &plain, &first, &a);
    optimize(&node, &plain, &alone, &b);
    let reusing = |to: &str, earlier: &str| {
        let profile = b.to_str().unwrap();
        node.json(&["--quiet", "optimize", &plain, to, "--profile", profile, "--reuse", earlier])
    };
    let optimized = reusing(&kept, &first);
    assert!(optimized["startup"]["kept_chunks"].as_u64() >= Some(3), "{optimized}");
    let without = streamed_after(&first, &alone, &expected);
    let with = streamed_after(&first, &kept, &expected);
    assert!(with > 0 && with * 2 < without, "{with} of {without}");
    // The next version learns all shapes from it.
    assert_eq!(reusing(&again, &kept)["startup"]["chunks"], optimized["startup"]["chunks"]);
    assert_eq!(streamed_after(&kept, &again, &expected), 0);
    cold_start(&kept, &expected, |node, dir| {
        program::same_files(&source, dir);
        umount(node, dir);
        node.done(&["verify", &kept]);
        node.done(&["mount", &kept, dir.to_str().unwrap()]);
    });
}

#[test]
fn what_can_not_be_optimized_is_refused() {
    let node = Node::new();
    let layout = format!("oci:{}:1", node.path().join("layout").display());
    build(&node, &tree(node.path(), 1), &layout, &[]);
    let profile = node.path().join("profile");
    let refused = |text: &str, expected: &str| {
        fs::write(&profile, text).unwrap();
        let all = ["optimize", &layout, &layout, "--profile", profile.to_str().unwrap(), "--quiet"];
        let error = node.fails(1, &all);
        assert!(error.contains(expected), "{text}: {error}");
    };
    let head =
        r#"{"firstread_profile":1,"image":"x","file_system":"ext4","device_bytes":4096,"seconds":1,"complete":true}"#;
    refused("", "empty");
    refused("nonsense", "first line");
    refused(head, "nothing that it names");
    refused(
        &format!("{head}\n{}\n", r#"{"t":0,"is":"file","path":"/nowhere","from":0,"blocks":1}"#),
        "nothing that it names",
    );
    refused(&format!("{head}\n{}\n", r#"{"t":0,"is":"data","block":1,"blocks":4294967294}"#), "nothing that it names");
    // More of a file than there is: what there is counts.
    let path = "/usr/lib/d3/f3";
    fs::write(
        &profile,
        format!("{head}\n{{\"t\":0,\"is\":\"file\",\"path\":\"{path}\",\"from\":0,\"blocks\":4294967295}}\n"),
    )
    .unwrap();
    let done = optimize(&node, &layout, &layout, &profile);
    assert_eq!((done["startup"]["found_blocks"].as_u64(), done["startup"]["lost_blocks"].as_u64()), (Some(1), Some(1)));
    assert!(done["startup"]["read_ahead_kb"].is_null());
}

#[test]
fn a_start_has_the_recordings_read_ahead_until_it_is_over() {
    let node = Node::new();
    let layout = format!("oci:{}:1", node.path().join("layout").display());
    build(&node, &tree(node.path(), 1), &layout, &[]);
    let dir = node.mount_point("mnt");
    let profile = node.path().join("profile");
    let mount = |more: &[&str]| {
        let mut all = vec!["mount", &layout, dir.to_str().unwrap()];
        all.extend(more);
        let device = node.json(&all)["device"].as_str().unwrap().to_owned();
        let setting = Path::new(&device).file_name().unwrap().to_str().unwrap().to_owned();
        let setting = PathBuf::from(format!("/sys/class/block/{setting}/queue/read_ahead_kb"));
        move || fs::read_to_string(&setting).unwrap().trim().to_owned()
    };
    let umount = || umount(&node, &dir);

    let setting = mount(&["--read-ahead", "16"]);
    assert_eq!(setting(), "16");
    start(&dir);
    node.done(&["profile", dir.to_str().unwrap(), "-o", profile.to_str().unwrap()]);
    node.done(&["ready", dir.to_str().unwrap()]);
    wait_until("it is raised when the program is ready", || setting() == "128");
    umount();
    optimize(&node, &layout, &layout, &profile);

    let setting = mount(&[]);
    assert_eq!(setting(), "16", "it is the recording's");
    let options = fs::read_to_string("/proc/self/mounts").unwrap();
    let options = options.lines().find(|line| line.contains(dir.to_str().unwrap())).unwrap();
    assert!(options.contains("inode_readahead_blks=0"), "{options}");
    start(&dir);
    assert_eq!(setting(), "16");
    wait_until("nothing hot is read any more", || setting() == "128");
    let status = node.json(&["status", dir.to_str().unwrap()]);
    assert_eq!((status["startup"]["read_ahead_kb"].as_u64(), status["startup"]["ready"].is_null()), (Some(128), true));
    umount();
    assert_eq!(mount(&["--read-ahead", "256"])(), "256");
    umount();
}

#[test]
fn a_build_with_a_profile_puts_what_is_hot_first_and_makes_the_pack() {
    use firstread::profile::{Kind, Place, Profile};
    let node = Node::new();
    let source = tree(node.path(), 1);
    let expected = start(&source);
    let (plain, fast) = (
        format!("oci:{}:1", node.path().join("plain").display()),
        format!("oci:{}:1", node.path().join("fast").display()),
    );
    build(&node, &source, &plain, &[]);
    let profile = node.path().join("profile");
    let record = |image: &str| {
        cold_start(image, &expected, |node, dir| {
            program::same_files(&source, dir);
            node.done(&["profile", dir.to_str().unwrap(), "--all", "-o", profile.to_str().unwrap()]);
        });
        Profile::from_text(&fs::read_to_string(&profile).unwrap()).unwrap()
    };
    // Where the data of the start's files ends on the device.
    let end = |profile: &Profile| {
        let hot: Vec<String> = [3u64, 43, 57, 80, 120, 199, 207, 240, 305, 399]
            .iter()
            .map(|number| format!("/usr/lib/d{}/f{number}", number % 20))
            .collect();
        let is_hot = |place: &Place| matches!(place, Place::Named { kind: Kind::File, path, .. } if hot.iter().any(|hot| hot.as_bytes() == path));
        profile.runs.iter().filter(|run| is_hot(&run.place)).map(|run| run.block.unwrap() + run.blocks).max().unwrap()
    };
    let recorded = record(&plain);
    let start_only = node.path().join("start");
    cold_start(&plain, &expected, |node, dir| {
        node.done(&["profile", dir.to_str().unwrap(), "-o", start_only.to_str().unwrap()]);
    });
    let built = build(&node, &source, &fast, &["--profile", start_only.to_str().unwrap()]);
    assert_eq!(built["startup"]["lost_blocks"], 0);
    assert!(built["startup"]["found_blocks"].as_u64() > Some(10), "{built}");
    let again = record(&fast);
    assert!(end(&again) < end(&recorded) / 2, "{} {}", end(&again), end(&recorded));
    let status = cold_start(&fast, &expected, |_, _| ());
    assert!(status["startup"]["missed_outside"].as_u64() <= Some(5), "{status}");
    // The ordinary chunks are the same ones in another order: what is new is metadata.
    let other = format!("oci:{}:1", node.path().join("other").display());
    let reused = build(&node, &source, &other, &["--reuse", &fast]);
    assert!(reused["new_bytes"].as_u64().unwrap() * 20 < reused["stored_bytes"].as_u64().unwrap(), "{reused}");
    let error = node.fails(
        1,
        &[
            "build",
            &format!("dir:{}", source.display()),
            "oci-archive:/nowhere/x.tar",
            "--profile",
            start_only.to_str().unwrap(),
        ],
    );
    assert!(error.contains("registry or an OCI layout"), "{error}");
}
