//! Opening an image: from a reference to a valid local index and an origin for its chunks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::unpack::unpack_index;
use super::{Origin, Patience};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::{Blob, Index};
use crate::oci::{
    Config, Document, Layers, MAX_CONFIG_BYTES, MAX_DOCUMENT_BYTES, Platform, Reference, descriptor_digest,
};
use crate::source::files::{blocking, read_small, replace};
use crate::source::{Access, RawDocument, Repository, Source, open_places};

/// Most image indexes that list one another on the way to a manifest.
const MAX_NESTING: u32 = 4;
/// Tries to fetch an index: wrong bytes and broken connections get another one.
const TRIES: u32 = 3;

/// An image that can be read: its index is local and valid, its chunks are at the origin.
pub struct Image {
    /// What the user named.
    pub reference: Reference,
    /// Digest of the image's manifest (not of the image index that may list it).
    pub manifest_digest: Digest,
    /// The image's layers: packs and index.
    pub layers: Layers,
    /// The device's description.
    pub index: Arc<Index>,
    /// Where the chunks come from.
    pub origin: Arc<Origin>,
    /// Environment, entry point and so on.
    pub config: Config,
}

impl Image {
    /// The image with an origin of its own, whose readers wait as long as `patience` says.
    #[must_use]
    pub fn patient(self, patience: Patience) -> Self {
        Self { origin: Arc::new(self.origin.fork(patience)), ..self }
    }
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
    let places = Places(Repository::open_all(reference, access).await?.into_iter().map(Arc::new).collect());
    let cache = Cache::open(cache_dir).await?;
    let mut raw = resolve(&places, &cache, reference).await?;
    let mut nesting = 0;
    let manifest = loop {
        match Document::parse(&raw.bytes, &raw.media_type)? {
            Document::Manifest(manifest) => break manifest,
            Document::Index(_) if nesting == MAX_NESTING => {
                return Err(Error::invalid(format!("image {reference}"), "its image indexes list one another"));
            }
            Document::Index(index) => {
                nesting += 1;
                let entry = Document::pick(&index, platform, places.name())?;
                let digest = descriptor_digest(entry)?;
                raw = document(&places, &cache, &digest, entry.media_type().as_ref()).await?;
            }
        }
    };
    let layers = Layers::of(&manifest)?;
    let config = config(&places, &cache, &manifest).await?;
    let index = Arc::new(index(&places, &cache, &layers).await?);
    let blobs: Vec<Blob> = index.blobs().collect();
    for blob in &blobs {
        if !layers.packs.iter().any(|(_, digest, bytes)| *digest == blob.digest && *bytes == blob.bytes) {
            let reason =
                format!("its index names blob {} of {} bytes, which is no pack of it", blob.digest, blob.bytes);
            return Err(Error::invalid(format!("image {reference}"), reason));
        }
    }
    let mut sources = open_places(reference, access)?;
    sources.extend(places.sources());
    let origin = Arc::new(Origin::new(blobs, sources).indexed(&index));
    Ok(Image { reference: reference.clone(), manifest_digest: raw.digest, layers, index, origin, config })
}

/// What is known of an image on this machine alone.
pub struct KnownImage {
    /// Digest of the image's manifest.
    pub manifest_digest: Digest,
    /// The device's description, checked just now.
    pub index: Index,
}

