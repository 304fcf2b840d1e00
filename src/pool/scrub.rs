//! Scrubbing: every chunk is read and checked, whether somebody wants it or not.

use serde::{Deserialize, Serialize};

use super::Pool;

/// What a scrub found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubbed {
    /// Chunks that were checked and are sound.
    pub chunks: u64,
    /// Their plain bytes.
    pub bytes: u64,
    /// Chunks that were not what they should be: dropped, to be fetched again when they are wanted.
    pub damaged: u64,
}

impl Pool {
    /// Reads and checks every chunk. What is damaged is dropped. Blocks for as long as reading the whole pool takes,
    /// in steps of a chunk; `step` hears what was found so far, and ends the scrub by returning false.
    pub fn scrub(&self, mut step: impl FnMut(&Scrubbed) -> bool) -> Scrubbed {
        let (mut found, before) = (Scrubbed::default(), self.stat().quarantined);
        for record in self.shards.records() {
            // What was evicted or moved meanwhile need not be checked here.
            let Some(place) = self.shards.peek(&record.digest) else { continue };
            if self.check(&record.digest, &place).is_some() {
                found.chunks += 1;
                found.bytes += u64::from(record.len);
            }
            found.damaged = self.stat().quarantined.saturating_sub(before);
            if !step(&found) {
                break;
            }
        }
        found
    }
}
