//! Who uses a block device: what a refused detach tells its user.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sys::namespace::unescape;

/// How long a detach waits for those who have the device open for a moment, as udev does.
const PASSERS_BY: Duration = Duration::from_secs(1);

/// One user of a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// It is mounted.
    Mount {
        /// Where, as the process sees it.
        point: PathBuf,
        /// A process in whose mount namespace it is, if that is not this process's.
        foreign: Option<String>,
    },
    /// Another block device lies on it.
    Device(String),
    /// A process has it open: name and pid.
    Process(String),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { point, foreign: None } => write!(f, "mounted on {}", point.display()),
            Self::Mount { point, foreign: Some(process) } => {
                write!(f, "mounted on {} in the mount namespace of {process}", point.display())
            }
            Self::Device(name) => write!(f, "used by the device {name}"),
            Self::Process(process) => write!(f, "open in {process}"),
        }
    }
}

/// The holders in one line, for error messages.
#[must_use]
pub fn describe(holders: &[Holder]) -> String {
    holders.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Finds the users of the block device at `path`. This process's own descriptors do not count. What may not be looked at
/// (another user's processes, without privileges) is left out.
#[must_use]
pub fn find(path: &Path) -> Vec<Holder> {
    let Ok(device) = fs::metadata(path).map(|found| found.rdev()) else { return Vec::new() };
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mut holders = Vec::new();
    let own = fs::read_link("/proc/self/ns/mnt").ok();
    let mut namespaces = HashSet::new();
    let mut processes = Vec::new();
    for pid in ["self".to_owned()].into_iter().chain(pids()) {
        let process = PathBuf::from("/proc").join(&pid);
        if let Ok(namespace) = fs::read_link(process.join("ns/mnt"))
            && namespaces.insert(namespace.clone())
        {
            let foreign = (own.as_ref() != Some(&namespace)).then(|| name(&pid));
            holders.extend(mounts(&process, &number, foreign.as_deref()));
        }
        if pid != "self" && pid != std::process::id().to_string() && has_open(&process, device) {
            processes.push(Holder::Process(name(&pid)));
        }
    }
    if let Some(device) = path.file_name()
        && let Ok(above) = fs::read_dir(Path::new("/sys/class/block").join(device).join("holders"))
    {
        holders.extend(above.flatten().map(|entry| Holder::Device(entry.file_name().to_string_lossy().into_owned())));
    }
    holders.extend(processes);
    holders
}

/// A path into the file system on the block device at `path`, if it is mounted: through the root directory of a process
/// that sees the mount, where this one does not.
#[must_use]
pub fn way_in(path: &Path) -> Option<PathBuf> {
    let device = fs::metadata(path).ok()?.rdev();
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mut namespaces = HashSet::new();
    for pid in ["self".to_owned()].into_iter().chain(pids()) {
        let process = PathBuf::from("/proc").join(&pid);
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if !namespaces.insert(namespace) {
            continue;
        }
        for holder in mounts(&process, &number, None) {
            let Holder::Mount { point, .. } = holder else { continue };
            let inside = process.join("root").join(point.strip_prefix("/").unwrap_or(&point));
            let way = if pid == "self" { point } else { inside };
            // Something else may be mounted over it.
            if fs::metadata(&way).is_ok_and(|found| found.dev() == device) {
                return Some(way);
            }
        }
    }
    None
}

/// Waits until nobody uses the block device at `path`: a second for processes that have it open, no time for mounts and
/// devices.
///
/// # Errors
/// [`Error::Busy`] that names who uses it.
pub(super) fn wait_until_unused(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PASSERS_BY;
    loop {
        let found = find(path);
        if found.is_empty() && !claimed(path) {
            return Ok(());
        }
        let lasting = found.iter().any(|holder| !matches!(holder, Holder::Process(_)));
        if lasting || Instant::now() >= deadline {
            return Err(busy(path, &found));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The error for a device that `found` use, or somebody who can't be found.
pub(super) fn busy(path: &Path, found: &[Holder]) -> Error {
    let unseen = || "by a mount, a device or a process that can't be seen from here".to_owned();
    let by = if found.is_empty() { unseen() } else { describe(found) };
    Error::Busy(format!("{} is in use: {by}", path.display()))
}

/// Whether a mount or another device has claimed the block device, in whatever namespace: open(2), O_EXCL.
fn claimed(path: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened: rustix::io::Result<OwnedFd> = rustix::fs::open(path, flags, Mode::empty());
    opened.is_err_and(|errno| errno == Errno::BUSY)
}

fn pids() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).collect()
}

fn name(pid: &str) -> String {
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{} (pid {pid})", command.trim_end())
}

/// Mounts of the device `number` ("major:minor") that a process sees.
fn mounts(process: &Path, number: &str, foreign: Option<&str>) -> Vec<Holder> {
    let table = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
    let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter(|fields| fields.get(2) == Some(&number))
        .filter_map(|fields| fields.get(4).map(|point| unescape(point)))
        .map(|point| Holder::Mount { point, foreign: foreign.map(ToOwned::to_owned) })
        .collect()
}

/// Whether a process has the device open. Only descriptors whose path begins with /dev are followed: a stat of anything
/// else may hang on a dead server.
fn has_open(process: &Path, device: u64) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().map(|entry| entry.path()).any(|descriptor| {
        fs::read_link(&descriptor).is_ok_and(|target| target.starts_with("/dev"))
            && fs::metadata(&descriptor)
                .is_ok_and(|found| found.file_type().is_block_device() && found.rdev() == device)
    })
}
