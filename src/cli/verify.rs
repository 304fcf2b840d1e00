//! `firstread verify`: is everything that an image needs at its sources, and right? Needs no daemon and no pool: what is
//! local says nothing about the sources. The other way round it is `--offline`, see `prove`.

use std::collections::HashMap;
use std::sync::Arc;

use clap::Args;
use futures_util::StreamExt;
use serde::Serialize;

use super::Outcome;
use super::inspect::{open, role_name, runtime};
use super::options::{AccessOptions, Context};
use super::output::size;
use super::progress::Progress;
use crate::chunk::{ChunkRef, Digest, Hasher};
use crate::daemon::control::{Kind, Problem};
use crate::error::Error;
use crate::fetch::{Image, decode};
use crate::index::Blob;
use crate::source::Source;

/// Stored bytes that one request asks for.
const RUN_BYTES: u64 = 4 << 20;

/// Gap in bytes between two chunks that is read over.
const GAP_BYTES: u64 = 64 << 10;

/// Damaged chunks that are listed; further ones are counted.
const LISTED: usize = 100;

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Verify {
    /// The image: HOST[:PORT]/REPO[:TAG][@DIGEST] or oci:DIR[:TAG]
    #[arg(value_name = "REF")]
    reference: String,
    /// Also check the digest of each whole pack, as a full pull does
    #[arg(long)]
    deep: bool,
    /// Check what is local instead: every chunk is read from the node's pool, and no source is asked
    #[arg(long, conflicts_with_all = ["deep", "plain_http", "docker_config"])]
    offline: bool,
    #[command(flatten)]
    access: AccessOptions,
}

/// The answer. Sizes in bytes.
#[derive(Debug, Default, Serialize)]
struct Verification {
    image: String,
    digest: String,
    sound: bool,
    /// Chunks in the index; each was checked at each source.
    chunks: u64,
    stored_bytes: u64,
    sources: Vec<String>,
    /// How many checks failed.
    failures: u64,
    /// The first of them.
    damaged: Vec<Damage>,
}

#[derive(Debug, Clone, Serialize)]
struct Damage {
    /// The chunk; none when it is a whole pack that is wrong.
    chunk: Option<String>,
    blob: String,
    offset: u64,
    stored_bytes: u64,
    source: String,
    reason: String,
}

impl Verification {
    fn report(&mut self, damage: Damage) {
        self.failures += 1;
        if self.damaged.len() < LISTED {
            self.damaged.push(damage);
        }
    }
}

impl Verify {
    /// Runs the verb.
    ///
    /// # Errors
    /// An image that can't be opened, or in which something is damaged.
    pub fn run(&self, context: &Context) -> Outcome {
        if self.offline {
            return super::prove::run(context, &self.reference);
        }
        let found = runtime()?.block_on(async {
            let image = open(context, &self.reference, &self.access).await?;
            let passes = if self.deep { 2 } else { 1 };
            let total: u64 = image.index.chunks().map(|chunk| u64::from(chunk.stored_len)).sum();
            let sources = image.origin.sources().len() as u64;
            let mut progress = Progress::new(&context.output, "verifying", total * sources * passes);
            let mut found = chunks(&image, &mut progress).await;
            if self.deep {
                packs(&image, &mut found, &mut progress).await;
            }
            found.sound = found.failures == 0;
            Ok::<_, Problem>(found)
        })?;
        context.output.answer(&found, text)?;
        if found.sound {
            return Ok(());
        }
        let message = format!("{}: {} checks failed", found.image, found.failures);
        Err(Problem::new(Kind::Source, message).hint("push the image again; build and push replace what is damaged"))
    }
}

/// Fetches and checks every chunk at every source.
async fn chunks(image: &Image, progress: &mut Progress) -> Verification {
    let mut found = Verification {
        image: image.reference.to_string(),
        digest: image.manifest_digest.to_string(),
        sources: image.origin.sources().iter().map(|source| source.name().to_owned()).collect(),
        chunks: u64::from(image.index.chunk_count()),
        ..Verification::default()
    };
    let mut all: Vec<ChunkRef> = image.index.chunks().collect();
    found.stored_bytes = all.iter().map(|chunk| u64::from(chunk.stored_len)).sum();
    all.sort_unstable_by_key(|chunk| (chunk.blob, chunk.offset));
    for source in image.origin.sources() {
        for run in all.chunk_by_run() {
            let Some(blob) = run.first().and_then(|chunk| image.origin.blobs().get(chunk.blob as usize)) else {
                continue;
            };
            for damage in check_run(source, blob, run).await {
                found.report(damage);
            }
            progress.add(run.iter().map(|chunk| u64::from(chunk.stored_len)).sum());
        }
    }
    found
}

/// Chunks in the order of their places, cut into what one request reads.
trait Runs {
    fn chunk_by_run(&self) -> impl Iterator<Item = &[ChunkRef]>;
}

