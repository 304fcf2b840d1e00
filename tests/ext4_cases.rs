//! Mistakes that writers of ext4 made, one test each: those that `e2fsck` does not see among them. Each tree is one that
//! shows the mistake; where a mistake would be on disk is looked at too.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use ext4::{Checked, Data, Mount, check, check_by_kernel, check_data, dir, file, inode, put, xattrs};
use firstread::ext4::{Inode, Kind, Options, Segment, Time, Tree, plan};

/// What debugfs answers.
fn debugfs(image: &Path, request: &str) -> String {
    let output = Command::new("debugfs").args(["-R", request]).arg(image).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn dumpe2fs(image: &Path) -> String {
    String::from_utf8_lossy(&Command::new("dumpe2fs").arg(image).output().unwrap().stdout).into_owned()
}

/// Bytes of the image's superblock.
fn superblock(image: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(image).unwrap().read_exact_at(&mut bytes, 1024 + at).unwrap();
    bytes
}

fn mount(checked: &Checked) -> Mount {
    Mount::new(&checked.image, &checked.directory.path().join("looked-at"), "ro,noload")
}

/// The blocks of the bitmaps of this kind, in the order of their groups.
fn bitmaps(image: &Path, kind: &str) -> Vec<u64> {
    let text = dumpe2fs(image);
    let label = format!("{kind} bitmap at ");
    let places = text.split(&label).skip(1);
    places.map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()).collect()
}

#[test]
fn bitmap_padding_is_set() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    put(&mut tree, root, "file", file(10_000));
    let checked = check(&tree, &Options::default());
    let image = File::open(&checked.image).unwrap();
    let bit = |block: u64, bit: u64| {
        let mut byte = [0];
        image.read_exact_at(&mut byte, block * 4096 + bit / 8).unwrap();
        byte[0] >> (bit % 8) & 1
    };
    let blocks = checked.plan.device_bytes() / 4096;
    let inodes = u64::from(u32::from_le_bytes(superblock(&checked.image, 0x28, 4).try_into().unwrap()));
    assert!(blocks < 32_768 && inodes < 32_768);
    let (block_bitmap, inode_bitmap) = (bitmaps(&checked.image, "Block")[0], bitmaps(&checked.image, "Inode")[0]);
    assert!((blocks..32_768).all(|at| bit(block_bitmap, at) == 1));
    assert!((inodes..32_768).all(|at| bit(inode_bitmap, at) == 1));
}

#[test]
fn the_last_partial_group_is_initialised() {
    let tree = Tree::new(dir());
    for size in [(128 << 20) + 4096, (3 << 27) - 4096, (2 << 27) + (5 << 20)] {
        let checked = check(&tree, &Options { size: Some(size), ..Options::default() });
        let text = dumpe2fs(&checked.image);
        let last = text.rsplit("Group ").next().unwrap();
        assert!(!last.lines().next().unwrap().contains("BLOCK_UNINIT"), "{last}");
    }
}

#[test]
fn an_htree_is_in_the_order_of_its_hashes() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let names = put(&mut tree, root, "names", dir());
    for number in 0..5000 {
        put(&mut tree, names, format!("name-{number}"), file(0));
    }
    let checked = check(&tree, &Options::default());
    let dump = debugfs(&checked.image, "htree_dump /names");
    // The root's entries are listed, and then once more with what they point to.
    let end = dump.match_indices("Entry #0").nth(1).map_or(dump.len(), |(at, _)| at);
    let hashes: Vec<u32> = dump[..end]
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Entry #")?.split("Hash 0x").nth(1)?.get(..8))
        .map(|hash| u32::from_str_radix(hash, 16).unwrap())
        .collect();
    assert!(hashes.len() > 10, "{dump}");
    assert!(hashes.is_sorted(), "{hashes:x?}");
    let mounted = mount(&checked);
    assert!((0..5000).all(|number| mounted.dir().join(format!("names/name-{number}")).exists()));
    assert!(!mounted.dir().join("names/name-5000").exists());
}

