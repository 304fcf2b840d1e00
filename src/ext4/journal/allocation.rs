//! Which blocks of a file system are in use: its block bitmaps and the group descriptors.
#![deny(clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::ops::Range;

use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::Result;
use crate::ext4::existing::{FileSystem, damaged};
use crate::ext4::group::{clear_bits, set_bits};
use crate::ext4::layout::{
    BLOCKS_PER_GROUP, Block, DESCRIPTOR_SIZE, DESCRIPTORS_PER_BLOCK, GroupDescriptor, ZERO_BLOCK, group_flag,
};
use crate::ext4::reader::ReadBlocks;

/// What blocks become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Used,
    Free,
}

/// The descriptors of all groups, and the bitmaps that changed.
pub struct Allocation<'a> {
    fs: &'a FileSystem,
    /// The blocks of descriptors: 32 bytes for each 128 MiB of the file system.
    tables: Vec<Block>,
    bitmaps: BTreeMap<u32, Block>,
}

impl<'a> Allocation<'a> {
    /// Reads the descriptors.
    pub fn read(fs: &'a FileSystem, read: &mut ReadBlocks<'_>) -> Result<Self> {
        let mut tables = Vec::new();
        for meta in 0..fs.groups.div_ceil(DESCRIPTORS_PER_BLOCK) {
            let mut table = ZERO_BLOCK;
            read(fs.descriptors_at(meta), &mut table)?;
            tables.push(table);
        }
        Ok(Self { fs, tables, bitmaps: BTreeMap::new() })
    }

    /// A group's descriptor; its places are inside the file system.
    pub fn descriptor(&self, group: u32) -> Result<GroupDescriptor> {
        let table = self.tables.get((group / DESCRIPTORS_PER_BLOCK) as usize);
        let place = table
            .and_then(|table| table.as_chunks::<DESCRIPTOR_SIZE>().0.get((group % DESCRIPTORS_PER_BLOCK) as usize));
        let read = place.and_then(|bytes| GroupDescriptor::read_from_bytes(bytes).ok());
        let Some(descriptor) = read.filter(|_| group < self.fs.groups) else {
            return Err(damaged("it has too few group descriptors"));
        };
        let mut sealed = descriptor.clone();
        self.fs.seal(group, &mut sealed);
        if sealed.checksum != descriptor.checksum {
            return Err(damaged("a group's descriptor has the wrong checksum"));
        }
        let blocks = self.fs.raw.blocks_count.get();
        let inside = |at: u32, len: u32| at > 0 && at.checked_add(len).is_some_and(|end| end <= blocks);
        let table = descriptor.inode_table.get();
        let bitmaps = [descriptor.block_bitmap.get(), descriptor.inode_bitmap.get()];
        if !bitmaps.into_iter().all(|at| inside(at, 1)) || !inside(table, self.fs.table_blocks) {
            return Err(damaged("a group's bitmap or inode table is behind its end"));
        }
        Ok(descriptor)
    }

    fn replace(&mut self, group: u32, descriptor: &GroupDescriptor) {
        let table = self.tables.get_mut((group / DESCRIPTORS_PER_BLOCK) as usize);
        let place = table.and_then(|table| {
            table.as_chunks_mut::<DESCRIPTOR_SIZE>().0.get_mut((group % DESCRIPTORS_PER_BLOCK) as usize)
        });
        if let Some(place) = place {
            place.copy_from_slice(descriptor.as_bytes());
        }
    }

    /// The blocks of a group.
    fn blocks(&self, group: u32) -> Range<u32> {
        let start = group * BLOCKS_PER_GROUP;
        start..self.fs.raw.blocks_count.get().min(start.saturating_add(BLOCKS_PER_GROUP))
    }

    /// The groups by how many free blocks they have, most first.
    pub fn by_room(&self) -> Result<Vec<u32>> {
        let mut groups = Vec::new();
        for group in 0..self.fs.groups {
            groups.push((std::cmp::Reverse(self.descriptor(group)?.free_blocks.get()), group));
        }
        groups.sort_unstable();
        Ok(groups.into_iter().map(|(_, group)| group).collect())
    }

    /// How many blocks are free, as the descriptors say.
    pub fn free_blocks(&self) -> Result<u32> {
        self.sum(|descriptor| descriptor.free_blocks.get())
    }

    /// How many inodes are free, as the descriptors say.
    pub fn free_inodes(&self) -> Result<u32> {
        self.sum(|descriptor| descriptor.free_inodes.get())
    }

    fn sum(&self, count: impl Fn(&GroupDescriptor) -> u16) -> Result<u32> {
        (0..self.fs.groups)
            .try_fold(0u32, |sum, group| Ok(sum.saturating_add(u32::from(count(&self.descriptor(group)?)))))
    }

