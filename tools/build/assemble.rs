//! From chunks in a spool to blobs and an index: packs with what a start probably reads and then all else in device order,
//! every chunk once, and where each belongs.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;

use super::metadata::DeviceExtent;
use super::pack::{Item, PACK_MAX, Written, small_layer, write_pack};
use super::pipeline::{Outcome, Place, Store};
use super::progress::{Event, Progress};
use super::reuse::Earlier;
use crate::chunk::{ChunkRef, Codec, Digest, Hasher};
use crate::error::{Error, Result};
use crate::index::{BLOCK, Blob, Extent, Index, IndexWriter, Role};
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
    /// Jobs that hold what a start will probably read, in that order.
    pub likely: &'a [u32],
    pub device_bytes: u64,
    /// As in the index.
    pub file_system: &'a str,
    pub store: &'a Store,
    pub earlier: &'a [Earlier],
    pub level: i32,
    pub workers: usize,
    /// Makes the file of a pack.
    pub draft: &'a (dyn Fn() -> Result<File> + Sync),
    /// What stays of the start-up pack of the first of the earlier images.
    pub startup: Option<Startup>,
}

/// A start-up pack of an earlier image, as far as it is still right.
#[derive(Clone)]
pub(super) struct Startup {
    /// Numbers of its blobs in that image's index.
    blobs: Vec<u32>,
    extents: Vec<Extent>,
    /// Its chunks with their numbers, in the order of the stream.
    order: Vec<(u32, ChunkRef)>,
    read_ahead_kb: Option<u32>,
}

impl Startup {
    /// What stays of the start-up tables of `index` when only the extents stay that `keeps` says; `None` without any.
    pub(super) fn of(index: &Index, keeps: impl Fn(&Extent) -> bool) -> Option<Self> {
        let extents = index.startup_extents().iter().flat_map(|extent| {
            // Block by block, since some of a run may have changed.
            (0..extent.blocks).map(move |at| Extent {
                block: extent.block + at,
                blocks: 1,
                chunk: extent.chunk,
                offset: extent.offset + at * BLOCK,
            })
        });
        let mut kept: Vec<Extent> = Vec::new();
        for extent in extents.filter(|extent| keeps(extent)) {
            match kept.last_mut() {
                Some(last)
                    if last.chunk == extent.chunk
                        && last.block + last.blocks == extent.block
                        && last.offset + last.blocks * BLOCK == extent.offset =>
                {
                    last.blocks += 1;
                }
                _ => kept.push(extent),
            }
        }
        let order: Vec<_> = index.startup_order().filter_map(|chunk| Some((chunk, index.chunk(chunk)?))).collect();
        let blobs = order.iter().map(|(_, chunk)| chunk.blob).collect::<BTreeSet<_>>().into_iter().collect();
        let read_ahead_kb = index.startup_read_ahead_kb();
        (!order.is_empty()).then_some(Self { blobs, extents: kept, order, read_ahead_kb })
    }

    /// Drops chunks that nothing needs: neither an extent of its own, nor one of those with these digests. Whether any
    /// is left.
    fn prune(&mut self, digests: &HashSet<Digest>) -> bool {
        let hot: HashSet<u32> = self.extents.iter().map(|extent| extent.chunk).collect();
        self.order.retain(|(number, chunk)| hot.contains(number) || digests.contains(&chunk.digest));
        let used: HashSet<u32> = self.order.iter().map(|(_, chunk)| chunk.blob).collect();
        self.blobs.retain(|blob| used.contains(blob));
        !self.order.is_empty()
    }

    /// Adds its tables; says which layers they need.
    fn add(&self, index: &mut IndexWriter, earlier: &[Earlier]) -> Result<Vec<Layer>> {
        let mut layers = Vec::new();
        let mut blobs = HashMap::new();
        for blob in &self.blobs {
            let (found, diff_id) = earlier_blob(earlier, (0, *blob))?;
            blobs.insert(*blob, index.blob(&found));
            layers.push(Layer::Reused { image: 0, blob: *blob, diff_id });
        }
        let mut numbers: HashMap<u32, u32> = HashMap::new();
        for (number, chunk) in &self.order {
            let Some(blob) = blobs.get(&chunk.blob) else { continue };
            let new = match numbers.get(number) {
                Some(new) => *new,
                None => index.chunk(&ChunkRef { blob: *blob, ..*chunk }),
            };
            numbers.insert(*number, new);
            index.startup_order(new);
        }
        for extent in &self.extents {
            if let Some(chunk) = numbers.get(&extent.chunk) {
                index.startup_extent(Extent { chunk: *chunk, ..*extent });
            }
        }
        if let Some(kib) = self.read_ahead_kb {
            index.startup_read_ahead_kb(kib);
        }
        Ok(layers)
    }
}

/// Writes packs and index.
pub(super) fn assemble(parts: &Parts<'_>, progress: &dyn Progress) -> Result<Assembled> {
    // The chunks' numbers in the index: what is likely, then in the order of the device. Neither depends on scheduling.
    let mut numbers: Vec<Option<u32>> = vec![None; parts.store.len()];
    let mut order: Vec<u32> = Vec::new();
    let mut index = IndexWriter::new();
    let mut number = |job: u32| -> Result<Option<u32>> {
        let Outcome::Chunk(chunk) = parts.store.outcome(job)? else { return Ok(None) };
        let number = numbers.get_mut(chunk as usize).ok_or_else(|| Error::invalid("build", "a chunk is missing"))?;
        Ok(Some(*number.get_or_insert_with(|| {
            order.push(chunk);
            order.len() as u32 - 1
        })))
    };
    let mut likely = 0;
    for job in parts.likely {
        likely = number(*job)?.map_or(likely, |number| likely.max(number + 1));
    }
    index.likely_chunks(likely);
    for extent in parts.extents {
        let Some(number) = number(extent.job)? else { continue };
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
    if let Some(mut startup) = parts.startup.clone()
        && startup.prune(&order.iter().map(|chunk| Ok(parts.store.chunk(*chunk)?.digest)).collect::<Result<_>>()?)
    {
        let layers = startup.add(&mut index, parts.earlier)?;
        assembled.packs.splice(..0, layers);
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
