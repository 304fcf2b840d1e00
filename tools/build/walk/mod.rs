//! A directory on disk as the source of a root file system.
//!
//! Nothing is followed; the walk stays on one file system, so that what is mounted below is an empty directory. Files
//! must not change while they are read: one that shrinks is an error.
//!
//! One thread lists ([`list`]), this one reads the contents: a cold disk is kept busy while chunks are made of what came before.

mod contents;
mod list;

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crossbeam_channel::bounded;

use self::contents::{Segments, segments};
use self::list::{BATCHES, Found, FoundKind, Lister, Xattrs};
use super::intake::Intake;
use super::layer::context;
use super::progress::{Event, Progress};
use super::rootfs::{Kind, Meta, NodeId, ROOT, Rootfs};
use super::tar::show;
use crate::error::{Error, Result};
use crate::ext4::{Time, Xattr};

/// Reads the tree below `top` into `rootfs`; times after `youngest`, in seconds since 1970, become that.
pub(super) fn walk(
    top: &Path,
    youngest: Option<u64>,
    rootfs: &mut Rootfs,
    intake: &mut Intake,
    progress: &dyn Progress,
) -> Result<()> {
    let found = std::fs::metadata(top).map_err(|error| Error::io(format!("reading {}", top.display()), error))?;
    if !found.is_dir() {
        return Err(Error::invalid("source", format!("{} is not a directory", top.display())));
    }
    let top = std::fs::canonicalize(top).map_err(|error| Error::io(format!("reading {}", top.display()), error))?;
    let mut xattrs = Xattrs::new();
    let top_xattrs = xattrs.read(&top)?;
    let (to, listed) = bounded(BATCHES);
    let lister = Lister { device: found.dev(), depth: rootfs.limits().depth, xattrs, to };
    let mut walker = Walker {
        device: found.dev(),
        youngest,
        links: HashMap::new(),
        directories: vec![ROOT],
        rootfs,
        intake,
        progress,
    };
    walker.rootfs.node_mut(ROOT)?.meta = walker.meta(&found, top_xattrs);
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("list".into())
            .spawn_scoped(scope, || lister.run(&top))
            .map_err(|error| Error::io("starting a thread", error))?;
        for batch in listed {
            for found in batch? {
                let path = found.path();
                walker.entry(found).map_err(|error| context(error, &show(path.as_os_str().as_bytes())))?;
            }
        }
        Ok(())
    })
}

struct Walker<'a> {
    device: u64,
    /// No time is later than this.
    youngest: Option<u64>,
    /// Files with several names, by inode number.
    links: HashMap<u64, NodeId>,
    /// By their numbers.
    directories: Vec<NodeId>,
    rootfs: &'a mut Rootfs,
    intake: &'a mut Intake,
    progress: &'a dyn Progress,
}

impl Walker<'_> {
    /// Adds one name.
    fn entry(&mut self, mut found: Found) -> Result<()> {
        let unlisted = || Error::invalid("source", "its directory was not listed");
        let parent = *self.directories.get(found.parent).ok_or_else(unlisted)?;
        let metadata = &found.metadata;
        let shared = metadata.nlink() > 1 && !metadata.is_dir();
        if let Some(node) = self.links.get(&metadata.ino()).filter(|_| shared) {
            self.rootfs.count(found.name.len())?;
            return self.rootfs.link(parent, &found.name, *node);
        }
        let meta = self.meta(metadata, std::mem::take(&mut found.xattrs));
        let attributes: usize = meta.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        self.rootfs.count(found.name.len() + attributes)?;
        let is_dir = matches!(found.kind, FoundKind::Directory);
        if is_dir && metadata.dev() != self.device {
            let path = found.path();
            let note = format!("{}: another file system is mounted here; its contents are left out", path.display());
            self.progress.event(Event::Note(&note));
        }
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let file_type = metadata.file_type();
        let kind = match found.kind {
            FoundKind::Directory => Kind::directory(),
            FoundKind::File(file) => self.file(&file, metadata)?,
            FoundKind::Symlink(target) => Kind::Symlink(target),
            FoundKind::Special if file_type.is_fifo() => Kind::Fifo,
            FoundKind::Special if file_type.is_socket() => Kind::Socket,
            FoundKind::Special if file_type.is_char_device() => Kind::CharDevice { major, minor },
            FoundKind::Special => Kind::BlockDevice { major, minor },
        };
        let node = self.rootfs.put(parent, &found.name, meta, kind)?;
        if shared {
            self.links.insert(metadata.ino(), node);
        }
        if is_dir {
            self.directories.push(node);
        }
        Ok(())
    }

    fn file(&mut self, file: &File, found: &Metadata) -> Result<Kind> {
        let size = found.len();
        if size > self.rootfs.limits().file_bytes {
            return Err(Error::invalid("source", format!("its {size} bytes are beyond the limit")));
        }
        let segments = segments(file, found, self.rootfs.limits().segments)?;
        let content = self.intake.file(size, &segments, &mut Segments::new(file, &segments))?;
        self.progress.event(Event::Read(segments.iter().map(|(_, len)| len).sum()));
        Ok(Kind::File(content))
    }

    fn time(&self, found: &Metadata) -> Time {
        match self.youngest.map(|youngest| i64::try_from(youngest).unwrap_or(i64::MAX)) {
            Some(youngest) if found.mtime() >= youngest => Time { secs: youngest, nanos: 0 },
            _ => Time { secs: found.mtime(), nanos: u32::try_from(found.mtime_nsec()).unwrap_or(0) },
        }
    }

    fn meta(&self, found: &Metadata, xattrs: Vec<Xattr>) -> Meta {
        Meta {
            mode: (found.mode() & 0o7777) as u16,
            uid: found.uid(),
            gid: found.gid(),
            mtime: self.time(found),
            xattrs,
        }
    }
}
