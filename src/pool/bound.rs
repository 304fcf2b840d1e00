//! The pool's bound: how much it may take, and who has to go.
//!
//! A chunk is evicted in this order: out of the index, the mark of its place, a record of the drop, the hole. Whoever read
//! the place meanwhile finds that the chunk is gone. A place is not used a second time: a slab
//! is removed as a whole when nothing of it is left, and what is left of one that is nearly empty is copied to the open
//! slab first. So a pool has at most about eight times the slabs that its chunks would fill.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::record::{Kind, Record, room};
use super::slab::{self, Slab};
use super::{Pool, PoolOptions};
use crate::chunk::Digest;
use crate::media::MediaDir;

/// How often the disk is asked how full it is.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A slab with less than this part of its bytes in use is emptied.
const SPARSE: u64 = 8;

/// A size, or a part of the disk that the pool is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// Bytes.
    Bytes(u64),
    /// Percent of the disk, 0 to 100.
    Percent(u8),
}

impl Amount {
    /// In bytes, on a disk of `total` bytes.
    fn of(self, total: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (u128::from(total) * u128::from(percent.min(100)) / 100) as u64,
        }
    }
}

/// What the pool may take.
pub(super) struct Bound {
    pub limit: Option<u64>,
    /// Bytes of the disk that are left to others.
    keep_free: u64,
    /// Bytes of admissions under way.
    reserved: AtomicU64,
    /// Bytes that can be written until no more than `keep_free` is left.
    spare: AtomicI64,
    looked: Mutex<Option<Instant>>,
    pub evicted: AtomicU64,
    /// Whether it was said that nothing can be evicted.
    stuck: AtomicBool,
}

/// Room for a chunk that is being admitted.
pub(super) struct Reserved<'a> {
    bound: &'a Bound,
    bytes: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.bound.reserved.fetch_sub(self.bytes, Relaxed);
    }
}

impl Bound {
    pub fn new(dir: &dyn MediaDir, options: &PoolOptions) -> Self {
        // A disk that does not say how large it is has no percent of it.
        let total = dir.space().map_or(u64::MAX, |space| space.total);
        Self {
            limit: options.limit.map(|limit| limit.of(total)),
            keep_free: options.keep_free.of(total),
            reserved: AtomicU64::default(),
            spare: AtomicI64::new(i64::MAX),
            looked: Mutex::default(),
            evicted: AtomicU64::default(),
            stuck: AtomicBool::default(),
        }
    }

    /// Asks the disk, if that was not done just now.
    fn look(&self, dir: &dyn MediaDir) {
        if self.keep_free == 0 {
            return;
        }
        {
            let mut looked = self.looked.lock();
            if looked.is_some_and(|then| then.elapsed() < LOOK_EVERY) {
                return;
            }
            *looked = Some(Instant::now());
        }
        if let Ok(space) = dir.space() {
            let clamp = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
            self.spare.store(clamp(space.free).saturating_sub(clamp(self.keep_free)), Relaxed);
        }
    }

    fn spend(&self, bytes: i64) {
        if self.keep_free > 0 {
            self.spare.fetch_sub(bytes, Relaxed);
        }
    }
}

impl Pool {
    /// Bytes that the pool takes: chunks, tables, journal.
    pub(super) fn size(&self) -> u64 {
        let journal = self.journal.as_ref().map_or(0, super::journal::Journal::bytes);
        self.shards.bytes() + self.shards.overhead() + journal
    }

