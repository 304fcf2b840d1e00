//! One owner: locks that the kernel releases when their holder ends, however that happens.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};

/// Holds the lock of a directory until it is dropped.
#[derive(Debug)]
pub(super) struct Owner {
    /// The directory: it holds where there is no lock file, or where somebody removes that.
    _dir: File,
    /// `None` on a disk that can only be read and has no lock file.
    _lock: Option<File>,
}

impl Owner {
    /// Takes the lock of `dir`.
    ///
    /// # Errors
    /// [`Error::Busy`] that names the process that has it, or [`Error::Io`].
    pub fn take(dir: &Path) -> Result<Self> {
        let path = dir.join("lock");
        let failed = |error| Error::io(format!("locking the pool by {}", path.display()), error);
        let pool = File::open(dir).map_err(failed)?;
        lock(&pool, dir, || File::open(&path).map_or_else(|_| holder(None), |file| holder(Some(&file))))?;
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = match open {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self { _dir: pool, _lock: None }),
                Err(error) => return Err(failed(error)),
            },
            Err(error) => return Err(failed(error)),
        };
        lock(&file, dir, || holder(Some(&file)))?;
        // The pid is for people; the lock holds without it, e.g. on a full disk.
        let pid = format!("{:<20}\n", std::process::id());
        let _ = file.write_all_at(pid.as_bytes(), 0);
        Ok(Self { _dir: pool, _lock: Some(file) })
    }
}

fn lock(file: &File, dir: &Path, holder: impl Fn() -> String) -> Result<()> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let (pool, holder) = (dir.display(), holder());
            Err(Error::Busy(format!("the pool {pool} is in use by {holder}; stop it, or use another directory")))
        }
        Err(error) => Err(Error::io(format!("locking the pool {}", dir.display()), io::Error::from(error))),
    }
}

/// Who wrote the lock file.
fn holder(file: Option<&File>) -> String {
    let mut bytes = [0; 20];
    let read = file.and_then(|file| file.read_exact_at(&mut bytes, 0).ok());
    let pid = read.and_then(|()| std::str::from_utf8(&bytes).ok()).map(str::trim);
    match pid {
        Some(pid) if !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit()) => format!("process {pid}"),
        _ => "another process".to_owned(),
    }
}
