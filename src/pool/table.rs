//! A shard's table: entries in a dense vector, found by the hash of their digest.
//!
//! The first [`Table::evictable`] entries may be evicted, the others are pinned: the eviction's hand walks over the first
//! part only, so that pinned chunks cost it nothing however many there are.
#![deny(clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use hashbrown::HashTable;

use super::shards::{At, Trust};
use crate::chunk::Digest;

/// Bits of [`Entry::marks`]: this one, and the row in the slab's table.
const CHECKED: u32 = 1 << 31;
const ROW: u32 = CHECKED - 1;

/// Whether a chunk may be evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// When it was not used for long.
    Evictable,
    /// Somebody pinned it.
    Pinned,
}

pub(super) struct Entry {
    pub digest: Digest,
    /// Number of the slab in this process, an index of the list of slabs.
    pub slot: u32,
    pub block: u32,
    pub len: u32,
    /// Whether the chunk was checked, and its row.
    marks: AtomicU32,
}

impl Entry {
    pub fn new(digest: Digest, at: At, trust: Trust) -> Self {
        let checked = if trust == Trust::Checked { CHECKED } else { 0 };
        let row = if at.row <= ROW { at.row } else { 0 };
        Self { digest, slot: at.slot, block: at.block, len: at.len, marks: AtomicU32::new(checked | row) }
    }

    /// The same chunk at another place, where it was written just now.
    pub fn relocate(&mut self, to: At) {
        *self = Self::new(self.digest, to, Trust::Checked);
    }

    pub fn at(&self) -> At {
        At { slot: self.slot, block: self.block, len: self.len, row: self.marks.load(Relaxed) & ROW }
    }

    pub fn trust(&self) -> Trust {
        if self.marks.load(Relaxed) & CHECKED != 0 { Trust::Checked } else { Trust::Unchecked }
    }

    pub fn set_checked(&self) {
        self.marks.fetch_or(CHECKED, Relaxed);
    }
}

#[derive(Default)]
pub(super) struct Table {
    /// Numbers of entries by the hash of their digest.
    index: HashTable<u32>,
    entries: Vec<Entry>,
    /// How many entries, from the first one, may be evicted.
    evictable: usize,
    /// The next entry that the eviction looks at.
    pub hand: usize,
}

impl Table {
    pub fn position(&self, hash: u64, digest: &Digest) -> Option<usize> {
        let same = |&number: &u32| self.entries.get(number as usize).is_some_and(|entry| entry.digest == *digest);
        self.index.find(hash, same).map(|&number| number as usize)
    }

    pub fn get(&self, hash: u64, digest: &Digest) -> Option<&Entry> {
        self.entries.get(self.position(hash, digest)?)
    }

    pub fn at(&self, position: usize) -> Option<&Entry> {
        self.entries.get(position)
    }

    pub fn at_mut(&mut self, position: usize) -> Option<&mut Entry> {
        self.entries.get_mut(position)
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub fn evictable(&self) -> usize {
        self.evictable
    }

    /// Adds an entry whose digest is not there yet; false if the table has as many as it can.
    pub fn push(&mut self, hash: u64, entry: Entry, keep: Keep, hash_of: impl Fn(&Digest) -> u64) -> bool {
        let Ok(number) = u32::try_from(self.entries.len()) else { return false };
        if self.entries.len() == self.entries.capacity() {
            self.entries.reserve_exact((self.entries.len() / 8).max(16));
        }
        self.entries.push(entry);
        let entries = &self.entries;
        let rehash = |&number: &u32| entries.get(number as usize).map_or(0, |entry| hash_of(&entry.digest));
        self.index.insert_unique(hash, number, rehash);
        if keep == Keep::Evictable {
            self.keep(number as usize, keep, hash_of);
        }
        true
    }

    /// Moves the entry at `position` to the part that it belongs to.
    pub fn keep(&mut self, position: usize, keep: Keep, hash_of: impl Fn(&Digest) -> u64) {
        match keep {
            Keep::Pinned if position < self.evictable => {
                self.evictable -= 1;
                self.swap(position, self.evictable, hash_of);
            }
            Keep::Evictable if (self.evictable..self.entries.len()).contains(&position) => {
                self.swap(position, self.evictable, hash_of);
                self.evictable += 1;
            }
            _ => {}
        }
    }

    /// Removes the entry at `position`; the last one of its part takes its place.
    pub fn remove(&mut self, position: usize, hash_of: impl Fn(&Digest) -> u64) {
        let mut position = position;
        if position < self.evictable {
            self.evictable -= 1;
            self.swap(position, self.evictable, &hash_of);
            position = self.evictable;
        }
        let Some(last) = self.entries.len().checked_sub(1) else { return };
        self.swap(position, last, &hash_of);
        if let Some(gone) = self.entries.pop()
            && let Ok(slot) = self.index.find_entry(hash_of(&gone.digest), |&number| number as usize == last)
        {
            slot.remove();
        }
    }

    fn swap(&mut self, one: usize, other: usize, hash_of: impl Fn(&Digest) -> u64) {
        if one == other {
            return;
        }
        let Self { index, entries, .. } = self;
        let hash = |position: usize| entries.get(position).map(|entry| hash_of(&entry.digest));
        let (Some(first), Some(second)) = (hash(one), hash(other)) else { return };
        // Both are looked up before either is changed: afterwards two slots might have the same number.
        let find = |hash, position: usize| index.find_bucket_index(hash, |&number| number as usize == position);
        let (Some(first), Some(second)) = (find(first, one), find(second, other)) else { return };
        for (bucket, number) in [(first, other), (second, one)] {
            if let Some(slot) = index.get_bucket_mut(bucket) {
                *slot = number as u32;
            }
        }
        entries.swap(one, other);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use std::collections::HashMap;

    use super::*;

    #[test]
    fn the_parts_stay_apart_while_entries_come_go_and_change_sides() {
        let digests: Vec<Digest> = (0..300_u32).map(|number| Digest::of(&number.to_le_bytes())).collect();
        // Few hashes, so that entries meet in the index.
        let hash_of = |digest: &Digest| u64::from(digest.as_bytes()[0] & 31) << 57;
        let (mut table, mut model) = (Table::default(), HashMap::new());
        let mut state = 1_u64;
        for step in 0..60_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (number, act) = ((state >> 33) as usize % digests.len(), state >> 60);
            let digest = &digests[number];
            let keep = if act & 1 == 0 { Keep::Evictable } else { Keep::Pinned };
            let position = table.position(hash_of(digest), digest);
            assert_eq!(position.is_some(), model.contains_key(&number), "{step}");
            match (position, act) {
                (None, _) => {
                    let at = At { slot: 0, block: number as u32, len: 1, row: 1 };
                    assert!(table.push(hash_of(digest), Entry::new(*digest, at, Trust::Checked), keep, hash_of));
                    model.insert(number, keep);
                }
                (Some(position), 0..=5) => {
                    table.remove(position, hash_of);
                    model.remove(&number);
                }
                (Some(position), _) => {
                    table.keep(position, keep, hash_of);
                    model.insert(number, keep);
                }
            }
            if step % 500 == 0 {
                assert_eq!(table.entries().len(), model.len());
                for (&number, &keep) in &model {
                    let position = table.position(hash_of(&digests[number]), &digests[number]).unwrap();
                    assert_eq!(table.at(position).unwrap().block, number as u32);
                    assert_eq!(position < table.evictable(), keep == Keep::Evictable, "{step}");
                }
            }
        }
    }
}
