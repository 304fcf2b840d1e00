//! Health: which of an image's sources work, since when they don't, and one event for each change of that.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::error::Error;

/// The health of an origin.
#[derive(Debug)]
pub(super) struct Health {
    names: Vec<String>,
    /// Whether anything is to be recovered from, so that success costs one load.
    troubled: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Since when no source can be reached.
    waiting: Option<Since>,
    sources: Vec<SourceState>,
    last_error: Option<(SystemTime, Error)>,
}

#[derive(Clone, Copy, Debug)]
struct Since {
    instant: Instant,
    time: SystemTime,
}

impl Since {
    fn at(instant: Instant) -> Self {
        let time = SystemTime::now();
        Self { instant, time: time.checked_sub(instant.elapsed()).unwrap_or(time) }
    }
}

#[derive(Debug, Default)]
struct SourceState {
    failing: Option<Since>,
    last_error: Option<Error>,
    /// How long it is left alone, and until when.
    pause: Duration,
    until: Option<Instant>,
    /// When it was last said that it fails: a source that comes and goes is not worth an event each time.
    told: Option<Instant>,
    /// Whether the current failure was told.
    telling: bool,
}

/// A source that comes and goes is an event once in this time.
const QUIET: Duration = Duration::from_secs(60);

/// How an image's sources are doing.
#[derive(Clone, Debug, Default)]
pub struct HealthReport {
    /// Since when no source can be reached: readers wait, or got errors after their patience was at its end.
    pub waiting_since: Option<SystemTime>,
    /// The last thing that went wrong, whether or not it has passed.
    pub last_error: Option<(SystemTime, Error)>,
    /// Each source, best first.
    pub sources: Vec<SourceReport>,
}

/// How one source is doing.
#[derive(Clone, Debug)]
pub struct SourceReport {
    /// Its name.
    pub name: String,
    /// Since when requests to it fail; while others work it is left alone for a while after each failure.
    pub failing_since: Option<SystemTime>,
    /// The last thing that went wrong with it, whether or not it has passed.
    pub last_error: Option<Error>,
}

impl Health {
    pub(super) fn new(names: Vec<String>) -> Self {
        let sources = names.iter().map(|_| SourceState::default()).collect();
        let state = State { sources, ..State::default() };
        Self { names, troubled: AtomicBool::new(false), state: Mutex::new(state) }
    }

