//! Optimizing: an image gets a start-up pack of what a profile says that its start reads. No other pack is rewritten: the
//! hot blocks are in their ordinary chunks as well, and what no start-up extent covers is read from there.

mod chunks;
mod hot;
mod image;
mod kept;
mod reads;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tokio::runtime::Handle;

use self::kept::Earlier;
use super::pack::{Item, Written, small_layer, write_pack};
use super::pipeline::{Pipeline, Place, Reusable, Settings, Store};
use super::progress::{Event, Progress};
use super::scratch::Scratch;
use super::{Report, Tree};
use crate::chunk::{ChunkRef, Codec, Hasher, Verified};
use crate::device::{Device, ImageDevice};
use crate::error::{Error, Result};
use crate::ext4::{BLOCK_SIZE, Names, read_names};
use crate::fetch::{FetchOptions, Fetcher, Image, Priority, open_image};
use crate::index::{Blob, Extent, Index, IndexWriter, Role, StartupRead};
use crate::map::Map;
use crate::oci::annotation::{INDEX_PATH, PACK_DIR};
use crate::oci::{Platform, Reference};
use crate::pool::{Pool, PoolOptions};
use crate::profile::Profile;
use crate::source::Access;
use crate::source::files::unlinked;

/// What to optimize.
#[derive(Clone, Debug)]
pub struct OptimizeRequest {
    /// A firstread image, in a registry or an OCI layout.
    pub source: Reference,
    /// Where the new one goes: a registry or an OCI layout, also the same one.
    pub destination: Reference,
    /// What its start reads.
    pub profile: Profile,
    /// Earlier images with start-up packs, whose hot chunks are kept as far as they are needed: a node that has them does
    /// not fetch them again.
    pub reuse: Vec<Reference>,
    /// zstd's compression level for the start-up pack.
    pub level: i32,
    /// Of an image for several platforms, the one whose start it is; the others stay as they are.
    pub platform: Platform,
    /// Where spools are made; they need room for what is hot, plain and stored.
    pub temp: PathBuf,
    /// How registries are reached.
    pub access: Access,
    /// Threads that hash and compress.
    pub workers: usize,
}

