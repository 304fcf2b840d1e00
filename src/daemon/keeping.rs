//! What the node keeps: the pool's upkeep, and pinned images.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::control::{JobState, Kind, Pin, Problem, ScrubAnswer, Trimmed};
use super::images::index_cache;
use super::jobs::Job;
use super::mending::mend;
use super::node::{Node, blocking};
use super::pins::{Pinned, runs};
use super::sharing::{Count, ImageShare, Sharing};
use super::startset::start_set;
use crate::chunk::{ChunkRef, Digest};
use crate::error::{Error, Result};
use crate::fetch::{Image, Priority, sync_known};
use crate::pool::{PoolStat, Scrub, Scrubbed};

/// How often the pool gives way to others on its disk, and is made durable.
const UPKEEP: Duration = Duration::from_secs(30);

/// Pause between two passes of the background scrub.
const BETWEEN_PASSES: Duration = Duration::from_secs(10);

/// Chunks that a pin asks for at a time; its memory is so many chunks.
pub(super) const BATCH: usize = 32;
/// Batches that are fetched at a time.
const BATCHES: usize = 3;

/// Plain bytes after which what a pin fetched so far is made durable, while it fetches more: in the end there is little left.
const DURABLE_STEP: u64 = 16 << 20;

/// How long the last chunks of a pin have to get from their fetch into the pool.
const ADMITTED_WITHIN: Duration = Duration::from_secs(2);

/// What the background scrub found since the daemon's start.
#[derive(Debug, Default)]
pub struct Scrubbing {
    passes: AtomicU64,
    found: Mutex<Scrubbed>,
}

/// The pool's numbers, and what the daemon knows of its use. Sizes in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct PoolReport {
    /// The pool's own.
    #[serde(flatten)]
    pub pool: PoolStat,
    /// What sharing saves.
    pub sharing: Sharing,
    /// The images in use.
    pub images: Vec<ImageShare>,
    /// Lost chunks that were fetched again for images in use.
    pub refetched: u64,
    /// The background scrub.
    pub scrub: ScrubReport,
}

/// What the background scrub does.
#[derive(Debug, Clone, Serialize)]
pub struct ScrubReport {
    /// Bytes a second that it reads; 0: it is off.
    pub rate: u64,
    /// How often it went through the whole pool since the daemon's start.
    pub passes: u64,
    /// What it found since then.
    #[serde(flatten)]
    pub found: Scrubbed,
}

/// Looks after the pool until the task is aborted.
pub async fn keep(node: Arc<Node>) {
    tokio::join!(bound(Arc::clone(&node)), mend(Arc::clone(&node)), scrub(node));
}

async fn bound(node: Arc<Node>) {
    loop {
        tokio::time::sleep(UPKEEP).await;
        let pool = Arc::clone(&node.pool);
        let kept = blocking(move || {
            pool.trim(None);
            pool.sync()
        });
        if let Err(error) = kept.await {
            tracing::warn!("the pool: {error}");
        }
    }
}

/// Reads the pool at the rate of the settings, pass after pass.
async fn scrub(node: Arc<Node>) {
    let rate = node.config.pool_scrub_rate.0;
    if rate == 0 {
        return;
    }
    let mut pass = Scrub::default();
    loop {
        let (working, before) = (Arc::clone(&node), pass.found);
        let step = blocking(move || {
            let end = before.bytes + rate / 8;
            let mut more = true;
            while more && pass.found.bytes <= end {
                more = working.pool.scrub_step(&mut pass);
            }
            Ok((pass, more))
        });
        let Ok((walked, more)) = step.await else { return };
        pass = walked;
        let bytes = pass.found.bytes - before.bytes;
        node.scrubbing.found.lock().add(&before, &pass.found);
        if more {
            tokio::time::sleep(Duration::from_secs_f64(bytes.max(4096) as f64 / rate as f64)).await;
        } else {
            pass = Scrub::default();
            node.scrubbing.passes.fetch_add(1, Relaxed);
            tokio::time::sleep(BETWEEN_PASSES).await;
        }
    }
}

