//! The process that lays a start into the page cache; see `daemon/laying.rs`.
//!
//! It has a mount of the file system for itself, in no namespace: the kernel has one superblock for all mounts of a device,
//! and with it one page cache. So nobody's mount is in use for this.

use std::fs::File;
use std::io::{self, BufRead};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::{Advice, Mode, OFlags, fadvise, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use super::Outcome;
use crate::daemon::control::{Kind, Problem};
use crate::index::BLOCK;
use crate::sys::inode::open_file;

/// The arguments of the process.
#[derive(Debug, Args)]
pub struct Lay {
    /// The block device, whose ext4 is mounted read-only
    device: PathBuf,
}

impl Lay {
    /// Has the kernel read what standard input says, until that ends.
    ///
    /// # Errors
    /// A device that can't be mounted once more, or a line that says nothing.
    pub fn run(self) -> Outcome {
        let failed = |error: io::Error| {
            let message = format!("laying the start of {} into the page cache: {error}", self.device.display());
            Problem::new(Kind::Failed, message)
        };
        let file_system = FileSystem::open(&self.device).map_err(failed)?;
        let mut last = None;
        for line in io::stdin().lock().lines() {
            let line = line.map_err(failed)?;
            let part = Part::parse(&line).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
            file_system.will_need(&part, &mut last);
        }
        Ok(())
    }
}

/// Blocks of a file, or of the device.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    /// 0: the device.
    inode: u32,
    /// First byte, and bytes.
    place: (u64, NonZeroU64),
}

impl Part {
    fn parse(line: &str) -> Option<Self> {
        let mut numbers = line.split(' ').map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        let (inode, first, blocks) = (next()?, next()?, next()?);
        let bytes = |blocks: u32| u64::from(blocks) * u64::from(BLOCK);
        Some(Self { inode, place: (bytes(first), NonZeroU64::new(bytes(blocks))?) })
    }
}

/// A mounted file system and its device.
struct FileSystem {
    device: File,
    root: File,
}

impl FileSystem {
    fn open(path: &Path) -> io::Result<Self> {
        let device = File::open(path)?;
        let context = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", path)?;
        // As it is mounted already: the kernel takes that superblock only if both can't be written.
        for flag in ["ro", "noload"] {
            fsconfig_set_flag(&context, flag)?;
        }
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let root = openat(&mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { device, root: File::from(root) })
    }

    /// Tells the kernel to read what is not in its page cache; `last` is the file that is open. What can't be read so is
    /// left to the program.
    fn will_need(&self, part: &Part, last: &mut Option<(u32, File)>) {
        if part.inode != 0 && last.as_ref().is_none_or(|(inode, _)| *inode != part.inode) {
            *last = open_file(&self.root, part.inode).ok().map(|file| (part.inode, file));
        }
        let file = match (part.inode, last) {
            (0, _) => &self.device,
            (_, Some((_, file))) => file,
            (_, None) => return,
        };
        let (first, bytes) = part.place;
        let _ = fadvise(file, first, Some(bytes), Advice::WillNeed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_three_numbers() {
        let blocks = NonZeroU64::new(8192).map(|bytes| Part { inode: 12, place: (4096, bytes) });
        assert_eq!(Part::parse("12 1 2"), blocks);
        for wrong in ["", "12", "12 1", "12 1 0", "12 1 x", "-1 1 1", "4294967296 1 1"] {
            assert_eq!(Part::parse(wrong), None, "{wrong:?}");
        }
    }
}
