//! Pins: chunks that are not evicted.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;

use super::Pool;
use super::table::Keep;
use crate::chunk::Digest;

/// How often each chunk is pinned, by the keyed hash of its digest: 16 bytes a chunk. Two chunks that share it are both
/// spared, which costs room and nothing else; nobody can look for such without the key.
#[derive(Default)]
pub(super) struct Pins {
    counts: RwLock<HashMap<u64, u32>>,
    /// How many there are, so that an unpinned pool takes no lock.
    len: AtomicUsize,
}

impl Pins {
    pub fn keep(&self, hash: u64) -> Keep {
        let pinned = self.len.load(Ordering::Acquire) > 0 && self.counts.read().contains_key(&hash);
        if pinned { Keep::Pinned } else { Keep::Evictable }
    }

    pub fn add(&self, hash: u64) {
        let mut counts = self.counts.write();
        *counts.entry(hash).or_default() += 1;
        self.len.store(counts.len(), Ordering::Release);
    }

    pub fn remove(&self, hash: u64) {
        let mut counts = self.counts.write();
        if let Some(count) = counts.get_mut(&hash) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&hash);
            }
        }
        self.len.store(counts.len(), Ordering::Release);
    }
}

impl Pool {
    /// Keeps these chunks from being evicted, those that are here and those that will be, until as many calls of
    /// [`unpin`](Self::unpin) name them. Lasts as long as this process; whoever wants more repeats it after a start.
    pub fn pin<'a>(&self, chunks: impl IntoIterator<Item = &'a Digest>) {
        self.shards.set_pins(chunks, Pins::add);
    }

    /// Undoes one [`pin`](Self::pin).
    pub fn unpin<'a>(&self, chunks: impl IntoIterator<Item = &'a Digest>) {
        self.shards.set_pins(chunks, Pins::remove);
    }
}
