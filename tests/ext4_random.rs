//! Generated trees through every oracle.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ext4::{Data, check_by_kernel};
use firstread::ext4::{Inode, InodeId, Kind, Options, Segment, Time, Tree};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// How long the test goes on with new trees.
const BUDGET: Duration = Duration::from_secs(20);

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        4 => (0..300_000u64).prop_map(Kind::file),
        // Gaps and lengths of alternating holes and segments.
        2 => (vec((1..40u32, 1..20u32), 0..12), 0..4096u64, 0..50u64).prop_map(|(runs, tail, hole)| {
            let mut end = 0;
            let segments: Vec<Segment> = runs
                .into_iter()
                .map(|(gap, blocks)| {
                    let segment = Segment { file_block: end + gap - 1, blocks };
                    end = segment.file_block + blocks;
                    segment
                })
                .collect();
            Kind::File { size: (u64::from(end) + hole) * 4096 + tail, segments: segments.into() }
        }),
        1 => vec(1..=255u8, 1..200).prop_map(|target| Kind::Symlink(target.into())),
        1 => (0..=4095u32, 0..=1_048_575u32).prop_map(|(major, minor)| Kind::CharDevice { major, minor }),
        1 => (0..300u32, 0..300u32).prop_map(|(major, minor)| Kind::BlockDevice { major, minor }),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
        6 => Just(Kind::Directory(Vec::new())),
    ]
}

fn xattrs() -> impl Strategy<Value = BTreeMap<Vec<u8>, Vec<u8>>> {
    let prefix = prop_oneof![Just(&b"trusted."[..]), Just(&b"security."[..])];
    let name = (prefix, vec(1..=255u8, 1..20)).prop_map(|(prefix, rest)| [prefix, &rest[..]].concat());
    prop_oneof![3 => Just(BTreeMap::new()), 1 => btree_map(name, vec(any::<u8>(), 0..250), 0..8)]
}

fn any_inode() -> impl Strategy<Value = Inode> {
    let time = prop_oneof![4 => 0..2_000_000_000i64, 1 => -3_000_000_000..20_000_000_000i64];
    (0..0o10000u16, any::<[u32; 2]>(), time, 0..1_000_000_000u32, xattrs(), kind()).prop_map(
        |(mode, [uid, gid], secs, nanos, xattrs, kind)| Inode {
            mode,
            // The highest id means nobody.
            uid: uid.min(u32::MAX - 1),
            gid: gid.min(u32::MAX - 1),
            mtime: Time { secs, nanos },
            xattrs: xattrs.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            kind,
        },
    )
}

fn any_name() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![vec(b'a'..=b'z', 1..8), vec(1..=255u8, 1..=255), vec(128..=255u8, 250..=255)];
    name.prop_filter("is no name", |name| !name.contains(&b'/') && name != b"." && name != b"..")
}

/// A tree of inodes, each with its name and a number that says in which directory it is; then hard links.
fn any_tree() -> impl Strategy<Value = Tree> {
    let places = vec((any_inode(), any_name(), any::<prop::sample::Index>()), 0..60);
    let links = vec((any::<prop::sample::Index>(), any_name(), any::<prop::sample::Index>()), 0..8);
    // A directory of many names, short or long, around one block.
    let many = (prop_oneof![3 => Just(0), 1 => 1..600u32], 4..=255usize);
    (any_inode(), places, links, many).prop_map(|(root, places, links, (many, width))| {
        let mut tree = Tree::new(Inode { kind: Kind::Directory(Vec::new()), ..root });
        let mut dirs = vec![tree.root()];
        let mut others = Vec::new();
        for (inode, name, parent) in places {
            let is_dir = matches!(inode.kind, Kind::Directory(_));
            let parent = *parent.get(&dirs);
            if has(&tree, parent, &name) {
                continue;
            }
            let id = tree.add(inode).unwrap();
            tree.link(parent, &name, id).unwrap();
            if is_dir { dirs.push(id) } else { others.push(id) }
        }
        for (parent, name, id) in links {
            let parent = *parent.get(&dirs);
            if !others.is_empty() && !has(&tree, parent, &name) {
                tree.link(parent, &name, *id.get(&others)).unwrap();
            }
        }
        let parent = dirs[dirs.len() - 1];
        for number in 0..many {
            let name = format!("{number:0width$}");
            if !has(&tree, parent, name.as_bytes()) {
                ext4::put(&mut tree, parent, name, ext4::file(0));
            }
        }
        tree
    })
}

fn has(tree: &Tree, dir: InodeId, name: &[u8]) -> bool {
    matches!(&tree.get(dir).unwrap().kind, Kind::Directory(entries) if entries.iter().any(|(other, _)| **other == *name))
}

/// Options, but for the inodes they name.
#[derive(Debug, Clone)]
struct Choices {
    seed: [u8; 32],
    size: Option<u64>,
    align: u32,
    hot: Vec<prop::sample::Index>,
    data_order: Vec<prop::sample::Index>,
}

impl Choices {
    fn options(&self, tree: &Tree) -> Options {
        let ids = |list: &[prop::sample::Index]| list.iter().map(|id| InodeId(id.index(tree.len()) as u32)).collect();
        Options {
            seed: self.seed,
            size: self.size,
            time: None,
            hot: ids(&self.hot),
            data_order: ids(&self.data_order),
            data_align_blocks: self.align,
        }
    }
}

fn any_choices() -> impl Strategy<Value = Choices> {
    let size = prop_oneof![Just(None), (100u64 << 20..3 << 30).prop_map(Some)];
    let ids = || vec(any::<prop::sample::Index>(), 0..20);
    (any::<[u8; 32]>(), size, 1..200u32, ids(), ids()).prop_map(|(seed, size, align, hot, data_order)| Choices {
        seed,
        size,
        align,
        hot,
        data_order,
    })
}

#[test]
fn any_tree_is_what_it_was() {
    let start = Instant::now();
    let config = Config { cases: 400, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&(any_tree(), any_choices()), |(tree, choices)| {
        if start.elapsed() < BUDGET {
            check_by_kernel(&tree, &choices.options(&tree), Data::Written);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
