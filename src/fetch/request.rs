//! One request: a range of a blob is read once and cut into chunks as it arrives.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use tokio::time::Instant;

use super::decode::decode_timed;
use super::fetcher::Shared;
use super::gate::{Gate, Pass};
use super::log::Fetched;
use super::origin::Counters;
use super::overtake::Overtaking;
use super::queue::Want;
use super::{Origin, Priority};
use crate::error::{Error, Result};
use crate::index::Blob;
use crate::source::Body;

/// Why a request did not bring everything.
enum Broken {
    /// The source's error.
    Failed(Error),
    /// Readers would not have waited any longer.
    OutOfTime,
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// A second request for what a source is slow with.
struct Hedge {
    number: usize,
    body: Body,
    /// Where its bytes begin: at the start of a chunk.
    from: u64,
    gate: Arc<Gate>,
    pass: Pass,
    /// What became of the first request.
    first_error: Option<Error>,
}

/// What came first.
enum Next {
    /// From the source that was asked first.
    Piece(Option<Result<Bytes>>),
    /// From the hedge.
    Hedge(Bytes, Hedge),
    /// Nothing for longer than usual.
    Slow,
}

/// The next piece of `body` or of `hedge`, which is taken out when it ends or wins.
async fn next_piece(body: &mut Body, hedge: &mut Option<Hedge>, usual: Option<Duration>) -> Next {
    if let Some(other) = hedge {
        let came = tokio::select! {
            biased;
            piece = body.next() => return Next::Piece(piece),
            came = other.body.next() => came,
        };
        let other = hedge.take();
        match (came, other) {
            (Some(Ok(piece)), Some(other)) => return Next::Hedge(piece, other),
            // It failed as well: the first one's error counts.
            (_, Some(Hedge { first_error: Some(error), .. })) => return Next::Piece(Some(Err(error))),
            _ => {}
        }
    }
    match usual {
        None => Next::Piece(body.next().await),
        Some(usual) => tokio::time::timeout(usual, body.next()).await.map_or(Next::Slow, Next::Piece),
    }
}

/// The most urgent of `wants`, as it is now.
fn priority(wants: &VecDeque<Want>) -> Priority {
    let urgent = wants.iter().any(|want| want.ticket.urgent());
    let queued = wants.iter().map(|want| want.priority).min().unwrap_or(Priority::Background);
    if urgent { Priority::Demand } else { queued }
}

impl Shared {
    /// Reads `wants` (one blob, ascending, not overlapping) from source number `number`. Chunks are decoded and
    /// delivered on blocking threads as they become complete. Returns those that did not arrive, with the trouble noted.
    pub(super) async fn request(
        self: &Arc<Self>,
        origin: &Arc<Origin>,
        mut number: usize,
        wants: Vec<Want>,
        give_up: Option<Instant>,
    ) -> Vec<Want> {
        let asked = wants.len();
        let mut wants = VecDeque::from(wants);
        wants.iter_mut().for_each(|want| want.requested = Some(Instant::now()));
        let Err(broken) = self.stream(origin, &mut number, &mut wants, give_up).await else {
            origin.health.reached(number);
            // What was given up for readers is asked for when they are gone.
            let mut queue = origin.queue.lock();
            wants.into_iter().for_each(|want| queue.push(want));
            return Vec::new();
        };
        let cut_short = || {
            let name = origin.sources().get(number).map_or("a source", |source| source.name());
            Error::unreachable(name, "it made no progress while readers waited")
        };
        if wants.len() < asked {
            origin.health.reached(number);
        }
        match &broken {
            Broken::Failed(error) => origin.health.failed(number, error, self.options.leave_alone, Instant::now()),
            Broken::OutOfTime => {
                // What was wrong before says more than that this try was cut short.
                let error = wants.iter().find_map(|want| want.earlier.clone()).unwrap_or_else(cut_short);
                origin.health.failed(number, &error, self.options.leave_alone, Instant::now());
            }
        }
        for want in &mut wants {
            let error = match &broken {
                Broken::Failed(error) => error.clone(),
                Broken::OutOfTime => want.earlier.clone().unwrap_or_else(cut_short),
            };
            // A source that lacks the chunk does not outweigh one that may have it and can't be reached.
            if !matches!((&want.trouble, &error), (Some(_), Error::NotFound { .. })) {
                want.trouble = Some(error);
            }
        }
        wants.into()
    }

