//! From a configuration to a running daemon, and its end.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::attachment::{Transport, is_held, remove_unknown};
use super::config::Config;
use super::control::{InUse, Lifetime, Problem, SOCKET, State};
use super::devices::still_held;
use super::node::Node;
use super::records::{Record, Records};
use super::rundir::RunDir;
use super::{server, snapshots, uppers};
use crate::device::upper::boot;
use crate::error::{Error, Result};
use crate::sys::namespace::enter_private_mount_namespace;

/// What a daemon that a verb started writes to its standard output when it serves.
pub const READY: &str = "ready";

/// What it writes when it can't, followed by the reason.
pub const FAILED: &str = "failed: ";

/// Threads that run tasks. Hits are answered by the transports' threads, so that few are enough.
const WORKERS: usize = 2;

/// Threads for work that blocks: decoding, hashing, admitting, loop devices.
const BLOCKING: usize = 8;

/// How long the daemon's end waits for work that blocks.
const LAST_WORK: Duration = Duration::from_secs(2);

/// Who waits for the daemon to be ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nobody: it was started by hand or by a service manager.
    Foreground,
    /// A verb, which reads [`READY`] or [`FAILED`] from its standard output.
    Background,
}

/// Runs the daemon until it is stopped.
///
/// Must be called before this process has a second thread: the mount namespace that it enters is one for each thread.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: Config, start: Start) -> std::result::Result<(), Problem> {
    if start == Start::Background {
        // Only a leader of a process group can't, and a child that a verb just made is none.
        let _ = rustix::process::setsid();
    }
    let outcome = serve(config, start);
    if let (Err(problem), Start::Background) = (&outcome, start) {
        tracing::error!("{problem}");
        announce(&format!("{FAILED}{}", problem.message.replace('\n', " ")));
    }
    outcome
}

fn serve(config: Config, start: Start) -> std::result::Result<(), Problem> {
    let run_dir = RunDir::lock(&config.run)?;
    std::fs::create_dir_all(&config.root)
        .map_err(|error| Error::io(format!("creating the root directory {}", config.root.display()), error))?;
    // Before anything is asked of ublk: the kernel answers with threads of its own in this process, which stay where they
    // were made.
    let namespace = own_mount_namespace(&config)?;
    let records = Records::open(&config.root.join("devices"))?;
    let (left, others): (Vec<_>, _) = remembered(&records)?.into_iter().partition(recoverable);
    let mut earlier = still_lost(&records, others)?;
    let recovering = to_recover(&config, &records, left)?;
    earlier.extend(recovering.iter().cloned());
    uppers::remove_unknown(&config, earlier.iter().map(|record| &record.device));
    snapshots::remove_all(&config);
    raise_file_limit();
    serve_writers();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .thread_name("firstread")
        .enable_all()
        .build()
        .map_err(|error| Error::io("starting the runtime", error))?;
    runtime.block_on(async {
        let node = Node::open(config.clone(), records, earlier)?;
        let listener = server::bind(run_dir.path())?;
        let signals = Signals::new()?;
        for record in recovering {
            tokio::spawn(Arc::clone(&node).recover(record));
        }
        tracing::info!("serving {} at {}", config.root.display(), run_dir.path().join(SOCKET).display());
        if start == Start::Background {
            announce(READY);
        }
        let keeper = tokio::spawn(super::keeping::keep(Arc::clone(&node)));
        let watcher = tokio::spawn(signals.watch(Arc::clone(&node)));
        if namespace == Namespace::Own {
            super::propagation::watch(&node)?;
        }
        server::serve(listener, Arc::clone(&node)).await;
        watcher.abort();
        keeper.abort();
        node.close().await;
        Ok::<(), Problem>(())
    })?;
    // What is being admitted to the pool just now gets there; a source that does not answer is not waited for.
    runtime.shutdown_timeout(LAST_WORK);
    // The lock is still held: the socket is this daemon's.
    if let Err(error) = std::fs::remove_file(run_dir.path().join(SOCKET)) {
        tracing::warn!("removing the control socket: {error}");
    }
    tracing::info!("stopped");
    // The directory is free when the process is gone, and the pool with it.
    std::mem::forget(run_dir);
    Ok(())
}

