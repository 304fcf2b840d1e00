//! Hedging: when a source is slower than it usually is while a reader waits, the next one is asked as well, and the first
//! to answer is used.
//!
//! What is usual is learnt: the time until pieces came, of which the 95th percentile is waited for. The load that this adds
//! is bounded to a tenth of the requests.

use std::time::Duration;

use parking_lot::Mutex;

/// Waits that are remembered.
const REMEMBERED: usize = 64;
/// Waits that are needed to know what is usual.
const KNOWN: usize = 8;
/// What is waited while it is not known.
const UNKNOWN: Duration = Duration::from_secs(1);
/// Bounds of what is waited.
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_secs(5);
/// Hedges that are allowed in any case; beyond them it is one in [`ONE_IN`] requests.
const FREE: u64 = 4;
const ONE_IN: u64 = 10;
/// Hedges that a source loses in a row before it counts as failing.
const LOSSES: u32 = 3;

/// What an origin has learnt of its sources' speed.
#[derive(Default)]
pub(super) struct Hedging {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waits: Vec<Duration>,
    next: usize,
    requests: u64,
    hedges: u64,
    /// Losses in a row by source.
    losses: Vec<u32>,
}

impl Hedging {
    /// A request for a reader begins. Returns how long each of its pieces may take until the next source is asked.
    pub(super) fn begin(&self) -> Duration {
        let mut state = self.state.lock();
        state.requests += 1;
        if state.waits.len() < KNOWN {
            return UNKNOWN;
        }
        let mut waits = state.waits.clone();
        let at = waits.len() * 95 / 100;
        let (_, wait, _) = waits.select_nth_unstable(at);
        (*wait).clamp(SHORTEST, LONGEST)
    }

    /// A piece came after `wait`.
    pub(super) fn came(&self, wait: Duration) {
        let mut state = self.state.lock();
        if state.waits.len() < REMEMBERED {
            state.waits.push(wait);
        } else {
            let next = state.next;
            if let Some(slot) = state.waits.get_mut(next) {
                *slot = wait;
            }
            state.next = (next + 1) % REMEMBERED;
        }
    }

    /// Source `number` brought all that it was asked for.
    pub(super) fn done(&self, number: usize) {
        let mut state = self.state.lock();
        if let Some(losses) = state.losses.get_mut(number) {
            *losses = 0;
        }
    }

    /// Whether another hedge is within bounds; it is counted.
    pub(super) fn may(&self) -> bool {
        let mut state = self.state.lock();
        let may = state.hedges < FREE + state.requests / ONE_IN;
        state.hedges += u64::from(may);
        may
    }

    /// Source `number` was overtaken by another one. True when that happened so often that it counts as failing.
    pub(super) fn lost(&self, number: usize) -> bool {
        let mut state = self.state.lock();
        if state.losses.len() <= number {
            state.losses.resize(number + 1, 0);
        }
        let Some(losses) = state.losses.get_mut(number) else { return false };
        *losses += 1;
        let failing = *losses >= LOSSES;
        if failing {
            *losses = 0;
        }
        failing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_usual_is_learnt_and_hedges_are_bounded() {
        let hedging = Hedging::default();
        assert_eq!(hedging.begin(), UNKNOWN);
        for ms in 1..=100 {
            hedging.came(Duration::from_millis(ms));
        }
        // Of the last 64, which are 37 to 100 ms.
        let wait = hedging.begin();
        assert!((Duration::from_millis(95)..=Duration::from_millis(98)).contains(&wait), "{wait:?}");
        for _ in 0..998 {
            hedging.begin();
        }
        let hedges = (0..1000).filter(|_| hedging.may()).count();
        assert_eq!(hedges as u64, FREE + 1000 / ONE_IN);
    }

    #[test]
    fn a_source_that_is_overtaken_again_and_again_counts_as_failing() {
        let hedging = Hedging::default();
        assert_eq!([0; 3].map(|number| hedging.lost(number)), [false, false, true]);
        assert!(!hedging.lost(0) && !hedging.lost(0));
        hedging.came(Duration::ZERO);
        assert!(hedging.lost(0), "a piece is not all");
        assert!(!hedging.lost(0) && !hedging.lost(0));
        hedging.done(0);
        assert!(!hedging.lost(0));
    }
}
