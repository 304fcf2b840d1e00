//! From layers to snapshots: the snapshotter takes the packs, and containerd applies the index and what is above it.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::image::{Descriptor, ImageManifest};
use tonic::{Code, Status};

use super::{Puller, Step, descriptor, is_pack, name_of, refused};
use crate::chunk::Digest;
use crate::daemon::control::{Kind, Problem};
use crate::error::Error;
use crate::snapshot::locate::REFERENCE;
use crate::snapshot::service::REF;
use crate::snapshot::wire::snapshots::{CommitRequest, InfoResponse, KeyRequest, MountsResponse, PrepareRequest};
use crate::snapshot::wire::{Empty, Labels, Mount, diff, snapshots};

/// The prefix of what containerd tells snapshotters.
const INHERITED: &str = "containerd.io/snapshot/";

/// What the layers and their snapshots are called, from the bottom.
pub(super) struct Chains {
    /// For each layer its plain digest, and the name of the chain that it ends.
    links: Vec<(String, String)>,
}

impl Chains {
    /// The chains of an image with this configuration.
    ///
    /// # Errors
    /// A configuration that is malformed or of another image.
    pub fn of(manifest: &ImageManifest, config: &[u8]) -> Result<Self, Problem> {
        let config: oci_spec::image::ImageConfiguration = serde_json::from_slice(config)
            .map_err(|error| Error::invalid("the image's configuration", error.to_string()))?;
        let diffs = config.rootfs().diff_ids();
        if diffs.len() != manifest.layers().len() || diffs.is_empty() {
            let reason = format!("it has {} layers and {} of their digests", manifest.layers().len(), diffs.len());
            return Err(Error::invalid("the image's configuration", reason).into());
        }
        let mut links: Vec<(String, String)> = Vec::new();
        for diff in diffs {
            let chain = match links.last() {
                None => diff.clone(),
                Some((_, parent)) => Digest::of(format!("{parent} {diff}").as_bytes()).to_string(),
            };
            links.push((diff.clone(), chain));
        }
        Ok(Self { links })
    }

    /// The name of the whole chain.
    pub fn top(&self) -> &str {
        self.links.last().map_or("", |(_, chain)| chain)
    }
}

impl Puller<'_> {
    /// Makes the snapshots of these layers; what they are based on is there.
    pub(super) async fn snapshots(
        &self,
        manifest: &ImageManifest,
        chains: &Chains,
        range: Range<usize>,
    ) -> Result<(), Problem> {
        let mut parent = "";
        for (number, (layer, (diff, chain))) in manifest.layers().iter().zip(&chains.links).enumerate() {
            if range.contains(&number) {
                if !self.exists(chain).await? {
                    self.add(layer, parent, chain, diff).await?;
                }
                self.tell(Step::Prepared);
            }
            parent = chain;
        }
        Ok(())
    }

    async fn exists(&self, chain: &str) -> Result<bool, Problem> {
        match self.snapshot::<_, InfoResponse>("Stat", self.key(chain)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(self.ask.refused(status)),
        }
    }

    async fn add(&self, layer: &Descriptor, parent: &str, chain: &str, diff: &str) -> Result<(), Problem> {
        let snapshotter = self.ask.pull.snapshotter.clone();
        let annotations = layer.annotations().clone().unwrap_or_default();
        let mut labels: Labels = annotations.into_iter().filter(|(name, _)| name.starts_with(INHERITED)).collect();
        labels.insert(REF.to_owned(), chain.to_owned());
        labels.insert(REFERENCE.to_owned(), name_of(&self.ask.pull.reference));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let key = format!("firstread-{now}-{} {chain}", std::process::id());
        let (parent, name) = (parent.to_owned(), chain.to_owned());
        let request =
            PrepareRequest { snapshotter: snapshotter.clone(), key: key.clone(), parent, labels: labels.clone() };
        let mounts = match self.snapshot::<_, MountsResponse>("Prepare", request).await {
            Ok(answer) => answer.mounts,
            // It was taken, or another pull was faster.
            Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
            Err(status) => return Err(self.ask.refused(status)),
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
            match self.snapshot::<_, Empty>("Commit", request).await {
                Ok(_) => return Ok(()),
                Err(status) if status.code() == Code::AlreadyExists => {}
                Err(status) => return Err(self.ask.refused(status)),
            }
        }
        self.snapshot::<_, Empty>("Remove", self.key(&key)).await.map_err(|status| self.ask.refused(status))?;
        applied
    }

    async fn apply(&self, layer: &Descriptor, mounts: Vec<Mount>, diff: &str) -> Result<(), Problem> {
        let request = diff::ApplyRequest { diff: Some(descriptor(layer)), mounts };
        let answer: diff::ApplyResponse = self.ask.api.call(diff::SERVICE, "Apply", request).await.map_err(refused)?;
        let applied = answer.applied.unwrap_or_default().digest;
        if applied != diff {
            let reason = format!("its layer {} unpacks to {applied}, not to {diff}", layer.digest());
            return Err(Error::invalid("firstread image", reason).into());
        }
        Ok(())
    }

    fn key(&self, key: &str) -> KeyRequest {
        KeyRequest { snapshotter: self.ask.pull.snapshotter.clone(), key: key.to_owned() }
    }

    async fn snapshot<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Clone + 'static,
        A: prost::Message + Default + 'static,
    {
        self.ask.patiently(|| self.ask.api.call(snapshots::SERVICE, method, request.clone())).await
    }
}
