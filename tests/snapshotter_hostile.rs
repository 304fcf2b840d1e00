//! Requests that containerd would not make: nothing outside of the state is touched, the service goes on, and what it accepted is
//! there after a restart and can be removed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;
#[path = "common/snapshotter.rs"]
mod snapshotter;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use firstread::snapshot::wire::snapshots::{Info, Kind};
use program::Node;
use random::Random;
use snapshotter::{Answer, Snapshotter, refused};
use tonic::Code;

/// Names that mean something to a file system, a shell, a filter or a terminal.
const NAMES: [&str; 14] = [
    "",
    ".",
    "..",
    "/",
    "../../../outside",
    "/tmp/outside",
    "a/../../b",
    "default/1/../../outside",
    "a\0b",
    "a\nb\u{1b}[2J",
    "record",
    "lock",
    "\u{202e}\u{fffd}",
    "x,upperdir=/etc,lowerdir=/",
];

/// All that is below `dir`, by path relative to it.
fn tree(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(at) = left.pop() {
        for entry in fs::read_dir(at).unwrap().flatten() {
            found.push(entry.path().strip_prefix(dir).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

/// What is listed, without times.
fn listed(snaps: &Snapshotter) -> BTreeMap<String, (String, i32, BTreeMap<String, String>)> {
    let all = snaps.list(&[]).unwrap();
    all.into_iter().map(|info| (info.name, (info.parent, info.kind, info.labels.into_iter().collect()))).collect()
}

/// Not a failure that a request may cause.
fn sound<T>(answer: Answer<T>) -> Option<T> {
    match answer {
        Ok(value) => Some(value),
        Err(status) => {
            let expected = [Code::InvalidArgument, Code::NotFound, Code::AlreadyExists, Code::FailedPrecondition];
            // What calls itself an index is asked of containerd, of which there is none, if it has a namespace to ask for it in.
            let of_index = status.code() == Code::Unavailable || status.message().contains("names no namespace");
            assert!(of_index || expected.contains(&status.code()), "{status:?}");
            None
        }
    }
}

#[test]
fn names_and_labels_are_never_paths() {
    let node = Node::new();
    let nobody = node.path().join("no-containerd").display().to_string();
    let mut snaps = Snapshotter::start(&node, &["--containerd", &nobody]);
    let state = node.root().join("snapshotter/default");
    let mut random = Random(11);
    let name = |random: &mut Random| NAMES[random.below(NAMES.len() as u64) as usize].to_owned();
    let labels = [
        "containerd.io/snapshot.ref",
        "containerd.io/snapshot/firstread/role",
        "containerd.io/snapshot/firstread/version",
        "containerd.io/snapshot/firstread/digest",
        "containerd.io/snapshot/firstread/image-ref",
        "containerd.io/snapshot/cri.image-ref",
        "containerd.io/gc.root",
        "",
    ];
    let values = ["", "pack", "startup", "1", "sha256:00", "../../outside", "127.0.0.1:1/../..:x@y", "index"];
    for round in 0..600 {
        let (key, other) = (name(&mut random), name(&mut random));
        let count = random.below(4);
        let picked: Vec<(&str, &str)> =
            (0..count).map(|_| (labels[random.below(8) as usize], values[random.below(8) as usize])).collect();
        match random.below(8) {
            0 | 1 => drop(sound(snaps.prepare_labelled(&key, &other, &picked))),
            2 => drop(sound(snaps.prepare_labelled(&key, "", &picked))),
            3 => drop(sound(snaps.view(&key, &other))),
            4 => drop(sound(snaps.commit_labelled(&key, &other, &picked))),
            5 => drop(sound(snaps.remove(&key))),
            6 => {
                let info = Info {
                    name: key,
                    labels: picked.iter().map(|&(n, v)| (n.to_owned(), v.to_owned())).collect(),
                    ..Info::default()
                };
                drop(sound(
                    snaps.update(
                        info,
                        &[["labels", "labels.", "labels.a/../b", "parent", ""][random.below(5) as usize]],
                    ),
                ));
            }
            _ => {
                drop(sound(snaps.mounts(&key)));
                let _ = sound(snaps.usage(&key));
                drop(sound(snaps.list(&[&key])));
            }
        }
        if round % 200 == 199 {
            let before = listed(&snaps);
            snaps.kill("-KILL");
            snaps.resume(&node);
            assert_eq!(listed(&snaps), before);
        }
    }
    // Whatever names there were, what is on the disk is called by numbers.
    let inside: Vec<String> = tree(&state.join("snapshots"));
    assert!(!inside.is_empty());
    for path in inside {
        let mut parts = path.split('/');
        assert!(parts.next().unwrap().parse::<u64>().is_ok(), "{path}");
        assert!(parts.all(|part| ["fs", "work", "record"].contains(&part)), "{path}");
    }
    let mut beside: Vec<String> =
        fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    beside.sort();
    assert_eq!(beside, ["lock", "new", "removed", "snapshots"]);
    // All of it can be removed: those first that nothing is based on.
    while !listed(&snaps).is_empty() {
        let all = listed(&snaps);
        let is_parent = |name: &String| all.values().any(|(parent, ..)| parent == name);
        for name in all.keys().filter(|name| !is_parent(name)) {
            snaps.remove(name).unwrap();
        }
    }
    assert_eq!(fs::read_dir(state.join("snapshots")).unwrap().count(), 0);
}

#[test]
fn what_is_too_large_is_refused_and_leaves_nothing() {
    let node = Node::new();
    let snaps = Snapshotter::start(&node, &[]);
    let state = node.root().join("snapshotter/default");
    let large = "x".repeat(2 << 20);
    refused(snaps.prepare(&large, ""), Code::Unknown);
    // The kind gets through, however long the name is that the message is about.
    refused(snaps.stat(&large), Code::NotFound);
    let long = "ä".repeat(20_000);
    snaps.prepare(&long, "").unwrap();
    refused(snaps.prepare(&long, ""), Code::AlreadyExists);
    snaps.remove(&long).unwrap();
    assert!(snaps.prepare_labelled("a", "", &[("label", &large)]).is_err());
    // More than the service reads of a request.
    assert!(snaps.prepare(&"x".repeat(5 << 20), "").is_err());
    snaps.prepare("kept", "").unwrap();
    let info =
        Info { name: "kept".to_owned(), labels: [("label".to_owned(), large.clone())].into(), ..Info::default() };
    assert!(snaps.update(info, &["labels"]).is_err());
    assert!(snaps.commit_labelled("committed", "kept", &[("label", &large)]).is_err());
    let kept = snaps.stat("kept").unwrap();
    assert_eq!((kept.kind(), kept.labels.len()), (Kind::Active, 0));
    refused(snaps.stat("committed"), Code::NotFound);
    for filter in
        [&large[..], "name==\"", "labels.", "name~=((((((((((a{1000}){1000}", &"a.".repeat(30_000), "name==a,,"]
    {
        refused(snaps.list(&[filter]), Code::InvalidArgument);
    }
    refused(snaps.list(&vec!["name"; 2000]), Code::InvalidArgument);
    assert_eq!(tree(&state.join("snapshots")).len(), 4, "{:?}", tree(&state));
    assert_eq!(fs::read_dir(state.join("new")).unwrap().count(), 0);
    snaps.remove("kept").unwrap();
}

#[test]
fn what_is_not_grpc_harms_nobody() {
    let node = Node::new();
    let snaps = Snapshotter::start(&node, &[]);
    snaps.prepare("kept", "").unwrap();
    let mut random = Random(5);
    for round in 0..60u64 {
        let mut stream = UnixStream::connect(snaps.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        // With the preface of HTTP/2, frames are read; a frame's length, type and flags are random then.
        let mut bytes = match round % 3 {
            0 => Vec::new(),
            _ => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
        };
        for _ in 0..random.below(8) {
            let length = random.below(300) as usize;
            bytes.extend([
                0,
                (length >> 8) as u8,
                length as u8,
                random.below(12) as u8,
                random.next() as u8,
                0,
                0,
                0,
                1,
            ]);
            bytes.extend(random.bytes(length));
        }
        // It may hang up in the middle.
        let _ = stream.write_all(&bytes);
        let _ = stream.read(&mut [0; 100]);
        assert_eq!(snaps.stat("kept").unwrap().kind(), Kind::Active);
    }
    snaps.remove("kept").unwrap();
}
