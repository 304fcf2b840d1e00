//! The throttle: how fast work in the background may be, and that it stops reading while readers wait.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::gate::Gate;

/// What may be caught up with after a pause.
const SLACK: Duration = Duration::from_millis(100);
/// How often who is slowed down looks whether a reader has come to wait for it.
const LOOK: Duration = Duration::from_millis(20);
/// Longest pause for readers between two pieces: the connection must not stall.
const LONGEST: Duration = Duration::from_millis(250);

/// The bandwidth that all work in the background shares.
pub(super) struct Throttle {
    /// Bytes a second.
    limit: Option<u64>,
    /// When everything up to now is paid for.
    paid: Mutex<Option<Instant>>,
}

impl Throttle {
    pub(super) fn new(limit: Option<u64>) -> Self {
        Self { limit: limit.filter(|&limit| limit > 0), paid: Mutex::new(None) }
    }

    /// Pays for `bytes` that came from the host of `gate`: returns when more may be read, or as soon as `urgent`.
    pub(super) async fn pay(&self, bytes: u64, gate: &Gate, urgent: impl Fn() -> bool) {
        let now = Instant::now();
        let due = self.due(bytes, now);
        let pause = now + LONGEST;
        loop {
            let now = Instant::now();
            let limited = due.filter(|due| *due > now);
            let yields = now < pause && gate.in_demand();
            if urgent() || limited.is_none() && !yields {
                return;
            }
            let until = limited.unwrap_or(now + LOOK).min(now + LOOK);
            tokio::time::sleep_until(until).await;
        }
    }

    /// When `bytes` more, that came at `now`, are paid for.
    fn due(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let limit = self.limit?;
        let mut paid = self.paid.lock();
        // At most a day: a longer time can't be waited for anyway.
        let time = Duration::from_secs_f64((bytes as f64 / limit as f64).min(86400.0));
        let start = paid.unwrap_or(now).max(now.checked_sub(SLACK).unwrap_or(now));
        Some(*paid.insert(start + time))
    }
}

#[cfg(test)]
mod tests {
    use super::super::gate::Gates;
    use super::*;

    #[test]
    fn the_limit_holds_whatever_the_pauses() {
        let throttle = Throttle::new(Some(1 << 20));
        let start = Instant::now();
        let mut now = start;
        for number in 0..160 {
            now = now.max(throttle.due(64 << 10, now).unwrap_or(now));
            // What was idle is not caught up with.
            now += Duration::from_secs(if number == 80 { 10 } else { 0 });
        }
        let seconds = (now - start).as_secs_f64();
        assert!((19.8..20.05).contains(&seconds), "{seconds}");
    }

    #[tokio::test]
    async fn who_is_waited_for_is_let_go() {
        let gate = Gates::new(4).of("host");
        Throttle::new(Some(1)).pay(100 << 20, &gate, || true).await;
        Throttle::new(None).pay(u64::MAX, &gate, || false).await;
    }
}
