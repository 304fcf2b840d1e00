//! Tickets: where a chunk is, for those who read it again and again.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::record::ALIGN;
use super::shards::Place;

/// Where a chunk was found the last time. Who reads a chunk often keeps one for it, and gives it to
/// [`Pool::read_known`](super::Pool::read_known), which then needs neither the chunk's digest nor the pool's index.
///
/// It is right for ever or not at all: numbers of slabs and places in them are never used twice, and a place says itself
/// whether it is still its chunk's. So a ticket is never taken back.
///
/// From the top: number of the slab (24 bits), block in it (19), length of the chunk (21); 0 = no ticket.
#[derive(Debug, Default)]
pub struct Ticket(AtomicU64);

const BLOCK_BITS: u32 = 19;
const LEN_BITS: u32 = 21;
const SLAB_BITS: u32 = 64 - BLOCK_BITS - LEN_BITS;

/// What a ticket says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub slab: u32,
    pub block: u32,
    pub len: u32,
}

impl Ticket {
    pub(super) fn known(&self) -> Option<Known> {
        let word = self.0.load(Relaxed);
        let bits = |from: u32, count: u32| (word >> from) as u32 & ((1 << count) - 1);
        (word != 0).then(|| Known {
            slab: bits(LEN_BITS + BLOCK_BITS, SLAB_BITS),
            block: bits(LEN_BITS, BLOCK_BITS),
            len: bits(0, LEN_BITS),
        })
    }

    /// Notes the place of a chunk that is checked. What has no room in a ticket gets none.
    pub(super) fn note(&self, place: &Place) {
        self.set(&Known { slab: place.slab.number, block: place.block, len: place.len });
    }

    fn set(&self, &Known { slab, block, len }: &Known) {
        if slab >> SLAB_BITS == 0 && block >> BLOCK_BITS == 0 && len >> LEN_BITS == 0 {
            let word = u64::from(slab) << (LEN_BITS + BLOCK_BITS) | u64::from(block) << LEN_BITS | u64::from(len);
            self.0.store(word, Relaxed);
        }
    }
}

/// Most chunks of a [`Run`].
const RUN_MAX: usize = 16;

/// Pieces of chunks that lie one behind the other in a slab, by their tickets: they are read at once
/// ([`Pool::read_run`](super::Pool::read_run)).
#[derive(Debug, Default)]
pub struct Run {
    pub(super) slab: u32,
    /// First byte in the slab.
    pub(super) start: u64,
    len: usize,
    blocks: [u32; RUN_MAX],
    count: usize,
}

impl Run {
    /// Adds `len` bytes from `skip` on of the ticket's chunk. False, and nothing is added, when they don't follow what the
    /// run has.
    pub fn extend(&mut self, ticket: &Ticket, skip: u32, len: u32) -> bool {
        let Some(known) = ticket.known() else { return false };
        let start = u64::from(known.block) * ALIGN + u64::from(skip);
        let follows = self.count == 0 || (known.slab == self.slab && start == self.start + self.len as u64);
        if !follows || u64::from(skip) + u64::from(len) > u64::from(known.len) {
            return false;
        }
        let Some(block) = self.blocks.get_mut(self.count) else { return false };
        *block = known.block;
        if self.count == 0 {
            (self.slab, self.start) = (known.slab, start);
        }
        self.len += len as usize;
        self.count += 1;
        true
    }

    /// The chunks' places.
    pub(super) fn blocks(&self) -> &[u32] {
        self.blocks.get(..self.count).unwrap_or_default()
    }

    /// Whether nothing was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::CHUNK_MAX;
    use crate::pool::slab::SLAB_MAX;

    #[test]
    fn a_ticket_says_what_was_noted_or_nothing() {
        let last = (SLAB_MAX / ALIGN) as u32 - 1;
        let ticket = Ticket::default();
        assert_eq!(ticket.known(), None);
        for (slab, block, len) in [(0, 2, 1), (7, last, CHUNK_MAX), ((1 << SLAB_BITS) - 1, 1, 4096)] {
            ticket.set(&Known { slab, block, len });
            assert_eq!(ticket.known(), Some(Known { slab, block, len }));
        }
        for (slab, block, len) in [(1 << SLAB_BITS, 0, 1), (u32::MAX, 0, 1), (0, last + 1, 1), (0, 0, 1 << LEN_BITS)] {
            let ticket = Ticket::default();
            ticket.set(&Known { slab, block, len });
            assert_eq!(ticket.known(), None, "{slab} {block} {len}");
        }
    }

    #[test]
    fn a_run_is_of_neighbours_in_one_slab() {
        let ticket = |slab, block, len| {
            let ticket = Ticket::default();
            ticket.set(&Known { slab, block, len });
            ticket
        };
        let mut run = Run::default();
        assert!(!run.extend(&Ticket::default(), 0, 1) && run.is_empty());
        assert!(!run.extend(&ticket(1, 4, 8192), 4096, 4097), "more than the chunk has");
        assert!(run.extend(&ticket(1, 4, 8192), 4096, 4096));
        assert!(!run.extend(&ticket(2, 6, 4096), 0, 4096), "another slab");
        assert!(!run.extend(&ticket(1, 7, 4096), 0, 4096), "not behind it");
        assert!(!run.extend(&ticket(1, 6, 8192), 4096, 4096), "not from its start");
        assert!(run.extend(&ticket(1, 6, 4096), 0, 4096));
        assert_eq!((run.start, run.len(), run.blocks()), (5 * ALIGN, 8192, [4, 6].as_slice()));
        for block in 7..21 {
            assert!(run.extend(&ticket(1, block, 4096), 0, 4096));
        }
        assert!(!run.extend(&ticket(1, 21, 4096), 0, 4096), "no room");
    }
}
