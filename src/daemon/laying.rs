//! Laying a start into the page cache: what the start-up stream brings is read from the mounted file system as it
//! arrives, in the stream's order, before the program asks for it.
//!
//! A program reads through page faults, one after the other and each a few blocks long. Here the kernel is told of whole
//! stretches of files, which it reads several at a time. Nothing is read that has not arrived, so that nothing is fetched
//! for this and the device's queue stays free for the program.
//!
//! A process of its own does it, which knows no descriptor of the daemon's: one that waits for a device can't be killed, and
//! a daemon that waits for its own could not be replaced. It gets lines `INODE FIRST BLOCKS` on its standard input (inode 0:
//! the device), and ends with it.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::fetch::Fetcher;
use crate::index::{BLOCK, Index, Place};
use crate::sys::descriptors;

/// The verb of the process that lays.
pub const VERB: &str = "lay-start";

/// How long is waited for its end when a device is to be detached.
const LAST: Duration = Duration::from_secs(5);

/// A start that is being laid into the page cache.
#[derive(Debug)]
pub struct Laying {
    laid: Arc<AtomicU64>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Laying {
    /// Begins with the start of `index`, whose ext4 on the block device at `device` is mounted and can't be written. On a
    /// tokio runtime.
    #[must_use]
    pub fn begin(device: &Path, index: &Arc<Index>, fetcher: &Arc<Fetcher>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let start = Start { device: device.to_owned(), index: Arc::clone(index), fetcher: Arc::clone(fetcher) };
        let laid = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(start.lay(Arc::clone(&laid), stopped));
        Self { laid, stop, task }
    }

    /// Bytes that were told of until now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.laid.load(Ordering::Relaxed)
    }

    /// Ends it: nothing holds the device then, unless a source can't be reached that a read waits for.
    pub async fn end(self) {
        self.stop.send_replace(true);
        drop(tokio::time::timeout(LAST, self.task).await);
    }
}

struct Start {
    device: PathBuf,
    index: Arc<Index>,
    fetcher: Arc<Fetcher>,
}

impl Start {
    async fn lay(self, laid: Arc<AtomicU64>, mut stop: watch::Receiver<bool>) {
        let (mut child, input) = match process(&self.device) {
            Ok(process) => process,
            Err(error) => {
                let device = self.device.display();
                return tracing::warn!("{device}: its start is not laid into the page cache: {error}");
            }
        };
        let stopped = tokio::select! {
            biased;
            () = told(&mut stop) => true,
            () = self.tell(input, &laid) => false,
        };
        let stopped = stopped
            || tokio::select! {
                biased;
                () = told(&mut stop) => true,
                _ = child.wait() => false,
            };
        if stopped && let Err(error) = child.kill().await {
            tracing::warn!("{}: ending the process that lays its start: {error}", self.device.display());
        }
    }

    /// Tells of everything in its turn.
    async fn tell(&self, mut input: ChildStdin, laid: &AtomicU64) {
        let mut reads = self.index.startup_reads().peekable();
        let mut lines = String::new();
        while let Some(&first) = reads.peek() {
            let (mut bytes, mut number) = (0, 0);
            lines.clear();
            while let Some(read) = reads.next_if(|next| next.chunk == first.chunk && number < BATCH) {
                let inode = match read.place {
                    Place::File { inode } => inode,
                    Place::Device => 0,
                };
                // A string takes any text.
                let _ = writeln!(lines, "{inode} {} {}", read.first, read.blocks);
                bytes += u64::from(read.blocks) * u64::from(BLOCK);
                number += 1;
            }
            let Some(chunk) = self.index.chunk(first.chunk) else { continue };
            if !self.fetcher.arrival(chunk.digest).await {
                continue;
            }
            // One that has ended said why.
            if input.write_all(lines.as_bytes()).await.is_err() {
                return;
            }
            laid.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// Most lines that are written at a time.
const BATCH: usize = 256;

/// The process, and where it is told. It is killed when it is dropped.
fn process(device: &Path) -> io::Result<(Child, ChildStdin)> {
    descriptors::close_on_exec()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(VERB).arg(device).current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn()?;
    let input = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    Ok((child, input))
}

async fn told(stop: &mut watch::Receiver<bool>) {
    // Nobody left who could tell is the same.
    drop(stop.wait_for(|stop| *stop).await);
}
