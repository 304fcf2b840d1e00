//! The pool's index in memory: digest to place, in shards so that readers rarely meet.
//!
//! A chunk takes an [`Entry`] of 48 bytes in a vector that grows by an eighth, and a 5-byte slot in a hash table that
//! is 7/16 to 7/8 full: 54 to 66 bytes. The entries are dense, so that an eviction hand can walk over them later.
#![deny(clippy::indexing_slicing)]

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use hashbrown::HashTable;
use parking_lot::{Mutex, RwLock};

use super::record::{ALIGN, Kind, Record, room};
use super::slab::Slab;
use crate::chunk::Digest;

const SHARDS: usize = 64;

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

impl Place {
    pub fn offset(&self) -> u64 {
        u64::from(self.block) * ALIGN
    }
}

struct Entry {
    digest: Digest,
    /// Number of the slab in this process, an index of [`Table::slabs`].
    slot: u32,
    block: u32,
    len: u32,
    checked: AtomicBool,
}

#[derive(Default)]
struct Table {
    /// Numbers of entries by the hash of their digest.
    index: HashTable<u32>,
    entries: Vec<Entry>,
    /// Every shard has its own list, so that a hit takes one lock and no common cache line but the slab's count.
    slabs: Vec<Arc<Slab>>,
}

#[derive(Default)]
#[repr(align(128))]
struct Shard {
    table: RwLock<Table>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// All shards.
pub(super) struct Shards {
    shards: Box<[Shard; SHARDS]>,
    /// Two secret words: whoever chooses chunks can't choose their hashes.
    keys: [u64; 2],
    /// Serializes changes of the list of slabs.
    slabs: Mutex<()>,
    chunks: AtomicU64,
    bytes: AtomicU64,
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
            chunks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
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

    pub fn find(&self, digest: &Digest) -> Option<Place> {
        let hash = self.hash(digest);
        let table = self.shard(hash).table.read();
        let entry = table.get(hash, digest)?;
        let slab = Arc::clone(table.slabs.get(entry.slot as usize)?);
        let trust = if entry.checked.load(Relaxed) { Trust::Checked } else { Trust::Unchecked };
        Some(Place { slab, slot: entry.slot, block: entry.block, len: entry.len, trust })
    }

    pub fn contains(&self, digest: &Digest) -> bool {
        let hash = self.hash(digest);
        self.shard(hash).table.read().position(hash, digest).is_some()
    }

    /// Adds a chunk unless it is there already; says whether it was added.
    pub fn insert(&self, digest: &Digest, slot: u32, block: u32, len: u32, trust: Trust) -> bool {
        let hash = self.hash(digest);
        let mut guard = self.shard(hash).table.write();
        let Table { index, entries, .. } = &mut *guard;
        let same = |&number: &u32| entries.get(number as usize).is_some_and(|entry| entry.digest == *digest);
        let Ok(number) = u32::try_from(entries.len()) else { return false };
        if index.find(hash, same).is_some() {
            return false;
        }
        if entries.len() == entries.capacity() {
            entries.reserve_exact((entries.len() / 8).max(16));
        }
        let checked = AtomicBool::new(trust == Trust::Checked);
        entries.push(Entry { digest: *digest, slot, block, len, checked });
        let hash_of = |&number: &u32| entries.get(number as usize).map_or(0, |entry| self.hash(&entry.digest));
        index.insert_unique(hash, number, hash_of);
        self.chunks.fetch_add(1, Relaxed);
        self.bytes.fetch_add(room(len), Relaxed);
        true
    }

    /// Removes a chunk if it is at this place; says whether it was.
    pub fn remove(&self, digest: &Digest, slot: u32, block: u32) -> bool {
        let hash = self.hash(digest);
        let mut table = self.shard(hash).table.write();
        let Some(position) = table.position(hash, digest) else { return false };
        match table.entries.get(position) {
            Some(entry) if (entry.slot, entry.block) == (slot, block) => {
                self.chunks.fetch_sub(1, Relaxed);
                self.bytes.fetch_sub(room(entry.len), Relaxed);
            }
            _ => return false,
        }
        table.remove(position, |digest| self.hash(digest));
        true
    }

    /// Marks a chunk as checked if it is at this place.
    pub fn trust(&self, digest: &Digest, slot: u32, block: u32) {
        let hash = self.hash(digest);
        let table = self.shard(hash).table.read();
        if let Some(entry) = table.get(hash, digest)
            && (entry.slot, entry.block) == (slot, block)
        {
            entry.checked.store(true, Relaxed);
        }
    }

    /// Removes all chunks of a slab; returns how many there were.
    pub fn clear_slab(&self, slot: u32) -> u64 {
        let mut removed = 0;
        for shard in &*self.shards {
            let mut table = shard.table.write();
            for position in (0..table.entries.len()).rev() {
                let Some(entry) = table.entries.get(position).filter(|entry| entry.slot == slot) else { continue };
                self.bytes.fetch_sub(room(entry.len), Relaxed);
                self.chunks.fetch_sub(1, Relaxed);
                table.remove(position, |digest| self.hash(digest));
                removed += 1;
            }
        }
        removed
    }

    /// Adds a slab and returns its slot.
    pub fn add_slab(&self, slab: &Arc<Slab>) -> u32 {
        let _serial = self.slabs.lock();
        let mut slot = 0;
        for shard in &*self.shards {
            let mut table = shard.table.write();
            slot = table.slabs.len();
            table.slabs.push(Arc::clone(slab));
        }
        slot as u32
    }

    /// All slabs; a slab's slot is its position.
    pub fn slabs(&self) -> Vec<Arc<Slab>> {
        let [first, ..] = &*self.shards;
        first.table.read().slabs.clone()
    }

    /// A record of every chunk, shard by shard.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        self.shards.iter().flat_map(|shard| {
            let table = shard.table.read();
            let record = |entry: &Entry| {
                let slab = table.slabs.get(entry.slot as usize)?.number;
                Some(Record { kind: Kind::Admit, digest: entry.digest, slab, block: entry.block, len: entry.len })
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
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]

    use super::*;

    #[test]
    fn entries_are_found_while_others_come_and_go() {
        assert_eq!(size_of::<Entry>(), 48);
        let shards = Shards::new();
        let digests: Vec<_> = (0_u32..20_000).map(|number| Digest::of(&number.to_le_bytes())).collect();
        for (number, digest) in digests.iter().enumerate() {
            assert!(shards.insert(digest, 0, number as u32, 5000, Trust::Unchecked));
            assert!(!shards.insert(digest, 1, 0, 5000, Trust::Unchecked));
        }
        for (number, digest) in digests.iter().enumerate() {
            assert!(!shards.remove(digest, 1, number as u32), "another place");
            if number % 3 != 0 {
                assert!(shards.remove(digest, 0, number as u32));
            }
        }
        for (number, digest) in digests.iter().enumerate() {
            assert_eq!(shards.contains(digest), number % 3 == 0, "{number}");
        }
        let left = digests.len().div_ceil(3) as u64;
        assert_eq!((shards.chunks(), shards.bytes()), (left, left * 8192));
        assert!(shards.insert(&digests[1], 1, 7, 5000, Trust::Checked));
        assert_eq!(shards.clear_slab(0), left);
        assert_eq!((shards.chunks(), shards.bytes()), (1, 8192));
        assert!(shards.contains(&digests[1]));
    }
}
