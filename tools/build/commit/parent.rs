//! The image that an upper lies over: its index, its chunks, and its documents.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::{CommitRequest, change};
use crate::build::Request;
use crate::build::likely::Command;
use crate::build::reuse::Earlier;
use crate::build::scratch::Scratch;
use crate::chunk::{ChunkRef, Digest, Verified};
use crate::device::upper::LowerIdentity;
use crate::device::{Device, ImageDevice};
use crate::error::{Error, Result};
use crate::fetch::{FetchOptions, Fetcher, Image, Priority, open_image};
use crate::index::{BLOCK, Index};
use crate::map::Map;
use crate::oci::{MAX_CONFIG_BYTES, Platform, Reference, rfc3339};
use crate::pool::{Pool, PoolOptions};
use crate::source::{Purpose, Repository};

/// Chunks that are asked for at a time.
const BATCH: usize = 64;
/// Entries of a config's history that are kept: the latest.
const MAX_HISTORY: usize = 127;

/// The opened image.
pub(super) struct Parent {
    image: Image,
    manifest: Value,
    config: Value,
    platform: Platform,
    device: Arc<ImageDevice>,
    fetcher: Arc<Fetcher>,
    pool: Arc<Pool>,
    /// Has the pool, which goes with this.
    _scratch: Scratch,
}

/// What an upper says that it lies over, as a reference that means exactly that.
pub(super) fn pinned(lower: &LowerIdentity) -> Result<Reference> {
    let digest = lower.manifest;
    Ok(match lower.image.parse::<Reference>()? {
        Reference::Registry(reference) => {
            Reference::Registry(crate::oci::RegistryReference { digest: Some(digest), ..reference })
        }
        Reference::Layout { dir, .. } => Reference::Layout { dir, tag: Some(format!("@{digest}")) },
        other => other,
    })
}

impl Parent {
    pub(super) fn open(reference: &Reference, request: &Request, runtime: &Handle) -> Result<Self> {
        let scratch = Scratch::new(&request.temp)?;
        let platform = Platform::host();
        let cache = scratch.path().join("cache");
        let image = runtime.block_on(open_image(reference, &request.access, &platform, &cache))?;
        let (manifest, config) = runtime.block_on(async {
            let repository = Repository::open(reference, &request.access, Purpose::Read).await?;
            let manifest = parse(&repository.manifest_by_digest(&image.manifest_digest).await?.bytes)?;
            let descriptor = &manifest["config"];
            let digest: Digest = descriptor["digest"].as_str().unwrap_or_default().parse()?;
            let bytes = descriptor["size"].as_u64().unwrap_or_default();
            let config = parse(&repository.small_blob(&digest, bytes, MAX_CONFIG_BYTES).await?)?;
            Ok::<_, Error>((manifest, config))
        })?;
        let platform = platform_of(&config).unwrap_or(platform);
        let pool = Arc::new(Pool::open(&scratch.path().join("pool"), &PoolOptions::default())?);
        let _inside = runtime.enter();
        let fetcher = Fetcher::new(Arc::clone(&pool), FetchOptions::default());
        let map = Map::new(Arc::clone(&image.index));
        let device = ImageDevice::new(map, Arc::clone(&image.origin), Arc::clone(&fetcher), Arc::clone(&pool));
        Ok(Self { image, manifest, config, platform, device, fetcher, pool, _scratch: scratch })
    }

    pub(super) fn index(&self) -> &Arc<Index> {
        &self.image.index
    }

    pub(super) fn device(&self) -> &Arc<ImageDevice> {
        &self.device
    }

    pub(super) fn platform(&self) -> &Platform {
        &self.platform
    }

    /// What an upper over it says.
    pub(super) fn identity(&self) -> LowerIdentity {
        LowerIdentity {
            contents: self.image.index.device_digest(),
            device_bytes: self.device.size(),
            image: self.image.reference.to_string(),
            manifest: self.image.manifest_digest,
        }
    }

    /// The first block of its dm-verity tree, if it has one.
    pub(super) fn tree(&self) -> Option<u32> {
        let verity = self.image.layers.index.verity.as_ref()?;
        u32::try_from(verity.offset / u64::from(BLOCK)).ok()
    }

