//! OCI documents and references: parsing only, nothing here does I/O.
//!
//! Everything comes from outside and is bounded before it is parsed. The documents are those of the OCI image
//! specification (image-spec v1.1: manifest.md, image-index.md, config.md, descriptor.md) and their docker twins.

pub mod annotation;
mod document;
mod layers;
mod reference;
mod time;

pub use document::{
    Config, Document, MAX_CONFIG_BYTES, MAX_DOCUMENT_BYTES, Platform, canonical_json, descriptor_digest, media_type,
};
pub use layers::{IndexLayer, Layers, Verity};
pub use reference::{Reference, RegistryReference};
pub use time::rfc3339;
