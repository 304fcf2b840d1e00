//! A build with the cache: layers that are there are taken from it, those that are read are put into it at the end.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::entry::{Base, Entries, Recorded, Recorder};
use super::file::{CacheFile, HOLE, Kept, Part, Parts, Writer, read_chunk};
use super::{CHUNKS, Cache, LAYER, chunks_key, layer_key};
use crate::build::Request;
use crate::build::decode::Expected;
use crate::build::intake::Intake;
use crate::build::layer::{apply_entry, context};
use crate::build::pipeline::{Known, KnownFile, Origin, Outcome, Place, Store};
use crate::build::progress::{Event, Progress};
use crate::build::rootfs::{Rootfs, Whiteouts};
use crate::build::tar::show;
use crate::chunk::{Digest, Hasher};
use crate::error::{Error, Result};

/// A layer that was read.
struct ReadLayer {
    key: Digest,
    entries: File,
    jobs: Range<u32>,
    small: Range<u64>,
    tar_bytes: u64,
}

/// One build's use of the cache.
pub(in crate::build) struct Run {
    cache: Cache,
    chunks_key: Digest,
    known: Arc<Known>,
    temp: PathBuf,
    read: Vec<ReadLayer>,
    /// Jobs of layers; those behind them are of the whole file system.
    layer_jobs: u32,
    small: Option<File>,
}

/// A layer that is being read.
pub(in crate::build) struct Reading {
    key: Digest,
    pub recorder: Recorder,
    first_job: u32,
    first_small: u64,
}

impl Run {
    /// Opens the cache that the request names. A cache that can't be used is said, and the build goes on without.
    pub(in crate::build) fn start(request: &Request, progress: &dyn Progress) -> Option<Self> {
        let settings = request.cache.as_ref()?;
        match Cache::open(settings) {
            Ok(cache) => Some(Self {
                known: Arc::new(known(cache.chunks(&chunks_key(request)))),
                cache,
                chunks_key: chunks_key(request),
                temp: request.temp.clone(),
                read: Vec::new(),
                layer_jobs: 0,
                small: None,
            }),
            Err(error) => {
                progress.event(Event::Note(&format!("building without the cache: {error}")));
                None
            }
        }
    }

    /// The chunks that earlier builds made of several layers.
    pub(in crate::build) fn known(&self) -> Arc<Known> {
        self.known.clone()
    }

    /// Applies a layer from the cache; returns the plain bytes of its tar, or `None` if it has to be read.
    ///
    /// # Errors
    /// What is wrong with the layer on top of those below it, as if it were read.
    pub(in crate::build) fn apply(
        &self,
        request: &Request,
        expected: &Expected,
        left: u64,
        rootfs: &mut Rootfs,
        intake: &mut Intake,
    ) -> Result<Option<u64>> {
        let Some(key) = layer_key(request, expected) else { return Ok(None) };
        let Some(file) = self.cache.layer(&key).filter(|file| file.tar_bytes() <= left) else { return Ok(None) };
        let base = match contents(&file, intake) {
            Ok(Some(base)) => base,
            Ok(None) => return Ok(None),
            Err(error) => {
                self.cache.discard(&file.path, &error);
                return Ok(None);
            }
        };
        let mut entries = Entries::new(file.entries(), base)?;
        while let Some(recorded) = entries.next()? {
            let Recorded { path, entry, content } = recorded;
            apply_entry(&path, &entry, rootfs, Whiteouts::Apply, || {
                content.ok_or_else(|| Error::invalid("build cache", "a file has no content"))
            })
            .map_err(|error| context(error, &show(&path)))?;
        }
        Ok(Some(file.tar_bytes()))
    }

    /// A layer is going to be read.
    pub(in crate::build) fn reading(
        &self,
        request: &Request,
        expected: &Expected,
        intake: &Intake,
    ) -> Result<Option<Reading>> {
        let Some(key) = layer_key(request, expected) else { return Ok(None) };
        let (first_job, first_small) = (intake.pipeline.next_job(), intake.small_bytes());
        let recorder = Recorder::new(&self.temp, first_job, first_small)?;
        Ok(Some(Reading { key, recorder, first_job, first_small }))
    }

    /// The layer was read, and is what its digests say.
    pub(in crate::build) fn finished(&mut self, reading: Reading, tar_bytes: u64, intake: &Intake) -> Result<()> {
        let Reading { key, recorder, first_job, first_small } = reading;
        let entries = recorder.finish()?;
        let (jobs, small) = (first_job..intake.pipeline.next_job(), first_small..intake.small_bytes());
        self.read.push(ReadLayer { key, entries, jobs, small, tar_bytes });
        Ok(())
    }

    /// All layers are in.
    pub(in crate::build) fn layers_done(&mut self, intake: &mut Intake) -> Result<()> {
        self.layer_jobs = intake.pipeline.next_job();
        self.small = Some(intake.small_file()?);
        Ok(())
    }

    /// Keeps what was made. What can't be kept is said; the build is none the worse.
    pub(in crate::build) fn save(&self, store: &Store, progress: &dyn Progress) {
        if let Err(error) = self.try_save(store) {
            progress.event(Event::Note(&format!("the build cache was not filled: {error}")));
        }
    }

