//! Extended attributes: behind the inode while they fit, the others in one block (`fs/ext4/xattr.c`).

use std::borrow::Cow;

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32};

use super::checksum::Checksum;
use super::layout::{BLOCK_SIZE, Block, XattrEntry, XattrHeader, ZERO_BLOCK};
use super::tree::{Inode, Xattr, show};

const MAGIC: u32 = 0xea02_0000;
/// How many inodes may share a block (`EXT4_XATTR_REFCOUNT_MAX`).
pub const MAX_REFERENCES: u32 = 1024;
/// Bytes for entries and values behind an inode: less the magic number and the end mark.
const ROOM_IN_INODE: usize = 96 - 4 - 4;
/// Bytes for entries and values in a block: less the header and the end mark.
const ROOM_IN_BLOCK: usize = BLOCK_SIZE - size_of::<XattrHeader>() - 4;

/// The longest name, prefix included (`XATTR_NAME_MAX`).
const LONGEST_NAME: usize = 255;
const SECURITY: u8 = 6;
/// The prefixes that ext4 has numbers for (`EXT4_XATTR_INDEX_*`).
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", SECURITY)];
/// The ACLs, whose whole names have numbers.
const ACLS: [(&[u8], u8); 2] = [(b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3)];

/// Whether ext4 has a place for attributes of this name.
#[must_use]
pub fn is_supported(name: &[u8]) -> bool {
    number_of(name).is_some()
}

/// The number of the prefix, and the rest of the name.
fn number_of(name: &[u8]) -> Option<(u8, &[u8])> {
    if let Some((_, number)) = ACLS.iter().find(|(acl, _)| *acl == name) {
        return Some((*number, b""));
    }
    PREFIXES
        .iter()
        .find_map(|(prefix, number)| name.strip_prefix(*prefix).map(|rest| (*number, rest)))
        .filter(|(_, rest)| !rest.is_empty() && name.len() <= LONGEST_NAME && !rest.contains(&0))
}

/// An attribute as ext4 stores it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stored<'a> {
    // The order of the fields is the order of entries in a block.
    number: u8,
    length: u8,
    name: &'a [u8],
    value: Cow<'a, [u8]>,
}

impl<'a> Stored<'a> {
    fn new((name, value): &'a Xattr) -> Result<Self, String> {
        let (number, rest) = number_of(name)
            .ok_or_else(|| format!("ext4 has no place for an extended attribute named {}", show(name)))?;
        let value = if rest.is_empty() {
            Cow::Owned(acl(value).ok_or_else(|| format!("the value of {} is no ACL", show(name)))?)
        } else {
            Cow::Borrowed(&**value)
        };
        Ok(Self { number, length: rest.len() as u8, name: rest, value })
    }

    fn name_bytes(&self) -> usize {
        size_of::<XattrEntry>() + self.name.len().next_multiple_of(4)
    }

    fn bytes(&self) -> usize {
        self.name_bytes().saturating_add(self.value.len().next_multiple_of(4))
    }

    /// `ext4_xattr_hash_entry`.
    fn hash(&self) -> u32 {
        let name = self.name.iter().fold(0u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
        self.value.chunks(4).fold(name, |hash, bytes| {
            let mut word = [0; 4];
            for (to, from) in word.iter_mut().zip(bytes) {
                *to = *from;
            }
            hash.rotate_left(16) ^ u32::from_le_bytes(word)
        })
    }
}

/// From the representation of `getxattr` (`include/uapi/linux/posix_acl_xattr.h`) to that of ext4 (`fs/ext4/acl.h`):
/// entries without an id are short.
fn acl(value: &[u8]) -> Option<Vec<u8>> {
    const HEADER: [u8; 4] = 2u32.to_le_bytes();
    let entries = value.strip_prefix(&HEADER)?;
    let mut stored = 1u32.to_le_bytes().to_vec();
    if entries.len() % 8 != 0 {
        return None;
    }
    for entry in entries.chunks_exact(8) {
        let (short, id) = entry.split_at(4);
        stored.extend_from_slice(short);
        match short {
            // ACL_USER and ACL_GROUP name somebody.
            [0x02 | 0x08, 0, ..] => stored.extend_from_slice(id),
            // ACL_USER_OBJ, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER.
            [0x01 | 0x04 | 0x10 | 0x20, 0, ..] => {}
            _ => return None,
        }
    }
    Some(stored)
}

/// The attributes of an inode, each with its place.
#[derive(Debug)]
pub struct Xattrs<'a> {
    in_inode: Vec<Stored<'a>>,
    in_block: Vec<Stored<'a>>,
}

