//! Sizes: large directories, large extent trees, devices with room to grow and up to the limit.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use ext4::{Checked, Data, Mount, assemble, build, check, check_by_kernel, check_data, dir, file, fsck, inode, put};
use firstread::ext4::{InodeId, Kind, Options, Segment, Tree, name_hash, plan};

/// Fills a directory, deletes from it, and expects `e2fsck` to find nothing afterwards.
fn write_and_delete(checked: &Checked, big_file: u64) {
    {
        let mount = Mount::new(&checked.image, &checked.directory.path().join("rw"), "rw,noatime,noinit_itable");
        let top = mount.dir();
        fs::create_dir(top.join("new")).unwrap();
        for number in 0..200 {
            fs::write(top.join(format!("new/{number}")), vec![b'n'; number * 100]).unwrap();
        }
        let zeros = format!("of={}/new/big", top.display());
        let dd = Command::new("dd").args(["if=/dev/urandom", "bs=1M", &zeros, &format!("count={big_file}")]).output();
        assert!(dd.unwrap().status.success());
        for entry in fs::read_dir(top).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.ends_with("doomed") {
                fs::remove_dir_all(&entry).unwrap();
            }
        }
        assert!(Path::new(&top.join("new/199")).exists());
    }
    fsck(&checked.image);
}

/// A directory of many names to delete, and something to keep.
fn doomed(tree: &mut Tree, names: u32) {
    let root = tree.root();
    let doomed = put(tree, root, "doomed", dir());
    for number in 0..names {
        put(tree, doomed, format!("file-{number}"), file(u64::from(number % 9000)));
    }
    let kept = put(tree, root, "kept", dir());
    put(tree, kept, "file", file(2 << 20));
}

#[test]
fn written_to_without_a_given_size() {
    let mut tree = Tree::new(dir());
    doomed(&mut tree, 300);
    write_and_delete(&check(&tree, &Options::default()), 1);
}

#[test]
fn written_to_after_growth() {
    let mut tree = Tree::new(dir());
    doomed(&mut tree, 3000);
    // Whole groups, and last groups of 1 block, of fewer blocks than a table has, and of almost a group.
    for (size, big_file) in
        [(8 << 30, 200), ((1 << 30) + 4096, 10), ((5 << 27) + (1 << 20), 10), ((1 << 30) - 4096, 10)]
    {
        let checked = check(&tree, &Options { size: Some(size), ..Options::default() });
        assert_eq!(checked.plan.device_bytes(), size);
        write_and_delete(&checked, big_file);
    }
}

#[test]
fn growth_is_stored_nowhere() {
    let mut tree = Tree::new(dir());
    doomed(&mut tree, 100);
    let plan_of = |size| plan(&tree, &Options { size, ..Options::default() }).unwrap();
    let (small, large) = (plan_of(None), plan_of(Some(64 << 30)));
    // Nothing is left for the kernel to initialise.
    let checked = build(&tree, &Options { size: Some(64 << 30), ..Options::default() }, Data::LeftOut);
    let dump = Command::new("dumpe2fs").arg(&checked.image).output().unwrap();
    let text = String::from_utf8_lossy(&dump.stdout);
    assert_eq!(text.matches("ITABLE_ZEROED").count(), 512);
    assert_eq!(text.matches("BLOCK_UNINIT").count(), 510);
    // 512 descriptors of 32 bytes, a second block bitmap, one more group's table.
    assert!(large.metadata_blocks() - small.metadata_blocks() < 4 + 2 + 512, "{}", large.metadata_blocks());
    let error = plan(&tree, &Options { size: Some(1 << 20), ..Options::default() }).expect_err("too small").to_string();
    assert!(error.contains("1048576 bytes are too few"), "{error}");
    let error = plan(&tree, &Options { size: Some((1 << 44) + 4096), ..Options::default() }).expect_err("too large");
    assert!(error.to_string().contains("at most 16 TiB"), "{error}");
}

