//! What the start-up pack has of files is laid into the page cache of a mount, before anybody reads; and whoever takes the
//! mount and its device away is not held up by that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/fault.rs"]
mod fault;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;

use std::fs::{self, File};
use std::io::IoSliceMut;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use built::Layout;
use fault::Fault;
use firstread::index::Index;
use firstread::profile::{Place, Profile};
use program::{Node, same_files, wait_until};
use rustix::io::{ReadWriteFlags, preadv2};
use serde_json::{Value, json};

const BLOCK: u32 = 4096;
/// Blocks of `large`.
const LARGE: u32 = 512;

/// The node's tree: what starts read parts of, and `beside`, which none does.
fn tree(node: &Node) -> PathBuf {
    let tree = node.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for (seed, (name, len)) in [("large", LARGE * BLOCK), ("small", 5000), ("beside", 300_000)].into_iter().enumerate()
    {
        fs::write(tree.join(name), noise(seed as u64, len)).unwrap();
    }
    tree
}

fn noise(seed: u64, len: u32) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Builds `source` in a layout of the node, with a start-up pack of these blocks of files, in this order. The layout, and
/// what `optimize` says.
fn packed(node: &Node, source: &str, start: &[(&str, Range<u32>)]) -> (PathBuf, Value) {
    let (layout, profile) = (node.path().join("layout"), node.path().join("hot"));
    let (plain, fast) = (format!("oci:{}:plain", layout.display()), reference(&layout));
    let built = node.json(&["--quiet", "build", source, &plain]);
    let index = Layout(layout.clone()).index(built["digest"].as_str().unwrap());
    let device = Index::from_bytes(index).unwrap().device_digest().to_string();
    let mut text = json!({
        "firstread_profile": 1, "image": "x", "device": device, "file_system": "ext4", "device_bytes": 4096,
        "seconds": 1, "complete": true,
    })
    .to_string();
    for (path, blocks) in start {
        let line = json!({"t": 0, "is": "file", "path": path, "from": blocks.start, "blocks": blocks.len()});
        text.push_str(&format!("\n{line}"));
    }
    fs::write(&profile, text).unwrap();
    let optimized = node.json(&["--quiet", "optimize", &plain, &fast, "--profile", profile.to_str().unwrap()]);
    assert_eq!(optimized["startup"]["lost_blocks"], 0, "{optimized}");
    (layout, optimized)
}

fn reference(layout: &Path) -> String {
    format!("oci:{}:fast", layout.display())
}