/// Lets this process open as many files as it may: slabs and connections are files.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // It works with fewer, until it needs them.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Tells the kernel that this process's threads are needed to write dirty pages: a write of theirs to an upper never waits
/// for pages that only they can write (prctl(2), PR_SET_IO_FLUSHER). The threads started from now on inherit it.
fn serve_writers() {
    if let Err(errno) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::info!(
            "writable devices may stall when memory is short: PR_SET_IO_FLUSHER: {}",
            io::Error::from(errno)
        );
    }
}

/// Which mount namespace the daemon is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Namespace {
    /// One of its own.
    Own,
    /// That of whoever started it.
    Shared,
}

/// Enters a mount namespace of its own. Who may not can't attach devices either, and serves exports.
fn own_mount_namespace(config: &Config) -> Result<Namespace> {
    match enter_private_mount_namespace(&[&config.root, &config.run]) {
        Ok(()) => Ok(Namespace::Own),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            tracing::info!("no privileges: exports only");
            Ok(Namespace::Shared)
        }
        Err(error) => Err(error),
    }
}

/// The devices of an earlier daemon on this start of the machine; records of an earlier start are dropped.
fn remembered(records: &Records) -> Result<Vec<Record>> {
    let found = records.load()?;
    for (path, reason) in found.damaged {
        tracing::error!("the record {} is damaged and was set aside: {reason}", path.display());
    }
    let boot = boot();
    let (current, old): (Vec<_>, Vec<_>) = found.records.into_iter().partition(|record| record.boot == boot);
    for record in old {
        tracing::info!("{} was attached before the machine started; forgotten", record.device.id);
        records.remove(&record.device.id)?;
    }
    Ok(current)
}

/// Whether the device of a record outlived its daemon, and can be served again.
fn recoverable(record: &Record) -> bool {
    record.reopen.is_some() && Transport::named(&record.device.transport).is_some_and(Transport::recovers)
}

/// The recoverable devices, without those whose client died before it had mounted them, and without what is left of
/// attaching when a daemon was killed in the middle of it.
fn to_recover(config: &Config, records: &Records, left: Vec<Record>) -> Result<Vec<Record>> {
    let mut kept = Vec::new();
    for mut record in left {
        record.device.state = State::Recovering;
        if record.lifetime == Lifetime::Tentative && !is_held(&record.device) {
            records.remove(&record.device.id)?;
        } else {
            kept.push(record);
        }
    }
    let paths: Vec<&Path> = kept.iter().map(|record| record.device.device.as_path()).collect();
    if let Err(error) = remove_unknown(config, &paths) {
        tracing::warn!("looking for devices that were left half made: {error}");
    }
    Ok(kept)
}

/// Those that somebody still holds; the others are reported and dropped.
fn still_lost(records: &Records, remembered: Vec<Record>) -> Result<Vec<Record>> {
    let (held, free): (Vec<_>, Vec<_>) = remembered.into_iter().partition(|record| still_held(&record.device));
    for record in &held {
        let device = &record.device;
        tracing::warn!(
            "{}: {} was lost with an earlier daemon and is still in use",
            device.id,
            device.device.display()
        );
    }
    for record in free {
        let device = &record.device;
        tracing::warn!("{}: {} was lost with an earlier daemon", device.id, device.device.display());
        records.remove(&device.id)?;
    }
    Ok(held)
}

/// Writes a line for the verb that waits, and gives standard output up.
fn announce(line: &str) {
    // The verb may have been killed meanwhile; the daemon stays.
    let _ = writeln!(io::stdout(), "{line}");
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// The signals that stop the daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let catch = |kind| signal(kind).map_err(|error| Error::io("catching signals", error));
        Ok(Self { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? })
    }

    async fn watch(mut self, node: Arc<Node>) {
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        };
        tracing::info!("{name}: stopping");
        let stopped = node.hand_over(InUse::Abandon).await;
        for id in stopped.detached {
            tracing::info!("{id}: detached");
        }
        for id in stopped.left {
            tracing::info!("{id}: left to the next daemon; its readers wait");
        }
    }
}
