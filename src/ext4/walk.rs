//! The tree in order: which inodes there are, how often each is named, and that the directories make a tree.

use super::dir::{self, name};
use super::tree::{InodeId, Kind, Tree, check_name, show};
use crate::error::{Error, Result};

/// An inode that no directory names, in [`Walk::links`].
pub const UNNAMED: u32 = 0;

/// What a walk over the tree found.
#[derive(Debug)]
pub struct Walk {
    /// All inodes but the root, each once: the entries of a directory by name, then those of its first directory and
    /// all below it, then those of the next one.
    pub order: Vec<InodeId>,
    /// By [`InodeId`]: how often it is named, `.` and `..` included, or [`UNNAMED`].
    pub links: Vec<u32>,
    /// By [`InodeId`]: the directory where a directory is; the root is in itself.
    pub parents: Vec<InodeId>,
}

/// Walks the tree.
pub fn walk(tree: &Tree) -> Result<Walk> {
    let root = tree.root();
    let mut found = Walk { order: Vec::new(), links: vec![UNNAMED; tree.len()], parents: vec![root; tree.len()] };
    if !matches!(tree.inode(root)?.kind, Kind::Directory(_)) {
        return Err(Error::invalid("file system", "the root is no directory"));
    }
    found.name(tree, root, 2)?;
    let mut stack = vec![root];
    while let Some(dir) = stack.pop() {
        let Kind::Directory(entries) = &tree.inode(dir)?.kind else { continue };
        if u32::try_from(entries.len()).is_err() {
            return Err(refuse(tree, dir, "it has more than 4 294 967 295 entries"));
        }
        let order = dir::sorted(entries);
        for (at, position) in order.iter().enumerate() {
            let name = name(entries, *position);
            check_name(name).map_err(|error| refuse(tree, dir, &error.to_string()))?;
            if order.get(at + 1).is_some_and(|next| dir::name(entries, *next) == name) {
                return Err(refuse(tree, dir, &format!("{} is in it twice", show(name))));
            }
        }
        let below = stack.len();
        for position in order {
            let Some((name, id)) = entries.get(position as usize) else { continue };
            let first = found.links.get(id.0 as usize) == Some(&UNNAMED);
            if matches!(tree.inode(*id)?.kind, Kind::Directory(_)) {
                if !first {
                    return Err(refuse(tree, dir, &format!("the directory {} in it is elsewhere too", show(name))));
                }
                found.name(tree, *id, 2)?;
                found.name(tree, dir, 1)?;
                if let Some(parent) = found.parents.get_mut(id.0 as usize) {
                    *parent = dir;
                }
                stack.push(*id);
            } else {
                found.name(tree, *id, 1)?;
            }
            if first {
                found.order.push(*id);
            }
        }
        if let Some(added) = stack.get_mut(below..) {
            added.reverse();
        }
    }
    Ok(found)
}

impl Walk {
    /// Counts links of an inode.
    fn name(&mut self, tree: &Tree, id: InodeId, links: u32) -> Result<()> {
        match self.links.get_mut(id.0 as usize).map(|count| (count.checked_add(links), count)) {
            Some((Some(sum), count)) => {
                *count = sum;
                Ok(())
            }
            _ => Err(refuse(tree, id, "it has too many links")),
        }
    }
}

/// An error about an inode, with its path.
pub fn refuse(tree: &Tree, id: InodeId, reason: &str) -> Error {
    Error::invalid("file system", format!("{}: {reason}", tree.path(id)))
}
