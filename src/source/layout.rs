//! OCI image layouts on disk (image-spec v1.1, image-layout.md): read and written.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageIndex, MediaType};
use rustix::fs::FlockOperation;
use serde::Deserialize;

use super::files::{self, Unpublished, blocking};
use super::{Body, Content, Publish, Purpose, RawDocument, Source, SourceFuture};
use crate::chunk::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::index::Blob;
use crate::oci::{Document, MAX_DOCUMENT_BYTES, canonical_json, descriptor_digest, media_type};

/// The annotation that names an image in `index.json`.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const BLOBS: &str = "blobs/sha256";
const LAYOUT_FILE: &str = "oci-layout";
const LAYOUT_CONTENT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// An image layout, and the image in it that a reference names.
pub struct Layout {
    name: String,
    store: Arc<Store>,
}

struct Store {
    dir: PathBuf,
    tag: Option<String>,
    name: String,
}

impl Layout {
    /// Opens the layout in `dir`; to push, it is made when it is not there.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::Unsupported`] for a directory that is no layout, or what the system says.
    pub async fn open(dir: &Path, tag: Option<&str>, purpose: Purpose) -> Result<Self> {
        let name = format!("oci:{}", dir.display());
        let store = Arc::new(Store { dir: dir.to_owned(), tag: tag.map(str::to_owned), name: name.clone() });
        let opened = store.clone();
        blocking(move || opened.open(purpose)).await?;
        Ok(Self { name, store })
    }

    /// The blobs in `dir`, which need not be a whole layout: containerd keeps its own this way.
    pub(super) fn blobs_of(dir: &Path) -> Self {
        let name = dir.display().to_string();
        Self { store: Arc::new(Store { dir: dir.to_owned(), tag: None, name: name.clone() }), name }
    }

    pub(super) async fn manifest(&self) -> Result<RawDocument> {
        self.run(Store::manifest).await
    }

    pub(super) async fn manifest_by_digest(&self, digest: &Digest) -> Result<RawDocument> {
        let digest = *digest;
        self.run(move |store| store.document(&digest, "")).await
    }

    pub(super) async fn exists(&self, digest: &Digest) -> Result<bool> {
        let digest = *digest;
        self.run(move |store| match store.blob_path(&digest).try_exists() {
            Ok(exists) => Ok(exists),
            Err(error) => Err(store.failed("looking for a blob", error)),
        })
        .await
    }

    /// A file that [`push_blob`](Self::push_blob) only has to name; not all file systems can.
    pub(super) fn draft(&self) -> Option<File> {
        files::linkable(&self.store.dir.join(BLOBS)).ok()
    }

    pub(super) async fn push_blob(&self, digest: &Digest, bytes: u64, content: &Content) -> Result<()> {
        let (digest, content) = (*digest, content.clone());
        self.run(move |store| match content {
            Content::Bytes(content) => store.add(&digest, bytes, &content[..]),
            Content::File(path) => {
                let file = File::open(&path);
                store.add(&digest, bytes, file.map_err(|e| Error::io(format!("opening {}", path.display()), e))?)
            }
            Content::Draft(file) => store.name(&digest, bytes, &file),
        })
        .await
    }

    pub(super) async fn push_manifest(&self, bytes: &[u8], media_type: &str, publish: Publish) -> Result<Digest> {
        let (bytes, media_type) = (bytes.to_vec(), media_type.to_owned());
        self.run(move |store| {
            let digest = Digest::of(&bytes);
            store.add(&digest, bytes.len() as u64, &bytes[..])?;
            if publish == Publish::Named {
                store.list(&digest, bytes.len() as u64, &media_type)?;
            }
            Ok(digest)
        })
        .await
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Store) -> Result<T> + Send + 'static) -> Result<T> {
        let store = self.store.clone();
        blocking(move || work(&store)).await
    }
}

impl Source for Layout {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        let blob = *blob;
        Box::pin(async move {
            let path = self.run(move |store| store.check_range(&blob, offset, len)).await?;
            Ok(Box::pin(files::stream(path, offset, len)) as Body)
        })
    }
}

