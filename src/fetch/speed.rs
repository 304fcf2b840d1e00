//! Speed: how fast the bytes of an answer follow each other, for those who ask for more than somebody waits for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// An answer's part that says something of the link: what is shorter was in buffers on the way.
const TELLING: u64 = 16 << 10;

/// What answers' bytes have taken so far.
#[derive(Debug, Default)]
pub(super) struct Speed(
    /// Bytes a second; 0: not known.
    AtomicU64,
);

impl Speed {
    /// `bytes` came in `time`, behind the first piece of an answer.
    pub(super) fn came(&self, bytes: u64, time: Duration) {
        if bytes < TELLING {
            return;
        }
        let now = (bytes as f64 / time.as_secs_f64().max(1e-6)) as u64;
        let before = self.0.load(Relaxed);
        // A few answers change it; one that is lost to another thread's does not matter.
        let mean = if before == 0 { now } else { before / 4 * 3 + now / 4 };
        self.0.store(mean.max(1), Relaxed);
    }

    /// Bytes that come in `time`; as many as can be where that is not known.
    pub(super) fn bytes_in(&self, time: Duration) -> u64 {
        match self.0.load(Relaxed) {
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
        speed.came(u64::MAX, Duration::ZERO);
        assert!(speed.bytes_in(second) > 1 << 40);
    }
}
