//! Layers are flattened as other unpackers do it: what is on the device equals what umoci and containerd unpack.
//!
//! Where those two differ, or one of them refuses, the test says which of them is followed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/containerd.rs"]
mod containerd;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use std::path::Path;

use built::{Layout, shell, try_build};
use containerd::Containerd;
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

/// Who else unpacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Umoci,
    Containerd,
}

const BOTH: &[Peer] = &[Peer::Umoci, Peer::Containerd];

/// What a peer unpacks, or that it refuses.
fn unpacked(peer: Peer, temp: &Path) -> Result<Nodes, String> {
    match peer {
        Peer::Umoci => {
            let output = std::process::Command::new("umoci")
                .args(["unpack", "--image", "source:t", "bundle"])
                .current_dir(temp)
                .output()
                .unwrap();
            match output.status.success() {
                true => Ok(nodes::read(&temp.join("bundle/rootfs"))),
                false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            }
        }
        Peer::Containerd => Containerd::start().unpack(&temp.join("source"), "t"),
    }
}

/// Builds the layers, and compares with what the peers unpack.
fn same_as(peers: &[Peer], layers: &[&[Item]]) -> Nodes {
    let temp = TempDir::new().unwrap();
    let source = image(temp.path(), layers);
    let found = built(temp.path(), &source);
    for peer in peers {
        println!("compared with {peer:?}");
        let expected = unpacked(*peer, temp.path()).unwrap_or_else(|error| panic!("{peer:?} refuses: {error}"));
        assert_same(
            &without_directory_times(expected),
            &without_directory_times(found.clone()),
            Compare::AcrossFileSystems,
        );
    }
    found
}

/// The layers are refused, by the peers too; the reason.
fn refused(peers: &[Peer], layers: &[&[Item]]) -> String {
    let temp = TempDir::new().unwrap();
    let source = image(temp.path(), layers);
    let error = try_build(&source, &format!("oci:{}:t", temp.path().join("layout").display())).unwrap_err();
    for peer in peers {
        assert!(unpacked(*peer, temp.path()).is_err(), "{peer:?} accepts what is refused with {error}");
    }
    error.to_string()
}

fn names(nodes: &Nodes) -> Vec<&str> {
    nodes.keys().map(|path| std::str::from_utf8(path).unwrap()).filter(|path| !path.is_empty()).collect()
}

#[test]
fn whiteouts_remove_files_trees_and_links() {
    let found = same_as(
        BOTH,
        &[
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
        ],
    );
    assert_eq!(names(&found), ["d", "d/b", "y"]);
}

#[test]
fn an_opaque_directory_hides_lower_layers_and_not_its_own() {
    let found = same_as(
        BOTH,
        &[
            &[Dir("d"), File("d/lower", "1"), Dir("d/sub"), File("d/sub/lower", "2")],
            &[Dir("d"), Mark("d/.wh..wh..opq"), File("d/upper", "3"), Dir("d/sub"), File("d/sub/upper", "4")],
        ],
    );
    assert_eq!(names(&found), ["d", "d/sub", "d/sub/upper", "d/upper"]);
}

#[test]
fn a_whiteout_and_a_new_file_of_that_name_in_one_layer() {
    let found = same_as(
        BOTH,
        &[
            &[Dir("d"), File("d/a", "old"), File("d/b", "old")],
            &[Mark("d/.wh.a"), File("d/a", "newer"), Mark("d/.wh.b")],
        ],
    );
    assert_eq!(names(&found), ["d", "d/a"]);
    assert_eq!(found[&b"d/a"[..]].size, 5);
}

#[test]
fn a_whiteout_and_a_new_directory_of_that_name_in_one_layer() {
    // In containerd's overlayfs the new directory takes the place of the mark, and what was removed is back.
    let found =
        same_as(&[Peer::Umoci], &[&[Dir("e"), File("e/old", "old")], &[Mark(".wh.e"), Dir("e"), File("e/new", "new")]]);
    assert_eq!(names(&found), ["e", "e/new"]);
}

