//! Where clients come from: a unix socket that only its owner may use, or TCP.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::tls::Tls;
use crate::attach::socket::{self, SocketFile};
use crate::error::{Error, Result};

/// Bytes of kernel memory for replies on their way to a client (the kernel doubles it): one piece of a large read, so
/// that the next is read while the client takes the last one. More is slower, since it no longer stays in a core's cache.
const SEND_BUFFER: usize = 256 << 10;

/// A bound socket. A unix socket's file is removed when this is dropped.
#[derive(Debug)]
pub struct NbdListener {
    socket: Socket,
    tls: Option<Tls>,
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A connected client.
#[derive(Debug)]
pub enum NbdStream {
    /// Over a unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

impl NbdListener {
    /// Binds a unix socket that only the owner may connect to (mode 0600). A socket that a dead server left is replaced.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Busy`] when another server answers at `path`, [`Error::Invalid`] when something else is there or the
    /// path is too long for a socket, or what the system says.
    pub fn unix(path: &Path) -> Result<Self> {
        let (listener, file) = socket::listen(path)?;
        let failed = |source: io::Error| Error::io(format!("listen on {}", path.display()), source);
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        Ok(Self { socket: Socket::Unix(listener), tls: None, _file: Some(file) })
    }

    /// Binds a TCP socket. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// What the system says.
    pub fn tcp(address: SocketAddr) -> Result<Self> {
        let failed = |source: io::Error| Error::io(format!("listen on {address}"), source);
        let listener = std::net::TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { socket: Socket::Tcp(TcpListener::from_std(listener).map_err(failed)?), tls: None, _file: None })
    }

    /// Demands TLS of every client.
    #[must_use]
    pub fn with_tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// What is demanded of clients.
    pub(super) fn tls(&self) -> Option<Tls> {
        self.tls.clone()
    }

    /// The TCP address, with the port that the system chose for port 0; `None` for a unix socket.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(_) => None,
        }
    }

    /// Waits for a client.
    pub(super) async fn accept(&self) -> io::Result<NbdStream> {
        Ok(match &self.socket {
            Socket::Unix(listener) => NbdStream::Unix(listener.accept().await?.0),
            Socket::Tcp(listener) => NbdStream::Tcp(listener.accept().await?.0),
        })
    }
}

/// A stream between two runtimes.
#[derive(Debug)]
pub(super) enum Idle {
    Unix(StdUnixStream),
    Tcp(std::net::TcpStream),
}

impl Idle {
    /// Joins the runtime that this is called in.
    pub(super) fn enter(self) -> io::Result<NbdStream> {
        Ok(match self {
            Self::Unix(stream) => NbdStream::Unix(UnixStream::from_std(stream)?),
            Self::Tcp(stream) => NbdStream::Tcp(TcpStream::from_std(stream)?),
        })
    }
}

impl NbdStream {
    /// Leaves the runtime that it was accepted in.
    pub(super) fn leave(self) -> io::Result<Idle> {
        Ok(match self {
            Self::Unix(stream) => Idle::Unix(stream.into_std()?),
            Self::Tcp(stream) => Idle::Tcp(stream.into_std()?),
        })
    }

    /// Sets what makes replies leave fast. None of it is needed for right answers, so that a refusal is no error.
    pub(super) fn tune(&self) {
        match self {
            Self::Unix(stream) => enlarge(stream),
            Self::Tcp(stream) => {
                let _ = stream.set_nodelay(true);
                enlarge(stream);
                keep_alive(stream);
            }
        }
    }
}

/// Past the system's limit where allowed (root), else up to it.
fn enlarge(socket: &impl std::os::fd::AsFd) {
    use rustix::net::sockopt;
    if sockopt::set_socket_send_buffer_size_force(socket, SEND_BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER);
    }
}

/// Finds out within about two minutes that an idle client's machine is gone, so that it does not take a connection's
/// place for ever.
fn keep_alive(socket: &impl std::os::fd::AsFd) {
    use rustix::net::sockopt;
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, Duration::from_secs(60));
    let _ = sockopt::set_tcp_keepintvl(socket, Duration::from_secs(15));
    let _ = sockopt::set_tcp_keepcnt(socket, 4);
}
