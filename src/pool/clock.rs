//! What to evict: a clock over the entries of all shards.
//!
//! The hand passes all entries once in a rotation. One that was used since the last time is spared, any other is the
//! victim. A rotation has ticks, in each of which the hand walks over the same part of every shard, so that shards of
//! different sizes are treated alike. A removed entry's place is taken by the shard's last one, which is one of the
//! newest: it is then just behind the hand, where a clock puts what is new.
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use super::shards::{At, SHARDS, Shards};
use super::slab::Slab;
use crate::chunk::Digest;

/// Parts of a rotation.
const TICKS: usize = 64;

/// Entries looked at for one victim. When all of them are used or protected, somebody else tries from there on.
const LOOKED_AT: usize = 1 << 16;

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
    /// Takes a chunk out of the index that was not used for long and is not `protected`. `None`: there is none, or none
    /// was found soon enough.
    pub fn evict(&self, protected: impl Fn(&Digest) -> bool) -> Option<Victim> {
        let mut clock = self.clock.lock();
        let mut left = LOOKED_AT;
        // Two rotations: the first one may find everything used.
        for _ in 0..2 * TICKS * SHARDS + 1 {
            let mut table = self.shards.get(clock.shard)?.table.write();
            let end = table.entries.len() * (clock.tick + 1) / TICKS;
            while table.hand < end {
                let hand = table.hand;
                table.hand += 1;
                left = left.checked_sub(1)?;
                let Some(entry) = table.entries.get(hand) else { break };
                if entry.take_used() || protected(&entry.digest) {
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