#[test]
fn kinds_replace_each_other() {
    let found = same_as(
        BOTH,
        &[
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
        ],
    );
    assert_eq!(names(&found), ["a", "b", "b/x", "c", "d", "e", "f"]);
}

#[test]
fn hard_links_reach_lower_layers_and_survive_their_target() {
    // containerd's overlayfs looks for the target in the layer itself only, and refuses such layers.
    let found = same_as(
        &[Peer::Umoci],
        &[
            &[Dir("d"), File("d/a", "content")],
            &[Hard("d/b", "d/a"), Hard("c", "/d/b")],
            &[Mark("d/.wh.a")],
            &[Hard("z", "c")],
        ],
    );
    assert_eq!(names(&found), ["c", "d", "d/b", "z"]);
    assert_eq!(found[&b"z"[..]].links, 3);
    assert_eq!(found[&b"z"[..]].size, 7);
}

#[test]
fn parents_through_links_stay_inside_the_root() {
    // containerd's overlayfs does not see the links of lower layers, and hides each behind a new directory.
    let found = same_as(
        &[Peer::Umoci],
        &[
            &[
                Dir("usr"),
                Dir("usr/lib"),
                Symlink("lib", "usr/lib"),
                Symlink("abs", "/usr"),
                Symlink("up", "../../usr"),
            ],
            &[File("lib/a", "1"), File("abs/b", "2"), File("up/c", "3"), File("/lib/d", "4"), File("../../usr/e", "5")],
        ],
    );
    assert_eq!(
        names(&found),
        ["abs", "lib", "up", "usr", "usr/b", "usr/c", "usr/e", "usr/lib", "usr/lib/a", "usr/lib/d"]
    );
}

#[test]
fn missing_parents_and_duplicates() {
    let found = same_as(BOTH, &[&[File("a/b/c", "1"), File("a/b/c", "twice"), Dir("./"), File("./a//b/./d", "3")]]);
    assert_eq!(names(&found), ["a", "a/b", "a/b/c", "a/b/d"]);
    assert_eq!(found[&b"a/b/c"[..]].size, 5);
    assert_eq!(found[&b"a"[..]].mode & 0o7777, 0o755);
}

#[test]
fn empty_layers_and_an_empty_image() {
    assert_eq!(names(&same_as(BOTH, &[&[], &[File("a", "1")], &[]])), ["a"]);
    assert!(names(&same_as(BOTH, &[&[]])).is_empty());
}

#[test]
fn parents_through_links_of_the_same_layer() {
    let found = same_as(
        BOTH,
        &[&[
            Dir("usr"),
            Dir("usr/lib"),
            Symlink("lib", "usr/lib"),
            Symlink("abs", "/usr"),
            Symlink("up", "../../usr"),
            File("lib/a", "1"),
            File("abs/b", "2"),
            File("up/c", "3"),
            File("../../usr/e", "5"),
            Hard("lib/f", "abs/b"),
        ]],
    );
    assert_eq!(
        names(&found),
        ["abs", "lib", "up", "usr", "usr/b", "usr/c", "usr/e", "usr/lib", "usr/lib/a", "usr/lib/f"]
    );
}

#[test]
fn an_opaque_mark_after_the_names_of_its_layer() {
    let found = same_as(
        BOTH,
        &[
            &[Dir("d"), File("d/lower", "1"), File("d/both", "2"), Dir("d/sub"), File("d/sub/lower", "3")],
            &[Dir("d"), File("d/upper", "4"), File("d/both", "55"), Mark("d/.wh..wh..opq")],
        ],
    );
    assert_eq!(names(&found), ["d", "d/both", "d/upper"]);
    assert_eq!(found[&b"d/both"[..]].size, 2);
}

