//! Devices: what a disk is.
//!
//! A transport asks [`Device::read_local`] first, on its own thread: that answers from local data or zeros and never
//! waits for the network. What it can't answer goes to [`Device::read_at`], which may wait.

mod image;
mod touch;
mod waits;

use std::future::Future;
use std::pin::Pin;

pub use image::{ImageDevice, ReadCounts};
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
