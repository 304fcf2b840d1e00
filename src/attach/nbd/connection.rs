//! One client: its thread, from the first byte to the last.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

use super::listen::NbdStream;
use super::{Exports, negotiate, serve};

/// Bytes of a connection's stack; buffers are on the heap.
const STACK: usize = 512 << 10;

/// What a connection needs of its server.
///
/// A connection has a thread and a runtime of its own: a request wakes the thread that answers it, without a detour by a
/// scheduler, and a hit that has to wait for the disk holds up nobody else. Misses run where the server was started, since
/// what they begin outlives the client.
pub(super) struct Connection {
    pub exports: Arc<Exports>,
    pub handshake: Duration,
    /// Where misses run.
    pub misses: Handle,
    /// Changes when the server closes.
    pub closed: watch::Receiver<()>,
}

impl Connection {
    /// Starts the thread. The future is ready when it has ended.
    ///
    /// # Errors
    /// What the system says, when it has no thread or no descriptor left.
    pub fn start(self, stream: NbdStream) -> io::Result<impl Future<Output = ()> + use<>> {
        let stream = stream.leave()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (ending, ended) = oneshot::channel::<()>();
        std::thread::Builder::new().name("nbd".into()).stack_size(STACK).spawn(move || {
            let outcome = runtime.block_on(async {
                let mut closed = self.closed.clone();
                tokio::select! {
                    biased;
                    outcome = async {
                        match stream.enter()? {
                            NbdStream::Unix(stream) => self.talk(stream).await,
                            NbdStream::Tcp(stream) => self.talk(stream).await,
                        }
                    } => outcome,
                    _ = closed.changed() => Ok(()),
                }
            });
            if let Err(error) = outcome {
                tracing::debug!("nbd: connection ended: {error}");
            }
            drop(ending);
        })?;
        Ok(async {
            // Nothing is ever sent: the sender is dropped.
            let _ = ended.await;
        })
    }

    async fn talk<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S) -> io::Result<()> {
        let negotiated = tokio::time::timeout(self.handshake, negotiate::negotiate(&mut stream, &self.exports)).await;
        match negotiated.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no export was chosen in time"))?? {
            Some(session) => serve::transmit(stream, session, &self.misses).await,
            None => Ok(()),
        }
    }
}
