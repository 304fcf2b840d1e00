//! How the device is divided: what goes where, and what each block group's descriptor and bitmaps say of it.

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32};

use super::checksum::Checksum;
use super::layout::{
    BLOCK_SIZE, BLOCKS_PER_GROUP, Block, DESCRIPTORS_PER_BLOCK, GroupDescriptor, INODES_PER_BLOCK,
    MAX_INODES_PER_GROUP, ZERO_BLOCK, group_flag,
};
use crate::error::{Error, Result};

/// Free space per new inode when a device has room to grow, in blocks: 16 KiB, as `mke2fs` takes it.
const BLOCKS_PER_SPARE_INODE: u64 = 4;
/// Free space of a device without a given size: a fixed part, and one in so many blocks.
const SLACK_BLOCKS: u64 = 1024;
const SLACK_PART: u64 = 32;
/// 16 TiB less one block: block numbers have 32 bits.
const MAX_BLOCKS: u64 = u32::MAX as u64;

/// What has to find a place.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// Blocks of hot inodes, in front of the inode tables.
    pub hot: u64,
    /// Blocks of the other inodes, behind them.
    pub cold: u64,
    /// Blocks of file data.
    pub data: u64,
    /// Inodes, the reserved ones included.
    pub inodes: u32,
    /// The data starts at a multiple of this.
    pub align: u32,
}

/// The division of a device. All positions are block numbers.
///
/// Groups fall into three ranges: below `tables` are those with inodes in use, whose bitmaps and tables are stored;
/// below `mapped` those of which blocks may be in use, so that their block bitmaps are stored, while their inode tables
/// are `virtual_start..` and never stored; the others are uninitialised and hold their own bitmaps and tables. Only the
/// last group is always mapped, since it may be short.
#[derive(Debug, Clone)]
pub struct Geometry {
    pub blocks: u32,
    pub groups: u32,
    pub inodes_per_group: u32,
    pub inodes: u32,
    pub tables: u32,
    pub mapped: u32,
    pub hot_start: u32,
    pub tables_start: u32,
    pub cold_start: u32,
    pub bitmaps_start: u32,
    pub metadata_end: u32,
    pub data_start: u32,
    pub virtual_start: u32,
    pub virtual_end: u32,
}

impl Geometry {
    /// Divides a device of `size` bytes, or one as large as needed.
    pub fn new(needs: Needs, size: Option<u64>) -> Result<Self> {
        match size {
            Some(size) => Self::of_size(needs, size),
            None => Self::fitting(needs),
        }
    }

    fn of_size(needs: Needs, size: u64) -> Result<Self> {
        let blocks = match size / BLOCK_SIZE as u64 {
            blocks if blocks == MAX_BLOCKS + 1 => MAX_BLOCKS,
            blocks if blocks > MAX_BLOCKS => {
                return Err(Error::invalid("size", format!("{size} bytes; ext4 here holds at most 16 TiB")));
            }
            blocks => blocks,
        };
        let too_small = || {
            let needed = Self::fitting(needs).map_or(0, |fitting| u64::from(fitting.blocks) * BLOCK_SIZE as u64);
            Error::invalid("size", format!("{size} bytes are too few for this file system; {needed} are enough"))
        };
        let groups = blocks.div_ceil(u64::from(BLOCKS_PER_GROUP)) as u32;
        let free = blocks.saturating_sub(needs.hot + needs.cold + needs.data);
        match Self::divide(needs, groups, free) {
            Ok(Ok(geometry)) if u64::from(geometry.virtual_end) <= blocks => {
                Ok(Self { blocks: blocks as u32, ..geometry })
            }
            Ok(_) => Err(too_small()),
            Err(error) => Err(error),
        }
    }

    fn fitting(needs: Needs) -> Result<Self> {
        let used = needs.hot + needs.cold + needs.data;
        let slack = SLACK_BLOCKS + used / SLACK_PART;
        let mut groups = needs.inodes.div_ceil(MAX_INODES_PER_GROUP).max(1);
        loop {
            let geometry = match Self::divide(needs, groups, slack)? {
                Ok(geometry) => geometry,
                Err(more) => {
                    groups = more;
                    continue;
                }
            };
            // Fewer groups than the inodes were spread over are filled up with free space.
            let least = u64::from(groups - 1) * u64::from(BLOCKS_PER_GROUP) + u64::from(needs.align);
            let blocks = (u64::from(geometry.virtual_end) + slack).max(least);
            let blocks = blocks.next_multiple_of(u64::from(needs.align)).min(MAX_BLOCKS);
            let wanted = blocks.div_ceil(u64::from(BLOCKS_PER_GROUP)) as u32;
            if wanted <= groups {
                return Ok(Self { blocks: blocks as u32, ..geometry });
            }
            groups = wanted;
        }
    }

