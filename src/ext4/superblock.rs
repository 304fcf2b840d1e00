//! The superblock.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromZeros, IntoBytes};

use super::checksum::Checksum;
use super::group::Geometry;
use super::layout::{
    BLOCKS_PER_GROUP, Block, DESCRIPTORS_PER_BLOCK, EXTRA_ISIZE, FIRST_INODE, INODE_SIZE, MAGIC, SUPERBLOCK_OFFSET,
    SuperBlock, ZERO_BLOCK, feature,
};
use super::tree::Time;

/// Groups of a flexible group, as a power of two: the allocator's unit.
const LOG_GROUPS_PER_FLEX: u8 = 4;

/// The names that a file system has, derived from what is in it.
#[derive(Debug, Clone)]
pub struct Names {
    /// Its UUID.
    pub uuid: [u8; 16],
    /// The seed of directory hashes.
    pub hash_seed: [u32; 4],
}

impl Names {
    /// From a digest: two UUIDs of version 8 (RFC 9562), which is for such use.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let half = |half: usize| {
            let mut uuid = [0; 16];
            for (to, from) in uuid.iter_mut().zip(seed.iter().skip(half * 16)) {
                *to = *from;
            }
            uuid[6] = uuid[6] & 0x0f | 0x80;
            uuid[8] = uuid[8] & 0x3f | 0x80;
            uuid
        };
        let second = half(1);
        let mut hash_seed = [0; 4];
        for (word, bytes) in hash_seed.iter_mut().zip(second.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        Self { uuid: half(0), hash_seed }
    }

    /// The start of the file system's checksums.
    pub fn checksum(&self) -> Checksum {
        Checksum::of_file_system(&self.uuid)
    }
}

/// The first block: the superblock behind the room for a boot loader.
pub fn encode(geometry: &Geometry, names: &Names, time: Time) -> Block {
    let mut raw = SuperBlock::new_zeroed();
    raw.inodes_count = U32::new(geometry.total_inodes());
    raw.blocks_count = U32::new(geometry.blocks);
    raw.free_blocks = U32::new(geometry.free_blocks());
    raw.free_inodes = U32::new(geometry.total_inodes() - geometry.inodes);
    raw.log_block_size = U32::new(2);
    raw.log_cluster_size = U32::new(2);
    raw.blocks_per_group = U32::new(BLOCKS_PER_GROUP);
    raw.clusters_per_group = U32::new(BLOCKS_PER_GROUP);
    raw.inodes_per_group = U32::new(geometry.inodes_per_group);
    raw.max_mount_count = U16::new(u16::MAX);
    raw.magic = U16::new(MAGIC);
    raw.state = U16::new(1);
    raw.errors = U16::new(1);
    raw.revision = U32::new(1);
    raw.first_inode = U32::new(FIRST_INODE);
    raw.inode_size = U16::new(INODE_SIZE as u16);
    raw.feature_compat = U32::new(feature::COMPATIBLE);
    raw.feature_incompat = U32::new(feature::INCOMPATIBLE);
    raw.feature_ro_compat = U32::new(feature::READ_ONLY_COMPATIBLE);
    raw.uuid = names.uuid;
    raw.hash_seed = names.hash_seed.map(U32::new);
    raw.default_hash_version = feature::HALF_MD4;
    raw.default_mount_options = U32::new(feature::MOUNT_OPTIONS);
    raw.min_extra_isize = U16::new(EXTRA_ISIZE);
    raw.want_extra_isize = U16::new(EXTRA_ISIZE);
    raw.flags = U32::new(feature::SIGNED_HASH);
    raw.log_groups_per_flex = LOG_GROUPS_PER_FLEX;
    raw.checksum_type = feature::CHECKSUM_CRC32C;
    let descriptors = geometry.groups.div_ceil(DESCRIPTORS_PER_BLOCK);
    raw.overhead_blocks = U32::new(1 + descriptors + geometry.groups * (geometry.table_blocks() + 2));
    // The times of the last write and check stay zero: a file from the future must not make the file system one.
    let made = time.secs.clamp(0, (1 << 40) - 1);
    raw.made_time = U32::new(made as u32);
    raw.made_time_high = (made >> 32) as u8;
    let bytes = raw.as_bytes();
    let checksum = Checksum::START.add(bytes.get(..core::mem::offset_of!(SuperBlock, checksum)).unwrap_or_default());
    raw.checksum = U32::new(checksum.value());
    let mut block = ZERO_BLOCK;
    block[SUPERBLOCK_OFFSET..SUPERBLOCK_OFFSET + size_of::<SuperBlock>()].copy_from_slice(raw.as_bytes());
    block
}
