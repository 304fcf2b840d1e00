//! The file system on a device whose upper is kept gets a journal when it is attached, so that it is whole after a loss of power.

use tokio::runtime::Handle;

use crate::device::{Device, Overlay, Residence, Zeroing};
use crate::error::{Error, Result};
use crate::ext4::{Addition, BLOCK_SIZE, Obstacle, add_journal};

/// Gives a journal to the file system on `device`, which nobody uses yet, if it is one of firstread's and has none. What it takes is a few
/// blocks in the upper. Returns why there is none, if somebody may wonder. Blocks.
///
/// # Errors
/// What reading and writing the device says. It may be tried again: see [`add_journal`].
pub fn add(device: &Overlay, runtime: &Handle) -> Result<Option<String>> {
    let offset = |block: u32| u64::from(block) * BLOCK_SIZE as u64;
    let mut read = |block: u32, buf: &mut [u8]| runtime.block_on(device.read_at(offset(block), buf));
    let journal = match add_journal(&mut read) {
        Ok(Addition::Adds(journal)) => journal,
        Ok(Addition::There | Addition::NoRoom | Addition::Stays(Obstacle::Foreign)) => return Ok(None),
        Ok(Addition::Stays(obstacle)) => return Ok(Some(none(&obstacle.to_string()))),
        Err(error @ Error::Invalid { .. }) => return Ok(Some(none(&error.to_string()))),
        Err(error) => return Err(error),
    };
    for run in &journal.place {
        let (mut at, end) = (offset(run.start), offset(run.end));
        for (len, residence) in device.residence(at, end - at)? {
            // Nothing of it is to be taken for the journal's; most of it was never written, and need not be.
            if residence != Residence::Zero {
                runtime.block_on(device.zero(at, len, Zeroing::Hole))?;
            }
            at += len;
        }
    }
    let write = |(at, bytes): &(u32, [u8; BLOCK_SIZE])| runtime.block_on(device.write_at(offset(*at), bytes));
    for blocks in [&journal.first, &journal.then] {
        blocks.iter().try_for_each(write)?;
        runtime.block_on(device.flush())?;
    }
    write(&(0, *journal.superblock))?;
    runtime.block_on(device.flush())?;
    tracing::info!("the file system has a journal of {} bytes now", journal.bytes());
    Ok(None)
}

fn none(reason: &str) -> String {
    format!("the file system gets no journal: {reason}")
}
