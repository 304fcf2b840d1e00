//! What a start waited for, chunk by chunk: the numbers behind a status, for those who draw them.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::devices::Served;
use crate::chunk::Digest;
use crate::fetch::{Fetched, Priority};

/// How a device's start went so far. Sizes in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StartupStatus {
    /// Chunks in the start-up order of the index; 0 without a start-up pack.
    pub chunks: u64,
    /// Whether the image's start-up stream runs.
    pub streaming: bool,
    /// Stored bytes that streams of the image were begun for: what was not local at attach.
    pub planned_bytes: u64,
    /// Chunks that readers waited for and that the start-up pack has: they were on their way.
    pub missed_inside: u64,
    /// Chunks that readers waited for and that the start-up pack has not.
    pub missed_outside: u64,
    /// Bytes of it that the kernel was told to read into its page cache as they came, before the program asks for them.
    #[serde(default)]
    pub laid_bytes: u64,
    /// Seconds from attach until the program was ready, if that is known.
    pub ready: Option<f64>,
    /// Read-ahead of the block device in KiB at the moment.
    pub read_ahead_kb: Option<u32>,
}

/// What is known of a start. All times are in seconds from the device's attach; what was fetched for another device of the
/// image may have happened before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// The device.
    pub id: String,
    /// The image's reference.
    pub image: String,
    /// Now.
    pub seconds: f64,
    /// The start in short.
    pub startup: StartupStatus,
    /// Names of the sources, by number.
    pub sources: Vec<String>,
    /// Pieces of reads that waited, oldest first; the latest 8192.
    pub waits: Vec<WaitTrace>,
    /// Waits before these.
    pub waits_forgotten: u64,
    /// Chunks that were fetched, in the order in which they were verified; the latest 8192.
    pub fetches: Vec<FetchTrace>,
    /// Fetches before these.
    pub fetches_forgotten: u64,
}

/// A piece of a read that waited for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WaitTrace {
    /// When it was asked for.
    pub asked: f64,
    /// When its read had everything.
    pub done: f64,
    /// Number of the chunk in the index: of several with the same bytes, the first.
    pub chunk: u32,
    /// First byte on the device.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A chunk that was fetched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FetchTrace {
    /// Number of the chunk in the index: of several with the same bytes, the first.
    pub chunk: u32,
    /// Stored bytes.
    pub stored: u32,
    /// Plain bytes.
    pub plain: u32,
    /// `demand`, `startup`, `read_ahead` or `background`.
    pub why: String,
    /// Number of the source that sent it.
    pub source: usize,
    /// When it was asked for first.
    pub asked: f64,
    /// When the request that brought it was sent: until then it was in a queue.
    pub requested: f64,
    /// When its last byte was there: until then it was in the network, or behind others of its request.
    pub arrived: f64,
    /// When it was its turn to be decoded.
    pub started: f64,
    /// When it was inflated.
    pub inflated: f64,
    /// When it was verified and delivered.
    pub verified: f64,
}

/// The start in short.
pub(super) fn startup_status(served: &Served) -> StartupStatus {
    let index = &served.image.index;
    let hot: HashSet<Digest> =
        index.startup_order().filter_map(|number| index.chunk(number)).map(|chunk| chunk.digest).collect();
    let (waits, _) = served.device.waits();
    let waited: HashSet<Digest> =
        waits.iter().filter_map(|wait| index.chunk(wait.chunk)).map(|chunk| chunk.digest).collect();
    let inside = waited.intersection(&hot).count() as u64;
    let (streaming, planned_bytes) = served.image.origin.startup();
    StartupStatus {
        chunks: index.startup_order().len() as u64,
        streaming,
        planned_bytes,
        missed_inside: inside,
        missed_outside: waited.len() as u64 - inside,
        laid_bytes: served.start.laid_bytes(),
        ready: served.start.ready().map(|ready| ready.as_secs_f64()),
        read_ahead_kb: Some(served.start.read_ahead_kb()),
    }
}

/// Everything that is known of a start. Goes over the whole index.
pub(super) fn trace(served: &Served, id: String, image: String) -> Trace {
    let (index, origin, device) = (&served.image.index, &served.image.origin, &served.device);
    let mut numbers: HashMap<Digest, u32> = HashMap::new();
    for (number, chunk) in (0..).zip(index.chunks()) {
        numbers.entry(chunk.digest).or_insert(number);
    }
    let first = |number: u32| index.chunk(number).and_then(|chunk| numbers.get(&chunk.digest)).copied();
    let (waits, waits_forgotten) = device.waits();
    let (fetches, fetches_forgotten) = origin.fetches();
    let started = device.started();
    Trace {
        id,
        image,
        seconds: round(started.elapsed().as_secs_f64()),
        startup: startup_status(served),
        sources: origin.sources().iter().map(|source| source.name().to_owned()).collect(),
        waits: waits
            .iter()
            .map(|wait| WaitTrace {
                asked: round(wait.asked),
                done: round(wait.done),
                chunk: first(wait.chunk).unwrap_or(wait.chunk),
                offset: wait.offset,
                len: wait.len,
            })
            .collect(),
        waits_forgotten,
        fetches: fetches
            .iter()
            .filter_map(|fetched| Some(fetch_trace(fetched, *numbers.get(&fetched.chunk.digest)?, started)))
            .collect(),
        fetches_forgotten,
    }
}

fn fetch_trace(fetched: &Fetched, chunk: u32, started: Instant) -> FetchTrace {
    let at = |time: Instant| {
        let before = started.saturating_duration_since(time).as_secs_f64();
        round(time.saturating_duration_since(started).as_secs_f64() - before)
    };
    let why = match fetched.priority {
        Priority::Demand => "demand",
        Priority::Startup => "startup",
        Priority::ReadAhead => "read_ahead",
        Priority::Background => "background",
    };
    FetchTrace {
        chunk,
        stored: fetched.chunk.stored_len,
        plain: fetched.chunk.plain_len,
        why: why.to_owned(),
        source: fetched.source,
        asked: at(fetched.asked),
        requested: at(fetched.requested),
        arrived: at(fetched.arrived),
        started: at(fetched.started),
        inflated: at(fetched.inflated),
        verified: at(fetched.verified),
    }
}

/// To microseconds.
fn round(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}
