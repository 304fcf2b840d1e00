//! Media: what durable local state is written to. Real files in production, a crashing medium in tests.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::{FallocateFlags, OFlags};

/// A random-access file. All offsets and lengths are in bytes.
///
/// What a caller may assume after a crash: data written before a successful [`sync`](Media::sync) is there; of what was
/// written after it, any subset of the 512-byte sectors is, in any order; the length is the old or the new one.
pub trait Media: Send + Sync {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the medium ends inside the range, or what the system says.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`, growing the medium when needed.
    ///
    /// # Errors
    /// What the system says, e.g. ENOSPC; part of the range may then be written.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// The current length in bytes.
    ///
    /// # Errors
    /// What the system says.
    fn len(&self) -> io::Result<u64>;

    /// Whether the medium is empty.
    ///
    /// # Errors
    /// What the system says.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends (with zeros) to `len` bytes.
    ///
    /// # Errors
    /// What the system says.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Gives the blocks of a range back to the disk, which reads as zeros from then on. The length stays. After a crash
    /// each sector is old or zeros.
    ///
    /// # Errors
    /// What the system says, e.g. EOPNOTSUPP.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// What the system says; the data must then be taken for lost.
    fn sync(&self) -> io::Result<()>;
}

impl Media for File {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    /// `FALLOC_FL_PUNCH_HOLE`, fallocate(2): ext4, xfs, btrfs and tmpfs have it.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(self, flags, offset, len)?)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// A file on a disk that can only be read: changes fail with EROFS, not with the EBADF of its descriptor.
struct ReadOnly(File);

impl Media for ReadOnly {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, buf)
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(ErrorKind::ReadOnlyFilesystem.into())
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(ErrorKind::ReadOnlyFilesystem.into())
    }

    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Err(ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Room on a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What can still be written without privileges.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// A flat directory of media. Real directories in production, a crashing one in tests.
///
/// What a caller may assume after a crash: files created, renamed and removed before a successful
/// [`sync`](MediaDir::sync) are as they were left; of what was done after it, each step is there or not, and a rename
/// shows the old file or the new one whole.
pub trait MediaDir: Send + Sync {
    /// The names of all files in the directory, in no particular order.
    ///
    /// # Errors
    /// What the system says.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Opens an existing regular file, without writing when its disk can only be read.
    ///
    /// # Errors
    /// What the system says, e.g. ENOENT, or `InvalidInput` for anything but a regular file.
    fn open(&self, name: &str) -> io::Result<Box<dyn Media>>;

    /// Creates an empty file.
    ///
    /// # Errors
    /// What the system says, e.g. EEXIST, ENOSPC, EROFS.
    fn create(&self, name: &str) -> io::Result<Box<dyn Media>>;

    /// Renames a file, replacing what has the new name.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system says.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes the directory's entries durable (not the content of its files).
    ///
    /// # Errors
    /// What the system says.
    fn sync(&self) -> io::Result<()>;

    /// The room on the disk that the directory is on.
    ///
    /// # Errors
    /// What the system says.
    fn space(&self) -> io::Result<Space>;
}

/// A directory of the file system.
#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// The directory at `path`, which exists.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
}

impl MediaDir for Directory {
    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            // Names that are not UTF-8 are nobody's that uses this trait.
            names.extend(entry?.file_name().into_string().ok());
        }
        Ok(names)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Media>> {
        // A FIFO or a device must neither block nor be read from; a link could lead anywhere.
        let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits() as i32;
        let open = |write| OpenOptions::new().read(true).write(write).custom_flags(flags).open(self.0.join(name));
        let (file, writable) = match open(true) {
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => (open(false)?, false),
            opened => (opened?, true),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
        }
        if writable { Ok(Box::new(file)) } else { Ok(Box::new(ReadOnly(file))) }
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Media>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(self.0.join(name))?;
        Ok(Box::new(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.0.join(from), self.0.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.0.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }

    fn space(&self) -> io::Result<Space> {
        let found = rustix::fs::statvfs(&self.0)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Ok(Space { free: bytes(found.f_bavail), total: bytes(found.f_blocks) })
    }
}
