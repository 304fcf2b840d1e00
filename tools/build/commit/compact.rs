//! Which packs of the parent are written anew, so that chains of commits stay short.

use std::collections::HashSet;

use super::ranges::Ranges;
use crate::build::reuse::Earlier;
use crate::chunk::CHUNK_SIZE;
use crate::index::{Index, Role};

/// Most packs that an image made by commits lists, beside its start-up pack.
pub(super) const MAX_PACKS: usize = 12;
/// Packs that stay when there are too many: the largest. The others become one with what is new, so that each byte is
/// written again about once for each time that an image grows sevenfold.
const KEPT: usize = 5;
/// A pack of which less than one part in so many is left, and that lost some of it just now, is written anew.
const DEAD: u64 = 4;

#[derive(Clone, Copy, Default)]
struct Pack {
    bytes: u64,
    live: u64,
    lost: u64,
    /// Whether its chunks can be stored again.
    fits: bool,
}

/// The packs of the parent, by what becomes of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Packs {
    /// Blobs whose chunks are stored again.
    stale: HashSet<u32>,
    /// How many others are needed.
    left: usize,
}

impl Packs {
    /// The packs whose chunks need not be stored again, as image and blob: those of the parent, the first of the images,
    /// and the largest of the others', so that there are not too many.
    pub(super) fn may_list(&self, earlier: &[Earlier]) -> HashSet<(usize, u32)> {
        let numbered = earlier.iter().enumerate().flat_map(|(image, earlier)| {
            (0u32..).zip(&earlier.packs).map(move |(number, (blob, _))| (image, number, *blob))
        });
        let (own, mut others): (Vec<_>, Vec<_>) = numbered.partition(|(image, _, _)| *image == 0);
        let listed: HashSet<_> = own.iter().map(|(_, _, blob)| blob.digest).collect();
        others.retain(|(_, _, blob)| !listed.contains(&blob.digest));
        others.sort_by_key(|(_, _, blob)| std::cmp::Reverse(blob.bytes));
        others.truncate(MAX_PACKS.saturating_sub(self.left + 1));
        let own = own.into_iter().filter(|(_, number, _)| !self.stale.contains(number));
        own.chain(others).map(|(image, number, _)| (image, number)).collect()
    }
}

/// Decides what becomes of the packs of `index`, the parent's, when its extents lose these blocks.
pub(super) fn packs(index: &Index, replaced: &Ranges) -> Packs {
    let mut alive = vec![false; index.chunk_count() as usize];
    let mut known = alive.clone();
    for extent in index.extents().iter() {
        let is_left = replaced.outside(&(extent.block..extent.block + extent.blocks)).next().is_some();
        if let (Some(alive), Some(known)) = (alive.get_mut(extent.chunk as usize), known.get_mut(extent.chunk as usize))
        {
            *alive |= is_left;
            *known = true;
        }
    }
    let mut packs: Vec<Option<Pack>> = index
        .blobs()
        .map(|blob| (blob.role == Role::Pack).then_some(Pack { bytes: blob.bytes, fits: true, ..Pack::default() }))
        .collect();
    for ((chunk, alive), known) in index.chunks().zip(&alive).zip(&known) {
        let Some(Some(pack)) = packs.get_mut(chunk.blob as usize) else { continue };
        pack.fits &= chunk.plain_len <= CHUNK_SIZE;
        match (alive, known) {
            (true, _) => pack.live += u64::from(chunk.stored_len),
            (false, true) => pack.lost += u64::from(chunk.stored_len),
            (false, false) => {}
        }
    }
    let numbered = packs.iter().enumerate().filter_map(|(number, pack)| Some((number as u32, (*pack)?)));
    let mut left: Vec<(u32, Pack)> = numbered.filter(|(_, pack)| pack.live > 0).collect();
    let needed = left.len();
    let is_dead = |pack: &Pack| pack.fits && pack.lost > 0 && pack.live * DEAD < pack.bytes;
    let mut stale: HashSet<u32> = left.iter().filter(|(_, pack)| is_dead(pack)).map(|(number, _)| *number).collect();
    left.retain(|(number, pack)| pack.fits && !stale.contains(number));
    // The new one counts.
    if left.len() + 1 > MAX_PACKS {
        left.sort_unstable_by_key(|(number, pack)| (pack.live, *number));
        stale.extend(left.iter().take(left.len() - KEPT).map(|(number, _)| *number));
    }
    let left = needed - stale.len();
    Packs { stale, left }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::chunk::{ChunkRef, Codec, Digest};
    use crate::index::{Blob, Extent, IndexWriter};

    /// Packs with so many chunks of one block and 1000 stored bytes each.
    fn index(packs: &[u32]) -> Index {
        let mut writer = IndexWriter::new();
        let mut block = 0;
        for chunks in packs {
            let digest = Digest::of(format!("pack {block}").as_bytes());
            let blob = writer.blob(&Blob { digest, bytes: u64::from(*chunks) * 1000, role: Role::Pack });
            for number in 0..*chunks {
                let digest = Digest::of(format!("{block}").as_bytes());
                let offset = u64::from(number) * 1000;
                let place = ChunkRef { digest, blob, offset, stored_len: 1000, plain_len: 4096, codec: Codec::Zstd };
                let chunk = writer.chunk(&place);
                writer.extent(Extent { block, blocks: 1, chunk, offset: 0 });
                block += 1;
            }
        }
        Index::from_bytes(writer.finish(1 << 30, "ext4").unwrap()).unwrap()
    }

    #[test]
    fn small_packs_become_one_when_there_are_too_many() {
        let all = Packs { stale: HashSet::new(), left: MAX_PACKS - 1 };
        assert_eq!(packs(&index(&[50; MAX_PACKS - 1]), &Ranges::default()), all);
        let sizes: Vec<u32> = (0..MAX_PACKS as u32).map(|number| 90 - number).collect();
        let expected: HashSet<u32> = (KEPT as u32..MAX_PACKS as u32).collect();
        assert_eq!(packs(&index(&sizes), &Ranges::default()), Packs { stale: expected, left: KEPT });
    }

    #[test]
    fn a_pack_that_is_nearly_dead_goes() {
        let index = index(&[100, 100, 100]);
        // Of the second 20 are left, of the third 30; the first lost nothing, however little of it there is.
        let replaced = Ranges::new(vec![100..180, 200..270]);
        assert_eq!(packs(&index, &replaced), Packs { stale: HashSet::from([1]), left: 2 });
        let first = Ranges::new(vec![0..50, 50..100]);
        assert_eq!(packs(&index, &first), Packs { stale: HashSet::new(), left: 2 }, "nothing of it is left to store");
    }
}
