//! `containerd.services.content.v1`: blobs.

use super::{Labels, Timestamp};

/// The service's full name.
pub const SERVICE: &str = "containerd.services.content.v1.Content";

/// A blob.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Info {
    /// Digest.
    #[prost(string, tag = "1")]
    pub digest: String,
    /// Length in bytes.
    #[prost(int64, tag = "2")]
    pub size: i64,
    /// When it came.
    #[prost(message, optional, tag = "3")]
    pub created_at: Option<Timestamp>,
    /// When its labels were changed last.
    #[prost(message, optional, tag = "4")]
    pub updated_at: Option<Timestamp>,
    /// Its labels.
    #[prost(map = "string, string", tag = "5")]
    pub labels: Labels,
}

/// Of Update.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct InfoResponse {
    /// The blob.
    #[prost(message, optional, tag = "1")]
    pub info: Option<Info>,
}

/// Of Update.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UpdateRequest {
    /// The new values.
    #[prost(message, optional, tag = "1")]
    pub info: Option<Info>,
    /// Which of them count.
    #[prost(message, optional, tag = "2")]
    pub update_mask: Option<super::FieldMask>,
}

/// Of List.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListRequest {
    /// A blob is listed when one of them matches.
    #[prost(string, repeated, tag = "1")]
    pub filters: Vec<String>,
}

/// Of List; one of several.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListResponse {
    /// Some of the blobs.
    #[prost(message, repeated, tag = "1")]
    pub info: Vec<Info>,
}

/// Of Read.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ReadRequest {
    /// Which blob.
    #[prost(string, tag = "1")]
    pub digest: String,
    /// From where.
    #[prost(int64, tag = "2")]
    pub offset: i64,
    /// How much; 0: all.
    #[prost(int64, tag = "3")]
    pub size: i64,
}

/// Of Read; one of several.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ReadResponse {
    /// Where the bytes belong.
    #[prost(int64, tag = "1")]
    pub offset: i64,
    /// The bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub data: bytes::Bytes,
}

/// What a write wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum WriteAction {
    /// How far is it?
    Stat = 0,
    /// More bytes.
    Write = 1,
    /// It is complete.
    Commit = 2,
}

/// Of Write; one of several.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WriteRequest {
    /// What is wanted.
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub action: i32,
    /// Name of the upload.
    #[prost(string, tag = "2")]
    pub r#ref: String,
    /// Its length.
    #[prost(int64, tag = "3")]
    pub total: i64,
    /// Its digest.
    #[prost(string, tag = "4")]
    pub expected: String,
    /// Where the bytes belong.
    #[prost(int64, tag = "5")]
    pub offset: i64,
    /// The bytes.
    #[prost(bytes = "bytes", tag = "6")]
    pub data: bytes::Bytes,
    /// The new blob's labels.
    #[prost(map = "string, string", tag = "7")]
    pub labels: Labels,
}

/// Of Write; one for each request.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WriteResponse {
    /// What was done.
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub action: i32,
    /// How far the upload is.
    #[prost(int64, tag = "4")]
    pub offset: i64,
}
