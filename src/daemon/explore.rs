//! What of a device is local, and what its blocks hold: for those who draw it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::control::{Kind, Problem};
use super::devices::Served;
use super::node::{Node, blocking};
use super::starts::names;
use crate::error::Result;
use crate::index::{BLOCK, Extent};
use crate::pool::Pool;
use crate::profile::{Profile, Recording, Touch, locate};

/// Most parts that a device is looked at in.
pub const CELLS_MAX: u32 = 16 << 10;

/// How much of a device is local, in parts of equal length (the last may be shorter).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filling {
    /// Of each part, blocks that are not zeros, and blocks of these that are local.
    pub cells: Vec<(u32, u32)>,
}

impl Node {
    /// How much of the device is local, in `cells` parts.
    ///
    /// # Errors
    /// There is no such device, nobody serves it, or the number of parts is out of bounds.
    pub async fn filling(&self, target: &str, cells: u32) -> std::result::Result<Filling, Problem> {
        if !(1..=CELLS_MAX).contains(&cells) {
            return Err(Problem::new(Kind::Request, format!("{cells} parts: 1 to {CELLS_MAX} can be had")));
        }
        let entry = self.devices.find(target)?;
        entry.served()?;
        let pool = Arc::clone(&self.pool);
        let cells = blocking(move || Ok(entry.served.as_ref().map(|served| filled(served, &pool, cells)))).await?;
        Ok(Filling { cells: cells.unwrap_or_default() })
    }

    /// What ranges of blocks hold (first block and length), as the text of a profile whose times mean nothing.
    ///
    /// # Errors
    /// There is no such device, nobody serves it, or its metadata can't be read.
    pub async fn locate(&self, target: &str, ranges: Vec<(u32, u32)>) -> std::result::Result<Arc<str>, Problem> {
        let entry = self.devices.find(target)?;
        entry.served()?;
        let runtime = Handle::current();
        Ok(blocking(move || {
            let text = match &entry.served {
                Some(served) => located(served, &ranges, &runtime)?,
                None => String::new(),
            };
            Ok(text.into())
        })
        .await?)
    }
}

fn filled(served: &Served, pool: &Pool, cells: u32) -> Vec<(u32, u32)> {
    let index = &served.image.index;
    let blocks = index.device_bytes().div_ceil(u64::from(BLOCK));
    let length = blocks.div_ceil(u64::from(cells)).max(1);
    let mut found = vec![(0, 0); usize::try_from(blocks.div_ceil(length)).unwrap_or(0)];
    let local: Vec<bool> = index.chunks().map(|chunk| pool.contains(&chunk.digest)).collect();
    let is_local = |chunk: u32| local.get(chunk as usize) == Some(&true);
    for extent in index.extents().iter() {
        add(&mut found, length, &extent, |cell, blocks| {
            cell.0 += blocks;
            cell.1 += if is_local(extent.chunk) { blocks } else { 0 };
        });
    }
    // These blocks are in the other extents as well, whose chunk may not be local.
    for extent in index.startup_extents().iter().filter(|extent| is_local(extent.chunk)) {
        add(&mut found, length, &extent, |cell, blocks| cell.1 = (cell.1 + blocks).min(cell.0));
    }
    found
}

/// Calls `count` for each part that the extent lies in, with how many of its blocks do.
fn add(cells: &mut [(u32, u32)], length: u64, extent: &Extent, mut count: impl FnMut(&mut (u32, u32), u32)) {
    let (mut at, end) = (u64::from(extent.block), u64::from(extent.block) + u64::from(extent.blocks));
    while at < end {
        let number = at / length;
        let next = end.min((number + 1) * length);
        let Some(cell) = usize::try_from(number).ok().and_then(|number| cells.get_mut(number)) else { return };
        count(cell, (next - at) as u32);
        at = next;
    }
}

fn located(served: &Served, ranges: &[(u32, u32)], runtime: &Handle) -> Result<String> {
    let index = &served.image.index;
    let end = index.device_bytes().div_ceil(u64::from(BLOCK));
    let touch = |(block, blocks): &(u32, u32)| {
        let inside = u64::from(*block) + u64::from(*blocks) <= end && *blocks > 0;
        inside.then_some(Touch { microseconds: 0, block: *block, blocks: *blocks })
    };
    let touches: Vec<Touch> = ranges.iter().filter_map(touch).collect();
    let recording = Recording {
        image: served.image.reference.to_string(),
        file_system: index.file_system().to_owned(),
        device_bytes: index.device_bytes(),
        ..Recording::default()
    };
    Profile { recording, runs: locate(&touches, names(&served.device, runtime)?.as_ref()) }.to_text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_counted_in_every_part_that_it_lies_in() {
        let mut cells = vec![(0, 0); 3];
        let extent = Extent { block: 7, blocks: 10, chunk: 0, offset: 0 };
        add(&mut cells, 8, &extent, |cell, blocks| cell.0 += blocks);
        assert_eq!(cells, [(1, 0), (8, 0), (1, 0)]);
        // One that ends behind the last part counts as far as there are parts.
        add(&mut cells, 8, &Extent { block: 20, ..extent }, |cell, blocks| cell.1 += blocks);
        assert_eq!(cells, [(1, 0), (8, 0), (1, 4)]);
    }
}
