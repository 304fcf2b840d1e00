//! Which blocks become which new chunks; what is free, and what stays as the parent has it.
//!
//! A large file's chunk is new when one of its blocks changed. Small files are grouped by directory as the builder groups
//! them, but only those that changed and those whose chunk is small. What belongs to no file — the file system's own
//! blocks, or everything where there is no file system to be looked into — goes by windows of a chunk's size, aligned on
//! the device. So a block is in one chunk, and there are never more chunks than a build of the same tree would have and
//! one for each [`SMALL`] bytes of a directory.
//!
//! This decides about sharing and size only: whatever a file system claims, the new image has the device's bytes, and
//! holes where it says twice that nobody has a block: in a bitmap with the right checksum, and by no file having it.

use std::ops::Range;

use super::files::{Files, Parts};
use super::ranges::Ranges;
use crate::build::intake::{CHUNK_BLOCKS, LARGE};
use crate::index::{BLOCK, Index};

/// Chunks of small files with fewer plain bytes are formed anew when a file of their directory changes.
const SMALL: u32 = LARGE as u32;
/// A chunk that was touched and of which less than one part in so many is left is given up.
const DECAYED: u64 = 4;
/// How often what is left of given up chunks may lead to more of them.
const ROUNDS: usize = 3;

/// A chunk to form: its blocks one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NewChunk {
    pub parts: Parts,
    pub zeros: Zeros,
}

/// What becomes of long runs of zeros in a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    /// They stay: the chunk is to be the same wherever the file is.
    Kept,
    /// They become holes.
    LeftOut,
}

/// What is to be done.
pub(super) struct Plan {
    pub chunks: Vec<NewChunk>,
    /// Blocks that the parent's extents do not back any more: new ones, and free ones.
    pub replaced: Ranges,
}

/// What is known of a device.
pub(super) struct Knowledge<'a> {
    /// The parent's.
    pub index: &'a Index,
    /// `None` where no file system could be looked into.
    pub files: Option<Files<'a>>,
    /// Blocks that nobody has.
    pub free: Ranges,
    pub device_blocks: u32,
}

/// Plans the chunks for the blocks that changed.
pub(super) fn plan(changed: Ranges, knowledge: &Knowledge<'_>) -> Plan {
    let mut changed = changed;
    let mut plan = once(&changed, knowledge);
    for _ in 1..ROUNDS {
        let left = decayed(knowledge.index, &plan.replaced);
        if left.is_empty() {
            break;
        }
        changed = changed.with(&left);
        plan = once(&changed, knowledge);
    }
    plan
}

fn once(changed: &Ranges, knowledge: &Knowledge<'_>) -> Plan {
    let live = changed.without(&knowledge.free);
    let mut chunks = Vec::new();
    let rest = match &knowledge.files {
        None => live,
        Some(files) => {
            file_chunks(&live, files, knowledge.index, &mut chunks);
            live.without(files.blocks())
        }
    };
    let zeros = if knowledge.files.is_some() { Zeros::LeftOut } else { Zeros::Kept };
    let mut last = None;
    for window in rest.iter().flat_map(|range| range.start / CHUNK_BLOCKS..(range.end - 1) / CHUNK_BLOCKS + 1) {
        // Ranges that do not touch may still meet one window.
        if last.replace(window) == Some(window) {
            continue;
        }
        let start = window * CHUNK_BLOCKS;
        let whole = start..start.saturating_add(CHUNK_BLOCKS).min(knowledge.device_blocks);
        let used = knowledge.free.outside(&whole);
        let parts: Parts = match &knowledge.files {
            None => used.map(|range| (range.start, range.end - range.start)).collect(),
            Some(files) => {
                let own = used.flat_map(|range| files.blocks().outside(&range).collect::<Vec<_>>());
                own.map(|range| (range.start, range.end - range.start)).collect()
            }
        };
        chunks.push(NewChunk { parts, zeros });
    }
    let new = chunks.iter().flat_map(|chunk| &chunk.parts).map(|(block, blocks)| *block..block + blocks).collect();
    let replaced = Ranges::new(new).with(&knowledge.free);
    Plan { chunks, replaced }
}