/// Blocks of a file that are in the page cache.
fn resident(file: &Path) -> u64 {
    let output = Command::new("fincore").args(["--raw", "--noheadings", "-o", "PAGES"]).arg(file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// Whether a block is in the page cache. If it is not, it may be afterwards.
fn has_block(file: &Path, block: u32) -> bool {
    let (file, mut byte) = (File::open(file).unwrap(), [0]);
    let read =
        preadv2(&file, &mut [IoSliceMut::new(&mut byte)], u64::from(block) * u64::from(BLOCK), ReadWriteFlags::NOWAIT);
    read == Ok(1)
}

/// Whether a profile has a part of the file.
fn names(profile: &Profile, file: &str) -> bool {
    let is_it = |place: &Place| matches!(place, Place::Named { path, .. } if path == file.as_bytes());
    profile.runs.iter().any(|run| is_it(&run.place))
}

fn mount(node: &Node, image: &str, dir: &Path) -> Value {
    node.json(&["mount", image, dir.to_str().unwrap()])
}

#[test]
fn what_is_hot_is_in_the_page_cache_before_anybody_reads_and_nothing_else() {
    let node = Node::new();
    let tree = tree(&node);
    let start = [("/large", 10..21), ("/large", 100..102), ("/small", 0..2)];
    let (layout, _) = packed(&node, &format!("dir:{}", tree.display()), &start);
    let dir = node.mount_point("mnt");
    // As the stream brings it; then at once, since the pool has it; then never, since nothing was to be read ahead.
    for (prefetch, lays) in [("startup", true), ("startup", true), ("none", false)] {
        let mut command = node.command(&["mount", &reference(&layout), dir.to_str().unwrap()]);
        assert!(command.env("FIRSTREAD_FETCH_PREFETCH", prefetch).stdout(Stdio::null()).status().unwrap().success());
        if lays {
            wait_until("what is last is laid", || resident(&dir.join("small")) == 2);
            wait_until("what is before that is laid", || resident(&dir.join("large")) >= 13);
        } else {
            // There is no sign of what never comes: as long as it would have taken by far.
            std::thread::sleep(Duration::from_secs(1));
        }
        let found = ["large", "small", "beside"].map(|name| resident(&dir.join(name)));
        assert_eq!(found, if lays { [13, 2, 0] } else { [0, 0, 0] }, "{prefetch}");
        for block in (10..21).chain(100..102).filter(|_| lays) {
            assert!(has_block(&dir.join("large"), block), "block {block}");
        }
        same_files(&tree, &dir);
        node.done(&["umount", dir.to_str().unwrap()]);
        node.done(&["stop"]);
    }
}

#[test]
fn a_mount_and_its_device_can_be_taken_away_while_a_start_is_being_laid() {
    let made = Node::new();
    let source = format!("dir:{}", tree(&made).display());
    let (layout, _) = packed(&made, &source, &[("/small", 0..2), ("/large", 0..LARGE)]);
    let pack = made.json(&["inspect", &reference(&layout)])["packs"][0].clone();
    assert_eq!(pack["role"], "startup");
    let proxy = Fault::start(layout.to_str().unwrap(), &[]);
    // Minutes for all of it, and half of one for a chunk of `large`.
    let hex = pack["digest"].as_str().unwrap().trim_start_matches("sha256:");
    proxy.arm(&format!("drip:rate=10K,path={hex},method=GET"));
    let image = format!("{}/app:fast", proxy.host());
    for by_verb in [true, false] {
        for begun in [true, false] {
            let node = Node::new();
            let dir = node.mount_point("mnt");
            let device = mount(&node, &image, &dir)["device"].as_str().unwrap().to_owned();
            if begun {
                wait_until("what has come is laid", || resident(&dir.join("small")) == 2);
                let file = node.path().join("read");
                node.done(&["profile", dir.to_str().unwrap(), "--all", "-o", file.to_str().unwrap()]);
                let profile = Profile::from_text(&fs::read_to_string(&file).unwrap()).unwrap();
                assert!(
                    names(&profile, "/small") && !names(&profile, "/large"),
                    "it is read before it comes: {profile:?}"
                );
            }
            let status = node.json(&["status", dir.to_str().unwrap()]);
            assert_eq!(status["startup"]["streaming"], true, "{status}");
            if by_verb {
                node.done(&["umount", dir.to_str().unwrap()]);
            } else {
                assert!(Command::new("umount").arg(&dir).status().unwrap().success());
                node.done(&["detach", &device]);
            }
            assert_eq!(node.json(&["list"]), json!([]));
            let name = device.trim_start_matches("/dev/");
            wait_until("the loop device is free", || !fs::exists(format!("/sys/block/{name}/loop")).unwrap());
        }
    }
}

#[test]
fn a_recording_has_what_its_program_reads_and_not_what_is_laid_elsewhere() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/image");
    let made = Command::new(script).arg("small").stderr(Stdio::inherit()).output().unwrap();
    assert!(made.status.success(), "scripts/image small");
    let small = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
    let node = Node::new();
    let source = format!("oci:{}:latest", small.join("layout").display());
    let (layout, _) = packed(&node, &source, &[("/usr/lib/random", 0..20)]);
    let dir = node.mount_point("mnt");
    mount(&node, &reference(&layout), &dir);
    wait_until("the start is laid", || resident(&dir.join("usr/lib/random")) == 20);
    node.done(&["umount", dir.to_str().unwrap()]);

    // All is local: it would be laid long before the program ends.
    let file = node.path().join("recorded");
    let script = "sleep 1; cat /var/lib/data/size-65536";
    node.done(&["record", &reference(&layout), "-o", file.to_str().unwrap(), "--", "sh", "-c", script]);
    let profile = Profile::from_text(&fs::read_to_string(&file).unwrap()).unwrap();
    assert!(names(&profile, "/var/lib/data/size-65536") && names(&profile, "/bin/busybox"), "{profile:?}");
    assert!(!names(&profile, "/usr/lib/random"), "{profile:?}");
}
