//! The upper: what was written to a device, over an image that never changes.
//!
//! A directory with four files: `header` (which lower it belongs to, how large it is), `data` (a sparse file of the
//! device's size: block N is at N × 4096), `map` (a bit a block: the block is in `data`), `live` (a byte a block: the same,
//! for a process that is killed). A block that is not in the map is the lower's. A block of zeros that was discarded or
//! zeroed is in the map, and a hole in `data`.
//!
//! # What is there after a crash
//!
//! A write is first in `data`, then in `live`, then in memory, and then it is answered. [`Upper::flush`] makes `data`
//! durable, then writes and syncs those bits of `map` that were set before that sync began, and then is answered. So:
//!
//! - *The machine loses power.* `live` names another start of the machine and is not looked at. Every bit in `map` was
//!   written after the block's data were durable: a bit that is there means data that are there. What was flushed is there.
//!   A block that was first written since the last flush is the lower's or the written one, whole, since its bit is in one
//!   sector of `map` and a medium tears at sectors only. A block that was in the map and is overwritten in place is as the
//!   medium leaves it: old or new by sectors of 512 bytes, as on any disk. Bits are only ever set, and each sector of `map`
//!   has a checksum of its own, so that any mix of old and new sectors is a map.
//! - *This process is killed.* What it gave to the system is there, and `live` says which blocks that are: every write that
//!   was answered is there, flushed or not. The block layer above counts on that, since for it nothing has happened.
//! - *The upper is being made, or made larger.* Its files are durable before the header that names their size is put in
//!   place with a rename. Without a header nothing was ever answered, and it is made anew.
//!
//! When the system says that a sync of `data` failed, it has dropped what it could not write, and a later sync would not say
//! so again: from then on every write and flush fails until the upper is opened again. A disk that is full fails the write,
//! nothing else.
//!
//! # Order of writes
//!
//! Blocks that are in the map are written in place, without any order of ours: who writes the same bytes at the same time gets
//! either. Whoever writes a block for the first time claims it meanwhile ([`Claims`]), since a part of it is completed from
//! the lower, and must not undo what somebody else wrote beside it.
//!
//! Memory: 16 bytes for each 15.75 MiB of the device, and 0.5 KiB for each of these parts that was written to.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::device::{Zeroing, check_range};
use crate::error::{Error, Result};
use crate::index::BLOCK;
use crate::media::Media;

mod claims;
mod copy;
mod directory;
mod flusher;
mod gate;
mod header;
mod live;
mod map;
mod open;

pub use claims::{Claim, Claims};
pub use directory::{describe, directory, discard, remove};
use flusher::Flusher;
use gate::Gate;
pub use header::LowerIdentity;
use live::Live;
pub use live::boot;
use map::BlockMap;

const DATA: &str = "data";
const MAP: &str = "map";

/// Bytes of a block as the offsets count.
const BLOCK_BYTES: u64 = BLOCK as u64;
/// Zeros that are written at a time where holes are not possible or not wanted.
const ZEROS: usize = 1 << 20;

/// How long an upper is to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// What is flushed survives a loss of power.
    Kept,
    /// It lasts as long as the machine runs, as the device does: a flush costs nothing.
    Private,
}

/// How an upper is opened.
#[derive(Clone, Debug)]
pub struct UpperOptions {
    /// Size of the device in bytes, at least the lower's; rounded up to blocks. `None`: as it is, or the lower's.
    pub size: Option<u64>,
    /// How long it is to last.
    pub durability: Durability,
    /// What tells this start of the machine from others.
    pub boot: String,
}

/// An upper that is open. Whoever has it open is the only one.
pub struct Upper {
    name: String,
    size: u64,
    lower: LowerIdentity,
    durability: Durability,
    data: Box<dyn Media>,
    map_file: Box<dyn Media>,
    live: Live,
    map: BlockMap,
    claims: Arc<Claims>,
    gate: Gate,
    flusher: Flusher,
    /// Why `data` can't be trusted any more.
    failed: OnceLock<Error>,
    /// The directory, locked. `None` in tests, and once it was closed.
    lock: Mutex<Option<File>>,
}

