//! `containerd.services.introspection.v1`: what a containerd consists of.

/// The service's full name.
pub const SERVICE: &str = "containerd.services.introspection.v1.Introspection";

/// Of Plugins.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PluginsRequest {
    /// A plugin is listed when one of them matches.
    #[prost(string, repeated, tag = "1")]
    pub filters: Vec<String>,
}

/// A plugin.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Plugin {
    /// Its type, e.g. `io.containerd.snapshotter.v1`.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// Its name.
    #[prost(string, tag = "2")]
    pub id: String,
    /// What it says of itself; `root` is its directory.
    #[prost(map = "string, string", tag = "5")]
    pub exports: super::Labels,
}

/// Of Plugins.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PluginsResponse {
    /// The plugins.
    #[prost(message, repeated, tag = "1")]
    pub plugins: Vec<Plugin>,
}
