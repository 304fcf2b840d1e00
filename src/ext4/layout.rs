//! The structures on the device, little-endian, each field at the offset that its comment gives.
//!
//! From the kernel's `fs/ext4/ext4.h`, `fs/ext4/ext4_extents.h`, `fs/ext4/xattr.h` and `fs/ext4/namei.c`. Structures
//! only: what goes into them is decided elsewhere.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The size of a block in bytes, the only one written.
pub const BLOCK_SIZE: usize = 4096;
/// A block's bytes.
pub type Block = [u8; BLOCK_SIZE];
/// An empty block.
pub const ZERO_BLOCK: Block = [0; BLOCK_SIZE];

/// Blocks of a group: as many as one bitmap block has bits.
pub const BLOCKS_PER_GROUP: u32 = BLOCK_SIZE as u32 * 8;
/// The most inodes of a group: as many as one bitmap block has bits.
pub const MAX_INODES_PER_GROUP: u32 = BLOCK_SIZE as u32 * 8;
/// Bytes of an inode.
pub const INODE_SIZE: usize = 256;
/// Inodes of a block of the inode table.
pub const INODES_PER_BLOCK: u32 = (BLOCK_SIZE / INODE_SIZE) as u32;
/// Bytes of a group descriptor without the 64bit feature.
pub const DESCRIPTOR_SIZE: usize = 32;
/// Group descriptors of a block.
pub const DESCRIPTORS_PER_BLOCK: u32 = (BLOCK_SIZE / DESCRIPTOR_SIZE) as u32;
/// The root directory's inode (`EXT4_ROOT_INO`).
pub const ROOT_INODE: u32 = 2;
/// The journal's inode (`EXT4_JOURNAL_INO`).
pub const JOURNAL_INODE: u32 = 8;
/// The first inode that is not reserved (`EXT4_GOOD_OLD_FIRST_INO`).
pub const FIRST_INODE: u32 = 11;
/// The most links of an inode (`EXT4_LINK_MAX`).
pub const LINK_MAX: u32 = 65_000;
/// `EXT4_SUPER_MAGIC`.
pub const MAGIC: u16 = 0xef53;
/// Where the superblock is in block 0.
pub const SUPERBLOCK_OFFSET: usize = 1024;

/// Feature words and other flags of the superblock.
pub mod feature {
    /// ext_attr, dir_index, sparse_super2 (`EXT4_FEATURE_COMPAT_*`).
    pub const COMPATIBLE: u32 = 0x8 | 0x20 | 0x200;
    /// filetype, extents, flex_bg (`EXT4_FEATURE_INCOMPAT_*`).
    pub const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x200;
    /// A journal (`EXT4_FEATURE_COMPAT_HAS_JOURNAL`).
    pub const HAS_JOURNAL: u32 = 0x4;
    /// The journal has something to be replayed (`EXT4_FEATURE_INCOMPAT_RECOVER`).
    pub const RECOVER: u32 = 0x4;
    /// Descriptors in the groups that they describe (`EXT4_FEATURE_INCOMPAT_META_BG`).
    pub const META_BG: u32 = 0x10;
    /// large_file, huge_file, dir_nlink, extra_isize, metadata_csum (`EXT4_FEATURE_RO_COMPAT_*`).
    pub const READ_ONLY_COMPATIBLE: u32 = 0x2 | 0x8 | 0x20 | 0x40 | 0x400;
    /// Names are hashed as signed bytes (`EXT2_FLAGS_SIGNED_HASH`), as all make them that know no other way.
    pub const SIGNED_HASH: u32 = 0x1;
    /// The hash of indexed directories (`DX_HASH_HALF_MD4`).
    pub const HALF_MD4: u8 = 1;
    /// User attributes and ACLs are on (`EXT4_DEFM_XATTR_USER | EXT4_DEFM_ACL`).
    pub const MOUNT_OPTIONS: u32 = 0x4 | 0x8;
    /// crc32c (`EXT4_CRC32C_CHKSUM`).
    pub const CHECKSUM_CRC32C: u8 = 1;
}

/// Flags of a group descriptor (`EXT4_BG_*`).
pub mod group_flag {
    /// No inode of the group is in use, its bitmap is not there.
    pub const INODE_UNINIT: u16 = 0x1;
    /// No block of the group is in use but its own bitmaps and table, its bitmap is not there.
    pub const BLOCK_UNINIT: u16 = 0x2;
    /// The unused part of the inode table is zeros: nothing is left to initialise.
    pub const INODE_ZEROED: u16 = 0x4;
}

/// Flags of an inode (`EXT4_*_FL`).
pub mod inode_flag {
    /// A directory with a hash tree.
    pub const INDEX: u32 = 0x1000;
    /// The inode maps its blocks by extents.
    pub const EXTENTS: u32 = 0x8_0000;
}

