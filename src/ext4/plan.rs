//! Where everything goes: from a tree to block numbers.

use super::tree::{InodeId, Time, Tree};
use crate::error::{Error, Result};

/// What the writer is free to choose.
#[derive(Debug, Clone)]
pub struct Options {
    /// A digest over the tree and the data, from which the UUID and the hash seed come.
    pub seed: [u8; 32],
    /// The size of the device in bytes, at most 16 TiB, with room to grow; `None` is as large as needed and a little
    /// more. Rounded down to whole blocks.
    pub size: Option<u64>,
    /// When the file system was made; `None` takes the newest modification time in the tree.
    pub time: Option<Time>,
    /// The inodes that are read first, hottest first: their numbers and blocks come first. Others may follow in any
    /// number, so this may be empty.
    pub hot: Vec<InodeId>,
    /// The order of the files' data. Files that it does not name follow in tree order. What it names twice counts once,
    /// and what has no data or is not in a directory counts not at all.
    pub data_order: Vec<InodeId>,
    /// The data area starts at a multiple of this many blocks: 64 for chunks of 256 KiB.
    pub data_align_blocks: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: [0; 32], size: None, time: None, hot: Vec::new(), data_order: Vec::new(), data_align_blocks: 64 }
    }
}

/// A file system of which every block has its place.
#[derive(Debug)]
pub struct Plan {
    blocks: u32,
}

/// Decides the place of everything in `tree`.
///
/// # Errors
///
/// What ext4 cannot hold, with the path of the inode it is about.
pub fn plan(_tree: &Tree, _options: &Options) -> Result<Plan> {
    Err(Error::Unsupported("the ext4 writer is not there yet".into()))
}

impl Plan {
    /// The size of the device in bytes, free space included.
    #[must_use]
    pub fn device_bytes(&self) -> u64 {
        u64::from(self.blocks) * super::BLOCK_SIZE as u64
    }

    /// How many blocks of the device are in use: metadata, tables and data.
    #[must_use]
    pub fn used_blocks(&self) -> u64 {
        0
    }

    /// How many inodes are in use, those that ext4 reserves not counted.
    #[must_use]
    pub fn inodes(&self) -> u32 {
        0
    }

    /// How many blocks at the start of the device may hold metadata: [`Plan::write_metadata`] emits none behind them.
    #[must_use]
    pub fn metadata_blocks(&self) -> u32 {
        0
    }

    /// The device blocks of all file data, without a gap; the start is aligned as the options say.
    #[must_use]
    pub fn data_blocks(&self) -> std::ops::Range<u32> {
        0..0
    }

    /// The number that the inode got in the file system, if a directory names it.
    #[must_use]
    pub fn inode_number(&self, _id: InodeId) -> Option<u32> {
        None
    }

    /// The device block where the data of a file starts, if it has any.
    ///
    /// All segments of the file follow each other there without their holes, and directly behind its last block come
    /// the segments of the next file that has data, in the order of [`Options::data_order`]: neighbours there are one
    /// contiguous range of the device. Data never shares a block with anything else.
    #[must_use]
    pub fn data_start(&self, _id: InodeId) -> Option<u32> {
        None
    }

    /// Emits the metadata in ascending device order: the number of the first block, and bytes that are a multiple of
    /// 4096. Blocks that are never emitted, and are not file data, are zeros. Memory does not grow with the device.
    pub fn write_metadata(&self, _tree: &Tree, _sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        Err(Error::Unsupported("the ext4 writer is not there yet".into()))
    }
}
