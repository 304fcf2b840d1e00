//! One platform's source on its way to packs and an index: a device whose contents are chunks, then what is made of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::runtime::Handle;

use super::arrange::{self, Arranged, DataRun};
use super::assemble::{Assembled, Parts, assemble};
use super::cache;
use super::decode::{Expected, Layer};
use super::hot_first::hot_first;
use super::input::{self, Input, LayerInput, Root};
use super::intake::{CHUNK_BLOCKS, Intake};
use super::likely::{self, Command, Contents, Data, Likely};
use super::metadata::{DeviceExtent, Windows};
use super::pipeline::{Pipeline, Settings};
use super::progress::{Event, Progress};
use super::rootfs::{Rootfs, Whiteouts};
use super::{Request, Tree, layer, raw, reuse, verity, walk};
use crate::error::{Error, Result};
use crate::ext4::{self, InodeId};
use crate::profile::Profile;
use crate::source::Repository;

/// A device whose contents are in chunks.
struct Device {
    /// In ascending order.
    extents: Vec<DeviceExtent>,
    /// Jobs that hold what a start will probably read, in that order.
    likely: Vec<u32>,
    bytes: u64,
    /// As in the index.
    file_system: &'static str,
    inodes: u32,
    pipeline: Pipeline,
}

/// What became of a source.
pub(super) struct Converted {
    pub assembled: Assembled,
    pub device_bytes: u64,
    pub inodes: u32,
    pub verity: Option<verity::Verity>,
    pub work: Work,
}

/// What had to be done. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    pub layers: u64,
    pub cached_layers: u64,
    /// Of the source.
    pub read_bytes: u64,
    /// Plain bytes of layers that were read.
    pub inflated_bytes: u64,
    pub cached_chunks: u64,
    /// Plain bytes.
    pub compressed_bytes: u64,
}

/// One platform: from its layers to packs and an index.
pub(super) fn convert(
    request: &Request,
    input: &Input,
    earlier: &[reuse::Earlier],
    destination: &Repository,
    progress: &Arc<dyn Progress>,
    runtime: &Handle,
) -> Result<Converted> {
    let counting = Arc::new(Counting::new(progress.clone()));
    let progress: &Arc<dyn Progress> = &(counting.clone() as Arc<dyn Progress>);
    let mut work = Work { layers: 1, ..Work::default() };
    let mut cache = match &input.root {
        Root::Layers(_) => cache::Run::start(request, &**progress),
        _ => None,
    };
    let mut pipeline = Pipeline::start(Settings {
        level: request.level,
        workers: request.workers,
        temp: &request.temp,
        reusable: reuse::chunks(earlier),
        known: cache.as_ref().map(cache::Run::known).unwrap_or_default(),
        progress: progress.clone(),
        leaves: request.tree,
    })?;
    let mut device = if let Root::Raw(path) = &input.root {
        let platform = &input.platform.to_string();
        let disk = raw::Disk::open(path, request.size, &request.limits)?;
        progress.event(Event::Image { platform, layers: 1, bytes: Some(disk.bytes()) });
        progress.event(Event::Layer { name: &path.display().to_string() });
        let extents = disk.read(&mut pipeline, &**progress)?;
        Device { extents, likely: Vec::new(), bytes: disk.device_bytes(), file_system: "raw", inodes: 0, pipeline }
    } else {
        let mut intake = Intake::new(pipeline, &request.temp)?;
        let mut rootfs = Rootfs::new(&request.limits);
        let source = Source { request, progress, runtime };
        source.read(input, &mut rootfs, &mut intake, &mut cache, &mut work)?;
        if let Some(cache) = &mut cache {
            cache.layers_done(&mut intake)?;
        }
        let (pipeline, small) = intake.finish()?;
        let start = match &request.profile {
            Some(profile) => Start::Recorded(profile),
            None => {
                let contents = Contents::new(&rootfs, &pipeline, &small, earlier, runtime);
                Start::Guessed(likely::guess(&Command::of(&input.config), &contents)?)
            }
        };
        file_system(arrange::arrange(rootfs, pipeline, small)?, request.size, &start)?
    };
    let verity = match request.tree {
        Tree::None => None,
        Tree::Verity => {
            let (verity, extents, bytes) = verity::append(&mut device.pipeline, &device.extents, device.bytes)?;
            device.extents.extend(extents);
            device.bytes = bytes;
            Some(verity)
        }
    };
    let Device { extents, likely, bytes: device_bytes, file_system, inodes, pipeline } = device;
    let store = pipeline.finish()?;
    (work.cached_chunks, work.compressed_bytes) = store.work();
    work.read_bytes = counting.read();
    let parts = Parts {
        extents: &extents,
        likely: &likely,
        device_bytes,
        file_system,
        store: &store,
        earlier,
        level: request.level,
        workers: request.workers,
        draft: &|| destination.draft(&request.temp),
        startup: None,
    };
    let assembled = std::thread::scope(|scope| {
        // The cache is filled while packs are written, most of which is hashing on one core.
        scope.spawn(|| cache.as_ref().map(|cache| cache.save(&store, &**progress)));
        assemble(&parts, &**progress)
    })?;
    Ok(Converted { assembled, device_bytes, inodes, verity, work })
}

