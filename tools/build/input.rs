//! Sources: what a reference names becomes layers to read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::StreamExt;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::Request;
use super::archive::TarFile;
use super::decode::{Expected, Stored, check_media_type};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::{Blob, Role};
use crate::oci::{
    self, Document, MAX_CONFIG_BYTES, MAX_DOCUMENT_BYTES, Platform, RegistryReference, descriptor_digest,
};
use crate::source::{Purpose, RawDocument, Repository, Source as _};

/// One root file system to build from.
pub(super) struct Input {
    pub platform: Platform,
    /// The source's config, or a minimal one.
    pub config: Value,
    /// Annotations of the source's manifest.
    pub annotations: BTreeMap<String, String>,
    pub root: Root,
}

/// Where the files are.
pub(super) enum Root {
    Directory(PathBuf),
    /// A tar that is the whole file system.
    Tar(PathBuf),
    /// A disk image.
    Raw(PathBuf),
    /// The layers of an image, lowest first.
    Layers(Vec<LayerInput>),
}

/// A layer to read.
pub(super) struct LayerInput {
    /// For people: its digest or the member of the archive.
    pub name: String,
    pub expected: Expected,
    /// Stored bytes.
    pub bytes: u64,
    origin: Arc<Origin>,
    at: At,
}

enum At {
    Blob(Digest),
    Member(String),
}

impl LayerInput {
    /// Opens the stored bytes.
    pub(super) fn open(&self, runtime: &Handle) -> Result<Stored> {
        match (&self.at, &*self.origin) {
            (At::Member(path), Origin::Archive(archive)) => archive.stream(path),
            (At::Blob(digest), Origin::Archive(archive)) => archive.stream(&blob_path(digest)),
            (At::Blob(digest), Origin::Repository(_)) => {
                Ok(Box::new(BlobReader::start(self.origin.clone(), *digest, self.bytes, runtime)))
            }
            (At::Member(path), Origin::Repository(_)) => {
                Err(Error::NotFound { source_name: self.origin.name().to_owned(), what: path.clone() })
            }
        }
    }
}