impl OptimizeRequest {
    /// A request with the defaults: level 19, this machine's platform, all cores.
    #[must_use]
    pub fn new(source: Reference, destination: Reference, profile: Profile) -> Self {
        Self {
            source,
            destination,
            profile,
            reuse: Vec::new(),
            level: 19,
            platform: Platform::host(),
            temp: std::env::temp_dir(),
            access: Access::default(),
            workers: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// What a start-up pack is made of. Sizes in bytes.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StartupReport {
    /// Plain bytes.
    pub plain_bytes: u64,
    /// Stored bytes.
    pub stored_bytes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Of the chunks, those of metadata.
    pub metadata_chunks: u64,
    /// Of the chunks, those that earlier images have.
    pub kept_chunks: u64,
    /// Start-up extents.
    pub extents: u64,
    /// Blocks of files that the profile names and the image has.
    pub found_blocks: u64,
    /// Blocks that the profile names and the image has not.
    pub lost_blocks: u64,
    /// Whether the profile was recorded on this very device.
    pub same_device: bool,
    /// Read-ahead in KiB that devices of the image get while they start.
    pub read_ahead_kb: Option<u32>,
}

/// What an index says of a start-up pack. Chunks are numbers of stored ones.
struct Tables {
    /// The chunks in the order of the stream.
    order: Vec<u32>,
    extents: Vec<Extent>,
    reads: Vec<StartupRead>,
}

/// A start-up pack and the index that knows it.
struct Optimized {
    pack: std::fs::File,
    written: Written,
    index: Vec<u8>,
    index_layer: (Vec<u8>, Written),
    report: StartupReport,
}

/// Adds a start-up pack to an image, or replaces the one that it has.
///
/// # Errors
/// An image (also one of `reuse`) that can't be read or is none of firstread's, a profile that can't be applied to it, what the destination
/// refuses. Nothing is named at the destination before all of it is there.
pub fn optimize(request: &OptimizeRequest, progress: &Arc<dyn Progress>) -> Result<Report> {
    let started = Instant::now();
    let runtime = super::runtime()?;
    let handle = runtime.handle();
    let scratch = Scratch::new(&request.temp)?;
    let image = handle.block_on(open_image(
        &request.source,
        &request.access,
        &request.platform,
        &scratch.path().join("cache"),
    ))?;
    let mut earlier = Earlier::default();
    for reference in &request.reuse {
        let cache = scratch.path().join("cache");
        let opened = handle.block_on(open_image(reference, &request.access, &request.platform, &cache))?;
        earlier.add(&opened.index);
    }
    let contents = Contents::open(image, &scratch.path().join("pool"), handle)?;
    let optimized = pack(request, &contents, &earlier, progress)?;
    let digest = image::publish(request, &contents.image, &optimized, &**progress, handle)?;
    let index = Index::from_bytes(optimized.index.clone())?;
    let stored = |role: Role| {
        let blobs: Vec<Blob> = index.blobs().collect();
        let in_role = |chunk: &ChunkRef| blobs.get(chunk.blob as usize).is_some_and(|blob| blob.role == role);
        index.chunks().filter(in_role).map(|chunk| u64::from(chunk.stored_len)).sum::<u64>()
    };
    let (new_bytes, reused_bytes) = (stored(Role::Startup), stored(Role::Pack));
    Ok(Report {
        digest,
        index_bytes: optimized.index.len() as u64,
        stored_bytes: new_bytes + reused_bytes,
        new_bytes,
        reused_bytes,
        chunks: u64::from(index.chunk_count()),
        new_chunks: optimized.report.chunks,
        seconds: started.elapsed().as_secs_f64(),
        device_bytes: index.device_bytes(),
        plain_bytes: index.chunks().map(|chunk| u64::from(chunk.plain_len)).sum(),
        inodes: contents.names.as_ref().map_or(0, |names| u64::from(names.len())),
        platforms: vec![request.platform.to_string()],
        startup: Some(optimized.report),
        ..Report::none()
    })
}

/// Forms, compresses and writes the start-up pack, and makes the index.
fn pack(
    request: &OptimizeRequest,
    contents: &Contents<'_>,
    earlier: &Earlier,
    progress: &Arc<dyn Progress>,
) -> Result<Optimized> {
    let old = &contents.image.index;
    let mut hot = hot::find(&request.profile, old, contents.names.as_ref())?;
    earlier.keep(&mut hot, old);
    let mut wanted: Vec<u32> = hot.chunks.keys().copied().collect();
    wanted.sort_unstable();
    let bytes = wanted.iter().filter_map(|chunk| old.chunk(*chunk)).map(|chunk| u64::from(chunk.stored_len)).sum();
    progress.event(Event::Image { platform: &request.platform.to_string(), layers: 1, bytes: Some(bytes) });
    contents.fetch(&wanted, &**progress)?;
    let mut pipeline = Pipeline::start(Settings {
        level: request.level,
        workers: request.workers,
        temp: &request.temp,
        reusable: Reusable::new(),
        known: Arc::default(),
        progress: Arc::clone(progress),
        leaves: Tree::None,
    })?;
    let formed = chunks::form(&hot, old, &mut pipeline, |number| contents.chunk(number))?;
    let store = pipeline.finish()?;
    let order = formed.order(&store)?;
    let tables = Tables {
        reads: match &contents.names {
            Some(names) => reads::reads(&hot, &formed, old, names, &store, &order)?,
            None => Vec::new(),
        },
        extents: formed.extents(&hot, &store)?,
        order,
    };
    let (pack, written, places) = write(request, &store, &tables.order, &**progress)?;
    let index = index(request, old, &store, &tables, &written, &places)?;
    let plain_bytes =
        tables.order.iter().map(|chunk| Ok(u64::from(store.chunk(*chunk)?.plain_len))).sum::<Result<u64>>()?;
    let report = StartupReport {
        plain_bytes,
        stored_bytes: written.bytes,
        chunks: tables.order.len() as u64,
        metadata_chunks: hot.metadata.len() as u64,
        kept_chunks: hot.chunks.values().map(|chunk| chunk.kept.len() as u64).sum(),
        extents: tables.extents.len() as u64,
        found_blocks: hot.found,
        lost_blocks: hot.lost,
        same_device: hot::is_same(&request.profile, &old.device_digest()),
        read_ahead_kb: request.profile.recording.read_ahead_kb,
    };
    let index_layer = small_layer(INDEX_PATH, &index, request.level)?;
    Ok(Optimized { pack, written, index, index_layer, report })
}

/// Writes the pack; says where each chunk is in it.
fn write(
    request: &OptimizeRequest,
    store: &Store,
    order: &[u32],
    progress: &dyn Progress,
) -> Result<(std::fs::File, Written, Vec<u64>)> {
    let mut name = Hasher::new();
    let mut items = Vec::new();
    for chunk in order {
        let stored = store.chunk(*chunk)?;
        let Place::Spool { offset, len } = stored.place else {
            return Err(Error::invalid("optimize", "a hot chunk was not stored"));
        };
        name.update(stored.digest.as_bytes());
        items.push(Item { offset, stored_len: len, plain_len: stored.plain_len });
    }
    progress.event(Event::Packing(items.iter().map(|item| u64::from(item.stored_len)).sum()));
    let file = unlinked(&request.temp)?;
    let mut places = vec![0; items.len()];
    let path = format!("{PACK_DIR}/{}", name.finish().hex());
    let settings = (request.level, request.workers);
    let written = write_pack(&file, &path, &items, store, settings, progress, |item, offset| {
        if let Some(place) = places.get_mut(item) {
            *place = offset;
        }
    })?;
    Ok((file, written, places))
}

/// The old index without its start-up tables, and with the new ones.
fn index(
    request: &OptimizeRequest,
    old: &Index,
    store: &Store,
    tables: &Tables,
    written: &Written,
    places: &[u64],
) -> Result<Vec<u8>> {
    let mut index = IndexWriter::new();
    let broken = || Error::invalid("optimize", "the old index contradicts itself");
    let blob = index.blob(&Blob { digest: written.digest, bytes: written.bytes, role: Role::Startup });
    let mut used = vec![false; old.chunk_count() as usize];
    for extent in old.extents().iter() {
        *used.get_mut(extent.chunk as usize).ok_or_else(broken)? = true;
    }
    let old_blobs: Vec<Blob> = old.blobs().collect();
    let mut blobs: Vec<Option<u32>> = vec![None; old_blobs.len()];
    let mut numbers: Vec<u32> = vec![0; used.len()];
    let startup = blob;
    for ((chunk, used), number) in old.chunks().zip(&used).zip(&mut numbers) {
        if !used {
            continue;
        }
        let slot = blobs.get_mut(chunk.blob as usize).ok_or_else(broken)?;
        let blob = match slot {
            Some(blob) => *blob,
            None => *slot.insert(index.blob(old_blobs.get(chunk.blob as usize).ok_or_else(broken)?)),
        };
        *number = index.chunk(&ChunkRef { blob, ..chunk });
    }
    for extent in old.extents().iter() {
        let chunk = *numbers.get(extent.chunk as usize).ok_or_else(broken)?;
        index.extent(Extent { chunk, ..extent });
    }
    let mut hot: Vec<Option<u32>> = vec![None; store.len()];
    for (chunk, offset) in tables.order.iter().zip(places) {
        let stored = store.chunk(*chunk)?;
        let Place::Spool { len, .. } = stored.place else { continue };
        let (digest, plain_len) = (stored.digest, stored.plain_len);
        let chunk_ref =
            ChunkRef { digest, blob: startup, offset: *offset, stored_len: len, plain_len, codec: Codec::Zstd };
        let number = index.chunk(&chunk_ref);
        index.startup_order(number);
        if let Some(slot) = hot.get_mut(*chunk as usize) {
            *slot = Some(number);
        }
    }
    let number = |stored: u32| hot.get(stored as usize).copied().flatten().ok_or_else(broken);
    for extent in &tables.extents {
        index.startup_extent(Extent { chunk: number(extent.chunk)?, ..*extent });
    }
    for read in &tables.reads {
        index.startup_read(StartupRead { chunk: number(read.chunk)?, ..*read });
    }
    if let Some(kib) = request.profile.recording.read_ahead_kb {
        index.startup_read_ahead_kb(kib);
    }
    index.finish(old.device_bytes(), old.file_system())
}

/// The contents of an image, fetched as they are needed, verified, and kept while this lives.
struct Contents<'a> {
    image: Image,
    names: Option<Names>,
    fetcher: Arc<Fetcher>,
    pool: Arc<Pool>,
    runtime: &'a Handle,
}

/// Chunks that are asked for at a time.
const BATCH: usize = 64;

impl<'a> Contents<'a> {
    fn open(image: Image, pool: &Path, runtime: &'a Handle) -> Result<Self> {
        let pool = Arc::new(Pool::open(pool, &PoolOptions::default())?);
        let fetcher = Fetcher::new(Arc::clone(&pool), FetchOptions::default());
        let map = Map::new(Arc::clone(&image.index));
        let device = ImageDevice::new(map, Arc::clone(&image.origin), Arc::clone(&fetcher), Arc::clone(&pool));
        let names = read_names(device.size(), &mut |block, buf| {
            runtime.block_on(device.inspect_at(u64::from(block) * BLOCK_SIZE as u64, buf))
        })?;
        Ok(Self { image, names, fetcher, pool, runtime })
    }