impl Runs for [ChunkRef] {
    fn chunk_by_run(&self) -> impl Iterator<Item = &[ChunkRef]> {
        let mut rest = self;
        std::iter::from_fn(move || {
            let first = rest.first()?;
            let mut end = end_of(first);
            let mut len = 1;
            for chunk in rest.iter().skip(1) {
                let next = end_of(chunk).max(end);
                if chunk.blob != first.blob || chunk.offset > end + GAP_BYTES || next - first.offset > RUN_BYTES {
                    break;
                }
                end = next;
                len += 1;
            }
            let (run, tail) = rest.split_at_checked(len)?;
            rest = tail;
            Some(run)
        })
    }
}

fn end_of(chunk: &ChunkRef) -> u64 {
    chunk.offset + u64::from(chunk.stored_len)
}

/// Checks the chunks of one run with one request; when that fails, each by itself, so that each has its own reason.
async fn check_run(source: &Arc<dyn Source>, blob: &Blob, run: &[ChunkRef]) -> Vec<Damage> {
    let (Some(first), Some(end)) = (run.first(), run.iter().map(end_of).max()) else { return Vec::new() };
    match read(source, blob, first.offset, end - first.offset).await {
        Ok(bytes) => {
            let (run, name, start) = (run.to_vec(), source.name().to_owned(), first.offset);
            let blob = *blob;
            let checked = tokio::task::spawn_blocking(move || {
                let stored = |chunk: &ChunkRef| {
                    let at = usize::try_from(chunk.offset - start).ok()?;
                    bytes.get(at..at + chunk.stored_len as usize).map(<[u8]>::to_vec)
                };
                let check = |chunk: &ChunkRef| match stored(chunk) {
                    Some(stored) => decode(chunk, stored, &name).err(),
                    None => Some(Error::invalid("range", "the source's answer is too short")),
                };
                run.iter().filter_map(|chunk| Some(damage(chunk, &blob, &name, &check(chunk)?))).collect()
            });
            checked.await.unwrap_or_default()
        }
        Err(error) => match run {
            [chunk] => vec![damage(chunk, blob, source.name(), &error)],
            run => {
                let mut found = Vec::new();
                for chunk in run {
                    found.extend(Box::pin(check_run(source, blob, std::slice::from_ref(chunk))).await);
                }
                found
            }
        },
    }
}

async fn read(source: &Arc<dyn Source>, blob: &Blob, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
    let mut body = source.read_at(blob, offset, len).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(bytes)
}

fn damage(chunk: &ChunkRef, blob: &Blob, source: &str, error: &Error) -> Damage {
    Damage {
        chunk: Some(chunk.digest.to_string()),
        blob: blob.digest.to_string(),
        offset: chunk.offset,
        stored_bytes: u64::from(chunk.stored_len),
        source: source.to_owned(),
        reason: error.to_string(),
    }
}

/// Streams every pack from every source and checks its digest.
async fn packs(image: &Image, found: &mut Verification, progress: &mut Progress) {
    let mut by_blob: HashMap<u32, u64> = HashMap::new();
    for chunk in image.index.chunks() {
        *by_blob.entry(chunk.blob).or_default() += u64::from(chunk.stored_len);
    }
    for source in image.origin.sources() {
        for (number, blob) in (0u32..).zip(image.origin.blobs()) {
            let reason = match hash(source, blob).await {
                Ok(digest) if digest == blob.digest => None,
                Ok(digest) => Some(format!("the {} hashes to {digest}", role_name(blob.role))),
                Err(error) => Some(error.to_string()),
            };
            if let Some(reason) = reason {
                let (source, blob_digest) = (source.name().to_owned(), blob.digest.to_string());
                found.report(Damage {
                    chunk: None,
                    blob: blob_digest,
                    offset: 0,
                    stored_bytes: blob.bytes,
                    source,
                    reason,
                });
            }
            progress.add(by_blob.get(&number).copied().unwrap_or_default());
        }
    }
}

async fn hash(source: &Arc<dyn Source>, blob: &Blob) -> Result<Digest, Error> {
    let mut body = source.read_at(blob, 0, blob.bytes).await?;
    let mut hasher = Hasher::new();
    while let Some(piece) = body.next().await {
        hasher.update(&piece?);
    }
    Ok(hasher.finish())
}

fn text(found: &Verification) -> String {
    let mut text = String::new();
    for damage in &found.damaged {
        let what = damage.chunk.as_ref().map_or_else(|| "whole pack".to_owned(), |chunk| format!("chunk {chunk}"));
        let Damage { blob, offset, source, reason, .. } = damage;
        text.push_str(&format!("DAMAGED {what}\n  blob {blob}, offset {offset}, at {source}\n  {reason}\n"));
    }
    if found.failures > found.damaged.len() as u64 {
        text.push_str(&format!("and {} more\n", found.failures - found.damaged.len() as u64));
    }
    if found.sound {
        let (chunks, stored) = (found.chunks, size(found.stored_bytes));
        text.push_str(&format!("{}: sound; {chunks} chunks ({stored}) at {}", found.image, found.sources.join(", ")));
    }
    text
}
