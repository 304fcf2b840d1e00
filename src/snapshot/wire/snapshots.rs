//! `containerd.services.snapshots.v1`.

use super::{FieldMask, Labels, Mount, Timestamp};

/// The service's full name.
pub const SERVICE: &str = "containerd.services.snapshots.v1.Snapshots";

/// What a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Not said.
    Unknown = 0,
    /// Read-only, for looking at a committed one.
    View = 1,
    /// Can be written, and committed.
    Active = 2,
    /// Unchangeable; the parent of others.
    Committed = 3,
}

/// A snapshot as containerd sees it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Info {
    /// Its key, or its name once it is committed.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The committed snapshot that it is based on; empty: none.
    #[prost(string, tag = "2")]
    pub parent: String,
    /// What it is.
    #[prost(enumeration = "Kind", tag = "3")]
    pub kind: i32,
    /// When it was made.
    #[prost(message, optional, tag = "4")]
    pub created_at: Option<Timestamp>,
    /// When its labels were changed last.
    #[prost(message, optional, tag = "5")]
    pub updated_at: Option<Timestamp>,
    /// Its labels.
    #[prost(map = "string, string", tag = "6")]
    pub labels: Labels,
}

/// Of Prepare and View.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PrepareRequest {
    /// containerd's name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// The new snapshot's key.
    #[prost(string, tag = "2")]
    pub key: String,
    /// What it is based on; empty: nothing.
    #[prost(string, tag = "3")]
    pub parent: String,
    /// Its labels.
    #[prost(map = "string, string", tag = "4")]
    pub labels: Labels,
}

/// Of Prepare, View and Mounts.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MountsResponse {
    /// What to mount, in order.
    #[prost(message, repeated, tag = "1")]
    pub mounts: Vec<Mount>,
}

/// Of Mounts, Remove, Stat and Usage.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct KeyRequest {
    /// containerd's name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Which one.
    #[prost(string, tag = "2")]
    pub key: String,
}

/// Of Commit.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CommitRequest {
    /// containerd's name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// The name from now on.
    #[prost(string, tag = "2")]
    pub name: String,
    /// The key until now.
    #[prost(string, tag = "3")]
    pub key: String,
    /// Its labels; they replace those that it had.
    #[prost(map = "string, string", tag = "4")]
    pub labels: Labels,
}

/// Of Stat and Update.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct InfoResponse {
    /// The snapshot.
    #[prost(message, optional, tag = "1")]
    pub info: Option<Info>,
}

/// Of Update.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UpdateRequest {
    /// containerd's name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// The new values.
    #[prost(message, optional, tag = "2")]
    pub info: Option<Info>,
    /// Which of them count; without it all that can change.
    #[prost(message, optional, tag = "3")]
    pub update_mask: Option<FieldMask>,
}

/// Of List.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListRequest {
    /// containerd's name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// A snapshot is listed when one of them matches, or there is none.
    #[prost(string, repeated, tag = "2")]
    pub filters: Vec<String>,
}

/// Of List; one of several.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListResponse {
    /// Some of the snapshots.
    #[prost(message, repeated, tag = "1")]
    pub info: Vec<Info>,
}

/// Of Usage.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct UsageResponse {
    /// Bytes on disk.
    #[prost(int64, tag = "1")]
    pub size: i64,
    /// Inodes.
    #[prost(int64, tag = "2")]
    pub inodes: i64,
}

/// Of Cleanup.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CleanupRequest {
    /// containerd's name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
}
