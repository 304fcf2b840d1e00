//! Background fill: an image without a start-up pack is fetched whole, from the first moment, behind its readers.
//!
//! On demand alone, a start is a long row of round trips; on a fast link that is slower than pulling everything. So what
//! nobody asked for yet is fetched as well, in an order that guesses what will be: what the builder found that the image's
//! command needs (the index's likely chunks), what lies behind the latest misses (the same file, or files of the same
//! directory), and then everything else as it lies in the packs.
//!
//! Readers come first. A piece of the fill is as long as the link moves in a twentieth of a second; where that is less
//! than a chunk, the link is slow, every byte of the fill delays a reader, and the fill waits until no reader has missed
//! anything for a while. On other links likely chunks are fetched beside readers, who probably wait for them next; and so
//! is everything else as far as the link is idle while a reader waits for an answer to begin: pieces are so short then that
//! they move in such a wait. It ends when the pool is full: it drops nothing that somebody wanted.

use std::collections::VecDeque;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Deserialize;
use tokio::time::Instant;

use super::fetcher::{Fetcher, Shared, check, outcome};
use super::flight::Sharing;
use super::order::Order;
use super::{Origin, Priority};
use crate::chunk::ChunkRef;
use crate::index::{BLOCK, Index};

/// How long a piece of the fill should take.
const PIECE: Duration = Duration::from_millis(50);
/// Stored bytes of a piece: at first and at least, and at most.
const PIECE_BYTES: (u64, u64) = (256 << 10, 4 << 20);
/// A link that moves less in that time is slow.
const SLOW_BYTES: u64 = 128 << 10;
/// A wait for an answer that leaves the link idle: where it is shorter, readers keep the link busy, and are slowed down.
const LONG_WAIT: Duration = Duration::from_millis(10);
/// Least stored bytes that the link must have room for in a reader's wait.
const IDLE_BYTES: u64 = 64 << 10;
/// Pieces under way at a time where the link is fast: one is moved while the other is asked for.
const TASKS: usize = 2;
/// On a slow link: how long no reader has missed anything before a piece is fetched.
const QUIET: Duration = Duration::from_millis(300);
/// How long a reader is remembered who waited.
const RECENT: Duration = Duration::from_secs(2);
/// Stored bytes behind a miss that are fetched before the rest.
const NEARBY: u64 = 1 << 20;
/// Misses that are remembered for that.
const MISSES: usize = 32;
/// Pause after a piece that could not be had.
const PAUSE: Duration = Duration::from_secs(5);

/// What is fetched of an image before anybody reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefetch {
    /// Nothing.
    None,
    /// The start-up pack, where there is one.
    Startup,
    /// The start-up pack; everything, of an image that has none.
    #[default]
    All,
}

impl FromStr for Prefetch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "startup" => Ok(Self::Startup),
            "all" => Ok(Self::All),
            other => Err(format!("{other:?} is none of none, startup, all")),
        }
    }
}

/// What readers of an origin are doing, for those who keep out of their way.
#[derive(Debug, Default)]
pub(super) struct Readers {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: usize,
    last: Option<Instant>,
    /// Blob and offset behind the latest misses, latest last.
    misses: VecDeque<(u32, u64)>,
}

/// A reader that waits.
pub(super) struct Reader<'a>(&'a Readers);

impl Readers {
    /// A reader waits for `chunks` until what is returned is dropped.
    pub(super) fn begin(&self, chunks: &[ChunkRef]) -> Reader<'_> {
        let mut state = self.state.lock();
        state.waiting += 1;
        for chunk in chunks.iter().take(MISSES) {
            if state.misses.len() == MISSES {
                state.misses.pop_front();
            }
            state.misses.push_back((chunk.blob, chunk.offset.saturating_add(chunk.stored_len.into())));
        }
        Reader(self)
    }

    /// How long nobody has waited.
    fn quiet_for(&self) -> Duration {
        let state = self.state.lock();
        match (state.waiting, state.last) {
            (0, Some(last)) => last.elapsed(),
            (0, None) => Duration::MAX,
            _ => Duration::ZERO,
        }
    }

    /// The latest miss that was not asked for yet.
    fn next_miss(&self) -> Option<(u32, u64)> {
        self.state.lock().misses.pop_back()
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.waiting = state.waiting.saturating_sub(1);
        state.last = Some(Instant::now());
    }
}

