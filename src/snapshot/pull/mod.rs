//! Pulling a firstread image into containerd: its manifest, its configuration and its index, and of its layers nothing else but
//! those that a container's commit put on top.
//!
//! For clients that can't: `ctr` of containerd 1.x downloads every layer before it asks a snapshotter. What is done here is
//! what containerd's own client does when it unpacks while it pulls, by the same calls; what does not need one another is
//! done at the same time, since a container waits for it.

mod content;
mod unpack;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use oci_spec::image::{Descriptor, ImageManifest};
use serde::Serialize;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::api::Api;
use super::wire::version::{self, VersionResponse};
use super::wire::{Descriptor as WireDescriptor, Empty, FieldMask, Labels, images, leases};
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
/// Layers that are fetched at the same time.
const FETCHES: usize = 3;
/// The pause between two tries of what was unavailable. containerd itself waits up to 3 s between its tries.
const AGAIN: Duration = Duration::from_millis(100);

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
    /// How long the snapshotter is waited for when containerd does not reach it.
    pub patience: Duration,
}

/// How far a pull is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is known what there is to do.
    Resolved {
        /// Digest of what the name stands for.
        digest: Digest,
        /// Bytes to fetch.
        bytes: u64,
        /// Stored bytes of the packs, which stay where they are.
        left: u64,
        /// Layers that snapshots are made of.
        layers: usize,
    },
    /// So many bytes more have arrived.
    Received(u64),
    /// The snapshot of one layer more is there.
    Prepared,
    /// containerd can't do something yet, and is asked again until it can.
    Waiting {
        /// What it says.
        reason: String,
    },
}

/// Is told each step.
pub type Tell = Arc<dyn Fn(Step) + Send + Sync>;

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
pub async fn forget(containerd: &Api, pull: &Pull, tell: &Tell) -> Result<(), Problem> {
    let puller = Asker { api: containerd.within(&pull.namespace).map_err(refused)?, pull, tell };
    let request = images::DeleteRequest { name: name_of(&pull.reference), sync: true };
    let delete = || puller.api.call::<_, Empty>(images::SERVICE, "Delete", request.clone());
    match puller.patiently(delete).await {
        Err(status) if status.code() != Code::NotFound => Err(puller.refused(status)),
        _ => Ok(()),
    }
}

/// Pulls an image, and tells how far it is.
///
/// # Errors
/// What the registry or containerd says; an image that is not firstread's, or a snapshotter that is not.
pub async fn pull(containerd: &Api, pull: &Pull, tell: &Tell) -> Result<Pulled, Problem> {
    let api = containerd.within(&pull.namespace).map_err(refused)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let lease = format!("firstread-{}-{}", now.as_nanos(), std::process::id());
    let labels = [("containerd.io/gc.expire".to_owned(), rfc3339(now.as_secs() + LEASE_SECONDS))].into();
    let request = leases::CreateRequest { id: lease.clone(), labels };
    let reference = Reference::Registry(pull.reference.clone());
    let access = source_access(&pull.access);
    let resolve = async {
        let places = Places::open(&reference, &access).await?;
        let top = places.manifest().await?;
        Ok::<_, Error>((places, top))
    };
    // What the registry says ends nothing here: the lease is to be given back.
    let (leases::CreateResponse { .. }, resolved) =
        tokio::try_join!(api.call(leases::SERVICE, "Create", request), async { Ok(resolve.await) }).map_err(refused)?;
    let done = match resolved {
        Ok((places, top)) => {
            let ask = Asker { api: api.leased(&lease).map_err(refused)?, pull, tell };
            Puller { ask, places, received: AtomicU64::new(0) }.run(top).await
        }
        Err(error) => Err(error.into()),
    };
    // It ends by itself otherwise.
    let ended = api.call::<_, Empty>(leases::SERVICE, "Delete", leases::DeleteRequest { id: lease }).await;
    if let Err(status) = ended {
        tracing::warn!("ending containerd's lease: {}", status.message());
    }
    done
}

/// Asks containerd.
struct Asker<'a> {
    api: Api,
    pull: &'a Pull,
    tell: &'a Tell,
}

