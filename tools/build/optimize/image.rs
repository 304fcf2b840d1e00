//! The documents of an optimized image: the old ones with a new first layer and a new last one.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::{OptimizeRequest, Optimized};
use crate::build::progress::{Event, Progress};
use crate::build::publish::{carry, descriptor, layer};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::fetch::Image;
use crate::oci::{Document, MAX_CONFIG_BYTES, annotation, canonical_json, media_type};
use crate::source::{Content, Publish, Purpose, Repository};

struct Publisher<'a> {
    request: &'a OptimizeRequest,
    source: Repository,
    destination: Repository,
    progress: &'a dyn Progress,
    runtime: &'a Handle,
}

/// Publishes the image with its new start-up pack and index; the digest of what was named.
pub(super) fn publish(
    request: &OptimizeRequest,
    image: &Image,
    optimized: &Optimized,
    progress: &dyn Progress,
    runtime: &Handle,
) -> Result<Digest> {
    let open = |reference, purpose| runtime.block_on(Repository::open(reference, &request.access, purpose));
    let publisher = Publisher {
        request,
        source: open(&request.source, Purpose::Read)?,
        destination: open(&request.destination, Purpose::Push)?,
        progress,
        runtime,
    };
    let top = runtime.block_on(publisher.source.manifest())?;
    if top.digest == image.manifest_digest {
        return publisher.image(&top.bytes, image, optimized, Publish::Named).map(|(digest, _)| digest);
    }
    let Document::Index(_) = Document::parse(&top.bytes, &top.media_type)? else {
        return Err(Error::invalid(request.source.to_string(), "it changed while it was read"));
    };
    // The other platforms stay as they are.
    let mut index: Value = parse(&top.bytes)?;
    let entries = index.get_mut("manifests").and_then(Value::as_array_mut);
    let mut replaced = false;
    for entry in entries.into_iter().flatten() {
        let digest = digest_of(entry)?;
        let manifest = runtime.block_on(publisher.source.manifest_by_digest(&digest))?;
        if digest == image.manifest_digest {
            let (digest, bytes) = publisher.image(&manifest.bytes, image, optimized, Publish::Listed)?;
            entry["digest"] = json!(digest.to_string());
            entry["size"] = json!(bytes);
            replaced = true;
            continue;
        }
        if !matches!(Document::parse(&manifest.bytes, &manifest.media_type)?, Document::Manifest(_)) {
            return Err(Error::Unsupported(format!("{}: an image index inside an image index", request.source)));
        }
        publisher.carry_all(&parse(&manifest.bytes)?)?;
        let kind = entry.get("mediaType").and_then(Value::as_str).unwrap_or(media_type::MANIFEST);
        runtime.block_on(publisher.destination.push_manifest(&manifest.bytes, kind, Publish::Listed))?;
    }
    if !replaced {
        return Err(Error::Unsupported(format!("{}: the image is not listed in its index itself", request.source)));
    }
    let index = canonical_json(&index)?;
    runtime.block_on(publisher.destination.push_manifest(&index, media_type::INDEX, Publish::Named))
}

