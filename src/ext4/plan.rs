//! Where everything goes: from a tree to block numbers.

use std::collections::HashMap;
use std::ops::Range;

use sha2::{Digest as _, Sha256};

use super::dir::Shape;
use super::extent::{self, IN_INODE};
use super::group::{Geometry, Needs};
use super::inode::{self, SHORT_TARGET};
use super::layout::{BLOCK_SIZE, FIRST_INODE, LINK_MAX, ROOT_INODE};
use super::superblock::Names;
use super::tree::{Inode, InodeId, Kind, Segment, Time, Tree};
use super::walk::{UNNAMED, Walk, refuse, walk};
use super::xattr::{MAX_REFERENCES, Xattrs};
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
    /// The inodes that are read first, hottest first: their numbers and blocks come first. It need not name all.
    pub hot: Vec<InodeId>,
    /// The order of the files' data. Files that it does not name follow in tree order. What it names twice counts once,
    /// and what has no data or is not in a directory counts not at all.
    pub data_order: Vec<InodeId>,
    /// The data area starts at a multiple of this many blocks: 64 for chunks of 256 KiB, at most [`ALIGN_MAX`].
    pub data_align_blocks: u32,
}

/// Largest alignment of the data area in blocks, 1 GiB. What is left out for it is in the device's groups, and so costs
/// time and metadata.
pub const ALIGN_MAX: u32 = 1 << 18;

impl Default for Options {
    fn default() -> Self {
        Self { seed: [0; 32], size: None, time: None, hot: Vec::new(), data_order: Vec::new(), data_align_blocks: 64 }
    }
}

/// A file system of which every block has its place.
#[derive(Debug)]
pub struct Plan {
    pub(super) geometry: Geometry,
    pub(super) names: Names,
    pub(super) time: Time,
    /// By [`InodeId`].
    pub(super) places: Vec<Place>,
    /// The inodes by number, from [`FIRST_INODE`] on; the root is not among them.
    pub(super) numbered: Vec<InodeId>,
    /// The named inodes in the order of their blocks, and how many of them are in front of the inode tables.
    pub(super) block_order: Vec<InodeId>,
    pub(super) hot_count: usize,
    pub(super) xattr_blocks: Vec<XattrBlock>,
    data_blocks: u32,
}

/// What was decided for an inode.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// The inode's number, or 0 for one that no directory names.
    pub number: u32,
    pub links: u32,
    pub parent: InodeId,
    /// The first block of its data.
    pub data: u32,
    /// The blocks of its own metadata: of a directory, a long link or an extent tree.
    pub blocks: u32,
    pub start: u32,
    /// Which attribute block, or [`NO_XATTRS`].
    pub xattrs: u32,
}

pub(super) const NO_XATTRS: u32 = u32::MAX;

/// An attribute block, which inodes with equal attributes share.
#[derive(Debug)]
pub(super) struct XattrBlock {
    pub owner: InodeId,
    pub references: u32,
    pub start: u32,
}

/// Decides the place of everything in `tree`.
///
/// # Errors
///
/// What ext4 cannot hold, with the path of the inode it is about.
pub fn plan(tree: &Tree, options: &Options) -> Result<Plan> {
    if !(1..=ALIGN_MAX).contains(&options.data_align_blocks) {
        let reason =
            format!("data can't be aligned to {} blocks: 1 to {ALIGN_MAX} are possible", options.data_align_blocks);
        return Err(Error::invalid("ext4 options", reason));
    }
    let Walk { order, links, parents } = walk(tree)?;
    let names = Names::from_seed(&options.seed);
    let mut places: Vec<Place> = links
        .into_iter()
        .zip(parents)
        .map(|(links, parent)| Place { number: 0, links, parent, data: 0, blocks: 0, start: 0, xattrs: NO_XATTRS })
        .collect();

    let hot = unique(&options.hot, &places, |id| id != tree.root())?;
    let numbered = number(tree, &hot, &order, &mut places)?;
    let block_order = first_these([tree.root()].iter().chain(&hot), &numbered, places.len());
    let hot_count = hot.len() + 1;

    let mut sizes =
        Sizes { tree, names: &names, places: &mut places, xattr_blocks: Vec::new(), shared: HashMap::new() };
    let (hot_order, cold_order) = block_order.split_at_checked(hot_count).unwrap_or((&block_order, &[]));
    let hot_blocks = sizes.measure(hot_order)?;
    let cold_blocks = sizes.measure(cold_order)?;
    let mut xattr_blocks = sizes.xattr_blocks;
    let data_order = data_order(tree, options, &order, &places)?;
    let data: u64 = data_order.iter().map(|id| data_blocks(tree, *id)).sum();

    let needs = Needs {
        hot: hot_blocks,
        cold: cold_blocks,
        data,
        inodes: FIRST_INODE - 1 + numbered.len() as u32,
        align: options.data_align_blocks,
    };
    let geometry = Geometry::new(needs, options.size)?;
    // The geometry has room for all of it, so none of these positions overflows.
    let mut at = geometry.data_start;
    for id in &data_order {
        if let Some(place) = places.get_mut(id.0 as usize) {
            place.data = at;
            at = at.wrapping_add(data_blocks(tree, *id) as u32);
        }
    }
    place_blocks(hot_order, geometry.hot_start, &mut places, &mut xattr_blocks);
    place_blocks(cold_order, geometry.cold_start, &mut places, &mut xattr_blocks);

    let newest = || {
        let all = block_order.iter().filter_map(|id| tree.get(*id));
        all.map(|inode| inode.mtime).max().unwrap_or_default()
    };
    let time = options.time.unwrap_or_else(newest);
    Ok(Plan { geometry, names, time, places, numbered, block_order, hot_count, xattr_blocks, data_blocks: data as u32 })
}

