//! Hot chunks of earlier images, kept as they are.
//!
//! Two starts never read the very same blocks, and one block more or less makes another chunk of all of them. So a hot
//! chunk that an earlier version has stays what it is as long as the start needs half of its blocks; what the start needs
//! besides it gets a hot chunk of its own. A node that ran the earlier version then has all but that.
//!
//! Where a profile of an earlier version is applied, these images also say which files changed: of those what lies beside the
//! places in the profile is hot as well.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::hot::Hot;
use crate::chunk::{CHUNK_SIZE, Digest};
use crate::index::{BLOCK, Extent, Index};

/// Most hot blocks of an earlier image that are looked at: 4 GiB, for which this takes 50 MB.
const MAX_BLOCKS: u32 = 1 << 20;
/// Most hot chunks of one ordinary chunk.
const MAX_SHAPES: usize = 64;

/// The hot chunks of earlier images, by the ordinary chunk whose blocks they have.
#[derive(Default)]
pub(super) struct Earlier {
    /// First bytes in the ordinary chunk, in the hot chunk's order.
    shapes: HashMap<Digest, Vec<Vec<u32>>>,
    /// Their ordinary chunks.
    ordinary: HashSet<Digest>,
}

impl Earlier {
    /// Learns the start-up pack of an image.
    pub(super) fn add(&mut self, index: &Index) {
        let mut left = MAX_BLOCKS;
        // By the place in the hot chunk: the ordinary chunk, and the place there.
        let mut parts: HashMap<u32, BTreeMap<u32, (u32, u32)>> = HashMap::new();
        for extent in index.startup_extents().iter() {
            let Some(rest) = left.checked_sub(extent.blocks) else { break };
            left = rest;
            for step in 0..extent.blocks {
                if let Some((chunk, offset)) = place(index, extent.block + step) {
                    parts.entry(extent.chunk).or_default().insert(extent.offset + step * BLOCK, (chunk, offset));
                }
            }
        }
        let ordinary = index.extents().iter().filter_map(|extent| index.chunk(extent.chunk)).map(|chunk| chunk.digest);
        self.ordinary.extend(ordinary);
        for number in index.startup_order() {
            let Some(hot) = index.chunk(number) else { continue };
            let blocks = || (0..hot.plain_len).step_by(BLOCK as usize);
            let (of, shape) = match parts.get(&number) {
                // Hot as a whole.
                None if self.ordinary.contains(&hot.digest) => (hot.digest, blocks().collect()),
                None => continue,
                Some(parts) => {
                    // All of its blocks are known, and of one chunk.
                    let Some(&(of, _)) = parts.values().next() else { continue };
                    let known = parts.keys().copied().eq(blocks()) && parts.values().all(|(chunk, _)| *chunk == of);
                    let Some(of) = index.chunk(of).filter(|_| known) else { continue };
                    (of.digest, parts.values().map(|(_, offset)| *offset).collect::<Vec<u32>>())
                }
            };
            let shapes = self.shapes.entry(of).or_default();
            if shapes.len() < MAX_SHAPES && hot.plain_len <= CHUNK_SIZE && !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
    }

    /// Gives the hot parts of `index`'s chunks the shapes that they have in earlier images.
    pub(super) fn keep(&self, hot: &mut Hot, index: &Index) {
        // The ordinary extents that hot blocks are in, by chunk.
        let mut extents: HashMap<u32, Vec<Extent>> = HashMap::new();
        for (&block, (chunk, _)) in &hot.blocks {
            let Some(extent) = index.extents().at_or_after(block) else { continue };
            let known = extents.entry(*chunk).or_default();
            if known.last() != Some(&extent) {
                known.push(extent);
            }
        }
        for (&number, chunk) in &mut hot.chunks {
            let Some(ordinary) = index.chunk(number) else { continue };
            // What did not change is read as it was. Without an earlier version nobody knows what did.
            if self.ordinary.is_empty() || self.ordinary.contains(&ordinary.digest) {
                chunk.beside.clear();
            }
            let shapes = self.shapes.get(&ordinary.digest).map(Vec::as_slice).unwrap_or_default();
            let mut wanted: HashSet<u32> = chunk.offsets.iter().copied().collect();
            for shape in shapes {
                let used = shape.iter().filter(|offset| wanted.contains(offset)).count();
                if used == 0 || used * 2 < shape.len() || shape.iter().any(|offset| *offset >= ordinary.plain_len) {
                    continue;
                }
                let is_whole = shape.len() as u32 == ordinary.plain_len.div_ceil(BLOCK);
                if is_whole {
                    (chunk.offsets, chunk.kept) = (shape.clone(), Vec::new());
                    break;
                }
                shape.iter().for_each(|offset| _ = wanted.remove(offset));
                // What nobody asked for is read from it as well, and the next version learns its shape.
                for extent in extents.get(&number).into_iter().flatten() {
                    for offset in shape {
                        if let Some(within) = offset.checked_sub(extent.offset).map(|bytes| bytes / BLOCK)
                            && within < extent.blocks
                        {
                            hot.blocks.entry(extent.block + within).or_insert((number, *offset));
                        }
                    }
                }
                chunk.kept.push(shape.clone());
            }
        }
    }
}

/// The ordinary chunk of a block, and the block's first byte there.
fn place(index: &Index, block: u32) -> Option<(u32, u32)> {
    let extent = index.extents().at_or_after(block).filter(|extent| extent.block <= block)?;
    Some((extent.chunk, extent.offset + (block - extent.block) * BLOCK))
}