impl Node {
    /// The pool's numbers.
    ///
    /// # Errors
    /// The daemon stops.
    pub async fn pool_stat(self: &Arc<Self>) -> Result<PoolReport> {
        let node = Arc::clone(self);
        blocking(move || {
            let (sharing, images) = node.count_sharing();
            let (passes, found) = (node.scrubbing.passes.load(Relaxed), *node.scrubbing.found.lock());
            let scrub = ScrubReport { rate: node.config.pool_scrub_rate.0, passes, found };
            let refetched = node.mender.refetched();
            Ok(PoolReport { pool: node.pool.stat(), sharing, images, refetched, scrub })
        })
        .await
    }

    fn count_sharing(&self) -> (Sharing, Vec<ImageShare>) {
        let mut pinned = self.pins.all();
        let mut open = self.images.in_use();
        open.sort_by_key(|image| (image.manifest_digest, image.reference.to_string()));
        open.dedup_by_key(|image| image.manifest_digest);
        let mut count = Count::default();
        for image in open {
            let digest = image.manifest_digest.to_string();
            let before = pinned.len();
            pinned.retain(|pinned| pinned.digest != digest);
            let share = ImageShare {
                image: image.reference.to_string(),
                digest,
                open: true,
                pinned: pinned.len() < before,
                ..ImageShare::default()
            };
            count.add(share, image.index.chunks(), &self.pool);
        }
        pinned.sort_by(|one, other| (&one.digest, &one.image).cmp(&(&other.digest, &other.image)));
        pinned.dedup_by(|one, other| one.digest == other.digest);
        for image in pinned {
            // What can't be read was reported when the pins were read.
            let Ok(chunks) = self.pins.chunks(&image) else { continue };
            let share = ImageShare { image: image.image, digest: image.digest, pinned: true, ..ImageShare::default() };
            count.add(share, chunks, &self.pool);
        }
        count.finish()
    }

    /// Evicts from the pool.
    ///
    /// # Errors
    /// The daemon stops.
    pub async fn pool_trim(&self, bytes: Option<u64>) -> Result<Trimmed> {
        let pool = Arc::clone(&self.pool);
        blocking(move || Ok(Trimmed { freed: pool.trim(bytes) })).await
    }

    /// Starts a scrub of the pool, or says how far it is. What it drops and an image in use needs is fetched again.
    ///
    /// # Errors
    /// The daemon stops.
    pub fn pool_scrub(self: &Arc<Self>) -> std::result::Result<JobState, Problem> {
        self.accepting()?;
        let (node, stopping) = (Arc::clone(self), self.stopping());
        self.jobs.start_or_ask("scrub", |job| async move {
            job.total.store(node.pool.stat().bytes, Relaxed);
            let pool = Arc::clone(&node.pool);
            let found = blocking(move || {
                Ok(pool.scrub(|found: &Scrubbed| {
                    job.done.store(found.bytes, Relaxed);
                    !*stopping.borrow()
                }))
            });
            let found = found.await?;
            answer(&ScrubAnswer { found, refetched: node.mend_soon().await })
        })
    }

    /// Starts to fetch and keep an image, or what a start of it reads, or says how far that is.
    ///
    /// # Errors
    /// The image can't be had whole, or the pool has no room for it: then it is not pinned.
    pub fn pin(self: &Arc<Self>, request: Pin) -> std::result::Result<JobState, Problem> {
        self.accepting()?;
        let Pin { reference, profile, .. } = &request;
        let (node, name) = (Arc::clone(self), format!("pin {reference} {profile:?}"));
        self.jobs.start_or_ask(&name, |job| async move {
            let (image, device) = node.open_device(&request.reference, &request.access, None).await?;
            let part = match request.profile.clone() {
                Some(path) => {
                    let runtime = Handle::current();
                    Some(blocking(move || start_set(&device, &path, &runtime)).await?)
                }
                None => None,
            };
            let chunks: Vec<ChunkRef> = match &part {
                Some(part) => part.iter().filter_map(|&number| image.index.chunk(number)).collect(),
                None => image.index.chunks().collect(),
            };
            let digests: Vec<Digest> = chunks.iter().map(|chunk| chunk.digest).collect();
            node.pool.pin(&digests);
            match node.fill(&request, &image, chunks, part.as_deref().map(runs), &job).await {
                Ok(pinned) => answer(&Pinned { part: None, ..pinned }),
                Err(problem) => {
                    node.pool.unpin(&digests);
                    Err(problem)
                }
            }
        })
    }

