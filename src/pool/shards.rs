//! The pool's index in memory: digest to place, in shards so that readers rarely meet.
//!
//! A chunk takes an [`Entry`] of 48 bytes in a vector that grows by an eighth, and a 5-byte slot in a hash table that
//! is 7/16 to 7/8 full: 54 to 66 bytes. The entries are dense, so that the eviction's hand (`clock`) can walk
//! over them.
#![deny(clippy::indexing_slicing)]

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use hashbrown::HashTable;
use parking_lot::{Mutex, RwLock};

use super::clock::Clock;
use super::record::{ALIGN, Kind, Record, room};
use super::slab::Slab;
use crate::chunk::Digest;

pub(super) const SHARDS: usize = 64;

/// Bits of [`Entry::marks`]; the rest is the row in the slab's table.
const CHECKED: u32 = 1 << 31;
const USED: u32 = 1 << 30;
const ROW: u32 = USED - 1;

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
    epoch: u32,
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
    /// Whether what was read from here was there all the time. False only says that it may not have been.
    pub fn is_intact(&self) -> bool {
        self.slab.is_unchanged(self.epoch)
    }

    pub fn offset(&self) -> u64 {
        u64::from(self.block) * ALIGN
    }
}

pub(super) struct Entry {
    pub digest: Digest,
    /// Number of the slab in this process, an index of [`Table::slabs`].
    slot: u32,
    block: u32,
    pub len: u32,
    /// Whether the chunk was checked and whether it was used since the hand passed, and its row.
    marks: AtomicU32,
}

impl Entry {
    fn new(digest: Digest, at: At, trust: Trust) -> Self {
        let checked = if trust == Trust::Checked { CHECKED } else { 0 };
        let row = if at.row <= ROW { at.row } else { 0 };
        Self { digest, slot: at.slot, block: at.block, len: at.len, marks: AtomicU32::new(checked | row) }
    }

    pub fn at(&self) -> At {
        At { slot: self.slot, block: self.block, len: self.len, row: self.marks.load(Relaxed) & ROW }
    }

    /// Stores only what is not set yet: a hit on a hot chunk must not take the cache line from other readers.
    fn mark(&self, mark: u32) {
        if self.marks.load(Relaxed) & mark == 0 {
            self.marks.fetch_or(mark, Relaxed);
        }
    }

    /// Whether the chunk was used since this was asked the last time.
    pub fn take_used(&self) -> bool {
        let used = self.marks.load(Relaxed) & USED != 0;
        if used {
            self.marks.fetch_and(!USED, Relaxed);
        }
        used
    }
}

#[derive(Default)]
pub(super) struct Table {
    /// Numbers of entries by the hash of their digest.
    index: HashTable<u32>,
    pub entries: Vec<Entry>,
    /// Every shard has its own list, so that a hit takes one lock and no common cache line but the slab's count.
    /// `None`: the slab was removed.
    slabs: Vec<Option<Arc<Slab>>>,
    /// The next entry that the eviction looks at.
    pub hand: usize,
}

#[derive(Default)]
#[repr(align(128))]
pub(super) struct Shard {
    pub table: RwLock<Table>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// All shards.
pub(super) struct Shards {
    pub shards: Box<[Shard; SHARDS]>,
    /// Two secret words: whoever chooses chunks can't choose their hashes.
    keys: [u64; 2],
    /// Serializes changes of the list of slabs.
    slabs: Mutex<()>,
    pub clock: Mutex<Clock>,
    chunks: AtomicU64,
    bytes: AtomicU64,
    /// Bytes of headers and tables of the slabs.
    overhead: AtomicU64,
}

impl Table {
    fn position(&self, hash: u64, digest: &Digest) -> Option<usize> {
        let same = |&number: &u32| self.entries.get(number as usize).is_some_and(|entry| entry.digest == *digest);
        self.index.find(hash, same).map(|&number| number as usize)
    }

    fn get(&self, hash: u64, digest: &Digest) -> Option<&Entry> {
        self.entries.get(self.position(hash, digest)?)
    }

