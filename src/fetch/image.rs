//! Opening an image: from a reference to a valid local index and an origin for its chunks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::places::Places;
use super::unpack::unpack_index;
use super::{Origin, Patience};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::{Blob, Index};
use crate::oci::{
    Config, Document, Layers, MAX_CONFIG_BYTES, MAX_DOCUMENT_BYTES, Platform, Reference, descriptor_digest,
};
use crate::source::files::{blocking, put, read_small, replace, sync_directory};
use crate::source::{Access, RawDocument, Repository, open_places};

/// Most image indexes that list one another on the way to a manifest.
const MAX_NESTING: u32 = 4;
/// Most things that can be missing of an image: its documents, the configuration and the index, and one round without a
/// miss.
const MOST_MISSING: u32 = MAX_NESTING + 1 + 1 + 1 + 1;
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
/// `cache_dir` keeps verified indexes, manifests and configs by digest, each written once and renamed into place, and checked
/// whenever it is read. Nothing of it is synced, which would hold up a start: see [`sync_known`]. What
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
    let places = Places::open(reference, access).await?;
    let cache = Cache { dir: cache_dir.to_owned() };
    let top = resolve(&places, &cache, reference).await?;
    let Local { documents: Documents { manifest_digest, layers, config }, index } =
        localize(&places, &cache, reference, &top, platform).await?;
    let (config, index) = (Config::parse(config)?, Arc::new(index));
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
    Ok(Image { reference: reference.clone(), manifest_digest, layers, index, origin, config })
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
    let (cache, reference, platform) = (Cache { dir: cache_dir.to_owned() }, reference.clone(), platform.clone());
    blocking(move || {
        let missing = |what: &str| Error::NotFound {
            source_name: "this machine".to_owned(),
            what: format!("the {what} of {reference}"),
        };
        let digest = match digest_of(&reference) {
            Some(digest) => digest,
            None => cache.noted(&reference)?.ok_or_else(|| missing("name"))?,
        };
        let found = cache.documents(&reference, &Top::known(digest), &platform)?;
        let documents = found.map_err(|lack| missing(lack.name()))?;
        let path = cache.index_path(&documents.layers);
        if !path.exists() {
            return Err(missing("index"));
        }
        let index = Index::open(&path, &documents.layers.index.index_digest)?;
        Ok(KnownImage { manifest_digest: documents.manifest_digest, index })
    })
    .await
}

/// What another program has of an image, unverified.
pub struct Parts<'a> {
    /// The manifest.
    pub manifest: &'a [u8],
    /// The configuration that it names.
    pub config: &'a [u8],
    /// A file with the plain index.
    pub index: &'a Path,
}

/// Puts an image's parts where [`open_image`] looks for them, which then asks nobody. Blocks.
///
/// # Errors
/// [`Error::Unsupported`] for an ordinary image; [`Error::Invalid`] for parts of which one does not name the next by its
/// digest; what the system says.
pub fn keep_image(cache_dir: &Path, parts: &Parts<'_>) -> Result<()> {
    let Document::Manifest(manifest) = Document::parse(parts.manifest, "")? else {
        return Err(Error::invalid("firstread image", "what was given as its manifest lists manifests"));
    };
    let layers = Layers::of(&manifest)?;
    let config = Digest::of(parts.config);
    if descriptor_digest(manifest.config())? != config {
        return Err(Error::invalid("firstread image", "its configuration is another one than its manifest names"));
    }
    let cache = Cache { dir: cache_dir.to_owned() };
    let failed = |error| Error::io(format!("copying the index {}", parts.index.display()), error);
    std::fs::create_dir_all(cache_dir).map_err(failed)?;
    let path = cache.path(&layers.index.index_digest, "index");
    if open_local(&path, &layers.index.index_digest)?.is_none() {
        let new = path.with_extension(format!("new-{}-{:?}", std::process::id(), std::thread::current().id()));
        let copied = std::fs::copy(parts.index, &new).map_err(failed).and_then(|_| {
            // What is wrong with it is found before it has its name.
            Index::open(&new, &layers.index.index_digest)?;
            std::fs::rename(&new, &path).map_err(failed)
        });
        if copied.is_err() {
            // Nothing else is left of it.
            let _ = std::fs::remove_file(&new);
        }
        copied?;
    }
    put(&cache.path(&config, "json"), parts.config)?;
    put(&cache.path(&Digest::of(parts.manifest), "json"), parts.manifest)
}