    /// The sources by number in the order in which they are asked: those that are left alone for now come last.
    pub(super) fn order(&self, now: Instant) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.names.len()).collect();
        if self.troubled.load(Ordering::Acquire) {
            let state = self.state.lock();
            order.sort_by_key(|&number| {
                state.sources.get(number).and_then(|source| source.until).is_some_and(|until| now < until)
            });
        }
        order
    }

    /// Whether source `number` is not left alone at the moment.
    pub(super) fn usable(&self, number: usize, now: Instant) -> bool {
        let left_alone =
            || self.state.lock().sources.get(number).and_then(|source| source.until).is_some_and(|until| now < until);
        !self.troubled.load(Ordering::Acquire) || !left_alone()
    }

    /// A request to source `number` failed at `now`. It is left alone for at least `pauses.0` and at most `pauses.1`.
    pub(super) fn failed(&self, number: usize, error: &Error, pauses: (Duration, Duration), now: Instant) {
        if is_ours(error) {
            return;
        }
        let mut state = self.state.lock();
        self.troubled.store(true, Ordering::Release);
        state.last_error = Some((SystemTime::now(), error.clone()));
        let others = self.names.len() > 1;
        let Some(source) = state.sources.get_mut(number) else { return };
        source.last_error = Some(error.clone());
        // Failures of requests that ran side by side are one.
        if source.until.is_none_or(|until| until <= now) {
            source.pause = if source.failing.is_some() { source.pause * 2 } else { pauses.0 }.min(pauses.1);
            source.until = Some(now + source.pause);
        }
        let first = source.failing.is_none() && source.told.is_none_or(|told| now.duration_since(told) >= QUIET);
        if source.failing.is_none() {
            source.telling = first;
        }
        if first {
            source.told = Some(now);
        }
        source.failing.get_or_insert(Since::at(now));
        drop(state);
        // The trouble of the only source is the origin's.
        if first && others {
            tracing::warn!(%error, "a source fails: others are asked first");
        }
    }

    /// Something went wrong that says nothing of the source's other answers.
    pub(super) fn note(&self, number: usize, error: &Error) {
        let mut state = self.state.lock();
        state.last_error = Some((SystemTime::now(), error.clone()));
        if let Some(source) = state.sources.get_mut(number) {
            source.last_error = Some(error.clone());
        }
    }

    /// Source `number` answered as it should.
    pub(super) fn answered(&self, number: usize) {
        if !self.troubled.load(Ordering::Acquire) {
            return;
        }
        let waited = self.reached(number);
        let mut state = self.state.lock();
        let recovered = state.sources.get_mut(number).and_then(|source| {
            (source.until, source.pause) = (None, Duration::ZERO);
            source.failing.take().filter(|_| source.telling)
        });
        if state.waiting.is_none() && state.sources.iter().all(|source| source.failing.is_none()) {
            self.troubled.store(false, Ordering::Release);
        }
        drop(state);
        let name = self.names.get(number).map_or("", String::as_str);
        if !waited && recovered.is_some() && self.names.len() > 1 {
            tracing::info!(source = name, "the source works again");
        }
    }

    /// Source `number` sent something. True if that ended an outage.
    pub(super) fn reached(&self, number: usize) -> bool {
        if !self.troubled.load(Ordering::Acquire) {
            return false;
        }
        let Some(since) = self.state.lock().waiting.take() else { return false };
        let (name, seconds) =
            (self.names.get(number).map_or("", String::as_str), since.instant.elapsed().as_secs_f64());
        tracing::info!(source = name, seconds, "sources can be reached again");
        true
    }

    /// No source can be reached since `since`.
    pub(super) fn waiting(&self, since: Instant, error: &Error) {
        if is_ours(error) {
            return;
        }
        let mut state = self.state.lock();
        self.troubled.store(true, Ordering::Release);
        let first = state.waiting.is_none();
        state.waiting.get_or_insert(Since::at(since));
        drop(state);
        if first {
            tracing::warn!(%error, "no source can be reached: readers wait");
        }
    }

    pub(super) fn report(&self) -> HealthReport {
        let state = self.state.lock();
        let source = |(name, source): (&String, &SourceState)| SourceReport {
            name: name.clone(),
            failing_since: source.failing.map(|since| since.time),
            last_error: source.last_error.clone(),
        };
        HealthReport {
            waiting_since: state.waiting.map(|since| since.time),
            last_error: state.last_error.clone(),
            sources: self.names.iter().zip(&state.sources).map(source).collect(),
        }
    }
}

/// Whether a request failed since this program ends, which says nothing of any source.
fn is_ours(error: &Error) -> bool {
    matches!(error, Error::Stopping(_))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3));

    #[test]
    fn a_source_that_fails_is_left_alone_longer_and_longer_and_tried_again() {
        let health = Health::new(vec!["a".into(), "b".into()]);
        let error = Error::unreachable("a", "reset");
        let mut now = Instant::now();
        assert_eq!(health.order(now), [0, 1]);
        for pause in [1, 2, 3, 3] {
            health.failed(0, &error, PAUSES, now);
            // At the same time by another request: no reason for a longer pause.
            health.failed(0, &error, PAUSES, now + Duration::from_millis(10));
            now += Duration::from_secs(pause);
            assert_eq!(health.order(now - Duration::from_millis(1)), [1, 0], "{pause}");
            assert_eq!(health.order(now), [0, 1], "{pause}");
        }
        health.failed(0, &error, PAUSES, now);
        health.answered(0);
        assert_eq!(health.order(now), [0, 1]);
        let report = health.report();
        assert!(report.waiting_since.is_none() && report.sources[0].failing_since.is_none());
        assert!(report.last_error.unwrap().1.to_string().contains("reset"));
        health.failed(0, &error, PAUSES, now);
        assert_eq!(health.order(now + PAUSES.0), [0, 1], "the first pause is short again");
    }

    #[test]
    fn the_end_of_the_program_is_no_outage() {
        let health = Health::new(vec!["a".into()]);
        let now = Instant::now();
        let quiet = || {
            let report = health.report();
            report.waiting_since.is_none() && report.last_error.is_none() && report.sources[0].failing_since.is_none()
        };
        let stopping = Error::Stopping("the program".into());
        health.failed(0, &stopping, PAUSES, now);
        health.waiting(now, &stopping);
        assert!(quiet() && health.usable(0, now), "{:?}", health.report());
        health.failed(0, &Error::unreachable("a", "reset"), PAUSES, now);
        assert!(!quiet());
    }
}
