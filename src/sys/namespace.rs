//! Namespaces of one's own: for mounts, so that a server holds nobody's mounts busy, and for a whole container.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use crate::error::{Error, Result};

/// Devices that transports make; a server must not keep what is on them mounted.
const SERVED: [&str; 3] = ["/dev/loop", "/dev/nbd", "/dev/ublkb"];

/// How many devices are looked through that lie on one another.
const DEVICES_DEEP: u32 = 8;

/// Moves the calling thread, and the threads it starts from now on, into a mount namespace of its own, and detaches in
/// it every mount of a device as transports make them, but those that a path of `keep` lies on.
///
/// Mounts and unmounts outside still arrive here where they are shared (a layout or a socket may be on any file system),
/// none made here leaves. Call this before any other thread is started: a thread that exists already stays where it is.
///
/// # Errors
/// What the system says; EPERM without CAP_SYS_ADMIN.
pub fn enter_private_mount_namespace(keep: &[&Path]) -> Result<()> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |errno: rustix::io::Errno| Error::io(what, io::Error::from(errno))
    };
    // SAFETY: a new mount namespace changes what paths mean for this thread; no descriptor or memory is affected.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(failed("make a mount namespace"))?;
    // mount_namespaces(7): a slave receives what a shared mount does, and what was private stays so.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).map_err(failed("make all mounts slaves"))?;
    let keep: Vec<PathBuf> =
        keep.iter().map(|path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf())).collect();
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo")
        .map_err(|error| Error::io("read /proc/thread-self/mountinfo", error))?;
    // Later mounts may cover earlier ones: from the last to the first.
    for line in table.lines().rev() {
        let Some(point) = line.split(' ').nth(4).map(unescape) else { continue };
        let source = line.split_once(" - ").and_then(|(_, rest)| rest.split(' ').nth(1)).unwrap_or_default();
        if is_needed(&point, source, &keep) {
            continue;
        }
        if let Err(errno) = rustix::mount::unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // EINVAL: it went with the mount above it. Another one stays, at worst held busy.
            if errno != rustix::io::Errno::INVAL && errno != rustix::io::Errno::NOENT {
                tracing::warn!("detach {} from the own mount namespace: {errno}", point.display());
            }
        }
    }
    Ok(())
}

/// Moves the calling process into namespaces of its own for mounts, the network, host name, System V objects and control
/// groups, and the processes that it starts from now on into one for processes. No mount made in here is seen outside, nor
/// one made outside in here. Only for a process of one thread.
///
/// # Errors
/// What the system says; EPERM without CAP_SYS_ADMIN.
pub fn enter_container_namespaces() -> Result<()> {
    let failed = |errno: rustix::io::Errno| Error::io("make namespaces", io::Error::from(errno));
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWCGROUP;
    // SAFETY: the flags leave the descriptor table alone (no FILES), and no other thread exists whose paths would differ.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(failed)?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(failed)
}

/// Moves the calling process into a copy of its mount namespace. Only for a process of one thread.
///
/// # Errors
/// What the system says; EPERM without CAP_SYS_ADMIN.
pub fn enter_mount_namespace() -> Result<()> {
    let failed = |errno: rustix::io::Errno| Error::io("make a mount namespace", io::Error::from(errno));
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(failed)
}

/// Detaches, in the calling thread's mount namespace, every mount of the block devices at `devices`, and of devices that lie
/// on them. Mounts made elsewhere arrive where they are shared (see [`enter_private_mount_namespace`]): a server that kept
/// its own devices mounted could have to answer a request of theirs while it ends, and never end.
///
/// Only for a namespace of one's own.
///
/// # Errors
/// A table of mounts that can't be read.
pub fn detach_mounts_of(devices: &[PathBuf]) -> Result<()> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo")
        .map_err(|error| Error::io("read /proc/thread-self/mountinfo", error))?;
    let names: Vec<_> = devices.iter().filter_map(|path| path.file_name()).collect();
    for line in table.lines().rev() {
        let mut fields = line.split(' ').skip(2);
        let (Some(number), Some(point)) = (fields.next(), fields.nth(1)) else { continue };
        if !lies_on(&Path::new("/sys/dev/block").join(number), &names, DEVICES_DEEP) {
            continue;
        }
        let point = unescape(point);
        match rustix::mount::unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Gone with the mount above it, or unmounted outside meanwhile.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(errno) => tracing::warn!("detach {} from the own mount namespace: {errno}", point.display()),
        }
    }
    Ok(())
}

/// Whether the block device in sysfs is one of those with these names, or a device mapper's on one.
fn lies_on(device: &Path, names: &[&std::ffi::OsStr], deep: u32) -> bool {
    let Ok(found) = device.canonicalize() else { return false };
    if found.file_name().is_some_and(|name| names.contains(&name)) {
        return true;
    }
    let below = std::fs::read_dir(found.join("slaves"));
    deep > 0 && below.into_iter().flatten().flatten().any(|entry| lies_on(&entry.path(), names, deep - 1))
}

fn is_needed(point: &Path, source: &str, keep: &[PathBuf]) -> bool {
    !SERVED.iter().any(|device| source.starts_with(device))
        || point == Path::new("/")
        || keep.iter().any(|kept| kept.starts_with(point))
}

/// Undoes mountinfo's escapes: space, tab, line feed and backslash as three octal digits.
#[must_use]
pub fn unescape(field: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let value = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match value {
            Some(value) => {
                out.push(value);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_served_devices_go_and_not_those_that_kept_paths_lie_on() {
        let keep = [PathBuf::from("/var/lib/firstread")];
        for (point, source) in [("/", "/dev/loop0"), ("/var", "/dev/loop1"), ("/home", "/dev/sda1"), ("/tmp", "tmpfs")]
        {
            assert!(is_needed(Path::new(point), source, &keep), "{point}");
        }
        for (point, source) in
            [("/mnt", "/dev/loop0"), ("/var/lib/firstread/a", "/dev/ublkb3"), ("/var/lib/fir", "/dev/nbd1")]
        {
            assert!(!is_needed(Path::new(point), source, &keep), "{point}");
        }
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(r"/a\040b\134c"), Path::new(r"/a b\c"));
        assert_eq!(unescape(r"/x\04"), Path::new(r"/x\04"));
    }
}
