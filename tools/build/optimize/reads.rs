//! Start-up reads: where in files the blocks of the start-up pack are, in the order of the stream.

use std::collections::HashMap;

use super::chunks::Formed;
use super::hot::Hot;
use crate::build::pipeline::Store;
use crate::error::Result;
use crate::ext4::{Names, Type};
use crate::index::{Index, Place, StartupRead};

/// What the start of `hot` reads of the files of `names`, with numbers of stored chunks, which `order` has in the order of
/// the stream. Blocks of one file that follow each other and are in one chunk are one read.
pub(super) fn reads(
    hot: &Hot,
    formed: &Formed,
    index: &Index,
    names: &Names,
    store: &Store,
    order: &[u32],
) -> Result<Vec<StartupRead>> {
    let turns: HashMap<u32, usize> = order.iter().enumerate().map(|(turn, chunk)| (*chunk, turn)).collect();
    let mut found: Vec<(usize, StartupRead)> = Vec::new();
    let mut add = |chunk: u32, place: Place, first: u32, blocks: u32| {
        if let Some(&turn) = turns.get(&chunk) {
            found.push((turn, StartupRead { chunk, place, first, blocks }));
        }
    };
    for (&block, &place) in &hot.blocks {
        let Some(run) = names.run_at(block).filter(|run| names.kind(run.name) == Some(Type::File)) else { continue };
        if let Some(chunk) = formed.chunk(place, store)? {
            add(chunk, Place::File { inode: names.inode(run.name) }, run.file_block + (block - run.block), 1);
        }
    }
    let needed: HashMap<u32, u32> = hot
        .needed_metadata()
        .filter_map(|number| Some(formed.chunk((number, 0), store).transpose()?.map(|chunk| (number, chunk))))
        .collect::<Result<_>>()?;
    for extent in index.extents().iter() {
        if let Some(&chunk) = needed.get(&extent.chunk) {
            add(chunk, Place::Device, extent.block, extent.blocks);
        }
    }
    let inode = |read: &StartupRead| match read.place {
        Place::Device => None,
        Place::File { inode } => Some(inode),
    };
    found.sort_unstable_by_key(|(turn, read)| (*turn, inode(read), read.first));
    let mut reads: Vec<StartupRead> = Vec::new();
    for (_, read) in found {
        match reads.last_mut() {
            Some(last)
                if (last.chunk, last.place) == (read.chunk, read.place) && last.first + last.blocks == read.first =>
            {
                last.blocks += read.blocks;
            }
            _ => reads.push(read),
        }
    }
    Ok(reads)
}