    /// Reads from source `number`, or from the next one when that is slow: then `number` is that one's. A long answer in
    /// the background is given up when a reader comes; `wants` are the rest then.
    async fn stream(
        self: &Arc<Self>,
        origin: &Arc<Origin>,
        number: &mut usize,
        wants: &mut VecDeque<Want>,
        give_up: Option<Instant>,
    ) -> Result<(), Broken> {
        let (Some(first), Some(last)) = (wants.front(), wants.back()) else { return Ok(()) };
        let (mut at, end) = (first.chunk.offset, last.end());
        let Some(blob) = origin.blobs().get(first.chunk.blob as usize).copied() else { return Ok(()) };
        let Some(source) = origin.sources().get(*number) else { return Ok(()) };
        let mut gate = self.gates.of(source.host());
        let mut pass = self.patient(origin, give_up, gate.enter(|| priority(wants))).await?;
        let usual = origin.hedging.begin();
        let mut body = self.open(origin, *number, blob, at, end);
        let mut hedge: Option<Hedge> = None;
        let mut hedged = false;
        let asked = first.priority;
        let mut since = Instant::now();
        let (mut begun, mut behind) = (None, 0);
        let mut overtaking = Overtaking::of(end - at);
        let mut stored = Vec::new();
        while !wants.is_empty() {
            let urgent = wants.iter().any(|want| want.ticket.urgent());
            let may_hedge = !hedged && urgent && origin.sources().len() > 1;
            let next = self.patient(origin, give_up, next_piece(&mut body, &mut hedge, may_hedge.then_some(usual)));
            let piece = match next.await? {
                Next::Slow => {
                    hedged = true;
                    let from = at - stored.len() as u64;
                    hedge = self.hedge(origin, *number, wants, blob, from, end);
                    continue;
                }
                Next::Hedge(piece, won) => {
                    let slow = origin.sources().get(*number).map_or("a source", |source| source.name());
                    let error = won.first_error.unwrap_or_else(|| Error::unreachable(slow, "it is slower than others"));
                    if origin.hedging.lost(*number) || !matches!(error, Error::Unreachable { .. }) {
                        origin.health.failed(*number, &error, self.options.leave_alone, Instant::now());
                    }
                    // Each chunk comes from one source, so that it is known who sent wrong bytes.
                    stored.clear();
                    (at, body, *number, gate, pass) = (won.from, won.body, won.number, won.gate, won.pass);
                    Some(piece)
                }
                Next::Piece(Some(Err(error))) => match hedge.take() {
                    // The other one may still come.
                    Some(other) if other.first_error.is_none() => {
                        hedge = Some(Hedge { first_error: Some(error), ..other });
                        body = Box::pin(futures_util::stream::pending());
                        continue;
                    }
                    _ => return Err(Broken::Failed(error)),
                },
                Next::Piece(piece) => piece.transpose()?,
            };
            let Some(piece) = piece else {
                let source_name = origin.sources().get(*number).map_or("a source", |source| source.name());
                let reason = format!("the answer ended at byte {at} of {end}");
                return Err(Broken::Failed(Error::unreachable(source_name, reason)));
            };
            // What moved may stop again.
            (hedge, hedged) = (None, false);
            if urgent {
                origin.hedging.came(since.elapsed());
            }
            Counters::add(&origin.counters().bytes, piece.len() as u64);
            if asked == Priority::Startup {
                Counters::add(&origin.counters().startup_bytes, piece.len() as u64);
            }
            let arrived = piece.len() as u64;
            let background = priority(wants) == Priority::Background;
            match begun {
                Some(_) => behind += arrived,
                None => origin.speed.began(since.elapsed()),
            }
            let first_came = *begun.get_or_insert_with(Instant::now);
            self.cut(origin, *number, wants, (&mut at, &mut stored), &piece).await;
            if asked == Priority::Startup {
                let near = at.saturating_add(Overtaking::reach(behind, first_came.elapsed()));
                self.ask_apart(origin, overtaking.take(wants, near));
            }
            if background {
                let is_long = end.saturating_sub(at) > self.options.background_bytes;
                if is_long && gate.recently_in_demand() {
                    break;
                }
                self.throttle.pay(arrived, &gate, || wants.iter().any(|want| want.ticket.urgent())).await;
            }
            since = Instant::now();
        }
        drop(pass);
        if let Some(begun) = begun.filter(|_| asked < Priority::Background) {
            origin.speed.came(behind, begun.elapsed());
        }
        origin.hedging.done(*number);
        Ok(())
    }

    /// Cuts `piece` of an answer of source `number` into chunks. `at` and `stored` are how far the answer has come and
    /// what there is of the first of `wants`.
    async fn cut(
        self: &Arc<Self>,
        origin: &Arc<Origin>,
        number: usize,
        wants: &mut VecDeque<Want>,
        (at, stored): (&mut u64, &mut Vec<u8>),
        mut piece: &[u8],
    ) {
        while let Some(want) = wants.front().filter(|_| !piece.is_empty()) {
            // The gap before the chunk, then the chunk.
            let gap = want.chunk.offset.saturating_sub(*at).min(piece.len() as u64) as usize;
            if stored.is_empty() {
                stored.reserve_exact(want.chunk.stored_len as usize);
            }
            let missing = want.chunk.stored_len as usize - stored.len();
            let taken = missing.min(piece.len() - gap);
            stored.extend_from_slice(&piece[gap..gap + taken]);
            *at += (gap + taken) as u64;
            piece = &piece[gap + taken..];
            if taken == missing
                && let Some(want) = wants.pop_front()
            {
                self.finish(origin, number, want, std::mem::take(stored)).await;
            }
        }
    }