/// A fill that runs; it ends when this is dropped.
#[derive(Debug)]
pub struct Filling(Arc<AtomicBool>);

impl Drop for Filling {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

impl Fetcher {
    /// Fetches everything of `index` that is not local, behind all others who want something. Runs on a tokio runtime.
    #[must_use]
    pub fn fill(&self, origin: &Arc<Origin>, index: &Arc<Index>) -> Filling {
        let stopped = Arc::new(AtomicBool::new(false));
        let (shared, origin) = (Arc::clone(&self.shared), Arc::clone(origin));
        let likely = 0..index.likely_chunks();
        let fill = Fill { chunks: origin.order(index), likely, next: 0, stopped: Arc::clone(&stopped) };
        let fill = Arc::new(Mutex::new((fill, Pace { bytes: PIECE_BYTES.0, slow: false })));
        for number in 0..TASKS {
            tokio::spawn(Arc::clone(&shared).run_fill(Arc::clone(&origin), Arc::clone(&fill), number));
        }
        Filling(stopped)
    }
}

struct Fill {
    chunks: Arc<Order>,
    /// Numbers of likely chunks that were not looked at yet.
    likely: Range<u32>,
    /// Everything before is local, or was.
    next: usize,
    stopped: Arc<AtomicBool>,
}

impl Fill {
    /// The next likely chunks to fetch, about `bytes` stored ones; empty when all are local.
    fn likely(&mut self, shared: &Shared, origin: &Origin, bytes: u64) -> Vec<ChunkRef> {
        let (mut piece, mut taken) = (Vec::new(), 0);
        while let Some(chunk) = self.likely.clone().next().and_then(|number| self.chunks.numbered(number)) {
            let wanted = !shared.pool.contains(&chunk.digest) && check(origin, &chunk).is_ok();
            if wanted {
                taken += u64::from(chunk.stored_len);
                if taken > bytes && !piece.is_empty() {
                    break;
                }
                piece.push(chunk);
            }
            self.likely.next();
        }
        piece
    }

    /// The next chunks to fetch, about `bytes` stored ones; empty when all are local.
    fn piece(&mut self, shared: &Shared, origin: &Origin, bytes: u64) -> Vec<ChunkRef> {
        while let Some(place) = origin.readers.next_miss() {
            let first = self.chunks.at(place);
            let piece = self.from(shared, origin, first, bytes.min(NEARBY), NEARBY);
            if !piece.is_empty() {
                return piece;
            }
        }
        let piece = self.from(shared, origin, self.next, bytes, u64::MAX);
        if let Some(last) = piece.last() {
            self.next = self.chunks.at((last.blob, last.offset)) + 1;
        } else {
            self.next = self.chunks.len();
        }
        piece
    }

    /// Chunks of one blob from position `first` on that are not local, not more than `bytes` and none further away than
    /// `far`.
    fn from(&self, shared: &Shared, origin: &Origin, first: usize, bytes: u64, far: u64) -> Vec<ChunkRef> {
        let (mut piece, mut taken) = (Vec::<ChunkRef>::new(), 0);
        let Some(start) = self.chunks.get(first) else { return piece };
        let (blob, limit) = (start.blob, start.offset.saturating_add(far));
        for chunk in self.chunks.iter_from(first) {
            let other_blob = chunk.blob != piece.first().map_or(blob, |first| first.blob);
            let bounded = far != u64::MAX;
            if (other_blob && (bounded || !piece.is_empty())) || (bounded && chunk.offset > limit) {
                break;
            }
            if shared.pool.contains(&chunk.digest) || check(origin, &chunk).is_err() {
                continue;
            }
            taken += u64::from(chunk.stored_len);
            if taken > bytes && !piece.is_empty() {
                break;
            }
            piece.push(chunk);
        }
        piece
    }
}

/// How fast the fill may go.
struct Pace {
    /// Stored bytes of a piece.
    bytes: u64,
    /// Whether readers notice every byte.
    slow: bool,
}

/// Whether how long a piece took says what the link moves: of a short one, most was the wait for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Paced {
    Yes,
    No,
}

