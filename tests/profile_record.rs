//! What a start read is recorded from attach, in order, by path and block; and written as a profile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use firstread::build::{Request, Silent, build};
use firstread::profile::{Kind, Place, Profile};
use program::{Node, wait_until};
use serde_json::Value;

const BLOCK: u64 = 4096;

/// A tree of some directories with small and large files, and an image of it.
fn image(node: &Node) -> (PathBuf, String) {
    let tree = node.path().join("tree");
    for number in 0..60u64 {
        let dir = tree.join(format!("usr/lib/d{}", number % 5));
        fs::create_dir_all(&dir).unwrap();
        let len = if number % 10 == 0 { 900_000 + number * 1111 } else { 1000 + number * 137 };
        let bytes: Vec<u8> = (0..len).map(|at| (at.wrapping_mul(number + 7) >> 3) as u8).collect();
        fs::write(dir.join(format!("f{number}")), bytes).unwrap();
    }
    fs::write(tree.join("usr/lib/d0/a\\b \"c\""), b"strange").unwrap();
    let reference = format!("oci:{}:1", node.path().join("layout").display());
    let request = Request::new(format!("dir:{}", tree.display()).parse().unwrap(), reference.parse().unwrap());
    let silent: std::sync::Arc<dyn firstread::build::Progress> = std::sync::Arc::new(Silent);
    build(&request, &silent).unwrap();
    (tree, reference)
}

fn profile(node: &Node, arguments: &[&str]) -> Profile {
    let file = node.path().join("profile");
    let mut all = vec!["profile", "-o", file.to_str().unwrap()];
    all.extend(arguments);
    node.done(&all);
    Profile::from_text(&fs::read_to_string(&file).unwrap()).unwrap()
}

/// The blocks of a file that a profile has.
fn blocks_of(profile: &Profile, wanted: &str) -> BTreeSet<u32> {
    let runs = profile.runs.iter().filter_map(|run| match &run.place {
        Place::Named { kind: Kind::File, path, from } if path == wanted.as_bytes() => Some(*from..*from + run.blocks),
        _ => None,
    });
    runs.flatten().collect()
}

fn position(profile: &Profile, wanted: &str) -> usize {
    let is_it = |place: &Place| matches!(place, Place::Named { path, .. } if path == wanted.as_bytes());
    profile.runs.iter().position(|run| is_it(&run.place)).unwrap_or_else(|| panic!("{wanted} is not in the profile"))
}

/// Every run with a path has that file's bytes at its place on the device.
fn check_places(profile: &Profile, device: &Path, tree: &Path) {
    let device = File::open(device).unwrap();
    let mut checked = 0;
    for run in &profile.runs {
        let Place::Named { kind: Kind::File, path, from } = &run.place else { continue };
        let path = std::str::from_utf8(path).unwrap().trim_start_matches('/');
        let content = fs::read(tree.join(path)).unwrap();
        let start = *from as usize * BLOCK as usize;
        let expected = &content[start..content.len().min(start + run.blocks as usize * BLOCK as usize)];
        let mut found = vec![0; expected.len()];
        device.read_exact_at(&mut found, u64::from(run.block.unwrap()) * BLOCK).unwrap();
        assert!(found == expected, "{path} from block {from}");
        checked += 1;
    }
    assert!(checked > 3, "{checked} runs were checked");
}