#[test]
fn an_opaque_mark_hides_what_several_layers_had() {
    let found = same_as(
        BOTH,
        &[
            &[Dir("d"), File("d/a", "1"), File("other", "1")],
            &[Dir("d"), File("d/b", "2")],
            &[Dir("d"), Mark("d/.wh..wh..opq"), File("d/c", "3")],
            &[Dir("d"), File("d/a", "44")],
        ],
    );
    assert_eq!(names(&found), ["d", "d/a", "d/c", "other"]);
    assert_eq!(found[&b"d/a"[..]].size, 2);
}

#[test]
fn opaque_marks_in_new_and_nested_directories() {
    let found = same_as(
        BOTH,
        &[
            &[Dir("d"), Dir("d/e"), File("d/e/lower", "1"), File("d/lower", "2")],
            &[
                Dir("d"),
                Dir("d/e"),
                Mark("d/e/.wh..wh..opq"),
                File("d/e/upper", "3"),
                Dir("new"),
                Mark("new/.wh..wh..opq"),
                File("new/x", "4"),
            ],
        ],
    );
    assert_eq!(names(&found), ["d", "d/e", "d/e/upper", "d/lower", "new", "new/x"]);
}

#[test]
fn a_whiteout_and_an_opaque_mark_together() {
    // containerd's overlayfs lists the mark as a file that can't be opened.
    let found = same_as(
        &[Peer::Umoci],
        &[
            &[Dir("d"), File("d/a", "1"), File("d/b", "2")],
            &[Dir("d"), Mark("d/.wh.a"), Mark("d/.wh..wh..opq"), File("d/c", "3")],
        ],
    );
    assert_eq!(names(&found), ["d", "d/c"]);
}

#[test]
fn a_whiteout_of_what_is_not_there() {
    let found = same_as(BOTH, &[&[Dir("d"), File("d/a", "1")], &[Mark("d/.wh.b"), Mark(".wh.c")]]);
    assert_eq!(names(&found), ["d", "d/a"]);
}

#[test]
fn a_whiteout_after_the_new_file_of_its_name() {
    // containerd refuses: the mark is a node of the overlay, and its place is taken.
    let found = same_as(&[Peer::Umoci], &[&[File("a", "old")], &[File("a", "newer"), Mark(".wh.a")]]);
    assert_eq!(found[&b"a"[..]].size, 5);
}

#[test]
fn a_file_removed_and_made_again_in_later_layers() {
    let found = same_as(
        BOTH,
        &[
            &[Dir("d"), File("d/a", "1")],
            &[Mark("d/.wh.a")],
            &[File("d/a", "22")],
            &[Mark(".wh.d")],
            &[Dir("d"), File("d/b", "3")],
        ],
    );
    assert_eq!(names(&found), ["d", "d/b"]);
}

#[test]
fn a_link_in_place_of_a_whited_out_directory() {
    let found = same_as(
        BOTH,
        &[&[Dir("d"), File("d/a", "1"), Dir("e"), File("e/x", "2")], &[Mark(".wh.d"), Symlink("d", "e")]],
    );
    assert_eq!(names(&found), ["d", "e", "e/x"]);
}

#[test]
fn a_link_to_a_file_that_its_layer_removed_before() {
    // containerd links the mark itself, and so removes one more name.
    let error = refused(&[Peer::Umoci], &[&[Dir("d"), File("d/a", "content")], &[Mark("d/.wh.a"), Hard("b", "d/a")]]);
    assert!(error.contains("d/a") && error.contains("not there"), "{error}");
}

#[test]
fn a_link_to_a_file_that_its_layer_removes_after() {
    let found = same_as(&[Peer::Umoci], &[&[Dir("d"), File("d/a", "content")], &[Hard("b", "d/a"), Mark("d/.wh.a")]]);
    assert_eq!(names(&found), ["b", "d"]);
    assert_eq!((found[&b"b"[..]].links, found[&b"b"[..]].size), (1, 7));
}

