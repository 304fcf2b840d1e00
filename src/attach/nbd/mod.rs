//! The NBD server: exports devices to QEMU, libnbd, nbd-client and the kernel.
//!
//! [`proto`] is the wire format without I/O, `negotiate` the handshake, `serve` the transmission. A connection is one
//! thread: hits are read straight into its reply buffer and leave in batches; misses are tasks whose replies that
//! connection sends as they finish.
//!
//! # What a client can cost
//!
//! Whatever it sends, at most per connection: a thread with 512 KiB of stack, 16 KiB of requests, 64 KiB of one option, [`serve::OUTPUT`] bytes of
//! replies, a piece of a write ([`serve::PIECE`]), [`serve::MISSES_MAX`] misses of together [`serve::MISS_BYTES_MAX`] bytes, and 512 KiB of socket buffer in
//! the kernel. [`NbdOptions::connections`] bounds the connections, [`NbdOptions::handshake`] the time without an export. A
//! client that reads slowly stops its own connection only.
//!
//! With [`NbdListener::with_tls`] a client is told nothing before it has started TLS.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::device::{Access, Device};
use crate::error::{Error, Result};
use connection::{Connection, Opening};

mod connection;
#[cfg(feature = "nbd-device")]
pub mod kernel;
mod listen;
mod negotiate;
pub mod proto;
pub mod serve;
mod status;
#[cfg_attr(not(feature = "nbd-tls"), path = "without_tls.rs")]
mod tls;

pub use listen::{NbdListener, NbdStream};
pub use tls::Tls;

/// Smallest request in bytes.
pub const BLOCK_MIN: u32 = 1;
/// Request size in bytes below which a client pays more than it need.
pub const BLOCK_PREFERRED: u32 = 4096;

/// What clients may know of any device: what may be done with it, and that its connections see each other's writes, and
/// make each other's durable.
fn device_flags(access: Access) -> u16 {
    use proto::export_flag::{
        CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES,
    };
    let always = HAS_FLAGS | SEND_FLUSH | CAN_MULTI_CONN;
    match access {
        Access::ReadOnly => always | READ_ONLY,
        Access::ReadWrite => always | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES,
    }
}

/// A device under a name.
pub struct Export {
    /// What clients ask for; at most [`proto::NAME_MAX`] bytes.
    pub name: String,
    /// For people, in lists.
    pub description: String,
    /// What is served.
    pub device: Arc<dyn Device>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).field("size", &self.device.size()).finish_non_exhaustive()
    }
}

/// The exports of a server. The first one added also answers to the empty name, the protocol's default export.
#[derive(Clone, Debug, Default)]
pub struct Exports {
    first: Option<Arc<Export>>,
    by_name: BTreeMap<String, Arc<Export>>,
}

impl Exports {
    /// No exports.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an export, in place of one with the same name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name or a description longer than [`proto::NAME_MAX`].
    pub fn add(&mut self, export: Export) -> Result<()> {
        if export.name.len() > proto::NAME_MAX || export.description.len() > proto::NAME_MAX {
            return Err(Error::invalid("export", format!("name or description exceeds {} bytes", proto::NAME_MAX)));
        }
        let export = Arc::new(export);
        if self.first.as_ref().is_none_or(|first| first.name == export.name) {
            self.first = Some(Arc::clone(&export));
        }
        self.by_name.insert(export.name.clone(), export);
        Ok(())
    }

    fn get(&self, name: &str) -> Option<Arc<Export>> {
        self.by_name.get(name).or_else(|| self.first.as_ref().filter(|_| name.is_empty())).cloned()
    }

    fn iter(&self) -> impl Iterator<Item = &Arc<Export>> {
        self.by_name.values()
    }
}

/// What a server allows.
#[derive(Clone, Copy, Debug)]
pub struct NbdOptions {
    /// Connections at a time; further ones are closed at once.
    pub connections: usize,
    /// Time from connecting to the choice of an export.
    pub handshake: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self { connections: 64, handshake: Duration::from_secs(10) }
    }
}

/// Serves `exports` to one client over any stream, until the client leaves.
///
/// # Errors
/// The connection broke, or the client does not follow the protocol.
pub async fn serve_stream<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    exports: Exports,
    options: NbdOptions,
) -> io::Result<()> {
    let (_open, closed) = watch::channel(());
    let opening = Opening::Handshake { exports: Arc::new(exports), time: options.handshake, tls: None };
    Connection { opening, misses: Handle::current(), closed }.talk(stream).await
}

/// Serves `exports` to everybody who connects, until `stop` completes; then all connections are closed and a unix
/// socket's file is removed.
///
/// # Errors
/// [`Error::Invalid`] when there are no exports.
pub async fn serve(
    listener: NbdListener,
    exports: Exports,
    options: NbdOptions,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    if exports.first.is_none() {
        return Err(Error::invalid("exports", "there are none"));
    }
    let exports = Arc::new(exports);
    let mut connections = JoinSet::new();
    let (closing, closed) = watch::channel(());
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok(stream) if connections.len() < options.connections => {
                    stream.tune();
                    let connection = Connection {
                        opening: Opening::Handshake {
                            exports: Arc::clone(&exports),
                            time: options.handshake,
                            tls: listener.tls(),
                        },
                        misses: Handle::current(),
                        closed: closed.clone(),
                    };
                    match connection.start(stream) {
                        Ok(ended) => drop(connections.spawn(ended)),
                        Err(error) => tracing::warn!("nbd: a connection can't be served: {error}"),
                    }
                }
                Ok(_) => tracing::warn!("nbd: {} connections are open, one more was refused", connections.len()),
                Err(error) => {
                    tracing::warn!("nbd: accept: {error}");
                    // Out of descriptors, most likely: others have to leave first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
    drop(listener);
    drop(closing);
    while connections.join_next().await.is_some() {}
    Ok(())
}
