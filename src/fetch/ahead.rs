//! Read-ahead: what is asked for along with the chunks that readers miss.
//!
//! Two things are asked for before anybody misses them, in the same request where it has room:
//!
//! * the chunks behind those of a reader that goes through a pack in order: after two adjacent misses a little, then
//!   twice as much each time, up to a bound. Misses that are near the end of what was asked for extend it, so that such
//!   a reader does not stand still;
//! * the neighbours of any miss, more of them where more of what is around it is local already: files of a directory, and
//!   pieces of a file, are read together, though in any order. Chunks of small files weigh less than a request costs.
//!
//! What nobody came for is bounded: streams may be ahead by a tenth of what readers missed, and all neighbours together
//! weigh at most three quarters of that; each has half a megabyte at first. Only a reader that has proved itself over
//! megabytes gets more. Starts of four images (node, nginx, redis, pandas) took 40% as many requests as without neighbours, and
//! 15 to 20% more bytes than they read; half of the neighbours would be read in any case.
//!
//! On a link where such neighbours would take longer than 50 ms there are fewer of them: every byte delays a reader there.
//!
//! Several readers of one origin are told apart by where they are.

use std::collections::VecDeque;
use std::time::Duration;

use super::FetchOptions;
use super::order::Order;
use super::speed::Speed;
use crate::chunk::ChunkRef;

