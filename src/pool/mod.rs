//! The pool: verified chunks kept locally, shared by all images of a node.
//!
//! On disk: append-only slabs of plain chunks and a journal; FORMAT.md, beside this file, describes them, what is
//! assumed about the medium, and why a crash can't lead to wrong bytes. In memory: digest to place, at most 70 bytes
//! a chunk, and marks of the places, 16 bytes for each 256 KiB of the slabs.
//!
//! Invariants:
//!
//! * A reader gets bytes that were verified since this start: when the chunk was admitted, or on its first read.
//! * A chunk is in the index after its data is written.
//! * No lock is held across I/O. A hit is one pread into the reader's buffer, after a lookup under a shard's read lock, or
//!   after none for those who have a [`Ticket`].
//! * Trouble with the disk is never the reader's: it is a miss, or a chunk that is not kept, and one event.
//!
//! * A place is given up after the index forgot it, and is never another chunk's. A reader asks the place after the read
//!   whether the chunk is still there: right bytes, or a miss.
//!
//! Eviction (`bound`, `clock`) takes place in [`Pool::admit`], before room is taken for a chunk.

mod admit;
mod bound;
mod claims;
mod clock;
mod journal;
mod lost;
mod open;
mod owner;
mod pins;
mod record;
mod scrub;
mod shards;
mod slab;
mod table;
mod tally;
mod ticket;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use serde::Serialize;

pub use admit::Admission;
pub use bound::Amount;
pub use record::room;
pub use scrub::{Scrub, Scrubbed};
pub(crate) use tally::{LANES, lane};
pub use ticket::{Run, Ticket};

use crate::chunk::{Digest, Mismatch, Verified, verify};
use crate::error::{Error, Result};
use crate::media::{Directory, MediaDir};
use admit::{Health, Writer};
use bound::Bound;
use claims::Claims;
use journal::Journal;
use lost::Lost;
use owner::Owner;
use shards::{Place, Shards, Trust};

/// How a pool is kept.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// What the pool may take, with its tables and its journal.
    pub limit: Option<Amount>,
    /// What is left to others of the disk: the pool shrinks when they fill it.
    pub keep_free: Amount,
    /// Bytes of a new slab at least; pools of many GiB make larger ones, so that there are never more than some
    /// hundred files.
    pub slab_bytes: u64,
    /// Records that the journal has at least before it is rewritten.
    pub journal_records: u64,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self { limit: None, keep_free: Amount::Bytes(0), slab_bytes: 64 << 20, journal_records: 4096 }
    }
}

/// Whether a chunk was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Lookup {
    /// The buffer was filled.
    Hit,
    /// The chunk is not in the pool (any more); the buffer's content is undefined.
    Miss,
}

/// What a pool has and what it did since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PoolStat {
    /// Bytes that the chunks take, each rounded up to 4096.
    pub bytes: u64,
    /// Bytes that the pool may take.
    pub limit: Option<u64>,
    /// Chunks.
    pub chunks: u64,
    /// Reads of a chunk that was there.
    pub hits: u64,
    /// Reads of a chunk that was not.
    pub misses: u64,
    /// Chunks dropped to make room.
    pub evicted: u64,
    /// Chunks dropped because their bytes on disk were not theirs.
    pub quarantined: u64,
    /// Chunks dropped because the disk did not give them back.
    pub unreadable: u64,
}

/// What became of a chunk that was looked at.
#[derive(Debug)]
pub enum Examined {
    /// It is what it should be.
    Sound(Verified),
    /// Its bytes are not its own; it was dropped.
    Damaged,
    /// The disk does not give it back; it was dropped.
    Unreadable,
    /// It is not where it was.
    Gone,
}

/// How the bytes of a chunk are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Via {
    /// What the system has cached will do.
    Cache,
    /// The medium, to see whether it still has them.
    Medium,
}

/// The pool of a node.
pub struct Pool {
    dir: Box<dyn MediaDir>,
    /// Where the pool is, for events.
    name: String,
    options: PoolOptions,
    shards: Shards,
    claims: Claims,
    writer: Mutex<Writer>,
    /// `None` when it could be neither used nor made: chunks are kept nonetheless, and the next start finds them by
    /// the slabs' tables.
    journal: Option<Journal>,
    health: Health,
    quarantined: AtomicU64,
    lost: Lost,
    bound: Bound,
    /// Declared last: the lock is released when the files are closed.
    owner: Option<Owner>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, owner, .. } = self;
        f.debug_struct("Pool").field("name", name).field("owner", owner).finish_non_exhaustive()
    }
}

