//! What the daemon answers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::SourceAccess;
use crate::daemon::uppers::UpperInfo;
use crate::pool::Scrubbed;

/// A part of a profile's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfilePage {
    /// The part.
    pub text: String,
    /// Where the next one begins, if there is one.
    pub next: Option<u64>,
}

/// The answer to [`Call::Ready`](super::Call::Ready).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// The device.
    pub id: String,
    /// Seconds from its attach until it was first said to be ready.
    pub seconds: f64,
}

/// How far a piece of long work is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobState {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all; 0 when that is not known yet.
    pub total: u64,
    /// The answer, when the work has ended.
    pub answer: Option<serde_json::Value>,
}

/// The answer to [`Call::PoolTrim`](super::Call::PoolTrim).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trimmed {
    /// Bytes that were freed.
    pub freed: u64,
}

/// The answer to [`Call::PoolScrub`](super::Call::PoolScrub).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubAnswer {
    /// What was found.
    #[serde(flatten)]
    pub found: Scrubbed,
    /// Chunks that were fetched again: what was dropped, or is missing of a pinned image.
    #[serde(default)]
    pub refetched: u64,
}

/// The answer to [`Call::Hello`](super::Call::Hello).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The program's version.
    pub program: String,
    /// The daemon's process.
    pub pid: u32,
    /// The root directory that it owns.
    pub root: PathBuf,
}

/// How a device is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Served.
    Attached,
    /// Its server died; somebody still holds it and gets errors. It goes away with `umount` or `detach`.
    Lost,
    /// Its server died, and this daemon is about to take it over; its readers wait.
    Recovering,
}

/// One device, as `list`, `attach` and `mount` show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Short and readable; what `detach` and `status` take.
    pub id: String,
    /// The image's reference.
    pub image: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// Path of the block device.
    pub device: PathBuf,
    /// Which transport serves it.
    pub transport: String,
    /// Where `mount` mounted it.
    pub mountpoint: Option<PathBuf>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Where what is written goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper: Option<UpperInfo>,
    /// How it is doing.
    pub state: State,
}

/// The answer to [`Call::Attach`](super::Call::Attach).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The new device.
    #[serde(flatten)]
    pub device: DeviceInfo,
    /// What is on it: `ext4`, or something else or empty for disk images.
    pub file_system: String,
    /// Size of the device in bytes.
    pub device_bytes: u64,
    /// Blocks of the inode table that ext4 should read ahead (its mount option): none where a start-up pack has all
    /// that is needed.
    #[serde(default = "inode_readahead")]
    pub inode_readahead_blks: u32,
    /// Why the transports before the chosen one were not possible.
    pub passed_over: Vec<String>,
    /// What the user should know of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

/// The kernel's own default.
fn inode_readahead() -> u32 {
    32
}

/// The answer to [`Call::Export`](super::Call::Export).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// The image's reference.
    pub image: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// What NBD clients connect to; for vhost-user-blk the socket's path.
    pub uri: String,
    /// Size of the device in bytes.
    pub device_bytes: u64,
    /// What the user should know of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

/// The answer to [`Call::Snapshot`](super::Call::Snapshot).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshotted {
    /// The copy: the directory of an upper that nobody has.
    pub dir: PathBuf,
    /// The image that it lies over.
    pub image: String,
    /// Digest of that image's manifest.
    pub digest: String,
    /// How that image's source is reached.
    pub access: SourceAccess,
    /// Bytes that were changed.
    pub bytes: u64,
}

/// The answer to [`Call::Stop`](super::Call::Stop).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// The devices that were detached.
    pub detached: Vec<String>,
    /// The devices that the next daemon takes over.
    #[serde(default)]
    pub left: Vec<String>,
    /// The devices that could not be detached, and why.
    pub in_use: Vec<String>,
    /// Whether the daemon stops.
    pub stopping: bool,
}

/// The answer to [`Call::Expect`](super::Call::Expect).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// Digest of the image's manifest.
    pub digest: String,
}
