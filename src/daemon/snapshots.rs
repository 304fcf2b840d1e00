//! Snapshots: what was written to a device, copied as it is at a moment, for who publishes or lists it.
//!
//! A snapshot is an upper in a directory of its own, `snapshots/N` in the root directory, and needs as much room as was
//! written. The device goes on; its writers wait until all is copied. It goes with the connection that asked for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::config::Config;
use super::control::{Kind, Problem, Snapshotted, SourceAccess};
use super::node::{Node, blocking};
use super::uppers::UpperInfo;
use crate::device::upper::boot;
use crate::device::upper::{self, Upper};
use crate::error::{Error, Result};

/// The uppers of exports, which are no devices and have no id: they are found by their directory.
#[derive(Default)]
pub(super) struct ExportedUppers(Mutex<Vec<Exported>>);

struct Exported {
    dir: PathBuf,
    upper: Weak<Upper>,
    access: SourceAccess,
}

impl ExportedUppers {
    /// Remembers an upper for as long as it is open.
    pub(super) fn add(&self, upper: &Arc<Upper>, info: &UpperInfo, access: &SourceAccess) {
        let mut all = self.0.lock();
        all.retain(|exported| exported.upper.strong_count() > 0);
        all.push(Exported { dir: info.dir.clone(), upper: Arc::downgrade(upper), access: access.clone() });
    }

    fn find(&self, dir: &Path) -> Option<(Arc<Upper>, SourceAccess)> {
        let all = self.0.lock();
        let found = all.iter().filter(|exported| exported.dir == dir);
        found.filter_map(|exported| Some((exported.upper.upgrade()?, exported.access.clone()))).next_back()
    }
}

/// A snapshot's directory, which goes when this does.
pub(super) struct SnapshotDir(PathBuf);

impl Drop for SnapshotDir {
    fn drop(&mut self) {
        if let Err(error) = upper::remove(&self.0) {
            tracing::warn!("a snapshot stays until the daemon starts again: {error}");
        }
    }
}

fn directory(config: &Config) -> PathBuf {
    config.root.join("snapshots")
}

impl Node {
    /// Copies what was written to a device or an export.
    ///
    /// # Errors
    /// There is no such device, it can't be written, or what the system says.
    pub(super) async fn snapshot(&self, target: &str) -> std::result::Result<(Snapshotted, SnapshotDir), Problem> {
        let (upper, access) = self.upper_of(target)?;
        let parent = directory(&self.config);
        let (dir, bytes) = blocking(move || {
            let dir = SnapshotDir(make(&parent)?);
            let bytes = upper.copy_to(&dir.0, &boot())?;
            Ok((dir, (bytes, upper.lower().clone())))
        })
        .await?;
        let (bytes, lower) = bytes;
        tracing::info!("{target}: {bytes} bytes are copied to {}", dir.0.display());
        let (image, digest) = (lower.image, lower.manifest.to_string());
        Ok((Snapshotted { dir: dir.0.clone(), image, digest, access, bytes }, dir))
    }

    fn upper_of(&self, target: &str) -> std::result::Result<(Arc<Upper>, SourceAccess), Problem> {
        let has_dir = |entry: &Arc<super::devices::Entry>| {
            entry.info().upper.is_some_and(|upper| upper.dir.as_os_str() == target)
        };
        let by_dir = || self.devices.all().into_iter().find(has_dir);
        let entry = match self.devices.find(target) {
            Ok(entry) => entry,
            Err(problem) => match by_dir() {
                Some(entry) => entry,
                None => return self.exported.find(Path::new(target)).ok_or(problem),
            },
        };
        let upper = entry.served()?.upper.clone().ok_or_else(|| {
            Problem::new(Kind::Request, format!("{target} can't be written: nothing was changed"))
                .hint("attach the image with --rw or --upper DIR")
        })?;
        Ok((upper, entry.access()))
    }
}

fn make(parent: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = |error| Error::io(format!("make a snapshot in {}", parent.display()), error);
    fs::create_dir_all(parent).map_err(failed)?;
    let mut number = 1u32;
    loop {
        let dir = parent.join(number.to_string());
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Removes what an earlier daemon left.
pub(super) fn remove_all(config: &Config) {
    let Ok(found) = fs::read_dir(directory(config)) else { return };
    for entry in found.flatten() {
        drop(SnapshotDir(entry.path()));
    }
}
