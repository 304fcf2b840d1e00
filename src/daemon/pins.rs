//! Pinned images: one small file each in the root directory, so that a pin outlives the daemon.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::control::SourceAccess;
use crate::chunk::{ChunkRef, Digest};
use crate::error::{Error, Result};
use crate::index::Index;
use crate::pool::Pool;
use crate::source::files::{read_small, replace};

/// Largest file in bytes that is read.
const RECORD_MAX: u64 = 64 << 20;

/// A pinned image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pinned {
    /// Its reference.
    pub image: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Digest of its index.
    pub index: String,
    /// Chunks that are kept.
    pub chunks: u64,
    /// Plain bytes of these.
    pub bytes: u64,
    /// How its source is reached, for what the disk loses.
    #[serde(default)]
    pub access: SourceAccess,
    /// The profile whose start-up set is kept; `None`: all of the image is.
    #[serde(default)]
    pub profile: Option<PathBuf>,
    /// With a profile, which chunks of the index these are: the first number and the count of each run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Vec<(u32, u32)>>,
}

/// Runs of numbers that follow each other: first number and count.
#[must_use]
pub fn runs(ascending: &[u32]) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &number in ascending {
        match runs.last_mut() {
            Some((first, count)) if u64::from(*first) + u64::from(*count) == u64::from(number) => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    runs
}

/// All pinned images, by reference.
#[derive(Debug)]
pub struct PinnedImages {
    dir: PathBuf,
    indexes: PathBuf,
    images: Mutex<HashMap<String, Pinned>>,
}

impl PinnedImages {
    /// Reads what is pinned from `dir` and pins it in the pool; indexes are in `indexes`. What can't be used is reported.
    ///
    /// # Errors
    /// A directory that can't be made or read.
    pub fn open(dir: &Path, indexes: &Path, pool: &Pool) -> Result<Self> {
        let failed = |error| Error::io(format!("reading the pins in {}", dir.display()), error);
        std::fs::create_dir_all(dir).map_err(failed)?;
        let pins = Self { dir: dir.to_owned(), indexes: indexes.to_owned(), images: Mutex::default() };
        for entry in std::fs::read_dir(dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let image = read_small(&path, RECORD_MAX).map(Option::unwrap_or_default).and_then(|bytes| {
                serde_json::from_slice(&bytes).map_err(|error| Error::invalid("pin", error.to_string()))
            });
            match image.and_then(|image: Pinned| Ok((pins.digests(&image)?, image))) {
                Ok((digests, image)) => {
                    pool.pin(&digests);
                    pins.images.lock().insert(image.image.clone(), image);
                }
                Err(error) => tracing::error!("the pin {} can't be used; pin the image again: {error}", path.display()),
            }
        }
        Ok(pins)
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Pinned> {
        self.images.lock().values().cloned().collect()
    }

    /// How the source of a pinned image is reached.
    #[must_use]
    pub fn access(&self, image: &str) -> SourceAccess {
        self.images.lock().get(image).map(|pinned| pinned.access.clone()).unwrap_or_default()
    }

    /// The chunks that a pin keeps. Blocks.
    ///
    /// # Errors
    /// An index that is gone or damaged.
    pub fn digests(&self, pinned: &Pinned) -> Result<Vec<Digest>> {
        Ok(self.chunks(pinned)?.map(|chunk| chunk.digest).collect())
    }

    /// The same, as the index has them. Blocks.
    ///
    /// # Errors
    /// An index that is gone or damaged.
    pub fn chunks(&self, pinned: &Pinned) -> Result<impl Iterator<Item = ChunkRef> + use<>> {
        let index = self.index(pinned)?;
        let all = vec![(0, index.chunk_count())];
        // A record that was changed by somebody may name more than there is.
        let runs = pinned
            .part
            .clone()
            .unwrap_or(all)
            .into_iter()
            .flat_map(|(first, count)| first..first.saturating_add(count));
        Ok(runs.map_while(move |number| index.chunk(number)))
    }

    /// The index of a pinned image. Blocks.
    ///
    /// # Errors
    /// An index that is gone or damaged.
    fn index(&self, pinned: &Pinned) -> Result<Index> {
        let digest: Digest = pinned.index.parse()?;
        Index::open(&self.indexes.join(format!("{}.index", digest.hex())), &digest)
    }

    /// Remembers `image`, whose chunks are pinned in the pool already; an earlier pin of the reference ends.
    ///
    /// # Errors
    /// What the system says.
    pub fn add(&self, image: &Pinned, pool: &Pool) -> Result<()> {
        let bytes = serde_json::to_vec(image).map_err(|error| Error::invalid("pin", error.to_string()))?;
        replace(&self.path(&image.image), &bytes)?;
        let earlier = self.images.lock().insert(image.image.clone(), image.clone());
        if let Some(earlier) = earlier {
            pool.unpin(&self.digests(&earlier)?);
        }
        Ok(())
    }

    /// Ends a pin; `None` if there is none of this reference.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self, image: &str, pool: &Pool) -> Result<Option<Pinned>> {
        let Some(pinned) = self.images.lock().remove(image) else { return Ok(None) };
        let path = self.path(image);
        std::fs::remove_file(&path).map_err(|error| Error::io(format!("removing {}", path.display()), error))?;
        pool.unpin(&self.digests(&pinned)?);
        Ok(Some(pinned))
    }

    fn path(&self, image: &str) -> PathBuf {
        self.dir.join(format!("{}.json", Digest::of(image.as_bytes()).hex()))
    }
}
