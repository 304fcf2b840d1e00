//! What is known of a start: what the daemon noted, and what the index says about it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::ranges::{union, without};
use crate::chunk::Digest;
use crate::daemon::trace::{FetchTrace, Trace, WaitTrace};
use crate::index::Index;
use crate::profile::{BLOCK, Profile, Run};

/// Cells of the map of the device.
const CELLS: u64 = 256 * 20;

/// What is known of a start, before names were looked up.
pub struct Facts {
    pub(super) trace: Trace,
    pub(super) profile: Profile,
    pub(super) end: f64,
    /// Blocks of the start-up pack, from first to behind the last.
    pub(super) hot: Vec<(u32, u32)>,
    pub(super) hot_chunks: HashSet<Digest>,
    pub(super) pack_bytes: u64,
    /// Blocks of chunks that were fetched.
    pub(super) fetched: HashMap<u32, Vec<(u32, u32)>>,
    pub(super) device_bytes: u64,
}

impl Facts {
    /// Puts together what the daemon said and what the index says.
    #[must_use]
    pub fn new(trace: Trace, profile: Profile, index: &Arc<Index>) -> Self {
        let last = |times: &mut dyn Iterator<Item = f64>| times.fold(0.0, f64::max);
        let end = trace.startup.ready.unwrap_or_else(|| {
            let touched = last(&mut profile.runs.iter().map(|run| run.seconds));
            touched.max(last(&mut trace.waits.iter().map(|wait| wait.done)))
        });
        let order: Vec<u32> = index.startup_order().collect();
        let chunks = order.iter().filter_map(|number| index.chunk(*number));
        let (mut hot_chunks, mut pack_bytes) = (HashSet::new(), 0);
        for chunk in chunks {
            hot_chunks.insert(chunk.digest);
            pack_bytes += u64::from(chunk.stored_len);
        }
        let wanted: HashSet<u32> = trace.fetches.iter().map(|fetch| fetch.chunk).collect();
        let mut fetched: HashMap<u32, Vec<(u32, u32)>> = HashMap::new();
        let (mut hot, mut own) = (Vec::new(), HashSet::new());
        for extent in index.startup_extents().iter() {
            let range = (extent.block, extent.block + extent.blocks);
            hot.push(range);
            own.insert(extent.chunk);
            fetched.entry(extent.chunk).or_default().push(range);
        }
        // Chunks that are hot as a whole have no extents of their own, but those of the same bytes elsewhere: of several
        // places, the one that was read is meant.
        let whole: HashSet<Digest> = order
            .iter()
            .filter(|number| !own.contains(*number))
            .filter_map(|number| Some(index.chunk(*number)?.digest))
            .collect();
        let read = union(profile.runs.iter().filter(|run| run.seconds <= end).filter_map(blocks_of).collect());
        let mut places: HashMap<Digest, (u32, bool)> = HashMap::new();
        let mut whole_ranges: Vec<(u32, (u32, u32))> = Vec::new();
        for extent in index.extents().iter() {
            let range = (extent.block, extent.block + extent.blocks);
            if wanted.contains(&extent.chunk) {
                fetched.entry(extent.chunk).or_default().push(range);
            }
            let Some(digest) =
                index.chunk(extent.chunk).map(|chunk| chunk.digest).filter(|digest| whole.contains(digest))
            else {
                continue;
            };
            let was_read = without(&[range], &read) != [range];
            let place = places.entry(digest).or_insert((extent.chunk, was_read));
            if was_read && !place.1 {
                *place = (extent.chunk, true);
            }
            whole_ranges.push((extent.chunk, range));
        }
        let meant: HashSet<u32> = places.values().map(|(chunk, _)| *chunk).collect();
        hot.extend(whole_ranges.into_iter().filter(|(chunk, _)| meant.contains(chunk)).map(|(_, range)| range));
        let device_bytes = index.device_bytes();
        Self { trace, profile, end, hot: union(hot), hot_chunks, pack_bytes, fetched, device_bytes }
    }

    /// Blocks of the start-up pack that were not read: what they hold is not known yet. First block and length.
    #[must_use]
    pub fn unnamed(&self) -> Vec<(u32, u32)> {
        let read = union(self.runs().filter_map(blocks_of).collect());
        without(&self.hot, &read).iter().map(|(from, to)| (*from, to - from)).collect()
    }

    /// How many parts the device is shown in.
    #[must_use]
    pub fn cells(&self) -> u32 {
        let blocks = self.device_bytes.div_ceil(u64::from(BLOCK)).max(1);
        u32::try_from(blocks.div_ceil(self.cell_blocks())).unwrap_or(u32::MAX)
    }

    pub(super) fn cell_blocks(&self) -> u64 {
        self.device_bytes.div_ceil(u64::from(BLOCK)).div_ceil(CELLS).max(1)
    }

    /// What was read until the end of the start.
    pub(super) fn runs(&self) -> impl Iterator<Item = &Run> {
        self.profile.runs.iter().filter(|run| run.seconds <= self.end)
    }

    pub(super) fn waits(&self) -> impl Iterator<Item = &WaitTrace> {
        self.trace.waits.iter().filter(|wait| wait.asked <= self.end)
    }

    pub(super) fn fetches(&self) -> impl Iterator<Item = &FetchTrace> {
        self.trace.fetches.iter().filter(|fetch| fetch.arrived <= self.end && fetch.arrived >= 0.0)
    }
}

/// The blocks of a run on the device, from the first to behind the last.
pub(super) fn blocks_of(run: &Run) -> Option<(u32, u32)> {
    let first = run.block?;
    Some((first, first.saturating_add(run.blocks)))
}
