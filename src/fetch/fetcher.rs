//! The fetcher: who asks for what, and who waits for whom.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::Origin;
use super::flight::{Flights, Joined, OriginId, Progress, Sharing};
use super::gate::Gates;
use super::queue::Want;
use super::throttle::Throttle;
use crate::chunk::{CHUNK_MAX, ChunkRef, STORED_MAX, Verified};
use crate::error::{Error, Result};
use crate::pool::Pool;

/// Who wants a chunk; each is served before those below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A reader waits for it.
    Demand,
    /// It belongs to the start-up pack.
    Startup,
    /// A sequential reader will want it soon.
    ReadAhead,
    /// It is fetched so that it is there one day.
    Background,
}

/// How the fetcher behaves.
#[derive(Clone, Copy, Debug)]
pub struct FetchOptions {
    /// How long readers wait while no source can be reached, unless their origin has a patience of its own; `None` is
    /// for ever.
    pub on_outage: Option<Duration>,
    /// Most requests in flight for one origin; the last one of several is kept for [`Priority::Demand`]. Those of
    /// [`Priority::Background`] take none of these places from others.
    pub requests: usize,
    /// Most requests in flight to one host, over all origins; at least 2.
    pub host_requests: usize,
    /// Most bytes a second that all fetches of [`Priority::Background`] may take together; `None`: no limit.
    pub background_limit: Option<u64>,
    /// Most stored bytes that one such request asks for while readers are about; one that has more left when a reader
    /// comes is given up.
    pub background_bytes: u64,
    /// Largest gap in bytes between two chunks that are still read by one request; the gap's bytes are discarded.
    pub gap: u64,
    /// Most stored bytes that one request asks for.
    pub request_bytes: u64,
    /// Most stored bytes that are asked for ahead of a reader that goes through a pack in order; 0: nothing is.
    pub read_ahead: u64,
    /// Pauses between tries of sources that can't be reached: the first one, doubled each time, and the longest.
    pub pause: (Duration, Duration),
    /// How long a source that failed is asked after all others: at first, doubled each time, and at most.
    pub leave_alone: (Duration, Duration),
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            on_outage: Some(Duration::from_secs(60)),
            requests: 4,
            host_requests: 8,
            background_limit: None,
            background_bytes: 256 << 10,
            gap: 64 << 10,
            request_bytes: 4 << 20,
            read_ahead: 4 << 20,
            pause: (Duration::from_millis(100), Duration::from_secs(5)),
            leave_alone: (Duration::from_secs(1), Duration::from_secs(60)),
        }
    }
}

/// Turns misses into verified chunks; one for each process.
pub struct Fetcher {
    pub(super) shared: Arc<Shared>,
}

/// What the fetcher's tasks share.
pub(super) struct Shared {
    pub pool: Arc<Pool>,
    pub options: FetchOptions,
    pub flights: Arc<Flights>,
    /// Bounds the chunks that are decoded at a time, and with them the memory that bodies can fill.
    pub decoders: Arc<Semaphore>,
    pub gates: Gates,
    pub throttle: Throttle,
}

/// A chunk that somebody waits for.
pub(super) struct Waiting {
    progress: watch::Receiver<Progress>,
    same_origin: bool,
    /// Who asked for it first.
    first: Priority,
}

impl Fetcher {
    /// A fetcher that admits what it verified to `pool`.
    #[must_use]
    pub fn new(pool: Arc<Pool>, options: FetchOptions) -> Arc<Self> {
        let decoders = std::thread::available_parallelism().map_or(2, usize::from) + 2;
        Arc::new(Self {
            shared: Arc::new(Shared {
                pool,
                options,
                flights: Arc::default(),
                decoders: Arc::new(Semaphore::new(decoders)),
                gates: Gates::new(options.host_requests),
                throttle: Throttle::new(options.background_limit),
            }),
        })
    }

    /// Fetches `chunks` of `origin`; result i belongs to `chunks[i]`.
    ///
    /// Runs on a tokio runtime. When the returned future is dropped the fetch goes on for the others that wait for it.
    pub async fn fetch(
        &self,
        origin: &Arc<Origin>,
        chunks: &[ChunkRef],
        priority: Priority,
    ) -> Vec<Result<Arc<Verified>>> {
        let started = Instant::now();
        let _reader = (priority == Priority::Demand).then(|| origin.readers.begin(chunks));
        // All are asked for before the first request is sent, so that neighbours share one.
        let waiting: Vec<_> = chunks
            .iter()
            .map(|chunk| {
                check(origin, chunk)?;
                Ok(self.shared.ask(origin, chunk, priority, Sharing::All))
            })
            .collect();
        if priority == Priority::Demand {
            // What is on its way in the start-up stream says nothing of what comes next: the stream does.
            let streamed =
                |waiting: &Result<Waiting>| matches!(waiting, Ok(waiting) if waiting.first == Priority::Startup);
            let missed = chunks.iter().zip(&waiting).filter(|(_, waiting)| !streamed(waiting));
            let missed: Vec<ChunkRef> = missed.map(|(chunk, _)| *chunk).collect();
            self.shared.read_ahead(origin, &missed);
        }
        self.shared.pump(origin);
        let mut results = Vec::with_capacity(chunks.len());
        for (chunk, waiting) in chunks.iter().zip(waiting) {
            results.push(match waiting {
                Ok(waiting) => self.wait(origin, chunk, priority, waiting).await,
                Err(error) => Err(error),
            });
        }
        if priority == Priority::Demand {
            origin.counters().waited(started.elapsed());
        }
        results
    }

