//! The file system on a writable device that is larger than its image is grown to the device's size when it is attached.

use std::collections::HashSet;

use tokio::runtime::Handle;

use crate::device::{Device, Overlay};
use crate::error::{Error, Result};
use crate::ext4::{BLOCK_SIZE, Growth, grow as plan};

/// Grows the file system on `device`, which nobody uses yet, over a lower of so many bytes. What it takes is a block or two in the upper
/// for each 16 GiB. Returns why the file system stays as it is, if somebody may wonder. Blocks.
///
/// # Errors
/// What reading and writing the device says. It may be tried again: the superblock is written last.
pub(super) fn grow(device: &Overlay, lower_bytes: u64, runtime: &Handle) -> Result<Option<String>> {
    if device.size() <= lower_bytes {
        return Ok(None);
    }
    let mut read =
        |block: u32, buf: &mut [u8]| runtime.block_on(device.read_at(u64::from(block) * BLOCK_SIZE as u64, buf));
    let blocks = match plan(device.size(), &mut read) {
        Ok(Growth::Grows(blocks)) => blocks,
        Ok(Growth::Fits) => return Ok(None),
        Ok(Growth::Stays(obstacle)) => return Ok(Some(stays(&obstacle.to_string()))),
        Err(error @ Error::Invalid { .. }) => return Ok(Some(stays(&error.to_string()))),
        Err(error) => return Err(error),
    };
    let planned: HashSet<u64> = blocks.first.iter().map(|(at, _)| u64::from(*at)).collect();
    let behind = device.upper().changed().flat_map(|run| run.start.max(blocks.before.into())..run.end);
    // Tables that are never written would begin with it.
    if behind.into_iter().any(|block| !planned.contains(&block)) {
        return Ok(Some(stays("something was written behind its end")));
    }
    let write = |at: u32, bytes: &[u8]| runtime.block_on(device.write_at(u64::from(at) * BLOCK_SIZE as u64, bytes));
    for (at, bytes) in &blocks.first {
        write(*at, bytes)?;
    }
    runtime.block_on(device.flush())?;
    write(0, &blocks.superblock[..])?;
    runtime.block_on(device.flush())?;
    tracing::info!("the file system was grown to {} bytes", u64::from(blocks.size) * BLOCK_SIZE as u64);
    Ok(None)
}

fn stays(reason: &str) -> String {
    format!("the file system keeps its size, the device is larger: {reason}")
}
