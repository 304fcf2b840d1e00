//! Scrubbing: every chunk is read from the medium and checked, whether somebody wants it or not.

use serde::{Deserialize, Serialize};

use super::shards::SHARDS;
use super::{Examined, Pool, Via};
use crate::chunk::Digest;

/// What a scrub found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubbed {
    /// Chunks that were checked and are sound.
    pub chunks: u64,
    /// Their plain bytes.
    pub bytes: u64,
    /// Chunks that were not what they should be: dropped, to be fetched again.
    pub damaged: u64,
    /// Chunks that the disk did not give back: dropped, to be fetched again.
    #[serde(default)]
    pub unreadable: u64,
}

impl Scrubbed {
    /// Adds what was found between `before` and `after`.
    pub fn add(&mut self, before: &Self, after: &Self) {
        self.chunks += after.chunks - before.chunks;
        self.bytes += after.bytes - before.bytes;
        self.damaged += after.damaged - before.damaged;
        self.unreadable += after.unreadable - before.unreadable;
    }
}

/// How far a scrub is. It holds nothing of the pool: whole days may pass between two steps.
#[derive(Debug, Default)]
pub struct Scrub {
    /// The next shard.
    shard: usize,
    /// What is left of the shard before it, as it was when it was its turn.
    left: Vec<Digest>,
    /// What was found so far.
    pub found: Scrubbed,
}

impl Pool {
    /// Checks the next chunk; false when there is none. What is damaged is dropped. Blocks for a read of the disk.
    pub fn scrub_step(&self, scrub: &mut Scrub) -> bool {
        while scrub.left.is_empty() {
            if scrub.shard == SHARDS {
                return false;
            }
            scrub.left = self.shards.digests(scrub.shard);
            scrub.shard += 1;
        }
        let Some(digest) = scrub.left.pop() else { return true };
        match self.examine_whole(&digest) {
            Examined::Sound(chunk) => {
                scrub.found.chunks += 1;
                scrub.found.bytes += chunk.bytes().len() as u64;
            }
            Examined::Damaged => scrub.found.damaged += 1,
            Examined::Unreadable => scrub.found.unreadable += 1,
            // Evicted meanwhile.
            Examined::Gone => {}
        }
        true
    }

    /// Reads a whole chunk from the medium, past what the system has cached of it, and checks it. What is damaged is
    /// dropped. Counts neither as a hit nor as a use.
    #[must_use]
    pub fn examine_whole(&self, digest: &Digest) -> Examined {
        loop {
            let Some(place) = self.shards.peek(digest) else { return Examined::Gone };
            match self.examine(digest, &place, Via::Medium) {
                // It was moved, or evicted and fetched again.
                Examined::Gone => {}
                examined => return examined,
            }
        }
    }

    /// Reads and checks every chunk. Blocks for as long as reading the whole pool takes, in steps of a chunk; `step`
    /// hears what was found so far, and ends the scrub by returning false.
    pub fn scrub(&self, mut step: impl FnMut(&Scrubbed) -> bool) -> Scrubbed {
        let mut scrub = Scrub::default();
        while self.scrub_step(&mut scrub) && step(&scrub.found) {}
        scrub.found
    }
}
