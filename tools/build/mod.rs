//! The builder: file systems and images become firstread images.
//!
//! ```text
//! input: layers, a tar, a directory ─ decode ─ tar ─→ rootfs (names, attributes) + intake (contents)
//! intake ─ chunks ─→ pipeline (hash, compress on all cores) ─→ spool
//! likely: what the config's command will probably read
//! arrange: numbers, groups, order of data ─→ ext4::plan ─→ metadata as chunks
//! (a raw disk is cut into chunks as it is: no rootfs, no plan) ─ verity: the hash tree behind it, if wanted
//! assemble: packs (what is likely, then all in device order), the index ─→ publish: blobs, config, manifest
//! ```
//!
//! With a build cache, a layer that an earlier build read is taken from there: its entries into the rootfs, its small files
//! into the intake, its chunks into the pipeline.
//!
//! One pass over the contents; memory grows with entries and chunks, never with contents. The result depends on the
//! source, the level, the size and the version of zstd alone: not on time, paths, or the scheduling of threads.
//!
//! Everything here blocks; the library tells a [`Progress`] what it does and prints nothing.

mod archive;
mod arrange;
mod assemble;
mod cache;
mod commit;
mod convert;
mod decode;
mod destination;
mod hot_first;
mod input;
mod intake;
mod layer;
mod likely;
mod limits;
mod metadata;
mod optimize;
mod pack;
mod pipeline;
mod progress;
mod publish;
mod raw;
mod reuse;
mod rootfs;
mod scratch;
mod tar;
mod verity;
mod walk;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use self::convert::{Converted, Work};
use self::destination::Destination;
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::oci::{Platform, Reference};
use crate::profile::Profile;
use crate::source::{Access, Publish};

pub use self::cache::CacheSettings;
pub use self::commit::{
    Change, Changed, CommitRequest, DiffRequest, Difference, DifferenceKind, FileSystemState, commit, diff,
};
pub use self::limits::Limits;
pub use self::optimize::{OptimizeRequest, StartupReport, optimize};
pub use self::progress::{Event, Progress, Silent};

/// What to build.
#[derive(Clone, Debug)]
pub struct Request {
    /// Where the files come from.
    pub source: Reference,
    /// Where the image goes: a registry, an OCI layout, or an archive of one.
    pub destination: Reference,
    /// zstd's compression level.
    pub level: i32,
    /// Size of the device in bytes; without it, as large as needed.
    pub size: Option<u64>,
    /// Earlier images whose packs may be listed again. Every chunk that one of them has is taken from there, however
    /// little else of its pack is needed: readers fetch ranges, the registry has the pack already, and a client that
    /// pulls whole layers most likely has it too. Who wants to be rid of old packs builds without.
    pub reuse: Vec<Reference>,
    /// Platforms to build; empty for all that the source has.
    pub platforms: Vec<Platform>,
    /// Where spools are made; they need room for the stored bytes and the small files, and for the stored bytes again where
    /// the destination is no OCI layout on disk.
    pub temp: PathBuf,
    /// How registries are reached.
    pub access: Access,
    /// What a source may ask for.
    pub limits: Limits,
    /// Threads that hash and compress.
    pub workers: usize,
    /// Seconds since 1970 that the image says it was created at, and that no file of a directory is younger than
    /// (`SOURCE_DATE_EPOCH`, reproducible-builds.org). Times in tars and layers stay: they are contents.
    pub source_date: Option<u64>,
    /// What is put behind the file system.
    pub tree: Tree,
    /// What a start reads: it comes first on the device, and gets a start-up pack.
    pub profile: Option<Arc<Profile>>,
    /// The build cache; layers of images are kept in it. `None`: nothing is kept.
    pub cache: Option<CacheSettings>,
}

/// What lies behind the file system or disk on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tree {
    /// Nothing.
    #[default]
    None,
    /// A dm-verity hash tree.
    Verity,
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
            source_date: None,
            tree: Tree::None,
            profile: None,
            cache: None,
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
    /// Files, directories and so on; none in a disk image, which is not looked into.
    pub inodes: u64,
    /// Root hashes of the dm-verity trees, by platform; empty without trees.
    pub verity: Vec<String>,
    /// The platforms that were built.
    pub platforms: Vec<String>,
    /// Layers of the source; what is no image is one.
    pub layers: u64,
    /// Layers that came from the build cache.
    pub cached_layers: u64,
    /// Stored bytes of the source that were read.
    pub read_bytes: u64,
    /// Plain bytes of the layers that were read.
    pub inflated_bytes: u64,
    /// Chunks that came from the build cache.
    pub cached_chunks: u64,
    /// Plain bytes of the chunks that were compressed.
    pub compressed_bytes: u64,
    /// The start-up pack, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub startup: Option<StartupReport>,
}