/// Flattens layers that are in memory and plans a file system: how many inodes it has.
pub(super) fn flatten(layers: Vec<Vec<u8>>, request: &Request, progress: &Arc<dyn Progress>) -> Result<u32> {
    let pipeline = Pipeline::start(Settings {
        level: 1,
        workers: 1,
        temp: &request.temp,
        reusable: super::pipeline::Reusable::new(),
        known: Arc::default(),
        progress: progress.clone(),
        leaves: Tree::None,
    })?;
    let mut intake = Intake::new(pipeline, &request.temp)?;
    let mut rootfs = Rootfs::new(&request.limits);
    let (expected, mut left) = (Expected::default(), request.limits.plain_bytes);
    for layer in layers {
        rootfs.next_layer();
        let stream = Layer::open(Box::new(std::io::Cursor::new(layer)), &expected, left, progress.clone())?;
        left = layer::apply(stream, &mut rootfs, &mut intake, Whiteouts::Apply, None)?.finish(&expected)?;
    }
    let (pipeline, small) = intake.finish()?;
    let device = file_system(arrange::arrange(rootfs, pipeline, small)?, None, &Start::Guessed(Likely::default()))?;
    device.pipeline.finish()?;
    Ok(device.inodes)
}

/// What is known of a start.
enum Start<'a> {
    Recorded(&'a Profile),
    Guessed(Likely),
}

/// Metadata at the front of the device that every start reads, in windows.
const LIKELY_WINDOWS: u32 = 2;

/// Plans the file system and turns its metadata into chunks.
fn file_system(mut arranged: Arranged, size: Option<u64>, start: &Start<'_>) -> Result<Device> {
    let (hot, data) = match start {
        Start::Recorded(profile) => (hot_first(&mut arranged, profile), Vec::new()),
        Start::Guessed(likely) => (likely_inodes(&arranged, likely), likely_jobs(&arranged, likely)),
    };
    let Arranged { tree, data_order, runs, seed, mut pipeline, .. } = arranged;
    let options = ext4::Options { seed, size, hot, data_order, ..ext4::Options::default() };
    let plan = ext4::plan(&tree, &options)?;
    let mut windows = Windows::new(&mut pipeline);
    plan.write_metadata(&tree, &mut |block, bytes| windows.write(block, bytes))?;
    let mut extents = windows.finish()?;
    // The tree is large, and its place is needed from here on.
    drop(tree);
    let mut likely: Vec<u32> = Vec::new();
    if !data.is_empty() {
        let first = extents.iter().take_while(|extent| extent.block < LIKELY_WINDOWS * CHUNK_BLOCKS);
        likely.extend(first.map(|extent| extent.job));
        likely.extend(data);
    }
    add_data(&mut extents, &plan, &runs)?;
    Ok(Device { extents, likely, bytes: plan.device_bytes(), file_system: "ext4", inodes: plan.inodes(), pipeline })
}

/// The inodes that a start probably looks up, in that order.
fn likely_inodes(arranged: &Arranged, likely: &Likely) -> Vec<InodeId> {
    likely.nodes.iter().filter_map(|node| arranged.inode(*node)).collect()
}

/// The jobs with the data that it probably reads, in that order.
fn likely_jobs(arranged: &Arranged, likely: &Likely) -> Vec<u32> {
    let small = likely.data.iter().filter_map(|data| match data {
        Data::Small(node) => arranged.inode(*node),
        Data::Piece(_) => None,
    });
    let jobs = arranged.jobs(&small.collect());
    let of = |data: &Data| match data {
        Data::Piece(job) => vec![*job],
        Data::Small(node) => arranged.inode(*node).and_then(|inode| jobs.get(&inode).cloned()).unwrap_or_default(),
    };
    likely.data.iter().flat_map(of).collect()
}

