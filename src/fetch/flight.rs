//! Flights: one fetch of a chunk, and everybody who waits for it.
//!
//! A flight exists from the first request for a chunk until the chunk is in the pool (or its fetch failed): whoever asks
//! in between joins it. The flight belongs to the origin that started it; a waiter from another origin leaves it as soon
//! as it is in trouble and starts one of its own, since its own sources may well be reachable.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::Priority;
use crate::chunk::{Digest, Verified};
use crate::error::{Error, Result};

/// Identity of an origin while any of its flights exists: its address.
pub(super) type OriginId = usize;

/// What a flight has come to.
#[derive(Clone)]
pub(super) enum Progress {
    /// It is under way.
    Pending,
    /// Its sources can't be reached at the moment.
    Troubled,
    /// It has ended.
    Done(Result<Arc<Verified>>),
}

/// Who shares a flight.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sharing {
    /// Everybody.
    All,
    /// The readers of one origin, after a shared flight of another one was in trouble.
    Origin(OriginId),
}

type Key = (Digest, Sharing);

struct Entry {
    progress: watch::Receiver<Progress>,
    origin: OriginId,
    /// Of whoever started it.
    priority: Priority,
    urgent: Arc<AtomicBool>,
}

/// All flights of a fetcher.
#[derive(Default)]
pub(super) struct Flights {
    entries: Mutex<HashMap<Key, Entry>>,
}

/// The outcome of [`Flights::join`].
pub(super) enum Joined {
    /// Nobody fetches the chunk: the holder of the ticket must.
    First(Ticket, watch::Receiver<Progress>),
    /// Somebody does.
    Shared {
        progress: watch::Receiver<Progress>,
        /// Whether it is fetched from the origin that asked.
        same_origin: bool,
        /// Of whoever asked first.
        first: Priority,
    },
}

impl Flights {
    /// Joins the flight for `digest`, or starts one.
    pub(super) fn join(
        self: &Arc<Self>,
        digest: Digest,
        sharing: Sharing,
        origin: OriginId,
        priority: Priority,
    ) -> Joined {
        let mut entries = self.entries.lock();
        let key = (digest, sharing);
        let demanded = priority == Priority::Demand;
        if let Some(entry) = entries.get(&key) {
            if demanded {
                entry.urgent.store(true, Ordering::Relaxed);
            }
            let (progress, first) = (entry.progress.clone(), entry.priority);
            return Joined::Shared { progress, same_origin: entry.origin == origin, first };
        }
        let (sender, receiver) = watch::channel(Progress::Pending);
        let urgent = Arc::new(AtomicBool::new(demanded));
        entries.insert(key, Entry { progress: receiver.clone(), origin, priority, urgent: Arc::clone(&urgent) });
        Joined::First(Ticket { key, sender, flights: Arc::clone(self), listed: true, urgent }, receiver)
    }
}

impl Flights {
    /// What becomes of the flight for `digest` that everybody shares, if there is one. Nobody asks for anything by that, but the
    /// flight counts as waited for.
    pub(super) fn look(&self, digest: Digest) -> Option<watch::Receiver<Progress>> {
        self.entries.lock().get(&(digest, Sharing::All)).map(|entry| entry.progress.clone())
    }
}

/// The duty to end a flight. Dropped without a result, it ends the flight with an error: waiters never hang.
pub(super) struct Ticket {
    key: Key,
    sender: watch::Sender<Progress>,
    flights: Arc<Flights>,
    /// Whether the flight can be joined.
    listed: bool,
    /// Whether a reader waits for it, or did.
    urgent: Arc<AtomicBool>,
}

impl Ticket {
    /// Hands the result to everybody who waits. The flight can be joined until the ticket is dropped.
    pub(super) fn deliver(&self, result: Result<Arc<Verified>>) {
        self.sender.send_replace(Progress::Done(result));
    }

    /// Whether somebody waits.
    pub(super) fn is_waited_for(&self) -> bool {
        // The entry's own receiver is one.
        self.sender.receiver_count() > 1
    }

    /// Whether a reader waits for it, or did.
    pub(super) fn urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }

    /// Closes the flight if nobody waits for it; says so.
    pub(super) fn close_if_unwaited(&mut self) -> bool {
        let mut entries = self.flights.entries.lock();
        // The entry's own receiver is one; nobody joins while the lock is held.
        if self.sender.receiver_count() > 1 {
            return false;
        }
        entries.remove(&self.key);
        drop(entries);
        self.listed = false;
        true
    }

    /// Tells waiters from other origins to look elsewhere.
    pub(super) fn troubled(&self) {
        self.sender.send_if_modified(|progress| {
            let pending = matches!(progress, Progress::Pending);
            if pending {
                *progress = Progress::Troubled;
            }
            pending
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.listed {
            self.flights.entries.lock().remove(&self.key);
        }
        self.sender.send_if_modified(|progress| {
            let ended = matches!(progress, Progress::Done(_));
            if !ended {
                *progress = Progress::Done(Err(Error::Stopping("fetching".to_owned())));
            }
            !ended
        });
    }
}
