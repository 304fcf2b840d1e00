//! The pool's index in memory: digest to place, in shards so that readers rarely meet. Who has a [`Ticket`] needs it not.
//!
//! A chunk takes an entry of 48 bytes in a vector that grows by an eighth, and a 5-byte slot in a hash table that
//! is 7/16 to 7/8 full (`table`): 54 to 66 bytes. The entries are dense, so that the eviction's hand (`clock`) can walk
//! over them.
#![deny(clippy::indexing_slicing)]

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use arc_swap::ArcSwap;
use parking_lot::{Mutex, RwLock};

use super::clock::Clock;
use super::pins::Pins;
use super::record::{ALIGN, Kind, Record, room};
use super::slab::Slab;
use super::table::{Entry, Table};
use super::tally::Tally;
use super::ticket::{Run, Ticket};
use crate::chunk::Digest;

pub(super) const SHARDS: usize = 64;

/// Whether a chunk's bytes may be served without a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// Written, or checked, since this start.
    Checked,
    /// Found on disk at this start.
    Unchecked,
}

/// Where a chunk is. Holding it keeps the slab's file open, and its places from being given to other chunks.
pub(super) struct Place {
    pub slab: Arc<Slab>,
    pub slot: u32,
    pub block: u32,
    pub len: u32,
    pub trust: Trust,
}

/// The slabs of the index, never changed but replaced as a whole.
#[derive(Default)]
struct Slabs {
    /// By slot. `None`: the slab was removed.
    slots: Vec<Option<Arc<Slab>>>,
    /// In the order of their numbers.
    numbers: Vec<(u32, Arc<Slab>)>,
}

impl Slabs {
    fn new(slots: Vec<Option<Arc<Slab>>>) -> Self {
        let mut numbers: Vec<_> = slots.iter().flatten().map(|slab| (slab.number, Arc::clone(slab))).collect();
        numbers.sort_unstable_by_key(|(number, _)| *number);
        Self { slots, numbers }
    }

    fn at(&self, slot: u32) -> Option<&Arc<Slab>> {
        self.slots.get(slot as usize)?.as_ref()
    }

    fn numbered(&self, number: u32) -> Option<&Arc<Slab>> {
        let at = self.numbers.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        self.numbers.get(at).map(|(_, slab)| slab)
    }
}

/// A place as the index keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    /// Position of the slab in the list of slabs.
    pub slot: u32,
    pub block: u32,
    pub len: u32,
    /// See [`Record::row`].
    pub row: u32,
}

impl Place {
    pub fn offset(&self) -> u64 {
        u64::from(self.block) * ALIGN
    }
}

#[derive(Default)]
#[repr(align(128))]
pub(super) struct Shard {
    pub table: RwLock<Table>,
}

/// All shards.
pub(super) struct Shards {
    pub shards: Box<[Shard; SHARDS]>,
    /// Two secret words: whoever chooses chunks can't choose their hashes.
    keys: [u64; 2],
    slabs: ArcSwap<Slabs>,
    /// Serializes changes of the list of slabs.
    slabs_change: Mutex<()>,
    pub hits: Tally,
    pub misses: Tally,
    pub clock: Mutex<Clock>,
    pins: Pins,
    chunks: AtomicU64,
    bytes: AtomicU64,
    /// Bytes of headers and tables of the slabs.
    overhead: AtomicU64,
}

/// The shard is chosen by bits that the table inside uses neither for its buckets nor for its tags.
fn shard_of(hash: u64) -> usize {
    (hash >> 48) as usize % SHARDS
}

impl Shards {
    pub fn new() -> Self {
        Self {
            shards: Box::new(std::array::from_fn(|_| Shard::default())),
            keys: [RandomState::new().hash_one(0), RandomState::new().hash_one(1)],
            slabs: ArcSwap::default(),
            slabs_change: Mutex::default(),
            hits: Tally::default(),
            misses: Tally::default(),
            clock: Mutex::default(),
            pins: Pins::default(),
            chunks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            overhead: AtomicU64::new(0),
        }
    }

