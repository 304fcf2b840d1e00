//! What waits to be requested from an origin, and which chunks go into one request.
//!
//! While requests are in flight, chunks that are asked for collect here; so neighbours that were asked for one by one
//! still become one request.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::flight::Ticket;
use super::{FetchOptions, Priority};
use crate::chunk::ChunkRef;
use crate::error::Error;

/// Most sources of an origin: they are numbered in a mask.
pub(super) const MAX_SOURCES: usize = 64;

/// A chunk to be fetched.
pub(super) struct Want {
    pub chunk: ChunkRef,
    pub ticket: Ticket,
    pub priority: Priority,
    /// When it was asked for.
    pub since: Instant,
    /// When the request was sent that it is in.
    pub requested: Option<Instant>,
    /// Sources whose bytes were wrong twice, by number.
    pub wrong_sources: u64,
    /// Sources whose bytes were wrong at least once.
    pub wrong_once: u64,
    /// What stood in the way in the current round over the sources.
    pub trouble: Option<Error>,
    /// What stood in the way in the round before.
    pub earlier: Option<Error>,
}

impl Want {
    pub(super) fn new(chunk: ChunkRef, ticket: Ticket, priority: Priority) -> Self {
        let since = Instant::now();
        let requested = None;
        Self {
            chunk,
            ticket,
            priority,
            since,
            requested,
            wrong_sources: 0,
            wrong_once: 0,
            trouble: None,
            earlier: None,
        }
    }

    /// First byte behind the stored chunk. Its range was checked against the blob.
    pub(super) fn end(&self) -> u64 {
        self.chunk.offset + u64::from(self.chunk.stored_len)
    }

    /// Whether it is requested by itself, since its bytes were wrong before.
    fn alone(&self) -> bool {
        self.wrong_once != 0
    }

    /// When a reader that waits for it gives up, for an outage that began at `down_since`.
    fn expiry(&self, down_since: Instant, on_outage: Duration) -> Option<Instant> {
        self.since.max(down_since).checked_add(on_outage)
    }
}

/// Blob, offset, and a serial number to tell equal places apart.
type Place = (u32, u64, u64);

/// Requests that were taken out of a queue. Those in the background may stand at their host's gate for long, while readers
/// go through it: they are counted by themselves, and take no place from others.
#[derive(Default)]
struct Running {
    background: usize,
    others: usize,
}

impl Running {
    fn of(&mut self, priority: Priority) -> &mut usize {
        match priority {
            Priority::Background => &mut self.background,
            _ => &mut self.others,
        }
    }

    /// The least priority of a request that may be taken now, of `limit` ones.
    fn least(&self, limit: usize) -> Option<Priority> {
        // The last place of several is kept for readers that wait.
        let kept = usize::from(limit > 1);
        match self.others {
            others if others + self.background + kept < limit => Some(Priority::Background),
            others if others + kept < limit => Some(Priority::ReadAhead),
            others if others < limit => Some(Priority::Demand),
            _ => None,
        }
    }
}

/// The queue of an origin. Its lock is held for lookups only.
#[derive(Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Place, Want>,
    /// Places in order of arrival for each priority; what is no longer waiting there is skipped.
    order: [VecDeque<Place>; 4],
    serial: u64,
    /// Requests that were taken and have not ended.
    running: Running,
    /// Since when no source can be reached. While this is set one task alone probes the sources.
    down_since: Option<Instant>,
}

impl Queue {
    /// Adds a chunk; one that a reader waits for by now is as urgent as that.
    pub(super) fn push(&mut self, mut want: Want) {
        if want.ticket.urgent() {
            want.priority = Priority::Demand;
        }
        self.serial += 1;
        let place = (want.chunk.blob, want.chunk.offset, self.serial);
        if let Some(order) = self.order.get_mut(want.priority as usize) {
            order.push_back(place);
        }
        self.waiting.insert(place, want);
    }

    /// Raises the priority of a chunk that waits.
    pub(super) fn promote(&mut self, chunk: &ChunkRef, priority: Priority) {
        let places = (chunk.blob, chunk.offset, 0)..=(chunk.blob, chunk.offset, u64::MAX);
        for (place, want) in self.waiting.range_mut(places) {
            if want.chunk.digest == chunk.digest && priority < want.priority {
                want.priority = priority;
                if let Some(order) = self.order.get_mut(priority as usize) {
                    order.push_back(*place);
                }
            }
        }
    }

