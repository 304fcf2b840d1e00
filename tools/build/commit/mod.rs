//! Committing: what a device's upper changed becomes a child image, over the packs of the image below it.
//!
//! ```text
//! parent (index, packs, config) + upper ─→ overlay ─→ names, free blocks ─ plan ─→ new chunks ─→ pipeline
//! parent's extents without what was replaced ─→ chunks that stay      (compact: of some packs they are stored again)
//! both ─ assemble: a pack of what is new, the child's index ─→ publish: blobs, config, manifest last
//! ```
//!
//! The device's bytes are never interpreted: what a file system says about itself decides how chunks are cut, and which
//! blocks are left out because nobody has them. Memory grows with entries, extents and chunks, not with contents.

mod change;
mod compact;
mod diff;
mod files;
mod likely;
mod parent;
mod plan;
mod ranges;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;

pub use self::change::Change;
pub use self::diff::{Changed, DiffRequest, Difference, Kind as DifferenceKind, diff};
use self::files::Files;
use self::parent::Parent;
use self::plan::{Knowledge, NewChunk, Plan, Zeros, plan};
use self::ranges::Ranges;
use super::assemble::{Parts, Startup, assemble};
use super::convert::{Converted, Work};
use super::destination::Destination;
use super::input::{Input, Root};
use super::metadata::{DeviceExtent, occupied};
use super::pipeline::{Pipeline, Settings};
use super::progress::{Event, Progress};
use super::publish::Publisher;
use super::{Report, Request, Tree, reuse};
use crate::chunk::CHUNK_SIZE;
use crate::device::upper::{Durability, Upper, UpperOptions};
use crate::device::{Device, Overlay};
use crate::error::{Error, Result};
use crate::ext4::{BLOCK_SIZE, Names, Settled, cleaned, read_free, read_names, settle};
use crate::index::{BLOCK, Extent};
use crate::oci::Reference;
use crate::source::{Access, Publish};

/// What to commit.
#[derive(Clone, Debug)]
pub struct CommitRequest {
    /// The directory of an upper that nobody has open.
    pub upper: PathBuf,
    /// What tells this start of the machine from others: a snapshot is only of this one.
    pub boot: String,
    /// The image that it lies over; `None`: what the upper says itself.
    pub parent: Option<Reference>,
    /// Where the child goes: a registry, an OCI layout, or an archive of one.
    pub destination: Reference,
    /// Further images whose packs may be listed: earlier commits of the same device, for one.
    pub reuse: Vec<Reference>,
    /// Whether its file system stood still when the upper was copied.
    pub state: FileSystemState,
    /// What becomes of the parent's configuration.
    pub changes: Vec<Change>,
    /// What was done.
    pub message: Option<String>,
    /// Who did it.
    pub author: Option<String>,
    /// When, in seconds since 1970.
    pub created: u64,
    /// zstd's compression level for new chunks.
    pub level: i32,
    /// Where spools are made.
    pub temp: PathBuf,
    /// How registries are reached.
    pub access: Access,
    /// Threads that hash and compress.
    pub workers: usize,
}

impl CommitRequest {
    /// A request with the defaults: level 3, all cores, created in 1970.
    #[must_use]
    pub fn new(upper: PathBuf, destination: Reference) -> Self {
        let request = Request::new(destination.clone(), destination.clone());
        Self {
            upper,
            boot: String::new(),
            parent: None,
            destination,
            reuse: Vec::new(),
            state: FileSystemState::AsItIs,
            changes: Vec::new(),
            message: None,
            author: None,
            created: 0,
            level: request.level,
            temp: request.temp,
            access: request.access,
            workers: request.workers,
        }
    }

    /// What the steps that a build and a commit share work with.
    fn shared(&self) -> Request {
        Request {
            level: self.level,
            temp: self.temp.clone(),
            access: self.access.clone(),
            workers: self.workers,
            source_date: Some(self.created),
            ..Request::new(self.destination.clone(), self.destination.clone())
        }
    }
}

/// How a file system was when its device was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystemState {
    /// It was frozen: everything of it was on the device, so that it may be called clean.
    Frozen,
    /// Nothing is known: it may be as after a loss of power.
    AsItIs,
}

