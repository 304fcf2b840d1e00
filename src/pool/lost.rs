//! What the disk lost: chunks that somebody may want to fetch again before a reader has to wait for them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use super::Pool;
use crate::chunk::Digest;

/// Chunks that are remembered, 2 MiB of digests. What else was lost is fetched when somebody reads it.
const REMEMBERED: usize = 1 << 16;

#[derive(Default)]
pub(super) struct Lost {
    digests: Mutex<Vec<Digest>>,
    unreadable: AtomicU64,
}

impl Lost {
    pub fn add(&self, gone: impl IntoIterator<Item = Digest>) {
        let mut digests = self.digests.lock();
        let room = REMEMBERED.saturating_sub(digests.len());
        digests.extend(gone.into_iter().take(room));
    }

    pub fn count_unreadable(&self) {
        self.unreadable.fetch_add(1, Relaxed);
    }

    pub fn unreadable(&self) -> u64 {
        self.unreadable.load(Relaxed)
    }
}

impl Pool {
    /// The chunks that were dropped since this was asked the last time because the disk damaged or lost them. They may
    /// have been fetched again meanwhile.
    #[must_use]
    pub fn take_lost(&self) -> Vec<Digest> {
        std::mem::take(&mut *self.lost.digests.lock())
    }
}
