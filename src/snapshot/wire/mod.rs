//! What containerd and firstread send each other: the parts of containerd's gRPC interface (version 1) that are used,
//! described by hand.
//!
//! Field numbers are those of containerd's api/services/*/v1/*.proto and api/types/*.proto, which are frozen. Fields that
//! are not named here are skipped on reading and left out on writing.

pub mod content;
pub mod diff;
pub mod images;
pub mod introspection;
pub mod leases;
pub mod snapshots;
pub mod version;

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Labels: names and values.
pub type Labels = HashMap<String, String>;

/// `google.protobuf.Empty`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Empty {}

/// `google.protobuf.Timestamp`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Timestamp {
    /// Seconds since 1970.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// Nanoseconds of the second.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        // A clock before 1970 is as good as one at 1970: nothing is decided by these times.
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        }
    }
}

/// `google.protobuf.FieldMask`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FieldMask {
    /// The fields, as paths.
    #[prost(string, repeated, tag = "1")]
    pub paths: Vec<String>,
}

/// `containerd.types.Mount`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Mount {
    /// The file system's type: `bind`, `overlay`, `ext4`.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// What is mounted.
    #[prost(string, tag = "2")]
    pub source: String,
    /// Where, below the root; empty: the root itself.
    #[prost(string, tag = "3")]
    pub target: String,
    /// Its options, as mount(8) has them.
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// `containerd.types.Descriptor`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Descriptor {
    /// Media type.
    #[prost(string, tag = "1")]
    pub media_type: String,
    /// Digest, `sha256:…`.
    #[prost(string, tag = "2")]
    pub digest: String,
    /// Length in bytes.
    #[prost(int64, tag = "3")]
    pub size: i64,
    /// Annotations.
    #[prost(map = "string, string", tag = "5")]
    pub annotations: Labels,
}
