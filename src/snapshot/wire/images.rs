//! `containerd.services.images.v1`: names of images.

use super::{Descriptor, FieldMask, Labels, Timestamp};

/// The service's full name.
pub const SERVICE: &str = "containerd.services.images.v1.Images";

/// A named image.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Image {
    /// Its name, a full reference.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its labels.
    #[prost(map = "string, string", tag = "2")]
    pub labels: Labels,
    /// Its manifest, or the image index that lists it.
    #[prost(message, optional, tag = "3")]
    pub target: Option<Descriptor>,
    /// When it was named.
    #[prost(message, optional, tag = "7")]
    pub created_at: Option<Timestamp>,
    /// When that was changed last.
    #[prost(message, optional, tag = "8")]
    pub updated_at: Option<Timestamp>,
}

/// Of List.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListRequest {
    /// An image is listed when one of them matches.
    #[prost(string, repeated, tag = "1")]
    pub filters: Vec<String>,
}

/// Of List.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListResponse {
    /// The images.
    #[prost(message, repeated, tag = "1")]
    pub images: Vec<Image>,
}

/// Of Create.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CreateRequest {
    /// The image.
    #[prost(message, optional, tag = "1")]
    pub image: Option<Image>,
}

/// Of Update.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UpdateRequest {
    /// The new values.
    #[prost(message, optional, tag = "1")]
    pub image: Option<Image>,
    /// Which of them count; without it all.
    #[prost(message, optional, tag = "2")]
    pub update_mask: Option<FieldMask>,
}

/// Of Create and Update.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ImageResponse {
    /// The image.
    #[prost(message, optional, tag = "1")]
    pub image: Option<Image>,
}

/// Of Delete.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeleteRequest {
    /// The image's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Whether to collect what nothing needs any more before the answer.
    #[prost(bool, tag = "2")]
    pub sync: bool,
}
