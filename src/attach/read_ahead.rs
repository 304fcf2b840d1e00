//! Read-ahead of a block device: how much the kernel reads around what was asked for. It is set on purpose on every
//! attach, since devices keep the value of their last user.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Read-ahead in KiB of a device that does not start, or has started: the kernel's own default.
pub const READY_KB: u32 = 128;

/// Sets the read-ahead of the block device at `path` in KiB.
///
/// # Errors
/// What the system says.
pub fn set(path: &Path, kib: u32) -> Result<()> {
    let setting = setting(path);
    fs::write(&setting, kib.to_string()).map_err(|error| Error::io(format!("write {}", setting.display()), error))
}

/// The read-ahead of the block device at `path` in KiB.
///
/// # Errors
/// What the system says.
pub fn get(path: &Path) -> Result<u32> {
    let setting = setting(path);
    let text = fs::read_to_string(&setting);
    let text = text.map_err(|error| Error::io(format!("read {}", setting.display()), error))?;
    text.trim().parse().map_err(|_| Error::invalid(setting.display().to_string(), format!("it says {text:?}")))
}

fn setting(path: &Path) -> PathBuf {
    Path::new("/sys/class/block").join(path.file_name().unwrap_or_default()).join("queue/read_ahead_kb")
}