#[test]
fn a_start_is_recorded_by_path_and_block_in_the_order_of_first_touch() {
    let node = Node::new();
    let (tree, reference) = image(&node);
    let dir = node.mount_point("mnt");
    let mounted = node.json(&["mount", &reference, dir.to_str().unwrap()]);
    let read = |path: &str| fs::read(dir.join(path)).unwrap();
    read("usr/lib/d2/f7");
    read("usr/lib/d0/f10");
    read("usr/lib/d0/a\\b \"c\"");
    read("usr/lib/d2/f7");
    let ready = node.json(&["ready", dir.to_str().unwrap()]);
    read("usr/lib/d4/f14");

    let start = profile(&node, &[dir.to_str().unwrap()]);
    let recording = &start.recording;
    assert_eq!((recording.image.as_str(), recording.file_system.as_str()), (reference.as_str(), "ext4"));
    assert_eq!(recording.digest.as_deref(), mounted["digest"].as_str());
    assert_eq!(recording.read_ahead_kb, Some(128));
    assert_eq!(recording.ready, ready["seconds"].as_f64());
    assert!(recording.complete && recording.seconds >= recording.ready.unwrap());

    assert_eq!(blocks_of(&start, "/usr/lib/d2/f7"), [0].into());
    let large = fs::metadata(tree.join("usr/lib/d0/f10")).unwrap().len();
    assert_eq!(blocks_of(&start, "/usr/lib/d0/f10").len() as u64, large.div_ceil(BLOCK));
    assert!(position(&start, "/usr/lib/d2/f7") < position(&start, "/usr/lib/d0/f10"));
    assert!(position(&start, "/usr/lib/d0/f10") < position(&start, "/usr/lib/d0/a\\b \"c\""));
    assert!(position(&start, "/usr/lib/d2") < position(&start, "/usr/lib/d2/f7"), "its directory is read before it");
    assert_eq!(start.runs[0].place, Place::Metadata, "the superblock comes first");
    assert_eq!(start.runs[0].block, Some(0));
    let times: Vec<f64> = start.runs.iter().map(|run| run.seconds).collect();
    assert!(times.is_sorted(), "{times:?}");
    assert!(blocks_of(&start, "/usr/lib/d4/f14").is_empty(), "it was read after the program was ready");

    let all = profile(&node, &[dir.to_str().unwrap(), "--all"]);
    assert!(!blocks_of(&all, "/usr/lib/d4/f14").is_empty());
    let mut seen = BTreeSet::new();
    for run in &all.runs {
        let first = run.block.unwrap();
        assert!((first..first + run.blocks).all(|block| seen.insert(block)), "a block is there twice: {run:?}");
    }
    // Looking for names is no touch, so the second profile has nothing that the first did not cause.
    let again = profile(&node, &[dir.to_str().unwrap(), "--all"]);
    assert_eq!(again.runs, all.runs);
    check_places(&all, Path::new(mounted["device"].as_str().unwrap()), &tree);
}

#[test]
fn profiles_are_merged_and_what_is_none_is_refused() {
    let node = Node::new();
    let (_, reference) = image(&node);
    let dir = node.mount_point("mnt");
    let mut files = Vec::new();
    for (number, path) in ["usr/lib/d1/f1", "usr/lib/d3/f3"].into_iter().enumerate() {
        node.done(&["mount", &reference, dir.to_str().unwrap()]);
        fs::read(dir.join(path)).unwrap();
        let file = node.path().join(format!("p{number}"));
        let answer = node.json(&["profile", dir.to_str().unwrap(), "-o", file.to_str().unwrap()]);
        assert!(answer["runs"].as_u64() > Some(0) && answer["bytes"].as_u64() > Some(0), "{answer}");
        // A test beside this one that starts a program has our files open in it for a moment.
        wait_until("nobody uses it any more", || node.run(&["umount", dir.to_str().unwrap()]).status.success());
        files.push(file.to_str().unwrap().to_owned());
    }
    let merged = profile(&node, &["--merge", &files[0], &files[1]]);
    assert_eq!(blocks_of(&merged, "/usr/lib/d1/f1"), [0].into());
    assert_eq!(blocks_of(&merged, "/usr/lib/d3/f3"), [0].into());
    let first = Profile::from_text(&fs::read_to_string(&files[0]).unwrap()).unwrap();
    assert_eq!(merged.recording.device, first.recording.device);

    let text: Value =
        serde_json::from_str(node.done(&["profile", "--merge", &files[0], "-o", "-"]).lines().next().unwrap()).unwrap();
    assert_eq!(text["firstread_profile"], 1);
    fs::write(node.path().join("bad"), "{}\n").unwrap();
    let bad = node.path().join("bad").display().to_string();
    let error = node.fails(1, &["profile", "--merge", &files[0], &bad, "-o", "-"]);
    assert!(error.contains("bad") && error.contains("first line"), "{error}");
    node.fails(2, &["profile", "app-1"]);
    let error = node.fails(1, &["profile", "nobody-1", "-o", "-"]);
    assert!(error.contains("nobody-1"), "{error}");
    let error = node.fails(1, &["ready", "nobody-1"]);
    assert!(error.contains("nobody-1"), "{error}");
}
