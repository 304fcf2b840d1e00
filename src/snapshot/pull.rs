//! Pulling a firstread image into containerd: its manifest, its configuration and its index, and of its layers nothing else but
//! those that a container's commit put on top.
//!
//! For clients that can't: `ctr` of containerd 1.x downloads every layer before it asks a snapshotter. What is done here is
//! what containerd's own client does when it unpacks while it pulls, by the same calls.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::StreamExt;
use oci_spec::image::{Descriptor, ImageManifest};
use parking_lot::Mutex;
use serde::Serialize;
use tonic::{Code, Status};

use super::api::Api;
use super::locate::REFERENCE;
use super::service::REF;
use super::wire::content::{self, WriteAction, WriteRequest, WriteResponse};
use super::wire::snapshots::{CommitRequest, InfoResponse, KeyRequest, MountsResponse, PrepareRequest};
use super::wire::{Descriptor as WireDescriptor, Empty, FieldMask, Labels, diff, images, leases, snapshots};
use crate::chunk::Digest;
use crate::daemon::control::{Kind, Problem, SourceAccess};
use crate::daemon::images::source_access;
use crate::error::Error;
use crate::fetch::Places;
use crate::oci::{
    Document, Layers, MAX_CONFIG_BYTES, Platform, Reference, RegistryReference, annotation, descriptor_digest,
    media_type, rfc3339,
};
use crate::source::RawDocument;

/// Most bytes of an index layer that are pulled.
const INDEX_LAYER_MAX: u64 = 2 << 30;
/// How long containerd keeps what was pulled when this process dies: a day.
const LEASE_SECONDS: u64 = 24 * 3600;
/// The prefix of what containerd tells snapshotters.
const INHERITED: &str = "containerd.io/snapshot/";

/// What is to be pulled, and where to.
#[derive(Clone, Debug)]
pub struct Pull {
    /// The image.
    pub reference: RegistryReference,
    /// containerd's namespace.
    pub namespace: String,
    /// What containerd's configuration calls the snapshotter.
    pub snapshotter: String,
    /// How the registry is reached.
    pub access: SourceAccess,
}

/// What was pulled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pulled {
    /// The image's name in containerd.
    pub image: String,
    /// Digest of what the name stands for.
    pub digest: String,
    /// Bytes that were received.
    pub received: u64,
    /// Stored bytes of the packs, which were not.
    pub left: u64,
}

/// Forgets an image in containerd, and what only it needs, before the answer. One that is not there is none.
///
/// # Errors
/// What containerd says.
pub async fn forget(containerd: &Api, pull: &Pull) -> Result<(), Problem> {
    let api = containerd.within(&pull.namespace).map_err(refused)?;
    let request = images::DeleteRequest { name: name_of(&pull.reference), sync: true };
    match api.call::<_, Empty>(images::SERVICE, "Delete", request).await {
        Err(status) if status.code() != Code::NotFound => Err(refused(status)),
        _ => Ok(()),
    }
}

/// Pulls an image.
///
/// # Errors
/// What the registry or containerd says; an image that is not firstread's, or a snapshotter that is not.
pub async fn pull(containerd: &Api, pull: &Pull) -> Result<Pulled, Problem> {
    let api = containerd.within(&pull.namespace).map_err(refused)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let lease = format!("firstread-{}-{}", now.as_nanos(), std::process::id());
    let labels = [("containerd.io/gc.expire".to_owned(), rfc3339(now.as_secs() + LEASE_SECONDS))].into();
    let request = leases::CreateRequest { id: lease.clone(), labels };
    api.call::<_, leases::CreateResponse>(leases::SERVICE, "Create", request).await.map_err(refused)?;
    let leased = api.leased(&lease).map_err(refused)?;
    let reference = Reference::Registry(pull.reference.clone());
    let places = Places::open(&reference, &source_access(&pull.access)).await?;
    let done = Puller { api: leased, pull, places, received: 0 }.run().await;
    // It ends by itself otherwise.
    let ended = api.call::<_, Empty>(leases::SERVICE, "Delete", leases::DeleteRequest { id: lease }).await;
    if let Err(status) = ended {
        tracing::warn!("ending containerd's lease: {}", status.message());
    }
    done
}

struct Puller<'a> {
    api: Api,
    pull: &'a Pull,
    places: Places,
    received: u64,
}

