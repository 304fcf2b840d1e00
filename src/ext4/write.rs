//! The metadata of a plan as blocks.

use zerocopy::IntoBytes;

use super::checksum::Checksum;
use super::dir::{Identity, Shape, changed};
use super::emit::Emitter;
use super::extent::{self, ExtentTree};
use super::inode::{self, Placed, encode_inode};
use super::layout::{
    BLOCK_SIZE, Block, DESCRIPTOR_SIZE, DESCRIPTORS_PER_BLOCK, FIRST_INODE, INODE_SIZE, INODES_PER_BLOCK, ROOT_INODE,
    ZERO_BLOCK, inode_flag,
};
use super::plan::{Place, Plan};
use super::superblock;
use super::tree::{Inode, InodeId, Kind, Segment, Tree};
use super::xattr::{self, Xattrs};
use crate::error::Result;

impl Plan {
    /// Emits the metadata in ascending device order: the number of the first block, and bytes that are a multiple of
    /// 4096. Blocks that are never emitted, and are not file data, are zeros. Memory does not grow with the device.
    ///
    /// The tree must be the one that was planned, unchanged.
    pub fn write_metadata(&self, tree: &Tree, sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        if tree.len() != self.places.len() {
            return Err(changed());
        }
        let mut out = Emitter::new(sink);
        let seed = self.names.checksum();
        out.put(0, &superblock::encode(&self.geometry, &self.names, self.time))?;
        self.emit_descriptors(tree, seed, &mut out)?;
        let (hot, cold) = self.block_order.split_at_checked(self.hot_count).ok_or_else(changed)?;
        for id in hot {
            self.emit_blocks(tree, *id, seed, &mut out)?;
        }
        self.emit_tables(tree, seed, &mut out)?;
        for id in cold {
            self.emit_blocks(tree, *id, seed, &mut out)?;
        }
        for (bitmap, number) in self.geometry.bitmaps().zip(self.geometry.bitmaps_start..) {
            out.put(number, &bitmap)?;
        }
        out.flush()
    }

    /// The inode of a number, if it is in use and not reserved.
    fn numbered(&self, tree: &Tree, number: u32) -> Option<InodeId> {
        match number {
            ROOT_INODE => Some(tree.root()),
            _ => self.numbered.get(number.checked_sub(FIRST_INODE)? as usize).copied(),
        }
    }

    fn place(&self, id: InodeId) -> Result<&Place> {
        self.places.get(id.0 as usize).ok_or_else(changed)
    }

    fn emit_descriptors(&self, tree: &Tree, seed: Checksum, out: &mut Emitter<'_>) -> Result<()> {
        let geometry = &self.geometry;
        let mut block = ZERO_BLOCK;
        for group in 0..geometry.groups {
            let first = u64::from(group) * u64::from(geometry.inodes_per_group) + 1;
            let numbers = first.min(u64::from(geometry.inodes) + 1)
                ..(first + u64::from(geometry.inodes_per_group)).min(u64::from(geometry.inodes) + 1);
            let inodes = numbers.filter_map(|number| tree.get(self.numbered(tree, u32::try_from(number).ok()?)?));
            let directories = inodes.filter(|inode| matches!(inode.kind, Kind::Directory(_))).count();
            let descriptor = geometry.descriptor(group, directories as u32, seed);
            let at = (group % DESCRIPTORS_PER_BLOCK) as usize * DESCRIPTOR_SIZE;
            block[at..at + DESCRIPTOR_SIZE].copy_from_slice(descriptor.as_bytes());
            if group % DESCRIPTORS_PER_BLOCK == DESCRIPTORS_PER_BLOCK - 1 || group + 1 == geometry.groups {
                out.put(1 + group / DESCRIPTORS_PER_BLOCK, &block)?;
                block = ZERO_BLOCK;
            }
        }
        Ok(())
    }

