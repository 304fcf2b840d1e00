//! Admission: verified chunks are appended to the open slab.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::record::{ALIGN, Kind, Record, room};
use super::shards::{At, Place, Trust};
use super::slab::{Appending, SLAB_MAX, Slab};
use super::{Pool, PoolOptions};
use crate::chunk::{CHUNK_MAX, Digest, Verified};

/// Names that are tried for a new slab when files that are not the pool's have them.
const NAME_ATTEMPTS: u32 = 1000;

/// What became of a chunk that was offered to the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is in the pool now.
    Kept,
    /// It was there, or another thread is about to put it there.
    Present,
    /// The disk does not take it, or nothing can be evicted for it: reads of it go on uncached.
    NotKept,
}

/// What is appended to.
pub(super) struct Writer {
    pub open: Option<OpenSlab>,
    /// Number of the next slab.
    pub next_number: u32,
}

/// The slab that chunks are appended to.
pub(super) struct OpenSlab {
    pub slab: Arc<Slab>,
    pub slot: u32,
    /// First free byte, a multiple of [`ALIGN`].
    pub next: u64,
    /// First free record of the table.
    pub next_record: u32,
}

/// A chunk whose data is written.
pub(super) struct Written {
    pub slab: Appending,
    pub digest: Digest,
    pub at: At,
}

impl Written {
    /// Offset in the slab in bytes.
    pub fn offset(&self) -> u64 {
        u64::from(self.at.block) * ALIGN
    }
}

/// Room taken for one chunk.
struct Room {
    slab: Appending,
    slot: u32,
    offset: u64,
    record: u32,
}

impl Writer {
    fn take(&mut self, len: u32) -> Option<Room> {
        let open = self.open.as_mut()?;
        let end = open.next.checked_add(room(len))?;
        if end > open.slab.bytes() || open.next_record >= open.slab.records() {
            return None;
        }
        let room = Room { slab: open.slab.append(), slot: open.slot, offset: open.next, record: open.next_record };
        open.next = end;
        open.next_record += 1;
        Some(room)
    }

    /// Gives room back that nothing was published in; a full disk must not use up slabs.
    fn give_back(&mut self, taken: &Room, len: u32) {
        if let Some(open) = &mut self.open
            && open.slot == taken.slot
            && open.next == taken.offset + room(len)
        {
            open.next = taken.offset;
            open.next_record = taken.record;
        }
    }

    /// Whether `slab` is the one that is appended to.
    pub fn has_open(&self, slab: &Arc<Slab>) -> bool {
        self.open.as_ref().is_some_and(|open| Arc::ptr_eq(&open.slab, slab))
    }

    /// Appends nothing more to `slab`.
    pub fn close(&mut self, slab: &Arc<Slab>) {
        self.open.take_if(|open| Arc::ptr_eq(&open.slab, slab));
    }
}

/// Whether the disk takes chunks. One event when it stops, one when it goes on.
#[derive(Default)]
pub(super) struct Health {
    /// Bytes of the largest write that failed since the last one as large that did not; 0 = all is well. On a nearly
    /// full disk small chunks still fit: they don't count as recovery.
    failed: AtomicU32,
}

impl Health {
    fn good(&self, pool: &str, len: u32) {
        let failed = self.failed.load(Relaxed);
        if failed != 0 && len >= failed && self.failed.swap(0, Relaxed) != 0 {
            tracing::info!(pool, "the pool takes chunks again");
        }
    }

    fn bad(&self, pool: &str, len: u32, error: &io::Error) {
        if self.failed.fetch_max(len, Relaxed) == 0 {
            tracing::warn!(pool, %error, "the pool can't take chunks; reads go on uncached until it can");
        }
    }
}

impl Pool {
    /// Puts a chunk into the pool. Blocks for a write to the page cache. Trouble with the disk is reported once until
    /// it is over, and is not the caller's.
    pub fn admit(&self, chunk: &Verified) -> Admission {
        let Some(len) = u32::try_from(chunk.bytes().len()).ok().filter(|len| (1..=CHUNK_MAX).contains(len)) else {
            return Admission::NotKept;
        };
        if self.shards.contains(chunk.digest()) {
            return Admission::Present;
        }
        // Two threads that admit the same chunk would take its room twice.
        let Some(_claim) = self.claims.take(chunk.digest()) else { return Admission::Present };
        if self.shards.contains(chunk.digest()) {
            return Admission::Present;
        }
        let Some(_reserved) = self.reserve(len) else { return Admission::NotKept };
        match self.append(chunk, len) {
            Ok(()) => {
                self.health.good(&self.name, len);
                self.compact_journal();
                Admission::Kept
            }
            Err(error) => {
                self.health.bad(&self.name, len, &error);
                if self.shards.contains(chunk.digest()) { Admission::Kept } else { Admission::NotKept }
            }
        }
    }

