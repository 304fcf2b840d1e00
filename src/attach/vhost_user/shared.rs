//! What a queue's thread shares with those who stop it and with the tasks that work for it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use crate::error::Result;

/// Whether a thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stop {
    /// It does.
    No,
    /// It answers what it has taken, and ends.
    Orderly,
    /// It ends: nobody looks at its answers any more.
    AtOnce,
}

/// What the thread shares with others.
#[derive(Debug)]
pub struct Shared {
    pub(super) wake: OwnedFd,
    stop: AtomicU8,
    pub(super) finished: Mutex<Vec<Finished>>,
    /// How the guest is told of answers; the front-end may change it at any time.
    pub(super) call: Arc<Mutex<Option<File>>>,
}

impl Shared {
    pub(super) fn new(call: Arc<Mutex<Option<File>>>) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { wake, stop: AtomicU8::new(Stop::No as u8), finished: Mutex::default(), call })
    }

    /// Makes the thread end.
    pub fn stop(&self, how: Stop) {
        self.stop.fetch_max(how as u8, Ordering::SeqCst);
        self.wake();
    }

    pub(super) fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed) != Stop::No as u8
    }

    pub(super) fn stops_at_once(&self) -> bool {
        self.stop.load(Ordering::Relaxed) == Stop::AtOnce as u8
    }

    fn wake(&self) {
        // It fails only when it is full, and then the thread wakes up anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    pub(super) fn finish(&self, finished: Finished) {
        self.finished.lock().push(finished);
        self.wake();
    }
}

/// A miss that has ended.
#[derive(Debug)]
pub(super) struct Finished {
    /// Which of the thread's misses.
    pub number: u64,
    pub data: Result<Vec<u8>>,
}
