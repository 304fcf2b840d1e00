//! One client: its thread, from the first byte to the last.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout_at};

use super::listen::NbdStream;
use super::negotiate::{Negotiated, Security, Session};
use super::tls::Tls;
use super::{Exports, negotiate, serve};

/// Bytes of a connection's stack; buffers are on the heap.
const STACK: usize = 512 << 10;

/// What a connection needs of its server.
///
/// A connection has a thread and a runtime of its own: a request wakes the thread that answers it, without a detour by a
/// scheduler, and a hit that has to wait for the disk holds up nobody else. Misses run where the server was started, since
/// what they begin outlives the client.
pub(super) struct Connection {
    pub opening: Opening,
    /// Where misses run.
    pub misses: Handle,
    /// Changes when the server closes.
    pub closed: watch::Receiver<()>,
}

/// How a connection begins.
pub(super) enum Opening {
    /// The client chooses an export.
    Handshake {
        /// What there is.
        exports: Arc<Exports>,
        /// How long it may take.
        time: Duration,
        /// Demanded of it, where there is such.
        tls: Option<Tls>,
    },
    /// With the transmission: everything was agreed on otherwise.
    Agreed(Session),
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

    /// Talks to the client until one side leaves.
    ///
    /// # Errors
    /// The connection broke, or the client does not follow the protocol.
    pub async fn talk<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S) -> io::Result<()> {
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no export was chosen in time");
        let (exports, time, tls) = match &self.opening {
            Opening::Agreed(session) => return serve::transmit(stream, session.clone(), &self.misses).await,
            Opening::Handshake { exports, time, tls } => (exports, *time, tls),
        };
        let until = Instant::now() + time;
        let security = if tls.is_some() { Security::Demanded } else { Security::Plain };
        let plain = async {
            let greeted = negotiate::greet(&mut stream).await?;
            Ok::<_, io::Error>((greeted, negotiate::negotiate(&mut stream, exports, greeted, security).await?))
        };
        let (greeted, outcome) = timeout_at(until, plain).await.map_err(late)??;
        #[cfg(not(feature = "nbd-tls"))]
        let _ = greeted;
        #[cfg(feature = "nbd-tls")]
        if let (Negotiated::StartTls, Some(tls)) = (&outcome, tls) {
            let secured = async {
                let mut stream = tls.acceptor.accept(stream).await.map_err(|error| super::tls::failed(&error))?;
                let outcome = negotiate::negotiate(&mut stream, exports, greeted, Security::Tls).await?;
                Ok::<_, io::Error>((stream, outcome))
            };
            let (stream, outcome) = timeout_at(until, secured).await.map_err(late)??;
            return self.transmit(stream, outcome).await;
        }
        self.transmit(stream, outcome).await
    }

    async fn transmit<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S, outcome: Negotiated) -> io::Result<()> {
        match outcome {
            Negotiated::Chosen(session) => serve::transmit(stream, session, &self.misses).await,
            Negotiated::StartTls | Negotiated::Left => Ok(()),
        }
    }
}