#[test]
fn the_hash_is_signed_where_the_flag_says_so() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let names = put(&mut tree, root, "names", dir());
    let name = |number: u32| [&b"\xff\xfe\x80"[..], number.to_string().as_bytes(), &[0xe4; 40]].concat();
    for number in 0..2000 {
        put(&mut tree, names, name(number), file(0));
    }
    let checked = check(&tree, &Options::default());
    let flags = u32::from_le_bytes(superblock(&checked.image, 0x160, 4).try_into().unwrap());
    assert_eq!(flags & 3, 1, "signed hash, and not unsigned");
    use std::os::unix::ffi::OsStrExt;
    let mounted = mount(&checked);
    for number in 0..2000 {
        let path = mounted.dir().join("names").join(std::ffi::OsStr::from_bytes(&name(number)));
        assert!(path.exists(), "{number} is listed and can't be looked up");
    }
}

#[test]
fn xattr_blocks_have_their_hash_and_count() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let same = |number: u8| Inode { xattrs: xattrs(&[(b"user.big", &[number; 900])]), ..file(1) };
    for number in 0..30u8 {
        put(&mut tree, root, format!("{number}"), same(number % 3));
    }
    let checked = check(&tree, &Options::default());
    let image = File::open(&checked.image).unwrap();
    let mut blocks = Vec::new();
    for number in 0..30 {
        let text = debugfs(&checked.image, &format!("stat /{number}"));
        let acl = text.split("File ACL: ").nth(1).unwrap().split_whitespace().next().unwrap();
        blocks.push(acl.parse::<u64>().unwrap());
    }
    for block in &blocks {
        let mut header = [0; 96];
        image.read_exact_at(&mut header, block * 4096).unwrap();
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), blocks.iter().filter(|other| *other == block).count() as u32, "h_refcount");
        assert!(word(12) != 0 && word(32 + 12) != 0, "h_hash and e_hash");
    }
}

#[test]
fn xattr_entries_in_a_block_are_sorted() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let names: Vec<String> = ["z", "yy", "xxx", "a", "bb", "ccc", "dddd"].map(|name| format!("user.{name}")).into();
    let list: Vec<(&[u8], &[u8])> = names.iter().map(|name| (name.as_bytes(), &[b'v'; 60][..])).collect();
    put(&mut tree, root, "file", Inode { xattrs: xattrs(&list), ..file(0) });
    // The kernel's binary search is what misses them: every one is asked for.
    let checked = check(&tree, &Options::default());
    let mounted = mount(&checked);
    for name in names {
        let mut value = [0; 100];
        assert_eq!(rustix::fs::getxattr(mounted.dir().join("file"), &*name, &mut value[..]), Ok(60), "{name}");
    }
}

#[test]
fn a_fast_symlink_has_no_extents() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    put(&mut tree, root, "fast", inode(Kind::Symlink([b'f'; 59].into())));
    put(&mut tree, root, "slow", inode(Kind::Symlink([b's'; 60].into())));
    let checked = check(&tree, &Options::default());
    let flags = |name: &str| debugfs(&checked.image, &format!("stat /{name}"));
    assert!(flags("fast").contains("Flags: 0x0"), "{}", flags("fast"));
    assert!(flags("slow").contains("Flags: 0x80000"), "{}", flags("slow"));
}

#[test]
fn extent_and_directory_blocks_have_checksums() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let segments = (0..900).map(|number| Segment { file_block: number * 2, blocks: 1 }).collect();
    put(&mut tree, root, "extents", inode(Kind::File { size: 1800 * 4096, segments }));
    let names = put(&mut tree, root, "names", dir());
    for number in 0..3000 {
        put(&mut tree, names, format!("{number}"), file(0));
    }
    let checked = check(&tree, &Options::default());
    let blocks = debugfs(&checked.image, "blocks /names");
    let image = File::open(&checked.image).unwrap();
    // All but the first, which is the root of the htree and has its checksum elsewhere.
    for block in blocks.split_whitespace().skip(1) {
        let mut tail = [0; 12];
        image.read_exact_at(&mut tail, block.parse::<u64>().unwrap() * 4096 + 4084).unwrap();
        assert_eq!(&tail[..8], b"\0\0\0\0\x0c\0\0\xde", "a directory block ends in its checksum");
    }
    assert!(blocks.split_whitespace().count() > 5, "{blocks}");
    // The kernel checks extent blocks when it reads them.
    let mounted = mount(&checked);
    fs::read(mounted.dir().join("extents")).unwrap();
}

