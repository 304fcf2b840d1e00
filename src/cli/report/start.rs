//! A start in numbers: what was waited for and why, for which file, and how far from the limit it was.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use serde::Serialize;

use crate::chunk::Digest;
use crate::daemon::control::DeviceInfo;
use crate::daemon::explore::Filling;
use crate::daemon::trace::{FetchTrace, Trace, WaitTrace};
use crate::fetch::Image;
use crate::index::Index;
use crate::profile::{BLOCK, Place, Profile, Run};

/// Cells of the map of the device.
const CELLS: u64 = 256 * 20;
/// Stored bytes of a request from which on its speed says something of the link.
const TELLING: u64 = 256 << 10;
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

/// The start as a whole.
#[derive(Debug, Default, Serialize)]
pub struct Start {
    /// How long it took: to readiness, or to the last thing that is known of it.
    pub seconds: f64,
    /// Whether somebody said that the program is ready.
    pub ready: bool,
    /// What it could not be shorter than.
    pub floor: f64,
    /// What that is made of.
    pub bound: &'static str,
    /// Time in which a read waited.
    pub waited: f64,
    /// Waits.
    pub waits: u64,
    /// Requests to sources.
    pub requests: u64,
    /// What arrived, as stored.
    pub fetched_bytes: u64,
    /// What was read for the first time.
    pub read_bytes: u64,
    /// Bytes a second of the link.
    pub link: f64,
    /// The start-up pack as stored.
    pub pack_bytes: u64,
    /// Of what it holds, what was not read, plain.
    pub vain_bytes: u64,
    /// Chunks that were waited for outside of it.
    pub missed: u64,
    /// Read-ahead of the device in KiB.
    pub read_ahead_kb: Option<u32>,
}

#[derive(Debug, Serialize)]
struct Wait {
    asked: f64,
    done: f64,
    chunk: u32,
    offset: u64,
    len: u32,
    file: Option<usize>,
    queue: f64,
    network: f64,
    line_up: f64,
    decompress: f64,
    verify: f64,
    other: f64,
    by: &'static str,
    source: String,
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

/// A letter for each part of the device: `m` read and waited for outside the start-up pack, `r` read, `v` in the start-up
/// pack and not read, `l` local, `d` data that is not local, `.` zeros.
#[derive(Debug, Serialize)]
struct Cells {
    cells: String,
    cell_bytes: u64,
}

/// What is known of a start, before names were looked up.
pub struct Facts {
    trace: Trace,
    profile: Profile,
    end: f64,
    /// Blocks of the start-up pack, from first to behind the last.
    hot: Vec<(u32, u32)>,
    hot_chunks: HashSet<Digest>,
    pack_bytes: u64,
    /// Blocks of chunks that were fetched.
    fetched: HashMap<u32, Vec<(u32, u32)>>,
    device_bytes: u64,
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

    fn cell_blocks(&self) -> u64 {
        self.device_bytes.div_ceil(u64::from(BLOCK)).div_ceil(CELLS).max(1)
    }

    /// What was read until the end of the start.
    fn runs(&self) -> impl Iterator<Item = &Run> {
        self.profile.runs.iter().filter(|run| run.seconds <= self.end)
    }

    fn waits(&self) -> impl Iterator<Item = &WaitTrace> {
        self.trace.waits.iter().filter(|wait| wait.asked <= self.end)
    }

    fn fetches(&self) -> impl Iterator<Item = &FetchTrace> {
        self.trace.fetches.iter().filter(|fetch| fetch.arrived <= self.end && fetch.arrived >= 0.0)
    }
}

/// Names by the blocks that were read, and numbers for them.
#[derive(Default)]
struct Names {
    /// First block to behind the last one, and the name.
    blocks: BTreeMap<u32, (u32, Option<usize>)>,
    numbers: HashMap<Vec<u8>, usize>,
    files: Vec<String>,
}

impl Names {
    fn add(&mut self, run: &Run) -> Option<usize> {
        let name = match &run.place {
            Place::Named { path, .. } => Some(self.number(path)),
            Place::Metadata | Place::Data => None,
        };
        if let Some(block) = run.block {
            self.blocks.insert(block, (block.saturating_add(run.blocks), name));
        }
        name
    }

    fn number(&mut self, path: &[u8]) -> usize {
        if let Some(number) = self.numbers.get(path) {
            return *number;
        }
        let number = self.files.len();
        self.numbers.insert(path.to_owned(), number);
        self.files.push(String::from_utf8_lossy(path).into_owned());
        number
    }

