//! The transport nbd: the kernel's NBD client, connected to this process's server over socket pairs.
//!
//! The device belongs to the kernel and outlives this process: when its connections die, requests wait, and the next
//! process gives it new ones. What was on its way then is sent again when its time is up ([`NbdDeviceOptions::timeout`]).
//! `kernel-notes/nbd.md` has what this relies on.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::connection::{Connection, Opening};
use super::listen::NbdStream;
use super::negotiate::{Replies, Session};
use super::{Export, device_flags};
use crate::attach::holders::{self, Holder};
use crate::device::Device;
use crate::error::{Error, Result};
use netlink::{Client, NewDevice};

mod netlink;

/// How long a new device may take to appear, and an old one to go.
const APPEARS: Duration = Duration::from_secs(5);
/// Between a connection's end and the next try to replace it, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// What the identifiers of firstread's devices begin with.
const PREFIX: &str = "firstread:";

/// Connections that a device may have.
pub const CONNECTIONS_MAX: u16 = 16;
/// Seconds that a request may take before it is sent again.
pub const TIMEOUT_MAX: u16 = 600;

/// How a device is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NbdDeviceOptions {
    /// Connections, and queues of the device; each costs a thread.
    pub connections: usize,
    /// After so long without an answer a request is sent again: how long the requests wait at most that were on their way
    /// to a server that died. Whole seconds.
    pub timeout: Duration,
    /// So long requests wait for a server to come back. Whole seconds.
    pub dead_timeout: Duration,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Read-ahead of the device in KiB.
    pub read_ahead_kb: u32,
}

impl Default for NbdDeviceOptions {
    fn default() -> Self {
        Self {
            connections: 2,
            timeout: Duration::from_secs(10),
            dead_timeout: Duration::from_secs(3600),
            block_size: 512,
            read_ahead_kb: 128,
        }
    }
}

/// What a device is connected with: the node whose it is, and its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identifier(String);

impl Identifier {
    /// The identifier of a device of `size` bytes of the node `node`.
    #[must_use]
    pub fn new(node: &str, size: u64) -> Self {
        Self(format!("{PREFIX}{node}:{size}"))
    }
}

/// Why the kernel can't have such devices; `None` if it can.
#[must_use]
pub fn obstacle() -> Option<String> {
    match Client::open() {
        Ok(_) => None,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some("the kernel does not offer it (modprobe nbd)".to_owned())
        }
        Err(error) => Some(format!("the kernel can't be asked for it: {error}")),
    }
}

/// The number of `/dev/nbdN`.
#[must_use]
pub fn index_of(path: &Path) -> Option<u32> {
    path.to_str()?.strip_prefix("/dev/nbd")?.parse().ok()
}

/// The devices of the node `node` that are connected.
#[must_use]
pub fn all_of(node: &str) -> Vec<u32> {
    let Ok(devices) = fs::read_dir("/sys/block") else { return Vec::new() };
    let prefix = format!("{PREFIX}{node}:");
    let index = |entry: fs::DirEntry| index_of(&Path::new("/dev").join(entry.file_name()));
    let ours = |index: &u32| backend(*index).is_some_and(|backend| backend.starts_with(&prefix));
    devices.flatten().filter_map(index).filter(ours).collect()
}

/// The identifier that a device was connected with.
fn backend(index: u32) -> Option<String> {
    fs::read_to_string(format!("/sys/block/nbd{index}/backend")).ok().map(|text| text.trim_end().to_owned())
}