impl std::fmt::Debug for Upper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upper").field("name", &self.name).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Upper {
    /// Size of the device in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What it lies over.
    #[must_use]
    pub fn lower(&self) -> &LowerIdentity {
        &self.lower
    }

    /// Whoever writes a block for the first time claims it here.
    #[must_use]
    pub fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }

    /// Whether it is being copied: a write would block meanwhile.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.gate.is_closed()
    }

    /// Waits until nobody copies it.
    pub async fn released(&self) {
        self.gate.opened().await;
    }

    /// Whether block `start` is in the upper, and how many blocks from there on, before `end`, are alike.
    #[must_use]
    pub fn run(&self, start: u64, end: u64) -> (bool, u64) {
        self.map.run(start, end)
    }

    /// Whether all of these blocks are in the upper.
    #[must_use]
    pub fn has(&self, blocks: &Range<u64>) -> bool {
        blocks.start >= blocks.end || self.run(blocks.start, blocks.end) == (true, blocks.end - blocks.start)
    }

    /// The blocks that are in the upper, as runs in order.
    pub fn changed(&self) -> impl Iterator<Item = Range<u64>> {
        let end = self.size / BLOCK_BYTES;
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < end {
                let (start, (changed, len)) = (at, self.run(at, end));
                at += len;
                if changed {
                    return Some(start..at);
                }
            }
            None
        })
    }

    /// Reads what is in the upper: all of the range's blocks must be.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        self.data.read(offset, buf).map_err(|error| self.error("read", error))
    }

    /// Writes to `data` alone: over blocks that are in the upper, or over whole ones that are claimed and that
    /// [`add`](Self::add) is called for afterwards.
    ///
    /// # Errors
    /// What the system says; part of the range may then be written.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check()?;
        check_range(self.size, offset, bytes.len() as u64)?;
        let _inside = self.gate.enter();
        self.data.write(offset, bytes).map_err(|error| self.error("write to", error))
    }

    /// Makes whole blocks zeros, as [`write`](Self::write) does.
    ///
    /// # Errors
    /// What the system says; part of the range may then be zeros.
    pub fn zero(&self, blocks: &Range<u64>, how: Zeroing) -> Result<()> {
        self.check()?;
        let (mut offset, len) = (blocks.start * BLOCK_BYTES, (blocks.end - blocks.start) * BLOCK_BYTES);
        check_range(self.size, offset, len)?;
        let _inside = self.gate.enter();
        if how != Zeroing::Allocated {
            match self.data.punch(offset, len) {
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => {}
                punched => return punched.map_err(|error| self.error("discard in", error)),
            }
        }
        let zeros = vec![0; ZEROS.min(len as usize)];
        let end = offset + len;
        while offset < end {
            let part = zeros.get(..(end - offset).min(ZEROS as u64) as usize).unwrap_or_default();
            self.data.write(offset, part).map_err(|error| self.error("write to", error))?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Takes blocks into the upper, whose data were written whole under `claim`.
    ///
    /// # Errors
    /// What the system says; the blocks are then the lower's as before.
    pub fn add(&self, claim: &Claim, blocks: &Range<u64>) -> Result<()> {
        debug_assert!(claim.covers(blocks));
        self.live.add(blocks).map_err(|error| self.error("write to", error))?;
        self.map.set(blocks);
        Ok(())
    }

    /// Makes everything durable that was answered before. Blocks, for as long as the disk takes; several at a time share
    /// one sync.
    ///
    /// # Errors
    /// What the system says. What could not be written to the map is tried again with the next flush; a failed sync of the
    /// data is for good.
    pub fn flush(&self) -> Result<()> {
        self.check()?;
        match self.durability {
            Durability::Private => Ok(()),
            Durability::Kept => self.flusher.flush(|| self.sync()),
        }
    }

    /// As [`flush`](Self::flush), for those who may not block: one thread of the runtime does for all of them.
    ///
    /// # Errors
    /// As of [`flush`](Self::flush).
    pub async fn flush_soon(self: &Arc<Self>) -> Result<()> {
        self.check()?;
        match self.durability {
            Durability::Private => Ok(()),
            Durability::Kept => {
                let start = |round| {
                    let upper = Arc::clone(self);
                    drop(tokio::task::spawn_blocking(move || upper.flusher.end(round, upper.sync())));
                };
                self.flusher.flush_soon(start).await
            }
        }
    }

    /// Flushes, and gives the directory to whoever wants it next. What is written from now on fails.
    ///
    /// # Errors
    /// As of [`flush`](Self::flush); it is closed all the same.
    pub fn close(&self) -> Result<()> {
        let flushed = self.flush();
        // Whatever is the first reason.
        let _ = self.failed.set(Error::Stopping("the device".to_owned()));
        *self.lock.lock() = None;
        flushed
    }

    fn sync(&self) -> Result<()> {
        self.check()?;
        // Only bits whose data were written before the sync of the data begins.
        let snapshot = self.map.take_dirty();
        let data = self.data.sync().map_err(|error| self.error("sync", error));
        let synced = data.inspect_err(|error| drop(self.failed.set(error.clone()))).and_then(|()| {
            if snapshot.is_empty() {
                return Ok(());
            }
            let written = snapshot.write(self.map_file.as_ref()).and_then(|()| self.map_file.sync());
            written.map_err(|error| self.error("write the map of", error))
        });
        if synced.is_err() {
            self.map.put_back(&snapshot);
        }
        synced
    }

    fn check(&self) -> Result<()> {
        match self.failed.get() {
            None => Ok(()),
            Some(error) => {
                let action = format!("write to the upper {} after it failed ({error}); attach it anew", self.name);
                Err(Error::io(action, io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())))
            }
        }
    }

    fn error(&self, what: &str, error: io::Error) -> Error {
        Error::io(format!("{what} the upper {}", self.name), error)
    }
}

#[cfg(test)]
mod tests;
