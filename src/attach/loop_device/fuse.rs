//! The FUSE file under a loop device: one file, `disk`, of the device's size.
//!
//! The file system is never mounted anywhere: it exists as a detached mount (`fsmount`, since 5.2; FUSE since 5.4) for
//! as long as somebody has its file open. So there is no mount point to make, to find busy or to leave behind, and when
//! the loop device lets go of the file, the session ends by itself.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL, WriteFlags,
};
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use tokio::runtime::Handle;

use crate::device::{Access, Device, DeviceFuture, Local, Zeroing};
use crate::error::{Error, Result};

/// Largest request in bytes: what the kernel allows by default (`fs.fuse.max_pages_limit` of 256 pages).
const READ_MAX: u32 = 1 << 20;
/// Asynchronous requests that the kernel has in flight: direct reads of a loop device are such. Together with
/// [`READ_MAX`] the bound of what misses can hold, 64 MiB.
const IN_FLIGHT: u16 = 64;
const ROOT: INodeNo = INodeNo(1);
const DISK: INodeNo = INodeNo(2);
const NAME: &str = "disk";
/// Modes of fallocate(2).
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 16;
/// The file's attributes never change.
const FOREVER: Duration = Duration::from_secs(1 << 30);

/// Starts a session with `threads` threads and opens its file. The session ends when the file's last user closes it.
///
/// # Errors
/// What the system says.
pub fn serve(
    device: Arc<dyn Device>,
    threads: usize,
    runtime: Handle,
    failing: Arc<AtomicBool>,
) -> Result<(BackgroundSession, OwnedFd)> {
    let channel = File::options().read(true).write(true).open("/dev/fuse");
    let channel = channel.map_err(|error| Error::io("open /dev/fuse", error))?;
    let access = device.access();
    let mount = detached_mount(&channel, access).map_err(|errno| Error::io("make a FUSE file system", errno.into()))?;
    let failed = |error: io::Error| Error::io("start the FUSE session", error);
    let disk = Disk { size: device.size(), device, runtime, failing, buffers: Mutex::default() };
    let mut config = Config::default();
    config.n_threads = Some(threads);
    config.clone_fd = true;
    let session = Session::from_fd(disk, channel.into(), SessionACL::Owner, config).map_err(failed)?;
    let session = session.spawn().map_err(failed)?;
    let mode = match access {
        Access::ReadOnly => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    let file = rustix::fs::openat(&mount, NAME, mode | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::io("open the FUSE file", errno.into()))?;
    Ok((session, file))
}

/// A FUSE file system on `channel` that is mounted nowhere.
fn detached_mount(channel: &File, access: Access) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let channel = channel.as_raw_fd().to_string();
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    for (key, value) in [
        ("source", "firstread"),
        ("subtype", "firstread"),
        ("fd", &channel),
        ("rootmode", "40000"),
        ("user_id", &user.to_string()),
        ("group_id", &group.to_string()),
        ("max_read", &READ_MAX.to_string()),
    ] {
        rustix::mount::fsconfig_set_string(&context, key, value)?;
    }
    rustix::mount::fsconfig_create(&context)?;
    let mut attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    if access == Access::ReadOnly {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The file system: a root directory with one file.
struct Disk {
    device: Arc<dyn Device>,
    size: u64,
    runtime: Handle,
    /// Whether every read is answered with an error.
    failing: Arc<AtomicBool>,
    /// Buffers for hits, one per thread that reads at the time; they keep the largest size they ever had.
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Disk {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, perm, size) = match ino {
            ROOT => (FileType::Directory, 0o500, 0),
            _ if self.device.access() == Access::ReadWrite => (FileType::RegularFile, 0o600, self.size),
            _ => (FileType::RegularFile, 0o400, self.size),
        };
        FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Disk {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it every direct read of the loop device waits for the one before.
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|_| io::Error::other("the kernel's FUSE has no asynchronous direct I/O"))?;
        let _ = config.set_max_write(READ_MAX);
        let _ = config.set_max_readahead(READ_MAX);
        let _ = config.set_max_background(IN_FLIGHT);
        let _ = config.set_congestion_threshold(IN_FLIGHT);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == ROOT && name == NAME {
            reply.entry(&FOREVER, &self.attributes(DISK), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(ino));
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if ino == DISK {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
        } else {
            reply.error(Errno::EISDIR);
        }
    }

    /// The kernel asks before it writes, for capabilities that the write would take away, until it hears that there are none.
    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    /// The loop device takes the block size for the granularity of its discards.
    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 0);
    }

    /// Every close of the loop device asks for it; what is to be durable is told by fsync.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.device.access() {
            Access::ReadOnly => reply.ok(),
            Access::ReadWrite => self.start(reply, |device| device.flush()),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if self.failing.load(Ordering::Relaxed) {
            reply.error(Errno::EIO);
            return;
        }
        // The kernel was told the largest request.
        let len = data.len() as u32;
        match self.device.write_local(offset, data) {
            Ok(Local::Done) => reply.written(len),
            Ok(Local::Missing) => {
                let (device, data) = (Arc::clone(&self.device), data.to_vec());
                self.runtime.spawn(async move {
                    match device.write_at(offset, &data).await {
                        Ok(()) => reply.written(len),
                        Err(error) => reply.error(Errno::from_i32(error.errno())),
                    }
                });
            }
            Err(error) => reply.error(Errno::from_i32(error.errno())),
        }
    }

    /// What the loop device makes of discards and of writes of zeros: which one it was can't be told, so that all become
    /// zeros.
    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, len: u64, mode: i32, reply: ReplyEmpty) {
        let how = match mode {
            _ if self.failing.load(Ordering::Relaxed) => return reply.error(Errno::EIO),
            mode if mode & PUNCH_HOLE != 0 => Zeroing::Hole,
            mode if mode & ZERO_RANGE != 0 => Zeroing::Allocated,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        self.start(reply, move |device| device.zero(offset, len, how));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if self.failing.load(Ordering::Relaxed) {
            reply.error(Errno::EIO);
            return;
        }
        let wanted = u64::from(size).min(self.size.saturating_sub(offset));
        let len = usize::try_from(wanted).unwrap_or(0);
        let mut buffer = self.buffers.lock().pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        match self.device.read_local(offset, &mut buffer[..len]) {
            Ok(Local::Done) => reply.data(&buffer[..len]),
            Ok(Local::Missing) => self.miss(offset, len, reply),
            Err(error) => reply.error(Errno::from_i32(error.errno())),
        }
        self.buffers.lock().push(buffer);
    }
}

impl Disk {
    /// Has the runtime do what has no data.
    fn start(&self, reply: ReplyEmpty, work: impl FnOnce(&dyn Device) -> DeviceFuture<'_, ()> + Send + 'static) {
        let device = Arc::clone(&self.device);
        self.runtime.spawn(async move {
            match work(device.as_ref()).await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(Errno::from_i32(error.errno())),
            }
        });
    }

    /// Fetches on the runtime. A task that the runtime drops on shutdown answers EIO by dropping the reply.
    fn miss(&self, offset: u64, len: usize, reply: ReplyData) {
        let device = Arc::clone(&self.device);
        self.runtime.spawn(async move {
            let mut data = vec![0; len];
            match device.read_at(offset, &mut data).await {
                Ok(()) => reply.data(&data),
                Err(error) => reply.error(Errno::from_i32(error.errno())),
            }
        });
    }
}
