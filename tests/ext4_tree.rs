//! Trees of every kind of node, through every oracle.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use ext4::{Data, check, check_by_kernel, dir, file, inode, put, xattrs};
use firstread::ext4::{Inode, InodeId, Kind, Options, Segment, Time, Tree, plan};

/// The value of an ACL as `getxattr` gives it.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// The text of the error that planning the tree gives.
fn refusal(tree: &Tree) -> String {
    plan(tree, &Options::default()).expect_err("must be refused").to_string()
}

#[test]
fn an_empty_tree() {
    let tree = Tree::new(dir());
    let checked = check(&tree, &Options::default());
    assert_eq!(checked.plan.inodes(), 1);
    assert!(checked.plan.data_blocks().is_empty());
}

#[test]
fn every_type_mode_and_owner() {
    let mut tree = Tree::new(Inode { mode: 0o1777, uid: 5, gid: 6, ..dir() });
    let root = tree.root();
    for mode in [0, 0o400, 0o777, 0o4755, 0o2755, 0o1644, 0o7777] {
        put(&mut tree, root, format!("file-{mode:o}"), Inode { mode, ..file(1) });
        put(&mut tree, root, format!("dir-{mode:o}"), Inode { mode, ..dir() });
    }
    for id in [1, 65_535, 65_536, 3_000_000_000, u32::MAX - 1] {
        put(&mut tree, root, format!("owner-{id}"), Inode { uid: id, gid: id ^ 0x1_0001, ..file(0) });
    }
    for (major, minor) in [(0, 0), (1, 3), (255, 255), (256, 0), (0, 256), (8, 1_048_575), (4095, 1_048_575)] {
        put(&mut tree, root, format!("char-{major}-{minor}"), inode(Kind::CharDevice { major, minor }));
        put(&mut tree, root, format!("block-{major}-{minor}"), inode(Kind::BlockDevice { major, minor }));
    }
    put(&mut tree, root, "fifo", inode(Kind::Fifo));
    put(&mut tree, root, "socket", inode(Kind::Socket));
    check(&tree, &Options::default());
}

#[test]
fn file_sizes_around_blocks() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    for size in [0, 1, 4095, 4096, 4097, 65_536, 1_000_000, (128 << 20) + 1] {
        put(&mut tree, root, format!("{size}"), file(size));
    }
    check(&tree, &Options::default());
}

#[test]
fn links_of_every_length() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    for length in [1, 58, 59, 60, 61, 255, 4094, 4095] {
        put(&mut tree, root, format!("{length}"), inode(Kind::Symlink(b"target/".repeat(600)[..length].into())));
    }
    put(&mut tree, root, "high", inode(Kind::Symlink(b"\xff\xfe/\x80".as_slice().into())));
    check(&tree, &Options::default());
    put(&mut tree, root, "long", inode(Kind::Symlink(vec![b'x'; 4096].into())));
    assert!(refusal(&tree).contains("/long: it links to a path of 4096 bytes"), "{}", refusal(&tree));
}

#[test]
fn times_in_all_epochs() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    for secs in [
        i64::MIN,
        -(1 << 31) - 1,
        -(1 << 31),
        -1,
        0,
        (1 << 31) - 1,
        1 << 31,
        (1 << 32) - 1,
        1 << 32,
        (1 << 33) + 5,
        15_032_385_535,
        15_032_385_536,
        i64::MAX,
    ] {
        put(&mut tree, root, format!("{secs}"), Inode { mtime: Time { secs, nanos: 999_999_999 }, ..file(0) });
    }
    // The independent reader knows only the years 1970 to 2038.
    check_by_kernel(&tree, &Options::default(), Data::Written);
    put(&mut tree, root, "odd", Inode { mtime: Time { secs: 0, nanos: 1_000_000_000 }, ..file(0) });
    assert!(refusal(&tree).contains("/odd: its time has 1000000000 nanoseconds"));
}

#[test]
fn names_of_any_bytes() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    put(&mut tree, root, [b'n'; 255], file(1));
    put(&mut tree, root, [0xff; 255], file(1));
    for byte in (1..=255).filter(|byte| !matches!(byte, b'/' | b'.')) {
        put(&mut tree, root, [byte], file(1));
        put(&mut tree, root, [byte, 0x80, 0xc3, byte, 0xff], dir());
    }
    check(&tree, &Options::default());
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'n'; 256]] {
        assert!(tree.link(root, name, root).is_err());
    }
    match &mut tree.get_mut(root).unwrap().kind {
        Kind::Directory(entries) => entries.push((b"a/b".as_slice().into(), InodeId(1))),
        _ => unreachable!(),
    }
    assert!(refusal(&tree).contains("has a NUL or a slash"));
}

