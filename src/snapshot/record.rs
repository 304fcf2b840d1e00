//! What is durable of a snapshot: a directory of its own, with a record in it.
//!
//! ```text
//! STATE/lock              held by the one process that uses the state
//! STATE/snapshots/N/      one snapshot, N its number
//!   record                JSON on one line, and the line's CRC-32C on the next
//!   fs/ work/             its files; overlayfs's work directory of an active one
//!   mnt/                  where the image's device is mounted, of an index
//!   upper/                what was written to a block device of its own
//! STATE/new/N             on its way to snapshots/N
//! STATE/removed/N         on its way out
//! ```
//!
//! A snapshot appears and goes by one rename of its directory; its record is replaced by one rename in it. So at every
//! moment the state is what it was before a call or after it, and a record that is damaged hurts one snapshot.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::usage::Usage;
use crate::error::{Error, Result};

/// Version of the record's form.
const VERSION: u32 = 1;
/// Largest record in bytes: labels are at most 4 KiB each in containerd, and there are few.
const RECORD_MAX: u64 = 1 << 20;

/// What a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// For looking at a committed one.
    View,
    /// Can be written, and committed.
    Active,
    /// Unchangeable; the parent of others.
    Committed,
}

/// What a snapshot has to do with firstread's images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Nothing: its files are in `fs/`.
    #[default]
    Ordinary,
    /// A pack that was not downloaded: `fs/` is empty.
    Pack,
    /// An index: what is based on it sees the image's device instead of its files.
    Index,
}

/// The image on whose device an index is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Where its bytes are: a reference with the digest of its manifest.
    pub reference: String,
    /// A directory with blobs as in an OCI layout that has them as well.
    #[serde(default)]
    pub blobs: Option<PathBuf>,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    version: u32,
    /// Its number, and its directory's name.
    pub id: u64,
    /// containerd's key, or name of a committed one.
    pub key: String,
    /// The committed snapshot that it is based on.
    pub parent: Option<String>,
    /// What it is.
    pub kind: Kind,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What it has to do with firstread's images.
    #[serde(default)]
    pub role: Role,
    /// When it was made, or committed.
    pub created: SystemTime,
    /// When its labels were changed last.
    pub updated: SystemTime,
    /// What it had taken when it was committed.
    #[serde(default)]
    pub usage: Option<Usage>,
    /// Of an index: its image, once it was asked for.
    #[serde(default)]
    pub found: Option<Found>,
}

/// What a new snapshot shall be.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its key, or the name of a committed one.
    pub key: String,
    /// What it is.
    pub kind: Kind,
    /// What it is based on.
    pub parent: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What it has to do with firstread's images.
    pub role: Role,
}

impl Snapshot {
    /// A new one, made now.
    #[must_use]
    pub fn new(id: u64, wanted: Wanted) -> Self {
        let Wanted { key, kind, parent, labels, role } = wanted;
        let (version, now) = (VERSION, SystemTime::now());
        Self { version, id, key, parent, kind, labels, role, created: now, updated: now, usage: None, found: None }
    }

    /// A label's value.
    #[must_use]
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }
}

/// The directory of the state, locked.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    // Closing it gives the lock up.
    _lock: File,
}

/// What [`State::load`] found.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Directories whose records are damaged, with the reason. They stay where they are: others may be based on them.
    pub damaged: Vec<(PathBuf, String)>,
    /// Larger than every number that is taken.
    pub next: u64,
}

impl State {
    /// Opens the state in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`Error::Busy`] when another process uses it, or what the system says.
    pub fn open(dir: &Path) -> Result<Self> {
        let failed = |error: io::Error| Error::io(format!("opening the snapshotter's state {}", dir.display()), error);
        for part in ["snapshots", "new", "removed"] {
            // Processes of containers look files up in here through overlays; nobody else has to list it.
            DirBuilder::new().recursive(true).mode(0o711).create(dir.join(part)).map_err(failed)?;
        }
        let lock = File::create(dir.join("lock")).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { dir: fs::canonicalize(dir).map_err(failed)?, _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(Error::Busy(format!("the snapshotter's state {} is used by another process", dir.display())))
            }
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// The directory that all snapshots are below.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.dir.join("snapshots")
    }