#[test]
fn a_link_to_a_file_that_a_lower_layer_removed() {
    let error = refused(BOTH, &[&[File("a", "content")], &[Mark(".wh.a")], &[Hard("b", "a")]]);
    assert!(error.contains("not there"), "{error}");
}

#[test]
fn a_link_to_a_directory() {
    let error = refused(BOTH, &[&[Dir("a"), Hard("b", "a")]]);
    assert!(error.contains("directory"), "{error}");
}

#[test]
fn a_replaced_file_leaves_its_other_names() {
    // An overlay counts the names that it hides.
    let found = same_as(
        &[Peer::Umoci],
        &[&[File("a", "content"), Hard("b", "a"), Hard("c", "b")], &[File("a", "new one"), File("c", "3")]],
    );
    assert_eq!(found[&b"b"[..]].size, 7);
    assert_eq!(found[&b"c"[..]].size, 1);
}

/// A link entry sets owner, mode and time of the inode, and its attributes are added: seen in containerd 1.6 (umoci
/// leaves the inode alone). As the owner is set anew, the kernel takes the capabilities away (`chown(2)`).
#[test]
fn a_link_entry_changes_the_inode_as_in_containerd() {
    const CAPABILITY: &[u8] = b"\x01\0\0\x02\0 \0 \0\0\0\0\0\0\0\0\0\0\0\0";
    type Entry<'a> = (&'a str, EntryType, &'a str, (u32, u64, u64), &'a [(&'a str, &'a [u8])]);
    let (user, other, capability) = ("SCHILY.xattr.user.a", "SCHILY.xattr.user.b", "SCHILY.xattr.security.capability");
    let both: &[(&str, &[u8])] = &[(user, b"1"), (capability, CAPABILITY)];
    let entries: &[Entry<'_>] = &[
        ("other", EntryType::Regular, "", (0o4755, 1, 1000), both),
        ("other-link", EntryType::Link, "other", (0o600, 3, 2000), &[(other, b"2")]),
        ("equal", EntryType::Regular, "", (0o4755, 1, 1000), both),
        ("equal-link", EntryType::Link, "equal", (0o4755, 1, 1000), &[]),
        ("kept", EntryType::Regular, "", (0o755, 1, 1000), both),
        ("kept-link", EntryType::Link, "kept", (0o755, 1, 1000), &[(user, b"3"), (capability, CAPABILITY)]),
        ("soft", EntryType::Symlink, "nowhere", (0o777, 1, 1000), &[]),
        ("soft-link", EntryType::Link, "soft", (0o600, 5, 3000), &[]),
        ("private", EntryType::Symlink, "nowhere", (0o600, 1, 1000), &[]),
    ];
    let temp = TempDir::new().unwrap();
    let source = image(temp.path(), &[]);
    let mut tar = Builder::new(std::fs::File::create(temp.path().join("links.tar")).unwrap());
    for (name, kind, link, (mode, owner, time), attributes) in entries {
        if !attributes.is_empty() {
            tar.append_pax_extensions(attributes.iter().copied()).unwrap();
        }
        let content: &[u8] = if *kind == EntryType::Regular { b"content" } else { b"" };
        let mut header = Header::new_ustar();
        header.set_path(name).unwrap();
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        header.set_entry_type(*kind);
        header.set_mode(*mode);
        header.set_uid(*owner);
        header.set_gid(owner + 10);
        header.set_mtime(*time);
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, content).unwrap();
    }
    tar.finish().unwrap();
    shell(temp.path(), "umoci raw add-layer --image source:t links.tar");
    let found = built(temp.path(), &source);
    let expected = unpacked(Peer::Containerd, temp.path()).unwrap();
    assert_same(&expected, &found, Compare::AcrossFileSystems);
    let attributes =
        |name: &[u8]| found[name].xattrs.keys().map(|key| key.escape_ascii().to_string()).collect::<Vec<_>>();
    assert_eq!(attributes(b"other"), ["user.a", "user.b"]);
    assert_eq!(attributes(b"equal"), ["user.a"]);
    assert_eq!(attributes(b"kept"), ["security.capability", "user.a"]);
    assert_eq!(found[&b"other"[..]].mode & 0o7777, 0o600);
    assert_eq!(found[&b"soft"[..]].uid, 5);
}