#[test]
fn hard_links() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let a = put(&mut tree, root, "a", dir());
    let b = put(&mut tree, a, "b", dir());
    let one = put(&mut tree, a, "one", file(10_000));
    let two = put(&mut tree, b, "two", inode(Kind::Symlink(b"one".as_slice().into())));
    let three = put(&mut tree, root, "three", inode(Kind::CharDevice { major: 1, minor: 3 }));
    for (number, dir) in [root, a, b].into_iter().enumerate() {
        for (name, id) in [("x", one), ("y", two), ("z", three)] {
            tree.link(dir, format!("{name}{number}").as_bytes(), id).unwrap();
        }
    }
    check(&tree, &Options::default());
}

#[test]
fn links_up_to_the_limit() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let many = put(&mut tree, root, "many", file(1));
    let names = put(&mut tree, root, "names", dir());
    for number in 1..65_000 {
        tree.link(names, format!("{number}").as_bytes(), many).unwrap();
    }
    check(&tree, &Options::default());
    tree.link(names, b"one-more", many).unwrap();
    let text = refusal(&tree);
    assert!(text.contains("it has 65001 links") && text.contains("/many"), "{text}");
}

#[test]
fn more_directories_than_links_can_count() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let above = put(&mut tree, root, "above", dir());
    for number in 0..64_999 {
        put(&mut tree, above, format!("{number}"), dir());
    }
    let checked = check(&tree, &Options::default());
    assert_eq!(checked.expected[&b"above"[..]].links, 1);
}

#[test]
fn extended_attributes() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let capability = [1, 0, 0, 2, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let set = |list: &[(&[u8], &[u8])]| Inode { xattrs: xattrs(list), ..file(1) };
    put(&mut tree, root, "capability", set(&[(b"security.capability", &capability)]));
    put(&mut tree, root, "empty", set(&[(b"user.empty", b"")]));
    put(&mut tree, root, "binary", set(&[(b"user.\xff\xfe\x80name", b"\0\xff\x01")]));
    put(&mut tree, root, "binary-in-block", set(&[(b"user.\xff\xfe\x80name", &[0xee; 301])]));
    put(&mut tree, root, "one-byte", set(&[(b"user.x", b"1"), (b"trusted.x", b"2"), (b"security.x", b"3")]));
    // Entries in a block are sorted by prefix, length and name; any other order hides some of them.
    let names: Vec<String> = (0..60).map(|number| format!("user.{}{number}", "z".repeat(59 - number))).collect();
    let many: Vec<(&[u8], &[u8])> = names.iter().map(|name| (name.as_bytes(), &b"value"[..])).collect();
    put(&mut tree, root, "many", set(&many[..40]));
    put(&mut tree, root, "many-too", set(&many[20..]));
    put(
        &mut tree,
        root,
        "mixed",
        set(&[(b"user.b", &[7; 300]), (b"trusted.a", &[8; 300]), (b"security.capability", &capability)]),
    );
    // 4096 less 32 of header, 4 of end mark, 20 of the entry and its name.
    put(&mut tree, root, "largest", set(&[(b"user.all", &[9; 4040])]));
    put(&mut tree, root, "long-name", set(&[(&[b"user.", &[b'n'; 250][..]].concat(), b"v")]));
    put(&mut tree, root, "dir", Inode { xattrs: xattrs(&[(b"user.big", &[3; 1000])]), ..dir() });
    let link = inode(Kind::Symlink(b"dir".as_slice().into()));
    put(&mut tree, root, "link", Inode { xattrs: xattrs(&[(b"security.selinux", &[b's'; 200])]), ..link });
    check(&tree, &Options::default());

    put(&mut tree, root, "too\nlarge", set(&[(b"user.all", &[9; 4041])]));
    let text = refusal(&tree);
    assert!(text.contains("/too\\nlarge: its extended attributes need 4064 bytes"), "{text}");
}

#[test]
fn attributes_that_are_refused() {
    for (name, value, reason) in [
        (&b"btrfs.compression"[..], &b"zstd"[..], "no place for an extended attribute named btrfs.compression"),
        (b"user.", b"", "no place"),
        (&[b"user.", &[b'n'; 251][..]].concat(), b"", "no place"),
        (b"system.posix_acl_access", b"\x02\0\0", "is no ACL"),
        (b"system.posix_acl_access", b"\x01\0\0\0", "is no ACL"),
        (b"system.posix_acl_default", b"\x02\0\0\0\x03\0\0\0\0\0\0\0", "is no ACL"),
    ] {
        let mut tree = Tree::new(dir());
        let root = tree.root();
        put(&mut tree, root, "file", Inode { xattrs: xattrs(&[(name, value)]), ..file(0) });
        let text = refusal(&tree);
        assert!(text.contains("/file") && text.contains(reason), "{text}");
    }
    let mut tree = Tree::new(dir());
    let root = tree.root();
    put(&mut tree, root, "file", Inode { xattrs: xattrs(&[(b"user.a", b"1"), (b"user.a", b"2")]), ..file(0) });
    assert!(refusal(&tree).contains("is there twice"));
}

