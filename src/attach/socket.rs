//! Unix sockets on which transports listen, for their owner only.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, Result};

/// Binds a unix socket that only the owner may connect to (mode 0600), not blocking. A socket that a dead server left is
/// replaced.
///
/// # Errors
/// [`Error::Busy`] when another server answers at `path`, [`Error::Invalid`] when something else is there or the path is
/// too long for a socket, or what the system says.
pub(super) fn listen(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let failed = |source: io::Error| Error::io(format!("listen on {}", path.display()), source);
    let address = SocketAddrUnix::new(path)
        .map_err(|_| Error::invalid("socket path", format!("{} is longer than 107 bytes", path.display())))?;
    remove_if_dead(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|errno| failed(errno.into()))?;
    // The file gets the mode that the socket has at bind (unix_bind() in net/unix/af_unix.c): there is no moment at
    // which others may connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|errno| failed(errno.into()))?;
    rustix::net::bind(&socket, &address).map_err(|errno| failed(errno.into()))?;
    let found = std::fs::symlink_metadata(path).map_err(failed)?;
    let file = SocketFile { path: path.to_owned(), identity: (found.dev(), found.ino()) };
    rustix::net::listen(&socket, 128).map_err(|errno| failed(errno.into()))?;
    Ok((socket.into(), file))
}

/// A socket's file, removed on drop if it is still the one that was bound.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket at `path` that nobody listens on.
fn remove_if_dead(path: &Path) -> Result<()> {
    let failed = |source: io::Error| Error::io(format!("look at {}", path.display()), source);
    let found = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(failed)?,
    };
    if !found.file_type().is_socket() {
        return Err(Error::invalid("socket path", format!("{} exists and is not a socket", path.display())));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(_) => Err(Error::Busy(format!("another server listens on {}", path.display()))),
    }
}
