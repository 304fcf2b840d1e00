//! The map: device ranges to extents, in memory.
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use crate::index::{BLOCK, Extent, Index};

/// What backs a piece of a device range. Lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// `len` zeros, stored nowhere.
    Zero {
        /// Length in bytes.
        len: u64,
    },
    /// `len` bytes of the plain chunk with number `chunk`, from `skip` on.
    Chunk {
        /// Number of the chunk in the index.
        chunk: u32,
        /// First byte in the plain chunk.
        skip: u32,
        /// Length in bytes.
        len: u32,
    },
}

impl Piece {
    /// Length in bytes, at least 1.
    #[must_use]
    pub fn len(&self) -> u64 {
        match *self {
            Self::Zero { len } => len,
            Self::Chunk { len, .. } => u64::from(len),
        }
    }

    /// Never true: a cover has no empty pieces.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Finds what backs a device range.
#[derive(Clone, Debug)]
pub struct Map {
    index: Arc<Index>,
}

impl Map {
    /// A map over a valid index.
    #[must_use]
    pub fn new(index: Arc<Index>) -> Self {
        Self { index }
    }

    /// The index that the map was made from.
    #[must_use]
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// The pieces that make up `len` bytes from `offset`, in order and without gaps.
    ///
    /// What lies behind the end of the device is zeros; devices refuse such ranges before they ask.
    #[must_use]
    pub fn cover(&self, offset: u64, len: u64) -> Cover<'_> {
        Cover { index: &self.index, at: offset, end: offset.saturating_add(len) }
    }
}

/// Iterator over the pieces of a range.
#[derive(Debug)]
pub struct Cover<'a> {
    index: &'a Index,
    at: u64,
    end: u64,
}

impl Iterator for Cover<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.at >= self.end {
            return None;
        }
        let piece = match u32::try_from(self.at / u64::from(BLOCK)) {
            Ok(block) => self.piece(block),
            Err(_) => Piece::Zero { len: self.end - self.at },
        };
        self.at += piece.len();
        Some(piece)
    }
}

impl Cover<'_> {
    /// The piece at `self.at`, which is in `block`. A start-up extent wins over an ordinary one.
    fn piece(&self, block: u32) -> Piece {
        let mut end = self.end;
        for table in [self.index.startup_extents(), self.index.extents()] {
            match table.at_or_after(block) {
                Some(extent) if extent.block <= block => return self.within(&extent, end),
                Some(extent) => end = end.min(u64::from(extent.block) * u64::from(BLOCK)),
                None => {}
            }
        }
        Piece::Zero { len: end - self.at }
    }

    /// The part of `extent` from `self.at` to `end`; behind the chunk's plain bytes the extent is zeros.
    fn within(&self, extent: &Extent, end: u64) -> Piece {
        let start = u64::from(extent.block) * u64::from(BLOCK);
        let end = end.min(start + u64::from(extent.blocks) * u64::from(BLOCK));
        let skip = u64::from(extent.offset) + (self.at - start);
        let plain = self.index.chunk(extent.chunk).map_or(0, |chunk| u64::from(chunk.plain_len));
        let len = (end - self.at).min(plain.saturating_sub(skip));
        match (u32::try_from(skip), u32::try_from(len)) {
            (Ok(skip), Ok(len)) if len > 0 => Piece::Chunk { chunk: extent.chunk, skip, len },
            _ => Piece::Zero { len: end - self.at },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::chunk::{ChunkRef, Codec, Digest};
    use crate::index::{Blob, IndexWriter, Role};

    fn map() -> Map {
        let mut writer = IndexWriter::new();
        let blob = writer.blob(&Blob { digest: Digest::of(b"blob"), bytes: 1 << 20, role: Role::Pack });
        let mut chunk = |plain_len| {
            let digest = Digest::of(b"chunk");
            writer.chunk(&ChunkRef { digest, blob, offset: 0, stored_len: 10, plain_len, codec: Codec::Zstd })
        };
        let (long, short, hot) = (chunk(16384), chunk(5000), chunk(4096));
        writer.extent(Extent { block: 1, blocks: 4, chunk: long, offset: 0 });
        writer.extent(Extent { block: 8, blocks: 2, chunk: short, offset: 0 });
        writer.startup_extent(Extent { block: 2, blocks: 1, chunk: hot, offset: 0 });
        writer.startup_order(hot);
        Map::new(Arc::new(Index::from_bytes(writer.finish(1 << 20, "ext4").unwrap()).unwrap()))
    }

    #[test]
    fn a_cover_has_zeros_start_up_extents_and_tails() {
        let pieces: Vec<_> = map().cover(0, 12 * 4096).collect();
        assert_eq!(
            pieces,
            [
                Piece::Zero { len: 4096 },
                Piece::Chunk { chunk: 0, skip: 0, len: 4096 },
                Piece::Chunk { chunk: 2, skip: 0, len: 4096 },
                Piece::Chunk { chunk: 0, skip: 8192, len: 8192 },
                Piece::Zero { len: 3 * 4096 },
                Piece::Chunk { chunk: 1, skip: 0, len: 5000 },
                Piece::Zero { len: 8192 - 5000 },
                Piece::Zero { len: 8192 },
            ]
        );
    }

    #[test]
    fn every_byte_of_a_cover_is_the_byte_of_the_whole() {
        let map = map();
        let byte = |offset| match map.cover(offset, 1).next().unwrap() {
            Piece::Zero { .. } => None,
            Piece::Chunk { chunk, skip, .. } => Some((chunk, skip)),
        };
        for (offset, len) in [(0, 1), (4095, 2), (8191, 4098), (36863, 7), (37000, 800), (45055, 3)] {
            let mut at = offset;
            for piece in map.cover(offset, len) {
                for step in [0, piece.len() - 1] {
                    let expected = match piece {
                        Piece::Zero { .. } => None,
                        Piece::Chunk { chunk, skip, .. } => Some((chunk, skip + step as u32)),
                    };
                    assert_eq!(byte(at + step), expected, "offset {offset} len {len}");
                }
                at += piece.len();
            }
            assert_eq!(at, offset + len);
        }
    }

    #[test]
    fn the_end_of_the_address_space_does_not_overflow() {
        let pieces: Vec<_> = map().cover(u64::MAX - 10, 100).collect();
        assert_eq!(pieces, [Piece::Zero { len: 10 }]);
    }
}
