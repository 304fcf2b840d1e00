//! The journal's inode.
#![deny(clippy::indexing_slicing)]

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::allocation::Allocation;
use crate::error::Result;
use crate::ext4::existing::{FileSystem, damaged};
use crate::ext4::extent::{IN_INODE, MAX_LENGTH};
use crate::ext4::layout::{
    BLOCK_SIZE, Block, EXTRA_ISIZE, Extent, ExtentHeader, INODE_SIZE, JOURNAL_INODE, RawInode, ZERO_BLOCK, inode_flag,
};
use crate::ext4::reader::ReadBlocks;

/// A regular file that only its owner reads and writes.
const MODE: u16 = 0o100_600;
const EXTENT_MAGIC: u16 = 0xf30a;
/// The most runs of a journal: as many as its inode has room for.
pub const MAX_RUNS: usize = IN_INODE;

/// The inode as it is.
pub struct JournalInode {
    /// The block of the inode table that it is in.
    pub at: u32,
    block: Block,
    raw: RawInode,
    is_sealed: bool,
}

impl JournalInode {
    /// Where it is in its block.
    const PLACE: usize = (JOURNAL_INODE as usize - 1) * INODE_SIZE;

    /// Reads it.
    pub fn read(fs: &FileSystem, space: &Allocation<'_>, read: &mut ReadBlocks<'_>) -> Result<Self> {
        let at = space.descriptor(0)?.inode_table.get();
        let mut block = ZERO_BLOCK;
        read(at, &mut block)?;
        let place = block.get(Self::PLACE..).unwrap_or_default();
        let Ok((raw, _)) = RawInode::read_from_prefix(place) else {
            return Err(damaged("its inode table is cut off"));
        };
        let is_sealed = sealed(raw.clone(), fs).as_bytes() == raw.as_bytes();
        Ok(Self { at, block, raw, is_sealed })
    }

    /// Whether something is in it.
    pub fn is_used(&self) -> bool {
        self.raw.mode.get() != 0 || self.raw.links.get() != 0
    }

    /// Which blocks it has, in their order: inside the file system, in no more than [`MAX_RUNS`], each once.
    pub fn runs(&self, fs: &FileSystem) -> Result<Vec<Range<u32>>> {
        let header = ExtentHeader::read_from_prefix(&self.raw.block).map(|(header, _)| header).ok();
        let entries = header.map_or(0, |header| {
            let is_leaf = header.magic.get() == EXTENT_MAGIC && header.depth.get() == 0;
            if is_leaf { usize::from(header.entries.get()) } else { 0 }
        });
        let is_usual = self.raw.mode.get() == MODE && self.raw.flags.get() == inode_flag::EXTENTS && self.is_sealed;
        if !is_usual || !(1..=MAX_RUNS).contains(&entries) {
            return Err(damaged("its journal's inode is damaged, or not one that firstread reads"));
        }
        let mut runs: Vec<Range<u32>> = Vec::new();
        let mut total = 0;
        for place in self.raw.block.as_chunks::<{ size_of::<Extent>() }>().0.iter().skip(1).take(entries) {
            let wrong = || damaged("its journal's blocks are out of bounds");
            let extent = Extent::read_from_bytes(place).map_err(|_| wrong())?;
            let (start, blocks) = (extent.start.get(), u32::from(extent.blocks.get()));
            let end = start.checked_add(blocks).filter(|end| *end <= fs.raw.blocks_count.get()).ok_or_else(wrong)?;
            let overlaps = runs.iter().any(|run| run.start < end && start < run.end);
            let follows = extent.file_block.get() == total && extent.start_high.get() == 0;
            if start == 0 || !(1..=MAX_LENGTH).contains(&blocks) || overlaps || !follows {
                return Err(wrong());
            }
            total += blocks;
            runs.push(start..end);
        }
        let size = u64::from(self.raw.size_high.get()) << 32 | u64::from(self.raw.size_low.get());
        if size != u64::from(total) * BLOCK_SIZE as u64 {
            return Err(damaged("its journal's size is not that of its blocks"));
        }
        Ok(runs)
    }

    /// The inode of a journal in these blocks, at most [`MAX_RUNS`] runs.
    pub fn encode(runs: &[Range<u32>], fs: &FileSystem) -> RawInode {
        let mut raw = RawInode::new_zeroed();
        let total: u32 = runs.iter().map(|run| run.end - run.start).sum();
        let size = u64::from(total) * BLOCK_SIZE as u64;
        raw.mode = U16::new(MODE);
        raw.size_low = U32::new(size as u32);
        raw.size_high = U32::new((size >> 32) as u32);
        let time = fs.raw.made_time;
        (raw.atime, raw.ctime, raw.mtime, raw.crtime) = (time, time, time, time);
        raw.links = U16::new(1);
        raw.sectors_low = U32::new(total * (BLOCK_SIZE / 512) as u32);
        raw.flags = U32::new(inode_flag::EXTENTS);
        raw.extra_size = U16::new(EXTRA_ISIZE);
        let header = ExtentHeader {
            magic: U16::new(EXTENT_MAGIC),
            entries: U16::new(runs.len() as u16),
            max: U16::new(IN_INODE as u16),
            depth: U16::new(0),
            generation: U32::new(0),
        };
        let mut file_block = 0;
        let extents = runs.iter().map(|run| {
            let blocks = run.end - run.start;
            let (at, blocks_field) = (U32::new(file_block), U16::new(blocks as u16));
            file_block += blocks;
            Extent { file_block: at, blocks: blocks_field, start_high: U16::new(0), start: U32::new(run.start) }
        });
        let bytes = header.as_bytes().to_vec().into_iter().chain(extents.flat_map(|extent| extent.as_bytes().to_vec()));
        for (to, from) in raw.block.iter_mut().zip(bytes) {
            *to = from;
        }
        sealed(raw, fs)
    }

    /// Its block of the table with another inode in its place.
    pub fn with(&self, raw: &RawInode) -> Block {
        let mut block = self.block;
        for (to, from) in block.iter_mut().skip(Self::PLACE).zip(raw.as_bytes()) {
            *to = *from;
        }
        block
    }

    /// Its block of the table without it, as images have it.
    pub fn without(&self) -> Block {
        self.with(&RawInode::new_zeroed())
    }
}

/// With its checksum, which itself counts as zero.
fn sealed(mut raw: RawInode, fs: &FileSystem) -> RawInode {
    (raw.checksum_low, raw.checksum_high) = (U16::new(0), U16::new(0));
    let value = fs.seed.of_inode(JOURNAL_INODE).add(raw.as_bytes()).value();
    (raw.checksum_low, raw.checksum_high) = (U16::new(value as u16), U16::new((value >> 16) as u16));
    raw
}
