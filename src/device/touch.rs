//! First touches: which blocks of a device were read for the first time, and when.
//!
//! Always on, so that a start can be explained and packed after it happened. A read of blocks that were read before costs
//! a look at a few words without a lock; only a first touch takes one. Memory is bounded: 4 KiB for each 128 MiB of the
//! device that was touched and 12 bytes for each run, up to limits behind which nothing more is recorded.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use parking_lot::Mutex;

use crate::index::BLOCK;
use crate::profile::Touch;

/// Blocks of a page of the bitmap: 128 MiB of the device.
const PAGE_BLOCKS: u64 = 1 << 15;
const WORDS: usize = (PAGE_BLOCKS / 64) as usize;
/// Most pages: 512 GiB of the device, 16 MiB of memory.
const MAX_PAGES: usize = 4096;
/// Most runs, 12 bytes each.
const MAX_RUNS: usize = 256 << 10;
/// A run goes on while reads follow each other on the device within this time.
const SAME_RUN_US: u64 = 1000;

type Page = [AtomicU64; WORDS];

/// The record of a device's first touches.
pub(super) struct Touches {
    started: Instant,
    pages: Box<[OnceLock<Box<Page>>]>,
    log: Mutex<Log>,
    full: AtomicBool,
}

#[derive(Default)]
struct Log {
    runs: Vec<Short>,
    pages: usize,
}

/// A [`Touch`] in 12 bytes.
#[derive(Clone, Copy)]
struct Short {
    /// Microseconds / 16, which lasts for 19 hours; what is later counts as then.
    time: u32,
    block: u32,
    blocks: u32,
}

impl Touches {
    /// Nothing was touched on a device of `device_bytes`.
    pub(super) fn new(device_bytes: u64) -> Self {
        let pages = (device_bytes / u64::from(BLOCK)).div_ceil(PAGE_BLOCKS);
        Self {
            started: Instant::now(),
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            log: Mutex::default(),
            full: AtomicBool::new(false),
        }
    }

    /// When the recording began.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Notes a read of `len` bytes from `offset`, which is inside the device.
    #[inline]
    pub(super) fn note(&self, offset: u64, len: usize) {
        let first = offset / u64::from(BLOCK);
        let end = (offset + len as u64).div_ceil(u64::from(BLOCK));
        let mut block = first;
        while block < end {
            let (mask, next) = mask(block, end);
            let page = self.pages.get((block / PAGE_BLOCKS) as usize).and_then(OnceLock::get);
            let word = page.and_then(|page| page.get((block % PAGE_BLOCKS / 64) as usize));
            if word.is_none_or(|word| word.load(Relaxed) & mask != mask) {
                return self.first(block, end);
            }
            block = next;
        }
    }

    /// Notes that some of the blocks are read for the first time.
    #[cold]
    fn first(&self, from: u64, end: u64) {
        if self.full.load(Relaxed) {
            return;
        }
        let now = self.started.elapsed().as_micros() as u64;
        let mut log = self.log.lock();
        let mut block = from;
        while block < end {
            let (mask, next) = mask(block, end);
            let Some(slot) = self.pages.get((block / PAGE_BLOCKS) as usize) else { return };
            if slot.get().is_none() {
                if log.pages == MAX_PAGES {
                    return self.full.store(true, Relaxed);
                }
                log.pages += 1;
            }
            let page = slot.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
            let Some(word) = page.get((block % PAGE_BLOCKS / 64) as usize) else { return };
            let new = mask & !word.load(Relaxed);
            if new != 0 {
                if !log.add(now, block - block % 64, new) {
                    return self.full.store(true, Relaxed);
                }
                word.fetch_or(new, Relaxed);
            }
            block = next;
        }
    }

    /// What was touched, in order, and whether that is all.
    pub(super) fn snapshot(&self) -> (Vec<Touch>, bool) {
        (self.from(0), !self.full.load(Relaxed))
    }

