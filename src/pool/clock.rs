//! What to evict: a clock over the entries of all shards.
//!
//! The hand passes all entries that may be evicted once in a rotation; pinned ones are not in its way (`table`). One that
//! was used since the last time is spared, any other is the victim: what the hand passes over was used once since, so
//! that an eviction costs what the uses before it cost, O(1) amortised. A rotation has ticks, in each of which the hand walks over the same part of every shard, so that shards of
//! different sizes are treated alike. A removed entry's place is taken by the shard's last one, which is one of the
//! newest: it is then just behind the hand, where a clock puts what is new.
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use super::shards::{At, SHARDS, Shards};
use super::slab::Slab;
use crate::chunk::Digest;

/// Parts of a rotation.
const TICKS: usize = 64;

/// Where the hand is.
#[derive(Default)]
pub(super) struct Clock {
    tick: usize,
    shard: usize,
}

/// A chunk that was taken out of the index.
pub(super) struct Victim {
    pub digest: Digest,
    pub at: At,
    pub slab: Arc<Slab>,
}

impl Shards {
    /// Takes a chunk out of the index that was not used for long. `None`: all that there are are pinned, or are used all
    /// the time.
    pub fn evict(&self) -> Option<Victim> {
        let mut clock = self.clock.lock();
        // Two rotations: the first one may find everything used.
        for _ in 0..2 * TICKS * SHARDS + 1 {
            let mut table = self.shards.get(clock.shard)?.table.write();
            let end = table.evictable() * (clock.tick + 1) / TICKS;
            while table.hand < end {
                let hand = table.hand;
                table.hand += 1;
                let Some(entry) = table.at(hand) else { continue };
                if self.slab(entry.slot).is_some_and(|slab| slab.take_used(entry.block)) {
                    continue;
                }
                if let Some((digest, at, slab)) = self.remove_at(&mut table, hand) {
                    return Some(Victim { digest, at, slab });
                }
            }
            drop(table);
            clock.shard += 1;
            if clock.shard == SHARDS {
                clock.shard = 0;
                clock.tick = (clock.tick + 1) % TICKS;
            }
            if clock.tick == 0 {
                self.shards.get(clock.shard)?.table.write().hand = 0;
            }
        }
        None
    }
}
