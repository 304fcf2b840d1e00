//! Growing a file system that this writer made, and that may have been written to since, to the size of a larger device.
//!
//! Nothing is moved: new groups get uninitialised descriptors, and hold their bitmaps and tables themselves, all zeros. Where the
//! descriptors do not fit in front of the first file system's blocks, those of further groups are in the groups that they describe
//! (`meta_bg`, kernel `Documentation/filesystems/ext4/blockgroup.rst`), as the kernel does it when it grows such a file system.
#![deny(clippy::indexing_slicing)]

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::existing::{FileSystem, Obstacle, damaged, first_block, with_superblock};
use super::group::{clear_bits, set_bits};
use super::layout::{
    BLOCK_SIZE, BLOCKS_PER_GROUP, Block, DESCRIPTOR_SIZE, DESCRIPTORS_PER_BLOCK, GroupDescriptor, ZERO_BLOCK, feature,
    group_flag,
};
use super::reader::ReadBlocks;
use crate::error::Result;

/// Free blocks that a last group must have to be worth its tables, as `mke2fs` takes it.
const LEAST_FREE: u32 = 50;

/// What is to be done to a file system.
#[derive(Debug)]
pub enum Growth {
    /// Nothing: it has its device's size already, or would gain nothing.
    Fits,
    /// Nothing can be done, for this reason.
    Stays(Obstacle),
    /// These blocks are to be written.
    Grows(Blocks),
}

/// The blocks that change. Until the superblock is there the others may be written in any order, and again.
#[derive(Debug)]
pub struct Blocks {
    /// All but the superblock's, by number, ascending.
    pub first: Vec<(u32, Block)>,
    /// Block 0, to be written when the others are durable.
    pub superblock: Box<Block>,
    /// The size of the file system before, in blocks.
    pub before: u32,
    /// The size of the file system then, in blocks.
    pub size: u32,
}

