//! A file system that this writer made, and that may have been written to since: where its structures are, and how they are
//! sealed again when they change.
#![deny(clippy::indexing_slicing)]

use std::fmt;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::checksum::Checksum;
use super::layout::{
    BLOCKS_PER_GROUP, Block, DESCRIPTORS_PER_BLOCK, GroupDescriptor, INODE_SIZE, INODES_PER_BLOCK, MAGIC,
    MAX_INODES_PER_GROUP, SUPERBLOCK_OFFSET, SuperBlock, ZERO_BLOCK, feature,
};
use super::reader::ReadBlocks;
use crate::error::{Error, Result};

/// Cleanly unmounted, without errors.
const CLEAN: u16 = 1;

/// What is known of the file system.
pub(super) struct FileSystem {
    pub raw: SuperBlock,
    pub groups: u32,
    /// Blocks of a group's inode table.
    pub table_blocks: u32,
    /// The first block of descriptors that is in the groups that it describes; `u32::MAX` when none is.
    pub first_meta: u32,
    pub seed: Checksum,
}

/// Block 0, and the superblock in it.
pub(super) fn first_block(read: &mut ReadBlocks<'_>) -> Result<(Block, SuperBlock)> {
    let mut first = ZERO_BLOCK;
    read(0, &mut first)?;
    let raw = superblock_of(&first)?;
    Ok((first, raw))
}

/// The superblock in block 0.
pub(super) fn superblock_of(first: &Block) -> Result<SuperBlock> {
    let (_, rest) = first.split_at(SUPERBLOCK_OFFSET);
    SuperBlock::read_from_prefix(rest).map(|(raw, _)| raw).map_err(|_| damaged("its superblock is cut off"))
}

/// Block 0 with another superblock, which gets its checksum.
pub(super) fn with_superblock(first: Block, mut raw: SuperBlock) -> Box<Block> {
    raw.checksum = U32::new(checksum_of(&raw));
    let mut block = Box::new(first);
    for (to, from) in block.iter_mut().skip(SUPERBLOCK_OFFSET).zip(raw.as_bytes()) {
        *to = *from;
    }
    block
}

fn checksum_of(raw: &SuperBlock) -> u32 {
    let covered = raw.as_bytes().get(..core::mem::offset_of!(SuperBlock, checksum)).unwrap_or_default();
    Checksum::START.add(covered).value()
}

/// Why a file system is left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// Another writer made it, or there is none.
    Foreign,
    /// Its superblock is wrong.
    Damaged,
    /// It was not unmounted, or found to be wrong by who used it.
    NotClean,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Foreign => "it is not one that firstread made",
            Self::Damaged => "its superblock is damaged; e2fsck can mend it",
            Self::NotClean => {
                "it was not unmounted cleanly; mount and unmount it, or check it with e2fsck, and attach it again"
            }
        })
    }
}

impl FileSystem {
    /// A file system that this writer made, and that is clean.
    pub fn clean(raw: SuperBlock) -> std::result::Result<Self, Obstacle> {
        let fs = Self::of(raw)?;
        let is_clean = fs.raw.state.get() == CLEAN && fs.raw.feature_incompat.get() & feature::RECOVER == 0;
        if is_clean { Ok(fs) } else { Err(Obstacle::NotClean) }
    }

    /// A file system that this writer made, clean or not.
    pub fn of(raw: SuperBlock) -> std::result::Result<Self, Obstacle> {
        let known = raw.magic.get() == MAGIC
            && raw.feature_compat.get() & !feature::HAS_JOURNAL == feature::COMPATIBLE
            && raw.feature_incompat.get() & !(feature::META_BG | feature::RECOVER) == feature::INCOMPATIBLE
            && raw.feature_ro_compat.get() == feature::READ_ONLY_COMPATIBLE
            && usize::from(raw.inode_size.get()) == INODE_SIZE
            && raw.log_block_size.get() == 2
            && raw.blocks_per_group.get() == BLOCKS_PER_GROUP;
        if !known {
            return Err(Obstacle::Foreign);
        }
        if checksum_of(&raw) != raw.checksum.get() {
            return Err(Obstacle::Damaged);
        }
        let (blocks, per_group) = (raw.blocks_count.get(), raw.inodes_per_group.get());
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        let sane = blocks > 1
            && (INODES_PER_BLOCK..=MAX_INODES_PER_GROUP).contains(&per_group)
            && per_group.is_multiple_of(INODES_PER_BLOCK)
            && groups.checked_mul(per_group) == Some(raw.inodes_count.get());
        if !sane {
            return Err(Obstacle::Damaged);
        }
        let has_meta = raw.feature_incompat.get() & feature::META_BG != 0;
        let first_meta = if has_meta { raw.first_meta_group.get() } else { u32::MAX };
        let seed = Checksum::of_file_system(&raw.uuid);
        Ok(Self { groups, table_blocks: per_group / INODES_PER_BLOCK, first_meta, seed, raw })
    }

    /// Whether it has a journal.
    pub fn has_journal(&self) -> bool {
        self.raw.feature_compat.get() & feature::HAS_JOURNAL != 0
    }

    /// The place of a block of descriptors.
    pub fn descriptors_at(&self, meta: u32) -> u32 {
        if meta < self.first_meta { 1 + meta } else { meta * DESCRIPTORS_PER_BLOCK * BLOCKS_PER_GROUP }
    }

    /// Where a block of descriptors is, all copies, each with its group.
    pub fn copies(&self, meta: u32) -> impl Iterator<Item = (u32, u32)> {
        let first = meta * DESCRIPTORS_PER_BLOCK;
        let front = (meta < self.first_meta).then_some((0, 1 + meta));
        let inside = [first, first + 1, first + DESCRIPTORS_PER_BLOCK - 1];
        let inside = inside.map(|group| (group, group.wrapping_mul(BLOCKS_PER_GROUP)));
        front.into_iter().chain(inside.into_iter().filter(move |_| front.is_none()))
    }

    /// Whether a group's first block has descriptors (`ext4_bg_num_gdb_meta`).
    pub fn has_descriptors(&self, group: u32) -> bool {
        let place = group % DESCRIPTORS_PER_BLOCK;
        group / DESCRIPTORS_PER_BLOCK >= self.first_meta && (place < 2 || place == DESCRIPTORS_PER_BLOCK - 1)
    }

    /// How many blocks a new group needs for itself.
    pub fn own_blocks(&self, group: u32) -> u32 {
        u32::from(self.has_descriptors(group)) + 2 + self.table_blocks
    }

    /// `ext4_group_desc_csum`: the checksum itself counts as zero.
    pub fn seal(&self, group: u32, descriptor: &mut GroupDescriptor) {
        descriptor.checksum = U16::new(0);
        descriptor.checksum = U16::new(self.seed.add(&group.to_le_bytes()).add(descriptor.as_bytes()).low());
    }
}

/// An error about the file system.
pub(super) fn damaged(reason: &str) -> Error {
    Error::invalid("ext4 file system", reason)
}