#[test]
fn a_device_of_16_tib() {
    let mut tree = Tree::new(dir());
    doomed(&mut tree, 10);
    let checked = build(&tree, &Options { size: Some(1 << 44), ..Options::default() }, Data::Written);
    assert_eq!(checked.plan.device_bytes(), (1 << 44) - 4096);
    let found = {
        let mount = Mount::new(&checked.image, &checked.directory.path().join("mount"), "ro,noload");
        nodes::read(mount.dir())
    };
    nodes::assert_same(&checked.expected, &found, nodes::Compare::Everything);
}

#[test]
fn directories_around_one_block_and_one_level() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    // Entries of 12 bytes in 4096 less 12 of tail and 24 of dots: 338 fit. Long names: a leaf holds 15 of them.
    for count in [337, 338, 339, 340, 700] {
        let dir = put(&mut tree, root, format!("short-{count}"), dir());
        for number in 0..count {
            put(&mut tree, dir, format!("{number:04}"), file(0));
        }
    }
    for leaves in [506, 507, 508] {
        let dir = put(&mut tree, root, format!("long-{leaves}"), dir());
        for number in 0..leaves * 15 {
            put(&mut tree, dir, format!("{number:0255}"), inode(Kind::Fifo));
        }
    }
    let checked = check(&tree, &Options::default());
    write_and_delete(&checked, 1);
}

#[test]
fn a_directory_of_100_000_names() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let names = put(&mut tree, root, "doomed", dir());
    for number in 0..100_000u32 {
        // High bytes tell signed hashes from unsigned ones.
        let name = [&b"\xfe-a-longer-name-that-fills-the-blocks-\xff-"[..], number.to_string().as_bytes()].concat();
        put(&mut tree, names, name, file(0));
    }
    let checked = check(&tree, &Options::default());
    let stat =
        std::process::Command::new("debugfs").args(["-R", "htree_dump /doomed"]).arg(&checked.image).output().unwrap();
    assert!(String::from_utf8_lossy(&stat.stdout).contains("Indirect levels: 1"));
    write_and_delete(&checked, 1);
}

#[test]
fn a_directory_of_1_000_000_names() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let names = put(&mut tree, root, "names", dir());
    let one = tree.add(file(1)).unwrap();
    for number in 0..1_000_000 {
        // Names are what is tested: 60 000 of them share an inode, the most that can.
        let id = if number % 60_000 == 0 { tree.add(file(1)).unwrap() } else { InodeId(tree.len() as u32 - 1) };
        tree.link(names, format!("name-{number}").as_bytes(), id).unwrap();
    }
    tree.link(root, b"one", one).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    assemble(&tree, &plan(&tree, &Options::default()).unwrap(), &image, Data::LeftOut);
    fsck(&image);
    let dump = Command::new("debugfs").args(["-R", "htree_dump /names"]).arg(&image).output().unwrap();
    assert!(String::from_utf8_lossy(&dump.stdout).contains("Indirect levels: 1"));
    let mount = Mount::new(&image, &directory.path().join("mount"), "ro,noload");
    assert_eq!(fs::read_dir(mount.dir().join("names")).unwrap().count(), 1_000_000);
    for number in (0..1_000_000).step_by(997) {
        assert!(mount.dir().join(format!("names/name-{number}")).exists(), "{number}");
    }
    assert!(!mount.dir().join("names/name-1000000").exists());
}