/// Makes durable what `cache_dir` has of all images: for one that is to start without its sources, also after a loss of power.
/// Blocks.
///
/// # Errors
/// What the system says.
pub fn sync_known(cache_dir: &Path) -> Result<()> {
    sync_directory(cache_dir)
}

/// The digest that a reference names its document by.
fn digest_of(reference: &Reference) -> Option<Digest> {
    match reference {
        Reference::Registry(registry) => registry.digest,
        _ => None,
    }
}

/// What a reference names: a manifest, or an image index.
#[derive(Clone)]
struct Top {
    digest: Digest,
    media_type: String,
    /// The document, when it has just been asked for.
    fresh: Option<Vec<u8>>,
}

impl Top {
    /// A document that is to be found by its digest.
    fn known(digest: Digest) -> Self {
        Self { digest, media_type: String::new(), fresh: None }
    }
}

/// What the reference names now, or named the last time when its places can't be reached.
async fn resolve(places: &Places, cache: &Cache, reference: &Reference) -> Result<Top> {
    if let Some(digest) = digest_of(reference) {
        return Ok(Top::known(digest));
    }
    match places.manifest().await {
        Ok(RawDocument { bytes, digest, media_type }) => Ok(Top { digest, media_type, fresh: Some(bytes) }),
        Err(error @ Error::Unreachable { .. }) => {
            let (cache, noted) = (cache.clone(), reference.clone());
            let Some(digest) = blocking(move || cache.noted(&noted)).await? else { return Err(error) };
            tracing::warn!(%reference, %digest, %error, "the image is used as it was found the last time");
            Ok(Top::known(digest))
        }
        Err(error) => Err(error),
    }
}

/// All that must be local of an image before it can be read.
struct Local {
    documents: Documents,
    index: Index,
}

/// Makes an image's documents and index local. What is there is looked through in one piece of blocking work: that is all
/// that a known image needs.
async fn localize(
    places: &Places,
    cache: &Cache,
    reference: &Reference,
    top: &Top,
    platform: &Platform,
) -> Result<Local> {
    for _ in 0..MOST_MISSING {
        let (cache_here, reference, top, platform) = (cache.clone(), reference.clone(), top.clone(), platform.clone());
        let found = blocking(move || {
            cache_here.keep_top(&reference, &top)?;
            let documents = match cache_here.documents(&reference, &top, &platform)? {
                Ok(documents) => documents,
                Err(missing) => return Ok(Err(missing)),
            };
            let index = open_local(&cache_here.index_path(&documents.layers), &documents.layers.index.index_digest)?;
            Ok(match index {
                Some(index) => Ok(Local { documents, index }),
                None => Err(Missing::Index(documents.layers)),
            })
        });
        match found.await? {
            Ok(local) => return Ok(local),
            Err(missing) => fetch(places, cache, missing).await?,
        }
    }
    let reason = "what was written there is gone or damaged as soon as it is read again; check the disk";
    Err(Error::invalid(format!("directory {}", cache.dir.display()), reason))
}

/// Fetches what is missing into the cache.
async fn fetch(places: &Places, cache: &Cache, missing: Missing) -> Result<()> {
    match missing {
        Missing::Document(digest) => {
            let raw = places.ask(|place| async move { place.manifest_by_digest(&digest).await }).await?;
            keep(cache, raw.digest, raw.bytes).await
        }
        // Of an image that is new the index is missing as well, and neither needs the other.
        Missing::Config { digest, bytes, layers } => {
            let config = async {
                let ask =
                    |place: Arc<Repository>| async move { place.small_blob(&digest, bytes, MAX_CONFIG_BYTES).await };
                keep(cache, digest, places.ask(ask).await?).await
            };
            let path = cache.index_path(&layers);
            let index = async { if path.exists() { Ok(()) } else { fetch_index(places, &layers, &path).await } };
            tokio::try_join!(config, index).map(drop)
        }
        Missing::Index(layers) => fetch_index(places, &layers, &cache.index_path(&layers)).await,
    }
}

async fn keep(cache: &Cache, digest: Digest, bytes: Vec<u8>) -> Result<()> {
    let cache = cache.clone();
    blocking(move || cache.keep(&digest, &bytes)).await
}

