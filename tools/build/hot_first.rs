//! A layout for a start: what a profile names comes first on the device. Chunks stay as they are, so that they are shared
//! as before; only their order is another one, and with it the file system's metadata.

use std::collections::HashMap;

use super::arrange::{Arranged, DataRun};
use crate::ext4::{InodeId, Kind, Tree};
use crate::profile::{Place, Profile};

/// Puts the data of hot files first, with the files that share chunks with them; gives out the hot inodes in the order
/// in which the start needs them: directories before what is in them.
pub(super) fn hot_first(arranged: &mut Arranged, profile: &Profile) -> Vec<InodeId> {
    let hot = hot_inodes(&arranged.tree, profile);
    let ranks: HashMap<InodeId, usize> = hot.iter().enumerate().map(|(rank, id)| (*id, rank)).collect();
    let mut units = units(arranged);
    units.sort_by_key(|unit| unit.files.iter().filter_map(|file| ranks.get(file)).min().copied().unwrap_or(usize::MAX));
    arranged.data_order = units.iter().flat_map(|unit| unit.files.iter().copied()).collect();
    arranged.runs = units.iter().flat_map(|unit| unit.runs.iter().copied()).collect();
    hot
}

/// Files whose data lies together: the small ones of a chunk, or a large one.
struct Unit {
    files: Vec<InodeId>,
    runs: Vec<DataRun>,
}

fn units(arranged: &Arranged) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let mut files = arranged.data_order.iter().copied().peekable();
    for run in &arranged.runs {
        if run.first.is_some() || units.is_empty() {
            units.push(Unit { files: Vec::new(), runs: Vec::new() });
        }
        if let Some(unit) = units.last_mut() {
            unit.runs.push(*run);
        }
    }
    // Each unit has the files from its first one to before the next one's.
    let firsts: Vec<Option<InodeId>> = units.iter().map(|unit| unit.runs.first().and_then(|run| run.first)).collect();
    for (number, unit) in units.iter_mut().enumerate() {
        let next = firsts.get(number + 1).copied().flatten();
        while let Some(file) = files.next_if(|file| next.is_none_or(|next| *file != next)) {
            unit.files.push(file);
        }
    }
    units
}

fn hot_inodes(tree: &Tree, profile: &Profile) -> Vec<InodeId> {
    let mut found: HashMap<&[u8], Option<InodeId>> = HashMap::new();
    let mut seen = vec![false; tree.len()];
    let mut hot = Vec::new();
    for run in &profile.runs {
        let Place::Named { path, .. } = &run.place else { continue };
        let mut at = Some(tree.root());
        let mut ends: Vec<usize> =
            path.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/').map(|(end, _)| end).collect();
        ends.push(path.len());
        let mut start = 1;
        for end in ends {
            let (Some(dir), Some(part)) = (at, path.get(start..end)) else { break };
            start = end + 1;
            if part.is_empty() {
                continue;
            }
            at = *found.entry(path.get(..end).unwrap_or_default()).or_insert_with(|| entry(tree, dir, part));
            if let Some(id) = at
                && seen.get_mut(id.0 as usize).is_some_and(|seen| !std::mem::replace(seen, true))
            {
                hot.push(id);
            }
        }
    }
    hot
}

/// What a directory has under a name.
fn entry(tree: &Tree, dir: InodeId, name: &[u8]) -> Option<InodeId> {
    match &tree.get(dir)?.kind {
        Kind::Directory(entries) => entries.iter().find(|(known, _)| **known == *name).map(|(_, id)| *id),
        _ => None,
    }
}
