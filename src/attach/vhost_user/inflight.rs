//! What of a guest's requests is not answered yet, in memory that outlives this process.
//!
//! The front-end keeps the memory and hands it to the next back-end, which so finds the requests that died with this
//! one (vhost-user specification, "Inflight I/O tracking", split virtqueues). Its layout is fixed: for each queue a header
//! of 16 bytes (features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16), and for each descriptor 16
//! bytes (inflight u8, 5 unused, next u16, counter u64).
//!
//! The memory is the front-end's: everything read from it is checked.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Error, Result};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

use super::disk::{QUEUE_SIZE_MAX, QUEUES};
use super::memory::check_covers;

const HEADER: usize = 16;
const ENTRY: usize = 16;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;
const VERSION: u16 = 1;
/// Each queue's part starts at a multiple of this.
const ALIGN: usize = 64;

/// The memory of all queues.
#[derive(Debug)]
pub struct Area {
    mapping: MmapRegion<()>,
    queues: u16,
    queue_size: u16,
}

fn part(queue_size: u16) -> usize {
    (HEADER + ENTRY * usize::from(queue_size)).next_multiple_of(ALIGN)
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl Area {
    /// Makes the memory that the front-end asks for: itself, and what to tell the front-end.
    ///
    /// # Errors
    /// More than this back-end has, or what the system says.
    pub fn make(wanted: &VhostUserInflight) -> Result<(Arc<Self>, VhostUserInflight, File)> {
        let (queues, queue_size) = (wanted.num_queues, wanted.queue_size);
        if queues == 0 || queues > QUEUES || queue_size == 0 || queue_size > QUEUE_SIZE_MAX {
            return Err(Error::InvalidParam);
        }
        let len = part(queue_size) * usize::from(queues);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("firstread-inflight", flags).map(File::from).map_err(failed)?;
        file.set_len(len as u64).map_err(failed)?;
        // Who shrinks it kills those that have it mapped.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed)?;
        let told = VhostUserInflight::new(len as u64, 0, queues, queue_size);
        let mapping = MmapRegion::from_file(FileOffset::new(file.try_clone().map_err(failed)?, 0), len);
        let mapping = mapping.map_err(failed)?;
        Ok((Arc::new(Self { mapping, queues, queue_size }), told, file))
    }

    /// Takes the memory that the front-end kept.
    ///
    /// # Errors
    /// It is not as [`make`](Self::make) makes it.
    pub fn take(told: &VhostUserInflight, file: File) -> Result<Arc<Self>> {
        let (queues, queue_size) = (told.num_queues, told.queue_size);
        let right = queues > 0 && queues <= QUEUES && queue_size > 0 && queue_size <= QUEUE_SIZE_MAX;
        let len = part(queue_size) * usize::from(queues);
        if !right || told.mmap_size < len as u64 {
            return Err(Error::InvalidParam);
        }
        check_covers(&file, told.mmap_offset, len as u64)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, told.mmap_offset), len).map_err(failed)?;
        Ok(Arc::new(Self { mapping, queues, queue_size }))
    }

    fn load_u16(&self, at: usize) -> u16 {
        // Offsets are within the mapping, as `part` lays it out.
        self.mapping.as_volatile_slice().load(at, Ordering::SeqCst).unwrap_or_default()
    }

    fn store_u16(&self, value: u16, at: usize) {
        let _ = self.mapping.as_volatile_slice().store(value, at, Ordering::SeqCst);
    }
}

/// What of one queue's requests is not answered yet.
#[derive(Debug)]
pub struct Tracker {
    area: Arc<Area>,
    /// Where the queue's part begins.
    start: usize,
    counter: u64,
}

impl Tracker {
    /// The part of queue `index`, which has `size` entries; `None` if the area was made for fewer or smaller queues.
    #[must_use]
    pub fn new(area: &Arc<Area>, index: u16, size: u16) -> Option<Self> {
        let fits = index < area.queues && size <= area.queue_size;
        let start = part(area.queue_size) * usize::from(index);
        fits.then(|| Self { area: Arc::clone(area), start, counter: 0 })
    }

    fn entry(&self, head: u16) -> usize {
        self.start + HEADER + ENTRY * usize::from(head)
    }

    fn set_in_flight(&self, head: u16, value: u8) {
        let _ = self.area.mapping.as_volatile_slice().store(value, self.entry(head), Ordering::SeqCst);
    }

