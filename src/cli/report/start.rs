//! A start in numbers: what was waited for and why, for which file, and how far from the limit it was.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::cells::{Cells, cells};
use super::facts::Facts;
use super::names::Names;
use super::totals::{Start, totals};
use super::wait::{Wait, parts};
use crate::daemon::control::DeviceInfo;
use crate::daemon::explore::Filling;
use crate::daemon::trace::FetchTrace;
use crate::fetch::Image;
use crate::profile::{BLOCK, Place, Run};

/// Files that are listed.
const FILES: usize = 5000;

/// What the page shows. Sizes in bytes, times in seconds from attach.
#[derive(Debug, Serialize)]
pub struct Explained {
    version: &'static str,
    id: String,
    image: String,
    digest: String,
    device: String,
    transport: String,
    device_bytes: u64,
    file_system: String,
    /// The start as a whole.
    pub start: Start,
    /// Paths; other parts have numbers of these.
    files: Vec<String>,
    waits: Vec<Wait>,
    /// Waits before these.
    forgotten: u64,
    fetches: Vec<Fetch>,
    /// When, first block, blocks.
    touches: Vec<(f64, u32, u32)>,
    by_file: Vec<ByFile>,
    missed: Vec<Bytes>,
    vain: Vec<Bytes>,
    map: Cells,
}

#[derive(Debug, Serialize)]
struct Fetch {
    arrived: f64,
    stored: u32,
}

#[derive(Debug, Serialize)]
struct ByFile {
    file: Option<usize>,
    read: u64,
    fetched: u64,
    waits: u64,
    waited: f64,
}

#[derive(Debug, Serialize)]
struct Bytes {
    file: Option<usize>,
    bytes: u64,
}

/// Explains a start; `named` says what the blocks of [`Facts::unnamed`] hold, `filling` what is local.
#[must_use]
pub fn explain(info: &DeviceInfo, facts: &Facts, named: &[Run], filling: &Filling, image: &Image) -> Explained {
    let index = &image.index;
    let mut names = Names::default();
    let mut files: HashMap<Option<usize>, ByFile> = HashMap::new();
    let entry = |file| ByFile { file, read: 0, fetched: 0, waits: 0, waited: 0.0 };
    for run in facts.runs() {
        let name = names.add(run);
        files.entry(name).or_insert_with(|| entry(name)).read += u64::from(run.blocks) * u64::from(BLOCK);
    }
    let is_hot = |chunk: u32| index.chunk(chunk).is_some_and(|chunk| facts.hot_chunks.contains(&chunk.digest));
    let mut by_chunk: HashMap<u32, Vec<&FetchTrace>> = HashMap::new();
    for fetch in &facts.trace.fetches {
        by_chunk.entry(fetch.chunk).or_default().push(fetch);
    }
    let (mut waits, mut missed, mut missed_chunks, mut missed_blocks) =
        (Vec::new(), HashMap::new(), HashSet::new(), Vec::new());
    for wait in facts.waits() {
        let block = u32::try_from(wait.offset / u64::from(BLOCK)).unwrap_or(u32::MAX);
        let file = names.at(block);
        let about = files.entry(file).or_insert_with(|| entry(file));
        about.waits += 1;
        about.waited += wait.done - wait.asked;
        if facts.pack_bytes > 0 && !is_hot(wait.chunk) {
            missed_chunks.insert(wait.chunk);
            *missed.entry(file).or_insert(0) += u64::from(wait.len);
            missed_blocks.push((block, block.saturating_add(wait.len.div_ceil(BLOCK))));
        }
        let fetches = by_chunk.get(&wait.chunk).map(Vec::as_slice).unwrap_or_default();
        waits.push(parts(wait, file, fetches, &facts.trace.sources));
    }
    for fetch in facts.fetches() {
        let ranges = facts.fetched.get(&fetch.chunk).map(Vec::as_slice).unwrap_or_default();
        let read: Vec<(Option<usize>, u32)> = ranges.iter().flat_map(|(from, to)| names.within(*from, *to)).collect();
        let all: u64 = read.iter().map(|(_, blocks)| u64::from(*blocks)).sum();
        for (name, blocks) in read {
            let share = u64::from(fetch.stored) * u64::from(blocks) / all;
            files.entry(name).or_insert_with(|| entry(name)).fetched += share;
        }
    }
    let mut vain: HashMap<Option<usize>, u64> = HashMap::new();
    for run in named {
        let name = match &run.place {
            Place::Named { path, .. } => Some(names.number(path)),
            Place::Metadata | Place::Data => None,
        };
        *vain.entry(name).or_insert(0) += u64::from(run.blocks) * u64::from(BLOCK);
    }
    let mut start = totals(facts);
    start.missed = missed_chunks.len() as u64;
    let mut by_file: Vec<ByFile> = files.into_values().collect();
    by_file.sort_by(|a, b| (b.waited, b.read).partial_cmp(&(a.waited, a.read)).unwrap_or(std::cmp::Ordering::Equal));
    by_file.truncate(FILES);
    Explained {
        version: env!("CARGO_PKG_VERSION"),
        id: info.id.clone(),
        image: info.image.clone(),
        digest: info.digest.clone(),
        device: info.device.display().to_string(),
        transport: info.transport.clone(),
        device_bytes: facts.device_bytes,
        file_system: index.file_system().to_owned(),
        map: cells(facts, filling, &missed_blocks),
        start,
        waits,
        forgotten: facts.trace.waits_forgotten,
        fetches: facts.fetches().map(|fetch| Fetch { arrived: fetch.arrived, stored: fetch.stored }).collect(),
        touches: facts.runs().map(|run| (run.seconds, run.block.unwrap_or(0), run.blocks)).collect(),
        by_file,
        missed: largest(missed),
        vain: largest(vain),
        files: names.files,
    }
}

fn largest(bytes: HashMap<Option<usize>, u64>) -> Vec<Bytes> {
    let mut all: Vec<Bytes> = bytes.into_iter().map(|(file, bytes)| Bytes { file, bytes }).collect();
    all.sort_by_key(|entry| (std::cmp::Reverse(entry.bytes), entry.file));
    all.truncate(FILES);
    all
}
