//! An origin: one image's blobs, the sources that have them, and what fetching from them has cost so far.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

use super::FetchOptions;
use super::ahead::Ahead;
use super::fill::Readers;
use super::health::{Health, HealthReport};
use super::hedge::Hedging;
use super::log::{Fetched, Log, Startup};
use super::order::Order;
use super::patience::Patience;
use super::queue::{MAX_SOURCES, Queue};
use super::speed::Speed;
use crate::chunk::{ChunkRef, Digest};
use crate::index::{Blob, Index};
use crate::source::Source;

/// Most chunks that are remembered as reported; more go unreported.
const MAX_REPORTED: usize = 1024;

/// Where the chunks of one image come from.
pub struct Origin {
    blobs: Vec<Blob>,
    sources: Vec<Arc<dyn Source>>,
    counters: Counters,
    /// What replaces the fetcher's own patience.
    patience: Option<Patience>,
    pub(super) health: Health,
    /// Where the image's chunks are; without it nothing is read ahead.
    order: Option<Arc<Order>>,
    ahead: Mutex<Ahead>,
    pub(super) hedging: Hedging,
    pub(super) speed: Speed,
    pub(super) queue: Mutex<Queue>,
    /// Chunks that a source (by number) or no source (`None`) has right, of which there was an event.
    reported: Mutex<HashSet<(Digest, Option<usize>)>>,
    pub(super) log: Log,
    pub(super) startup: Startup,
    pub(super) readers: Readers,
}

impl Origin {
    /// An origin with the image's `blobs` in the index's order and its sources, best first; at most 64 are used.
    #[must_use]
    pub fn new(blobs: Vec<Blob>, sources: Vec<Arc<dyn Source>>) -> Self {
        let sources: Vec<_> = sources.into_iter().take(MAX_SOURCES).collect();
        let health = Health::new(sources.iter().map(|source| source.name().to_owned()).collect());
        Self {
            blobs,
            sources,
            counters: Counters::default(),
            patience: None,
            health,
            order: None,
            ahead: Mutex::default(),
            hedging: Hedging::default(),
            speed: Speed::default(),
            queue: Mutex::default(),
            reported: Mutex::default(),
            log: Log::default(),
            startup: Startup::default(),
            readers: Readers::default(),
        }
    }

    /// The same origin, whose readers wait as long as `patience` says and not as the fetcher's options do.
    #[must_use]
    pub fn patient(self, patience: Patience) -> Self {
        Self { patience: Some(patience), ..self }
    }

    /// The same origin, which knows the chunks of `index` and so what is adjacent to a miss.
    #[must_use]
    pub fn indexed(self, index: &Arc<Index>) -> Self {
        Self { order: Some(Arc::new(Order::new(Arc::clone(index)))), ..self }
    }

    /// An origin with the same sources and chunks whose readers wait as long as `patience` says.
    #[must_use]
    pub fn fork(&self, patience: Patience) -> Self {
        let new = Self::new(self.blobs.clone(), self.sources.clone()).patient(patience);
        Self { order: self.order.clone(), ..new }
    }

    /// The chunks of `index`, which is the image's.
    pub(super) fn order(&self, index: &Arc<Index>) -> Arc<Order> {
        self.order.clone().unwrap_or_else(|| Arc::new(Order::new(Arc::clone(index))))
    }

    /// What to ask for along with `missed`.
    pub(super) fn ahead(
        &self,
        missed: &[ChunkRef],
        options: &FetchOptions,
        is_local: impl Fn(&ChunkRef) -> bool,
    ) -> Vec<ChunkRef> {
        match &self.order {
            Some(order) if options.read_ahead > 0 => {
                self.ahead.lock().of(missed, order, options, &self.speed, is_local)
            }
            _ => Vec::new(),
        }
    }

    /// The patience of its own, if it has one.
    #[must_use]
    pub fn patience(&self) -> Option<Patience> {
        self.patience
    }

    /// How long readers wait while no source can be reached, where the fetcher's options say `node`.
    pub(super) fn on_outage(&self, node: Option<Duration>) -> Option<Duration> {
        self.patience.map_or(node, Patience::limit)
    }

    /// How the sources are doing.
    #[must_use]
    pub fn health(&self) -> HealthReport {
        self.health.report()
    }

    /// True the first time that it is asked for a chunk, and the source that has it wrong or all of them.
    pub(super) fn report_once(&self, digest: &Digest, source: Option<usize>) -> bool {
        let mut reported = self.reported.lock();
        let first = reported.len() < MAX_REPORTED && reported.insert((*digest, source));
        if first && reported.len() == MAX_REPORTED {
            tracing::warn!("further wrong chunks of this image are not logged: run `firstread verify` on it");
        }
        first
    }

    /// The blobs, by number.
    #[must_use]
    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// The sources, best first.
    #[must_use]
    pub fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    /// The latest fetches, oldest first, and how many before them were forgotten.
    #[must_use]
    pub fn fetches(&self) -> (Vec<Fetched>, u64) {
        self.log.snapshot()
    }

    /// Whether a start-up stream runs, and the stored bytes that streams were begun for.
    #[must_use]
    pub fn startup(&self) -> (bool, u64) {
        (self.startup.is_running(), self.startup.planned())
    }

    /// What fetching has cost since the origin was made.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// Counters of an origin. Each is right by itself; together they are not one moment's.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) chunks: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) startup_bytes: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) hedges: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) verify_failures: AtomicU64,
    waits: AtomicU64,
    waited_ns: AtomicU64,
    longest_wait_ns: AtomicU64,
    pub(super) outage_ns: AtomicU64,
}

/// The values of [`Counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CounterValues {
    /// Chunks fetched and verified.
    pub chunks: u64,
    /// Bytes received from sources, including what was skipped or discarded.
    pub bytes: u64,
    /// Of these, bytes of the start-up stream.
    pub startup_bytes: u64,
    /// Requests to sources.
    pub requests: u64,
    /// Requests of these to a further source, because the first one was slower than usual.
    pub hedges: u64,
    /// Chunks whose fetch ended in an error.
    pub failed: u64,
    /// Times that bytes were not what the index promised.
    pub verify_failures: u64,
    /// Fetches on demand that a reader waited for.
    pub waits: Waits,
    /// Seconds in which readers waited while no source could be reached.
    pub outage_seconds: f64,
}

/// How long readers waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Waits {
    /// How often.
    pub count: u64,
    /// Seconds, summed over the readers.
    pub total: f64,
    /// The longest wait in seconds.
    pub max: f64,
}

impl Counters {
    /// The values now.
    #[must_use]
    pub fn snapshot(&self) -> CounterValues {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |counter: &AtomicU64| Duration::from_nanos(get(counter)).as_secs_f64();
        CounterValues {
            chunks: get(&self.chunks),
            bytes: get(&self.bytes),
            startup_bytes: get(&self.startup_bytes),
            requests: get(&self.requests),
            hedges: get(&self.hedges),
            failed: get(&self.failed),
            verify_failures: get(&self.verify_failures),
            waits: Waits {
                count: get(&self.waits),
                total: seconds(&self.waited_ns),
                max: seconds(&self.longest_wait_ns),
            },
            outage_seconds: seconds(&self.outage_ns),
        }
    }

    pub(super) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    pub(super) fn waited(&self, time: Duration) {
        let ns = nanoseconds(time);
        Self::add(&self.waits, 1);
        Self::add(&self.waited_ns, ns);
        self.longest_wait_ns.fetch_max(ns, Ordering::Relaxed);
    }

    pub(super) fn outage(&self, time: Duration) {
        Self::add(&self.outage_ns, nanoseconds(time));
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