/// The chunks of files that changed, in path order: of each directory the small files, then the large ones, then what is
/// below it.
fn file_chunks(changed: &Ranges, files: &Files<'_>, index: &Index, chunks: &mut Vec<NewChunk>) {
    let mut wanted = files.touched(changed);
    let mut beside: Vec<usize> = Vec::new();
    for number in &wanted {
        if files.get(*number).is_some_and(|file| !file.is_large) {
            beside.extend(files.beside(*number));
        }
    }
    beside.sort_unstable();
    beside.dedup();
    beside.retain(|number| wanted.binary_search(number).is_err() && is_in_small_chunk(files, *number, index));
    wanted.extend(beside);
    let names = files.names();
    let mut ordered: Vec<_> = wanted
        .into_iter()
        .filter_map(|number| {
            let file = files.get(number)?;
            let path = names.path(file.name);
            let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            let (directory, name) = path.split_at(end);
            // Names have no zero byte: so a directory comes before everything that is below it.
            let directory: Vec<u8> = directory.iter().map(|byte| if *byte == b'/' { 0 } else { *byte }).collect();
            Some((directory, file.is_large, name.to_vec(), number))
        })
        .collect();
    ordered.sort_unstable();
    let mut group: Option<(Vec<u8>, Parts)> = None;
    for (directory, is_large, _, number) in ordered {
        let Some(file) = files.get(number) else { continue };
        if is_large {
            close(&mut group, chunks);
            let is_changed =
                |piece: &Parts| piece.iter().any(|(block, blocks)| changed.meets(&(*block..block + blocks)));
            chunks.extend(
                file.pieces().into_iter().filter(is_changed).map(|parts| NewChunk { parts, zeros: Zeros::Kept }),
            );
            continue;
        }
        let parts = file.parts();
        let blocks = |parts: &Parts| parts.iter().map(|(_, blocks)| blocks).sum::<u32>();
        let fits =
            |(other, used): &(Vec<u8>, Parts)| *other == directory && blocks(used) + blocks(&parts) <= CHUNK_BLOCKS;
        match group.as_mut().filter(|group| fits(group)) {
            Some((_, used)) => used.extend(parts),
            None => {
                close(&mut group, chunks);
                group = Some((directory, parts));
            }
        }
    }
    close(&mut group, chunks);
}

fn close(group: &mut Option<(Vec<u8>, Parts)>, chunks: &mut Vec<NewChunk>) {
    chunks.extend(group.take().map(|(_, parts)| NewChunk { parts, zeros: Zeros::Kept }));
}

fn is_in_small_chunk(files: &Files<'_>, number: usize, index: &Index) -> bool {
    let block = files.get(number).and_then(|file| file.parts().first().map(|(block, _)| *block));
    let extent = block.and_then(|block| index.extents().at_or_after(block).filter(|extent| extent.block <= block));
    extent.and_then(|extent| index.chunk(extent.chunk)).is_some_and(|chunk| chunk.plain_len < SMALL)
}

/// What is left of chunks that lost most of their blocks just now.
fn decayed(index: &Index, replaced: &Ranges) -> Ranges {
    let mut counts = vec![(0u64, 0u64); index.chunk_count() as usize];
    let blocks = |ranges: &mut dyn Iterator<Item = Range<u32>>| {
        ranges.map(|range| u64::from(range.end - range.start)).sum::<u64>()
    };
    for extent in index.extents().iter() {
        let whole = extent.block..extent.block + extent.blocks;
        let left = blocks(&mut replaced.outside(&whole));
        if let Some((lost, alive)) = counts.get_mut(extent.chunk as usize) {
            *lost += u64::from(extent.blocks) - left;
            *alive += left;
        }
    }
    let is_decayed = |chunk: u32| {
        let plain = index.chunk(chunk).map_or(0, |chunk| u64::from(chunk.plain_len.div_ceil(BLOCK)));
        counts.get(chunk as usize).is_some_and(|(lost, alive)| *lost > 0 && *alive > 0 && alive * DECAYED < plain)
    };
    let extents = index.extents().iter().filter(|extent| is_decayed(extent.chunk));
    Ranges::new(
        extents
            .flat_map(|extent| replaced.outside(&(extent.block..extent.block + extent.blocks)).collect::<Vec<_>>())
            .collect(),
    )
}
