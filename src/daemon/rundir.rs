//! The run directory: sockets, the pid file and the log. One daemon at a time owns it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::control::SOCKET;
use crate::error::{Error, Result};

/// Where the log of a daemon goes that a verb started.
pub const LOG: &str = "daemon.log";

/// A log larger than this, in bytes, is set aside when a daemon starts.
const LOG_MAX: u64 = 16 << 20;

/// How long a starting daemon waits for one that is leaving.
const LEAVING: Duration = Duration::from_secs(10);

const PID: &str = "daemon.pid";
const START: &str = "start.lock";

/// Creates the directory `path`, for its owner only, if it is not there.
///
/// # Errors
/// A directory that can't be made, is somebody else's, or can be written by others: a socket in it could be replaced.
pub fn create(path: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("creating the run directory {}", path.display()), error);
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    let metadata = fs::metadata(path).map_err(failed)?;
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own || metadata.mode() & 0o022 != 0 {
        let reason = format!(
            "{} belongs to user {} with mode {:o}; it must be the daemon's own and writable by nobody else",
            path.display(),
            metadata.uid(),
            metadata.mode() & 0o7777
        );
        return Err(Error::invalid("run directory", reason));
    }
    if metadata.mode() & 0o7777 != 0o700 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

/// The lock of a run directory's daemon, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    // Closing it gives the lock up.
    _pid: File,
}

impl RunDir {
    /// Creates and locks the directory, and writes this process's id into its pid file. Waits a moment for a daemon that
    /// does not serve any more and is about to leave.
    ///
    /// # Errors
    /// [`Error::Busy`] that names the daemon which owns it.
    pub fn lock(path: &Path) -> Result<Self> {
        create(path)?;
        let name = path.join(PID);
        let failed = |error: io::Error| Error::io(format!("locking {}", name.display()), error);
        let mut file = options().open(&name).map_err(failed)?;
        let deadline = Instant::now() + LEAVING;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(failed(error.into())),
            }
            if Instant::now() >= deadline || UnixStream::connect(path.join(SOCKET)).is_ok() {
                let mut text = String::new();
                let owner = match file.read_to_string(&mut text) {
                    Ok(_) if !text.trim().is_empty() => format!("process {}", text.trim()),
                    _ => "another process".to_owned(),
                };
                return Err(Error::Busy(format!(
                    "the run directory {} belongs to a daemon that is running: {owner}",
                    path.display()
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        file.set_len(0).map_err(failed)?;
        file.rewind().map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { path: path.to_owned(), _pid: file })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Waits until no process owns the run directory; says whether that came true in time.
#[must_use]
pub fn wait_until_free(path: &Path, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let Ok(file) = File::open(path.join(PID)) else { return true };
        // A shared lock, given up at once: one that starts meanwhile tries again.
        if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for the turn to start a daemon: of several verbs that find none, one starts it and the others find it running.
///
/// # Errors
/// What the system says.
pub fn start_turn(path: &Path) -> Result<File> {
    create(path)?;
    let name = path.join(START);
    let failed = |error: io::Error| Error::io(format!("locking {}", name.display()), error);
    let file = options().open(&name).map_err(failed)?;
    flock(&file, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    Ok(file)
}

/// Opens the daemon's log for appending; a large one is set aside as `daemon.log.old`.
///
/// # Errors
/// What the system says.
pub fn open_log(path: &Path) -> Result<File> {
    let name = path.join(LOG);
    let failed = |error: io::Error| Error::io(format!("opening the log {}", name.display()), error);
    if fs::metadata(&name).is_ok_and(|metadata| metadata.len() > LOG_MAX) {
        fs::rename(&name, path.join("daemon.log.old")).map_err(failed)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(&name).map_err(failed)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_run_directory_has_one_owner_and_is_free_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let first = RunDir::lock(&path).unwrap();
        let error = RunDir::lock(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        RunDir::lock(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(RunDir::lock(dir.path()).is_err());
    }
}
