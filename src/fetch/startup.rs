//! The start-up stream: the chunks that a start needs, in the order in which it needs them, asked for before anybody
//! misses them.
//!
//! All of them get a flight before the first byte is asked for. So whoever misses one waits for the stream and asks for
//! nothing twice; each chunk is decoded, verified and delivered as it becomes complete. What the pool has is left out: in
//! long stretches by asking for several ranges, in short ones by reading over it. The stream takes no place of the
//! queue's requests, which stay free for what readers miss elsewhere. What it can't get from any source goes to the queue,
//! and so to everything that is done about sources that can't be reached.

use std::sync::Arc;

use tokio::time::Instant;

use super::fetcher::{Fetcher, Shared, check, id};
use super::flight::{Joined, Progress, Sharing};
use super::queue::Want;
use super::{Origin, Priority};
use crate::chunk::{ChunkRef, Digest};
use crate::index::Index;

/// Chunks that have a flight at a time: bounds the memory of a stream, whatever an index says.
const ROUND: usize = 8192;
/// Bytes that are read over rather than asked around, at first; doubled until there are few enough ranges.
const GAP: u64 = 256 << 10;
/// Most ranges of a round.
const RANGES: usize = 8;

impl Fetcher {
    /// Starts to fetch the start-up chunks of `index` that are not local. Returns at once; runs on a tokio runtime.
    ///
    /// Nothing happens when there are none, or none is missing.
    pub fn start_up(&self, origin: &Arc<Origin>, index: &Arc<Index>) {
        let Some(first) = index.startup_order().next() else { return };
        let mut order = vec![first];
        order.extend(index.startup_order().skip(1));
        let missing = self.shared.missing(origin, index, &order);
        if missing.is_empty() {
            return;
        }
        let (shared, origin) = (Arc::clone(&self.shared), Arc::clone(origin));
        let streaming = origin.startup.begin(missing.iter().map(|chunk| u64::from(chunk.stored_len)).sum());
        let mut rounds = rounds(missing);
        // Before this returns: a read that comes right behind it must find the flights.
        let mut wants = rounds.next().map(|chunks| shared.board(&origin, chunks)).unwrap_or_default();
        tokio::spawn(async move {
            loop {
                for range in ranges(std::mem::take(&mut wants)) {
                    shared.stream_range(&origin, range).await;
                }
                match rounds.next() {
                    Some(chunks) => wants = shared.board(&origin, chunks),
                    None => break,
                }
            }
            drop(streaming);
        });
    }
}

impl Fetcher {
    /// Waits until a chunk that is on its way has come, or comes no more; nothing is fetched for that. Says whether a read
    /// of it waits for no source.
    ///
    /// A chunk of a stream's later rounds is not on its way yet.
    pub async fn arrival(&self, digest: Digest) -> bool {
        let Some(mut progress) = self.shared.flights.look(digest) else { return self.shared.pool.contains(&digest) };
        // Who asks before the pool has it still gets it from the flight.
        let done = progress.wait_for(|progress| matches!(progress, Progress::Done(_))).await;
        done.is_ok_and(|done| matches!(&*done, Progress::Done(Ok(_))))
    }
}

fn rounds(chunks: Vec<ChunkRef>) -> impl Iterator<Item = Vec<ChunkRef>> + Send {
    let mut left = chunks.into_iter();
    std::iter::from_fn(move || {
        let round: Vec<ChunkRef> = left.by_ref().take(ROUND).collect();
        (!round.is_empty()).then_some(round)
    })
}

impl Shared {
    /// The chunks of `order` that are not local, as they lie in their blobs: each once, none inside another.
    fn missing(&self, origin: &Origin, index: &Index, order: &[u32]) -> Vec<ChunkRef> {
        let mut chunks: Vec<ChunkRef> = order
            .iter()
            .filter_map(|&number| index.chunk(number))
            .filter(|chunk| check(origin, chunk).is_ok() && !self.pool.contains(&chunk.digest))
            .collect();
        chunks.sort_unstable_by_key(|chunk| (chunk.blob, chunk.offset));
        let mut end = (0, 0);
        chunks.retain(|chunk| {
            let apart = (chunk.blob, chunk.offset) >= end;
            if apart {
                end = (chunk.blob, chunk.offset + u64::from(chunk.stored_len));
            }
            apart
        });
        chunks
    }

    /// Starts a flight for each chunk that nobody fetches yet.
    fn board(&self, origin: &Arc<Origin>, chunks: Vec<ChunkRef>) -> Vec<Want> {
        let board = |chunk: ChunkRef| match self.flights.join(chunk.digest, Sharing::All, id(origin), Priority::Startup)
        {
            Joined::First(ticket, _) => Some(Want::new(chunk, ticket, Priority::Startup)),
            Joined::Shared { .. } => None,
        };
        chunks.into_iter().filter(|chunk| !self.pool.contains(&chunk.digest)).filter_map(board).collect()
    }

    /// Reads chunks of one blob, ascending, with one request where all goes well.
    async fn stream_range(self: &Arc<Self>, origin: &Arc<Origin>, wants: Vec<Want>) {
        let mut left = wants;
        while !left.is_empty() {
            let progress;
            (left, progress) = self.attempt(origin, left, None).await;
            if !progress {
                break;
            }
        }
        if left.is_empty() {
            return;
        }
        {
            let mut queue = origin.queue.lock();
            for mut want in left {
                if want.ticket.is_waited_for() {
                    want.priority = Priority::Demand;
                }
                // Readers' patience counts from now: before, the stream was on its way.
                want.since = Instant::now();
                queue.push(want);
            }
        }
        self.pump(origin);
    }
}

/// Cuts what one round wants into ranges that are read with one request each.
fn ranges(wants: Vec<Want>) -> Vec<Vec<Want>> {
    let mut gap = GAP;
    let breaks = |gap: u64| {
        let next = |pair: &[Want]| matches!(pair, [a, b] if !near(&a.chunk, &b.chunk, gap));
        wants.windows(2).filter(|pair| next(pair)).count()
    };
    while breaks(gap) >= RANGES && gap < 1 << 40 {
        gap *= 2;
    }
    let mut ranges: Vec<Vec<Want>> = Vec::new();
    for want in wants {
        match ranges.last_mut() {
            Some(range) if range.last().is_some_and(|last| near(&last.chunk, &want.chunk, gap)) => range.push(want),
            _ => ranges.push(vec![want]),
        }
    }
    ranges
}

fn near(a: &ChunkRef, b: &ChunkRef, gap: u64) -> bool {
    a.blob == b.blob && b.offset.saturating_sub(a.offset + u64::from(a.stored_len)) <= gap
}
