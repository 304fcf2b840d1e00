//! What an upper changed, file by file: the tree below compared with the tree on the device.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::files::Files;
use super::{Request, Written};
use crate::build::progress::{Event, Progress};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ext4::{BLOCK_SIZE, Names, read_names};
use crate::index::BLOCK;
use crate::oci::Reference;
use crate::source::Access;

/// What to compare.
#[derive(Clone, Debug)]
pub struct DiffRequest {
    /// The directory of an upper that nobody has open.
    pub upper: PathBuf,
    /// What tells this start of the machine from others.
    pub boot: String,
    /// Where a directory for what is fetched is made.
    pub temp: PathBuf,
    /// How registries are reached.
    pub access: Access,
}

/// How a path changed, in the letters of `docker diff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Kind {
    /// It was added.
    #[serde(rename = "A")]
    Added,
    /// Its content or its attributes changed.
    #[serde(rename = "C")]
    Changed,
    /// It was deleted.
    #[serde(rename = "D")]
    Deleted,
}

/// A path that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// From `/` on; bytes that are no UTF-8 are replaced.
    pub path: String,
    /// How.
    pub kind: Kind,
    /// Bytes of its data that were written, in whole blocks.
    pub bytes: u64,
}

/// All that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The paths, in order; none where there is no file system that could be looked into.
    pub changes: Vec<Changed>,
    /// Bytes that were written, in whole blocks.
    pub written_bytes: u64,
    /// Of these, those that belong to no file: the file system's own, and what was free again.
    pub other_bytes: u64,
}

/// Compares what an upper makes of its image with the image.
///
/// # Errors
/// An upper that is in use, damaged or none of that image, an image that can't be read, or a file system on it that is
/// damaged.
pub fn diff(request: &DiffRequest, progress: &Arc<dyn Progress>) -> Result<Difference> {
    let runtime = crate::build::runtime()?;
    let handle = runtime.handle();
    let none = Reference::Dir(PathBuf::new());
    let shared =
        Request { temp: request.temp.clone(), access: request.access.clone(), ..Request::new(none.clone(), none) };
    let written = Written::open(&request.upper, &request.boot, None, &shared, handle)?;
    let changed = written.changed();
    let bytes = changed.blocks() * u64::from(BLOCK);
    let platform = written.parent.platform().to_string();
    progress.event(Event::Image { platform: &platform, layers: 1, bytes: Some(bytes) });
    let now = read_names(written.overlay.size(), &mut |block, buf| written.read(block, buf, handle))?;
    let lower = written.parent.device();
    let before = read_names(lower.size(), &mut |block, buf| {
        handle.block_on(lower.inspect_at(u64::from(block) * BLOCK_SIZE as u64, buf))
    })?;
    let (Some(now), Some(before)) = (now, before) else {
        let reason = "there is no clean ext4 on the device (it may have a journal to be replayed)";
        return Err(Error::Unsupported(format!("{}: {reason}", request.upper.display())));
    };
    let mut of_files: HashMap<u32, u64> = HashMap::new();
    for run in now.runs().iter().filter(|run| now.kind(run.name) == Some(crate::ext4::Type::File)) {
        let met: u64 =
            changed.within(&(run.block..run.block + run.blocks)).map(|part| u64::from(part.end - part.start)).sum();
        if met > 0 {
            *of_files.entry(now.inode(run.name)).or_default() += met * u64::from(BLOCK);
        }
    }
    let files = Files::new(&now);
    let other = changed.without(files.blocks()).blocks() * u64::from(BLOCK);
    Ok(Difference { changes: compare(&before, &now, &of_files), written_bytes: bytes, other_bytes: other })
}

fn compare(before: &Names, now: &Names, of_files: &HashMap<u32, u64>) -> Vec<Changed> {
    let (old_marks, new_marks) = (before.marks(), now.marks());
    let old = before.by_path();
    let mut changes = Vec::new();
    let show = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    let new = now.by_path();
    for (path, name) in &new {
        let inode = now.inode(*name);
        let bytes = of_files.get(&inode).copied().unwrap_or(0);
        let mark = |names: &Names, marks: &HashMap<u32, u32>, name: u32| marks.get(&names.inode(name)).copied();
        let kind = match old.get(path) {
            None => Kind::Added,
            Some(was) if mark(before, &old_marks, *was) == mark(now, &new_marks, *name) && bytes == 0 => continue,
            Some(_) => Kind::Changed,
        };
        changes.push(Changed { path: show(path), kind, bytes });
    }
    let gone = old.keys().filter(|path| !new.contains_key(*path));
    changes.extend(gone.map(|path| Changed { path: show(path), kind: Kind::Deleted, bytes: 0 }));
    changes.sort_unstable_by(|left, right| left.path.cmp(&right.path));
    changes
}
