//! A start as a whole: how long it took, and how far that is from its limit.

use std::collections::HashMap;

use serde::Serialize;

use super::facts::Facts;
use super::ranges::{length, spans};
use crate::profile::BLOCK;

/// Stored bytes of a request from which on its speed says something of the link.
const TELLING: u64 = 256 << 10;

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
    /// Bytes of it that the kernel was told to read before the program asked: which the program used is not known then.
    pub laid_bytes: u64,
    /// Chunks that were waited for outside of it.
    pub missed: u64,
    /// Read-ahead of the device in KiB.
    pub read_ahead_kb: Option<u32>,
}

/// Adds up a start; what it missed is for the caller to say.
pub(super) fn totals(facts: &Facts) -> Start {
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
        laid_bytes: facts.trace.startup.laid_bytes,
        missed: 0,
        read_ahead_kb: facts.profile.recording.read_ahead_kb,
    }
}
