//! What the node keeps: the pool's upkeep, and pinned images.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::control::{JobState, Kind, Pin, Problem, Trimmed};
use super::jobs::Job;
use super::node::{Node, blocking};
use super::pins::Pinned;
use crate::chunk::{ChunkRef, Digest};
use crate::error::{Error, Result};
use crate::fetch::{Image, Priority};
use crate::oci::Reference;
use crate::pool::Scrubbed;

/// How often the pool gives way to others on its disk, and is made durable.
const UPKEEP: Duration = Duration::from_secs(30);

/// Chunks that a pin asks for at a time; its memory is so many chunks.
const BATCH: usize = 32;

/// How long the last chunks of a pin have to get from their fetch into the pool.
const ADMITTED_WITHIN: Duration = Duration::from_secs(2);

/// Looks after the pool until the task is aborted.
pub async fn keep(node: Arc<Node>) {
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

impl Node {
    /// Evicts from the pool.
    ///
    /// # Errors
    /// The daemon stops.
    pub async fn pool_trim(&self, bytes: Option<u64>) -> Result<Trimmed> {
        let pool = Arc::clone(&self.pool);
        blocking(move || Ok(Trimmed { freed: pool.trim(bytes) })).await
    }

    /// Starts a scrub of the pool, or says how far it is.
    ///
    /// # Errors
    /// The daemon stops.
    pub fn pool_scrub(self: &Arc<Self>) -> std::result::Result<JobState, Problem> {
        self.accepting()?;
        let (node, stopping) = (Arc::clone(self), self.stopping());
        self.jobs.start_or_ask("scrub", |job| async move {
            job.total.store(node.pool.stat().bytes, Relaxed);
            let found = blocking(move || {
                Ok(node.pool.scrub(|found: &Scrubbed| {
                    job.done.store(found.bytes, Relaxed);
                    !*stopping.borrow()
                }))
            });
            answer(&found.await?)
        })
    }

    /// Starts to fetch and keep an image, or says how far that is.
    ///
    /// # Errors
    /// The image can't be had whole, or the pool has no room for it: then it is not pinned.
    pub fn pin(self: &Arc<Self>, request: Pin) -> std::result::Result<JobState, Problem> {
        self.accepting()?;
        let (node, name) = (Arc::clone(self), format!("pin {}", request.reference));
        self.jobs.start_or_ask(&name, |job| async move {
            let reference: Reference = request.reference.parse()?;
            let image = node.images.open(&reference, &request.access, None).await?;
            let digests: Vec<Digest> = image.index.chunks().map(|chunk| chunk.digest).collect();
            node.pool.pin(&digests);
            match node.fill(&request.reference, &image, &job).await {
                Ok(pinned) => answer(&pinned),
                Err(problem) => {
                    node.pool.unpin(&digests);
                    Err(problem)
                }
            }
        })
    }

    /// Fetches what is missing of a pinned image, makes it durable, and remembers the pin.
    async fn fill(self: &Arc<Self>, name: &str, image: &Image, job: &Job) -> std::result::Result<Pinned, Problem> {
        let mut chunks: Vec<ChunkRef> = image.index.chunks().collect();
        let bytes = chunks.iter().map(|chunk| u64::from(chunk.plain_len)).sum();
        let count = chunks.len() as u64;
        job.total.store(bytes, Relaxed);
        chunks.sort_unstable_by_key(|chunk| (chunk.blob, chunk.offset));
        let mut stopping = self.stopping();
        for batch in chunks.chunks(BATCH) {
            let missing: Vec<_> = batch.iter().filter(|chunk| !self.pool.contains(&chunk.digest)).copied().collect();
            let fetched = tokio::select! {
                fetched = self.fetcher.fetch(&image.origin, &missing, Priority::Background) => fetched,
                _ = stopping.wait_for(|&stopping| stopping) => return Err(Error::Stopping("the daemon".to_owned()).into()),
            };
            for result in fetched {
                result?;
            }
            job.done.fetch_add(batch.iter().map(|chunk| u64::from(chunk.plain_len)).sum(), Relaxed);
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
            image: name.to_owned(),
            digest: image.manifest_digest.to_string(),
            index: image.layers.index.index_digest.to_string(),
            chunks: count,
            bytes,
        };
        let node = Arc::clone(self);
        let pinned = blocking(move || {
            node.pool.sync()?;
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

fn answer<T: serde::Serialize>(answer: &T) -> std::result::Result<Value, Problem> {
    serde_json::to_value(answer).map_err(|error| Problem::new(Kind::Failed, format!("writing an answer: {error}")))
}