/// `struct ext4_super_block`.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperBlock {
    pub inodes_count: U32,                // 0x000
    pub blocks_count: U32,                // 0x004
    pub reserved_blocks: U32,             // 0x008
    pub free_blocks: U32,                 // 0x00c
    pub free_inodes: U32,                 // 0x010
    pub first_data_block: U32,            // 0x014
    pub log_block_size: U32,              // 0x018: 1024 << n
    pub log_cluster_size: U32,            // 0x01c
    pub blocks_per_group: U32,            // 0x020
    pub clusters_per_group: U32,          // 0x024
    pub inodes_per_group: U32,            // 0x028
    pub mount_time: U32,                  // 0x02c
    pub write_time: U32,                  // 0x030
    pub mount_count: U16,                 // 0x034
    pub max_mount_count: U16,             // 0x036
    pub magic: U16,                       // 0x038
    pub state: U16,                       // 0x03a: 1 = cleanly unmounted
    pub errors: U16,                      // 0x03c: 1 = continue
    pub minor_revision: U16,              // 0x03e
    pub last_check: U32,                  // 0x040
    pub check_interval: U32,              // 0x044
    pub creator_os: U32,                  // 0x048: 0 = Linux
    pub revision: U32,                    // 0x04c: 1 = dynamic inode sizes
    pub reserved_uid: U16,                // 0x050
    pub reserved_gid: U16,                // 0x052
    pub first_inode: U32,                 // 0x054
    pub inode_size: U16,                  // 0x058
    pub block_group: U16,                 // 0x05a
    pub feature_compat: U32,              // 0x05c
    pub feature_incompat: U32,            // 0x060
    pub feature_ro_compat: U32,           // 0x064
    pub uuid: [u8; 16],                   // 0x068
    pub volume_name: [u8; 16],            // 0x078
    pub last_mounted: [u8; 64],           // 0x088
    pub compression: U32,                 // 0x0c8
    pub preallocation: [u8; 2],           // 0x0cc
    pub reserved_gdt_blocks: U16,         // 0x0ce
    pub journal_uuid: [u8; 16],           // 0x0d0: stays zero, or a journal device is looked for
    pub journal_inode: U32,               // 0x0e0
    pub journal_device: U32,              // 0x0e4
    pub last_orphan: U32,                 // 0x0e8
    pub hash_seed: [U32; 4],              // 0x0ec
    pub default_hash_version: u8,         // 0x0fc
    pub journal_backup: u8,               // 0x0fd: 1 = journal_blocks is a copy
    pub descriptor_size: U16,             // 0x0fe: 0 without 64bit
    pub default_mount_options: U32,       // 0x100
    pub first_meta_group: U32,            // 0x104
    pub made_time: U32,                   // 0x108
    pub journal_blocks: [U32; 17],        // 0x10c: of the journal's inode the block field and the size, high half first
    pub high_counts: [U32; 3],            // 0x150
    pub min_extra_isize: U16,             // 0x15c
    pub want_extra_isize: U16,            // 0x15e
    pub flags: U32,                       // 0x160
    pub raid_stride: U16,                 // 0x164
    pub mmp_interval: U16,                // 0x166
    pub mmp_block: U64,                   // 0x168
    pub raid_stripe_width: U32,           // 0x170
    pub log_groups_per_flex: u8,          // 0x174
    pub checksum_type: u8,                // 0x175
    pub encryption_level: u8,             // 0x176
    pub reserved_pad: u8,                 // 0x177
    pub written_kib: U64,                 // 0x178
    pub snapshots_and_errors: [u8; 0xc8], // 0x180
    pub overhead_blocks: U32,             // 0x248
    pub backup_groups: [U32; 2],          // 0x24c: none
    pub encryption: [u8; 0x20],           // 0x254
    pub write_time_high: u8,              // 0x274
    pub mount_time_high: u8,              // 0x275
    pub made_time_high: u8,               // 0x276
    pub last_check_high: u8,              // 0x277
    pub rest: [u8; 0x184],                // 0x278
    pub checksum: U32,                    // 0x3fc
}

/// `struct ext4_group_desc`, its first half, which is all there is without the 64bit feature.
#[derive(Debug, Clone, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GroupDescriptor {
    pub block_bitmap: U32,          // 0x00
    pub inode_bitmap: U32,          // 0x04
    pub inode_table: U32,           // 0x08
    pub free_blocks: U16,           // 0x0c
    pub free_inodes: U16,           // 0x0e
    pub used_directories: U16,      // 0x10
    pub flags: U16,                 // 0x12
    pub exclude_bitmap: U32,        // 0x14
    pub block_bitmap_checksum: U16, // 0x18
    pub inode_bitmap_checksum: U16, // 0x1a
    pub unused_inodes: U16,         // 0x1c: how many at the end of the table were never used
    pub checksum: U16,              // 0x1e
}