    /// Divides a device of so many groups, where `free` blocks should have inodes; or says how many groups it takes.
    fn divide(needs: Needs, groups: u32, free: u64) -> Result<Result<Self, u32>> {
        let least = needs.inodes.div_ceil(MAX_INODES_PER_GROUP);
        if groups < least.max(1) {
            return Ok(Err(least.max(1)));
        }
        let wanted = u64::from(needs.inodes) + u64::from(needs.inodes / 64) + 16 + free / BLOCKS_PER_SPARE_INODE;
        let most = MAX_INODES_PER_GROUP.min(u32::MAX / groups / INODES_PER_BLOCK * INODES_PER_BLOCK);
        let per_group = wanted.div_ceil(u64::from(groups)).next_multiple_of(u64::from(INODES_PER_BLOCK));
        let inodes_per_group = per_group.min(u64::from(most)) as u32;
        let table_blocks = u64::from(inodes_per_group / INODES_PER_BLOCK);
        let tables = needs.inodes.div_ceil(inodes_per_group);
        if tables > groups {
            return Err(Error::invalid("file system", format!("{} inodes are more than ext4 can hold", needs.inodes)));
        }

        let hot_start = 1 + u64::from(groups.div_ceil(DESCRIPTORS_PER_BLOCK));
        let tables_start = hot_start + needs.hot;
        let cold_start = tables_start + u64::from(tables) * table_blocks;
        let bitmaps_start = cold_start + needs.cold;
        // The more groups are mapped, the more bitmaps and virtual tables there are, which may take another group.
        let mut mapped = tables;
        loop {
            let last = u64::from(mapped < groups);
            let metadata_end = bitmaps_start + u64::from(mapped) + last + u64::from(tables);
            let data_start = metadata_end.next_multiple_of(u64::from(needs.align));
            let virtual_start = data_start + needs.data;
            let virtual_end = virtual_start + (u64::from(mapped - tables) + last) * (table_blocks + 1);
            if virtual_end > MAX_BLOCKS {
                return Err(Error::invalid("file system", "it needs more than 16 TiB"));
            }
            let reached = virtual_end.div_ceil(u64::from(BLOCKS_PER_GROUP)) as u32;
            if reached > groups {
                return Ok(Err(reached));
            }
            if reached <= mapped {
                return Ok(Ok(Self {
                    blocks: 0,
                    groups,
                    inodes_per_group,
                    inodes: needs.inodes,
                    tables,
                    mapped,
                    hot_start: hot_start as u32,
                    tables_start: tables_start as u32,
                    cold_start: cold_start as u32,
                    bitmaps_start: bitmaps_start as u32,
                    metadata_end: metadata_end as u32,
                    data_start: data_start as u32,
                    virtual_start: virtual_start as u32,
                    virtual_end: virtual_end as u32,
                }));
            }
            mapped = reached;
        }
    }

    /// Blocks of a group's inode table.
    pub fn table_blocks(&self) -> u32 {
        self.inodes_per_group / INODES_PER_BLOCK
    }

    /// The groups whose block bitmaps are stored: all mapped ones, and the last.
    fn bitmap_groups(&self) -> impl Iterator<Item = u32> + use<> {
        (0..self.mapped).chain((self.mapped < self.groups).then(|| self.groups - 1))
    }

    /// Which stored block bitmap is the group's, if its own is.
    fn bitmap_number(&self, group: u32) -> Option<u32> {
        if group < self.mapped { Some(group) } else { (group + 1 == self.groups).then_some(self.mapped) }
    }

    /// The blocks of a group: all have the same count but the last.
    fn group_range(&self, group: u32) -> (u64, u64) {
        let start = u64::from(group) * u64::from(BLOCKS_PER_GROUP);
        (start, (start + u64::from(BLOCKS_PER_GROUP)).min(u64::from(self.blocks)))
    }

    /// The blocks in use outside of uninitialised groups.
    fn used_ranges(&self) -> [(u64, u64); 2] {
        [(0, self.metadata_end.into()), (self.data_start.into(), self.virtual_end.into())]
    }

    fn free_blocks_of(&self, group: u32) -> u32 {
        let (start, end) = self.group_range(group);
        let free = if self.bitmap_number(group).is_some() {
            let used = self.used_ranges().iter().map(|used| used.1.min(end).saturating_sub(used.0.max(start))).sum();
            (end - start).saturating_sub(used)
        } else {
            (end - start).saturating_sub(u64::from(self.table_blocks()) + 2)
        };
        free as u32
    }

    /// All free blocks.
    pub fn free_blocks(&self) -> u32 {
        (0..self.groups).map(|group| self.free_blocks_of(group)).sum()
    }

