//! One profile of several starts.

use std::collections::HashMap;

use super::{Kind, Place, Profile, Recording, Run};
use crate::error::{Error, Result};

/// Most blocks of all profiles together: 64 GiB.
const MAX_BLOCKS: u64 = 16 << 20;

/// A block, whatever device it is on.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    /// Kind as a number, path, block in the file.
    Named(u8, Vec<u8>, u32),
    /// On the one device that all profiles were recorded on: whether it is metadata, and the block.
    Device(bool, u32),
}

struct Entry {
    /// How far the recording was when the block's run began, from 0 to 1, counted in blocks: recordings over links of
    /// different speeds differ in time, and little in this.
    rank: f64,
    /// The profile and the place in it: what began equally early in several profiles stays in runs.
    order: (usize, u64),
    seconds: f64,
    block: Option<u32>,
}

/// Joins profiles: everything that one of them has, each block as early as in the one that has it earliest.
///
/// Of profiles of different devices only what has a path is kept.
///
/// # Errors
/// [`Error::Invalid`] without profiles, with too many blocks, and when nothing would be left.
pub fn merge(profiles: &[Profile]) -> Result<Profile> {
    let first = profiles.first().ok_or_else(|| invalid("none was given"))?;
    let same = |of: fn(&Recording) -> &Option<String>| {
        let value = of(&first.recording).clone();
        value.filter(|value| profiles.iter().all(|profile| of(&profile.recording).as_ref() == Some(value)))
    };
    let (digest, device) = (same(|recording| &recording.digest), same(|recording| &recording.device));
    let max = |of: fn(&Recording) -> f64| profiles.iter().map(|profile| of(&profile.recording)).fold(0.0, f64::max);
    let recording = Recording {
        image: first.recording.image.clone(),
        digest,
        device: device.clone(),
        file_system: first.recording.file_system.clone(),
        device_bytes: first.recording.device_bytes,
        read_ahead_kb: profiles.iter().filter_map(|profile| profile.recording.read_ahead_kb).max(),
        seconds: max(|recording| recording.seconds),
        ready: profiles.iter().filter_map(|profile| profile.recording.ready).reduce(f64::max),
        complete: profiles.iter().all(|profile| profile.recording.complete),
    };
    let mut entries: HashMap<Key, Entry> = HashMap::new();
    let mut left = MAX_BLOCKS;
    for (number, profile) in profiles.iter().enumerate() {
        let all: u64 = profile.runs.iter().map(|run| u64::from(run.blocks)).sum();
        left = left.checked_sub(all).ok_or_else(|| invalid("they have more than 64 GiB of blocks"))?;
        let mut done = 0;
        for run in &profile.runs {
            let rank = done as f64 / all as f64;
            for step in 0..run.blocks {
                let order = (number, done);
                done += 1;
                let block = run.block.map(|block| block + step).filter(|_| device.is_some());
                let key = match (&run.place, block) {
                    (Place::Named { kind, path, from }, _) => Key::Named(*kind as u8, path.clone(), from + step),
                    (_, None) => continue,
                    (place, Some(block)) => Key::Device(*place == Place::Metadata, block),
                };
                let new = Entry { rank, order, seconds: run.seconds, block };
                let known = entries.entry(key).or_insert(Entry { rank: f64::MAX, ..new });
                if rank < known.rank {
                    *known = Entry { rank, order, seconds: run.seconds, block };
                }
            }
        }
    }
    let mut sorted: Vec<(Key, Entry)> = entries.into_iter().collect();
    sorted.sort_by(|(_, a), (_, b)| a.rank.total_cmp(&b.rank).then_with(|| a.order.cmp(&b.order)));
    let runs = join(sorted);
    if runs.is_empty() {
        return Err(invalid("they are of different devices and name no paths"));
    }
    Ok(Profile { recording, runs })
}

