//! A device as it is after a replay of its journal, and without the journal: nothing is written, only read otherwise.
#![deny(clippy::indexing_slicing)]

use std::collections::HashMap;

use zerocopy::FromZeros;
use zerocopy::byteorder::little_endian::U32;

use super::allocation::{Allocation, Mark};
use super::inode::JournalInode;
use super::log::{self, Form, Logged, MAGIC};
use crate::error::{Error, Result};
use crate::ext4::existing::{FileSystem, damaged, first_block, with_superblock};
use crate::ext4::layout::{BLOCK_SIZE, Block, feature};
use crate::ext4::reader::ReadBlocks;

/// Which blocks read otherwise than the device has them: at most as many as the journal has, and a few.
#[derive(Debug, Default)]
pub struct Settled {
    logged: HashMap<u32, Logged>,
    made: HashMap<u32, Box<Block>>,
    kept: Option<String>,
}

impl Settled {
    /// The blocks that read otherwise, in no order; some twice.
    pub fn blocks(&self) -> impl Iterator<Item = u32> {
        self.logged.keys().chain(self.made.keys()).copied()
    }

    /// Why a journal that has nothing to be replayed was left where it is.
    #[must_use]
    pub fn kept(&self) -> Option<&str> {
        self.kept.as_deref()
    }

    /// Reads whole blocks from `first` on; `read` reads the device.
    ///
    /// # Errors
    /// What `read` says.
    pub fn read(&self, first: u32, buf: &mut [u8], read: &mut ReadBlocks<'_>) -> Result<()> {
        read(first, buf)?;
        if self.logged.is_empty() && self.made.is_empty() {
            return Ok(());
        }
        for (number, place) in (first..).zip(buf.as_chunks_mut::<BLOCK_SIZE>().0) {
            if let Some(made) = self.made.get(&number) {
                *place = **made;
            } else if let Some(logged) = self.logged.get(&number) {
                read(logged.at, place)?;
                if logged.form == Form::Escaped
                    && let Some(start) = place.first_chunk_mut()
                {
                    *start = MAGIC;
                }
            }
        }
        Ok(())
    }
}

/// Looks at the file system on a device of `device_bytes` that stands still. One that this writer did not make is left as it is, and
/// one that has no journal.
///
/// # Errors
/// What `read` says, and [`Error::Invalid`] when there is something to be replayed and that can't be done.
pub fn settle(device_bytes: u64, read: &mut ReadBlocks<'_>) -> Result<Settled> {
    let mut settled = Settled::default();
    if device_bytes < 2 * BLOCK_SIZE as u64 {
        return Ok(settled);
    }
    let (_, raw) = first_block(read)?;
    let Ok(fs) = FileSystem::of(raw) else { return Ok(settled) };
    if u64::from(fs.raw.blocks_count.get()) * BLOCK_SIZE as u64 > device_bytes {
        return Ok(settled);
    }
    let is_open = fs.has_journal() && fs.raw.feature_incompat.get() & feature::RECOVER != 0;
    if is_open {
        let space = Allocation::read(&fs, read)?;
        let place = JournalInode::read(&fs, &space, read)?.runs(&fs)?;
        settled.logged = log::replay(&place, &fs, read)?;
    }
    match without_journal(&settled, read) {
        Ok(made) => settled.made = made,
        Err(error @ Error::Invalid { .. }) if !is_open => settled.kept = fs.has_journal().then(|| error.to_string()),
        Err(error) => return Err(error),
    }
    Ok(settled)
}

/// The blocks of the file system without its journal that it has otherwise now.
fn without_journal(settled: &Settled, read: &mut ReadBlocks<'_>) -> Result<HashMap<u32, Box<Block>>> {
    let mut read = |block: u32, buf: &mut [u8]| settled.read(block, buf, read);
    let (first, raw) = first_block(&mut read)?;
    let fs = FileSystem::of(raw).map_err(|obstacle| damaged(&obstacle.to_string()))?;
    let mut space = Allocation::read(&fs, &mut read)?;
    let inode = JournalInode::read(&fs, &space, &mut read)?;
    // The inode alone is what an interrupted try to add a journal left.
    if !inode.is_used() && !fs.has_journal() {
        return Ok(HashMap::new());
    }
    let place = inode.runs(&fs)?;
    space.mark(&place, Mark::Free, &mut read)?;
    let mut raw = fs.raw.clone();
    if fs.has_journal() {
        let blocks = place.iter().map(|run| run.end - run.start).sum();
        raw.overhead_blocks = U32::new(raw.overhead_blocks.get().saturating_sub(blocks));
    }
    raw.feature_compat = U32::new(raw.feature_compat.get() & !feature::HAS_JOURNAL);
    raw.feature_incompat = U32::new(raw.feature_incompat.get() & !feature::RECOVER);
    raw.journal_inode = U32::new(0);
    raw.journal_backup = 0;
    raw.journal_blocks = FromZeros::new_zeroed();
    // While it is mounted, the superblock's own counts are old.
    raw.free_blocks = U32::new(space.free_blocks()?);
    raw.free_inodes = U32::new(space.free_inodes()?);
    let changed = space.changed().into_iter().chain([(inode.at, inode.without())]);
    let mut made: HashMap<u32, Box<Block>> = changed.map(|(at, block)| (at, Box::new(block))).collect();
    made.insert(0, with_superblock(first, raw));
    Ok(made)
}