    /// Inodes in use in a group: from its first on.
    fn used_inodes_of(&self, group: u32) -> u32 {
        let before = u64::from(group) * u64::from(self.inodes_per_group);
        u64::from(self.inodes).saturating_sub(before).min(u64::from(self.inodes_per_group)) as u32
    }

    /// All inodes, free ones included.
    pub fn total_inodes(&self) -> u32 {
        self.groups * self.inodes_per_group
    }

    /// The descriptor of a group in which so many inodes are directories.
    pub fn descriptor(&self, group: u32, directories: u32, seed: Checksum) -> GroupDescriptor {
        let (start, _) = self.group_range(group);
        let bitmap = self.bitmap_number(group);
        let block_bitmap = bitmap.map(|number| self.bitmaps_start + number);
        let (inode_bitmap, inode_table) = if group < self.tables {
            let bitmaps = self.mapped + u32::from(self.mapped < self.groups);
            (self.bitmaps_start + bitmaps + group, self.tables_start + group * self.table_blocks())
        } else if let Some(number) = bitmap {
            let at = self.virtual_start + (number - self.tables) * (self.table_blocks() + 1);
            (at, at + 1)
        } else {
            (start as u32 + 1, start as u32 + 2)
        };
        let used = self.used_inodes_of(group);
        let mut flags = group_flag::INODE_ZEROED;
        let mut descriptor = GroupDescriptor {
            block_bitmap: U32::new(block_bitmap.unwrap_or(start as u32)),
            inode_bitmap: U32::new(inode_bitmap),
            inode_table: U32::new(inode_table),
            free_blocks: U16::new(self.free_blocks_of(group) as u16),
            free_inodes: U16::new((self.inodes_per_group - used) as u16),
            used_directories: U16::new(directories as u16),
            unused_inodes: U16::new((self.inodes_per_group - used) as u16),
            ..GroupDescriptor::default()
        };
        if bitmap.is_some() {
            descriptor.block_bitmap_checksum = U16::new(seed.add(&self.block_bitmap(group)).low());
        } else {
            flags |= group_flag::BLOCK_UNINIT;
        }
        if group < self.tables {
            let bitmap = self.inode_bitmap(group);
            let covered = bitmap.get(..self.inodes_per_group as usize / 8).unwrap_or_default();
            descriptor.inode_bitmap_checksum = U16::new(seed.add(covered).low());
        } else {
            flags |= group_flag::INODE_UNINIT;
        }
        descriptor.flags = U16::new(flags);
        // `ext4_group_desc_csum`: the checksum itself counts as zero.
        descriptor.checksum = U16::new(seed.add(&group.to_le_bytes()).add(descriptor.as_bytes()).low());
        descriptor
    }

    /// The bitmap blocks in their order on the device, from `bitmaps_start` on.
    pub fn bitmaps(&self) -> impl Iterator<Item = Block> + '_ {
        let blocks = self.bitmap_groups().map(|group| self.block_bitmap(group));
        blocks.chain((0..self.tables).map(|group| self.inode_bitmap(group)))
    }

    /// A set bit is a block in use, or one behind the end of the device.
    fn block_bitmap(&self, group: u32) -> Block {
        let (start, end) = self.group_range(group);
        let mut bitmap = ZERO_BLOCK;
        for (from, to) in self.used_ranges() {
            set_bits(&mut bitmap, from.clamp(start, end) - start, to.clamp(start, end) - start);
        }
        set_bits(&mut bitmap, end - start, u64::from(BLOCKS_PER_GROUP));
        bitmap
    }

    /// A set bit is an inode in use, or one that the group does not have.
    fn inode_bitmap(&self, group: u32) -> Block {
        let mut bitmap = ZERO_BLOCK;
        set_bits(&mut bitmap, 0, self.used_inodes_of(group).into());
        set_bits(&mut bitmap, self.inodes_per_group.into(), BLOCK_SIZE as u64 * 8);
        bitmap
    }
}

/// Sets the bits `from..to`.
pub fn set_bits(bitmap: &mut Block, from: u64, to: u64) {
    for (byte, first) in bitmap.iter_mut().zip((0u64..).step_by(8)) {
        let (low, high) = (from.clamp(first, first + 8) - first, to.clamp(first, first + 8) - first);
        if low < high {
            *byte |= (0xff_u16 << low & !(0xff_u16 << high)) as u8;
        }
    }
}

/// Clears the bits `from..to`.
pub fn clear_bits(bitmap: &mut Block, from: u64, to: u64) {
    let mut mask = ZERO_BLOCK;
    set_bits(&mut mask, from, to);
    for (byte, mask) in bitmap.iter_mut().zip(&mask) {
        *byte &= !mask;
    }
}