impl Asker<'_> {
    /// Asks again, for as long as the pull's patience lasts, while containerd answers that something it needs is not available:
    /// a snapshotter that was not there a moment ago is looked for again after a while only, and what another pull writes is
    /// locked until it is there.
    async fn patiently<T, F: Future<Output = Result<T, Status>>>(&self, ask: impl Fn() -> F) -> Result<T, Status> {
        let mut since: Option<Instant> = None;
        loop {
            let status = match ask().await {
                Err(status) if status.code() == Code::Unavailable => status,
                other => return other,
            };
            // The same code is a containerd's that is not there itself, which nobody said to wait for.
            if !self.answers().await {
                return Err(status);
            }
            if since.is_some_and(|since| since.elapsed() >= self.pull.patience) {
                return Err(Status::deadline_exceeded(status.message()));
            }
            if since.is_none() {
                since = Some(Instant::now());
                (self.tell)(Step::Waiting { reason: status.message().to_owned() });
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn answers(&self) -> bool {
        self.api.call::<_, VersionResponse>(version::SERVICE, "Version", Empty {}).await.is_ok()
    }

    /// What containerd said when the snapshotter was needed, patiently.
    fn refused(&self, status: Status) -> Problem {
        let Pull { snapshotter, patience, .. } = self.pull;
        let problem = refused(status.clone());
        match status.code() {
            Code::DeadlineExceeded => {
                let message = format!("{}, after {} s", problem.message, patience.as_secs());
                Problem::new(Kind::Failed, message).hint(format!(
                    "`firstread snapshotter` must run and listen where containerd's configuration of {snapshotter:?} says: \
                     `firstread doctor` looks at both"
                ))
            }
            _ => problem,
        }
    }
}

struct Puller<'a> {
    ask: Asker<'a>,
    places: Places,
    received: AtomicU64,
}

/// What an image consists of.
struct Resolved {
    /// The document that lists the manifest, or else the manifest; and its media type.
    top: (RawDocument, &'static str),
    raw: RawDocument,
    manifest: Box<ImageManifest>,
}

impl Puller<'_> {
    async fn run(&self, top: RawDocument) -> Result<Pulled, Problem> {
        let Resolved { top: (top, kind), raw, manifest } = self.resolve(top).await?;
        let layers = Layers::of(&manifest).map_err(|error| {
            Problem::from(error).hint("`firstread build` converts it; `ctr image pull` pulls it as it is")
        })?;
        if layers.index.bytes > INDEX_LAYER_MAX {
            return Err(Error::invalid("index", format!("its layer has {} bytes", layers.index.bytes)).into());
        }
        let left = layers.packs.iter().map(|(_, _, bytes)| bytes).sum();
        let wanted = self.missing(&manifest).await?;
        let bytes = wanted.iter().map(|layer| layer.size()).sum::<u64>() + manifest.config().size();
        self.tell(Step::Resolved { digest: top.digest, bytes, left, layers: manifest.layers().len() });
        // A layer is fetched while the packs before it become snapshots.
        let fetches = futures_util::stream::iter(wanted).map(|layer| self.fetch(layer)).buffer_unordered(FETCHES);
        let ((), chains, ()) = tokio::try_join!(
            self.keep_documents(&top, &raw, &manifest),
            self.begin(&manifest),
            fetches.try_collect::<()>(),
        )?;
        self.unpack(&manifest, &chains).await?;
        self.name(&top, kind).await?;
        Ok(Pulled {
            image: name_of(&self.ask.pull.reference),
            digest: top.digest.to_string(),
            received: self.received.load(Ordering::Relaxed),
            left,
        })
    }

    /// From what the name stands for to the manifest.
    async fn resolve(&self, top: RawDocument) -> Result<Resolved, Problem> {
        self.count(top.bytes.len());
        let index = match Document::parse(&top.bytes, &top.media_type)? {
            Document::Manifest(manifest) => {
                return Ok(Resolved { top: (top.clone(), media_type::MANIFEST), raw: top, manifest });
            }
            Document::Index(index) => index,
        };
        let kind = match top.media_type.as_str() {
            media_type::DOCKER_INDEX => media_type::DOCKER_INDEX,
            _ => media_type::INDEX,
        };
        let entry = Document::pick(&index, &Platform::host(), &name_of(&self.ask.pull.reference))?;
        let digest = descriptor_digest(entry)?;
        let raw = self.places.ask(|place| async move { place.manifest_by_digest(&digest).await }).await?;
        self.count(raw.bytes.len());
        match Document::parse(&raw.bytes, &raw.media_type)? {
            Document::Manifest(manifest) => Ok(Resolved { top: (top, kind), raw, manifest }),
            Document::Index(_) => Err(Error::invalid("image", "its indexes are nested").into()),
        }
    }

    /// The layers that containerd is to have and has not; those that it has are said to be from here as well.
    async fn missing<'a>(&self, manifest: &'a ImageManifest) -> Result<Vec<&'a Descriptor>, Problem> {
        let (mut missing, mut seen) = (Vec::new(), BTreeSet::new());
        for layer in manifest.layers().iter().filter(|layer| !is_pack(layer)) {
            let digest = descriptor_digest(layer)?;
            if !seen.insert(digest.to_string()) {
                continue;
            }
            match self.has(&digest, layer.size()).await? {
                true => self.relabel(&digest, self.source()).await?,
                false => missing.push(layer),
            }
        }
        Ok(missing)
    }

    /// Writes the manifest, and what lists it. Each has labels that lead containerd's garbage collection to what it names.
    async fn keep_documents(
        &self,
        top: &RawDocument,
        raw: &RawDocument,
        manifest: &ImageManifest,
    ) -> Result<(), Problem> {
        let mut labels: Labels =
            [("containerd.io/gc.ref.content.config".to_owned(), manifest.config().digest().to_string())].into();
        for (number, layer) in manifest.layers().iter().enumerate() {
            labels.insert(format!("containerd.io/gc.ref.content.l.{number}"), layer.digest().to_string());
        }
        self.keep(raw, labels).await?;
        if top.digest == raw.digest {
            return Ok(());
        }
        let Document::Index(index) = Document::parse(&top.bytes, &top.media_type)? else { return Ok(()) };
        let wanted = raw.digest.to_string();
        let number = index.manifests().iter().position(|entry| entry.digest().to_string() == wanted);
        let label = format!("containerd.io/gc.ref.content.m.{}", number.unwrap_or_default());
        self.keep(top, [(label, wanted)].into()).await
    }

    /// Fetches and writes the configuration, and makes snapshots of the packs at the bottom, for which nothing else is needed. The
    /// names of all layers' snapshots.
    async fn begin(&self, manifest: &ImageManifest) -> Result<unpack::Chains, Problem> {
        let (digest, bytes) = (descriptor_digest(manifest.config())?, manifest.config().size());
        let config =
            self.places.ask(|place| async move { place.small_blob(&digest, bytes, MAX_CONFIG_BYTES).await }).await?;
        self.count(config.len());
        self.tell(Step::Received(config.len() as u64));
        let chains = unpack::Chains::of(manifest, &config)?;
        let mut labels = self.source();
        let of_snapshot = format!("containerd.io/gc.ref.snapshot.{}", self.ask.pull.snapshotter);
        // The lease keeps the snapshots until all are there.
        labels.insert(of_snapshot, chains.top().to_owned());
        self.write(&digest, Bytes::from(config), labels).await?;
        let packs = manifest.layers().iter().take_while(|layer| is_pack(layer)).count();
        self.snapshots(manifest, &chains, 0..packs).await?;
        Ok(chains)
    }

    /// Makes snapshots of what is not there yet.
    async fn unpack(&self, manifest: &ImageManifest, chains: &unpack::Chains) -> Result<(), Problem> {
        let packs = manifest.layers().iter().take_while(|layer| is_pack(layer)).count();
        self.snapshots(manifest, chains, packs..manifest.layers().len()).await
    }

    /// Names the image: a document of a media type.
    async fn name(&self, top: &RawDocument, media_type: &str) -> Result<(), Problem> {
        let target = WireDescriptor {
            media_type: media_type.to_owned(),
            digest: top.digest.to_string(),
            size: i64::try_from(top.bytes.len()).unwrap_or(i64::MAX),
            annotations: Labels::new(),
        };
        let name = name_of(&self.ask.pull.reference);
        let image = images::Image { name, target: Some(target), ..images::Image::default() };
        let request = images::CreateRequest { image: Some(image.clone()) };
        match self.ask.api.call::<_, images::ImageResponse>(images::SERVICE, "Create", request).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(refused(status)),
        }
        let update_mask = Some(FieldMask { paths: vec!["target".to_owned()] });
        let request = images::UpdateRequest { image: Some(image), update_mask };
        let done: Result<images::ImageResponse, _> = self.ask.api.call(images::SERVICE, "Update", request).await;
        done.map(drop).map_err(refused)
    }

    fn count(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn tell(&self, step: Step) {
        (self.ask.tell)(step);
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