    /// Takes the next request if another one may run; [`done`](Self::done) must follow with what is returned along. The
    /// chunks are in order of offset and don't overlap.
    pub(super) fn start(&mut self, options: &FetchOptions, background_bytes: u64) -> Option<(Vec<Want>, Priority)> {
        if self.down_since.is_some() {
            return None;
        }
        let least = self.running.least(options.requests.max(1))?;
        let batch = self.take(options, least, background_bytes)?;
        let priority = batch.iter().map(|want| want.priority).min()?;
        *self.running.of(priority) += 1;
        Some((batch, priority))
    }

    /// Takes the next request of at least the priority `least`, whatever runs.
    ///
    /// A request that is in the background alone asks for `background_bytes` at most.
    pub(super) fn take(&mut self, options: &FetchOptions, least: Priority, background_bytes: u64) -> Option<Vec<Want>> {
        for level in 0..=least as usize {
            while let Some(place) = self.order.get_mut(level).and_then(VecDeque::pop_front) {
                let current = |want: &Want| want.priority as usize == level;
                if self.waiting.get(&place).is_some_and(current) {
                    return Some(self.batch(place, options, background_bytes));
                }
            }
        }
        None
    }

    /// The chunk at `seed` and its neighbours.
    fn batch(&mut self, seed: Place, options: &FetchOptions, background_bytes: u64) -> Vec<Want> {
        let Some(first) = self.waiting.remove(&seed) else { return Vec::new() };
        if first.alone() {
            return vec![first];
        }
        let most = match first.priority {
            Priority::Background => background_bytes,
            _ => options.request_bytes,
        };
        let (mut start, mut end) = (first.chunk.offset, first.end());
        let fits = |start: u64, end: u64| end - start <= most;
        let mut places = Vec::new();
        for (place, want) in self.waiting.range(seed..(seed.0, u64::MAX, u64::MAX)) {
            let near = want.chunk.offset.checked_sub(end).is_some_and(|gap| gap <= options.gap);
            if !near || want.alone() || !fits(start, want.end()) {
                break;
            }
            end = want.end();
            places.push(*place);
        }
        for (place, want) in self.waiting.range((seed.0, 0, 0)..seed).rev() {
            let near = start.checked_sub(want.end()).is_some_and(|gap| gap <= options.gap);
            if !near || want.alone() || !fits(want.chunk.offset, end) {
                break;
            }
            start = want.chunk.offset;
            places.push(*place);
        }
        let mut batch = vec![first];
        batch.extend(places.iter().filter_map(|place| self.waiting.remove(place)));
        batch.sort_unstable_by_key(|want| want.chunk.offset);
        batch
    }

    /// A request has ended that was taken with `priority`.
    pub(super) fn done(&mut self, priority: Priority) {
        let running = self.running.of(priority);
        *running = running.saturating_sub(1);
    }

    /// No source could be reached since `since`. True for the caller that has to probe them from now on.
    pub(super) fn down(&mut self, since: Instant) -> bool {
        let first = self.down_since.is_none();
        self.down_since.get_or_insert(since);
        first
    }

    /// Sources can be reached again, or nobody waits for them.
    pub(super) fn up(&mut self) {
        self.down_since = None;
    }

    /// Ends the state of [`down`](Self::down) if nobody waits; says so.
    pub(super) fn up_if_idle(&mut self) -> bool {
        let idle = self.waiting.is_empty();
        if idle {
            self.down_since = None;
        }
        idle
    }

    /// Takes the chunks out whose readers have waited long enough, and says when the next one will have.
    pub(super) fn expired(&mut self, now: Instant, on_outage: Option<Duration>) -> (Vec<Want>, Option<Instant>) {
        let (Some(down_since), Some(on_outage)) = (self.down_since, on_outage) else { return (Vec::new(), None) };
        let expiry = |want: &Want| want.expiry(down_since, on_outage);
        let due: Vec<Place> = self
            .waiting
            .iter()
            .filter(|(_, want)| expiry(want).is_some_and(|at| at <= now))
            .map(|(place, _)| *place)
            .collect();
        let expired = due.iter().filter_map(|place| self.waiting.remove(place)).collect();
        (expired, self.waiting.values().filter_map(expiry).min())
    }
}
