//! Local files: read as streams, and written under a temporary name until they are complete.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Bytes that are read at once.
const PIECE: u64 = 256 << 10;

/// The `len` bytes from `offset` of the file at `path`, which is opened when the stream is first polled.
pub(crate) fn stream(path: PathBuf, offset: u64, len: u64) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
    pieces(None, path, offset, len)
}

/// The first `len` bytes of an open file.
pub(crate) fn stream_open(file: Arc<File>, len: u64) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
    let path = path_of(&file);
    pieces(Some(file), path, 0, len)
}

fn pieces(
    file: Option<Arc<File>>,
    path: PathBuf,
    offset: u64,
    len: u64,
) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
    let state = (file, Arc::new(path), offset, len);
    futures_util::stream::try_unfold(state, |(file, path, offset, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let wanted = left.min(PIECE);
        let (file, piece) = blocking({
            let path = path.clone();
            move || {
                let read = || -> io::Result<(Arc<File>, Vec<u8>)> {
                    let file = match file {
                        Some(file) => file,
                        None => Arc::new(File::open(path.as_ref())?),
                    };
                    let mut piece = vec![0; wanted as usize];
                    file.read_exact_at(&mut piece, offset)?;
                    Ok((file, piece))
                };
                read().map_err(|error| Error::io(format!("reading {}", path.display()), error))
            }
        })
        .await?;
        Ok(Some((Bytes::from(piece), (Some(file), path, offset + wanted, left - wanted))))
    })
}

/// Runs file work on a blocking thread.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(Error::Stopping("the program".to_owned())))
}

/// The content of the file at `path`, unless it has more than `max` bytes; `None` when there is no such file.
pub(crate) fn read_small(path: &Path, max: u64) -> Result<Option<Vec<u8>>> {
    let failed = |error| Error::io(format!("reading {}", path.display()), error);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    // Room for most such files at once: an empty vector begins with reads of 32 bytes.
    let mut content = Vec::with_capacity(max.min(8191) as usize + 1);
    file.take(max + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > max {
        return Err(Error::invalid(format!("file {}", path.display()), format!("it has more than {max} bytes")));
    }
    Ok(Some(content))
}

/// A file that has no name of its own until [`publish`](Self::publish); dropped before, it is removed.
pub(crate) struct Unpublished {
    file: File,
    path: PathBuf,
    published: bool,
}

impl Unpublished {
    /// A new file in `dir`.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        let unique = RandomState::new().build_hasher().finish();
        let path = dir.join(format!(".unpublished-{unique:016x}"));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|error| Error::io(format!("creating {}", path.display()), error))?;
        Ok(Self { file, path, published: false })
    }

    /// Appends `bytes`.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(format!("writing {}", self.path.display()), error))
    }

    /// Makes the content durable and gives it its name, replacing what had it.
    pub(crate) fn publish(mut self, path: &Path) -> Result<()> {
        let publish = || -> io::Result<()> {
            self.file.sync_all()?;
            std::fs::rename(&self.path, path)?;
            path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
        };
        let result = publish().map_err(|error| Error::io(format!("writing {}", path.display()), error));
        self.published = result.is_ok();
        result
    }

    /// Gives the content its name, replacing what had it. A loss of power soon afterwards may leave anything under that name:
    /// only for what is checked when it is read, and can be had again.
    pub(crate) fn place(mut self, path: &Path) -> Result<()> {
        let placed = std::fs::rename(&self.path, path);
        self.published = placed.is_ok();
        placed.map_err(|error| Error::io(format!("writing {}", path.display()), error))
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if !self.published {
            // What can't be removed is left behind under a name that nothing reads.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A file that has no name in `dir` and gets none: it is gone when the last handle is, however the program ends.
pub(crate) fn unlinked(dir: &Path) -> Result<File> {
    let action = || format!("making a temporary file in {}", dir.display());
    match open_unnamed(dir, OFlags::EXCL, Mode::RUSR | Mode::WUSR) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            // A file system without O_TMPFILE.
            let path = dir.join(format!(".firstread-{}-{:?}", std::process::id(), std::thread::current().id()));
            let file = File::options().read(true).write(true).create_new(true).open(&path);
            let file = file.map_err(|error| Error::io(action(), error))?;
            std::fs::remove_file(&path).map_err(|error| Error::io(action(), error))?;
            Ok(file)
        }
        made => made.map_err(|error| Error::io(action(), error.into())),
    }
}

/// A file without a name in `dir`, which [`link`] can give one; not all file systems have such files.
pub(crate) fn linkable(dir: &Path) -> std::result::Result<File, Errno> {
    open_unnamed(dir, OFlags::empty(), Mode::from_raw_mode(0o666))
}

fn open_unnamed(dir: &Path, more: OFlags, mode: Mode) -> std::result::Result<File, Errno> {
    rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | more, mode).map(File::from)
}

/// A path to a file that has none, as long as the file is open here.
pub(crate) fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Makes a [`linkable`] file's content durable and gives it a name on its file system, unless that is taken.
pub(crate) fn link(file: &File, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    match rustix::fs::linkat(CWD, path_of(file), CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all()),
        Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Writes `content` to `path` so that a reader finds the old file or the new one, never a part.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = Unpublished::create(path.parent().unwrap_or(Path::new(".")))?;
    file.write(content)?;
    file.publish(path)
}

/// The same without making it durable, as [`Unpublished::place`].
pub(crate) fn put(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = Unpublished::create(path.parent().unwrap_or(Path::new(".")))?;
    file.write(content)?;
    file.place(path)
}

/// Makes all files in the directory `dir` durable, with their names.
pub(crate) fn sync_directory(dir: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("syncing {}", dir.display()), error);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        match File::open(entry.map_err(failed)?.path()).and_then(|file| file.sync_all()) {
            // Somebody made room.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            synced => synced.map_err(failed)?,
        }
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}
