//! What a device was asked for, counted by many threads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::ReadCounts;
use crate::pool::{LANES, lane};

/// Bits of the bytes in [`Lane::recent`]; above them are the hits.
const BYTES: u32 = 48;
/// Hits of one word; their bytes have room in it, as each has less than [`LONG`].
const RECENT: u64 = 1 << 15;
/// Reads of so many bytes and more are counted at once.
const LONG: u64 = 1 << 32;

/// Hits on a cache line for each thread, as far as possible, since one of all would pass from core to core with every hit;
/// and as one addition, which is most of what knowing of a hit costs. 4 KiB.
#[derive(Default)]
pub(super) struct Counts {
    hits: [Lane; LANES],
    misses: AtomicU64,
    missed_bytes: AtomicU64,
}

#[derive(Default)]
#[repr(align(128))]
struct Lane {
    /// Those of late, and their bytes.
    recent: AtomicU64,
    hits: AtomicU64,
    bytes: AtomicU64,
}

impl Counts {
    /// A read that was answered from local data and zeros.
    #[inline]
    pub(super) fn hit(&self, bytes: usize) {
        let Some(lane) = self.hits.get(lane()) else { return };
        let bytes = bytes as u64;
        if bytes >= LONG {
            return lane.settle(1, bytes);
        }
        if lane.recent.fetch_add(1 << BYTES | bytes, Relaxed) >> BYTES >= RECENT {
            let recent = lane.recent.swap(0, Relaxed);
            lane.settle(recent >> BYTES, recent & ((1 << BYTES) - 1));
        }
    }

    /// A read that had to wait for a source.
    pub(super) fn miss(&self, bytes: usize) {
        self.misses.fetch_add(1, Relaxed);
        self.missed_bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// All of them. While others count, some thousands of hits may be missing for a moment.
    pub(super) fn sums(&self) -> ReadCounts {
        let (bytes, misses) = (self.missed_bytes.load(Relaxed), self.misses.load(Relaxed));
        let none = ReadCounts { bytes, hits: 0, misses };
        self.hits.iter().fold(none, |sum, lane| {
            let (hits, bytes) = (lane.hits.load(Relaxed), lane.bytes.load(Relaxed));
            let recent = lane.recent.load(Relaxed);
            let (hits, bytes) = (hits + (recent >> BYTES), bytes + (recent & ((1 << BYTES) - 1)));
            ReadCounts { bytes: sum.bytes + bytes, hits: sum.hits + hits, ..sum }
        })
    }
}

impl Lane {
    #[cold]
    fn settle(&self, hits: u64, bytes: u64) {
        self.hits.fetch_add(hits, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost() {
        let counts = Counts::default();
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| (0..100_000).for_each(|_| counts.hit(LONG as usize - 1)));
            }
        });
        counts.hit(usize::MAX >> 8);
        counts.miss(4096);
        let bytes = 4_000_000 * (LONG - 1) + (u64::MAX >> 8) + 4096;
        assert_eq!(counts.sums(), ReadCounts { bytes, hits: 4_000_001, misses: 1 });
    }
}