    /// Asks for `wants` again, apart from the stream that they were in.
    fn ask_apart(self: &Arc<Self>, origin: &Arc<Origin>, wants: Vec<Want>) {
        if wants.is_empty() {
            return;
        }
        {
            let mut queue = origin.queue.lock();
            wants.into_iter().for_each(|want| queue.push(want));
        }
        self.pump(origin);
    }

    /// The bytes `from` to `end` of `blob` from source `number`, which is asked when the body is first polled.
    fn open(&self, origin: &Arc<Origin>, number: usize, blob: Blob, from: u64, end: u64) -> Body {
        Counters::add(&origin.counters().requests, 1);
        let Some(source) = origin.sources().get(number).map(Arc::clone) else {
            return Box::pin(futures_util::stream::empty());
        };
        let opened = async move { source.read_at(&blob, from, end - from).await };
        Box::pin(futures_util::stream::once(opened).try_flatten())
    }

    /// Asks the best source other than `number`, if there is one that is neither spared nor left alone and the extra load is
    /// in bounds.
    fn hedge(
        &self,
        origin: &Arc<Origin>,
        number: usize,
        wants: &VecDeque<Want>,
        blob: Blob,
        from: u64,
        end: u64,
    ) -> Option<Hedge> {
        let now = Instant::now();
        let wrong = wants.iter().fold(0, |wrong, want| wrong | want.wrong_once);
        let mut others = origin.health.order(now).into_iter();
        let spared = |other: usize| origin.sources().get(other).is_some_and(|source| source.is_spared());
        let other = others.find(|&other| {
            other != number && wrong >> other & 1 == 0 && !spared(other) && origin.health.usable(other, now)
        })?;
        let gate = self.gates.of(origin.sources().get(other)?.host());
        let pass = gate.try_enter(Priority::Demand)?;
        if !origin.hedging.may() {
            return None;
        }
        Counters::add(&origin.counters().hedges, 1);
        let body = self.open(origin, other, blob, from, end);
        Some(Hedge { number: other, body, from, gate, pass, first_error: None })
    }

    /// Waits for a source, but no longer than readers do.
    async fn patient<T>(
        &self,
        origin: &Origin,
        give_up: Option<Instant>,
        work: impl Future<Output = T>,
    ) -> Result<T, Broken> {
        // Half of it, so that a reader that met a stall is not out of patience before there was another try.
        let limit = origin.on_outage(self.options.on_outage).and_then(|wait| Instant::now().checked_add(wait / 2));
        match [give_up, limit].into_iter().flatten().min() {
            None => Ok(work.await),
            Some(limit) => tokio::time::timeout_at(limit, work).await.map_err(|_| Broken::OutOfTime),
        }
    }

    /// Decodes, verifies, delivers and admits one chunk on a blocking thread.
    async fn finish(self: &Arc<Self>, origin: &Arc<Origin>, number: usize, want: Want, stored: Vec<u8>) {
        let arrived = std::time::Instant::now();
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&self.decoders).acquire_owned().await else { return };
        let (shared, origin) = (Arc::clone(self), Arc::clone(origin));
        drop(tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let source_name = origin.sources().get(number).map_or("a source", |source| source.name());
            let started = std::time::Instant::now();
            match decode_timed(&want.chunk, stored, source_name) {
                Ok((chunk, inflated)) => {
                    let chunk = Arc::new(chunk);
                    origin.health.answered(number);
                    Counters::add(&origin.counters().chunks, 1);
                    want.ticket.deliver(Ok(Arc::clone(&chunk)));
                    origin.log.add(Fetched {
                        chunk: want.chunk,
                        priority: want.priority,
                        source: number,
                        asked: want.since.into_std(),
                        requested: want.requested.unwrap_or(want.since).into_std(),
                        arrived,
                        started,
                        inflated,
                        verified: std::time::Instant::now(),
                    });
                    // Before the ticket is dropped: until then whoever misses the chunk in the pool joins this flight.
                    shared.pool.admit(&chunk);
                }
                Err(error) => shared.wrong(&origin, number, want, error),
            }
        }));
    }

    /// A source sent wrong bytes: it gets one more chance, since they may have been damaged on the way, then the others
    /// are asked; the last one's answer is the reader's error.
    fn wrong(self: &Arc<Self>, origin: &Arc<Origin>, number: usize, mut want: Want, error: Error) {
        Counters::add(&origin.counters().verify_failures, 1);
        if origin.sources().len() > 1 {
            origin.health.failed(number, &error, self.options.leave_alone, Instant::now());
        } else {
            origin.health.note(number, &error);
        }
        want.wrong_sources |= want.wrong_once & 1 << number;
        want.wrong_once |= 1 << number;
        let exhausted = (0..origin.sources().len()).all(|source| want.wrong_sources & 1 << source != 0);
        if exhausted {
            if origin.report_once(&want.chunk.digest, None) {
                tracing::error!(chunk = %want.chunk.digest, %error, "no source has the right bytes of a chunk");
            }
            Counters::add(&origin.counters().failed, 1);
            want.ticket.deliver(Err(error));
            return;
        }
        if origin.report_once(&want.chunk.digest, Some(number)) {
            tracing::warn!(%error, "asking again, other sources first");
        }
        origin.queue.lock().push(want);
        self.pump(origin);
    }
}
