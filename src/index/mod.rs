//! The index: a device's description on disk. Small, fetched whole, memory-mapped, validated once and then read
//! without an allocation per record. FORMAT.md, beside this file, is the specification.

mod identity;
mod layout;
mod read;
mod write;

pub use read::{Index, MAX_INDEX_BYTES};
pub use write::IndexWriter;

use crate::chunk::Digest;

/// Bytes in a device block.
pub const BLOCK: u32 = 4096;

/// Largest device in bytes: 2^32 blocks.
pub const DEVICE_MAX: u64 = 1 << 44;

/// What a blob of an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Chunks in device order.
    Pack,
    /// Hot chunks in the order of first touch.
    Startup,
}

/// A registry object that holds chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blob {
    /// Its content hash, by which a registry finds it.
    pub digest: Digest,
    /// Its length in bytes.
    pub bytes: u64,
    /// What it is for.
    pub role: Role,
}

/// A contiguous device range backed by one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First device block.
    pub block: u32,
    /// Length in blocks, at least 1.
    pub blocks: u32,
    /// Number of the chunk in the index.
    pub chunk: u32,
    /// First byte of the range in the plain chunk.
    pub offset: u32,
}

/// Something that a start reads, of which one start-up chunk has all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StartupRead {
    /// Number of the chunk in the index.
    pub chunk: u32,
    /// Of what it is a part.
    pub place: Place,
    /// First block there.
    pub first: u32,
    /// Length in blocks, at least 1.
    pub blocks: u32,
}

/// What blocks are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A file of the device's ext4.
    File {
        /// Its inode's number.
        inode: u32,
    },
    /// The device: metadata of the file system.
    Device,
}
