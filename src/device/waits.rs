//! Reads that waited for a source: the latest ones, so that a start can be explained.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

/// Waits that are kept, 40 bytes each.
const KEPT: usize = 8 << 10;

/// One piece of a read that waited for a chunk. Times are in seconds from the device's start.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Wait {
    /// When it was asked for.
    pub asked: f64,
    /// When the read had all it waited for.
    pub done: f64,
    /// Number of the chunk in the index.
    pub chunk: u32,
    /// First byte on the device.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// The waits of a device.
#[derive(Default)]
pub(super) struct Waits {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    waits: VecDeque<Wait>,
    forgotten: u64,
}

impl Waits {
    /// Adds a read that waited from `asked` to `done` for pieces: chunk, first byte on the device, length.
    pub(super) fn add(&self, asked: Duration, done: Duration, pieces: impl Iterator<Item = (u32, u64, u32)>) {
        let (asked, done) = (asked.as_secs_f64(), done.as_secs_f64());
        let mut kept = self.kept.lock();
        for (chunk, offset, len) in pieces {
            if kept.waits.len() == KEPT {
                kept.waits.pop_front();
                kept.forgotten += 1;
            }
            kept.waits.push_back(Wait { asked, done, chunk, offset, len });
        }
    }

    /// The waits that are kept, oldest first, and how many were forgotten.
    pub(super) fn snapshot(&self) -> (Vec<Wait>, u64) {
        let kept = self.kept.lock();
        (kept.waits.iter().copied().collect(), kept.forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_waits_are_kept() {
        let waits = Waits::default();
        for number in 0..KEPT as u32 + 2 {
            let piece = (number, u64::from(number) * 4096, 4096);
            waits.add(Duration::ZERO, Duration::from_secs(1), [piece].into_iter());
        }
        let (kept, forgotten) = waits.snapshot();
        assert_eq!((kept.len(), forgotten), (KEPT, 2));
        assert_eq!(kept.first().map(|wait| wait.chunk), Some(2));
    }
}