    /// Data, then the index, then the records: a chunk is found only after it was written, and a record that can't be
    /// written costs no more than a fetch after the next start.
    fn append(&self, chunk: &Verified, len: u32) -> io::Result<()> {
        let written = self.write(chunk, len)?;
        self.shards.insert(chunk.digest(), written.at, Trust::Checked);
        self.announce(&written)
    }

    /// Writes a chunk to room that was taken for it. Nobody finds it yet.
    pub(super) fn write(&self, chunk: &Verified, len: u32) -> io::Result<Written> {
        let room = self.take_room(len)?;
        if let Err(error) = room.slab.write(room.offset, chunk.bytes()) {
            self.writer.lock().give_back(&room, len);
            return Err(error);
        }
        let at = At { slot: room.slot, block: (room.offset / ALIGN) as u32, len, row: room.record + 1 };
        Ok(Written { slab: room.slab, digest: *chunk.digest(), at })
    }

    /// Writes the records of a chunk that is in the index.
    pub(super) fn announce(&self, written: &Written) -> io::Result<()> {
        let Written { slab, digest, at } = written;
        let At { block, len, row, .. } = *at;
        let record = Record { kind: Kind::Admit, digest: *digest, slab: slab.number, block, len, row };
        slab.write_record(row - 1, &record)?;
        if let Some(journal) = &self.journal {
            journal.append(&record)?;
        }
        // Evicted since it is in the index, its drop may have been recorded first: the last record must be that.
        let there = |place: Place| (place.slot, place.block) == (at.slot, block);
        if !self.shards.peek(digest).is_some_and(there) {
            self.give_up(digest, slab, *at);
        }
        Ok(())
    }

    fn take_room(&self, len: u32) -> io::Result<Room> {
        loop {
            let number = {
                let mut writer = self.writer.lock();
                if let Some(room) = writer.take(len) {
                    return Ok(room);
                }
                writer.next_number
            };
            let slab = Arc::new(self.create_slab(number)?);
            let mut writer = self.writer.lock();
            if writer.next_number > number {
                // Another thread opened a slab meanwhile.
                drop(writer);
                let _ = self.dir.remove(&super::slab::name(slab.number));
                continue;
            }
            writer.next_number = slab.number.saturating_add(1);
            let slot = self.shards.add_slab(&slab);
            let next = slab.data_start();
            let full = writer.open.replace(OpenSlab { slab, slot, next, next_record: 0 });
            drop(writer);
            if let Some(full) = full {
                // All of it may have been evicted already.
                self.retire(&full.slab, full.slot);
            }
        }
    }

    fn create_slab(&self, number: u32) -> io::Result<Slab> {
        let bytes = slab_bytes(&self.options, self.bound.limit, self.shards.bytes());
        for number in number..number.saturating_add(NAME_ATTEMPTS) {
            match Slab::create(&*self.dir, number, bytes) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                created => return created,
            }
        }
        Err(ErrorKind::AlreadyExists.into())
    }
}

/// Bytes of the next slab of a pool that has `pool` bytes: the number of slabs, each an open file, grows with the
/// pool's logarithm. A small limit makes for small slabs, since the last one is never removed.
fn slab_bytes(options: &PoolOptions, limit: Option<u64>, pool: u64) -> u64 {
    let grown = (pool / 128).checked_next_power_of_two().unwrap_or(SLAB_MAX);
    let most = limit.map_or(SLAB_MAX, |limit| limit / 8).clamp(2 << 20, SLAB_MAX);
    options.slab_bytes.max(grown).clamp(2 << 20, most).next_multiple_of(1 << 20)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::Examined;
    use super::*;
    use crate::chunk::verify;

    #[test]
    fn a_chunk_that_is_evicted_before_it_is_recorded_is_not_there_after_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let chunk = |byte: u8| {
            let bytes = vec![byte; 100_000];
            verify(&Digest::of(&bytes), bytes).unwrap()
        };
        let (kept, evicted) = (chunk(1), chunk(2));
        let pool = Pool::open(dir.path(), &PoolOptions::default()).unwrap();
        pool.admit(&kept);
        // What another thread does between the two steps of an admission.
        let written = pool.write(&evicted, 100_000).unwrap();
        pool.shards.insert(evicted.digest(), written.at, Trust::Checked);
        let at = pool.shards.remove(evicted.digest(), written.at.slot, written.at.block).unwrap();
        pool.give_up(evicted.digest(), &written.slab, at);
        pool.announce(&written).unwrap();
        drop((written, pool));
        let pool = Pool::open(dir.path(), &PoolOptions::default()).unwrap();
        assert!(!pool.contains(evicted.digest()));
        assert!(matches!(pool.examine_whole(kept.digest()), Examined::Sound(_)));
        let found = pool.scrub(|_| true);
        assert_eq!((found.chunks, found.damaged), (1, 0));
    }
}
