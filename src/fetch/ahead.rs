//! Read-ahead: what is asked for along with the chunks that readers miss.
//!
//! Two things are asked for before anybody misses them, in the same request where it has room:
//!
//! * the chunks behind those of a reader that goes through a pack in order: after two adjacent misses a little, then
//!   twice as much each time, up to a bound. Misses that are near the end of what was asked for extend it, so that such
//!   a reader does not stand still;
//! * small neighbours of any miss, since a request costs more than they weigh: above all file system metadata, of which
//!   256 KiB are stored in a few.
//!
//! What nobody came for is bounded: together with the small neighbours it may make up a tenth of what readers missed,
//! and half a megabyte at first. Only a reader that has proved itself over megabytes gets more.
//!
//! Several readers of one origin are told apart by where they are.

use std::collections::VecDeque;
use std::sync::Arc;

use super::FetchOptions;
use crate::chunk::ChunkRef;
use crate::index::Index;

/// Places that are remembered where a reader was: also one that stopped is continued there later.
const STREAMS: usize = 256;
/// Bytes asked for ahead at first.
const FIRST_WINDOW: u64 = 128 << 10;
/// Most local chunks between two misses that still count as adjacent.
const MAX_LOCAL: usize = 32;
/// Stored bytes of a chunk that is small, and of all small ones asked for along with one miss.
const SMALL: u64 = 32 << 10;
const SMALL_TOTAL: u64 = 64 << 10;
/// Bytes that may be asked for in vain before a share of what was missed counts.
const FREE: u64 = 512 << 10;
/// Stored bytes after which a reader's windows need no allowance.
const PROVED: u64 = 4 << 20;

/// The chunks of an image in the order of their places.
pub(super) struct Order {
    index: Arc<Index>,
    /// Numbers of chunks.
    chunks: Vec<u32>,
}

impl Order {
    pub(super) fn new(index: Arc<Index>) -> Self {
        let mut chunks: Vec<u32> = (0..index.chunk_count()).collect();
        chunks.sort_by_key(|&number| index.chunk(number).map(|chunk| (chunk.blob, chunk.offset)));
        Self { index, chunks }
    }

    fn get(&self, position: usize) -> Option<ChunkRef> {
        self.index.chunk(*self.chunks.get(position)?)
    }

    /// Stored bytes of the chunks from position `from` to before `to`.
    fn bytes(&self, from: usize, to: usize) -> u64 {
        (from..to).filter_map(|at| self.get(at)).map(|chunk| u64::from(chunk.stored_len)).sum()
    }

    fn position(&self, chunk: &ChunkRef) -> Option<usize> {
        let place = |number: &u32| self.index.chunk(*number).map(|chunk| (chunk.blob, chunk.offset));
        self.chunks.binary_search_by_key(&Some((chunk.blob, chunk.offset)), place).ok()
    }
}

/// A reader that goes through a pack.
struct Stream {
    /// Position behind its last miss.
    next: usize,
    /// Position behind what was asked for ahead.
    end: usize,
    /// Stored bytes that were asked for the last time; 0 before.
    window: u64,
    /// Stored bytes that were asked for ahead and not come to yet.
    unused: u64,
    /// Stored bytes that it went through.
    run: u64,
}

/// The readers of an origin.
#[derive(Default)]
pub(super) struct Ahead {
    /// The latest one first.
    streams: VecDeque<Stream>,
    /// Stored bytes of misses, and of chunks that readers came to after they were asked for.
    missed: u64,
    /// Stored bytes of small neighbours.
    small: u64,
    /// Stored bytes that were asked for ahead of streams, which did not come to them, or not yet.
    unused: u64,
}

impl Ahead {
    /// What to ask for along with `missed`, the chunks of one read. `is_local` says which chunks need no asking.
    pub(super) fn of(
        &mut self,
        missed: &[ChunkRef],
        order: &Order,
        options: &FetchOptions,
        is_local: impl Fn(&ChunkRef) -> bool,
    ) -> Vec<ChunkRef> {
        let mut positions: Vec<usize> = missed.iter().filter_map(|chunk| order.position(chunk)).collect();
        positions.sort_unstable();
        self.missed += missed.iter().map(|chunk| u64::from(chunk.stored_len)).sum::<u64>();
        let mut wanted = Vec::new();
        for run in positions.chunk_by(|a, b| a + 1 == *b) {
            let (Some(&first), Some(&last)) = (run.first(), run.last()) else { continue };
            self.step(first, last, order, options, &is_local, &mut wanted);
            self.small(first, last, order, options, &is_local, &mut wanted);
        }
        wanted
    }

