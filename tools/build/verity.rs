//! A dm-verity hash tree behind the file system: the kernel then checks every block against one root hash.
//!
//! The format is veritysetup's (cryptsetup, `lib/verity/verity.c`; kernel, `Documentation/admin-guide/device-mapper/
//! verity.rst`), version 1: a block with the superblock, then the levels of the tree, the highest first. sha256, blocks of
//! 4096 bytes on both sides, the salt before the block. Hash type 1: as many digests as fit lie in a block, and what is
//! left of it is zeros.
//!
//! The leaves were hashed with the chunks; zeros, which are stored nowhere, have one hash. Only the levels above the
//! lowest are held in memory: a 128 KiB for each 2 GiB of the device.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::intake::CHUNK_BLOCKS;
use super::metadata::{DeviceExtent, Windows};
use super::pipeline::Pipeline;
use crate::chunk::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::ext4::BLOCK_SIZE;

const HASH: usize = 32;
/// Bytes of the hashes of a chunk's blocks.
pub(super) const LEAVES_BYTES: u64 = CHUNK_BLOCKS as u64 * HASH as u64;

/// The same for all images, so that equal blocks have equal hashes. A salt keeps tables of hashes made beforehand from being
/// of use, and nothing here is secret.
const SALT: &[u8; HASH] = b"firstread: salt of verity trees\0";

/// A tree on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verity {
    pub root: Digest,
    /// Offset of the superblock in bytes.
    pub offset: u64,
}

fn hash(block: &[u8]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(SALT);
    hasher.update(block);
    hasher.finish()
}

/// The hashes of the blocks of `plain`.
pub(super) fn leaves(plain: &[u8]) -> Vec<u8> {
    plain.chunks(BLOCK_SIZE).flat_map(|block| *hash(block).as_bytes()).collect()
}

/// Puts a tree behind a device of `bytes`: what it is, its extents, and the new length of the device.
pub(super) fn append(
    pipeline: &mut Pipeline,
    extents: &[DeviceExtent],
    bytes: u64,
) -> Result<(Verity, Vec<DeviceExtent>, u64)> {
    pipeline.wait()?;
    let data_blocks = bytes / BLOCK_SIZE as u64;
    let chunks: Vec<_> = extents.iter().map(|extent| pipeline.chunk(extent.job)).collect();
    let leaves = Leaves { file: pipeline.leaves()?, extents, chunks, blocks: data_blocks };
    // The hashes of each level's blocks, from the lowest level on.
    let mut hashes = Vec::new();
    leaves.blocks(&mut |block| {
        match data_blocks {
            // A single block needs no level: its hash is the root.
            1 => hashes.extend_from_slice(block.get(..HASH).unwrap_or_default()),
            _ => hashes.extend_from_slice(hash(block).as_bytes()),
        }
        Ok(())
    })?;
    let mut levels: Vec<Vec<u8>> = Vec::new();
    while hashes.len() > HASH {
        let mut level = hashes;
        level.resize(level.len().next_multiple_of(BLOCK_SIZE), 0);
        hashes = level.chunks(BLOCK_SIZE).flat_map(|block| *hash(block).as_bytes()).collect();
        levels.push(level);
    }
    let root = <[u8; HASH]>::try_from(hashes.as_slice()).map_err(|_| Error::invalid("verity", "an empty device"))?;
    let root = Digest::from_bytes(root);
    let mut windows = Windows::new(pipeline);
    let mut at = data_blocks;
    let mut put = |bytes: &[u8]| {
        let block = at;
        at += (bytes.len() / BLOCK_SIZE) as u64;
        windows.write(block, bytes)
    };
    put(&superblock(data_blocks, &root))?;
    for level in levels.iter().rev() {
        put(level)?;
    }
    if data_blocks > 1 {
        leaves.blocks(&mut |block| put(block))?;
    }
    let extents = windows.finish()?;
    Ok((Verity { root, offset: bytes }, extents, at * BLOCK_SIZE as u64))
}

/// `struct verity_sb`, 512 bytes, little-endian, in a block of zeros.
fn superblock(data_blocks: u64, root: &Digest) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK_SIZE);
    block.extend_from_slice(b"verity\0\0");
    block.extend_from_slice(&1u32.to_le_bytes()); // version
    block.extend_from_slice(&1u32.to_le_bytes()); // hash type
    block.extend_from_slice(root.as_bytes().get(..16).unwrap_or_default()); // uuid
    let mut algorithm = [0; 32];
    algorithm.iter_mut().zip(b"sha256").for_each(|(place, byte)| *place = *byte);
    block.extend_from_slice(&algorithm);
    block.extend_from_slice(&(BLOCK_SIZE as u32).to_le_bytes()); // data block size
    block.extend_from_slice(&(BLOCK_SIZE as u32).to_le_bytes()); // hash block size
    block.extend_from_slice(&data_blocks.to_le_bytes());
    block.extend_from_slice(&(HASH as u16).to_le_bytes()); // salt size
    block.extend_from_slice(&[0; 6]);
    block.extend_from_slice(SALT);
    block.resize(BLOCK_SIZE, 0);
    block
}

/// The hashes of a device's blocks.
struct Leaves<'a> {
    file: File,
    extents: &'a [DeviceExtent],
    /// By extent; `None` for zeros.
    chunks: Vec<Option<u32>>,
    /// Blocks of the device.
    blocks: u64,
}

impl Leaves<'_> {
    /// Hands out the lowest level of the tree, block by block.
    fn blocks(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let zero = *hash(&[0; BLOCK_SIZE]).as_bytes();
        let mut block = Vec::with_capacity(BLOCK_SIZE);
        let mut put = |leaf: &[u8]| {
            block.extend_from_slice(leaf);
            if block.len() < BLOCK_SIZE {
                return Ok(());
            }
            let result = sink(&block);
            block.clear();
            result
        };
        let mut at = 0;
        let mut buffer = Vec::new();
        for (extent, chunk) in self.extents.iter().zip(&self.chunks) {
            let Some(chunk) = chunk else { continue };
            for _ in at..u64::from(extent.block) {
                put(&zero)?;
            }
            at = u64::from(extent.block) + u64::from(extent.blocks);
            buffer.resize(extent.blocks as usize * HASH, 0);
            let offset = u64::from(*chunk) * LEAVES_BYTES + (extent.offset as usize / BLOCK_SIZE * HASH) as u64;
            let read = self.file.read_exact_at(&mut buffer, offset);
            read.map_err(|error| Error::io("reading the spool of hashes", error))?;
            buffer.chunks(HASH).try_for_each(&mut put)?;
        }
        for _ in at..self.blocks {
            put(&zero)?;
        }
        if !block.is_empty() {
            block.resize(BLOCK_SIZE, 0);
            sink(&block)?;
        }
        Ok(())
    }
}