impl<'a> Xattrs<'a> {
    /// Gives each attribute its place: behind the inode while there is room, security attributes first, since an exec
    /// reads them. An error says what is wrong, without the path of the inode.
    pub fn of(inode: &'a Inode) -> Result<Self, String> {
        let mut all = inode.xattrs.iter().map(Stored::new).collect::<Result<Vec<_>, _>>()?;
        all.sort();
        for pair in all.windows(2) {
            if let [one, other] = pair
                && (one.number, one.name) == (other.number, other.name)
            {
                return Err(format!("the extended attribute …{} is there twice", show(one.name)));
            }
        }
        let (security, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|xattr| xattr.number == SECURITY);
        let mut room = ROOM_IN_INODE;
        let (mut in_inode, mut in_block): (Vec<_>, Vec<_>) = security.into_iter().chain(others).partition(|xattr| {
            let fits = xattr.bytes() <= room;
            if fits {
                room -= xattr.bytes();
            }
            fits
        });
        in_inode.sort();
        in_block.sort();
        let bytes = in_block.iter().fold(0usize, |sum, xattr| sum.saturating_add(xattr.bytes()));
        if bytes > ROOM_IN_BLOCK {
            return Err(format!(
                "its extended attributes need {bytes} bytes beside those in the inode; ext4 holds at most {ROOM_IN_BLOCK}"
            ));
        }
        Ok(Self { in_inode, in_block })
    }

    /// Fills in the room behind the inode.
    pub fn fill_inode(&self, room: &mut [u8; 96]) {
        if self.in_inode.is_empty() {
            return;
        }
        let (magic, entries) = room.split_at_mut(4);
        magic.copy_from_slice(&MAGIC.to_le_bytes());
        // Offsets count from the first entry here, and the kernel leaves the hashes out.
        fill(entries, 0, &self.in_inode, |_| 0);
    }

    /// The attribute block, if one is needed, without what depends on its users: the count of references, and the
    /// checksum.
    pub fn block(&self) -> Option<Box<Block>> {
        if self.in_block.is_empty() {
            return None;
        }
        let mut block = Box::new(ZERO_BLOCK);
        fill(&mut block[..], size_of::<XattrHeader>(), &self.in_block, Stored::hash);
        // `ext4_xattr_rehash`.
        let hash = self.in_block.iter().try_fold(0u32, |hash, xattr| match xattr.hash() {
            0 => None,
            entry => Some(hash.rotate_left(16) ^ entry),
        });
        put_header(
            &mut block,
            &XattrHeader {
                magic: U32::new(MAGIC),
                references: U32::ZERO,
                blocks: U32::new(1),
                hash: U32::new(hash.unwrap_or(0)),
                checksum: U32::ZERO,
                reserved: [U32::ZERO; 3],
            },
        );
        Some(block)
    }
}

/// Completes an attribute block that so many inodes use, at its place on the device (`ext4_xattr_block_csum`).
pub fn finish_block(block: &mut Block, references: u32, number: u32, seed: Checksum) {
    const REFERENCES: usize = core::mem::offset_of!(XattrHeader, references);
    const CHECKSUM: usize = core::mem::offset_of!(XattrHeader, checksum);
    block[REFERENCES..REFERENCES + 4].copy_from_slice(&references.to_le_bytes());
    let checksum = seed.add(&u64::from(number).to_le_bytes()).add(&block[..]).value();
    block[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
}

fn put_header(block: &mut Block, header: &XattrHeader) {
    let (head, _) = block.split_at_mut(size_of::<XattrHeader>());
    head.copy_from_slice(header.as_bytes());
}

/// Entries from `start` on, values from the end down. The caller has checked that all fit.
fn fill<'a>(bytes: &mut [u8], start: usize, xattrs: &[Stored<'a>], hash: impl Fn(&Stored<'a>) -> u32) {
    let mut at = start;
    let mut value_at = bytes.len();
    for xattr in xattrs {
        value_at = value_at.saturating_sub(xattr.value.len().next_multiple_of(4));
        let entry = XattrEntry {
            name_len: xattr.length,
            name_index: xattr.number,
            value_offset: U16::new(if xattr.value.is_empty() { 0 } else { value_at as u16 }),
            value_inode: U32::ZERO,
            value_size: U32::new(xattr.value.len() as u32),
            hash: U32::new(hash(xattr)),
        };
        put(bytes, at, entry.as_bytes());
        put(bytes, at + size_of::<XattrEntry>(), xattr.name);
        put(bytes, value_at, &xattr.value);
        at += xattr.name_bytes();
    }
}

fn put(bytes: &mut [u8], at: usize, from: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + from.len()) {
        to.copy_from_slice(from);
    }
}
