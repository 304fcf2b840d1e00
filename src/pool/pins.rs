//! Pins: chunks that are not evicted.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use parking_lot::RwLock;

use super::Pool;
use crate::chunk::Digest;

/// How often each chunk is pinned, by the first 8 bytes of its digest: 16 bytes a chunk. Two chunks that share them are
/// both spared, which costs room and nothing else.
#[derive(Default)]
pub(super) struct Pins {
    counts: RwLock<HashMap<u64, u32>>,
    /// How many there are, so that an unpinned pool takes no lock.
    len: AtomicUsize,
}

fn key(digest: &Digest) -> u64 {
    digest.as_bytes().iter().take(8).fold(0, |key, &byte| key << 8 | u64::from(byte))
}

impl Pins {
    pub fn has(&self, digest: &Digest) -> bool {
        self.len.load(Relaxed) > 0 && self.counts.read().contains_key(&key(digest))
    }
}

impl Pool {
    /// Keeps these chunks from being evicted, those that are here and those that will be, until as many calls of
    /// [`unpin`](Self::unpin) name them. Lasts as long as this process; whoever wants more repeats it after a start.
    pub fn pin<'a>(&self, chunks: impl IntoIterator<Item = &'a Digest>) {
        let mut counts = self.pins.counts.write();
        for digest in chunks {
            *counts.entry(key(digest)).or_default() += 1;
        }
        self.pins.len.store(counts.len(), Relaxed);
    }

    /// Undoes one [`pin`](Self::pin).
    pub fn unpin<'a>(&self, chunks: impl IntoIterator<Item = &'a Digest>) {
        let mut counts = self.pins.counts.write();
        for digest in chunks {
            let key = key(digest);
            if let Some(count) = counts.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&key);
                }
            }
        }
        self.pins.len.store(counts.len(), Relaxed);
    }
}
