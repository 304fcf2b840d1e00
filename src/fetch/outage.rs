//! Running requests, and what happens when no source can be reached.
//!
//! The first request that fails with all sources makes its task the origin's probe: no other request is started, chunks
//! wait in the queue, and the probe tries the most urgent of them again and again, with growing pauses. It ends when a
//! source answers, or when nobody waits any more, since every reader has waited for `on_outage`.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::fetcher::Shared;
use super::origin::Counters;
use super::queue::Want;
use super::{Origin, Priority};
use crate::error::Error;

/// Wrong bytes may have been damaged on the way: their source is asked once more, but after all others.
#[derive(Clone, Copy)]
enum Round {
    First,
    Again,
}

impl Round {
    /// Whether source `number` is asked for a chunk in this round.
    fn asks(self, want: &Want, number: usize) -> bool {
        let (once, twice) = (want.wrong_once >> number & 1 != 0, want.wrong_sources >> number & 1 != 0);
        match self {
            Self::First => !once,
            Self::Again => once && !twice,
        }
    }
}

impl Shared {
    /// Starts as many requests as may run.
    pub(super) fn pump(self: &Arc<Self>, origin: &Arc<Origin>) {
        loop {
            let background = self.background_bytes(origin);
            let batch = origin.queue.lock().start(&self.options, background);
            let Some((batch, priority)) = batch else { return };
            let (shared, origin) = (Arc::clone(self), Arc::clone(origin));
            tokio::spawn(async move {
                shared.serve(&origin, batch).await;
                origin.queue.lock().done(priority);
                shared.pump(&origin);
            });
        }
    }

    /// Most bytes of one request in the background: while readers are about, few, so that they need not wait long.
    fn background_bytes(&self, origin: &Origin) -> u64 {
        let first = origin.health.order(Instant::now()).first().and_then(|&number| origin.sources().get(number));
        let readers = first.is_some_and(|source| self.gates.of(source.host()).recently_in_demand());
        let most = self.options.request_bytes;
        if readers { most.min(self.options.background_bytes) } else { most }
    }

    async fn serve(self: &Arc<Self>, origin: &Arc<Origin>, batch: Vec<Want>) {
        let started = Instant::now();
        let (left, progress) = self.attempt(origin, batch, None).await;
        if left.is_empty() {
            return;
        }
        let trouble = left.iter().find_map(|want| want.trouble.clone());
        let trouble = trouble.unwrap_or_else(|| Error::unreachable("every source", "all requests failed"));
        let probe = {
            let mut queue = origin.queue.lock();
            // A source that sent a part can be reached: the rest is asked for again at once.
            let probe = !progress && queue.down(started);
            for want in left {
                if !progress {
                    want.ticket.troubled();
                }
                queue.push(want);
            }
            probe
        };
        if probe {
            origin.health.waiting(started, &trouble);
            self.probe(origin, started).await;
        }
    }

    /// Asks the sources in turn. Returns the chunks that did not arrive, for causes that may pass, and whether any other
    /// did, or was found not to be there.
    pub(super) async fn attempt(
        self: &Arc<Self>,
        origin: &Arc<Origin>,
        batch: Vec<Want>,
        give_up: Option<Instant>,
    ) -> (Vec<Want>, bool) {
        let asked = batch.len();
        let mut left = batch;
        for want in &mut left {
            want.earlier = want.trouble.take();
        }
        let order = origin.health.order(Instant::now());
        let mut turns: Vec<(Round, usize)> = order.iter().map(|&number| (Round::First, number)).collect();
        turns.extend(order.iter().map(|&number| (Round::Again, number)));
        for (round, number) in turns {
            let (asked, mut skipped): (Vec<_>, Vec<_>) = left.into_iter().partition(|want| round.asks(want, number));
            if !asked.is_empty() {
                skipped.extend(self.request(origin, number, asked, give_up).await);
                skipped.sort_unstable_by_key(|want| want.chunk.offset);
            }
            left = skipped;
            if left.is_empty() {
                break;
            }
        }
        let (absent, left): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|want| matches!(want.trouble, Some(Error::NotFound { .. })));
        self.fail(origin, absent, None);
        let progress = left.len() < asked;
        // What was only read ahead is not worth waiting for.
        let waited = left.into_iter().filter_map(|mut want| {
            let idle = want.priority == Priority::ReadAhead && want.ticket.close_if_unwaited();
            (!idle).then_some(want)
        });
        (waited.collect(), progress)
    }

    /// Ends flights with their own trouble, or else with that of the outage.
    fn fail(&self, origin: &Origin, wants: Vec<Want>, outage: Option<&Error>) {
        for want in wants {
            Counters::add(&origin.counters().failed, 1);
            let error = want.trouble.as_ref().or(outage).cloned();
            let error = error.unwrap_or_else(|| Error::unreachable("every source", "all requests failed"));
            want.ticket.deliver(Err(error));
        }
    }

    async fn probe(self: &Arc<Self>, origin: &Arc<Origin>, since: Instant) {
        let mut pause = self.options.pause.0;
        let mut counted = since;
        let on_outage = origin.on_outage(self.options.on_outage);
        // A reader that comes after the sources do must not give up before they are tried again.
        let longest = on_outage.map_or(self.options.pause.1, |wait| self.options.pause.1.min(wait / 4));
        let mut trouble: Option<Error> = None;
        loop {
            let ((expired, next_expiry), idle) = {
                let mut queue = origin.queue.lock();
                (queue.expired(Instant::now(), on_outage), queue.up_if_idle())
            };
            self.fail(origin, expired, trouble.as_ref());
            origin.counters().outage(counted.elapsed());
            counted = Instant::now();
            if idle {
                return;
            }

            let resume = counted + jittered(pause.min(longest));
            tokio::time::sleep_until(next_expiry.map_or(resume, |expiry| expiry.min(resume))).await;
            if next_expiry.is_some_and(|expiry| expiry <= Instant::now()) {
                continue;
            }
            pause = (pause * 2).min(longest);

            let batch = {
                let mut queue = origin.queue.lock();
                let batch = queue.take(&self.options, Priority::Background, self.options.request_bytes);
                if batch.is_none() {
                    queue.up();
                }
                batch
            };
            let Some(batch) = batch else { return };
            let (left, reached) = self.attempt(origin, batch, next_expiry).await;
            if let Some(error) = left.iter().find_map(|want| want.trouble.clone()).filter(|_| !reached) {
                trouble = Some(error);
            }
            {
                let mut queue = origin.queue.lock();
                if reached {
                    queue.up();
                }
                left.into_iter().for_each(|want| queue.push(want));
            }
            if reached {
                origin.counters().outage(counted.elapsed());
                return;
            }
        }
    }
}

/// Between half of `pause` and all of it, so that many nodes don't come back at one moment.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() % 1024;
    pause / 2 + pause / 2 * random as u32 / 1024
}