/// Plans to grow the file system on a device that now has `device_bytes`. What is behind the file system's end must read as zeros,
/// apart from blocks of an earlier try.
///
/// # Errors
/// What `read` says, and [`Error::Invalid`] for a file system that is damaged.
pub fn grow(device_bytes: u64, read: &mut ReadBlocks<'_>) -> Result<Growth> {
    let device_blocks = u32::try_from(device_bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
    let (first, raw) = first_block(read)?;
    let mut fs = match FileSystem::clean(raw) {
        Ok(fs) => fs,
        Err(obstacle) => return Ok(Growth::Stays(obstacle)),
    };
    let Some((blocks, groups)) = fs.reach(device_blocks) else { return Ok(Growth::Fits) };
    let (old_blocks, old_groups) = (fs.raw.blocks_count.get(), fs.groups);
    fs.use_meta_groups(groups);

    let mut changed = Vec::new();
    let mut free = 0;
    let mut overhead = 0;
    for meta in (old_groups - 1) / DESCRIPTORS_PER_BLOCK..groups.div_ceil(DESCRIPTORS_PER_BLOCK) {
        let mut table = ZERO_BLOCK;
        if meta * DESCRIPTORS_PER_BLOCK < old_groups {
            read(fs.descriptors_at(meta), &mut table)?;
        }
        let all = meta * DESCRIPTORS_PER_BLOCK..((meta + 1) * DESCRIPTORS_PER_BLOCK).min(groups);
        for (group, bytes) in all.clone().zip(table.as_chunks_mut::<DESCRIPTOR_SIZE>().0) {
            let end = (u64::from(group + 1) * u64::from(BLOCKS_PER_GROUP)).min(blocks.into());
            let len = (end - u64::from(group) * u64::from(BLOCKS_PER_GROUP)) as u32;
            if group + 1 == old_groups {
                let before = old_blocks - group * BLOCKS_PER_GROUP;
                if before < len {
                    let mut descriptor = GroupDescriptor::read_from_bytes(&*bytes)
                        .map_err(|_| damaged("a group's descriptor is cut off"))?;
                    let (at, bitmap, gained) = fs.longer(group, &mut descriptor, before, len, read)?;
                    free += u64::from(gained);
                    changed.push((at, bitmap));
                    bytes.copy_from_slice(descriptor.as_bytes());
                }
            } else if group >= old_groups {
                let (descriptor, bitmap) = fs.new_group(group, len, group + 1 == groups);
                free += u64::from(descriptor.free_blocks.get());
                overhead += fs.own_blocks(group);
                changed.extend(bitmap.map(|bitmap| (descriptor.block_bitmap.get(), bitmap)));
                bytes.copy_from_slice(descriptor.as_bytes());
            }
        }
        changed.extend(fs.copies(meta).filter(|(group, _)| *group < groups).map(|(_, at)| (at, table)));
    }
    changed.sort_unstable_by_key(|(at, _)| *at);
    let superblock = fs.finished(first, blocks, groups, free, overhead);
    Ok(Growth::Grows(Blocks { first: changed, superblock, before: old_blocks, size: blocks }))
}

impl FileSystem {
    /// How many blocks and groups it can have on a device of so many blocks, if that is more than it has.
    fn reach(&self, device_blocks: u32) -> Option<(u32, u32)> {
        let most = u32::MAX / self.raw.inodes_per_group.get();
        let mut groups = device_blocks.div_ceil(BLOCKS_PER_GROUP).min(most);
        let mut blocks = device_blocks.min(groups.saturating_mul(BLOCKS_PER_GROUP));
        let last = blocks - (groups - 1) * BLOCKS_PER_GROUP;
        // It may have to have descriptors as well.
        if groups > self.groups && last < self.table_blocks + 3 + LEAST_FREE {
            groups -= 1;
            blocks = groups * BLOCKS_PER_GROUP;
        }
        (blocks > self.raw.blocks_count.get()).then_some((blocks, groups))
    }

    /// Decides where the descriptors are that do not fit in front.
    fn use_meta_groups(&mut self, groups: u32) {
        let there = self.groups.div_ceil(DESCRIPTORS_PER_BLOCK);
        if self.first_meta == u32::MAX && groups.div_ceil(DESCRIPTORS_PER_BLOCK) > there {
            self.first_meta = there;
        }
    }

    /// A group without anything but its own blocks; one that is to have a bitmap, since it may be short, has that too.
    fn new_group(&self, group: u32, len: u32, last: bool) -> (GroupDescriptor, Option<Block>) {
        let (start, used) = (group * BLOCKS_PER_GROUP, self.own_blocks(group));
        let bitmaps = start + u32::from(self.has_descriptors(group));
        let mut flags = group_flag::INODE_UNINIT | group_flag::INODE_ZEROED;
        let per_group = U16::new(self.raw.inodes_per_group.get() as u16);
        let mut descriptor = GroupDescriptor {
            block_bitmap: U32::new(bitmaps),
            inode_bitmap: U32::new(bitmaps + 1),
            inode_table: U32::new(bitmaps + 2),
            free_blocks: U16::new((len - used) as u16),
            free_inodes: per_group,
            unused_inodes: per_group,
            ..GroupDescriptor::default()
        };
        let bitmap = last.then(|| {
            let mut bitmap = ZERO_BLOCK;
            set_bits(&mut bitmap, 0, used.into());
            set_bits(&mut bitmap, len.into(), BLOCKS_PER_GROUP.into());
            descriptor.block_bitmap_checksum = U16::new(self.seed.add(&bitmap).low());
            bitmap
        });
        if bitmap.is_none() {
            flags |= group_flag::BLOCK_UNINIT;
        }
        descriptor.flags = U16::new(flags);
        self.seal(group, &mut descriptor);
        (descriptor, bitmap)
    }

    /// The last group gets longer: its bitmap, where that is, and how many blocks become free. An earlier try may have done it.
    fn longer(
        &self,
        group: u32,
        descriptor: &mut GroupDescriptor,
        before: u32,
        len: u32,
        read: &mut ReadBlocks<'_>,
    ) -> Result<(u32, Block, u32)> {
        let at = descriptor.block_bitmap.get();
        if descriptor.flags.get() & group_flag::BLOCK_UNINIT != 0 || at == 0 || at >= self.raw.blocks_count.get() {
            return Err(damaged("its last group has no bitmap"));
        }
        let mut bitmap = ZERO_BLOCK;
        read(at, &mut bitmap)?;
        clear_bits(&mut bitmap, before.into(), len.into());
        set_bits(&mut bitmap, len.into(), BLOCKS_PER_GROUP.into());
        let free = bitmap.iter().map(|byte| byte.count_zeros()).sum::<u32>();
        descriptor.free_blocks = U16::new(free as u16);
        descriptor.block_bitmap_checksum = U16::new(self.seed.add(&bitmap).low());
        self.seal(group, descriptor);
        Ok((at, bitmap, len - before))
    }

    /// Block 0 of the grown file system.
    fn finished(&self, first: Block, blocks: u32, groups: u32, free: u64, overhead: u32) -> Box<Block> {
        let mut raw = self.raw.clone();
        let per_group = raw.inodes_per_group.get();
        raw.free_blocks = U32::new((u64::from(raw.free_blocks.get()) + free).min(blocks.into()) as u32);
        raw.free_inodes = U32::new(raw.free_inodes.get().saturating_add((groups - self.groups) * per_group));
        raw.blocks_count = U32::new(blocks);
        raw.inodes_count = U32::new(groups * per_group);
        raw.overhead_blocks = U32::new(raw.overhead_blocks.get().saturating_add(overhead));
        if self.first_meta != u32::MAX {
            raw.feature_incompat = U32::new(raw.feature_incompat.get() | feature::META_BG);
            raw.first_meta_group = U32::new(self.first_meta);
        }
        with_superblock(first, raw)
    }
}