/// Blocks in their order as runs.
fn join(sorted: Vec<(Key, Entry)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (key, entry) in sorted {
        let place = match key {
            Key::Named(kind, path, from) => {
                let kind = [Kind::File, Kind::Directory, Kind::Link].into_iter().find(|known| *known as u8 == kind);
                Place::Named { kind: kind.unwrap_or(Kind::File), path, from }
            }
            Key::Device(true, _) => Place::Metadata,
            Key::Device(false, _) => Place::Data,
        };
        if let Some(last) = runs.last_mut()
            && follows(last, &place, entry.block)
        {
            last.blocks += 1;
            continue;
        }
        runs.push(Run { seconds: entry.seconds, place, blocks: 1, block: entry.block });
    }
    runs
}

/// Whether a block continues a run, in its file and on the device.
fn follows(run: &Run, place: &Place, block: Option<u32>) -> bool {
    let on_device = match (run.block, block) {
        (Some(first), Some(block)) => first + run.blocks == block,
        (None, None) => true,
        _ => false,
    };
    on_device
        && match (&run.place, place) {
            (Place::Named { kind, path, from }, Place::Named { kind: other, path: its, from: at }) => {
                kind == other && path == its && from + run.blocks == *at
            }
            (known, place) => known == place,
        }
}

fn invalid(reason: &str) -> Error {
    Error::invalid("profiles to merge", reason)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn file(seconds: f64, path: &str, from: u32, blocks: u32, block: u32) -> Run {
        let place = Place::Named { kind: Kind::File, path: path.into(), from };
        Run { seconds, place, blocks, block: Some(block) }
    }

    fn profile(device: &str, read_ahead_kb: u32, runs: Vec<Run>) -> Profile {
        let recording = Recording {
            device: Some(device.into()),
            read_ahead_kb: Some(read_ahead_kb),
            complete: true,
            ..Recording::default()
        };
        Profile { recording, runs }
    }

    #[test]
    fn a_merge_has_what_each_has_at_its_earliest_place() {
        let metadata = Run { seconds: 0.0, place: Place::Metadata, blocks: 2, block: Some(0) };
        let a = profile("d", 0, vec![metadata.clone(), file(1.0, "/a", 0, 4, 100), file(2.0, "/b", 0, 2, 200)]);
        let b = profile("d", 128, vec![file(0.5, "/b", 0, 2, 200), file(9.0, "/a", 2, 4, 102)]);
        let merged = merge(&[a.clone(), b]).unwrap();
        assert_eq!(merged.recording.device.as_deref(), Some("d"));
        assert_eq!(merged.recording.read_ahead_kb, Some(128));
        let blocks: Vec<u32> =
            merged.runs.iter().flat_map(|run| run.block.unwrap()..run.block.unwrap() + run.blocks).collect();
        assert_eq!(blocks, [0, 1, 200, 201, 100, 101, 102, 103, 104, 105], "{:?}", merged.runs);
        let alone = merge(std::slice::from_ref(&a)).unwrap();
        assert_eq!(alone.runs, a.runs);
    }

    #[test]
    fn of_other_devices_paths_are_kept() {
        let metadata = Run { seconds: 0.0, place: Place::Metadata, blocks: 2, block: Some(0) };
        let a = profile("d", 0, vec![metadata.clone(), file(1.0, "/a", 0, 4, 100)]);
        let b = profile("e", 0, vec![metadata.clone(), file(1.0, "/a", 3, 2, 500)]);
        let merged = merge(&[a, b]).unwrap();
        assert_eq!(merged.recording.device, None);
        assert!(merged.runs.iter().all(|run| run.block.is_none()), "{:?}", merged.runs);
        assert_eq!(merged.runs.iter().map(|run| run.blocks).sum::<u32>(), 5);
        let only = |device| profile(device, 0, vec![metadata.clone()]);
        assert!(merge(&[only("d"), only("e")]).is_err());
        assert!(merge(&[]).is_err());
    }
}
