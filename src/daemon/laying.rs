//! Laying a start into the page cache: what the start-up stream brings is read from the mounted file system as it
//! arrives, in the stream's order, before the program asks for it.
//!
//! A program reads through page faults, one after the other and each a few blocks long. Here the kernel is told of whole
//! stretches of files (posix_fadvise(2), POSIX_FADV_WILLNEED), which it reads several at a time. Nothing is read that has
//! not arrived, so that nothing is fetched for this and the device's queue stays free for the program.
//!
//! The daemon has a mount of the file system for itself, in no namespace: the kernel has one superblock for all mounts of
//! a device, and with it one page cache. So nobody's mount is in use for this.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{Advice, Mode, OFlags, fadvise, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::fetch::Fetcher;
use crate::index::{BLOCK, Index, Place, StartupRead};
use crate::sys::inode::open_file;

/// Most reads that are told of at a time.
const BATCH: usize = 256;

/// How long is waited for the last of them when a device is to be detached.
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
        let (device, index, fetcher) = (device.to_owned(), Arc::clone(index), Arc::clone(fetcher));
        let laid = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(lay(device, index, fetcher, Arc::clone(&laid), stopped));
        Self { laid, stop, task }
    }

    /// Bytes that the kernel was told of until now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.laid.load(Ordering::Relaxed)
    }

    /// Ends it: what holds the device is closed then, unless a source can't be reached that a read waits for.
    pub async fn end(self) {
        self.stop.send_replace(true);
        drop(tokio::time::timeout(LAST, self.task).await);
    }
}

async fn lay(
    device: PathBuf,
    index: Arc<Index>,
    fetcher: Arc<Fetcher>,
    laid: Arc<AtomicU64>,
    mut stop: watch::Receiver<bool>,
) {
    let opened = spawn_blocking({
        let device = device.clone();
        move || FileSystem::open(&device)
    });
    let file_system = match opened.await {
        Ok(Ok(file_system)) => Arc::new(file_system),
        Ok(Err(error)) => {
            return tracing::debug!("{}: its start is not laid into the page cache: {error}", device.display());
        }
        Err(_) => return,
    };
    let mut reads = index.startup_reads().peekable();
    while let Some(first) = reads.next() {
        let mut batch = vec![first];
        while let Some(next) = reads.next_if(|next| next.chunk == first.chunk && batch.len() < BATCH) {
            batch.push(next);
        }
        let Some(chunk) = index.chunk(first.chunk) else { continue };
        let is_local = tokio::select! {
            biased;
            () = told(&mut stop) => return,
            is_local = fetcher.arrival(chunk.digest) => is_local,
        };
        let file_system = Arc::clone(&file_system);
        if is_local {
            match spawn_blocking(move || file_system.will_need(&batch)).await {
                Ok(bytes) => laid.fetch_add(bytes, Ordering::Relaxed),
                Err(_) => return,
            };
        }
    }
}

async fn told(stop: &mut watch::Receiver<bool>) {
    // Nobody left who could tell is the same.
    drop(stop.wait_for(|stop| *stop).await);
}

/// A mounted file system and its device.
struct FileSystem {
    device: File,
    root: File,
}

impl FileSystem {
    fn open(path: &Path) -> io::Result<Self> {
        let device = File::open(path)?;
        let context = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", path)?;
        // As it is mounted already: the kernel takes that superblock only if both can't be written.
        for flag in ["ro", "noload"] {
            fsconfig_set_flag(&context, flag)?;
        }
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let root = openat(&mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { device, root: File::from(root) })
    }

    /// Tells the kernel to read what is not in its page cache; of how many bytes. What it can't is left to the program.
    fn will_need(&self, reads: &[StartupRead]) -> u64 {
        let mut bytes = 0;
        let mut last: Option<(u32, File)> = None;
        for read in reads {
            let told = match read.place {
                Place::Device => will_need(&self.device, read),
                Place::File { inode } => {
                    if last.as_ref().is_none_or(|(number, _)| *number != inode) {
                        last = open_file(&self.root, inode).ok().map(|file| (inode, file));
                    }
                    last.as_ref().map_or(Ok(0), |(_, file)| will_need(file, read))
                }
            };
            match told {
                Ok(told) => bytes += told,
                Err(error) => tracing::debug!("laying {read:?} into the page cache: {error}"),
            }
        }
        bytes
    }
}

fn will_need(file: &File, read: &StartupRead) -> io::Result<u64> {
    let (first, len) = (u64::from(read.first) * u64::from(BLOCK), u64::from(read.blocks) * u64::from(BLOCK));
    fadvise(file, first, NonZeroU64::new(len), Advice::WillNeed)?;
    Ok(len)
}
