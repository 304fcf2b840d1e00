//! `containerd.services.version.v1`: which containerd it is.

/// The service's full name.
pub const SERVICE: &str = "containerd.services.version.v1.Version";

/// Of Version.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct VersionResponse {
    /// The version.
    #[prost(string, tag = "1")]
    pub version: String,
}
