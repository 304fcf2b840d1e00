//! Overtaking: what a reader waits for, and what comes late in a start-up stream, gets a request of its own.
//!
//! A start that goes another way than the recorded one soon needs something from the stream's end: to wait for that is to
//! wait for the whole stream. The stream's bytes of such a chunk come as well and are passed over, so that what overtakes
//! is bounded to a share of the stream.

use std::collections::VecDeque;
use std::time::Duration;

use super::queue::Want;
use super::speed::Speed;

/// What comes within this time is waited for: a request takes a round trip, and shares the link with the stream.
const SOON: Duration = Duration::from_millis(150);
/// What is as near as this is waited for at any speed.
const NEAR: u64 = 128 << 10;
/// Of the stream's bytes, at most one in so many comes twice.
const ONE_IN: u64 = 8;

/// What of one stream has been overtaken.
pub(super) struct Overtaking {
    /// Stored bytes that still may.
    left: u64,
}

impl Overtaking {
    /// Nothing yet, of a stream of so many bytes.
    pub(super) fn of(stream: u64) -> Self {
        Self { left: stream / ONE_IN }
    }

    /// How many bytes of a stream come soon, of which `bytes` came in `time` behind its first piece. All of them while that
    /// does not tell.
    pub(super) fn reach(bytes: u64, time: Duration) -> u64 {
        let speed = Speed::default();
        speed.came(bytes, time);
        speed.bytes_in(SOON).max(NEAR)
    }

    /// Takes those out of `wants`, ascending in offset, that a reader waits for and that begin behind the byte `near`.
    pub(super) fn take(&mut self, wants: &mut VecDeque<Want>, near: u64) -> Vec<Want> {
        let mut late = wants.partition_point(|want| want.chunk.offset <= near);
        let mut taken = Vec::new();
        while let Some(want) = wants.get(late) {
            let bytes = u64::from(want.chunk.stored_len);
            if !want.ticket.urgent() || bytes > self.left {
                late += 1;
            } else if let Some(want) = wants.remove(late) {
                self.left -= bytes;
                taken.push(want);
            }
        }
        taken
    }
}
