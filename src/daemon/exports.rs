//! Exports: an image served to another program for as long as somebody wants it.

use std::future::Future;
use std::net::ToSocketAddrs;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::control::TlsFiles;
use super::node::blocking;
use super::uppers::{self, UpperInfo};
use crate::attach::nbd::{self, Export, Exports, NbdListener, NbdOptions, Tls};
use crate::attach::vhost_user::{self, Disk, VhostUserListener};
use crate::device::Device;
use crate::device::upper::Upper;
use crate::error::{Error, Result};

/// Completes when an export shall end.
type Stopped = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A server that runs until it is stopped or dropped.
#[derive(Debug)]
pub struct Serving {
    /// What clients connect to.
    pub uri: String,
    /// What was written, and where it is.
    upper: Option<(Arc<Upper>, UpperInfo)>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<()>>,
}

impl Serving {
    /// Serves `device` over NBD at `address`: `unix:PATH` or `tcp:HOST:PORT`.
    ///
    /// # Errors
    /// An address that is malformed or can't be bound, or certificates that can't be used.
    pub async fn nbd(
        address: &str,
        tls: Option<&TlsFiles>,
        description: String,
        device: Arc<dyn Device>,
    ) -> Result<Self> {
        let tls = tls.map(|files| Tls::load(&files.certificate, &files.key, files.clients.as_deref())).transpose()?;
        let (mut listener, mut uri) = bind(address).await?;
        if let Some(tls) = tls {
            listener = listener.with_tls(tls);
            uri.replace_range(..3, "nbds");
        }
        let mut exports = Exports::new();
        exports.add(Export { name: String::new(), description, device })?;
        Ok(Self::spawn(uri, |stop| nbd::serve(listener, exports, NbdOptions::default(), stop)))
    }

    /// Serves `device` to VMMs at the socket `path`; its serial number is the start of `digest`.
    ///
    /// # Errors
    /// A path that can't be bound.
    pub fn vhost_user(path: &Path, digest: &str, device: Arc<dyn Device>) -> Result<Self> {
        if !path.is_absolute() {
            return Err(Error::invalid("address", format!("{}: the socket's path must be absolute", path.display())));
        }
        let listener = VhostUserListener::bind(path)?;
        let serial = digest.rsplit(':').next().unwrap_or_default().to_owned();
        let disk = Disk { device, serial };
        Ok(Self::spawn(path.display().to_string(), |stop| vhost_user::serve(listener, disk, stop)))
    }

    fn spawn<F>(uri: String, serve: impl FnOnce(Stopped) -> F) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = Box::pin(async {
            // A sender that is gone means the same as its word.
            let _ = stopped.await;
        });
        Self { uri, upper: None, stop: Some(stop), task: tokio::spawn(serve(stopped)) }
    }

    /// Closes this upper when it is stopped.
    #[must_use]
    pub(super) fn with_upper(self, upper: Option<(Arc<Upper>, UpperInfo)>) -> Self {
        Self { upper, ..self }
    }

    /// Stops; returns when the socket is gone.
    ///
    /// # Errors
    /// What ended the server.
    pub async fn stop(mut self) -> Result<()> {
        drop(self.stop.take());
        let ended = (&mut self.task)
            .await
            .unwrap_or_else(|error| Err(Error::Unsupported(format!("an export that panicked: {error}"))));
        let closed = match self.upper.take() {
            Some((upper, info)) => blocking(move || uppers::close(Some(&upper), &info)).await,
            None => Ok(()),
        };
        ended.and(closed)
    }
}

async fn bind(address: &str) -> Result<(NbdListener, String)> {
    let invalid = |reason: &str| Error::invalid("address", format!("{address:?}: {reason}"));
    match address.split_once(':') {
        Some(("unix", path)) => {
            let path = Path::new(path);
            if !path.is_absolute() {
                return Err(invalid("the socket's path must be absolute"));
            }
            Ok((NbdListener::unix(path)?, format!("nbd+unix:///?socket={}", escape(&path.display().to_string()))))
        }
        Some(("tcp", rest)) => {
            let name = rest.to_owned();
            let found = tokio::task::spawn_blocking(move || name.to_socket_addrs().map(|mut found| found.next())).await;
            let found = found.ok().and_then(std::result::Result::ok).flatten();
            let listener = NbdListener::tcp(found.ok_or_else(|| invalid("the host was not found"))?)?;
            let bound = listener.tcp_address().ok_or_else(|| invalid("it is not bound"))?;
            Ok((listener, format!("nbd://{bound}")))
        }
        _ => Err(invalid("write unix:PATH or tcp:HOST:PORT")),
    }
}

/// Percent-encodes what has a meaning in a URI's query.
fn escape(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    path.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn paths_are_escaped_for_a_uri() {
        assert_eq!(super::escape("/run/a b&c.sock"), "/run/a%20b%26c.sock");
    }
}
