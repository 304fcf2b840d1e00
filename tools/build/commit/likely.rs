//! What a start of the child probably reads: what the builder guessed for the parent, where that lies now.

use std::ops::Range;

use crate::build::metadata::DeviceExtent;
use crate::index::Index;

/// The jobs that hold what lies where the parent's likely chunks do, in their order: these chunks as far as something of
/// them is left, and the new ones for what was written over them. `extents` are the child's, in ascending order.
///
/// It goes by place: of a file that was replaced by another one, the guess says nothing.
pub(super) fn jobs(parent: &Index, extents: &[DeviceExtent]) -> Vec<u32> {
    let likely = parent.extents().iter().filter(|extent| extent.chunk < parent.likely_chunks());
    let mut places: Vec<(u32, Range<u32>)> =
        likely.map(|extent| (extent.chunk, extent.block..extent.block + extent.blocks)).collect();
    places.sort_unstable_by_key(|(chunk, place)| (*chunk, place.start));
    let mut jobs = Vec::new();
    for (_, place) in places {
        let first = extents.partition_point(|extent| extent.block + extent.blocks <= place.start);
        let here = extents.iter().skip(first).take_while(|extent| extent.block < place.end);
        jobs.extend(here.map(|extent| extent.job));
        jobs.dedup();
    }
    jobs
}