    /// A reader missed the chunks from position `first` to `last`.
    fn step(
        &mut self,
        first: usize,
        last: usize,
        order: &Order,
        options: &FetchOptions,
        is_local: &impl Fn(&ChunkRef) -> bool,
        wanted: &mut Vec<ChunkRef>,
    ) {
        let skipped = |from: usize| {
            first - from <= MAX_LOCAL && (from..first).all(|at| order.get(at).is_some_and(|chunk| is_local(&chunk)))
        };
        let found = self.streams.iter().position(|stream| {
            (stream.next..=stream.end).contains(&first) || first > stream.end && skipped(stream.end)
        });
        let Some(mut stream) = found.and_then(|at| self.streams.remove(at)) else {
            self.streams.truncate(STREAMS - 1);
            let run = order.bytes(first, last + 1);
            return self.streams.push_front(Stream { next: last + 1, end: last + 1, window: 0, unused: 0, run });
        };
        stream.run += order.bytes(stream.next, last + 1);
        stream.next = last + 1;
        stream.end = stream.end.max(last + 1);
        let ahead = order.bytes(stream.next, stream.end);
        let reached = stream.unused.saturating_sub(ahead);
        stream.unused -= reached;
        self.unused -= reached;
        self.missed += reached;
        if ahead <= stream.window / 2 {
            let allowed = if stream.run >= PROVED { u64::MAX } else { self.allowance() };
            stream.window = (stream.window * 2).max(FIRST_WINDOW).min(options.read_ahead).min(stream.run);
            let blob = order.get(last).map(|chunk| chunk.blob);
            let mut left = stream.window.min(allowed);
            while let Some(chunk) = order.get(stream.end).filter(|chunk| Some(chunk.blob) == blob) {
                let Some(rest) = left.checked_sub(u64::from(chunk.stored_len)) else { break };
                left = rest;
                stream.end += 1;
                if !is_local(&chunk) {
                    stream.unused += u64::from(chunk.stored_len);
                    self.unused += u64::from(chunk.stored_len);
                    wanted.push(chunk);
                }
            }
        }
        self.streams.push_front(stream);
    }

    /// Bytes that may be asked for in vain, of all that was missed so far.
    fn budget(&self) -> u64 {
        FREE.max(self.missed / 10)
    }

    /// Bytes that may still be asked for in vain.
    fn allowance(&self) -> u64 {
        self.budget().saturating_sub(self.small + self.unused)
    }

    /// Small chunks that touch the run from position `first` to `last`, behind it and before it.
    fn small(
        &mut self,
        first: usize,
        last: usize,
        order: &Order,
        options: &FetchOptions,
        is_local: &impl Fn(&ChunkRef) -> bool,
        wanted: &mut Vec<ChunkRef>,
    ) {
        // Half of what is allowed is kept for streams.
        let share = (self.budget() / 2).saturating_sub(self.small);
        let mut left = share.min(self.allowance()).min(SMALL_TOTAL).min(options.read_ahead);
        let blob = order.get(last).map(|chunk| chunk.blob);
        let behind = (last + 1..).map(|at| order.get(at));
        let before = (0..first).rev().map(|at| order.get(at));
        for side in [&mut behind.take(64) as &mut dyn Iterator<Item = _>, &mut before.take(64)] {
            for chunk in side.map_while(|chunk| chunk) {
                let bytes = u64::from(chunk.stored_len);
                if Some(chunk.blob) != blob || bytes > SMALL || bytes > left || is_local(&chunk) {
                    break;
                }
                if !wanted.iter().any(|other| other.digest == chunk.digest) {
                    left -= bytes;
                    self.small += bytes;
                    wanted.push(chunk);
                }
            }
        }
    }
}
