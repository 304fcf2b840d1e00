//! From plain bytes to stored chunks: one thread cuts, workers on all cores hash and compress, a spool keeps the result.
//!
//! A job is one chunk's plain bytes. Jobs are numbered in the order of their submission, which does not depend on how
//! the workers are scheduled; where a stored chunk lies in the spool does, and nothing that leaves the builder may
//! depend on that. Buffers and zstd contexts are made once and go round: memory is bounded by their number.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use zstd::bulk::Compressor;

use super::cache::{CacheFile, Kept, read_chunk};
use super::progress::{Event, Progress};
use super::{Tree, verity};
use crate::chunk::{CHUNK_SIZE, ChunkRef, Digest, is_zero};
use crate::error::{Error, Result};
use crate::source::files::unlinked;

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The bytes were all zero: nothing is stored.
    Hole,
    /// Number of a chunk in [`Store::chunks`].
    Chunk(u32),
    /// No worker is done with it yet.
    Pending,
}

/// Where a chunk's stored bytes are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// In the spool.
    Spool { offset: u64, len: u32 },
    /// In a pack of an earlier image: number of the image, and the chunk in it.
    Reused { image: usize, chunk: ChunkRef },
}

/// A chunk that the image needs, listed once however often it occurs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    pub digest: Digest,
    pub plain_len: u32,
    pub place: Place,
    pub origin: Origin,
}

/// Where a chunk's stored bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// They were compressed in this build.
    Made,
    /// They were in the build cache.
    Cached,
    /// An earlier image has them.
    Earlier,
}

/// Chunks in the files of the build cache, with the number of the file.
#[derive(Default)]
pub(super) struct Known {
    pub files: Vec<KnownFile>,
    pub chunks: HashMap<Digest, (usize, Kept)>,
}

/// A file of such chunks, and what became of it.
pub(super) struct KnownFile {
    pub file: CacheFile,
    pub used: AtomicBool,
    pub damaged: AtomicBool,
}

impl Known {
    /// Reads a chunk's stored bytes into `stored`, if they are there and undamaged.
    fn read(&self, digest: &Digest, plain_len: u32, stored: &mut Vec<u8>) -> Option<()> {
        let (file, chunk) = self.chunks.get(digest)?;
        let file = self.files.get(*file)?;
        if chunk.plain_len != plain_len || chunk.stored_len == 0 || !read_chunk(&file.file.file, chunk, stored) {
            file.damaged.store(true, Ordering::Relaxed);
            return None;
        }
        file.used.store(true, Ordering::Relaxed);
        Some(())
    }
}

/// Chunks of earlier images that need not be stored again, with the number of the image.
pub(super) type Reusable = HashMap<Digest, (usize, ChunkRef)>;

struct Job {
    number: u32,
    buffer: Vec<u8>,
    len: usize,
}

#[derive(Default)]
struct Table {
    by_digest: HashMap<Digest, u32>,
    chunks: Vec<Stored>,
    outcomes: Vec<Outcome>,
}

impl Table {
    /// Adds a chunk that is not there; its number.
    fn add(&mut self, chunk: Stored) -> Result<u32> {
        let number = u32::try_from(self.chunks.len()).map_err(|_| Error::invalid("source", "too many chunks"))?;
        self.by_digest.insert(chunk.digest, number);
        self.chunks.push(chunk);
        Ok(number)
    }
}

struct Shared {
    table: Mutex<Table>,
    spool: File,
    spool_end: AtomicU64,
    reusable: Reusable,
    known: Arc<Known>,
    /// The hashes of each chunk's blocks, by the chunk's number.
    leaves: Option<File>,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    progress: Arc<dyn Progress>,
}

impl Shared {
    /// Writes stored bytes to the spool.
    fn spool(&self, stored: &[u8]) -> Result<Place> {
        let offset = self.spool_end.fetch_add(stored.len() as u64, Ordering::Relaxed);
        self.spool.write_all_at(stored, offset).map_err(|error| {
            Error::io("writing the spool of stored chunks (--temp or TMPDIR says where it is)", error)
        })?;
        Ok(Place::Spool { offset, len: stored.len() as u32 })
    }

    /// Keeps the hashes of a chunk's blocks, if a hash tree is to be made.
    fn write_leaves(&self, number: u32, plain: &[u8]) -> Result<()> {
        let Some(leaves) = &self.leaves else { return Ok(()) };
        leaves
            .write_all_at(&verity::leaves(plain), u64::from(number) * verity::LEAVES_BYTES)
            .map_err(|error| Error::io("writing the spool of hashes (--temp or TMPDIR says where it is)", error))
    }
}

