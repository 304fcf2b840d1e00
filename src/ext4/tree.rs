//! The input of the writer: inodes, and the directories that name them.

use std::fmt::Write as _;

use crate::error::{Error, Result};

/// Which inode of a [`Tree`]: an index into it, not the number the inode gets in the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub u32);

/// A point in time: seconds since 1970 and nanoseconds within that second.
///
/// ext4 holds the years 1901 to 2446 (`fs/ext4/ext4.h`, `EXT4_TIMESTAMP_MIN` and `EXT4_EXTRA_TIMESTAMP_MAX`). Times
/// outside are clamped to the nearest it can hold, as the kernel does when such a time is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds since the beginning of 1970, negative before.
    pub secs: i64,
    /// Nanoseconds, less than 1 000 000 000.
    pub nanos: u32,
}

/// An extended attribute: the full name, such as `user.x`, and the value.
pub type Xattr = (Box<[u8]>, Box<[u8]>);

/// What the file system knows of one file, directory, link or device.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Permission bits with set-uid, set-gid and sticky: at most 0o7777.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// When the content changed; the other times of the inode are set to it too.
    pub mtime: Time,
    /// Extended attributes with full names and the values that `getxattr` gives; ACLs in that representation too.
    pub xattrs: Box<[Xattr]>,
    /// The type, and what only this type has.
    pub kind: Kind,
}

/// The type of an inode, and what only this type has.
#[derive(Debug, Clone)]
pub enum Kind {
    /// A directory: its entries in any order, without `.` and `..`.
    Directory(Vec<(Box<[u8]>, InodeId)>),
    /// A regular file.
    File {
        /// In bytes.
        size: u64,
        /// The runs of 4 KiB blocks that have data, ascending and within the size; all else are holes.
        segments: Box<[Segment]>,
    },
    /// A symbolic link to a target of 1 to 4095 bytes.
    Symlink(Box<[u8]>),
    /// A character device.
    CharDevice {
        /// At most 4095.
        major: u32,
        /// At most 1 048 575.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// At most 4095.
        major: u32,
        /// At most 1 048 575.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A run of a file's blocks that has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first block, counted in 4 KiB from the start of the file.
    pub file_block: u32,
    /// How many blocks.
    pub blocks: u32,
}

/// A tree of inodes under one root directory. A hard link is one inode in several directory entries.
///
/// Inodes that no directory names are left out of the file system, so that a file can be replaced by linking another.
#[derive(Debug, Clone)]
pub struct Tree {
    inodes: Vec<Inode>,
}

impl Tree {
    /// A tree of the root alone, which must be a directory when the tree is planned.
    #[must_use]
    pub fn new(root: Inode) -> Self {
        Self { inodes: vec![root] }
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> InodeId {
        InodeId(0)
    }

    /// How many inodes were added, the root included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inodes.len()
    }

    /// Never: there is always a root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
    }

    /// Adds an inode that no directory names yet.
    pub fn add(&mut self, inode: Inode) -> Result<InodeId> {
        let id = u32::try_from(self.inodes.len())
            .ok()
            .filter(|id| *id < u32::MAX)
            .ok_or_else(|| Error::invalid("file system", "more than 4 294 967 294 inodes"))?;
        self.inodes.push(inode);
        Ok(InodeId(id))
    }

    /// The inode, if it is one of this tree's.
    #[must_use]
    pub fn get(&self, id: InodeId) -> Option<&Inode> {
        self.inodes.get(id.0 as usize)
    }

    /// The inode to change, if it is one of this tree's.
    pub fn get_mut(&mut self, id: InodeId) -> Option<&mut Inode> {
        self.inodes.get_mut(id.0 as usize)
    }

    /// Names an inode in a directory. That no name occurs twice is checked when the tree is planned.
    pub fn link(&mut self, dir: InodeId, name: &[u8], inode: InodeId) -> Result<()> {
        check_name(name)?;
        self.inode(inode)?;
        match self.get_mut(dir).map(|dir| &mut dir.kind) {
            Some(Kind::Directory(entries)) => {
                entries.push((name.into(), inode));
                Ok(())
            }
            _ => Err(Error::invalid("file system", format!("{} is linked in what is no directory", show(name)))),
        }
    }

    /// The inode, or an error for one that another tree gave out.
    pub(crate) fn inode(&self, id: InodeId) -> Result<&Inode> {
        self.get(id).ok_or_else(|| Error::invalid("file system", format!("inode {} is not in the tree", id.0)))
    }

    /// A path of the inode for an error's text. Walks the tree: for errors only.
    pub(crate) fn path(&self, wanted: InodeId) -> String {
        let mut parents = vec![None; self.inodes.len()];
        let mut stack = vec![self.root()];
        while let Some(dir) = stack.pop() {
            let Some(Inode { kind: Kind::Directory(entries), .. }) = self.get(dir) else { continue };
            for (name, id) in entries {
                match parents.get_mut(id.0 as usize) {
                    Some(parent @ None) if *id != self.root() => *parent = Some((dir, name)),
                    _ => continue,
                }
                stack.push(*id);
            }
        }
        let mut names = Vec::new();
        let mut at = wanted;
        while let Some(Some((dir, name))) = parents.get(at.0 as usize) {
            names.push(show(name));
            at = *dir;
        }
        names.reverse();
        if at == self.root() { format!("/{}", names.join("/")) } else { format!("inode {}", wanted.0) }
    }
}

impl Kind {
    /// A file without holes, of `size` bytes.
    ///
    /// Sizes that ext4 cannot hold give a file that [`plan`](super::plan) refuses.
    #[must_use]
    pub fn file(size: u64) -> Self {
        let blocks = u32::try_from(size.div_ceil(super::BLOCK_SIZE as u64)).unwrap_or(u32::MAX);
        let segments =
            if blocks == 0 { Box::default() } else { Box::new([Segment { file_block: 0, blocks }]) as Box<_> };
        Self::File { size, segments }
    }
}

/// Whether a name can be that of a directory entry.
pub(crate) fn check_name(name: &[u8]) -> Result<()> {
    let reason = match name {
        b"" => "is empty",
        b"." | b".." => "is reserved",
        _ if name.len() > 255 => "is longer than 255 bytes",
        _ if name.iter().any(|byte| matches!(byte, 0 | b'/')) => "has a NUL or a slash",
        _ => return Ok(()),
    };
    Err(Error::invalid("file name", format!("{} {reason}", show(name))))
}

/// Any bytes as text of one line.
pub(crate) fn show(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() { text.extend(c.escape_default()) } else { text.push(c) }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}
