//! A repository: what holds an image's manifest and blobs, and takes new ones.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;

use super::files;
use super::layout::Layout;
#[cfg(feature = "registry")]
use super::registry::Registry;
use super::{Body, Source, SourceFuture};
use crate::chunk::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::index::Blob;
use crate::oci::Reference;

/// How repositories are reached.
#[derive(Clone, Debug)]
pub struct Access {
    /// Plain http for every registry; loopback hosts get it in any case.
    pub plain_http: bool,
    /// docker's config.json with the credentials; without it `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`.
    pub docker_config: Option<PathBuf>,
    /// containerd's `certs.d`: how hosts are reached and what they are trusted by.
    pub hosts_dir: PathBuf,
    /// Longest wait for a connection.
    pub connect: Duration,
    /// Longest wait without progress: for an answer to begin, and between two pieces of it.
    pub stall: Duration,
    /// Further places of blobs, which are asked before registries.
    pub blobs: Vec<super::BlobPlace>,
    /// What repositories of one host share.
    #[cfg(feature = "registry")]
    pub connections: super::Connections,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            plain_http: false,
            docker_config: None,
            hosts_dir: "/etc/containerd/certs.d".into(),
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(20),
            blobs: Vec::new(),
            #[cfg(feature = "registry")]
            connections: super::Connections::default(),
        }
    }
}

/// Whether opening a repository may create it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It is read, and must exist.
    Read,
    /// It is written: a layout's directory is made, registries are asked for tokens to push.
    Push,
}

/// A manifest or image index as it was received.
#[derive(Clone, Debug)]
pub struct RawDocument {
    /// The bytes, at most [`MAX_DOCUMENT_BYTES`](crate::oci::MAX_DOCUMENT_BYTES).
    pub bytes: Vec<u8>,
    /// Their digest, computed here.
    pub digest: Digest,
    /// What the source says they are.
    pub media_type: String,
}

/// What a blob is pushed from.
#[derive(Clone, Debug)]
pub enum Content {
    /// A file's whole content.
    File(PathBuf),
    /// Bytes in memory.
    Bytes(Bytes),
    /// A file that [`Repository::draft`] made. Who wrote it computed the digest meanwhile, and is believed.
    Draft(Arc<File>),
}

/// How a manifest is to be found afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publish {
    /// By the reference that the repository was opened with: its tag in a registry or layout; a layout without a tag
    /// lists it unnamed, in place of other unnamed images.
    Named,
    /// By its digest alone, since an image index lists it.
    Listed,
}

/// A place that holds images.
pub enum Repository {
    /// A repository in a registry.
    #[cfg(feature = "registry")]
    Registry(Box<Registry>),
    /// An OCI layout on disk.
    Layout(Layout),
}

impl Repository {
    /// Opens what `reference` names. A registry is not spoken to yet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a reference that is neither a registry's nor a layout's, or what the layout's
    /// directory answers.
    #[cfg_attr(not(feature = "registry"), allow(unused_variables))]
    pub async fn open(reference: &Reference, access: &Access, purpose: Purpose) -> Result<Self> {
        match reference {
            #[cfg(feature = "registry")]
            Reference::Registry(reference) => Ok(Self::Registry(Box::new(Registry::new(reference, access, purpose)?))),
            Reference::Layout { dir, tag } => Ok(Self::Layout(Layout::open(dir, tag.as_deref(), purpose).await?)),
            other => {
                Err(Error::Unsupported(format!("{other} is neither in a registry nor in an OCI layout (oci:DIR)")))
            }
        }
    }

    /// Opens all places to read what `reference` names from, best first: a registry's mirrors, then the registry.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    #[cfg_attr(not(feature = "registry"), allow(unused_variables))]
    pub async fn open_all(reference: &Reference, access: &Access) -> Result<Vec<Self>> {
        match reference {
            #[cfg(feature = "registry")]
            Reference::Registry(reference) => {
                let all = Registry::with_mirrors(reference, access)?;
                Ok(all.into_iter().map(|registry| Self::Registry(Box::new(registry))).collect())
            }
            other => Ok(vec![Self::open(other, access, Purpose::Read).await?]),
        }
    }

