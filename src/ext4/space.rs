//! Which blocks of a file system nobody uses, and how one is made clean that was frozen.
//!
//! The file system may be hostile or damaged: a block counts as free only where its group's bitmap has the right checksum.
#![deny(clippy::indexing_slicing)]

use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use super::checksum::Checksum;
use super::layout::{BLOCK_SIZE, BLOCKS_PER_GROUP, Block, MAGIC, SUPERBLOCK_OFFSET, SuperBlock, group_flag};
use super::reader::{Opened, ReadBlocks, Reader};
use crate::error::Result;

/// `EXT4_FEATURE_INCOMPAT_CSUM_SEED`: checksums begin with something else.
const INCOMPAT_UNKNOWN: u32 = 0x2000;
/// `EXT4_FEATURE_RO_COMPAT_BIGALLOC`: a bit is not a block.
const RO_COMPAT_BIGALLOC: u32 = 0x200;
/// `EXT4_FEATURE_RO_COMPAT_METADATA_CSUM`.
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
/// `EXT4_VALID_FS`, in the state of the superblock.
const CLEAN: u16 = 1;
/// Most free ranges that are told: a file system in more pieces has none.
const MAX_FREE: usize = 4 << 20;

/// The free blocks of the file system on a device of `device_bytes`, as ranges in order; none where that can't be told
/// for sure.
///
/// # Errors
/// What `read` says, and [`Error::Invalid`](crate::Error::Invalid) for a file system that is damaged.
pub fn read_free(device_bytes: u64, read: &mut ReadBlocks<'_>) -> Result<Vec<Range<u32>>> {
    let mut reader = Reader::new(device_bytes, read);
    let Some(opened) = Opened::read(&mut reader)? else { return Ok(Vec::new()) };
    let superblock = &opened.superblock;
    let unknown = superblock.feature_incompat.get() & INCOMPAT_UNKNOWN != 0
        || superblock.feature_ro_compat.get() & RO_COMPAT_BIGALLOC != 0
        || superblock.feature_ro_compat.get() & RO_COMPAT_METADATA_CSUM == 0
        || superblock.blocks_per_group.get() != BLOCKS_PER_GROUP
        || superblock.first_data_block.get() != 0
        || superblock.blocks_count.get() > reader.device_blocks;
    if unknown {
        return Ok(Vec::new());
    }
    let seed = Checksum::of_file_system(&superblock.uuid);
    let end = superblock.blocks_count.get();
    let mut free: Vec<Range<u32>> = Vec::new();
    for (number, group) in (0u32..).zip(&opened.groups) {
        // A bitmap that was never written says nothing.
        if group.flags.get() & group_flag::BLOCK_UNINIT != 0 {
            continue;
        }
        let Some(first) = number.checked_mul(BLOCKS_PER_GROUP).filter(|first| *first < end) else { break };
        let Ok(bitmap) = reader.block(group.block_bitmap.get()) else { continue };
        if seed.add(&bitmap).low() != group.block_bitmap_checksum.get() {
            continue;
        }
        let blocks = (end - first).min(BLOCKS_PER_GROUP);
        for (byte, bits) in (0u32..).zip(&bitmap).filter(|(_, bits)| **bits != u8::MAX) {
            for bit in (0..8).filter(|bit| bits >> bit & 1 == 0) {
                let within = byte * 8 + bit;
                if within >= blocks {
                    break;
                }
                let full = free.len() == MAX_FREE;
                match free.last_mut() {
                    Some(last) if last.end == first + within => last.end += 1,
                    _ if full => return Ok(Vec::new()),
                    _ => free.push(first + within..first + within + 1),
                }
            }
        }
    }
    Ok(free)
}

/// The first block of a device whose file system was frozen, or has no journal to replay, saying that it was unmounted
/// cleanly: everything of it is on the device. `None` when there is no such file system, or nothing to change.
#[must_use]
pub fn cleaned(first: &Block) -> Option<Block> {
    let (before, rest) = first.split_at_checked(SUPERBLOCK_OFFSET)?;
    let (mut superblock, _) = SuperBlock::read_from_prefix(rest).ok()?;
    let checksummed = superblock.feature_ro_compat.get() & RO_COMPAT_METADATA_CSUM != 0;
    if superblock.magic.get() != MAGIC || superblock.state.get() & CLEAN != 0 {
        return None;
    }
    superblock.state.set(superblock.state.get() | CLEAN);
    if checksummed {
        let covered = superblock.as_bytes().get(..core::mem::offset_of!(SuperBlock, checksum))?;
        superblock.checksum.set(Checksum::START.add(covered).value());
    }
    let mut block = [0; BLOCK_SIZE];
    let parts = before.iter().chain(superblock.as_bytes()).chain(rest.iter().skip(size_of::<SuperBlock>()));
    for (to, from) in block.iter_mut().zip(parts) {
        *to = *from;
    }
    Some(block)
}