/// An image of one layer, stored as given.
fn handmade(dir: &Path, media_type: &str, stored: &[u8], tar: &[u8]) -> String {
    use sha2::Digest;
    let digest =
        |bytes: &[u8]| -> String { sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect() };
    std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    let put = |media_type: &str, bytes: &[u8]| {
        std::fs::write(dir.join("blobs/sha256").join(digest(bytes)), bytes).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": format!("sha256:{}", digest(bytes)), "size": bytes.len()})
    };
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", digest(tar))]}});
    let config = put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [put(media_type, stored)]});
    let mut manifest = put("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
    manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "t"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    format!("oci:{}:t", dir.display())
}

/// Every way to store one tar gives one device; the cuts are where no entry begins.
#[test]
fn layers_stored_in_every_way() {
    let temp = TempDir::new().unwrap();
    layer(&temp.path().join("tar"), &[Dir("d"), File("d/a", "content"), Symlink("s", "d/a"), Fifo("f")]);
    let tar = std::fs::read(temp.path().join("tar")).unwrap();
    let pieces = [&tar[..700], &tar[700..1025], &tar[1025..]];
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let members: Vec<u8> = pieces.iter().flat_map(|piece| gzip(piece)).collect();
    let frames: Vec<u8> = pieces.iter().flat_map(|piece| zstd(piece)).collect();
    // A skippable frame in front, between and behind (RFC 8878, 3.1.2).
    let skippable = b"\x5a\x2a\x4d\x18\x03\0\0\0abc";
    let skipped: Vec<u8> = [&skippable[..]]
        .into_iter()
        .chain(pieces.iter().flat_map(|_| [&skippable[..]]))
        .zip(pieces.iter().map(|piece| zstd(piece)).chain([Vec::new()]))
        .flat_map(|(skippable, frame)| [skippable.to_vec(), frame].concat())
        .collect();
    let oci = "application/vnd.oci.image.layer.v1.tar";
    let docker = "application/vnd.docker.image.rootfs.diff.tar";
    let layout = Layout(temp.path().join("layout"));
    let mut plain = None;
    for (number, (media_type, stored)) in [
        (oci.to_owned(), tar.clone()),
        (format!("{oci}+gzip"), gzip(&tar)),
        (format!("{oci}+gzip"), members.clone()),
        (format!("{oci}+zstd"), zstd(&tar)),
        (format!("{oci}+zstd"), frames.clone()),
        (format!("{oci}+zstd"), skipped),
        (docker.to_owned(), tar.clone()),
        (format!("{docker}.gzip"), members),
        (format!("{docker}.zstd"), frames),
    ]
    .into_iter()
    .enumerate()
    {
        let source = handmade(&temp.path().join(number.to_string()), &media_type, &stored, &tar);
        let report = try_build(&source, &format!("oci:{}:t{number}", layout.0.display()))
            .unwrap_or_else(|error| panic!("{number}, {media_type}: {error}"));
        let index = layout.index(&report.digest.to_string());
        assert!(*plain.get_or_insert_with(|| index.clone()) == index, "{number}, {media_type} differs");
    }
    let foreign =
        handmade(&temp.path().join("foreign"), "application/vnd.oci.image.layer.nondistributable.v1.tar", &tar, &tar);
    let error = try_build(&foreign, &format!("oci:{}:x", layout.0.display())).unwrap_err().to_string();
    assert!(error.contains("nondistributable"), "{error}");
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
