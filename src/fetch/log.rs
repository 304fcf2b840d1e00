//! What was fetched lately, and how a start-up stream is doing: so that a start can be explained.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use parking_lot::Mutex;

use super::Priority;
use crate::chunk::ChunkRef;

/// Fetches that are kept, 140 bytes each.
const KEPT: usize = 8192;

/// A chunk that was fetched and verified.
#[derive(Clone, Copy, Debug)]
pub struct Fetched {
    /// The chunk.
    pub chunk: ChunkRef,
    /// Who asked for it first, or more urgently since.
    pub priority: Priority,
    /// Number of the source that sent it.
    pub source: usize,
    /// When it was asked for.
    pub asked: Instant,
    /// When the request that brought it was sent.
    pub requested: Instant,
    /// When its last byte had arrived.
    pub arrived: Instant,
    /// When a thread began to decode it.
    pub started: Instant,
    /// When it was inflated.
    pub inflated: Instant,
    /// When it was verified and handed to those who waited.
    pub verified: Instant,
}

/// The latest fetches of an origin.
#[derive(Debug, Default)]
pub(super) struct Log {
    kept: Mutex<(VecDeque<Fetched>, u64)>,
}

impl Log {
    pub(super) fn add(&self, fetched: Fetched) {
        let mut kept = self.kept.lock();
        if kept.0.len() == KEPT {
            kept.0.pop_front();
            kept.1 += 1;
        }
        kept.0.push_back(fetched);
    }

    /// The fetches that are kept, oldest first, and how many were forgotten.
    pub(super) fn snapshot(&self) -> (Vec<Fetched>, u64) {
        let kept = self.kept.lock();
        (kept.0.iter().copied().collect(), kept.1)
    }
}

/// How the start-up streams of an origin are doing.
#[derive(Debug, Default)]
pub(super) struct Startup {
    running: Arc<AtomicUsize>,
    planned: AtomicU64,
}

/// A stream that runs.
pub(super) struct Running(Arc<AtomicUsize>);

impl Startup {
    /// A stream of so many stored bytes begins; it runs until what is returned is dropped.
    pub(super) fn begin(&self, bytes: u64) -> Running {
        self.running.fetch_add(1, Relaxed);
        self.planned.fetch_add(bytes, Relaxed);
        Running(Arc::clone(&self.running))
    }

    /// Whether a stream runs.
    pub(super) fn is_running(&self) -> bool {
        self.running.load(Relaxed) > 0
    }

    /// Stored bytes that streams were begun for.
    pub(super) fn planned(&self) -> u64 {
        self.planned.load(Relaxed)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