    /// Fetches what is not there of these chunks.
    fn fetch(&self, numbers: &[u32], progress: &dyn Progress) -> Result<()> {
        for batch in numbers.chunks(BATCH) {
            let chunks: Vec<ChunkRef> = batch.iter().filter_map(|number| self.image.index.chunk(*number)).collect();
            let missing: Vec<ChunkRef> =
                chunks.iter().filter(|chunk| !self.pool.contains(&chunk.digest)).copied().collect();
            let fetched = self.runtime.block_on(self.fetcher.fetch(&self.image.origin, &missing, Priority::Background));
            fetched.into_iter().try_for_each(|result| result.map(drop))?;
            progress.event(Event::Read(chunks.iter().map(|chunk| u64::from(chunk.stored_len)).sum()));
        }
        Ok(())
    }

    /// A chunk's plain bytes.
    fn chunk(&self, number: u32) -> Result<Arc<Verified>> {
        let missing = || Error::invalid("index", format!("it has no chunk {number}"));
        let chunk = self.image.index.chunk(number).ok_or_else(missing)?;
        if let Some(found) = self.pool.read_whole(&chunk.digest) {
            return Ok(Arc::new(found));
        }
        let fetched = self.runtime.block_on(self.fetcher.fetch(&self.image.origin, &[chunk], Priority::Demand));
        fetched.into_iter().next().unwrap_or_else(|| Err(missing()))
    }
}