/// `struct ext4_inode`, with the room for extended attributes behind it.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawInode {
    pub mode: U16,          // 0x00
    pub uid_low: U16,       // 0x02
    pub size_low: U32,      // 0x04
    pub atime: U32,         // 0x08
    pub ctime: U32,         // 0x0c
    pub mtime: U32,         // 0x10
    pub dtime: U32,         // 0x14
    pub gid_low: U16,       // 0x18
    pub links: U16,         // 0x1a
    pub sectors_low: U32,   // 0x1c: of 512 bytes
    pub flags: U32,         // 0x20
    pub version: U32,       // 0x24
    pub block: [u8; 60],    // 0x28: extents, a short link's target or a device number
    pub generation: U32,    // 0x64
    pub xattr_block: U32,   // 0x68
    pub size_high: U32,     // 0x6c
    pub fragment: U32,      // 0x70
    pub sectors_high: U16,  // 0x74
    pub xattr_high: U16,    // 0x76
    pub uid_high: U16,      // 0x78
    pub gid_high: U16,      // 0x7a
    pub checksum_low: U16,  // 0x7c
    pub reserved: U16,      // 0x7e
    pub extra_size: U16,    // 0x80: how much of the part above 128 bytes is fields
    pub checksum_high: U16, // 0x82
    pub ctime_extra: U32,   // 0x84
    pub mtime_extra: U32,   // 0x88
    pub atime_extra: U32,   // 0x8c
    pub crtime: U32,        // 0x90
    pub crtime_extra: U32,  // 0x94
    pub version_high: U32,  // 0x98
    pub project: U32,       // 0x9c
    pub xattrs: [u8; 96],   // 0xa0
}

/// The size of the fields of [`RawInode`] above 128 bytes.
pub const EXTRA_ISIZE: u16 = 32;

/// `struct ext4_extent_header`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtentHeader {
    pub magic: U16,      // 0x0: 0xf30a
    pub entries: U16,    // 0x2
    pub max: U16,        // 0x4
    pub depth: U16,      // 0x6: 0 = the entries are extents
    pub generation: U32, // 0x8
}

/// `struct ext4_extent`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extent {
    pub file_block: U32, // 0x0
    pub blocks: U16,     // 0x4: at most 32768
    pub start_high: U16, // 0x6
    pub start: U32,      // 0x8
}

/// `struct ext4_extent_idx`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtentIndex {
    pub file_block: U32, // 0x0
    pub leaf: U32,       // 0x4
    pub leaf_high: U16,  // 0x8
    pub unused: U16,     // 0xa
}

/// `struct ext4_xattr_header`, of an attribute block.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrHeader {
    pub magic: U32,         // 0x00: 0xea020000
    pub references: U32,    // 0x04
    pub blocks: U32,        // 0x08
    pub hash: U32,          // 0x0c
    pub checksum: U32,      // 0x10
    pub reserved: [U32; 3], // 0x14
}

/// `struct ext4_xattr_entry`, followed by the name without its prefix.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    pub name_len: u8,      // 0x0
    pub name_index: u8,    // 0x1: which prefix
    pub value_offset: U16, // 0x2
    pub value_inode: U32,  // 0x4
    pub value_size: U32,   // 0x8
    pub hash: U32,         // 0xc
}

/// `struct ext4_dir_entry_2` before its name.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DirEntry {
    pub inode: U32,    // 0x0
    pub rec_len: U16,  // 0x4
    pub name_len: u8,  // 0x6
    pub file_type: u8, // 0x7
}

/// `struct ext4_dir_entry_tail`: ends each block of a directory that has entries.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DirTail {
    pub inode: U32,    // 0x0: 0
    pub rec_len: U16,  // 0x4: 12
    pub name_len: u8,  // 0x6: 0
    pub file_type: u8, // 0x7: 0xde
    pub checksum: U32, // 0x8
}

/// `struct dx_entry`: the block of a directory where the names from this hash on are.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DxEntry {
    pub hash: U32,  // 0x0: in the first entry of a node, the limit and the count instead
    pub block: U32, // 0x4
}

const _: () = {
    assert!(size_of::<SuperBlock>() == 1024);
    assert!(core::mem::offset_of!(SuperBlock, hash_seed) == 0xec);
    assert!(core::mem::offset_of!(SuperBlock, made_time) == 0x108);
    assert!(core::mem::offset_of!(SuperBlock, min_extra_isize) == 0x15c);
    assert!(core::mem::offset_of!(SuperBlock, log_groups_per_flex) == 0x174);
    assert!(core::mem::offset_of!(SuperBlock, overhead_blocks) == 0x248);
    assert!(core::mem::offset_of!(SuperBlock, write_time_high) == 0x274);
    assert!(core::mem::offset_of!(SuperBlock, checksum) == 0x3fc);
    assert!(size_of::<GroupDescriptor>() == DESCRIPTOR_SIZE);
    assert!(size_of::<RawInode>() == INODE_SIZE);
    assert!(core::mem::offset_of!(RawInode, xattr_block) == 0x68);
    assert!(core::mem::offset_of!(RawInode, extra_size) == 0x80);
    assert!(core::mem::offset_of!(RawInode, xattrs) == 128 + EXTRA_ISIZE as usize);
    assert!(size_of::<ExtentHeader>() == 12 && size_of::<Extent>() == 12 && size_of::<ExtentIndex>() == 12);
    assert!(size_of::<XattrHeader>() == 32 && size_of::<XattrEntry>() == 16);
    assert!(size_of::<DirEntry>() == 8 && size_of::<DirTail>() == 12 && size_of::<DxEntry>() == 8);
};
