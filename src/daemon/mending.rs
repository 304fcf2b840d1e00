//! Mending: what the disk damaged or lost is fetched again for images in use, before a reader has to wait for it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

use super::keeping::BATCH;
use super::node::{Node, blocking};
use crate::chunk::{ChunkRef, Digest};
use crate::error::Result;
use crate::fetch::{Image, Priority};
use crate::index::Index;

/// How often somebody looks whether something was lost.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long a scrub that somebody waits for waits for sources.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is to be fetched again.
#[derive(Default)]
pub struct Mender {
    wanted: Mutex<HashSet<Digest>>,
    /// Held by the one who mends.
    turn: tokio::sync::Mutex<()>,
    refetched: AtomicU64,
}

impl Mender {
    /// Chunks that were fetched again since the start.
    #[must_use]
    pub fn refetched(&self) -> u64 {
        self.refetched.load(Relaxed)
    }
}

/// Mends until the task is aborted. A pin that lacks chunks at the start is completed first.
pub async fn mend(node: Arc<Node>) {
    let looking = Arc::clone(&node);
    let missing = blocking(move || Ok(looking.missing_of_pins())).await.unwrap_or_default();
    node.mender.wanted.lock().extend(missing);
    loop {
        node.mend().await;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

impl Node {
    fn missing_of_pins(&self) -> HashSet<Digest> {
        let mut missing = HashSet::new();
        for pinned in self.pins.all() {
            // What can't be read was reported when the pins were read.
            if let Ok(digests) = self.pins.digests(&pinned) {
                missing.extend(digests.into_iter().filter(|digest| !self.pool.contains(digest)));
            }
        }
        missing
    }

    /// As [`mend`](Self::mend), but not for longer than somebody wants to wait; returns how many chunks were fetched.
    pub(super) async fn mend_soon(self: &Arc<Self>) -> u64 {
        let before = self.mender.refetched();
        // What is not done then is done in the background.
        let _ = tokio::time::timeout(PATIENCE, self.mend()).await;
        self.mender.refetched() - before
    }

    /// Fetches what was lost and an image in use needs. What can't be had is tried again the next time; what no image
    /// in use needs is forgotten.
    pub(super) async fn mend(self: &Arc<Self>) {
        let _turn = self.mender.turn.lock().await;
        let wanted = {
            let mut wanted = self.mender.wanted.lock();
            wanted.extend(self.pool.take_lost());
            wanted.retain(|digest| !self.pool.contains(digest));
            wanted.clone()
        };
        if wanted.is_empty() {
            return;
        }
        let mut left = wanted.clone();
        let mut needed = HashSet::new();
        for image in self.images.in_use() {
            needed.extend(self.refetch(&image, &mut left).await);
        }
        for pinned in self.pins.all() {
            let (node, name) = (Arc::clone(self), pinned.image.clone());
            let Ok(digests) = blocking(move || node.pins.digests(&pinned)).await else { continue };
            let concerned: Vec<_> = digests.into_iter().filter(|digest| left.contains(digest)).collect();
            if concerned.is_empty() {
                continue;
            }
            needed.extend(concerned);
            match self.open_pinned(&name).await {
                Ok(image) => drop(self.refetch(&image, &mut left).await),
                Err(error) => tracing::warn!("{} chunks of the pinned {name} were lost: {error}", left.len()),
            }
        }
        let mended = wanted.len() - left.len();
        if mended > 0 {
            tracing::info!("{mended} chunks that the pool had lost were fetched again");
        }
        self.mender
            .wanted
            .lock()
            .retain(|digest| !wanted.contains(digest) || left.contains(digest) && needed.contains(digest));
    }

    async fn open_pinned(&self, name: &str) -> Result<Arc<Image>> {
        let access = self.pins.access(name);
        self.images.open(&name.parse()?, &access, None).await
    }

    /// Fetches what an image has of `left`, and takes it out there. Returns what it needs and did not get.
    async fn refetch(self: &Arc<Self>, image: &Image, left: &mut HashSet<Digest>) -> Vec<Digest> {
        let mut chunks = concerned(&image.index, left);
        chunks.sort_unstable_by_key(|chunk| (chunk.blob, chunk.offset));
        let mut failed = Vec::new();
        for batch in chunks.chunks(BATCH) {
            let fetched = self.fetcher.fetch(&image.origin, batch, Priority::Background).await;
            for (chunk, result) in batch.iter().zip(fetched) {
                match result {
                    Ok(_) if left.remove(&chunk.digest) => drop(self.mender.refetched.fetch_add(1, Relaxed)),
                    Ok(_) => {}
                    Err(error) => {
                        tracing::debug!(chunk = %chunk.digest, %error, "a lost chunk can't be fetched again yet");
                        failed.push(chunk.digest);
                    }
                }
            }
            if !failed.is_empty() {
                // The source is in trouble: the others are not asked for one by one.
                failed.extend(concerned(&image.index, left).iter().map(|chunk| chunk.digest));
                break;
            }
        }
        failed
    }
}

fn concerned(index: &Index, wanted: &HashSet<Digest>) -> Vec<ChunkRef> {
    index.chunks().filter(|chunk| wanted.contains(&chunk.digest)).collect()
}
