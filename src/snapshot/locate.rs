//! Which image an index is of, and where its bytes are: asked of containerd, which pulled it.
//!
//! From the snapshot to the image: containerd's garbage labels lead from a snapshot to the configuration (by the chain's
//! name), from a configuration or layer to the manifest, from there to an image index that lists it; an image record
//! names one of the two, and its name is the full reference. Where there is no such record, the manifest's label
//! `containerd.io/distribution.source.HOST` has host (without port) and repository. Only reads are made: containerd
//! calls Commit inside of its write transaction.

use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::image::ImageManifest;
use tonic::Status;

use super::api::Api;
use super::failure::Failure;
use super::record::Snapshot;
use super::wire::{content, images, introspection};
use crate::chunk::Digest;
use crate::oci::{Document, Layers, MAX_CONFIG_BYTES, MAX_DOCUMENT_BYTES, Reference, annotation, descriptor_digest};

/// Longest time that all questions about one image take.
const PATIENCE: Duration = Duration::from_secs(8);
/// Most blobs and images that one answer has.
const ANSWERS_MAX: usize = 4096;
/// Most manifests of an image index that are looked for in it.
const PLATFORMS_MAX: usize = 64;
/// CRI's name of the image, as a label of its layers' snapshots.
const CRI_REFERENCE: &str = "containerd.io/snapshot/cri.image-ref";
/// The same as a label of ours, which `firstread pull` sets.
pub const REFERENCE: &str = "containerd.io/snapshot/firstread/image-ref";

/// Whether a label says which image the snapshot is of.
#[must_use]
pub fn is_named(snapshot: &Snapshot) -> bool {
    [REFERENCE, CRI_REFERENCE].iter().any(|label| snapshot.label(label).is_some())
}

/// An image that containerd has.
#[derive(Debug)]
pub struct Located {
    /// Where its bytes are: a reference with the manifest's digest.
    pub reference: String,
    /// The manifest.
    pub manifest: Vec<u8>,
    /// The configuration.
    pub config: Vec<u8>,
    /// containerd's blobs, if the packs are among them.
    pub blobs: Option<PathBuf>,
}

/// Finds the image of the index `snapshot`, which is the `depth`th layer (from 0).
///
/// # Errors
/// [`Failure::NotFound`] when containerd has no firstread image with such a layer; [`Failure::Unavailable`] when it does
/// not answer.
pub async fn locate(containerd: &Path, snapshot: &Snapshot, depth: usize) -> Result<Located, Failure> {
    let work = search(containerd, snapshot, depth);
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(Ok(located)) => Ok(located),
        Ok(Err(Failure::NotFound(message))) => Err(Failure::NotFound(message)),
        Ok(Err(failure)) => Err(at(containerd, &failure.to_string())),
        Err(_) => Err(at(containerd, "it takes too long")),
    }
}

fn at(containerd: &Path, reason: &str) -> Failure {
    Failure::Unavailable(format!("asking containerd at {} for the image: {reason}", containerd.display()))
}

async fn search(containerd: &Path, snapshot: &Snapshot, depth: usize) -> Result<Located, Failure> {
    // <namespace>/<sequence>/<name>; the header may be missing when it calls us.
    let mut parts = snapshot.key.splitn(3, '/');
    let (namespace, chain) = match (parts.next(), parts.next(), parts.next()) {
        (Some(namespace), Some(_), Some(name)) if !namespace.is_empty() => (namespace, name),
        _ => return Err(Failure::NotFound(format!("the key {:?} names no namespace", snapshot.key))),
    };
    let api = Api::new(containerd).and_then(|api| api.within(namespace)).map_err(status)?;
    let layer = snapshot.label(annotation::DIGEST);
    let configs = of_chain(&api, chain).await?;
    let of_layer = layer.map(|digest| format!("labels.\"containerd.io/gc.ref.content.l.{depth}\"=={digest}"));
    let of_config = configs.iter().map(|config| format!("labels.\"containerd.io/gc.ref.content.config\"=={config}"));
    let filters: Vec<String> = of_layer.into_iter().chain(of_config).collect();
    for info in list(&api, &filters).await? {
        let Some(manifest) = firstread(&api, &info).await? else { continue };
        if layer.is_some_and(|digest| digest != manifest.layers.index.digest.to_string()) {
            continue;
        }
        let config = read(&api, &descriptor_digest(manifest.document.config())?, MAX_CONFIG_BYTES).await?;
        let reference = reference(&api, snapshot, &info, &manifest.digest).await?;
        let blobs = blobs(&api, &manifest.layers).await;
        return Ok(Located { reference, manifest: manifest.bytes, config, blobs });
    }
    Err(Failure::NotFound(format!("containerd has no firstread image whose index is {chain}")))
}

/// The configurations whose layers make the chain.
async fn of_chain(api: &Api, chain: &str) -> Result<Vec<String>, Failure> {
    // The label's name ends in what containerd's configuration calls this snapshotter; it is not told to us everywhere.
    let plugins = plugins(api, "io.containerd.snapshotter.v1").await?;
    let filters: Vec<String> = plugins
        .iter()
        .map(|plugin| format!("labels.\"containerd.io/gc.ref.snapshot.{}\"=={chain}", plugin.id))
        .collect();
    Ok(list(api, &filters).await?.into_iter().map(|info| info.digest).collect())
}

