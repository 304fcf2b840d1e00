//! What containerd asks of every snapshotter: the cases of its own test suite (core/snapshots/testsuite), written anew
//! against the gRPC service, with real mounts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;
#[path = "common/snapshotter.rs"]
mod snapshotter;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use firstread::snapshot::wire::snapshots::{Info, Kind};
use program::Node;
use snapshotter::{Mounted, Snapshotter, refused};
use tonic::Code;

/// A snapshotter, and where to mount.
struct Bed {
    node: Node,
    at: PathBuf,
    snaps: Snapshotter,
}

fn bed() -> Bed {
    let node = Node::new();
    let at = node.mount_point("mounted");
    let snaps = Snapshotter::start(&node, &[]);
    Bed { node, at, snaps }
}

impl Bed {
    fn layer(&self, name: &str, parent: &str, script: &str) {
        self.snaps.layer(&self.at, name, parent, script);
    }

    /// What a view of `name` shows.
    fn seen(&self, name: &str) -> Seen<'_> {
        let key = format!("view of {name}");
        let mounts = self.snaps.view(&key, name).unwrap();
        Seen { mounted: Some(Mounted::new(&mounts, &self.at)), snaps: &self.snaps, key }
    }

    fn names(&self, filters: &[&str]) -> BTreeSet<String> {
        let listed = self.snaps.list(filters).unwrap();
        let names: BTreeSet<String> = listed.iter().map(|info| info.name.clone()).collect();
        assert_eq!(names.len(), listed.len(), "listed twice");
        names
    }

    fn is(&self, key: &str, parent: &str, kind: Kind) {
        let info = self.snaps.stat(key).unwrap();
        assert_eq!((info.name.as_str(), info.parent.as_str(), info.kind()), (key, parent, kind));
        assert!(info.created_at.is_some() && info.updated_at.is_some());
    }
}

/// A view while it is mounted.
struct Seen<'a> {
    mounted: Option<Mounted>,
    snaps: &'a Snapshotter,
    key: String,
}

impl std::ops::Deref for Seen<'_> {
    type Target = Mounted;

    fn deref(&self) -> &Mounted {
        self.mounted.as_ref().unwrap()
    }
}