#[test]
fn no_journal_is_named() {
    let checked = check(&Tree::new(dir()), &Options::default());
    assert_eq!(superblock(&checked.image, 0xd0, 16), [0; 16], "s_journal_uuid");
    assert_eq!(superblock(&checked.image, 0xe0, 8), [0; 8], "s_journal_inum, s_journal_dev");
}

#[test]
fn posix_acls_are_converted() {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1u16, 6u16, u32::MAX), (2, 7, 3_000_000_000), (4, 4, u32::MAX), (16, 7, u32::MAX), (32, 0, u32::MAX)]
    {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let acl = xattrs(&[(b"system.posix_acl_access", &value)]);
    put(&mut tree, root, "file", Inode { mode: 0o670, xattrs: acl, ..file(3) });
    let checked = check(&tree, &Options::default());
    let mut found = [0; 100];
    let len = rustix::fs::getxattr(mount(&checked).dir().join("file"), "system.posix_acl_access", &mut found[..]);
    assert_eq!(&found[..len.unwrap()], &value[..]);
}

#[test]
fn times_before_1970_and_after_2038() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let times = [-2_147_483_648i64, -1, 0, 2_147_483_647, 2_147_483_648, 4_294_967_296, 15_032_385_535];
    for secs in times {
        put(&mut tree, root, format!("{secs}"), Inode { mtime: Time { secs, nanos: 5 }, ..file(0) });
    }
    // The independent reader knows the years 1970 to 2038 only.
    let checked = check_by_kernel(&tree, &Options::default(), Data::Written);
    let mounted = mount(&checked);
    for secs in times {
        let found = fs::metadata(mounted.dir().join(secs.to_string())).unwrap();
        assert_eq!((found.mtime(), found.mtime_nsec()), (secs, 5));
    }
}

#[test]
fn uid_and_gid_have_32_bits() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    put(&mut tree, root, "file", Inode { uid: 3_000_000_000, gid: 65_537, ..file(0) });
    let checked = check(&tree, &Options::default());
    let found = fs::metadata(mount(&checked).dir().join("file")).unwrap();
    assert_eq!((found.uid(), found.gid()), (3_000_000_000, 65_537));
}

#[test]
fn hard_links_are_counted() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let id = put(&mut tree, root, "0", file(1));
    for number in 1..1000 {
        tree.link(root, number.to_string().as_bytes(), id).unwrap();
    }
    let checked = check(&tree, &Options::default());
    let found = |name: &str| fs::metadata(mount(&checked).dir().join(name)).unwrap();
    assert_eq!((found("0").nlink(), found("0").ino()), (1000, found("999").ino()));
}

#[test]
fn more_than_65_000_links_are_an_error_that_names_the_file() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let id = put(&mut tree, root, "first", file(1));
    for number in 1..65_001 {
        tree.link(root, number.to_string().as_bytes(), id).unwrap();
    }
    let error = plan(&tree, &Options::default()).unwrap_err().to_string();
    assert!(error.contains("65001 links") && error.starts_with("invalid file system: /first"), "{error}");
}

#[test]
fn xattrs_beyond_a_block_are_an_error_that_names_the_file() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let deep = put(&mut tree, root, "deep", dir());
    put(&mut tree, deep, "file", Inode { xattrs: xattrs(&[(b"user.big", &[1; 4096])]), ..file(1) });
    let error = plan(&tree, &Options::default()).unwrap_err().to_string();
    assert!(error.contains("/deep/file"), "{error}");
}

