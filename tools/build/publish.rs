//! The OCI documents of the new image, and sending everything to the destination: blobs first, what names them last.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::assemble::{Assembled, Layer};
use super::input::Input;
use super::progress::{Event, Progress};
use super::reuse::Earlier;
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::Blob;
use crate::oci::{annotation, canonical_json, media_type};
use crate::source::{Content, Publish, Repository};

/// When the image was created, for sources that do not say.
const NO_TIME: &str = "1970-01-01T00:00:00Z";

fn descriptor(media_type: &str, digest: &Digest, bytes: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes })
}

fn layer(role: &str, digest: &Digest, bytes: u64, index: Option<(&Digest, u64)>) -> Value {
    let mut layer = descriptor(media_type::LAYER_ZSTD, digest, bytes);
    let mut annotations = json!({
        annotation::ROLE: role,
        annotation::VERSION: annotation::VERSION_1,
        annotation::DIGEST: digest.to_string(),
    });
    if let (Some((digest, bytes)), Some(annotations)) = (index, annotations.as_object_mut()) {
        annotations.insert(annotation::INDEX_DIGEST.into(), json!(digest.to_string()));
        annotations.insert(annotation::INDEX_BYTES.into(), json!(bytes.to_string()));
    }
    layer["annotations"] = annotations;
    layer
}

/// The source's config with the new layers: its history stays, as of layers that are empty.
fn config(source: &Value, layers: &[(&str, Digest)]) -> Result<Vec<u8>> {
    let mut config = source.clone();
    let object = config.as_object_mut().ok_or_else(|| Error::invalid("image config", "it is not an object"))?;
    let created = object.get("created").and_then(Value::as_str).unwrap_or(NO_TIME).to_owned();
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

/// Pushes an image, and returns the descriptor of its manifest.
pub(super) fn image(
    input: &Input,
    assembled: &Assembled,
    earlier: &[Earlier],
    destination: &Repository,
    publish: Publish,
    progress: &dyn Progress,
    runtime: &Handle,
) -> Result<(Digest, Value)> {
    let push = |digest: &Digest, bytes: u64, content: Content| {
        progress.event(Event::Publish { digest: &digest.to_string(), bytes });
        runtime.block_on(destination.push_blob(digest, bytes, &content))
    };
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for pack in &assembled.packs {
        match pack {
            Layer::New { file, written } => {
                // The file has no name; this is one while it is open.
                let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                push(&written.digest, written.bytes, Content::File(path))?;
                layers.push(layer(annotation::ROLE_PACK, &written.digest, written.bytes, None));
                diff_ids.push((annotation::ROLE_PACK, written.diff_id));
            }
            Layer::Reused { image, blob, diff_id } => {
                let missing = || Error::invalid("build", "a reused pack is missing");
                let image = earlier.get(*image).ok_or_else(missing)?;
                let (blob, _) = image.packs.get(*blob as usize).ok_or_else(missing)?;
                carry(blob, &image.repository, destination, progress, runtime)?;
                layers.push(layer(annotation::ROLE_PACK, &blob.digest, blob.bytes, None));
                diff_ids.push((annotation::ROLE_PACK, *diff_id));
            }
        }
    }
    let (blob, written) = &assembled.index_layer;
    push(&written.digest, written.bytes, Content::Bytes(blob.clone().into()))?;
    let index = (&Digest::of(&assembled.index), assembled.index.len() as u64);
    layers.push(layer(annotation::ROLE_INDEX, &written.digest, written.bytes, Some(index)));
    diff_ids.push((annotation::ROLE_INDEX, written.diff_id));

    let config = config(&input.config, &diff_ids)?;
    let config_digest = Digest::of(&config);
    let config_descriptor = descriptor(media_type::CONFIG, &config_digest, config.len() as u64);
    push(&config_digest, config.len() as u64, Content::Bytes(config.into()))?;
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
    let digest = runtime.block_on(destination.push_manifest(&manifest, media_type::MANIFEST, publish))?;
    let mut descriptor = descriptor(media_type::MANIFEST, &digest, manifest.len() as u64);
    let mut platform = json!({ "os": input.platform.os, "architecture": input.platform.architecture });
    if let Some(variant) = &input.platform.variant {
        platform["variant"] = json!(variant);
    }
    descriptor["platform"] = platform;
    Ok((digest, descriptor))
}

/// Pushes the index of a multi-platform image.
pub(super) fn index(manifests: &[Value], destination: &Repository, runtime: &Handle) -> Result<Digest> {
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": manifests });
    let index = canonical_json(&index)?;
    runtime.block_on(destination.push_manifest(&index, media_type::INDEX, Publish::Named))
}

/// Sees to it that an earlier image's pack is at the destination.
fn carry(
    blob: &Blob,
    from: &Repository,
    destination: &Repository,
    progress: &dyn Progress,
    runtime: &Handle,
) -> Result<()> {
    runtime.block_on(async {
        if destination.exists(&blob.digest).await? || destination.mount_blob(&blob.digest, from).await? {
            return Ok(());
        }
        progress.event(Event::Publish { digest: &blob.digest.to_string(), bytes: blob.bytes });
        let file = super::pipeline::unlinked(&std::env::temp_dir())?;
        let mut body = from.blob(&blob.digest, blob.bytes).await?;
        let mut writer = std::io::BufWriter::new(&file);
        let action = |error| Error::io("writing a pack", error);
        while let Some(piece) = futures_util::StreamExt::next(&mut body).await {
            std::io::Write::write_all(&mut writer, &piece?).map_err(action)?;
        }
        writer.into_inner().map_err(|error| action(error.into_error()))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        destination.push_blob(&blob.digest, blob.bytes, &Content::File(path)).await
    })
}