impl Drop for Seen<'_> {
    fn drop(&mut self) {
        self.mounted = None;
        if !std::thread::panicking() {
            self.snaps.remove(&self.key).unwrap();
        }
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn basic() {
    let bed = bed();
    let mounts = bed.snaps.prepare_labelled("preparing", "", &[("containerd.io/gc.root", "x")]).unwrap();
    Mounted::new(&mounts, &bed.at).run("echo foo > foo; chmod 777 foo; mkdir -p a/b/c; echo x > a/x");
    bed.snaps.commit_labelled("committed", "preparing", &[("l", "v")]).unwrap();
    bed.is("committed", "", Kind::Committed);
    // The labels of the active one are replaced, not inherited.
    assert_eq!(bed.snaps.stat("committed").unwrap().labels, [("l".to_owned(), "v".to_owned())].into());
    refused(bed.snaps.stat("preparing"), Code::NotFound);
    refused(bed.snaps.mounts("preparing"), Code::NotFound);

    let next = bed.snaps.prepare("next", "committed").unwrap();
    assert_eq!(bed.snaps.mounts("next").unwrap(), next);
    let mounted = Mounted::new(&next, &bed.at);
    assert_eq!(mounted.read("foo").as_deref(), Some("foo\n"));
    mounted.run("echo bar > bar; rm -r a/b; mkdir -p a/d");
    drop(mounted);
    bed.is("next", "committed", Kind::Active);
    bed.snaps.commit("second", "next").unwrap();
    bed.is("second", "committed", Kind::Committed);
    assert_eq!(bed.names(&[]), set(&["committed", "second"]));

    let seen = bed.seen("second");
    assert_eq!(seen.read("bar").as_deref(), Some("bar\n"));
    assert!(seen.path("a/d").is_dir() && !seen.path("a/b").exists() && seen.path("a/x").exists());
    assert_eq!(mode(&seen.path("foo")), 0o777);
    drop(seen);

    bed.snaps.prepare("third", "second").unwrap();
    let usage = bed.snaps.usage("committed").unwrap();
    assert!(usage.size >= 4096 && usage.inodes >= 6, "{usage:?}");
    bed.snaps.remove("third").unwrap();
    bed.snaps.remove("second").unwrap();
    bed.snaps.remove("committed").unwrap();
    bed.snaps.cleanup().unwrap();
    assert!(bed.names(&[]).is_empty());
    let state = bed.node.root().join("snapshotter/default");
    for part in ["snapshots", "removed", "new"] {
        assert_eq!(fs::read_dir(state.join(part)).unwrap().count(), 0, "{part}");
    }
}

#[test]
fn stat_of_an_active_snapshot() {
    let bed = bed();
    let mounts = bed.snaps.prepare("preparing", "").unwrap();
    Mounted::new(&mounts, &bed.at).run("touch foo");
    bed.is("preparing", "", Kind::Active);
}

#[test]
fn stat_of_a_committed_snapshot() {
    let bed = bed();
    bed.layer("committed", "", "touch foo");
    bed.is("committed", "", Kind::Committed);
    refused(bed.snaps.mounts("committed"), Code::FailedPrecondition);
}

#[test]
fn parents_are_transitive() {
    let bed = bed();
    bed.layer("a", "", "touch foo");
    bed.layer("b", "a", "touch foo.bar");
    bed.is("a", "", Kind::Committed);
    bed.is("b", "a", Kind::Committed);
    let parent = bed.snaps.stat("b").unwrap().parent;
    assert_eq!(bed.snaps.stat(&parent).unwrap().parent, "");
}

#[test]
fn what_can_not_be_prepared_or_viewed() {
    let bed = bed();
    bed.snaps.prepare("active", "").unwrap();
    // The parent must be committed.
    refused(bed.snaps.prepare("x", "active"), Code::InvalidArgument);
    refused(bed.snaps.view("x", "active"), Code::InvalidArgument);
    refused(bed.snaps.prepare("x", "nothing"), Code::NotFound);
    refused(bed.snaps.view("x", "nothing"), Code::NotFound);
    // The key must be free.
    refused(bed.snaps.prepare("active", ""), Code::AlreadyExists);
    refused(bed.snaps.view("active", ""), Code::AlreadyExists);
    bed.snaps.commit("committed", "active").unwrap();
    refused(bed.snaps.prepare("committed", ""), Code::AlreadyExists);
    refused(bed.snaps.view("committed", "committed"), Code::AlreadyExists);
    bed.snaps.prepare("active", "committed").unwrap();
    refused(bed.snaps.commit("committed", "active"), Code::AlreadyExists);
    refused(bed.snaps.commit("other", "nothing"), Code::NotFound);
    bed.snaps.view("view", "committed").unwrap();
    refused(bed.snaps.commit("other", "view"), Code::FailedPrecondition);
    refused(bed.snaps.commit("other", "committed"), Code::FailedPrecondition);
    refused(bed.snaps.prepare("", ""), Code::InvalidArgument);
    // Nothing is left of the failed ones.
    assert_eq!(bed.names(&[]), set(&["active", "committed", "view"]));
    bed.snaps.commit("other", "active").unwrap();
}

#[test]
fn labels_are_updated_and_nothing_else() {
    let bed = bed();
    bed.snaps.prepare("active", "").unwrap();
    bed.snaps.commit_labelled("base", "active", &[("for", "committed")]).unwrap();
    bed.snaps.prepare_labelled("s", "base", &[("for", "prepare")]).unwrap();
    let before = bed.snaps.stat("s").unwrap();
    let wanted = |labels: &[(&str, &str)]| Info {
        name: "s".to_owned(),
        parent: "other".to_owned(),
        kind: Kind::Committed.into(),
        labels: labels.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
        ..Info::default()
    };
    for (labels, paths, expected) in [
        (&[("a", "1"), ("b", "2")][..], &[][..], &[("a", "1"), ("b", "2")][..]),
        (&[("a", "3"), ("b", "4")], &["labels.a"], &[("a", "3"), ("b", "2")]),
        (&[("c.d/e", "5")], &["labels.c.d/e"], &[("a", "3"), ("b", "2"), ("c.d/e", "5")]),
        (&[], &["labels.a", "labels.c.d/e"], &[("b", "2")]),
        (&[("z", "6")], &["labels"], &[("z", "6")]),
    ] {
        let answer = bed.snaps.update(wanted(labels), paths).unwrap();
        let expected = wanted(expected).labels;
        assert_eq!(answer.labels, expected);
        let after = bed.snaps.stat("s").unwrap();
        assert_eq!(after.labels, expected);
        assert_eq!((after.parent, after.kind, after.created_at), ("base".to_owned(), before.kind, before.created_at));
        assert_ne!(after.updated_at, before.updated_at);
    }
    refused(bed.snaps.update(wanted(&[]), &["parent"]), Code::InvalidArgument);
    refused(bed.snaps.update(wanted(&[]), &["labels.b", "kind"]), Code::InvalidArgument);
    refused(bed.snaps.update(Info { name: "nothing".to_owned(), ..Info::default() }, &[]), Code::NotFound);
    assert_eq!(bed.snaps.stat("s").unwrap().labels, wanted(&[("z", "6")]).labels);
    let mut base = bed.snaps.stat("base").unwrap();
    base.labels.insert("more".to_owned(), "x".to_owned());
    assert_eq!(bed.snaps.update(base.clone(), &[]).unwrap().labels, base.labels);
}

#[test]
fn remove() {
    let bed = bed();
    bed.layer("a", "", "touch a");
    bed.snaps.prepare("active", "a").unwrap();
    refused(bed.snaps.remove("a"), Code::FailedPrecondition);
    bed.snaps.commit("b", "active").unwrap();
    refused(bed.snaps.remove("a"), Code::FailedPrecondition);
    bed.snaps.view("view", "b").unwrap();
    refused(bed.snaps.remove("b"), Code::FailedPrecondition);
    for key in ["view", "b", "a"] {
        bed.snaps.remove(key).unwrap();
        refused(bed.snaps.stat(key), Code::NotFound);
        refused(bed.snaps.remove(key), Code::NotFound);
        refused(bed.snaps.mounts(key), Code::NotFound);
        refused(bed.snaps.usage(key), Code::NotFound);
    }
    // Its name is free again.
    bed.layer("a", "", "touch a");
}

#[test]
fn walk() {
    let bed = bed();
    bed.layer("base", "", "touch a");
    bed.snaps.prepare_labelled("one", "base", &[("l", "1"), ("containerd.io/x", "y")]).unwrap();
    bed.snaps.prepare_labelled("two", "base", &[("l", "2")]).unwrap();
    bed.snaps.view("look", "base").unwrap();
    bed.snaps.prepare("alone", "").unwrap();
    for (filters, expected) in [
        (&[][..], &["base", "one", "two", "look", "alone"][..]),
        (&["kind==active"], &["one", "two", "alone"]),
        (&["kind==view"], &["look"]),
        (&["kind==committed", "kind==view"], &["base", "look"]),
        (&["parent==base"], &["one", "two", "look"]),
        (&["parent==base,kind==active,labels.l==2"], &["two"]),
        (&["labels.l"], &["one", "two"]),
        (&[r#"labels."containerd.io/x"==y,parent=="base""#], &["one"]),
        (&["name~=^(one|two)$"], &["one", "two"]),
        (&["name==nothing"], &[]),
        (&["labels.l!=1"], &["base", "two", "look", "alone"]),
    ] {
        assert_eq!(bed.names(filters), set(expected), "{filters:?}");
    }
    refused(bed.snaps.list(&["name=one"]), Code::InvalidArgument);
}

#[test]
fn a_file_is_updated_in_a_layer() {
    let bed = bed();
    bed.layer("1", "", "mkdir etc; echo one > etc/foo; printf 'a\\n' > etc/bar");
    bed.layer("2", "1", "echo two > etc/foo; echo b >> etc/bar; mkdir root; echo x > root/.bashrc");
    let seen = bed.seen("2");
    assert_eq!(seen.read("etc/foo").as_deref(), Some("two\n"));
    assert_eq!(seen.read("etc/bar").as_deref(), Some("a\nb\n"));
    assert_eq!(seen.read("root/.bashrc").as_deref(), Some("x\n"));
    drop(seen);
    assert_eq!(bed.seen("1").read("etc/foo").as_deref(), Some("one\n"));
}

#[test]
fn a_directory_of_a_lower_layer_is_removed() {
    let bed = bed();
    bed.layer("1", "", "mkdir -p lib/hidden; echo 1 > lib/hidden/x; echo 1 > lib/not-hidden");
    bed.layer("2", "1", "rm -r lib; mkdir lib; echo 2 > lib/new");
    bed.layer("3", "2", "echo 3 > lib/more");
    let seen = bed.seen("3");
    let names: BTreeSet<_> =
        fs::read_dir(seen.path("lib")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, set(&["new", "more"]));
}

#[test]
fn owners() {
    let bed = bed();
    bed.layer("1", "", "mkdir -p opt/a/b; echo x > opt/a/b/file; ln -s file opt/a/b/link; chown 1:1 opt/a");
    bed.layer("2", "1", "chown 100:200 opt opt/a/b/file; chown -h 7:8 opt/a/b/link");
    let seen = bed.seen("2");
    for (path, owner) in
        [("opt", (100, 200)), ("opt/a", (1, 1)), ("opt/a/b/file", (100, 200)), ("opt/a/b/link", (7, 8))]
    {
        let metadata = fs::symlink_metadata(seen.path(path)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), owner, "{path}");
    }
}

#[test]
fn permissions_of_directories_survive_a_commit() {
    let bed = bed();
    bed.layer("1", "", "mkdir -m 0700 d1; mkdir -m 1777 d2; mkdir -m 0755 d3; mkdir -p -m 0711 d1/e; chown 5:6 d1");
    bed.layer("2", "1", "echo x > d1/foo; echo x > d2/foo; chmod 0500 d3");
    bed.layer("3", "2", "echo y > d1/bar");
    let seen = bed.seen("3");
    for (path, expected) in [("d1", 0o700), ("d2", 0o1777), ("d3", 0o500), ("d1/e", 0o711)] {
        assert_eq!(mode(&seen.path(path)), expected, "{path}");
    }
    let metadata = fs::metadata(seen.path("d1")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (5, 6));
}

#[test]
fn an_intermediate_snapshot_is_not_removed() {
    let bed = bed();
    bed.layer("base", "", "echo x > base");
    bed.layer("middle", "base", "echo x > middle");
    bed.snaps.prepare("top", "middle").unwrap();
    refused(bed.snaps.remove("middle"), Code::FailedPrecondition);
    refused(bed.snaps.remove("base"), Code::FailedPrecondition);
    for key in ["top", "middle", "base"] {
        bed.snaps.remove(key).unwrap();
    }
}

#[test]
fn files_are_deleted_in_a_child() {
    let bed = bed();
    bed.layer("1", "", "mkdir foo; for f in a b c; do echo $f > foo/$f; done");
    bed.layer("2", "1", "rm foo/a; rm foo/b; echo again > foo/b");
    bed.layer("3", "2", "rm foo/b");
    let seen = bed.seen("3");
    assert!(!seen.path("foo/a").exists() && !seen.path("foo/b").exists());
    assert_eq!(seen.read("foo/c").as_deref(), Some("c\n"));
    drop(seen);
    assert_eq!(bed.seen("2").read("foo/b").as_deref(), Some("again\n"));
}

#[test]
fn a_file_of_a_lower_layer_is_moved() {
    let bed = bed();
    bed.layer("1", "", "mkdir dir1 dir2; echo hello > dir1/f1; ln dir1/f1 dir1/same");
    bed.layer("2", "1", "mv dir1/f1 dir2/f2");
    let seen = bed.seen("2");
    assert!(!seen.path("dir1/f1").exists());
    assert_eq!(seen.read("dir2/f2").as_deref(), Some("hello\n"));
    assert_eq!(seen.read("dir1/same").as_deref(), Some("hello\n"));
}

#[test]
fn directories_are_renamed() {
    let bed = bed();
    bed.layer("1", "", "mkdir -p dir1 somefiles/deep; echo 1 > somefiles/f1; echo 2 > somefiles/deep/f2");
    bed.layer("2", "1", "mv somefiles dir1/moved; mkdir somefiles; echo new > somefiles/f1");
    let seen = bed.seen("2");
    assert_eq!(seen.read("dir1/moved/f1").as_deref(), Some("1\n"));
    assert_eq!(seen.read("dir1/moved/deep/f2").as_deref(), Some("2\n"));
    assert_eq!(seen.read("somefiles/f1").as_deref(), Some("new\n"));
    assert!(!seen.path("somefiles/deep").exists());
}

#[test]
fn a_view_is_read_only() {
    let bed = bed();
    bed.layer("1", "", "touch foo");
    bed.layer("2", "1", "touch bar");
    for (name, parent) in [("none", ""), ("one", "1"), ("two", "2")] {
        let mounted = Mounted::new(&bed.snaps.view(name, parent).unwrap(), &bed.at);
        let error = fs::write(mounted.path("new"), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{name}");
        drop(mounted);
        refused(bed.snaps.commit("x", name), Code::FailedPrecondition);
    }
}

#[test]
fn every_listed_snapshot_has_a_stat() {
    let bed = bed();
    bed.layer("a", "", "touch a");
    bed.snaps.prepare("b", "a").unwrap();
    bed.snaps.view("c", "a").unwrap();
    let listed = bed.snaps.list(&[]).unwrap();
    assert_eq!(listed.len(), 3);
    for info in listed {
        assert_eq!(bed.snaps.stat(&info.name).unwrap(), info);
    }
}

#[test]
fn a_connection_is_closed_twice() {
    let mut bed = bed();
    bed.layer("a", "", "touch a");
    for _ in 0..2 {
        bed.snaps.reconnect();
        assert_eq!(bed.names(&[]), set(&["a"]));
    }
    // And so is the server.
    for signal in ["-TERM", "-KILL"] {
        bed.snaps.kill(signal);
        refused(bed.snaps.stat("a"), Code::Unavailable);
        bed.snaps.resume(&bed.node);
        assert_eq!(bed.names(&[]), set(&["a"]));
    }
}

#[test]
fn the_root_can_be_entered_by_everybody() {
    let bed = bed();
    let mounted = Mounted::new(&bed.snaps.prepare("preparing", "").unwrap(), &bed.at);
    assert_eq!(mode(&mounted.path("")), 0o755);
    mounted.run("chmod 0750 .; chown 3:4 .");
    drop(mounted);
    bed.snaps.commit("1", "preparing").unwrap();
    let mounted = Mounted::new(&bed.snaps.prepare("next", "1").unwrap(), &bed.at);
    let metadata = fs::metadata(mounted.path("")).unwrap();
    assert_eq!((mode(&mounted.path("")), metadata.uid(), metadata.gid()), (0o750, 3, 4));
}

#[test]
fn one_hundred_and_twenty_eight_layers() {
    let bed = bed();
    bed.layer("1", "", "echo 1 > bottom; mkdir -p many; echo 1 > many/1");
    for number in 2..=128u32 {
        let script = format!("echo {number} > many/{number}; echo {number} > last");
        bed.layer(&number.to_string(), &(number - 1).to_string(), &script);
    }
    let mounted = Mounted::new(&bed.snaps.prepare("top", "128").unwrap(), &bed.at);
    assert_eq!(fs::read_dir(mounted.path("many")).unwrap().count(), 128);
    assert_eq!(mounted.read("last").as_deref(), Some("128\n"));
    assert_eq!(mounted.read("many/77").as_deref(), Some("77\n"));
    mounted.run("echo x > bottom");
}
