//! Media: what durable local state is written to. Real files in production, a crashing medium in tests.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{Advice, FallocateFlags, OFlags};

/// Alignment of direct I/O in bytes: no disk has larger logical blocks.
const DIRECT: u64 = 4096;

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

    /// As [`read`](Self::read), but past what the system has cached, where it can: whether the medium still has what
    /// was written to it. Slower.
    ///
    /// # Errors
    /// As of [`read`](Self::read), and EIO for what the medium does not give back.
    fn read_medium(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read(offset, buf)
    }

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

    fn read_medium(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match read_direct(self, offset, buf) {
            // EINVAL: the file system has no direct I/O, or wants a coarser alignment; ENOENT: no /proc.
            Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::NotFound) => {
                Media::read(self, offset, buf)
            }
            outcome => outcome,
        }
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

/// Reads with O_DIRECT, open(2), through a second descriptor: the file's own must not lose its cache.
fn read_direct(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let direct = OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path)?;
    let start = offset / DIRECT * DIRECT;
    let skip = (offset - start) as usize;
    let want = (skip + buf.len()).next_multiple_of(DIRECT as usize);
    let mut room = vec![0; want + DIRECT as usize];
    let aligned = room.as_ptr().align_offset(DIRECT as usize);
    let room = room.get_mut(aligned..).and_then(|room| room.get_mut(..want)).unwrap_or_default();
    let mut have = 0;
    while let Some(rest) = room.get_mut(have..).filter(|rest| !rest.is_empty()) {
        let read = direct.read_at(rest, start + have as u64)?;
        have += read;
        // Anything but whole blocks comes at the end of the file only.
        if read == 0 || !(read as u64).is_multiple_of(DIRECT) {
            break;
        }
    }
    let read = room.get(skip..have).and_then(|read| read.get(..buf.len())).ok_or(ErrorKind::UnexpectedEof)?;
    buf.copy_from_slice(read);
    Ok(())
}

/// A file that was opened on a disk that could only be read. Changes fail with EROFS, not with the EBADF of its
/// descriptor, until the disk can be written.
struct ReadOnly {
    file: File,
    path: PathBuf,
    writable: OnceLock<File>,
}

impl ReadOnly {
    fn writable(&self) -> io::Result<&File> {
        if let Some(file) = self.writable.get() {
            return Ok(file);
        }
        let file = open_file(&self.path, Opening::Writable)?;
        let (now, then) = (file.metadata()?, self.file.metadata()?);
        // Somebody may have put another file there.
        if (now.dev(), now.ino()) != (then.dev(), then.ino()) {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        }
        Ok(self.writable.get_or_init(|| file))
    }
}

impl Media for ReadOnly {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, buf)
    }

    fn read_medium(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_medium(offset, buf)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.writable()?.write(offset, bytes)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Media::set_len(self.writable()?, len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.writable()?.punch(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.writable.get().map_or(Ok(()), Media::sync)
    }
}

/// A file on btrfs, which gives no block of an extent back before all of it is given up, and makes one extent of all
/// neighbours that it writes back together. So that what is punched is given back, each larger write is on its way to the
/// disk before the next one comes.
struct Extents(File);

/// Writes in bytes that get an extent of their own.
const OWN_EXTENT: usize = 16 << 10;

impl Extents {
    /// BTRFS_SUPER_MAGIC, statfs(2).
    const MAGIC: u64 = 0x9123_683e;

    fn has(file: &File) -> bool {
        rustix::fs::fstatfs(file).is_ok_and(|found| found.f_type as u64 & 0xffff_ffff == Self::MAGIC)
    }
}

impl Media for Extents {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, buf)
    }

    fn read_medium(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_medium(offset, buf)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write(offset, bytes)?;
        if bytes.len() >= OWN_EXTENT {
            // POSIX_FADV_DONTNEED starts writing what is dirty and drops what is not. It is advice: without it only the
            // blocks come back later.
            let _ = rustix::fs::fadvise(&self.0, offset, NonZeroU64::new(bytes.len() as u64), Advice::DontNeed);
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Media::len(&self.0)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Media::set_len(&self.0, len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        Media::sync(&self.0)
    }
}

/// A file that can be written, as its file system wants it.
fn writable(file: File) -> Box<dyn Media> {
    if Extents::has(&file) { Box::new(Extents(file)) } else { Box::new(file) }
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    Writable,
    ReadOnly,
}

fn open_file(path: &Path, opening: Opening) -> io::Result<File> {
    // A FIFO or a device must neither block nor be read from; a link could lead anywhere.
    let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits() as i32;
    OpenOptions::new().read(true).write(opening == Opening::Writable).custom_flags(flags).open(path)
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
        let path = self.0.join(name);
        let (file, opening) = match open_file(&path, Opening::Writable) {
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {
                (open_file(&path, Opening::ReadOnly)?, Opening::ReadOnly)
            }
            opened => (opened?, Opening::Writable),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
        }
        match opening {
            Opening::Writable => Ok(writable(file)),
            Opening::ReadOnly => Ok(Box::new(ReadOnly { file, path, writable: OnceLock::new() })),
        }
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Media>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(self.0.join(name))?;
        Ok(writable(file))
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