impl Puller<'_> {
    async fn run(mut self) -> Result<Pulled, Problem> {
        let top = self.places.manifest().await?;
        self.received += top.bytes.len() as u64;
        let (raw, manifest, kind) = match Document::parse(&top.bytes, &top.media_type)? {
            Document::Manifest(manifest) => (top.clone(), manifest, media_type::MANIFEST),
            Document::Index(index) => {
                let kind = match top.media_type.as_str() {
                    media_type::DOCKER_INDEX => media_type::DOCKER_INDEX,
                    _ => media_type::INDEX,
                };
                let entry = Document::pick(&index, &Platform::host(), &name_of(&self.pull.reference))?;
                let digest = descriptor_digest(entry)?;
                let raw = self.places.ask(|place| async move { place.manifest_by_digest(&digest).await }).await?;
                self.received += raw.bytes.len() as u64;
                let number = index.manifests().iter().position(|other| other.digest() == entry.digest());
                let label = format!("containerd.io/gc.ref.content.m.{}", number.unwrap_or_default());
                // The manifest has to be there before what refers to it, or it could be collected.
                self.keep(&top, [(label, digest.to_string())].into()).await?;
                match Document::parse(&raw.bytes, &raw.media_type)? {
                    Document::Manifest(manifest) => (raw, manifest, kind),
                    Document::Index(_) => return Err(Error::invalid("image", "its indexes are nested").into()),
                }
            }
        };
        let layers = Layers::of(&manifest).map_err(|error| {
            Problem::from(error).hint("`firstread build` converts it; `ctr image pull` pulls it as it is")
        })?;
        let mut labels: Labels =
            [("containerd.io/gc.ref.content.config".to_owned(), manifest.config().digest().to_string())].into();
        for (number, layer) in manifest.layers().iter().enumerate() {
            labels.insert(format!("containerd.io/gc.ref.content.l.{number}"), layer.digest().to_string());
        }
        self.keep(&raw, labels).await?;
        let digest = descriptor_digest(manifest.config())?;
        let bytes = manifest.config().size();
        let config =
            self.places.ask(|place| async move { place.small_blob(&digest, bytes, MAX_CONFIG_BYTES).await }).await?;
        self.received += config.len() as u64;
        self.write(&digest, Bytes::from(config.clone()), self.source()).await?;
        if layers.index.bytes > INDEX_LAYER_MAX {
            return Err(Error::invalid("index", format!("its layer has {} bytes", layers.index.bytes)).into());
        }
        for layer in manifest.layers().iter().filter(|layer| !is_pack(layer)) {
            self.fetch(layer).await?;
        }
        let top_chain = self.unpack(&manifest, &config).await?;
        let label = format!("containerd.io/gc.ref.snapshot.{}", self.pull.snapshotter);
        self.relabel(&digest, [(label, top_chain)].into()).await?;
        self.name(&top, kind).await?;
        Ok(Pulled {
            image: name_of(&self.pull.reference),
            digest: top.digest.to_string(),
            received: self.received,
            left: layers.packs.iter().map(|(_, _, bytes)| bytes).sum(),
        })
    }

    /// Says in containerd where a blob came from, as its own client does.
    fn source(&self) -> Labels {
        let RegistryReference { host, repository, .. } = &self.pull.reference;
        let host = host.rsplit_once(':').map_or(host.as_str(), |(host, _)| host);
        [(format!("containerd.io/distribution.source.{host}"), repository.clone())].into()
    }

    async fn keep(&self, document: &RawDocument, mut labels: Labels) -> Result<(), Problem> {
        labels.extend(self.source());
        self.write(&document.digest, Bytes::from(document.bytes.clone()), labels).await
    }

    async fn fetch(&mut self, layer: &Descriptor) -> Result<(), Problem> {
        let (digest, bytes) = (descriptor_digest(layer)?, layer.size());
        if self.has(&digest).await? {
            return self.relabel(&digest, self.source()).await;
        }
        let body = self.places.ask(|place| async move { place.blob(&digest, bytes).await }).await?;
        let broken = Arc::new(Mutex::new(None));
        let request = WriteRequest {
            r#ref: format!("firstread-{digest}"),
            total: i64::try_from(bytes).unwrap_or(i64::MAX),
            expected: digest.to_string(),
            ..WriteRequest::default()
        };
        let (piece, failed, end) = (request.clone(), Arc::clone(&broken), request);
        let pieces = body.scan(0i64, move |offset, data| {
            let at = *offset;
            let next = match data {
                Ok(data) => {
                    *offset += i64::try_from(data.len()).unwrap_or_default();
                    let action = WriteAction::Write.into();
                    Some(WriteRequest { action, offset: at, data, ..piece.clone() })
                }
                Err(error) => {
                    *failed.lock() = Some(error);
                    None
                }
            };
            std::future::ready(next)
        });
        let whole = end.total;
        let commit = WriteRequest { action: WriteAction::Commit.into(), offset: whole, labels: self.source(), ..end };
        let sent = self.send(pieces.chain(futures_util::stream::iter([commit]))).await;
        if let Some(error) = broken.lock().take() {
            return Err(error.into());
        }
        self.received += bytes;
        sent
    }

    async fn write(&self, digest: &Digest, data: Bytes, labels: Labels) -> Result<(), Problem> {
        if self.has(digest).await? {
            return self.relabel(digest, labels).await;
        }
        let total = i64::try_from(data.len()).unwrap_or(i64::MAX);
        let request = WriteRequest {
            action: WriteAction::Commit.into(),
            r#ref: format!("firstread-{digest}"),
            total,
            expected: digest.to_string(),
            data,
            labels,
            ..WriteRequest::default()
        };
        self.send(futures_util::stream::iter([request])).await
    }

    async fn send(
        &self,
        requests: impl futures_util::Stream<Item = WriteRequest> + Send + 'static,
    ) -> Result<(), Problem> {
        let sent = async {
            let mut answers = self.api.talk::<_, WriteResponse>(content::SERVICE, "Write", requests).await?;
            while answers.message().await?.is_some() {}
            Ok(())
        };
        match sent.await {
            Err(status) if Status::code(&status) != Code::AlreadyExists => Err(refused(status)),
            _ => Ok(()),
        }
    }

    async fn has(&self, digest: &Digest) -> Result<bool, Problem> {
        let request = content::InfoRequest { digest: digest.to_string() };
        match self.api.call::<_, content::InfoResponse>(content::SERVICE, "Info", request).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused(status)),
        }
    }

    async fn relabel(&self, digest: &Digest, labels: Labels) -> Result<(), Problem> {
        let paths = labels.keys().map(|name| format!("labels.{name}")).collect();
        let info = content::Info { digest: digest.to_string(), labels, ..content::Info::default() };
        let request = content::UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let done: Result<content::InfoResponse, _> = self.api.call(content::SERVICE, "Update", request).await;
        done.map(drop).map_err(refused)
    }

    /// Has the snapshotter take the packs, and containerd apply the index. The name of the whole chain.
    async fn unpack(&self, manifest: &ImageManifest, config: &[u8]) -> Result<String, Problem> {
        let config: oci_spec::image::ImageConfiguration = serde_json::from_slice(config)
            .map_err(|error| Error::invalid("the image's configuration", error.to_string()))?;
        let diffs = config.rootfs().diff_ids();
        if diffs.len() != manifest.layers().len() || diffs.is_empty() {
            let reason = format!("it has {} layers and {} of their digests", manifest.layers().len(), diffs.len());
            return Err(Error::invalid("the image's configuration", reason).into());
        }
        let mut chain = String::new();
        for (layer, diff) in manifest.layers().iter().zip(diffs) {
            let parent = chain.clone();
            chain = match parent.as_str() {
                "" => diff.clone(),
                parent => Digest::of(format!("{parent} {diff}").as_bytes()).to_string(),
            };
            if !self.exists(&chain).await? {
                self.add(layer, &parent, &chain, diff).await?;
            }
        }
        Ok(chain)
    }

    async fn exists(&self, chain: &str) -> Result<bool, Problem> {
        match self.snapshots::<_, InfoResponse>("Stat", self.key(chain)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused(status)),
        }
    }

    async fn add(&self, layer: &Descriptor, parent: &str, chain: &str, diff: &str) -> Result<(), Problem> {
        let snapshotter = self.pull.snapshotter.clone();
        let annotations = layer.annotations().clone().unwrap_or_default();
        let mut labels: Labels = annotations.into_iter().filter(|(name, _)| name.starts_with(INHERITED)).collect();
        labels.insert(REF.to_owned(), chain.to_owned());
        labels.insert(REFERENCE.to_owned(), name_of(&self.pull.reference));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let key = format!("firstread-{now}-{} {chain}", std::process::id());
        let (parent, name) = (parent.to_owned(), chain.to_owned());
        let request =
            PrepareRequest { snapshotter: snapshotter.clone(), key: key.clone(), parent, labels: labels.clone() };
        let mounts = match self.snapshots::<_, MountsResponse>("Prepare", request).await {
            Ok(answer) => answer.mounts,
            // It was taken, or another pull was faster.
            Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
            Err(status) => return Err(refused(status)),
        };
        let applied = match is_pack(layer) {
            false => self.apply(layer, mounts, diff).await,
            true => {
                let message =
                    format!("containerd's snapshotter {snapshotter:?} wants the packs: it is not firstread's");
                Err(Problem::new(Kind::Failed, message)
                    .hint("`firstread doctor --containerd` prints its configuration"))
            }
        };
        if applied.is_ok() {
            let request = CommitRequest { snapshotter, name, key: key.clone(), labels };
            match self.snapshots::<_, Empty>("Commit", request).await {
                Ok(_) => return Ok(()),
                Err(status) if status.code() == Code::AlreadyExists => {}
                Err(status) => return Err(refused(status)),
            }
        }
        self.snapshots::<_, Empty>("Remove", self.key(&key)).await.map_err(refused)?;
        applied
    }

    async fn apply(&self, layer: &Descriptor, mounts: Vec<super::wire::Mount>, diff: &str) -> Result<(), Problem> {
        let request = diff::ApplyRequest { diff: Some(descriptor(layer)), mounts };
        let answer: diff::ApplyResponse = self.api.call(diff::SERVICE, "Apply", request).await.map_err(refused)?;
        let applied = answer.applied.unwrap_or_default().digest;
        if applied != diff {
            let reason = format!("its layer {} unpacks to {applied}, not to {diff}", layer.digest());
            return Err(Error::invalid("firstread image", reason).into());
        }
        Ok(())
    }

    /// Names the image: a document of a media type.
    async fn name(&self, top: &RawDocument, media_type: &str) -> Result<(), Problem> {
        let target = WireDescriptor {
            media_type: media_type.to_owned(),
            digest: top.digest.to_string(),
            size: i64::try_from(top.bytes.len()).unwrap_or(i64::MAX),
            annotations: Labels::new(),
        };
        let image =
            images::Image { name: name_of(&self.pull.reference), target: Some(target), ..images::Image::default() };
        let request = images::CreateRequest { image: Some(image.clone()) };
        match self.api.call::<_, images::ImageResponse>(images::SERVICE, "Create", request).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(refused(status)),
        }
        let update_mask = Some(FieldMask { paths: vec!["target".to_owned()] });
        let request = images::UpdateRequest { image: Some(image), update_mask };
        let done: Result<images::ImageResponse, _> = self.api.call(images::SERVICE, "Update", request).await;
        done.map(drop).map_err(refused)
    }

    fn key(&self, key: &str) -> KeyRequest {
        KeyRequest { snapshotter: self.pull.snapshotter.clone(), key: key.to_owned() }
    }

    async fn snapshots<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.api.call(snapshots::SERVICE, method, request).await
    }
}

/// Whether the snapshotter takes the layer as it is, instead of its bytes. Layers of other roles than these are refused before.
fn is_pack(layer: &Descriptor) -> bool {
    let role = layer.annotations().as_ref().and_then(|annotations| annotations.get(annotation::ROLE));
    role.is_some_and(|role| role != annotation::ROLE_INDEX)
}

fn name_of(reference: &RegistryReference) -> String {
    Reference::Registry(reference.clone()).to_string()
}

fn descriptor(layer: &Descriptor) -> WireDescriptor {
    WireDescriptor {
        media_type: layer.media_type().to_string(),
        digest: layer.digest().to_string(),
        size: i64::try_from(layer.size()).unwrap_or(i64::MAX),
        annotations: layer.annotations().clone().unwrap_or_default(),
    }
}

/// What containerd said.
pub fn refused(status: Status) -> Problem {
    let message = format!("containerd: {}", status.message());
    match status.code() {
        Code::Unavailable => Problem::new(Kind::Failed, message).hint("does it run? --containerd names its socket"),
        _ => Problem::new(Kind::Failed, message),
    }
}