    /// What was touched after the first `seen` runs. The last one of those may have grown since.
    pub(super) fn from(&self, seen: usize) -> Vec<Touch> {
        let log = self.log.lock();
        let touch =
            |run: &Short| Touch { microseconds: u64::from(run.time) * 16, block: run.block, blocks: run.blocks };
        log.runs.get(seen..).unwrap_or_default().iter().map(touch).collect()
    }
}

impl Log {
    /// Adds the blocks whose bits are set in `new`; bit 0 is block `base`. False when there is no room.
    fn add(&mut self, now: u64, base: u64, mut new: u64) -> bool {
        while new != 0 {
            let start = new.trailing_zeros();
            let blocks = (new >> start).trailing_ones();
            new &= u64::MAX.checked_shl(start + blocks).unwrap_or(0);
            // A device has at most 2^32 blocks.
            let block = (base + u64::from(start)) as u32;
            let time = u32::try_from(now / 16).unwrap_or(u32::MAX);
            if let Some(last) = self.runs.last_mut()
                && last.block.checked_add(last.blocks) == Some(block)
                && u64::from(time - last.time.min(time)) * 16 < SAME_RUN_US
            {
                last.blocks += blocks;
                continue;
            }
            if self.runs.len() == MAX_RUNS {
                return false;
            }
            self.runs.push(Short { time, block, blocks });
        }
        true
    }
}

/// The bits of `block` and those behind it in its word, before `end`; and the first block of the next word.
fn mask(block: u64, end: u64) -> (u64, u64) {
    let next = (block / 64 + 1) * 64;
    let from = u64::MAX << (block % 64);
    let mask = if end < next { from & !(u64::MAX << (end % 64)) } else { from };
    (mask, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(touches: &Touches) -> Vec<(u32, u32)> {
        touches.snapshot().0.iter().map(|touch| (touch.block, touch.blocks)).collect()
    }

    #[test]
    fn only_first_touches_are_recorded_in_their_order() {
        let block = u64::from(BLOCK);
        let touches = Touches::new(1 << 40);
        touches.note(70 * block, 4096);
        touches.note(10 * block + 5, 4096);
        touches.note(10 * block, 3 * 4096);
        touches.note(60 * block, 20 * 4096);
        touches.note(60 * block, 20 * 4096);
        let expected = [(70, 1), (10, 2), (12, 1), (60, 10), (71, 9)];
        let mut found = blocks(&touches);
        // Runs that follow each other at once are one.
        if found.get(1) == Some(&(10, 3)) {
            found.splice(1..2, [(10, 2), (12, 1)]);
        }
        assert_eq!(found, expected);
        assert!(touches.snapshot().1);
    }

    #[test]
    fn a_long_read_is_one_run_over_all_pages() {
        let touches = Touches::new(1 << 30);
        touches.note(0, 1 << 30);
        assert_eq!(blocks(&touches), [(0, 1 << 18)]);
    }

    #[test]
    fn a_recording_that_is_full_says_so_and_stays_bounded() {
        let touches = Touches::new(1 << 44);
        for run in 0..MAX_RUNS as u64 + 10 {
            touches.note(run * 2 * u64::from(BLOCK), 1);
        }
        let (runs, complete) = touches.snapshot();
        assert_eq!((runs.len(), complete), (MAX_RUNS, false));
        let touches = Touches::new(1 << 44);
        for page in 0..MAX_PAGES as u64 + 1 {
            touches.note(page * PAGE_BLOCKS * u64::from(BLOCK), 1);
        }
        assert!(!touches.snapshot().1);
    }

    #[test]
    fn every_block_of_every_range_is_recorded_once() {
        let mut seed = 1u64;
        let touches = Touches::new(4096 * 4096);
        let mut expected = vec![false; 4096];
        for _ in 0..3000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let first = (seed >> 33) % 4096;
            let len = ((seed >> 20) % 200).min(4096 - first);
            touches.note(first * 4096, len as usize * 4096);
            (first..first + len).for_each(|block| expected[block as usize] = true);
        }
        let mut found = vec![false; 4096];
        for (block, blocks) in blocks(&touches) {
            for block in block..block + blocks {
                assert!(!std::mem::replace(&mut found[block as usize], true), "{block} twice");
            }
        }
        assert_eq!(found, expected);
    }
}