    /// What a block that was read belongs to.
    fn at(&self, block: u32) -> Option<usize> {
        let (_, (end, name)) = self.blocks.range(..=block).next_back()?;
        (block < *end).then_some(*name).flatten()
    }

    /// Blocks of a range that were read, by name.
    fn within(&self, from: u32, to: u32) -> impl Iterator<Item = (Option<usize>, u32)> {
        let first = self.blocks.range(..=from).next_back().map_or(from, |(block, _)| *block);
        self.blocks.range(first..to).filter_map(move |(block, (end, name))| {
            let (start, stop) = (from.max(*block), to.min(*end));
            (start < stop).then(|| (*name, stop - start))
        })
    }
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

/// Where the time of a wait went: to the fetch that ended it.
fn parts(wait: &WaitTrace, file: Option<usize>, fetches: &[&FetchTrace], sources: &[String]) -> Wait {
    const SLACK: f64 = 0.001;
    let ending =
        fetches.iter().rev().find(|fetch| fetch.verified <= wait.done + SLACK && fetch.verified >= wait.asked - SLACK);
    let clip = |from: f64, to: f64| (to.min(wait.done) - from.max(wait.asked)).max(0.0);
    let all = wait.done - wait.asked;
    let Wait { asked, done, chunk, offset, len, .. } = Wait {
        asked: wait.asked,
        done: wait.done,
        chunk: wait.chunk,
        offset: wait.offset,
        len: wait.len,
        file,
        queue: 0.0,
        network: 0.0,
        line_up: 0.0,
        decompress: 0.0,
        verify: 0.0,
        other: all,
        by: "",
        source: String::new(),
    };
    let (mut queue, mut network, mut line_up, mut decompress, mut verify) = (0.0, 0.0, 0.0, 0.0, 0.0);
    let (mut by, mut source) = ("", String::new());
    if let Some(fetch) = ending {
        queue = clip(wait.asked, fetch.requested);
        network = clip(fetch.requested, fetch.arrived);
        line_up = clip(fetch.arrived, fetch.started);
        decompress = clip(fetch.started, fetch.inflated);
        verify = clip(fetch.inflated, fetch.verified);
        by = match fetch.why.as_str() {
            "demand" => "asked for because it was missed",
            "startup" => "came with the start-up stream",
            "read_ahead" => "asked for ahead of its reader",
            _ => "asked for by the background fill",
        };
        source = sources.get(fetch.source).cloned().unwrap_or_default();
    }
    let other = (all - queue - network - line_up - decompress - verify).max(0.0);
    Wait { asked, done, chunk, offset, len, file, queue, network, line_up, decompress, verify, other, by, source }
}

fn totals(facts: &Facts) -> Start {
    let waited = length(&spans(facts.waits().map(|wait| (wait.asked, wait.done.min(facts.end))).collect()));
    // Chunks of one request were sent for at the same instant.
    let mut requests: HashMap<u64, (f64, f64, u64)> = HashMap::new();
    for fetch in facts.fetches() {
        let entry = requests.entry(fetch.requested.to_bits()).or_insert((fetch.requested, fetch.arrived, 0));
        entry.1 = entry.1.max(fetch.arrived);
        entry.2 += u64::from(fetch.stored);
    }
    let fetched_bytes: u64 = requests.values().map(|(_, _, bytes)| bytes).sum();
    let busy = length(&spans(requests.values().map(|(from, to, _)| (*from, *to)).collect()));
    let overall = if busy > 0.0 { fetched_bytes as f64 / busy } else { 0.0 };
    let telling = requests.values().filter(|(from, to, bytes)| *bytes >= TELLING && to > from);
    let link = telling.map(|(from, to, bytes)| *bytes as f64 / (to - from)).fold(overall, f64::max);
    let planned = facts.trace.startup.planned_bytes.min(facts.pack_bytes);
    let (needed, transfer) = match planned {
        0 => (fetched_bytes, "what was fetched, at the link's rate"),
        planned => (planned, "the start-up pack at the link's rate"),
    };
    let (transferring, local) = (if link > 0.0 { needed as f64 / link } else { 0.0 }, (facts.end - waited).max(0.0));
    let (floor, bound) =
        if transferring > local { (transferring, transfer) } else { (local, "the program's own time") };
    Start {
        seconds: facts.end,
        ready: facts.trace.startup.ready.is_some(),
        floor: floor.min(facts.end),
        bound,
        waited,
        waits: facts.waits().count() as u64,
        requests: requests.len() as u64,
        fetched_bytes,
        read_bytes: facts.runs().map(|run| u64::from(run.blocks) * u64::from(BLOCK)).sum(),
        link,
        pack_bytes: facts.pack_bytes,
        vain_bytes: facts.unnamed().iter().map(|(_, blocks)| u64::from(*blocks) * u64::from(BLOCK)).sum(),
        missed: 0,
        read_ahead_kb: facts.profile.recording.read_ahead_kb,
    }
}

fn cells(facts: &Facts, filling: &Filling, missed: &[(u32, u32)]) -> Cells {
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

/// The blocks of a run on the device, from the first to behind the last.
fn blocks_of(run: &Run) -> Option<(u32, u32)> {
    let first = run.block?;
    Some((first, first.saturating_add(run.blocks)))
}

/// Ranges in order, joined where they touch.
fn union(mut ranges: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    ranges.sort_unstable();
    let mut out: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
    for (from, to) in ranges {
        match out.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            _ => out.push((from, to)),
        }
    }
    out
}

/// What of `ranges` is not in `other`; both as of [`union`].
fn without(ranges: &[(u32, u32)], other: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut out = Vec::new();
    let mut others = other.iter().peekable();
    for &(mut from, to) in ranges {
        while from < to {
            while others.peek().is_some_and(|other| other.1 <= from) {
                others.next();
            }
            match others.peek() {
                Some(other) if other.0 <= from => from = other.1.min(to),
                Some(other) if other.0 < to => {
                    out.push((from, other.0));
                    from = other.0;
                }
                _ => {
                    out.push((from, to));
                    from = to;
                }
            }
        }
    }
    out
}

fn spans(mut spans: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut out: Vec<(f64, f64)> = Vec::with_capacity(spans.len());
    for (from, to) in spans {
        match out.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            _ => out.push((from, to)),
        }
    }
    out
}

fn length(spans: &[(f64, f64)]) -> f64 {
    spans.iter().map(|(from, to)| (to - from).max(0.0)).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn ranges_are_joined_and_taken_from_each_other() {
        let ranges = union(vec![(10, 20), (0, 5), (18, 30), (5, 6)]);
        assert_eq!(ranges, [(0, 6), (10, 30)]);
        assert_eq!(without(&ranges, &[(2, 3), (4, 12), (29, 99)]), [(0, 2), (3, 4), (12, 29)]);
        assert_eq!(without(&ranges, &[]), ranges);
        assert_eq!(without(&[], &ranges), []);
        assert_eq!(without(&[(0, 4), (5, 8)], &[(0, 8)]), []);
    }

    #[test]
    fn the_parts_of_a_wait_make_up_the_whole() {
        let fetch = FetchTrace {
            chunk: 1,
            stored: 10,
            plain: 20,
            why: "demand".to_owned(),
            source: 0,
            asked: 1.0,
            requested: 1.5,
            arrived: 2.5,
            started: 2.6,
            inflated: 2.7,
            verified: 2.9,
        };
        let sum = |wait: &Wait| wait.queue + wait.network + wait.line_up + wait.decompress + wait.verify + wait.other;
        let wait = WaitTrace { asked: 1.0, done: 3.0, chunk: 1, offset: 0, len: 4096 };
        let whole = parts(&wait, None, &[&fetch], &["here".to_owned()]);
        assert!(
            (whole.queue - 0.5).abs() < 1e-9 && (whole.network - 1.0).abs() < 1e-9 && (whole.other - 0.1).abs() < 1e-9
        );
        assert_eq!((whole.by, whole.source.as_str()), ("asked for because it was missed", "here"));
        assert!((sum(&whole) - 2.0).abs() < 1e-9);
        // One that came late to a fetch on its way, and one whose fetch is forgotten.
        let late = parts(&WaitTrace { asked: 2.0, ..wait }, None, &[&fetch], &[]);
        assert!(late.queue == 0.0 && (late.network - 0.5).abs() < 1e-9 && (sum(&late) - 1.0).abs() < 1e-9);
        let unknown = parts(&wait, None, &[], &[]);
        assert!((unknown.other - 2.0).abs() < 1e-9);
    }
}
