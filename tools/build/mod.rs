//! The builder: file systems and images become firstread images.
//!
//! ```text
//! input: layers, a tar, a directory ─ decode ─ tar ─→ rootfs (names, attributes) + intake (contents)
//! intake ─ chunks ─→ pipeline (hash, compress on all cores) ─→ spool
//! arrange: numbers, groups, order of data ─→ ext4::plan ─→ metadata as chunks
//! assemble: packs in device order, the index ─→ publish: blobs, config, manifest
//! ```
//!
//! One pass over the contents; memory grows with entries and chunks, never with contents. The result depends on the
//! source, the level, the size and the version of zstd alone: not on time, paths, or the scheduling of threads.
//!
//! Everything here blocks; the library tells a [`Progress`] what it does and prints nothing.

mod archive;
mod arrange;
mod assemble;
mod decode;
mod input;
mod intake;
mod layer;
mod limits;
mod metadata;
mod pack;
mod pipeline;
mod progress;
mod publish;
mod reuse;
mod rootfs;
mod tar;
mod walk;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tokio::runtime::Handle;

use self::arrange::{Arranged, DataRun};
use self::assemble::{Assembled, Parts};
use self::decode::{Expected, Layer};
use self::input::{Input, Root};
use self::intake::Intake;
use self::metadata::{MetadataExtent, Windows};
use self::pipeline::{Pipeline, Settings, Store};
use self::rootfs::{Rootfs, Whiteouts};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::ext4;
use crate::oci::{Platform, Reference};
use crate::source::{Access, Publish, Purpose, Repository};

pub use self::limits::Limits;
pub use self::progress::{Event, Progress, Silent};

/// What to build.
#[derive(Clone, Debug)]
pub struct Request {
    /// Where the files come from.
    pub source: Reference,
    /// Where the image goes: a registry or an OCI layout.
    pub destination: Reference,
    /// zstd's compression level.
    pub level: i32,
    /// Size of the device in bytes; without it, as large as needed.
    pub size: Option<u64>,
    /// Earlier images whose packs may be listed again.
    pub reuse: Vec<Reference>,
    /// Platforms to build; empty for all that the source has.
    pub platforms: Vec<Platform>,
    /// Where spools are made; they need room for the stored bytes twice, and for the small files.
    pub temp: PathBuf,
    /// How registries are reached.
    pub access: Access,
    /// What a source may ask for.
    pub limits: Limits,
    /// Threads that hash and compress.
    pub workers: usize,
}

