//! A directory on disk as the source of a root file system.
//!
//! Nothing is followed; the walk stays on one file system, so that what is mounted below is an empty directory. Files
//! must not change while they are read: one that shrinks is an error.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, SeekFrom};

use super::intake::{Intake, LARGE};
use super::layer::{context, is_namespaced, target};
use super::progress::{Event, Progress};
use super::rootfs::{Kind, Meta, NodeId, ROOT, Rootfs};
use super::tar::show;
use crate::error::{Error, Result};
use crate::ext4::{Time, Xattr};

/// Largest list of attribute names, and largest value, that Linux has (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_MAX: usize = 64 << 10;

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
    let mut walker = Walker {
        device: found.dev(),
        youngest,
        links: HashMap::new(),
        xattrs: Xattrs::new(),
        rootfs,
        intake,
        progress,
    };
    let meta = walker.meta(&top, &found)?;
    walker.rootfs.node_mut(ROOT)?.meta = meta;
    let mut stack = vec![(top, ROOT, 0usize)];
    while let Some((dir, parent, depth)) = stack.pop() {
        if depth > walker.rootfs.limits().depth {
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
            let added = walker
                .entry(&path, parent, &name)
                .map_err(|error| context(error, &show(path.as_os_str().as_bytes())))?;
            if let Some(node) = added {
                stack.push((path, node, depth + 1));
            }
        }
    }
    Ok(())
}

struct Walker<'a> {
    device: u64,
    /// No time is later than this.
    youngest: Option<u64>,
    /// Files with several names, by inode number.
    links: HashMap<u64, NodeId>,
    xattrs: Xattrs,
    rootfs: &'a mut Rootfs,
    intake: &'a mut Intake,
    progress: &'a dyn Progress,
}

impl Walker<'_> {
    /// Adds one name, and returns the node if it is a directory to go into.
    fn entry(&mut self, path: &Path, parent: NodeId, name: &[u8]) -> Result<Option<NodeId>> {
        let found = std::fs::symlink_metadata(path).map_err(|error| Error::io("reading", error))?;
        let shared = found.nlink() > 1 && !found.is_dir();
        if let Some(node) = self.links.get(&found.ino()).filter(|_| shared) {
            self.rootfs.count(name.len())?;
            self.rootfs.link(parent, name, *node)?;
            return Ok(None);
        }
        let meta = self.meta(path, &found)?;
        let attributes: usize = meta.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        self.rootfs.count(name.len() + attributes)?;
        let file_type = found.file_type();
        let kind = if file_type.is_dir() {
            Kind::directory()
        } else if file_type.is_file() {
            self.file(path)?
        } else if file_type.is_symlink() {
            let link = std::fs::read_link(path).map_err(|error| Error::io("reading", error))?;
            Kind::Symlink(target(link.as_os_str().as_bytes())?)
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else if file_type.is_socket() {
            Kind::Socket
        } else {
            let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
            if file_type.is_char_device() {
                Kind::CharDevice { major, minor }
            } else {
                Kind::BlockDevice { major, minor }
            }
        };
        let is_dir = matches!(kind, Kind::Directory(_));
        let node = self.rootfs.put(parent, name, meta, kind)?;
        if shared {
            self.links.insert(found.ino(), node);
        }
        if is_dir && found.dev() != self.device {
            let note = format!("{}: another file system is mounted here; its contents are left out", path.display());
            self.progress.event(Event::Note(&note));
        }
        Ok((is_dir && found.dev() == self.device).then_some(node))
    }

    fn file(&mut self, path: &Path) -> Result<Kind> {
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
        let size = found.len();
        if size > self.rootfs.limits().file_bytes {
            return Err(Error::invalid("source", format!("its {size} bytes are beyond the limit")));
        }
        let sparse = size >= LARGE && found.blocks().saturating_mul(512) < size;
        let segments = match (sparse, size) {
            (_, 0) => Vec::new(),
            (true, _) => data_segments(&file, size, self.rootfs.limits().segments)?,
            (false, _) => vec![(0, size)],
        };
        let mut data = Segments { file: &file, segments: &segments, taken: 0 };
        let content = self.intake.file(size, &segments, &mut data)?;
        self.progress.event(Event::Read(segments.iter().map(|(_, len)| len).sum()));
        Ok(Kind::File(content))
    }

    fn time(&self, found: &Metadata) -> Time {
        match self.youngest.map(|youngest| i64::try_from(youngest).unwrap_or(i64::MAX)) {
            Some(youngest) if found.mtime() >= youngest => Time { secs: youngest, nanos: 0 },
            _ => Time { secs: found.mtime(), nanos: u32::try_from(found.mtime_nsec()).unwrap_or(0) },
        }
    }

    fn meta(&mut self, path: &Path, found: &Metadata) -> Result<Meta> {
        Ok(Meta {
            mode: (found.mode() & 0o7777) as u16,
            uid: found.uid(),
            gid: found.gid(),
            mtime: self.time(found),
            xattrs: self.xattrs.read(path)?,
        })
    }
}

/// Reads extended attributes into buffers that are made once.
struct Xattrs {
    list: Vec<u8>,
    value: Vec<u8>,
}

impl Xattrs {
    fn new() -> Self {
        Self { list: vec![0; XATTR_MAX], value: vec![0; XATTR_MAX] }
    }

    /// The attributes of a file, not followed if it is a link, in the order of their names.
    fn read(&mut self, path: &Path) -> Result<Vec<Xattr>> {
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

/// The parts of a sparse file that are not holes.
fn data_segments(file: &File, size: u64, limit: usize) -> Result<Vec<(u64, u64)>> {
    let mut segments = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(size),
            Err(rustix::io::Errno::NXIO) => break,
            // A file system that does not know holes.
            Err(rustix::io::Errno::INVAL) => return Ok(vec![(0, size)]),
            Err(error) => return Err(Error::io("finding its holes", error.into())),
        };
        if start == size {
            break;
        }
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))
            .map_err(|error| Error::io("finding its holes", error.into()))?
            .min(size);
        if segments.len() >= limit {
            return Err(Error::invalid("source", format!("it has more than {limit} pieces (limit)")));
        }
        segments.push((start, end - start));
        at = end;
    }
    Ok(segments)
}

/// Parts of a file as one stream.
struct Segments<'a> {
    file: &'a File,
    segments: &'a [(u64, u64)],
    taken: u64,
}

impl Read for Segments<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some((&(offset, len), rest)) = self.segments.split_first() else { return Ok(0) };
        let want = buf.len().min(usize::try_from(len - self.taken).unwrap_or(usize::MAX));
        let read = self.file.read_at(buf.get_mut(..want).unwrap_or_default(), offset + self.taken)?;
        self.taken += read as u64;
        if self.taken == len {
            (self.segments, self.taken) = (rest, 0);
        }
        Ok(read)
    }
}
