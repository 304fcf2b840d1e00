//! Reading names: which file or directory each block of an ext4 file system belongs to.
//!
//! Nothing of file contents is read. The file system may be hostile: every number in it is checked before it is used,
//! nothing is followed twice, and what it can make the reader hold is bounded by constants here.
#![deny(clippy::indexing_slicing)]

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;

use zerocopy::IntoBytes;

use super::layout::{
    BLOCK_SIZE, DirEntry, Extent, ExtentHeader, ExtentIndex, INODE_SIZE, ROOT_INODE, RawInode, inode_flag,
};
use super::reader::{Opened, ReadBlocks, Reader, invalid, parse};
use crate::error::Result;

/// Most names, and most bytes of them.
const MAX_NAMES: usize = 4 << 20;
const MAX_NAME_BYTES: usize = 256 << 20;
/// Most pieces that files are in.
const MAX_RUNS: usize = 8 << 20;
/// Deepest extent tree (`EXT4_MAX_EXTENT_DEPTH`).
const MAX_DEPTH: u16 = 5;

const EXTENT_MAGIC: u16 = 0xf30a;
/// An inode whose data is in the inode itself (`EXT4_INLINE_DATA_FL`).
const INLINE_DATA: u32 = 0x1000_0000;

const TYPE_MASK: u16 = 0o170_000;
const TYPE_DIRECTORY: u16 = 0o040_000;
const TYPE_FILE: u16 = 0o100_000;
const TYPE_LINK: u16 = 0o120_000;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link with a block of its own.
    Link,
}

/// Blocks of the device that hold a part of one file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First device block.
    pub block: u32,
    /// Length in blocks.
    pub blocks: u32,
    /// Which block of the file the first one is.
    pub file_block: u32,
    /// Number of the name; see [`Names::path`].
    pub name: u32,
}

struct Name {
    parent: u32,
    start: u32,
    len: u8,
    kind: Option<Type>,
    inode: u32,
    size: u64,
    mark: Option<u32>,
}

/// The names of a file system and the blocks that belong to them.
pub struct Names {
    names: Vec<Name>,
    bytes: Vec<u8>,
    /// By device block.
    runs: Vec<Run>,
    tables: Vec<u32>,
    inodes_per_group: u32,
    inode_size: u32,
    /// Blocks of extent trees and attributes, with the name that they belong to.
    own: HashMap<u32, Vec<u32>>,
}

/// The file system's root in [`Names`].
pub const ROOT: u32 = 0;

impl Names {
    /// The run that `block` is in, if a file or directory has it.
    #[must_use]
    pub fn run_at(&self, block: u32) -> Option<&Run> {
        let next = self.runs.partition_point(|run| run.block <= block);
        let run = self.runs.get(next.checked_sub(1)?)?;
        (block - run.block < run.blocks).then_some(run)
    }

    /// All runs, by device block.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// What the name stands for; `None` for devices, short links and so on.
    #[must_use]
    pub fn kind(&self, name: u32) -> Option<Type> {
        self.names.get(name as usize)?.kind
    }

    /// Length in bytes of the file that the name stands for; 0 for a further name of a file that has several.
    #[must_use]
    pub fn size(&self, name: u32) -> u64 {
        self.names.get(name as usize).map_or(0, |name| name.size)
    }

    /// The directory that has the name; the root is its own.
    #[must_use]
    pub fn parent(&self, name: u32) -> u32 {
        self.names.get(name as usize).map_or(ROOT, |name| name.parent)
    }

    /// How many names there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.names.len() as u32
    }

    /// Never true: there is a root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The path of a name from `/` on.
    #[must_use]
    pub fn path(&self, name: u32) -> Vec<u8> {
        let mut parts = Vec::new();
        let mut at = name;
        // Each name's parent was there before it, so this ends.
        while let Some(entry) = self.names.get(at as usize).filter(|_| at != ROOT) {
            parts.push(self.bytes_of(entry));
            at = entry.parent;
        }
        if parts.is_empty() {
            return b"/".to_vec();
        }
        parts.iter().rev().flat_map(|part| [&b"/"[..], part]).flatten().copied().collect()
    }

    /// All names by their path; of files with several, each.
    #[must_use]
    pub fn by_path(&self) -> HashMap<Vec<u8>, u32> {
        (0..self.len()).map(|name| (self.path(name), name)).collect()
    }

    /// Number of the inode that the name stands for.
    #[must_use]
    pub fn inode(&self, name: u32) -> u32 {
        self.names.get(name as usize).map_or(0, |name| name.inode)
    }

    /// A checksum of each inode without the time of its last access: two that differ tell that something about the file
    /// changed, its content included, since a write changes its times.
    #[must_use]
    pub fn marks(&self) -> HashMap<u32, u32> {
        self.names.iter().filter_map(|name| Some((name.inode, name.mark?))).collect()
    }

    /// The runs of each inode, in the order of the file.
    #[must_use]
    pub fn by_inode(&self) -> HashMap<u32, Vec<Run>> {
        let mut files: HashMap<u32, Vec<Run>> = HashMap::new();
        for run in &self.runs {
            files.entry(self.inode(run.name)).or_default().push(*run);
        }
        files.values_mut().for_each(|runs| runs.sort_unstable_by_key(|run| run.file_block));
        files
    }

    /// The block of the inode table with the name's inode.
    #[must_use]
    pub fn inode_block(&self, name: u32) -> Option<u32> {
        let (block, _) = self.inode_place(self.names.get(name as usize)?.inode)?;
        u32::try_from(block).ok()
    }

    /// Blocks of the name's extent tree and attributes.
    #[must_use]
    pub fn own_blocks(&self, name: u32) -> &[u32] {
        self.own.get(&name).map_or(&[], Vec::as_slice)
    }

    fn bytes_of(&self, name: &Name) -> &[u8] {
        self.bytes.get(name.start as usize..name.start as usize + usize::from(name.len)).unwrap_or_default()
    }

    fn inode_place(&self, inode: u32) -> Option<(u64, usize)> {
        let index = inode.checked_sub(1)?;
        let table = *self.tables.get((index / self.inodes_per_group.max(1)) as usize)?;
        let byte = u64::from(index % self.inodes_per_group.max(1)) * u64::from(self.inode_size);
        Some((u64::from(table) + byte / BLOCK_SIZE as u64, (byte % BLOCK_SIZE as u64) as usize))
    }
}