impl Request {
    /// A request with the defaults: level 3, all platforms, all cores.
    #[must_use]
    pub fn new(source: Reference, destination: Reference) -> Self {
        Self {
            source,
            destination,
            level: 3,
            size: None,
            reuse: Vec::new(),
            platforms: Vec::new(),
            temp: std::env::temp_dir(),
            access: Access::default(),
            limits: Limits::default(),
            workers: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// What was built. Sizes are in bytes and summed over all platforms.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Digest of the manifest, or of the image index of several platforms.
    #[serde(serialize_with = "text")]
    pub digest: Digest,
    /// Plain length of the index.
    pub index_bytes: u64,
    /// Stored bytes of all chunks.
    pub stored_bytes: u64,
    /// Stored bytes that no earlier image has.
    pub new_bytes: u64,
    /// Stored bytes in packs of earlier images.
    pub reused_bytes: u64,
    /// Chunks, each counted once.
    pub chunks: u64,
    /// Chunks that no earlier image has.
    pub new_chunks: u64,
    /// How long it took.
    pub seconds: f64,
    /// Length of the device.
    pub device_bytes: u64,
    /// Plain bytes of all chunks.
    pub plain_bytes: u64,
    /// Files, directories and so on.
    pub inodes: u64,
    /// The platforms that were built.
    pub platforms: Vec<String>,
}

fn text<S: serde::Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(digest)
}

/// Builds an image and publishes it.
///
/// # Errors
/// What is wrong with the source (with the layer and the path), what can't be read or written, what the destination
/// refuses. Nothing is named at the destination before all of it is there.
pub fn build(request: &Request, progress: &Arc<dyn Progress>) -> Result<Report> {
    let started = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::io("starting the runtime", error))?;
    let handle = runtime.handle();
    let destination = handle.block_on(Repository::open(&request.destination, &request.access, Purpose::Push))?;
    let inputs = input::resolve(request, handle)?;
    let publish = if inputs.len() == 1 { Publish::Named } else { Publish::Listed };
    let mut report = Report {
        digest: Digest::of(&[]),
        index_bytes: 0,
        stored_bytes: 0,
        new_bytes: 0,
        reused_bytes: 0,
        chunks: 0,
        new_chunks: 0,
        seconds: 0.0,
        device_bytes: 0,
        plain_bytes: 0,
        inodes: 0,
        platforms: Vec::new(),
    };
    let mut manifests = Vec::new();
    for input in &inputs {
        let earlier: Vec<_> = request
            .reuse
            .iter()
            .map(|reference| reuse::open(reference, &input.platform, request, handle))
            .collect::<Result<_>>()?;
        let (plan, assembled) = convert(request, input, &earlier, progress, handle)?;
        let (digest, descriptor) =
            publish::image(input, &assembled, &earlier, &destination, publish, &**progress, handle)?;
        manifests.push(descriptor);
        report.digest = digest;
        report.index_bytes += assembled.index.len() as u64;
        report.new_bytes += assembled.new_bytes;
        report.reused_bytes += assembled.reused_bytes;
        report.stored_bytes += assembled.new_bytes + assembled.reused_bytes;
        report.chunks += assembled.chunks;
        report.new_chunks += assembled.new_chunks;
        report.plain_bytes += assembled.plain_bytes;
        report.device_bytes += plan.device_bytes();
        report.inodes += u64::from(plan.inodes());
        report.platforms.push(input.platform.to_string());
    }
    if publish == Publish::Listed {
        report.digest = publish::index(&manifests, &destination, handle)?;
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Flattens layers that are in memory, plans a file system for the result, and throws it away: for fuzzing.
///
/// # Errors
/// What is wrong with the layers.
pub fn flatten(layers: Vec<Vec<u8>>, limits: &Limits) -> Result<u32> {
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let temp = std::env::temp_dir();
    let settings =
        Settings { level: 1, workers: 1, temp: &temp, reusable: pipeline::Reusable::new(), progress: progress.clone() };
    let mut intake = Intake::new(Pipeline::start(settings)?, &temp)?;
    let mut rootfs = Rootfs::new(limits);
    let (expected, mut left) = (Expected::default(), limits.plain_bytes);
    for layer in layers {
        rootfs.next_layer();
        let stream = Layer::open(Box::new(std::io::Cursor::new(layer)), &expected, left, progress.clone())?;
        left = layer::apply(stream, &mut rootfs, &mut intake, Whiteouts::Apply)?.finish(&expected)?;
    }
    let (_, plan) = plan(arrange::arrange(rootfs, intake)?, None)?;
    Ok(plan.inodes())
}

/// Plans the file system and turns its metadata into chunks.
fn plan(arranged: Arranged, size: Option<u64>) -> Result<(Ready, ext4::Plan)> {
    let Arranged { tree, data_order, runs, seed, mut pipeline } = arranged;
    let options = ext4::Options { seed, size, data_order, ..ext4::Options::default() };
    let plan = ext4::plan(&tree, &options)?;
    let mut windows = Windows::new(&mut pipeline);
    plan.write_metadata(&tree, &mut |block, bytes| windows.write(block, bytes))?;
    let metadata = windows.finish()?;
    // The tree is large, and its place is needed from here on.
    drop(tree);
    Ok((Ready { metadata, runs, store: pipeline.finish()? }, plan))
}

/// Everything that goes into packs.
struct Ready {
    metadata: Vec<MetadataExtent>,
    runs: Vec<DataRun>,
    store: Store,
}

/// One platform: from its layers to packs and an index.
fn convert(
    request: &Request,
    input: &Input,
    earlier: &[reuse::Earlier],
    progress: &Arc<dyn Progress>,
    runtime: &Handle,
) -> Result<(ext4::Plan, Assembled)> {
    let pipeline = Pipeline::start(Settings {
        level: request.level,
        workers: request.workers,
        temp: &request.temp,
        reusable: reuse::chunks(earlier),
        progress: progress.clone(),
    })?;
    let mut intake = Intake::new(pipeline, &request.temp)?;
    let mut rootfs = Rootfs::new(&request.limits);
    read(request, input, &mut rootfs, &mut intake, progress, runtime)?;
    let (ready, plan) = plan(arrange::arrange(rootfs, intake)?, request.size)?;
    let parts = Parts {
        plan: &plan,
        metadata: &ready.metadata,
        runs: &ready.runs,
        store: &ready.store,
        earlier,
        level: request.level,
        workers: request.workers,
        temp: &request.temp,
    };
    let assembled = assemble::assemble(&parts, &**progress)?;
    Ok((plan, assembled))
}

/// Reads the source into the tree, and its contents into chunks.
fn read(
    request: &Request,
    input: &Input,
    rootfs: &mut Rootfs,
    intake: &mut Intake,
    progress: &Arc<dyn Progress>,
    runtime: &Handle,
) -> Result<()> {
    let platform = input.platform.to_string();
    let image = |layers, bytes| progress.event(Event::Image { platform: &platform, layers, bytes });
    match &input.root {
        Root::Directory(path) => {
            image(1, None);
            progress.event(Event::Layer { name: &path.display().to_string() });
            walk::walk(path, rootfs, intake, &**progress)
        }
        Root::Tar(path) => {
            let (stored, bytes) = input::open_tar(path)?;
            image(1, bytes);
            let name = path.display().to_string();
            progress.event(Event::Layer { name: &name });
            let expected = Expected::default();
            let layer = Layer::open(stored, &expected, request.limits.plain_bytes, progress.clone());
            layer
                .and_then(|layer| layer::apply(layer, rootfs, intake, Whiteouts::Keep))
                .and_then(|layer| layer.finish(&expected))
                .map(drop)
                .map_err(|error| layer::context(error, &name))
        }
        Root::Layers(layers) => {
            image(layers.len(), Some(layers.iter().map(|layer| layer.bytes).sum()));
            let mut left = request.limits.plain_bytes;
            for layer in layers {
                progress.event(Event::Layer { name: &layer.name });
                rootfs.next_layer();
                let stream =
                    layer.open(runtime).and_then(|stored| Layer::open(stored, &layer.expected, left, progress.clone()));
                left = stream
                    .and_then(|stream| layer::apply(stream, rootfs, intake, Whiteouts::Apply))
                    .and_then(|stream| stream.finish(&layer.expected))
                    .map_err(|error| layer::context(error, &format!("layer {}", layer.name)))?;
            }
            Ok(())
        }
    }
}
