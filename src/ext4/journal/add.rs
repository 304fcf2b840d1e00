//! Adding a journal to a file system on a device that nobody uses yet.
//!
//! The blocks can't all be written at once, and half of them would make a file system that is not consistent. So the inode is written
//! first: from it the next try knows which blocks the journal is to have, and does the same again. The superblock is written last: from
//! then on there is a journal.
#![deny(clippy::indexing_slicing)]

use std::ops::Range;

use zerocopy::byteorder::little_endian::U32;

use super::allocation::{Allocation, Mark};
use super::inode::{JournalInode, MAX_RUNS};
use super::log;
use crate::error::Result;
use crate::ext4::existing::{FileSystem, Obstacle, first_block, with_superblock};
use crate::ext4::layout::{BLOCK_SIZE, Block, JOURNAL_INODE, feature};
use crate::ext4::reader::ReadBlocks;

/// Blocks of the smallest journal (`JBD2_MIN_JOURNAL_BLOCKS`).
const LEAST: u32 = 1024;
/// A journal takes at most one of so many free blocks.
const SHARE: u32 = 4;
/// `journal_backup`: the superblock has a copy of where the journal is (`EXT4_JNL_BACKUP_BLOCKS`).
const BACKUP_BLOCKS: u8 = 1;

/// What is to be done to a file system.
#[derive(Debug)]
pub enum Addition {
    /// Nothing: it has a journal, clean or not.
    There,
    /// Nothing: there is no room for one.
    NoRoom,
    /// Nothing can be done, for this reason.
    Stays(Obstacle),
    /// These blocks are to be written.
    Adds(NewJournal),
}

/// The blocks that change, in the order in which they are to be durable. Until the superblock is, all may be written again.
#[derive(Debug)]
pub struct NewJournal {
    /// Where the journal is, in the order of its blocks. It must read as zeros before anything else is written, but for the block of
    /// it that is in `first`.
    pub place: Vec<Range<u32>>,
    /// The journal's own superblock and its inode.
    pub first: Vec<(u32, Block)>,
    /// Bitmaps and group descriptors, ascending.
    pub then: Vec<(u32, Block)>,
    /// Block 0.
    pub superblock: Box<Block>,
}

impl NewJournal {
    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.place.iter().map(|run| u64::from(run.end - run.start)).sum::<u64>() * BLOCK_SIZE as u64
    }
}

/// Plans a journal for the file system on a device.
///
/// # Errors
/// What `read` says, and [`Error::Invalid`](crate::Error::Invalid) for a file system that is damaged.
pub fn add_journal(read: &mut ReadBlocks<'_>) -> Result<Addition> {
    let (first, raw) = first_block(read)?;
    if FileSystem::of(raw.clone()).is_ok_and(|fs| fs.has_journal()) {
        return Ok(Addition::There);
    }
    let fs = match FileSystem::clean(raw) {
        Ok(fs) => fs,
        Err(obstacle) => return Ok(Addition::Stays(obstacle)),
    };
    let mut space = Allocation::read(&fs, read)?;
    let inode = JournalInode::read(&fs, &space, read)?;
    let place = match inode.is_used() {
        true => inode.runs(&fs)?,
        false => match find(&fs, &space, read)? {
            Some(place) => place,
            None => return Ok(Addition::NoRoom),
        },
    };
    space.mark(&place, Mark::Used, read)?;
    let blocks = place.iter().map(|run| run.end - run.start).sum();
    let made = JournalInode::encode(&place, &fs);
    let mut raw = fs.raw.clone();
    raw.feature_compat = U32::new(raw.feature_compat.get() | feature::HAS_JOURNAL);
    raw.journal_inode = U32::new(JOURNAL_INODE);
    raw.journal_backup = BACKUP_BLOCKS;
    let words = made.block.as_chunks::<4>().0.iter().map(|word| U32::new(u32::from_le_bytes(*word)));
    for (to, from) in raw.journal_blocks.iter_mut().zip(words.chain([made.size_high, made.size_low])) {
        *to = from;
    }
    raw.free_blocks = U32::new(space.free_blocks()?);
    raw.overhead_blocks = U32::new(raw.overhead_blocks.get().saturating_add(blocks));
    let superblock = with_superblock(first, raw);
    let start = place.first().map_or(0, |run| run.start);
    let first = vec![(start, log::superblock(blocks, &fs.raw.uuid)), (inode.at, inode.with(&made))];
    Ok(Addition::Adds(NewJournal { then: space.changed(), place, first, superblock }))
}

/// Blocks for a journal, as few runs as can be, in the groups that have most room.
fn find(fs: &FileSystem, space: &Allocation<'_>, read: &mut ReadBlocks<'_>) -> Result<Option<Vec<Range<u32>>>> {
    let mut groups = space.by_room()?;
    groups.truncate(MAX_RUNS);
    let mut runs: Vec<Range<u32>> = Vec::new();
    let mut wanted = usual(fs.raw.blocks_count.get());
    while wanted >= LEAST && wanted > space.free_blocks()? / SHARE {
        wanted /= 2;
    }
    let mut found = 0;
    for group in groups {
        if found >= wanted {
            break;
        }
        let longest = space.longest_free(group, read)?;
        found += longest.end - longest.start;
        runs.push(longest);
    }
    while wanted > found {
        wanted /= 2;
    }
    if wanted < LEAST {
        return Ok(None);
    }
    let mut left = wanted;
    for run in &mut runs {
        run.end = run.end.min(run.start + left);
        left -= run.end - run.start;
    }
    runs.retain(|run| run.start < run.end);
    Ok(Some(runs))
}

/// Blocks of the journal that `mke2fs` gives to a file system of so many (`ext2fs_default_journal_size`), up to 64 MiB.
fn usual(blocks: u32) -> u32 {
    match blocks {
        0..2048 => 0,
        2048..32_768 => 1024,
        32_768..262_144 => 4096,
        262_144..524_288 => 8192,
        _ => 16_384,
    }
}
