//! One inode of the inode table.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromZeros, IntoBytes};

use super::checksum::Checksum;
use super::layout::{EXTRA_ISIZE, INODE_SIZE, LINK_MAX, RawInode};
use super::tree::{Inode, Kind, Time};
use super::xattr::Xattrs;

/// The longest target that the inode itself holds.
pub const SHORT_TARGET: usize = 59;
/// The longest target at all: with its end it must fit in a block.
pub const LONGEST_TARGET: usize = 4095;
/// The range of device numbers (`include/linux/kdev_t.h`).
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xf_ffff;

/// The earliest and the latest second (`EXT4_TIMESTAMP_MIN`, `EXT4_EXTRA_TIMESTAMP_MAX`): 1901 and 2446.
const EARLIEST: i64 = i32::MIN as i64;
const LATEST: i64 = i32::MAX as i64 + (3 << 32);

/// What the plan adds to an inode.
pub struct Placed {
    /// The inode's number.
    pub number: u32,
    /// How many directory entries name it, `.` and `..` included.
    pub links: u32,
    /// In bytes; that of a directory follows from its blocks.
    pub size: u64,
    /// All blocks it owns: data, extent tree, attributes.
    pub blocks: u64,
    /// Flags of `inode_flag`.
    pub flags: u32,
    /// The extent tree's root, or what is there in its place.
    pub block: [u8; 60],
    /// The attribute block, or 0.
    pub xattr_block: u32,
}

/// The bits of the mode that say what it is (`S_IFMT`), and the same for a directory entry (`EXT4_FT_*`).
pub fn types(kind: &Kind) -> (u16, u8) {
    match kind {
        Kind::File { .. } => (0o100_000, 1),
        Kind::Directory(_) => (0o040_000, 2),
        Kind::CharDevice { .. } => (0o020_000, 3),
        Kind::BlockDevice { .. } => (0o060_000, 4),
        Kind::Fifo => (0o010_000, 5),
        Kind::Socket => (0o140_000, 6),
        Kind::Symlink(_) => (0o120_000, 7),
    }
}

/// What in an inode ext4 cannot hold, beside its directory entries, blocks and attributes.
pub fn check(inode: &Inode) -> Result<(), String> {
    if inode.mode > 0o7777 {
        return Err(format!("its mode {:o} has more than permission bits", inode.mode));
    }
    if inode.mtime.nanos >= 1_000_000_000 {
        return Err(format!("its time has {} nanoseconds", inode.mtime.nanos));
    }
    match &inode.kind {
        Kind::Symlink(target) if target.is_empty() => Err("it links to nothing".into()),
        Kind::Symlink(target) if target.len() > LONGEST_TARGET => {
            Err(format!("it links to a path of {} bytes; ext4 holds at most {LONGEST_TARGET}", target.len()))
        }
        Kind::Symlink(target) if target.contains(&0) => Err("it links to a path with a NUL".into()),
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor }
            if *major > MAX_MAJOR || *minor > MAX_MINOR =>
        {
            Err(format!("its device number {major}:{minor} is above {MAX_MAJOR}:{MAX_MINOR}"))
        }
        _ => Ok(()),
    }
}

/// What stands in the inode in place of an extent tree, for the types that have none.
pub fn in_place(kind: &Kind) -> Option<[u8; 60]> {
    let mut block = [0; 60];
    match kind {
        Kind::Symlink(target) if target.len() <= SHORT_TARGET => {
            for (to, from) in block.iter_mut().zip(target) {
                *to = *from;
            }
        }
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            let (old, new) = block.split_at_mut(4);
            if *major < 256 && *minor < 256 {
                old.copy_from_slice(&(major << 8 | minor).to_le_bytes());
            } else if let Some((new, _)) = new.split_first_chunk_mut() {
                *new = (minor & 0xff | major << 8 | (minor & !0xff) << 12).to_le_bytes();
            }
        }
        Kind::Fifo | Kind::Socket => {}
        Kind::Directory(_) | Kind::File { .. } | Kind::Symlink(_) => return None,
    }
    Some(block)
}

/// A time as ext4 holds it: the seconds' lower half, and the nanoseconds above two bits of epoch
/// (`ext4_encode_extra_time`).
fn encode(time: Time) -> (U32, U32) {
    let time = match time.secs {
        secs if secs < EARLIEST => Time { secs: EARLIEST, nanos: 0 },
        secs if secs > LATEST => Time { secs: LATEST, nanos: 0 },
        _ => time,
    };
    let low = time.secs as i32;
    let epoch = ((time.secs - i64::from(low)) >> 32) as u32 & 3;
    (U32::new(low as u32), U32::new(time.nanos << 2 | epoch))
}

/// The inode as it stands in the table.
pub fn encode_inode(inode: &Inode, xattrs: &Xattrs<'_>, placed: &Placed, seed: Checksum) -> [u8; INODE_SIZE] {
    let mut raw = RawInode::new_zeroed();
    let (time, extra) = encode(inode.mtime);
    raw.mode = U16::new(types(&inode.kind).0 | inode.mode);
    (raw.uid_low, raw.uid_high) = halves(inode.uid);
    (raw.gid_low, raw.gid_high) = halves(inode.gid);
    raw.size_low = U32::new(placed.size as u32);
    raw.size_high = U32::new((placed.size >> 32) as u32);
    (raw.atime, raw.ctime, raw.mtime, raw.crtime) = (time, time, time, time);
    (raw.atime_extra, raw.ctime_extra, raw.mtime_extra, raw.crtime_extra) = (extra, extra, extra, extra);
    // A directory of too many directories to count has one link (the dir_nlink feature).
    raw.links = U16::new(if placed.links > LINK_MAX { 1 } else { placed.links as u16 });
    let sectors = placed.blocks * 8;
    raw.sectors_low = U32::new(sectors as u32);
    raw.sectors_high = U16::new((sectors >> 32) as u16);
    raw.flags = U32::new(placed.flags);
    raw.block = placed.block;
    raw.xattr_block = U32::new(placed.xattr_block);
    raw.extra_size = U16::new(EXTRA_ISIZE);
    xattrs.fill_inode(&mut raw.xattrs);
    (raw.checksum_low, raw.checksum_high) = halves(seed.of_inode(placed.number).add(raw.as_bytes()).value());
    let mut bytes = [0; INODE_SIZE];
    bytes.copy_from_slice(raw.as_bytes());
    bytes
}

fn halves(value: u32) -> (U16, U16) {
    (U16::new(value as u16), U16::new((value >> 16) as u16))
}
