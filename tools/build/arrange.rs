//! From the finished tree to the writer's: numbers inodes in path order, groups small files by directory, and fixes the
//! order of data on the device.
//!
//! Path order is the order of a walk that enters each directory after the files beside it: a directory's small files
//! (one after another, each at a block), its large files, then its subdirectories, all by the bytes of their names.

use std::collections::{HashMap, HashSet};

use super::intake::{SmallFiles, pieces};
use super::pipeline::Pipeline;
use super::rootfs::{Content, Kind, Meta, Names, NodeId, ROOT, Rootfs};
use crate::chunk::{CHUNK_SIZE, Digest, Hasher};
use crate::error::{Error, Result};
use crate::ext4::{self, BLOCK_SIZE, Inode, InodeId, Tree};

/// Blocks that lie together on the device and are one chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct DataRun {
    pub blocks: u32,
    pub job: u32,
    /// The file that the run begins with, to check the plan by.
    pub first: Option<InodeId>,
}

/// A tree that is ready to be planned.
pub(super) struct Arranged {
    pub tree: Tree,
    /// The order of files that have data.
    pub data_order: Vec<InodeId>,
    /// All data in that order.
    pub runs: Vec<DataRun>,
    /// Digest of everything that the device will hold.
    pub seed: [u8; 32],
    /// What became of the nodes that the tree was made of, by their numbers.
    pub inodes: Vec<Option<InodeId>>,
    pub pipeline: Pipeline,
}

impl Arranged {
    /// The inode of a node, if it got one.
    pub(super) fn inode(&self, node: NodeId) -> Option<InodeId> {
        self.inodes.get(node as usize).copied().flatten()
    }

    /// The jobs that hold the data of the `wanted` files: several files may share one.
    pub(super) fn jobs(&self, wanted: &HashSet<InodeId>) -> HashMap<InodeId, Vec<u32>> {
        let (mut runs, mut at, mut found) = (self.runs.iter().peekable(), Vec::new(), HashMap::new());
        for file in &self.data_order {
            if let Some(first) = runs.next_if(|run| run.first == Some(*file)) {
                at = vec![first.job];
                while let Some(more) = runs.next_if(|run| run.first.is_none()) {
                    at.push(more.job);
                }
            }
            if wanted.contains(file) {
                found.insert(*file, at.clone());
            }
        }
        found
    }
}

/// Files of one directory that share chunks.
struct Group {
    buffer: Option<Vec<u8>>,
    used: usize,
    first: Option<InodeId>,
}

struct Arranger {
    small: SmallFiles,
    pipeline: Pipeline,
    tree: Tree,
    data_order: Vec<InodeId>,
    runs: Vec<DataRun>,
    hasher: Hasher,
}

/// Arranges `rootfs`. All chunks of file data are done afterwards.
pub(super) fn arrange(mut rootfs: Rootfs, pipeline: Pipeline, small: SmallFiles) -> Result<Arranged> {
    let root = inode(&mut rootfs, ROOT)?;
    let mut arranger = Arranger {
        small,
        pipeline,
        tree: Tree::new(root),
        data_order: Vec::new(),
        runs: Vec::new(),
        hasher: Hasher::new(),
    };
    arranger.hash_inode(InodeId(0), b"")?;
    let mut known: Vec<Option<InodeId>> = vec![None; rootfs.len()];
    let mut stack = vec![(ROOT, arranger.tree.root())];
    while let Some((node, dir)) = stack.pop() {
        let names = match &mut rootfs.node_mut(node)?.kind {
            Kind::Directory(names) => std::mem::take(names),
            _ => Names::new(),
        };
        arranger.directory(&mut rootfs, names, dir, &mut known, &mut stack)?;
    }
    arranger.pipeline.wait()?;
    for run in &arranger.runs {
        let digest = arranger.pipeline.digest(run.job);
        arranger.hasher.update(&run.blocks.to_le_bytes());
        arranger.hasher.update(digest.as_ref().map_or(&[0; 32], Digest::as_bytes).as_slice());
    }
    let Arranger { pipeline, tree, data_order, runs, hasher, .. } = arranger;
    Ok(Arranged { tree, data_order, runs, seed: *hasher.finish().as_bytes(), inodes: known, pipeline })
}

impl Arranger {
    fn directory(
        &mut self,
        rootfs: &mut Rootfs,
        names: Names,
        dir: InodeId,
        known: &mut [Option<InodeId>],
        stack: &mut Vec<(NodeId, InodeId)>,
    ) -> Result<()> {
        let mut group = Group { buffer: None, used: 0, first: None };
        let mut large = Vec::new();
        let mut directories = Vec::new();
        for (name, entry) in names {
            let place = known
                .get_mut(entry.node as usize)
                .ok_or_else(|| Error::invalid("file system", format!("no node {}", entry.node)))?;
            if let Some(id) = *place {
                self.hash_name(id, &name);
                self.tree.link(dir, &name, id)?;
                continue;
            }
            let id = self.tree.add(inode(rootfs, entry.node)?)?;
            *place = Some(id);
            self.tree.link(dir, &name, id)?;
            self.hash_inode(id, &name)?;
            match &rootfs.node(entry.node)?.kind {
                Kind::Directory(_) => directories.push((entry.node, id)),
                Kind::File(Content::Small { offset, bytes }) if *bytes > 0 => {
                    self.small_file(&mut group, id, *offset, *bytes as usize)?;
                }
                Kind::File(Content::Large { runs, .. }) if !runs.is_empty() => large.push((id, runs.clone())),
                _ => {}
            }
        }
        self.close(&mut group)?;
        for (id, runs) in large {
            self.data_order.push(id);
            let mut first = Some(id);
            for run in runs {
                for (number, (_, blocks)) in pieces(run.segment).enumerate() {
                    self.runs.push(DataRun { blocks, job: run.job + number as u32, first: first.take() });
                }
            }
        }
        stack.extend(directories.into_iter().rev());
        Ok(())
    }