/// Adds the files' data, which follow the metadata without a gap.
fn add_data(extents: &mut Vec<DeviceExtent>, plan: &ext4::Plan, runs: &[DataRun]) -> Result<()> {
    let range = plan.data_blocks();
    let mut at = range.start;
    let misplaced = || Error::invalid("build", "the file system's plan and the data disagree");
    for run in runs {
        if run.first.is_some_and(|first| plan.data_start(first) != Some(at)) {
            return Err(misplaced());
        }
        extents.push(DeviceExtent { block: at, blocks: run.blocks, job: run.job, offset: 0 });
        at = at.checked_add(run.blocks).ok_or_else(misplaced)?;
    }
    if at != range.end { Err(misplaced()) } else { Ok(()) }
}

/// Where layers are read.
struct Source<'a> {
    request: &'a Request,
    progress: &'a Arc<dyn Progress>,
    runtime: &'a Handle,
}

impl Source<'_> {
    /// Reads the source into the tree, and its contents into chunks.
    fn read(
        &self,
        input: &Input,
        rootfs: &mut Rootfs,
        intake: &mut Intake,
        cache: &mut Option<cache::Run>,
        work: &mut Work,
    ) -> Result<()> {
        let Self { request, progress, .. } = self;
        let platform = input.platform.to_string();
        let image = |layers, bytes| progress.event(Event::Image { platform: &platform, layers, bytes });
        match &input.root {
            Root::Raw(path) => Err(Error::invalid("source", format!("{} is a disk image", path.display()))),
            Root::Directory(path) => {
                image(1, None);
                progress.event(Event::Layer { name: &path.display().to_string() });
                walk::walk(path, request.source_date, rootfs, intake, &***progress)
            }
            Root::Tar(path) => {
                let (stored, bytes) = input::open_tar(path)?;
                image(1, bytes);
                let name = path.display().to_string();
                progress.event(Event::Layer { name: &name });
                let expected = Expected::default();
                let layer = Layer::open(stored, &expected, request.limits.plain_bytes, (*progress).clone());
                let left = layer
                    .and_then(|layer| layer::apply(layer, rootfs, intake, Whiteouts::Keep, None))
                    .and_then(|layer| layer.finish(&expected))
                    .map_err(|error| layer::context(error, &name))?;
                work.inflated_bytes = request.limits.plain_bytes - left;
                Ok(())
            }
            Root::Layers(layers) => {
                image(layers.len(), Some(layers.iter().map(|layer| layer.bytes).sum()));
                work.layers = layers.len() as u64;
                let mut left = request.limits.plain_bytes;
                for layer in layers {
                    rootfs.next_layer();
                    left = self
                        .layer(layer, left, rootfs, intake, cache, work)
                        .map_err(|error| layer::context(error, &format!("layer {}", layer.name)))?;
                }
                Ok(())
            }
        }
    }

    /// Applies a layer, from the cache or read; returns how many plain bytes are left for the others.
    fn layer(
        &self,
        layer: &LayerInput,
        left: u64,
        rootfs: &mut Rootfs,
        intake: &mut Intake,
        cache: &mut Option<cache::Run>,
        work: &mut Work,
    ) -> Result<u64> {
        let (name, expected) = (&layer.name, &layer.expected);
        let mut reading = None;
        if let Some(cache) = cache {
            if let Some(bytes) = cache.apply(self.request, expected, left, rootfs, intake)? {
                work.cached_layers += 1;
                self.progress.event(Event::Cached { name, bytes: layer.bytes });
                return Ok(left - bytes);
            }
            reading = cache.reading(self.request, expected, intake)?;
        }
        self.progress.event(Event::Layer { name });
        let stored = layer.open(self.runtime)?;
        let stream = Layer::open(stored, expected, left, self.progress.clone())?;
        let recorder = reading.as_mut().map(|reading| &mut reading.recorder);
        let stream = layer::apply(stream, rootfs, intake, Whiteouts::Apply, recorder)?;
        let rest = stream.finish(expected)?;
        work.inflated_bytes += left - rest;
        if let (Some(cache), Some(reading)) = (cache, reading) {
            cache.finished(reading, left - rest, intake)?;
        }
        Ok(rest)
    }
}

/// Counts what is read of the source.
struct Counting {
    inner: Arc<dyn Progress>,
    read: AtomicU64,
}

impl Counting {
    const fn new(inner: Arc<dyn Progress>) -> Self {
        Self { inner, read: AtomicU64::new(0) }
    }

    fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

impl Progress for Counting {
    fn event(&self, event: Event<'_>) {
        if let Event::Read(bytes) = event {
            self.read.fetch_add(bytes, Ordering::Relaxed);
        }
        self.inner.event(event);
    }
}
