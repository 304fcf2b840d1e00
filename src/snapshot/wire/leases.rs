//! `containerd.services.leases.v1`: what is not collected as garbage for a while.

use super::Labels;

/// The service's full name.
pub const SERVICE: &str = "containerd.services.leases.v1.Leases";

/// Of Create.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CreateRequest {
    /// The lease's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its labels; `containerd.io/gc.expire` is when it ends by itself.
    #[prost(map = "string, string", tag = "3")]
    pub labels: Labels,
}

/// Of Delete.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeleteRequest {
    /// The lease's id.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Of Create; what it says is known already.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CreateResponse {}