/// Opens the image `reference` as it was opened the last time, from `cache_dir` alone: nothing is asked for anywhere,
/// and nothing is changed.
///
/// # Errors
/// [`Error::NotFound`] for an image of which not everything is there that a start without its sources needs;
/// [`Error::Invalid`] for an index that is damaged.
pub async fn open_known(reference: &Reference, platform: &Platform, cache_dir: &Path) -> Result<KnownImage> {
    let cache = Cache { dir: cache_dir.to_owned() };
    let missing = |what: &str| Error::NotFound {
        source_name: "this machine".to_owned(),
        what: format!("the {what} of {reference}"),
    };
    let mut digest = match reference {
        Reference::Registry(registry) if registry.digest.is_some() => registry.digest,
        _ => cache.noted(reference).await?,
    }
    .ok_or_else(|| missing("name"))?;
    let mut nesting = 0;
    let manifest = loop {
        let bytes = cache.find(&digest, MAX_DOCUMENT_BYTES).await?.ok_or_else(|| missing("manifest"))?;
        match Document::parse(&bytes, "")? {
            Document::Manifest(manifest) => break manifest,
            Document::Index(_) if nesting == MAX_NESTING => {
                return Err(Error::invalid(format!("image {reference}"), "its image indexes list one another"));
            }
            Document::Index(index) => {
                nesting += 1;
                digest = descriptor_digest(Document::pick(&index, platform, "this machine")?)?;
            }
        }
    };
    let layers = Layers::of(&manifest)?;
    let config = descriptor_digest(manifest.config())?;
    cache.find(&config, MAX_CONFIG_BYTES).await?.ok_or_else(|| missing("configuration"))?;
    let (path, index_digest) = (cache.path(&layers.index.index_digest, "index"), layers.index.index_digest);
    let index = blocking(move || if path.exists() { Index::open(&path, &index_digest).map(Some) } else { Ok(None) });
    Ok(KnownImage { manifest_digest: digest, index: index.await?.ok_or_else(|| missing("index"))? })
}

/// Where an image is, best first.
struct Places(Vec<Arc<Repository>>);

impl Places {
    /// For people.
    fn name(&self) -> &str {
        self.0.last().map_or("", |place| place.name())
    }

    fn sources(self) -> Vec<Arc<dyn Source>> {
        self.0.into_iter().map(|place| place as Arc<dyn Source>).collect()
    }

    /// What the reference names: of the places that may be asked for that.
    async fn manifest(&self) -> Result<RawDocument> {
        let may = self.0.iter().filter(|place| place.resolves());
        first(may, |place| async move { place.manifest().await }).await
    }

    /// Asks one place after the other until one has the right answer.
    async fn ask<T, F: Future<Output = Result<T>>>(&self, ask: impl Fn(Arc<Repository>) -> F) -> Result<T> {
        first(self.0.iter(), ask).await
    }
}

/// The first good answer, or else the last place's error: that is the registry itself.
async fn first<'a, T, F: Future<Output = Result<T>>>(
    places: impl Iterator<Item = &'a Arc<Repository>>,
    ask: impl Fn(Arc<Repository>) -> F,
) -> Result<T> {
    let mut earlier: Option<Error> = None;
    for place in places {
        if let Some(error) = earlier.take() {
            tracing::warn!(%error, "asking {} instead", place.name());
        }
        match ask(Arc::clone(place)).await {
            Ok(answer) => return Ok(answer),
            Err(error) => earlier = Some(error),
        }
    }
    Err(earlier.unwrap_or_else(|| Error::unreachable("the image", "it has no source")))
}

/// The document that the reference names, and a note of it for a time without the registry.
async fn resolve(places: &Places, cache: &Cache, reference: &Reference) -> Result<RawDocument> {
    if let Reference::Registry(reference) = reference
        && let Some(digest) = &reference.digest
    {
        return document(places, cache, digest, "").await;
    }
    let note = cache.note(reference);
    match places.manifest().await {
        Ok(raw) => {
            cache.keep(&raw.digest, &raw.bytes).await?;
            let (path, digest) = (note, raw.digest.to_string());
            blocking(move || match read_small(&path, 128)? {
                Some(known) if known == digest.as_bytes() => Ok(()),
                _ => replace(&path, digest.as_bytes()),
            })
            .await?;
            Ok(raw)
        }
        Err(error @ Error::Unreachable { .. }) => {
            let Some(digest) = cache.noted(reference).await? else { return Err(error) };
            let Some(bytes) = cache.find(&digest, MAX_DOCUMENT_BYTES).await? else { return Err(error) };
            tracing::warn!(%reference, %digest, %error, "the image is used as it was found the last time");
            Ok(RawDocument { bytes, digest, media_type: String::new() })
        }
        Err(error) => Err(error),
    }
}

