//! From chunks in a spool to blobs and an index: packs in device order, every chunk once, and where each belongs.

use std::fs::File;
use std::sync::Arc;

use super::metadata::DeviceExtent;
use super::pack::{Item, PACK_MAX, Written, small_layer, write_pack};
use super::pipeline::{Outcome, Place, Store};
use super::progress::{Event, Progress};
use super::reuse::Earlier;
use crate::chunk::{ChunkRef, Codec, Digest, Hasher};
use crate::error::{Error, Result};
use crate::index::{Blob, Extent, IndexWriter, Role};
use crate::oci::annotation::{INDEX_PATH, PACK_DIR};

/// A layer of the new image.
pub(super) enum Layer {
    /// A pack that was just written, in a draft of the destination.
    New { file: Arc<File>, written: Written },
    /// A pack of an earlier image: number of the image, number of the blob in its index.
    Reused { image: usize, blob: u32, diff_id: Digest },
}

/// What becomes an image.
pub(super) struct Assembled {
    pub packs: Vec<Layer>,
    pub index: Vec<u8>,
    pub index_layer: (Vec<u8>, Written),
    pub chunks: u64,
    pub new_chunks: u64,
    pub new_bytes: u64,
    pub reused_bytes: u64,
    pub plain_bytes: u64,
}

/// What to assemble from.
pub(super) struct Parts<'a> {
    /// In ascending order.
    pub extents: &'a [DeviceExtent],
    pub device_bytes: u64,
    /// As in the index.
    pub file_system: &'a str,
    pub store: &'a Store,
    pub earlier: &'a [Earlier],
    pub level: i32,
    pub workers: usize,
    /// Makes the file of a pack.
    pub draft: &'a (dyn Fn() -> Result<File> + Sync),
}

/// Writes packs and index.
pub(super) fn assemble(parts: &Parts<'_>, progress: &dyn Progress) -> Result<Assembled> {
    // The chunks' numbers in the index: in the order of the device, which does not depend on scheduling.
    let mut numbers: Vec<Option<u32>> = vec![None; parts.store.len()];
    let mut order = Vec::new();
    let mut index = IndexWriter::new();
    for extent in parts.extents {
        let Outcome::Chunk(chunk) = parts.store.outcome(extent.job)? else { continue };
        let number = numbers.get_mut(chunk as usize).ok_or_else(|| Error::invalid("build", "a chunk is missing"))?;
        let number = match number {
            Some(number) => *number,
            None => {
                let next = order.len() as u32;
                order.push(chunk);
                *number.insert(next)
            }
        };
        index.extent(Extent { block: extent.block, blocks: extent.blocks, chunk: number, offset: extent.offset });
    }
    let mut refs: Vec<Option<ChunkRef>> = vec![None; order.len()];
    let mut assembled = Assembled {
        packs: Vec::new(),
        index: Vec::new(),
        index_layer: small_layer(INDEX_PATH, &[], parts.level)?,
        chunks: order.len() as u64,
        new_chunks: 0,
        new_bytes: 0,
        reused_bytes: 0,
        plain_bytes: 0,
    };
    let mut fresh = Vec::new();
    let mut blobs: Vec<((usize, u32), u32)> = Vec::new();
    for (number, chunk) in order.iter().enumerate() {
        let stored = parts.store.chunk(*chunk)?;
        assembled.plain_bytes += u64::from(stored.plain_len);
        match stored.place {
            Place::Spool { offset, len } => {
                assembled.new_chunks += 1;
                assembled.new_bytes += u64::from(len);
                fresh.push((number, stored.digest, Item { offset, stored_len: len, plain_len: stored.plain_len }));
            }
            Place::Reused { image, chunk } => {
                assembled.reused_bytes += u64::from(chunk.stored_len);
                let key = (image, chunk.blob);
                let blob = match blobs.iter().find(|(known, _)| *known == key) {
                    Some((_, blob)) => *blob,
                    None => {
                        let (blob, diff_id) = earlier_blob(parts.earlier, key)?;
                        let number = index.blob(&blob);
                        assembled.packs.push(Layer::Reused { image, blob: chunk.blob, diff_id });
                        blobs.push((key, number));
                        number
                    }
                };
                set(&mut refs, number, ChunkRef { blob, ..chunk });
            }
        }
    }
    progress.event(Event::Packing(assembled.new_bytes));
    for pack in split(&fresh) {
        let items: Vec<Item> = pack.iter().map(|(_, _, item)| *item).collect();
        let mut name = Hasher::new();
        pack.iter().for_each(|(_, digest, _)| name.update(digest.as_bytes()));
        let path = format!("{PACK_DIR}/{}", name.finish().hex());
        let file = (parts.draft)()?;
        let mut offsets = vec![0; items.len()];
        let written =
            write_pack(&file, &path, &items, parts.store, (parts.level, parts.workers), progress, |item, offset| {
                if let Some(place) = offsets.get_mut(item) {
                    *place = offset;
                }
            })?;
        let blob = index.blob(&Blob { digest: written.digest, bytes: written.bytes, role: Role::Pack });
        for ((number, digest, item), offset) in pack.iter().zip(offsets) {
            let Item { stored_len, plain_len, .. } = *item;
            let chunk = ChunkRef { digest: *digest, blob, offset, stored_len, plain_len, codec: Codec::Zstd };
            set(&mut refs, *number, chunk);
        }
        assembled.packs.push(Layer::New { file: Arc::new(file), written });
    }
    for chunk in refs {
        index.chunk(&chunk.ok_or_else(|| Error::invalid("build", "a chunk has no place"))?);
    }
    assembled.index = index.finish(parts.device_bytes, parts.file_system)?;
    assembled.index_layer = small_layer(INDEX_PATH, &assembled.index, parts.level)?;
    Ok(assembled)
}

fn set(refs: &mut [Option<ChunkRef>], number: usize, chunk: ChunkRef) {
    if let Some(place) = refs.get_mut(number) {
        *place = Some(chunk);
    }
}

fn earlier_blob(earlier: &[Earlier], (image, blob): (usize, u32)) -> Result<(Blob, Digest)> {
    let missing = || Error::invalid("build", "a reused pack is missing");
    earlier.get(image).and_then(|image| image.packs.get(blob as usize)).copied().ok_or_else(missing)
}

type Fresh = (usize, Digest, Item);

/// Cuts the new chunks so that no pack's file is too long for a tar header.
fn split(fresh: &[Fresh]) -> Vec<&[Fresh]> {
    let (mut packs, mut start, mut plain) = (Vec::new(), 0, 0);
    for (number, (_, _, item)) in fresh.iter().enumerate() {
        if plain + u64::from(item.plain_len) > PACK_MAX {
            packs.extend(fresh.get(start..number));
            (start, plain) = (number, 0);
        }
        plain += u64::from(item.plain_len);
    }
    packs.extend(fresh.get(start..).filter(|rest| !rest.is_empty()));
    packs
}
