//! Profiles: what a start read, in the order of first touch. FORMAT.md, beside this file, describes the text.

mod locate;
mod merge;
mod text;

pub use locate::{Touch, locate};
pub use merge::merge;
pub use text::MAX_PROFILE_BYTES;

use serde::{Deserialize, Serialize};

/// Bytes in a block of a profile.
pub const BLOCK: u32 = 4096;

/// A recorded start.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// What was recorded, and how.
    pub recording: Recording,
    /// What was read, in the order of first touch.
    pub runs: Vec<Run>,
}

/// What a profile was made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recording {
    /// Reference of the image.
    pub image: String,
    /// Digest of its manifest; `None` if profiles of several were merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Digest of the device's contents ([`Index::device_digest`](crate::index::Index::device_digest)); `None` if profiles
    /// of several were merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// As in the index.
    pub file_system: String,
    /// Size of the device in bytes.
    pub device_bytes: u64,
    /// Read-ahead of the device in KiB, where the kernel has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_ahead_kb: Option<u32>,
    /// Length of the recording in seconds.
    pub seconds: f64,
    /// Seconds from attach until the program was ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<f64>,
    /// Whether everything that was read is in the profile.
    pub complete: bool,
}

/// Blocks that were read for the first time, one after another.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// When, in seconds from attach.
    pub seconds: f64,
    /// What they hold.
    pub place: Place,
    /// Length in blocks, at least 1.
    pub blocks: u32,
    /// First block on the device that was recorded.
    pub block: Option<u32>,
}

/// What blocks hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A part of what a path names.
    Named {
        /// What kind of thing that is.
        kind: Kind,
        /// Its path from `/` on.
        path: Vec<u8>,
        /// Number of the first block in it.
        from: u32,
    },
    /// Something else of a file system.
    Metadata,
    /// Something of a device without a file system that was looked into.
    Data,
}

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
}