fn path_of(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

fn failed(index: u32, what: &str) -> impl FnOnce(io::Error) -> Error {
    let what = format!("{what} /dev/nbd{index}");
    move |error| Error::io(what, error)
}

/// Disconnects a device that no process serves any more, whoever uses it.
///
/// # Errors
/// What the system says.
pub fn remove_abandoned(index: u32) -> Result<()> {
    let client = Client::open().map_err(failed(index, "disconnect"))?;
    client.disconnect(index).map_err(failed(index, "disconnect"))
}

/// A device attached as `/dev/nbdN`. Dropping it ends its connections only: the device waits for the next server.
#[derive(Debug)]
pub struct NbdAttachment {
    index: u32,
    path: PathBuf,
    /// Dropped to end the connections.
    open: Option<watch::Sender<()>>,
}

/// What makes connections, for as long as the device is attached.
struct Keeper {
    index: u32,
    identifier: Identifier,
    export: Arc<Export>,
    runtime: Handle,
    closed: watch::Receiver<()>,
}

/// A connection's two ends: the kernel's, and the one that is served when it has been taken.
type Ends = (StdUnixStream, StdUnixStream);

fn pairs(count: usize) -> io::Result<Vec<Ends>> {
    (0..count).map(|_| StdUnixStream::pair()).collect()
}

/// Attaches `device`. Its misses and what keeps its connections run on `runtime`. Blocks for milliseconds.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel has no NBD client, or what the system says.
pub fn attach(
    device: Arc<dyn Device>,
    identifier: Identifier,
    options: NbdDeviceOptions,
    runtime: Handle,
) -> Result<NbdAttachment> {
    if let Some(reason) = obstacle() {
        return Err(Error::Unsupported(format!("transport nbd: {reason}")));
    }
    let connect = || -> io::Result<(u32, Vec<Ends>)> {
        let ends = pairs(options.connections.max(1))?;
        let kernel: Vec<_> = ends.iter().map(|(kernel, _)| kernel.as_fd()).collect();
        let new = NewDevice {
            size: device.size(),
            block_size: options.block_size,
            flags: device_flags(device.access()),
            timeout: options.timeout,
            dead_timeout: options.dead_timeout,
            identifier: &identifier.0,
        };
        let index = Client::open()?.connect(&new, &kernel)?;
        Ok((index, ends))
    };
    let (index, ends) = connect().map_err(|error| Error::io("connect an NBD device", error))?;
    let attachment = serve(index, identifier, device, runtime, ends);
    let finish = || -> io::Result<()> {
        wait_for(|| path_of(index).exists())?;
        let setting = format!("/sys/block/nbd{index}/queue/read_ahead_kb");
        fs::write(setting, options.read_ahead_kb.to_string())
    };
    match finish() {
        Ok(()) => Ok(attachment),
        Err(error) => {
            let _ = remove_abandoned(index);
            Err(failed(index, "set up")(error))
        }
    }
}

/// Serves a device again that lost its server; `None` when it is there no more.
///
/// # Errors
/// What the system says; it may be tried again.
pub fn recover(
    index: u32,
    device: Arc<dyn Device>,
    identifier: Identifier,
    options: NbdDeviceOptions,
    runtime: Handle,
) -> Result<Option<NbdAttachment>> {
    if backend(index).as_deref() != Some(&identifier.0) {
        return Ok(None);
    }
    let reconnect = || -> io::Result<Vec<Ends>> {
        let ends = pairs(options.connections.max(1))?;
        let kernel: Vec<_> = ends.iter().map(|(kernel, _)| kernel.as_fd()).collect();
        Client::open()?.reconnect(index, &identifier.0, &kernel)?;
        Ok(ends)
    };
    let ends = reconnect().map_err(failed(index, "reconnect"))?;
    Ok(Some(serve(index, identifier, device, runtime, ends)))
}

fn serve(
    index: u32,
    identifier: Identifier,
    device: Arc<dyn Device>,
    runtime: Handle,
    ends: Vec<Ends>,
) -> NbdAttachment {
    let (open, closed) = watch::channel(());
    let export = Arc::new(Export { name: String::new(), description: String::new(), device });
    let keeper = Keeper { index, identifier, export, runtime: runtime.clone(), closed };
    runtime.spawn(keeper.keep(ends.into_iter().map(|(_, served)| served).collect()));
    NbdAttachment { index, path: path_of(index), open: Some(open) }
}

impl Keeper {
    /// Serves these connections, and others in place of those that end.
    async fn keep(mut self, served: Vec<StdUnixStream>) {
        let mut connections = JoinSet::new();
        for stream in served {
            if let Err(error) = self.start(stream, &mut connections) {
                // The kernel sees that it is closed, and it is replaced below.
                tracing::warn!("nbd{}: a connection can't be served: {error}", self.index);
                connections.spawn(std::future::ready(()));
            }
        }
        let mut pause = AGAIN.0;
        loop {
            tokio::select! {
                _ = self.closed.changed() => break,
                ended = connections.join_next() => if ended.is_none() { break },
            }
            let began = Instant::now();
            loop {
                tokio::select! {
                    _ = self.closed.changed() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                match self.replace(&mut connections).await {
                    Ok(()) => break,
                    Err(_) if backend(self.index).as_deref() != Some(&self.identifier.0) => {
                        tracing::warn!("/dev/nbd{} was disconnected by somebody else", self.index);
                        return;
                    }
                    Err(error) => tracing::warn!("/dev/nbd{}: a connection can't be replaced: {error}", self.index),
                }
                pause = (2 * pause).min(AGAIN.1);
            }
            // One that lasts makes up for those that did not.
            if began.elapsed() < AGAIN.1 {
                pause = AGAIN.0;
            }
        }
        while connections.join_next().await.is_some() {}
    }

    fn start(&self, stream: StdUnixStream, connections: &mut JoinSet<()>) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let stream = NbdStream::Unix(tokio::net::UnixStream::from_std(stream)?);
        stream.tune();
        let session = Session { export: Arc::clone(&self.export), replies: Replies::Simple, contexts: Vec::new() };
        let connection =
            Connection { opening: Opening::Agreed(session), misses: self.runtime.clone(), closed: self.closed.clone() };
        connections.spawn(connection.start(stream)?);
        Ok(())
    }

    /// The kernel gave a connection up, most likely since a request took longer than its timeout.
    async fn replace(&self, connections: &mut JoinSet<()>) -> io::Result<()> {
        let (kernel, served) = StdUnixStream::pair()?;
        self.start(served, connections)?;
        let (index, identifier) = (self.index, self.identifier.0.clone());
        let told =
            tokio::task::spawn_blocking(move || Client::open()?.reconnect(index, &identifier, &[kernel.as_fd()]));
        told.await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

fn wait_for(done: impl Fn() -> bool) -> io::Result<()> {
    let until = Instant::now() + APPEARS;
    while !done() {
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

impl NbdAttachment {
    /// `/dev/nbdN`.
    #[must_use]
    pub fn device_path(&self) -> &Path {
        &self.path
    }

    /// Who uses the device.
    #[must_use]
    pub fn holders(&self) -> Vec<Holder> {
        holders::find(&self.path)
    }

    /// Disconnects the device. Blocks for up to some seconds. After success only dropping is left; after an error
    /// everything is as before.
    ///
    /// # Errors
    /// [`Error::Busy`] that names who uses the device, or what the system says.
    pub fn detach(&mut self) -> Result<()> {
        holders::wait_until_unused(&self.path)?;
        self.fail()
    }

    /// Disconnects the device, whoever uses it: what they read from now on fails.
    ///
    /// # Errors
    /// What the system says.
    pub fn fail(&mut self) -> Result<()> {
        // First, or the connections that end would be replaced.
        self.open = None;
        remove_abandoned(self.index)
    }
}
