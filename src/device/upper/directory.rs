//! The directory of an upper: who has it, what it belongs to, how it goes.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::header::{self, Header, LowerIdentity};
use super::{DATA, MAP, live};
use crate::error::{Error, Result};
use crate::media::{Directory, MediaDir};

/// The lower that the upper in the directory `dir` belongs to, and the size of its device; `None` when there is no upper.
///
/// # Errors
/// A damaged one, or what the system says.
pub fn describe(dir: &Path) -> Result<Option<(LowerIdentity, u64)>> {
    let header = Header::read(&Directory::new(dir), &dir.display().to_string())?;
    Ok(header.map(|header| (header.lower, header.device_bytes)))
}

/// Removes the upper in the directory `dir`, and the directory if nothing else is in it. One that is not there is removed.
///
/// # Errors
/// [`Error::Busy`] when somebody has it open, or what the system says.
pub fn discard(dir: &Path) -> Result<()> {
    let name = dir.display();
    let failed = |error| Error::io(format!("remove the upper {name}"), error);
    let lock = match File::open(dir) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Err(Error::Busy(format!("the upper {name} is in use by a device; detach that first")));
    }
    remove(dir)
}

/// As [`discard`], for who knows that nobody has it open, or that it does not matter.
///
/// # Errors
/// What the system says.
pub fn remove(dir: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("remove the upper {}", dir.display()), error);
    for file in [header::NAME, header::NEW, MAP, live::NAME, DATA] {
        remove_file(&Directory::new(dir), file).map_err(failed)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {
            Err(failed(error))
        }
        _ => Ok(()),
    }
}

/// The lock of the upper in the directory `dir`.
pub(super) fn lock(dir: &Path) -> Result<File> {
    let failed = |error| Error::io(format!("open the upper {}", dir.display()), error);
    let lock = File::open(dir).map_err(failed)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(Error::Busy(format!("the upper {} is in use by another device; detach that first", dir.display())))
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

/// The directory of the upper named by a user, from the root directory.
///
/// # Errors
/// A path that is relative.
pub fn directory(path: &Path) -> Result<PathBuf> {
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    Err(Error::invalid("upper", format!("{}: the directory's path must be absolute", path.display())))
}

/// Removes a file that may not be there.
pub(super) fn remove_file(dir: &dyn MediaDir, file: &str) -> io::Result<()> {
    match dir.remove(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