    /// Whether it may be asked what a tag stands for; a mirror may be too old for that.
    #[must_use]
    pub fn resolves(&self) -> bool {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.resolves(),
            Self::Layout(_) => true,
        }
    }

    /// The manifest or image index that the reference names; its digest is the reference's when that has one.
    ///
    /// # Errors
    /// As of [`Source::read_at`], and [`Error::Invalid`] for a document that is too large or has another digest.
    pub async fn manifest(&self) -> Result<RawDocument> {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.manifest(None).await,
            Self::Layout(layout) => layout.manifest().await,
        }
    }

    /// The manifest with `digest`, e.g. one that an image index lists.
    ///
    /// # Errors
    /// As of [`manifest`](Self::manifest).
    pub async fn manifest_by_digest(&self, digest: &Digest) -> Result<RawDocument> {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.manifest(Some(digest)).await,
            Self::Layout(layout) => layout.manifest_by_digest(digest).await,
        }
    }

    /// Streams the whole blob with `digest`, which has `bytes` bytes. The caller verifies it.
    ///
    /// # Errors
    /// As of [`Source::read_at`].
    pub async fn blob(&self, digest: &Digest, bytes: u64) -> Result<Body> {
        let blob = Blob { digest: *digest, bytes, role: crate::index::Role::Pack };
        self.read_at(&blob, 0, bytes).await
    }

    /// The whole blob with `digest`, verified, for documents and other small things.
    ///
    /// # Errors
    /// As of [`Source::read_at`]; [`Error::Invalid`] when it has more than `max` bytes or another digest.
    pub async fn small_blob(&self, digest: &Digest, bytes: u64, max: u64) -> Result<Vec<u8>> {
        let what = || format!("blob {digest} of {}", self.name());
        if bytes > max {
            return Err(Error::invalid(what(), format!("it has {bytes} bytes, more than {max}")));
        }
        let mut body = self.blob(digest, bytes).await?;
        let mut content = Vec::new();
        let mut hasher = Hasher::new();
        while let Some(piece) = body.next().await {
            let piece = piece?;
            hasher.update(&piece);
            content.extend_from_slice(&piece);
        }
        let found = hasher.finish();
        if found != *digest {
            return Err(Error::invalid(what(), format!("its bytes hash to {found}; they were discarded")));
        }
        Ok(content)
    }

    /// Whether the blob is there.
    ///
    /// # Errors
    /// As of [`Source::read_at`], except that a blob that is not there is none.
    pub async fn exists(&self, digest: &Digest) -> Result<bool> {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.exists(digest).await,
            Self::Layout(layout) => layout.exists(digest).await,
        }
    }

    /// A file without a name to write a blob into before its digest is known: in a layout, where pushing it needs no copy, or
    /// else in `temp`. It is gone when its last handle is.
    ///
    /// # Errors
    /// What the system says.
    pub fn draft(&self, temp: &Path) -> Result<File> {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(_) => files::unlinked(temp),
            Self::Layout(layout) => layout.draft().map_or_else(|| files::unlinked(temp), Ok),
        }
    }

    /// Adds a blob; one that is there already is left alone.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Refused`] when `content` does not have this digest and length, otherwise what the
    /// source answers.
    pub async fn push_blob(&self, digest: &Digest, bytes: u64, content: &Content) -> Result<()> {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.push_blob(digest, bytes, content).await,
            Self::Layout(layout) => layout.push_blob(digest, bytes, content).await,
        }
    }

    /// Makes a blob of `other` available here without moving its bytes, where both are in one registry.
    /// Says whether that worked; if not, push it.
    ///
    /// # Errors
    /// What the source answers.
    pub async fn mount_blob(&self, digest: &Digest, other: &Self) -> Result<bool> {
        match (self, other) {
            #[cfg(feature = "registry")]
            (Self::Registry(registry), Self::Registry(other)) => registry.mount_blob(digest, other).await,
            _ => self.exists(digest).await,
        }
    }

    /// Adds a manifest or image index; its blobs must be there.
    ///
    /// # Errors
    /// What the source answers.
    pub async fn push_manifest(&self, bytes: &[u8], media_type: &str, publish: Publish) -> Result<Digest> {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.push_manifest(bytes, media_type, publish).await,
            Self::Layout(layout) => layout.push_manifest(bytes, media_type, publish).await,
        }
    }
}

impl Source for Repository {
    fn name(&self) -> &str {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.name(),
            Self::Layout(layout) => layout.name(),
        }
    }

    fn host(&self) -> &str {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.host(),
            Self::Layout(layout) => layout.host(),
        }
    }

    fn is_spared(&self) -> bool {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.is_spared(),
            Self::Layout(layout) => layout.is_spared(),
        }
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(registry) => registry.read_at(blob, offset, len),
            Self::Layout(layout) => layout.read_at(blob, offset, len),
        }
    }
}
