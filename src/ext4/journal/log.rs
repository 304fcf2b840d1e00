//! The journal's contents: a new one's superblock, and what a replay of one brings.
//!
//! A replay writes nothing: it says for each block that it would write where in the journal its contents are. The journal may be
//! hostile: it is gone through once, from its tail on, and never further than it is long.
#![deny(clippy::indexing_slicing)]

use std::collections::HashMap;
use std::ops::Range;

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Result;
use crate::ext4::checksum::Checksum;
use crate::ext4::existing::{FileSystem, damaged};
use crate::ext4::layout::{BLOCK_SIZE, Block, ZERO_BLOCK};
use crate::ext4::reader::ReadBlocks;

/// The first four bytes of each block of the journal but those of data (`JBD2_MAGIC_NUMBER`).
pub const MAGIC: [u8; 4] = 0xc03b_3998_u32.to_be_bytes();
/// What such a block is (`JBD2_DESCRIPTOR_BLOCK` and so on).
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK: u32 = 4;
const REVOKE: u32 = 5;

/// Features (`JBD2_FEATURE_INCOMPAT_*`): revoke blocks, checksums of each block. Those of a file system without 64-bit block numbers
/// are 32 bits wide in its journal too.
const INCOMPAT_REVOKE: u32 = 0x1;
const INCOMPAT_CSUM_V3: u32 = 0x10;
/// `JBD2_CRC32C_CHKSUM`.
const CRC32C: u8 = 4;

/// Flags of a tag (`JBD2_FLAG_*`).
const ESCAPED: u32 = 0x1;
const SAME_UUID: u32 = 0x2;
const LAST_TAG: u32 = 0x8;
const UUID_LEN: usize = 16;

/// `journal_superblock_t`, its first half kilobyte and a little; the rest are users.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct JournalSuperBlock {
    header: Header,            // 0x00
    block_size: U32,           // 0x0c
    blocks: U32,               // 0x10
    first: U32,                // 0x14: the first block of the log
    sequence: U32,             // 0x18: of the first transaction expected
    start: U32,                // 0x1c: where it is; 0 = nothing is in the log
    error: U32,                // 0x20
    feature_compat: U32,       // 0x24
    feature_incompat: U32,     // 0x28
    feature_ro_compat: U32,    // 0x2c
    uuid: [u8; 16],            // 0x30
    users: U32,                // 0x40
    dynamic_superblock: U32,   // 0x44
    max_transaction: U32,      // 0x48
    max_transaction_data: U32, // 0x4c
    checksum_type: u8,         // 0x50
    padding: [u8; 0xab],       // 0x51
    checksum: U32,             // 0xfc
    user_ids: [u8; 0x300],     // 0x100
}

/// `journal_header_t`.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 4], // 0x0
    kind: U32,      // 0x4
    sequence: U32,  // 0x8
}

/// `journal_block_tag3_t`: one block of data.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Tag {
    block: U32,      // 0x0
    flags: U32,      // 0x4
    block_high: U32, // 0x8
    checksum: U32,   // 0xc
}

const _: () = {
    assert!(size_of::<JournalSuperBlock>() == 1024);
    assert!(core::mem::offset_of!(JournalSuperBlock, checksum) == 0xfc);
    assert!(size_of::<Header>() == 12 && size_of::<Tag>() == 16);
};

/// The checksum of a descriptor or revoke block is in its last four bytes, that of a commit block behind its header and
/// four more (`h_chksum`).
const TAIL: usize = BLOCK_SIZE - 4;
const COMMIT_CHECKSUM: usize = 16;
/// Bytes of `struct commit_header`.
const COMMIT_HEADER: usize = 64;

/// The superblock of a new journal of so many blocks, as `mke2fs` writes it: the kernel turns checksums on when it mounts.
pub fn superblock(blocks: u32, uuid: &[u8; 16]) -> Block {
    let mut raw = JournalSuperBlock::new_zeroed();
    raw.header = Header { magic: MAGIC, kind: U32::new(SUPERBLOCK), sequence: U32::new(0) };
    raw.block_size = U32::new(BLOCK_SIZE as u32);
    raw.blocks = U32::new(blocks);
    raw.first = U32::new(1);
    raw.sequence = U32::new(1);
    raw.uuid = *uuid;
    raw.users = U32::new(1);
    let mut block = ZERO_BLOCK;
    for (to, from) in block.iter_mut().zip(raw.as_bytes()) {
        *to = *from;
    }
    block
}