/// Where documents and blobs are read.
pub(super) enum Origin {
    Repository(Repository),
    Archive(TarFile),
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl Origin {
    fn name(&self) -> &str {
        match self {
            Self::Repository(repository) => repository.name(),
            Self::Archive(archive) => archive.name(),
        }
    }

    fn document(&self, digest: &Digest, runtime: &Handle) -> Result<RawDocument> {
        match self {
            Self::Repository(repository) => runtime.block_on(repository.manifest_by_digest(digest)),
            Self::Archive(archive) => {
                let bytes = checked(archive.small(&blob_path(digest), MAX_DOCUMENT_BYTES)?, digest)?;
                Ok(RawDocument { bytes, digest: *digest, media_type: String::new() })
            }
        }
    }

    fn config(&self, descriptor: &Descriptor, runtime: &Handle) -> Result<Vec<u8>> {
        let digest = descriptor_digest(descriptor)?;
        match self {
            Self::Repository(repository) => {
                runtime.block_on(repository.small_blob(&digest, descriptor.size(), MAX_CONFIG_BYTES))
            }
            Self::Archive(archive) => checked(archive.small(&blob_path(&digest), MAX_CONFIG_BYTES)?, &digest),
        }
    }
}

fn checked(bytes: Vec<u8>, digest: &Digest) -> Result<Vec<u8>> {
    let found = Digest::of(&bytes);
    if found != *digest {
        return Err(Error::invalid(format!("blob {digest}"), format!("its bytes hash to {found}")));
    }
    Ok(bytes)
}

/// Resolves the source of a request: one input for each platform.
pub(super) fn resolve(request: &Request, runtime: &Handle) -> Result<Vec<Input>> {
    let origin = match &request.source {
        oci::Reference::Dir(path) => return plain(request, Root::Directory(path.clone())),
        oci::Reference::Tar(path) => return plain(request, Root::Tar(path.clone())),
        oci::Reference::Raw(path) => return plain(request, Root::Raw(path.clone())),
        oci::Reference::DockerArchive { file, tag } => {
            let archive = TarFile::open(file, &request.temp, &request.limits)?;
            return docker_archive(request, archive, tag.as_deref());
        }
        oci::Reference::OciArchive { file, .. } => {
            Origin::Archive(TarFile::open(file, &request.temp, &request.limits)?)
        }
        oci::Reference::Registry(RegistryReference { .. }) | oci::Reference::Layout { .. } => {
            Origin::Repository(runtime.block_on(Repository::open(&request.source, &request.access, Purpose::Read))?)
        }
    };
    let origin = Arc::new(origin);
    let top = match &*origin {
        Origin::Repository(repository) => runtime.block_on(repository.manifest())?,
        Origin::Archive(archive) => archived_top(archive, &request.source)?,
    };
    let index = match Document::parse(&top.bytes, &top.media_type)? {
        Document::Manifest(manifest) => {
            let input = image(request, &origin, &manifest, None, runtime)?;
            if let Some(other) = request.platforms.iter().find(|wanted| !same(wanted, &input.platform)) {
                let what = format!("an image for {other} (there is: {})", input.platform);
                return Err(Error::NotFound { source_name: origin.name().to_owned(), what });
            }
            return Ok(vec![input]);
        }
        Document::Index(index) => index,
    };
    let mut inputs = Vec::new();
    for descriptor in chosen(request, &index, origin.name())? {
        let document = origin.document(&descriptor_digest(descriptor)?, runtime)?;
        match Document::parse(&document.bytes, &document.media_type)? {
            Document::Manifest(manifest) => {
                let platform = descriptor.platform().as_ref().map(Platform::from);
                inputs.push(image(request, &origin, &manifest, platform, runtime)?);
            }
            Document::Index(_) => {
                return Err(Error::Unsupported(format!("{}: an image index inside an image index", document.digest)));
            }
        }
    }
    if inputs.is_empty() {
        return Err(Error::NotFound { source_name: origin.name().to_owned(), what: "an image".into() });
    }
    Ok(inputs)
}

fn same(wanted: &Platform, found: &Platform) -> bool {
    wanted.os == found.os
        && wanted.architecture == found.architecture
        && (wanted.variant.is_none() || wanted.variant == found.variant)
}

/// The images of an index to build: those asked for, or all. Attestations (platform unknown) are of the old image only.
fn chosen<'a>(request: &Request, index: &'a ImageIndex, source_name: &str) -> Result<Vec<&'a Descriptor>> {
    if request.platforms.is_empty() {
        let is_image = |entry: &&Descriptor| {
            entry.platform().as_ref().map(Platform::from).is_none_or(|platform| platform.os != "unknown")
        };
        return Ok(index.manifests().iter().filter(is_image).collect());
    }
    request.platforms.iter().map(|platform| Document::pick(index, platform, source_name)).collect()
}

/// A file system without an image: the config says no more than the platform.
fn plain(request: &Request, root: Root) -> Result<Vec<Input>> {
    let platform = match request.platforms.as_slice() {
        [] => Platform::host(),
        [platform] => platform.clone(),
        _ => return Err(Error::invalid("platform", "a single file system is for a single platform")),
    };
    let mut config = json!({ "os": platform.os, "architecture": platform.architecture, "config": {} });
    if let (Some(variant), Some(config)) = (&platform.variant, config.as_object_mut()) {
        config.insert("variant".into(), json!(variant));
    }
    Ok(vec![Input { platform, config, annotations: BTreeMap::new(), root }])
}

fn image(
    request: &Request,
    origin: &Arc<Origin>,
    manifest: &ImageManifest,
    platform: Option<Platform>,
    runtime: &Handle,
) -> Result<Input> {
    if manifest.layers().iter().any(|layer| {
        layer.annotations().as_ref().is_some_and(|annotations| annotations.contains_key(oci::annotation::ROLE))
    }) {
        return Err(Error::Unsupported(format!("{} is a firstread image already", request.source)));
    }
    let config = origin.config(manifest.config(), runtime)?;
    let config = Config::parse(&config)?;
    let mut layers = Vec::new();
    for layer in manifest.layers() {
        let digest = descriptor_digest(layer)?;
        check_media_type(layer.media_type().as_ref())
            .map_err(|error| super::layer::context(error, &format!("layer {digest}")))?;
        layers.push(LayerInput {
            name: digest.to_string(),
            expected: Expected { digest: Some(digest), diff_id: None },
            bytes: layer.size(),
            origin: origin.clone(),
            at: At::Blob(digest),
        });
    }
    let annotations = manifest.annotations().clone().unwrap_or_default().into_iter().collect();
    config.input(request, platform, annotations, layers)
}