    /// Removes the entry at `position`; the last one takes its number.
    fn remove(&mut self, position: usize, hash_of: impl Fn(&Digest) -> u64) {
        let Self { index, entries, .. } = self;
        let (Some(gone), Some(moved)) = (entries.get(position), entries.last()) else { return };
        let (gone, moved, last) = (hash_of(&gone.digest), hash_of(&moved.digest), entries.len() - 1);
        if let Ok(slot) = index.find_entry(gone, |&number| number as usize == position) {
            slot.remove();
        }
        if let Some(number) = index.find_mut(moved, |&number| number as usize == last) {
            *number = position as u32;
        }
        entries.swap_remove(position);
    }
}

impl Shards {
    pub fn new() -> Self {
        Self {
            shards: Box::new(std::array::from_fn(|_| Shard::default())),
            keys: [RandomState::new().hash_one(0), RandomState::new().hash_one(1)],
            slabs: Mutex::new(()),
            clock: Mutex::default(),
            chunks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            overhead: AtomicU64::new(0),
        }
    }

    /// A keyed hash. The digest is uniform already unless somebody searched for digests that are not.
    fn hash(&self, digest: &Digest) -> u64 {
        let bytes = digest.as_bytes();
        let word =
            |at: usize| bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes);
        let [first, second] = self.keys;
        let product = u128::from(word(0) ^ first) * u128::from(word(8) ^ second);
        (product >> 64) as u64 ^ product as u64
    }

    /// The shard is chosen by bits that the table inside uses neither for its buckets nor for its tags.
    fn shard(&self, hash: u64) -> &Shard {
        let [first, ..] = &*self.shards;
        self.shards.get((hash >> 48) as usize % SHARDS).unwrap_or(first)
    }

    /// Where a chunk is, for somebody who wants to read it: it counts as used.
    pub fn find(&self, digest: &Digest) -> Option<Place> {
        self.look_up(digest, USED)
    }

    /// Where a chunk is; changes nothing.
    pub fn peek(&self, digest: &Digest) -> Option<Place> {
        self.look_up(digest, 0)
    }

    fn look_up(&self, digest: &Digest, mark: u32) -> Option<Place> {
        let hash = self.hash(digest);
        let table = self.shard(hash).table.read();
        let entry = table.get(hash, digest)?;
        let slab = Arc::clone(table.slabs.get(entry.slot as usize)?.as_ref()?);
        if mark != 0 {
            entry.mark(mark);
        }
        let trust = if entry.marks.load(Relaxed) & CHECKED != 0 { Trust::Checked } else { Trust::Unchecked };
        let epoch = slab.epoch();
        Some(Place { slab, slot: entry.slot, block: entry.block, len: entry.len, trust, epoch })
    }

    /// Whether the chunk is still at this place. A place is never given to another chunk, so that it was there all the
    /// time since `place` was looked up.
    pub fn is_at(&self, digest: &Digest, place: &Place) -> bool {
        self.peek(digest).is_some_and(|now| Arc::ptr_eq(&now.slab, &place.slab) && now.block == place.block)
    }

    pub fn contains(&self, digest: &Digest) -> bool {
        let hash = self.hash(digest);
        self.shard(hash).table.read().position(hash, digest).is_some()
    }

    /// Adds a chunk unless it is there already; says whether it was added.
    pub fn insert(&self, digest: &Digest, at: At, trust: Trust) -> bool {
        let hash = self.hash(digest);
        let mut guard = self.shard(hash).table.write();
        let Table { index, entries, slabs, .. } = &mut *guard;
        let same = |&number: &u32| entries.get(number as usize).is_some_and(|entry| entry.digest == *digest);
        let Ok(number) = u32::try_from(entries.len()) else { return false };
        if index.find(hash, same).is_some() {
            return false;
        }
        if entries.len() == entries.capacity() {
            entries.reserve_exact((entries.len() / 8).max(16));
        }
        entries.push(Entry::new(*digest, at, trust));
        let hash_of = |&number: &u32| entries.get(number as usize).map_or(0, |entry| self.hash(&entry.digest));
        index.insert_unique(hash, number, hash_of);
        self.chunks.fetch_add(1, Relaxed);
        self.bytes.fetch_add(room(at.len), Relaxed);
        if let Some(slab) = slab(slabs, at.slot) {
            slab.gained(room(at.len));
        }
        true
    }

    /// Removes a chunk if it is at this place; says where it was.
    pub fn remove(&self, digest: &Digest, slot: u32, block: u32) -> Option<At> {
        let hash = self.hash(digest);
        let mut table = self.shard(hash).table.write();
        let position = table.position(hash, digest)?;
        let at = table.entries.get(position)?.at();
        if (at.slot, at.block) != (slot, block) {
            return None;
        }
        self.remove_at(&mut table, position);
        Some(at)
    }