#[test]
fn xattr_names_outside_ascii() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let name = b"user.\xc3\xa9\xff\x80\x01";
    // In the inode, and in a block of its own.
    for (file_name, value) in [("small", vec![7; 10]), ("large", vec![7; 1000])] {
        put(&mut tree, root, file_name, Inode { xattrs: xattrs(&[(name, &value)]), ..file(0) });
    }
    let checked = check(&tree, &Options::default());
    let mounted = mount(&checked);
    for (file_name, len) in [("small", 10), ("large", 1000)] {
        let mut value = vec![0; 2000];
        let path = mounted.dir().join(file_name);
        assert_eq!(rustix::fs::lgetxattr(&path, &name[..], value.as_mut_slice()), Ok(len));
    }
}

#[test]
fn names_that_are_not_utf_8_and_of_255_bytes() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    for byte in [0x80, 0xff, b'n'] {
        let attribute = [b"user.", &[byte][..]].concat();
        put(&mut tree, root, [byte; 255], file(1));
        put(&mut tree, root, [byte], Inode { xattrs: xattrs(&[(&attribute, b"v")]), ..dir() });
    }
    check(&tree, &Options::default());
}

/// More than 4 × 340 extents; in a tree of depth 1 each leaf has the blocks from its own first one on.
#[test]
fn a_file_of_900_extents_and_one_of_depth_2() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    for (count, step) in [(900, 3), (900, 40_000), (3000, 7)] {
        let segments = (0..count).map(|number| Segment { file_block: number * step, blocks: 1 + number % 2 }).collect();
        let size = u64::from(count) * u64::from(step) * 4096;
        put(&mut tree, root, format!("{count}-{step}"), inode(Kind::File { size, segments }));
    }
    let checked = check(&tree, &Options::default());
    assert!(debugfs(&checked.image, "extents /900-3").contains("1/ 1"));
    assert!(debugfs(&checked.image, "extents /3000-7").contains("2/ 2"));
}

/// Depth 1 with leaves far from the start: an offset that is added twice reads something else.
#[test]
fn a_sparse_file_above_42_gib() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let (gib, last) = (1 << 18, 60 << 18);
    let mut segments: Vec<Segment> =
        (0..400).map(|number| Segment { file_block: number * gib / 7, blocks: 2 }).collect();
    segments.push(Segment { file_block: last, blocks: 3 });
    let size = u64::from(last + 3) * 4096 - 5;
    put(&mut tree, root, "sparse", inode(Kind::File { size, segments: segments.into() }));
    let checked = check(&tree, &Options::default());
    assert!(checked.plan.device_bytes() < 64 << 20);
    assert!(debugfs(&checked.image, "extents /sparse").contains("1/ 1"));
}

#[test]
fn a_full_file_above_42_gib() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let large = put(&mut tree, root, "large", file((44 << 30) + 5));
    let checked = check_data(&tree, &Options::default(), Data::LeftOut);
    let start = u64::from(checked.plan.data_start(large).unwrap()) * 4096;
    let image = File::options().write(true).open(&checked.image).unwrap();
    let places: Vec<u64> = (0..44).map(|gib| (gib << 30) + 4096).chain([44 << 30]).collect();
    for at in &places {
        image.write_all_at(&(at | 1).to_le_bytes()[..5], start + at).unwrap();
    }
    let mounted = mount(&checked);
    let file = File::open(mounted.dir().join("large")).unwrap();
    for at in places {
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(bytes, (at | 1).to_le_bytes()[..5]);
    }
}

#[test]
fn directories_40_deep() {
    let mut tree = Tree::new(dir());
    let mut at = tree.root();
    for depth in 0..40 {
        at = put(&mut tree, at, format!("d{depth}"), dir());
    }
    put(&mut tree, at, "file", file(5000));
    check(&tree, &Options::default());
}

#[test]
fn sparse_files_read_as_zeros_in_their_holes() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let segments = [(3, 1), (10, 2), (500, 1)].map(|(file_block, blocks)| Segment { file_block, blocks });
    put(&mut tree, root, "sparse", inode(Kind::File { size: 1000 * 4096, segments: segments.into() }));
    let checked = check(&tree, &Options::default());
    let bytes = fs::read(mount(&checked).dir().join("sparse")).unwrap();
    for (number, block) in bytes.chunks(4096).enumerate() {
        assert_eq!(block.iter().any(|byte| *byte != 0), matches!(number, 3 | 10 | 11 | 500), "block {number}");
    }
}
