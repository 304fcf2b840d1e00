//! The daemon's end of the control socket.
//!
//! A connection is one task that reads requests and one that writes responses; each request runs in a task of its own.
//! When the client closes its side, the requests that run are finished, and then what belongs to the connection goes:
//! tentative devices, exports, and devices whose answer nobody was there to read.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::control::{Call, Envelope, InUse, Kind, LINE_MAX, Outcome, Problem, Request, Response, SOCKET, VERSION};
use super::exports::Serving;
use super::node::{FAREWELL, Node};
use super::snapshots::SnapshotDir;
use super::starts::page;
use crate::error::{Error, Result};

/// Connections at a time.
const CONNECTIONS: usize = 256;
/// Requests of one connection at a time; further ones wait.
const REQUESTS: usize = 64;

/// Binds the control socket in the run directory, which this process has locked: a socket that is there is a dead
/// daemon's.
///
/// # Errors
/// What the system says.
pub fn bind(run: &Path) -> Result<UnixListener> {
    let path = run.join(SOCKET);
    let failed = |error| Error::io(format!("listening on {}", path.display()), error);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    UnixListener::bind(&path).map_err(failed)
}

/// Serves clients until the node stops.
pub async fn serve(listener: UnixListener, node: Arc<Node>) {
    let mut stopping = node.stopping();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = stopping.wait_for(|&stopping| stopping) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < CONNECTIONS && permitted(&stream) => {
                    connections.spawn(Arc::new(Connection::new(Arc::clone(&node))).run(stream));
                }
                Ok(_) => tracing::warn!("a client was refused"),
                Err(error) => {
                    tracing::warn!("accepting a client: {error}");
                    // Out of descriptors, most likely: others have to leave first.
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }
    // They see the same signal, and end what belongs to them.
    while connections.join_next().await.is_some() {}
}

