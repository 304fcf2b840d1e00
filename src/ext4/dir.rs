//! Directory blocks: entries one after another, and the hash tree over them where they need more than one block
//! (`fs/ext4/namei.c`).

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32};

use super::checksum::Checksum;
use super::htree::{self, Index};
use super::layout::{BLOCK_SIZE, Block, DirEntry, DirTail, ZERO_BLOCK};
use super::tree::InodeId;
use crate::error::{Error, Result};

/// A directory's entries as the tree has them.
pub type Entries = [(Box<[u8]>, InodeId)];

/// Room for entries in a block: less its tail.
pub const ROOM: usize = BLOCK_SIZE - size_of::<DirTail>();
/// Bytes of the entries `.` and `..`.
const DOTS: usize = 24;

/// Who a directory is, for its blocks.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Its inode's number.
    pub number: u32,
    /// Its parent's: its own for the root.
    pub parent: u32,
    /// The start of its blocks' checksums.
    pub seed: Checksum,
}

/// How a directory is cut into blocks.
#[derive(Debug)]
pub enum Shape {
    /// One block, the entries sorted by name.
    Single(Vec<u32>),
    /// A hash tree.
    Indexed(Index),
}

/// Bytes of an entry.
pub fn entry_bytes(name: &[u8]) -> usize {
    (size_of::<DirEntry>() + name.len()).next_multiple_of(4)
}

/// The entries' positions, sorted by name.
pub fn sorted(entries: &Entries) -> Vec<u32> {
    let mut order: Vec<u32> = (0..entries.len() as u32).collect();
    order.sort_unstable_by_key(|position| name(entries, *position));
    order
}

/// The name at a position.
pub fn name(entries: &Entries, position: u32) -> &[u8] {
    entries.get(position as usize).map_or(&[], |(name, _)| name)
}

impl Shape {
    /// Cuts a directory into blocks.
    pub fn of(entries: &Entries, hash_seed: &[u32; 4]) -> Result<Self, String> {
        let bytes = entries.iter().fold(DOTS, |sum, (name, _)| sum.saturating_add(entry_bytes(name)));
        if bytes <= ROOM { Ok(Self::Single(sorted(entries))) } else { Index::of(entries, hash_seed).map(Self::Indexed) }
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> u32 {
        match self {
            Self::Single(_) => 1,
            Self::Indexed(index) => index.blocks(),
        }
    }

    /// Gives out the blocks in order. `target` tells the inode number and the file type of an entry.
    pub fn emit(
        &self,
        entries: &Entries,
        identity: Identity,
        target: &dyn Fn(InodeId) -> Result<(u32, u8)>,
        out: &mut dyn FnMut(&Block) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Single(order) => {
                let mut block = EntryBlock::new();
                block.dots(identity)?;
                for position in order {
                    block.entry(entries, *position, target)?;
                }
                out(&block.finish(identity.seed))
            }
            Self::Indexed(index) => {
                htree::emit(index, identity, out)?;
                for leaf in index.leaves() {
                    let mut block = EntryBlock::new();
                    for position in leaf {
                        block.entry(entries, position, target)?;
                    }
                    out(&block.finish(identity.seed))?;
                }
                Ok(())
            }
        }
    }
}

/// A block of entries being filled.
struct EntryBlock {
    block: Block,
    at: usize,
    last: usize,
}

impl EntryBlock {
    fn new() -> Self {
        Self { block: ZERO_BLOCK, at: 0, last: 0 }
    }

    fn dots(&mut self, identity: Identity) -> Result<()> {
        self.push(b".", identity.number, 2)?;
        self.push(b"..", identity.parent, 2)
    }

    fn entry(&mut self, entries: &Entries, position: u32, target: &dyn Fn(InodeId) -> Result<(u32, u8)>) -> Result<()> {
        let Some((name, id)) = entries.get(position as usize) else { return Err(changed()) };
        let (number, file_type) = target(*id)?;
        self.push(name, number, file_type)
    }

    fn push(&mut self, name: &[u8], number: u32, file_type: u8) -> Result<()> {
        let bytes = entry_bytes(name);
        if bytes > ROOM.saturating_sub(self.at) {
            return Err(changed());
        }
        put_entry(&mut self.block, self.at, bytes, name, number, file_type);
        self.last = self.at;
        self.at += bytes;
        Ok(())
    }

    /// Stretches the last entry to the tail, and adds that (`ext4_dirblock_csum`).
    fn finish(mut self, seed: Checksum) -> Block {
        if self.at == 0 {
            put_entry(&mut self.block, 0, ROOM, b"", 0, 0);
        } else {
            let at = self.last + core::mem::offset_of!(DirEntry, rec_len);
            self.block[at..at + 2].copy_from_slice(&((ROOM - self.last) as u16).to_le_bytes());
        }
        let (covered, tail) = self.block.split_at_mut(ROOM);
        let checksum = seed.add(covered).value();
        let end = DirTail {
            inode: U32::ZERO,
            rec_len: U16::new(12),
            name_len: 0,
            file_type: 0xde,
            checksum: U32::new(checksum),
        };
        tail.copy_from_slice(end.as_bytes());
        self.block
    }
}

/// Writes an entry, for which there must be room.
pub fn put_entry(block: &mut Block, at: usize, rec_len: usize, name: &[u8], number: u32, file_type: u8) {
    let entry =
        DirEntry { inode: U32::new(number), rec_len: U16::new(rec_len as u16), name_len: name.len() as u8, file_type };
    let (head, rest) = block[at..].split_at_mut(size_of::<DirEntry>());
    head.copy_from_slice(entry.as_bytes());
    rest[..name.len()].copy_from_slice(name);
}

/// The tree is not the one that was planned.
pub fn changed() -> Error {
    Error::invalid("file system", "the tree was changed after it was planned")
}
