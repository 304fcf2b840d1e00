//! The layers of a firstread image, found by their annotations.

use oci_spec::image::{Descriptor, ImageManifest};

use super::{annotation, descriptor_digest};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::{MAX_INDEX_BYTES, Role};

/// The layer that holds the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexLayer {
    /// The layer's digest.
    pub digest: Digest,
    /// The layer's stored length in bytes.
    pub bytes: u64,
    /// sha256 of the plain index.
    pub index_digest: Digest,
    /// Length of the plain index in bytes, at most [`MAX_INDEX_BYTES`].
    pub index_bytes: u64,
    /// The dm-verity tree on the device.
    pub verity: Option<Verity>,
}

/// Where a dm-verity tree is, and what it must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verity {
    /// The root hash.
    pub root: Digest,
    /// Offset of the tree's superblock on the device in bytes; before it is what the tree protects.
    pub offset: u64,
}

/// The layers of a firstread image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layers {
    /// The packs in manifest order: role, digest, stored length in bytes.
    pub packs: Vec<(Role, Digest, u64)>,
    /// The index layer.
    pub index: IndexLayer,
    /// How many ordinary layers there are besides, such as a container's commit puts on top. A device shows nothing of them.
    pub ordinary: usize,
}

impl Layers {
    /// Finds the layers of `manifest`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an ordinary image or one of a newer version, and [`Error::Invalid`] for annotations
    /// that contradict the manifest.
    pub fn of(manifest: &ImageManifest) -> Result<Self> {
        let mut packs = Vec::new();
        let mut index = None;
        let mut ordinary = 0;
        for (number, layer) in manifest.layers().iter().enumerate() {
            let Some(role) = text(layer, annotation::ROLE) else {
                ordinary += 1;
                continue;
            };
            match text(layer, annotation::VERSION) {
                Some(annotation::VERSION_1) => {}
                found => {
                    return Err(Error::Unsupported(format!(
                        "firstread image of version {}; this program reads version 1: use a newer one",
                        found.map_or_else(|| "(none)".to_owned(), |found| format!("{found:?}"))
                    )));
                }
            }
            let digest = descriptor_digest(layer)?;
            if text(layer, annotation::DIGEST).is_some_and(|text| text != digest.to_string()) {
                return Err(invalid(format!("layer {number} is annotated with another digest than its own")));
            }
            match role {
                annotation::ROLE_PACK => packs.push((Role::Pack, digest, layer.size())),
                annotation::ROLE_STARTUP => packs.push((Role::Startup, digest, layer.size())),
                annotation::ROLE_INDEX if index.is_none() => index = Some(index_layer(layer, digest)?),
                annotation::ROLE_INDEX => return Err(invalid("it has two index layers")),
                other => return Err(Error::Unsupported(format!("layer {number} with the role {other:?}"))),
            }
        }
        let index = index.ok_or_else(|| {
            Error::Unsupported("this is not a firstread image; convert it with `firstread build`".to_owned())
        })?;
        Ok(Self { packs, index, ordinary })
    }
}

fn index_layer(layer: &Descriptor, digest: Digest) -> Result<IndexLayer> {
    let required = |name: &str| text(layer, name).ok_or_else(|| invalid(format!("its index layer lacks {name}")));
    let index_digest = required(annotation::INDEX_DIGEST)?.parse()?;
    let bytes = required(annotation::INDEX_BYTES)?;
    let index_bytes = bytes
        .parse::<u64>()
        .ok()
        .filter(|&bytes| bytes > 0 && bytes <= MAX_INDEX_BYTES)
        .ok_or_else(|| invalid(format!("its index claims {bytes:?} bytes; at most {MAX_INDEX_BYTES} are read")))?;
    // zstd makes nothing larger than its input by more than a few bytes a block; the tar adds some headers.
    if layer.size() == 0 || layer.size() > index_bytes + index_bytes / 64 + (1 << 20) {
        return Err(invalid(format!("its index layer has {} bytes for {index_bytes} plain ones", layer.size())));
    }
    let verity = match (text(layer, annotation::VERITY_ROOT), text(layer, annotation::VERITY_OFFSET)) {
        (Some(root), Some(offset)) => Some(Verity {
            root: format!("sha256:{root}").parse()?,
            offset: offset.parse().map_err(|_| invalid(format!("its verity tree is at {offset:?}")))?,
        }),
        (None, None) => None,
        _ => return Err(invalid("its verity tree lacks its root hash or its place")),
    };
    Ok(IndexLayer { digest, bytes: layer.size(), index_digest, index_bytes, verity })
}

fn text<'a>(layer: &'a Descriptor, name: &str) -> Option<&'a str> {
    layer.annotations().as_ref()?.get(name).map(String::as_str)
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::invalid("firstread image", reason)
}
