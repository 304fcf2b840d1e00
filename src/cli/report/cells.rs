//! The device as a map of cells.

use serde::Serialize;

use super::facts::{Facts, blocks_of};
use super::ranges::{union, without};
use crate::daemon::explore::Filling;
use crate::profile::BLOCK;

/// A letter for each part of the device: `m` read and waited for outside the start-up pack, `r` read, `v` in the start-up
/// pack and not read, `l` local, `d` data that is not local, `.` zeros.
#[derive(Debug, Serialize)]
pub(super) struct Cells {
    cells: String,
    cell_bytes: u64,
}

/// The map; `missed` are ranges of blocks.
pub(super) fn cells(facts: &Facts, filling: &Filling, missed: &[(u32, u32)]) -> Cells {
    let blocks = facts.cell_blocks();
    let mut cells: Vec<u8> = filling
        .cells
        .iter()
        .map(|(data, local)| match (data, local) {
            (0, _) => b'.',
            (_, 0) => b'd',
            _ => b'l',
        })
        .collect();
    let read = union(facts.runs().filter_map(blocks_of).collect());
    for (ranges, letter) in [(without(&facts.hot, &read), b'v'), (read, b'r'), (union(missed.to_vec()), b'm')] {
        for (from, to) in ranges {
            let last = u64::from(to.saturating_sub(1)) / blocks;
            for cell in u64::from(from) / blocks..=last {
                if let Some(cell) = usize::try_from(cell).ok().and_then(|cell| cells.get_mut(cell)) {
                    *cell = letter;
                }
            }
        }
    }
    Cells { cells: String::from_utf8_lossy(&cells).into_owned(), cell_bytes: blocks * u64::from(BLOCK) }
}