impl Publisher<'_> {
    fn push(&self, digest: &Digest, bytes: u64, content: &Content) -> Result<()> {
        self.progress.event(Event::Publish { digest: &digest.to_string(), bytes });
        self.runtime.block_on(self.destination.push_blob(digest, bytes, content))
    }

    fn carry(&self, digest: &Digest, bytes: u64) -> Result<()> {
        let (from, to) = (&self.source, &self.destination);
        self.runtime.block_on(carry(digest, bytes, from, to, &self.request.temp, self.progress))
    }

    /// Sees to it that everything that a manifest names is at the destination.
    fn carry_all(&self, manifest: &Value) -> Result<()> {
        let layers = manifest.get("layers").and_then(Value::as_array).into_iter().flatten();
        for descriptor in layers.chain(manifest.get("config")) {
            self.carry(&digest_of(descriptor)?, bytes_of(descriptor)?)?;
        }
        Ok(())
    }

    /// Publishes the image whose manifest was `old`; its new manifest's digest and length.
    fn image(&self, old: &[u8], image: &Image, optimized: &Optimized, publish: Publish) -> Result<(Digest, u64)> {
        let mut manifest: Value = parse(old)?;
        let old_layers = manifest.get("layers").and_then(Value::as_array).cloned().unwrap_or_default();
        let config_descriptor = manifest.get("config").cloned().unwrap_or_default();
        let config = self.runtime.block_on(self.source.small_blob(
            &digest_of(&config_descriptor)?,
            bytes_of(&config_descriptor)?,
            MAX_CONFIG_BYTES,
        ))?;
        let mut config: Value = parse(&config)?;
        let old_ids: Vec<Value> = config["rootfs"]["diff_ids"].as_array().cloned().unwrap_or_default();
        if old_ids.len() != old_layers.len() {
            return Err(Error::invalid("image config", "it has another number of layers than the manifest"));
        }

        let Optimized { pack, written, index, index_layer: (index_blob, index_written), .. } = optimized;
        // The file has no name; this is one while it is open.
        let path = PathBuf::from(format!("/proc/self/fd/{}", pack.as_raw_fd()));
        self.push(&written.digest, written.bytes, &Content::File(path))?;
        let mut layers = vec![layer(annotation::ROLE_STARTUP, &written.digest, written.bytes, &[])];
        let mut roles = vec![(annotation::ROLE_STARTUP.to_owned(), json!(written.diff_id.to_string()))];
        let needed: Vec<Digest> =
            crate::index::Index::from_bytes(index.clone())?.blobs().map(|blob| blob.digest).collect();
        // Ordinary layers, as a container's commit makes: above the index, which hides what is below it.
        let mut above = Vec::new();
        let mut last = None;
        for (old, id) in old_layers.iter().zip(&old_ids) {
            let role = old["annotations"][annotation::ROLE].as_str().unwrap_or_default();
            let digest = digest_of(old)?;
            match role {
                "" => {
                    self.carry(&digest, bytes_of(old)?)?;
                    above.push((old.clone(), id.clone()));
                }
                annotation::ROLE_INDEX => last = Some(old.clone()),
                // The start-up pack before this one, unless its chunks are in use as ordinary ones.
                annotation::ROLE_STARTUP if digest == written.digest || !needed.contains(&digest) => {}
                role => {
                    self.carry(&digest, bytes_of(old)?)?;
                    layers.push(old.clone());
                    roles.push((role.to_owned(), id.clone()));
                }
            }
        }
        self.push(&index_written.digest, index_written.bytes, &Content::Bytes(index_blob.clone().into()))?;
        let mut last = last.ok_or_else(|| Error::invalid("image", "it has no index layer"))?;
        last["digest"] = json!(index_written.digest.to_string());
        last["size"] = json!(index_written.bytes);
        last["mediaType"] = json!(media_type::LAYER_ZSTD);
        last["annotations"][annotation::DIGEST] = json!(index_written.digest.to_string());
        last["annotations"][annotation::INDEX_DIGEST] = json!(Digest::of(index).to_string());
        last["annotations"][annotation::INDEX_BYTES] = json!(index.len().to_string());
        layers.push(last);
        roles.push((annotation::ROLE_INDEX.to_owned(), json!(index_written.diff_id.to_string())));
        for (old, id) in above {
            layers.push(old);
            roles.push((String::new(), id));
        }

        relayer(&mut config, &roles);
        let config = canonical_json(&config)?;
        let config_digest = Digest::of(&config);
        manifest["config"] = descriptor(media_type::CONFIG, &config_digest, config.len() as u64);
        self.push(&config_digest, config.len() as u64, &Content::Bytes(config.into()))?;
        manifest["layers"] = json!(layers);
        let manifest = canonical_json(&manifest)?;
        let pushed = self.destination.push_manifest(&manifest, media_type::MANIFEST, publish);
        let digest = self.runtime.block_on(pushed)?;
        tracing::debug!(old = %image.manifest_digest, new = %digest, "optimized");
        Ok((digest, manifest.len() as u64))
    }
}

/// Gives a config other layers: its history keeps what made the file system.
fn relayer(config: &mut Value, layers: &[(String, Value)]) {
    let created = config.get("created").cloned();
    if let Some(history) = config.get_mut("history").and_then(Value::as_array_mut) {
        history.retain(|entry| entry["empty_layer"] == json!(true));
        for (role, _) in layers {
            let mut entry = json!({ "created_by": "firstread build", "comment": role });
            if let Some(created) = &created {
                entry["created"] = created.clone();
            }
            history.push(entry);
        }
    }
    let ids: Vec<Value> = layers.iter().map(|(_, id)| id.clone()).collect();
    config["rootfs"] = json!({ "type": "layers", "diff_ids": ids });
}

fn parse(bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|error| Error::invalid("image", error.to_string()))
}

fn digest_of(descriptor: &Value) -> Result<Digest> {
    descriptor.get("digest").and_then(Value::as_str).unwrap_or_default().parse()
}

fn bytes_of(descriptor: &Value) -> Result<u64> {
    let missing = || Error::invalid("image", "a descriptor has no size");
    descriptor.get("size").and_then(Value::as_u64).ok_or_else(missing)
}