/// Publishes what an upper changed as a child of the image that it lies over.
///
/// # Errors
/// An upper that is in use, damaged or none of that image, an image that can't be read, what the destination refuses.
/// Nothing is named at the destination before all of it is there.
pub fn commit(request: &CommitRequest, progress: &Arc<dyn Progress>) -> Result<Report> {
    let started = Instant::now();
    let runtime = super::runtime()?;
    let handle = runtime.handle();
    let shared = request.shared();
    let written = Written::open(&request.upper, &request.boot, request.parent.as_ref(), &shared, handle)?;
    let destination = Destination::open(&shared, handle)?;
    let parent = &written.parent;
    if let Some(reason) = written.settled.kept() {
        progress.event(Event::Note(&format!("the journal can't be taken out ({reason}): it is published as it is")));
    }
    let changed = written.changed();
    progress.event(Event::Image {
        platform: &parent.platform().to_string(),
        layers: 1,
        bytes: Some(changed.blocks() * u64::from(BLOCK)),
    });
    let look = written.look(handle, &**progress)?;
    let index = Arc::clone(parent.index());
    let knowledge = look.knowledge(&index, written.overlay.size(), parent.tree());
    let plan = plan(changed, &knowledge);
    let mut earlier = vec![parent.earlier(&shared, handle)?];
    for reference in &request.reuse {
        earlier.push(reuse::open(reference, parent.platform(), &shared, handle)?);
    }
    let may_list = compact::packs(&index, &plan.replaced).may_list(&earlier);
    let mut reusable = reuse::chunks(&earlier);
    reusable.retain(|_, (image, chunk)| may_list.contains(&(*image, chunk.blob)));
    let mut pipeline = Pipeline::start(Settings {
        level: request.level,
        workers: request.workers,
        temp: &request.temp,
        reusable,
        known: Arc::default(),
        progress: Arc::clone(progress),
        leaves: Tree::None,
    })?;
    let maker = Maker { written: &written, clean: request.state == FileSystemState::Frozen, runtime: handle };
    let mut extents = maker.new_chunks(&plan.chunks, &mut pipeline, &**progress)?;
    extents.extend(maker.kept(&plan, &mut pipeline)?);
    let store = pipeline.finish()?;
    extents.sort_unstable_by_key(|extent| extent.block);
    let extents = joined(extents);
    let config = parent.config(request)?;
    // For another program nobody guessed.
    let likely = if parent.runs_with(&config) { likely::jobs(&index, &extents) } else { Vec::new() };
    let draft = || destination.repository.draft(&request.temp);
    let parts = Parts {
        likely: &likely,
        extents: &extents,
        device_bytes: written.overlay.size(),
        file_system: index.file_system(),
        store: &store,
        earlier: &earlier,
        level: request.level,
        workers: request.workers,
        draft: &draft,
        startup: Startup::of(&index, |extent| !plan.replaced.meets(&(extent.block..extent.block + extent.blocks))),
    };
    let assembled = assemble(&parts, &**progress)?;
    let input = Input {
        platform: parent.platform().clone(),
        config,
        annotations: parent.annotations(),
        root: Root::Layers(Vec::new()),
    };
    let device_bytes = written.overlay.size();
    let inodes = look.names.as_ref().map_or(0, Names::len);
    let converted = Converted { assembled, device_bytes, inodes, verity: None, work: Work::default() };
    let publisher =
        Publisher { request: &shared, destination: &destination.repository, progress: &**progress, runtime: handle };
    let (digest, _) = publisher.image(&input, &converted, &earlier, Publish::Named)?;
    destination.finish()?;
    let Converted { assembled, .. } = converted;
    let (_, compressed_bytes) = store.work();
    Ok(Report {
        digest,
        index_bytes: assembled.index.len() as u64,
        stored_bytes: assembled.new_bytes + assembled.reused_bytes,
        new_bytes: assembled.new_bytes,
        reused_bytes: assembled.reused_bytes,
        chunks: assembled.chunks,
        new_chunks: assembled.new_chunks,
        seconds: started.elapsed().as_secs_f64(),
        device_bytes,
        plain_bytes: assembled.plain_bytes,
        inodes: u64::from(inodes),
        platforms: vec![parent.platform().to_string()],
        compressed_bytes,
        ..Report::none()
    })
}

/// An upper over the image that it belongs to, as it is after a replay of its file system's journal and without that.
struct Written {
    parent: Parent,
    overlay: Arc<Overlay>,
    settled: Settled,
}

impl Written {
    fn open(
        dir: &std::path::Path,
        boot: &str,
        parent: Option<&Reference>,
        shared: &Request,
        runtime: &Handle,
    ) -> Result<Self> {
        let Some((lower, _)) = crate::device::upper::describe(dir)? else {
            return Err(Error::invalid("upper", format!("there is none in {}", dir.display())));
        };
        let reference = match parent {
            Some(parent) => parent.clone(),
            None => parent::pinned(&lower)?,
        };
        let parent = Parent::open(&reference, shared, runtime)?;
        let options = UpperOptions { size: None, durability: Durability::Kept, boot: boot.to_owned() };
        let upper = Upper::open_existing(dir, &parent.identity(), &options)?;
        let overlay = Overlay::new(Arc::clone(parent.device()) as Arc<dyn Device>, Arc::new(upper))?;
        let settled = settle(overlay.size(), &mut |block, buf| device_read(&overlay, block, buf, runtime));
        let settled = settled.map_err(|error| match error {
            Error::Invalid { reason, .. } => {
                let next = "mount the device and unmount it, or check it with e2fsck, and then try again";
                Error::invalid(format!("upper {}", dir.display()), format!("{reason}: {next}"))
            }
            error => error,
        })?;
        Ok(Self { parent, overlay, settled })
    }