    fn try_save(&self, store: &Store) -> Result<()> {
        let mut stored = Vec::new();
        for layer in &self.read {
            self.cache
                .write(&format!("{}.{LAYER}", layer.key.hex()), |file| self.layer(layer, store, file, &mut stored))?;
        }
        self.save_shared(store, &mut stored)?;
        self.cache.trim()
    }

    fn layer(&self, layer: &ReadLayer, store: &Store, file: File, stored: &mut Vec<u8>) -> Result<u64> {
        let mut writer = Writer::new(file);
        let mut numbers: HashMap<u32, u32> = HashMap::new();
        let mut jobs = Vec::with_capacity(layer.jobs.len());
        for job in layer.jobs.clone() {
            let Outcome::Chunk(chunk) = store.outcome(job)? else {
                jobs.push(HOLE);
                continue;
            };
            let next = numbers.len() as u32;
            let number = *numbers.entry(chunk).or_insert(next);
            jobs.push(number);
            if number == next {
                let chunk = store.chunk(chunk)?;
                stored.clear();
                if let Place::Spool { offset, len } = chunk.place {
                    stored.resize(len as usize, 0);
                    store.read(offset, stored)?;
                }
                writer.chunk(&chunk.digest, chunk.plain_len, stored)?;
            }
        }
        let small = self.small.as_ref().ok_or_else(|| Error::invalid("build", "the small files are gone"))?;
        let parts = Parts {
            entries: &layer.entries,
            small: Part { file: small, at: layer.small.start, end: layer.small.end },
            small_bytes: layer.small.end - layer.small.start,
            tar_bytes: layer.tar_bytes,
            jobs: &jobs,
        };
        writer.finish(&layer.key, Some(parts))
    }

    /// The chunks of the whole file system that were made in this build, and, if a file of them was found to be damaged,
    /// those that were not.
    fn save_shared(&self, store: &Store, stored: &mut Vec<u8>) -> Result<()> {
        let mut found = Origin::Made;
        for file in &self.known.files {
            if file.damaged.load(Ordering::Relaxed) {
                self.cache.discard(&file.file.path, &Error::invalid("cache file", "a chunk is damaged"));
                found = Origin::Cached;
            } else if file.used.load(Ordering::Relaxed) {
                file.file.touch();
            }
        }
        let mut made = Vec::new();
        for job in self.layer_jobs..store.jobs() {
            if let Outcome::Chunk(number) = store.outcome(job)?
                && let chunk = store.chunk(number)?
                && let Place::Spool { offset, len } = chunk.place
                && (chunk.origin == Origin::Made || chunk.origin == found)
            {
                made.push((chunk.digest, chunk.plain_len, offset, len));
            }
        }
        made.sort_unstable_by_key(|(digest, ..)| *digest.as_bytes());
        made.dedup_by_key(|(digest, ..)| *digest);
        if made.is_empty() {
            return Ok(());
        }
        let mut name = Hasher::new();
        made.iter().for_each(|(digest, ..)| name.update(digest.as_bytes()));
        let name = format!("{}-{}.{CHUNKS}", self.chunks_key.hex(), name.finish().hex());
        self.cache.write(&name, |file| {
            let mut writer = Writer::new(file);
            for (digest, plain_len, offset, len) in made {
                stored.clear();
                stored.resize(len as usize, 0);
                store.read(offset, stored)?;
                writer.chunk(&digest, plain_len, stored)?;
            }
            writer.finish(&self.chunks_key, None)
        })
    }
}

fn known(files: Vec<CacheFile>) -> Known {
    let mut known = Known::default();
    for (number, mut file) in files.into_iter().enumerate() {
        let chunks = std::mem::take(&mut file.chunks);
        known.chunks.extend(chunks.into_iter().map(|chunk| (chunk.digest, (number, chunk))));
        known.files.push(KnownFile { file, used: AtomicBool::new(false), damaged: AtomicBool::new(false) });
    }
    known
}

/// Hands a layer's chunks and small files to the intake; `None` if a chunk is not there and no earlier image has it.
fn contents(file: &CacheFile, intake: &mut Intake) -> Result<Option<Base>> {
    let damaged = || Error::invalid("cache file", "a chunk is damaged");
    let mut stored = Vec::new();
    for chunk in &file.chunks {
        let Kept { digest, plain_len, stored_len, .. } = chunk;
        if intake.pipeline.has(digest, *plain_len)? {
            continue;
        }
        if *stored_len == 0 {
            return Ok(None);
        }
        if !read_chunk(&file.file, chunk, &mut stored) {
            return Err(damaged());
        }
        intake.pipeline.adopt(digest, *plain_len, &stored)?;
    }
    let first_small = intake.small_bytes();
    let mut small = zstd::stream::read::Decoder::new(file.small())
        .map_err(|error| Error::io("reading small files from the build cache", error))?;
    intake.take_small(&mut small, file.small_bytes())?;
    let first_job = intake.pipeline.next_job();
    for job in &file.jobs {
        let chunk = match *job {
            HOLE => None,
            number => Some(&file.chunks.get(number as usize).ok_or_else(damaged)?.digest),
        };
        intake.pipeline.finished(chunk)?;
    }
    let jobs = file.jobs.len() as u32;
    Ok(Some(Base { first_job, jobs, first_small, small_bytes: file.small_bytes() }))
}