    /// The image as one whose packs are listed again.
    pub(super) fn earlier(&self, request: &Request, runtime: &Handle) -> Result<Earlier> {
        let reference = &self.image.reference;
        let repository = runtime.block_on(Repository::open(reference, &request.access, Purpose::Read))?;
        let layers = self.manifest["layers"].as_array().map_or(&[][..], Vec::as_slice);
        let diff_ids = self.config["rootfs"]["diff_ids"].as_array().map_or(&[][..], Vec::as_slice);
        let mut packs = Vec::new();
        for blob in self.image.index.blobs() {
            let digest = blob.digest.to_string();
            let at = layers.iter().position(|layer| layer["digest"].as_str() == Some(&digest));
            let diff_id = at.and_then(|at| diff_ids.get(at)).and_then(Value::as_str).ok_or_else(|| {
                Error::invalid(reference.to_string(), format!("its pack {digest} is not a layer of it"))
            })?;
            packs.push((blob, diff_id.parse()?));
        }
        Ok(Earlier { repository, packs, index: Arc::clone(&self.image.index) })
    }

    /// The annotations of the child's manifest: the parent's, and which image it is a child of.
    pub(super) fn annotations(&self) -> BTreeMap<String, String> {
        let own = self.manifest["annotations"].as_object().into_iter().flatten();
        let mut all: BTreeMap<String, String> =
            own.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect();
        // OCI image specification, annotations.md.
        let base = "org.opencontainers.image.base";
        all.insert(format!("{base}.digest"), self.image.manifest_digest.to_string());
        if let Reference::Registry(reference) = &self.image.reference {
            let mut named = reference.clone();
            named.digest = None;
            all.insert(format!("{base}.name"), Reference::Registry(named).to_string());
        }
        all
    }

    /// The child's config: the parent's with what is changed, and one more entry of history. Layers are not in it yet.
    pub(super) fn config(&self, request: &CommitRequest) -> Result<Value> {
        let mut config = self.config.clone();
        let object = config.as_object_mut().ok_or_else(|| Error::invalid("image config", "it is not an object"))?;
        let mut history = match object.remove("history") {
            Some(Value::Array(history)) => history,
            _ => Vec::new(),
        };
        // What made the parent's layers is replaced by what makes the child's.
        history.retain(|entry| entry["empty_layer"] == json!(true));
        let created = rfc3339(request.created);
        let mut entry = json!({ "created": created, "created_by": "firstread commit", "empty_layer": true });
        if !request.changes.is_empty() {
            let changes: Vec<String> = request.changes.iter().map(ToString::to_string).collect();
            entry["created_by"] = json!(format!("firstread commit --change {}", changes.join(" --change ")));
        }
        if let Some(message) = &request.message {
            entry["comment"] = json!(message);
        }
        if let Some(author) = &request.author {
            entry["author"] = json!(author);
            object.insert("author".into(), json!(author));
        }
        history.push(entry);
        history.drain(..history.len().saturating_sub(MAX_HISTORY));
        object.insert("history".into(), json!(history));
        object.insert("created".into(), json!(created));
        let mut settings = match object.remove("config") {
            Some(settings @ Value::Object(_)) => settings,
            _ => json!({}),
        };
        change::apply(&request.changes, &mut settings)?;
        object.insert("config".into(), settings);
        Ok(config)
    }

    /// Whether its own config and `config` run the same program.
    pub(super) fn runs_with(&self, config: &Value) -> bool {
        Command::of(&self.config).program() == Command::of(config).program()
    }

    /// Fetches what is not local of these chunks, verified.
    pub(super) fn fetch(&self, numbers: &[u32], runtime: &Handle) -> Result<()> {
        for batch in numbers.chunks(BATCH) {
            let chunks = batch.iter().filter_map(|number| self.image.index.chunk(*number));
            let missing: Vec<ChunkRef> = chunks.filter(|chunk| !self.pool.contains(&chunk.digest)).collect();
            let fetched = runtime.block_on(self.fetcher.fetch(&self.image.origin, &missing, Priority::Background));
            fetched.into_iter().try_for_each(|result| result.map(drop))?;
        }
        Ok(())
    }

    /// A chunk's plain bytes.
    pub(super) fn chunk(&self, number: u32, runtime: &Handle) -> Result<Arc<Verified>> {
        let missing = || Error::invalid("index", format!("it has no chunk {number}"));
        let chunk = self.image.index.chunk(number).ok_or_else(missing)?;
        if let Some(found) = self.pool.read_whole(&chunk.digest) {
            return Ok(Arc::new(found));
        }
        let fetched = runtime.block_on(self.fetcher.fetch(&self.image.origin, &[chunk], Priority::Demand));
        fetched.into_iter().next().unwrap_or_else(|| Err(missing()))
    }
}

fn platform_of(config: &Value) -> Option<Platform> {
    let text = |name: &str| config[name].as_str().filter(|text| !text.is_empty());
    let base = format!("{}/{}", text("os")?, text("architecture")?);
    let whole = text("variant").map_or_else(|| base.clone(), |variant| format!("{base}/{variant}"));
    whole.parse().ok()
}

fn parse(bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|error| Error::invalid("image", error.to_string()))
}
