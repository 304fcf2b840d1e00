//! The status of a device.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::State;
use crate::daemon::trace::StartupStatus;

/// The numbers of one device. Sizes in bytes, times in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The device.
    pub id: String,
    /// The image's reference.
    pub image: String,
    /// How the device is doing.
    pub state: State,
    /// Size of the device.
    pub device_bytes: u64,
    /// Chunks of the image.
    pub chunks: ChunkCounts,
    /// Bytes that went somewhere.
    pub bytes: ByteCounts,
    /// Requests made to sources for this image.
    pub requests: u64,
    /// Of these, second ones to a further source, since the first was slower than usual.
    #[serde(default)]
    pub hedges: u64,
    /// Chunk reads that the pool answered.
    pub hits: u64,
    /// Chunk reads that needed a source.
    pub misses: u64,
    /// Chunks that came with wrong bytes.
    pub verify_failures: u64,
    /// How long sources were unreachable.
    pub outage_seconds: f64,
    /// Reads that waited for a source.
    pub waits: Waits,
    /// The device's start.
    #[serde(default)]
    pub startup: StartupStatus,
    /// Whether sources can be reached.
    #[serde(default)]
    pub health: Health,
    /// The sources, best first.
    #[serde(default)]
    pub sources: Vec<SourceStatus>,
    /// The last thing that went wrong with a source, whether or not it has passed.
    #[serde(default)]
    pub last_error: Option<String>,
    /// When that was, in seconds since 1970.
    #[serde(default)]
    pub last_error_at: Option<u64>,
}

/// Whether a device's sources can be reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The state.
    pub state: HealthState,
    /// Since when nothing can be reached, in seconds since 1970.
    pub since: Option<u64>,
    /// How long readers wait for sources in seconds; `None`: for ever.
    pub on_outage: Option<u64>,
}

/// A state of a device's sources, or of one source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// What was asked for last came, or nothing was asked for yet.
    #[default]
    Healthy,
    /// No source can be reached: readers wait, as long as `on_outage` says.
    Waiting,
    /// This source fails; others are asked first.
    Failing,
}

/// A source of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Its name.
    pub name: String,
    /// How it is doing.
    pub state: HealthState,
    /// Since when it fails, in seconds since 1970.
    pub since: Option<u64>,
    /// The last thing that went wrong with it, whether or not it has passed.
    pub last_error: Option<String>,
}

/// Chunks of an image, counted by digest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkCounts {
    /// In the index.
    pub total: u64,
    /// In the pool.
    pub local: u64,
    /// Fetched since the image was opened.
    pub fetched: u64,
    /// Fetches that failed.
    pub failed: u64,
}

/// Bytes of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteCounts {
    /// Read from the device.
    pub read: u64,
    /// Fetched from sources, as stored.
    pub fetched: u64,
    /// Of these, in the start-up stream.
    pub startup: u64,
}

/// Times that readers waited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Waits {
    /// How often.
    pub count: u64,
    /// All of them together.
    pub total: f64,
    /// The longest.
    pub max: f64,
}

impl Waits {
    /// Waits from whole durations.
    #[must_use]
    pub fn new(count: u64, total: Duration, max: Duration) -> Self {
        Self { count, total: total.as_secs_f64(), max: max.as_secs_f64() }
    }
}
