//! `firstread inspect`: what an image consists of. Needs no daemon.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::Args;
use rustix::fs::Access;
use serde::Serialize;

use super::options::{AccessOptions, Context};
use super::output::{fields, size, table};
use super::{Outcome, reference};
use crate::daemon::control::{Kind, Problem};
use crate::daemon::images::{index_cache, source_access};
use crate::fetch::{Image, open_image};
use crate::index::Role;
use crate::oci::Platform;

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Inspect {
    /// The image: HOST[:PORT]/REPO[:TAG][@DIGEST] or oci:DIR[:TAG]
    #[arg(value_name = "REF")]
    reference: String,
    #[command(flatten)]
    access: AccessOptions,
}

/// The answer. Sizes in bytes.
#[derive(Debug, Serialize)]
struct Inspection {
    image: String,
    digest: String,
    device_bytes: u64,
    file_system: String,
    chunks: u64,
    unique_chunks: u64,
    plain_bytes: u64,
    stored_bytes: u64,
    index_bytes: u64,
    /// Ordinary layers above firstread's, of which nothing is said here.
    ordinary_layers: usize,
    /// The dm-verity tree on the device, if it has one.
    verity: Option<VerityTree>,
    packs: Vec<Pack>,
}

/// What `veritysetup` needs to know.
#[derive(Debug, Serialize)]
struct VerityTree {
    root: String,
    /// Offset of the tree on the device.
    offset: u64,
}

#[derive(Debug, Serialize)]
struct Pack {
    digest: String,
    stored_bytes: u64,
    chunks: u64,
    role: &'static str,
    /// Whether an earlier image made it; nothing in an image says so yet.
    reused: Option<bool>,
}

impl Inspect {
    /// Runs the verb.
    ///
    /// # Errors
    /// An image that can't be opened.
    pub fn run(&self, context: &Context) -> Outcome {
        let image = runtime()?.block_on(open(context, &self.reference, &self.access))?;
        context.output.answer(&inspect(&image), text)
    }
}

/// Opens the image for a verb that works without the daemon. Indexes are kept where the daemon keeps them; who can't
/// write there has a cache directory (XDG Base Directory Specification).
///
/// # Errors
/// An image that can't be opened.
pub async fn open(context: &Context, image: &str, access: &AccessOptions) -> Outcome<Image> {
    let reference = reference::image(image)?;
    let access = source_access(&context.access(access)?);
    let mut cache = index_cache(&context.config.root);
    if std::fs::create_dir_all(&cache).is_err() || rustix::fs::access(&cache, Access::WRITE_OK).is_err() {
        let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = || variable("HOME").map(|home| home.join(".cache"));
        let base = variable("XDG_CACHE_HOME").or_else(home).unwrap_or_else(std::env::temp_dir);
        cache = base.join("firstread/index");
    }
    Ok(open_image(&reference, &access, &Platform::host(), &cache).await?)
}

/// A small runtime for a verb.
///
/// # Errors
/// What the system says.
pub fn runtime() -> Outcome<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Problem::new(Kind::Failed, format!("starting the runtime: {error}")))
}

/// A role's name in JSON, as in the layers' annotations.
#[must_use]
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Pack => "pack",
        Role::Startup => "startup",
    }
}

fn inspect(image: &Image) -> Inspection {
    let index = &image.index;
    let mut packs: Vec<Pack> = index
        .blobs()
        .map(|blob| Pack {
            digest: blob.digest.to_string(),
            stored_bytes: blob.bytes,
            chunks: 0,
            role: role_name(blob.role),
            reused: None,
        })
        .collect();
    let mut unique = HashSet::new();
    let (mut plain_bytes, mut chunk_bytes) = (0, 0);
    for chunk in index.chunks() {
        plain_bytes += u64::from(chunk.plain_len);
        chunk_bytes += u64::from(chunk.stored_len);
        unique.insert(chunk.digest);
        if let Some(pack) = packs.get_mut(chunk.blob as usize) {
            pack.chunks += 1;
        }
    }
    Inspection {
        image: image.reference.to_string(),
        digest: image.manifest_digest.to_string(),
        device_bytes: index.device_bytes(),
        file_system: index.file_system().to_owned(),
        chunks: u64::from(index.chunk_count()),
        unique_chunks: unique.len() as u64,
        plain_bytes,
        stored_bytes: chunk_bytes,
        index_bytes: image.layers.index.index_bytes,
        ordinary_layers: image.layers.ordinary,
        verity: image.layers.index.verity.map(|verity| VerityTree { root: verity.root.hex(), offset: verity.offset }),
        packs,
    }
}

fn text(found: &Inspection) -> String {
    let startup: u64 = found.packs.iter().filter(|pack| pack.role == "startup").map(|pack| pack.chunks).sum();
    let mut text = fields([
        ("image", found.image.clone()),
        ("manifest", found.digest.clone()),
        ("device", format!("{}, {}", size(found.device_bytes), found.file_system)),
        ("chunks", format!("{} ({} different, {startup} for the start)", found.chunks, found.unique_chunks)),
        ("plain", size(found.plain_bytes)),
        ("stored", size(found.stored_bytes)),
        ("index", size(found.index_bytes)),
    ]);
    if found.ordinary_layers > 0 {
        text.push('\n');
        text.push_str(&fields([("ordinary layers", format!("{}, above what is said here", found.ordinary_layers))]));
    }
    if let Some(verity) = &found.verity {
        text.push('\n');
        text.push_str(&fields([("verity root", verity.root.clone()), ("verity offset", verity.offset.to_string())]));
    }
    text.push('\n');
    let row =
        |pack: &Pack| [pack.role.to_owned(), pack.chunks.to_string(), size(pack.stored_bytes), pack.digest.clone()];
    text.push_str(&table(["role", "chunks", "stored", "pack"], found.packs.iter().map(row)));
    text
}
