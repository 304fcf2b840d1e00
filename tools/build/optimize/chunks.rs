//! Hot chunks: the hot blocks of one ordinary chunk, one after another.
//!
//! An ordinary chunk is a piece of one file, or the small files of one directory. So its hot blocks are the same in every
//! image that has the file and starts alike, whatever else changed: two versions share most of them. In the pack they
//! follow each other in the order of first touch. A chunk that is hot as a whole stays the chunk that it is.

use std::collections::HashMap;

use super::hot::{Hot, HotChunk};
use crate::build::pipeline::{Outcome, Pipeline, Store};
use crate::chunk::{CHUNK_SIZE, Verified, is_zero};
use crate::error::{Error, Result};
use crate::index::{BLOCK, Extent, Index};

/// Blocks of a hot chunk.
const CHUNK_BLOCKS: usize = (CHUNK_SIZE / BLOCK) as usize;

/// Hot chunks that are being compressed.
pub(super) struct Formed {
    /// By job, in the order of the stream.
    jobs: u32,
    /// Where a hot block is: job and first byte, by chunk and first byte there. Chunks that are hot as a whole need none.
    places: HashMap<(u32, u32), (u32, u32)>,
    /// The jobs of chunks that are hot as a whole.
    wholes: HashMap<u32, u32>,
}

/// Submits the hot chunks of `index` to `pipeline` in the order of the stream; `read` gives a chunk's plain bytes.
pub(super) fn form(
    hot: &Hot,
    index: &Index,
    pipeline: &mut Pipeline,
    mut read: impl FnMut(u32) -> Result<std::sync::Arc<Verified>>,
) -> Result<Formed> {
    let mut order: Vec<(&u32, &HotChunk)> = hot.chunks.iter().collect();
    order.sort_unstable_by_key(|(number, chunk)| (chunk.rank, **number));
    let mut formed = Formed { jobs: 0, places: HashMap::new(), wholes: HashMap::new() };
    for (&number, chunk) in order {
        let plain_len = index.chunk(number).map_or(0, |chunk| chunk.plain_len);
        let content = read(number)?;
        let plain = content.bytes();
        if chunk.kept.is_empty() && Hot::is_whole(chunk, plain_len) && plain_len <= CHUNK_SIZE {
            let job = formed.submit(pipeline, &[plain])?;
            formed.wholes.insert(number, job);
            continue;
        }
        let mut offsets = chunk.offsets.clone();
        if offsets.is_empty() {
            offsets.extend((0..plain_len).step_by(BLOCK as usize));
        }
        offsets.sort_unstable();
        offsets.dedup();
        let block = |offset: u32| {
            let end = plain.len().min(offset as usize + BLOCK as usize);
            plain.get(offset as usize..end).unwrap_or_default()
        };
        for shape in &chunk.kept {
            let blocks: Vec<&[u8]> = shape.iter().map(|offset| block(*offset)).collect();
            let job = formed.submit(pipeline, &blocks)?;
            for (position, offset) in shape.iter().enumerate() {
                formed.places.insert((number, *offset), (job, position as u32 * BLOCK));
            }
        }
        let mut beside = chunk.beside.clone();
        beside.sort_unstable();
        beside.dedup();
        for list in [&mut offsets, &mut beside] {
            list.retain(|offset| !formed.places.contains_key(&(number, *offset)));
        }
        for group in offsets.chunks(CHUNK_BLOCKS - 1).chain(beside.chunks(CHUNK_BLOCKS - 1)) {
            let mut blocks: Vec<&[u8]> = group.iter().map(|offset| block(*offset)).collect();
            if blocks.iter().all(|block| is_zero(block)) {
                // Zeros alone are no chunk: one of its blocks that are not goes along.
                let all = (0..plain_len).step_by(BLOCK as usize).map(block);
                blocks.extend(all.into_iter().find(|block| !is_zero(block)));
            }
            let job = formed.submit(pipeline, &blocks)?;
            for (position, offset) in group.iter().enumerate() {
                formed.places.insert((number, *offset), (job, position as u32 * BLOCK));
            }
        }
    }
    Ok(formed)
}

impl Formed {
    /// Submits the next chunk: blocks filled up to their size, unless there is one part alone.
    fn submit(&mut self, pipeline: &mut Pipeline, parts: &[&[u8]]) -> Result<u32> {
        let mut buffer = pipeline.buffer()?;
        let mut used = 0;
        for part in parts {
            let end = used + part.len();
            let Some(place) = buffer.get_mut(used..end) else {
                return Err(Error::invalid("optimize", "a hot chunk is too long"));
            };
            place.copy_from_slice(part);
            used = if parts.len() == 1 { end } else { end.next_multiple_of(BLOCK as usize) };
            buffer.get_mut(end..used).unwrap_or_default().fill(0);
        }
        self.jobs += 1;
        pipeline.submit(buffer, used)
    }

    /// The stored hot chunk that has the block at `place`: ordinary chunk and first byte there.
    pub(super) fn chunk(&self, place: (u32, u32), store: &Store) -> Result<Option<u32>> {
        let job = self.places.get(&place).map(|(job, _)| job).or_else(|| self.wholes.get(&place.0));
        let outcome = job.map(|job| store.outcome(*job)).transpose()?;
        Ok(outcome.and_then(|outcome| match outcome {
            Outcome::Chunk(chunk) => Some(chunk),
            _ => None,
        }))
    }

    /// The numbers of the stored hot chunks in the order of the stream, each once.
    pub(super) fn order(&self, store: &Store) -> Result<Vec<u32>> {
        let mut seen = vec![false; store.len()];
        let mut order = Vec::new();
        for job in 0..self.jobs {
            if let Outcome::Chunk(chunk) = store.outcome(job)?
                && seen.get_mut(chunk as usize).is_some_and(|seen| !std::mem::replace(seen, true))
            {
                order.push(chunk);
            }
        }
        Ok(order)
    }

    /// The start-up extents, with numbers of stored chunks.
    pub(super) fn extents(&self, hot: &Hot, store: &Store) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        for (&block, place) in &hot.blocks {
            let Some(&(job, offset)) = self.places.get(place) else { continue };
            let Outcome::Chunk(chunk) = store.outcome(job)? else { continue };
            match extents.last_mut() {
                Some(last)
                    if last.chunk == chunk
                        && last.block + last.blocks == block
                        && last.offset + last.blocks * BLOCK == offset =>
                {
                    last.blocks += 1;
                }
                _ => extents.push(Extent { block, blocks: 1, chunk, offset }),
            }
        }
        Ok(extents)
    }
}
