//! Earlier images whose packs are listed again, so that their chunks need not be stored a second time.

use std::io::Read;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::Request;
use super::pipeline::Reusable;
use super::rootfs::clean;
use super::tar::Archive;
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::{Blob, Index, MAX_INDEX_BYTES, Role};
use crate::oci::annotation::INDEX_PATH;
use crate::oci::{Config, Document, Layers, MAX_CONFIG_BYTES, Platform, Reference, descriptor_digest};
use crate::source::{Purpose, Repository};

/// An earlier image.
pub(super) struct Earlier {
    pub repository: Repository,
    /// By the blob numbers of its index: the pack and its diff_id.
    pub packs: Vec<(Blob, Digest)>,
    pub index: Arc<Index>,
}

/// Opens the image that `reference` names.
pub(super) fn open(reference: &Reference, platform: &Platform, request: &Request, runtime: &Handle) -> Result<Earlier> {
    runtime.block_on(async {
        let repository = Repository::open(reference, &request.access, Purpose::Read).await?;
        let mut document = repository.manifest().await?;
        if let Document::Index(index) = Document::parse(&document.bytes, &document.media_type)? {
            let entry = Document::pick(&index, platform, &reference.to_string())?;
            document = repository.manifest_by_digest(&descriptor_digest(entry)?).await?;
        }
        let Document::Manifest(manifest) = Document::parse(&document.bytes, &document.media_type)? else {
            return Err(Error::Unsupported(format!("{reference}: an image index inside an image index")));
        };
        let layers = Layers::of(&manifest)?;
        let config = manifest.config();
        let config =
            Config::parse(repository.small_blob(&descriptor_digest(config)?, config.size(), MAX_CONFIG_BYTES).await?)?;
        let stored = repository.small_blob(&layers.index.digest, layers.index.bytes, 2 * MAX_INDEX_BYTES).await?;
        let index = index_of(&stored, &layers.index.index_digest, request)?;
        let diff_ids = config.parsed.rootfs().diff_ids();
        let mut packs = Vec::new();
        for blob in index.blobs() {
            let at = manifest
                .layers()
                .iter()
                .position(|layer| descriptor_digest(layer).is_ok_and(|digest| digest == blob.digest));
            let diff_id = at.and_then(|at| diff_ids.get(at)).ok_or_else(|| {
                Error::invalid(reference.to_string(), format!("its pack {} is not a layer of it", blob.digest))
            })?;
            packs.push((blob, diff_id.parse()?));
        }
        Ok(Earlier { repository, packs, index: Arc::new(index) })
    })
}

/// The index in its layer, checked against the digest in the manifest.
fn index_of(stored: &[u8], digest: &Digest, request: &Request) -> Result<Index> {
    let tar =
        zstd::stream::read::Decoder::with_buffer(stored).map_err(|error| Error::io("inflating an index", error))?;
    let mut archive = Archive::new(tar, &request.limits);
    while let Some(entry) = archive.next_entry()? {
        if clean(&entry.path).join(&b'/') == INDEX_PATH.as_bytes() && entry.size <= MAX_INDEX_BYTES {
            let mut bytes = Vec::new();
            archive.read_to_end(&mut bytes).map_err(|error| Error::io("reading an index", error))?;
            if Digest::of(&bytes) != *digest {
                return Err(Error::invalid("index", format!("it does not hash to {digest}")));
            }
            return Index::from_bytes(bytes);
        }
    }
    Err(Error::invalid("index layer", format!("it has no {INDEX_PATH}")))
}

/// The chunks of the earlier images' packs; of several places the first counts. Start-up packs repeat what packs have.
pub(super) fn chunks(earlier: &[Earlier]) -> Reusable {
    let mut reusable = Reusable::new();
    for (number, image) in earlier.iter().enumerate() {
        for chunk in image.index.chunks() {
            if image.packs.get(chunk.blob as usize).is_some_and(|(blob, _)| blob.role == Role::Pack) {
                reusable.entry(chunk.digest).or_insert((number, chunk));
            }
        }
    }
    reusable
}
