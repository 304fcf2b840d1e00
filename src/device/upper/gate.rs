//! The gate that writes go through, and that is closed while an upper is copied.
//!
//! Who writes is inside for the time of one write to a file; who closes the gate waits for those, and keeps others out.
//! So a copy shows a moment: all that was answered before, and of what was in flight any part, as after a loss of power.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(super) struct Gate {
    inside: RwLock<()>,
    closed: AtomicBool,
    opened: Notify,
}

/// A write is on its way until this is dropped.
pub(super) struct Inside<'a>(#[allow(dead_code)] RwLockReadGuard<'a, ()>);

/// Nobody writes until this is dropped.
pub(super) struct Closed<'a> {
    gate: &'a Gate,
    alone: Option<RwLockWriteGuard<'a, ()>>,
}

impl Gate {
    /// Goes in; blocks while the gate is closed.
    pub fn enter(&self) -> Inside<'_> {
        Inside(self.inside.read())
    }

    /// Closes the gate, as soon as all have left.
    pub fn close(&self) -> Closed<'_> {
        self.closed.store(true, Ordering::SeqCst);
        let alone = Some(self.inside.write());
        // Whoever had closed it before has said meanwhile that it is open.
        self.closed.store(true, Ordering::SeqCst);
        Closed { gate: self, alone }
    }

    /// Whether it is closed, or about to be: for who must not block.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Waits until it is open.
    pub async fn opened(&self) {
        while self.is_closed() {
            let mut opened = std::pin::pin!(self.opened.notified());
            // From here on no opening is missed.
            opened.as_mut().enable();
            if self.is_closed() {
                opened.await;
            }
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.closed.store(false, Ordering::SeqCst);
        self.alone = None;
        self.gate.opened.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn who_comes_while_it_is_closed_waits() {
        let gate = Arc::new(Gate::default());
        drop(gate.enter());
        let closed = gate.close();
        assert!(gate.is_closed());
        let waiting = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.opened().await }
        });
        let writing = tokio::task::spawn_blocking({
            let gate = Arc::clone(&gate);
            move || drop(gate.enter())
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished() && !writing.is_finished());
        drop(closed);
        waiting.await.unwrap();
        writing.await.unwrap();
        gate.opened().await;
    }
}
