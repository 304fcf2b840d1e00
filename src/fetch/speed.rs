//! Speed: how fast the bytes of an answer follow each other, and how long the first one takes, for those who ask for more
//! than somebody waits for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// An answer's part that says something of the link: what is shorter was in buffers on the way.
const TELLING: u64 = 16 << 10;

/// What answers' bytes have taken so far.
#[derive(Debug, Default)]
pub(super) struct Speed {
    /// Bytes a second; 0: not known.
    bytes: AtomicU64,
    /// Microseconds until an answer begins on a link with nothing else on it; 0: not known.
    wait: AtomicU64,
}

impl Speed {
    /// An answer began after `wait`.
    ///
    /// Short waits count: long ones had others in front of them. They make it grow by and by, for a place that moves away.
    pub(super) fn began(&self, wait: Duration) {
        let now = (wait.as_micros() as u64).max(1);
        let before = self.wait.load(Relaxed);
        let wait = if before == 0 { now } else { now.min(before + before / 1024 + 1) };
        self.wait.store(wait, Relaxed);
    }

    /// How long an answer takes to begin on a link with nothing else on it; zero where that is not known.
    pub(super) fn wait(&self) -> Duration {
        Duration::from_micros(self.wait.load(Relaxed))
    }

    /// Bytes for which the link has room while one request waits for its answer; 0 where that is not known.
    pub(super) fn bytes_in_a_wait(&self) -> u64 {
        match (self.bytes.load(Relaxed), self.wait.load(Relaxed)) {
            (0, _) => 0,
            (_, wait) => self.bytes_in(Duration::from_micros(wait)),
        }
    }

    /// `bytes` came in `time`, behind the first piece of an answer.
    pub(super) fn came(&self, bytes: u64, time: Duration) {
        if bytes < TELLING {
            return;
        }
        let now = (bytes as f64 / time.as_secs_f64().max(1e-6)) as u64;
        let before = self.bytes.load(Relaxed);
        // A few answers change it; one that is lost to another thread's does not matter.
        let mean = if before == 0 { now } else { before / 4 * 3 + now / 4 };
        self.bytes.store(mean.max(1), Relaxed);
    }

    /// Bytes that come in `time`; as many as can be where that is not known.
    pub(super) fn bytes_in(&self, time: Duration) -> u64 {
        match self.bytes.load(Relaxed) {
            0 => u64::MAX,
            speed => (speed as f64 * time.as_secs_f64()) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_of_the_latest_answers_is_known() {
        let (speed, second) = (Speed::default(), Duration::from_secs(1));
        speed.came(1000, second);
        assert_eq!(speed.bytes_in(second), u64::MAX, "too short to tell");
        for _ in 0..10 {
            speed.came(1 << 20, second / 10);
        }
        assert!((10_000_000..10_500_000).contains(&speed.bytes_in(second)), "{speed:?}");
        for _ in 0..30 {
            speed.came(64 << 10, second);
        }
        assert!((65_000..70_000).contains(&speed.bytes_in(second)), "{speed:?}");
        assert_eq!(speed.bytes_in_a_wait(), 0, "not known");
        speed.began(second / 5);
        let close = |bytes: u64, wanted: u64| bytes.abs_diff(wanted) < wanted / 20;
        assert!(close(speed.bytes_in_a_wait(), 13_107), "{speed:?}");
        speed.began(second / 10);
        (0..20).for_each(|_| speed.began(second));
        assert!(close(speed.bytes_in_a_wait(), 6_553), "what others delay says little: {speed:?}");
        speed.came(u64::MAX, Duration::ZERO);
        assert!(speed.bytes_in(second) > 1 << 40);
    }
}
