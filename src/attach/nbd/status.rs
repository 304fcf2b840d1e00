//! Block status: a device's residence in the form of the protocol.

use super::negotiate::Context;
use super::proto::Extent;
use crate::device::{Device, Residence};
use crate::error::Result;

/// Runs in one reply; a client asks again for what comes after them.
const RUNS_MAX: usize = 1024;
/// Bytes of a device that are looked up at a time, which bounds what one request can make the device list.
const WINDOW: u64 = 64 << 20;

/// Flags of `base:allocation` for a range that is not stored and reads as zeros (`NBD_STATE_HOLE | NBD_STATE_ZERO`).
const HOLE_AND_ZERO: u32 = 1 | 2;
/// Flag of `firstread:local`: reading needs the source.
const REMOTE: u32 = 1;

/// How many extents a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// The first only (`NBD_CMD_FLAG_REQ_ONE`).
    One,
    /// As many as fit.
    Many,
}

/// The runs from `offset` on: at least one, at most [`RUNS_MAX`], within `len` bytes.
///
/// # Errors
/// What the device says.
pub fn runs(device: &dyn Device, offset: u64, len: u32) -> Result<Vec<(u64, Residence)>> {
    let mut runs: Vec<(u64, Residence)> = Vec::new();
    let (mut offset, mut rest) = (offset, u64::from(len));
    while rest > 0 && runs.len() <= RUNS_MAX {
        let window = rest.min(WINDOW);
        for (len, residence) in device.residence(offset, window)? {
            match runs.last_mut() {
                Some(last) if last.1 == residence => last.0 += len,
                _ => runs.push((len, residence)),
            }
        }
        offset += window;
        rest -= window;
    }
    runs.truncate(RUNS_MAX);
    Ok(runs)
}

/// What `context` says of `runs`.
#[must_use]
pub fn extents(context: Context, runs: &[(u64, Residence)], amount: Amount) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (len, residence) in runs {
        let flags = match (context, residence) {
            (Context::Allocation, Residence::Zero) => HOLE_AND_ZERO,
            (Context::Local, Residence::Remote) => REMOTE,
            _ => 0,
        };
        let len = u32::try_from(*len).unwrap_or(u32::MAX);
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.len = last.len.saturating_add(len),
            Some(_) if amount == Amount::One => break,
            _ => extents.push(Extent { len, flags }),
        }
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_a_context_does_not_tell_apart_are_one_extent() {
        let runs = [(4096, Residence::Local), (8192, Residence::Remote), (4096, Residence::Zero)];
        let allocation = extents(Context::Allocation, &runs, Amount::Many);
        assert_eq!(allocation, [Extent { len: 12288, flags: 0 }, Extent { len: 4096, flags: 3 }]);
        let local = extents(Context::Local, &runs, Amount::Many);
        let expected = [(4096, 0), (8192, 1), (4096, 0)].map(|(len, flags)| Extent { len, flags });
        assert_eq!(local, expected);
        assert_eq!(extents(Context::Allocation, &runs, Amount::One), allocation[..1]);
    }
}
