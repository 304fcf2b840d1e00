//! The loop transport: a FUSE file under a loop device, for kernels that offer neither ublk nor NBD. Without recovery:
//! when this process ends, users get I/O errors.
//!
//! Nothing is left behind by a process that is killed: the loop device releases itself when its last user closes it, and
//! the attachment is one of the users. `kernel-notes/loop.md` has what this relies on.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuser::BackgroundSession;
use tokio::runtime::Handle;

use super::holders::{self, Holder};
use super::read_ahead;
use crate::device::{Access, Device};
use crate::error::{Error, Result};
use crate::sys::loop_ioctl;
pub use crate::sys::loop_ioctl::LoopIo;
use crate::sys::loop_ioctl::LoopWrites;

mod fuse;

/// Tries to get a free loop device: each may be taken by another process before it is bound.
const TRIES: u32 = 64;
/// How long a detach waits for the kernel to release the device after the last close.
const RELEASE: Duration = Duration::from_secs(5);
/// What the names of firstread's loop devices begin with; the pid and start time of the server follow.
const PREFIX: &str = "firstread:";

/// How a loop device is set up.
#[derive(Clone, Copy, Debug)]
pub struct LoopOptions {
    /// How the loop device reads the FUSE file.
    pub io: LoopIo,
    /// Logical block size in bytes. 512 suits every image: partition tables and file systems with small blocks as well.
    pub block_size: u32,
    /// Read-ahead of the device in KiB. A loop device keeps the value of its last user, so that it is always set.
    pub read_ahead_kb: u32,
    /// Threads that answer requests.
    pub threads: usize,
}

impl Default for LoopOptions {
    fn default() -> Self {
        Self { io: LoopIo::Direct, block_size: 512, read_ahead_kb: read_ahead::READY_KB, threads: 2 }
    }
}

/// A device attached as `/dev/loopN`. Dropping it releases the loop device, at once or when its last user closes it.
#[derive(Debug)]
pub struct LoopAttachment {
    path: PathBuf,
    name: String,
    /// Keeps the loop device bound while nobody else has it open. `None` once it was released.
    held: Option<File>,
    failing: Arc<AtomicBool>,
    session: BackgroundSession,
}

/// Attaches `device`. Misses run on `runtime`. Blocks for milliseconds: call it on a blocking thread.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel has no loop devices or no FUSE, or what the system says.
pub fn attach(device: Arc<dyn Device>, options: LoopOptions, runtime: Handle) -> Result<LoopAttachment> {
    for needed in ["/dev/loop-control", "/dev/fuse"] {
        if !Path::new(needed).exists() {
            return Err(Error::Unsupported(format!("the transport loop needs {needed}, which does not exist")));
        }
    }
    let failing = Arc::new(AtomicBool::new(false));
    let writes = match device.access() {
        Access::ReadOnly => LoopWrites::Refused,
        Access::ReadWrite => LoopWrites::Accepted,
    };
    let (session, file) = fuse::serve(device, options.threads.max(1), runtime, Arc::clone(&failing))?;
    let name = format!("{PREFIX}{}", identity(std::process::id()).unwrap_or_default());
    let (path, held) = bind(&file, &name, options, writes)?;
    let attachment = LoopAttachment { path, name, held: Some(held), failing, session };
    read_ahead::set(&attachment.path, options.read_ahead_kb)?;
    Ok(attachment)
}

/// Binds a free loop device to `file`; its path, and the device opened.
fn bind(file: impl std::os::fd::AsFd, name: &str, options: LoopOptions, writes: LoopWrites) -> Result<(PathBuf, File)> {
    let control = File::options().read(true).write(true).open("/dev/loop-control");
    let control = control.map_err(|error| Error::io("open /dev/loop-control", error))?;
    let mut busy = None;
    for _ in 0..TRIES {
        let number = loop_ioctl::get_free(&control).map_err(|error| Error::io("find a free loop device", error))?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        // The kernel makes a device read-only whose binder could not have written to it.
        let device = File::options().read(true).write(writes == LoopWrites::Accepted).open(&path);
        let device = device.map_err(|error| Error::io(format!("open {}", path.display()), error))?;
        match loop_ioctl::configure(&device, file.as_fd(), name, options.block_size, options.io, writes) {
            // Kept open for reading only: some kernels mount nothing that somebody has open for writing. The second open
            // comes before the close that would release it.
            Ok(()) => {
                let held = File::open(&path).map_err(|error| Error::io(format!("open {}", path.display()), error))?;
                return Ok((path, held));
            }
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => busy = Some(error),
            Err(error) => return Err(Error::io(format!("bind {}", path.display()), error)),
        }
    }
    let error = busy.unwrap_or_else(|| io::ErrorKind::ResourceBusy.into());
    Err(Error::io(format!("bind a loop device, {TRIES} times"), error))
}