    /// Removes the entry at `position`, and counts it off.
    pub fn remove_at(&self, table: &mut Table, position: usize) -> Option<(Digest, At, Arc<Slab>)> {
        let entry = table.entries.get(position)?;
        let (digest, at) = (entry.digest, entry.at());
        self.chunks.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(room(at.len), Relaxed);
        let slab = slab(&table.slabs, at.slot).cloned();
        if let Some(slab) = &slab {
            slab.lost(room(at.len));
        }
        table.remove(position, |digest| self.hash(digest));
        Some((digest, at, slab?))
    }

    /// Says that the chunk at `from` is at `to` now; false if it was not at `from` any more.
    pub fn relocate(&self, digest: &Digest, from: (u32, u32), to: At) -> bool {
        let hash = self.hash(digest);
        let mut guard = self.shard(hash).table.write();
        let Some(position) = guard.position(hash, digest) else { return false };
        let Table { entries, slabs, .. } = &mut *guard;
        let Some(entry) = entries.get_mut(position).filter(|entry| (entry.slot, entry.block) == from) else {
            return false;
        };
        let used = entry.marks.load(Relaxed) & USED;
        *entry = Entry::new(*digest, to, Trust::Checked);
        entry.mark(used);
        if let Some(slab) = slab(slabs, from.0) {
            slab.lost(room(to.len));
        }
        if let Some(slab) = slab(slabs, to.slot) {
            slab.gained(room(to.len));
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
            entry.mark(CHECKED);
        }
    }

    /// Removes all chunks of a slab; returns how many there were.
    pub fn clear_slab(&self, slot: u32) -> u64 {
        let mut removed = 0;
        for shard in &*self.shards {
            let mut table = shard.table.write();
            for position in (0..table.entries.len()).rev() {
                if table.entries.get(position).is_some_and(|entry| entry.slot == slot) {
                    self.remove_at(&mut table, position);
                    removed += 1;
                }
            }
        }
        removed
    }

    /// Adds a slab and returns its slot.
    pub fn add_slab(&self, slab: &Arc<Slab>) -> u32 {
        let _serial = self.slabs.lock();
        let mut slot = 0;
        for shard in &*self.shards {
            let slabs = &mut shard.table.write().slabs;
            slot = slabs.iter().position(Option::is_none).unwrap_or(slabs.len());
            match slabs.get_mut(slot) {
                Some(free) => *free = Some(Arc::clone(slab)),
                None => slabs.push(Some(Arc::clone(slab))),
            }
        }
        self.overhead.fetch_add(slab.data_start(), Relaxed);
        slot as u32
    }

    /// Forgets a slab in which the index has nothing; its slot is free for another one.
    pub fn remove_slab(&self, slot: u32) {
        let _serial = self.slabs.lock();
        let mut gone = None;
        for shard in &*self.shards {
            gone = shard.table.write().slabs.get_mut(slot as usize).and_then(Option::take);
        }
        if let Some(slab) = gone {
            self.overhead.fetch_sub(slab.data_start(), Relaxed);
        }
    }

    /// All slabs with their slots.
    pub fn slabs(&self) -> Vec<(u32, Arc<Slab>)> {
        let [first, ..] = &*self.shards;
        let table = first.table.read();
        (0..).zip(&table.slabs).filter_map(|(slot, slab)| Some((slot, Arc::clone(slab.as_ref()?)))).collect()
    }

    /// A record of every chunk, shard by shard.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        self.shards.iter().flat_map(|shard| {
            let table = shard.table.read();
            let record = |entry: &Entry| {
                let (At { block, len, row, .. }, digest) = (entry.at(), entry.digest);
                let slab = slab(&table.slabs, entry.slot)?.number;
                Some(Record { kind: Kind::Admit, digest, slab, block, len, row })
            };
            table.entries.iter().filter_map(record).collect::<Vec<_>>()
        })
    }

    pub fn hit(&self, digest: &Digest) {
        self.shard(self.hash(digest)).hits.fetch_add(1, Relaxed);
    }

    pub fn miss(&self, digest: &Digest) {
        self.shard(self.hash(digest)).misses.fetch_add(1, Relaxed);
    }

    /// Hits and misses so far.
    pub fn counts(&self) -> (u64, u64) {
        self.shards.iter().fold((0, 0), |(hits, misses), shard| {
            (hits + shard.hits.load(Relaxed), misses + shard.misses.load(Relaxed))
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

fn slab(slabs: &[Option<Arc<Slab>>], slot: u32) -> Option<&Arc<Slab>> {
    slabs.get(slot as usize)?.as_ref()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]

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
        assert_eq!(shards.clear_slab(0), left);
        assert_eq!((shards.chunks(), shards.bytes()), (1, 8192));
        assert!(shards.contains(&digests[1]));
    }
}
