//! Claims: who is writing blocks for the first time.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// The claims of an upper: as many as there are writes in flight.
#[derive(Debug, Default)]
pub struct Claims {
    held: Mutex<Vec<Range<u64>>>,
    released: Notify,
}

impl Claims {
    /// Claims blocks, unless somebody has one of them.
    #[must_use]
    pub fn try_take(self: &Arc<Self>, blocks: Range<u64>) -> Option<Claim> {
        let mut held = self.held.lock();
        if held.iter().any(|other| other.start < blocks.end && blocks.start < other.end) {
            return None;
        }
        held.push(blocks.clone());
        Some(Claim { claims: Arc::clone(self), blocks })
    }

    /// Claims blocks as soon as nobody has one of them.
    pub async fn take(self: &Arc<Self>, blocks: Range<u64>) -> Claim {
        loop {
            let mut released = std::pin::pin!(self.released.notified());
            // From here on no release is missed.
            released.as_mut().enable();
            if let Some(claim) = self.try_take(blocks.clone()) {
                return claim;
            }
            released.await;
        }
    }
}

/// Blocks that are claimed until this is dropped.
#[derive(Debug)]
pub struct Claim {
    claims: Arc<Claims>,
    blocks: Range<u64>,
}

impl Claim {
    /// Whether all of these blocks are claimed.
    #[must_use]
    pub fn covers(&self, blocks: &Range<u64>) -> bool {
        self.blocks.start <= blocks.start && blocks.end <= self.blocks.end
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut held = self.claims.held.lock();
        if let Some(place) = held.iter().position(|other| *other == self.blocks) {
            held.swap_remove(place);
        }
        drop(held);
        self.claims.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_claim_waits_for_those_that_it_meets() {
        let claims = Arc::new(Claims::default());
        let first = claims.try_take(3..7).unwrap();
        assert!(first.covers(&(4..7)) && !first.covers(&(4..8)));
        for blocks in [0..4, 6..9, 4..5, 0..9] {
            assert!(claims.try_take(blocks).is_none());
        }
        let beside = claims.try_take(7..9).unwrap();
        let waiting = tokio::spawn({
            let claims = Arc::clone(&claims);
            async move { claims.take(5..8).await }
        });
        drop(beside);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        drop(first);
        let claim = waiting.await.unwrap();
        assert!(claims.try_take(7..8).is_none());
        drop(claim);
        assert!(claims.try_take(0..9).is_some());
    }
}
