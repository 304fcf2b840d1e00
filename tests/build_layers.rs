//! Layers are flattened as other unpackers do it: what is on the device equals what umoci unpacks.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use std::path::Path;

use built::{Layout, shell, try_build};
use nodes::{Compare, Nodes, assert_same};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

/// One entry of a layer.
enum Item {
    File(&'static str, &'static str),
    Dir(&'static str),
    Symlink(&'static str, &'static str),
    Hard(&'static str, &'static str),
    Mark(&'static str),
    Fifo(&'static str),
}
use Item::{Dir, Fifo, File, Hard, Mark, Symlink};

fn layer(path: &Path, items: &[Item]) {
    let mut tar = Builder::new(std::fs::File::create(path).unwrap());
    for (number, item) in items.iter().enumerate() {
        let (name, kind, link, content, mode) = match item {
            File(name, content) => (name, EntryType::Regular, "", *content, 0o640),
            Dir(name) => (name, EntryType::Directory, "", "", 0o750),
            Symlink(name, link) => (name, EntryType::Symlink, *link, "", 0o777),
            Hard(name, link) => (name, EntryType::Link, *link, "", 0o640),
            Mark(name) => (name, EntryType::Regular, "", "", 0o600),
            Fifo(name) => (name, EntryType::Fifo, "", "", 0o644),
        };
        let mut header = Header::new_ustar();
        let bytes = header.as_mut_bytes();
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        // What a link says of its owner is the file's owner from then on (containerd, docker), or not (umoci): the same.
        header.set_uid(if kind == EntryType::Directory { number as u64 } else { 1000 });
        header.set_gid(7);
        header.set_mtime(1_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, content.as_bytes()).unwrap();
    }
    tar.finish().unwrap();
}

fn image(temp: &Path, layers: &[&[Item]]) -> String {
    shell(temp, "umoci init --layout source; umoci new --image source:t");
    for (number, items) in layers.iter().enumerate() {
        layer(&temp.join(format!("{number}.tar")), items);
        shell(temp, &format!("umoci raw add-layer --image source:t {number}.tar"));
    }
    format!("oci:{}:t", temp.join("source").display())
}

fn built(temp: &Path, source: &str) -> Nodes {
    let layout = Layout(temp.join("layout"));
    let report = try_build(source, &format!("oci:{}:t", layout.0.display())).unwrap();
    layout.tree(&report.digest.to_string(), temp)
}

/// Times of directories, which umoci restores or not by the order of events, are not compared.
fn without_directory_times(mut nodes: Nodes) -> Nodes {
    for node in nodes.values_mut().filter(|node| node.mode & 0o170_000 == 0o040_000) {
        node.mtime = (0, 0);
    }
    nodes
}

/// Builds the layers, and compares with what umoci unpacks.
fn same_as_umoci(layers: &[&[Item]]) -> Nodes {
    let temp = TempDir::new().unwrap();
    let source = image(temp.path(), layers);
    shell(temp.path(), "umoci unpack --image source:t bundle");
    let expected = nodes::read(&temp.path().join("bundle/rootfs"));
    let found = built(temp.path(), &source);
    assert_same(
        &without_directory_times(expected),
        &without_directory_times(found.clone()),
        Compare::AcrossFileSystems,
    );
    found
}

fn names(nodes: &Nodes) -> Vec<&str> {
    nodes.keys().map(|path| std::str::from_utf8(path).unwrap()).filter(|path| !path.is_empty()).collect()
}

#[test]
fn whiteouts_remove_files_trees_and_links() {
    let found = same_as_umoci(&[
        &[
            Dir("d"),
            File("d/a", "1"),
            File("d/b", "2"),
            Dir("d/e"),
            File("d/e/f", "3"),
            Symlink("s", "d"),
            File("x", "x"),
        ],
        &[Mark("d/.wh.a"), Mark("d/.wh.e"), Mark(".wh.s")],
        &[Mark(".wh.x"), File("y", "y")],
    ]);
    assert_eq!(names(&found), ["d", "d/b", "y"]);
}

#[test]
fn an_opaque_directory_hides_lower_layers_and_not_its_own() {
    let found = same_as_umoci(&[
        &[Dir("d"), File("d/lower", "1"), Dir("d/sub"), File("d/sub/lower", "2")],
        &[Dir("d"), Mark("d/.wh..wh..opq"), File("d/upper", "3"), Dir("d/sub"), File("d/sub/upper", "4")],
    ]);
    assert_eq!(names(&found), ["d", "d/sub", "d/sub/upper", "d/upper"]);
}

#[test]
fn a_whiteout_and_a_new_file_of_that_name_in_one_layer() {
    let found = same_as_umoci(&[
        &[Dir("d"), File("d/a", "old"), Dir("e"), File("e/old", "old")],
        &[Mark("d/.wh.a"), File("d/a", "new"), Mark(".wh.e"), Dir("e"), File("e/new", "new")],
    ]);
    assert_eq!(names(&found), ["d", "d/a", "e", "e/new"]);
    assert_eq!(found[&b"d/a"[..]].size, 3);
}

#[test]
fn kinds_replace_each_other() {
    let found = same_as_umoci(&[
        &[
            Dir("a"),
            File("a/x", "1"),
            File("b", "2"),
            Symlink("c", "a"),
            Dir("d"),
            File("d/x", "3"),
            Fifo("e"),
            File("f", "4"),
        ],
        &[
            File("a", "now a file"),
            Dir("b"),
            File("b/x", "5"),
            File("c", "6"),
            Symlink("d", "b"),
            File("e", "7"),
            Fifo("f"),
        ],
    ]);
    assert_eq!(names(&found), ["a", "b", "b/x", "c", "d", "e", "f"]);
}

#[test]
fn hard_links_reach_lower_layers_and_survive_their_target() {
    let found = same_as_umoci(&[
        &[Dir("d"), File("d/a", "content")],
        &[Hard("d/b", "d/a"), Hard("c", "/d/b")],
        &[Mark("d/.wh.a")],
        &[Hard("z", "c")],
    ]);
    assert_eq!(names(&found), ["c", "d", "d/b", "z"]);
    assert_eq!(found[&b"z"[..]].links, 3);
    assert_eq!(found[&b"z"[..]].size, 7);
}

#[test]
fn parents_through_links_stay_inside_the_root() {
    let found = same_as_umoci(&[
        &[Dir("usr"), Dir("usr/lib"), Symlink("lib", "usr/lib"), Symlink("abs", "/usr"), Symlink("up", "../../usr")],
        &[File("lib/a", "1"), File("abs/b", "2"), File("up/c", "3"), File("/lib/d", "4"), File("../../usr/e", "5")],
    ]);
    assert_eq!(
        names(&found),
        ["abs", "lib", "up", "usr", "usr/b", "usr/c", "usr/e", "usr/lib", "usr/lib/a", "usr/lib/d"]
    );
}

#[test]
fn missing_parents_and_duplicates() {
    let found = same_as_umoci(&[&[File("a/b/c", "1"), File("a/b/c", "twice"), Dir("./"), File("./a//b/./d", "3")]]);
    assert_eq!(names(&found), ["a", "a/b", "a/b/c", "a/b/d"]);
    assert_eq!(found[&b"a/b/c"[..]].size, 5);
    assert_eq!(found[&b"a"[..]].mode & 0o7777, 0o755);
}

#[test]
fn empty_layers_and_an_empty_image() {
    assert_eq!(names(&same_as_umoci(&[&[], &[File("a", "1")], &[]])), ["a"]);
    assert!(names(&same_as_umoci(&[&[]])).is_empty());
}

#[test]
fn a_layer_with_other_bytes_than_its_digest_is_refused() {
    let temp = TempDir::new().unwrap();
    let source = image(temp.path(), &[&[File("a", "content")]]);
    shell(temp.path(), "skopeo --insecure-policy copy -q oci:source:t docker-archive:saved.tar:n:t");
    let layout = Layout(temp.path().join("source"));
    let manifest = layout.json(&layout.top("t"));
    let digest = manifest["layers"][0]["digest"].as_str().unwrap();
    let path = layout.blob_path(digest).display().to_string();
    // The same tar, stored otherwise.
    shell(
        temp.path(),
        &format!(
            "gzip -dc {path} | gzip -1n > other; test $(stat -c %s {path}) -le $(stat -c %s other)
        head -c $(stat -c %s {path}) other > {path}"
        ),
    );
    let destination = format!("oci:{}:t", temp.path().join("out").display());
    let error = try_build(&source, &destination).unwrap_err().to_string();
    assert!(error.contains(digest), "{error}");
    // Another tar: an archive of docker has no digests of stored bytes, but the config has those of the plain ones.
    shell(temp.path(), "mkdir x; cd x; tar xf ../saved.tar; chmod -R u+w .
        for layer in $(find . -name '*.tar' -type f); do cp ../0.tar $layer; printf C | dd of=$layer bs=1 seek=512 conv=notrunc status=none; done
        tar cf ../saved.tar .");
    let saved = format!("docker-archive:{}", temp.path().join("saved.tar").display());
    let error = try_build(&saved, &destination).unwrap_err().to_string();
    assert!(error.contains("plain bytes hash to"), "{error}");
    assert!(
        !temp.path().join("out/index.json").exists()
            || std::fs::read_to_string(temp.path().join("out/index.json")).unwrap().contains("\"manifests\":[]")
    );
}

#[test]
fn unknown_media_types_are_named() {
    let temp = TempDir::new().unwrap();
    let source = image(temp.path(), &[&[File("a", "content")]]);
    shell(
        temp.path(),
        r##"cd source
        old=$(grep -o 'sha256:[0-9a-f]*' index.json | head -1 | cut -d: -f2)
        sed 's#application/vnd.oci.image.layer.v1.tar+gzip#application/x-foreign#; s#application/vnd.oci.image.layer.v1.tar"#application/x-foreign"#' \
            blobs/sha256/$old > m
        new=$(sha256sum m | cut -d' ' -f1); size=$(stat -c %s m); mv m blobs/sha256/$new
        sed -i "s/$old/$new/; s/\"size\":[0-9]*/\"size\":$size/" index.json"##,
    );
    let error = try_build(&source, &format!("oci:{}:t", temp.path().join("out").display())).unwrap_err().to_string();
    assert!(error.contains("application/x-foreign"), "{error}");
}