impl Pool {
    /// Opens the pool in the directory `dir`, which is created when it does not exist. Whatever state its files are
    /// in, the pool opens; what can't be used is reported and left out.
    ///
    /// # Errors [`Error::Busy`] that names the process that has the pool open, or [`Error::Io`] for a directory that
    /// can't be made or read.
    pub fn open(dir: &Path, options: &PoolOptions) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .map_err(|error| Error::io(format!("creating the pool's directory {}", dir.display()), error))?;
        let owner = Owner::take(dir)?;
        let mut pool = Self::open_on(Box::new(Directory::new(dir)), &dir.display().to_string(), options)?;
        pool.owner = Some(owner);
        Ok(pool)
    }

    /// Fills `buf` with the bytes of the chunk from `skip` on, if the pool has the chunk.
    ///
    /// A chunk from before this start is read whole and checked on its first read; one that is not what it should be,
    /// or can't be read, is dropped and is a miss. So is a range that is not inside the chunk.
    pub fn read(&self, digest: &Digest, skip: u32, buf: &mut [u8]) -> Lookup {
        self.read_noting(digest, skip, buf, &Ticket::default())
    }

    /// As [`read`](Self::read), and notes for [`read_known`](Self::read_known) where the chunk is.
    pub fn read_noting(&self, digest: &Digest, skip: u32, buf: &mut [u8], ticket: &Ticket) -> Lookup {
        if self.find_and_read(digest, skip, buf, ticket) {
            self.shards.hits.add_one();
            Lookup::Hit
        } else {
            self.shards.misses.add_one();
            Lookup::Miss
        }
    }

    /// Fills `buf` with the bytes from `skip` on of the chunk that the ticket was noted for, if it is still where it was,
    /// which is a hit. False says nothing: [`read_noting`](Self::read_noting) finds out.
    #[inline]
    #[must_use]
    pub fn read_known(&self, ticket: &Ticket, skip: u32, buf: &mut [u8]) -> bool {
        let hit = self.shards.read_known(ticket, skip, buf);
        if hit {
            self.shards.hits.add_one();
        }
        hit
    }

    /// As [`read_known`](Self::read_known) for all chunks of a run, of whose length `buf` is.
    #[must_use]
    pub fn read_run(&self, run: &Run, buf: &mut [u8]) -> bool {
        let hit = self.shards.read_run(run, buf);
        if hit {
            run.blocks().iter().for_each(|_| self.shards.hits.add_one());
        }
        hit
    }

    fn find_and_read(&self, digest: &Digest, skip: u32, buf: &mut [u8], ticket: &Ticket) -> bool {
        loop {
            let Some(place) = self.shards.find(digest) else { return false };
            if u64::from(skip) + buf.len() as u64 > u64::from(place.len) {
                return false;
            }
            if place.trust == Trust::Checked {
                match place.slab.read(place.offset() + u64::from(skip), buf) {
                    Ok(()) if place.slab.use_place(place.block) => {
                        ticket.note(&place);
                        return true;
                    }
                    Ok(()) => continue,
                    Err(error) => {
                        self.unreadable(digest, &place, &error);
                        return false;
                    }
                }
            }
            let Some(_claim) = self.claims.take(digest) else { continue };
            if self.shards.find(digest).is_none_or(|place| place.trust == Trust::Checked) {
                continue;
            }
            let Some(chunk) = self.check(digest, &place) else { return false };
            let Some(bytes) = chunk.bytes().get(skip as usize..skip as usize + buf.len()) else { return false };
            buf.copy_from_slice(bytes);
            return true;
        }
    }

    /// The whole chunk, checked, if the pool has it. Counts neither as a hit nor as a miss.
    #[must_use]
    pub fn read_whole(&self, digest: &Digest) -> Option<Verified> {
        let place = self.shards.find(digest)?;
        self.check(digest, &place)
    }

    /// Reads the whole chunk at `place` and checks it. The chunk is trusted from then on, or dropped.
    fn check(&self, digest: &Digest, place: &Place) -> Option<Verified> {
        match self.examine(digest, place, Via::Cache) {
            Examined::Sound(chunk) => Some(chunk),
            Examined::Damaged | Examined::Unreadable | Examined::Gone => None,
        }
    }

    fn examine(&self, digest: &Digest, place: &Place, via: Via) -> Examined {
        let mut bytes = vec![0; place.len as usize];
        let read = match via {
            Via::Cache => place.slab.read(place.offset(), &mut bytes),
            Via::Medium => place.slab.read_medium(place.offset(), &mut bytes),
        };
        if let Err(error) = read {
            return if self.unreadable(digest, place, &error) { Examined::Unreadable } else { Examined::Gone };
        }
        match verify(digest, bytes) {
            Ok(chunk) => {
                self.shards.trust(digest, place.slot, place.block);
                Examined::Sound(chunk)
            }
            Err(mismatch) if self.quarantine(&mismatch, place) => Examined::Damaged,
            // The place was given up while it was read.
            Err(_) => Examined::Gone,
        }
    }

    fn quarantine(&self, mismatch: &Mismatch, place: &Place) -> bool {
        let dropped = self.drop_chunk(&mismatch.expected, place);
        if dropped {
            self.quarantined.fetch_add(1, Relaxed);
            tracing::warn!(
                pool = %self.name, slab = place.slab.number, offset = place.offset(), chunk = %mismatch.expected,
                found = %mismatch.found,
                "a chunk in the pool is corrupt: its bytes were discarded, it will be fetched again"
            );
        }
        dropped
    }

    fn unreadable(&self, digest: &Digest, place: &Place, error: &io::Error) -> bool {
        let dropped = self.drop_chunk(digest, place);
        if dropped {
            self.lost.count_unreadable();
            if place.slab.report_once() {
                tracing::warn!(
                    pool = %self.name, slab = place.slab.number, offset = place.offset(), chunk = %digest, %error,
                    "a chunk in the pool can't be read and will be fetched again; more of this slab go unreported"
                );
            }
        }
        dropped
    }

    /// Takes a chunk out of the pool that the disk lost; false if somebody did before.
    fn drop_chunk(&self, digest: &Digest, place: &Place) -> bool {
        let Some(at) = self.shards.remove(digest, place.slot, place.block) else { return false };
        self.give_up(digest, &place.slab, at);
        self.lost.add([*digest]);
        true
    }

    /// Whether the pool has the chunk, as far as is known without reading it.
    #[must_use]
    pub fn contains(&self, digest: &Digest) -> bool {
        self.shards.contains(digest)
    }

    /// Writes a new journal when most of its records say nothing any more.
    fn compact_journal(&self) {
        let Some(journal) = &self.journal else { return };
        if !journal.begin_compaction(self.shards.chunks(), self.options.journal_records) {
            return;
        }
        let next_slab = self.writer.lock().next_number;
        if let Err(error) = journal.compact(&*self.dir, next_slab, self.shards.records()) {
            tracing::warn!(pool = %self.name, %error, "the pool's journal can't be rewritten; it grows on");
        }
    }

    /// Makes everything durable that was admitted so far. Needed for nothing but warm starts after a power loss.
    ///
    /// # Errors
    /// [`Error::Io`]; when the data of a slab may be lost, its chunks were dropped.
    pub fn sync(&self) -> Result<()> {
        let failed = |error| Error::io(format!("syncing the pool {}", self.name), error);
        let result = self.sync_slabs();
        if let Some(journal) = &self.journal {
            journal.sync().map_err(failed)?;
        }
        self.dir.sync().map_err(failed)?;
        result.map_err(failed)
    }

    fn sync_slabs(&self) -> io::Result<()> {
        let mut result = Ok(());
        for (slot, slab) in self.shards.slabs() {
            if let Err(error) = slab.sync() {
                self.writer.lock().close(&slab);
                let gone = self.shards.clear_slab(slot);
                let chunks = gone.len();
                self.lost.add(gone);
                tracing::warn!(
                    pool = %self.name, slab = slab.number, chunks, %error,
                    "the disk lost data of a slab: its chunks were dropped and will be fetched again"
                );
                result = Err(error);
            }
        }
        result
    }

    /// What the pool has and did.
    #[must_use]
    pub fn stat(&self) -> PoolStat {
        PoolStat {
            bytes: self.shards.bytes(),
            limit: self.bound.limit,
            chunks: self.shards.chunks(),
            hits: self.shards.hits.sum(),
            misses: self.shards.misses.sum(),
            evicted: self.bound.evicted.load(Relaxed),
            quarantined: self.quarantined.load(Relaxed),
            unreadable: self.lost.unreadable(),
        }
    }
}
