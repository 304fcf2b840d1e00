//! What is hot: from the lines of a profile to blocks of chunks of an image, in the order in which a start needs them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

use crate::chunk::{CHUNK_SIZE, Digest};
use crate::error::{Error, Result};
use crate::ext4::{Names, ROOT, Run, Type};
use crate::index::{BLOCK, Extent, Index};
use crate::profile::{Place, Profile};

/// Blocks that are hot, of the device and of its chunks.
#[derive(Default)]
pub(super) struct Hot {
    /// By the first byte in the chunk, for each chunk.
    pub chunks: HashMap<u32, HotChunk>,
    /// Hot data blocks of the device with their chunk and the first byte in it.
    pub blocks: BTreeMap<u32, (u32, u32)>,
    /// Chunks of metadata in the order in which they are needed; all of them.
    pub metadata: Vec<u32>,
    /// How many of them are needed.
    needed: usize,
    /// Blocks of the profile that the image has, and that it has not.
    pub found: u64,
    pub lost: u64,
}

/// The hot part of a chunk.
#[derive(Default)]
pub(super) struct HotChunk {
    /// Place in the order of first touch.
    pub rank: u64,
    /// First bytes of its hot blocks. All of it, for metadata.
    pub offsets: Vec<u32>,
    /// First bytes of further blocks, which may be needed where another version needed the ones above. They have hot chunks of
    /// their own, so that those of the ones above are the same in both versions.
    pub beside: Vec<u32>,
    /// Hot chunks that earlier images have of it, each as the first bytes of its blocks in order. What is in none of them
    /// gets a chunk of its own.
    pub kept: Vec<Vec<u32>>,
}

struct Finder<'a> {
    index: &'a Index,
    hot: Hot,
    /// Next place in the order.
    rank: u64,
    /// Place of each metadata chunk that is needed early.
    early: HashMap<u32, u64>,
}

/// Finds what `profile` names on the device of `index`, whose names are `names` where it has an ext4.
///
/// # Errors
/// A profile of another device that could be applied by block only.
pub(super) fn find(profile: &Profile, index: &Index, names: Option<&Names>) -> Result<Hot> {
    let device = Some(index.device_digest().to_string());
    let same_device = profile.recording.device == device;
    let mut finder = Finder { index, hot: Hot::default(), rank: 0, early: HashMap::new() };
    match names {
        Some(names) => finder.by_name(profile, names, same_device),
        None if same_device => finder.by_block(profile),
        None => {
            let reason = "it was recorded on another device, and there is no ext4 on this one to apply it by path";
            return Err(Error::invalid("profile", reason));
        }
    }
    if finder.hot.found == 0 {
        return Err(Error::invalid("profile", "nothing that it names is in the image"));
    }
    // Everything of an image of ours that belongs to no file is metadata: a start of another kind needs other parts.
    let metadata = match (index.file_system(), names) {
        ("ext4", Some(names)) => finder.metadata_chunks(names),
        _ => Vec::new(),
    };
    let Finder { mut hot, early, .. } = finder;
    hot.metadata = metadata;
    hot.needed = hot.metadata.iter().filter(|chunk| early.contains_key(chunk)).count();
    hot.metadata.sort_by_key(|chunk| (early.get(chunk).copied().unwrap_or(u64::MAX), *chunk));
    for (place, chunk) in hot.metadata.iter().enumerate() {
        // What nobody needed comes behind everything else.
        let rank = early.get(chunk).copied().unwrap_or(u64::MAX - hot.metadata.len() as u64 + place as u64);
        hot.chunks.insert(*chunk, HotChunk { rank, ..HotChunk::default() });
    }
    for (block, (chunk, _)) in &hot.blocks {
        debug_assert!(hot.chunks.contains_key(chunk), "block {block}");
    }
    Ok(hot)
}