/// The running workers.
pub(super) struct Pipeline {
    jobs: Option<Sender<Job>>,
    free: Receiver<Vec<u8>>,
    give_back: Sender<Vec<u8>>,
    buffers: usize,
    submitted: u32,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// How the pipeline is to work.
pub(super) struct Settings<'a> {
    /// zstd's compression level.
    pub level: i32,
    /// How many workers.
    pub workers: usize,
    /// Where the unlinked spool is made.
    pub temp: &'a Path,
    pub reusable: Reusable,
    pub known: Arc<Known>,
    pub progress: Arc<dyn Progress>,
    /// Whether the leaves of a hash tree are computed.
    pub leaves: Tree,
}

impl Pipeline {
    pub(super) fn start(settings: Settings<'_>) -> Result<Self> {
        let workers = settings.workers.max(1);
        let buffers = workers * 4 + 4;
        let (jobs, incoming) = bounded::<Job>(buffers);
        let (give_back, free) = bounded::<Vec<u8>>(buffers);
        for _ in 0..buffers {
            let _ = give_back.send(vec![0; CHUNK_SIZE as usize]);
        }
        let shared = Arc::new(Shared {
            table: Mutex::default(),
            spool: unlinked(settings.temp)?,
            spool_end: AtomicU64::new(0),
            reusable: settings.reusable,
            known: settings.known,
            leaves: match settings.leaves {
                Tree::None => None,
                Tree::Verity => Some(unlinked(settings.temp)?),
            },
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            progress: settings.progress,
        });
        let mut pipeline =
            Self { jobs: Some(jobs), free, give_back, buffers, submitted: 0, shared, workers: Vec::new() };
        for number in 0..workers {
            let compressor = Compressor::new(settings.level)
                .map_err(|error| Error::io(format!("compressing at level {}", settings.level), error))?;
            let (shared, incoming, give_back) = (pipeline.shared.clone(), incoming.clone(), pipeline.give_back.clone());
            let worker = std::thread::Builder::new()
                .name(format!("compress-{number}"))
                .spawn(move || work(&shared, &incoming, &give_back, compressor))
                .map_err(|error| Error::io("starting a worker", error))?;
            pipeline.workers.push(worker);
        }
        Ok(pipeline)
    }

    /// A buffer of [`CHUNK_SIZE`] bytes with anything in it; waits until a worker gives one back.
    pub(super) fn buffer(&self) -> Result<Vec<u8>> {
        self.check()?;
        self.free.recv().map_err(|_| self.stopped())
    }

    /// Hands over the first `len` bytes of `buffer` as the next job, and returns its number.
    pub(super) fn submit(&mut self, buffer: Vec<u8>, len: usize) -> Result<u32> {
        self.check()?;
        let number = self.submitted;
        self.submitted = number.checked_add(1).ok_or_else(|| Error::invalid("source", "too many chunks"))?;
        self.shared.table.lock().outcomes.push(Outcome::Pending);
        let jobs = self.jobs.as_ref().ok_or_else(|| self.stopped())?;
        jobs.send(Job { number, buffer, len }).map_err(|_| self.stopped())?;
        Ok(number)
    }

    /// Whether a chunk can be had without its plain bytes: it was seen already, or an earlier image has it.
    pub(super) fn has(&self, digest: &Digest, plain_len: u32) -> Result<bool> {
        let mut table = self.shared.table.lock();
        if table.by_digest.contains_key(digest) {
            return Ok(true);
        }
        // The leaves of a hash tree are made of plain bytes.
        if self.shared.leaves.is_some() {
            return Ok(false);
        }
        let Some((image, chunk)) = self.shared.reusable.get(digest) else { return Ok(false) };
        let place = Place::Reused { image: *image, chunk: *chunk };
        table.add(Stored { digest: *digest, plain_len, place, origin: Origin::Earlier })?;
        drop(table);
        self.shared.progress.event(Event::Chunk { plain: plain_len, stored: chunk.stored_len, reused: true });
        Ok(true)
    }