/// The named inodes among `ids`, each once.
fn unique(ids: &[InodeId], places: &[Place], wanted: impl Fn(InodeId) -> bool) -> Result<Vec<InodeId>> {
    let mut seen = vec![false; places.len()];
    let mut unique = Vec::new();
    for id in ids {
        let (Some(place), Some(seen)) = (places.get(id.0 as usize), seen.get_mut(id.0 as usize)) else {
            return Err(Error::invalid("file system", format!("inode {} is not in the tree", id.0)));
        };
        if place.links != UNNAMED && wanted(*id) && !std::mem::replace(seen, true) {
            unique.push(*id);
        }
    }
    Ok(unique)
}

/// `first`, which has nothing twice, and then the others of `all`; both are ids below `count`.
fn first_these<'a>(first: impl Iterator<Item = &'a InodeId>, all: &'a [InodeId], count: usize) -> Vec<InodeId> {
    let mut seen = vec![false; count];
    let mut order = Vec::with_capacity(all.len() + 1);
    for id in first.chain(all) {
        if seen.get_mut(id.0 as usize).is_some_and(|seen| !std::mem::replace(seen, true)) {
            order.push(*id);
        }
    }
    order
}

/// Numbers the inodes: hot directories, other hot inodes, then the rest in tree order.
fn number(tree: &Tree, hot: &[InodeId], order: &[InodeId], places: &mut [Place]) -> Result<Vec<InodeId>> {
    let is_dir = |id: &InodeId| matches!(tree.get(*id), Some(Inode { kind: Kind::Directory(_), .. }));
    let hot_first = hot.iter().filter(|id| is_dir(id)).chain(hot.iter().filter(|id| !is_dir(id)));
    let numbered = first_these(hot_first, order, places.len());
    let too_many = || Error::invalid("file system", "it has more inodes than ext4 can hold");
    let last =
        u32::try_from(numbered.len()).ok().and_then(|count| count.checked_add(FIRST_INODE)).ok_or_else(too_many)?;
    let root = (&tree.root(), ROOT_INODE);
    for (id, number) in numbered.iter().zip(FIRST_INODE..last).chain([root]) {
        if let Some(place) = places.get_mut(id.0 as usize) {
            place.number = number;
        }
    }
    Ok(numbered)
}

/// The files that have data, in its order.
fn data_order(tree: &Tree, options: &Options, order: &[InodeId], places: &[Place]) -> Result<Vec<InodeId>> {
    let first = unique(&options.data_order, places, |_| true)?;
    let mut all = first_these(first.iter(), order, places.len());
    all.retain(|id| data_blocks(tree, *id) > 0);
    Ok(all)
}

/// How many blocks of data an inode has.
fn data_blocks(tree: &Tree, id: InodeId) -> u64 {
    match tree.get(id) {
        Some(Inode { kind: Kind::File { segments, .. }, .. }) => {
            segments.iter().map(|segment| u64::from(segment.blocks)).sum()
        }
        _ => 0,
    }
}

/// Gives each inode's blocks, and then its attribute block if it is the first to have it, the next position.
fn place_blocks(order: &[InodeId], start: u32, places: &mut [Place], xattr_blocks: &mut [XattrBlock]) {
    let mut at = start;
    for id in order {
        let Some(place) = places.get_mut(id.0 as usize) else { continue };
        place.start = at;
        at = at.wrapping_add(place.blocks);
        if let Some(block) = xattr_blocks.get_mut(place.xattrs as usize).filter(|block| block.owner == *id) {
            block.start = at;
            at = at.wrapping_add(1);
        }
    }
}

/// Checks inodes, and finds out how many blocks each needs.
struct Sizes<'a> {
    tree: &'a Tree,
    names: &'a Names,
    places: &'a mut [Place],
    xattr_blocks: Vec<XattrBlock>,
    shared: HashMap<[u8; 32], u32>,
}

