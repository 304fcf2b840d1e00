//! One request: a range of a blob is read once and cut into chunks as it arrives.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::StreamExt;
use tokio::time::Instant;

use super::Origin;
use super::Priority;
use super::decode::decode_timed;
use super::fetcher::Shared;
use super::log::Fetched;
use super::origin::Counters;
use super::queue::Want;
use crate::error::{Error, Result};
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

impl Shared {
    /// Reads `wants` (one blob, ascending, not overlapping) from source number `number`. Chunks are decoded and
    /// delivered on blocking threads as they become complete. Returns those that did not arrive, with the trouble noted.
    pub(super) async fn request(
        self: &Arc<Self>,
        origin: &Arc<Origin>,
        number: usize,
        wants: Vec<Want>,
        give_up: Option<Instant>,
    ) -> Vec<Want> {
        let asked = wants.len();
        let mut wants = VecDeque::from(wants);
        wants.iter_mut().for_each(|want| want.requested = Some(Instant::now()));
        let Err(broken) = self.stream(origin, number, &mut wants, give_up).await else {
            origin.health.answered(number);
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
            Broken::OutOfTime => origin.health.failed(number, &cut_short(), self.options.leave_alone, Instant::now()),
        }
        for want in &mut wants {
            let error = match &broken {
                Broken::Failed(error) => error.clone(),
                // What was wrong before says more than that this try was cut short.
                Broken::OutOfTime => want.earlier.clone().unwrap_or_else(cut_short),
            };
            // A source that lacks the chunk does not outweigh one that may have it and can't be reached.
            if !matches!((&want.trouble, &error), (Some(_), Error::NotFound { .. })) {
                want.trouble = Some(error);
            }
        }
        wants.into()
    }

    async fn stream(
        self: &Arc<Self>,
        origin: &Arc<Origin>,
        number: usize,
        wants: &mut VecDeque<Want>,
        give_up: Option<Instant>,
    ) -> Result<(), Broken> {
        let (Some(first), Some(last)) = (wants.front(), wants.back()) else { return Ok(()) };
        let (mut at, end) = (first.chunk.offset, last.end());
        let blob = origin.blobs().get(first.chunk.blob as usize);
        let (Some(blob), Some(source)) = (blob, origin.sources().get(number)) else { return Ok(()) };
        let startup = first.priority == Priority::Startup;
        Counters::add(&origin.counters().requests, 1);
        let mut body: Body = self.patient(origin, give_up, source.read_at(blob, at, end - at)).await??;
        let mut stored = Vec::new();
        while !wants.is_empty() {
            let Some(piece) = self.patient(origin, give_up, body.next()).await? else {
                let reason = format!("the answer ended at byte {at} of {end}");
                return Err(Broken::Failed(Error::unreachable(source.name(), reason)));
            };
            let piece = piece?;
            Counters::add(&origin.counters().bytes, piece.len() as u64);
            if startup {
                Counters::add(&origin.counters().startup_bytes, piece.len() as u64);
            }
            let mut piece = &piece[..];
            while let Some(want) = wants.front().filter(|_| !piece.is_empty()) {
                // The gap before the chunk, then the chunk.
                let gap = want.chunk.offset.saturating_sub(at).min(piece.len() as u64) as usize;
                if stored.is_empty() {
                    stored.reserve_exact(want.chunk.stored_len as usize);
                }
                let missing = want.chunk.stored_len as usize - stored.len();
                let taken = missing.min(piece.len() - gap);
                stored.extend_from_slice(&piece[gap..gap + taken]);
                at += (gap + taken) as u64;
                piece = &piece[gap + taken..];
                if taken == missing
                    && let Some(want) = wants.pop_front()
                {
                    self.finish(origin, number, want, std::mem::take(&mut stored)).await;
                }
            }
        }
        Ok(())
    }

    /// Waits for a source, but no longer than readers do.
    async fn patient<T>(
        &self,
        origin: &Origin,
        give_up: Option<Instant>,
        work: impl Future<Output = T>,
    ) -> Result<T, Broken> {
        let limit = origin.on_outage(self.options.on_outage).and_then(|wait| Instant::now().checked_add(wait));
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
        origin.health.note(number, &error);
        want.wrong_sources |= want.wrong_once & 1 << number;
        want.wrong_once |= 1 << number;
        let exhausted = (0..origin.sources().len()).all(|source| want.wrong_sources & 1 << source != 0);
        if exhausted {
            if origin.report_once(&want.chunk.digest) {
                tracing::error!(chunk = %want.chunk.digest, %error, "no source has the right bytes of a chunk");
            }
            Counters::add(&origin.counters().failed, 1);
            want.ticket.deliver(Err(error));
            return;
        }
        tracing::debug!(chunk = %want.chunk.digest, %error, "asking again");
        origin.queue.lock().push(want);
        self.pump(origin);
    }
}
