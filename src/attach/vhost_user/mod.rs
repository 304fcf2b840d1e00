//! The vhost-user-blk server: a device for QEMU, Firecracker, Cloud Hypervisor, Kata and UML, without any block device
//! on the host.
//!
//! A front-end (the VMM) connects to a unix socket, shares its guest's memory and sets up queues; the guest's requests
//! then reach a thread for each queue without passing the VMM. `kernel-notes/vhost-user.md` has what this relies on.
//!
//! # Who is believed
//!
//! The guest: nothing. Its requests are checked and bounded ([`request`]), and what it does to its queues stops those
//! only. The front-end is the owner of the socket; what it says is checked too, but who shrinks the file behind memory
//! that is mapped here ends this process: front-ends should seal it, as QEMU and Firecracker do.

use std::future::Future;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use super::socket::{self, SocketFile};
use crate::error::{Error, Result};
use session::Session;

mod disk;
mod inflight;
mod memory;
pub mod request;
mod ring;
mod segments;
mod session;
mod shared;
mod worker;

pub use disk::{Disk, QUEUE_SIZE_MAX, QUEUES, SEGMENTS};
pub use memory::Memory;

/// A bound socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct VhostUserListener {
    listener: UnixListener,
    _file: SocketFile,
}

impl VhostUserListener {
    /// Binds a unix socket that only the owner may connect to (mode 0600). A socket that a dead server left is replaced.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Busy`] when another server answers at `path`, [`Error::Invalid`] when something else is there or the
    /// path is too long for a socket, or what the system says.
    pub fn bind(path: &Path) -> Result<Self> {
        let (listener, file) = socket::listen(path)?;
        let listener = UnixListener::from_std(listener);
        let listener = listener.map_err(|error| Error::io(format!("listen on {}", path.display()), error))?;
        Ok(Self { listener, _file: file })
    }
}

/// Serves `disk` to one front-end after the other until `stop` completes: one that leaves, or dies, may come back.
///
/// # Errors
/// None yet.
pub async fn serve(listener: VhostUserListener, disk: Disk, stop: impl Future<Output = ()>) -> Result<()> {
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => return Ok(()),
            accepted = listener.listener.accept() => accepted,
        };
        let started = accepted.and_then(|(stream, _)| {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            Ok((stream.try_clone()?, front_end(stream, disk.clone(), Handle::current())?))
        });
        let (stream, mut ended) = match started {
            Ok(started) => started,
            Err(error) => {
                tracing::warn!("vhost-user: a front-end can't be served: {error}");
                // Out of descriptors or threads, most likely: others have to leave first.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        tokio::select! {
            _ = &mut ended => {}
            () = &mut stop => {
                // It ends the front-end's thread, and that its queues.
                let _ = stream.shutdown(Shutdown::Both);
                let _ = ended.await;
                return Ok(());
            }
        }
    }
}

/// Talks to a front-end on a thread of its own. The receiver is ready when it has left and its queues have stopped.
fn front_end(stream: UnixStream, disk: Disk, runtime: Handle) -> std::io::Result<oneshot::Receiver<()>> {
    let (ending, ended) = oneshot::channel::<()>();
    std::thread::Builder::new().name("vhost-user".into()).stack_size(512 << 10).spawn(move || {
        let session = Arc::new(Mutex::new(Session::new(disk, runtime)));
        let mut handler = BackendReqHandler::from_stream(stream, session);
        let error = loop {
            if let Err(error) = handler.handle_request() {
                break error;
            }
        };
        match error {
            ProtocolError::Disconnected | ProtocolError::SocketBroken(_) => {
                tracing::debug!("vhost-user: the front-end left");
            }
            // What a front-end that dies leaves is often half a message.
            ProtocolError::PartialMessage => {
                tracing::debug!("vhost-user: the front-end left in the middle of a message")
            }
            error => tracing::warn!("vhost-user: the front-end was sent away: {error}"),
        }
        drop(handler);
        drop(ending);
    })?;
    Ok(ended)
}
