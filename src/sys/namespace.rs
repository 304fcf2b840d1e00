//! A mount namespace of one's own, so that a server holds nobody's mounts busy.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use crate::error::{Error, Result};

/// Mounts at or below these are kept, whoever needs them: the kernel's own file systems.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Moves the calling thread, and the threads it starts from now on, into a mount namespace of its own, and detaches in
/// it every mount but the root, the kernel's file systems, and those that a path of `keep` lies on.
///
/// Nothing that is mounted later outside becomes visible inside, nor the other way around. Call this before any other
/// thread is started: a thread that exists already stays where it is.
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
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed("make all mounts private"))?;
    let keep: Vec<PathBuf> =
        keep.iter().map(|path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf())).collect();
    let table = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| Error::io("read /proc/self/mountinfo", error))?;
    // Later mounts may cover earlier ones: from the last to the first.
    for line in table.lines().rev() {
        let Some(point) = line.split(' ').nth(4).map(unescape) else { continue };
        if is_needed(&point, &keep) {
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

fn is_needed(point: &Path, keep: &[PathBuf]) -> bool {
    point == Path::new("/")
        || KERNEL.iter().any(|kernel| point.starts_with(kernel))
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
    fn needed_are_the_root_the_kernels_and_what_kept_paths_lie_on() {
        let keep = [PathBuf::from("/var/lib/firstread")];
        for point in ["/", "/proc", "/dev/pts", "/sys/fs/cgroup", "/var", "/var/lib/firstread"] {
            assert!(is_needed(Path::new(point), &keep), "{point}");
        }
        for point in ["/home", "/var/lib/firstread/mounts/a", "/var/lib/fir", "/process", "/mnt"] {
            assert!(!is_needed(Path::new(point), &keep), "{point}");
        }
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(r"/a\040b\134c"), Path::new(r"/a b\c"));
        assert_eq!(unescape(r"/x\04"), Path::new(r"/x\04"));
    }
}
