//! The chunks of an image as they lie in its packs.

use std::sync::Arc;

use crate::chunk::ChunkRef;
use crate::index::Index;

/// The chunks of an index in the order of their places: a position is a chunk's number in that order.
pub(super) struct Order {
    index: Arc<Index>,
    /// Numbers of chunks in the index.
    chunks: Vec<u32>,
}

impl Order {
    pub(super) fn new(index: Arc<Index>) -> Self {
        let mut chunks: Vec<u32> = (0..index.chunk_count()).collect();
        chunks.sort_by_key(|&number| index.chunk(number).map(|chunk| (chunk.blob, chunk.offset)));
        Self { index, chunks }
    }

    /// Number of chunks.
    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// The chunk with a number in the index.
    pub(super) fn numbered(&self, number: u32) -> Option<ChunkRef> {
        self.index.chunk(number)
    }

    /// The chunk at a position.
    pub(super) fn get(&self, position: usize) -> Option<ChunkRef> {
        self.index.chunk(*self.chunks.get(position)?)
    }

    /// The chunks from position `from` on.
    pub(super) fn iter_from(&self, from: usize) -> impl Iterator<Item = ChunkRef> + '_ {
        self.chunks.get(from..).unwrap_or_default().iter().filter_map(|&number| self.index.chunk(number))
    }

    /// Stored bytes of the chunks from position `from` to before `to`.
    pub(super) fn bytes(&self, from: usize, to: usize) -> u64 {
        (from..to).filter_map(|at| self.get(at)).map(|chunk| u64::from(chunk.stored_len)).sum()
    }

    /// Position of the first chunk at or behind a place: blob and offset.
    pub(super) fn at(&self, place: (u32, u64)) -> usize {
        let before = |number: &u32| self.index.chunk(*number).is_some_and(|chunk| (chunk.blob, chunk.offset) < place);
        self.chunks.partition_point(before)
    }

    /// Position of a chunk, or of another one at its place.
    pub(super) fn position(&self, chunk: &ChunkRef) -> Option<usize> {
        let position = self.at((chunk.blob, chunk.offset));
        self.get(position).filter(|found| (found.blob, found.offset) == (chunk.blob, chunk.offset)).map(|_| position)
    }
}
