//! Resolving paths inside the root.

use super::{Kind, Meta, NodeId, ROOT, Rootfs};
use crate::error::{Error, Result};

/// As containerd's `fs.RootPath` bounds it.
const MAX_LINKS: usize = 255;

/// The components of a path, cleaned textually: no empty ones, no `.`, and `..` takes the one before away or, at the
/// root, nothing.
pub(in crate::build) fn clean(path: &[u8]) -> Vec<&[u8]> {
    let mut components = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => drop(components.pop()),
            name => components.push(name),
        }
    }
    components
}

/// Where a step leads.
enum Step {
    Directory(NodeId),
    Link(Box<[u8]>),
    /// To what no path goes through.
    Other,
    Nothing,
}

impl Rootfs {
    /// The directory at `components`, if it is there.
    pub(super) fn find(&self, components: &[&[u8]]) -> Result<Option<NodeId>> {
        let mut walk = Walk::new(components, self.limits.depth)?;
        while let Some(name) = walk.next(self.limits.depth)? {
            match self.step(walk.at(), &name)? {
                Step::Directory(node) => walk.enter(node),
                Step::Link(target) => walk.follow(&target, &name)?,
                Step::Other | Step::Nothing => return Ok(None),
            }
        }
        Ok(Some(walk.at()))
    }

    /// What is at `components`, the last one followed as well; `trail` gets what is passed on the way: directories, links,
    /// and itself. Nothing where the way ends, or is too long.
    pub(in crate::build) fn resolve(&self, components: &[&[u8]], trail: &mut Vec<NodeId>) -> Option<NodeId> {
        let mut walk = Walk::new(components, self.limits.depth).ok()?;
        while let Some(name) = walk.next(self.limits.depth).ok()? {
            let node = self.names(walk.at())?.get(&name)?.node;
            trail.push(node);
            match &self.node(node).ok()?.kind {
                Kind::Directory(_) => walk.enter(node),
                Kind::Symlink(target) => walk.follow(target, &name).ok()?,
                _ => return walk.left.iter().all(|name| name.is_empty()).then_some(node),
            }
        }
        Some(walk.at())
    }

    /// The directory at `components`; what is missing is made, 0755 and owned by root.
    pub(super) fn make(&mut self, components: &[&[u8]]) -> Result<NodeId> {
        let mut walk = Walk::new(components, self.limits.depth)?;
        while let Some(name) = walk.next(self.limits.depth)? {
            match self.step(walk.at(), &name)? {
                Step::Directory(node) => walk.enter(node),
                Step::Link(target) => walk.follow(&target, &name)?,
                Step::Other => {
                    let reason = format!("{} is not a directory, and something is to go into it", super::show(&name));
                    return Err(Error::invalid("path", reason));
                }
                Step::Nothing => {
                    self.count(name.len())?;
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    let node = self.put(walk.at(), &name, meta, Kind::directory())?;
                    walk.enter(node);
                }
            }
        }
        Ok(walk.at())
    }

    fn step(&self, dir: NodeId, name: &[u8]) -> Result<Step> {
        let Some(entry) = self.names(dir).and_then(|names| names.get(name)) else { return Ok(Step::Nothing) };
        match &self.node(entry.node)?.kind {
            Kind::Directory(_) => Ok(Step::Directory(entry.node)),
            Kind::Symlink(target) => Ok(Step::Link(target.clone())),
            _ => Ok(Step::Other),
        }
    }
}

fn too_deep(depth: usize) -> Error {
    Error::invalid("path", format!("more than {depth} directories deep (limit)"))
}

/// A walk from the root: the directories entered so far, and what is left of the path.
struct Walk {
    entered: Vec<NodeId>,
    /// Components to come, the next one last.
    left: Vec<Box<[u8]>>,
    links: usize,
}

impl Walk {
    fn new(components: &[&[u8]], depth: usize) -> Result<Self> {
        if components.len() > depth {
            return Err(too_deep(depth));
        }
        let left = components.iter().rev().map(|name| (*name).into()).collect();
        Ok(Self { entered: Vec::new(), left, links: 0 })
    }

    fn at(&self) -> NodeId {
        self.entered.last().copied().unwrap_or(ROOT)
    }

    fn enter(&mut self, node: NodeId) {
        self.entered.push(node);
    }

    /// The next name to look up; `..`, which comes from links only, goes to the parent and stops at the root.
    fn next(&mut self, depth: usize) -> Result<Option<Box<[u8]>>> {
        while let Some(name) = self.left.pop() {
            match &*name {
                b"" | b"." => {}
                b".." => drop(self.entered.pop()),
                _ if self.entered.len() >= depth => return Err(too_deep(depth)),
                _ => return Ok(Some(name)),
            }
        }
        Ok(None)
    }

    fn follow(&mut self, target: &[u8], name: &[u8]) -> Result<()> {
        self.links += 1;
        if self.links > MAX_LINKS {
            let reason = format!("too many symbolic links, the last one is {}: a loop?", super::show(name));
            return Err(Error::invalid("path", reason));
        }
        if target.first() == Some(&b'/') {
            self.entered.clear();
        }
        self.left.extend(target.split(|byte| *byte == b'/').rev().map(Into::into));
        Ok(())
    }
}