impl Shared {
    /// One of the tasks of a fill: number 0 goes on alone where the link is slow.
    async fn run_fill(self: Arc<Self>, origin: Arc<Origin>, fill: Arc<Mutex<(Fill, Pace)>>, number: usize) {
        loop {
            let (stopped, slow) = {
                let fill = fill.lock();
                (fill.0.stopped.load(Relaxed), fill.1.slow)
            };
            if stopped {
                return;
            }
            let busy = slow && (number > 0 || origin.readers.quiet_for() < QUIET);
            if busy || origin.startup.is_running() {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            let readers = origin.readers.quiet_for() < RECENT;
            let idle = self.idle_bytes(&origin).filter(|_| readers && !slow);
            let next = {
                let mut fill = fill.lock();
                let bytes = fill.1.bytes;
                let likely = fill.0.likely(&self, &origin, bytes);
                match (likely.is_empty(), idle) {
                    (false, _) => Some((likely, self.beside(), Paced::Yes)),
                    (true, None) => Some((fill.0.piece(&self, &origin, bytes), Priority::Background, Paced::Yes)),
                    (true, Some(idle)) if number == 0 => {
                        Some((fill.0.piece(&self, &origin, idle), self.beside(), Paced::No))
                    }
                    // One piece at a time is what the link has room for.
                    (true, Some(_)) => None,
                }
            };
            let Some((piece, priority, paced)) = next else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            if piece.is_empty() || !self.has_room(&piece) {
                return;
            }
            let started = Instant::now();
            if !self.fill_piece(&origin, &piece, priority).await {
                // Whoever misses it is told; here it is left to them.
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            if paced == Paced::No {
                continue;
            }
            let asked: u64 = piece.iter().map(|chunk| u64::from(chunk.stored_len)).sum();
            let took = started.elapsed().max(Duration::from_micros(100));
            let rate = asked as f64 / took.as_secs_f64() * if slow { 1.0 } else { TASKS as f64 };
            let fits = (rate * PIECE.as_secs_f64()) as u64;
            let mut fill = fill.lock();
            let (least, most) = PIECE_BYTES;
            fill.1 = Pace {
                bytes: fits.clamp(fill.1.bytes / 2, fill.1.bytes * 2).clamp(least, most),
                slow: fits < SLOW_BYTES,
            };
        }
    }

    /// The priority of what is fetched beside readers. Who bounds the background bounds all of it.
    fn beside(&self) -> Priority {
        if self.options.background_limit.is_some() { Priority::Background } else { Priority::ReadAhead }
    }

    /// Stored bytes of a piece for which the link has room beside readers, if that is worth a request.
    fn idle_bytes(&self, origin: &Origin) -> Option<u64> {
        let fast = origin.speed.bytes_in(PIECE) >= SLOW_BYTES;
        let idle = fast && origin.speed.wait() >= LONG_WAIT;
        Some(origin.speed.bytes_in_a_wait().min(PIECE_BYTES.1)).filter(|&bytes| idle && bytes >= IDLE_BYTES)
    }

    /// Whether the pool takes these chunks without giving up others: those were wanted by somebody.
    fn has_room(&self, piece: &[ChunkRef]) -> bool {
        let stat = self.pool.stat();
        let needed: u64 = piece.iter().map(|chunk| u64::from(chunk.plain_len.next_multiple_of(BLOCK))).sum();
        stat.limit.is_none_or(|limit| stat.bytes + needed <= limit)
    }

    /// Fetches chunks that nobody waits for; says whether all came. Each is let go as soon as it is in the pool.
    async fn fill_piece(self: &Arc<Self>, origin: &Arc<Origin>, piece: &[ChunkRef], priority: Priority) -> bool {
        let asked: Vec<_> = piece.iter().map(|chunk| self.ask(origin, chunk, priority, Sharing::All)).collect();
        self.pump(origin);
        let mut all = true;
        for waiting in asked {
            all &= matches!(outcome(waiting).await, Some(Ok(_)));
        }
        all
    }
}
