//! The build cache: what was made of a layer, so that the layer is not read, inflated and compressed again.
//!
//! Each layer has a file of its own, named by everything that its content depends on: the layer's digests, the level,
//! the limits, the versions of the builder and of zstd. It has the layer's entries, the contents of its small files, and the
//! stored chunks of its large ones. What depends on several layers (small files of one directory, the file system's
//! metadata) is hashed in every build and compressed only if no build did it before: those chunks are in files of one build each.
//!
//! Nothing in the cache is believed: every part has a sha256, checked before the first byte of it is used. A file that is
//! not what it should be is removed, and its layer is read. Files appear under their names complete or not at all; those used
//! least recently go when the limit is reached.

mod entry;
mod file;
mod run;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::Request;
use super::decode::Expected;
use crate::chunk::{Digest, Hasher};
use crate::error::{Error, Result};

pub(super) use self::entry::Recorder;
pub(super) use self::file::{CacheFile, Kept, read_chunk};
pub(super) use self::run::Run;

/// Where builds keep what they can use again, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    /// The directory; it is made if it is not there.
    pub dir: PathBuf,
    /// Most bytes that stay in it after a build.
    pub limit: u64,
}

/// Changes when the meaning of the files does.
const VERSION: u32 = 1;
/// Ends of file names.
const LAYER: &str = "layer";
const CHUNKS: &str = "chunks";
const PARTIAL: &str = "partial";
/// A partial file that was not written to for so long belongs to a build that was killed.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// A directory of cache files.
pub(super) struct Cache {
    dir: PathBuf,
    limit: u64,
}

impl Cache {
    pub(super) fn open(settings: &CacheSettings) -> Result<Self> {
        let dir = settings.dir.clone();
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|error| Error::io(format!("making {}", dir.display()), error))?;
        Ok(Self { dir, limit: settings.limit })
    }

    /// The file for a layer, if there is a sound one.
    fn layer(&self, key: &Digest) -> Option<CacheFile> {
        let file = self.sound(&self.dir.join(format!("{}.{LAYER}", key.hex())), key)?;
        file.touch();
        Some(file)
    }

    /// The files of chunks that builds with `key` left.
    fn chunks(&self, key: &Digest) -> Vec<CacheFile> {
        let prefix = format!("{}-", key.hex());
        let mut paths: Vec<PathBuf> = self.files(CHUNKS).unwrap_or_default();
        paths.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)));
        paths.sort_unstable();
        paths.iter().filter_map(|path| self.sound(path, key)).collect()
    }

    /// Opens a file and checks everything but its chunks. One that is damaged goes.
    fn sound(&self, path: &Path, key: &Digest) -> Option<CacheFile> {
        match CacheFile::open(path, key) {
            Ok(file) => Some(file),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.discard(path, &error);
                None
            }
        }
    }

    fn discard(&self, path: &Path, error: &Error) {
        tracing::warn!("the cache file {} is removed, it is made again: {error}", path.display());
        // What can't be removed is found to be damaged again.
        let _ = fs::remove_file(path);
    }

    /// Makes a file under a name that only complete files have, if it is not larger than the whole cache may be.
    fn write(&self, name: &str, fill: impl FnOnce(File) -> Result<u64>) -> Result<()> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let partial = self.dir.join(format!("{}-{number}.{PARTIAL}", std::process::id()));
        let action = |error| Error::io(format!("writing {}", partial.display()), error);
        let made = File::create_new(&partial).map_err(action).and_then(fill).and_then(|bytes| {
            if bytes > self.limit {
                return Ok(false);
            }
            fs::rename(&partial, self.dir.join(name)).map_err(action)?;
            Ok(true)
        });
        if !matches!(made, Ok(true)) {
            // The first error is the one to tell.
            let _ = fs::remove_file(&partial);
        }
        made.map(drop)
    }

    fn files(&self, extension: &str) -> Result<Vec<PathBuf>> {
        let action = |error| Error::io(format!("listing {}", self.dir.display()), error);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(action)? {
            let path = entry.map_err(action)?.path();
            if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
        Ok(found)
    }

    /// Removes what was used least recently until the limit is kept.
    fn trim(&self) -> Result<()> {
        let mut files = Vec::new();
        let now = SystemTime::now();
        for (extension, partial) in [(LAYER, None), (CHUNKS, None), (PARTIAL, Some(ABANDONED))] {
            for path in self.files(extension)? {
                // Another build may have removed it meanwhile.
                let Ok(found) = fs::metadata(&path) else { continue };
                let used = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                match partial {
                    Some(age) if now.duration_since(used).is_ok_and(|since| since > age) => {
                        let _ = fs::remove_file(&path);
                    }
                    Some(_) => {}
                    None => files.push((used, path, found.len())),
                }
            }
        }
        files.sort_unstable();
        let mut bytes: u64 = files.iter().map(|(_, _, len)| len).sum();
        for (_, path, len) in files {
            if bytes <= self.limit {
                break;
            }
            bytes -= len;
            fs::remove_file(&path).map_err(|error| Error::io(format!("removing {}", path.display()), error))?;
        }
        Ok(())
    }
}

/// What the chunks of a build depend on beside their plain bytes.
fn chunks_key(request: &Request) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(&VERSION.to_le_bytes());
    hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
    hasher.update(&zstd::zstd_safe::version_number().to_le_bytes());
    hasher.update(&request.level.to_le_bytes());
    hasher.finish()
}

/// What a layer's file depends on; `None` for a layer that nothing identifies.
fn layer_key(request: &Request, expected: &Expected) -> Option<Digest> {
    if expected.digest.is_none() && expected.diff_id.is_none() {
        return None;
    }
    let mut hasher = Hasher::new();
    hasher.update(chunks_key(request).as_bytes());
    for digest in [&expected.digest, &expected.diff_id] {
        hasher.update(digest.as_ref().map_or(&[0; 32], Digest::as_bytes).as_slice());
    }
    // A layer that passed other limits may be beyond these.
    hasher.update(format!("{:?}", request.limits).as_bytes());
    Some(hasher.finish())
}