impl Store {
    fn open(&self, purpose: Purpose) -> Result<()> {
        let marker = self.dir.join(LAYOUT_FILE);
        if let Some(content) = files::read_small(&marker, 4096)? {
            #[derive(Deserialize)]
            #[serde(rename_all = "camelCase")]
            struct Marker {
                image_layout_version: String,
            }
            let marker: Marker = serde_json::from_slice(&content)
                .map_err(|error| Error::invalid(format!("{} in {}", LAYOUT_FILE, self.name), error.to_string()))?;
            if marker.image_layout_version != "1.0.0" {
                let version = marker.image_layout_version;
                return Err(Error::Unsupported(format!("{}: layout version {version:?}", self.name)));
            }
            return Ok(());
        }
        if purpose == Purpose::Read {
            return Err(self.not_found(format!("the file {LAYOUT_FILE}; an OCI layout has one")));
        }
        let occupied = match std::fs::read_dir(&self.dir) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(self.failed("opening", error)),
        };
        if occupied {
            let reason = "it is neither empty nor an OCI layout: name another directory";
            return Err(Error::invalid(format!("destination {}", self.name), reason));
        }
        std::fs::create_dir_all(self.dir.join(BLOBS)).map_err(|error| self.failed("creating", error))?;
        let empty = format!(r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[]}}"#, media_type::INDEX);
        files::replace(&self.dir.join("index.json"), empty.as_bytes())?;
        // Last, since it makes the directory a layout.
        files::replace(&marker, LAYOUT_CONTENT)
    }

    fn manifest(&self) -> Result<RawDocument> {
        // What no image is named: a manifest by its digest, listed or not.
        if let Some(digest) = self.tag.as_deref().and_then(|tag| tag.strip_prefix('@')) {
            return self.document(&digest.parse()?, "");
        }
        let (index, raw) = self.index()?;
        let named = |entry: &&Descriptor| ref_name(entry).is_some();
        let entry = match &self.tag {
            Some(tag) => index.manifests().iter().find(|entry| ref_name(entry) == Some(tag)),
            None if index.manifests().len() == 1 => index.manifests().first(),
            // Unnamed images only: the layout is one image for several platforms.
            None if !index.manifests().is_empty() && !index.manifests().iter().any(|entry| named(&entry)) => {
                let digest = Digest::of(&raw);
                return Ok(RawDocument { bytes: raw, digest, media_type: media_type::INDEX.to_owned() });
            }
            None => None,
        };
        let entry = entry.ok_or_else(|| {
            let names: Vec<&str> = index.manifests().iter().filter_map(|entry| ref_name(entry)).take(32).collect();
            let wanted = self.tag.as_ref().map_or_else(|| "a single image".to_owned(), |tag| format!("image {tag:?}"));
            self.not_found(format!("{wanted} (it names: {})", names.join(", ")))
        })?;
        self.document(&descriptor_digest(entry)?, entry.media_type().as_ref())
    }

    fn document(&self, digest: &Digest, media_type: &str) -> Result<RawDocument> {
        let path = self.blob_path(digest);
        let bytes = files::read_small(&path, MAX_DOCUMENT_BYTES)?;
        let bytes = bytes.ok_or_else(|| self.not_found(format!("manifest {digest}")))?;
        let found = Digest::of(&bytes);
        if found != *digest {
            let reason = format!("its bytes hash to {found}");
            return Err(Error::invalid(format!("manifest {digest} of {}", self.name), reason));
        }
        Ok(RawDocument { bytes, digest: found, media_type: media_type.to_owned() })
    }

    fn index(&self) -> Result<(ImageIndex, Vec<u8>)> {
        let raw = files::read_small(&self.dir.join("index.json"), MAX_DOCUMENT_BYTES)?;
        let raw = raw.ok_or_else(|| self.not_found("the file index.json".to_owned()))?;
        match Document::parse(&raw, media_type::INDEX)? {
            Document::Index(index) => Ok((*index, raw)),
            Document::Manifest(_) => Err(Error::invalid(format!("index.json of {}", self.name), "it is a manifest")),
        }
    }

    fn check_range(&self, blob: &Blob, offset: u64, len: u64) -> Result<PathBuf> {
        if offset.checked_add(len).is_none_or(|end| end > blob.bytes) {
            let reason = format!("{len} bytes from {offset} are not inside a blob of {} bytes", blob.bytes);
            return Err(Error::invalid("range", reason));
        }
        let path = self.blob_path(&blob.digest);
        match std::fs::metadata(&path) {
            Ok(found) if found.len() == blob.bytes => Ok(path),
            Ok(found) => Err(Error::Refused {
                source_name: self.name.clone(),
                what: format!("blob {}", blob.digest),
                reason: format!("the file has {} bytes, not {}", found.len(), blob.bytes),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(self.not_found(format!("blob {}", blob.digest)))
            }
            Err(error) => Err(Error::unreachable(&self.name, error.to_string())),
        }
    }

    fn add(&self, digest: &Digest, bytes: u64, mut content: impl Read) -> Result<()> {
        let path = self.blob_path(digest);
        if path.exists() {
            return Ok(());
        }
        let mut file = Unpublished::create(&self.dir.join(BLOBS))?;
        let mut hasher = Hasher::new();
        let (mut buffer, mut total) = (vec![0; 256 << 10], 0);
        loop {
            let read = content.read(&mut buffer).map_err(|error| self.failed("reading what is pushed to", error))?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            file.write(&buffer[..read])?;
            total += read as u64;
        }
        let found = hasher.finish();
        if found != *digest || total != bytes {
            let reason = format!("the content has {total} bytes and hashes to {found}; {bytes} bytes were announced");
            return Err(Error::invalid(format!("blob {digest}"), reason));
        }
        file.publish(&path)
    }

    /// Names a draft, or copies it where that is not possible.
    fn name(&self, digest: &Digest, bytes: u64, file: &File) -> Result<()> {
        let path = self.blob_path(digest);
        if path.exists() {
            return Ok(());
        }
        let failed = |error| self.failed("reading what is pushed to", error);
        let found = file.metadata().map_err(failed)?.len();
        if found != bytes {
            let reason = format!("the content has {found} bytes; {bytes} were announced");
            return Err(Error::invalid(format!("blob {digest}"), reason));
        }
        match files::link(file, &path) {
            Ok(()) => Ok(()),
            // It is in the temporary directory.
            Err(_) => self.add(digest, bytes, File::open(files::path_of(file)).map_err(failed)?),
        }
    }

    /// Lists a manifest in `index.json`, in place of what has its name.
    fn list(&self, digest: &Digest, bytes: u64, media_type: &str) -> Result<()> {
        // Held until it is dropped: the file is read, changed and replaced by one writer at a time.
        let lock = File::open(&self.dir).map_err(|error| self.failed("locking", error))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| self.failed("locking", error.into()))?;
        let (mut index, _) = self.index()?;
        let name = digest.to_string().parse::<oci_spec::image::Digest>();
        let name = name.map_err(|error| Error::invalid("digest", error.to_string()))?;
        let mut entry = Descriptor::new(MediaType::from(media_type), bytes, name);
        if let Some(tag) = &self.tag {
            entry.set_annotations(Some([(REF_NAME.to_owned(), tag.clone())].into()));
        }
        let mut entries = index.manifests().clone();
        entries.retain(|entry| ref_name(entry) != self.tag.as_deref());
        entries.push(entry);
        index.set_manifests(entries);
        files::replace(&self.dir.join("index.json"), &canonical_json(&index)?)
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(BLOBS).join(digest.hex())
    }

    fn not_found(&self, what: String) -> Error {
        Error::NotFound { source_name: self.name.clone(), what }
    }

    fn failed(&self, action: &str, error: io::Error) -> Error {
        Error::io(format!("{action} {}", self.dir.display()), error)
    }
}

fn ref_name(entry: &Descriptor) -> Option<&str> {
    entry.annotations().as_ref()?.get(REF_NAME).map(String::as_str)
}