    fn small_file(&mut self, group: &mut Group, id: InodeId, offset: u64, bytes: usize) -> Result<()> {
        let padded = bytes.next_multiple_of(BLOCK_SIZE);
        if group.used + padded > CHUNK_SIZE as usize {
            self.close(group)?;
        }
        let buffer = match &mut group.buffer {
            Some(buffer) => buffer,
            empty => empty.insert(self.pipeline.buffer()?),
        };
        let (content, padding) =
            buffer.get_mut(group.used..group.used + padded).unwrap_or_default().split_at_mut(bytes);
        self.small.read(offset, content)?;
        padding.fill(0);
        group.used += padded;
        group.first.get_or_insert(id);
        self.data_order.push(id);
        Ok(())
    }

    /// Ends a group: it becomes a chunk.
    fn close(&mut self, group: &mut Group) -> Result<()> {
        let Some(buffer) = group.buffer.take() else { return Ok(()) };
        let job = self.pipeline.submit(buffer, group.used)?;
        self.runs.push(DataRun { blocks: (group.used / BLOCK_SIZE) as u32, job, first: group.first.take() });
        group.used = 0;
        Ok(())
    }

    fn hash_name(&mut self, id: InodeId, name: &[u8]) {
        self.hasher.update(&id.0.to_le_bytes());
        self.hasher.update(&(name.len() as u64).to_le_bytes());
        self.hasher.update(name);
    }

    fn hash_inode(&mut self, id: InodeId, name: &[u8]) -> Result<()> {
        self.hash_name(id, name);
        let Some(inode) = self.tree.get(id) else { return Ok(()) };
        let hasher = &mut self.hasher;
        hasher.update(&inode.mode.to_le_bytes());
        hasher.update(&inode.uid.to_le_bytes());
        hasher.update(&inode.gid.to_le_bytes());
        hasher.update(&inode.mtime.secs.to_le_bytes());
        hasher.update(&inode.mtime.nanos.to_le_bytes());
        let mut bytes = |kind: u8, bytes: &[u8]| {
            hasher.update(&[kind]);
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for (name, value) in &inode.xattrs {
            bytes(b'x', name);
            bytes(b'v', value);
        }
        let device = |major: u32, minor: u32| (u64::from(major) << 32 | u64::from(minor)).to_le_bytes();
        match &inode.kind {
            ext4::Kind::Directory(_) => bytes(b'd', &[]),
            ext4::Kind::File { size, segments } => {
                bytes(b'f', &size.to_le_bytes());
                for segment in segments {
                    bytes(b's', &(u64::from(segment.file_block) << 32 | u64::from(segment.blocks)).to_le_bytes());
                }
            }
            ext4::Kind::Symlink(target) => bytes(b'l', target),
            ext4::Kind::CharDevice { major, minor } => bytes(b'c', &device(*major, *minor)),
            ext4::Kind::BlockDevice { major, minor } => bytes(b'b', &device(*major, *minor)),
            ext4::Kind::Fifo => bytes(b'p', &[]),
            ext4::Kind::Socket => bytes(b'k', &[]),
        }
        Ok(())
    }
}

/// The writer's inode for a node, without names if it is a directory. Takes the node's attributes.
fn inode(rootfs: &mut Rootfs, id: NodeId) -> Result<Inode> {
    let node = rootfs.node_mut(id)?;
    let Meta { mode, uid, gid, mtime, xattrs } = std::mem::take(&mut node.meta);
    let kind = match &node.kind {
        Kind::Directory(_) => ext4::Kind::Directory(Vec::new()),
        Kind::File(Content::Small { bytes, .. }) => ext4::Kind::file(u64::from(*bytes)),
        Kind::File(Content::Large { bytes, runs }) => {
            ext4::Kind::File { size: *bytes, segments: runs.iter().map(|run| run.segment).collect() }
        }
        Kind::Symlink(target) => ext4::Kind::Symlink(target.clone()),
        Kind::CharDevice { major, minor } => ext4::Kind::CharDevice { major: *major, minor: *minor },
        Kind::BlockDevice { major, minor } => ext4::Kind::BlockDevice { major: *major, minor: *minor },
        Kind::Fifo => ext4::Kind::Fifo,
        Kind::Socket => ext4::Kind::Socket,
    };
    Ok(Inode { mode, uid, gid, mtime, xattrs: xattrs.into(), kind })
}
