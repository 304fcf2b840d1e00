//! What is local of an image, proven: every chunk is read from the disk and checked, and no source is asked.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};

use super::control::{JobState, Kind, Problem};
use super::images::index_cache;
use super::jobs::Job;
use super::keeping::answer;
use super::node::{Node, blocking};
use crate::error::Error;
use crate::fetch::{KnownImage, open_known};
use crate::oci::{Platform, Reference};
use crate::pool::Examined;

/// Chunks that are listed; further ones are counted.
const LISTED: usize = 100;

/// The answer. Plain bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// The image's reference.
    pub image: String,
    /// Digest of its manifest, as it was found the last time.
    pub digest: String,
    /// Whether all of it is local and right: it starts without its sources.
    pub sound: bool,
    /// Whether it is kept.
    pub pinned: bool,
    /// Chunks in the index.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Chunks that are local and have their digest.
    pub local_chunks: u64,
    /// Their bytes.
    pub local_bytes: u64,
    /// Chunks that are not local.
    pub missing: u64,
    /// Chunks whose bytes were not theirs.
    pub damaged: u64,
    /// Chunks that the disk did not give back.
    pub unreadable: u64,
    /// The first that are not local and right.
    pub faults: Vec<Fault>,
}

/// A chunk that is not local, or was not right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The chunk.
    pub chunk: String,
    /// Its length.
    pub bytes: u64,
    /// What is wrong.
    pub reason: String,
}

impl Node {
    /// Starts to prove what is local of an image, or says how far that is.
    ///
    /// # Errors
    /// An image that was never opened here, or whose local index is damaged.
    pub fn prove(self: &Arc<Self>, reference: String) -> std::result::Result<JobState, Problem> {
        self.accepting()?;
        let (node, name) = (Arc::clone(self), format!("prove {reference}"));
        self.jobs.start_or_ask(&name, |job| async move {
            let parsed: Reference = reference.parse()?;
            let cache = index_cache(&node.config.root);
            let known = open_known(&parsed, &Platform::host(), &cache).await.map_err(|error| match error {
                Error::NotFound { what, .. } => Problem::new(
                    Kind::NotFound,
                    format!("{what} is not local: the image can't start without its source"),
                )
                .hint(format!("`firstread pin {reference}` fetches it")),
                error => Problem::from(error),
            })?;
            answer(&blocking(move || node.check_local(&reference, &known, &job)).await?)
        })
    }

    fn check_local(&self, name: &str, known: &KnownImage, job: &Job) -> crate::error::Result<Proof> {
        let stopping = self.stopping();
        let mut proof = Proof {
            image: name.to_owned(),
            digest: known.manifest_digest.to_string(),
            pinned: self.pins.all().iter().any(|pinned| pinned.image == name),
            chunks: u64::from(known.index.chunk_count()),
            bytes: known.index.chunks().map(|chunk| u64::from(chunk.plain_len)).sum(),
            ..Proof::default()
        };
        job.total.store(proof.bytes, Relaxed);
        for chunk in known.index.chunks() {
            if *stopping.borrow() {
                return Err(Error::Stopping("the daemon".to_owned()));
            }
            let bytes = u64::from(chunk.plain_len);
            let reason = match self.pool.examine_whole(&chunk.digest) {
                Examined::Sound(_) => {
                    proof.local_chunks += 1;
                    proof.local_bytes += bytes;
                    None
                }
                Examined::Gone => {
                    proof.missing += 1;
                    Some("it is not local")
                }
                Examined::Damaged => {
                    proof.damaged += 1;
                    Some("its local bytes were not its own and were dropped")
                }
                Examined::Unreadable => {
                    proof.unreadable += 1;
                    Some("the disk did not give it back, and it was dropped")
                }
            };
            if let Some(reason) = reason
                && proof.faults.len() < LISTED
            {
                proof.faults.push(Fault { chunk: chunk.digest.to_string(), bytes, reason: reason.to_owned() });
            }
            job.done.fetch_add(bytes, Relaxed);
        }
        proof.sound = proof.local_chunks == proof.chunks;
        Ok(proof)
    }
}