    /// The tables of the groups with inodes in use follow each other, so they are one table. Its unused end is zeros.
    fn emit_tables(&self, tree: &Tree, seed: Checksum, out: &mut Emitter<'_>) -> Result<()> {
        let mut number = 1;
        for at in 0..self.geometry.inodes.div_ceil(INODES_PER_BLOCK) {
            let mut block = ZERO_BLOCK;
            for bytes in block.chunks_exact_mut(INODE_SIZE) {
                if let Some(id) = self.numbered(tree, number) {
                    bytes.copy_from_slice(&self.encode(tree, id, seed)?);
                }
                number += 1;
            }
            out.put(self.geometry.tables_start + at, &block)?;
        }
        Ok(())
    }

    fn encode(&self, tree: &Tree, id: InodeId, seed: Checksum) -> Result<[u8; INODE_SIZE]> {
        let (inode, place) = (tree.inode(id)?, self.place(id)?);
        let xattrs = Xattrs::of(inode).map_err(|_| changed())?;
        let xattr_block = self.xattr_blocks.get(place.xattrs as usize).map(|block| block.start);
        let own = u64::from(place.blocks);
        let (size, mut flags) = match &inode.kind {
            Kind::Directory(_) if place.blocks > 1 => (own * BLOCK_SIZE as u64, inode_flag::INDEX),
            Kind::Directory(_) => (own * BLOCK_SIZE as u64, 0),
            Kind::File { size, .. } => (*size, 0),
            Kind::Symlink(target) => (target.len() as u64, 0),
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo | Kind::Socket => (0, 0),
        };
        let block = match inode::in_place(&inode.kind) {
            Some(block) => block,
            None => {
                flags |= inode_flag::EXTENTS;
                extent_tree(inode, place).in_inode()
            }
        };
        let data = match &inode.kind {
            Kind::File { segments, .. } => segments.iter().map(|segment| u64::from(segment.blocks)).sum(),
            _ => 0,
        };
        let placed = Placed {
            number: place.number,
            links: place.links,
            size,
            blocks: own + data + u64::from(xattr_block.is_some()),
            flags,
            block,
            xattr_block: xattr_block.unwrap_or(0),
        };
        Ok(encode_inode(inode, &xattrs, &placed, seed))
    }

    /// The blocks that an inode has of its own, then its attribute block if it is the first to use it.
    fn emit_blocks(&self, tree: &Tree, id: InodeId, seed: Checksum, out: &mut Emitter<'_>) -> Result<()> {
        let (inode, place) = (tree.inode(id)?, self.place(id)?);
        let own = seed.of_inode(place.number);
        match &inode.kind {
            Kind::Directory(entries) => {
                let shape = Shape::of(entries, &self.names.hash_seed).map_err(|_| changed())?;
                if shape.blocks() != place.blocks {
                    return Err(changed());
                }
                let identity = Identity { number: place.number, parent: self.place(place.parent)?.number, seed: own };
                let target = |id: InodeId| Ok((self.place(id)?.number, inode::types(&tree.inode(id)?.kind).1));
                let mut at = place.start;
                shape.emit(entries, identity, &target, &mut |block| {
                    out.put(at, block)?;
                    at = at.wrapping_add(1);
                    Ok(())
                })?;
            }
            Kind::Symlink(target) if place.blocks == 1 => {
                let mut block: Block = ZERO_BLOCK;
                block.get_mut(..target.len()).ok_or_else(changed)?.copy_from_slice(target);
                out.put(place.start, &block)?;
            }
            Kind::File { .. } if place.blocks > 0 => extent_tree(inode, place).emit(own, out)?,
            _ => {}
        }
        if let Some(shared) = self.xattr_blocks.get(place.xattrs as usize).filter(|block| block.owner == id) {
            let mut block = Xattrs::of(inode).ok().and_then(|xattrs| xattrs.block()).ok_or_else(changed)?;
            xattr::finish_block(&mut block, shared.references, shared.start, seed);
            out.put(shared.start, &block)?;
        }
        Ok(())
    }
}

/// Where the blocks of a file, a directory or a long link are.
fn extent_tree(inode: &Inode, place: &Place) -> ExtentTree {
    match &inode.kind {
        Kind::File { segments, .. } => ExtentTree::new(extent::runs(segments, place.data).collect(), place.start),
        _ => {
            let segments = [Segment { file_block: 0, blocks: place.blocks }];
            ExtentTree::new(extent::runs(&segments, place.start).collect(), 0)
        }
    }
}
