//! The start-up set: the chunks of an image that a recorded start reads.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use tokio::runtime::Handle;

use super::starts::names;
use crate::device::{Device, ImageDevice};
use crate::error::{Error, Result};
use crate::ext4::{Names, ROOT};
use crate::map::Piece;
use crate::profile::{BLOCK, MAX_PROFILE_BYTES, Place, Profile};

/// Blocks of a device: the first one, and the first one behind them.
type Blocks = (u32, u32);

/// The numbers of the chunks that the start in the profile at `path` reads from `device`, ascending. Blocks.
///
/// A profile of the same device is applied block by block; one of another device, e.g. of an earlier version of the image,
/// by the names of files.
///
/// # Errors
/// A file that is no profile, or one that says nothing about this device.
pub fn start_set(device: &ImageDevice, path: &Path, runtime: &Handle) -> Result<Vec<u32>> {
    let profile = read(path)?;
    let index = device.map().index();
    let same = profile.recording.device == Some(index.device_digest().to_string());
    let mut blocks = if same {
        profile.runs.iter().filter_map(|run| Some((run.block?, run.block?.saturating_add(run.blocks)))).collect()
    } else {
        match names(device, runtime)? {
            Some(names) => by_name(&profile, &names),
            None => Vec::new(),
        }
    };
    blocks.sort_unstable();
    let mut chunks = BTreeSet::new();
    let mut done = 0;
    for (first, end) in blocks {
        // Ranges may overlap as often as a profile says: each block is looked up once.
        let (start, end) = (u64::from(first.max(done)), u64::from(end));
        done = done.max(end as u32);
        let (start, end) = (start * u64::from(BLOCK), (end * u64::from(BLOCK)).min(device.size()));
        if start < end {
            chunks.extend(device.map().cover(start, end - start).filter_map(|piece| match piece {
                Piece::Chunk { chunk, .. } => Some(chunk),
                Piece::Zero { .. } => None,
            }));
        }
    }
    if chunks.is_empty() {
        let reason = "nothing that it names is on this image; record a start of this image, or of an earlier version";
        return Err(Error::invalid(format!("profile {}", path.display()), reason));
    }
    Ok(chunks.into_iter().collect())
}

fn read(path: &Path) -> Result<Profile> {
    let failed = |error| Error::io(format!("reading the profile {}", path.display()), error);
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > MAX_PROFILE_BYTES {
        let reason = format!("it has {bytes} bytes, more than {MAX_PROFILE_BYTES}");
        return Err(Error::invalid(format!("profile {}", path.display()), reason));
    }
    Profile::from_text(&std::fs::read_to_string(path).map_err(failed)?)
}

/// Where the files of a profile are on a device, and what it takes to find them there.
fn by_name(profile: &Profile, names: &Names) -> Vec<Blocks> {
    let numbers = names.by_path();
    let mut places: HashMap<u32, Vec<_>> = HashMap::new();
    for run in names.runs() {
        places.entry(run.name).or_default().push(run);
    }
    let mut blocks = vec![(0, 1)];
    let mut found = BTreeSet::new();
    for run in &profile.runs {
        let Place::Named { path, from, .. } = &run.place else { continue };
        let Some(&name) = numbers.get(path) else { continue };
        let (from, until) = (*from, from.saturating_add(run.blocks));
        for place in places.get(&name).into_iter().flatten() {
            let first = from.max(place.file_block);
            let end = until.min(place.file_block.saturating_add(place.blocks));
            if first < end {
                let start = place.block + (first - place.file_block);
                blocks.push((start, start + (end - first)));
            }
        }
        let mut name = name;
        while found.insert(name) && name != ROOT {
            name = names.parent(name);
        }
    }
    for name in found {
        let own = names.inode_block(name).into_iter().chain(names.own_blocks(name).iter().copied());
        blocks.extend(own.map(|block| (block, block.saturating_add(1))));
    }
    blocks
}