    /// A snapshot's directory.
    #[must_use]
    pub fn dir_of(&self, id: u64) -> PathBuf {
        self.dir.join("snapshots").join(id.to_string())
    }

    /// Reads all records.
    ///
    /// # Errors
    /// A directory that can't be read.
    pub fn load(&self) -> Result<Loaded> {
        let dir = self.snapshots();
        let failed = |error| Error::io(format!("reading the snapshots in {}", dir.display()), error);
        let mut loaded = Loaded { next: 1, ..Loaded::default() };
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Some(id) = path.file_name().and_then(|name| name.to_str()?.parse::<u64>().ok()) else { continue };
            loaded.next = loaded.next.max(id.saturating_add(1));
            match read(&path.join("record")) {
                Ok(snapshot) if snapshot.id == id => loaded.snapshots.push(snapshot),
                Ok(snapshot) => loaded.damaged.push((path, format!("it is the record of snapshot {}", snapshot.id))),
                Err(reason) => loaded.damaged.push((path, reason)),
            }
        }
        Ok(loaded)
    }

    /// Makes a snapshot's directory, which appears whole or not at all. `fill` makes what is in it, the record aside.
    ///
    /// # Errors
    /// What the system says, or `fill`; nothing is left then.
    pub fn create(&self, snapshot: &Snapshot, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
        let new = self.dir.join("new").join(snapshot.id.to_string());
        let made = || -> io::Result<()> {
            DirBuilder::new().mode(0o711).create(&new)?;
            fill(&new)?;
            write(&new, snapshot)?;
            fs::rename(&new, self.dir_of(snapshot.id))?;
            sync(&self.snapshots())
        };
        made().map_err(|error| {
            // What can't be removed now is at the next start.
            let _ = fs::remove_dir_all(&new);
            Error::io(format!("making snapshot {:?} in {}", snapshot.key, self.dir.display()), error)
        })
    }

    /// Replaces a snapshot's record.
    ///
    /// # Errors
    /// What the system says; the old record is then still there.
    pub fn save(&self, snapshot: &Snapshot) -> Result<()> {
        let dir = self.dir_of(snapshot.id);
        write(&dir, snapshot).map_err(|error| Error::io(format!("writing the record in {}", dir.display()), error))
    }

    /// Takes a snapshot away; its files go with [`sweep`](Self::sweep).
    ///
    /// # Errors
    /// What the system says; it is then still there.
    pub fn remove(&self, id: u64) -> Result<()> {
        let (from, to) = (self.dir_of(id), self.dir.join("removed").join(id.to_string()));
        let moved = fs::rename(&from, to).and_then(|()| sync(&self.snapshots()));
        moved.map_err(|error| Error::io(format!("removing {}", from.display()), error))
    }

    /// Deletes the files of removed snapshots, and what was never finished of new ones when nobody makes any.
    pub fn sweep(&self, unfinished: Unfinished) {
        let dirs: &[&str] = match unfinished {
            Unfinished::Keep => &["removed"],
            Unfinished::Delete => &["removed", "new"],
        };
        for dir in dirs.iter().map(|dir| self.dir.join(dir)) {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                if let Err(error) = fs::remove_dir_all(entry.path())
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!("deleting {}: {error}; tried again later", entry.path().display());
                }
            }
        }
    }
}

/// The directories of snapshots whose records are damaged, of all snapshotters of the root directory `root`, with the
/// reason. Looks only; a snapshotter may be at work meanwhile.
#[must_use]
pub fn damaged(root: &Path) -> Vec<(PathBuf, String)> {
    let records = dirs(root).filter_map(|dir| {
        let reason = read(&dir.join("record")).err()?;
        // It may have been removed in this moment.
        dir.exists().then_some((dir, reason))
    });
    records.collect()
}

