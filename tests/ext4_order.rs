//! Where the writer puts things: hot inodes first, data in the order that was asked for, the same bytes every time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use ext4::{Data, assemble, check, dir, file, inode, put, xattrs};
use firstread::ext4::{ALIGN_MAX, Inode, InodeId, Kind, Options, Segment, Time, Tree, plan};

/// Directories of files, and links with blocks of their own.
fn sample() -> (Tree, Vec<InodeId>) {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let mut ids = Vec::new();
    for number in 0..20u32 {
        let parent = put(&mut tree, root, format!("dir-{number:02}"), dir());
        ids.push(parent);
        for size in [100, 5000, 0, 70_000] {
            ids.push(put(&mut tree, parent, format!("file-{size}"), file(size + u64::from(number))));
        }
        let segments = [Segment { file_block: 1, blocks: 2 }, Segment { file_block: 7, blocks: 1 }];
        ids.push(put(&mut tree, parent, "sparse", inode(Kind::File { size: 40_000, segments: segments.into() })));
        ids.push(put(&mut tree, parent, "link", inode(Kind::Symlink(b"../".repeat(30).into()))));
        let big = xattrs(&[(b"user.big", &[number as u8; 400])]);
        ids.push(put(&mut tree, parent, "attributes", Inode { xattrs: big, ..file(1) }));
    }
    (tree, ids)
}

fn blocks_of(tree: &Tree, id: InodeId) -> u32 {
    match &tree.get(id).unwrap().kind {
        Kind::File { segments, .. } => segments.iter().map(|segment| segment.blocks).sum(),
        _ => 0,
    }
}

#[test]
fn data_follows_its_order_without_a_gap() {
    let (tree, ids) = sample();
    let mut data_order: Vec<InodeId> = ids.iter().rev().copied().step_by(2).collect();
    data_order.push(data_order[0]);
    for align in [1, 64, 1000] {
        let options = Options { data_order: data_order.clone(), data_align_blocks: align, ..Options::default() };
        let checked = check(&tree, &options);
        let data = checked.plan.data_blocks();
        assert_eq!(data.start % align, 0);
        assert!(data.start >= checked.plan.metadata_blocks() && data.start < checked.plan.metadata_blocks() + align);
        let rest = ids.iter().filter(|id| !data_order.contains(id));
        let mut at = data.start;
        for id in data_order[..data_order.len() - 1].iter().chain(rest) {
            match blocks_of(&tree, *id) {
                0 => assert_eq!(checked.plan.data_start(*id), None),
                blocks => {
                    // Those not named are in tree order, which is by name and not that of `ids`.
                    if data_order.contains(id) {
                        assert_eq!(checked.plan.data_start(*id), Some(at));
                    }
                    at += blocks;
                }
            }
        }
        assert_eq!(at, data.end);
    }
}

#[test]
fn hot_inodes_come_first() {
    let (tree, ids) = sample();
    let hot: Vec<InodeId> = ids[80..96].iter().rev().copied().collect();
    let checked = check(&tree, &Options { hot: [&hot[..], &[tree.root()], &hot[..1]].concat(), ..Options::default() });
    let (dirs, others): (Vec<InodeId>, Vec<InodeId>) =
        hot.iter().copied().partition(|id| matches!(tree.get(*id).unwrap().kind, Kind::Directory(_)));
    assert_eq!(dirs.len(), 2);
    for (number, id) in (11..).zip(dirs.into_iter().chain(others)) {
        assert_eq!(checked.plan.inode_number(id), Some(number));
    }
    assert_eq!(checked.plan.inode_number(tree.root()), Some(2));
    assert_eq!(checked.plan.inode_number(ids[0]), Some(27));
}

