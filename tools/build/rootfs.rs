//! The file system under construction: an in-memory tree to which layers are applied bottom-up.
//!
//! Memory grows with entries, never with contents. Every name carries the number of the layer that set it, so that
//! whiteouts and opaque marks hide what lower layers had and nothing else (image-spec, layer.md, "Whiteouts").
//!
//! # Paths
//!
//! As containerd resolves them (`fs.RootPath`): a path is cleaned textually, `..` stops at the root, symbolic links
//! among the parents are followed inside the root and never leave it, the last component is not followed.

mod path;

use std::collections::BTreeMap;

use super::limits::{Limits, Spent};
use super::tar::show;
use crate::error::{Error, Result};
use crate::ext4::{Segment, Time, Xattr};

pub(super) use self::path::clean;

/// Number of a node in a [`Rootfs`].
pub(super) type NodeId = u32;

/// The root directory.
pub(super) const ROOT: NodeId = 0;

/// What a node has whatever its kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    pub xattrs: Vec<Xattr>,
}

/// Where a file's content went while its layer streamed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// In the spool of small files, from `offset` on.
    Small { offset: u64, bytes: u32 },
    /// In chunks.
    Large { bytes: u64, runs: Box<[Run]> },
}

/// A run of a file's blocks, cut into jobs of the pipeline at every multiple of a chunk's size in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub segment: Segment,
    /// The job of the first piece; the others follow.
    pub job: u32,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    pub node: NodeId,
    /// Number of the layer that set it.
    layer: u32,
}

/// Names in the order of their bytes.
pub(super) type Names = BTreeMap<Box<[u8]>, Name>;

#[derive(Debug)]
pub(super) enum Kind {
    Directory(Names),
    File(Content),
    Symlink(Box<[u8]>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

impl Kind {
    /// An empty directory.
    pub(super) fn directory() -> Self {
        Self::Directory(Names::new())
    }
}

#[derive(Debug)]
pub(super) struct Node {
    pub meta: Meta,
    pub kind: Kind,
}

/// What a hard link's target leads to.
#[derive(Debug)]
pub(super) struct Target {
    pub parent: NodeId,
    pub name: Box<[u8]>,
    pub node: NodeId,
}

/// A whiteout or the mark of an opaque directory.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Whether names that begin with `.wh.` mean something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whiteouts {
    /// In the layers of an image.
    Apply,
    /// In a plain tar or directory, such names are names.
    Keep,
}

/// What to do with an entry of a layer.
#[derive(Debug)]
pub(super) enum Place {
    /// It belongs into the directory `parent` under `name`.
    At { parent: NodeId, name: Box<[u8]> },
    /// It is the root directory itself.
    Root,
    /// It was a mark, and is dealt with.
    Done,
}

/// The tree.
pub(super) struct Rootfs {
    nodes: Vec<Node>,
    limits: Limits,
    spent: Spent,
    layer: u32,
}

impl Rootfs {
    /// An empty root directory, 0755 and of the year 1970.
    pub(super) fn new(limits: &Limits) -> Self {
        let root = Node { meta: Meta { mode: 0o755, ..Meta::default() }, kind: Kind::directory() };
        Self { nodes: vec![root], limits: *limits, spent: Spent::default(), layer: 0 }
    }

