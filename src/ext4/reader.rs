//! Reading a file system that may be hostile: its blocks, its superblock and its group descriptors.
#![deny(clippy::indexing_slicing)]

use std::collections::VecDeque;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::layout::{
    BLOCK_SIZE, DESCRIPTOR_SIZE, GroupDescriptor, MAGIC, ROOT_INODE, SUPERBLOCK_OFFSET, SuperBlock, feature,
};
use crate::error::{Error, Result};

/// Most groups: twice as many as 16 TiB have.
const MAX_GROUPS: u32 = 1 << 18;
/// Most blocks that are looked at, inode tables and directories together.
const MAX_BLOCKS: u64 = 8 << 20;

/// `EXT4_FEATURE_INCOMPAT_64BIT`.
const INCOMPAT_64BIT: u32 = 0x80;
/// `EXT4_FEATURE_RO_COMPAT_SPARSE_SUPER` and `EXT4_FEATURE_COMPAT_SPARSE_SUPER2`.
const SPARSE_SUPER: u32 = 0x1;
const SPARSE_SUPER2: u32 = 0x200;
/// Features with which blocks mean something else: meta_bg, inline data, encryption, casefolding and so on leave the
/// rest readable, a journal to be replayed or compression do not.
const INCOMPAT_UNREADABLE: u32 = 0x1 | 0x4 | 0x8;

/// Blocks that are read at once: a chunk's worth of metadata.
const WINDOW_BLOCKS: u64 = 64;
/// Windows that are kept.
const WINDOWS: usize = 64;

/// Reads `buf.len()` bytes from the device block given, whole blocks; the range is inside the device.
pub type ReadBlocks<'a> = dyn FnMut(u32, &mut [u8]) -> Result<()> + 'a;

/// What says where everything else is.
pub(super) struct Opened {
    pub superblock: SuperBlock,
    /// Bytes of an inode.
    pub inode_size: u32,
    pub groups: Vec<GroupDescriptor>,
}

impl Opened {
    /// Reads it; `None` when there is no file system that this can read.
    pub fn read(reader: &mut Reader<'_, '_>) -> Result<Option<Self>> {
        if reader.device_blocks < 2 {
            return Ok(None);
        }
        let superblock: SuperBlock = parse(&reader.block(0)?, SUPERBLOCK_OFFSET)?;
        let incompat = superblock.feature_incompat.get();
        let block_size_log = superblock.log_block_size.get();
        if superblock.magic.get() != MAGIC || block_size_log != 2 || incompat & INCOMPAT_UNREADABLE != 0 {
            return Ok(None);
        }
        let inode_size = if superblock.revision.get() == 0 { 128 } else { u32::from(superblock.inode_size.get()) };
        let descriptor = if incompat & INCOMPAT_64BIT != 0 {
            usize::from(superblock.descriptor_size.get())
        } else {
            DESCRIPTOR_SIZE
        };
        let (per_group, inodes) = (superblock.inodes_per_group.get(), superblock.inodes_count.get());
        let sane_inode = inode_size.is_power_of_two() && (128..=BLOCK_SIZE as u32).contains(&inode_size);
        let sane_descriptor = descriptor.is_power_of_two() && (DESCRIPTOR_SIZE..=1024).contains(&descriptor);
        if !sane_inode || !sane_descriptor || per_group == 0 || inodes < ROOT_INODE {
            return Err(invalid("its superblock is out of bounds"));
        }
        let count = inodes.div_ceil(per_group);
        if count > MAX_GROUPS {
            return Err(invalid(format!("it has {count} groups")));
        }
        let per_block = (BLOCK_SIZE / descriptor) as u32;
        let has_meta = incompat & feature::META_BG != 0;
        let first_meta = if has_meta { superblock.first_meta_group.get() } else { u32::MAX };
        // sparse_super and sparse_super2: no group that is the first one of a block of descriptors, but the first of all.
        let (compat, ro_compat) = (superblock.feature_compat.get(), superblock.feature_ro_compat.get());
        let every_group_has_one = ro_compat & SPARSE_SUPER == 0 && compat & SPARSE_SUPER2 == 0;
        let mut groups = Vec::new();
        for group in 0..count {
            let meta = group / per_block;
            // In front, or in the first group that they describe, behind a superblock if one is there.
            let behind = u32::from(meta == 0 || every_group_has_one);
            let own = || superblock.blocks_per_group.get().checked_mul(meta * per_block)?.checked_add(behind);
            let at = if meta < first_meta { Some(1 + meta) } else { own() };
            let block = reader.block(at.ok_or_else(|| invalid("its descriptors are behind its end"))?)?;
            groups.push(parse(&block, (group % per_block) as usize * descriptor)?);
        }
        Ok(Some(Self { superblock, inode_size, groups }))
    }
}

/// Reads blocks of the device, a window at a time.
pub(super) struct Reader<'a, 'b> {
    read: &'a mut ReadBlocks<'b>,
    pub device_blocks: u32,
    windows: VecDeque<(u64, Vec<u8>)>,
    /// Blocks that may still be looked at.
    left: u64,
}

impl<'a, 'b> Reader<'a, 'b> {
    /// Reads a device of `device_bytes` by `read`.
    pub fn new(device_bytes: u64, read: &'a mut ReadBlocks<'b>) -> Self {
        let device_blocks = u32::try_from(device_bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
        Self { read, device_blocks, windows: VecDeque::new(), left: MAX_BLOCKS }
    }

    /// A block of the device.
    pub fn block(&mut self, block: u32) -> Result<Vec<u8>> {
        if block >= self.device_blocks {
            return Err(invalid(format!("it refers to block {block}, behind its end")));
        }
        self.left = self.left.checked_sub(1).ok_or_else(|| invalid("it has too many directories to look at"))?;
        let window = u64::from(block) / WINDOW_BLOCKS;
        if !self.windows.iter().any(|(known, _)| *known == window) {
            let first = window * WINDOW_BLOCKS;
            let blocks = WINDOW_BLOCKS.min(u64::from(self.device_blocks) - first);
            let mut bytes = vec![0; blocks as usize * BLOCK_SIZE];
            (self.read)(first as u32, &mut bytes)?;
            self.windows.truncate(WINDOWS - 1);
            self.windows.push_front((window, bytes));
        }
        let at = (u64::from(block) % WINDOW_BLOCKS) as usize * BLOCK_SIZE;
        let found = self.windows.iter().find(|(known, _)| *known == window);
        let bytes = found.and_then(|(_, bytes)| bytes.get(at..at + BLOCK_SIZE));
        bytes.map(<[u8]>::to_vec).ok_or_else(|| invalid("a block of it is missing"))
    }
}

/// The structure at `at`.
pub(super) fn parse<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8], at: usize) -> Result<T> {
    let from = bytes.get(at..).unwrap_or_default();
    T::read_from_prefix(from).map(|(value, _)| value).map_err(|_| invalid("a structure is cut off"))
}

/// An error about the file system.
pub(super) fn invalid(reason: impl Into<String>) -> Error {
    Error::invalid("ext4 file system", reason)
}