#[test]
fn the_order_of_linking_does_not_show() {
    let build = |reverse: bool| {
        let mut tree = Tree::new(dir());
        let root = tree.root();
        let names = put(&mut tree, root, "names", dir());
        let files: Vec<InodeId> = (0..3000).map(|_| tree.add(file(0)).unwrap()).collect();
        let mut links: Vec<(String, InodeId)> = files.iter().map(|id| (format!("name-{}", id.0), *id)).collect();
        if reverse {
            links.reverse();
        }
        for (name, id) in links {
            tree.link(names, name.as_bytes(), id).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let plan = plan(&tree, &Options::default()).unwrap();
        assemble(&tree, &plan, &directory.path().join("image"), Data::LeftOut)
    };
    assert_eq!(build(false), build(true));
}

#[test]
fn replaced_inodes_are_left_out() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let lost = tree.add(file(1 << 20)).unwrap();
    let lost_dir = tree.add(dir()).unwrap();
    put(&mut tree, lost_dir, "below", file(10));
    let kept = put(&mut tree, root, "kept", file(1));
    let options = Options { hot: vec![lost, kept], data_order: vec![lost, kept], ..Options::default() };
    let checked = check(&tree, &options);
    assert_eq!(checked.plan.inodes(), 2);
    assert_eq!(checked.plan.data_start(lost), None);
    assert_eq!(checked.plan.data_start(kept), Some(checked.plan.data_blocks().start));
    assert_eq!(checked.plan.data_blocks().len(), 1);
    assert!(plan(&tree, &Options { hot: vec![InodeId(99)], ..Options::default() }).is_err());
}

#[test]
fn identity_comes_from_the_seed_and_times_from_the_tree() {
    let superblock = |options: &Options, mtime: i64| {
        let mut tree = Tree::new(dir());
        let root = tree.root();
        put(&mut tree, root, "file", Inode { mtime: Time { secs: mtime, nanos: 5 }, ..file(0) });
        let mut first = Vec::new();
        let plan = plan(&tree, options).unwrap();
        plan.write_metadata(&tree, &mut |block, bytes| {
            if block == 0 {
                first = bytes[1024..2048].to_vec();
            }
            Ok(())
        })
        .unwrap();
        first
    };
    let made = |superblock: &[u8]| u32::from_le_bytes(superblock[0x108..0x10c].try_into().unwrap());
    let one = superblock(&Options::default(), 1_800_000_000);
    let other = superblock(&Options { seed: [7; 32], ..Options::default() }, 1_800_000_000);
    let given = Options { time: Some(Time { secs: 77, nanos: 0 }), ..Options::default() };
    assert_ne!(one[0x68..0x78], other[0x68..0x78]);
    assert_ne!(one[0xec..0xfc], other[0xec..0xfc]);
    assert_eq!((made(&one), made(&superblock(&given, 1_800_000_000))), (1_800_000_000, 77));
}

/// An alignment near 2^32 blocks was taken, and the device filled up with groups of nothing: minutes of work.
#[test]
fn an_alignment_beyond_reason_is_refused() {
    let (tree, _) = sample();
    let aligned = |data_align_blocks| plan(&tree, &Options { data_align_blocks, ..Options::default() });
    for blocks in [0, ALIGN_MAX + 1, u32::MAX] {
        let error = aligned(blocks).expect_err("must be refused").to_string();
        assert!(error.contains(&format!("aligned to {blocks} blocks: 1 to {ALIGN_MAX}")), "{error}");
    }
    assert_eq!(aligned(ALIGN_MAX).unwrap().data_blocks().start, ALIGN_MAX);
}

#[test]
fn a_changed_tree_is_refused() {
    let (mut tree, ids) = sample();
    let plan = plan(&tree, &Options::default()).unwrap();
    for number in 0..500 {
        tree.link(ids[0], format!("more-{number}").as_bytes(), ids[1]).unwrap();
    }
    let error = plan.write_metadata(&tree, &mut |_, _| Ok(())).expect_err("must be refused").to_string();
    assert!(error.contains("changed after it was planned"), "{error}");
}