impl LoopAttachment {
    /// `/dev/loopN`.
    #[must_use]
    pub fn device_path(&self) -> &Path {
        &self.path
    }

    /// How the loop device reads its file, as the kernel says.
    ///
    /// # Errors
    /// What the system says, or [`Error::Stopping`] after a detach.
    pub fn io(&self) -> Result<LoopIo> {
        let held = self.held.as_ref().ok_or_else(|| Error::Stopping(self.path.display().to_string()))?;
        let status = loop_ioctl::status(held);
        status.map(|status| status.io).map_err(|error| Error::io(format!("ask {}", self.path.display()), error))
    }

    /// Who uses the device.
    #[must_use]
    pub fn holders(&self) -> Vec<Holder> {
        holders::find(&self.path)
    }

    /// Releases the loop device and waits until it is free. Blocks for up to some seconds. After success only dropping
    /// is left; after an error the attachment is as before, and this may be called again.
    ///
    /// # Errors
    /// [`Error::Busy`] that names who uses the device.
    pub fn detach(&mut self) -> Result<()> {
        holders::wait_until_unused(&self.path)?;
        self.held = None;
        if self.wait_for_release(RELEASE) {
            return Ok(());
        }
        // Somebody opened it since. As before, so that it stays bound when they leave.
        let again = File::open(&self.path);
        let still_ours = |file: &File| loop_ioctl::status(file).is_ok_and(|status| status.name == self.name);
        match again {
            Ok(file) if still_ours(&file) => self.held = Some(file),
            _ if self.wait_for_release(RELEASE) => return Ok(()),
            _ => {}
        }
        Err(holders::busy(&self.path, &self.holders()))
    }

    /// Answers every read and write with an error from now on, and gives the device up: it is free when its last user leaves. Only
    /// dropping is left.
    pub fn fail(&mut self) {
        self.failing.store(true, Ordering::Relaxed);
        self.held = None;
    }

    /// The session ends when the kernel has let go of the FUSE file, which the loop device had open.
    fn wait_for_release(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while !self.session.guard.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }
}

impl Drop for LoopAttachment {
    fn drop(&mut self) {
        if self.held.take().is_some() && !self.wait_for_release(Duration::from_secs(1)) {
            tracing::warn!(
                "{} is still in use: {}; it is served until that ends or this process does",
                self.path.display(),
                holders::describe(&self.holders())
            );
        }
    }
}

/// A loop device whose server has ended, and who keeps it: reads fail until those leave, then it is free by itself.
#[derive(Clone, Debug)]
pub struct Stale {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// Who has to leave.
    pub holders: Vec<Holder>,
}

/// Finds what servers that were killed have left in use.
#[must_use]
pub fn stale() -> Vec<Stale> {
    let Ok(devices) = fs::read_dir("/sys/block") else { return Vec::new() };
    let mut found = Vec::new();
    for device in devices.flatten() {
        // Opening one that is not bound would only disturb others.
        if !device.path().join("loop").exists() {
            continue;
        }
        let path = Path::new("/dev").join(device.file_name());
        let status = File::open(&path).and_then(loop_ioctl::status);
        let Some(owner) = status.ok().and_then(|status| status.name.strip_prefix(PREFIX).map(ToOwned::to_owned)) else {
            continue;
        };
        let pid = owner.split('.').next().and_then(|pid| pid.parse().ok());
        if pid.and_then(identity) != Some(owner) {
            found.push(Stale { holders: holders::find(&path), path });
        }
    }
    found
}

/// `pid.start`: the start time in clock ticks tells a process from a later one with the same pid (proc_pid_stat(5)).
fn identity(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(") ")?.1;
    // A zombie has let go of everything, and nobody may ever reap it.
    if after_name.starts_with(['Z', 'X']) {
        return None;
    }
    Some(format!("{pid}.{}", after_name.split(' ').nth(19)?))
}
