//! The OCI documents of the new image, and sending everything to the destination: blobs first, what names them last.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::Request;
use super::assemble::Layer;
use super::convert::Converted;
use super::input::Input;
use super::progress::{Event, Progress};
use super::reuse::Earlier;
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::{Blob, Role};
use crate::oci::{annotation, canonical_json, media_type, rfc3339};
use crate::source::files::unlinked;
use crate::source::{Content, Publish, Repository};

/// When the image was created, for sources that do not say.
const NO_TIME: u64 = 0;

pub(super) fn descriptor(media_type: &str, digest: &Digest, bytes: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes })
}

pub(super) fn layer(role: &str, digest: &Digest, bytes: u64, more: &[(&str, String)]) -> Value {
    let mut layer = descriptor(media_type::LAYER_ZSTD, digest, bytes);
    let mut annotations = json!({
        annotation::ROLE: role,
        annotation::VERSION: annotation::VERSION_1,
        annotation::DIGEST: digest.to_string(),
    });
    if let Some(annotations) = annotations.as_object_mut() {
        annotations.extend(more.iter().map(|(name, value)| ((*name).to_owned(), json!(value))));
    }
    layer["annotations"] = annotations;
    layer
}

/// The source's config with the new layers: its history stays, as of layers that are empty.
fn config(source: &Value, layers: &[(&str, Digest)], source_date: Option<u64>) -> Result<Vec<u8>> {
    let mut config = source.clone();
    let object = config.as_object_mut().ok_or_else(|| Error::invalid("image config", "it is not an object"))?;
    let own = object.get("created").and_then(Value::as_str).map(str::to_owned);
    let created = source_date.map(rfc3339).or(own).unwrap_or_else(|| rfc3339(NO_TIME));
    let mut history = match object.remove("history") {
        Some(Value::Array(history)) => history,
        _ => Vec::new(),
    };
    for entry in history.iter_mut().filter_map(Value::as_object_mut) {
        entry.insert("empty_layer".into(), json!(true));
    }
    for (role, _) in layers {
        history.push(json!({ "created": created, "created_by": "firstread build", "comment": role }));
    }
    let diff_ids: Vec<_> = layers.iter().map(|(_, diff_id)| diff_id.to_string()).collect();
    object.insert("created".into(), json!(created));
    object.insert("history".into(), json!(history));
    object.insert("rootfs".into(), json!({ "type": "layers", "diff_ids": diff_ids }));
    canonical_json(&config)
}

/// What sends an image to its destination.
pub(super) struct Publisher<'a> {
    pub request: &'a Request,
    pub destination: &'a Repository,
    pub progress: &'a dyn Progress,
    pub runtime: &'a Handle,
}

impl Publisher<'_> {
    fn push(&self, digest: &Digest, bytes: u64, content: &Content) -> Result<()> {
        self.progress.event(Event::Publish { digest: &digest.to_string(), bytes });
        self.runtime.block_on(self.destination.push_blob(digest, bytes, content))
    }

    /// Pushes an image, and returns the descriptor of its manifest.
    pub(super) fn image(
        &self,
        input: &Input,
        converted: &Converted,
        earlier: &[Earlier],
        publish: Publish,
    ) -> Result<(Digest, Value)> {
        let assembled = &converted.assembled;
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for pack in &assembled.packs {
            match pack {
                Layer::New { file, written } => {
                    self.push(&written.digest, written.bytes, &Content::Draft(file.clone()))?;
                    layers.push(layer(annotation::ROLE_PACK, &written.digest, written.bytes, &[]));
                    diff_ids.push((annotation::ROLE_PACK, written.diff_id));
                }
                Layer::Reused { image, blob, diff_id } => {
                    let missing = || Error::invalid("build", "a reused pack is missing");
                    let image = earlier.get(*image).ok_or_else(missing)?;
                    let (blob, _) = image.packs.get(*blob as usize).ok_or_else(missing)?;
                    self.carry(blob, &image.repository)?;
                    let role = match blob.role {
                        Role::Pack => annotation::ROLE_PACK,
                        Role::Startup => annotation::ROLE_STARTUP,
                    };
                    layers.push(layer(role, &blob.digest, blob.bytes, &[]));
                    diff_ids.push((role, *diff_id));
                }
            }
        }
        let (blob, written) = &assembled.index_layer;
        self.push(&written.digest, written.bytes, &Content::Bytes(blob.clone().into()))?;
        let mut annotations = vec![
            (annotation::INDEX_DIGEST, Digest::of(&assembled.index).to_string()),
            (annotation::INDEX_BYTES, assembled.index.len().to_string()),
        ];
        if let Some(verity) = &converted.verity {
            annotations.push((annotation::VERITY_ROOT, verity.root.hex()));
            annotations.push((annotation::VERITY_OFFSET, verity.offset.to_string()));
        }
        layers.push(layer(annotation::ROLE_INDEX, &written.digest, written.bytes, &annotations));
        diff_ids.push((annotation::ROLE_INDEX, written.diff_id));

        let config = config(&input.config, &diff_ids, self.request.source_date)?;
        let config_digest = Digest::of(&config);
        let config_descriptor = descriptor(media_type::CONFIG, &config_digest, config.len() as u64);
        self.push(&config_digest, config.len() as u64, &Content::Bytes(config.into()))?;
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type::MANIFEST,
            "config": config_descriptor,
            "layers": layers,
        });
        if !input.annotations.is_empty() {
            manifest["annotations"] = json!(input.annotations);
        }
        let manifest = canonical_json(&manifest)?;
        let digest = self.runtime.block_on(self.destination.push_manifest(&manifest, media_type::MANIFEST, publish))?;
        let mut descriptor = descriptor(media_type::MANIFEST, &digest, manifest.len() as u64);
        let mut platform = json!({ "os": input.platform.os, "architecture": input.platform.architecture });
        if let Some(variant) = &input.platform.variant {
            platform["variant"] = json!(variant);
        }
        descriptor["platform"] = platform;
        Ok((digest, descriptor))
    }

    /// Sees to it that an earlier image's pack is at the destination.
    fn carry(&self, blob: &Blob, from: &Repository) -> Result<()> {
        let temp = &self.request.temp;
        self.runtime.block_on(carry(&blob.digest, blob.bytes, from, self.destination, temp, self.progress))
    }
}

/// Sees to it that a blob of `from` is at `to`: without moving its bytes where that is possible.
pub(super) async fn carry(
    digest: &Digest,
    bytes: u64,
    from: &Repository,
    to: &Repository,
    temp: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    if to.exists(digest).await? || to.mount_blob(digest, from).await? {
        return Ok(());
    }
    progress.event(Event::Publish { digest: &digest.to_string(), bytes });
    let file = unlinked(temp)?;
    let mut body = from.blob(digest, bytes).await?;
    let mut writer = std::io::BufWriter::new(&file);
    let action = |error| Error::io("writing a pack (--temp or TMPDIR says where)", error);
    while let Some(piece) = futures_util::StreamExt::next(&mut body).await {
        std::io::Write::write_all(&mut writer, &piece?).map_err(action)?;
    }
    writer.into_inner().map_err(|error| action(error.into_error()))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    to.push_blob(digest, bytes, &Content::File(path)).await
}

/// Pushes the index of a multi-platform image.
pub(super) fn index(manifests: &[Value], destination: &Repository, runtime: &Handle) -> Result<Digest> {
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": manifests });
    let index = canonical_json(&index)?;
    runtime.block_on(destination.push_manifest(&index, media_type::INDEX, Publish::Named))
}