    /// Brings the part in order, when the ring's used index is `used`: the requests that were taken and not answered, in
    /// the order in which they were taken.
    pub fn recover(&mut self, used: u16) -> Vec<u16> {
        let area = &self.area;
        let version_at = self.start + VERSION_AT;
        let size = area.queue_size;
        if area.load_u16(version_at) != VERSION {
            for head in 0..size {
                self.set_in_flight(head, 0);
            }
            area.store_u16(size, self.start + DESC_NUM_AT);
            area.store_u16(used, self.start + USED_IDX_AT);
            area.store_u16(VERSION, version_at);
            return Vec::new();
        }
        // The answer was given, but the process died before it could say so here. Answers are given one by one.
        if area.load_u16(self.start + USED_IDX_AT) != used {
            let answered = area.load_u16(self.start + LAST_BATCH_HEAD_AT);
            if answered < size {
                self.set_in_flight(answered, 0);
            }
            area.store_u16(used, self.start + USED_IDX_AT);
        }
        let bytes = area.mapping.as_volatile_slice();
        let mut found: Vec<(u64, u16)> = (0..size)
            .filter(|&head| bytes.load::<u8>(self.entry(head), Ordering::SeqCst).is_ok_and(|flag| flag == 1))
            .map(|head| (bytes.load(self.entry(head) + COUNTER_AT, Ordering::SeqCst).unwrap_or_default(), head))
            .collect();
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        found.into_iter().map(|(_, head)| head).collect()
    }

    /// A request was taken.
    pub fn begin(&mut self, head: u16) {
        if head < self.area.queue_size {
            let bytes = self.area.mapping.as_volatile_slice();
            let _ = bytes.store(self.counter, self.entry(head) + COUNTER_AT, Ordering::SeqCst);
            self.counter = self.counter.wrapping_add(1);
            self.set_in_flight(head, 1);
        }
    }

    /// A request is about to be answered: before the ring's used index is written.
    pub fn answering(&self, head: u16) {
        if head < self.area.queue_size {
            let last = self.start + LAST_BATCH_HEAD_AT;
            self.area.store_u16(self.area.load_u16(last), self.entry(head) + NEXT_AT);
            self.area.store_u16(head, last);
        }
    }

    /// A request was answered: the ring's used index is now `used`.
    pub fn answered(&self, head: u16, used: u16) {
        if head < self.area.queue_size {
            self.set_in_flight(head, 0);
        }
        self.area.store_u16(used, self.start + USED_IDX_AT);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const NONE: [u16; 0] = [];

    /// What a process does that dies, and what the next finds.
    #[test]
    fn what_was_taken_and_not_answered_is_found_again_in_order() {
        let (area, told, file) = Area::make(&VhostUserInflight::new(0, 0, 2, 128)).unwrap();
        let mut tracker = Tracker::new(&area, 1, 128).unwrap();
        assert_eq!(tracker.recover(7), NONE);
        for head in [5, 3, 90, 4] {
            tracker.begin(head);
        }
        tracker.answering(3);
        tracker.answered(3, 8);
        // The used index was written (9), then the process died.
        tracker.answering(90);
        let area = Area::take(&told, file.try_clone().unwrap()).unwrap();
        assert_eq!(Tracker::new(&area, 1, 128).unwrap().recover(9), [5, 4]);
        assert_eq!(Tracker::new(&area, 0, 128).unwrap().recover(0), NONE);
        // Once more: nothing has changed.
        let mut tracker = Tracker::new(&area, 1, 128).unwrap();
        assert_eq!(tracker.recover(9), [5, 4]);
        tracker.begin(1);
        assert_eq!(Tracker::new(&area, 1, 128).unwrap().recover(9), [5, 4, 1]);
    }

    #[test]
    fn hostile_memory_is_refused_or_harmless() {
        for (queues, size) in [(0, 128), (QUEUES + 1, 128), (1, 0), (1, QUEUE_SIZE_MAX + 1)] {
            assert!(Area::make(&VhostUserInflight::new(0, 0, queues, size)).is_err());
        }
        let (_, told, file) = Area::make(&VhostUserInflight::new(0, 0, 1, 128)).unwrap();
        assert!(Area::take(&VhostUserInflight { queue_size: 1024, ..told }, file.try_clone().unwrap()).is_err());
        let bigger = VhostUserInflight { queue_size: 1024, mmap_size: 1 << 20, ..told };
        assert!(Area::take(&bigger, file.try_clone().unwrap()).is_err(), "the file is shorter");
        let area = Area::take(&told, file).unwrap();
        area.mapping.as_volatile_slice().write_slice(&vec![0xff; told.mmap_size as usize], 0).unwrap();
        area.store_u16(VERSION, VERSION_AT);
        assert_eq!(Tracker::new(&area, 0, 128).unwrap().recover(3), NONE, "flags other than 1 are none");
        assert!(Tracker::new(&area, 1, 128).is_none());
        assert!(Tracker::new(&area, 0, 256).is_none());
    }
}