impl Sizes<'_> {
    /// How many blocks these inodes need, file data not counted.
    fn measure(&mut self, ids: &[InodeId]) -> Result<u64> {
        let mut sum = 0;
        for id in ids {
            let inode = self.tree.inode(*id)?;
            let refuse = |reason: String| refuse(self.tree, *id, &reason);
            inode::check(inode).map_err(refuse)?;
            let blocks = own_blocks(inode, self.names).map_err(refuse)?;
            let xattr_block = Xattrs::of(inode).map_err(refuse)?.block();
            let Some(place) = self.places.get_mut(id.0 as usize) else { continue };
            if place.links > LINK_MAX && !matches!(inode.kind, Kind::Directory(_)) {
                return Err(refuse(format!("it has {} links; ext4 holds at most {LINK_MAX}", place.links)));
            }
            place.blocks = blocks;
            sum += u64::from(blocks);
            if let Some(block) = xattr_block {
                let new = self.xattr_blocks.len() as u32;
                let number = self.shared.entry(Sha256::digest(&block[..]).into()).or_insert(new);
                match self.xattr_blocks.get_mut(*number as usize) {
                    Some(block) if block.references < MAX_REFERENCES => block.references += 1,
                    _ => {
                        *number = new;
                        self.xattr_blocks.push(XattrBlock { owner: *id, references: 1, start: 0 });
                        sum += 1;
                    }
                }
                place.xattrs = *number;
            }
        }
        Ok(sum)
    }
}

/// How many blocks of metadata an inode has, attributes not counted.
fn own_blocks(inode: &Inode, names: &Names) -> Result<u32, String> {
    match &inode.kind {
        Kind::Directory(entries) => {
            let blocks = Shape::of(entries, &names.hash_seed)?.blocks();
            let most = IN_INODE as u32 * extent::MAX_LENGTH;
            if blocks > most {
                return Err(format!("it is a directory of {blocks} blocks; at most {most} are supported"));
            }
            Ok(blocks)
        }
        Kind::Symlink(target) => Ok(u32::from(target.len() > SHORT_TARGET)),
        Kind::File { size, segments } => {
            check_segments(*size, segments)?;
            extent::tree_blocks(extent::runs(segments, 0).count()).map_err(|error| error.to_string())
        }
        Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo | Kind::Socket => Ok(0),
    }
}

/// Segments must be ascending and end with the file.
fn check_segments(size: u64, segments: &[Segment]) -> Result<(), String> {
    let blocks = size.div_ceil(BLOCK_SIZE as u64);
    if blocks > u64::from(u32::MAX) {
        return Err(format!("it has {size} bytes; ext4 holds less than 16 TiB"));
    }
    let mut end = 0;
    for segment in segments {
        let start = u64::from(segment.file_block);
        if segment.blocks == 0 || start < end {
            return Err(format!("its segment at block {start} is empty, or not behind the one before"));
        }
        end = start + u64::from(segment.blocks);
    }
    if end > blocks { Err(format!("its data ends at block {end}, behind its end at {blocks}")) } else { Ok(()) }
}

impl Plan {
    /// The size of the device in bytes, free space included.
    #[must_use]
    pub fn device_bytes(&self) -> u64 {
        u64::from(self.geometry.blocks) * BLOCK_SIZE as u64
    }

    /// How many blocks of the device are in use: metadata, tables and data.
    #[must_use]
    pub fn used_blocks(&self) -> u64 {
        u64::from(self.geometry.blocks) - u64::from(self.geometry.free_blocks())
    }

    /// How many inodes are in use, those that ext4 reserves not counted.
    #[must_use]
    pub fn inodes(&self) -> u32 {
        self.numbered.len() as u32 + 1
    }

    /// How many blocks at the start of the device may hold metadata: [`Plan::write_metadata`] emits none behind them.
    #[must_use]
    pub fn metadata_blocks(&self) -> u32 {
        self.geometry.metadata_end
    }

    /// The device blocks of all file data, without a gap; the start is aligned as the options say.
    #[must_use]
    pub fn data_blocks(&self) -> Range<u32> {
        let start = self.geometry.data_start;
        start..start.saturating_add(self.data_blocks)
    }

    /// The number that the inode got in the file system, if a directory names it.
    #[must_use]
    pub fn inode_number(&self, id: InodeId) -> Option<u32> {
        self.places.get(id.0 as usize).map(|place| place.number).filter(|number| *number != 0)
    }

    /// The device block where the data of a file starts, if it has any.
    ///
    /// All segments of the file follow each other there without their holes, and directly behind its last block come
    /// the segments of the next file that has data, in the order of [`Options::data_order`]: neighbours there are one
    /// contiguous range of the device. Data never shares a block with anything else.
    #[must_use]
    pub fn data_start(&self, id: InodeId) -> Option<u32> {
        self.places.get(id.0 as usize).map(|place| place.data).filter(|start| *start != 0)
    }
}