/// Reads the names of the file system on a device of `device_bytes`; `None` when there is none that this can read:
/// another file system, or one with other blocks than 4 KiB.
///
/// # Errors
/// What `read` says, and [`Error::Invalid`] for a file system that is damaged or unreasonably large.
pub fn read_names(device_bytes: u64, read: &mut ReadBlocks<'_>) -> Result<Option<Names>> {
    let mut reader = Reader::new(device_bytes, read);
    let Some(opened) = Opened::read(&mut reader)? else { return Ok(None) };
    let names = Names {
        names: vec![Name {
            parent: ROOT,
            start: 0,
            len: 0,
            kind: Some(Type::Directory),
            inode: ROOT_INODE,
            size: 0,
            mark: None,
        }],
        bytes: Vec::new(),
        runs: Vec::new(),
        tables: opened.groups.iter().map(|group| group.inode_table.get()).collect(),
        inodes_per_group: opened.superblock.inodes_per_group.get(),
        inode_size: opened.inode_size,
        own: HashMap::new(),
    };
    let inodes = opened.superblock.inodes_count.get();
    let mut walk = Walk { reader, names, seen: HashSet::from([ROOT_INODE]), inodes };
    walk.run()?;
    let mut names = walk.names;
    // A block belongs to one file; where a damaged file system says otherwise, to the first one.
    names.runs.sort_unstable_by_key(|run| run.block);
    let mut end = 0;
    names.runs.retain(|run| {
        let free = u64::from(run.block) >= end;
        if free {
            end = u64::from(run.block) + u64::from(run.blocks);
        }
        free
    });
    Ok(Some(names))
}

struct Walk<'a, 'b> {
    reader: Reader<'a, 'b>,
    names: Names,
    /// Inodes that have a name already.
    seen: HashSet<u32>,
    inodes: u32,
}

