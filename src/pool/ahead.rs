//! Reading ahead: from the disk into the system's cache, for a start whose order is known.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Pool;
use super::record::ALIGN;
use super::slab::Slab;
use crate::chunk::Digest;

/// Bytes from which on neighbours are asked for apart.
const PIECE: u64 = 1 << 20;

/// Bytes on their way from which on they are waited for: a read of somebody else waits for little more than these.
const WINDOW: u64 = 2 << 20;

/// Neighbouring chunks of a slab.
struct Stretch {
    slab: Arc<Slab>,
    offset: u64,
    end: u64,
}

impl Stretch {
    fn bytes(&self) -> u64 {
        self.end - self.offset
    }

    /// Waits until its last byte was read. What can't be read is found by who needs it.
    fn wait(&self) {
        let _ = self.slab.read(self.end - 1, &mut [0]);
    }
}

impl Pool {
    /// Has the system read those of these chunks that are here from the disk into its cache, in this order, until that are
    /// `most` bytes: what is needed soon is then read in large pieces, not in those of its readers. Nothing is checked or
    /// counted. Blocks, for as long as reading takes.
    pub fn read_ahead(&self, chunks: impl IntoIterator<Item = Digest>, most: u64) {
        let mut reading = Reading::default();
        let (mut next, mut left) = (None::<Stretch>, most);
        let places = chunks.into_iter().filter_map(|digest| self.shards.peek(&digest));
        for place in places {
            let (offset, bytes) = (place.offset(), u64::from(place.len));
            if bytes > left {
                break;
            }
            left -= bytes;
            match &mut next {
                Some(stretch) if stretch.takes(&place.slab, offset) => stretch.end = offset + bytes,
                _ => {
                    let began = Stretch { slab: place.slab, offset, end: offset + bytes };
                    if let Some(stretch) = next.replace(began) {
                        reading.begin(stretch);
                    }
                }
            }
        }
        if let Some(stretch) = next {
            reading.begin(stretch);
        }
    }
}

impl Stretch {
    fn takes(&self, slab: &Arc<Slab>, offset: u64) -> bool {
        Arc::ptr_eq(&self.slab, slab) && self.end.next_multiple_of(ALIGN) == offset && self.bytes() < PIECE
    }
}

/// What is on its way, oldest first.
#[derive(Default)]
struct Reading {
    stretches: VecDeque<Stretch>,
    bytes: u64,
}

impl Reading {
    fn begin(&mut self, stretch: Stretch) {
        while self.bytes >= WINDOW
            && let Some(earlier) = self.stretches.pop_front()
        {
            earlier.wait();
            self.bytes -= earlier.bytes();
        }
        stretch.slab.will_need(stretch.offset, stretch.bytes());
        self.bytes += stretch.bytes();
        self.stretches.push_back(stretch);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::fs::File;
    use std::io::IoSliceMut;
    use std::ops::Range;
    use std::time::Duration;

    use rustix::fs::Advice;
    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    use super::*;
    use crate::chunk::{Verified, verify};
    use crate::pool::PoolOptions;

    /// TMPFS_MAGIC, statfs(2).
    const TMPFS: u64 = 0x0102_1994;

    /// Whether the block at `offset` is in the system's cache. It is afterwards: each block can be asked for once.
    fn cached(file: &File, offset: u64) -> bool {
        let mut block = [0; 4096];
        match preadv2(file, &mut [IoSliceMut::new(&mut block)], offset, ReadWriteFlags::NOWAIT) {
            Ok(_) => true,
            Err(Errno::AGAIN) => false,
            Err(errno) => panic!("{errno}"),
        }
    }

    fn chunk(number: u8) -> Verified {
        let bytes = vec![number; 200_000];
        verify(&Digest::of(&bytes), bytes).unwrap()
    }

    #[test]
    fn what_is_read_ahead_is_in_the_cache_and_no_more_than_was_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Pool::open(dir.path(), &PoolOptions::default()).unwrap();
        let chunks: Vec<Verified> = (0..20).map(chunk).collect();
        for chunk in &chunks {
            assert_eq!(pool.admit(chunk), crate::pool::Admission::Kept);
        }
        pool.sync().unwrap();
        let file = File::open(dir.path().join("slab-00000000")).unwrap();
        if rustix::fs::fstatfs(&file).unwrap().f_type as u64 == TMPFS {
            return println!("not tested: nothing here is on a disk");
        }
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        // Asking for one block reads no other one.
        rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap();
        let start = |number: usize| pool.shards.peek(chunks[number].digest()).unwrap().offset();
        let are_cached = |numbers: Range<usize>, block: u64| {
            numbers.map(|number| cached(&file, start(number) + block * 4096)).collect()
        };
        let here: Vec<bool> = are_cached(0..20, 1);
        assert_eq!(here, [false; 20]);
        // Ten of them, the last first, and one that is not here.
        let order = chunks.iter().rev().map(|chunk| *chunk.digest());
        pool.read_ahead([Digest::of(b"elsewhere")].into_iter().chain(order), 10 * 200_000 + 1);
        let read = (2..40).any(|block| {
            let here: Vec<bool> = are_cached(10..20, block);
            std::thread::sleep(Duration::from_millis(200));
            here == [true; 10]
        });
        assert!(read, "they are not in the cache");
        let others: Vec<bool> = are_cached(0..10, 40);
        assert_eq!(others, [false; 10]);
        assert_eq!(pool.stat().hits, 0);
    }
}