/// Where the contents of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Logged {
    /// The device block, in the journal.
    pub at: u32,
    /// How they are there.
    pub form: Form,
}

/// How a block is in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    AsItIs,
    /// It begins with [`MAGIC`], in place of which there are zeros.
    Escaped,
}

/// What a replay of the journal at `place` writes, by device block.
///
/// # Errors
/// What `read` says, and [`Error::Invalid`](crate::Error::Invalid) for a journal that the kernel would not replay either,
/// or one without checksums.
pub fn replay(place: &[Range<u32>], fs: &FileSystem, read: &mut ReadBlocks<'_>) -> Result<HashMap<u32, Logged>> {
    let mut log = Log { place, read, seed: Checksum::START };
    let raw: JournalSuperBlock = parse(&log.block(0)?, 0)?;
    if raw.start.get() == 0 {
        return Ok(HashMap::new());
    }
    let mut covered = raw.clone();
    covered.checksum = U32::new(0);
    let (blocks, first, features) = (raw.blocks.get(), raw.first.get(), raw.feature_incompat.get());
    let total: u32 = place.iter().map(|run| run.end - run.start).sum();
    let is_known = raw.header.magic == MAGIC
        && raw.header.kind.get() == SUPERBLOCK
        && raw.block_size.get() == BLOCK_SIZE as u32
        && features & !INCOMPAT_REVOKE == INCOMPAT_CSUM_V3
        && raw.checksum_type == CRC32C;
    if !is_known {
        return Err(damaged("its journal is of a kind that firstread does not replay"));
    }
    if Checksum::START.add(covered.as_bytes()).value() != raw.checksum.get() {
        return Err(damaged("its journal's superblock has the wrong checksum"));
    }
    let in_log = first..blocks;
    if first == 0 || blocks > total || !in_log.contains(&raw.start.get()) {
        return Err(damaged("its journal's superblock is out of bounds"));
    }
    if raw.error.get() != 0 {
        return Err(damaged("its journal was given up after an error"));
    }
    log.seed = Checksum::START.add(&raw.uuid);
    log.replay(&in_log, raw.start.get(), raw.sequence.get(), fs)
}

struct Log<'a, 'b> {
    place: &'a [Range<u32>],
    read: &'a mut ReadBlocks<'b>,
    seed: Checksum,
}

/// What a transaction does, until it is known to be complete.
#[derive(Default)]
struct Transaction {
    tags: Vec<(u32, Tag)>,
    revoked: Vec<u32>,
    /// What is wrong with it, which is no matter when it is not complete.
    doubt: Option<&'static str>,
}

impl Log<'_, '_> {
    /// The device block of a block of the journal.
    fn at(&self, number: u32) -> Result<u32> {
        let mut left = number;
        for run in self.place {
            match left.checked_sub(run.end - run.start) {
                None => return Ok(run.start + left),
                Some(rest) => left = rest,
            }
        }
        Err(damaged("its journal is shorter than it says"))
    }

    fn block(&mut self, number: u32) -> Result<Block> {
        let mut block = ZERO_BLOCK;
        let at = self.at(number)?;
        (self.read)(at, &mut block)?;
        Ok(block)
    }