    /// The blocks that were written, or would be by a replay.
    fn changed(&self) -> Ranges {
        // A device has at most as many blocks as a u32 counts.
        let block = |block: u64| u32::try_from(block).unwrap_or(u32::MAX);
        let written = self.overlay.upper().changed().map(|run| block(run.start)..block(run.end));
        Ranges::new(written.chain(self.settled.blocks().map(|block| block..block + 1)).collect())
    }

    fn read(&self, block: u32, buf: &mut [u8], runtime: &Handle) -> Result<()> {
        self.settled.read(block, buf, &mut |block, buf| device_read(&self.overlay, block, buf, runtime))
    }

    /// Looks into the file system. One that is damaged is a device without one.
    fn look(&self, runtime: &Handle, progress: &dyn Progress) -> Result<Look> {
        let bytes = self.overlay.size();
        let mut failed = None;
        let mut read = |block: u32, buf: &mut [u8]| {
            self.read(block, buf, runtime).inspect_err(|error| failed = Some(error.clone()))
        };
        let found = read_names(bytes, &mut read).and_then(|names| match names {
            Some(names) => Ok(Some((names, read_free(bytes, &mut read)?))),
            None => Ok(None),
        });
        match (found, failed) {
            // What can't be read is no reason to publish.
            (Err(_), Some(error)) => Err(error),
            (Err(error), None) => {
                let note = format!("the file system can't be looked into ({error}): chunks are cut by place");
                progress.event(Event::Note(&note));
                Ok(Look { names: None, free: Vec::new() })
            }
            (Ok(Some((names, free))), _) => Ok(Look { names: Some(names), free }),
            (Ok(None), _) => {
                if self.parent.index().file_system() == "ext4" {
                    let note = "there is no clean ext4 (it may have a journal to be replayed): chunks are cut by place";
                    progress.event(Event::Note(note));
                }
                Ok(Look { names: None, free: Vec::new() })
            }
        }
    }
}

fn device_read(overlay: &Overlay, block: u32, buf: &mut [u8], runtime: &Handle) -> Result<()> {
    runtime.block_on(overlay.read_at(u64::from(block) * u64::from(BLOCK), buf))
}

/// What a look into the file system showed.
struct Look {
    names: Option<Names>,
    free: Vec<std::ops::Range<u32>>,
}

impl Look {
    /// `tree` is where the parent's dm-verity tree begins, which is wrong from now on: nobody has it.
    fn knowledge<'a>(&'a self, index: &'a crate::index::Index, bytes: u64, tree: Option<u32>) -> Knowledge<'a> {
        let device_blocks = u32::try_from(bytes / u64::from(BLOCK)).unwrap_or(u32::MAX);
        let tree = tree.map(|first| first..u32::try_from(index.device_bytes() / u64::from(BLOCK)).unwrap_or(u32::MAX));
        let free = Ranges::new(self.free.iter().cloned().chain(tree).collect());
        let Some(names) = &self.names else {
            return Knowledge { index, files: None, free, device_blocks };
        };
        let files = Files::new(names);
        // Whoever has a block has it, whatever a bitmap says.
        let own = names.runs().iter().map(|run| run.block..run.block + run.blocks);
        let single = (0..names.len()).flat_map(|name| names.own_blocks(name).iter().map(|block| *block..block + 1));
        let free = free.without(&Ranges::new(own.chain(single).collect()));
        Knowledge { index, files: Some(files), free, device_blocks }
    }
}

/// Makes chunks and extents.
struct Maker<'a> {
    written: &'a Written,
    /// Whether the file system is to be called clean.
    clean: bool,
    runtime: &'a Handle,
}