    /// The longest free run of a group, the first of these; empty when there is none.
    pub fn longest_free(&self, group: u32, read: &mut ReadBlocks<'_>) -> Result<Range<u32>> {
        let (bitmap, whole) = (self.bitmap(group, None, read)?, self.blocks(group));
        let mut longest = whole.start..whole.start;
        let mut run = longest.clone();
        let bits = bitmap.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 0));
        for (block, is_free) in whole.zip(bits) {
            if !is_free {
                run = block + 1..block + 1;
                continue;
            }
            run.end = block + 1;
            if run.len() > longest.len() {
                longest = run.clone();
            }
        }
        Ok(longest)
    }

    /// A group's bitmap, as it is or as the kernel would begin it. An interrupted change may have marked the blocks `ours` of it, and
    /// have written the bitmap and not its checksum, or the other way round.
    fn bitmap(&self, group: u32, ours: Option<&Range<u32>>, read: &mut ReadBlocks<'_>) -> Result<Block> {
        let descriptor = self.descriptor(group)?;
        if descriptor.flags.get() & group_flag::BLOCK_UNINIT != 0 {
            return Ok(self.first_bitmap(group, &descriptor));
        }
        let mut bitmap = ZERO_BLOCK;
        read(descriptor.block_bitmap.get(), &mut bitmap)?;
        let is_right = |bitmap: &Block| self.fs.seed.add(bitmap).low() == descriptor.block_bitmap_checksum.get();
        let is_ours = |bitmap: &Block| {
            let with = |mark: Mark| ours.is_some_and(|run| is_right(&marked(*bitmap, run, mark)));
            is_right(bitmap) || with(Mark::Used) || with(Mark::Free)
        };
        // That of a group that had none may not be there yet.
        let candidates = [bitmap, self.first_bitmap(group, &descriptor)];
        let found = candidates.into_iter().find(is_ours);
        found.ok_or_else(|| damaged("a block bitmap has the wrong checksum"))
    }

    /// The bitmap of a group where nothing but its own blocks is in use (`ext4_init_block_bitmap`).
    fn first_bitmap(&self, group: u32, descriptor: &GroupDescriptor) -> Block {
        let (mut bitmap, whole) = (ZERO_BLOCK, self.blocks(group));
        let mut own = |at: u32, len: u32| {
            let (from, to) = (at.max(whole.start), (at + len).min(whole.end));
            if from < to {
                set_bits(&mut bitmap, (from - whole.start).into(), (to - whole.start).into());
            }
        };
        own(whole.start, u32::from(self.fs.has_descriptors(group)));
        own(descriptor.block_bitmap.get(), 1);
        own(descriptor.inode_bitmap.get(), 1);
        own(descriptor.inode_table.get(), self.fs.table_blocks);
        set_bits(&mut bitmap, (whole.end - whole.start).into(), BLOCKS_PER_GROUP.into());
        bitmap
    }

    /// Marks blocks of the file system; those that are marked so already stay so.
    pub fn mark(&mut self, runs: &[Range<u32>], mark: Mark, read: &mut ReadBlocks<'_>) -> Result<()> {
        for run in runs {
            for group in run.start / BLOCKS_PER_GROUP..run.end.div_ceil(BLOCKS_PER_GROUP) {
                let whole = self.blocks(group);
                let part = run.start.max(whole.start) - whole.start..run.end.min(whole.end) - whole.start;
                let before = match self.bitmaps.get(&group) {
                    Some(bitmap) => *bitmap,
                    None => self.bitmap(group, Some(&part), read)?,
                };
                let used = marked(before, &part, Mark::Used);
                if before != used && before != marked(before, &part, Mark::Free) {
                    return Err(damaged("some of the journal's blocks are in use and some are not"));
                }
                let bitmap = marked(before, &part, mark);
                let mut descriptor = self.descriptor(group)?;
                descriptor.flags = U16::new(descriptor.flags.get() & !group_flag::BLOCK_UNINIT);
                let free = bitmap.iter().map(|byte| byte.count_zeros()).sum::<u32>();
                descriptor.free_blocks = U16::new(free as u16);
                descriptor.block_bitmap_checksum = U16::new(self.fs.seed.add(&bitmap).low());
                self.fs.seal(group, &mut descriptor);
                self.replace(group, &descriptor);
                self.bitmaps.insert(group, bitmap);
            }
        }
        Ok(())
    }

    /// The blocks that changed, by number, all copies of descriptors with them.
    pub fn changed(&self) -> Vec<(u32, Block)> {
        let mut changed = Vec::new();
        let mut metas: Vec<u32> = Vec::new();
        for (group, bitmap) in &self.bitmaps {
            changed.extend(self.descriptor(*group).map(|descriptor| (descriptor.block_bitmap.get(), *bitmap)));
            metas.push(group / DESCRIPTORS_PER_BLOCK);
        }
        metas.dedup();
        for meta in metas {
            let copies = self.fs.copies(meta).filter(|(group, _)| *group < self.fs.groups);
            let table = self.tables.get(meta as usize).copied();
            changed.extend(copies.filter_map(|(_, at)| Some((at, table?))));
        }
        changed.sort_unstable_by_key(|(at, _)| *at);
        changed
    }
}

fn marked(mut bitmap: Block, run: &Range<u32>, mark: Mark) -> Block {
    match mark {
        Mark::Used => set_bits(&mut bitmap, run.start.into(), run.end.into()),
        Mark::Free => clear_bits(&mut bitmap, run.start.into(), run.end.into()),
    }
    bitmap
}