    /// Goes through the log, transaction by transaction. It ends where the next block of the sequence is not
    /// (`do_one_pass` in `fs/jbd2/recovery.c`).
    fn replay(
        &mut self,
        in_log: &Range<u32>,
        start: u32,
        sequence: u32,
        fs: &FileSystem,
    ) -> Result<HashMap<u32, Logged>> {
        let mut replayed = HashMap::new();
        let mut transaction = Transaction::default();
        let mut sequence = sequence;
        let mut left = in_log.end - in_log.start;
        let mut position = start;
        // The block where the log goes on; none when it has been gone through.
        let mut next = || {
            left = left.checked_sub(1)?;
            let now = position;
            position = if now + 1 == in_log.end { in_log.start } else { now + 1 };
            Some(now)
        };
        while let Some(number) = next() {
            let block = self.block(number)?;
            let header: Header = parse(&block, 0)?;
            if header.magic != MAGIC || header.sequence.get() != sequence {
                break;
            }
            match header.kind.get() {
                DESCRIPTOR => {
                    if !self.is_sealed(&block, TAIL) {
                        transaction.doubt = Some("a block of its journal has the wrong checksum");
                    }
                    for tag in tags(&block) {
                        match next() {
                            Some(number) => transaction.tags.push((number, tag)),
                            None => return Ok(replayed),
                        }
                    }
                }
                REVOKE => {
                    if !self.is_sealed(&block, TAIL) {
                        transaction.doubt = Some("a block of its journal has the wrong checksum");
                    }
                    transaction.revoked.extend(revoked(&block)?);
                }
                COMMIT => {
                    if !self.is_sealed(&commit_of(&block), COMMIT_CHECKSUM) {
                        return Err(damaged("the end of a transaction in its journal has the wrong checksum"));
                    }
                    self.apply(&std::mem::take(&mut transaction), sequence, fs, &mut replayed)?;
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
        }
        Ok(replayed)
    }

    /// A complete transaction: what it has is newer than what earlier ones had. What it revokes is not written from it or from
    /// earlier ones.
    fn apply(
        &mut self,
        transaction: &Transaction,
        sequence: u32,
        fs: &FileSystem,
        replayed: &mut HashMap<u32, Logged>,
    ) -> Result<()> {
        if let Some(reason) = transaction.doubt {
            return Err(damaged(reason));
        }
        for (number, tag) in &transaction.tags {
            let (at, block) = (self.at(*number)?, tag.block.get());
            let in_journal = self.place.iter().any(|run| run.contains(&block));
            if tag.block_high.get() != 0 || block >= fs.raw.blocks_count.get() || in_journal {
                return Err(damaged("its journal writes where it must not"));
            }
            let contents = self.block(*number)?;
            if self.seed.add(&sequence.to_be_bytes()).add(&contents).value() != tag.checksum.get() {
                return Err(damaged("data in its journal has the wrong checksum"));
            }
            let form = if tag.flags.get() & ESCAPED != 0 { Form::Escaped } else { Form::AsItIs };
            replayed.insert(block, Logged { at, form });
        }
        for block in &transaction.revoked {
            replayed.remove(block);
        }
        Ok(())
    }

    /// Whether a block of the journal has the right checksum, which is at `at` and counts as zero.
    fn is_sealed(&self, block: &Block, at: usize) -> bool {
        let (before, rest) = block.split_at(at);
        let Some((stored, after)) = rest.split_first_chunk() else { return false };
        self.seed.add(before).add(&[0; 4]).add(after).value() == u32::from_be_bytes(*stored)
    }
}

/// A commit block as it was written: zeros behind its header. A loss of power may have left there what was in its later sectors before
/// (`jbd2_commit_block_csum_verify_partial`).
fn commit_of(block: &Block) -> Block {
    let mut commit = ZERO_BLOCK;
    for (to, from) in commit.iter_mut().zip(block.iter().take(COMMIT_HEADER)) {
        *to = *from;
    }
    commit
}

/// The blocks that a revoke block names. Its length, in bytes, is behind the header.
fn revoked(block: &Block) -> Result<Vec<u32>> {
    let from = size_of::<Header>() + 4;
    let used = parse::<U32>(block, size_of::<Header>())?.get() as usize;
    let records = block.get(from..used).filter(|_| used <= TAIL);
    let records = records.ok_or_else(|| damaged("a revoke block of its journal is out of bounds"))?;
    Ok(records.as_chunks::<4>().0.iter().map(|bytes| u32::from_be_bytes(*bytes)).collect())
}

/// The tags of a descriptor block; behind one of another journal's UUID there is that.
fn tags(block: &Block) -> Vec<Tag> {
    let mut tags = Vec::new();
    let mut at = size_of::<Header>();
    while at + size_of::<Tag>() <= TAIL {
        let Ok(tag) = parse::<Tag>(block, at) else { break };
        let flags = tag.flags.get();
        tags.push(tag);
        at += size_of::<Tag>() + if flags & SAME_UUID == 0 { UUID_LEN } else { 0 };
        if flags & LAST_TAG != 0 {
            break;
        }
    }
    tags
}

fn parse<T: FromBytes + Immutable + KnownLayout + Unaligned>(block: &Block, at: usize) -> Result<T> {
    let from = block.get(at..).unwrap_or_default();
    T::read_from_prefix(from).map(|(value, _)| value).map_err(|_| damaged("a block of its journal is cut off"))
}