async fn fetch_index(places: &Places, layers: &Layers, path: &Path) -> Result<()> {
    let mut tries = TRIES;
    loop {
        tries -= 1;
        let unpack = |place: Arc<Repository>| async move { unpack_index(&place, &layers.index, path).await };
        match places.ask(unpack).await {
            Err(error @ (Error::Unreachable { .. } | Error::WrongBytes { .. })) if tries > 0 => {
                tracing::warn!(%error, "fetching the index again");
            }
            result => return result,
        }
    }
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

/// An image's documents.
struct Documents {
    /// Digest of the manifest.
    manifest_digest: Digest,
    layers: Layers,
    /// The configuration, not parsed yet.
    config: Vec<u8>,
}

/// What the cache has not.
enum Missing {
    Document(Digest),
    /// The configuration; whether the index is there was not looked at.
    Config {
        digest: Digest,
        bytes: u64,
        layers: Layers,
    },
    Index(Layers),
}

impl Missing {
    /// For people.
    fn name(&self) -> &'static str {
        match self {
            Self::Document(_) => "manifest",
            Self::Config { .. } => "configuration",
            Self::Index(_) => "index",
        }
    }
}

/// Verified documents and indexes by digest. Its methods block.
#[derive(Clone)]
struct Cache {
    dir: PathBuf,
}

impl Cache {
    fn path(&self, digest: &Digest, kind: &str) -> PathBuf {
        self.dir.join(format!("{}.{kind}", digest.hex()))
    }

    fn index_path(&self, layers: &Layers) -> PathBuf {
        self.path(&layers.index.index_digest, "index")
    }

    /// Where it is noted what a reference named the last time.
    fn note(&self, reference: &Reference) -> PathBuf {
        self.path(&Digest::of(reference.to_string().as_bytes()), "ref")
    }

    fn noted(&self, reference: &Reference) -> Result<Option<Digest>> {
        let known = read_small(&self.note(reference), 128)?;
        Ok(known.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok()))
    }

    /// The document with `digest`. One that was damaged on disk counts as absent.
    fn find(&self, digest: &Digest, max: u64) -> Result<Option<Vec<u8>>> {
        Ok(read_small(&self.path(digest, "json"), max)?.filter(|bytes| Digest::of(bytes) == *digest))
    }

    fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if self.find(digest, bytes.len() as u64).is_ok_and(|found| found.is_some()) {
            return Ok(());
        }
        put(&self.path(digest, "json"), bytes)
    }

    /// Makes the cache, and keeps and notes a fresh document for a time without its places.
    fn keep_top(&self, reference: &Reference, top: &Top) -> Result<()> {
        let made = std::fs::create_dir_all(&self.dir);
        made.map_err(|error| Error::io(format!("creating {}", self.dir.display()), error))?;
        let Some(bytes) = &top.fresh else { return Ok(()) };
        self.keep(&top.digest, bytes)?;
        match self.noted(reference)? {
            Some(known) if known == top.digest => Ok(()),
            None => put(&self.note(reference), top.digest.to_string().as_bytes()),
            // What is known is not to be lost with what is new.
            Some(_) => replace(&self.note(reference), top.digest.to_string().as_bytes()),
        }
    }

    /// The documents from the one that the reference names to the configuration, or the first that is not there.
    fn documents(
        &self,
        reference: &Reference,
        top: &Top,
        platform: &Platform,
    ) -> Result<std::result::Result<Documents, Missing>> {
        let Top { mut digest, mut media_type, fresh } = top.clone();
        let (mut bytes, mut nesting) = (fresh, 0);
        let manifest = loop {
            let found = match bytes.take() {
                Some(bytes) => Some(bytes),
                None => self.find(&digest, MAX_DOCUMENT_BYTES)?,
            };
            let Some(found) = found else { return Ok(Err(Missing::Document(digest))) };
            match Document::parse(&found, &media_type)? {
                Document::Manifest(manifest) => break manifest,
                Document::Index(_) if nesting == MAX_NESTING => {
                    return Err(Error::invalid(format!("image {reference}"), "its image indexes list one another"));
                }
                Document::Index(index) => {
                    nesting += 1;
                    let entry = Document::pick(&index, platform, &reference.to_string())?;
                    (digest, media_type) = (descriptor_digest(entry)?, entry.media_type().to_string());
                }
            }
        };
        let layers = Layers::of(&manifest)?;
        let config = descriptor_digest(manifest.config())?;
        Ok(match self.find(&config, MAX_CONFIG_BYTES)? {
            Some(config) => Ok(Documents { manifest_digest: digest, layers, config }),
            None => Err(Missing::Config { digest: config, bytes: manifest.config().size(), layers }),
        })
    }
}
