//! The names, attributes and open files of a directory tree, found ahead of whoever reads the contents.
//!
//! The kernel is asked to read the beginning of each file as it is found, so that a cold disk has many requests to work on and
//! not one at a time. What is ahead is bounded: [`BATCHES`] and one that waits, of [`BATCH`] names each, no more files open than
//! that, and [`ADVISED`] bytes of each in the page cache.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::Sender;
use rustix::fs::OFlags;

use super::contents::{ADVISED, advise};
use crate::build::layer::{context, is_namespaced, target};
use crate::build::tar::show;
use crate::error::{Error, Result};
use crate::ext4::Xattr;

/// Names that are handed over together.
const BATCH: usize = 32;
/// Batches that wait to be taken.
pub(super) const BATCHES: usize = 3;

/// Largest list of attribute names, and largest value, that Linux has (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_MAX: usize = 64 << 10;

/// A name in the tree.
pub(super) struct Found {
    pub dir: Arc<Path>,
    /// Number of that directory: the top is 0, the others follow in the order in which they are found.
    pub parent: usize,
    pub name: Vec<u8>,
    pub metadata: Metadata,
    pub xattrs: Vec<Xattr>,
    pub kind: FoundKind,
}

/// What a name stands for.
pub(super) enum FoundKind {
    Directory,
    /// Open; the metadata are those of what was opened.
    File(File),
    Symlink(Box<[u8]>),
    /// The metadata say what.
    Special,
}

impl Found {
    pub(super) fn path(&self) -> PathBuf {
        self.dir.join(OsStr::from_bytes(&self.name))
    }
}

/// Finds what is below a directory.
pub(super) struct Lister {
    pub device: u64,
    /// Directories below each other that are entered.
    pub depth: usize,
    pub xattrs: Xattrs,
    pub to: Sender<Result<Vec<Found>>>,
}

impl Lister {
    /// Sends everything below `top`: the entries of one directory after another, each in the order of the names' bytes.
    pub(super) fn run(mut self, top: &Path) {
        let mut batch = Vec::with_capacity(BATCH);
        let listed = self.tree(top, &mut batch);
        // Who reads is gone after an error of its own, which is the one to tell.
        let _ = self.to.send(Ok(batch));
        if let Err(error) = listed {
            let _ = self.to.send(Err(error));
        }
    }

    fn tree(&mut self, top: &Path, batch: &mut Vec<Found>) -> Result<()> {
        let mut stack = vec![(Arc::<Path>::from(top), 0, 0)];
        let mut directories = 0;
        while let Some((dir, parent, depth)) = stack.pop() {
            if depth > self.depth {
                return Err(Error::invalid("source", format!("{} is too deep (limit)", dir.display())));
            }
            let action = |error| Error::io(format!("reading the directory {}", dir.display()), error);
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&dir).map_err(action)? {
                names.push(entry.map_err(action)?.file_name().into_vec());
            }
            // The order of the directory on disk must not matter.
            names.sort_unstable();
            for name in names {
                let path = dir.join(OsStr::from_bytes(&name));
                let found = self.entry(&path, &dir, parent, name);
                let found = found.map_err(|error| context(error, &show(path.as_os_str().as_bytes())))?;
                if matches!(found.kind, FoundKind::Directory) {
                    directories += 1;
                    if found.metadata.dev() == self.device {
                        stack.push((path.into(), directories, depth + 1));
                    }
                }
                batch.push(found);
                if batch.len() >= BATCH
                    && self.to.send(Ok(std::mem::replace(batch, Vec::with_capacity(BATCH)))).is_err()
                {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, dir: &Arc<Path>, parent: usize, name: Vec<u8>) -> Result<Found> {
        let mut metadata = std::fs::symlink_metadata(path).map_err(|error| Error::io("reading", error))?;
        let xattrs = self.xattrs.read(path)?;
        let file_type = metadata.file_type();
        let kind = if file_type.is_dir() {
            FoundKind::Directory
        } else if file_type.is_file() {
            let (file, opened) = open(path)?;
            metadata = opened;
            FoundKind::File(file)
        } else if file_type.is_symlink() {
            let link = std::fs::read_link(path).map_err(|error| Error::io("reading", error))?;
            FoundKind::Symlink(target(link.as_os_str().as_bytes())?)
        } else {
            FoundKind::Special
        };
        Ok(Found { dir: dir.clone(), parent, name, metadata, xattrs, kind })
    }
}

fn open(path: &Path) -> Result<(File, Metadata)> {
    let io = |error| Error::io("reading", error);
    let file = File::options()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(path)
        .map_err(io)?;
    // What was opened counts, not what was listed.
    let found = file.metadata().map_err(io)?;
    if !found.is_file() {
        return Err(Error::invalid("source", "it changed while it was read"));
    }
    advise(&file, 0, found.len().min(ADVISED));
    Ok((file, found))
}

/// Reads extended attributes into buffers that are made once.
pub(super) struct Xattrs {
    list: Vec<u8>,
    value: Vec<u8>,
}

impl Xattrs {
    pub(super) fn new() -> Self {
        Self { list: vec![0; XATTR_MAX], value: vec![0; XATTR_MAX] }
    }

    /// The attributes of a file, not followed if it is a link, in the order of their names.
    pub(super) fn read(&mut self, path: &Path) -> Result<Vec<Xattr>> {
        use rustix::io::Errno;
        let io = |error: Errno| Error::io("reading the extended attributes", error.into());
        let len = match rustix::fs::llistxattr(path, self.list.as_mut_slice()) {
            Ok(len) => len,
            Err(Errno::OPNOTSUPP | Errno::ACCESS) => 0,
            Err(error) => return Err(io(error)),
        };
        let names = self.list.get(..len).unwrap_or_default().split(|byte| *byte == 0);
        let mut all = Vec::new();
        for name in names.filter(|name| is_namespaced(name)) {
            match rustix::fs::lgetxattr(path, name, self.value.as_mut_slice()) {
                Ok(len) => all.push((name.into(), self.value.get(..len).unwrap_or_default().into())),
                Err(Errno::NODATA | Errno::ACCESS) => {}
                Err(error) => return Err(io(error)),
            }
        }
        all.sort_unstable();
        Ok(all)
    }
}