impl Finder<'_> {
    /// Every block by its number.
    fn by_block(&mut self, profile: &Profile) {
        for run in &profile.runs {
            let Some(first) = run.block else { continue };
            self.rank += 1;
            for block in first..first.saturating_add(run.blocks) {
                self.data(block);
            }
        }
    }

    fn by_name(&mut self, profile: &Profile, names: &Names, same_device: bool) {
        let (by_path, by_inode) = (names.by_path(), names.by_inode());
        let mut beside = Vec::new();
        for run in &profile.runs {
            self.rank += 1;
            match &run.place {
                Place::Named { path, from, .. } => {
                    let Some(&name) = by_path.get(path) else {
                        self.hot.lost += u64::from(run.blocks);
                        continue;
                    };
                    let runs = by_inode.get(&names.inode(name)).map(Vec::as_slice).unwrap_or_default();
                    self.lookup(names, &by_inode, name);
                    let is_file = names.kind(name) == Some(Type::File);
                    if is_file && !same_device {
                        for (first, blocks) in sides(runs, *from, run.blocks) {
                            beside.extend(device_blocks(runs, first, blocks).flatten());
                        }
                    }
                    for block in device_blocks(runs, *from, run.blocks) {
                        match block {
                            Some(block) if is_file => self.data(block),
                            Some(block) => self.metadata(block),
                            None => self.hot.lost += 1,
                        }
                    }
                }
                Place::Metadata | Place::Data => {
                    let Some(first) = run.block.filter(|_| same_device) else { continue };
                    for block in first..first.saturating_add(run.blocks) {
                        self.metadata(block);
                    }
                }
            }
        }
        for block in beside {
            self.beside(block);
        }
    }

    /// What the kernel reads to find a file: inodes and directories from the root on, then what maps the file's blocks.
    fn lookup(&mut self, names: &Names, by_inode: &HashMap<u32, Vec<Run>>, name: u32) {
        let mut path = vec![name];
        let mut at = name;
        while at != ROOT {
            at = names.parent(at);
            path.push(at);
        }
        for &part in path.iter().rev() {
            if let Some(block) = names.inode_block(part) {
                self.metadata(block);
            }
            for &block in names.own_blocks(part) {
                self.metadata(block);
            }
            if names.kind(part) == Some(Type::Directory) {
                for run in by_inode.get(&names.inode(part)).into_iter().flatten() {
                    (run.block..run.block + run.blocks).for_each(|block| self.metadata(block));
                }
            }
        }
    }

    /// A block of metadata is needed now, if not before.
    fn metadata(&mut self, block: u32) {
        if let Some((extent, _)) = self.place(block) {
            self.early.entry(extent.chunk).or_insert(self.rank);
        }
    }

    /// A block of data is needed now, if not before.
    fn data(&mut self, block: u32) {
        // What no extent covers is zeros.
        let Some((extent, offset)) = self.place(block) else { return };
        self.hot.found += 1;
        if self.hot.blocks.insert(block, (extent.chunk, offset)).is_none() {
            let chunk = self.hot.chunks.entry(extent.chunk).or_default();
            if chunk.offsets.is_empty() {
                chunk.rank = self.rank;
            }
            chunk.offsets.push(offset);
        }
    }

    /// A block of data may be needed along with others of its chunk.
    fn beside(&mut self, block: u32) {
        let Some((extent, offset)) = self.place(block) else { return };
        // A chunk without anything that is needed is left to be missed.
        if let Some(chunk) = self.hot.chunks.get_mut(&extent.chunk)
            && let Entry::Vacant(free) = self.hot.blocks.entry(block)
        {
            free.insert((extent.chunk, offset));
            chunk.beside.push(offset);
        }
    }

    /// The ordinary extent of a block, and the block's first byte in the chunk.
    fn place(&self, block: u32) -> Option<(Extent, u32)> {
        let extent = self.index.extents().at_or_after(block).filter(|extent| extent.block <= block)?;
        Some((extent, extent.offset + (block - extent.block) * BLOCK))
    }

    /// The chunks in which no file has a block.
    fn metadata_chunks(&self, names: &Names) -> Vec<u32> {
        let mut kinds: BTreeMap<u32, bool> = BTreeMap::new();
        let files: Vec<&Run> = names.runs().iter().filter(|run| names.kind(run.name) == Some(Type::File)).collect();
        for extent in self.index.extents().iter() {
            let next = files.partition_point(|run| run.block + run.blocks <= extent.block);
            let has_file = files.get(next).is_some_and(|run| run.block < extent.block + extent.blocks);
            *kinds.entry(extent.chunk).or_default() |= has_file;
        }
        kinds.into_iter().filter(|(_, has_file)| !has_file).map(|(chunk, _)| chunk).collect()
    }
}

/// Blocks to either side of what a start of another version read of a large file that are hot as well. What a program needs of
/// a new release lies a page or two beside the old places: of node's, python's and redis' hot blocks, with the libraries new
/// as well, 4 to 6% are missed without this, and 0 to 4% with it, in a pack that is a sixth larger.
const BESIDE: u32 = 2;

/// What lies beside a part of a file, each as first block and blocks.
fn sides(runs: &[Run], from: u32, blocks: u32) -> [(u32, u32); 2] {
    let size = runs.last().map_or(0, |run| run.file_block.saturating_add(run.blocks));
    let end = from.saturating_add(blocks);
    // A small file is read whole, or has little to be missed.
    if size <= CHUNK_SIZE / BLOCK || end > size {
        return [(from, 0), (end, 0)];
    }
    let before = BESIDE.min(from);
    [(from - before, before), (end, BESIDE.min(size - end))]
}

/// The device blocks of a file's blocks; `None` for one that the file does not have. `runs` are in the file's order.
fn device_blocks(runs: &[Run], from: u32, blocks: u32) -> impl Iterator<Item = Option<u32>> + '_ {
    let size = runs.last().map_or(0, |run| run.file_block.saturating_add(run.blocks));
    // A hostile profile may name billions.
    let end = from.saturating_add(blocks).min(size.max(from).saturating_add(1));
    (from..end).map(move |wanted| {
        let next = runs.partition_point(|run| run.file_block <= wanted);
        let run = runs.get(next.checked_sub(1)?)?;
        let within = wanted - run.file_block;
        (within < run.blocks).then_some(run.block + within)
    })
}

impl Hot {
    /// Chunks of metadata that the start needs, in that order.
    pub(super) fn needed_metadata(&self) -> impl Iterator<Item = u32> + '_ {
        self.metadata.iter().copied().take(self.needed)
    }

    /// Whether all blocks of a chunk of `plain_len` bytes are hot.
    pub(super) fn is_whole(chunk: &HotChunk, plain_len: u32) -> bool {
        chunk.offsets.is_empty()
            || chunk.offsets.len() as u32 == plain_len.div_ceil(BLOCK)
                && chunk.offsets.iter().all(|offset| offset % BLOCK == 0 && *offset < plain_len)
    }
}

/// For people: how the digests of a profile and a device compare.
pub(super) fn is_same(profile: &Profile, device: &Digest) -> bool {
    profile.recording.device.as_deref() == Some(&device.to_string())
}