    /// Takes a chunk whose stored bytes are known, unless it is there.
    pub(super) fn adopt(&self, digest: &Digest, plain_len: u32, stored: &[u8]) -> Result<()> {
        if self.has(digest, plain_len)? {
            return Ok(());
        }
        let reusable = self.shared.reusable.get(digest);
        let (place, origin) = match reusable {
            Some((image, chunk)) => (Place::Reused { image: *image, chunk: *chunk }, Origin::Earlier),
            None => (self.shared.spool(stored)?, Origin::Cached),
        };
        let number = self.shared.table.lock().add(Stored { digest: *digest, plain_len, place, origin })?;
        if self.shared.leaves.is_some() {
            let plain = zstd::bulk::decompress(stored, plain_len as usize)
                .map_err(|error| Error::io(format!("inflating chunk {digest}"), error))?;
            self.shared.write_leaves(number, &plain)?;
        }
        let reused = reusable.is_some();
        self.shared.progress.event(Event::Chunk { plain: plain_len, stored: stored.len() as u32, reused });
        Ok(())
    }

    /// Adds a job that is done already: it became the chunk with this digest, or a hole.
    pub(super) fn finished(&mut self, digest: Option<&Digest>) -> Result<u32> {
        let number = self.submitted;
        let mut table = self.shared.table.lock();
        let outcome = match digest {
            None => Outcome::Hole,
            Some(digest) => {
                let missing = || Error::invalid("build", format!("there is no chunk {digest}"));
                Outcome::Chunk(*table.by_digest.get(digest).ok_or_else(missing)?)
            }
        };
        table.outcomes.push(outcome);
        self.submitted = number.checked_add(1).ok_or_else(|| Error::invalid("source", "too many chunks"))?;
        Ok(number)
    }

    /// The number that the next job will get.
    pub(super) const fn next_job(&self) -> u32 {
        self.submitted
    }

    /// Gives back a buffer that is not needed after all.
    pub(super) fn return_buffer(&self, buffer: Vec<u8>) {
        let _ = self.give_back.send(buffer);
    }

    /// Waits until all jobs are done: then all buffers are back.
    pub(super) fn wait(&self) -> Result<()> {
        let idle: Vec<_> = self.free.iter().take(self.buffers).collect();
        for buffer in idle {
            self.return_buffer(buffer);
        }
        self.check()
    }

    /// The digest of what a finished job held, `None` for a hole.
    pub(super) fn digest(&self, job: u32) -> Option<Digest> {
        let table = self.shared.table.lock();
        match table.outcomes.get(job as usize)? {
            Outcome::Chunk(chunk) => table.chunks.get(*chunk as usize).map(|chunk| chunk.digest),
            Outcome::Hole | Outcome::Pending => None,
        }
    }

    /// The number of the chunk that a finished job became, `None` for a hole.
    pub(super) fn chunk(&self, job: u32) -> Option<u32> {
        match self.shared.table.lock().outcomes.get(job as usize)? {
            Outcome::Chunk(chunk) => Some(*chunk),
            Outcome::Hole | Outcome::Pending => None,
        }
    }

    /// What a finished job became: its digest, plain length and place; `None` for a hole.
    pub(super) fn stored(&self, job: u32) -> Result<Option<(Digest, u32, Place)>> {
        let table = self.shared.table.lock();
        match table.outcomes.get(job as usize) {
            Some(Outcome::Chunk(chunk)) => {
                Ok(table.chunks.get(*chunk as usize).map(|chunk| (chunk.digest, chunk.plain_len, chunk.place)))
            }
            Some(Outcome::Hole) => Ok(None),
            Some(Outcome::Pending) | None => Err(Error::invalid("build", format!("chunk job {job} was not done"))),
        }
    }

    /// Reads stored bytes back.
    pub(super) fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>> {
        let mut stored = vec![0; len as usize];
        let read = self.shared.spool.read_exact_at(&mut stored, offset);
        read.map(|()| stored).map_err(|error| Error::io("reading the spool", error))
    }

    /// The hashes of chunks' blocks: of chunk `n` from `n` × [`verity::LEAVES_BYTES`] on.
    pub(super) fn leaves(&self) -> Result<File> {
        let missing = || Error::invalid("build", "no hashes of blocks were kept");
        let file = self.shared.leaves.as_ref().ok_or_else(missing)?;
        file.try_clone().map_err(|error| Error::io("opening the spool of hashes again", error))
    }

    /// Ends the workers and gives out what they made.
    pub(super) fn finish(mut self) -> Result<Store> {
        self.wait()?;
        self.stop();
        let table = std::mem::take(&mut *self.shared.table.lock());
        let spool = self.shared.spool.try_clone().map_err(|error| Error::io("opening the spool again", error))?;
        Ok(Store { outcomes: table.outcomes, chunks: table.chunks, spool })
    }

    fn stop(&mut self) {
        self.jobs = None;
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }

    fn check(&self) -> Result<()> {
        if self.shared.failed.load(Ordering::Relaxed) { Err(self.stopped()) } else { Ok(()) }
    }

    fn stopped(&self) -> Error {
        self.shared.failure.lock().clone().unwrap_or_else(|| Error::Stopping("the builder".into()))
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.shared.failed.store(true, Ordering::Relaxed);
        self.stop();
    }
}

/// What the pipeline made.
pub(super) struct Store {
    /// By job.
    outcomes: Vec<Outcome>,
    chunks: Vec<Stored>,
    spool: File,
}

impl Store {
    pub(super) fn outcome(&self, job: u32) -> Result<Outcome> {
        match self.outcomes.get(job as usize) {
            Some(Outcome::Pending) | None => Err(Error::invalid("build", format!("chunk job {job} was not done"))),
            Some(outcome) => Ok(*outcome),
        }
    }

    pub(super) fn chunk(&self, number: u32) -> Result<&Stored> {
        self.chunks.get(number as usize).ok_or_else(|| Error::invalid("build", format!("no chunk {number}")))
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// How many jobs there were.
    pub(super) fn jobs(&self) -> u32 {
        self.outcomes.len() as u32
    }

    /// Chunks from the build cache, and plain bytes of those that were compressed.
    pub(super) fn work(&self) -> (u64, u64) {
        self.chunks.iter().fold((0, 0), |(cached, made), chunk| match chunk.origin {
            Origin::Cached => (cached + 1, made),
            Origin::Made => (cached, made + u64::from(chunk.plain_len)),
            Origin::Earlier => (cached, made),
        })
    }

    /// Reads stored bytes back.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.spool.read_exact_at(buf, offset).map_err(|error| Error::io("reading the spool", error))
    }
}

fn work(shared: &Shared, jobs: &Receiver<Job>, give_back: &Sender<Vec<u8>>, mut compressor: Compressor<'static>) {
    let mut stored = Vec::with_capacity(zstd::zstd_safe::compress_bound(CHUNK_SIZE as usize));
    for Job { number, buffer, len } in jobs {
        if !shared.failed.load(Ordering::Relaxed) {
            let plain = buffer.get(..len).unwrap_or_default();
            match store(shared, plain, &mut compressor, &mut stored) {
                Ok(outcome) => {
                    if let Some(place) = shared.table.lock().outcomes.get_mut(number as usize) {
                        *place = outcome;
                    }
                }
                Err(error) => {
                    shared.failure.lock().get_or_insert(error);
                    shared.failed.store(true, Ordering::Relaxed);
                }
            }
        }
        let _ = give_back.send(buffer);
    }
}

fn store(shared: &Shared, plain: &[u8], compressor: &mut Compressor<'static>, stored: &mut Vec<u8>) -> Result<Outcome> {
    if is_zero(plain) {
        return Ok(Outcome::Hole);
    }
    let digest = Digest::of(plain);
    let plain_len = plain.len() as u32;
    let reused = shared.reusable.get(&digest).map(|(image, chunk)| Place::Reused { image: *image, chunk: *chunk });
    let number = {
        let mut table = shared.table.lock();
        if let Some(known) = table.by_digest.get(&digest) {
            return Ok(Outcome::Chunk(*known));
        }
        // The place is filled in below; nobody asks for it before all jobs are done.
        let place = reused.unwrap_or(Place::Spool { offset: 0, len: 0 });
        table.add(Stored { digest, plain_len, place, origin: Origin::Earlier })?
    };
    shared.write_leaves(number, plain)?;
    if let Some(Place::Reused { chunk, .. }) = reused {
        shared.progress.event(Event::Chunk { plain: plain_len, stored: chunk.stored_len, reused: true });
        return Ok(Outcome::Chunk(number));
    }
    let origin = match shared.known.read(&digest, plain_len, stored) {
        Some(()) => Origin::Cached,
        None => {
            stored.clear();
            stored.reserve(zstd::zstd_safe::compress_bound(plain.len()));
            compressor
                .compress_to_buffer(plain, stored)
                .map_err(|error| Error::io(format!("compressing chunk {digest}"), error))?;
            Origin::Made
        }
    };
    let place = shared.spool(stored)?;
    if let Some(chunk) = shared.table.lock().chunks.get_mut(number as usize) {
        (chunk.place, chunk.origin) = (place, origin);
    }
    shared.progress.event(Event::Chunk { plain: plain_len, stored: stored.len() as u32, reused: false });
    Ok(Outcome::Chunk(number))
}