struct Config {
    value: Value,
    platform: Platform,
    diff_ids: Vec<Digest>,
}

impl Config {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let invalid = |reason: String| Error::invalid("image config", reason);
        let value: Value = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        let text = |key: &str| value.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        let platform = Platform {
            os: text("os").unwrap_or("linux").to_owned(),
            architecture: text("architecture").ok_or_else(|| invalid("it has no architecture".into()))?.to_owned(),
            variant: text("variant").map(str::to_owned),
        };
        if !value.is_object() {
            return Err(invalid("it is not an object".into()));
        }
        let diff_ids = value.pointer("/rootfs/diff_ids").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let diff_ids = diff_ids
            .iter()
            .map(|id| id.as_str().ok_or_else(|| invalid("a diff_id is not a text".into()))?.parse())
            .collect::<Result<_>>()?;
        Ok(Self { value, platform, diff_ids })
    }

    fn input(
        self,
        request: &Request,
        platform: Option<Platform>,
        annotations: BTreeMap<String, String>,
        mut layers: Vec<LayerInput>,
    ) -> Result<Input> {
        let (named, there) = (self.diff_ids.len(), layers.len());
        if named != there {
            return Err(Error::invalid("image config", format!("it has {named} diff_ids for {there} layers")));
        }
        if there > request.limits.layers {
            return Err(Error::invalid("image", format!("{there} layers, more than {}", request.limits.layers)));
        }
        for (layer, diff_id) in layers.iter_mut().zip(self.diff_ids) {
            layer.expected.diff_id = Some(diff_id);
        }
        let platform = platform.unwrap_or(self.platform);
        Ok(Input { platform, config: self.value, annotations, root: Root::Layers(layers) })
    }
}

/// What `docker save` writes: manifest.json lists configs, tags and layers by their paths in the archive.
fn docker_archive(request: &Request, archive: TarFile, tag: Option<&str>) -> Result<Vec<Input>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Image {
        config: String,
        #[serde(default)]
        repo_tags: Option<Vec<String>>,
        layers: Vec<String>,
    }
    let what = || format!("manifest.json in {}", archive.name());
    let bytes = archive.small("manifest.json", MAX_DOCUMENT_BYTES)?;
    let images: Vec<Image> =
        serde_json::from_slice(&bytes).map_err(|error| Error::invalid(what(), error.to_string()))?;
    let tags = |image: &Image| image.repo_tags.clone().unwrap_or_default();
    let found = match (tag, images.as_slice()) {
        (None, [image]) => Some(image),
        (None, _) => None,
        (Some(tag), images) => images.iter().find(|image| {
            tags(image).iter().any(|name| name == tag || name.rsplit_once(':').is_some_and(|(_, last)| last == tag))
        }),
    };
    let Some(found) = found else {
        let there: Vec<String> = images.iter().take(32).flat_map(tags).collect();
        let reason = format!("choose one of its images by its tag: {}", there.join(", "));
        return Err(Error::invalid(what(), reason));
    };
    let config = Config::parse(&archive.small(&found.config, MAX_CONFIG_BYTES)?)?;
    let layers = found.layers.clone();
    let origin = Arc::new(Origin::Archive(archive));
    let Origin::Archive(archive) = &*origin else { return Ok(Vec::new()) };
    let layers = layers.into_iter().map(|path| {
        Ok(LayerInput {
            name: path.clone(),
            expected: Expected::default(),
            bytes: archive.len(&path)?,
            origin: origin.clone(),
            at: At::Member(path),
        })
    });
    let input = config.input(request, None, BTreeMap::new(), layers.collect::<Result<_>>()?)?;
    Ok(vec![input])
}