    /// A keyed hash. The digest is uniform already unless somebody searched for digests that are not.
    pub fn hash(&self, digest: &Digest) -> u64 {
        let bytes = digest.as_bytes();
        let word =
            |at: usize| bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes);
        let [first, second] = self.keys;
        let product = u128::from(word(0) ^ first) * u128::from(word(8) ^ second);
        (product >> 64) as u64 ^ product as u64
    }

    fn shard(&self, hash: u64) -> &Shard {
        let [first, ..] = &*self.shards;
        self.shards.get(shard_of(hash)).unwrap_or(first)
    }

    /// Fills `buf` with a chunk's bytes from `skip` on, without a lock, or a count that others change. False says nothing:
    /// the ticket may be old, the range not inside the chunk, the read may have failed.
    pub fn read_known(&self, ticket: &Ticket, skip: u32, buf: &mut [u8]) -> bool {
        let Some(known) = ticket.known() else { return false };
        // Keeps the slab's file open, no more.
        let slabs = self.slabs.load();
        let Some(slab) = slabs.numbered(known.slab) else { return false };
        u64::from(skip) + buf.len() as u64 <= u64::from(known.len)
            && slab.read(u64::from(known.block) * ALIGN + u64::from(skip), buf).is_ok()
            && slab.use_place(known.block)
    }

    /// As [`read_known`](Self::read_known) for all chunks of a run, whose bytes fill `buf`.
    pub fn read_run(&self, run: &Run, buf: &mut [u8]) -> bool {
        let slabs = self.slabs.load();
        let Some(slab) = slabs.numbered(run.slab) else { return false };
        buf.len() == run.len()
            && slab.read(run.start, buf).is_ok()
            && run.blocks().iter().all(|block| slab.use_place(*block))
    }

    /// Where a chunk is, for somebody who wants to read it: it counts as used.
    pub fn find(&self, digest: &Digest) -> Option<Place> {
        let place = self.peek(digest)?;
        place.slab.use_place(place.block);
        Some(place)
    }

    /// Where a chunk is; changes nothing.
    pub fn peek(&self, digest: &Digest) -> Option<Place> {
        let hash = self.hash(digest);
        let table = self.shard(hash).table.read();
        let entry = table.get(hash, digest)?;
        let slab = self.slab(entry.slot)?;
        Some(Place { slab, slot: entry.slot, block: entry.block, len: entry.len, trust: entry.trust() })
    }

    pub fn slab(&self, slot: u32) -> Option<Arc<Slab>> {
        self.slabs.load().at(slot).map(Arc::clone)
    }

    pub fn contains(&self, digest: &Digest) -> bool {
        let hash = self.hash(digest);
        self.shard(hash).table.read().position(hash, digest).is_some()
    }

    /// Adds a chunk unless it is there already, or another one is at its place; says whether it was added.
    pub fn insert(&self, digest: &Digest, at: At, trust: Trust) -> bool {
        let hash = self.hash(digest);
        let mut table = self.shard(hash).table.write();
        if table.position(hash, digest).is_some() {
            return false;
        }
        let slab = self.slab(at.slot);
        if slab.as_ref().is_some_and(|slab| !slab.gained(at.block, room(at.len))) {
            return false;
        }
        // Asked under the shard's lock, see `set_pins`.
        let keep = self.pins.keep(hash);
        if !table.push(hash, Entry::new(*digest, at, trust), keep, |digest| self.hash(digest)) {
            if let Some(slab) = slab {
                slab.lost(at.block, room(at.len));
            }
            return false;
        }
        self.chunks.fetch_add(1, Relaxed);
        self.bytes.fetch_add(room(at.len), Relaxed);
        true
    }

    /// Changes the pins, and moves the chunks that are there to where they belong.
    ///
    /// Whoever adds a chunk asks for its pins under the lock of its shard, and here that lock is taken after the pins
    /// changed: one of the two sees what the other did.
    pub fn set_pins<'a>(&self, digests: impl IntoIterator<Item = &'a Digest>, change: impl Fn(&Pins, u64)) {
        for digest in digests {
            let hash = self.hash(digest);
            change(&self.pins, hash);
            let mut table = self.shard(hash).table.write();
            let keep = self.pins.keep(hash);
            if let Some(position) = table.position(hash, digest) {
                table.keep(position, keep, |digest| self.hash(digest));
            }
        }
    }

    /// Removes a chunk if it is at this place; says where it was.
    pub fn remove(&self, digest: &Digest, slot: u32, block: u32) -> Option<At> {
        let hash = self.hash(digest);
        let mut table = self.shard(hash).table.write();
        let position = table.position(hash, digest)?;
        let at = table.at(position)?.at();
        if (at.slot, at.block) != (slot, block) {
            return None;
        }
        self.remove_at(&mut table, position);
        Some(at)
    }

    /// Removes the entry at `position`, and counts it off.
    pub fn remove_at(&self, table: &mut Table, position: usize) -> Option<(Digest, At, Arc<Slab>)> {
        let entry = table.at(position)?;
        let (digest, at) = (entry.digest, entry.at());
        self.chunks.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(room(at.len), Relaxed);
        let slab = self.slab(at.slot);
        if let Some(slab) = &slab {
            slab.lost(at.block, room(at.len));
        }
        table.remove(position, |digest| self.hash(digest));
        Some((digest, at, slab?))
    }

    /// Says that the chunk at `from` is at `to` now; false if it was not at `from` any more.
    pub fn relocate(&self, digest: &Digest, from: (u32, u32), to: At) -> bool {
        let hash = self.hash(digest);
        let mut table = self.shard(hash).table.write();
        let Some(position) = table.position(hash, digest) else { return false };
        let Some(entry) = table.at_mut(position).filter(|entry| (entry.slot, entry.block) == from) else {
            return false;
        };
        entry.relocate(to);
        let used = self.slab(from.0).is_some_and(|slab| slab.lost(from.1, room(to.len)));
        if let Some(slab) = self.slab(to.slot) {
            slab.gained(to.block, room(to.len));
            if used {
                slab.use_place(to.block);
            }
        }
        true
    }

    /// Marks a chunk as checked if it is at this place.
    pub fn trust(&self, digest: &Digest, slot: u32, block: u32) {
        let hash = self.hash(digest);
        let table = self.shard(hash).table.read();
        if let Some(entry) = table.get(hash, digest)
            && (entry.slot, entry.block) == (slot, block)
        {
            entry.set_checked();
        }
    }

    /// Removes all chunks of a slab, and returns them.
    pub fn clear_slab(&self, slot: u32) -> Vec<Digest> {
        let mut removed = Vec::new();
        for shard in &*self.shards {
            let mut table = shard.table.write();
            for position in (0..table.entries().len()).rev() {
                if let Some(entry) = table.at(position).filter(|entry| entry.slot == slot) {
                    removed.push(entry.digest);
                    self.remove_at(&mut table, position);
                }
            }
        }
        removed
    }

    /// Adds a slab and returns its slot.
    pub fn add_slab(&self, slab: &Arc<Slab>) -> u32 {
        let _serial = self.slabs_change.lock();
        let mut slots = self.slabs.load().slots.clone();
        let slot = slots.iter().position(Option::is_none).unwrap_or(slots.len());
        match slots.get_mut(slot) {
            Some(free) => *free = Some(Arc::clone(slab)),
            None => slots.push(Some(Arc::clone(slab))),
        }
        self.slabs.store(Arc::new(Slabs::new(slots)));
        self.overhead.fetch_add(slab.data_start(), Relaxed);
        slot as u32
    }

    /// Forgets a slab in which the index has nothing; its slot is free for another one.
    pub fn remove_slab(&self, slot: u32) {
        let _serial = self.slabs_change.lock();
        let mut slots = self.slabs.load().slots.clone();
        if let Some(slab) = slots.get_mut(slot as usize).and_then(Option::take) {
            self.overhead.fetch_sub(slab.data_start(), Relaxed);
        }
        self.slabs.store(Arc::new(Slabs::new(slots)));
    }

    /// All slabs with their slots.
    pub fn slabs(&self) -> Vec<(u32, Arc<Slab>)> {
        let slabs = self.slabs.load();
        (0..).zip(&slabs.slots).filter_map(|(slot, slab)| Some((slot, Arc::clone(slab.as_ref()?)))).collect()
    }

    /// The digests of a shard's chunks.
    pub fn digests(&self, shard: usize) -> Vec<Digest> {
        let table = self.shards.get(shard).map(|shard| shard.table.read());
        table.map_or_else(Vec::new, |table| table.entries().iter().map(|entry| entry.digest).collect())
    }

    /// A record of every chunk, shard by shard.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        self.shards.iter().flat_map(|shard| {
            let table = shard.table.read();
            let slabs = self.slabs.load();
            let record = |entry: &Entry| {
                let (At { block, len, row, .. }, digest) = (entry.at(), entry.digest);
                let slab = slabs.at(entry.slot)?.number;
                Some(Record { kind: Kind::Admit, digest, slab, block, len, row })
            };
            table.entries().iter().filter_map(record).collect::<Vec<_>>()
        })
    }

    /// Chunks.
    pub fn chunks(&self) -> u64 {
        self.chunks.load(Relaxed)
    }

    /// Bytes that the chunks take in the slabs.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Bytes of headers and tables of the slabs.
    pub fn overhead(&self) -> u64 {
        self.overhead.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use std::collections::HashMap;

    use super::*;

    #[test]
    fn entries_are_found_while_others_come_and_go() {
        assert_eq!(size_of::<Entry>(), 48);
        let at = |slot, block| At { slot, block, len: 5000, row: 0 };
        let shards = Shards::new();
        let digests: Vec<_> = (0_u32..20_000).map(|number| Digest::of(&number.to_le_bytes())).collect();
        for (number, digest) in digests.iter().enumerate() {
            assert!(shards.insert(digest, at(0, number as u32), Trust::Unchecked));
            assert!(!shards.insert(digest, at(1, 0), Trust::Unchecked));
        }
        for (number, digest) in digests.iter().enumerate() {
            assert_eq!(shards.remove(digest, 1, number as u32), None, "another place");
            if number % 3 != 0 {
                assert!(shards.remove(digest, 0, number as u32).is_some());
            }
        }
        for (number, digest) in digests.iter().enumerate() {
            assert_eq!(shards.contains(digest), number % 3 == 0, "{number}");
        }
        let left = digests.len().div_ceil(3) as u64;
        assert_eq!((shards.chunks(), shards.bytes()), (left, left * 8192));
        assert!(shards.insert(&digests[1], at(1, 7), Trust::Checked));
        assert_eq!(shards.clear_slab(0).len() as u64, left);
        assert_eq!((shards.chunks(), shards.bytes()), (1, 8192));
        assert!(shards.contains(&digests[1]));
    }

    #[test]
    fn pinned_chunks_are_not_in_the_eviction_s_way() {
        let shards = Shards::new();
        let dir = tempfile::tempdir().unwrap();
        let slab = Slab::create(&crate::media::Directory::new(dir.path()), 0, 1 << 30).unwrap();
        shards.add_slab(&Arc::new(slab));
        let digests: Vec<Digest> = (0..200_000_u32).map(|number| Digest::of(&number.to_le_bytes())).collect();
        let places: HashMap<Digest, u32> = digests.iter().copied().zip(0..).collect();
        let at = |digest: &Digest| At { slot: 0, block: places[digest], len: 1, row: 1 };
        let (pinned, rest) = digests.split_at(digests.len() - 50);
        // Some are pinned before they come, some afterwards.
        for digest in &pinned[..1000] {
            assert!(shards.insert(digest, at(digest), Trust::Checked));
        }
        shards.set_pins(pinned, Pins::add);
        for digest in digests.iter().filter(|digest| !shards.contains(digest)).collect::<Vec<_>>() {
            assert!(shards.insert(digest, at(digest), Trust::Checked));
        }
        for _ in rest {
            let victim = shards.evict().unwrap();
            assert!(rest.contains(&victim.digest));
        }
        assert!(shards.evict().is_none());
        shards.set_pins(&pinned[..1], Pins::remove);
        assert_eq!(shards.evict().map(|victim| victim.digest), Some(pinned[0]));
    }
}