/// The snapshots called `name` that write to a block device of their own, of all snapshotters of the root directory `root`: key and
/// directory of the upper. A container's snapshot is called `NAMESPACE/NUMBER/CONTAINER`, and the container alone will do.
#[must_use]
pub fn uppers(root: &Path, name: &str) -> Vec<(String, PathBuf)> {
    let is_it = |key: &str| key == name || key.splitn(3, '/').nth(2) == Some(name);
    let found = dirs(root).filter_map(|dir| {
        let upper = dir.join("upper");
        let snapshot = read(&dir.join("record")).ok().filter(|snapshot| is_it(&snapshot.key))?;
        upper.is_dir().then_some((snapshot.key, upper))
    });
    found.collect()
}

/// The directories of all snapshots of all snapshotters.
fn dirs(root: &Path) -> impl Iterator<Item = PathBuf> {
    let states = fs::read_dir(root.join("snapshotter")).into_iter().flatten().flatten();
    let entries = states.flat_map(|state| fs::read_dir(state.path().join("snapshots")).into_iter().flatten().flatten());
    entries.map(|entry| entry.path())
}

/// What to do with directories in `new/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// Somebody may be at work on them.
    Keep,
    /// They are of an earlier process.
    Delete,
}

fn write(dir: &Path, snapshot: &Snapshot) -> io::Result<()> {
    let mut text = serde_json::to_vec(snapshot)?;
    let checksum = crc32c::crc32c(&text);
    text.extend_from_slice(format!("\n{checksum:08x}\n").as_bytes());
    if text.len() as u64 > RECORD_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("its labels exceed {RECORD_MAX} bytes")));
    }
    let new = dir.join("record.new");
    let mut file = File::create(&new)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&new, dir.join("record"))?;
    sync(dir)
}

fn read(path: &Path) -> Result<Snapshot, String> {
    let mut text = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(RECORD_MAX + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > RECORD_MAX {
        return Err(format!("it has more than {RECORD_MAX} bytes"));
    }
    let mut lines = text.split(|&byte| byte == b'\n');
    let (json, checksum) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    if format!("{:08x}", crc32c::crc32c(json)).as_bytes() != checksum {
        return Err("its checksum is wrong".to_owned());
    }
    let snapshot: Snapshot = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    match snapshot.version {
        VERSION => Ok(snapshot),
        other => Err(format!("it has version {other}; this program reads {VERSION}")),
    }
}

fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn snapshot(id: u64) -> Snapshot {
        let (key, labels) = (format!("key {id}"), BTreeMap::new());
        Snapshot::new(id, Wanted { key, kind: Kind::Active, parent: None, labels, role: Role::Ordinary })
    }

    #[test]
    fn a_damaged_record_hurts_one_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path()).unwrap();
        for id in 1..=4 {
            state.create(&snapshot(id), |_| Ok(())).unwrap();
        }
        let record = |id: u64| state.dir_of(id).join("record");
        let mut text = fs::read(record(2)).unwrap();
        text[20] ^= 1;
        fs::write(record(2), &text).unwrap();
        fs::write(record(3), b"").unwrap();
        let loaded = state.load().unwrap();
        let mut ids: Vec<u64> = loaded.snapshots.iter().map(|snapshot| snapshot.id).collect();
        ids.sort_unstable();
        assert_eq!((ids, loaded.damaged.len(), loaded.next), (vec![1, 4], 2, 5));
    }

    #[test]
    fn what_was_not_finished_is_gone_after_a_restart_and_the_state_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path()).unwrap();
        assert!(matches!(State::open(dir.path()), Err(Error::Busy(_))));
        state.create(&snapshot(1), |dir| fs::write(dir.join("x"), "x")).unwrap();
        assert!(state.create(&snapshot(2), |_| Err(io::Error::other("no"))).is_err());
        fs::create_dir(dir.path().join("new/3")).unwrap();
        state.remove(1).unwrap();
        drop(state);
        let state = State::open(dir.path()).unwrap();
        assert!(state.load().unwrap().snapshots.is_empty());
        state.sweep(Unfinished::Delete);
        for part in ["new", "removed", "snapshots"] {
            assert_eq!(fs::read_dir(dir.path().join(part)).unwrap().count(), 0, "{part}");
        }
    }
}
