//! Applying a tar to the tree, entry by entry.

use std::io::Read;

use super::cache::Recorder;
use super::intake::Intake;
use super::rootfs::{Content, Kind, Meta, Place, ROOT, Rootfs, Whiteouts};
use super::tar::{Archive, Entry, EntryKind, show};
use crate::error::{Error, Result};

/// Linux: 12 bits of major, 20 of minor (`include/linux/kdev_t.h`, `MINORBITS`).
const MAJOR_MAX: u64 = 0xfff;
const MINOR_MAX: u64 = 0xf_ffff;
/// Longest symbolic link target in bytes (`PATH_MAX` less its NUL).
const TARGET_MAX: usize = 4095;

/// Applies all entries of `tar`, which has a buffer of its own, writes them down if that is wanted, and returns the stream for its rest. Errors name the
/// path.
pub(super) fn apply<R: Read>(
    tar: R,
    rootfs: &mut Rootfs,
    intake: &mut Intake,
    whiteouts: Whiteouts,
    mut recorder: Option<&mut Recorder>,
) -> Result<R> {
    let mut archive = Archive::new(tar, rootfs.limits());
    while let Some(mut entry) = archive.next_entry()? {
        let at = archive.position();
        let path = std::mem::take(&mut entry.path);
        let mut content = None;
        apply_entry(&path, &entry, rootfs, whiteouts, || {
            let taken = intake.file(entry.size, &entry.segments, &mut archive)?;
            Ok(content.insert(taken).clone())
        })
        .map_err(|error| context(error, &format!("{} (data at byte {at} of the tar)", show(&path))))?;
        if let Some(recorder) = &mut recorder {
            recorder.entry(&path, &entry, content.as_ref())?;
        }
    }
    Ok(archive.into_inner())
}

/// The error with the path or layer it is about.
pub(super) fn context(error: Error, what: &str) -> Error {
    match error {
        Error::Invalid { what: kind, reason } => Error::Invalid { what: format!("{kind} in {what}"), reason },
        Error::Unsupported(reason) => Error::Unsupported(format!("{what}: {reason}")),
        Error::Io { action, source } => Error::Io { action: format!("{what}: {action}"), source },
        other => other,
    }
}

/// Applies an entry; `content` takes the content of a file.
pub(super) fn apply_entry(
    path: &[u8],
    entry: &Entry,
    rootfs: &mut Rootfs,
    whiteouts: Whiteouts,
    content: impl FnOnce() -> Result<Content>,
) -> Result<()> {
    let attributes: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
    rootfs.count(path.len() + entry.link.len() + attributes)?;
    let place = rootfs.place(path, whiteouts)?;
    let mut xattrs: Vec<_> = entry.xattrs.iter().filter(|(name, _)| is_namespaced(name)).cloned().collect();
    xattrs.sort_unstable();
    let meta = Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs };
    let (parent, name) = match place {
        Place::Done => return Ok(()),
        Place::Root => {
            if entry.kind != EntryKind::Directory {
                return Err(Error::invalid("path", "it is the root directory, and the entry is not a directory"));
            }
            rootfs.node_mut(ROOT)?.meta = meta;
            return Ok(());
        }
        Place::At { parent, name } => (parent, name),
    };
    let kind = match entry.kind {
        EntryKind::HardLink => return hard_link(&entry.link, meta, parent, &name, rootfs),
        EntryKind::File => Kind::File(content()?),
        EntryKind::Symlink => Kind::Symlink(target(&entry.link)?),
        EntryKind::CharDevice { major, minor } => {
            let (major, minor) = device(major, minor)?;
            Kind::CharDevice { major, minor }
        }
        EntryKind::BlockDevice { major, minor } => {
            let (major, minor) = device(major, minor)?;
            Kind::BlockDevice { major, minor }
        }
        EntryKind::Directory => Kind::directory(),
        EntryKind::Fifo => Kind::Fifo,
    };
    let meta = Meta { mode: permissions(&kind, meta.mode), ..meta };
    rootfs.put(parent, &name, meta, kind).map(drop)
}

/// Linux has no permissions on symbolic links: they read as 0777, whatever a tar says (symlink(7)).
const fn permissions(kind: &Kind, mode: u16) -> u16 {
    if matches!(kind, Kind::Symlink(_)) { 0o777 } else { mode }
}

/// As containerd does: the link is made, what the entry says of owner, mode and time is set on the shared inode, and its
/// attributes are added. Setting the owner takes the inode's capabilities away, even if it is the same (`chown(2)`).
fn hard_link(link: &[u8], meta: Meta, parent: u32, name: &[u8], rootfs: &mut Rootfs) -> Result<()> {
    let missing = || Error::invalid("hard link", format!("its target {} is not there", show(link)));
    let found = rootfs.link_target(link)?.ok_or_else(missing)?;
    let target = rootfs.node_mut(found.node)?;
    if matches!(target.kind, Kind::Directory(_)) {
        return Err(Error::invalid("hard link", format!("its target {} is a directory", show(link))));
    }
    let mut xattrs = std::mem::take(&mut target.meta.xattrs);
    let is_replaced = |name: &[u8]| meta.xattrs.iter().any(|(other, _)| other[..] == *name);
    xattrs.retain(|(name, _)| name[..] != *b"security.capability" && !is_replaced(name));
    xattrs.extend_from_slice(&meta.xattrs);
    xattrs.sort_unstable();
    target.meta = Meta { mode: permissions(&target.kind, meta.mode), xattrs, ..meta };
    if (found.parent, &*found.name) == (parent, name) {
        // GNU tar writes a file that it was given twice as a link to itself.
        return Ok(());
    }
    rootfs.link(parent, name, found.node)
}

pub(super) fn target(link: &[u8]) -> Result<Box<[u8]>> {
    if link.is_empty() || link.len() > TARGET_MAX {
        let reason = format!("its target has {} bytes; 1 to {TARGET_MAX} are possible", link.len());
        return Err(Error::invalid("symbolic link", reason));
    }
    Ok(link.into())
}

fn device(major: u64, minor: u64) -> Result<(u32, u32)> {
    if major > MAJOR_MAX || minor > MINOR_MAX {
        return Err(Error::invalid("device", format!("its number {major}:{minor} is out of range")));
    }
    Ok((major as u32, minor as u32))
}

/// Whether a kernel has a namespace for the attribute (xattr(7)): others can't be set anywhere, and unpackers skip them.
pub(super) fn is_namespaced(name: &[u8]) -> bool {
    let known: [&[u8]; 4] = [b"user.", b"trusted.", b"security.", b"system.posix_acl_"];
    known.iter().any(|prefix| name.len() > prefix.len() && name.starts_with(prefix))
}