/// Extents of 128 MiB: more than 4 need a level, more than 4 × 340 need two.
#[test]
fn large_files() {
    for size in [512 << 20, (512 << 20) + 1, (42 << 30) + (1 << 29), 43 << 30, 200 << 30, 3 << 40] {
        let mut tree = Tree::new(dir());
        let root = tree.root();
        let large = put(&mut tree, root, "large", file(size));
        put(&mut tree, root, "small", file(100));
        let checked = check_data(&tree, &Options::default(), Data::LeftOut);

        // A mark here and there must come out where it was put in.
        let start = u64::from(checked.plan.data_start(large).unwrap()) * 4096;
        let image = File::options().write(true).open(&checked.image).unwrap();
        let marks: Vec<u64> = (0..50).map(|mark| (size - 8) / 50 * mark / 4096 * 4096).chain([size - 8]).collect();
        for mark in &marks {
            image.write_all_at(&(mark + 1).to_le_bytes(), start + mark).unwrap();
        }
        let mount = Mount::new(&checked.image, &checked.directory.path().join("marks"), "ro,noload");
        let file = File::open(mount.dir().join("large")).unwrap();
        for mark in marks {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, mark).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), mark + 1, "at {mark} of {size}");
        }
    }
}

#[test]
fn equal_hashes_on_both_sides_of_a_border() {
    // Any two names of one hash, found among many.
    let seed = [7; 32];
    let superblock = {
        let mut block = Vec::new();
        let tree = Tree::new(dir());
        let plan = plan(&tree, &Options { seed, ..Options::default() }).unwrap();
        plan.write_metadata(&tree, &mut |number, bytes| {
            if number == 0 {
                block = bytes[1024..2048].to_vec();
            }
            Ok(())
        })
        .unwrap();
        block
    };
    let word = |at: usize| u32::from_le_bytes(superblock[at..at + 4].try_into().unwrap());
    let hash_seed = [word(0xec), word(0xf0), word(0xf4), word(0xf8)];
    let name = |number: u32| format!("{number:08}");
    let mut hashes: Vec<(u32, u32)> =
        (0..400_000).map(|number| (name_hash(name(number).as_bytes(), &hash_seed).0, number)).collect();
    hashes.sort_unstable();
    let mut tested = 0;
    for at in (1..hashes.len()).filter(|at| hashes[at - 1].0 == hashes[*at].0 && *at > 1000).take(3) {
        let mut tree = Tree::new(dir());
        let root = tree.root();
        let names = put(&mut tree, root, "names", dir());
        // Entries of 16 bytes, 255 of them in a leaf: the first of the two is the last in its leaf.
        for (_, number) in hashes[at - 255..at + 255].iter().chain(hashes.iter().rev().take(20)) {
            put(&mut tree, names, name(*number), file(0));
        }
        // The independent reader does not look in the second leaf.
        check_by_kernel(&tree, &Options { seed, ..Options::default() }, Data::Written);
        tested += 1;
    }
    assert_eq!(tested, 3);
}

#[test]
fn fragmented_files() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    for count in [4, 5, 340, 341, 1360, 1361, 6000] {
        // The last one lies above 42 GiB.
        let step = if count == 6000 { 2000 } else { 3 };
        let segments = (0..count).map(|number| Segment { file_block: number * step + 1, blocks: 1 }).collect();
        let size = (u64::from(count) * u64::from(step) + 5) * 4096;
        put(&mut tree, root, format!("{count}"), inode(Kind::File { size, segments }));
    }
    check(&tree, &Options::default());
}

#[test]
fn a_file_of_three_levels() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let segments = (0..4 * 340 * 340 + 1).map(|number| Segment { file_block: number * 2, blocks: 1 }).collect();
    put(&mut tree, root, "fragments", inode(Kind::File { size: 4096 << 20, segments }));
    let checked = check_data(&tree, &Options::default(), Data::LeftOut);
    let stat = Command::new("debugfs").args(["-R", "extents /fragments"]).arg(&checked.image).output().unwrap();
    assert!(String::from_utf8_lossy(&stat.stdout).contains("3/ 3"));
}

#[test]
fn more_inodes_than_the_data_has_groups_for() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    for number in 0..70 {
        let dir = put(&mut tree, root, format!("{number}"), dir());
        for number in 0..1000 {
            put(&mut tree, dir, format!("{number}"), file(0));
        }
    }
    let checked = check(&tree, &Options::default());
    assert_eq!(checked.plan.inodes(), 70 * 1001 + 1);
}