    /// Fetches what is missing of a pinned image, makes it durable, and remembers the pin.
    async fn fill(
        self: &Arc<Self>,
        request: &Pin,
        image: &Image,
        mut chunks: Vec<ChunkRef>,
        part: Option<Vec<(u32, u32)>>,
        job: &Job,
    ) -> std::result::Result<Pinned, Problem> {
        let Pin { reference: name, access, profile } = request.clone();
        let bytes = chunks.iter().map(|chunk| u64::from(chunk.plain_len)).sum();
        let count = chunks.len() as u64;
        job.total.store(bytes, Relaxed);
        chunks.sort_unstable_by_key(|chunk| (chunk.blob, chunk.offset));
        let mut stopping = self.stopping();
        let owned: Vec<Vec<ChunkRef>> = chunks.chunks(BATCH).map(<[_]>::to_vec).collect();
        let batches = owned.into_iter().map(|batch| async move {
            let missing: Vec<_> = batch.iter().filter(|chunk| !self.pool.contains(&chunk.digest)).copied().collect();
            for result in self.fetcher.fetch(&image.origin, &missing, Priority::Background).await {
                result?;
            }
            Ok::<u64, Error>(batch.iter().map(|chunk| u64::from(chunk.plain_len)).sum())
        });
        let (mut volatile, mut syncing) = (0, None);
        // A batch is on its way while the one before is checked.
        let mut batches = std::pin::pin!(futures_util::stream::iter(batches).buffered(BATCHES));
        loop {
            let fetched = tokio::select! {
                fetched = batches.next() => fetched,
                _ = stopping.wait_for(|&stopping| stopping) => return Err(Error::Stopping("the daemon".to_owned()).into()),
            };
            let Some(bytes) = fetched.transpose()? else { break };
            job.done.fetch_add(bytes, Relaxed);
            volatile += bytes;
            if volatile >= DURABLE_STEP && syncing.as_ref().is_none_or(JoinHandle::is_finished) {
                let pool = Arc::clone(&self.pool);
                // What the disk lost is found missing in the end.
                syncing = Some(tokio::task::spawn_blocking(move || drop(pool.sync())));
                volatile = 0;
            }
        }
        let count_missing = || chunks.iter().filter(|chunk| !self.pool.contains(&chunk.digest)).count();
        let mut missing = count_missing();
        let started = Instant::now();
        // A chunk is delivered before it is in the pool.
        while missing > 0 && started.elapsed() < ADMITTED_WITHIN {
            tokio::time::sleep(Duration::from_millis(20)).await;
            missing = count_missing();
        }
        if missing > 0 {
            let message = format!("the pool has no room for {missing} of the {count} chunks of {name}");
            return Err(
                Problem::new(Kind::Failed, message).hint("raise pool.limit, lower pool.keep_free, or unpin others")
            );
        }
        let pinned = Pinned {
            image: name,
            digest: image.manifest_digest.to_string(),
            index: image.layers.index.index_digest.to_string(),
            chunks: count,
            bytes,
            access,
            profile,
            part,
        };
        let node = Arc::clone(self);
        let pinned = blocking(move || {
            node.pool.sync()?;
            sync_known(&index_cache(&node.config.root))?;
            node.pins.add(&pinned, &node.pool)?;
            Ok(pinned)
        });
        Ok(pinned.await?)
    }

    /// Ends a pin.
    ///
    /// # Errors
    /// The image is not pinned.
    pub async fn unpin(self: &Arc<Self>, reference: String) -> std::result::Result<Pinned, Problem> {
        let (node, name) = (Arc::clone(self), reference.clone());
        let removed = blocking(move || node.pins.remove(&name, &node.pool)).await?;
        removed.ok_or_else(|| Problem::new(Kind::NotFound, format!("{reference} is not pinned")))
    }
}

pub(super) fn answer<T: serde::Serialize>(answer: &T) -> std::result::Result<Value, Problem> {
    serde_json::to_value(answer).map_err(|error| Problem::new(Kind::Failed, format!("writing an answer: {error}")))
}