    async fn wait(
        &self,
        origin: &Arc<Origin>,
        chunk: &ChunkRef,
        priority: Priority,
        waiting: Waiting,
    ) -> Result<Arc<Verified>> {
        if let Some(result) = outcome(waiting).await {
            return result;
        }
        let own = self.shared.ask(origin, chunk, priority, Sharing::Origin(id(origin)));
        self.shared.pump(origin);
        outcome(Waiting { same_origin: true, ..own })
            .await
            .unwrap_or_else(|| Err(Error::Stopping("fetching".to_owned())))
    }
}

impl Shared {
    /// Asks for what readers that missed `missed` will probably miss next; [`pump`](Self::pump) must follow.
    fn read_ahead(self: &Arc<Self>, origin: &Arc<Origin>, missed: &[ChunkRef]) {
        let is_local = |chunk: &ChunkRef| self.pool.contains(&chunk.digest);
        for chunk in origin.ahead(missed, &self.options, is_local) {
            if check(origin, &chunk).is_ok() {
                // Nobody waits for it.
                drop(self.ask(origin, &chunk, Priority::ReadAhead, Sharing::All));
            }
        }
    }

    /// Joins the flight for `chunk` or starts one; [`pump`](Self::pump) must follow.
    pub(super) fn ask(
        self: &Arc<Self>,
        origin: &Arc<Origin>,
        chunk: &ChunkRef,
        priority: Priority,
        sharing: Sharing,
    ) -> Waiting {
        match self.flights.join(chunk.digest, sharing, id(origin), priority) {
            Joined::Shared { progress, same_origin, first } => {
                if same_origin {
                    origin.queue.lock().promote(chunk, priority);
                }
                Waiting { progress, same_origin, first }
            }
            Joined::First(ticket, progress) => {
                let want = Want::new(*chunk, ticket, priority);
                // The chunk may have been admitted between the caller's miss and now: the flight that did it is gone.
                if self.pool.contains(&chunk.digest) {
                    let (shared, origin) = (Arc::clone(self), Arc::clone(origin));
                    drop(tokio::task::spawn_blocking(move || match shared.pool.read_whole(&want.chunk.digest) {
                        Some(found) => want.ticket.deliver(Ok(Arc::new(found))),
                        None => {
                            origin.queue.lock().push(want);
                            shared.pump(&origin);
                        }
                    }));
                } else {
                    origin.queue.lock().push(want);
                }
                Waiting { progress, same_origin: true, first: priority }
            }
        }
    }
}

/// How a flight ends; `None` when it belongs to another origin and is in trouble.
pub(super) async fn outcome(mut waiting: Waiting) -> Option<Result<Arc<Verified>>> {
    loop {
        let progress = waiting.progress.borrow_and_update().clone();
        match progress {
            Progress::Done(Err(_)) | Progress::Troubled if !waiting.same_origin => return None,
            Progress::Done(result) => return Some(result),
            Progress::Pending | Progress::Troubled => {}
        }
        if waiting.progress.changed().await.is_err() {
            // The ticket is gone; it left its result.
            return match &*waiting.progress.borrow() {
                Progress::Done(Err(_)) if !waiting.same_origin => None,
                Progress::Done(result) => Some(result.clone()),
                _ => Some(Err(Error::Stopping("fetching".to_owned()))),
            };
        }
    }
}

pub(super) fn id(origin: &Arc<Origin>) -> OriginId {
    Arc::as_ptr(origin) as OriginId
}

/// Checks what an index promises of its chunks, since later arithmetic relies on it.
pub(super) fn check(origin: &Origin, chunk: &ChunkRef) -> Result<()> {
    let bytes = origin.blobs().get(chunk.blob as usize).map(|blob| blob.bytes);
    let end = chunk.offset.checked_add(u64::from(chunk.stored_len));
    let inside = bytes.zip(end).is_some_and(|(bytes, end)| end <= bytes);
    if !inside || chunk.stored_len == 0 || chunk.stored_len > STORED_MAX || chunk.plain_len > CHUNK_MAX {
        return Err(Error::invalid("chunk", format!("{} is not inside its blob", chunk.digest)));
    }
    if origin.sources().is_empty() {
        return Err(Error::NotFound {
            source_name: "an image without sources".to_owned(),
            what: chunk.digest.to_string(),
        });
    }
    Ok(())
}