#[test]
fn access_control_lists() {
    const NOBODY: u32 = u32::MAX;
    let access =
        acl(&[(1, 6, NOBODY), (2, 7, 1000), (2, 5, 3_000_000_000), (4, 4, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY)]);
    let many: Vec<_> = (0..100).map(|id| (8, 5, 70_000 + id)).collect();
    let long = acl(&[&[(1, 7, NOBODY), (4, 5, NOBODY)][..], &many, &[(16, 7, NOBODY), (32, 5, NOBODY)]].concat());
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let both =
        xattrs(&[(b"system.posix_acl_default", &long), (b"system.posix_acl_access", &access), (b"user.x", b"y")]);
    put(
        &mut tree,
        root,
        "file",
        Inode { mode: 0o670, xattrs: xattrs(&[(b"system.posix_acl_access", &access)]), ..file(3) },
    );
    put(&mut tree, root, "dir", Inode { mode: 0o670, xattrs: both, ..dir() });
    check(&tree, &Options::default());
}

#[test]
fn equal_attributes_share_blocks() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    for number in 0..2500 {
        put(&mut tree, root, format!("{number}"), Inode { xattrs: xattrs(&[(b"user.same", &[b'v'; 500])]), ..file(0) });
    }
    let checked = check(&tree, &Options::default());
    // 1024 inodes share one block.
    let mut without = Tree::new(dir());
    let root = without.root();
    for number in 0..2500 {
        put(&mut without, root, format!("{number}"), file(0));
    }
    let without = plan(&without, &Options::default()).unwrap();
    assert_eq!(checked.plan.metadata_blocks() - without.metadata_blocks(), 3);
}

#[test]
fn deep_directories() {
    let mut tree = Tree::new(dir());
    let mut at = tree.root();
    for depth in 0..40 {
        at = put(&mut tree, at, format!("directory-{depth}"), dir());
        put(&mut tree, at, "file", file(100));
    }
    check(&tree, &Options::default());
}

#[test]
fn sparse_files() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let mut sparse = |name: &str, size: u64, segments: &[(u32, u32)]| {
        let segments = segments.iter().map(|(file_block, blocks)| Segment { file_block: *file_block, blocks: *blocks });
        put(&mut tree, root, name, inode(Kind::File { size, segments: segments.collect() }));
    };
    sparse("all-hole", 1 << 30, &[]);
    sparse("hole-first", 5 * 4096, &[(4, 1)]);
    sparse("hole-last", 1_000_000, &[(0, 1)]);
    sparse("holes", 100 * 4096 - 1, &[(0, 1), (2, 1), (4, 5), (9, 1), (50, 50)]);
    sparse("touching", 8 * 4096, &[(0, 4), (4, 4)]);
    sparse("far", (1 << 44) - 4096, &[(0, 1), (u32::MAX - 1, 1)]);
    check(&tree, &Options::default());
    for (size, segments) in
        [(4096, &[(0, 2)][..]), (8192, &[(1, 1), (0, 1)]), (8192, &[(0, 0)]), (8192, &[(0, 2), (1, 1)])]
    {
        let mut tree = Tree::new(dir());
        let root = tree.root();
        let segments = segments.iter().map(|(file_block, blocks)| Segment { file_block: *file_block, blocks: *blocks });
        put(&mut tree, root, "bad", inode(Kind::File { size, segments: segments.collect() }));
        assert!(refusal(&tree).contains("/bad: its"));
    }
    let mut tree = Tree::new(dir());
    let root = tree.root();
    put(&mut tree, root, "huge", inode(Kind::File { size: 1 << 44, segments: Box::default() }));
    assert!(refusal(&tree).contains("/huge: it has 17592186044416 bytes"));
}

#[test]
fn what_is_no_tree_is_refused() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let a = put(&mut tree, root, "a", dir());
    let b = put(&mut tree, a, "b", dir());
    let mut cycle = tree.clone();
    cycle.link(b, b"up", a).unwrap();
    assert!(refusal(&cycle).contains("the directory up in it is elsewhere too"));
    let mut to_root = tree.clone();
    to_root.link(b, b"root", root).unwrap();
    assert!(refusal(&to_root).contains("/a/b: the directory root in it is elsewhere too"));
    let mut twice = tree.clone();
    put(&mut twice, a, "b", file(0));
    assert!(refusal(&twice).contains("/a: b is in it twice"));
    assert!(refusal(&Tree::new(file(0))).contains("the root is no directory"));
    assert!(tree.link(root, b"x", InodeId(99)).is_err());
}