/// Root and the daemon's own user may talk to it.
fn permitted(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

/// A client.
pub struct Connection {
    node: Arc<Node>,
    gone: AtomicBool,
    tentative: Mutex<BTreeSet<String>>,
    exports: Mutex<Vec<Serving>>,
    snapshots: Mutex<Vec<SnapshotDir>>,
    /// What was asked for last, while it is asked for page by page.
    profile: Mutex<Option<Arc<str>>>,
}

impl Connection {
    fn new(node: Arc<Node>) -> Self {
        Self {
            node,
            gone: AtomicBool::new(false),
            tentative: Mutex::default(),
            exports: Mutex::default(),
            snapshots: Mutex::default(),
            profile: Mutex::default(),
        }
    }

    async fn run(self: Arc<Self>, stream: UnixStream) {
        let (reader, writer) = stream.into_split();
        let (responses, queue) = mpsc::channel(REQUESTS);
        let writer = tokio::spawn(write(writer, queue));
        let mut requests = JoinSet::new();
        let mut stopping = self.node.stopping();
        tokio::select! {
            () = self.read(BufReader::new(reader), &responses, &mut requests) => {}
            _ = stopping.wait_for(|&stopping| stopping) => {}
        }
        self.gone.store(true, Ordering::SeqCst);
        while requests.join_next().await.is_some() {}
        self.release().await;
        drop(responses);
        // It ends when the queue is empty; a client that does not read is not waited for.
        let _ = tokio::time::timeout(FAREWELL, writer).await;
    }

    async fn read(
        self: &Arc<Self>,
        mut reader: impl AsyncBufReadExt + Unpin,
        responses: &mpsc::Sender<Response>,
        requests: &mut JoinSet<()>,
    ) {
        let turns = Arc::new(Semaphore::new(REQUESTS));
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut reader).take(LINE_MAX as u64 + 1).read_until(b'\n', &mut line).await {
                Ok(_) if line.last() == Some(&b'\n') => {}
                Ok(_) if line.len() > LINE_MAX => {
                    let problem = Problem::new(Kind::Request, format!("a request is longer than {LINE_MAX} bytes"));
                    // The client may be gone already.
                    let _ = responses.send(Response { id: 0, outcome: Outcome::Error(problem) }).await;
                    return;
                }
                _ => return,
            }
            while requests.try_join_next().is_some() {}
            let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
            let (connection, responses, line) = (Arc::clone(self), responses.clone(), std::mem::take(&mut line));
            requests.spawn(async move {
                let response = connection.answer(&line).await;
                // The client may be gone; what must not outlive it was taken care of.
                let _ = responses.send(response).await;
                drop(turn);
            });
        }
    }

    async fn answer(self: Arc<Self>, line: &[u8]) -> Response {
        let envelope = match serde_json::from_slice::<Envelope>(line) {
            Ok(envelope) => envelope,
            Err(error) => {
                let problem = Problem::new(Kind::Request, format!("a request that is no request: {error}"));
                return Response { id: 0, outcome: Outcome::Error(problem) };
            }
        };
        let result = if envelope.version == VERSION {
            match serde_json::from_slice::<Request>(line) {
                Ok(request) => self.call(request.call).await,
                Err(error) => {
                    Err(Problem::new(Kind::Request, format!("a request that this daemon does not know: {error}"))
                        .hint("use the same version of firstread, or stop the daemon and start it anew"))
                }
            }
        } else {
            let version = envelope.version;
            Err(Problem::new(
                Kind::Request,
                format!("this daemon speaks version {VERSION} of the protocol, not {version}"),
            )
            .hint("use the same version of firstread, or stop the daemon and start it anew"))
        };
        let outcome = result.map_or_else(Outcome::Error, Outcome::Result);
        Response { id: envelope.id, outcome }
    }

    async fn call(&self, call: Call) -> std::result::Result<serde_json::Value, Problem> {
        let node = &self.node;
        match call {
            Call::Hello => value(&node.hello()),
            Call::Attach(request) => {
                let attached = node.attach(&request).await?;
                let id = attached.device.id.clone();
                self.tentative.lock().insert(id.clone());
                if request.lifetime == super::control::Lifetime::Permanent && !self.gone.load(Ordering::SeqCst) {
                    self.tentative.lock().remove(&id);
                }
                value(&attached)
            }
            Call::Expect(request) => value(&node.expect(&request).await?),
            Call::Settle { target, mountpoint } => {
                let device = node.settle(&target, mountpoint).await?;
                self.tentative.lock().remove(&device.id);
                value(&device)
            }
            Call::Detach { target, in_use } => value(&node.detach(&target, in_use).await?),
            Call::Find { target } => value(&node.find(&target)?),
            Call::List => value(&node.list()),
            Call::Status { target } => value(&node.status(target.as_deref()).await?),
            Call::Ready { target } => value(&node.ready(&target)?),
            Call::Filling { target, cells } => value(&node.filling(&target, cells).await?),
            Call::Locate { target, ranges } => {
                let text = node.locate(&target, ranges).await?;
                *self.profile.lock() = Some(Arc::clone(&text));
                value(&page(&text, 0))
            }
            Call::Trace { target } => value(&node.trace(&target).await?),
            Call::Profile { target, until } => {
                let text = node.profile(&target, until).await?;
                *self.profile.lock() = Some(Arc::clone(&text));
                value(&page(&text, 0))
            }
            Call::ProfileMore { from } => {
                let text = self.profile.lock().clone();
                value(&page(text.as_deref().unwrap_or_default(), from))
            }
            Call::Export(request) => {
                let (exported, serving) = node.export(&request).await?;
                self.exports.lock().push(serving);
                value(&exported)
            }
            Call::Snapshot { target } => {
                let (snapshotted, dir) = node.snapshot(&target).await?;
                self.snapshots.lock().push(dir);
                value(&snapshotted)
            }
            Call::PoolStat => value(&node.pool_stat().await?),
            Call::PoolTrim { bytes } => value(&node.pool_trim(bytes).await?),
            Call::PoolScrub => value(&node.pool_scrub()?),
            Call::Pin(request) => value(&node.pin(request)?),
            Call::Prove { reference } => value(&node.prove(reference)?),
            Call::Unpin { reference } => value(&node.unpin(reference).await?),
            Call::HandOver => value(&node.hand_over(InUse::Refuse).await),
            Call::Stop { in_use } => value(&node.stop(in_use).await),
        }
    }

    /// Ends what belongs to the connection.
    async fn release(&self) {
        let exports = std::mem::take(&mut *self.exports.lock());
        for export in exports {
            if let Err(error) = export.stop().await {
                tracing::warn!("an export ended: {error}");
            }
        }
        let snapshots = std::mem::take(&mut *self.snapshots.lock());
        // Files of gigabytes take a moment to go; nobody waits for that.
        drop(tokio::task::spawn_blocking(move || drop(snapshots)));
        let tentative = std::mem::take(&mut *self.tentative.lock());
        for id in tentative {
            self.abandon(&id).await;
        }
    }

    /// Detaches a device that nobody wants any more. What the client ran may still be ending, with a mount of its own.
    async fn abandon(&self, id: &str) {
        match self.node.detach(id, InUse::Wait).await {
            Ok(_) => tracing::info!("{id} was detached: the client that wanted it is gone"),
            Err(problem) if problem.kind == Kind::NotFound => {}
            Err(problem) => tracing::warn!("{id} stays, though the client that wanted it is gone: {problem}"),
        }
    }
}

fn value<T: serde::Serialize>(answer: &T) -> std::result::Result<serde_json::Value, Problem> {
    serde_json::to_value(answer).map_err(|error| Problem::new(Kind::Failed, format!("writing an answer: {error}")))
}

async fn write(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Response>) {
    while let Some(response) = queue.recv().await {
        let Ok(mut line) = serde_json::to_vec(&response) else { continue };
        line.push(b'\n');
        if writer.write_all(&line).await.is_err() {
            return;
        }
    }
}

/// Says when the node stops.
pub type Stopping = watch::Receiver<bool>;
