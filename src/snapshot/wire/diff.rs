//! `containerd.services.diff.v1`: layers into snapshots.

use super::{Descriptor, Mount};

/// The service's full name.
pub const SERVICE: &str = "containerd.services.diff.v1.Diff";

/// Of Apply.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ApplyRequest {
    /// The layer.
    #[prost(message, optional, tag = "1")]
    pub diff: Option<Descriptor>,
    /// Where it is applied to.
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<Mount>,
}

/// Of Apply.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ApplyResponse {
    /// The layer without compression.
    #[prost(message, optional, tag = "1")]
    pub applied: Option<Descriptor>,
}