impl Report {
    /// Of nothing.
    fn none() -> Self {
        Self {
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
            verity: Vec::new(),
            platforms: Vec::new(),
            layers: 0,
            cached_layers: 0,
            read_bytes: 0,
            inflated_bytes: 0,
            cached_chunks: 0,
            compressed_bytes: 0,
            startup: None,
        }
    }

    fn add(&mut self, work: &Work) {
        self.layers += work.layers;
        self.cached_layers += work.cached_layers;
        self.read_bytes += work.read_bytes;
        self.inflated_bytes += work.inflated_bytes;
        self.cached_chunks += work.cached_chunks;
        self.compressed_bytes += work.compressed_bytes;
    }
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
    if request.profile.is_some() && !matches!(request.destination, Reference::Registry(_) | Reference::Layout { .. }) {
        let reason = "an image with a start-up pack goes to a registry or an OCI layout (oci:DIR)";
        return Err(Error::Unsupported(reason.to_owned()));
    }
    let runtime = runtime()?;
    let handle = runtime.handle();
    let destination = Destination::open(request, handle)?;
    let inputs = input::resolve(request, handle)?;
    let publish = if inputs.len() == 1 { Publish::Named } else { Publish::Listed };
    let mut report = Report::none();
    let mut manifests = Vec::new();
    for input in &inputs {
        let earlier: Vec<_> = request
            .reuse
            .iter()
            .map(|reference| reuse::open(reference, &input.platform, request, handle))
            .collect::<Result<_>>()?;
        let converted = convert::convert(request, input, &earlier, &destination.repository, progress, handle)?;
        let publisher = publish::Publisher {
            request,
            destination: &destination.repository,
            progress: &**progress,
            runtime: handle,
        };
        let (digest, descriptor) = publisher.image(input, &converted, &earlier, publish)?;
        let Converted { assembled, device_bytes, inodes, verity, work } = converted;
        manifests.push(descriptor);
        report.digest = digest;
        report.index_bytes += assembled.index.len() as u64;
        report.new_bytes += assembled.new_bytes;
        report.reused_bytes += assembled.reused_bytes;
        report.stored_bytes += assembled.new_bytes + assembled.reused_bytes;
        report.chunks += assembled.chunks;
        report.new_chunks += assembled.new_chunks;
        report.plain_bytes += assembled.plain_bytes;
        report.device_bytes += device_bytes;
        report.inodes += u64::from(inodes);
        report.verity.extend(verity.map(|verity| verity.root.hex()));
        report.platforms.push(input.platform.to_string());
        report.add(&work);
    }
    if publish == Publish::Listed {
        report.digest = publish::index(&manifests, &destination.repository, handle)?;
    }
    destination.finish()?;
    if let Some(profile) = &request.profile {
        add_startup(request, profile, &inputs, progress, &mut report)?;
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// What the builder talks to sources with.
fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().map_err(|error| Error::io("starting the runtime", error))
}

/// Adds the start-up pack to what was just published: its metadata and hot blocks are where they are only now.
fn add_startup(
    request: &Request,
    profile: &Arc<Profile>,
    inputs: &[input::Input],
    progress: &Arc<dyn Progress>,
    report: &mut Report,
) -> Result<()> {
    let host = Platform::host();
    let platforms: Vec<&Platform> = inputs.iter().map(|input| &input.platform).collect();
    let platform = platforms
        .iter()
        .find(|platform| ***platform == host)
        .or(platforms.first())
        .map_or(host, |first| (*first).clone());
    let made = optimize(
        &OptimizeRequest {
            platform,
            reuse: request.reuse.clone(),
            temp: request.temp.clone(),
            access: request.access.clone(),
            workers: request.workers,
            ..OptimizeRequest::new(request.destination.clone(), request.destination.clone(), (**profile).clone())
        },
        progress,
    )?;
    report.digest = made.digest;
    report.index_bytes = made.index_bytes;
    report.stored_bytes += made.new_bytes;
    report.new_bytes += made.new_bytes;
    report.new_chunks += made.new_chunks;
    report.chunks += made.new_chunks;
    report.startup = made.startup;
    Ok(())
}

/// Flattens layers that are in memory, plans a file system for the result, and throws it away: for fuzzing.
///
/// # Errors
/// What is wrong with the layers.
pub fn flatten(layers: Vec<Vec<u8>>, limits: &Limits) -> Result<u32> {
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let none = Reference::Dir(PathBuf::new());
    let request = Request { limits: *limits, ..Request::new(none.clone(), none) };
    convert::flatten(layers, &request, &progress)
}