/// Places that are remembered where a reader was: also one that stopped is continued there later.
const STREAMS: usize = 256;
/// Bytes asked for ahead at first.
const FIRST_WINDOW: u64 = 128 << 10;
/// Most local chunks between two misses that still count as adjacent.
const MAX_LOCAL: usize = 32;
/// Stored bytes of neighbours of a miss: where nothing around it is local, and at most.
const NEIGHBOURS: (u64, u64) = (96 << 10, 256 << 10);
/// What takes longer than this is a delay that readers notice: on a slow link bytes count, and not requests.
const NOTICED: Duration = Duration::from_millis(50);
/// Stored bytes before and behind a miss that are looked at for what is local.
const AROUND: u64 = 256 << 10;
/// Most chunks of that on each side.
const AROUND_CHUNKS: usize = 64;
/// Bytes that may be asked for in vain before a share of what was missed counts.
const FREE: u64 = 512 << 10;
/// Stored bytes after which a reader's windows need no allowance.
const PROVED: u64 = 4 << 20;

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
    /// Stored bytes of neighbours.
    neighbours: u64,
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
        speed: &Speed,
        is_local: impl Fn(&ChunkRef) -> bool,
    ) -> Vec<ChunkRef> {
        let most = options.read_ahead.min(speed.bytes_in(NOTICED));
        let mut positions: Vec<usize> = missed.iter().filter_map(|chunk| order.position(chunk)).collect();
        positions.sort_unstable();
        self.missed += missed.iter().map(|chunk| u64::from(chunk.stored_len)).sum::<u64>();
        let mut wanted = Vec::new();
        for run in positions.chunk_by(|a, b| a + 1 == *b) {
            let (Some(&first), Some(&last)) = (run.first(), run.last()) else { continue };
            self.step(first, last, order, options, &is_local, &mut wanted);
            self.neighbours(first, last, order, most, &is_local, &mut wanted);
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

    /// Bytes that streams may still be ahead of their readers.
    fn allowance(&self) -> u64 {
        FREE.max(self.missed / 10).saturating_sub(self.unused)
    }

    /// Chunks that touch the run from position `first` to `last`: two thirds of them behind it, since what lies before it
    /// delays its reader. They weigh `most` at most.
    fn neighbours(
        &mut self,
        first: usize,
        last: usize,
        order: &Order,
        most: u64,
        is_local: &impl Fn(&ChunkRef) -> bool,
        wanted: &mut Vec<ChunkRef>,
    ) {
        let blob = order.get(last).map(|chunk| chunk.blob);
        let same_blob = |at: usize| order.get(at).filter(|chunk| Some(chunk.blob) == blob);
        let behind = || (last + 1..).map_while(same_blob).take(AROUND_CHUNKS);
        let before = || (0..first).rev().map_while(same_blob).take(AROUND_CHUNKS);
        let local = local_bytes(behind(), is_local) + local_bytes(before(), is_local);
        let allowed = (FREE + self.missed / 4 * 3).saturating_sub(self.neighbours);
        let window = (NEIGHBOURS.0 + local).min(NEIGHBOURS.1).min(most).min(allowed);
        let (ahead, back) = (window / 3 * 2, window / 3);
        let sides: [(u64, &mut dyn Iterator<Item = ChunkRef>); 2] = [(ahead, &mut behind()), (back, &mut before())];
        for (mut left, chunks) in sides {
            for chunk in chunks {
                let Some(rest) = left.checked_sub(chunk.stored_len.into()).filter(|_| !is_local(&chunk)) else { break };
                left = rest;
                if !wanted.iter().any(|other| other.digest == chunk.digest) {
                    self.neighbours += u64::from(chunk.stored_len);
                    wanted.push(chunk);
                }
            }
        }
    }
}

/// Stored bytes of the chunks that are local, of those within [`AROUND`].
fn local_bytes(chunks: impl Iterator<Item = ChunkRef>, is_local: &impl Fn(&ChunkRef) -> bool) -> u64 {
    let (mut seen, mut local) = (0, 0);
    for chunk in chunks {
        seen += u64::from(chunk.stored_len);
        if seen > AROUND {
            break;
        }
        local += if is_local(&chunk) { u64::from(chunk.stored_len) } else { 0 };
    }
    local
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::*;
    use crate::chunk::{Codec, Digest};
    use crate::index::{Blob, Extent, Index, IndexWriter, Role};

    const STORED: u32 = 32 << 10;

    /// Chunks behind each other in one blob.
    fn order(count: u32) -> Order {
        let mut writer = IndexWriter::new();
        let bytes = u64::from(count) * u64::from(STORED);
        writer.blob(&Blob { digest: Digest::of(b"blob"), bytes, role: Role::Pack });
        for number in 0..count {
            let chunk = ChunkRef {
                digest: Digest::of(&number.to_le_bytes()),
                blob: 0,
                offset: u64::from(number * STORED),
                stored_len: STORED,
                plain_len: STORED,
                codec: Codec::Plain,
            };
            writer.chunk(&chunk);
            writer.extent(Extent { block: number * STORED / 4096, blocks: STORED / 4096, chunk: number, offset: 0 });
        }
        Order::new(Arc::new(Index::from_bytes(writer.finish(bytes, "raw").unwrap()).unwrap()))
    }

    /// Positions that are asked for along with a miss, of chunks whose positions are not in `local`.
    fn asked(ahead: &mut Ahead, order: &Order, miss: usize, local: &[usize], speed: &Speed) -> Vec<usize> {
        let is_local = |chunk: &ChunkRef| local.contains(&order.position(chunk).unwrap());
        let missed = [order.get(miss).unwrap()];
        let wanted = ahead.of(&missed, order, &FetchOptions::default(), speed, is_local);
        let mut positions: Vec<usize> = wanted.iter().map(|chunk| order.position(chunk).unwrap()).collect();
        positions.sort_unstable();
        positions
    }

    #[test]
    fn the_more_is_local_around_a_miss_the_more_neighbours_come_along() {
        let (order, speed) = (order(200), Speed::default());
        let asked = |miss, local: &[usize]| asked(&mut Ahead::default(), &order, miss, local, &speed);
        assert_eq!(asked(100, &[]), [99, 101, 102]);
        assert_eq!(asked(100, &[20, 180]), [99, 101, 102], "what is far away says nothing");
        assert_eq!(asked(100, &[94, 95, 107]), [98, 99, 101, 102, 103, 104]);
        assert_eq!(
            asked(100, &[92, 93, 94, 95, 96, 105, 106, 107]),
            [98, 99, 101, 102, 103, 104],
            "up to what is local"
        );
        assert_eq!(asked(0, &[]), [1, 2]);
        assert_eq!(asked(199, &[]), [198]);
    }

    #[test]
    fn where_bytes_are_slow_there_are_few_neighbours() {
        let (order, speed) = (order(200), Speed::default());
        // 5 Mbit/s: 31 KiB in 50 ms.
        speed.came(625_000, Duration::from_secs(1));
        assert!(asked(&mut Ahead::default(), &order, 100, &[96, 97], &speed).is_empty());
        let speed = Speed::default();
        speed.came(12_500_000, Duration::from_secs(1));
        assert_eq!(asked(&mut Ahead::default(), &order, 100, &[96, 97], &speed), [99, 101, 102, 103]);
    }

    #[test]
    fn neighbours_are_bounded_by_what_was_missed() {
        let (order, speed) = (order(4000), Speed::default());
        let mut ahead = Ahead::default();
        let misses: Vec<usize> = (0..400).map(|number| number * 7 % 400 * 10 + 5).collect();
        let neighbours: usize = misses.iter().map(|&miss| asked(&mut ahead, &order, miss, &[], &speed).len()).sum();
        let bound = FREE / u64::from(STORED) + 300;
        assert!((300..=bound).contains(&(neighbours as u64)), "{neighbours} of at most {bound}");
    }
}
