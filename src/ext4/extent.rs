//! Extent trees: which device blocks the blocks of an inode are (`fs/ext4/ext4_extents.h`).

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32};

use super::checksum::Checksum;
use super::emit::Emitter;
use super::layout::{BLOCK_SIZE, Extent, ExtentHeader, ExtentIndex, ZERO_BLOCK};
use super::tree::Segment;
use crate::error::{Error, Result};

const MAGIC: u16 = 0xf30a;
/// The most blocks of an extent that is written (`EXT_INIT_MAX_LEN`).
pub const MAX_LENGTH: u32 = 1 << 15;
/// Entries in the inode.
pub const IN_INODE: usize = 4;
/// Entries in a block, in front of its checksum.
const IN_BLOCK: usize = (BLOCK_SIZE - size_of::<ExtentHeader>() - 4) / size_of::<Extent>();

/// One extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    file_block: u32,
    start: u32,
    blocks: u16,
}

/// The extents of segments that follow each other on the device from `start` on; segments that touch are one.
pub fn runs(segments: &[Segment], start: u32) -> impl Iterator<Item = Run> + '_ {
    let mut at = start;
    let mut rest = segments.iter().peekable();
    let mut open: Option<Segment> = None;
    std::iter::from_fn(move || {
        let mut segment = match open.take() {
            Some(segment) => segment,
            None => *rest.next()?,
        };
        while segment.blocks < MAX_LENGTH {
            match rest.next_if(|next| Some(next.file_block) == segment.file_block.checked_add(segment.blocks)) {
                Some(next) => segment.blocks = segment.blocks.saturating_add(next.blocks),
                None => break,
            }
        }
        let blocks = segment.blocks.min(MAX_LENGTH);
        if segment.blocks > blocks {
            open =
                Some(Segment { file_block: segment.file_block.wrapping_add(blocks), blocks: segment.blocks - blocks });
        }
        let run = Run { file_block: segment.file_block, start: at, blocks: blocks as u16 };
        at = at.wrapping_add(blocks);
        Some(run)
    })
}

/// How many nodes each level has, that of the leaves first, for so many extents; none where the inode holds them all.
fn levels(extents: usize) -> Vec<usize> {
    let mut levels = Vec::new();
    let mut entries = extents;
    while entries > IN_INODE {
        entries = entries.div_ceil(IN_BLOCK);
        levels.push(entries);
    }
    levels
}

/// How many blocks the tree of so many extents needs outside of the inode.
pub fn tree_blocks(extents: usize) -> Result<u32> {
    u32::try_from(levels(extents).iter().sum::<usize>())
        .map_err(|_| Error::invalid("file system", "a file of more extents than ext4 can hold"))
}

/// An extent tree whose blocks lie in one range of the device: the top level first, the leaves last.
#[derive(Debug)]
pub struct ExtentTree {
    runs: Vec<Run>,
    levels: Vec<usize>,
    start: u32,
}

impl ExtentTree {
    /// The tree over `runs`, with its blocks from `start` on.
    pub fn new(runs: Vec<Run>, start: u32) -> Self {
        let levels = levels(runs.len());
        Self { runs, levels, start }
    }

    /// What the inode holds.
    pub fn in_inode(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
        self.node(&mut bytes, self.levels.len(), 0, IN_INODE);
        bytes
    }

    /// Emits the blocks.
    pub fn emit(&self, seed: Checksum, out: &mut Emitter<'_>) -> Result<()> {
        for (depth, count) in self.levels.iter().enumerate().rev() {
            for number in 0..*count {
                let mut block = ZERO_BLOCK;
                self.node(&mut block, depth, number, IN_BLOCK);
                let (covered, checksum) = block.split_at_mut(BLOCK_SIZE - 4);
                checksum.copy_from_slice(&seed.add(covered).value().to_le_bytes());
                out.put(self.block(depth, number), &block)?;
            }
        }
        Ok(())
    }

    /// Where a node is.
    fn block(&self, depth: usize, number: usize) -> u32 {
        let above: usize = self.levels.iter().skip(depth + 1).sum();
        self.start.wrapping_add((above + number) as u32)
    }

    /// Fills in the node `number` of the level `depth`, which holds at most `max` entries.
    fn node(&self, bytes: &mut [u8], depth: usize, number: usize, max: usize) {
        let below = if depth == 0 { self.runs.len() } else { self.levels.get(depth - 1).copied().unwrap_or(0) };
        let first = number * max;
        let count = below.saturating_sub(first).min(max);
        let header = ExtentHeader {
            magic: U16::new(MAGIC),
            entries: U16::new(count as u16),
            max: U16::new(max as u16),
            depth: U16::new(depth as u16),
            generation: U32::ZERO,
        };
        let (head, entries) = bytes.split_at_mut(size_of::<ExtentHeader>());
        head.copy_from_slice(header.as_bytes());
        let span = IN_BLOCK.saturating_pow(depth as u32);
        for (entry, child) in entries.chunks_exact_mut(size_of::<Extent>()).zip(first..first + count) {
            let Some(run) = self.runs.get(child.saturating_mul(span)) else { break };
            if depth == 0 {
                let extent = Extent {
                    file_block: U32::new(run.file_block),
                    blocks: U16::new(run.blocks),
                    start_high: U16::ZERO,
                    start: U32::new(run.start),
                };
                entry.copy_from_slice(extent.as_bytes());
            } else {
                let index = ExtentIndex {
                    file_block: U32::new(run.file_block),
                    leaf: U32::new(self.block(depth - 1, child)),
                    leaf_high: U16::ZERO,
                    unused: U16::ZERO,
                };
                entry.copy_from_slice(index.as_bytes());
            }
        }
    }
}