/// A manifest of a firstread image.
struct Manifest {
    bytes: Vec<u8>,
    digest: Digest,
    document: Box<ImageManifest>,
    layers: Layers,
}

/// The blob as a manifest, if it is that of a firstread image.
async fn firstread(api: &Api, info: &content::Info) -> Result<Option<Manifest>, Failure> {
    let Ok(digest) = info.digest.parse() else { return Ok(None) };
    let bytes = read(api, &digest, MAX_DOCUMENT_BYTES).await?;
    let Ok(Document::Manifest(document)) = Document::parse(&bytes, "") else { return Ok(None) };
    let Ok(layers) = Layers::of(&document) else { return Ok(None) };
    Ok(Some(Manifest { bytes, digest, document, layers }))
}

/// The reference of the image with this manifest.
async fn reference(
    api: &Api,
    snapshot: &Snapshot,
    manifest: &content::Info,
    digest: &Digest,
) -> Result<String, Failure> {
    let given = [REFERENCE, CRI_REFERENCE].iter().find_map(|label| at_digest(snapshot.label(label)?, digest));
    if let Some(reference) = given {
        return Ok(reference);
    }
    let listed = (0..PLATFORMS_MAX)
        .map(|number| format!("labels.\"containerd.io/gc.ref.content.m.{number}\"=={}", manifest.digest))
        .collect::<Vec<_>>();
    let mut targets = vec![manifest.digest.clone()];
    targets.extend(list(api, &listed).await?.into_iter().map(|info| info.digest));
    let filters = targets.iter().map(|target| format!("target.digest=={target}")).collect();
    let named: images::ListResponse =
        api.call(images::SERVICE, "List", images::ListRequest { filters }).await.map_err(status)?;
    if let Some(reference) = named.images.iter().find_map(|image| at_digest(&image.name, digest)) {
        return Ok(reference);
    }
    let sources = manifest.labels.iter().filter_map(|(name, repositories)| {
        let host = name.strip_prefix("containerd.io/distribution.source.")?;
        at_digest(&format!("{host}/{}", repositories.split(',').next()?), digest)
    });
    sources.min().ok_or_else(|| {
        Failure::NotFound(format!("nothing in containerd says where the image {} was pulled from", manifest.digest))
    })
}

/// The registry's image `name` with this digest; `None` for a name that is none, such as CRI's `sha256:…`.
fn at_digest(name: &str, digest: &Digest) -> Option<String> {
    if !name.contains('/') {
        return None;
    }
    match name.parse().ok()? {
        Reference::Registry(mut reference) => {
            reference.digest = Some(*digest);
            Some(Reference::Registry(reference).to_string())
        }
        _ => None,
    }
}

/// The directory of containerd's blobs, when the image's packs were downloaded into it.
async fn blobs(api: &Api, layers: &Layers) -> Option<PathBuf> {
    let plugins = plugins(api, "io.containerd.content.v1").await.ok()?;
    let root = PathBuf::from(plugins.first()?.exports.get("root")?);
    let (_, first, _) = layers.packs.first()?;
    let file = root.join("blobs/sha256").join(first.hex());
    tokio::fs::try_exists(&file).await.ok()?.then_some(root)
}

/// The blobs that one of the filters matches; without a filter none, and not all.
async fn list(api: &Api, filters: &[String]) -> Result<Vec<content::Info>, Failure> {
    if filters.is_empty() {
        return Ok(Vec::new());
    }
    let request = content::ListRequest { filters: filters.to_vec() };
    let mut pages: tonic::Streaming<content::ListResponse> =
        api.stream(content::SERVICE, "List", request).await.map_err(status)?;
    let mut found = Vec::new();
    while let Some(page) = pages.message().await.map_err(status)? {
        found.extend(page.info);
        if found.len() > ANSWERS_MAX {
            return Err(Failure::Failed(format!("it answers with more than {ANSWERS_MAX} blobs")));
        }
    }
    Ok(found)
}

/// A blob's bytes, verified.
async fn read(api: &Api, digest: &Digest, max: u64) -> Result<Vec<u8>, Failure> {
    let request = content::ReadRequest { digest: digest.to_string(), offset: 0, size: 0 };
    let mut pieces: tonic::Streaming<content::ReadResponse> =
        api.stream(content::SERVICE, "Read", request).await.map_err(status)?;
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.message().await.map_err(status)? {
        bytes.extend_from_slice(&piece.data);
        if bytes.len() as u64 > max {
            return Err(Failure::Failed(format!("{digest} has more than {max} bytes")));
        }
    }
    match Digest::of(&bytes) {
        found if found == *digest => Ok(bytes),
        found => Err(Failure::Failed(format!("what it has as {digest} hashes to {found}"))),
    }
}

/// containerd's plugins of a type.
async fn plugins(api: &Api, kind: &str) -> Result<Vec<introspection::Plugin>, Failure> {
    let request = introspection::PluginsRequest { filters: vec![format!("type=={kind}")] };
    let answer: introspection::PluginsResponse =
        api.call(introspection::SERVICE, "Plugins", request).await.map_err(status)?;
    Ok(answer.plugins)
}

fn status(status: Status) -> Failure {
    Failure::Failed(status.message().to_owned())
}
