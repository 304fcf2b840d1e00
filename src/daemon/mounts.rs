//! Mounting a device; what is mounted where, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)), and who uses it.

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;

use super::control::{Attached, Kind, Problem};
use crate::error::{Error, Result};

/// Users of a mount that are named; more are not.
const USERS_MAX: usize = 5;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub dir: PathBuf,
    /// What is mounted: a device's path for file systems on one.
    pub source: PathBuf,
    /// `major:minor` of the device.
    pub device: String,
}

/// What an ext4 image is mounted with: as many inode table blocks ahead as the daemon says, and no journal to load where
/// nothing can be written (in Linux' Documentation/filesystems/ext4/).
fn ext4_options(attached: &Attached) -> String {
    let load = if attached.device.read_only { "noload," } else { "" };
    format!("{load}inode_readahead_blks={}", attached.inode_readahead_blks)
}

/// Mounts the device on `dir`, read-only unless it can be written.
///
/// # Errors
/// A device without ext4, or what mount(2) says.
pub fn mount(attached: &Attached, dir: &Path) -> Result<(), Problem> {
    let device = &attached.device.device;
    if attached.file_system != "ext4" {
        let message = format!(
            "mounting {}: the image's file system is {:?}, not ext4",
            attached.device.image, attached.file_system
        );
        return Err(
            Problem::new(Kind::Unsupported, message).hint("`firstread attach` it and mount the device yourself")
        );
    }
    let data = CString::new(ext4_options(attached)).unwrap_or_default();
    let access = if attached.device.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    rustix::mount::mount(device, dir, "ext4", access | MountFlags::NOATIME, Some(data.as_c_str())).map_err(|errno| {
        let error = std::io::Error::from(errno);
        let message =
            format!("mounting {} ({}) on {}: {error}", device.display(), attached.device.image, dir.display());
        let hint = match errno {
            rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => "mounting needs root (CAP_SYS_ADMIN)",
            _ => "`dmesg` has the kernel's reason, `firstread verify` checks the image",
        };
        Problem::new(Kind::Failed, message).hint(hint)
    })
}

/// The mounts of this process's mount namespace, in the order they were made.
///
/// # Errors
/// What the system says.
pub fn all() -> Result<Vec<Mount>> {
    let text = fs::read("/proc/self/mountinfo").map_err(|error| Error::io("reading /proc/self/mountinfo", error))?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(parse).collect())
}

/// The mount on the directory `dir`, which has no symbolic links; the topmost if there are several.
///
/// # Errors
/// What the system says.
pub fn at(dir: &Path) -> Result<Option<Mount>> {
    Ok(all()?.into_iter().rev().find(|mount| mount.dir == dir))
}

/// Processes that use the mount on `dir`: `python3 (process 812)`, … As far as this process may look.
#[must_use]
pub fn users(dir: &Path) -> Vec<String> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let numbered = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        uses(&entry.path(), dir).then(|| {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            format!("{} (process {pid})", name.trim_end())
        })
    };
    processes.filter_map(numbered).take(USERS_MAX).collect()
}

fn uses(process: &Path, dir: &Path) -> bool {
    // Only the links' texts are read: to follow them would ask the file system, which may be the one that hangs.
    let inside = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(dir));
    let open = || fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    inside(process.join("cwd"))
        || inside(process.join("root"))
        || inside(process.join("exe"))
        || open().any(|entry| inside(entry.path()))
}

fn parse(line: &[u8]) -> Option<Mount> {
    // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let separator = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    Some(Mount {
        dir: unescape(fields.get(4)?).into(),
        source: unescape(fields.get(separator + 2)?).into(),
        device: String::from_utf8_lossy(fields.get(2)?).into_owned(),
    })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(text: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// The number N of a `/dev/loopN`.
#[must_use]
pub fn loop_number(device: &Path) -> Option<u32> {
    let name = device.strip_prefix("/dev").ok()?.as_os_str().as_bytes();
    std::str::from_utf8(name.strip_prefix(b"loop")?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let mount =
            parse(b"36 35 7:0 / /mnt/a\\040b ro,noatime master:1 shared:2 - ext4 /dev/loop0 ro,noload").unwrap();
        let expected = Mount { dir: "/mnt/a b".into(), source: "/dev/loop0".into(), device: "7:0".into() };
        assert_eq!(mount, expected);
        assert_eq!(parse(b"36 35 7:0 / /mnt"), None);
        assert_eq!(parse(b""), None);
        assert_eq!(loop_number(Path::new("/dev/loop12")), Some(12));
        assert_eq!(loop_number(Path::new("/dev/loop-control")), None);
    }

    #[test]
    fn this_process_uses_its_directory() {
        let dir = std::env::current_dir().unwrap();
        assert!(uses(Path::new("/proc/self"), &dir));
        assert!(!uses(Path::new("/proc/self"), Path::new("/nowhere")));
        assert!(at(Path::new("/proc")).unwrap().is_some());
    }
}