    /// Makes room for a chunk of `len` bytes by evicting others. `None`: there is none to be had.
    pub(super) fn reserve(&self, len: u32) -> Option<Reserved<'_>> {
        let bytes = room(len);
        self.bound.reserved.fetch_add(bytes, Relaxed);
        let reserved = Reserved { bound: &self.bound, bytes };
        self.bound.look(&*self.dir);
        while !self.fits(bytes) {
            if !self.evict() {
                if !self.bound.stuck.swap(true, Relaxed) {
                    tracing::warn!(
                        pool = %self.name, limit = self.bound.limit, bytes = self.size(),
                        "the pool is full and nothing in it may be evicted; chunks are read uncached"
                    );
                }
                return None;
            }
        }
        self.bound.spend(bytes as i64);
        if self.bound.stuck.load(Relaxed) && self.bound.stuck.swap(false, Relaxed) {
            tracing::info!(pool = %self.name, "the pool has room again");
        }
        Some(reserved)
    }

    fn fits(&self, more: u64) -> bool {
        let reserved = self.bound.reserved.load(Relaxed);
        self.bound.limit.is_none_or(|limit| self.size() + reserved <= limit)
            && self.bound.spare.load(Relaxed) >= more as i64
    }

    /// Evicts down to the pool's limit, to `bytes` if given, and to what the disk has to spare. Returns the bytes that
    /// were freed. What is pinned stays.
    pub fn trim(&self, bytes: Option<u64>) -> u64 {
        *self.bound.looked.lock() = None;
        self.bound.look(&*self.dir);
        let before = self.shards.bytes();
        for (slot, slab) in self.shards.slabs() {
            // It was appended to when its last chunk went.
            self.retire(&slab, slot);
        }
        while (!self.fits(0) || bytes.is_some_and(|bytes| self.size() > bytes)) && self.evict() {}
        before.saturating_sub(self.shards.bytes())
    }

    /// Evicts one chunk; false if there is none that may go.
    fn evict(&self) -> bool {
        let Some(victim) = self.shards.evict() else { return false };
        self.bound.evicted.fetch_add(1, Relaxed);
        self.bound.spend(-(room(victim.at.len) as i64));
        self.give_up(&victim.digest, &victim.slab, victim.at);
        self.retire(&victim.slab, victim.at.slot);
        true
    }

    /// Gives the room of a chunk back that was just taken out of the index.
    pub(super) fn give_up(&self, digest: &Digest, slab: &Slab, at: super::shards::At) {
        let record =
            Record { kind: Kind::Drop, digest: *digest, slab: slab.number, block: at.block, len: at.len, row: at.row };
        // Without the record the chunk is only found out and dropped once more after the next start.
        let _ = self.journal.as_ref().map(|journal| journal.append(&record));
        if let Err(error) = slab.give_up(record.offset(), room(at.len), at.row)
            && slab.report_once()
        {
            tracing::warn!(
                pool = %self.name, slab = slab.number, %error,
                "room in a slab can't be given back before the whole slab is unused"
            );
        }
    }

    /// Removes the slab if it is not appended to and nothing, or nearly nothing, is left in it.
    pub(super) fn retire(&self, slab: &Arc<Slab>, slot: u32) {
        if slab.live() * SPARSE >= slab.bytes() || self.is_open(slab) || !slab.retire_once() {
            return;
        }
        if slab.live() > 0 {
            self.empty(slab, slot);
        }
        {
            let writer = self.writer.lock();
            if slab.live() > 0 || slab.is_appended_to() || writer.has_open(slab) {
                // What can't be moved stays, and the slab with it, until the next start.
                return;
            }
            self.shards.remove_slab(slot);
        }
        if let Err(error) = self.dir.remove(&slab::name(slab.number)) {
            tracing::warn!(pool = %self.name, slab = slab.number, %error, "an unused slab can't be removed");
        }
    }

    fn is_open(&self, slab: &Arc<Slab>) -> bool {
        let writer = self.writer.lock();
        slab.is_appended_to() || writer.has_open(slab)
    }

    /// Moves what is left in a slab to the open one. It may be pinned, so that a crash must not cost it: the copies are
    /// durable before anything on disk or in memory names them, and that is before the originals go.
    fn empty(&self, slab: &Arc<Slab>, slot: u32) {
        let (mut left, mut copies) = (Vec::new(), Vec::new());
        // What a damaged table does not tell stays where it is.
        let _ = slab.table(|record| left.push(record));
        for record in left {
            let Some(place) = self.shards.peek(&record.digest) else { continue };
            if (place.slot, place.block) != (slot, record.block) {
                continue;
            }
            let Some(chunk) = self.check(&record.digest, &place) else { continue };
            match self.write(&chunk, place.len) {
                Ok(written) => copies.push((record.block, written)),
                Err(_) => break,
            }
        }
        let durable = self.sync_slabs().is_ok();
        for (block, written) in &copies {
            let moved = durable && self.shards.relocate(&written.digest, (slot, *block), written.at);
            // A copy of what was evicted meanwhile is nobody's; a record that is not written is a fetch some day.
            let _ = if moved {
                self.announce(written)
            } else {
                written.slab.give_up(written.offset(), room(written.at.len), 0)
            };
        }
        if let Err(error) = self.sync() {
            tracing::warn!(pool = %self.name, %error, "syncing what was moved");
        }
    }
}