    /// From here on, entries belong to the next layer.
    pub(super) fn next_layer(&mut self) {
        self.layer += 1;
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn node(&self, id: NodeId) -> Result<&Node> {
        self.nodes.get(id as usize).ok_or_else(|| Error::invalid("file system", format!("no node {id}")))
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> Result<&mut Node> {
        self.nodes.get_mut(id as usize).ok_or_else(|| Error::invalid("file system", format!("no node {id}")))
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The names in a directory, or nothing for another kind.
    pub(super) fn names(&self, id: NodeId) -> Option<&Names> {
        match self.nodes.get(id as usize)? {
            Node { kind: Kind::Directory(names), .. } => Some(names),
            _ => None,
        }
    }

    fn names_mut(&mut self, id: NodeId) -> Option<&mut Names> {
        match self.nodes.get_mut(id as usize)? {
            Node { kind: Kind::Directory(names), .. } => Some(names),
            _ => None,
        }
    }

    /// Counts an entry against the limits; `bytes` of names, targets and attributes come with it.
    pub(super) fn count(&mut self, bytes: usize) -> Result<()> {
        self.spent.entry(&self.limits, bytes)
    }

    /// Finds the place of an entry, makes its missing parents, and applies it if it is a whiteout.
    pub(super) fn place(&mut self, path: &[u8], whiteouts: Whiteouts) -> Result<Place> {
        let components = clean(path);
        if whiteouts == Whiteouts::Apply {
            let mark = components.iter().find(|name| name.starts_with(b".wh..wh."));
            if mark.is_some_and(|name| *name != OPAQUE) {
                // The private files of aufs.
                return Ok(Place::Done);
            }
        }
        let Some((name, parents)) = components.split_last() else { return Ok(Place::Root) };
        let is_mark = whiteouts == Whiteouts::Apply && name.starts_with(WHITEOUT);
        if is_mark {
            if let Some(parent) = self.find(parents)? {
                self.whiteout(parent, name)?;
            }
            return Ok(Place::Done);
        }
        let parent = self.make(parents)?;
        Ok(Place::At { parent, name: (*name).into() })
    }

    fn whiteout(&mut self, parent: NodeId, mark: &[u8]) -> Result<()> {
        if mark == OPAQUE {
            return self.hide_lower(parent);
        }
        let name = mark.strip_prefix(WHITEOUT).unwrap_or_default();
        if matches!(name, b"" | b"." | b"..") {
            return Err(Error::invalid("whiteout", format!("{} hides no file", show(mark))));
        }
        let layer = self.layer;
        let Some(names) = self.names_mut(parent) else { return Ok(()) };
        let Some(entry) = names.get(name).copied() else { return Ok(()) };
        if let Kind::Directory(_) = self.node(entry.node)?.kind {
            self.hide_lower(entry.node)?;
            // A directory that lower layers had stays only as the parent of what this layer put into it.
            let empty = self.names(entry.node).is_none_or(BTreeMap::is_empty);
            if entry.layer == layer || !empty {
                return Ok(());
            }
        } else if entry.layer == layer {
            return Ok(());
        }
        if let Some(names) = self.names_mut(parent) {
            names.remove(name);
        }
        Ok(())
    }

    /// Removes everything under `top` that is not of the current layer, or holds something that is.
    fn hide_lower(&mut self, top: NodeId) -> Result<()> {
        // Post-order, without recursion: a directory is judged after what it holds.
        let mut order = vec![top];
        let mut at = 0;
        while let Some(&dir) = order.get(at) {
            at += 1;
            let nodes = &self.nodes;
            if let Some(names) = self.names(dir) {
                let is_dir =
                    |name: &&Name| matches!(nodes.get(name.node as usize), Some(Node { kind: Kind::Directory(_), .. }));
                order.extend(names.values().filter(is_dir).map(|name| name.node));
            }
        }
        let layer = self.layer;
        for dir in order.into_iter().rev() {
            let Some(names) = self.names_mut(dir) else { continue };
            let mut names = std::mem::take(names);
            names.retain(|_, name| name.layer == layer || self.names(name.node).is_some_and(|names| !names.is_empty()));
            if let Some(place) = self.names_mut(dir) {
                *place = names;
            }
        }
        Ok(())
    }

    /// Puts a node at a place. A directory over a directory keeps what is in it; anything else replaces.
    pub(super) fn put(&mut self, parent: NodeId, name: &[u8], meta: Meta, kind: Kind) -> Result<NodeId> {
        let existing = self.names(parent).and_then(|names| names.get(name)).copied();
        if let (Some(existing), Kind::Directory(_)) = (existing, &kind)
            && self.names(existing.node).is_some()
        {
            self.node_mut(existing.node)?.meta = meta;
            self.link(parent, name, existing.node)?;
            return Ok(existing.node);
        }
        let id = u32::try_from(self.nodes.len()).map_err(|_| Error::invalid("file system", "too many files"))?;
        self.nodes.push(Node { meta, kind });
        self.link(parent, name, id)?;
        Ok(id)
    }

    /// Names a node in a directory, as of the current layer.
    pub(super) fn link(&mut self, parent: NodeId, name: &[u8], node: NodeId) -> Result<()> {
        if name.len() > 255 {
            return Err(Error::invalid("file name", format!("{} is longer than 255 bytes", show(name))));
        }
        let layer = self.layer;
        let names = self.names_mut(parent).ok_or_else(|| Error::invalid("path", "the parent is not a directory"))?;
        names.insert(name.into(), Name { node, layer });
        Ok(())
    }

    /// The node that a hard link's target names: its parents are followed, itself not.
    pub(super) fn link_target(&self, path: &[u8]) -> Result<Option<Target>> {
        let components = clean(path);
        let Some((name, parents)) = components.split_last() else { return Ok(None) };
        let Some(parent) = self.find(parents)? else { return Ok(None) };
        let target = self.names(parent).and_then(|names| names.get(*name));
        Ok(target.map(|target| Target { parent, name: (*name).into(), node: target.node }))
    }
}

#[cfg(test)]
#[path = "rootfs/tests.rs"]
mod tests;

#[cfg(test)]
#[path = "rootfs/model.rs"]
mod model;