/// The document that a tag names in an archive of an OCI layout.
fn archived_top(archive: &TarFile, reference: &oci::Reference) -> Result<RawDocument> {
    let bytes = archive.small("index.json", MAX_DOCUMENT_BYTES)?;
    let Document::Index(index) = Document::parse(&bytes, oci::media_type::INDEX)? else {
        return Err(Error::invalid(archive.name(), "its index.json is not an image index"));
    };
    let tag = match reference {
        oci::Reference::OciArchive { tag, .. } => tag.as_deref(),
        _ => None,
    };
    let named = |entry: &&Descriptor| {
        let name = entry.annotations().as_ref().and_then(|all| all.get("org.opencontainers.image.ref.name"));
        tag.is_some() && name.map(String::as_str) == tag
    };
    let entry = match (tag, index.manifests().as_slice()) {
        (None, [entry]) => Some(entry),
        (None, _) => None,
        (Some(_), entries) => entries.iter().find(named),
    };
    let entry = entry.ok_or_else(|| Error::NotFound {
        source_name: archive.name().to_owned(),
        what: format!("the image {}", tag.unwrap_or("(name one: it does not have exactly one)")),
    })?;
    let digest = descriptor_digest(entry)?;
    let bytes = checked(archive.small(&blob_path(&digest), MAX_DOCUMENT_BYTES)?, &digest)?;
    Ok(RawDocument { bytes, digest, media_type: entry.media_type().to_string() })
}

/// Opens a plain tar.
pub(super) fn open_tar(path: &std::path::Path) -> Result<(Stored, Option<u64>)> {
    if path.as_os_str() == "-" {
        return Ok((Box::new(io::stdin()), None));
    }
    let action = |error| Error::io(format!("reading {}", path.display()), error);
    let file = File::open(path).map_err(action)?;
    let bytes = file.metadata().map_err(action)?;
    Ok((Box::new(file), bytes.is_file().then_some(bytes.len())))
}

/// How often a broken stream is resumed where it broke.
const RESUMES: u32 = 5;

/// A blob that arrives on the runtime, read by a thread.
struct BlobReader {
    pieces: tokio::sync::mpsc::Receiver<Result<bytes::Bytes>>,
    current: bytes::Bytes,
}

impl BlobReader {
    fn start(origin: Arc<Origin>, digest: Digest, bytes: u64, runtime: &Handle) -> Self {
        let (sender, pieces) = tokio::sync::mpsc::channel(16);
        runtime.spawn(async move {
            let Origin::Repository(repository) = &*origin else { return };
            let blob = Blob { digest, bytes, role: Role::Pack };
            let (mut at, mut resumes) = (0, 0);
            while at < bytes {
                let failure = match repository.read_at(&blob, at, bytes - at).await {
                    Ok(mut body) => loop {
                        match body.next().await {
                            Some(Ok(piece)) => {
                                at += piece.len() as u64;
                                if sender.send(Ok(piece)).await.is_err() {
                                    return;
                                }
                            }
                            Some(Err(error)) => break Some(error),
                            None => break None,
                        }
                    },
                    Err(error) => Some(error),
                };
                match failure {
                    None if at >= bytes => return,
                    Some(error @ Error::Unreachable { .. }) if resumes < RESUMES => {
                        resumes += 1;
                        tracing::warn!("layer {digest} stopped at byte {at}, resuming: {error}");
                        tokio::time::sleep(std::time::Duration::from_millis(200 << resumes)).await;
                    }
                    failure => {
                        let short = || Error::unreachable(repository.name(), format!("blob {digest} ends early"));
                        let _ = sender.send(Err(failure.unwrap_or_else(short))).await;
                        return;
                    }
                }
            }
        });
        Self { pieces, current: bytes::Bytes::new() }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(Ok(piece)) => self.current = piece,
                Some(Err(error)) => return Err(io::Error::other(error)),
                None => return Ok(0),
            }
        }
        let piece = self.current.split_to(buf.len().min(self.current.len()));
        buf.get_mut(..piece.len()).unwrap_or_default().copy_from_slice(&piece);
        Ok(piece.len())
    }
}