async fn document(places: &Places, cache: &Cache, digest: &Digest, media_type: &str) -> Result<RawDocument> {
    if let Some(bytes) = cache.find(digest, MAX_DOCUMENT_BYTES).await? {
        return Ok(RawDocument { bytes, digest: *digest, media_type: media_type.to_owned() });
    }
    let digest = *digest;
    let raw = places.ask(|place| async move { place.manifest_by_digest(&digest).await }).await?;
    cache.keep(&raw.digest, &raw.bytes).await?;
    Ok(raw)
}

async fn config(places: &Places, cache: &Cache, manifest: &oci_spec::image::ImageManifest) -> Result<Config> {
    let digest = descriptor_digest(manifest.config())?;
    let raw = match cache.find(&digest, MAX_CONFIG_BYTES).await? {
        Some(raw) => raw,
        None => {
            let bytes = manifest.config().size();
            let raw =
                places.ask(|place| async move { place.small_blob(&digest, bytes, MAX_CONFIG_BYTES).await }).await?;
            cache.keep(&digest, &raw).await?;
            raw
        }
    };
    Config::parse(raw)
}

async fn index(places: &Places, cache: &Cache, layers: &Layers) -> Result<Index> {
    let layer = &layers.index;
    let (path, digest) = (cache.path(&layer.index_digest, "index"), layer.index_digest);
    if let Some(index) = blocking({
        let path = path.clone();
        move || open_local(&path, &digest)
    })
    .await?
    {
        return Ok(index);
    }
    let mut tries = TRIES;
    loop {
        tries -= 1;
        let unpack = |place: Arc<Repository>| {
            let path = &path;
            async move { unpack_index(&place, layer, path).await }
        };
        match places.ask(unpack).await {
            Err(error @ (Error::Unreachable { .. } | Error::WrongBytes { .. })) if tries > 0 => {
                tracing::warn!(%error, "fetching the index again");
            }
            Err(error) => return Err(error),
            Ok(()) => break,
        }
    }
    blocking(move || Index::open(&path, &digest)).await
}

/// The index in the cache, if it is there and sound.
fn open_local(path: &Path, digest: &Digest) -> Result<Option<Index>> {
    if !path.exists() {
        return Ok(None);
    }
    match Index::open(path, digest) {
        Ok(index) => Ok(Some(index)),
        Err(error @ Error::Unsupported(_)) => Err(error),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the local index is damaged and fetched again");
            std::fs::remove_file(path).map_err(|error| Error::io(format!("removing {}", path.display()), error))?;
            Ok(None)
        }
    }
}

/// Verified documents by digest.
struct Cache {
    dir: PathBuf,
}

impl Cache {
    async fn open(dir: &Path) -> Result<Self> {
        let dir = dir.to_owned();
        blocking(move || {
            std::fs::create_dir_all(&dir).map_err(|error| Error::io(format!("creating {}", dir.display()), error))?;
            Ok(Self { dir })
        })
        .await
    }

    fn path(&self, digest: &Digest, kind: &str) -> PathBuf {
        self.dir.join(format!("{}.{kind}", digest.hex()))
    }

    /// Where it is noted what a reference named the last time.
    fn note(&self, reference: &Reference) -> PathBuf {
        self.path(&Digest::of(reference.to_string().as_bytes()), "ref")
    }

    async fn noted(&self, reference: &Reference) -> Result<Option<Digest>> {
        let note = self.note(reference);
        let known = blocking(move || read_small(&note, 128)).await?;
        Ok(known.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok()))
    }

    /// The document with `digest`. One that was damaged on disk counts as absent.
    async fn find(&self, digest: &Digest, max: u64) -> Result<Option<Vec<u8>>> {
        let (path, digest) = (self.path(digest, "json"), *digest);
        blocking(move || Ok(read_small(&path, max)?.filter(|bytes| Digest::of(bytes) == digest))).await
    }

    async fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if self.find(digest, bytes.len() as u64).await.is_ok_and(|found| found.is_some()) {
            return Ok(());
        }
        let (path, bytes) = (self.path(digest, "json"), bytes.to_vec());
        blocking(move || replace(&path, &bytes)).await
    }
}
