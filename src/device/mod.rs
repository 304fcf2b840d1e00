//! Devices: what a disk is.
//!
//! A transport asks [`Device::read_local`] first, on its own thread: that answers from local data or zeros and never
//! waits for the network. What it can't answer goes to [`Device::read_at`], which may wait. Writes are alike; what makes
//! them durable, and zeros, may take the disk's time and are futures only.

mod counts;
mod image;
mod overlay;
mod touch;
pub mod upper;
mod waits;

use std::future::Future;
use std::pin::Pin;

pub use image::{ImageDevice, ReadCounts};
pub use overlay::Overlay;
pub use waits::Wait;

use crate::error::{Error, Result};

/// A future that a device returns; it may be moved between threads.
pub type DeviceFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// Whether a read could be answered from what is local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Local {
    /// The whole buffer was filled.
    Done,
    /// Something is missing; the buffer's content is undefined.
    Missing,
}

/// Where the bytes of a device range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residence {
    /// Nowhere: the range reads as zeros and costs nothing.
    Zero,
    /// On this node.
    Local,
    /// At the source only.
    Remote,
}

/// Adds a run to those of a device range; one that is like the last makes that longer.
fn add_run(runs: &mut Vec<(u64, Residence)>, len: u64, residence: Residence) {
    match runs.last_mut() {
        Some((run, last)) if *last == residence => *run += len,
        _ => runs.push((len, residence)),
    }
}

/// What may be done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads only.
    ReadOnly,
    /// Writes as well.
    ReadWrite,
}

/// How a range is made zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Its user needs it no more: whole blocks become zeros, parts of blocks stay as they are.
    Discard,
    /// It reads as zeros, and its room is given back.
    Hole,
    /// It reads as zeros, and later writes need no more room than they would have.
    Allocated,
}

/// A logical disk. All offsets and lengths are in bytes; any alignment is served.
///
/// Implemented by the image (map and pool) and by an overlay of an upper over it.
pub trait Device: Send + Sync {
    /// Size of the device in bytes, a multiple of 4096.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset` if everything is local or zero, without waiting for a source. Costs no more than the
    /// reads of local files.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is not inside the device.
    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local>;

    /// Fills `buf` from `offset`, fetching what is missing.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is not inside the device, or the error of the fetch; `buf` is then undefined.
    fn read_at<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> DeviceFuture<'a, ()>;

    /// Where `len` bytes from `offset` are: runs with their lengths in bytes, in order, adding up to `len`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is not inside the device.
    fn residence(&self, offset: u64, len: u64) -> Result<Vec<(u64, Residence)>>;

    /// What may be done with it.
    fn access(&self) -> Access {
        Access::ReadOnly
    }

    /// Writes `data` at `offset` if that needs no source; [`Local::Missing`]: nothing was written. Costs no more than the
    /// writes of local files.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is not inside the device, EROFS of a device that can't be written, ENOSPC, or
    /// what else the system says; the range's bytes are then old or new.
    fn write_local(&self, offset: u64, data: &[u8]) -> Result<Local> {
        let _ = (offset, data);
        Err(read_only())
    }

    /// Writes `data` at `offset`, fetching what is missing. It is durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// As of [`write_local`](Self::write_local), or the error of the fetch.
    fn write_at<'a>(&'a self, offset: u64, data: &'a [u8]) -> DeviceFuture<'a, ()> {
        let _ = (offset, data);
        Box::pin(async { Err(read_only()) })
    }

    /// Makes `len` bytes from `offset` zeros. It is durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// As of [`write_at`](Self::write_at).
    fn zero(&self, offset: u64, len: u64, how: Zeroing) -> DeviceFuture<'_, ()> {
        let _ = (offset, len, how);
        Box::pin(async { Err(read_only()) })
    }

    /// Makes all writes durable that were answered before. To be awaited on a tokio runtime.
    ///
    /// # Errors
    /// What the system says; the writes must then be taken for lost.
    fn flush(&self) -> DeviceFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// The error of whoever writes to a device that can't be written.
fn read_only() -> Error {
    Error::io("write to a read-only device", std::io::ErrorKind::ReadOnlyFilesystem.into())
}

/// Checks that `len` bytes from `offset` are inside a device of `size` bytes.
///
/// # Errors
/// [`Error::Invalid`] that names the range and the size.
pub fn check_range(size: u64, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::invalid("range", format!("{len} bytes from {offset} are not inside a device of {size} bytes"))),
    }
}
