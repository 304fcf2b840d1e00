//! Trees of every kind of node, through every oracle.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use ext4::{check, dir, file, inode, put};
use firstread::ext4::{Kind, Options, Tree};

#[test]
fn empty_tree() {
    let tree = Tree::new(dir());
    let checked = check(&tree, &Options::default());
    assert_eq!(checked.plan.inodes(), 1);
    assert!(checked.plan.data_blocks().is_empty());
}

#[test]
fn small_tree() {
    let mut tree = Tree::new(dir());
    let root = tree.root();
    let etc = put(&mut tree, root, "etc", dir());
    put(&mut tree, etc, "passwd", file(1234));
    put(&mut tree, etc, "big", file(3 << 20));
    put(&mut tree, etc, "link", inode(Kind::Symlink(b"passwd".as_slice().into())));
    check(&tree, &Options::default());
}