impl Maker<'_> {
    /// Forms the new chunks.
    fn new_chunks(
        &self,
        chunks: &[NewChunk],
        pipeline: &mut Pipeline,
        progress: &dyn Progress,
    ) -> Result<Vec<DeviceExtent>> {
        let mut extents = Vec::new();
        for chunk in chunks {
            let mut buffer = pipeline.buffer()?;
            match self.fill(chunk, &mut buffer) {
                Ok((0, _)) => pipeline.return_buffer(buffer),
                Ok((used, mut parts)) => {
                    let job = pipeline.submit(buffer, used)?;
                    parts.iter_mut().for_each(|part| part.job = job);
                    extents.extend(parts);
                    progress.event(Event::Read(used as u64));
                }
                Err(error) => {
                    pipeline.return_buffer(buffer);
                    return Err(error);
                }
            }
        }
        Ok(extents)
    }

    /// Reads a chunk's blocks; how long it is, and where its parts belong.
    fn fill(&self, chunk: &NewChunk, buffer: &mut [u8]) -> Result<(usize, Vec<DeviceExtent>)> {
        let too_long = || Error::invalid("commit", "a chunk is too long");
        let mut used = 0;
        let mut extents = Vec::new();
        for (block, blocks) in &chunk.parts {
            let len = *blocks as usize * BLOCK_SIZE;
            let place = buffer.get_mut(used..used + len).ok_or_else(too_long)?;
            self.written.read(*block, place, self.runtime)?;
            if *block == 0
                && self.clean
                && let Some(first) = place.first_chunk_mut::<BLOCK_SIZE>()
                && let Some(cleaned) = cleaned(first)
            {
                *first = cleaned;
            }
            let whole = [(0, *blocks as usize)];
            let runs = match chunk.zeros {
                Zeros::Kept => whole.to_vec(),
                Zeros::LeftOut => occupied(place),
            };
            for (first, count) in runs {
                extents.push(DeviceExtent {
                    block: block + first as u32,
                    blocks: count as u32,
                    job: 0,
                    offset: (used + first * BLOCK_SIZE) as u32,
                });
            }
            used += len;
        }
        Ok((pack_down(buffer, &mut extents), extents))
    }

    /// The parent's extents where nothing replaced them; chunks that can't be taken from there are stored again.
    fn kept(&self, plan: &Plan, pipeline: &mut Pipeline) -> Result<Vec<DeviceExtent>> {
        let index = self.written.parent.index();
        let mut jobs: HashMap<u32, u32> = HashMap::new();
        let mut extents = Vec::new();
        let kept =
            |extent: &Extent| plan.replaced.outside(&(extent.block..extent.block + extent.blocks)).collect::<Vec<_>>();
        // What is not local is fetched together.
        let mut wanted: Vec<u32> = Vec::new();
        for extent in index.extents().iter().filter(|extent| !kept(extent).is_empty()) {
            let Some(chunk) = index.chunk(extent.chunk) else { continue };
            if !pipeline.has(&chunk.digest, chunk.plain_len)? {
                wanted.push(extent.chunk);
            }
        }
        wanted.sort_unstable();
        wanted.dedup();
        self.written.parent.fetch(&wanted, self.runtime)?;
        for extent in index.extents().iter() {
            let parts = kept(&extent);
            if parts.is_empty() {
                continue;
            }
            let job = match jobs.get(&extent.chunk) {
                Some(job) => *job,
                None => {
                    let job = self.known(extent.chunk, pipeline)?;
                    jobs.insert(extent.chunk, job);
                    job
                }
            };
            extents.extend(parts.into_iter().map(|part| DeviceExtent {
                block: part.start,
                blocks: part.end - part.start,
                job,
                offset: extent.offset + (part.start - extent.block) * BLOCK,
            }));
        }
        Ok(extents)
    }

    /// The job that stands for a chunk of the parent.
    fn known(&self, number: u32, pipeline: &mut Pipeline) -> Result<u32> {
        let index = self.written.parent.index();
        let missing = || Error::invalid("index", format!("it has no chunk {number}"));
        let chunk = index.chunk(number).ok_or_else(missing)?;
        if pipeline.has(&chunk.digest, chunk.plain_len)? {
            return pipeline.finished(Some(&chunk.digest));
        }
        let plain = self.written.parent.chunk(number, self.runtime)?;
        let bytes = plain.bytes();
        if bytes.len() > CHUNK_SIZE as usize {
            let reason = format!("a chunk of {} bytes can't be stored again", bytes.len());
            return Err(Error::Unsupported(reason));
        }
        let mut buffer = pipeline.buffer()?;
        buffer.get_mut(..bytes.len()).ok_or_else(missing)?.copy_from_slice(bytes);
        pipeline.submit(buffer, bytes.len())
    }
}

/// Moves the parts of a chunk together; how long it is then.
fn pack_down(buffer: &mut [u8], extents: &mut [DeviceExtent]) -> usize {
    let mut used = 0;
    for extent in extents {
        let (from, len) = (extent.offset as usize, extent.blocks as usize * BLOCK_SIZE);
        buffer.copy_within(from..from + len, used);
        extent.offset = used as u32;
        used += len;
    }
    used
}

/// Neighbours that are one piece of one chunk are one extent.
fn joined(extents: Vec<DeviceExtent>) -> Vec<DeviceExtent> {
    let mut all: Vec<DeviceExtent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match all.last_mut() {
            Some(last)
                if last.job == extent.job
                    && last.block + last.blocks == extent.block
                    && last.offset + last.blocks * BLOCK == extent.offset =>
            {
                last.blocks += extent.blocks;
            }
            _ => all.push(extent),
        }
    }
    all
}