impl Walk<'_, '_> {
    fn run(&mut self) -> Result<()> {
        self.inode(ROOT)?;
        let mut queue = VecDeque::from([(ROOT, 0..self.names.runs.len())]);
        while let Some((dir, runs)) = queue.pop_front() {
            for (name, inode) in self.entries(runs)? {
                let number = self.add(dir, &name, inode)?;
                if !self.seen.insert(inode) {
                    continue;
                }
                let first = self.names.runs.len();
                if self.inode(number)? == Some(Type::Directory) {
                    queue.push_back((number, first..self.names.runs.len()));
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, parent: u32, name: &[u8], inode: u32) -> Result<u32> {
        let names = &mut self.names;
        if names.names.len() >= MAX_NAMES || names.bytes.len() + name.len() > MAX_NAME_BYTES {
            return Err(invalid("it has too many names"));
        }
        let (number, start) = (names.names.len() as u32, names.bytes.len() as u32);
        names.bytes.extend_from_slice(name);
        names.names.push(Name { parent, start, len: name.len() as u8, kind: None, inode, size: 0, mark: None });
        Ok(number)
    }

    /// Reads the inode of a name: what it is, and its blocks.
    fn inode(&mut self, name: u32) -> Result<Option<Type>> {
        let inode = self.names.names.get(name as usize).map_or(0, |name| name.inode);
        let (block, at) = self.names.inode_place(inode).ok_or_else(|| invalid(format!("it has no inode {inode}")))?;
        let block = u32::try_from(block).map_err(|_| invalid("an inode table is behind its end"))?;
        let bytes = self.reader.block(block)?;
        // Without the part above 128 bytes, which small inodes lack and nobody here needs.
        let mut whole = [0; INODE_SIZE];
        let len = (self.names.inode_size as usize).min(INODE_SIZE);
        if let (Some(to), Some(from)) = (whole.get_mut(..len), bytes.get(at..at + len)) {
            to.copy_from_slice(from);
        }
        let raw: RawInode = parse(&whole, 0)?;
        let untouched = RawInode {
            atime: 0.into(),
            atime_extra: 0.into(),
            checksum_low: 0.into(),
            checksum_high: 0.into(),
            ..raw.clone()
        };
        if let Some(entry) = self.names.names.get_mut(name as usize) {
            entry.mark = Some(crc32c::crc32c(untouched.as_bytes()));
        }
        let kind = match raw.mode.get() & TYPE_MASK {
            TYPE_DIRECTORY => Type::Directory,
            TYPE_FILE => Type::File,
            // A short target is in the inode, and no extents are.
            TYPE_LINK if raw.flags.get() & inode_flag::EXTENTS != 0 => Type::Link,
            _ => return Ok(None),
        };
        let mut own = Vec::new();
        if raw.xattr_block.get() != 0 {
            own.push(raw.xattr_block.get());
        }
        if raw.flags.get() & inode_flag::EXTENTS != 0 && raw.flags.get() & INLINE_DATA == 0 {
            self.extents(name, &raw.block, None, &mut own)?;
        }
        if !own.is_empty() {
            self.names.own.insert(name, own);
        }
        if let Some(entry) = self.names.names.get_mut(name as usize) {
            entry.kind = Some(kind);
            entry.size = u64::from(raw.size_high.get()) << 32 | u64::from(raw.size_low.get());
        }
        Ok(Some(kind))
    }

    /// Adds the runs of a node of an extent tree; `below` is the depth that it must have.
    fn extents(&mut self, name: u32, node: &[u8], below: Option<u16>, own: &mut Vec<u32>) -> Result<()> {
        let header: ExtentHeader = parse(node, 0)?;
        let (entries, depth) = (usize::from(header.entries.get()), header.depth.get());
        let fits = (entries + 1) * size_of::<ExtentHeader>() <= node.len();
        if header.magic.get() != EXTENT_MAGIC || !fits || depth > MAX_DEPTH || below.is_some_and(|below| below != depth)
        {
            return Err(invalid("an extent tree is damaged"));
        }
        for number in 1..=entries {
            let at = number * size_of::<Extent>();
            if depth > 0 {
                let index: ExtentIndex = parse(node, at)?;
                let leaf = index.leaf.get();
                own.push(leaf);
                let bytes = self.reader.block(leaf)?;
                // The depth falls with each step, and each step costs a block of those that may be looked at.
                self.extents(name, &bytes, Some(depth - 1), own)?;
                continue;
            }
            let extent: Extent = parse(node, at)?;
            // Lengths above this mark blocks that are allocated and not written: zeros.
            let blocks = u32::from(extent.blocks.get());
            if blocks == 0 || blocks > 32_768 {
                continue;
            }
            let block = extent.start.get();
            if block.checked_add(blocks).is_none_or(|end| end > self.reader.device_blocks) {
                return Err(invalid("an extent is behind its end"));
            }
            if self.names.runs.len() >= MAX_RUNS {
                return Err(invalid("its files are in too many pieces"));
            }
            self.names.runs.push(Run { block, blocks, file_block: extent.file_block.get(), name });
        }
        Ok(())
    }

    /// The names in the directory that has these runs, with their inodes.
    fn entries(&mut self, runs: Range<usize>) -> Result<Vec<(Vec<u8>, u32)>> {
        let mut runs: Vec<Run> = self.names.runs.get(runs).unwrap_or_default().to_vec();
        runs.sort_unstable_by_key(|run| run.file_block);
        let mut found = Vec::new();
        for run in runs {
            for block in run.block..run.block + run.blocks {
                let bytes = self.reader.block(block)?;
                self.block_entries(&bytes, &mut found)?;
            }
        }
        Ok(found)
    }

    fn block_entries(&self, bytes: &[u8], found: &mut Vec<(Vec<u8>, u32)>) -> Result<()> {
        let mut at = 0;
        while at + size_of::<DirEntry>() <= bytes.len() {
            let entry: DirEntry = parse(bytes, at)?;
            let (inode, len, name_len) =
                (entry.inode.get(), usize::from(entry.rec_len.get()), usize::from(entry.name_len));
            if len < size_of::<DirEntry>() || at + len > bytes.len() || size_of::<DirEntry>() + name_len > len {
                return Err(invalid("a directory is damaged"));
            }
            let start = at + size_of::<DirEntry>();
            let name = bytes.get(start..start + name_len).unwrap_or_default();
            at += len;
            if inode == 0 || name.is_empty() || name == b"." || name == b".." {
                continue;
            }
            if inode > self.inodes || name.contains(&b'/') || name.contains(&0) {
                return Err(invalid("a directory has an impossible entry"));
            }
            if found.len() >= MAX_NAMES {
                return Err(invalid("a directory has too many names"));
            }
            found.push((name.to_vec(), inode));
        }
        Ok(())
    }
}
